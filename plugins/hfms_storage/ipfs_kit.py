"""The storage `ipfs_kit`: any object with the verbs of ipfs_kit_py's `IPFSBackendAdapter`, believed in nothing.

    async add_bytes(data) -> {"cid": ...}       async cat(cid) -> bytes      async pin(cid), unpin(cid)
    and where it has it: async block_get(cid) -> bytes

Some releases of the library do not import, and some install programs when they are imported. So it is imported in a
process of its own first, where installing, writing and the network are forbidden; only what passes is imported here.
Then it has to give back what it was given. Whatever goes wrong, the storage is `unavailable, because ...`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from hfms_cli import HfmsError, NotFound, Unavailable, VerifyFailed
from hfms_cli.ipfs import CHUNKER, Block, BlockStore, Cid, blocks_of_bytes, check, parse, root_of
from hfms_storage.options import IpfsKitOptions

LARGEST = 64 * 2**20
"""Bytes of the largest file: the library takes and gives files whole."""
CANARY = b"hfms was here, to see whether what is written can be read."

# Run by the child: an audit hook sees what Python code asks of the system, and this one forbids what an import
# has no business with.
_TRIAL = """
import importlib, os, sys
FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.rmdir",
             "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil.", "socket.connect",
             "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "urllib.Request", "ensurepip.")
