"""Tokens of an identity provider: a real one on loopback, with real keys, and every way to forge a token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hfms_cli import ConfigError, Unavailable
from hfms_middleware.auth.keyring import BadKey
from hfms_middleware.auth.oidc import AGAIN_SECONDS, KEYS_SECONDS, Oidc, looks_like_token
from hfms_middleware.auth.options import AuthOptions

ISSUER, AUDIENCE, NOW = "https://id.example.com/", "hfms", 1_800_000_000.0
CHAT = {"model": "echo:a", "messages": [{"role": "user", "content": "hi"}]}


def segment(data: object) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Signer:
    """One key pair of the provider."""

    def __init__(self, kid: str, algorithm: str = "RS256") -> None:
        self.kid, self.algorithm = kid, algorithm
        rs = algorithm.startswith("RS")
        self.private = rsa.generate_private_key(65537, 2048) if rs else ec.generate_private_key(ec.SECP256R1())

    def jwk(self) -> dict[str, str]:
        kind = jwt.algorithms.get_default_algorithms()[self.algorithm]
        return kind.to_jwk(self.private.public_key(), as_dict=True) | {"kid": self.kid, "use": "sig"}

    def pem(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.private.public_key().public_bytes(serialization.Encoding.PEM, form)

    def token(self, headers: dict | None = None, **claims: object) -> str:
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": NOW + 600} | claims
        head = {"alg": self.algorithm, "typ": "JWT", "kid": self.kid} | (headers or {})
        signed = f"{segment(head)}.{segment({k: v for k, v in body.items() if v is not None})}"
        kind = jwt.algorithms.get_default_algorithms()[self.algorithm]  # PyJWT's `encode` writes only what is right
        return f"{signed}.{segment(kind.sign(signed.encode(), self.private))}"


class Provider:
    """Serves its public keys, and counts how often it was asked."""

    def __init__(self) -> None:
        self.keys: list[dict] = []
        self.asked = 0
        self.status = 200
        self.url = ""

    async def jwks(self, request: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response({"keys": self.keys}, status=self.status)


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer("one")


@pytest.fixture(scope="module")
def stranger() -> Signer:
    return Signer("one")


@pytest.fixture
async def provider(signer):
    made = Provider()
    made.keys = [signer.jwk()]
    app = web.Application()
    app.router.add_get("/jwks", made.jwks)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    yield made
    await runner.cleanup()


class Clock:
    at = NOW

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def options(provider, **more) -> AuthOptions:
    said = {"oidc_issuer": ISSUER, "oidc_audience": AUDIENCE, "oidc_jwks_url": provider.url}
    return AuthOptions(**said | more)


@pytest.fixture
def oidc(provider, clock) -> Oidc:
    claims = {"admin": "realm.roles=hfms-admin", "priority": "prio", "rate_limit": "rpm", "allowed_models": "models"}
    return Oidc(options(provider, oidc_claims=claims), now=clock, clock=clock)


async def refused(oidc: Oidc, token: str) -> BadKey:
    with pytest.raises(BadKey) as caught:
        await oidc.caller(token)
    return caught.value


async def test_claims_become_the_policy_of_the_caller(oidc, signer):
    token = signer.token(realm={"roles": ["x", "hfms-admin"]}, prio="HIGH", rpm=5, models=["org/*"])
    caller = await oidc.caller(token)
    assert (caller.key_id, caller.name, caller.admin) == ("oidc:ann", "ann", True)
    assert (caller.priority, caller.requests_per_minute, caller.allowed_models) == (2, 5, ("org/*",))


async def test_a_token_without_the_claims_permits_little(oidc, signer):
    caller = await oidc.caller(signer.token())
    assert (caller.admin, caller.priority, caller.requests_per_minute) == (False, 1, None)
    assert not caller.may_use("org/x")
    assert not caller.may_use("")


@pytest.mark.parametrize(
    "roles", ["hfms-admin-not", ["HFMS-ADMIN"], {"hfms-admin": True}, True, None, [["hfms-admin"]]]
)
async def test_what_only_resembles_the_admin_claim_is_none(oidc, signer, roles):
    assert not (await oidc.caller(signer.token(realm={"roles": roles}))).admin


async def test_claims_that_are_nonsense_are_refused(oidc, signer):
    for claims in ({"rpm": -5}, {"prio": "URGENT"}, {"models": [5]}, {"rpm": {"a": 1}}):
        assert (await refused(oidc, signer.token(**claims))).reason == "token"


async def test_none_is_no_algorithm(oidc, signer):
    _, body, signed = signer.token().split(".")
    for alg in ("none", "None", "NONE", ""):
        for signature in ("", signed):
            assert await refused(oidc, f"{segment({'alg': alg, 'typ': 'JWT', 'kid': 'one'})}.{body}.{signature}")


async def test_a_public_key_is_no_password(oidc, signer):
    """HS256 with the public key as the secret: what verifiers that obey the token's header take for good."""
    body = signer.token().split(".")[1]
    head = segment({"alg": "HS256", "typ": "JWT", "kid": "one"})
    for secret in (signer.pem(), signer.pem().strip(), json.dumps(signer.jwk()).encode()):
        signature = segment(hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha256).digest())
        assert await refused(oidc, f"{head}.{body}.{signature}")


