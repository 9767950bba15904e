"""The storage `hf_cache`: `org/name` on the Hugging Face Hub, kept in the Hub's own cache.

Everything goes through huggingface_hub, so HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean
everywhere (it reads them when it is first imported), and what other programs have fetched is found. Of a repository
only what an engine needs is fetched (`hub_download.py`). Where the Hub cannot be asked, what is here whole answers for
it.

Beside the cache it keeps whatever has a CID: see `blocks.py`.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfms_cli import (
    BadRequest,
    FetchFailed,
    GatedModel,
    HfmsError,
    Leftover,
    Manifest,
    ModelFile,
    ModelName,
    ModelNotFound,
    Progress,
    SeveralModels,
    Terms,
    VerifyFailed,
    Watch,
    __version__,
    choose,
    gguf_models,
    gguf_tag,
)
from hfms_storage.blocks import BlockFolder, beside
from hfms_storage.choosing import choose_files
from hfms_storage.hub_download import Blob, Download, Stopped, locked, read_part, refuse_what_does_not_fit
from hfms_storage.options import HfCacheOptions
from hfms_storage.partial import SUFFIX
from hfms_storage.threads import watched

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo, HfApi, HFCacheInfo
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_BY_HTTP = 50 * 10**9
"""Bytes; the Hub sends larger files by Xet alone."""
_TELL_SECONDS = 0.1
_AT_ONCE = threading.Event()
"""Set: whoever finds a lock taken does not wait for it."""
_AT_ONCE.set()
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Snapshot:
    """One revision of a repository in the cache."""

    repo: str
    info: CachedRevisionInfo
    tree: frozenset[str] | None
    """What the repository holds at that revision; None where nobody has noted it."""

    @property
    def sizes(self) -> dict[str, tuple[int, str]]:
        """Path -> bytes, and the name of the blob: the SHA-256 of large files, and git's SHA-1 of others."""
        root = self.info.snapshot_path
        return {f.file_path.relative_to(root).as_posix(): (f.size_on_disk, f.blob_path.name) for f in self.info.files}

    @property
    def revision(self) -> str | None:
        """What the snapshot is called beside its commit; None is `main`."""
        return None if "main" in self.info.refs else min(self.info.refs, default=self.info.commit_hash)


