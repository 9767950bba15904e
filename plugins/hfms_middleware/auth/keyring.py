"""Every key in memory, never more than half a second behind its store.

A request that finds the news too old waits for one question to the store; nothing runs in between, and an idle server
asks nothing. Where the store does not answer, no stored key is good: a key that was revoked meanwhile must not be.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from hfms_cli import Unauthorized
from hfms_middleware.auth.keys import Secret, StoredKey, read_secret
from hfms_middleware.auth.store import KeyStore, StoreUnavailable

FRESH_SECONDS = 0.5
"""A revocation is in force everywhere after so long, and the time of one question."""
TOUCH_SECONDS = 60.0
"""How often the last use of one key is written."""

Reason = Literal["missing", "malformed", "unknown", "wrong", "expired", "revoked", "token"]
_NOBODY = "0" * 64


class BadKey(Unauthorized):
    """What was sent is no key that is good now. `reason` is for counters, and never shown to a stranger."""

    def __init__(self, reason: Reason, message: str = "Incorrect API key provided.") -> None:
        super().__init__(message)
        self.reason = reason


class NeverBack:
    """The time of day, which never goes back while this process lives.

    A clock that is set back would otherwise revive keys that had expired. What it cannot know is the time before the
    process began.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._latest = 0.0

    def __call__(self) -> float:
        self._latest = max(self._latest, self._wall())
        return self._latest


class Keyring:
    """The keys of one store, for one server."""

    def __init__(
        self, store: KeyStore, *, now: Callable[[], float] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store = store
        self.now = now or NeverBack()
        self._clock = clock
        self._keys: dict[str, StoredKey] = {}
        self._revision = 0
        self._asked = float("-inf")
        self._trouble: StoreUnavailable | None = None
        self._lock = asyncio.Lock()
        self._used: dict[str, float] = {}
        """When keys were last used, as far as the store was told or is about to be."""
        self._untold: dict[str, float] = {}
        self._telling: asyncio.Task[None] | None = None
        self.ever_had_keys = False

    async def refresh(self) -> None:
        """Learn what has changed, where that was not asked lately. Raises StoreUnavailable."""
        if not self._fresh():
            async with self._lock:
                if not self._fresh():  # while this one waited another may have asked
                    await asyncio.to_thread(self.load)
        if self._trouble is not None:
            raise StoreUnavailable(self._trouble.reason)

    def load(self) -> None:
        """Ask the store now; blocking. What goes wrong is kept in `trouble`."""
        asked = self._clock()
        try:
            revision, changed = self.store.changes(self._revision)
        except StoreUnavailable as exc:
            self._trouble = exc
        else:
            known = {} if revision < self._revision else self._keys
            self._keys = known | {key.id: key for key in changed} if changed or not known else known
            self._revision, self._trouble = revision, None
            # A store that lost its keys must not open the door that they had shut.
            self.ever_had_keys = self.ever_had_keys or bool(self._keys)
        self._asked = asked

    def forget_freshness(self) -> None:
        """The store was changed here: the next request asks it."""
        self._asked = float("-inf")

    def check(self, secret: Secret) -> StoredKey:
        """The key that a secret belongs to. Raises BadKey.

        Unknown ids are compared as well, with what no secret has as its digest, so that time tells nothing.
        """
        now, key, digest = self.now(), self._keys.get(secret.id), secret.digest
        grace = key is not None and key.old_until is not None and now < key.old_until
        good = hmac.compare_digest(digest, key.digest if key else _NOBODY)
        good |= hmac.compare_digest(digest, (key.old_digest or _NOBODY) if key and grace else _NOBODY)
        if key is None:
            raise BadKey("unknown")
        if not good:
            raise BadKey("wrong")
        match key.state(now):
            case "revoked":
                raise BadKey("revoked", "This API key was revoked.")
            case "expired":
                raise BadKey("expired", "This API key has expired.")
        self._note_use(key.id, now)
        return key

    def knows(self, text: str) -> bool:
        """Whether a text is written like a key, with an id that the store had when it was last asked."""
        secret = read_secret(text)
        return secret is not None and secret.id in self._keys

    def states(self) -> Counter[str]:
        """How many keys are active, expired and revoked."""
        now = self.now()
        return Counter(key.state(now) for key in self._keys.values())

    @property
    def trouble(self) -> str | None:
        """Why the store could not be asked, for operators."""
        return self._trouble.reason if self._trouble else None

    async def close(self) -> None:
        """Write what is not written yet, and let go of the store."""
        if self._telling is not None:
            await self._telling
        await asyncio.to_thread(self.store.close)

    def _fresh(self) -> bool:
        return self._clock() - self._asked < FRESH_SECONDS

    def _note_use(self, key_id: str, now: float) -> None:
        if now - self._used.get(key_id, float("-inf")) < TOUCH_SECONDS:
            return
        self._used[key_id] = self._untold[key_id] = now
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        """Write last uses in the background: no request waits for it, and none fails by it."""
        while self._untold:
            told, self._untold = self._untold, {}
            try:
                await asyncio.to_thread(self.store.touch, told)
            except StoreUnavailable:
                for key_id in told:
                    self._used.pop(key_id, None)  # its next use is written instead
                return
