"""Keys in memory, and how soon they know what the store knows."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from hfms_middleware.auth.keyring import FRESH_SECONDS, TOUCH_SECONDS, BadKey, Keyring, NeverBack
from hfms_middleware.auth.keys import Policy, StoredKey, new_secret
from hfms_middleware.auth.sqlite import SqliteStore
from hfms_middleware.auth.store import StoreUnavailable


class Clock:
    def __init__(self, at: float = 1000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class Counting(SqliteStore):
    """A store that counts questions, and can be taken away."""

    asked = 0
    away = False

    def changes(self, since):
        self.asked += 1
        if self.away:
            raise StoreUnavailable("it is away")
        return super().changes(since)


@pytest.fixture
def store(tmp_path):
    made = Counting(tmp_path / "keys.db")
    yield made
    made.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def ring(store, clock):
    made = Keyring(store, now=NeverBack(clock), clock=clock)
    yield made
    await made.close()


def put(store, **policy):
    secret = new_secret()
    store.insert(StoredKey(id=secret.id, digest=secret.digest, policy=Policy(**policy), created_at=1.0))
    return secret


def reason(ring, secret) -> str:
    with pytest.raises(BadKey) as caught:
        ring.check(secret)
    return caught.value.reason


async def test_a_key_is_found_and_carries_its_policy(store, ring):
    secret = put(store, name="n", admin=True, priority=2, tokens_per_day=7, allowed_models=("a*",))
    await ring.refresh()
    caller = ring.check(secret).caller()
    assert (caller.key_id, caller.name, caller.admin, caller.priority) == (secret.id, "n", True, 2)
    assert (caller.tokens_per_day, caller.requests_per_minute, caller.allowed_models) == (7, None, ("a*",))


async def test_a_wrong_secret_and_an_unknown_id_are_refused_in_the_same_words(store, ring):
    secret = put(store)
    await ring.refresh()
    said = set()
    for wrong, why in ((new_secret(secret.id), "wrong"), (new_secret(), "unknown")):
        with pytest.raises(BadKey) as caught:
            ring.check(wrong)
        assert caught.value.reason == why
        said.add(caught.value.message)
    assert len(said) == 1


async def test_a_revocation_elsewhere_is_in_force_after_half_a_second(store, ring, clock):
    secret = put(store)
    await ring.refresh()
    ring.check(secret)
    store.update(secret.id, lambda k: msgspec.structs.replace(k, revoked_at=5.0))
    clock.at += FRESH_SECONDS
    await ring.refresh()
    assert reason(ring, secret) == "revoked"


async def test_many_requests_at_once_ask_the_store_one_question(store, ring, clock):
    put(store)
    await asyncio.gather(*(ring.refresh() for _ in range(100)))
    assert store.asked == 1
    clock.at += FRESH_SECONDS / 2
    await ring.refresh()
    assert store.asked == 1
    clock.at += FRESH_SECONDS / 2
    await asyncio.gather(*(ring.refresh() for _ in range(100)))
    assert store.asked == 2


async def test_an_unknown_id_asks_the_store_nothing(store, ring):
    put(store)
    await ring.refresh()
    for _ in range(50):
        assert reason(ring, new_secret()) == "unknown"
    assert store.asked == 1


async def test_a_store_that_is_away_makes_no_key_good(store, ring, clock):
    secret = put(store)
    await ring.refresh()
    store.away = True
    clock.at += FRESH_SECONDS
    with pytest.raises(StoreUnavailable):
        await ring.refresh()
    with pytest.raises(StoreUnavailable):  # and is not asked for each request
        await ring.refresh()
    assert store.asked == 2
    assert ring.trouble == "it is away"
    store.away = False
    clock.at += FRESH_SECONDS
    await ring.refresh()
    assert ring.check(secret).id == secret.id
    assert ring.trouble is None


async def test_a_store_that_lost_its_keys_does_not_open_the_door(store, ring, clock, tmp_path):
    secret = put(store)
    await ring.refresh()
    store.close()
    for file in tmp_path.glob("keys.db*"):
        file.unlink()
    clock.at += FRESH_SECONDS
    await ring.refresh()
    assert reason(ring, secret) == "unknown"
    assert ring.ever_had_keys


async def test_the_old_secret_is_good_during_its_grace_and_not_after(store, ring, clock):
    old = put(store)
    new = new_secret(old.id)
    store.update(
        old.id,
        lambda k: msgspec.structs.replace(k, digest=new.digest, old_digest=k.digest, old_until=clock.at + 60),
    )
    await ring.refresh()
    clock.at += 59.9
    assert ring.check(old).id == ring.check(new).id
    clock.at += 0.1
    assert reason(ring, old) == "wrong"
    assert ring.check(new).id == new.id


async def test_a_clock_that_is_set_back_does_not_revive_an_expired_key(store, ring, clock):
    secret = put(store, expires_at=clock.at + 10)
    await ring.refresh()
    ring.check(secret)
    clock.at += 10
    assert reason(ring, secret) == "expired"
    clock.at -= 3600
    assert reason(ring, secret) == "expired"


async def test_the_last_use_is_written_once_a_minute(store, ring, clock):
    secret = put(store)
    await ring.refresh()
    began = clock.at
    for _ in range(20):
        ring.check(secret)
    await ring._telling
    assert store.last_used() == {secret.id: began}
    clock.at += TOUCH_SECONDS - 1
    ring.check(secret)
    await ring._telling
    assert store.last_used() == {secret.id: began}
    clock.at += 1
    ring.check(secret)
    await ring._telling
    assert store.last_used() == {secret.id: began + TOUCH_SECONDS}


async def test_a_last_use_that_could_not_be_written_fails_no_request_and_is_written_later(store, ring, monkeypatch):
    secret = put(store)
    await ring.refresh()
    whole = store._file
    store.close()
    store._file = whole.with_name("folder")  # opening a folder fails
    store._file.mkdir()
    ring.check(secret)
    await ring._telling
    store._file = whole
    ring.check(secret)
    await ring._telling
    assert secret.id in store.last_used()
