"""More names for models: those of `[models] aliases`, then those that `hfms models alias` has made.

A running server sees the latter within `LOOK_SECONDS`: they lie in a file of the state folder, which is read again when
it changes. To look at it for each of the half dozen questions of a call would cost a fifth of what the cache can
answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from math import inf
from pathlib import Path

import msgspec

from hfms_cli.errors import ConfigError, Conflict, NotFound
from hfms_cli.models import names

__all__ = ["Aliases"]

FILE = "aliases.json"
LOOK_SECONDS = 0.1


class Aliases(Mapping[str, str]):
    """Alias -> model, as people write it."""

    def __init__(
        self, configured: Mapping[str, str], state_dir: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.configured = dict(configured)
        self._clock = clock
        self._looked = -inf
        """When it was last seen whether the file has changed."""
        self._file = state_dir / FILE
        self._stamp: tuple[int, int, int] | None = None
        self._made: dict[str, str] = {}

    def __getitem__(self, alias: str) -> str:
        return self.configured[alias] if alias in self.configured else self._lately()[alias]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lately() | self.configured)

    def __len__(self) -> int:
        return len(self._lately() | self.configured)

    def add(self, alias: str, model: str) -> None:
        """Raises BadRequest where either is no name, Conflict, and ConfigError where the file cannot be written."""
        names.check(alias)
        target = str(names.parse(model))
        if alias in self.configured:
            raise Conflict(f"`{alias}` is an alias of [models] aliases; change it there.", param="alias")
        if alias == target or target in self:
            raise Conflict(f"`{target}` is an alias itself; name the model.", param="model")
        self._write(self._now() | {alias: target})

    def remove(self, alias: str) -> None:
        """Raises NotFound, Conflict, ConfigError."""
        if alias in self.configured:
            raise Conflict(f"`{alias}` is an alias of [models] aliases; remove it there.", param="alias")
        made = dict(self._now())
        if made.pop(alias, None) is None:
            raise NotFound(f"There is no alias `{alias}`; there are: {', '.join(self) or 'none'}.", param="alias")
        self._write(made)

    def _lately(self) -> dict[str, str]:
        return self._now() if self._clock() - self._looked >= LOOK_SECONDS else self._made

    def _now(self) -> dict[str, str]:
        self._looked = self._clock()
        try:
            stat = self._file.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp != self._stamp:
                self._made = msgspec.json.decode(self._file.read_bytes(), type=dict[str, str])
                self._stamp = stamp
        except FileNotFoundError:
            self._made, self._stamp = {}, None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            self._made = {}  # not ours; the verb that writes next makes it whole
        return self._made

    def _write(self, made: dict[str, str]) -> None:
        draft = self._file.with_name(f".{FILE}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(made))
            draft.replace(self._file)
            self._looked = -inf
        except OSError as exc:
            raise ConfigError(f"Aliases cannot be written to {self._file.parent}: {exc.strerror}.") from exc
