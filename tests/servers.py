"""Real servers that tests talk to: Redis and PostgreSQL, each on a free port of loopback and ended by its id.

A test that needs one that this machine lacks is skipped, and says so; `.ci/system.sh` installs both.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def redis_server() -> Iterator[str]:
    """A Redis that keeps nothing on the disk; yields its URL."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on this machine")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory(prefix="hfms-redis-") as folder, _running([*command, "--dir", folder], port):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL with an empty database; yields its URL, which holds a password."""
    programs = shutil.which("initdb"), shutil.which("postgres")
    if None in programs:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        programs = (str(found[-1]), str(found[-1].with_name("postgres"))) if found else (None, None)
    initdb, postgres = programs
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL (initdb, postgres) is not on this machine")
    # It refuses to be run by root, in whose place anybody else will do.
    user = "nobody" if os.geteuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="hfms-pg-") as folder:
        data, password = Path(folder, "data"), Path(folder, "password")
        password.write_text("p%4041word\n")
        os.chmod(folder, 0o755)
        data.mkdir(mode=0o700)
        if user is not None:
            shutil.chown(data, user)
            shutil.chown(password, user)
        make = [initdb, "--pgdata", str(data), "--username", "hfms", "--auth", "scram-sha-256", "--no-sync"]
        subprocess.run(
            [*make, f"--pwfile={password}", "--encoding", "UTF8", "--locale", "C"],
            check=True, user=user, cwd="/", stdout=subprocess.DEVNULL,
        )  # fmt: skip
        run = [postgres, "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        url = f"postgresql://hfms:p%254041word@127.0.0.1:{port}/postgres"
        with _running([*run, "-c", "unix_socket_directories="], port, user):
            _wait_until_ready(url)
            yield url


@contextmanager
def _running(command: list[str], port: int, user: str | None = None) -> Iterator[None]:
    process = subprocess.Popen(command, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} did not listen within {START_SECONDS:.0f} s"
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL takes SIGTERM for "when the last client has gone"
        process.wait(30)


def _wait_until_ready(url: str) -> None:
    import psycopg

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
