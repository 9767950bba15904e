"""The storage `gateway`: IPFS over HTTP gateways, none of which is trusted.

Asked for a raw block or for a CAR of blocks (https://specs.ipfs.tech/http-gateways/trustless-gateway/); hfms checks
every block, so that a gateway can be anybody's. Each gateway is a source of its own: one that fails or lies is asked
after the others.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from hfms_cli import ConfigError, FetchFailed, NotFound
from hfms_cli.ipfs import MAX_BLOCK, BlockStore, Fetch, Source, parse
from hfms_storage.options import GatewayOptions

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

_CHUNK = 2**18
_KINDS = {
    "raw": "application/vnd.ipld.raw",
    "car": "application/vnd.ipld.car;version=1;order=dfs;dups=n",
}


class Gateways(BlockStore):
    """Several gateways as one store, which can only be read."""

    name = "gateway"

    def __init__(self, options: GatewayOptions) -> None:
        self._gateways = [Gateway(url, options.timeout_seconds) for url in options.urls]

    @property
    def sources(self) -> Sequence[Source]:
        return self._gateways

    async def block_get(self, cid: str) -> bytes:
        return await Fetch(self.sources).get(parse(cid))

    async def close(self) -> None:
        for gateway in self._gateways:
            await gateway.close()


class Gateway:
    """One gateway."""

    here = False
    kind = "gateway"
    most_redirects = 4
    refusals: ClassVar[Mapping[int, str]] = {}
    """What a status means, where that is worth more words."""

    def __init__(self, url: str, patience: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            table = "neighbours" if self.kind == "neighbour" else self.kind
            raise ConfigError(f"[storage.{table}] urls are of the form https://HOST")
        self.name = f"{self.kind} {parts.netloc}"
        self._url = url.rstrip("/").removesuffix("/ipfs")
        self._host = parts.hostname
        self._patience = patience
        self._headers: dict[str, str] = {}
        self._session: aiohttp.ClientSession | None = None

    async def block_get(self, cid: str) -> bytes:
        async with self._get(cid, "raw") as response:
            taken = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK):
                taken += chunk
                if len(taken) > MAX_BLOCK:
                    raise FetchFailed(f"The {self.kind} sends more than a block can hold.")
            return bytes(taken)

    def car(self, cid: str) -> AsyncIterator[bytes]:
        return self._car(cid)

    def file(self, cid: str) -> None:
        return None  # trustless gateways send blocks

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def _car(self, cid: str) -> AsyncGenerator[bytes, None]:
        async with self._get(cid, "car") as response:
            async for chunk in response.content.iter_chunked(_CHUNK):
                yield chunk

    def _get(self, cid: str, kind: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._ask(f"/ipfs/{parse(cid)}", {"format": kind}, {"Accept": _KINDS[kind]})

    @asynccontextmanager
    async def _ask(
        self, path: str, query: dict[str, str], headers: dict[str, str]
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        import aiohttp
        from yarl import URL

        if self._session is None:
            # Not unpacked: a small answer could become a large one.
            self._session = aiohttp.ClientSession(
                auto_decompress=False, read_bufsize=_CHUNK, cookie_jar=aiohttp.DummyCookieJar()
            )
        url = URL(f"{self._url}{path}").with_query(query)
        headers = self._headers | headers | {"Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self._patience)
        try:
            for _ in range(1 + self.most_redirects):
                async with self._session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = self._elsewhere(url, response.headers.get("Location", ""))
                        continue
                    if response.status in (404, 410):
                        raise NotFound(f"The {self.kind} does not have it.", param="cid")
                    if response.status != 200:
                        usual = f"The {self.kind} answered {response.status}."
                        raise FetchFailed(self.refusals.get(response.status, usual))
                    yield response
                    return
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise FetchFailed(f"The {self.kind} cannot be reached, or broke off ({type(exc).__name__}).") from exc
        raise FetchFailed(f"The {self.kind} sends from one address to the next.")

    def _elsewhere(self, url: object, location: str) -> URL:
        """Where a redirect leads: to the same host, or below it, as gateways do that give each CID a host."""
        from yarl import URL

        try:
            target = URL(str(url)).join(URL(location))
            host = target.host or ""
        except ValueError:
            raise FetchFailed(f"The {self.kind} redirects to nowhere.") from None
        same = host == self._host or host.endswith(f".{self._host}")
        if target.scheme not in ("http", "https") or not same:
            raise FetchFailed(f"The {self.kind} redirects to another place, which is not followed.")
        return target
