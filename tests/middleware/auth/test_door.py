"""The door over HTTP: deny by default, and what becomes of keys that are wrong. Real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
import types
from importlib.metadata import EntryPoint, entry_points

import pytest

from hfms_cli import Config, hookimpl
from hfms_cli.errors import ConfigError
from hfms_middleware.auth.keyring import FRESH_SECONDS
from hfms_middleware.auth.keys import Policy, StoredKey, new_secret
from hfms_middleware.auth.store import open_store
from hfms_middleware.auth.throttle import Throttle

CHAT = {"model": "echo:a", "messages": [{"role": "user", "content": "hi"}]}
OPEN = {"/health", "/ready"}
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH")


def bearer(key: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def put(tmp_path):
    """`put(name=..., ...)` puts a key into the store of the test's server, as another process would."""
    store = open_store("", tmp_path / "state")

    def key(change=lambda key: key, **policy):
        secret = new_secret()
        stored = StoredKey(id=secret.id, digest=secret.digest, policy=Policy(**policy), created_at=1.0)
        store.insert(change(stored))
        return secret

    yield key
    store.close()


@pytest.fixture
def with_plugin_route(monkeypatch):
    """A third party's plugin with a route."""
    plugin = types.ModuleType("door_test_plugin")

    @hookimpl
    def hfms_routes(app):
        from aiohttp import web

        async def page(request):
            return web.Response(text="inside")

        app.router.add_get("/third/party", page)

    plugin.hfms_routes = hfms_routes
    monkeypatch.setitem(sys.modules, "door_test_plugin", plugin)
    points = [*entry_points(group="hfms"), EntryPoint("door", "door_test_plugin", "hfms")]
    monkeypatch.setattr("hfms_cli.plugins.entry_points", lambda group: points)


async def test_every_route_by_every_method_asks_for_a_key_but_health_and_ready(serve, put, with_plugin_route):
    put(admin=True)
    async with serve() as server:
        from hfms_cli.web.app import build_app

        paths = {r.resource.canonical for r in build_app(server.runtime).router.routes()}
        assert {"/admin/keys/generate", "/third/party", "/metrics", "/status", "/v1/models"} <= paths
        walked = [p.replace("{id}", "x").replace("{key_id}", "a" * 12) for p in sorted(paths - OPEN)]
        for path in [*walked, "/", "/nowhere", "/health/", "//health", "/health/../status", "/healthz", "/ready/x"]:
            for method in METHODS:
                async with server.session.request(method, server.url + path) as response:
                    assert response.status == 401, (method, path)
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    if method != "HEAD":
                        assert (await response.json())["error"]["code"] == "invalid_api_key"
        for path in OPEN:
            async with server.session.get(server.url + path) as response:
                assert response.status in (200, 503)
        assert len(walked) >= 15


async def test_the_first_key_of_the_store_shuts_the_door_of_a_running_server(serve, put):
    async with serve("echo:a") as server:
        for headers in ({}, bearer("none"), {"Authorization": "Basic abc"}):
            assert (await server.post("/v1/chat/completions", CHAT, headers=headers))[0] == 200
        secret = put()
        server.runtime.middlewares[0].keyring.forget_freshness()
        assert (await server.post("/v1/chat/completions", CHAT))[0] == 401
        assert (await server.post("/v1/chat/completions", CHAT, headers=bearer(secret)))[0] == 200
        assert (await server.post("/v1/chat/completions", CHAT, headers={"X-API-Key": str(secret)}))[0] == 200
        assert (await server.post("/models/load", {"model": "echo:b"}, headers=bearer(secret)))[0] == 403


async def test_keys_of_a_store_let_the_server_leave_loopback_and_meet_require(serve, put):
    with pytest.raises(ConfigError, match="no key is configured"):
        async with serve(toml='[server]\nhost = "0.0.0.0"'):
            raise AssertionError("it started")
    put()
    async with serve(toml='[server]\nhost = "0.0.0.0"', env={"HFMS_REQUIRE_AUTH": "true"}) as server:
        assert server.runtime.guarded


async def test_a_store_of_revoked_keys_only_is_still_a_shut_door(serve, put):
    import msgspec

    secret = put(lambda key: msgspec.structs.replace(key, revoked_at=2.0))
    async with serve() as server:
        assert (await server.get("/v1/models"))[0] == 401
        status, body = await server.get("/v1/models", headers=bearer(secret))
        assert (status, body["error"]["message"]) == (401, "This API key was revoked.")


async def test_a_key_named_admin_is_no_administrator(serve, put):
    secret = put(name="admin")
    async with serve() as server:
        for path in ("/models/load", "/admin/keys/generate"):
            status, body = await server.post(path, {"model": "echo:a"}, headers=bearer(secret))
            assert (status, body["error"]["code"]) == (403, "not_admin")


