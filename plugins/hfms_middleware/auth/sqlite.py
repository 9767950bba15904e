"""Keys in a file of this machine, shared by all its processes. The file is made when the first key is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hfms_cli import HfmsError
from hfms_middleware.auth.keys import StoredKey
from hfms_middleware.auth.sql import Execute, SqlStore, migrate
from hfms_middleware.auth.store import StoreUnavailable, no_such_key

BUSY_SECONDS = 10.0
"""How long a writer waits for another process's transaction."""


class SqliteStore(SqlStore):
    """WAL, so that readers never wait; every transaction is on the disk before it counts as done."""

    kind = "sqlite"

    def __init__(self, file: Path) -> None:
        super().__init__(self._begin, sqlite3.IntegrityError)
        self._file = file
        self._connection: sqlite3.Connection | None = None

    def changes(self, since: int) -> tuple[int, list[StoredKey]]:
        return super().changes(since) if self._exists() else (0, [])

    def last_used(self) -> dict[str, float]:
        return super().last_used() if self._exists() else {}

    def update(self, key_id: str, change: Callable[[StoredKey], StoredKey]) -> StoredKey:
        if not self._exists():
            raise no_such_key(key_id)
        return super().update(key_id, change)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _exists(self) -> bool:
        return self._connection is not None or self._file.exists()

    @contextmanager
    def _begin(self, *, write: bool) -> Iterator[Execute]:
        try:
            connection = self._connection = self._connection or self._connect()
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
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite gives the files beside this one its permissions; its own default would let everybody read.
        os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(
            self._file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            migrate(connection.execute)
            connection.execute("COMMIT")
        except (sqlite3.Error, HfmsError):
            connection.close()
            raise
        return connection
