"""From checked blocks to files and folders: list, read, export and save. Nothing here holds more than a few blocks."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from hfms_cli.errors import BadRequest, Conflict, FetchFailed, NotFound, VerifyFailed
from hfms_cli.ipfs import cbor
from hfms_cli.ipfs.car import car_header, car_section
from hfms_cli.ipfs.cid import CODECS, Cid, parse
from hfms_cli.ipfs.fetch import Fetch
from hfms_cli.ipfs.lanes import checked
from hfms_cli.ipfs.unixfs import Kind, Link, Node, links_of, parse_node

__all__ = ["Entry", "cat", "export", "files", "ls", "resolve", "save", "write_file"]

AHEAD = 32
"""Blocks that are asked for before they are needed: enough to keep several sources busy."""
DEEPEST = 64
MOST_ENTRIES = 100_000
_WRITE = 2**20
_FILE = (Kind.FILE, Kind.RAW)

Progress = Callable[[int, int], None]
"""Bytes so far and bytes in all."""


class Hash(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes, /) -> None: ...


Have = Callable[[Cid, int, int | None], Awaitable[bytes | None]]
"""A block that is here already: its CID, where it begins in the file, and how long it is there (None: the whole)."""


@dataclass(frozen=True)
class Entry:
    """What a folder holds under a name."""

    name: str
    cid: str
    kind: Literal["file", "folder", "link"]
    size: int
    """Of a file: bytes."""


async def ls(fetch: Fetch, cid: Cid) -> list[Entry]:
    """What is in a folder, sorted by name; of a file, the file itself, without a name."""
    node = parse_node(cid, await fetch.get(cid))
    if node.kind in (Kind.FOLDER, Kind.SHARD):
        links = await _children(fetch, cid, node)
    else:
        links = [Link(cid)]
    async with aclosing(_ahead(fetch, [(link.cid, 0, None) for link in links])) as blocks:
        entries = [_entry(link, parse_node(link.cid, await anext(blocks))) for link in links]
    return sorted(entries, key=lambda e: e.name.encode())


async def resolve(fetch: Fetch, cid: Cid, path: Sequence[str]) -> Cid:
    """The CID at a path below a folder. Raises NotFound."""
    for part in path:
        node = parse_node(cid, await fetch.get(cid))
        links = await _children(fetch, cid, node) if node.kind in (Kind.FOLDER, Kind.SHARD) else []
        found = next((link.cid for link in links if link.name == part), None)
        if found is None:
            raise NotFound(f"There is no {part[:100]!r} in `{cid}`.", param="cid")
        cid = found
    return cid


async def files(fetch: Fetch, cid: Cid) -> list[tuple[str, Entry]]:
    """Every file below a folder with its path, in order; for a file, itself under an empty path.

    Raises VerifyFailed for names that are no names of files, for links, and for trees without end.
    """
    found: list[tuple[str, Entry]] = []
    left = deque([("", cid, 0)])
    listed: dict[Cid, list[Entry]] = {}  # a few blocks may stand for very many folders
    while left:
        above, folder, depth = left.popleft()
        if folder not in listed:
            listed[folder] = await ls(fetch, folder)
        for entry in listed[folder]:
            if entry.cid == str(folder):  # what is no folder lists itself
                return [("", entry)] if entry.kind == "file" else _refuse_link(entry)
            _refuse_unsafe(entry, depth)
            path = f"{above}{entry.name}"
            if entry.kind == "folder":
                left.append((f"{path}/", _cid(entry), depth + 1))
            else:
                found.append((path, entry))
        if len(found) + len(left) > MOST_ENTRIES:
            raise VerifyFailed(f"`{cid}` holds more than {MOST_ENTRIES:,} files and folders.")
    return sorted(found)


async def cat(fetch: Fetch, cid: Cid, have: Have | None = None) -> AsyncGenerator[bytes, None]:
    """A file's bytes, piece by piece. Raises BadRequest for what is no file.

    have: asked for each raw block before it is fetched.
    """
    node = parse_node(cid, await _one(fetch, cid, 0, None, have))
    if node.kind not in _FILE:
        raise BadRequest(f"`{cid}` is a folder or a link, not a file.", param="cid")
    if not node.links:
        yield node.data
        return
    # A stream would send what is here already, too.
    async with fetch.all_of(cid, stream=have is None), aclosing(_pieces(fetch, node, 0, 0, have)) as pieces:
        async for piece in pieces:
            yield piece


async def export(fetch: Fetch, cid: Cid) -> AsyncGenerator[bytes, None]:
    """A CAR with every block below a CID, depth first, each once."""
    seen: set[bytes] = set()
    left = [cid]
    yield car_header([cid])
    async with fetch.all_of(cid, ahead=False):
        while left:
            name = left.pop()
            if name.inline is not None or bytes(name) in seen:
                continue
            seen.add(bytes(name))
            block = await fetch.get(name)
            yield car_section(name, block)
            left += reversed(below(name, block))


def below(cid: Cid, block: bytes) -> list[Cid]:
    """The CIDs that a block holds. Raises VerifyFailed, and BadRequest for codecs that hfms cannot read."""
    try:
        if cid.codec == CODECS["raw"]:
            return []
        if cid.codec == CODECS["dag-pb"]:
            return [link.cid for link in links_of(block)]
        if cid.codec == CODECS["dag-cbor"]:
            return list(cbor.cids_in(cbor.load(block)))
    except (ValueError, TypeError, KeyError) as exc:
        raise VerifyFailed(f"The block `{cid}` is broken: its links cannot be read.") from exc
    raise BadRequest(f"`{cid}` is of a codec that hfms cannot read ({cid.codec:#x}).", param="cid")


async def save(fetch: Fetch, cid: Cid, target: Path, progress: Progress = lambda done, total: None) -> int:
    """Write a file or a folder to `target`, which must not be there yet, and answer its size.

    It is written beside the target and moved there when it is whole; after an error nothing is left.
    Raises Conflict, VerifyFailed, FetchFailed (of which a full disk is one).
    """
    if await asyncio.to_thread(os.path.lexists, target):
        raise Conflict(f"`{target.name}` is there already, and nothing is written over.")
    found = await files(fetch, cid)
    total = sum(entry.size for _, entry in found)
    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}")
    done = 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(target.parent).free):
            raise FetchFailed(f"It needs {total:,} bytes of disk, and {free:,} are free.")
        progress(0, total)
        for path, entry in found:
            await write_file(fetch, entry, draft / path if path else draft, wrote)
        if [path for path, _ in found] != [""]:
            await _make_folders(fetch, cid, draft)
        os.rename(draft, target)
    except OSError as exc:
        raise FetchFailed(f"`{target.name}` could not be written: {exc.strerror}.") from exc
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
    return total


async def _make_folders(fetch: Fetch, cid: Cid, draft: Path) -> None:
    """Empty folders are made, too; those that are not are there already."""
    left = [(draft, cid)]
    while left:
        path, folder = left.pop()
        path.mkdir(parents=True, exist_ok=True)
        left += [(path / e.name, _cid(e)) for e in await ls(fetch, folder) if e.kind == "folder"]


async def write_file(
    fetch: Fetch,
    entry: Entry,
    path: Path,
    wrote: Callable[[int], None],
    *,
    resume: bool = False,
    hashed: Hash | None = None,
) -> None:
    """Write one file. wrote: told of the bytes. hashed: fed with them. Raises OSError, FetchFailed.

    resume: the file may be there already, in part or with wrong bytes; blocks that are right in their place stay, and
    are not fetched. Otherwise it must not be there.
    """
    with _opened(path, resume) as file:
        there = os.fstat(file.fileno()).st_size
        right: set[int] = set()  # where what is there is right

        async def have(cid: Cid, at: int, size: int | None) -> bytes | None:
            if cid.codec != CODECS["raw"] or at + (length := entry.size if size is None else size) > there:
                return None
            block = await asyncio.to_thread(os.pread, file.fileno(), length, at)
            with suppress(VerifyFailed):
                await checked(cid, block)
                right.add(at)
                return block
            return None

        def write(at: int, pieces: list[bytes]) -> int:
            for piece in pieces:
                if hashed is not None:
                    hashed.update(piece)
                if at not in right:
                    _write(file, at, piece)
                at += len(piece)
            return sum(map(len, pieces))

        # While one piece is hashed and written, the next one comes. The thread ends before the file is closed, however
        # this ends: the number of a closed file may be another's already.
        with ThreadPoolExecutor(1) as writer:
            loop = asyncio.get_running_loop()
            writing: asyncio.Future[int] = loop.create_future()
            writing.set_result(0)
            held: list[bytes] = []
            at = size = 0
            async with aclosing(cat(fetch, _cid(entry), have if there else None)) as pieces:
                async for piece in pieces:
                    held.append(piece)
                    size += len(piece)
                    if size >= _WRITE:
                        wrote(await writing)
                        writing = loop.run_in_executor(writer, write, at, held)
                        at += size
                        held, size = [], 0
            wrote(await writing)
            wrote(await loop.run_in_executor(writer, write, at, held))
        file.truncate(at + size)


def _opened(path: Path, resume: bool) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (resume and path.is_file()):
        path.open("xb").close()
    return path.open("r+b", buffering=0)


def _write(file: BinaryIO, at: int, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        done = os.pwrite(file.fileno(), left, at)
        left, at = left[done:], at + done


async def _children(fetch: Fetch, cid: Cid, node: Node, depth: int = 0) -> list[Link]:
    """A folder's links with their names, from all its shards."""
    if node.kind == Kind.FOLDER:
        found = list(node.links)
    else:
        if not 1 < node.fanout <= 1024 or depth > DEEPEST:
            raise VerifyFailed(f"`{cid}` is a part of a folder that makes no sense.")
        prefix, found = len(f"{node.fanout - 1:X}"), []
        for link in node.links:
            if len(link.name) > prefix:
                found.append(Link(link.cid, link.name[prefix:], link.total))
                continue
            shard = parse_node(link.cid, await fetch.get(link.cid))
            if shard.kind != Kind.SHARD:
                raise VerifyFailed(f"`{cid}` is a part of a folder that makes no sense.")
            found += await _children(fetch, link.cid, shard, depth + 1)
            if len(found) > MOST_ENTRIES:
                break
    if len(found) > MOST_ENTRIES:
        raise VerifyFailed(f"`{cid}` holds more than {MOST_ENTRIES:,} files and folders.")
    if len({link.name for link in found}) != len(found):
        raise VerifyFailed(f"`{cid}` holds one name twice.")
    return found


