"""Keys in a file of this machine, shared by all its processes. The file is made when the first key is."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfms_cli import HfmsError
from hfms_middleware.auth.keys import StoredKey
from hfms_middleware.auth.sql import MIGRATIONS, Execute, SqlStore, migrate
from hfms_middleware.auth.store import StoreUnavailable, no_such_key

BUSY_SECONDS = 10.0
"""How long a writer waits for another process's transaction."""


class SqliteStore(SqlStore):
    """WAL, so that readers never wait; every transaction is on the disk before it counts as done."""

    kind = "sqlite"

    def __init__(self, file: Path) -> None:
        super().__init__(self._begin, sqlite3.IntegrityError)
        self._file = file
        self._connections: dict[bool, sqlite3.Connection] = {}
        """Whether it writes -> connection."""

    def changes(self, since: int) -> tuple[int, list[StoredKey]]:
        return super().changes(since) if self._exists() else (0, [])

    def last_used(self) -> dict[str, float]:
        return super().last_used() if self._exists() else {}

    def update(self, key_id: str, change: Callable[[StoredKey], StoredKey]) -> StoredKey:
        if not self._exists():
            raise no_such_key(key_id)
        return super().update(key_id, change)

    def close(self) -> None:
        with self._reading, self._writing:
            for connection in self._connections.values():
                connection.close()
            self._connections.clear()

    def _exists(self) -> bool:
        return bool(self._connections) or self._file.exists()

    @contextmanager
    def _begin(self, *, write: bool, durable: bool = True) -> Iterator[Execute]:
        try:
            if write not in self._connections:
                self._connections[write] = self._connect()
            connection = self._connections[write]
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield connection.execute
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise
        except (sqlite3.Error, OSError) as exc:
            raise StoreUnavailable(f"{self._file}: {exc}") from exc

    def _connect(self) -> sqlite3.Connection:
        if not self._file.exists():
            self._make_file()
        connection = sqlite3.connect(
            self._file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if not _is_current(connection):
                connection.execute("BEGIN IMMEDIATE")
                migrate(connection.execute)
                connection.execute("COMMIT")
        except (sqlite3.Error, HfmsError):
            connection.close()
            raise
        return connection

    def _make_file(self) -> None:
        """An empty store that only its owner can read; SQLite gives those beside it the same permissions.

        It is made under another name: to close a file drops all locks that its process has on it, SQLite's too. It is
        in WAL mode before others see it: of two who change the mode at once one is refused, however long it would wait.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        number, draft = tempfile.mkstemp(prefix=f".{self._file.name}-", dir=self._file.parent)
        os.close(number)
        try:
            connection = sqlite3.connect(draft)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
            with suppress(FileExistsError):  # another process was quicker
                os.link(draft, self._file)
        finally:
            os.unlink(draft)


def _is_current(connection: sqlite3.Connection) -> bool:
    """Whether there is nothing to migrate: then a new reader need not wait for a writer."""
    try:
        found = connection.execute("SELECT version FROM hfms_keys_schema").fetchone()
    except sqlite3.OperationalError:  # no such table
        return False
    return bool(found == (len(MIGRATIONS),))
