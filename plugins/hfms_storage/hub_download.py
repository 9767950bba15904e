"""Fetches files of the Hub into its cache's `blobs`: over several connections, and going on where the last pull ended.

huggingface_hub fetches a file in one stream, into a new temporary file each time, so a pull that is killed begins anew.
Here a file is fetched in pieces (`partial.py`), by whichever thread is free, and hashed meanwhile. Only what has the
right hash gets its name among the blobs, so there is nothing to take back. Addresses, tokens, proxies and certificates
are huggingface_hub's own affair.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from hfms_cli import FetchFailed, VerifyFailed
from hfms_storage.partial import SUFFIX, Partial

if TYPE_CHECKING:
    import httpx2

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries that brought nothing; one more and the pull fails. Whatever comes, the first is next again."""
LONGEST_PAUSE = 60.0
"""Seconds; a Hub that asks for more patience than that is given up."""

HASHERS = 4
LOOK_SECONDS = 0.25
"""How often whoever waits looks whether the pull has been given up."""
_READ = 2**20

_BUSY = {408, 425, 429, 500, 502, 503, 504}
_STALE = {401, 403, 404, 410}
"""What the address of a file answers when it has grown too old."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Stopped(Exception):
    """Nobody waits for this download any more."""


class Hub(Protocol):
    """What this asks of the Hub's client."""

    @property
    def headers(self) -> Mapping[str, str]:
        """With the token, where there is one."""
        ...

    def address(self, path: str) -> tuple[str, str, int | None]:
        """Of a file: its URL at the Hub, where its bytes are, and how many the Hub says they are.

        Raises what huggingface_hub raises.
        """
        ...


