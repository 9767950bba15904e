"""One contract, and every store that claims to fulfil it: SQLite, a real PostgreSQL, a real Redis."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from hfms_cli import ConfigError, Conflict, NotFound
from hfms_middleware.auth.sql import MIGRATIONS, migrate
from hfms_middleware.auth.store import StoreUnavailable, open_store
from tests.middleware.auth.conftest import a_key


def renamed(name):
    return lambda key: msgspec.structs.replace(key, policy=msgspec.structs.replace(key.policy, name=name))


def test_an_empty_store_tells_nothing(store):
    assert store.changes(0) == (0, [])
    assert store.changes(-1) == (0, [])
    assert store.last_used() == {}


def test_what_was_inserted_is_told_whole_to_every_server(opened):
    key = a_key(name="ännchen 'x'", admin=True, priority=3, requests_per_minute=5, allowed_models=("a/*", "b"))
    opened().insert(key)
    revision, found = opened().changes(0)
    assert (revision, found) == (1, [key])


def test_only_what_changed_since_is_told(opened):
    here, there = opened(), opened()
    first, second = a_key(), a_key()
    here.insert(first)
    seen, _ = there.changes(0)
    here.insert(second)
    here.update(second.id, renamed("two"))
    revision, found = there.changes(seen)
    assert [key.id for key in found] == [second.id]
    assert found[0].policy.name == "two"
    assert revision > seen
    assert there.changes(revision) == (revision, [])


def test_an_id_is_given_once(opened):
    key = a_key()
    opened().insert(key)
    with pytest.raises(Conflict):
        opened().insert(msgspec.structs.replace(key, created_at=1.0))
    assert opened().changes(0)[1] == [key]


def test_what_is_not_there_cannot_be_changed(store):
    with pytest.raises(NotFound):
        store.update("x" * 12, renamed("x"))
    store.insert(a_key())
    with pytest.raises(NotFound):
        store.update("x" * 12, renamed("x"))


def test_a_change_that_raises_changes_nothing(opened):
    here, key = opened(), a_key()
    here.insert(key)

    def refuse(key):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        here.update(key.id, refuse)
    assert opened().changes(0) == (1, [key])
    here.update(key.id, renamed("yes"))
    assert here.changes(1)[1][0].policy.name == "yes"


def test_the_last_use_never_goes_back_and_is_no_change(opened):
    here, there = opened(), opened()
    key = a_key()
    here.insert(key)
    here.touch({key.id: 50.5})
    there.touch({key.id: 40.0})
    assert here.last_used() == {key.id: 50.5}
    there.touch({key.id: 60.0})
    assert here.last_used() == {key.id: 60.0}
    assert here.changes(1) == (1, [])


def test_concurrent_changes_of_one_key_are_all_made(opened):
    key = a_key(priority=0)
    opened().insert(key)
    servers = [opened() for _ in range(4)]
    start = threading.Barrier(4)

    def count(server):
        start.wait()
        for _ in range(10):
            server.update(key.id, lambda k: msgspec.structs.replace(k, created_at=k.created_at + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, servers))
    assert servers[0].changes(0)[1][0].created_at == key.created_at + 40


def test_a_reader_misses_nothing_while_others_write(opened):
    """Who asks only for what is new must end with all there is, in whatever order writers finish."""
    writers, reader = [opened() for _ in range(4)], opened()
    written, done = [], threading.Event()

    def write(server):
        for _ in range(15):
            key = a_key()
            server.insert(key)
            written.append(key.id)

    seen: set[str] = set()

    def read():
        revision = 0
        while True:
            last = done.is_set()
            revision, found = reader.changes(revision)
            seen.update(key.id for key in found)
            if last:
                return

    thread = threading.Thread(target=read)
    thread.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, writers))
    done.set()
    thread.join()
    assert seen == set(written)
    assert len(seen) == 60


def test_processes_may_all_be_the_first(store_url):
    """Whoever finds no store makes one, and of many at once none is refused."""
    code = (
        "import sys; from pathlib import Path\n"
        "from hfms_middleware.auth.store import open_store\n"
        "from tests.middleware.auth.conftest import a_key\n"
        "store = open_store(sys.argv[1], Path('.')); print(flush=True); sys.stdin.readline(); store.insert(a_key())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, store_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    for process in processes:
        process.stdout.readline()  # all are about to write
    for process in processes:
        process.communicate(b"\n", timeout=60)
    assert [process.returncode for process in processes] == [0] * 6


def test_another_process_that_comes_and_goes_is_heard(store_url, opened):
    """SQLite forgets its locks on a file where its process closes that file by any other hand."""
    here, key = opened(), a_key()
    here.insert(key)
    assert here.changes(0) == (1, [key])
    code = (
        "import sys; from pathlib import Path\n"
        "from hfms_middleware.auth.store import open_store\n"
        "from tests.middleware.auth.conftest import a_key\n"
        "store = open_store(sys.argv[1], Path('.')); store.insert(a_key()); store.changes(0); store.close()"
    )
    for revision in (2, 3):
        subprocess.run([sys.executable, "-c", code, store_url], check=True, timeout=60)
        here.touch({key.id: float(revision)})
        assert here.changes(revision - 1)[0] == revision


def test_a_key_outlives_the_process_that_made_it(store_url, opened, tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from hfms_middleware.auth.store import open_store\n"
        "from tests.middleware.auth.conftest import a_key\n"
        "key = a_key(); open_store(sys.argv[1], Path('.')).insert(key)\n"
        "print(key.id, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, store_url], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    assert [key.id for key in opened().changes(0)[1]] == [done.stdout.strip()]


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_no_reader_waits_for_a_writer(opened):
    """Another server's long write must not keep this one from hearing of a revocation; nor must its own."""
    here, there, key = opened(), opened(), a_key()
    here.insert(key)
    writing, go_on = threading.Event(), threading.Event()

    def slowly(key):
        writing.set()
        assert go_on.wait(30)
        return key

    thread = threading.Thread(target=lambda: here.update(key.id, slowly))
    thread.start()
    try:
        assert writing.wait(30)
        assert here.changes(0) == there.changes(0) == (1, [key])
    finally:
        go_on.set()
        thread.join()
    assert here.changes(1) == (2, [key])


