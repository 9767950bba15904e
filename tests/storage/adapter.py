"""An object of the shape of ipfs_kit_py's IPFSBackendAdapter, over a real node, and the ways in which it can lie."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import aiohttp


class NodeAdapter:
    """async add_bytes, cat, pin and unpin, as that class has them."""

    def __init__(self, api: str) -> None:
        self.api = api

    async def add_bytes(self, data: bytes, *, expected_sha256: str | None = None) -> dict[str, Any]:
        form = aiohttp.FormData()
        form.add_field("file", data, filename="file", content_type="application/octet-stream")
        said = await self._ask("add", form, **{"cid-version": "1", "raw-leaves": "true", "pin": "false"})
        return {
            "cid": json.loads(said.splitlines()[-1])["Hash"],
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    async def cat(
        self, cid: str, *, byte_range: tuple[int, int] | None = None, expected_sha256: str | None = None
    ) -> bytes:
        return await self._ask("cat", arg=cid, timeout="2s")

    async def pin(self, cid: str) -> None:
        await self._ask("pin/add", arg=cid)

    async def unpin(self, cid: str) -> None:
        await self._ask("pin/rm", arg=cid)

    async def _ask(self, command: str, form: aiohttp.FormData | None = None, **query: str) -> bytes:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.api}/api/v0/{command}", params=query, data=form) as response,
        ):
            response.raise_for_status()
            return await response.read()


class Liar(NodeAdapter):
    """Gives back other bytes than it was given."""

    async def cat(self, cid: str, **more: Any) -> bytes:
        return bytes(255 - b for b in await super().cat(cid, **more))


class Canned(NodeAdapter):
    """Answers every file with the same CID, as a release of the library does."""

    async def add_bytes(self, data: bytes, **more: Any) -> dict[str, Any]:
        return {"cid": "QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn", "size": len(data)}
