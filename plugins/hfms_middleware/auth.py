"""Authentication by the keys of the configuration: one for callers, one for administrators.

With no key set everybody may call, and hfms listens on loopback only. With one set everything but `/health` and
`/ready` asks for it: what is not opened here is shut.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from hfms_cli import Caller, Config, ConfigError, Middleware, Unauthorized, setting

if TYPE_CHECKING:
    from aiohttp import web

OPEN_PATHS = frozenset({"/health", "/ready"})
STRONG_LENGTH = 20
WEAK_WORDS = ("admin", "password", "secret", "changeme", "test", "key", "hfms")


@dataclass(frozen=True)
class AuthOptions:
    """Options of `[middleware.auth]`."""

    api_key: str = setting("", "Key that callers must send; empty: none.", env="API_KEY", secret=True)
    admin_api_key: str = setting(
        "", "Key that may also load and unload models; empty: none.", env="ADMIN_API_KEY", secret=True
    )
    require: bool = setting(
        False, "Refuse to start without a key instead of serving everybody on loopback.", env="REQUIRE_AUTH"
    )
    open_metrics: bool = setting(False, "Let Prometheus read /metrics without a key.")


class Auth(Middleware):
    """`Authorization: Bearer` wins over `X-API-Key`; both are compared in constant time, by digest."""

    def __init__(self, options: AuthOptions) -> None:
        self._options = options
        self._keys = [
            (sha256(key.encode()).digest(), Caller(key_id=name, admin=admin))
            for key, name, admin in (
                (options.admin_api_key, "admin_api_key", True),
                (options.api_key, "api_key", False),
            )
            if key
        ]
        self._open = OPEN_PATHS | ({"/metrics"} if options.open_metrics else set())

    def guards(self) -> bool:
        return bool(self._keys)

    def check(self, config: Config) -> Iterable[str]:
        """A weak key is a key on loopback, and none where others can try it."""
        if self._options.require and not self._keys:
            raise ConfigError("auth is required and no key is set: set HFMS_API_KEY or HFMS_ADMIN_API_KEY")
        for name in ("api_key", "admin_api_key"):
            key = getattr(self._options, name)
            if not key or not weak(key):
                continue
            if not config.server.loopback_only:
                raise ConfigError(
                    f"{name} is easily guessed and the server would listen on {config.server.host}; make a longer one, "
                    "for example with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
                    param=name,
                )
            yield f"{name} is easily guessed; it is accepted because the server listens on loopback only"

    async def http(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self._keys and request.path not in self._open:
            self.identify(request, self._caller(request))
        return await handler(request)

    def _caller(self, request: web.Request) -> Caller:
        authorization = request.headers.get("Authorization")
        scheme, _, token = (authorization or "").partition(" ")
        if authorization is not None and scheme.lower() != "bearer":
            raise Unauthorized("The Authorization header must be `Bearer KEY`.")
        secret = token.strip() if authorization is not None else request.headers.get("X-API-Key", "")
        if not secret:
            raise Unauthorized(
                "You didn't provide an API key. Send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
            )
        digest = sha256(secret.encode(errors="surrogateescape")).digest()
        # Every key is compared, so that the time tells nothing about which one was near.
        found = [caller for known, caller in self._keys if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthorized("Incorrect API key provided.")
        return found[0]

    def status(self) -> dict[str, Any]:
        return {"keys": len(self._keys), "required": bool(self._keys)}


def weak(key: str) -> bool:
    """Whether a key could be guessed: short, of few different characters, or a word that everybody tries."""
    return len(key) < STRONG_LENGTH or len(set(key)) < 8 or key.lower().strip("0123456789!") in WEAK_WORDS