async def test_a_key_sees_and_uses_only_its_models(serve, put):
    secret, alias = put(allowed_models=("echo:a*", "org/*")), put(allowed_models=("mine",))
    free = put()
    async with serve("echo:abc", "echo:b", toml='[models.aliases]\nmine = "echo:b"\n') as server:

        async def names(key, path="/v1/models"):
            return {m["id"] for m in (await server.get(path, headers=bearer(key)))[1]["data"]}

        async def ask(key, model):
            status, body = await server.post("/v1/chat/completions", CHAT | {"model": model}, headers=bearer(key))
            return status, body.get("error", {}).get("code")

        assert await names(free) == {"echo:abc", "echo:b", "mine"}
        assert await names(secret) == await names(secret, "/models") == {"echo:abc"}
        assert await names(alias) == {"mine"}
        assert await ask(secret, "echo:abc") == (200, None)
        for model in ("echo:b", "mine", "never-heard-of"):
            assert await ask(secret, model) == (403, "model_not_allowed")
            status, body = await server.post("/tokenize", {"model": model, "prompt": "x"}, headers=bearer(secret))
            assert (status, body["error"]["code"]) == (403, "model_not_allowed")
        # The only one that this key may use.
        assert (await server.get("/tokenizer_info", headers=bearer(secret)))[0] == 200
        assert await ask(alias, "mine") == (200, None)
        assert await ask(alias, "echo:b") == (403, "model_not_allowed")
        assert (await server.get("/v1/models/echo:b", headers=bearer(secret)))[0] == 404
        # A name that is allowed and not there: what is not allowed is not suggested.
        status, body = await server.post(
            "/v1/embeddings", {"model": "org/echo:b", "input": "x"}, headers=bearer(secret)
        )
        assert status == 404
        assert "`echo:b`" not in body["error"]["message"]


async def test_a_key_of_the_store_can_be_revoked_although_the_environment_holds_it(serve, put):
    boss, other = put(admin=True), put(admin=True)
    async with serve(env={"HFMS_ADMIN_API_KEY": str(boss)}) as server:
        assert (await server.get("/admin/keys/list", headers=bearer(boss)))[0] == 200
        assert (await server.post(f"/admin/keys/{boss.id}/revoke", {}, headers=bearer(other)))[0] == 200
        assert (await server.get("/admin/keys/list", headers=bearer(boss)))[0] == 401


async def test_a_store_that_goes_away_shuts_the_door_but_for_keys_of_the_configuration(serve, put):
    secret, static = put(), "a-key-that-nobody-guesses-7"
    async with serve("echo:a", env={"HFMS_API_KEY": static}) as server:
        auth = server.runtime.middlewares[0]
        assert (await server.get("/v1/models", headers=bearer(secret)))[0] == 200
        store = auth.keyring.store
        with store._reading, store._writing:  # SQLite may crash where a thread of the server is at it just then
            for connection in store._connections.values():
                connection.close()
        auth.keyring.forget_freshness()
        async with server.session.get(server.url + "/v1/models", headers=bearer(secret)) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
            error = (await response.json())["error"]
            assert error["code"] == "key_store_unavailable"
            assert "keys.db" not in error["message"]
        assert (await server.get("/v1/models", headers=bearer(static)))[0] == 200
        assert (await server.get("/health"))[0] == 200
        _, status = await server.get("/status", headers=bearer(static))
        assert "closed database" in status["middleware"]["auth"]["store_error"]


async def test_wrong_keys_are_slowed_and_counted_and_right_ones_never(serve, put):
    secret, waits = put(), []

    async def sleep(seconds):
        waits.append(seconds)

    async with serve() as server:
        auth = server.runtime.middlewares[0]
        auth._sleep, auth._throttle = sleep, Throttle(lambda: 0.0)  # a clock that stands: nothing is pardoned
        answers = [(await server.get("/v1/models", headers=bearer(new_secret())))[0] for _ in range(13)]
        assert answers == [401] * 10 + [429] * 3
        assert waits == [0.25, 0.5, 1.0]
        async with server.session.get(server.url + "/v1/models", headers=bearer("nonsense")) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "2"
            assert (await response.json())["error"]["code"] == "too_many_attempts"
        assert (await server.get("/v1/models", headers=bearer(secret)))[0] == 200
        async with server.session.get(server.url + "/metrics", headers=bearer(secret)) as response:
            text = await response.text()
        assert 'hfms_auth_failures_total{reason="unknown"} 14.0' in text
        assert 'hfms_auth_keys{status="active"} 1.0' in text
        assert "hfms_auth_store_up 1.0" in text
        _, status = await server.get("/status", headers=bearer(secret))
        auth = status["middleware"]["auth"]
        assert auth["failures"] == {"unknown": 14}
        assert auth["keys_of_store"] == {"active": 1, "expired": 0, "revoked": 0}
        assert (auth["required"], auth["store"], auth["store_error"]) == (True, "sqlite", None)


async def test_a_request_without_a_key_is_no_attempt(serve, put):
    put()
    async with serve() as server:
        assert {(await server.get("/v1/models"))[0] for _ in range(30)} == {401}