# Servers that are away, and what must not be said of them.


@pytest.mark.parametrize(
    "url", ["postgresql://hfms:p%254041word@127.0.0.1:{port}/x", "redis://:p%254041word@127.0.0.1:{port}/0"]
)
def test_a_store_that_is_away_is_unavailable_and_its_password_is_not_told(url, tmp_path, free_port):
    store = open_store(url.format(port=free_port), tmp_path)
    with pytest.raises(StoreUnavailable) as caught:
        store.changes(0)
    assert "word" not in caught.value.reason
    assert "word" not in caught.value.message
    assert "127.0.0.1" not in caught.value.message


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_postgres_is_asked_again_after_it_cut_the_connection(opened, store_url):
    import psycopg

    store = opened()
    store.insert(a_key())
    with psycopg.connect(store_url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hfms'")
    assert store.changes(0)[0] == 1
    store.insert(a_key())
    assert store.changes(0)[0] == 2


@pytest.mark.parametrize("store_url", ["redis"], indirect=True)
def test_a_store_that_was_emptied_is_told_as_it_is(opened, store_url):
    from redis import Redis

    store = opened()
    store.insert(a_key())
    store.insert(a_key())
    seen, _ = store.changes(0)
    with Redis.from_url(store_url) as client:
        client.flushall()
    key = a_key()
    store.insert(key)
    assert store.changes(seen) == (1, [key])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://u:hunter2@h/d", "must begin with sqlite://"),
        ("sqlite://keys.db", "sqlite:///PATH"),
        ("redis://:hunter2@host:many/0", "Port could not be"),
        ("postgresql://u:hunter2@127.0.0.1:many/d", "many"),
    ],
)
def test_a_url_that_is_none_is_told_without_showing_it(url, said, tmp_path):
    with pytest.raises((ConfigError, StoreUnavailable)) as caught:
        open_store(url, tmp_path).changes(0)
    told = getattr(caught.value, "reason", "") + caught.value.message
    assert said in told
    assert "hunter2" not in told


# The schema.


def test_a_schema_grows_by_the_steps_that_it_lacks(tmp_path):
    connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    migrate(connection.execute)
    key = a_key()
    row = (key.id, 1, msgspec.json.encode(key).decode())
    connection.execute("INSERT INTO hfms_keys (id, revision, record) VALUES (?, ?, ?)", row)
    longer = (*MIGRATIONS, ("ALTER TABLE hfms_keys ADD COLUMN note TEXT",))
    migrate(connection.execute, longer)
    migrate(connection.execute, longer)
    assert connection.execute("SELECT note FROM hfms_keys").fetchall() == [(None,)]
    assert connection.execute("SELECT version FROM hfms_keys_schema").fetchall() == [(len(longer),)]


def test_a_store_of_a_newer_hfms_is_refused(opened, store_url):
    store = opened()
    store.insert(a_key())
    if store_url.startswith("redis"):
        from redis import Redis

        with Redis.from_url(store_url) as client:
            client.set("{hfms:keys}:schema", 99)
    elif store_url.startswith("postgres"):
        import psycopg

        with psycopg.connect(store_url) as connection:
            connection.execute("UPDATE hfms_keys_schema SET version = 99")
    else:
        connection = sqlite3.connect(store_url.removeprefix("sqlite:///"))
        with connection:
            connection.execute("UPDATE hfms_keys_schema SET version = 99")
    with pytest.raises(ConfigError, match="newer hfms"):
        opened().changes(0)


# The file.


def test_sqlites_file_is_made_by_the_first_key_and_read_by_nobody_else(tmp_path):
    folder = tmp_path / "state"
    store = open_store("", folder)
    assert store.changes(0) == (0, [])
    assert not folder.exists()
    old = os.umask(0)
    try:
        store.insert(a_key())
    finally:
        os.umask(old)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()}
    assert modes == {"keys.db": 0o600, "keys.db-wal": 0o600, "keys.db-shm": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    store.close()


def test_sqlite_syncs_every_transaction_to_the_disk(tmp_path):
    store = open_store("", tmp_path)
    store.insert(a_key())
    pragma = store._connections[True].execute
    assert pragma("PRAGMA journal_mode").fetchone() == ("wal",)
    assert pragma("PRAGMA synchronous").fetchone() == (2,)
    store.close()


def test_a_file_that_is_no_store_is_told(tmp_path):
    (tmp_path / "keys.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreUnavailable) as caught:
        open_store("", tmp_path).changes(0)
    assert "not a database" in caught.value.reason
