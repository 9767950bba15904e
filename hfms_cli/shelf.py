"""Models that a storage keeps on this disk, each in a folder of its own. For authors of storages.

<root>/.../<folder>/manifest.json    and files/
<root>/.fetch-...                    what is on its way, or on its way out
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from hfms_cli.types import Leftover, Manifest

__all__ = ["delete", "kept", "kept_revision", "leftovers", "sha256"]


def kept(folder: Path) -> Manifest | None:
    """The model in a folder. None where it is not whole: half deleted, or changed by another program."""
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
        sizes = [(folder / "files" / f.safe_path()).stat().st_size for f in manifest.files]
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
    return manifest if sizes == [f.size for f in manifest.files] else None


def kept_revision(folder: Path) -> Manifest | None:
    """The same of a folder that is named by the model's revision."""
    manifest = kept(folder)
    return manifest if manifest is not None and manifest.revision == folder.name else None


def delete(root: Path, folder: Path) -> None:
    """Take a folder below `root` away, and the one around it where it was the last."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-", ignore_cleanup_errors=True) as temp:
        folder.rename(Path(temp, "old"))  # so that it is gone at once, or not at all
    if folder.parent != root and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def leftovers(root: Path, about: str) -> Iterator[Leftover]:
    """What fetches that ended early have left."""
    for left in root.glob(".fetch-*"):
        with suppress(FileNotFoundError):
            yield Leftover(
                about=about,
                size=sum(p.stat().st_blocks * 512 for p in left.rglob("*") if p.is_file()),
                age_seconds=time.time() - left.stat().st_mtime,
                paths=(str(left),),
            )


def sha256(file: Path) -> str:
    """In hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
