"""CAR, version 1: many blocks in one stream. Every block is checked when it is read.

async for cid, block in read_car(chunks): ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable

from hfms_cli.errors import BadRequest, FetchFailed
from hfms_cli.ipfs import cbor
from hfms_cli.ipfs.cid import MAX_BLOCK, Cid, decode, varint

__all__ = ["CarReader", "car_header", "car_section"]

LONGEST_HEADER = 2**16
LONGEST_CID = 256
LONGEST_SECTION = MAX_BLOCK + 2**10


def car_header(roots: Iterable[Cid]) -> bytes:
    header = cbor.dump_header(list(roots))
    return varint(len(header)) + header


def car_section(cid: Cid, block: bytes) -> bytes:
    name = bytes(cid)
    return varint(len(name) + len(block)) + name + block


class CarReader:
    """Reads a CAR from chunks of any size. It does not check the blocks: `hfms_cli.ipfs.check` does.

    Raises FetchFailed where the stream is cut off or is no CAR, and never holds more than one block.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()
        self.roots: list[Cid] = []

    async def header(self) -> list[Cid]:
        """The roots that the CAR says it has. To be read first."""
        size = await self._varint(LONGEST_HEADER)
        try:
            told = cbor.load(await self._take(size or 0))
            version, roots = told["version"], told.get("roots", [])
            if version == 2:
                raise BadRequest("The CAR is of version 2, and only version 1 can be read here.")
            if version != 1 or not all(isinstance(r, Cid) for r in roots):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise FetchFailed("What came is no CAR.") from exc
        self.roots = roots
        return self.roots

    async def blocks(self) -> AsyncGenerator[tuple[Cid, bytes], None]:
        """Names and blocks, as the stream has them."""
        while (size := await self._varint(LONGEST_SECTION)) is not None:
            await self._need(size)
            try:
                cid, end = decode(bytes(self._buffer[: min(size, LONGEST_CID)]))
            except (ValueError, IndexError) as exc:
                raise FetchFailed("The CAR holds a block whose CID cannot be checked.") from exc
            del self._buffer[:end]
            yield cid, await self._take(size - end)

    async def _more(self) -> bool:
        chunk = await anext(self._chunks, None)
        self._buffer += chunk or b""
        return chunk is not None

    async def _varint(self, most: int) -> int | None:
        """None at the end of the stream."""
        number = shift = 0
        while shift < 63:
            while not self._buffer:
                if not await self._more():
                    if shift:
                        raise FetchFailed("The CAR is cut off.")
                    return None
            byte = self._buffer[0]
            del self._buffer[:1]  # pop(0) would move all the rest
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if number > most or number == 0:
            raise FetchFailed("The CAR holds a block that is too large, or is no CAR.")
        return number

    async def _need(self, size: int) -> None:
        while len(self._buffer) < size:
            if not await self._more():
                raise FetchFailed("The CAR is cut off.")

    async def _take(self, size: int) -> bytes:
        await self._need(size)
        with memoryview(self._buffer) as view:  # a slice of the buffer would be one more copy
            taken = bytes(view[:size])
        del self._buffer[:size]
        return taken
