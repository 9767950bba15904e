"""What `/admin/keys/*` answers, as types, for `/openapi.json`. Times are ISO 8601."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from hfms_middleware.auth.keys import StoredKey


class Key(Struct, kw_only=True):
    """A key as administrators see it. null: the server's own limit, or never."""

    key_id: str
    name: str
    status: Literal["active", "expired", "revoked"]
    admin: bool
    priority: Literal["LOW", "NORMAL", "HIGH", "CRITICAL"]
    rate_limit: int | None
    """Requests a minute."""
    token_limit: int | None
    """Tokens a minute."""
    daily_token_limit: int | None
    allowed_models: list[str]
    """Globs over names of models; empty: every model."""
    cache_group: str
    """Keys of one group share what is kept of their prompts and answers."""
    created_at: str
    created_by: str
    expires_at: str | None
    revoked_at: str | None
    rotated_at: str | None
    old_secret_until: str | None
    last_used_at: str | None


class NewKey(Key, kw_only=True):
    """The same, with its secret."""

    api_key: str


class KeyList(Struct):
    object: Literal["list"]
    data: list[Key]


class Export(Struct):
    object: Literal["list"]
    data: list[StoredKey]


class Imported(Struct):
    imported: int
    """Keys that were new or replaced."""
    present: int
    """Keys that were there already, just so."""


class Audit(Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]
    """The newest last."""
