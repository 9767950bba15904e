"""`/admin/keys/*` over HTTP: shapes, bad input, and the audit log."""

from __future__ import annotations

import json
import stat
import time
from datetime import UTC, datetime

import pytest

from hfms_middleware.auth.audit import Actor, AuditLog

ADMIN = "admin-key-0123456789abcdef"
AS_ADMIN = {"headers": {"Authorization": f"Bearer {ADMIN}"}}
ENV = {"HFMS_ADMIN_API_KEY": ADMIN}
GENERATE = "/admin/keys/generate"


def bearer(key: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_generated_key_is_shown_once_and_works(serve):
    asked = {
        "name": "Ann's laptop",
        "rate_limit": 60,
        "token_limit": 10_000,
        "daily_token_limit": 10**6,
        "priority": "high",
        "allowed_models": ["org/*", "small"],
        "expires_at": "2099-01-31T12:00:00+01:00",
    }
    async with serve(env=ENV) as server:
        status, made = await server.post(GENERATE, asked, **AS_ADMIN)
        assert status == 200
        key_id = made["key_id"]
        assert made["api_key"].startswith(f"hf_{key_id}")
        assert made["created_at"].endswith("Z")
        _, shown = await server.get(f"/admin/keys/{key_id}", **AS_ADMIN)
        assert {k: v for k, v in made.items() if k != "api_key"} == shown | {"last_used_at": None}
        assert {k: shown[k] for k in asked if k not in ("priority", "expires_at")} == {
            k: v for k, v in asked.items() if k not in ("priority", "expires_at")
        }
        assert (shown["priority"], shown["expires_at"]) == ("HIGH", "2099-01-31T11:00:00Z")
        assert (shown["status"], shown["admin"], shown["created_by"]) == ("active", False, "admin_api_key")
        assert (await server.get("/v1/models", headers=bearer(made["api_key"])))[0] == 200
        async with server.session.post(server.url + GENERATE, **AS_ADMIN) as response:
            assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("how", ["json", "form", "query"])
async def test_fields_come_as_json_as_a_form_or_in_the_query(serve, how):
    fields = {"name": "n", "rate_limit": 5, "priority": 3, "admin": True, "allowed_models": ["a", "b*"]}
    flat = {"name": "n", "rate_limit": "5", "priority": "3", "admin": "true", "allowed_models": "a, b*"}
    more = {"json": {"json": fields}, "form": {"data": flat}, "query": {"params": flat}}[how]
    async with serve(env=ENV) as server:
        status, made = await server.request("POST", GENERATE, **more, **AS_ADMIN)
        assert status == 200, made
        assert {k: made[k] for k in fields} == fields | {"priority": "CRITICAL"}
        # It is an administrator itself now.
        assert (await server.post(GENERATE, {}, headers=bearer(made["api_key"])))[0] == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(f, v) for f in ("rate_limit", "token_limit", "daily_token_limit") for v in (-1, 0, 10**15, 2**70, 1.5, "x")],
        *[("priority", v) for v in ("URGENT", 4, -1, "", None, ["HIGH"])],
        *[("expires_at", v) for v in ("tomorrow", "2099-01-31T12:00:00", "2001-01-01T00:00:00Z", 5, -1, 1e300, "nan")],
        *[("name", v) for v in ("a\nb", "a\x1b[2J", "\u2028", "x" * 101, 5)],
        *[("allowed_models", v) for v in ("a", [""], ["a\x00"], ["x" * 513], [5], ["a"] * 1001)],
        *[("admin", v) for v in ("yes, please", 1, "admin")],
        ("sudo", True),
    ],
)
async def test_bad_input_is_400_and_names_the_field(serve, field, value):
    async with serve(env=ENV) as server:
        status, body = await server.post(GENERATE, {field: value}, **AS_ADMIN)
        assert status == 400, body
        assert body["error"]["param"].startswith(field)
        assert (await server.get("/admin/keys/list", **AS_ADMIN))[1]["data"] == []


async def test_bad_forms_and_queries_are_400_as_well(serve):
    async with serve(env=ENV) as server:
        for fields in ([("rate_limit", "-1")], [("rate_limit", "1"), ("rate_limit", "2")], [("rate_limit", "many")]):
            for more in ({"data": fields}, {"params": fields}):
                status, body = await server.request("POST", GENERATE, **more, **AS_ADMIN)
                assert (status, body["error"]["param"]) == (400, "rate_limit")
        both = {"json": {"name": "a"}, "params": {"name": "b"}}
        assert (await server.request("POST", GENERATE, **both, **AS_ADMIN))[0] == 400
        assert (await server.request("POST", GENERATE, data=b"[1", **AS_ADMIN))[0] == 400
        assert (await server.request("POST", GENERATE, data=b"\xff\xfe", **AS_ADMIN))[0] == 400


