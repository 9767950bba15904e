"""A real IPFS node on loopback with Kubo's RPC (js-ipfs), and what tests ask of it without hfms."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hfms_cli.ipfs import parse

HERE = Path(__file__).parent / "node"
FILES = ("package.json", "package-lock.json", "node.mjs")


@dataclass
class Node:
    api: str
    addresses: list[str]
    process: subprocess.Popen[str]

    async def ask(self, command: str, arg: str | None = None, body: bytes | None = None, **options: str) -> bytes:
        """One call of the RPC. Raises AssertionError where the node refuses."""
        query = options | ({"arg": arg} if arg is not None else {})
        form = None
        if body is not None:
            form = aiohttp.FormData()
            form.add_field("file", body, filename="file", content_type="application/octet-stream")
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.api}/api/v0/{command}", params=query, data=form) as response,
        ):
            raw = await response.read()
            assert response.status == 200, raw
            return raw

    async def add(self, data: bytes, **options: str) -> str:
        """The CID that the node itself gives these bytes."""
        said = await self.ask("add", None, data, **{"cid-version": "1", "raw-leaves": "true"} | options)
        return json.loads(said.splitlines()[-1])["Hash"]

    async def add_folder(self, files: dict[str, bytes], **options: str) -> str:
        """The CID that the node itself gives a folder."""
        query = {"cid-version": "1", "raw-leaves": "true", "wrap-with-directory": "true", **options}
        with aiohttp.MultipartWriter("form-data") as form:
            for path, data in files.items():
                part = form.append(data, {"Content-Type": "application/octet-stream"})
                part.set_content_disposition("form-data", name="file", filename=path, quote_fields=True)
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{self.api}/api/v0/add", params=query, data=form) as response,
            ):
                return json.loads((await response.read()).splitlines()[-1])["Hash"]

    async def holds_pinned(self, cid: str) -> bool:
        """Whether it holds a CID pinned, in whatever form it writes that."""
        said = await self.ask("pin/ls", type="recursive")
        held = [pin for line in said.splitlines() for pin in _keys(json.loads(line))]
        return any(parse(pin).same_block(parse(cid)) for pin in held)

    async def connect(self, other: Node) -> None:
        await self.ask("swarm/connect", other.addresses[0])

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _keys(said: dict[str, Any]) -> list[str]:
    return list(said["Keys"]) if "Keys" in said else [said["Cid"]]


def installed(cache: Path) -> Path:
    """The folder with the node's packages, installed once for each version of the lock file; skips without npm."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("no npm here: an IPFS node for tests cannot be installed")
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()[:16]
    folder = cache / f"ipfs-node-{digest}"
    if not folder.is_dir():
        draft = cache / f".ipfs-node-{digest}-{os.getpid()}"
        draft.mkdir(parents=True)
        for name in FILES:
            shutil.copy(HERE / name, draft)
        done = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=draft,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            shutil.rmtree(draft)
            pytest.skip(f"npm could not install the IPFS node for tests: {done.stderr.strip()[-200:]}")
        with contextlib.suppress(OSError):  # another session was quicker
            draft.rename(folder)
    return folder


@contextlib.contextmanager
def running(folder: Path, repo: Path) -> Iterator[Node]:
    """A node with a repository of its own, until the context ends."""
    process = subprocess.Popen(
        ["node", "node.mjs", str(repo)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("NODE_OPTIONS", "IPFS_PATH")},
    )
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("{"):
            break
    else:
        process.wait()
        pytest.fail("the IPFS node did not start:\n" + "".join(said))
    node = Node(**json.loads(line), process=process)
    try:
        yield node
    finally:
        node.end()
