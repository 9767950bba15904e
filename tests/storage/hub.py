"""A small Hugging Face Hub on loopback: the routes that huggingface_hub asks, and the ways in which a Hub can fail."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from aiohttp import web

LARGE = (".safetensors", ".gguf", ".bin", ".pt")
"""Kept as LFS files: known by their SHA-256, and served from another place by a redirect."""


AT_ONCE = 2**20
BIT = 2**16
"""Bytes that go out at once where that is watched."""


def git_oid(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


@functools.lru_cache(maxsize=64)
def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@dataclass
class Repo:
    """Files by path, at one commit, which `main` stands for."""

    files: dict[str, bytes]
    gated: bool = False
    readers: frozenset[str] = frozenset()
    """Tokens that may read a gated repository."""

    private: bool = False
    license: str = ""
    sha: str = ""
    """What the Hub says its commit is, where that is not the truth."""

    @property
    def commit(self) -> str:
        if self.sha:
            return self.sha
        told = "".join(f"{path}:{hashlib.sha1(raw).hexdigest()}\n" for path, raw in sorted(self.files.items()))
        return hashlib.sha1(told.encode()).hexdigest()


@dataclass
class Hub:
    """Start it with `async with`; then `url` is where it listens."""

    repos: dict[str, Repo] = field(default_factory=dict)
    down: int = 0
    """A status that every request is answered with."""
    wrong: set[str] = field(default_factory=set)
    """Files whose bytes come out wrong, in the right number."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File -> after how many bytes each next answer breaks off."""
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    """File -> once half of it is sent, the rest waits for this."""
    faults: dict[str, list[int]] = field(default_factory=dict)
    """File -> the statuses of its next answers."""
    retry_after: str = ""
    """What answers with a fault say of that."""
    ranges: dict[str, str] = field(default_factory=dict)
    """File -> the Content-Range of its answers, where that is not the truth."""
    rangeless: bool = False
    """Ranges are not known here: every answer has the whole file."""
    more: dict[str, bytes] = field(default_factory=dict)
    """File -> bytes that are sent behind what was asked for."""
    less: dict[str, int] = field(default_factory=dict)
    """File -> bytes that are missing at the end of each answer, which ends as if all were well."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File -> its length as it is listed, where that is not the truth."""
    addresses: dict[str, str] = field(default_factory=dict)
    """File -> where its redirect leads, instead of to its bytes."""
    on_bytes: Callable[[int], None] = lambda count: None
    """Told of bytes of files that have gone out; then they go out slowly, and bit by bit."""
    slowly: float = 0.0
    """Seconds between two such bits of one answer."""
    tokens: set[str] = field(default_factory=set)
    """Tokens that clients showed."""
    shown: set[tuple[str, str]] = field(default_factory=set)
    """Host that was asked, and token that it was shown."""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    """File, first byte and number of bytes of each answer with a file in it."""
    url: str = ""

    async def __aenter__(self) -> Hub:
        app = web.Application(middlewares=[self._middleware])
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}", self._info)
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}/revision/{revision:.+}", self._info)
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}/tree/{revision}", self._tree)
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}/auth-check", self._auth_check)
        app.router.add_get("/{repo:[^/]+/[^/]+}/resolve/{revision}/{path:.+}", self._resolve)
        app.router.add_get("/cdn/{repo:[^/]+/[^/]+}/{path:.+}", self._cdn)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _middleware(self, request, handler):
        self.tokens.add(request.headers.get("Authorization", "").removeprefix("Bearer "))
        self.shown.add((request.host, request.headers.get("Authorization", "").removeprefix("Bearer ")))
        if self.down:
            return web.Response(status=self.down)
        try:
            return await handler(request)
        except Refused as exc:
            return web.Response(status=exc.status, headers={"X-Error-Code": exc.code})

    def _repo(self, request, *, read: bool = False) -> Repo:
        repo = self.repos.get(request.match_info["repo"])
        if repo is None:
            # As the real one: a stranger is not told whether a repository is missing or private.
            raise Refused(404 if request.headers.get("Authorization") else 401, "RepoNotFound")
        if request.match_info.get("revision", "main") not in ("main", repo.commit):
            raise Refused(404, "RevisionNotFound")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if read and repo.gated and token not in repo.readers:
            raise Refused(403 if token else 401, "GatedRepo")
        return repo

    async def _info(self, request):
        repo = self._repo(request)
        siblings = []
        for path, raw in repo.files.items():
            size = self.sizes.get(path, len(raw))
            sibling = {"rfilename": path, "size": size, "blobId": git_oid(raw)}
            if path.endswith(LARGE):
                sibling["lfs"] = {"sha256": sha256(raw), "size": size, "pointerSize": 130}
            siblings.append(sibling)
        name = request.match_info["repo"]
        gated = "manual" if repo.gated else False
        told = {"id": name, "sha": repo.commit, "gated": gated, "private": repo.private, "siblings": siblings}
        tags = [f"license:{repo.license}"] if repo.license else []
        return web.json_response(told | {"tags": tags})

    async def _tree(self, request):
        entries = []
        for path, raw in self._repo(request).files.items():
            entry = {"type": "file", "path": path, "size": len(raw), "oid": git_oid(raw)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(raw), "size": len(raw), "pointerSize": 130}
            entries.append(entry)
        return web.json_response(entries)

    async def _auth_check(self, request):
        self._repo(request, read=True)
        return web.Response()

    async def _resolve(self, request):
        repo = self._repo(request, read=True)
        path = request.match_info["path"]
        if path not in repo.files:
            raise Refused(404, "EntryNotFound")
        raw = repo.files[path]
        headers = {"X-Repo-Commit": repo.commit}
        if not path.endswith(LARGE):
            return await self._send(request, path, raw, headers | {"ETag": f'"{git_oid(raw)}"'})
        headers["X-Linked-Etag"] = f'"{sha256(raw)}"'
        headers["X-Linked-Size"] = str(len(raw))
        # Another host, as with the real Hub: its client must not take the token there.
        elsewhere = f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{request.match_info['repo']}/{quote(path)}"
        headers["Location"] = self.addresses.get(path, elsewhere)
        return web.Response(status=302, headers=headers)

    async def _cdn(self, request):
        path = request.match_info["path"]
        return await self._send(request, path, self.repos[request.match_info["repo"]].files[path], {})

    async def _send(self, request, path, raw, headers):
        if request.method == "GET" and (faults := self.faults.get(path)):
            told = {"Retry-After": self.retry_after} if self.retry_after else {}
            return web.Response(status=faults.pop(0), headers=told)
        if path in self.wrong:
            raw = bytes(255 - b for b in raw)
        asked = slice(None) if self.rangeless else request.http_range
        first, end, _ = asked.indices(len(raw))
        rest = memoryview(raw)[first : end - self.less.get(path, 0)]  # a copy would cost more than the sending
        if path in self.more:
            rest = memoryview(bytes(rest) + self.more[path])
        in_part = "Range" in request.headers and not self.rangeless
        response = web.StreamResponse(status=206 if in_part else 200, headers=headers)
        if path in self.more or path in self.less:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(rest)
        if in_part:
            response.headers["Content-Range"] = self.ranges.get(path, f"bytes {first}-{end - 1}/{len(raw)}")
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if cuts := self.cuts.get(path):
            rest = rest[: cuts.pop(0)]
            self.sent.append((path, first, len(rest)))
            await response.write(rest)
            request.transport.close()
            return response
        if self.slowly:
            return await self._send_slowly(request, response, path, first, rest)
        self.sent.append((path, first, len(rest)))
        if path in self.held:
            await response.write(rest[: len(rest) // 2])
            await self.held[path].wait()
            rest = rest[len(rest) // 2 :]
        for at in range(0, len(rest), AT_ONCE):  # a transport takes long over much at once
            await response.write(rest[at : at + AT_ONCE])
        await response.write_eof()
        return response

    async def _send_slowly(self, request, response, path, first, rest):
        """Bit by bit, and with little on the way: so `sent` tells what the other side may have."""
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BIT)
        gone = 0
        try:
            for at in range(0, len(rest), BIT):
                await response.write(rest[at : at + BIT])
                gone = min(at + BIT, len(rest))
                self.on_bytes(min(BIT, len(rest) - at))
                await asyncio.sleep(self.slowly)
            await response.write_eof()
        except ConnectionError:
            if request.transport is not None:
                request.transport.close()
        finally:
            self.sent.append((path, first, gone))
        return response


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
