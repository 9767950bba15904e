"""The real command line in a process of its own, and a server on loopback that says what a test wants said."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without anything that hfms or the hub would read; the hub itself is not asked."""
    ours = ("HFMS_", "HF_", "XDG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**kept, "HOME": str(home), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return clean_environment(tmp_path)


@pytest.fixture
def hfms(tmp_path, environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hfms ARGS` in an empty home, which is also the current folder."""

    def run(*args: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hfms_cli", *args],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment | (env or {}),
            timeout=60,
        )

    return run


@dataclass
class Scripted:
    """An OpenAI server that answers as its test says, and remembers what it was asked.

    `stream`: pieces of bytes of a chat's answer, or a function from the request's body to them. Where the pieces end
    with Ellipsis, the answer stays open until the client goes away, and `left` is then set.
    """

    models: list[str] = field(default_factory=lambda: ["first-model", "second-model"])
    stream: Any = ()
    files: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Path -> bytes and their type."""
    replies: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path, body))
        self.headers.append(dict(request.headers))
        if reply := self.replies.get((request.method, request.path)):
            status, answer = reply
            if isinstance(answer, str):
                return web.Response(text=answer, status=status)
            return web.json_response(answer, status=status)
        if file := self.files.get(request.path):
            return web.Response(body=file[0], content_type=file[1])
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": m} for m in self.models]})
        if request.path == "/v1/chat/completions":
            return await self._say(request, body)
        raise web.HTTPNotFound

    async def _say(self, request: web.Request, body: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in self.stream(body) if callable(self.stream) else self.stream:
            if piece is ...:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.left.set()
            await response.write(piece)
        return response


@pytest.fixture
def server() -> Iterator[Scripted]:
    """A `Scripted`, served from a thread of its own until the test is over."""
    scripted, ready, loop = Scripted(), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", scripted.handle)
        # handler_cancellation: the handler ends when its client goes away
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield scripted
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


ECHO = """
[server]
port = 0
[storage]
order = ["echo"]
[engine]
order = ["echo"]
"""


@pytest.fixture
def serving(tmp_path, environment) -> Iterator[Callable[..., str]]:
    """`serving(toml)` starts a real `hfms serve echo:tiny` with these settings too, and answers its address."""
    processes: list[subprocess.Popen[str]] = []

    def start(toml: str = "", env: dict[str, str] | None = None) -> str:
        (tmp_path / "serve.toml").write_text(ECHO + toml)
        process = subprocess.Popen(
            [sys.executable, "-m", "hfms_cli", "serve", "echo:tiny", "--config", "serve.toml"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment | (env or {}),
        )
        processes.append(process)
        url = ""
        for line in process.stdout:
            if found := re.search(r"http://[0-9.]+:\d+", line):
                url = found[0]
            if line.startswith("ready"):
                return url
        raise AssertionError("the server ended before it was ready")

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=30)


class Served:
    """A running `hfms serve`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"
        self.printed = ""

    async def until(self, word: str, seconds: float = 30) -> str:
        """Read stdout until `word` has been printed."""
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            while word not in self.printed:
                data = await self.process.stdout.read(4096)
                if not data:
                    stderr = await self.process.stderr.read() if self.process.stderr else b""
                    raise AssertionError(f"ended without {word!r}: {self.printed}\n{stderr.decode()}")
                self.printed += data.decode()
        return self.printed


@pytest.fixture
async def hfms_serve(environ, tmp_path: Path, free_port: int):
    """`await hfms_serve("echo:a", toml="...")` starts `hfms serve` on a free port; what runs still is killed."""
    started: list[Served] = []

    async def start(*arguments: str, toml: str = "", env: dict[str, str] | None = None) -> Served:
        (tmp_path / "hfms.toml").write_text(toml)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hfms_cli", "serve", "--port", str(free_port), *arguments,
            cwd=tmp_path, env=environ | (env or {}),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        started.append(Served(process, free_port))
        return started[-1]

    yield start
    for served in started:
        if served.process.returncode is None:
            served.process.kill()
            await served.process.wait()
