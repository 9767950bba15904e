"""A trustless gateway on loopback, over a dictionary of blocks, and the ways in which a gateway can be bad."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from hfms_cli.ipfs import Cid, below, car_header, car_section, parse


def flipped(block: bytes) -> bytes:
    """The same number of bytes, one of them wrong."""
    return bytes([block[0] ^ 1]) + block[1:] if block else b"\1"


@dataclass
class TrustlessGateway:
    """Start it with `async with`; then `url` is where it listens."""

    blocks: dict[Cid, bytes] = field(default_factory=dict)
    wrong: set[Cid] = field(default_factory=set)
    """Blocks that it sends with a wrong byte."""
    cars: bool = True
    """Whether it sends CARs."""
    order: Callable[[list[Cid]], list[Cid]] = lambda cids: cids
    """In what order it sends the blocks of a CAR."""
    answer: Callable[[web.Request], object] | None = None
    """What it does instead, with every request."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Format and CID of each request."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def __aenter__(self) -> TrustlessGateway:
        app = web.Application()
        app.router.add_get("/ipfs/{cid}", self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.released.set()
        await self._runner.cleanup()

    @property
    def raw_asked(self) -> list[str]:
        return [cid for kind, cid in self.asked if kind == "raw"]

    async def _get(self, request: web.Request) -> web.StreamResponse:
        kind, cid = request.query.get("format", ""), parse(request.match_info["cid"])
        self.asked.append((kind, str(cid)))
        if self.answer is not None:
            return await self.answer(request)
        if cid not in self.blocks or (kind == "car" and not self.cars):
            raise web.HTTPNotFound
        if kind == "raw":
            return web.Response(body=self._sent(cid))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(car_header([cid]))
        for name in self.order(self._all(cid, [])):
            if name in self.blocks:
                await response.write(car_section(name, self._sent(name)))
        await response.write_eof()
        return response

    def _sent(self, cid: Cid) -> bytes:
        return flipped(self.blocks[cid]) if cid in self.wrong else self.blocks[cid]

    def _all(self, cid: Cid, seen: list[Cid]) -> list[Cid]:
        """Depth first, each once, as `dups=n` asks for."""
        if cid not in seen:
            seen.append(cid)
            for child in below(cid, self.blocks.get(cid, b"")):
                self._all(child, seen)
        return seen
