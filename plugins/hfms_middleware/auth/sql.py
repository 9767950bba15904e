"""What SQLite and PostgreSQL have in common: the tables, and every statement. Written with `?` for values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import msgspec

from hfms_cli import ConfigError
from hfms_middleware.auth.keys import StoredKey
from hfms_middleware.auth.store import key_exists, no_such_key

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE hfms_keys (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, record TEXT NOT NULL, used_at DOUBLE "
        "PRECISION)",
        "CREATE INDEX hfms_keys_by_revision ON hfms_keys (revision)",
        "CREATE TABLE hfms_keys_revision (value BIGINT NOT NULL)",
        "INSERT INTO hfms_keys_revision (value) VALUES (0)",
    ),
)
"""What leads from one version of the schema to the next; the last one's number is the version. Only ever added to."""

Execute = Callable[..., Iterable[Sequence[Any]]]
_decode = msgspec.json.Decoder(StoredKey).decode


class Transaction(Protocol):
    """Opens a transaction, and gives what runs a statement in it.

    write: alone among all writers, on a connection of its own, so that no reader waits for it.
    durable: on the disk when it is done; else it may be lost with the machine, but not with the process.
    """

    def __call__(self, *, write: bool, durable: bool = True) -> AbstractContextManager[Execute]: ...


def migrate(execute: Execute, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring the tables to this version of hfms. Call it in a transaction that is alone. Raises ConfigError."""
    execute("CREATE TABLE IF NOT EXISTS hfms_keys_schema (version INTEGER NOT NULL)")
    rows = list(execute("SELECT version FROM hfms_keys_schema"))
    version = rows[0][0] if rows else 0
    if version > len(migrations):
        raise ConfigError(
            f"the key store has schema {version} and this hfms knows {len(migrations)}: it was written by a newer hfms",
            param="store",
        )
    for statements in migrations[version:]:
        for statement in statements:
            execute(statement)
    if not rows:
        execute("INSERT INTO hfms_keys_schema (version) VALUES (?)", (len(migrations),))
    elif version < len(migrations):
        execute("UPDATE hfms_keys_schema SET version = ?", (len(migrations),))


class SqlStore:
    """The store's methods over two connections, each used by one thread at a time."""

    def __init__(self, transaction: Transaction, duplicate: type[Exception]) -> None:
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._transaction = transaction
        self._duplicate = duplicate
        """What the database raises where an id is taken."""

    def changes(self, since: int) -> tuple[int, list[StoredKey]]:
        with self._reading, self._transaction(write=False) as execute:
            # The revision first: what is written between the two statements is told again the next time.
            revision = _revision(execute)
            after = since if revision >= since else -1
            rows = list(execute("SELECT record FROM hfms_keys WHERE revision > ? ORDER BY revision", (after,)))
        return revision, [_decode(row[0]) for row in rows]

    def insert(self, key: StoredKey) -> None:
        try:
            with self._writing, self._transaction(write=True) as execute:
                values = (key.id, _next_revision(execute), _encode(key))
                execute("INSERT INTO hfms_keys (id, revision, record) VALUES (?, ?, ?)", values)
        except self._duplicate:
            raise key_exists(key.id) from None

    def update(self, key_id: str, change: Callable[[StoredKey], StoredKey]) -> StoredKey:
        with self._writing, self._transaction(write=True) as execute:
            revision = _next_revision(execute)  # takes the lock that makes this process the only writer
            rows = list(execute("SELECT record FROM hfms_keys WHERE id = ?", (key_id,)))
            if not rows:
                raise no_such_key(key_id)
            key = change(_decode(rows[0][0]))
            execute("UPDATE hfms_keys SET revision = ?, record = ? WHERE id = ?", (revision, _encode(key), key_id))
        return key

    def touch(self, used: Mapping[str, float]) -> None:
        with self._writing, self._transaction(write=True, durable=False) as execute:
            for key_id, at in sorted(used.items()):  # in one order, so that two servers cannot wait for each other
                statement = "UPDATE hfms_keys SET used_at = ? WHERE id = ? AND (used_at IS NULL OR used_at < ?)"
                execute(statement, (at, key_id, at))

    def last_used(self) -> dict[str, float]:
        with self._reading, self._transaction(write=False) as execute:
            rows = execute("SELECT id, used_at FROM hfms_keys WHERE used_at IS NOT NULL")
            return {str(row[0]): float(row[1]) for row in rows}


def _revision(execute: Execute) -> int:
    (row,) = execute("SELECT value FROM hfms_keys_revision")
    return int(row[0])


def _next_revision(execute: Execute) -> int:
    """The row stays locked until the transaction ends, so revisions become visible in their order."""
    execute("UPDATE hfms_keys_revision SET value = value + 1")
    return _revision(execute)


def _encode(key: StoredKey) -> str:
    return msgspec.json.encode(key).decode()
