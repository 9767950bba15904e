"""The door: who sent a request, or 401.

With no key set everybody may call, and hfms listens on loopback only. With one set everything but `/health` and
`/ready` asks for it: what is not opened here is shut.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from hfms_cli import Caller, Config, ConfigError, Middleware, Overloaded, in_owner
from hfms_middleware.auth.admin import KeyAdmin
from hfms_middleware.auth.audit import AUDIT_FILE, Actor, AuditLog
from hfms_middleware.auth.keyring import BadKey, Keyring, NeverBack
from hfms_middleware.auth.keys import read_secret
from hfms_middleware.auth.options import AuthOptions
from hfms_middleware.auth.store import open_store
from hfms_middleware.auth.throttle import Throttle

if TYPE_CHECKING:
    from aiohttp import web
    from prometheus_client import CollectorRegistry

    from hfms_middleware.auth.oidc import Oidc

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS = frozenset({"/metrics"})
DOCS = frozenset({"/docs", "/openapi.json"})
SHARED_PATHS = ("/.well-known/hfms/", "/ipfs/")
"""Below these other hfms servers read what this one has published."""
STRONG_LENGTH = 20
WEAK_WORDS = ("admin", "password", "secret", "changeme", "test", "key", "hfms")
HELD_AT_ONCE = 64
"""Answers to wrong keys that wait at the same time; more are told at once, so that waiting costs the server little."""
NOTED = ("/admin/", "/models/")
"""What administrators do below these is noted; the key routes note themselves, in more detail."""
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Auth(Middleware):
    """`Authorization: Bearer` wins over `X-API-Key`; every comparison takes the same time."""

    def __init__(self, options: AuthOptions, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._options = options
        self._static: list[tuple[bytes, Caller]] = []
        self._open = OPEN_PATHS | (METRICS if options.open_metrics else set()) | (DOCS if options.open_docs else set())
        self._open_below = SHARED_PATHS if options.open_shared else ()
        self._now = NeverBack()
        self._oidc: Oidc | None = None
        self._throttle = Throttle()
        self._sleep = sleep
        self._held = 0
        self._failures: Counter[str] = Counter()

    # At start and at the end.

    def check(self, config: Config) -> Iterable[str]:
        """Opens the store. A weak key is a key on loopback, and none where others can try it."""
        self.audit = AuditLog(config.state_dir / AUDIT_FILE, self._now)
        self.keyring = Keyring(open_store(self._options.store, config.state_dir), now=self._now)
        self.admin = KeyAdmin(self.keyring.store, self.audit, self._now)
        self.keyring.load()
        if trouble := self.keyring.trouble:
            raise ConfigError(f"the key store cannot be opened: {trouble}", param="store")
        self._static = list(self._keys_of_configuration())
        if self._options.oidc_issuer:
            from hfms_middleware.auth.oidc import Oidc

            self._oidc = Oidc(self._options, now=self._now)
        if self._options.require and not self.guards():
            raise ConfigError(
                "auth is required and there is no key: make one with `hfms keys create --admin`, or set HFMS_API_KEY "
                "or HFMS_ADMIN_API_KEY"
            )
        return list(self._weak_keys(config))

    def _keys_of_configuration(self) -> Iterable[tuple[bytes, Caller]]:
        for key, name, admin, priority in (
            (self._options.admin_api_key, "admin_api_key", True, 3),
            (self._options.api_key, "api_key", False, 1),
        ):
            # HFMS_ADMIN_API_KEY is also what verbs send. A key of the store stays one: it can be revoked.
            if key and not self.keyring.knows(key):
                yield sha256(key.encode()).digest(), Caller(key_id=name, admin=admin, priority=priority)

    def _weak_keys(self, config: Config) -> Iterable[str]:
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

    def guards(self) -> bool:
        return bool(self._static) or self._oidc is not None or self.keyring.ever_had_keys

    async def close(self) -> None:
        await self.keyring.close()

    # A request.

    async def http(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path in self._open or request.path.startswith(self._open_below):
            return await handler(request)
        caller = await self._caller(request)
        if caller is not None:
            self.identify(request, caller)
            if caller.admin and self._is_noted(request):
                actor = Actor(caller.key_id or "", request.remote or "")
                await asyncio.to_thread(self.audit.write, actor, f"{request.method} {request.path}")
        return await handler(request)

    async def _caller(self, request: web.Request) -> Caller | None:
        """Who sent the request; None where there is no key at all. Raises Unauthorized, Overloaded, Unavailable."""
        if not self.guards():
            await self.keyring.refresh()  # the first key may just have been made
            if not self.guards():
                return None
        try:
            return await self._of_token(_token(request))
        except BadKey as exc:
            if wait := await self._count_failure(exc.reason, request.remote or ""):
                await self._hold_back(wait)
            raise

    @in_owner
    async def _count_failure(self, reason: str, address: str) -> float:
        """The seconds that an answer without a good key is to be held back. Counted for the server, not for a front."""
        self._failures[reason] += 1
        return 0.0 if reason == "missing" else self._throttle.failed(address)

    def _of_configuration(self, token: str) -> Caller | None:
        digest = sha256(token.encode()).digest()
        # Every key is compared, so that the time tells nothing about which one was near.
        found = [caller for known, caller in self._static if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    async def _of_token(self, token: str | None) -> Caller:
        if token is None:
            raise BadKey(
                "missing", "You didn't provide an API key. Send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
            )
        if caller := self._of_configuration(token):
            return caller  # also while the store is away
        await self.keyring.refresh()
        if (secret := read_secret(token)) is not None:
            return self.keyring.check(secret).caller()
        if self._oidc is not None:
            from hfms_middleware.auth.oidc import looks_like_token

            if looks_like_token(token):
                return await self._oidc.caller(token)
        raise BadKey("unknown")

    async def _hold_back(self, wait: float) -> None:
        """Let whoever sends wrong keys wait. Raises Overloaded: there were too many from that address."""
        if self._held < HELD_AT_ONCE:
            self._held += 1
            try:
                await self._sleep(wait)
            finally:
                self._held -= 1
        raise Overloaded("Too many wrong API keys came from your address.", code="too_many_attempts", retry_after=wait)

    @staticmethod
    def _is_noted(request: web.Request) -> bool:
        below = request.path.startswith(NOTED) and not request.path.startswith("/admin/keys/")
        return below and request.method not in ("GET", "HEAD", "OPTIONS")

    # What it brings along.

    def routes(self, app: web.Application) -> None:
        from hfms_middleware.auth.routes import add_routes

        add_routes(app, self.admin, self.keyring)

    def document(self, document: dict[str, Any]) -> None:
        from hfms_middleware.auth.documenting import document_keys

        document_keys(document, self._open, needed=self.guards())

    def status(self) -> dict[str, Any]:
        states = self.keyring.states()
        return {
            "required": self.guards(),
            "keys": len(self._static) + states.total(),
            "keys_of_configuration": len(self._static),
            "keys_of_store": {state: states[state] for state in ("active", "expired", "revoked")},
            "store": self.keyring.store.kind,
            "store_error": self.keyring.trouble,
            "oidc": self._oidc is not None,
            "failures": dict(self._failures),
        }

    def metrics(self, registry: CollectorRegistry) -> None:
        from hfms_middleware.auth.series import AuthSeries

        registry.register(AuthSeries(self))


def _token(request: web.Request) -> str | None:
    """The key as it was sent, or None. Raises BadKey where a header is not such as it must be."""
    authorization = request.headers.getall("Authorization", [])
    if authorization:
        scheme, _, token = authorization[0].partition(" ")
        if len(set(authorization)) > 1 or scheme.lower() != "bearer":
            raise BadKey("malformed", "The Authorization header must be one `Bearer KEY`.")
        token = token.strip(" ")
    else:
        sent = set(request.headers.getall("X-API-Key", []))
        if len(sent) > 1:
            raise BadKey("malformed", "Send one X-API-Key header.")
        token = sent.pop() if sent else ""
    if not token:
        return None
    if not _TOKEN.fullmatch(token):
        raise BadKey("malformed", "The API key holds characters that no key has.")
    return token


def weak(key: str) -> bool:
    """Whether a key could be guessed: short, of few different characters, or a word that everybody tries."""
    return len(key) < STRONG_LENGTH or len(set(key)) < 8 or key.lower().strip("0123456789!") in WEAK_WORDS
