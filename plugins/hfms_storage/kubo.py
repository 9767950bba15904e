"""The storage `kubo`: an IPFS node, by its RPC, or by the program `ipfs` where no RPC answers.

hfms makes the blocks and their CIDs itself, so a node only has to keep and send blocks: `dag/import`, `dag/export`,
`block/get` and the pins. CIDs that reach a command line were made by hfms from bytes, and stand behind `--`.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hfms_cli import ConfigError, FetchFailed, HfmsError, NotFound
from hfms_cli.ipfs import MAX_BLOCK, Block, BlockStore, Cid, car_header, car_section, check, parse
from hfms_storage.options import KuboOptions

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
_CHUNK = 2**18
_NO_ROOT = Cid(1, 0x55, 0, b"")
"""The empty block, which every node has: a CAR must name its root before hfms knows it."""
_MISSING = ("not found", "could not find", "not have", "no link named", "blockstore: block")
_PATH = re.compile(r"(?:/[^\s:/]+){2,}")


class Road(Protocol):
    """A way to the node. `arguments` are the command's, without options."""

    async def call(self, command: str, argument: str, **options: str) -> bytes:
        """The whole answer."""
        ...

    def stream(self, command: str, argument: str, **options: str) -> AsyncGenerator[bytes, None]: ...

    async def send(self, command: str, body: AsyncIterator[bytes], **options: str) -> bytes: ...

    async def close(self) -> None: ...


class Kubo(BlockStore):
    """A Kubo node, or one that speaks its RPC."""

    name = "kubo"

    def __init__(self, options: KuboOptions) -> None:
        self._rpc = Rpc(_url(options.api), options.timeout_seconds)
        self._program = Program(shlex.split(options.command), options.timeout_seconds)

    async def block_get(self, cid: str) -> bytes:
        return await self._call("block/get", str(parse(cid)))

    def car(self, cid: str) -> AsyncIterator[bytes]:
        return self._sent("dag/export", str(parse(cid)))

    def file(self, cid: str) -> AsyncIterator[bytes]:
        return self._sent("cat", str(parse(cid)))

    async def put_blocks(self, blocks: AsyncIterator[Block]) -> None:
        # Not tried on one road and then on the other: the blocks come only once.
        road = await self._road()
        final: Cid | None = None
        fault: HfmsError | None = None

        async def car() -> AsyncGenerator[bytes, None]:
            nonlocal final, fault
            yield car_header([_NO_ROOT])
            yield car_section(_NO_ROOT, b"")
            try:
                async for cid, block in blocks:
                    final = cid
                    yield car_section(cid, block)
            except HfmsError as exc:
                fault = exc
                raise

        try:
            async with aclosing(car()) as body:
                await road.send("dag/import", body, **{"pin-roots": "false"})
        except HfmsError as exc:
            raise fault or exc from None  # what ended the blocks, and not that they ended
        # A node may fail after its answer has begun; whether it took all is seen by what it has.
        if final is not None and final.inline is None:
            check(final, await road.call("block/get", str(final)))

    async def pin(self, cid: str) -> None:
        await self._call("pin/add", str(parse(cid)))

    async def unpin(self, cid: str) -> None:
        try:
            await self._call("pin/rm", str(parse(cid)))
        except HfmsError as exc:
            if "not pinned" in exc.message:
                raise NotFound(f"`{cid}` is not pinned at the node.", param="cid") from exc
            raise

    async def close(self) -> None:
        await self._rpc.close()

    async def _sent(self, command: str, cid: str) -> AsyncGenerator[bytes, None]:
        road = await self._road()
        async with aclosing(road.stream(command, cid)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _call(self, command: str, argument: str) -> bytes:
        return await (await self._road()).call(command, argument)

    async def _road(self) -> Road:
        """The RPC where it answers, else the program where there is one."""
        try:
            await self._rpc.greet()
        except FetchFailed:
            if not self._program.there:
                raise
            return self._program
        return self._rpc


class Rpc:
    """The node's HTTP interface."""

    def __init__(self, url: str, patience: float) -> None:
        self._url = url
        self._patience = patience
        self._session: aiohttp.ClientSession | None = None
        self._greeted = False

    async def greet(self) -> None:
        """Raise FetchFailed where nothing answers. Asked until it has answered once."""
        if not self._greeted:
            await self.call("version", "")
            self._greeted = True

    async def call(self, command: str, argument: str, **options: str) -> bytes:
        return await _whole(self.stream(command, argument, **options), "The node")

    async def stream(self, command: str, argument: str, **options: str) -> AsyncGenerator[bytes, None]:
        async with self._post(command, argument, None, options) as response:
            async for chunk in response.content.iter_chunked(_CHUNK):
                yield chunk

    async def send(self, command: str, body: AsyncIterator[bytes], **options: str) -> bytes:
        import aiohttp

        with aiohttp.MultipartWriter("form-data") as form:
            part = form.append(body, {"Content-Type": "application/octet-stream"})
            part.set_content_disposition("form-data", name="file", filename="blocks.car")
        async with self._post(command, "", form, options) as response:
            return await response.content.read(2**20)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None
        self._greeted = False

    @asynccontextmanager
    async def _post(
        self, command: str, argument: str, body: Any, options: dict[str, str]
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        import aiohttp

        query = options | ({"arg": argument} if argument else {})
        if body is None and argument:
            query["timeout"] = f"{max(1, round(self._patience))}s"  # else a node looks for what is missing for ever
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self._patience)
        if self._session is None:
            self._session = aiohttp.ClientSession(read_bufsize=_CHUNK)
        try:
            url = f"{self._url}/api/v0/{command}"
            async with self._session.post(
                url, params=query, data=body, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise await _refusal(response)
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError) as exc:
            self._greeted = False
            raise FetchFailed("The node's RPC cannot be reached.") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise FetchFailed(f"The node's RPC broke off, or was silent for too long ({type(exc).__name__}).") from exc


class Program:
    """The program `ipfs`, one process for each question."""

    def __init__(self, command: Sequence[str], patience: float) -> None:
        self._command = list(command)
        self._patience = patience

    @property
    def there(self) -> bool:
        return bool(self._command) and shutil.which(self._command[0]) is not None

    async def call(self, command: str, argument: str, **options: str) -> bytes:
        return await _whole(self.stream(command, argument, **options), "The program `ipfs`")

    async def stream(self, command: str, argument: str, **options: str) -> AsyncGenerator[bytes, None]:
        async with self._running(command, argument, options) as process:
            assert process.stdout is not None
            while chunk := await self._within(process.stdout.read(_CHUNK)):
                yield chunk
            await self._end(process)

    async def send(self, command: str, body: AsyncIterator[bytes], **options: str) -> bytes:
        async with self._running(command, "", options) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError, ConnectionResetError):  # then its exit status says why
                async for chunk in body:
                    process.stdin.write(chunk)
                    await self._within(process.stdin.drain())
            process.stdin.close()
            said = await self._within(process.stdout.read(2**20))
            await self._end(process)
            return said

    async def close(self) -> None:
        """Nothing is open between two questions."""

    @asynccontextmanager
    async def _running(
        self, command: str, argument: str, options: dict[str, str]
    ) -> AsyncGenerator[asyncio.subprocess.Process, None]:
        flags = [f"--{name}={value}" for name, value in options.items()]
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *(*self._command, *command.split("/"), f"--timeout={max(1, round(self._patience))}s", *flags),
                *(["--", argument] if argument else []),
                stdin=asyncio.subprocess.DEVNULL if argument else pipe,
                stdout=pipe,
                stderr=pipe,
            )
        except OSError as exc:
            raise FetchFailed(f"The program `ipfs` cannot be run: {exc.strerror}.") from exc
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        said = await self._within(process.stderr.read(2**16))
        if await self._within(process.wait()):
            raise _explained(said.decode(errors="replace").strip().removeprefix("Error: "))

    async def _within(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._patience):
                return await work
        except TimeoutError as exc:
            raise FetchFailed(f"The program `ipfs` was silent for {self._patience:g} seconds.") from exc


