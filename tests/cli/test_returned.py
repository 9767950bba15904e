"""Unloading returns everything: memory, processes, descriptors and files, time after time."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.conftest import MINILM

REAL_CYCLES = int(os.environ.get("HFMS_TEST_CYCLES", "5"))
"""Loads of a real model; each takes some seconds, and no bound depends on their number."""
SETTLED = 3
"""Cycles in which the server imports, opens and caches what it then keeps."""
GROWTH = 4 * 2**20
"""Bytes that the server may grow by in all the cycles after those: its allocator's slack, and no model."""


def held(server: psutil.Process, temporary: Path) -> dict[str, Any]:
    """What the server and all that it started hold now."""
    return {
        "processes": len(server.children(recursive=True)),
        "descriptors": server.num_fds(),
        "sockets": len(server.net_connections(kind="all")),
        "files": sorted(p.name for p in temporary.rglob("*")),
    }


def resident(server: psutil.Process) -> int:
    """Bytes of the whole tree."""
    return sum(p.memory_info().rss for p in [server, *server.children(recursive=True)])


async def connections_closed(server: psutil.Process) -> None:
    """A client has its answer before the server has closed the connection."""
    async with asyncio.timeout(10):
        while any(c.status != psutil.CONN_LISTEN for c in server.net_connections(kind="tcp")):
            await asyncio.sleep(0.01)


@pytest.fixture
def temporary(tmp_path) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("model", "cycles", "size"),
    [
        ("echo:b", 50, 20 * 2**20),
        pytest.param(MINILM, REAL_CYCLES, 100 * 2**20, marks=pytest.mark.real_model),
    ],
)
async def test_after_each_unload_everything_that_the_load_took_is_back(hfms_serve, temporary, model, cycles, size):
    served = await hfms_serve("echo:a", env={"TMPDIR": str(temporary)})
    await served.until("ready")
    server = psutil.Process(served.process.pid)
    sizes, states = [], []
    asked = {"model": model, "input": "What does it hold?"}
    async with aiohttp.ClientSession(served.url, connector=aiohttp.TCPConnector(force_close=True)) as session:
        for _ in range(cycles):
            for path, body in (("/models/load", {"model": model}), ("/v1/embeddings", asked)):
                async with session.post(path, json=body) as response:
                    assert response.status == 200, await response.text()
            loaded = resident(server)
            async with session.post("/models/unload", json={"model": model}) as response:
                assert response.status == 200
            await connections_closed(server)
            sizes.append(resident(server))
            states.append(held(server, temporary))
            assert loaded - sizes[-1] > size
    assert states[SETTLED:] == [states[SETTLED]] * (cycles - SETTLED)
    assert max(sizes[SETTLED:]) - sizes[SETTLED] <= GROWTH, [size // 2**10 for size in sizes]


@pytest.mark.parametrize("killed", ["worker", "server"])
async def test_a_process_that_is_killed_leaves_no_file_and_no_other_process_behind(hfms_serve, temporary, killed):
    served = await hfms_serve("echo:a", env={"TMPDIR": str(temporary)}, toml="[engine]\nrestart_limit = 0\n")
    await served.until("ready")
    (worker,) = psutil.Process(served.process.pid).children()
    assert [p.is_dir() for p in temporary.iterdir()] == [True]
    (next(temporary.iterdir()) / "left-behind").write_bytes(b"x")  # as an engine does with its sockets
    os.kill(worker.pid if killed == "worker" else served.process.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while list(temporary.iterdir()) or (worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE):
            await asyncio.sleep(0.02)


async def test_where_there_are_several_fronts_a_killed_server_leaves_nothing_behind_either(hfms_serve, temporary):
    several = "[server]\nworkers = 2\n[middleware]\norder = []\n"
    served = await hfms_serve("echo:a", env={"TMPDIR": str(temporary)}, toml=several)
    await served.until("ready")
    server = psutil.Process(served.process.pid)
    async with asyncio.timeout(20):
        while len(server.children()) < 2:
            await asyncio.sleep(0.02)
    children = server.children()
    async with aiohttp.ClientSession() as session:  # until the front is there, nobody would clean up after the server
        async with asyncio.timeout(20):
            while not (await (await session.get(f"{served.url}/status")).json())["fronts"]:
                await asyncio.sleep(0.02)
    os.kill(server.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while list(temporary.iterdir()) or any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
            await asyncio.sleep(0.02)
