"""Where keys are kept: one contract, and the three places that fulfil it.

Every change of a key gets the store's next revision, and changes are seen in the order of their revisions. So a server
asks only "what has changed since?", and holds all keys in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from hfms_cli import ConfigError, Conflict, NotFound, Unavailable
from hfms_middleware.auth.keys import StoredKey

SQLITE_FILE = "keys.db"
TIMEOUT_SECONDS = 3.0
"""For one connection or one answer of a store that is reached over a network."""


class StoreUnavailable(Unavailable):
    """The store did not answer. The message is for any caller, `reason` for operators; neither holds a password."""

    code = "key_store_unavailable"

    def __init__(self, reason: str) -> None:
        super().__init__("The key store cannot be reached at the moment.")
        self.reason = reason


class KeyStore(Protocol):
    """Blocking, and safe to call from several threads and from several processes at once.

    What a method has written when it returns survives the end of the process by kill -9. Every method may raise
    StoreUnavailable.
    """

    kind: str
    """`sqlite`, `postgresql` or `redis`."""

    def changes(self, since: int) -> tuple[int, list[StoredKey]]:
        """The store's revision, and every key that was changed after revision `since`.

        Where the revision is lower than `since` the store is not what it was, and all keys are told.
        """
        ...

    def insert(self, key: StoredKey) -> None:
        """Keep a new key. Raises Conflict where there is one of its id."""
        ...

    def update(self, key_id: str, change: Callable[[StoredKey], StoredKey]) -> StoredKey:
        """Change a key, alone; `change` may be called more than once. Raises NotFound, and what `change` raises."""
        ...

    def touch(self, used: Mapping[str, float]) -> None:
        """Note when keys were last used (id -> Unix time); never to an earlier time. Not a change of the keys."""
        ...

    def last_used(self) -> dict[str, float]:
        """When keys were last used, as far as they were."""
        ...

    def close(self) -> None: ...


def open_store(url: str, state_dir: Path) -> KeyStore:
    """The store that a URL names; an empty one is SQLite's in the state folder. Connects on first use.

    Raises ConfigError, which does not show the URL: it may hold a password.
    """
    scheme, _, rest = url.partition("://")
    if not url or scheme == "sqlite":
        from hfms_middleware.auth.sqlite import SqliteStore

        if url and not rest.startswith("/"):
            raise ConfigError(
                "[middleware.auth] store: write sqlite:///PATH, with four slashes for a path from the root"
            )
        return SqliteStore(Path(rest[1:]).expanduser() if url else state_dir / SQLITE_FILE)
    if scheme in ("postgresql", "postgres"):
        from hfms_middleware.auth.postgres import PostgresStore

        return PostgresStore(url)
    if scheme in ("redis", "rediss", "unix"):
        from hfms_middleware.auth.redis import RedisStore

        return RedisStore(url)
    raise ConfigError("[middleware.auth] store must begin with sqlite://, postgresql:// or redis://", param="store")


def without_password(text: str, url: str) -> str:
    """A library's message without the password of the URL that it may be about."""
    try:
        password = urlsplit(url).password
    except ValueError:
        return "the URL of the store is not valid"
    for secret in {password, unquote(password)} if password else ():
        text = text.replace(secret, "***")
    return text.strip().partition("\n")[0]


def missing_extra(extra: str) -> ConfigError:
    return ConfigError(
        f"[middleware.auth] store needs more than hfms itself brings: pip install 'hfms[{extra}]'", param="store"
    )


def no_such_key(key_id: str) -> NotFound:
    return NotFound(f"There is no key `{key_id}`.", param="key_id", code="key_not_found")


def key_exists(key_id: str) -> Conflict:
    return Conflict(f"There is a key `{key_id}` already.", param="key_id", code="key_exists")