async def test_the_list_tells_everything_but_secrets(serve):
    async with serve(env=ENV) as server:
        made = [(await server.post(GENERATE, {"name": f"k{i}"}, **AS_ADMIN))[1] for i in range(3)]
        assert (await server.get("/v1/models", headers=bearer(made[1]["api_key"])))[0] == 200
        await server.runtime.middlewares[0].keyring._telling
        status, listed = await server.get("/admin/keys/list", **AS_ADMIN)
        assert (status, listed["object"]) == (200, "list")
        rows = {row["name"]: row for row in listed["data"]}
        assert set(rows) == {"k0", "k1", "k2"}
        used = rows["k1"].pop("last_used_at")
        assert abs(datetime.fromisoformat(used).timestamp() - time.time()) < 60
        assert rows["k0"]["last_used_at"] is None
        text = json.dumps(listed)
        for row in made:
            assert row["api_key"][15:] not in text
        assert "digest" not in text


async def test_a_revoked_key_is_worthless_at_once_and_for_good(serve):
    async with serve(env=ENV) as server:
        _, made = await server.post(GENERATE, {}, **AS_ADMIN)
        path = f"/admin/keys/{made['key_id']}"
        assert (await server.get("/v1/models", headers=bearer(made["api_key"])))[0] == 200
        status, row = await server.post(f"{path}/revoke", {}, **AS_ADMIN)
        assert (status, row["status"]) == (200, "revoked")
        assert (await server.get("/v1/models", headers=bearer(made["api_key"])))[0] == 401
        again = await server.post(f"{path}/revoke", {}, **AS_ADMIN)
        assert again == (200, row)
        status, body = await server.post(f"{path}/rotate", {}, **AS_ADMIN)
        assert (status, body["error"]["param"]) == (400, "key_id")


async def test_rotation_gives_a_new_secret_and_the_old_one_its_grace(serve):
    async with serve(env=ENV) as server:
        _, made = await server.post(GENERATE, {"name": "n"}, **AS_ADMIN)
        path = f"/admin/keys/{made['key_id']}/rotate"

        async def works(key):
            return (await server.get("/v1/models", headers=bearer(key)))[0] == 200

        status, second = await server.post(path, {"grace_seconds": 3600}, **AS_ADMIN)
        assert status == 200
        assert (second["key_id"], second["name"]) == (made["key_id"], "n")
        assert second["old_secret_until"] > second["rotated_at"]
        assert await works(made["api_key"])
        assert await works(second["api_key"])
        status, third = await server.request("POST", path, **AS_ADMIN)
        assert (status, third["old_secret_until"]) == (200, None)
        assert [await works(k["api_key"]) for k in (made, second, third)] == [False, False, True]
        for grace in (-1, 31 * 86400, "1h", None):
            status, body = await server.post(path, {"grace_seconds": grace}, **AS_ADMIN)
            assert (status, body["error"]["param"]) == (400, "grace_seconds")


@pytest.mark.parametrize("key_id", ["a" * 12, "short", "x" * 40, "..%2f..%2fetc", "aaaaaaaaaaa%0a"])
async def test_an_unknown_id_is_404(serve, key_id):
    async with serve(env=ENV) as server:
        for method, path in (("GET", ""), ("POST", "/revoke"), ("POST", "/rotate")):
            assert (await server.request(method, f"/admin/keys/{key_id}{path}", **AS_ADMIN))[0] == 404


async def test_only_an_administrators_key_administers_keys(serve):
    async with serve(env=ENV) as server:
        _, made = await server.post(GENERATE, {"name": "admin"}, **AS_ADMIN)
        user = {"headers": bearer(made["api_key"])}
        own = f"/admin/keys/{made['key_id']}"
        asked = (("POST", GENERATE), ("GET", "/admin/keys/list"), ("GET", own), ("POST", f"{own}/revoke"))
        more = (("GET", "/admin/keys/export"), ("POST", "/admin/keys/import"), ("GET", "/admin/keys/audit"))
        for method, path in (*asked, *more, ("POST", f"{own}/rotate")):
            status, body = await server.request(method, path, **user)
            assert (status, body["error"]["code"]) == (403, "not_admin")
        assert (await server.get("/v1/models", **user))[0] == 200


async def test_without_any_key_nobody_makes_one_over_http(serve):
    """Any page in a browser on this machine could: it may send forms anywhere."""
    async with serve() as server:
        status, body = await server.request("POST", GENERATE, data={"name": "x"})
        assert (status, body["error"]["code"]) == (403, "not_admin")
        assert "hfms keys create --admin" in body["error"]["message"]