def _url(api: str) -> str:
    """The address of the RPC. Raises ConfigError."""
    parts = api.strip("/").split("/")
    if len(parts) >= 4 and parts[0] in ("ip4", "ip6", "dns", "dns4", "dns6") and parts[2] == "tcp":
        host = f"[{parts[1]}]" if parts[0] == "ip6" else parts[1]
        return f"{'https' if 'https' in parts[4:] else 'http'}://{host}:{parts[3]}"
    if api.startswith(("http://", "https://")):
        return api.rstrip("/").removesuffix("/api/v0")
    raise ConfigError("[storage.kubo] api (IPFS_API) is neither http://ADDRESS:PORT nor /ip4/ADDRESS/tcp/PORT")


async def _refusal(response: aiohttp.ClientResponse) -> HfmsError:
    """What the node says of its refusal."""
    import json

    raw = await response.content.read(2**16)
    try:
        message = str(json.loads(raw)["Message"])
    except (ValueError, KeyError, TypeError):
        return FetchFailed(f"The node's RPC answered {response.status}.")
    return _explained(message)


def _explained(message: str) -> HfmsError:
    text = _PATH.sub("…", message.splitlines()[0])[:200] if message else "it did not say why"
    lowered = text.lower()
    if any(words in lowered for words in _MISSING) and "not pinned" not in lowered:
        return NotFound(f"The node does not have it: {text}.", param="cid")
    return FetchFailed(f"The node refused: {text}.")


async def _whole(answer: AsyncGenerator[bytes, None], who: str) -> bytes:
    """An answer that is a block at most. Raises FetchFailed where it is longer."""
    taken = bytearray()
    async with aclosing(answer) as chunks:
        async for chunk in chunks:
            taken += chunk
            if len(taken) > MAX_BLOCK + 2**16:
                raise FetchFailed(f"{who} answers with more than a block can hold.")
    return bytes(taken)