async def _pieces(fetch: Fetch, node: Node, depth: int, at: int, have: Have | None) -> AsyncGenerator[bytes, None]:
    """What is below a node, in order, and exactly as many bytes as the node says. at: where it begins in the file."""
    if node.data:
        yield node.data
    starts = accumulate(node.parts, initial=at + len(node.data))
    asked = [(link.cid, start, part) for link, start, part in zip(node.links, starts, node.parts, strict=False)]
    async with aclosing(_ahead(fetch, asked, have)) as blocks:
        for cid, start, part in asked:
            child = parse_node(cid, await anext(blocks))
            if child.kind not in _FILE or child.size != part or depth > DEEPEST:
                raise VerifyFailed(f"The block `{cid}` is not the part of a file that it should be.")
            if not child.links:
                yield child.data
                continue
            async with aclosing(_pieces(fetch, child, depth + 1, start, have)) as pieces:
                async for piece in pieces:
                    yield piece


async def _ahead(
    fetch: Fetch, asked: Sequence[tuple[Cid, int, int | None]], have: Have | None = None
) -> AsyncGenerator[bytes, None]:
    """Blocks in order. Leaves are asked for ahead; nodes are not, since a stream has all that is below one first.

    asked: CID, and where it begins in the file and how long it is there.
    """
    tasks: deque[asyncio.Task[bytes]] = deque()
    begun = 0
    raw = CODECS["raw"]
    try:
        for i, (cid, _, _) in enumerate(asked):
            while begun < len(asked) and begun < i + AHEAD and (begun == i or asked[begun][0].codec == raw):
                tasks.append(asyncio.ensure_future(_one(fetch, *asked[begun], have)))
                begun += 1
                if cid.codec != raw:
                    break
            yield await tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one(fetch: Fetch, cid: Cid, at: int, size: int | None, have: Have | None) -> bytes:
    if have is not None and (block := await have(cid, at, size)) is not None:
        return block
    # A raw block is its part of the file and nothing else.
    return await (fetch.get(cid, at, size) if cid.codec == CODECS["raw"] else fetch.get(cid))


def _entry(link: Link, node: Node) -> Entry:
    kind: Literal["file", "folder", "link"] = "file"
    if node.kind in (Kind.FOLDER, Kind.SHARD):
        kind = "folder"
    elif node.kind == Kind.SYMLINK:
        kind = "link"
    elif node.kind not in _FILE:
        raise BadRequest(f"`{link.cid}` is neither a file nor a folder.", param="cid")
    return Entry(link.name, str(link.cid), kind, node.size)


def _cid(entry: Entry) -> Cid:
    return parse(entry.cid)


def _refuse_link(entry: Entry) -> list[tuple[str, Entry]]:
    raise VerifyFailed(f"`{entry.cid}` is a symbolic link, which is never written.")


def _refuse_unsafe(entry: Entry, depth: int) -> None:
    bad = entry.name in ("", ".", "..") or any(c in entry.name for c in "/\\\0") or len(entry.name.encode()) > 255
    if bad or depth > DEEPEST:
        raise VerifyFailed(f"A folder holds {entry.name[:100]!r}, which is no name of a file, or is too deep.")
    if entry.kind == "link":
        _refuse_link(entry)
