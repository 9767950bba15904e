"""Options of `[middleware.auth]`."""

from __future__ import annotations

from dataclasses import dataclass

from hfms_cli import setting


@dataclass(frozen=True)
class AuthOptions:
    """Keys of the configuration, keys of a store, and tokens of an identity provider: any of them, or all."""

    api_key: str = setting("", "Key that callers must send; empty: none.", env="API_KEY", secret=True)
    admin_api_key: str = setting(
        "", "Key that may also load and unload models, and administer keys; empty: none.", env="ADMIN_API_KEY",
        secret=True,
    )  # fmt: skip
    require: bool = setting(
        False, "Refuse to start without a key instead of serving everybody on loopback.", env="REQUIRE_AUTH"
    )
    open_metrics: bool = setting(False, "Let Prometheus read /metrics without a key.")
    open_docs: bool = setting(
        False,
        "Let browsers read /docs, and /openapi.json which it shows, without a key; to send requests, it asks for one.",
    )
    open_shared: bool = setting(False, "Let anybody read what share_models shares without a key.")
    store: str = setting(
        "",
        "Where `hfms keys` keeps keys: sqlite:///PATH, postgresql://... or redis://...; empty: keys.db in the state "
        "folder.",
        env="KEY_STORE",
        secret=True,
    )
    oidc_issuer: str = setting(
        "", "Identity provider whose tokens are taken beside keys (`iss`); empty: none.", env="OIDC_ISSUER"
    )
    oidc_audience: str = setting("", "Whom its tokens must be meant for (`aud`).", env="OIDC_AUDIENCE")
    oidc_jwks_url: str = setting("", "Where its public keys are; https beyond this machine.", env="OIDC_JWKS_URL")
    oidc_algorithms: list[str] = setting(
        lambda: ["RS256", "ES256"], "Signatures that are taken; only those with public keys can be."
    )
    oidc_leeway_seconds: int = setting(30, "How far its clock may be from ours.", ge=0, le=600)
    oidc_claims: dict[str, str] = setting(
        dict,
        'What claims permit: admin = "claim=value it is or holds"; priority, rate_limit, ... = "claim".',
    )