async def test_answers_that_are_held_back_are_bounded(serve, put):
    put()
    release = asyncio.Event()
    held = []

    async def sleep(seconds):
        held.append(seconds)
        await release.wait()

    async with serve() as server:
        server.runtime.middlewares[0]._sleep = sleep
        tries = [asyncio.create_task(server.get("/v1/models", headers=bearer("x"))) for _ in range(90)]
        async with asyncio.timeout(30):
            while sum(task.done() for task in tries) < 90 - 64:
                await asyncio.sleep(0.01)
        assert len(held) == 64
        release.set()
        assert {status for status, _ in await asyncio.gather(*tries)} == {401, 429}


async def raw(server, *lines: bytes) -> bytes:
    """The status line of an answer to a request that no client library would send."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\r\n".join([b"GET /v1/models HTTP/1.1", b"Host: x", b"Connection: close", *lines, b"", b""]))
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n")[0]


@pytest.mark.parametrize("bad", [b"\x00", b"\x01", b"\t", b"\x0b", b"\x1b[2J", b"\x7f", b"\x80", b"\xff", b" "])
async def test_a_key_with_control_characters_is_refused(serve, put, bad):
    key = str(put()).encode()
    async with serve() as server:
        assert b" 200 " in await raw(server, b"Authorization: Bearer " + key)
        for sent in (key[:20] + bad + key[20:], key[:20] + bad + key[21:]):
            for header in (b"Authorization: Bearer ", b"X-API-Key: "):
                status = await raw(server, header + sent)
                assert b" 400 " in status or b" 401 " in status, status


async def test_what_is_no_http_is_answered_in_the_envelope_and_its_bytes_are_in_no_log(serve, put, capsys):
    """aiohttp would quote the header that it cannot read, with the key in it."""
    key = f"{put()}"
    async with serve() as server:
        host, port = server.url.removeprefix("http://").split(":")
        for header in (f"Authorization: Bearer {key}\x01", f"X-API-Key: {key}{'x' * 20_000}", f"no header {key}"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert b" 400 " in head.partition(b"\r\n")[0]
            assert b"x-request-id: req-" in head
            assert json.loads(body)["error"]["code"] == "bad_request"
            assert key.encode() not in body
    logged = "".join(capsys.readouterr())
    assert "no HTTP" in logged
    assert key not in logged


async def test_one_bearer_wins_and_two_that_differ_are_refused(serve, put):
    key, other = (f"{put()}".encode() for _ in range(2))
    async with serve() as server:
        first, second = b"Authorization: Bearer " + key, b"Authorization: Bearer " + other
        # Python's own parser says 400, aiohttp's C parser leaves it to us.
        assert (await raw(server, first, second)).split()[1] in (b"400", b"401")
        assert (await raw(server, second, first)).split()[1] in (b"400", b"401")
        assert (await raw(server, b"X-API-Key: " + key, b"X-API-Key: " + other)).split()[1] in (b"400", b"401")
        assert b" 200 " in await raw(server, first, b"X-API-Key: wrong")
        assert b" 401 " in await raw(server, b"Authorization: Bearer wrong", b"X-API-Key: " + key)
        assert b" 401 " in await raw(server, b"Authorization: Basic abc", b"X-API-Key: " + key)


async def test_a_second_server_obeys_a_revocation_as_soon_as_half_a_second_has_passed(serve, store_url):
    env = {"HFMS_KEY_STORE": store_url, "HFMS_ADMIN_API_KEY": "a-key-that-nobody-guesses-7"}
    admin = bearer(env["HFMS_ADMIN_API_KEY"])
    async with serve(env=env) as one, serve(env=env) as two:
        clock = itertools.count(time.monotonic() + 1, FRESH_SECONDS)  # passes half a second whenever it is read
        two.runtime.middlewares[0].keyring._clock = lambda: next(clock)
        _, made = await one.post("/admin/keys/generate", {}, headers=admin)
        key = bearer(made["api_key"])
        assert [(await server.get("/v1/models", headers=key))[0] for server in (one, two)] == [200, 200]
        assert (await one.post(f"/admin/keys/{made['key_id']}/revoke", {}, headers=admin))[0] == 200
        assert [(await server.get("/v1/models", headers=key))[0] for server in (one, two)] == [401, 401]


async def test_nothing_of_it_is_left_where_auth_is_not_in_the_order(serve, put):
    put()
    async with serve(env={"HFMS_MIDDLEWARE": ""}) as server:
        assert (await server.get("/admin/keys/list"))[0] == 404
        assert (await server.get("/v1/models"))[0] == 200
        async with server.session.get(server.url + "/metrics") as response:
            assert "hfms_auth" not in await response.text()
        assert "auth" not in (await server.get("/status"))[1]["middleware"]


def test_a_store_that_cannot_be_opened_stops_the_start(tmp_path):
    from hfms_middleware.auth.middleware import Auth
    from hfms_middleware.auth.options import AuthOptions

    (tmp_path / "bad.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match="the key store cannot be opened"):
        Auth(AuthOptions(store=f"sqlite:///{tmp_path}/bad.db")).check(Config())