@dataclass(frozen=True)
class Blob:
    """A file that is to be fetched."""

    path: str
    """In the repository."""
    size: int
    sha256: str | None
    oid: str | None
    """Git's SHA-1 of it; without a SHA-256 this is what proves its bytes."""

    @property
    def name(self) -> str:
        """In the cache."""
        return self.sha256 or self.oid or ""

    def hasher(self) -> hashlib._Hash:
        """Told the file's bytes, it ends up with the blob's name."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass
class Fetching:
    """A blob on its way."""

    blob: Blob
    partial: Partial
    pieces: list[int]
    """That nobody has taken yet, the last first."""
    ranges: bool | None = None
    """Whether its source sends parts of it. Until that is known, one thread alone asks."""
    asking: bool = False
    address: tuple[str, str, int | None] | None = None
    moved: threading.Condition = field(default_factory=threading.Condition)
    """Told of every byte."""

    def whole(self) -> bool:
        return not any(map(self.partial.left, self.partial.pieces))


class Download:
    """One pull of some files of a repository. `run` is called once."""

    def __init__(
        self,
        hub: Hub,
        blobs: Sequence[Blob],
        folder: Path,
        *,
        connections: int,
        report: Callable[[Blob, int], None],
        stop: threading.Event,
    ) -> None:
        """folder: where blobs lie. report: told of bytes of a blob that are here, or have come; by any thread."""
        self._hub = hub
        self._blobs = blobs
        self._folder = folder
        self._connections = connections
        self._report = report
        self._stop = stop
        self._taking = threading.Condition()
        self._queue: list[Fetching] = []
        self._failure: BaseException | None = None

    def run(self) -> list[tuple[Path, str]]:
        """Fetch all; each file's path and hash.

        Raises VerifyFailed, OSError, Stopped, and what huggingface_hub and its HTTP client raise.
        """
        with ExitStack() as stack:
            for blob in self._blobs:
                part = stack.enter_context(Partial(self._folder / (blob.name + SUFFIX), blob.size))
                pieces = [i for i in reversed(part.pieces) if part.left(i)]
                self._queue.append(Fetching(blob, part, pieces))
                self._report(blob, part.here)
            fetching = list(self._queue)
            threads = max(1, min(self._connections, sum(len(f.pieces) for f in fetching)))
            with ThreadPoolExecutor(threads) as fetchers, ThreadPoolExecutor(HASHERS) as hashers:
                workers = [fetchers.submit(self._guarded, self._work) for _ in range(threads)]
                checks = [hashers.submit(self._guarded, partial(self._check, f)) for f in fetching]
                for worker in workers:
                    worker.result()
                digests = [check.result() for check in checks]
        if self._failure is not None:
            raise self._failure
        return [(self._folder / f.blob.name, digest) for f, digest in zip(fetching, digests, strict=True) if digest]

    def _guarded(self, work: Callable[[], str | None]) -> str | None:
        """Work of a thread. The first failure ends that of all."""
        try:
            return work()
        except BaseException as exc:
            with self._taking:
                if self._failure is None:
                    self._failure = exc
                self._taking.notify_all()
            return None

    def _go_on(self) -> None:
        if self._stop.is_set() or self._failure is not None:
            raise Stopped

    # Fetching.

    def _work(self) -> None:
        while taken := self._take():
            self._fetch(*taken)

    def _take(self) -> tuple[Fetching, int] | None:
        """The next piece that nobody has taken: those of a file together, and the files in their order."""
        with self._taking:
            while any(f.pieces for f in self._queue):
                self._go_on()
                for f in self._queue:
                    if f.pieces and (f.ranges or not f.asking):
                        f.asking = True
                        return f, f.pieces.pop()
                self._taking.wait(LOOK_SECONDS)
        return None

    def _answered(self, f: Fetching, *, ranges: bool) -> None:
        """Note whether the source of a file sends parts of it; where not, all is for the thread that asked."""
        with self._taking:
            if f.ranges is None:
                f.ranges = ranges
                if not ranges:
                    f.pieces.clear()
            self._taking.notify_all()

    def _fetch(self, f: Fetching, piece: int) -> None:
        """All of a piece, in as many tries as that takes."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        failed, stale = 0, False
        while f.partial.left(piece) or (f.ranges is False and not f.whole()):
            before, pause = f.partial.here, None
            failure: Exception = FetchFailed(f"The Hub sent `{f.blob.path}` in part and no more.")
            try:
                self._try(f, piece)
            except httpx2.TransportError as exc:
                failure = exc
            except HfHubHTTPError as exc:
                status, pause = exc.response.status_code, _asked_pause(exc.response)
                if status in _STALE and f.address is not None and not stale:
                    f.address, stale = None, True
                    continue
                if status not in _BUSY or (pause or 0) > LONGEST_PAUSE:
                    raise
                failure = exc
            if f.partial.here > before:
                failed = 0
                continue
            failed += 1
            if failed > len(PAUSES):
                raise failure
            self._stop.wait(PAUSES[failed - 1] if pause is None else pause)

    def _try(self, f: Fetching, piece: int) -> None:
        """Read a piece, or as much of it as comes."""
        self._go_on()
        if f.address is None:
            f.address = self._hub.address(f.blob.path)
        size = f.address[2]
        if size not in (None, f.blob.size):
            raise VerifyFailed(f"The Hub says that `{f.blob.path}` has {size:,} bytes, and lists {f.blob.size:,}.")
        first, left = f.partial.next(piece), f.partial.left(piece)
        in_part = left < f.blob.size and f.ranges is not False
        part = f"bytes={first}-{first + left - 1}" if in_part else None
        with _asking(self._hub, f.address, part) as response:
            if in_part and response.status_code == 206:
                _check_range(response, f.blob, first, left)
                self._answered(f, ranges=True)
                self._read(f, response, first, first + left)
            elif response.status_code == 200 and not f.ranges:
                if in_part:
                    self._answered(f, ranges=False)
                self._read(f, response, 0, f.blob.size)
            else:
                raise VerifyFailed(f"The Hub did not send the part of `{f.blob.path}` that it was asked for.")

    def _read(self, f: Fetching, response: httpx2.Response, at: int, end: int) -> None:
        """Put what comes to its place; what is here already is passed over.

        at, end: where in the file the answer begins, and where what is wanted of it ends.
        """
        for data in response.iter_raw():
            self._go_on()
            data = data[: end - at]
            while data:
                piece = f.partial.piece(at)
                part = data[: f.partial.end(piece) - at]
                new = part[max(0, f.partial.next(piece) - at) :]
                f.partial.write(piece, new)
                at, data = at + len(part), data[len(part) :]
                self._report(f.blob, len(new))
            with f.moved:
                f.moved.notify_all()
            if at == end:
                return

    # Checking.

    def _check(self, f: Fetching) -> str:
        """Hash a file while it comes, and give it its name if it is the right one; its hash."""
        blob, at = f.blob, 0
        digest = blob.hasher()
        while at < blob.size:
            with f.moved:
                while not (ready := f.partial.next(f.partial.piece(at)) - at):
                    self._go_on()
                    f.moved.wait(LOOK_SECONDS)
            data = f.partial.read(at, min(ready, _READ))
            digest.update(data)
            at += len(data)
        if digest.hexdigest() != blob.name:
            f.partial.discard()
            raise VerifyFailed(f"What the Hub sent as `{blob.path}` is not that file; it was deleted. Try again.")
        f.partial.finish(self._folder / blob.name)
        return blob.name