async def test_a_key_that_the_token_brings_along_is_not_looked_at(oidc, stranger, provider):
    for headers in ({"jwk": stranger.jwk()}, {"jku": provider.url}, {"x5u": provider.url}):
        assert await refused(oidc, stranger.token(headers))
    assert await refused(oidc, stranger.token())


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil.example.com/"},
        {"iss": None},
        {"iss": ISSUER.rstrip("/")},
        {"aud": "another"},
        {"aud": None},
        {"aud": []},
        {"exp": None},
        {"exp": "soon"},
        {"exp": NOW - 31},
        {"exp": 0},
        {"exp": True},
        {"nbf": NOW + 31},
        {"nbf": "x"},
        {"sub": None},
        {"sub": ""},
        {"sub": 5},
    ],
)
async def test_a_token_for_others_or_for_another_time_is_refused(oidc, signer, claims):
    assert await refused(oidc, signer.token(**claims))


async def test_clocks_may_differ_by_the_leeway(oidc, signer):
    assert await oidc.caller(signer.token(exp=NOW - 29, nbf=NOW + 29))


async def test_one_of_several_audiences_is_enough(oidc, signer):
    assert await oidc.caller(signer.token(aud=["other", AUDIENCE]))


async def test_the_provider_may_change_its_keys(oidc, provider, signer, clock):
    await oidc.caller(signer.token())
    after = Signer("two", "ES256")
    provider.keys = [signer.jwk(), after.jwk()]
    clock.at += AGAIN_SECONDS
    assert (await oidc.caller(after.token(exp=NOW + 1e6))).key_id == "oidc:ann"
    assert provider.asked == 2
    provider.keys = [after.jwk()]
    clock.at += KEYS_SECONDS
    assert await refused(oidc, signer.token(exp=NOW + 1e6))
    assert provider.asked == 3


async def test_unknown_key_ids_do_not_make_us_ask_for_each(oidc, provider, signer, clock):
    await oidc.caller(signer.token())
    for i in range(50):
        assert await refused(oidc, signer.token({"kid": f"random-{i}"}))
    assert provider.asked == 1
    clock.at += AGAIN_SECONDS
    for i in range(50):
        assert await refused(oidc, signer.token({"kid": f"random-{i}"}))
    assert provider.asked == 2


async def test_keys_that_are_known_go_on_while_the_provider_is_away(oidc, provider, signer, clock):
    provider.status = 500
    with pytest.raises(Unavailable):
        await oidc.caller(signer.token())
    provider.status = 200
    clock.at += AGAIN_SECONDS
    await oidc.caller(signer.token())
    provider.status = 500
    clock.at += KEYS_SECONDS
    assert await oidc.caller(signer.token())


async def test_a_key_for_encryption_signs_nothing(provider, signer, clock):
    provider.keys = [signer.jwk() | {"use": "enc"}]
    assert await refused(Oidc(options(provider), now=clock, clock=clock), signer.token())


@pytest.mark.parametrize("text", ["eyJ..", "eyJ.a.b", "eyJhbGciOiJSUzI1NiJ9.e30.", f"{'eyJ' * 50}.x.y", "eyJ\xff.a.b"])
async def test_what_is_no_token_is_refused(oidc, text):
    assert looks_like_token(text)
    assert await refused(oidc, text)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"oidc_audience": ""}, "needs oidc_audience"),
        ({"oidc_jwks_url": ""}, "needs oidc_jwks_url"),
        ({"oidc_jwks_url": "http://id.example.com/jwks"}, "https://"),
        ({"oidc_jwks_url": "file:///etc/passwd"}, "https://"),
        ({"oidc_algorithms": ["RS256", "HS256"]}, "HS256 cannot be taken"),
        ({"oidc_algorithms": ["none"]}, "none cannot be taken"),
        ({"oidc_algorithms": []}, "is empty"),
        ({"oidc_claims": {"adnim": "a=b"}}, "unknown field `adnim`"),
        ({"oidc_claims": {"admin": "roles"}}, "claim=value"),
    ],
)
def test_settings_that_are_not_safe_do_not_start(more, said):
    provider = Provider()
    provider.url = "https://id.example.com/jwks"
    with pytest.raises(ConfigError, match=said):
        Oidc(options(provider, **more))


async def test_a_token_opens_the_door_of_a_server_beside_keys(serve, provider, signer):
    import time

    toml = (
        f'[middleware.auth]\noidc_issuer = "{ISSUER}"\noidc_audience = "{AUDIENCE}"\noidc_jwks_url = "{provider.url}"\n'
        'oidc_claims = { admin = "roles=hfms-admin" }\n'
    )
    static = "a-key-that-nobody-guesses-7"
    async with serve("echo:a", toml=toml, env={"HFMS_API_KEY": static}) as server:

        async def ask(key, path="/v1/chat/completions", body=CHAT):
            return (await server.post(path, body, headers={"Authorization": f"Bearer {key}"}))[0]

        user = signer.token(exp=time.time() + 60)
        admin = signer.token(exp=time.time() + 60, roles=["hfms-admin"])
        assert [await ask(k) for k in (user, admin, static)] == [200, 200, 200]
        assert [await ask(k, "/models/load", {"model": "echo:b"}) for k in (user, admin)] == [403, 200]
        assert await ask(signer.token(exp=time.time() - 60)) == 401
        assert await ask(user[:-5] + "AAAAA") == 401
        assert (await server.post("/v1/chat/completions", CHAT))[0] == 401
