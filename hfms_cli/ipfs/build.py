"""Bytes, files and folders into blocks, with the CIDs that Kubo gives them (`ipfs add --cid-version=1`).

Chunks of one size, raw leaves, balanced trees of 174 links, folders sorted by name and sharded above 256 KiB. As with
`ipfs add -r`, files whose names begin with a dot are left out.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from hfms_cli.errors import BadRequest, FetchFailed
from hfms_cli.ipfs.cid import Cid
from hfms_cli.ipfs.shards import shards
from hfms_cli.ipfs.unixfs import Kind, Link, encode_node

__all__ = ["CHUNKER", "Block", "blocks_of_bytes", "blocks_of_path", "blocks_of_tree", "chunk_size", "root_of"]

Block = tuple[Cid, bytes]

CHUNKER = "size-262144"
MOST_LINKS = 174
SHARD_ABOVE = 256 * 1024
"""Bytes of names and CIDs of a folder, from which on Kubo shards it."""


def chunk_size(chunker: str) -> int:
    """Bytes of a chunk: `size-N`. Raises BadRequest."""
    found = re.fullmatch(r"size-([1-9][0-9]{0,6})", chunker)
    if not found or int(found[1]) > 2**20:
        raise BadRequest(f"The chunker is `size-N` with N up to 1048576, not {chunker[:40]!r}.", param="chunker")
    return int(found[1])


def blocks_of_bytes(data: bytes, *, chunker: str = CHUNKER, version: int = 1) -> Iterator[Block]:
    """Every block of a file with these bytes; the last one is its root. version: of the CIDs; 0 as in old times."""
    yield from _Builder(chunk_size(chunker), version).file(io.BytesIO(data))


def blocks_of_path(
    path: Path,
    *,
    recursive: bool = False,
    chunker: str = CHUNKER,
    version: int = 1,
    read: Callable[[int], object] = bool,
) -> Iterator[Block]:
    """Every block of a file or folder; the last one is its root. read: told of the bytes that were read.

    Raises BadRequest for what is no file, for a folder without `recursive`, and for links that lead out of the folder.
    """
    builder = _Builder(chunk_size(chunker), version, read)
    try:
        if not path.is_dir():
            yield from builder.path(path)
            return
        if not recursive:
            raise BadRequest(f"`{path.name}` is a folder: ask for it to be added with all that is in it.", param="path")
        yield from builder.folder(path, _homes(path))
    except OSError as exc:
        raise FetchFailed(f"`{path.name}` could not be read: {exc.strerror}.") from exc


def blocks_of_tree(files: Mapping[str, Path | bytes], *, read: Callable[[int], object] = bool) -> Iterator[Block]:
    """Every block of a folder with these files, by their relative POSIX paths; the last one is its root."""
    builder = _Builder(chunk_size(CHUNKER), read=read)
    try:
        yield from builder.tree(files)
    except OSError as exc:
        raise FetchFailed(f"The files could not be read: {exc.strerror}.") from exc


def root_of(blocks: Iterator[Block]) -> Cid:
    """The root of blocks that are not kept."""
    ((cid, _),) = deque(blocks, maxlen=1)
    return cid


class _Builder:
    """Each method yields the blocks of what it is given, then has its root in `root`."""

    def __init__(self, chunk: int, version: int = 1, read: Callable[[int], object] = bool) -> None:
        self._chunk = chunk
        self._version = version
        self._read = read
        self.root = Link(Cid.of("raw", b""))

    def file(self, source: BinaryIO) -> Iterator[Block]:
        """Levels of the tree are filled from below; no more than 174 links of each are held."""
        levels: list[list[tuple[Link, int]]] = [[]]
        while (chunk := source.read(self._chunk)) or levels == [[]]:
            self._read(len(chunk))
            if self._version == 1:
                cid, block = Cid.of("raw", chunk), chunk
            else:
                block = encode_node(Kind.FILE, data=chunk, parts=())
                cid = self._named(block)
            yield cid, block
            levels[0].append((Link(cid, total=len(block)), len(chunk)))
            level = 0
            while len(levels[level]) == MOST_LINKS:
                yield self._join(levels, level)
                level += 1
            if not chunk:
                break
        level = 0
        while len(levels[level]) != 1 or level + 1 < len(levels):
            if levels[level]:
                yield self._join(levels, level)
            level += 1
        self.root = levels[level][0][0]

    def _join(self, levels: list[list[tuple[Link, int]]], level: int) -> Block:
        """All of a level under one node of the next."""
        links, parts = [link for link, _ in levels[level]], [size for _, size in levels[level]]
        block = encode_node(Kind.FILE, links=links, parts=parts)
        cid = self._named(block)
        levels[level] = []
        if level + 1 == len(levels):
            levels.append([])
        levels[level + 1].append((Link(cid, total=len(block) + sum(link.total for link in links)), sum(parts)))
        return cid, block

    def _named(self, node: bytes) -> Cid:
        return dataclasses.replace(Cid.of("dag-pb", node), version=self._version)

    def path(self, path: Path) -> Iterator[Block]:
        # Not following a pipe or a device, which would never end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as source:
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise BadRequest(f"`{path.name}` is neither a file nor a folder.", param="path")
            yield from self.file(source)

    def folder(self, path: Path, homes: tuple[Path, ...]) -> Iterator[Block]:
        entries = []
        for child in sorted(path.iterdir(), key=lambda p: p.name.encode(errors="surrogateescape")):
            if child.name.startswith("."):
                continue
            _refuse_odd_name(child)
            if child.is_symlink() and not child.resolve().is_file():
                raise BadRequest(f"`{child.name}` is a link to no file.", param="path")
            if child.is_symlink() and not any(child.resolve().is_relative_to(home) for home in homes):
                raise BadRequest(f"`{child.name}` is a link that leads out of the folder.", param="path")
            yield from self.folder(child, homes) if child.is_dir() else self.path(child)
            entries.append(Link(self.root.cid, child.name, self.root.total))
        yield from self._entries(entries)

    def tree(self, files: Mapping[str, Path | bytes]) -> Iterator[Block]:
        entries = []
        for name in sorted({path.partition("/")[0] for path in files}, key=str.encode):
            inside = {p.removeprefix(f"{name}/"): f for p, f in files.items() if p.startswith(f"{name}/")}
            match files.get(name):
                case bytes() as data:
                    yield from self.file(io.BytesIO(data))
                case Path() as path:
                    yield from self.path(path)
                case None:
                    yield from self.tree(inside)
            entries.append(Link(self.root.cid, name, self.root.total))
        yield from self._entries(entries)

    def _entries(self, entries: list[Link]) -> Iterator[Block]:
        made: list[Block] = []

        def put(block: bytes) -> Cid:
            made.append((self._named(block), block))
            return made[-1][0]

        if sum(len(e.name.encode()) + len(bytes(e.cid)) for e in entries) >= SHARD_ABOVE:
            cid, total = shards(entries, put)
        else:
            block = encode_node(Kind.FOLDER, links=entries)
            cid, total = put(block), len(block) + sum(e.total for e in entries)
        yield from made
        self.root = Link(cid, total=total)


def _refuse_odd_name(path: Path) -> None:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"A file's name is not UTF-8: {path.name!r}.", param="path") from None


def _homes(folder: Path) -> tuple[Path, ...]:
    """Where links may lead: within the folder, and from a snapshot of the Hub's cache into its blobs."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        return home, home.parents[1] / "blobs"
    return (home,)
