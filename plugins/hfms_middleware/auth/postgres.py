"""Keys in PostgreSQL, shared by all servers that reach it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hfms_middleware.auth.sql import Execute, SqlStore, migrate
from hfms_middleware.auth.store import TIMEOUT_SECONDS, StoreUnavailable, missing_extra, without_password

if TYPE_CHECKING:
    import psycopg

_MIGRATION_LOCK = 0x68666D73  # "hfms"; any number that nobody else takes


class PostgresStore(SqlStore):
    """Connections are made anew when they broke. Writers wait for each other on the row that holds the revision."""

    kind = "postgresql"

    def __init__(self, url: str) -> None:
        try:
            import psycopg
        except ImportError as exc:
            raise missing_extra("postgres") from exc
        super().__init__(self._begin, psycopg.errors.UniqueViolation)
        self._url = url
        self._connections: dict[bool, psycopg.Connection] = {}
        """Whether it writes -> connection."""

    def close(self) -> None:
        with self._reading, self._writing:
            self._drop(False)
            self._drop(True)

    def _drop(self, write: bool) -> None:
        if connection := self._connections.pop(write, None):
            with suppress(Exception):  # it is broken as likely as not
                connection.close()

    @contextmanager
    def _begin(self, *, write: bool, durable: bool = True) -> Iterator[Execute]:
        import psycopg

        try:
            connection = self._connected(write)
            with connection.transaction():
                if not durable:
                    connection.execute("SET LOCAL synchronous_commit = off")
                yield _execute(connection)
        except psycopg.errors.UniqueViolation:
            raise
        except psycopg.Error as exc:
            self._drop(write)
            raise StoreUnavailable(without_password(str(exc), self._url)) from exc

    def _connected(self, write: bool) -> psycopg.Connection:
        """A connection that answers: one that was left idle may have been cut meanwhile."""
        import psycopg

        if kept := self._connections.get(write):
            try:
                kept.execute("SELECT 1")
            except psycopg.Error:
                self._drop(write)
            else:
                return kept
        milliseconds = int(TIMEOUT_SECONDS * 1000)
        connection = psycopg.connect(
            self._url,
            autocommit=True,  # so that only `transaction()` begins one
            connect_timeout=int(TIMEOUT_SECONDS),
            application_name="hfms",
            options=f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            tcp_user_timeout=milliseconds,
        )
        try:
            with connection.transaction():
                connection.execute(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
                migrate(_execute(connection))
        except BaseException:
            connection.close()
            raise
        self._connections[write] = connection
        return connection


def _execute(connection: psycopg.Connection) -> Execute:
    def execute(statement: str, values: Sequence[Any] = ()) -> Iterable[Sequence[Any]]:
        cursor = connection.execute(statement.replace("?", "%s").encode(), values)
        return cursor.fetchall() if cursor.description else ()

    return execute