async def test_keys_go_from_one_server_to_another_by_its_routes(serve, tmp_path):
    async with serve(env=ENV) as server:
        _, made = await server.post(GENERATE, {"name": "n", "cache_group": "team"}, **AS_ADMIN)
        _, exported = await server.get("/admin/keys/export", **AS_ADMIN)
        assert exported["object"] == "list"
    env = ENV | {"HFMS_STATE_DIR": str(tmp_path / "elsewhere")}
    async with serve(env=env) as server:
        moved = {"keys": exported["data"]}
        assert await server.post("/admin/keys/import", moved, **AS_ADMIN) == (200, {"imported": 1, "present": 0})
        assert await server.post("/admin/keys/import", moved, **AS_ADMIN) == (200, {"imported": 0, "present": 1})
        assert (await server.get("/v1/models", headers=bearer(made["api_key"])))[0] == 200
        _, audit = await server.get("/admin/keys/audit?last=1", **AS_ADMIN)
        assert [line["action"] for line in audit["data"]] == ["key.import"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"id": "../../../x"}, "keys[1]"),
        ({"digest": "hunter2"}, "keys[1]"),
        ({"policy": {"priority": 9}}, "keys[1]"),
        ({"policy": {"name": "a\nb"}}, "keys[1]"),
        ({"policy": {"priority": "high"}}, "keys[1].policy.priority"),
    ],
)
async def test_an_import_with_one_bad_key_keeps_none(serve, change, param):
    good = {"id": "a" * 12, "digest": "0" * 64, "policy": {}, "created_at": 1}
    async with serve(env=ENV) as server:
        asked = {"keys": [good, good | {"id": "b" * 12} | change]}
        status, body = await server.post("/admin/keys/import", asked, **AS_ADMIN)
        assert (status, body["error"]["param"]) == (400, param)
        assert (await server.get("/admin/keys/list", **AS_ADMIN))[1]["data"] == []


@pytest.mark.parametrize("last", ["0", "-1", "ten", "10001"])
async def test_the_number_of_audit_lines_is_checked(serve, last):
    async with serve(env=ENV) as server:
        status, body = await server.get(f"/admin/keys/audit?last={last}", **AS_ADMIN)
        assert (status, body["error"]["param"]) == (400, "last")


# The audit log.


async def test_every_deed_of_an_administrator_is_noted_with_who_and_from_where(serve, tmp_path):
    async with serve(env=ENV) as server:
        _, made = await server.post(GENERATE, {"name": "boss", "admin": True}, **AS_ADMIN)
        boss = {"headers": bearer(made["api_key"])}
        _, second = await server.post(GENERATE, {"name": "n", "rate_limit": 5}, **boss)
        await server.post(f"/admin/keys/{second['key_id']}/rotate", {"grace_seconds": 9}, **boss)
        await server.post(f"/admin/keys/{second['key_id']}/revoke", {}, **boss)
        await server.post("/models/load", {"model": "echo:a"}, **boss)
        await server.get("/admin/keys/list", **boss)
        await server.post(f"/admin/keys/{'a' * 12}/revoke", {}, **boss)
    file = tmp_path / "state" / "audit.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    by = made["key_id"]
    assert [(line["action"], line["by"], line.get("key")) for line in lines] == [
        ("key.create", "admin_api_key", by),
        ("key.create", by, second["key_id"]),
        ("key.rotate", by, second["key_id"]),
        ("key.revoke", by, second["key_id"]),
        ("POST /models/load", by, None),
    ]
    assert {line["from"] for line in lines} == {"127.0.0.1"}
    assert all(datetime.fromisoformat(line["time"]).tzinfo == UTC for line in lines)
    assert lines[1]["policy"]["requests_per_minute"] == 5
    for key in (made, second):
        assert key["api_key"][15:] not in text
    assert "digest" not in text


async def test_what_cannot_be_noted_is_not_done(serve, tmp_path):
    async with serve(env=ENV) as server:
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / "audit.jsonl").mkdir()
        status, body = await server.post(GENERATE, {}, **AS_ADMIN)
        assert (status, body["error"]["code"]) == (503, "audit_log_unavailable")
        assert str(tmp_path) not in body["error"]["message"]
        assert (await server.post("/models/load", {"model": "echo:a"}, **AS_ADMIN))[0] == 503
        assert (await server.get("/admin/keys/list", **AS_ADMIN))[1]["data"] == []
        assert (await server.get("/models", **AS_ADMIN))[1]["data"] == []


def test_lines_are_only_ever_added_and_a_torn_one_is_left_out(tmp_path):
    file = tmp_path / "log" / "audit.jsonl"
    log = AuditLog(file, lambda: 0.0)
    log.write(Actor("ann", "here"), "first", key="k")
    before = file.read_bytes()
    with file.open("ab") as torn:
        torn.write(b'{"time": "19\n')
    AuditLog(file, lambda: 60.0).write(Actor("bob", "there"), "second")
    assert file.read_bytes().startswith(before)
    assert list(log.read()) == [
        {"time": "1970-01-01T00:00:00Z", "action": "first", "by": "ann", "from": "here", "key": "k"},
        {"time": "1970-01-01T00:01:00Z", "action": "second", "by": "bob", "from": "there"},
    ]


def test_a_name_cannot_forge_a_line(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", lambda: 0.0)
    log.write(Actor('x"}\n{"action": "forged"', "here"), "real")
    assert [line["action"] for line in log.read()] == ["real"]
