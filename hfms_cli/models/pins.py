"""Models that the operator wants kept: neither `rm` nor `gc` takes them unless it is told to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hfms_cli.errors import ConfigError, HfmsError, NotFound
from hfms_cli.models import names
from hfms_cli.types import ModelName

__all__ = ["Pins"]


class Pins:
    """Names, one a file, so that two processes which pin and unpin never take away each other's."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "pins"

    def __iter__(self) -> Iterator[ModelName]:
        found = []
        for file in self._folder.glob("*.pin"):
            with suppress(OSError, UnicodeDecodeError, HfmsError):  # unpinned just now, or not ours
                found.append(names.parse(file.read_text()))
        return iter(sorted(found, key=str))

    def add(self, name: ModelName) -> None:
        """Raises ConfigError where the state folder cannot be written."""
        file = self._file(name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(name))
        except OSError as exc:
            raise ConfigError(f"Pins cannot be written to {self._folder}: {exc.strerror}.") from exc

    def remove(self, name: ModelName) -> None:
        """Raises NotFound."""
        try:
            self._file(name).unlink()
        except FileNotFoundError:
            pinned = ", ".join(f"`{n}`" for n in self) or "nothing"
            raise NotFound(f"`{name}` is not pinned; pinned: {pinned}.", param="model") from None
        except OSError as exc:
            raise ConfigError(f"Pins cannot be written to {self._folder}: {exc.strerror}.") from exc

    def keeps(self, name: ModelName, revision: str = "") -> bool:
        """Whether a model is pinned, at this revision or at any. revision: what the name stands for."""
        return any(
            (pin.scheme, pin.rest) == (name.scheme, name.rest)
            and pin.revision in (None, name.revision, revision or name.revision)
            for pin in self
        )

    def _file(self, name: ModelName) -> Path:
        return self._folder / f"{hashlib.sha256(str(name).encode()).hexdigest()[:32]}.pin"
