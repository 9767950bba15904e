"""What administrators do with keys, the same over HTTP and at the command line. All of it blocks."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import asdict, replace

from hfms_cli import BadRequest
from hfms_middleware.auth.audit import Actor, AuditLog, iso
from hfms_middleware.auth.keys import PRIORITIES, Policy, StoredKey, is_key_id, new_secret
from hfms_middleware.auth.store import KeyStore, no_such_key

LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Glob = Annotated[str, Meta(min_length=1, max_length=512)]


class KeyRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/keys/generate`. A limit that is not given is the server's own."""

    name: Annotated[str, Meta(max_length=100)] = ""
    admin: bool = False
    priority: int | str = "NORMAL"
    """The highest that the key may ask for: LOW, NORMAL, HIGH, CRITICAL, or 0 to 3."""
    rate_limit: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Requests a minute."""
    token_limit: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    """Tokens a minute."""
    daily_token_limit: Annotated[int, Meta(ge=1, le=1_000_000_000_000)] | None = None
    allowed_models: Annotated[list[Glob], Meta(max_length=1000)] = []
    cache_group: Annotated[str, Meta(max_length=100)] = ""
    """Keys of one group share what is cached of their prompts and answers."""
    expires_at: str | float | None = None
    """A date and time with its zone (ISO 8601), or Unix seconds."""

    def policy(self, now: float) -> Policy:
        """What is to be kept. Raises BadRequest for what the types cannot say."""
        for field, texts in (
            ("name", [self.name]),
            ("allowed_models", self.allowed_models),
            ("cache_group", [self.cache_group]),
        ):
            if any(_CONTROLS.search(text) for text in texts):
                raise BadRequest(f"`{field}` holds control characters.", param=field)
        expires_at = _time(self.expires_at)
        if expires_at is not None and not now < expires_at <= LATEST:
            raise BadRequest("`expires_at` is not in the future.", param="expires_at")
        return Policy(
            name=self.name,
            admin=self.admin,
            priority=_priority(self.priority),
            requests_per_minute=self.rate_limit,
            tokens_per_minute=self.token_limit,
            tokens_per_day=self.daily_token_limit,
            allowed_models=tuple(self.allowed_models),
            cache_group=self.cache_group,
            expires_at=expires_at,
        )


class RotateRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/keys/{key_id}/rotate`."""

    grace_seconds: Annotated[int, Meta(ge=0, le=30 * 86400)] = 0
    """How long the old secret stays good beside the new one."""


class ImportRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/keys/import`: what `GET /admin/keys/export` answers, and what to do with keys that are there."""

    keys: list[StoredKey]
    replace: bool = False
    """Keys that are there and differ."""


class KeyAdmin:
    """Changes keys in a store. Each change is in the audit log before it is made."""

    def __init__(self, store: KeyStore, audit: AuditLog, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._audit = audit
        self._now = now

    def create(self, asked: KeyRequest, actor: Actor) -> dict[str, Any]:
        """A new key, with its secret in `api_key`: it is never told again."""
        now, secret = self._now(), new_secret()
        policy = asked.policy(now)
        key = StoredKey(
            id=secret.id, digest=secret.digest, policy=policy, created_at=round(now, 3), created_by=actor.who
        )
        self._audit.write(actor, "key.create", key=key.id, policy=asdict(policy))
        self._store.insert(key)
        return {"api_key": str(secret), **describe(key, now)}

    def all(self) -> list[dict[str, Any]]:
        """Every key, the oldest first; never a secret."""
        now, used = self._now(), self._store.last_used()
        _, keys = self._store.changes(-1)
        return [describe(k, now, used.get(k.id)) for k in sorted(keys, key=lambda k: (k.created_at, k.id))]

    def show(self, key_id: str) -> dict[str, Any]:
        """One key. Raises NotFound."""
        return describe(self._find(key_id), self._now(), self._store.last_used().get(key_id))

    def revoke(self, key_id: str, actor: Actor) -> dict[str, Any]:
        """Make a key worthless for good. Raises NotFound; to revoke twice changes nothing."""
        now = self._now()
        self._find(key_id)
        self._audit.write(actor, "key.revoke", key=key_id)
        key = self._store.update(key_id, lambda k: k if k.revoked_at else replace(k, revoked_at=round(now, 3)))
        return describe(key, now)

    def rotate(self, key_id: str, asked: RotateRequest, actor: Actor) -> dict[str, Any]:
        """A new secret for a key, in `api_key`; the old one stays good for a while. Raises NotFound, BadRequest."""
        now, secret = self._now(), new_secret(key_id)
        grace = asked.grace_seconds

        def change(key: StoredKey) -> StoredKey:
            if key.state(now) != "active":
                raise BadRequest(f"The key `{key_id}` is {key.state(now)}; create a new one.", param="key_id")
            return replace(
                key,
                digest=secret.digest,
                rotated_at=round(now, 3),
                old_digest=key.digest if grace else None,
                old_until=round(now + grace, 3) if grace else None,
            )

        change(self._find(key_id))
        self._audit.write(actor, "key.rotate", key=key_id, grace_seconds=grace)
        return {"api_key": str(secret), **describe(self._store.update(key_id, change), now)}

    def export(self, actor: Actor) -> list[StoredKey]:
        """Every key as it is kept, digests included."""
        self._audit.write(actor, "key.export")
        return sorted(self._store.changes(-1)[1], key=lambda k: (k.created_at, k.id))

    def load(self, keys: list[StoredKey], *, replace_known: bool, actor: Actor) -> tuple[int, int]:
        """Keep exported keys; how many were new or replaced, and how many were there already, just so.

        Raises BadRequest before any is kept where one is no key, and Conflict at the first that is there and differs,
        unless it may be replaced.
        """
        for number, key in enumerate(keys):
            _check_import(key, f"keys[{number}]")
        known = {key.id: key for key in self._store.changes(-1)[1]}
        done = 0
        for key in keys:
            if known.get(key.id) == key:
                continue
            self._audit.write(actor, "key.import", key=key.id, policy=asdict(key.policy))
            if key.id in known and replace_known:
                self._store.update(key.id, lambda _, new=key: new)  # type: ignore[misc]
            else:
                self._store.insert(key)
            done += 1
        return done, len(keys) - done

    def audit(self, last: int) -> list[dict[str, Any]]:
        """What administrators did on this machine, the newest last."""
        return list(deque(self._audit.read(), maxlen=last))

    def _find(self, key_id: str) -> StoredKey:
        found = next((key for key in self._store.changes(-1)[1] if key.id == key_id), None)
        if found is None:
            raise no_such_key(key_id)
        return found


def describe(key: StoredKey, now: float, used_at: float | None = None) -> dict[str, Any]:
    """A key as administrators see it."""

    def when(unix: float | None) -> str | None:
        return None if unix is None else iso(unix)

    policy = key.policy
    return {
        "key_id": key.id,
        "name": policy.name,
        "status": key.state(now),
        "admin": policy.admin,
        "priority": PRIORITIES[policy.priority],
        "rate_limit": policy.requests_per_minute,
        "token_limit": policy.tokens_per_minute,
        "daily_token_limit": policy.tokens_per_day,
        "allowed_models": list(policy.allowed_models),
        "cache_group": policy.cache_group,
        "created_at": iso(key.created_at),
        "created_by": key.created_by,
        "expires_at": when(policy.expires_at),
        "revoked_at": when(key.revoked_at),
        "rotated_at": when(key.rotated_at),
        "old_secret_until": when(key.old_until),
        "last_used_at": when(used_at),
    }


def _check_import(key: StoredKey, at: str) -> None:
    """Raises BadRequest for what no export holds."""
    digests = [key.digest, *([key.old_digest] if key.old_digest else [])]
    texts = (key.policy.name, key.policy.cache_group, key.created_by, *key.policy.allowed_models)
    sound = is_key_id(key.id) and all(map(_DIGEST.fullmatch, digests)) and not any(map(_CONTROLS.search, texts))
    if not sound or not 0 <= key.policy.priority < len(PRIORITIES):
        raise BadRequest("This is not what `hfms keys export` writes.", param=at)


def _priority(value: int | str) -> int:
    text = str(value).upper()
    if text in PRIORITIES:
        return PRIORITIES.index(text)
    if text in ("0", "1", "2", "3"):
        return int(text)
    raise BadRequest(f"`priority` must be one of {', '.join(PRIORITIES)}.", param="priority")


def _time(value: str | float | None) -> float | None:
    """Unix seconds of either form; BadRequest where it is neither, or has no time zone."""
    if value is None or value == "":
        return None
    with suppress(ValueError):
        return float(value)
    with suppress(ValueError, OverflowError):
        parsed = datetime.fromisoformat(str(value))
        if parsed.tzinfo is not None:
            return parsed.timestamp()
    raise BadRequest("`expires_at` must be like 2027-01-31T12:00:00Z, or Unix seconds.", param="expires_at")
