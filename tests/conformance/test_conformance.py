"""`hfms conformance`: green for what is so, and nothing green by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from hfms_cli.conformance import checks
from hfms_cli.conformance.server import Server
from hfms_cli.conformance.suite import Colour, Verdict, all_checks, judge
from tests.conftest import MINILM, SMOLLM2

KEY = "k-0123456789abcdefghijkl"


async def verdicts_of(server: Server) -> dict[str, Verdict]:
    async with server:
        return {f"{check.group}: {check.name}": verdict async for check, (verdict,) in judge(all_checks(), [server])}


@contextlib.asynccontextmanager
async def answering(answer) -> AsyncIterator[str]:
    """A server that answers everything by one function."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_every_check_has_a_name_of_its_own_in_a_known_group():
    names = [(check.group, check.name) for check in all_checks()]
    assert len(names) == len({*names}) > 90
    assert {group for group, _ in names} == {*checks.GROUPS}


@pytest.mark.parametrize(
    "body",
    [{}, {"object": "list", "data": []}, {"choices": [{"index": 0}]}, {"choices": [], "usage": {}}, [], "text", None],
)
async def test_no_check_is_green_for_a_server_that_answers_always_the_same(body):
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body)

    async with answering(answer) as url:
        found = await verdicts_of(Server(url, "m", key=KEY, embedding_model="m", rerank_model="m"))
    assert [name for name, verdict in found.items() if verdict.colour is Colour.GREEN] == []


async def test_a_server_that_refuses_everything_is_green_for_refusals_alone():
    async def answer(request: web.Request) -> web.Response:
        error = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
        return web.json_response({"error": error}, status=400)

    async with answering(answer) as url:
        found = await verdicts_of(Server(url, "m", embedding_model="m", rerank_model="m"))
    green = {name for name, verdict in found.items() if verdict.colour is Colour.GREEN}
    assert green == {
        "streaming: a wrong request has its status before any event",
        "errors: an error has message, type, param and code",
        "errors: a body that is no JSON is 400",
        "errors: missing messages are 400",
        "errors: a missing prompt is 400",
        "errors: an unknown role is 400",
        "errors: a temperature beyond 2 is 400",
        "errors: a text for a number is 400",
        "embeddings: nothing to embed is 400",
    }


async def test_a_connection_that_breaks_is_red_and_not_an_error_of_ours():
    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with answering(answer) as url:
        found = await verdicts_of(Server(url, "m"))
    assert {v.colour for name, v in found.items() if name.startswith("chat")} == {Colour.RED}
    assert found["chat: answers in OpenAI's shape"].why.startswith("the connection broke")


@pytest.mark.real_model
async def test_hfms_is_red_in_nothing(serve):
    toml = '[models]\ndtype = "float32"\n[engine]\norder = ["openvino", "transformers", "embeddings"]'
    async with serve(SMOLLM2, MINILM, toml=toml, env={"HFMS_ADMIN_API_KEY": KEY}) as server:
        found = await verdicts_of(Server(server.url, SMOLLM2, key=KEY, embedding_model=MINILM))
    red = {name: verdict.why for name, verdict in found.items() if verdict.colour is Colour.RED}
    assert red == {}
    assert found["errors: no key is 401, where the server has keys"].colour is Colour.GREEN


async def verb(*arguments: str, **env: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hfms_cli", "conformance", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_verb_prints_a_table_or_json_and_its_status_tells_of_red(serve, environ):
    async with serve("echo:a", "echo:b", env={"HFMS_API_KEY": KEY}) as server:
        environ = environ | {"HFMS_API_KEY": KEY}
        status, out, _ = await verb(server.url, "--model", "echo:a", "--group", "models", **environ)
        assert status == 0
        assert "4 ok, 0 failed, 0 skipped" in out
        assert KEY not in out
        status, out, _ = await verb(server.url + "/v1", "--group", "sampling", "--json", **environ)
        assert status == 1  # the echo engine has no stop strings
        data = json.loads(out)
        results = {check["name"]: check["results"][0] for check in data["checks"]}
        stop = results["ends before a stop string, which is not in the text"]
        assert (stop["verdict"], data["servers"][0]["model"]) == ("red", "echo:a")
        assert "`stop`" in stop["why"]
        side = ["--compare", server.url, "--compare-model", "echo:b", "--group", "models"]
        status, out, _ = await verb(server.url, *side, **environ)
        assert status == 0  # only the first server's verdicts count
        assert "(echo:b): " in out
        assert "FAILED" in out  # the key is not sent to a server that it was not given for
        status, out, _ = await verb(server.url, *side, "--compare-key-env", "HFMS_API_KEY", **environ)
        assert (status, "FAILED" in out) == (0, False)


async def test_the_verb_says_what_is_wrong_with_its_options(environ, free_port):
    assert (await verb("http://127.0.0.1:1", "--group", "poems", **environ))[0] == 2
    assert (await verb("http://127.0.0.1:1", "--key-env", "NOT_SET", **environ))[0] == 2
    status, _, err = await verb(f"http://127.0.0.1:{free_port}", **environ)
    assert (status, "no server answers" in err) == (3, True)
