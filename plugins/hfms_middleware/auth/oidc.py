"""Tokens of an identity provider, as a second way in: signed JSON (JWT), checked with the provider's public keys.

What is taken is written down here and in the configuration, never in the token: the algorithms are pinned to those with
public keys, so neither `none` nor a signature made with a public key as if it were a password (HS256) can pass.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hfms_cli import BadRequest, Caller, ConfigError, Unavailable, parse_fields
from hfms_middleware.auth.admin import KeyRequest
from hfms_middleware.auth.keyring import BadKey
from hfms_middleware.auth.options import AuthOptions

if TYPE_CHECKING:
    import jwt

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
FIELDS = ("admin", "priority", "rate_limit", "token_limit", "daily_token_limit", "allowed_models", "cache_group")
KEYS_SECONDS = 300.0
"""The provider's keys are fetched anew after so long."""
AGAIN_SECONDS = 10.0
"""A token with an unknown key id lets them be fetched sooner, but no sooner than this: anybody can send one."""
LONGEST_ANSWER = 2**20
NO_MODEL = "\0"
"""A glob that matches no name: none holds control characters."""


def looks_like_token(text: str) -> bool:
    """Whether a bearer is a JWT rather than a key: three parts, the first a JSON object in base64."""
    return text.startswith("eyJ") and text.count(".") == 2


class Oidc:
    """The tokens of one issuer."""

    def __init__(
        self,
        options: AuthOptions,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(options)
        self._options = options
        self._now = now
        self._clock = clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched = float("-inf")
        self._lock = asyncio.Lock()

    async def caller(self, token: str) -> Caller:
        """Who a token speaks for. Raises BadKey, or Unavailable where the provider's keys cannot be had."""
        import jwt

        o = self._options
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in o.oidc_algorithms:
                raise BadKey("token", "The token is signed by an algorithm that is not taken here.")
            key = await self._key(header.get("kid"))
            claims = jwt.decode(
                token,
                key,
                algorithms=o.oidc_algorithms,
                issuer=o.oidc_issuer,
                audience=o.oidc_audience,
                # Times are compared below, with our own clock, which never goes back.
                options={"require": ["exp", "sub"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
            )
        except jwt.PyJWTError:
            raise BadKey("token", "The token is not valid here.") from None
        self._check_times(claims)
        return self._as_caller(claims)

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now, leeway = self._now(), self._options.oidc_leeway_seconds
        try:
            expires, begins = float(claims["exp"]), float(claims.get("nbf", 0))
        except (TypeError, ValueError):
            raise BadKey("token", "The token is not valid here.") from None
        if not now < expires + leeway:
            raise BadKey("expired", "The token has expired.")
        if not begins <= now + leeway:
            raise BadKey("token", "The token is not valid yet.")

    def _as_caller(self, claims: Mapping[str, Any]) -> Caller:
        fields: dict[str, Any] = {}
        for field, claim in self._options.oidc_claims.items():
            path, _, wanted = claim.partition("=")
            value = _claim(claims, path)
            if field == "admin":
                fields["admin"] = wanted in [_text(v) for v in _listed(value)]
            elif field == "allowed_models":
                fields[field] = _listed(value)
            elif value is not None:
                fields[field] = value
        subject = claims["sub"]
        if not subject:
            raise BadKey("token", "The token is not valid here.")
        try:
            policy = parse_fields(KeyRequest, {"name": subject[:100], **fields}).policy(self._now())
        except BadRequest:
            raise BadKey("token", "The token's claims are not such as this server expects.") from None
        # Where the claim is to say which models, a token without it permits none: empty would be "every model".
        nothing = (NO_MODEL,) if "allowed_models" in self._options.oidc_claims else ()
        return Caller(
            key_id=f"oidc:{subject[:200]}",
            name=policy.name,
            admin=policy.admin,
            priority=policy.priority,
            requests_per_minute=policy.requests_per_minute,
            tokens_per_minute=policy.tokens_per_minute,
            tokens_per_day=policy.tokens_per_day,
            allowed_models=policy.allowed_models or nothing,
            cache_group=policy.cache_group,
        )

    async def _key(self, kid: Any) -> jwt.PyJWK:
        """The public key of that id; without an id, the only one there is."""
        async with self._lock:
            age = self._clock() - self._fetched
            if age >= KEYS_SECONDS or (age >= AGAIN_SECONDS and self._find(kid) is None):
                await self._fetch()
        if (key := self._find(kid)) is None:
            raise BadKey("token", "The token is not valid here.")
        return key

    def _find(self, kid: Any) -> jwt.PyJWK | None:
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid) if isinstance(kid, str) else None

    async def _fetch(self) -> None:
        """Where the provider does not answer, the keys that we have go on; without any the token waits."""
        import aiohttp
        import jwt

        self._fetched = self._clock()
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(self._options.oidc_jwks_url, allow_redirects=False) as response,
            ):
                response.raise_for_status()
                body = await response.content.read(LONGEST_ANSWER)
            found = jwt.PyJWKSet.from_json(body.decode())
        except (aiohttp.ClientError, TimeoutError, ValueError, jwt.PyJWTError) as exc:
            self._fetched += AGAIN_SECONDS - KEYS_SECONDS  # ask again soon
            if not self._keys:
                raise Unavailable(
                    "The keys of the identity provider cannot be had at the moment.", code="oidc_unavailable"
                ) from exc
            return
        self._keys = {key.key_id: key for key in found.keys if key.public_key_use in (None, "sig")}


def _check(o: AuthOptions) -> None:
    """Raises ConfigError where the settings do not say enough, or say what is not safe."""
    try:
        import jwt  # noqa: F401
    except ImportError as exc:
        raise ConfigError("[middleware.auth] oidc_issuer needs: pip install 'hfms[oidc]'", param="oidc_issuer") from exc
    for name in ("oidc_audience", "oidc_jwks_url"):
        if not getattr(o, name):
            raise ConfigError(f"[middleware.auth] oidc_issuer needs {name} beside it", param=name)
    url = urlsplit(o.oidc_jwks_url)
    if url.scheme != "https" and not (url.scheme == "http" and url.hostname in ("127.0.0.1", "::1", "localhost")):
        raise ConfigError("[middleware.auth] oidc_jwks_url must begin with https://", param="oidc_jwks_url")
    if bad := [a for a in o.oidc_algorithms if a not in ALGORITHMS]:
        raise ConfigError(
            f"[middleware.auth] oidc_algorithms: {', '.join(bad)} cannot be taken; there are {', '.join(ALGORITHMS)}",
            param="oidc_algorithms",
        )
    if not o.oidc_algorithms:
        raise ConfigError("[middleware.auth] oidc_algorithms is empty", param="oidc_algorithms")
    for field, claim in o.oidc_claims.items():
        if field not in FIELDS:
            raise ConfigError(
                f"[middleware.auth] oidc_claims: unknown field `{field}`; there are {', '.join(FIELDS)}",
                param="oidc_claims",
            )
        if (field == "admin") != ("=" in claim):
            raise ConfigError(
                '[middleware.auth] oidc_claims: admin is written "claim=value", every other field "claim"',
                param="oidc_claims",
            )


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """A claim by its path: `roles`, `realm_access.roles`. A name with dots of its own comes first."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
