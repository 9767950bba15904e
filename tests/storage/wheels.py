"""Wheels as their makers would never build them, and a package index on loopback that serves them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import encode_basic_auth, web


def sha256(raw: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()


def build_wheel(
    folder: Path,
    name: str,
    version: str,
    files: dict[str, bytes],
    *,
    links: tuple[str, ...] = (),
    lies: dict[str, bytes] | None = None,
    unrecorded: tuple[str, ...] = (),
) -> Path:
    """A wheel with a true RECORD.

    links: which of the files are symbolic links; their content is where they lead.
    lies: files for which RECORD holds the hash of other bytes. unrecorded: files that RECORD leaves out.
    """
    stem = f"{name.replace('-', '_')}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        "WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    everything = files | {f"{stem}.dist-info/{k}": v for k, v in info.items()}
    recorded = {k: (lies or {}).get(k, v) for k, v in everything.items() if k not in unrecorded}
    record = "".join(f"{path},sha256={sha256(raw)},{len(raw)}\n" for path, raw in recorded.items())
    everything[f"{stem}.dist-info/RECORD"] = f"{record}{stem}.dist-info/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, raw in everything.items():
            entry = zipfile.ZipInfo(path)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = ((stat.S_IFLNK if path in links else stat.S_IFREG) | 0o644) << 16
            archive.writestr(entry, raw)
    return wheel


@dataclass
class Index:
    """A simple index (PEP 503) of the archives in a folder, with PyPI's own caching. Start it with `async with`."""

    folder: Path
    down: bool = False
    """Every request is answered 503."""
    login: tuple[str, str] | None = None
    swapped: dict[str, bytes] = field(default_factory=dict)
    """File name -> the bytes that are sent in place of its own; the page keeps the true hash."""
    yanked: set[str] = field(default_factory=set)
    """Archives that were withdrawn."""
    held: asyncio.Event | None = None
    """Where there is one, archives wait for it."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """An archive has been asked for."""
    sent: list[str] = field(default_factory=list)
    """Archives that were sent."""
    url: str = ""

    async def __aenter__(self) -> Index:
        app = web.Application()
        app.router.add_get("/simple/{project}/", self._page)
        app.router.add_get("/files/{file}", self._file)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        login = "{}:{}@".format(*self.login) if self.login else ""
        self.url = f"http://{login}127.0.0.1:{self._runner.addresses[0][1]}/simple"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def _refuse(self, request: web.Request) -> None:
        if self.down:
            raise web.HTTPServiceUnavailable
        if self.login and request.headers.get("Authorization") != encode_basic_auth(*self.login):
            raise web.HTTPUnauthorized

    async def _page(self, request: web.Request) -> web.Response:
        self._refuse(request)
        project = request.match_info["project"].replace("-", "_")
        found = sorted(p for p in self.folder.glob("*") if p.name.startswith(f"{project}-"))
        if not found:
            raise web.HTTPNotFound
        links = []
        for path in found:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yanked = 'data-yanked="broken"' if path.name in self.yanked else ""
            links.append(f'<a href="/files/{path.name}#sha256={digest}" {yanked}>{path.name}</a>')
        return web.Response(text=f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>", content_type="text/html")

    async def _file(self, request: web.Request) -> web.Response:
        self._refuse(request)
        name = request.match_info["file"]
        if self.held:
            self.asked.set()
            await self.held.wait()
        self.sent.append(name)
        raw = self.swapped.get(name) or (self.folder / name).read_bytes()
        return web.Response(body=raw, headers={"Cache-Control": "max-age=365000000, immutable, public"})
