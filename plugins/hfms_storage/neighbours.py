"""The storage `neighbours`: other hfms servers, which share what they have published (docs/publishing.md).

This only carries bytes: hfms itself checks indexes by their signatures, blocks by their CIDs and files by their hashes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar

from hfms_cli import ConfigError, FetchFailed, HfmsError, NotFound
from hfms_cli.ipfs import BlockStore, Fetch, Source, parse
from hfms_storage.gateway import Gateway
from hfms_storage.options import NeighbourOptions

INDEX_PATH = "/.well-known/hfms/index.json"
LONGEST_INDEX = 16 * 2**20


class Neighbours(BlockStore):
    """Other hfms servers as one store, which can only be read."""

    name = "neighbours"

    def __init__(self, options: NeighbourOptions) -> None:
        unknown = {url.rstrip("/") for url in options.keys} - {url.rstrip("/") for url in options.urls}
        if unknown:
            raise ConfigError("[storage.neighbours] keys names a server that urls does not", param="keys")
        keys = {url.rstrip("/"): key for url, key in options.keys.items()}
        self._neighbours = [Neighbour(url, options.timeout_seconds, keys.get(url.rstrip("/"))) for url in options.urls]

    @property
    def sources(self) -> Sequence[Source]:
        return self._neighbours

    async def block_get(self, cid: str) -> bytes:
        return await Fetch(self.sources).get(parse(cid))

    async def indexes(self) -> Sequence[tuple[str, bytes | HfmsError]]:
        """Of each its signed index, or why there is none; all are asked at once."""
        found = await asyncio.gather(*(n.index() for n in self._neighbours))
        return list(zip([n.name for n in self._neighbours], found, strict=True))

    async def close(self) -> None:
        for neighbour in self._neighbours:
            await neighbour.close()


class Neighbour(Gateway):
    """One server. It is asked with a key, so no redirect is followed."""

    kind = "neighbour"
    most_redirects = 0
    refusals: ClassVar[Mapping[int, str]] = {
        401: "It asks for a key: set one for its URL in [storage.neighbours] keys.",
        403: "It does not let this key have it.",
    }

    def __init__(self, url: str, patience: float, key: str | None) -> None:
        super().__init__(url, patience)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def index(self) -> bytes | HfmsError:
        taken = bytearray()
        try:
            async with asyncio.timeout(self._patience), self._ask(INDEX_PATH, {}, {}) as response:
                async for chunk in response.content.iter_any():
                    taken += chunk
                    if len(taken) > LONGEST_INDEX:
                        raise FetchFailed("Its index is too long to be read.")
        except TimeoutError:
            return FetchFailed(f"It did not answer within {self._patience:g} seconds.")
        except NotFound:
            return NotFound("It shares nothing.")
        except HfmsError as exc:
            return exc
        return bytes(taken)
