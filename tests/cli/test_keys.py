"""`hfms keys`, in a process of its own: on the store, and on a real server."""

from __future__ import annotations

import json
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from hfms_middleware.auth.keys import read_secret
from tests.servers import postgres_server, redis_server

ADMIN = "an-admin-key-nobody-guesses-7"


def status_of(url: str, key: str, path: str = "/v1/models") -> int:
    asked = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status
    except urllib.error.HTTPError as exc:
        return exc.code


def becomes(url: str, key: str, status: int) -> bool:
    """Whether a server that asks the store for changes now and then comes to answer so."""
    deadline = time.monotonic() + 10
    while (found := status_of(url, key)) != status and time.monotonic() < deadline:
        time.sleep(0.05)
    return found == status


@pytest.fixture
def state(tmp_path) -> Path:
    return tmp_path / ".local" / "state" / "hfms"


@pytest.fixture(params=["store", "server"])
def keys(request, hfms, serving) -> Callable[..., object]:
    """`keys("create", ...)` at the store itself, or at a real server with its own."""
    where: list[str] = []
    env = {"HFMS_ADMIN_API_KEY": ADMIN}
    if request.param == "server":
        where = ["--url", serving(env=env)]

    def run(*args: str, **more):
        return hfms("keys", *args, *where, env=env, **more)

    return run


def test_a_created_key_stands_alone_on_standard_output(keys):
    done = keys("create", "--name", "laptop")
    assert done.returncode == 0, done.stderr
    secret = read_secret(done.stdout.strip())
    assert secret is not None
    assert done.stdout.count("\n") == 1
    assert secret.id in done.stderr
    assert secret.text not in done.stderr


def test_a_key_lives_from_create_to_revoke(keys):
    options = ["--priority", "high", "--rate-limit", "60", "--token-limit", "9000", "--daily-token-limit", "100000"]
    models = ["--model", "org/*", "--model", "small", "--expires", "30d"]
    made = json.loads(keys("create", "--name", "n", "--admin", *options, *models, "--json").stdout)
    key_id = made["key_id"]
    assert read_secret(made["api_key"]).id == key_id
    assert (made["admin"], made["priority"], made["rate_limit"]) == (True, "HIGH", 60)
    assert (made["token_limit"], made["daily_token_limit"]) == (9000, 100000)
    assert made["allowed_models"] == ["org/*", "small"]
    assert made["expires_at"] > made["created_at"]
    (row,) = json.loads(keys("list", "--json").stdout)
    assert row == {k: v for k, v in made.items() if k != "api_key"}
    assert json.loads(keys("show", key_id, "--json").stdout) == row
    head, line = [" ".join(text.split()) for text in keys("list").stdout.splitlines()]
    assert head == "KEY ID NAME STATUS ADMIN PRIORITY REQ/MIN TOK/MIN TOK/DAY MODELS EXPIRES LAST USED"
    assert line == f"{key_id} n active yes HIGH 60 9000 100000 org/*, small {made['expires_at']} -"
    assert f"key id              {key_id}\n" in keys("show", key_id).stdout
    rotated = keys("rotate", key_id, "--grace", "1h")
    assert read_secret(rotated.stdout.strip()).id == key_id
    assert rotated.stdout.strip() != made["api_key"]
    assert keys("revoke", key_id).stdout == f"{key_id} is revoked\n"
    assert json.loads(keys("show", key_id, "--json").stdout)["status"] == "revoked"
    assert keys("rotate", key_id).returncode == 1


def test_a_mistake_is_told_in_one_line(keys):
    for args, said in (
        (["create", "--rate-limit", "-1"], "rate_limit"),
        (["create", "--token-limit", str(10**15)], "token_limit"),
        (["create", "--priority", "urgent"], "priority"),
        (["create", "--expires", "soon"], "expires_at"),
        (["create", "--name", "a\x1b[2J"], "name"),
        (["rotate", "a" * 12, "--grace", "forever"], "--grace"),
        (["show", "a" * 12], "There is no key"),
        (["revoke", "../../etc"], "There is no key"),
    ):
        done = keys(*args)
        assert (done.returncode, done.stdout) == (1, ""), args
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_server_with_another_administrator_refuses(hfms, serving):
    url = serving(env={"HFMS_ADMIN_API_KEY": ADMIN, "HFMS_API_KEY": "a-key-that-nobody-guesses-7"})
    done = hfms("keys", "list", "--url", url, env={"HFMS_API_KEY": "a-key-that-nobody-guesses-7"})
    assert done.returncode == 1
    assert "answered 403" in done.stderr


def test_nobody_there_exits_3(hfms, free_port):
    assert hfms("keys", "list", "--url", f"http://127.0.0.1:{free_port}").returncode == 3


def test_a_running_server_obeys_what_is_done_to_its_store(hfms, serving):
    made = json.loads(hfms("keys", "create", "--json").stdout)
    url = serving()
    assert status_of(url, made["api_key"]) == 200
    assert status_of(url, "nonsense") == 401
    second = hfms("keys", "rotate", made["key_id"]).stdout.strip()
    assert becomes(url, made["api_key"], 401)
    assert becomes(url, second, 200)
    hfms("keys", "revoke", made["key_id"])
    assert becomes(url, second, 401)


def test_the_first_key_is_made_at_the_store_and_the_rest_over_http(hfms, serving):
    url = serving()
    first = hfms("keys", "create", "--admin", "--name", "ops").stdout.strip()
    done = hfms("keys", "create", "--name", "app", "--url", url, env={"HFMS_ADMIN_API_KEY": first})
    assert status_of(url, done.stdout.strip()) == 200
    lines = json.loads(hfms("keys", "audit", "--json").stdout)
    assert [(line["action"], line["by"].partition(":")[0]) for line in lines] == [
        ("key.create", "cli"),
        ("key.create", read_secret(first).id),
    ]


