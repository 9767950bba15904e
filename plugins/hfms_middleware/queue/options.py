"""`[middleware.queue]`."""

from __future__ import annotations

from dataclasses import dataclass

from hfms_cli import setting


@dataclass(frozen=True)
class QueueOptions:
    """Options of `[middleware.queue]`."""

    max_size: int = setting(
        256, "Calls that may wait for an engine to begin them; more are answered 429.", env="MAX_QUEUE_SIZE", ge=1
    )
    max_tokens: int = setting(0, "Prompt tokens, roughly, that may wait in all; 0: any number.", ge=0)
    timeout_seconds: float = setting(
        60.0, "How long a call may wait before it is answered 504.", env="QUEUE_TIMEOUT_SECONDS", ge=0.001
    )
    per_model: bool = setting(False, "Whether each model has a queue of this size, or all share one.")
