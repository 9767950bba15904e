"""What lies in the operator's folders of models: the models themselves, and cards that say where one is.

    house/                      [models] folders = ["house"]
      small.gguf                served as `small`
      bert/config.json ...      served as `bert`
      org/name/config.json ...  served as `org/name`
      chat.toml                 a card: another name, source and way to load it

A card is a small TOML file (`Card`, `[load]`: `Loading`). One that is wrong is told with its file and key, and keeps no
other from being served. Links may not lead out of the folder; a card may, by an absolute path.
"""

from __future__ import annotations

import asyncio
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import structlog

from hfms_cli.errors import BadRequest, ConfigError, HfmsError, close_matches
from hfms_cli.model_files import SeveralModels, choose, gguf_models
from hfms_cli.models import names
from hfms_cli.models.inspect import inspect
from hfms_cli.models.loader import Wish
from hfms_cli.settings import read_table, setting
from hfms_cli.types import ModelCard, ModelName, Quantize

__all__ = ["Card", "Catalogue", "Entry", "Loading", "scan"]

log = structlog.get_logger("hfms.models")

LOOK_SECONDS = 5.0
"""How old the knowledge of the folders may be."""
LARGEST_CARD = 64 * 2**10
TASKS = ("generate", "embed", "score", "transcribe", "image-text-to-text")


@dataclass(frozen=True)
class Card:
    """A card's own keys."""

    source: str = setting("", "The model: org/name[@revision], package:NAME, ipfs://CID, ./file or an absolute path.")
    name: str = setting("", "What clients call it; empty: the card's file name without .toml.")
    summary: str = setting("", "What it is good for, in a sentence.")
    tasks: list[str] = setting(list, f"What it can do: {', '.join(TASKS)}; empty: as its files say.")
    architecture: str = setting("", "Empty: as its files say.")
    hardware: list[str] = setting(list, "Kinds of device that it is meant for; empty: those that can run it here.")
    aliases: list[str] = setting(list, "More names for it.")


@dataclass(frozen=True)
class Loading:
    """A card's `[load]`: how the model is loaded where a load does not say otherwise."""

    hardware: str | None = setting(None, "A kind of device (cuda) or one device (cuda:1).")
    engine: str | None = setting(None, "The engine that is to run it.")
    dtype: str | None = setting(None, "Precision.", choices=("auto", "float32", "bfloat16", "float16"))
    quantize: str | None = setting(None, "Bits of weights.", choices=("auto", "none", "int8", "int4"))
    draft_model: str | None = setting(None, "A smaller model of the same vocabulary that guesses for it.")
    replicas: int | None = setting(None, "Engine processes.", ge=1, le=256)
    pinned: bool = setting(False, "It is not unloaded to make room, nor when idle.")
    idle_seconds: float | None = setting(None, "It is unloaded when nobody has called it for so long; 0: never.", ge=0)


@dataclass(frozen=True)
class Entry:
    """A model that can be served by name."""

    id: str
    name: ModelName
    """What is loaded."""
    aliases: tuple[str, ...] = ()
    summary: str = ""
    tasks: tuple[str, ...] = ()
    architecture: str = ""
    hardware: tuple[str, ...] = ()
    """As a card says."""
    loading: Loading = Loading()
    read: ModelCard | None = None
    """What the model's own files say, where they are in the folder."""
    listed: bool = True
    """It is in a folder, and not just a name that somebody gave."""

    def wishes(self, usual: int) -> tuple[Wish, ...]:
        """One for each replica. usual: how many there are where nothing is said."""
        load = self.loading
        wish = Wish(load.hardware, load.engine, load.dtype, cast("Quantize | None", load.quantize), load.draft_model)
        return (wish,) * (load.replicas or usual)


