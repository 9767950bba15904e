"""`[middleware.rate_limit]`."""

from __future__ import annotations

from dataclasses import dataclass

from hfms_cli import setting

MOST = 10**12
"""Beyond it a number is a slip: no server does so much."""


@dataclass(frozen=True)
class RateLimitOptions:
    """Options of `[middleware.rate_limit]`."""

    requests_per_minute: int = setting(
        0,
        "Requests a minute of each key, or of each address without one; 0: no limit. A key's own limit wins.",
        env="DEFAULT_RATE_LIMIT",
        ge=0,
        le=MOST,
    )
    tokens_per_minute: int = setting(
        0, "Tokens a minute, read and written together; 0: no limit.", env="DEFAULT_TOKEN_LIMIT", ge=0, le=MOST
    )
    tokens_per_day: int = setting(0, "Tokens a day; 0: no limit.", env="DEFAULT_DAILY_TOKENS", ge=0, le=MOST)
    reserve_tokens: int = setting(
        512, "Tokens set aside for an answer whose `max_tokens` the caller did not give.", ge=1, le=MOST
    )
    count_cached: bool = setting(False, "Count the tokens of answers that came from a cache.")
    store: str = setting(
        "memory",
        'Where levels are kept: "memory", or a Redis for all servers together, such as redis://127.0.0.1:6379/0.',
        env="RATE_LIMIT_STORE",
        secret=True,  # it may hold a password
    )
    on_error: str = setting(
        "closed",
        "While Redis does not answer: refuse calls (closed), or let them pass without a limit (open).",
        choices=("closed", "open"),
    )
