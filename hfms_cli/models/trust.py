"""Who may speak for which names. Nobody may, until somebody says so.

    org/* ed25519:KEY                 this key for the models of `org`
    org/*,other/one ed25519:KEY       several patterns
    ed25519:KEY                       for every name

Such lines stand in `[storage] trusted_publishers`, and one below another in the file `trusted_publishers` of the state
folder, which `hfms publisher trust` writes. It is the form of OpenSSH's `allowed_signers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hfms_cli.errors import BadRequest, ConfigError, NotFound
from hfms_cli.models.signing import is_key

__all__ = ["TRUSTED_FILE", "Trust", "Trusted"]

TRUSTED_FILE = "trusted_publishers"


@dataclass(frozen=True)
class Trusted:
    """A key, and the names that it may speak for."""

    key: str
    patterns: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Trusted:
        """Raises BadRequest."""
        patterns, _, key = line.strip().rpartition(" ")
        names = tuple(p.strip() for p in (patterns or "*").split(","))
        if not is_key(key):
            raise BadRequest(f"{key[:80]!r} is no public key: write `ed25519:` and 43 characters.", param="key")
        if not all(names) or any(c in name for name in names for c in " \t#[]?"):
            raise BadRequest(f"{patterns[:80]!r} are no names: write `org/name`, or `org/*` for all of them.")
        return cls(key, names)

    def __str__(self) -> str:
        return f"{','.join(self.patterns)} {self.key}"

    def speaks_for(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


class Trust:
    """Every key that is trusted here."""

    def __init__(self, trusted: Iterable[Trusted]) -> None:
        self._trusted = tuple(trusted)
        self.keys = frozenset(t.key for t in self._trusted)

    @classmethod
    def load(cls, lines: Sequence[str], state_dir: Path) -> Trust:
        """lines: those of the configuration. Raises ConfigError."""
        try:
            return cls([*map(Trusted.parse, lines), *read_file(state_dir)])
        except BadRequest as exc:
            raise ConfigError(f"[storage] trusted_publishers: {exc.message}", param="trusted_publishers") from exc

    def speaks_for(self, key: str, name: str) -> bool:
        return any(t.key == key and t.speaks_for(name) for t in self._trusted)


def read_file(state_dir: Path) -> list[Trusted]:
    """What `hfms publisher trust` has written. Raises BadRequest."""
    try:
        lines = (state_dir / TRUSTED_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as exc:
        raise BadRequest(f"the file {state_dir / TRUSTED_FILE} cannot be read") from exc
    return [Trusted.parse(line) for line in lines if line.strip() and not line.startswith("#")]


def add(state_dir: Path, new: Trusted) -> None:
    """Trust a key for some names, beside those that it is trusted for."""
    _write(state_dir, [*(t for t in read_file(state_dir) if t != new), new])


def remove(state_dir: Path, key: str) -> None:
    """Raises NotFound where the file has no such key."""
    there = read_file(state_dir)
    kept = [t for t in there if t.key != key]
    if kept == there:
        raise NotFound(f"`{key}` is not among those that `hfms publisher trust` has added.")
    _write(state_dir, kept)


def _write(state_dir: Path, trusted: Sequence[Trusted]) -> None:
    path = state_dir / TRUSTED_FILE
    draft = path.with_name(f".{TRUSTED_FILE}.{os.getpid()}")
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        draft.write_text("".join(f"{t}\n" for t in trusted))
        draft.replace(path)
    except OSError as exc:
        raise BadRequest(f"{path} cannot be written: {exc.strerror}.") from exc