def read_part(hub: Hub, blob: Blob, first: int, count: int) -> bytes:
    """Some bytes of a file, by one request. Raises VerifyFailed, and what huggingface_hub and its client raise."""
    asked = hub.address(blob.path)
    found = bytearray()
    with _asking(hub, asked, f"bytes={first}-{first + count - 1}") as response:
        if response.status_code == 206:
            _check_range(response, blob, first, count)
        skip = 0 if response.status_code == 206 else first
        for data in response.iter_raw():
            found += data[skip:]
            skip = max(0, skip - len(data))
            if len(found) >= count:
                return bytes(found[:count])
    raise VerifyFailed(f"The Hub sent `{blob.path}` in part and no more.")


@contextmanager
def _asking(hub: Hub, address: tuple[str, str, int | None], part: str | None) -> Iterator[httpx2.Response]:
    """What the source of a file answers, its status looked at."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    asked, source, _ = address
    headers = dict(hub.headers) | {"Accept-Encoding": "identity"} | ({"Range": part} if part else {})
    if urlsplit(asked)[:2] != urlsplit(source)[:2]:
        headers.pop("authorization", None)  # that other host has signed the address instead
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", source, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        yield response


def _check_range(response: httpx2.Response, blob: Blob, first: int, count: int) -> None:
    """Refuse an answer that holds other bytes than those that were asked for."""
    said = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start, end, size = map(int, said.groups()) if said else (-1, -1, -1)
    if start != first or not first <= end < first + count or size != blob.size:
        raise VerifyFailed(f"The Hub sent another part of `{blob.path}` than it was asked for.")


def _asked_pause(response: httpx2.Response) -> float | None:
    """Seconds that the Hub wants to be left alone."""
    told = response.headers.get("Retry-After", "")
    return float(told) if told.isascii() and told.isdecimal() else None


@contextmanager
def locked(folder: Path, names: Sequence[str], say: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Keep others from fetching the same blobs: huggingface_hub and other processes of hfms. Their end frees a lock.

    folder: where huggingface_hub has the locks of a repository. say: called once, if someone else fetches already.
    Raises OSError, Stopped.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    folder.mkdir(parents=True, exist_ok=True)
    waited = False
    with ExitStack() as stack:
        for name in sorted(set(names)):  # in one order, so that no two wait for each other
            while True:
                try:
                    stack.enter_context(WeakFileLock(folder / f"{name}.lock", timeout=LOOK_SECONDS))
                except TimeoutError:
                    if stop.is_set():
                        raise Stopped from None
                    if not waited:
                        say()
                        waited = True
                else:
                    break
        yield


def refuse_what_does_not_fit(blobs: Sequence[Blob], folder: Path) -> None:
    """Raise FetchFailed where the disk has no room for what has not come yet."""
    needs = 0
    for blob in blobs:
        if (folder / blob.name).is_file():
            continue
        needs += blob.size
        with suppress(OSError):
            needs -= min(blob.size, (folder / (blob.name + SUFFIX)).stat().st_blocks * 512)
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if needs > free:
        raise FetchFailed(
            f"There is no room: {needs:,} bytes are still to come, and the disk of the Hugging Face cache has {free:,} "
            "left. Free some (`hfms models gc`), or set [storage.hf_cache] cache_dir to another disk.",
            code="disk_full",
        )
