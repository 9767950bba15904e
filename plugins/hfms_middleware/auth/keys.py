"""A key: how it is written, what of it is kept, and what it permits.

    hf_ Kq3vN0aPz81T 7Yd…(43)…Q 0aB9xZ        without the spaces
        id           secret     checksum

The id may be shown to anybody. The secret is shown once and never kept: only its SHA-256 is. A secret of 256 random
bits needs no slow hash, which is for what people can remember. The checksum lets programs that look for leaked keys,
and ours, tell a key from a word without asking anybody.
"""

from __future__ import annotations

import secrets
import string
from binascii import crc32
from hashlib import sha256
from typing import Literal

from msgspec import Struct

from hfms_cli import Caller

PREFIX = "hf_"
ALPHABET = string.digits + string.ascii_letters
ID_LENGTH = 12
SECRET_LENGTH = 43
"""62**43 is more than 2**256."""
CHECK_LENGTH = 6
PRIORITIES = ("LOW", "NORMAL", "HIGH", "CRITICAL")


class Policy(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an administrator decides about a key. None is "as the server allows to everybody"."""

    name: str = ""
    admin: bool = False
    priority: int = 1
    """The highest that its calls may ask for, an index of PRIORITIES."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    allowed_models: tuple[str, ...] = ()
    cache_group: str = ""
    expires_at: float | None = None
    """Unix time; None: never."""


class StoredKey(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a store keeps. Times are Unix times, digests SHA-256 in hex."""

    id: str
    digest: str
    policy: Policy
    created_at: float
    created_by: str = ""
    revoked_at: float | None = None
    rotated_at: float | None = None
    old_digest: str | None = None
    """Of the secret before the last rotation, good until `old_until`."""
    old_until: float | None = None

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        expires = self.policy.expires_at
        return "expired" if expires is not None and now >= expires else "active"

    def caller(self) -> Caller:
        p = self.policy
        return Caller(
            key_id=self.id,
            name=p.name,
            admin=p.admin,
            priority=p.priority,
            requests_per_minute=p.requests_per_minute,
            tokens_per_minute=p.tokens_per_minute,
            tokens_per_day=p.tokens_per_day,
            allowed_models=p.allowed_models,
            cache_group=p.cache_group,
        )


class Secret(Struct, frozen=True):
    """A key as its holder has it."""

    id: str
    text: str

    @property
    def digest(self) -> str:
        return sha256(self.text.encode()).hexdigest()

    def __str__(self) -> str:
        body = self.id + self.text
        return PREFIX + body + _checksum(body)

    def __repr__(self) -> str:
        return f"Secret({self.id})"  # so that no log and no traceback shows one


def new_secret(key_id: str = "") -> Secret:
    """A fresh secret, for a new id or for one that there is."""
    return Secret(key_id or _random(ID_LENGTH), _random(SECRET_LENGTH))


def read_secret(text: str) -> Secret | None:
    """A key that is well formed, else None. Says nothing of whether there is such a key."""
    body = text[len(PREFIX) : -CHECK_LENGTH]
    if not text.startswith(PREFIX) or len(body) != ID_LENGTH + SECRET_LENGTH or not set(text[3:]) <= set(ALPHABET):
        return None
    if text[-CHECK_LENGTH:] != _checksum(body):
        return None
    return Secret(body[:ID_LENGTH], body[ID_LENGTH:])


def is_key_id(text: str) -> bool:
    """Whether a text could be a key's id, whatever a store has."""
    return len(text) == ID_LENGTH and set(text) <= set(ALPHABET)


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = crc32(body.encode()), ""
    for _ in range(CHECK_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits += ALPHABET[digit]
    return digits
