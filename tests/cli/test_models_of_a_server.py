"""`hfms models ps|load|unload`: what is sent to a server, and what is made of its answers."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from hfms_cli.cli import models
from hfms_cli.cli.client import Client, local_url, server_root
from hfms_cli.config import ServerConfig
from hfms_cli.errors import ConfigError

LOADED = {
    "id": "org/name",
    "status": {"value": "loaded"},
    "aliases": ["mine"],
    "engine": "transformers",
    "device": "cpu",
    "dtype": "float32",
    "context_length": 2048,
    "memory_bytes": 2**30,
}
LOADING = {"id": "big", "status": {"value": "loading", "progress": 0.25}, "aliases": []}
FAILED = {"id": "bad", "status": {"value": "failed", "reason": "no \x1b[2Jroom"}, "aliases": []}
ON_DISK = {"id": "idle", "status": {"value": "unloaded"}, "aliases": []}


@pytest.fixture
def states(server):
    server.replies["GET", "/models"] = (200, {"object": "list", "data": [LOADED, LOADING, FAILED, ON_DISK]})
    return server


def test_ps_lists_what_the_server_holds_and_not_what_is_only_on_its_disk(hfms, states):
    done = hfms("models", "ps", "--url", states.url)
    assert (done.returncode, done.stderr) == (0, "")
    head, loaded, loading, failed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert head == "MODEL STATUS DEVICE ENGINE DTYPE MEMORY CONTEXT ALIASES"
    assert loaded == "org/name loaded cpu transformers float32 1.0 GiB 2048 mine"
    assert loading == "big loading 25% - - - - - -"
    assert failed == "bad failed: no [2Jroom - - - - - -"


def test_ps_as_json_is_what_the_server_said(hfms, states):
    assert json.loads(hfms("models", "ps", "--url", states.url, "--json").stdout) == [LOADED, LOADING, FAILED]


def test_load_sends_the_wishes_and_the_admin_key(hfms, server):
    server.replies["POST", "/models/load"] = (200, LOADED)
    wishes = ["--hardware", "cpu", "--dtype", "float32", "--quantize", "int8", "--replicas", "2", "--alias", "mine"]
    keys = {"HFMS_API_KEY": "user", "HFMS_ADMIN_API_KEY": "admin"}
    done = hfms("models", "load", "org/name@main", *wishes, "--url", server.url, env=keys)
    assert (done.returncode, done.stdout) == (0, "org/name is loaded on cpu\n")
    body = {
        "model": "org/name@main",
        "hardware": "cpu",
        "dtype": "float32",
        "quantize": "int8",
        "replicas": 2,
        "alias": "mine",
    }
    assert server.asked == [("POST", "/models/load", body)]
    assert server.headers[-1]["Authorization"] == "Bearer admin"


def test_load_sends_nothing_that_was_not_asked_for(hfms, server):
    server.replies["POST", "/models/load"] = (200, LOADED)
    done = hfms("models", "load", "org/name", "--url", server.url, "--json", env={"HF_SERVER_API_KEY": "user"})
    assert json.loads(done.stdout) == LOADED
    assert server.asked == [("POST", "/models/load", {"model": "org/name"})]
    assert server.headers[-1]["Authorization"] == "Bearer user"


def test_path_is_sent_whole_because_the_server_has_another_current_folder(hfms, server, tmp_path):
    server.replies["POST", "/models/load"] = (200, LOADED)
    hfms("models", "load", "./mine", "--url", server.url)
    assert server.asked[-1][2] == {"model": str(tmp_path / "mine")}


def test_name_that_is_none_is_refused_before_anything_is_sent(hfms, server):
    done = hfms("models", "load", "../a\nb", "--url", server.url)
    assert (done.returncode, server.asked) == (1, [])
    assert done.stderr.startswith("error: ")


def test_unload_says_what_the_server_said(hfms, server):
    server.replies["POST", "/models/unload"] = (200, {"id": "org/name", "status": {"value": "unloaded"}})
    done = hfms("models", "unload", "mine", "--url", server.url)
    assert (done.returncode, done.stdout) == (0, "org/name is unloaded\n")
    assert server.asked == [("POST", "/models/unload", {"model": "mine"})]


def test_load_lora_sends_name_and_adapter_and_says_whose_it_is(hfms, server, tmp_path):
    row = {"id": "sql", "status": {"value": "loaded"}, "parent": "org/base"}
    server.replies["POST", "/v1/load_lora_adapter"] = (200, row)
    done = hfms("models", "load-lora", "sql", "./sql", "--base-model-name", "base", "--url", server.url)
    assert (done.returncode, done.stdout) == (0, "sql is loaded, an adapter of org/base\n")
    body = {"lora_name": "sql", "lora_path": str(tmp_path / "sql"), "load_inplace": False, "base_model_name": "base"}
    assert server.asked == [("POST", "/v1/load_lora_adapter", body)]


def test_refusal_is_told_in_the_servers_words(hfms, server):
    envelope = {"error": {"message": "The model `x` does not exist.", "code": "model_not_found"}}
    server.replies["POST", "/models/unload"] = (404, envelope)
    done = hfms("models", "unload", "x", "--url", server.url)
    assert done.returncode == 1
    assert done.stderr == f"error: {server.url} answered 404: The model `x` does not exist.\n"


@pytest.mark.parametrize("answer", [[], {"data": [{"id": "x"}]}, {"data": 5}, {"data": ["x"]}])
def test_server_that_is_not_hfms_is_told(hfms, server, answer):
    server.replies["GET", "/models"] = (200, answer)
    done = hfms("models", "ps", "--url", server.url)
    assert done.returncode == 1
    assert done.stderr == f"error: {server.url} does not list models as hfms does\n"


def test_address_comes_from_the_configuration(hfms, states, tmp_path):
    (tmp_path / "hfms.toml").write_text(f"[server]\nport = {states.url.rpartition(':')[2]}\n")
    assert hfms("models", "ps").stdout.startswith("MODEL")
    assert hfms("models", "ps", "--config", "hfms.toml").returncode == 0


def test_nobody_there_exits_3(hfms, unused_tcp_port):
    done = hfms("models", "ps", env={"HFMS_PORT": str(unused_tcp_port)})
    assert done.returncode == 3
    assert f"no server answers at http://127.0.0.1:{unused_tcp_port}" in done.stderr


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
        ("box.lan", "http://box.lan:8000"),
    ],
)
def test_server_that_listens_everywhere_is_asked_on_loopback(host, url):
    assert local_url(ServerConfig(host=host)) == url
    assert server_root(url) == url


def test_port_0_cannot_be_guessed():
    with pytest.raises(ConfigError, match="name it with --url"):
        local_url(ServerConfig(port=0))


def test_real_server_loads_lists_and_unloads(hfms, serving):
    keys = {"HFMS_ADMIN_API_KEY": "an-admin-key-nobody-guesses-7"}
    url = serving(env=keys)
    assert hfms("models", "load", "echo:two", "--alias", "zwei", "--url", url, env=keys).stdout == (
        "echo:two is loaded on cpu\n"
    )
    rows = json.loads(hfms("models", "ps", "--url", url, "--json", env=keys).stdout)
    assert [(r["id"], r["status"]["value"], r["aliases"]) for r in rows] == [
        ("echo:tiny", "loaded", []),
        ("echo:two", "loaded", ["zwei"]),
    ]
    assert hfms("models", "unload", "zwei", "--url", url, env=keys).stdout == "echo:two is unloaded\n"
    refused = hfms("models", "unload", "echo:two", "--url", url, env=keys)
    assert refused.returncode == 1
    assert "`echo:two` does not exist" in refused.stderr


def test_real_server_refuses_who_has_no_key(hfms, serving):
    url = serving(env={"HFMS_ADMIN_API_KEY": "an-admin-key-nobody-guesses-7"})
    done = hfms("models", "load", "echo:two", "--url", url)
    assert done.returncode == 1
    assert "answered 401" in done.stderr
    assert "HFMS_API_KEY" in done.stderr


def test_chat_talks_to_a_real_server(hfms, serving):
    assert hfms("chat", "hello there", "--url", serving()).stdout == "hello there\n"


async def test_while_a_model_loads_the_phase_is_shown(monkeypatch):
    asked = asyncio.Event()

    async def states(request: web.Request) -> web.Response:
        asked.set()
        status = {"value": "loading", "phase": "convert", "progress": 0.5}
        return web.json_response({"data": [{"id": "org/name", "status": status}]})

    async def load(request: web.Request) -> web.Response:
        await asked.wait()  # a load that is not done before somebody has asked how it goes
        return web.json_response(LOADED)

    monkeypatch.setattr(models, "PHASE_SECONDS", 0.01)
    app = web.Application()
    app.router.add_get("/models", states)
    app.router.add_post("/models/load", load)
    shown: list[str] = []
    async with TestServer(app) as server:
        row = await models._load(Client(str(server.make_url("/"))), {"model": "org/name"}, shown.append)
    assert row["status"] == {"value": "loaded"}
    assert set(shown) == {"convert 50%"}
