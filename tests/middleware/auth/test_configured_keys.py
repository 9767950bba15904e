"""Keys of the configuration: who may do what."""

from __future__ import annotations

import pytest

from hfms_cli.errors import ConfigError

CHAT = {"model": "echo:a", "messages": [{"role": "user", "content": "hi"}]}
KEY, ADMIN = "user-key-0123456789abcdef", "admin-key-0123456789abcdef"
KEYS = {"HFMS_API_KEY": KEY, "HFMS_ADMIN_API_KEY": ADMIN}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_key_calls_and_only_an_admin_key_administers(serve):
    async with serve("echo:a", env=KEYS) as server:
        assert (await server.post("/v1/chat/completions", CHAT, headers=bearer(KEY)))[0] == 200
        assert (await server.post("/v1/chat/completions", CHAT, headers={"X-API-Key": KEY}))[0] == 200
        status, body = await server.post("/models/load", {"model": "echo:b"}, headers=bearer(KEY))
        assert (status, body["error"]["code"]) == (403, "not_admin")
        assert (await server.post("/models/unload", {"model": "echo:a"}, headers=bearer(KEY)))[0] == 403
        assert (await server.post("/models/load", {"model": "echo:b"}, headers=bearer(ADMIN)))[0] == 200


async def test_bearer_wins_over_x_api_key(serve):
    async with serve("echo:a", env=KEYS) as server:
        headers = bearer("wrong") | {"X-API-Key": KEY}
        assert (await server.post("/v1/chat/completions", CHAT, headers=headers))[0] == 401
        headers = bearer(KEY) | {"X-API-Key": "wrong"}
        assert (await server.post("/v1/chat/completions", CHAT, headers=headers))[0] == 200


@pytest.mark.parametrize(
    "header", ["", "Basic abc", "Bearer", "Bearer ", f"bearer{KEY}", f"Token {KEY}", "Bearer \xff"]
)
async def test_a_header_that_is_no_bearer_key_is_401(serve, header):
    async with serve(env=KEYS) as server:
        assert (await server.get("/v1/models", headers={"Authorization": header}))[0] == 401


async def test_metrics_are_open_only_when_the_operator_says_so(serve):
    async with serve(env=KEYS, toml="[middleware.auth]\nopen_metrics = true") as server:
        async with server.session.get(server.url + "/metrics") as response:
            assert response.status == 200
        assert (await server.get("/status"))[0] == 401


async def test_the_docs_are_open_to_browsers_only_when_the_operator_says_so(serve):
    """A browser sends no key when it opens a page; the page itself has a field for one."""
    for opened in (False, True):
        async with serve(env=KEYS, toml=f"[middleware.auth]\nopen_docs = {str(opened).lower()}") as server:
            for path in ("/docs", "/openapi.json"):
                async with server.session.get(server.url + path) as response:
                    assert response.status == (200 if opened else 401)
            assert (await server.get("/v1/models"))[0] == 401
            assert (await server.post("/v1/chat/completions", CHAT))[0] == 401
            _, document = await server.get("/openapi.json", headers=bearer(KEY))
            assert ("security" not in document["paths"]["/openapi.json"]["get"]) == opened
            assert document["paths"]["/v1/models"]["get"]["security"]


async def test_a_weak_admin_key_is_accepted_with_a_warning_on_loopback_and_refused_beyond(serve):
    weak = {"HF_SERVER_ADMIN_API_KEY": "admin123"}
    async with serve(env=weak) as server:
        assert any("admin_api_key is easily guessed" in w for w in server.runtime.warnings)
        assert (await server.get("/v1/models", headers=bearer("admin123")))[0] == 200
    with pytest.raises(ConfigError, match="easily guessed"):
        async with serve(env=weak, toml='[server]\nhost = "0.0.0.0"'):
            raise AssertionError("it started")


async def test_without_a_key_the_server_refuses_to_leave_loopback_unless_told(serve):
    with pytest.raises(ConfigError, match="no key is configured"):
        async with serve(toml='[server]\nhost = "0.0.0.0"'):
            raise AssertionError("it started")
    async with serve(toml='[server]\nhost = "0.0.0.0"\ninsecure = true') as server:
        assert any("anybody" in w for w in server.runtime.warnings)


async def test_auth_that_is_required_without_a_key_does_not_start(serve):
    with pytest.raises(ConfigError, match="auth is required"):
        async with serve(env={"HFMS_REQUIRE_AUTH": "true"}):
            raise AssertionError("it started")


async def test_switching_auth_off_takes_it_out_of_the_road(serve):
    async with serve(env={"HF_SERVER_ENABLE_AUTH": "false"}) as server:
        assert "auth" not in [m.name for m in server.runtime.middlewares]