class Catalogue:
    """The entries of all folders. What it knows is at most some seconds old when it was refreshed."""

    def __init__(self, folders: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folders = [Path(f).expanduser() for f in folders]
        self._clock = clock
        self._looked = -float("inf")
        self._seen: object = None
        self._names: dict[str, Entry] = {}
        self.entries: list[Entry] = []
        self.faults: list[str] = []
        """What is wrong in the folders, with the file and the key; paths begin at the folder's name."""

    def find(self, name: str) -> Entry | None:
        """By id or alias."""
        return self._names.get(name)

    async def refresh(self) -> None:
        """Look at the folders again, where that is due and something has changed there."""
        if self._folders and self._clock() - self._looked > LOOK_SECONDS:
            self._looked = self._clock()
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Look at the folders now. Reads nothing where nothing has changed."""
        seen = [_stamps(folder) for folder in self._folders]
        if seen == self._seen:
            return
        self._seen, entries, faults = seen, list[Entry](), list[str]()
        known: dict[str, Entry] = {}
        for folder in self._folders:
            for where, found in scan(folder):
                taken = [] if isinstance(found, str) else [n for n in (found.id, *found.aliases) if n in known]
                if isinstance(found, str) or taken:
                    faults.append(f"{where}: {found if isinstance(found, str) else _taken(taken[0], known)}")
                    continue
                entries.append(found)
                known |= dict.fromkeys((found.id, *found.aliases), found)
        for fault in faults:
            if fault not in self.faults:
                log.warning("model cannot be listed", reason=fault)
        self.entries, self.faults, self._names = entries, faults, known


def _taken(name: str, known: Mapping[str, Entry]) -> str:
    return f"`{name}` is already a name of `{known[name].id}`"


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when something in the folder does, so far as it is looked at."""
    stamps = []
    for path in [folder, *_walk(folder)]:
        try:
            stat = path.stat()
        except OSError:
            continue
        stamps.append((str(path), stat.st_mtime_ns, stat.st_size))
    return stamps


def _walk(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Everything in a folder and in those below it, sorted; what cannot be read is passed over."""
    try:
        inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return
    for path in inside:
        yield path
        if depth > 1 and path.is_dir():
            yield from _walk(path, depth - 1)


def scan(folder: Path) -> Iterator[tuple[str, Entry | str]]:
    """Each model and card in a folder, with where it is; a text in place of an entry says what is wrong there."""
    if not folder.is_dir():
        yield folder.name, "there is no such folder ([models] folders)"
        return
    whole: list[Path] = []
    """Folders that are a model, and what is in them a part of it."""
    for place in [folder, *(p for p in _walk(folder, 2) if p.is_dir())]:
        if any(model in place.parents for model in whole):
            continue
        for path, read in _things(folder, place):
            whole += [path] if path == place else []
            where = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            try:
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise BadRequest("is a link that leads out of the folder; a card may name its absolute path")
                yield where, read()
            except HfmsError as exc:
                yield where, exc.message
            except OSError as exc:
                yield where, f"cannot be read: {exc.strerror}"


def _things(folder: Path, place: Path) -> Iterator[tuple[Path, Callable[[], Entry]]]:
    """The models and cards that lie in one place, each with how to read it."""
    try:
        files = sorted(p.relative_to(place).as_posix() for p in _walk(place, 2) if p.is_file())
    except OSError:
        return
    here = [f for f in files if "/" not in f]
    for card in here:
        if card.endswith(".toml"):
            yield place / card, lambda path=place / card: read_card(path, folder)  # type: ignore[misc]
    try:
        chosen = choose(here if place == folder else files)
    except SeveralModels:
        chosen = ()
    if "config.json" in chosen and place != folder:
        yield place, lambda: _model(folder, place, place, chosen)
        return
    models = gguf_models(here)
    for model, parts in models.items():
        # A folder that was made for one model is that model.
        called = place if len(models) == 1 and place != folder else place / model
        yield place / parts[0], lambda p=place / parts[0], c=called, f=tuple(parts): _model(folder, c, p, f)  # type: ignore[misc]


def _model(folder: Path, called: Path, path: Path, files: Sequence[str]) -> Entry:
    """A model that lies in the folder. Raises HfmsError where its files are torn, or its name is none."""
    model_id = called.relative_to(folder).as_posix()
    _check_name(model_id)
    card = inspect(path if path.is_dir() else path.parent, files)
    name = names.parse(str(path.absolute()))
    return Entry(model_id, name, tasks=card.tasks, architecture=card.architecture, read=card)


def read_card(path: Path, folder: Path) -> Entry:
    """The entry that a card makes. Raises ConfigError, which names the key, or what else is wrong with the model."""
    if path.stat().st_size > LARGEST_CARD:
        raise ConfigError("is too long for a card")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"is not valid TOML: {exc}") from exc
    load = values.pop("load", {})
    if not isinstance(load, dict):
        raise ConfigError("`load` must be a table, written `[load]`")
    card = _read(Card, values, "card")
    loading = _read(Loading, load, "[load]")
    if not card.source:
        raise ConfigError("`source` is missing: the model that the card is of")
    for task in card.tasks:
        if task not in TASKS:
            near = close_matches(task, TASKS)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}"
            raise ConfigError(f"`tasks` holds {task!r}; {hint}")
    model_id = card.name or path.stem
    for key, name in [("name", model_id), *(("aliases", alias) for alias in card.aliases)]:
        _check_name(name, key)
    source = _source(card.source, path.parent, folder)
    read = _read_model(source)
    return Entry(
        model_id,
        source,
        aliases=tuple(dict.fromkeys(a for a in card.aliases if a != model_id)),
        summary=card.summary,
        tasks=tuple(card.tasks) or (read.tasks if read else ()),
        architecture=card.architecture or (read.architecture if read else ""),
        hardware=tuple(card.hardware),
        loading=loading,
        read=read,
    )


def _read(table: type[Any], values: Mapping[str, Any], where: str) -> Any:
    return read_table(table, values, where=where, environ={})


def _check_name(name: str, key: str = "") -> None:
    """Raises ConfigError where clients could not call a model so."""
    of = f"`{key}`: " if key else ""
    try:
        parsed = names.parse(name)
    except BadRequest as exc:
        raise ConfigError(f"{of}{exc.message}") from exc
    if parsed.scheme:
        raise ConfigError(f"{of}`{name}` reads as a {parsed.scheme}; write a name as `name` or `org/name`")


def _source(text: str, beside: Path, folder: Path) -> ModelName:
    """What a card's `source` names. A relative path begins at the card, and stays in the folder."""
    absolute = text.startswith(("/", "~"))
    try:
        if absolute or not (text.startswith(".") or text.endswith(".gguf")):
            return names.parse(text)
        path = Path(os.path.normpath(beside.absolute() / text))
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"`source` {text!r} leads out of the folder; write an absolute path if you mean it")
        return names.parse(str(path))
    except BadRequest as exc:
        raise ConfigError(f"`source`: {exc.message}") from exc


def _read_model(source: ModelName) -> ModelCard | None:
    """What the model's own files say, where the source is a path. Raises ConfigError, LoadFailed."""
    if source.scheme != "path":
        return None
    path = Path(source.rest)
    if not path.exists():
        raise ConfigError("`source` is a path where nothing is")
    return inspect(path)
