"""The HTTP surface over the echo engine: shapes, streams, errors. Real sockets, a real worker process."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import struct

import pytest

CHAT = {"model": "echo:a", "messages": [{"role": "user", "content": "one two three"}]}


async def events(response) -> list[str]:
    """The data of each event, exactly as sent."""
    body = (await response.read()).decode()
    assert body.endswith("\n\n")
    lines = body.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def test_chat_answers_in_openais_shape(serve):
    async with serve("echo:a") as server:
        status, body = await server.post("/v1/chat/completions", CHAT)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "echo:a"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "one two three", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


async def test_chat_stream_is_role_then_text_then_reason_then_usage_then_done(serve):
    async with serve("echo:a") as server:
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        async with server.session.post(server.url + "/v1/chat/completions", json=body) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            *chunks, last = await events(response)
    assert last == "[DONE]"
    chunks = [json.loads(c) for c in chunks]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    *deltas, usage = chunks
    assert [c["choices"][0]["delta"] for c in deltas] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "one"},
        {"content": " two"},
        {"content": " three"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in deltas] == [None, None, None, None, "stop"]
    assert all(c["usage"] is None for c in deltas)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


async def test_continuous_usage_stats_tell_the_usage_in_every_event(serve):
    async with serve("echo:a") as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"model": "echo:a", "prompt": "a b c", "stream": True, "stream_options": options}
        async with server.session.post(server.url + "/v1/completions", json=body) as response:
            chunks = [json.loads(e) for e in (await events(response))[:-1]]
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]
    assert [c["usage"]["prompt_tokens"] for c in chunks] == [3, 3, 3, 3]
    assert chunks[-1]["choices"] == []


async def test_completions_take_every_form_of_prompt_and_number_the_choices(serve):
    async with serve("echo:a") as server:
        for prompt, texts in (
            ("a b", ["a b"]),
            (["a", "b c"], ["a", "b c"]),
            ([7, 8], ["7 8"]),
            ([[7], [8, 9]], ["7", "8 9"]),
        ):
            status, body = await server.post("/v1/completions", {"model": "echo:a", "prompt": prompt, "n": 2})
            assert status == 200
            assert body["object"] == "text_completion"
            assert [c["text"] for c in body["choices"]] == [t for t in texts for _ in range(2)]
            assert [c["index"] for c in body["choices"]] == list(range(2 * len(texts)))


async def test_completions_stop_after_16_tokens_by_default_and_say_length(serve):
    async with serve("echo:a") as server:
        status, body = await server.post("/v1/completions", {"model": "echo:a", "prompt": "w " * 40})
    assert status == 200
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16


async def test_embeddings_are_the_same_as_floats_and_as_base64(serve):
    async with serve("echo:a") as server:
        body = {"model": "echo:a", "input": ["x", "y"]}
        _, floats = await server.post("/v1/embeddings", body)
        _, packed = await server.post("/v1/embeddings", body | {"encoding_format": "base64"})
    assert [d["index"] for d in floats["data"]] == [0, 1]
    for one, other in zip(floats["data"], packed["data"], strict=True):
        raw = base64.b64decode(other["embedding"])
        assert one["embedding"] == pytest.approx(struct.unpack(f"<{len(raw) // 4}f", raw))
    assert floats["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


async def test_models_lists_what_is_served_and_an_unknown_one_is_404_with_close_matches(serve):
    async with serve("echo:alpha") as server:
        status, body = await server.get("/v1/models")
        assert (status, [m["id"] for m in body["data"]]) == (200, ["echo:alpha"])
        status, body = await server.get("/v1/models/echo:alpha")
        assert (status, body["id"], body["object"]) == (200, "echo:alpha", "model")
        status, body = await server.get("/v1/models/echo:alpa")
        assert status == 404
        assert body["error"]["code"] == "model_not_found"
        assert "`echo:alpha`" in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"]}, "model", "missing_parameter"),
        ("/v1/chat/completions", CHAT | {"messages": []}, "messages", "invalid_value"),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "wizard", "content": ""}]},
            "messages[0].role",
            "invalid_value",
        ),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"temperature": 2.5}, "temperature", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"seed": 2**70}, "seed", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"logit_bias": {str(2**70): 1}}, "logit_bias", "invalid_value"),
        ("/v1/completions", {"model": "echo:a", "prompt": [5, 2**70]}, "prompt[1]", "invalid_value"),
        ("/v1/embeddings", {"model": "echo:a", "input": [[5, -1]]}, "input[0][1]", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"temperature": "hot"}, "temperature", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"stream": 0}, "stream", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 0}, "max_tokens", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"n": 0}, "n", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"stop": ["a"] * 17}, "stop", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"stop": ""}, "stop", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"frobnicate": 1}, "frobnicate", "unsupported_parameter"),
        ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools[0].function", "missing_parameter"),
        ("/v1/chat/completions", CHAT | {"logprobs": 1}, "logprobs", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        (
            "/v1/chat/completions",
            CHAT | {"response_format": {"type": "json_object"}},
            "response_format",
            "unsupported_parameter",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        ("/v1/completions", {"model": "echo:a", "prompt": []}, "prompt", "invalid_value"),
        ("/v1/completions", {"model": "echo:a", "prompt": ["a", 1]}, "prompt", "invalid_value"),
        ("/v1/completions", {"model": "echo:a", "prompt": [-1]}, "prompt[0]", "invalid_value"),
        ("/v1/completions", {"model": "echo:a", "prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        ("/v1/completions", {"model": "echo:a", "prompt": "a", "n": 3, "best_of": 2}, "best_of", "invalid_value"),
        (
            "/v1/completions",
            {"model": "echo:a", "prompt": "a", "stream": True, "best_of": 2},
            "best_of",
            "invalid_value",
        ),
        ("/v1/completions", {"model": "echo:a", "prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ("/v1/completions", {"model": "echo:a", "prompt": "a", "echo": True, "suffix": "b"}, "suffix", "invalid_value"),
        (
            "/v1/completions",
            {"model": "echo:a", "prompt": "a", "stop_token_ids": [-1]},
            "stop_token_ids[0]",
            "invalid_value",
        ),
        ("/v1/completions", {"model": "echo:a", "prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ("/v1/embeddings", {"model": "echo:a", "input": {"a": 1}}, "input", "invalid_value"),
        ("/v1/embeddings", {"model": "echo:a", "input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ("/v1/rerank", {"model": "echo:a", "documents": ["a"]}, "query", "missing_parameter"),
        ("/v1/rerank", {"model": "echo:a", "query": ["q"], "documents": ["a"]}, "query", "invalid_value"),
        ("/v1/rerank", {"model": "echo:a", "query": "q", "documents": []}, "documents", "invalid_value"),
        ("/v1/rerank", {"model": "echo:a", "query": "q", "documents": [1]}, "documents[0]", "invalid_value"),
        ("/v1/rerank", {"model": "echo:a", "query": "q", "documents": [{}]}, "documents[0].text", "missing_parameter"),
        ("/v1/rerank", {"model": "echo:a", "query": "q", "documents": ["a"], "top_n": 0}, "top_n", "invalid_value"),
        (
            "/v1/rerank",
            {"model": "echo:a", "query": "q", "documents": ["a"], "max_chunks_per_doc": 1},
            "max_chunks_per_doc",
            "unsupported_parameter",
        ),
        ("/v1/score", {"model": "echo:a", "text_1": "a"}, "text_2", "missing_parameter"),
        ("/v1/score", {"model": "echo:a", "text_1": [], "text_2": "a"}, "text_1", "invalid_value"),
        ("/v1/score", {"model": "echo:a", "text_1": ["a", "b"], "text_2": "a"}, "text_1", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"stop": ["x"]}, "stop", "invalid_value"),  # refused by the engine itself
    ],
)
async def test_a_bad_field_is_400_and_is_named(serve, path, body, param, code):
    async with serve("echo:a") as server:
        status, answer = await server.post(path, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)


async def test_values_that_ask_for_nothing_are_taken_as_clients_send_them(serve):
    nothing = {
        "tools": [],
        "tool_choice": None,
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": None,
        "store": False,
        "n": 1,
        "user": "u",
    }
    async with serve("echo:a") as server:
        status, _ = await server.post("/v1/chat/completions", CHAT | nothing)
    assert status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v1/nothing", 404, "unknown_url"), ("GET", "/v1/chat/completions", 405, "method_not_allowed")],
)
async def test_unknown_routes_and_methods_get_the_envelope(serve, method, path, status, code):
    async with (
        serve() as server,
        server.session.request(method, server.url + path, headers={"X-Request-Id": "mine-1"}) as response,
    ):
        assert response.status == status
        assert (await response.json())["error"]["code"] == code
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers.get("Allow") == ("POST" if status == 405 else None)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b'{"model": "a", "messages": NaN}', b'{"chat_template_kwargs": {"a": ' + b"[" * 100_000],
)
async def test_a_body_that_is_no_json_is_400(serve, raw):
    async with serve() as server:
        status, body = await server.request("POST", "/v1/chat/completions", data=raw)
    assert (status, body["error"]["code"]) == (400, "invalid_json")


async def test_a_body_over_the_limit_is_413(serve):
    async with serve(toml="[server]\nmax_body_bytes = 2048") as server:
        status, body = await server.post("/v1/completions", {"model": "m", "prompt": "x" * 4096})
    assert (status, body["error"]["code"]) == (413, "body_too_large")


async def test_a_request_id_with_strange_characters_is_replaced(serve):
    async with (
        serve() as server,
        server.session.get(server.url + "/health", headers={"X-Request-Id": "a b\tc"}) as response,
    ):
        assert response.headers["x-request-id"].startswith("req-")


async def test_a_prompt_that_does_not_fit_is_400_context_length_exceeded_also_when_streaming(serve):
    async with serve("echo:a") as server:
        for stream in (False, True):
            body = {"model": "echo:a", "prompt": "w " * 40_000, "stream": stream}
            status, answer = await server.post("/v1/completions", body)
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


async def test_kill_9_mid_stream_ends_with_an_error_event_then_503_then_200(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server:
        (model,) = server.runtime.pool.models()
        body = CHAT | {"stream": True, "ignore_eos": True}
        async with server.session.post(server.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200
            await response.content.readline()
            os.kill(model.host.pid, signal.SIGKILL)
            data = (await response.content.read()).decode().strip().split("\n\n")
        error = json.loads(data[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_died")
        async with server.session.post(server.url + "/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
        status, _ = await server.get("/ready")
        assert status == 503
        async with asyncio.timeout(20):
            while (await server.post("/v1/chat/completions", CHAT))[0] != 200:
                await asyncio.sleep(0.05)
        assert (await server.get("/ready"))[0] == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_place_in_the_engine(serve, stream):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5\nmax_batch = 1") as server:
        (model,) = server.runtime.pool.models()
        body = CHAT | {"stream": stream, "ignore_eos": True, "max_tokens": 30_000}
        gone = asyncio.create_task(server.post("/v1/chat/completions", body))
        async with asyncio.timeout(10):
            while not model.host.running:
                await asyncio.sleep(0.01)
        gone.cancel()
        async with asyncio.timeout(10):
            assert (await server.post("/v1/chat/completions", CHAT))[0] == 200
        assert model.host.running == 0
        assert server.runtime.in_flight == 0


async def test_draining_refuses_new_calls_and_lets_those_in_flight_finish(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server:
        long = asyncio.create_task(
            server.post("/v1/completions", {"model": "echo:a", "prompt": "w " * 60, "max_tokens": 60})
        )
        async with asyncio.timeout(10):
            while not server.runtime.in_flight:
                await asyncio.sleep(0.01)
        server.runtime.draining = True
        async with server.session.post(server.url + "/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
        assert (await server.get("/ready"))[0] == 503
        status, body = await long
        assert (status, body["usage"]["completion_tokens"]) == (200, 60)


async def test_health_ready_status_and_metrics_tell_the_truth(serve):
    async with serve() as server:
        assert (await server.get("/health"))[0] == 200
        status, body = await server.get("/ready")
        assert status == 503
        assert "no model is loaded" in body["error"]["message"]
    async with serve("echo:a") as server:
        assert (await server.get("/ready"))[0] == 200
        await server.post("/v1/chat/completions", CHAT)
        await server.post("/v1/chat/completions", CHAT | {"model": "x" * 50})
        _, status = await server.get("/status")
        assert status["ready"] is True
        assert [m["status"]["value"] for m in status["models"]] == ["loaded"]
        assert {h["name"] for h in status["hardware"]} >= {"cpu", "cuda"}
        assert status["middleware"]["auth"]["required"] is False
        async with server.session.get(server.url + "/metrics") as response:
            text = await response.text()
    assert 'hfms_requests_total{endpoint="/v1/chat/completions",model="echo:a",status="200"} 1.0' in text
    assert 'hfms_requests_total{endpoint="/v1/chat/completions",model="",status="404"} 1.0' in text
    assert 'hfms_prompt_tokens_total{model="echo:a"} 3.0' in text
    assert 'hfms_generation_tokens_total{model="echo:a"} 3.0' in text
    assert "hfms_models_loaded 1.0" in text
    assert 'hfms_time_to_first_token_seconds_count{model="echo:a"} 1.0' in text
    assert "xxxx" not in text


async def test_metrics_can_be_switched_off(serve):
    async with serve(env={"HF_SERVER_ENABLE_METRICS": "false"}) as server:
        assert (await server.get("/metrics"))[0] == 404


async def test_the_access_line_has_tokens_and_timings_and_never_the_prompt(serve, capsys):
    async with serve("echo:a") as server:
        secret = "my-secret-prompt"
        body = {"model": "echo:a", "prompt": secret, "stream": True}
        async with server.session.post(server.url + "/v1/completions?api_key=k123", json=body) as response:
            await response.read()
    logged = "".join(capsys.readouterr())
    (line,) = [x for x in logged.splitlines() if "/v1/completions" in x]
    plain = re.sub(r"\x1b\[\d+m", "", line)
    assert "completion_tokens=1" in plain
    assert re.search(r"first_token_seconds=\d", plain)
    assert secret not in logged
    assert "k123" not in logged