class HfCache(BlockFolder):
    """Models of the Hugging Face Hub, and beside its cache what has a CID."""

    name = "hf_cache"

    def __init__(self, options: HfCacheOptions) -> None:
        self._options = options
        self._hashed: list[tuple[Path, os.stat_result, str]] = []

    def claims(self, name: ModelName) -> bool:
        return name.scheme == ""

    async def find(self, name: ModelName) -> Manifest | None:
        return await asyncio.to_thread(self._find, name)

    async def fetch(self, manifest: Manifest, progress: Progress) -> Path:
        with watched(progress) as (watch, stop):
            return await asyncio.to_thread(self._fetch, manifest, watch, stop)

    def hashed(self) -> Sequence[tuple[Path, os.stat_result, str]]:
        """Files that were hashed while they came, since this was last asked."""
        found, self._hashed = self._hashed, []
        return found

    async def list(self) -> Sequence[Manifest]:
        return await asyncio.to_thread(lambda: [m for s in self._snapshots() for m in self._models(s)])

    async def remove(self, manifest: Manifest) -> None:
        await asyncio.to_thread(self._remove, manifest)

    async def terms(self, manifest: Manifest) -> Terms:
        """What the Hub says of a model's licence, and of who may have it."""
        return await asyncio.to_thread(self._terms, manifest)

    async def peek(self, manifest: Manifest, path: str, first: int, count: int) -> bytes:
        """Some bytes of a file, which is not fetched for that; unproven, as no hash is of a part."""
        repo = manifest.name.rest.partition(":")[0]
        (file,) = (f for f in manifest.files if f.path == path)
        hub = _Repository(self._api, repo, manifest.revision)

        def read() -> bytes:
            try:
                return read_part(hub, _blob(file), first, count)
            except Exception as exc:
                raise _explained(exc, repo) from exc

        return await asyncio.to_thread(read)

    async def discard(self, manifest: Manifest, paths: Sequence[str]) -> None:
        """Delete files of a model, and the blobs that they are."""
        await asyncio.to_thread(self._discard, manifest, paths)

    def leftovers(self) -> Iterator[Leftover]:
        """What broken pulls have left, blobs without a name, and revisions that no branch or tag means any more."""
        for repo in sorted(self.root.glob("models--*--*")) if self.root.is_dir() else ():
            name = ModelName("", repo.name.removeprefix("models--").replace("--", "/"))
            links = [p for p in repo.glob("snapshots/*/**/*") if p.is_symlink()]
            used = {Path(os.path.normpath(p.parent / p.readlink())) for p in links}
            for blob in sorted(repo.glob("blobs/*")):
                broken = blob.name.endswith((SUFFIX, ".incomplete"))
                if blob in used or (broken and self._is_fetched(repo.name, blob.name.partition(".")[0])):
                    continue
                about = f"a broken pull of {name}" if broken else f"a file that no revision of {name} has"
                with suppress(FileNotFoundError):  # a pull has completed meanwhile
                    yield _leftover(about, [blob], model=name)
        cache = self._scan()
        for cached in sorted(cache.repos if cache else (), key=lambda r: r.repo_id):
            named = [r for r in cached.revisions if r.refs]
            for info in (r for r in cached.revisions if named and not r.refs and cached.repo_type == "model"):
                gone = cache.delete_revisions(info.commit_hash) if cache else None
                if gone is not None:
                    yield Leftover(
                        about=f"{cached.repo_id}@{info.commit_hash[:12]}, which no branch or tag means any more",
                        size=gone.expected_freed_size,
                        age_seconds=time.time() - info.last_modified,
                        paths=tuple(map(str, [*sorted(gone.snapshots), *sorted(gone.blobs)])),
                        model=ModelName("", cached.repo_id, info.commit_hash),
                    )

    def _is_fetched(self, repo: str, blob: str) -> bool:
        """Whether somebody fetches a blob now."""
        try:
            with locked(self.root / ".locks" / repo, [blob], lambda: None, _AT_ONCE):
                return False
        except (Stopped, OSError):
            return True

    # On the Hub.

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._options.endpoint or None, library_name="hfms", library_version=__version__)

    @property
    def blocks_root(self) -> Path:
        return Path(self._options.blocks_dir).expanduser() if self._options.blocks_dir else beside(self.root)

    @property
    def root(self) -> Path:
        from huggingface_hub import constants

        return Path(self._options.cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()

    def _find(self, name: ModelName) -> Manifest | None:
        repo, _, quant = name.rest.partition(":")
        try:
            info = self._ask(repo, name.revision)
        except (GatedModel, FetchFailed) as exc:
            here = next((s for s in self._snapshots(repo) if name.revision in _names(s)), None)
            if here and (found := self._manifest(here, name, quant)):
                return found
            raise exc
        if info is None:
            return None
        files = {f.rfilename: _file(f) for f in info.siblings or ()}
        chosen = [files[path] for path in choose_files(repo, files, quant, self._options.quant)]
        if not _COMMIT.fullmatch(info.sha or ""):  # it becomes the name of a folder
            raise FetchFailed(f"The Hub names no commit of `{repo}`.")
        for file in chosen:
            try:
                file.safe_path()
            except ValueError as exc:
                raise FetchFailed(f"The Hub lists an {exc} in `{repo}`.") from exc
            if file.size < 0:
                raise FetchFailed(f"The Hub lists {file.size} bytes for `{file.path}` in `{repo}`.")
            if not (file.sha256 or file.oid):
                raise FetchFailed(f"The Hub names no hash of `{file.path}` in `{repo}`, so nothing could prove it.")
        return Manifest(
            name=name,
            storage=self.name,
            revision=info.sha or "",
            files=tuple(chosen),
            source=_PASSWORD.sub("", f"{self._api.endpoint}/{repo}"),
        )

    def _ask(self, repo: str, revision: str | None) -> ModelInfo | None:
        """The repository as the Hub knows it; None where it knows none."""
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        info = None
        try:
            info = self._api.model_info(repo, revision=revision, files_metadata=True)
            if info.gated:
                self._api.auth_check(repo)
        except HFValidationError as exc:
            raise BadRequest(f"`{repo}` is no name of a repository on the Hub.", param="model") from exc
        except RevisionNotFoundError as exc:
            raise ModelNotFound(f"`{repo}` has no revision `{revision or 'main'}`.", param="model") from exc
        except Exception as exc:
            # A gated repository is one of "not found" to huggingface_hub, but whoever may see its list can ask for it.
            if isinstance(exc, RepositoryNotFoundError) and not _gated(exc) and info is None:
                return None
            raise _explained(exc, repo, gated=info is not None and bool(info.gated)) from exc
        return info

    def _terms(self, manifest: Manifest) -> Terms:
        repo = manifest.name.rest.partition(":")[0]
        try:
            info = self._ask(repo, manifest.revision)
        except GatedModel:
            return Terms(restricted="it is gated on the Hub, which lets in only who has accepted its terms")
        except HfmsError:
            info = None
        if info is None:
            return Terms(restricted="the Hub cannot be asked whether it is gated or private")
        named = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
        restricted = ""
        if info.gated:
            restricted = "it is gated on the Hub, which lets in only who has accepted its terms"
        elif info.private:
            restricted = "it is private on the Hub"
        return Terms(named[0] if named else "", restricted)

    def _fetch(self, manifest: Manifest, watch: Watch, stop: threading.Event) -> Path:
        from huggingface_hub import snapshot_download

        repo = manifest.name.rest.partition(":")[0]
        folder = self._folder(repo, manifest.revision)
        missing = [f for f in manifest.files if not (folder / f.safe_path()).is_file()]
        here = manifest.size - sum(f.size for f in missing)
        watch(here, manifest.size)
        if missing:
            ours = [] if self._options.xet else [f for f in missing if f.size <= _LARGEST_BY_HTTP]
            so_far = _Tally(watch, here, manifest)
            try:
                refuse_what_does_not_fit([_blob(f) for f in missing], folder.parents[1] / "blobs")
                self._download(repo, manifest.revision, ours, so_far, stop)
                # The rest is the library's: files that come by Xet, and its own notes on the repository.
                snapshot_download(
                    repo,
                    revision=manifest.revision,
                    allow_patterns=[glob.escape(f.path) for f in manifest.files],
                    cache_dir=self.root,
                    endpoint=self._options.endpoint or None,
                    library_name="hfms",
                    library_version=__version__,
                    tqdm_class=_bar(so_far.by_library, stop),
                )
            except Exception as exc:
                raise _explained(exc, repo) from exc
            for file in (f for f in missing if f not in ours):
                _refuse_wrong(folder / file.path, file)
            watch(manifest.size, manifest.size)
        self._note(repo, manifest)
        return folder

    def _download(
        self, repo: str, commit: str, files: Sequence[ModelFile], tally: _Tally, stop: threading.Event
    ) -> None:
        """Fetch files into the cache's blobs, and give them their names in the snapshot once all are there."""
        folder = self._folder(repo, commit)
        blobs = folder.parents[1] / "blobs"
        wanted = {f.path: _blob(f) for f in files}
        blobs.mkdir(parents=True, exist_ok=True)

        def say() -> None:
            tally.watch.say(f"Another process fetches `{repo}` already; waiting for it.")

        with locked(self.root / ".locks" / folder.parents[1].name, [b.name for b in wanted.values()], say, stop):
            # Two names may stand for the same bytes, and whoever had the locks before may have brought some.
            missing = {b.name: b for b in wanted.values() if not (blobs / b.name).is_file()}
            for blob in wanted.values():
                if blob not in missing.values():
                    tally.add(blob.path, blob.size)
            download = Download(
                _Repository(self._api, repo, commit),
                [*missing.values()],
                blobs,
                connections=self._options.connections,
                report=lambda blob, more: tally.add(blob.path, more),
                stop=stop,
            )
            self._hashed += [(path, path.stat(), digest) for path, digest in download.run()]
            # The largest last: a snapshot with weights in it has all else.
            for blob in sorted(wanted.values(), key=lambda b: b.size):
                _link(blobs / blob.name, folder / blob.path)

    def _folder(self, repo: str, commit: str) -> Path:
        return self.root / f"models--{repo.replace('/', '--')}" / "snapshots" / commit

    def _note(self, repo: str, manifest: Manifest) -> None:
        """Note in the cache which commit a branch or tag stands for, now that it is here whole."""
        called = manifest.name.revision or "main"
        if called == manifest.revision:
            return
        refs = self._folder(repo, manifest.revision).parents[1] / "refs"
        path, draft = refs / called, refs.parent / f".ref-{os.getpid()}-{threading.get_ident()}"
        try:
            if not path.is_file() or path.read_text() != manifest.revision:
                path.parent.mkdir(parents=True, exist_ok=True)
                draft.write_text(manifest.revision)
                draft.replace(path)
        except OSError as exc:
            # A cache that cannot be written serves what it has by the commit.
            if not path.is_file():
                raise FetchFailed(f"The Hugging Face cache cannot be written: {exc.strerror}.") from exc

    # In the cache.

    def _scan(self) -> HFCacheInfo | None:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            return scan_cache_dir(self.root)
        except (CacheNotFound, ValueError):  # not made yet, or a file
            return None

    def _snapshots(self, repo: str | None = None) -> Iterator[Snapshot]:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        cache = self._scan()
        for cached in sorted(cache.repos if cache else (), key=lambda r: r.repo_id):
            if cached.repo_type != "model" or repo not in (None, cached.repo_id):
                continue
            for info in sorted(cached.revisions, key=lambda r: r.commit_hash):
                tree = None
                with suppress(CachedRepoTreeNotFoundError):
                    known = get_cached_repo_tree(cached.repo_id, revision=info.commit_hash, cache_dir=self.root)
                    tree = frozenset(f.path for f in known)
                yield Snapshot(cached.repo_id, info, tree)

    def _models(self, snapshot: Snapshot) -> Iterator[Manifest]:
        """Whole models of a snapshot, by the names that find them: one, or each GGUF."""
        paths = snapshot.tree or frozenset(snapshot.sizes)
        ggufs = gguf_models(paths)
        try:
            tags = [] if not choose(paths) else [""]
        except SeveralModels:
            tags = list(dict.fromkeys(map(gguf_tag, ggufs)))
        for tag in tags:
            rest = f"{snapshot.repo}:{tag}" if tag else snapshot.repo
            if found := self._manifest(snapshot, ModelName("", rest, snapshot.revision), tag):
                yield found

    def _manifest(self, snapshot: Snapshot, name: ModelName, quant: str) -> Manifest | None:
        """A model of a snapshot; None where it is not whole."""
        sizes = snapshot.sizes
        chosen = choose_files(snapshot.repo, snapshot.tree or frozenset(sizes), quant, self._options.quant)
        if not sizes.keys() >= {*chosen} or (snapshot.tree is None and not _joined(snapshot, chosen)):
            return None
        return Manifest(
            name=name,
            storage=self.name,
            revision=snapshot.info.commit_hash,
            files=tuple(ModelFile(p, sizes[p][0], _sha256(sizes[p][1]), _oid(sizes[p][1])) for p in chosen),
            source=str(snapshot.info.snapshot_path),
        )

    def _discard(self, manifest: Manifest, paths: Sequence[str]) -> None:
        folder = self._folder(manifest.name.rest.partition(":")[0], manifest.revision)
        try:
            for path in paths:
                file = folder / path
                blob = file.resolve()
                file.unlink(missing_ok=True)
                if blob.parent == folder.parents[1] / "blobs":
                    blob.unlink(missing_ok=True)
        except OSError as exc:
            raise FetchFailed(f"The Hugging Face cache cannot be written: {exc.strerror}.") from exc

    def _remove(self, manifest: Manifest) -> None:
        """Delete the revision, or of a snapshot with more models in it only this one's files."""
        repo = manifest.name.rest.partition(":")[0]
        cache = self._scan()
        snapshot = next((s for s in self._snapshots(repo) if s.info.commit_hash == manifest.revision), None)
        if cache is None or snapshot is None:
            raise ModelNotFound(f"`{manifest.name}` is not in the Hugging Face cache.", param="model")
        own = {f.path for f in manifest.files}
        others = [m for m in gguf_models(snapshot.sizes).values() if not own.issuperset(m)]
        if others and any(p.endswith(".gguf") for p in own):
            root = snapshot.info.snapshot_path
            files = [f for f in snapshot.info.files if f.file_path.relative_to(root).as_posix() in own]
            cache.delete_files(*files).execute()
        else:
            cache.delete_revisions(manifest.revision).execute()


def _names(snapshot: Snapshot) -> set[str | None]:
    """Every revision that a name can ask for and that means this snapshot."""
    return {*snapshot.info.refs, snapshot.info.commit_hash, *([None] if "main" in snapshot.info.refs else [])}


def _file(sibling: RepoSibling) -> ModelFile:
    """A file as the Hub lists it. Its hashes become names of files, so they are looked at closely."""
    sha256 = _sha256(sibling.lfs.sha256) if sibling.lfs else None
    return ModelFile(sibling.rfilename, sibling.size or 0, sha256, None if sha256 else _oid(sibling.blob_id or ""))


def _leftover(about: str, paths: Sequence[Path], model: ModelName) -> Leftover:
    stats = [p.stat() for p in paths]
    return Leftover(
        about=about,
        size=sum(s.st_blocks * 512 for s in stats),
        age_seconds=time.time() - max(s.st_mtime for s in stats),
        paths=tuple(map(str, paths)),
        model=model,
    )


def _blob(file: ModelFile) -> Blob:
    return Blob(file.path, file.size, file.sha256, file.oid)


def _sha256(blob: str) -> str | None:
    return blob if _SHA256.fullmatch(blob) else None


def _oid(blob: str) -> str | None:
    return blob if _COMMIT.fullmatch(blob) else None


def _link(blob: Path, path: Path) -> None:
    """Give a blob its name in a snapshot, as huggingface_hub does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}.link")
    try:
        draft.symlink_to(os.path.relpath(blob, path.parent))
    except PermissionError:  # a file system without links
        blob.replace(path)
    else:
        draft.replace(path)


@dataclass(frozen=True)
class _Repository:
    """One commit of a repository, for `hub_download`."""

    api: HfApi
    repo: str
    commit: str

    @property
    def headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return build_hf_headers(library_name="hfms", library_version=__version__)

    def address(self, path: str) -> tuple[str, str, int | None]:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.repo, path, revision=self.commit, endpoint=self.api.endpoint)
        found = get_hf_file_metadata(
            url, timeout=constants.HF_HUB_ETAG_TIMEOUT, headers=self.headers, endpoint=self.api.endpoint
        )
        return url, found.location, found.size


class _Tally:
    """Adds up what threads say has come, and tells it on a few times a second."""

    def __init__(self, watch: Watch, here: int, manifest: Manifest) -> None:
        """here: bytes of the model that were on the disk before."""
        self.watch = watch
        self._here = here
        self._total = manifest.size
        self._sizes = {f.path: f.size for f in manifest.files}
        self._done: Counter[str] = Counter()
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, path: str, more: int) -> None:
        now, size = time.monotonic(), self._sizes[path]
        with self._lock:
            self._done[path] += more
            done = self._done[path]
            if done < size and now - self._told.get(path, -1.0) < _TELL_SECONDS:
                return
            self._told[path] = now
            # Within the lock, so that no thread tells old news last.
            self.watch.file(path, done, size)
            self.watch(min(self._here + self._done.total(), self._total), self._total)

    def by_library(self, done: int) -> None:
        """Bytes that huggingface_hub has brought, which does not say of which files."""
        self.watch(min(self._here + self._done.total() + done, self._total), self._total)


def _joined(snapshot: Snapshot, chosen: Collection[str]) -> bool:
    """Whether every part that an index names is there."""
    for index in (p for p in chosen if p.endswith(".index.json")):
        try:
            parts = json.loads((snapshot.info.snapshot_path / index).read_bytes())["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if not snapshot.sizes.keys() >= {*parts}:
            return False
    return True


def _refuse_wrong(path: Path, file: ModelFile) -> None:
    """Check a file that has just come. Wrong bytes leave the cache, so that the next fetch gets new ones."""
    blob = path.resolve()
    with blob.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        right = size == file.size and file.sha256 in (None, hashlib.file_digest(opened, "sha256").hexdigest())
    if not right:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise VerifyFailed(f"What the Hub sent as `{file.path}` is not that file; it was deleted. Try again.")


def _gated(exc: BaseException) -> bool:
    from huggingface_hub.errors import GatedRepoError

    return isinstance(exc, GatedRepoError)


def _explained(exc: BaseException, repo: str, *, gated: bool = False) -> HfmsError:
    """The Hub's client's error in our words: it has many kinds, and most of them hold URLs."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(exc, HfmsError):
        return exc
    causes = [exc, *_causes(exc)]
    status = next((r.status_code for c in causes if (r := getattr(c, "response", None)) is not None), None)
    if any(map(_gated, causes)) or (gated and status in (401, 403, 404)):
        return GatedModel(
            f"`{repo}` is gated: accept its terms on its page at the Hub, and set HF_TOKEN to a token of that account.",
            param="model",
        )
    if any(isinstance(c, OfflineModeIsEnabled) for c in causes):
        return FetchFailed(f"`{repo}` is not whole in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it.")
    if status == 401:
        return FetchFailed("The Hub does not take the token in HF_TOKEN.")
    if status is not None:
        return FetchFailed(f"The Hub answered {status} when asked for `{repo}`.")
    if isinstance(exc, OSError) and exc.errno is not None:
        return FetchFailed(f"`{repo}` could not be written to the Hugging Face cache: {exc.strerror}.")
    return FetchFailed(f"The Hub could not be reached, or stopped in the middle of `{repo}` ({type(exc).__name__}).")


def _causes(exc: BaseException) -> Iterator[BaseException]:
    while (cause := exc.__cause__) is not None:
        yield cause
        exc = cause


def _bar(report: Callable[[int], None], stop: threading.Event) -> type[Any]:
    """A progress bar that is not drawn: huggingface_hub tells it of every chunk, and it can end the download."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B"  # another bar counts files
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            if stop.is_set():
                raise Stopped
            with lock:
                self.n += n or 0
                if self._bytes and self.n > most:
                    most = int(self.n)
                    report(most)

    return Bar