def watch(event, arguments):
    writes = event == "open" and (
        set(str(arguments[1] or "")) & set("wax+") or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event.startswith(FORBIDDEN) or writes and arguments[0] != os.devnull:
        os.write(2, b"\\nit wants to do at its import what it may not: " + event.encode() + b"\\n")
        os._exit(3)
sys.dont_write_bytecode = True
module, name = sys.argv[1].split(":")
sys.addaudithook(watch)
getattr(importlib.import_module(module), name)
"""


class IpfsKit(BlockStore):
    """An adapter of ipfs_kit_py's shape."""

    name = "ipfs_kit"

    def __init__(self, options: IpfsKitOptions, adapter: Any = None) -> None:
        """adapter: an object of that shape, instead of the library's own."""
        self._options = options
        self._adapter = adapter
        self._trusted = False
        self._refusal: str | None = None
        self._lock = asyncio.Lock()
        self._made: dict[bytes, bytes] = {}

    async def block_get(self, cid: str) -> bytes:
        adapter, name = await self._ready(), parse(cid)
        if (block := self._made.get(name.digest)) is not None:
            return block
        if hasattr(adapter, "block_get"):
            return _bytes(await self._ask(adapter.block_get, str(name)))
        data = _bytes(await self._ask(adapter.cat, str(name)))
        if name.codec == 0x55:
            return data
        return await asyncio.to_thread(self._rebuild, name, data)

    async def put_blocks(self, blocks: AsyncIterator[Block]) -> None:
        await self._ready()
        raise self.cannot("keep single blocks or folders", "its library takes only the bytes of files")

    async def block_put(self, data: bytes, *, codec: str = "raw") -> str:
        if codec != "raw" or len(data) > 262_144:
            raise self.cannot("keep this block", "its library takes only the bytes of files")
        return await self.add_bytes(data, pin=False)

    async def add_bytes(self, data: bytes, *, pin: bool = True) -> str:
        await self._ready()
        if len(data) > LARGEST:
            raise self.cannot("keep it", f"its library takes files whole, and {LARGEST:,} bytes are the most")
        return await self._keep(data, pin)

    async def add_path(
        self,
        path: Path,
        *,
        recursive: bool = False,
        pin: bool = True,
        chunker: str = CHUNKER,
        read: Callable[[int], object] | None = None,
    ) -> str:
        await self._ready()
        if chunker != CHUNKER or not await asyncio.to_thread(path.is_file):
            raise self.cannot("keep it", "its library takes only files, and cuts them in its own way")
        if (await asyncio.to_thread(path.stat)).st_size > LARGEST:
            raise self.cannot("keep it", f"its library takes files whole, and {LARGEST:,} bytes are the most")
        data = await asyncio.to_thread(path.read_bytes)
        (read or bool)(len(data))
        return await self.add_bytes(data, pin=pin)

    async def pin(self, cid: str) -> None:
        await self._ask((await self._ready()).pin, str(parse(cid)))

    async def unpin(self, cid: str) -> None:
        await self._ask((await self._ready()).unpin, str(parse(cid)))

    async def _keep(self, data: bytes, pin: bool) -> str:
        answer = await self._ask(self._adapter.add_bytes, data)
        told = answer.get("cid") if isinstance(answer, dict) else answer
        cid = parse(str(told))
        roots = await asyncio.to_thread(lambda: [root_of(blocks_of_bytes(data, version=v)) for v in (1, 0)])
        if not any(cid.same_block(root) for root in roots):
            raise VerifyFailed("`ipfs_kit` answered with a CID that is not that of the bytes.")
        if pin and hasattr(self._adapter, "pin"):
            await self._ask(self._adapter.pin, str(cid))
        return str(Cid(1, cid.codec, cid.hash, cid.digest))

    def _rebuild(self, cid: Cid, data: bytes) -> bytes:
        """The block that a CID names, made of the file's bytes in each of the usual ways, until the CIDs agree."""
        if len(data) > LARGEST:
            raise self.cannot("check it", f"its library gives files whole, and {LARGEST:,} bytes are the most")
        for version in (1, 0):
            for chunk in (262_144, 2**20):
                blocks = blocks_of_bytes(data, chunker=f"size-{chunk}", version=version)
                made = {name.digest: block for name, block in blocks}
                if (block := made.get(cid.digest)) is not None:
                    check(cid, block)
                    self._made = made  # what is below will be asked for next
                    return block
        raise VerifyFailed(f"`ipfs_kit` gives bytes for `{cid}` that are not those, or are cut in an unusual way.")

    async def _ready(self) -> Any:
        """The adapter, once it has shown that it can be used. Raises Unavailable."""
        async with self._lock:
            if not self._trusted and self._refusal is None:
                try:
                    if self._adapter is None:
                        self._adapter = await self._load()
                    await self._try()
                except HfmsError as exc:
                    self._refusal = exc.message
                else:
                    self._trusted = True
        if self._refusal is not None:
            raise Unavailable(f"It is unavailable, because {self._refusal.rstrip('.')}.")
        return self._adapter

    async def _load(self) -> Any:
        module, _, name = self._options.factory.partition(":")
        if not importlib.util.find_spec(module.partition(".")[0]):
            raise Unavailable(f"`{module.partition('.')[0]}` is not installed")
        await self._import_elsewhere()
        try:
            return getattr(await asyncio.to_thread(importlib.import_module, module), name)()
        except (Exception, SystemExit) as exc:
            raise Unavailable(f"its library cannot be used ({type(exc).__name__})") from exc

    async def _import_elsewhere(self) -> None:
        """Import it in a child that cannot install anything. Raises Unavailable."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _TRIAL, self._options.factory),
            env={**os.environ, "PIP_NO_INDEX": "1", "IPFS_KIT_AUTO_INSTALL_DEPS": "0"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                _, said = await process.communicate()
        except TimeoutError as exc:
            raise Unavailable("its library takes too long to import") from exc
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 3:
            raise Unavailable(said.decode(errors="replace").strip().splitlines()[-1])
        if process.returncode:
            last = (said.decode(errors="replace").strip().splitlines() or ["it ended"])[-1]
            raise Unavailable(f"its library cannot be imported ({last.partition(':')[0][:60]})")

    async def _try(self) -> None:
        """Write something and read it back. Raises HfmsError."""
        for verb in ("add_bytes", "cat", "pin", "unpin"):
            if not callable(getattr(self._adapter, verb, None)):
                raise Unavailable(f"its library has no `{verb}`")
        cid = await self._keep(CANARY, pin=False)
        if _bytes(await self._ask(self._adapter.cat, cid)) != CANARY:
            raise VerifyFailed("it gives back other bytes than it was given")

    async def _ask(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        """One answer. Whatever the library raises becomes an error of ours, without its text."""
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                answer = verb(*arguments)
                return await answer if asyncio.iscoroutine(answer) else answer
        except TimeoutError as exc:
            raise Unavailable("`ipfs_kit` did not answer in time.") from exc
        except HfmsError:
            raise
        except Exception as exc:
            missing = "notfound" in type(exc).__name__.lower() or isinstance(exc, KeyError | FileNotFoundError)
            kind = NotFound if missing else Unavailable
            raise kind(f"`ipfs_kit` failed at `{getattr(verb, '__name__', 'it')}` ({type(exc).__name__}).") from exc


def _bytes(answer: Any) -> bytes:
    if isinstance(answer, dict):
        answer = answer.get("data", answer.get("content"))
    if not isinstance(answer, bytes | bytearray | memoryview):
        raise VerifyFailed("`ipfs_kit` answered with no bytes.")
    return bytes(answer)
