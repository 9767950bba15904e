"""The storage `bucket`: `org/name` as a folder in an object store, on a file server or wherever else fsspec can read.

    <url>/org/name/config.json, model.safetensors, ...
    <url>/org/name/SHA256SUMS                      what `sha256sum FILE...` prints, where somebody has put it there

Where there is a SHA256SUMS it says which files there are, so that no listing is needed, and each file is proven by it.
Without one, what was fetched is what the source sent. Credentials are the source's own affair and come from the
environment. What was fetched is kept under

    <cache>/buckets/<source>/<org--name>/<revision>/manifest.json    and files/
    <cache>/buckets/<source>/.fetch-<org--name>-<revision>/          one that is not whole yet, as far as it goes
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from hfms_cli import (
    BadRequest,
    ConfigError,
    FetchFailed,
    HfmsError,
    Leftover,
    Manifest,
    ModelFile,
    ModelName,
    ModelNotFound,
    Progress,
    VerifyFailed,
    Watch,
    shelf,
)
from hfms_storage.choosing import choose_files
from hfms_storage.hub_download import Stopped, locked
from hfms_storage.options import BucketOptions
from hfms_storage.partial import SUFFIX, Partial
from hfms_storage.threads import watched

log = logging.getLogger("hfms.storage")

SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_LONGEST_SUMS = 10 * 2**20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_READ = 4 * 2**20
"""Bytes that are asked for at once; what was read before is kept if the next breaks off."""
# What tells an object from another under its name, in the words of several sources.
_STAMPS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
_NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Bucket:
    """Models below one URL."""

    name = "bucket"

    def __init__(self, options: BucketOptions) -> None:
        """Raises ConfigError where the URL is none, holds a secret, or needs a package that is not here."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfms"
        self._url = options.url.rstrip("/")
        self._connections = options.connections
        _check(self._url)
        source = hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self.root = Path(options.cache_dir or base).expanduser() / "buckets" / source
        self._opened: Any = None
        self._hashed: list[tuple[Path, os.stat_result, str]] = []

    def claims(self, name: ModelName) -> bool:
        return name.scheme == ""

    async def find(self, name: ModelName) -> Manifest | None:
        return await asyncio.to_thread(self._find, name)

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        folder = self._folder(manifest)
        if await asyncio.to_thread(shelf.kept_revision, folder) is None:
            with watched(progress) as (watch, stop):
                try:
                    await asyncio.to_thread(self._fetch, manifest, folder, watch, stop)
                except OSError as exc:
                    raise FetchFailed(f"The cache of buckets cannot be written: {exc.strerror}.") from exc
        progress(manifest.size, manifest.size)
        return folder / "files"

    def hashed(self) -> Sequence[tuple[Path, os.stat_result, str]]:
        """Files that were hashed when they had come, since this was last asked."""
        found, self._hashed = self._hashed, []
        return found

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: [*self._all()])

    async def remove(self, manifest: Manifest) -> None:
        folder = self._folder(manifest)
        if not folder.is_dir():
            raise ModelNotFound(f"`{manifest.name}` is not on this disk.", param="model")
        await asyncio.to_thread(shelf.delete, self.root, folder)

    async def peek(self, manifest: Manifest, path: str, first: int, count: int) -> bytes:
        """Some bytes of a file, which is not fetched for that; unproven, as no hash is of a part."""
        repo, _ = _repo(manifest.name)
        return await asyncio.to_thread(self._read, f"{repo}/{path}", first, count)

    def leftovers(self) -> Iterator[Leftover]:
        """What fetches that ended early have left."""
        return shelf.leftovers(self.root, "a broken pull from a bucket")

    # At the source.

    def _find(self, name: ModelName) -> Manifest | None:
        """As the source has it; where that cannot be asked, or has another revision by now, as it is on this disk."""
        here = [m for m in self._all() if m.name.rest == name.rest and name.revision in (None, m.revision)]
        kept = msgspec.structs.replace(here[0], name=name) if here else None
        if kept and name.revision:
            return kept
        try:
            found = self._look(name)
        except FetchFailed:
            if kept is None:
                raise
            log.warning("the bucket cannot be asked; what is on this disk answers for it")
            return kept
        return found if found and name.revision in (None, found.revision) else None

    def _look(self, name: ModelName) -> Manifest | None:
        repo, quant = _repo(name)
        sums = self._sums(repo)
        paths: Collection[str] = sums or self._paths(repo)
        if not paths:
            return None
        files, told = [], hashlib.sha256()
        for path in choose_files(repo, paths, quant):
            size, stamp = self._about(repo, path)
            file = ModelFile(path, size, sums.get(path))
            files.append(file)
            told.update(f"{path}\0{size}\0{file.sha256 or stamp}\n".encode())
        return Manifest(
            name=name,
            storage=self.name,
            revision=told.hexdigest()[:40],
            files=tuple(files),
            source=f"{self._url}/{repo}",
        )

    def _sums(self, repo: str) -> dict[str, str]:
        """What SHA256SUMS says, by path; nothing where there is none."""
        try:
            # An object store says "forbidden" of what is not there to those who may not list.
            with _explained(forbidden=FileNotFoundError):
                raw = self._files.cat_file(f"{self._url}/{repo}/{SUMS}")
        except FileNotFoundError:
            return {}
        if len(raw) > _LONGEST_SUMS:
            raise FetchFailed(f"The {SUMS} of `{repo}` is longer than {_LONGEST_SUMS // 2**20} MB.")
        lines = [_SUM.fullmatch(line) for line in raw.decode(errors="replace").splitlines()]
        if not all(lines):
            raise FetchFailed(f"The {SUMS} of `{repo}` has a line that is none of sha256sum's.")
        return {_safe(repo, line[2]): line[1].lower() for line in lines if line}

    def _paths(self, repo: str) -> Sequence[str]:
        """Files in the model's folder and one level below it."""
        top = f"{self._url}/{repo}"
        with _explained():
            root = self._files._strip_protocol(top).rstrip("/")
            try:
                found = self._files.find(top, maxdepth=2)
            except FileNotFoundError:
                return []
        inside = [str(p).removeprefix(root).lstrip("/") for p in found if str(p).startswith(f"{root}/")]
        return [_safe(repo, p) for p in inside if p]

    def _about(self, repo: str, path: str) -> tuple[int, str]:
        """Size of a file, and what changes when it is written anew."""
        try:
            with _explained():
                info: Mapping[str, Any] = self._files.info(f"{self._url}/{repo}/{path}")
        except FileNotFoundError as exc:
            raise FetchFailed(f"`{path}` of `{repo}` is listed and not there.") from exc
        size = info.get("size")
        if not isinstance(size, int) or size < 0:
            raise FetchFailed(f"The source does not say how long `{path}` of `{repo}` is.")
        return size, next((str(info[key]) for key in _STAMPS if info.get(key)), "")

    def _read(self, path: str, first: int, count: int) -> bytes:
        if not count:
            return b""
        try:
            with _explained():
                data = self._files.cat_file(f"{self._url}/{path}", start=first, end=first + count)
        except FileNotFoundError as exc:
            raise FetchFailed(f"`{path}` was there, and is gone.") from exc
        if len(data) != count:
            raise FetchFailed(f"The source sent {len(data):,} bytes of `{path}` where it was asked for {count:,}.")
        return bytes(data)

    @property
    def _files(self) -> Any:
        """fsspec's file system. Opened when it is first asked, since that may take seconds."""
        if self._opened is None:
            from fsspec.core import url_to_fs

            how: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
            if self._url.startswith(("s3:", "s3a:")):
                how["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 3}}
            self._opened, _ = url_to_fs(self._url, **how)
        return self._opened

    # On its way.

    def _fetch(self, manifest: Manifest, folder: Path, watch: Watch, stop: threading.Event) -> None:
        """Fetch what is not here yet of a model, hash it, and give it its place. Runs in a thread."""
        draft = self.root / f".fetch-{folder.parent.name}-{folder.name}"
        waits = lambda: watch.say("another process fetches this model; waiting for it")  # noqa: E731
        with locked(self.root / ".locks", [draft.name.removeprefix(".fetch-")], waits, stop):
            if shelf.kept_revision(folder) is not None:
                return
            (draft / "files").mkdir(parents=True, exist_ok=True)
            os.utime(draft)
            _refuse_what_does_not_fit(manifest, draft)
            self._bring(manifest, draft, watch, stop)
            if any(f.sha256 is None for f in manifest.files):
                now = self._look(manifest.name)
                if now is None or now.revision != manifest.revision:
                    shutil.rmtree(draft)
                    raise FetchFailed(f"`{manifest.name}` was changed at its source while it was fetched. Try again.")
            (draft / "manifest.json").write_bytes(msgspec.json.encode(manifest))
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():  # half deleted, or by another program
                shelf.delete(self.root, folder)
                folder.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(folder)
            proven = [((folder / "files" / f.path).resolve(), f.sha256) for f in manifest.files if f.sha256]
            self._hashed += [(path, path.stat(), digest) for path, digest in proven]

    def _bring(self, manifest: Manifest, draft: Path, watch: Watch, stop: threading.Event) -> None:
        """The files, each proven where that is possible; what has come stays when this ends early."""
        repo, _ = _repo(manifest.name)
        lock, done, connections = threading.Lock(), 0, self._connections

        def add(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                watch(done, manifest.size)

        def piece(part: Partial, path: str, number: int) -> None:
            while left := part.left(number):
                if stop.is_set():
                    raise Stopped
                count = min(left, _READ)
                part.write(number, self._read(f"{repo}/{path}", part.next(number), count))
                add(count)

        for number, file in enumerate(manifest.files):
            target = draft / "files" / file.safe_path()
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file() and target.stat().st_size == file.size:
                add(file.size)
            else:
                # The threads end before their file is closed.
                with Partial(draft / f"{number}{SUFFIX}", file.size) as part, ThreadPoolExecutor(connections) as pool:
                    add(part.here)
                    for come in [pool.submit(piece, part, file.path, n) for n in part.pieces]:
                        try:
                            come.result()
                        except BaseException:
                            stop.set()
                            raise
                    part.finish(target)
            if file.sha256 not in (None, shelf.sha256(target)):
                target.unlink()
                raise VerifyFailed(f"`{file.path}` of `{repo}` has not the SHA-256 that its {SUMS} says.")

    # On this disk.

    def _folder(self, manifest: Manifest) -> Path:
        repo, _ = _repo(manifest.name)
        return self.root / repo.replace("/", "--") / manifest.revision

    def _all(self) -> Iterator[Manifest]:
        """What is kept, whole, by the name that finds it: the one that came last needs no revision."""
        folders = [f.parent for f in self.root.glob("[!.]*/*/manifest.json")]
        folders.sort(key=lambda f: (-f.stat().st_mtime, f.name))
        seen: set[str] = set()
        for manifest in filter(None, map(shelf.kept_revision, folders)):
            rest = manifest.name.rest
            yield msgspec.structs.replace(
                manifest, name=ModelName("", rest, manifest.revision if rest in seen else None)
            )
            seen.add(rest)


def _check(url: str) -> None:
    parts = urlsplit(url)
    where = "[storage.bucket] url"
    if not parts.scheme or "::" in url:
        raise ConfigError(f"`{where}` must be a URL such as s3://bucket/folder, https://host/folder or file:///folder")
    if parts.username or parts.password or parts.query:
        raise ConfigError(f"`{where}` holds a name, a password or a query; credentials belong into the environment")
    missing = next((p for p in ("fsspec", _NEEDS.get(parts.scheme, "")) if p and not importlib.util.find_spec(p)), None)
    if missing:
        extra = "'hfms[s3]'" if missing in ("fsspec", "s3fs") else missing
        raise ConfigError(f"`{where}` is {parts.scheme}:, and {missing} is not installed: pip install {extra}")


def _repo(name: ModelName) -> tuple[str, str]:
    """The model's folder below the URL, and which GGUF of it is meant. Raises BadRequest."""
    repo, _, quant = name.rest.partition(":")
    if not _NAME.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 200:
        raise BadRequest(f"`{repo}` is no name of a folder in a bucket.", param="model")
    return repo, quant


def _safe(repo: str, path: str) -> str:
    try:
        ModelFile(path, 0).safe_path()
    except ValueError as exc:
        raise FetchFailed(f"The source lists an {exc} in `{repo}`.") from exc
    return path


@contextmanager
def _explained(forbidden: type[Exception] | None = None) -> Iterator[None]:
    """Whatever a source raises, as FetchFailed; what is not there stays FileNotFoundError.

    The source's own words are left out, since they may hold what it was asked with.
    """
    try:
        yield
    except (HfmsError, FileNotFoundError):
        raise
    except PermissionError as exc:
        if forbidden is not None:
            raise forbidden from exc
        raise FetchFailed(
            "The source refuses to show what it has. Its credentials come from the environment: for S3 from "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        ) from None
    except Exception as exc:
        raise FetchFailed(f"The source did not answer as it should: {type(exc).__name__}.") from exc


def _refuse_what_does_not_fit(manifest: Manifest, draft: Path) -> None:
    here = sum(p.stat().st_blocks * 512 for p in draft.rglob("*") if p.is_file())
    free = shutil.disk_usage(draft).free
    if manifest.size - here > free:
        raise FetchFailed(
            f"There is no room: {manifest.size - here:,} bytes are still to come, and the disk of the cache has "
            f"{free:,} left. Free some (`hfms models gc`), or set [storage.bucket] cache_dir to another disk.",
            code="disk_full",
        )
