"""Stores of every kind, each empty for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hfms_middleware.auth.keys import Policy, StoredKey, new_secret
from hfms_middleware.auth.store import KeyStore, open_store
from tests.servers import postgres_server, redis_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="session")
def redis() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def store_url(request, tmp_path) -> str:
    """The URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/keys/keys.db"
    if request.param == "postgresql":
        import psycopg

        url = request.getfixturevalue("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url
    from redis import Redis

    url = request.getfixturevalue("redis")
    with Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def opened(store_url, tmp_path) -> Iterator[Callable[[], KeyStore]]:
    """`opened()` is one more connection to the store, as another server has it."""
    stores: list[KeyStore] = []

    def another() -> KeyStore:
        stores.append(open_store(store_url, tmp_path))
        return stores[-1]

    yield another
    for store in stores:
        store.close()


@pytest.fixture
def store(opened) -> KeyStore:
    return opened()


def a_key(created_at: float = 1000.0, **policy: object) -> StoredKey:
    secret = new_secret()
    return StoredKey(id=secret.id, digest=secret.digest, policy=Policy(**policy), created_at=created_at)
