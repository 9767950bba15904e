"""What administrators did: JSON by the line, only ever added to, each line on the disk before the deed is done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hfms_cli import Unavailable

AUDIT_FILE = "audit.jsonl"


@dataclass(frozen=True)
class Actor:
    """Who does something, and from where."""

    who: str
    address: str


class AuditLog:
    """One file, which any number of processes may add to. Blocking."""

    def __init__(self, file: Path, now: Callable[[], float]) -> None:
        self._file = file
        self._now = now

    def write(self, actor: Actor, action: str, **details: Any) -> None:
        """Add a line and wait until it is on the disk. Raises Unavailable: what cannot be noted is not done.

        details: never a secret, nor what a secret could be found by.
        """
        line = {"time": iso(self._now()), "action": action, "by": actor.who, "from": actor.address, **details}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # One write of one line at the end of the file: lines of several processes do not mix.
            number = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(number, json.dumps(line).encode() + b"\n")
                os.fsync(number)
            finally:
                os.close(number)
        except OSError as exc:
            raise Unavailable("The audit log cannot be written.", code="audit_log_unavailable") from exc

    def read(self) -> Iterator[dict[str, Any]]:
        """Every line, the oldest first. A line that a power cut tore is left out."""
        if not self._file.exists():
            return
        with self._file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


def iso(unix: float) -> str:
    """`2026-11-24T22:00:00Z`."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
