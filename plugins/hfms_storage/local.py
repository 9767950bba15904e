"""The storage `local`: a model that lies on this disk already. Nothing is copied, and nothing deleted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

from hfms_cli import (
    BadRequest,
    Manifest,
    ModelFile,
    ModelName,
    ModelNotFound,
    Progress,
    SeveralModels,
    choose,
    gguf_models,
    no_model,
)


class Local:
    """A folder with a model in it, or a GGUF file."""

    name = "local"
    root = None

    def claims(self, name: ModelName) -> bool:
        return name.scheme == "path"

    async def find(self, name: ModelName) -> Manifest | None:
        return await asyncio.to_thread(self._look, name)

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        progress(manifest.size, manifest.size)
        path = Path(manifest.name.rest)
        return path.parent if await asyncio.to_thread(path.is_file) else path

    async def list(self) -> Sequence[Manifest]:
        return ()

    async def remove(self, manifest: Manifest) -> None:
        raise BadRequest(f"hfms deletes only what it fetched; delete `{manifest.name}` yourself.", param="model")

    def _look(self, name: ModelName) -> Manifest | None:
        path = Path(name.rest)
        try:
            there = [] if path.is_file() else _paths(path)
            folder, paths = (path.parent, _gguf(path)) if path.is_file() else (path, choose(there))
            stats = [(p, (folder / p).stat()) for p in paths]
        except SeveralModels as exc:
            models = ", ".join(f"`{path}/{m}.gguf`" for m in exc.models)
            raise BadRequest(f"`{path}` holds several models; name one: {models}.", param="model") from exc
        except OSError as exc:
            raise ModelNotFound(f"`{path}` cannot be read: {exc.strerror}.", param="model") from exc
        if not paths:
            raise ModelNotFound(f"`{path}` {no_model(there)}", param="model")
        told = "".join(f"{p}\0{s.st_size}\0{s.st_mtime_ns}\n" for p, s in stats)
        return Manifest(
            name=name,
            storage=self.name,
            revision=hashlib.sha256(told.encode()).hexdigest()[:40],
            files=tuple(ModelFile(p, s.st_size) for p, s in stats),
            source=str(path),
        )


def _gguf(file: Path) -> Sequence[str]:
    """The file, and the other parts of the same model."""
    if file.suffix != ".gguf":
        raise BadRequest(f"`{file}` is not a GGUF file; of other models, name the folder.", param="model")
    models = gguf_models(p.name for p in file.parent.glob("*.gguf"))
    return next((parts for parts in models.values() if file.name in parts), [file.name])


def _paths(folder: Path) -> list[str]:
    """Files in the folder and one level below it."""
    found = [p for top in folder.iterdir() for p in ([top] if top.is_file() else top.glob("*")) if p.is_file()]
    return [p.relative_to(folder).as_posix() for p in found]
