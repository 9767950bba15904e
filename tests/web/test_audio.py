"""`/v1/audio/transcriptions` and `/v1/audio/translations`, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import re

import aiohttp
import openai
import pytest


def client(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


WORDS = b"one two three"


async def test_openai_client_gets_every_format(serve):
    async with serve("echo:a") as server:
        ask = client(server).audio.transcriptions.create
        plain = await ask(model="echo:a", file=WORDS)
        assert plain.text == "one two three"
        assert (plain.usage.type, plain.usage.seconds) == ("duration", 3.0)
        assert await ask(model="echo:a", file=WORDS, response_format="text") == "one two three\n"
        srt = await ask(model="echo:a", file=WORDS, response_format="srt")
        assert srt.startswith("1\n00:00:00,000 --> 00:00:01,000\none\n\n2\n")
        vtt = await ask(model="echo:a", file=WORDS, response_format="vtt")
        assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\none\n\n")
        verbose = await ask(
            model="echo:a", file=WORDS, response_format="verbose_json", timestamp_granularities=["segment"]
        )
        assert (verbose.language, float(verbose.duration), verbose.text) == ("english", 3.0, "one two three")
        assert [(s.id, s.seek, s.start, s.text) for s in verbose.segments] == [
            (0, 0, 0, "one"),
            (1, 100, 1, " two"),
            (2, 200, 2, " three"),
        ]
        translated = await client(server).audio.translations.create(model="echo:a", file=WORDS)
        assert translated.text == "one two three"


async def test_openai_client_reads_a_stream(serve):
    async with serve("echo:a") as server:
        stream = await client(server).audio.transcriptions.create(model="echo:a", file=WORDS, stream=True)
        events = [event async for event in stream]
    assert [e.type for e in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    assert "".join(e.delta for e in events[:-1]) == events[-1].text == "one two three"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "echo:a"}, "file"),
        ({"file": WORDS}, "model"),
        ({"file": b"", "model": "echo:a"}, "file"),
        ({"file": WORDS, "model": "echo:a", "response_format": "diarized_json"}, "response_format"),
        ({"file": WORDS, "model": "echo:a", "temperature": "2"}, "temperature"),
        ({"file": WORDS, "model": "echo:a", "include[]": "logprobs"}, "include"),
        ({"file": WORDS, "model": "echo:a", "chunking_strategy": "auto"}, "chunking_strategy"),
        ({"file": WORDS, "model": "echo:a", "timestamp_granularities[]": "segment"}, "timestamp_granularities[]"),
        ({"file": WORDS, "model": "echo:a", "stream": "true", "response_format": "srt"}, "response_format"),
        ({"file": WORDS, "model": "echo:a", "surprise": "1"}, "surprise"),
    ],
)
async def test_a_wrong_field_is_named(serve, fields, param):
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, value, filename="a.wav" if name == "file" else None)
    async with serve("echo:a") as server:
        status, body = await server.request("POST", "/v1/audio/transcriptions", data=form)
    assert (status, body["error"]["param"]) == (400, param), body


async def test_times_of_words_are_refused_by_name(serve):
    async with serve("echo:a") as server:
        with pytest.raises(openai.BadRequestError) as caught:
            await client(server).audio.transcriptions.create(
                model="echo:a", file=WORDS, response_format="verbose_json", timestamp_granularities=["word"]
            )
    assert caught.value.param == "timestamp_granularities[]"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_file_beyond_the_limit_is_413_whether_or_not_its_length_was_declared(serve, declared):
    async with serve("echo:a", toml="[server]\nmax_body_bytes = 4096") as server:
        form = aiohttp.FormData()
        form.add_field("model", "echo:a")
        form.add_field("file", bytes(10_000), filename="a.wav")
        chunked = {} if declared else {"chunked": True}
        status, body = await server.request("POST", "/v1/audio/transcriptions", data=form(), **chunked)
    assert (status, body["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{}", "application/json"),
        (b"nothing of the kind", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data"),
        (b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\nhalf", "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\nno name\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    ],
)
async def test_what_is_no_form_is_a_400(serve, body, kind):
    async with serve("echo:a") as server:
        status, answer = await server.request(
            "POST", "/v1/audio/transcriptions", data=body, headers={"Content-Type": kind}
        )
    assert status == 400, answer


async def test_other_models_say_what_they_can_do(serve, tmp_path):
    pytest.importorskip("torch")
    from tests.engines.sentences import tiny_bert

    async with serve(str(tiny_bert(tmp_path / "bert"))) as server:
        _, models = await server.get("/v1/models")
        with pytest.raises(openai.BadRequestError, match="cannot write down speech; it can make embeddings"):
            await client(server).audio.transcriptions.create(model=models["data"][0]["id"], file=WORDS)


@pytest.fixture
def whisper(tmp_path) -> str:
    for package in ("torch", "transformers", "soundfile", "soxr"):
        pytest.importorskip(package)
    from tests.engines.speeches import tiny_whisper

    return str(tiny_whisper(tmp_path / "whisper"))


async def test_a_real_whisper_hears_refuses_and_stops_when_its_caller_leaves(serve, whisper):
    from tests.engines.speeches import recording

    async with serve(whisper) as server:
        _, models = await server.get("/v1/models")
        (model,) = models["data"]
        assert model["tasks"] == ["transcribe"]
        ask = client(server).audio.transcriptions.create
        verbose = await ask(model=model["id"], file=recording(40, format="FLAC"), response_format="verbose_json")
        plain = await ask(model=model["id"], file=recording(40, format="FLAC"))
        assert plain.text == verbose.text
        assert len(verbose.segments) > 1
        assert float(verbose.duration) == 40.0
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(model=model["id"], file=b"no recording at all")
        assert (caught.value.param, caught.value.code) == ("file", "invalid_audio")
        status, body = await server.post("/v1/completions", {"model": model["id"], "prompt": "a"})
        assert (status, body["error"]["param"]) == (400, "model")

        stream = await ask(model=model["id"], file=recording(600, format="FLAC"), stream=True)
        async for _ in stream:
            break
        await stream.close()
        (host,) = (r.host for m in server.runtime.pool.models() for r in m.replicas)
        async with asyncio.timeout(30):
            while host.outstanding:
                await asyncio.sleep(0.01)
        assert (await ask(model=model["id"], file=recording(1))).text


async def test_recordings_are_not_in_the_log(serve, capsys):
    async with serve("echo:a") as server:
        await client(server).audio.transcriptions.create(model="echo:a", file=b"my-secret words", prompt="my-secret")
    logged = "".join(capsys.readouterr())
    (line,) = [x for x in logged.splitlines() if "/v1/audio/transcriptions" in x]
    assert re.search(r"audio_seconds\W", line)
    assert "my-secret" not in logged