def test_no_secret_and_no_digest_is_in_any_log_or_file_but_the_store(hfms, environment, tmp_path, state):
    import re
    import subprocess
    import sys
    import threading

    env = environment | {"HFMS_ADMIN_API_KEY": ADMIN, "HFMS_LOG_LEVEL": "debug", "HFMS_LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "hfms_cli", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env
    ) as server:
        said: list[str] = []
        url = next(
            found[0] for line in server.stdout if said.append(line) or (found := re.search(r"http://[0-9.:]+", line))
        )
        reader = threading.Thread(target=lambda: said.extend(server.stdout))
        reader.start()
        at = ["--url", url]
        key = hfms("keys", "create", *at, env=env).stdout.strip()
        newer = hfms("keys", "rotate", read_secret(key).id, *at, env=env).stdout.strip()
        for tried in (key, newer, newer[:-7] + "x" + newer[-6:]):
            status_of(url, tried)
            status_of(url, tried, "/admin/keys/list")
        server.terminate()
        reader.join(30)
    log = "".join(said)
    assert '"path": "/admin/keys/list"' in log
    store = {"keys.db", "keys.db-wal", "keys.db-shm"}
    files = [f for f in state.rglob("*") if f.is_file()]
    kept = b"".join(f.read_bytes() for f in files if f.name in store)
    rest = b"".join(f.read_bytes() for f in files if f.name not in store)
    assert read_secret(newer).digest.encode() in kept
    for text in (key, newer):
        secret = read_secret(text)
        assert secret.text not in log
        assert secret.text.encode() not in kept + rest
        assert secret.digest not in log
        assert secret.digest.encode() not in rest
    assert ADMIN not in log


@pytest.mark.parametrize("other", [postgres_server, redis_server])
def test_keys_move_to_another_store_and_go_on_to_be_good(hfms, tmp_path, serving, other):
    made = [json.loads(hfms("keys", "create", "--name", f"k{i}", "--json").stdout) for i in range(3)]
    hfms("keys", "revoke", made[2]["key_id"])
    hfms("keys", "export", "keys.json")
    assert stat.S_IMODE(os.stat(tmp_path / "keys.json").st_mode) == 0o600
    assert all(m["api_key"][15:-6] not in (tmp_path / "keys.json").read_text() for m in made)
    assert hfms("keys", "export", "keys.json").returncode == 1  # never over a file
    with other() as url:
        env = {"HFMS_KEY_STORE": url}
        assert hfms("keys", "import", "keys.json", env=env).stdout == "3 imported, 0 there already\n"
        assert hfms("keys", "import", "keys.json", env=env).stdout == "0 imported, 3 there already\n"
        server = serving(env=env)
        assert [status_of(server, m["api_key"]) for m in made] == [200, 200, 401]
        listed = hfms("keys", "list", env=env)
        assert [line.split()[1] for line in listed.stdout.splitlines()[1:]] == ["k0", "k1", "k2"]
        shown = hfms("config", "show", env=env).stdout
        assert url not in shown


def test_an_import_replaces_only_when_told(keys):
    made = json.loads(keys("create", "--cache-group", "team", "--json").stdout)
    exported = keys("export").stdout
    assert made["api_key"][15:-6] not in exported
    keys("revoke", made["key_id"])
    refused = keys("import", "-", stdin=exported)
    assert refused.returncode == 1
    assert "already" in refused.stderr
    assert json.loads(keys("list", "--json").stdout)[0]["status"] == "revoked"
    assert keys("import", "-", "--replace", stdin=exported).stdout == "1 imported, 0 there already\n"
    [row] = json.loads(keys("list", "--json").stdout)
    assert (row["status"], row["cache_group"]) == ("active", "team")
    deeds = [line["action"] for line in json.loads(keys("audit", "--last", "4", "--json").stdout)]
    assert deeds == ["key.export", "key.revoke", "key.import", "key.import"]  # the refused one, too


def test_what_is_no_export_is_refused(keys):
    row = '[{"id": "%s", "digest": "%s", "policy": {"priority": %d}, "created_at": 1}]'
    digest = "0" * 64
    key_id = "a" * 12
    rows = [row % ("../x", digest, 1), row % (key_id, "hunter2", 1), row % (key_id, digest, 9)]
    for text in ("", "{}", "[{}]", "\xff", *rows):
        done = keys("import", "-", stdin=text)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "`hfms keys export`" in done.stderr
        assert "hunter2" not in done.stderr


def test_a_store_that_is_away_is_told_without_its_password(hfms, free_port):
    done = hfms("keys", "list", env={"HFMS_KEY_STORE": f"postgresql://u:hunter2@127.0.0.1:{free_port}/d"})
    assert done.returncode == 1
    assert "the key store cannot be reached" in done.stderr
    assert "refused" in done.stderr
    assert "hunter2" not in done.stderr


def test_without_auth_in_the_order_there_is_no_such_verb(hfms):
    done = hfms("keys", "list", env={"HFMS_ENABLE_AUTH": "false"})
    assert done.returncode == 2
    assert "No such command 'keys'" in done.stderr


def test_the_audit_log_is_shown(hfms):
    hfms("keys", "create", "--name", "n")
    assert [line.split()[1] for line in hfms("keys", "audit").stdout.splitlines()] == ["ACTION", "key.create"]
