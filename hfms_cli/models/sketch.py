"""A model that is not on this disk, as far as its memory goes: the headers of its weights, and holes for the rest.

Its folder can be inspected as if the model were there, and costs some kilobytes to fetch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfms_cli.errors import LoadFailed, Unsupported
from hfms_cli.models.gguf import NeedsMore, read_gguf
from hfms_cli.types import Manifest, ModelFile

__all__ = ["sketch"]

LONGEST_CONFIG = 100 * 2**20
LONGEST_HEADER = 100_000_000
_GGUF_BEGINS = 2**20
# What `inspect` reads besides weights.
_READ = ("config.json", "modules.json", "sentence_bert_config.json", ".index.json", "openvino_model.xml")


async def sketch(storage: Any, manifest: Manifest, folder: Path) -> None:
    """Put the model's files into a folder, whole where they are small and needed, else with holes.

    Raises Unsupported where the storage cannot send parts of files, LoadFailed, and what the storage raises.
    """
    if not hasattr(storage, "peek") or not manifest.files:
        raise Unsupported(
            f"`{manifest.name}` is not on this disk, and {manifest.storage} cannot send a part of it: "
            f"`hfms models pull {manifest.name}` first.",
            param="model",
        )
    for file in manifest.files:
        path = folder / file.safe_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as made:
            made.truncate(file.size)
        if file.path.endswith(_READ):
            if file.size > LONGEST_CONFIG:
                raise LoadFailed(f"`{file.path}` is longer than {LONGEST_CONFIG // 2**20} MB.")
            await _copy(storage, manifest, file, path, 0, file.size)
        elif file.path.endswith(".safetensors"):
            await _copy(storage, manifest, file, path, 0, min(8, file.size))
            length = int.from_bytes(path.read_bytes()[:8] if file.size < 8 else _head(path, 8), "little")
            if length <= min(file.size - 8, LONGEST_HEADER):  # else `inspect` says what is wrong
                await _copy(storage, manifest, file, path, 8, length)
        elif file.path.endswith(".gguf"):
            await _copy_gguf(storage, manifest, file, path)


async def _copy_gguf(storage: Any, manifest: Manifest, file: ModelFile, path: Path) -> None:
    """As much as its header takes, which only reading it tells."""
    known = 0
    while known < file.size:
        more = min(max(_GGUF_BEGINS, 3 * known), file.size - known)
        await _copy(storage, manifest, file, path, known, more)
        known += more
        try:
            read_gguf(path, known=known)
            return
        except NeedsMore:
            continue


async def _copy(storage: Any, manifest: Manifest, file: ModelFile, path: Path, first: int, count: int) -> None:
    data = await storage.peek(manifest, file.path, first, count)
    with path.open("r+b") as made:
        made.seek(first)
        made.write(data)


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
