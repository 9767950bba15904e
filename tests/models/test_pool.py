"""The pool over real worker processes."""

from __future__ import annotations

import asyncio
import os
import signal

import msgspec
import psutil
import pytest

from hfms_cli.errors import Conflict, DoesNotFit, LoadFailed, ModelNotFound, Unavailable
from tests.conftest import workers


async def reaches(model, state: str) -> None:
    async with asyncio.timeout(30):
        while model.state != state:
            await asyncio.sleep(0.02)


async def test_a_model_that_dies_too_often_counts_as_failed_until_it_is_loaded_again(serve):
    async with serve("echo:a", toml="[engine]\nrestart_limit = 1") as server:
        pool = server.runtime.pool
        model = pool.find("echo:a")
        for expected in ("loaded", "failed"):
            pid = model.host.pid
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                while model.state == "loaded" and model.host is not None and model.host.pid == pid:
                    await asyncio.sleep(0.02)
            await reaches(model, expected)
        assert "ended 2 times in a row" in model.reason
        with pytest.raises(LoadFailed):
            async with pool.lease("echo:a"):
                raise AssertionError("it was leased")
        again = await pool.load("echo:a")
        assert again.state == "loaded"


async def test_a_restart_gives_back_the_memory_that_was_set_aside(serve):
    async with serve("echo:a") as server:
        loader, model = server.runtime.pool.loader, server.runtime.pool.find("echo:a")
        os.kill(model.host.pid, signal.SIGKILL)
        await reaches(model, "restarting")
        await reaches(model, "loaded")
        await server.runtime.pool.unload("echo:a")
        (cpu,) = [d for d in loader.devices() if d.id == "cpu"]
        assert loader.ledger.available(cpu) == cpu.free_bytes


async def test_unloading_while_it_loads_ends_the_load_and_its_process(serve):
    async with serve() as server:
        pool = server.runtime.pool
        model = pool.begin("echo:a")
        async with asyncio.timeout(10):
            while not workers():
                await asyncio.sleep(0.005)
        await pool.unload("echo:a")
        with pytest.raises(Unavailable, match="unloaded while it loaded"):
            await model.ready
        assert not workers()
        with pytest.raises(ModelNotFound):
            await pool.unload("echo:a")


async def test_an_alias_cannot_be_taken_twice(serve):
    async with serve("echo:a", "echo:b") as server:
        pool = server.runtime.pool
        await pool.load("echo:a", alias="small")
        with pytest.raises(Conflict):
            await pool.load("echo:b", alias="small")
        with pytest.raises(Conflict):
            await pool.load("echo:b", alias="echo:a")


async def test_an_alias_of_the_configuration_names_the_model(serve):
    async with serve("small", toml='[models.aliases]\nsmall = "echo:a"') as server:
        status, body = await server.post("/v1/completions", {"model": "small", "prompt": "hi"})
        assert (status, body["choices"][0]["text"]) == (200, "hi")
        _, listed = await server.get("/v1/models")
        assert {m["id"] for m in listed["data"]} == {"echo:a", "small"}


async def test_a_model_that_does_not_fit_says_by_how_much_and_starts_no_process(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        (cpu,) = [d for d in loader.devices() if d.id == "cpu"]
        everything = msgspec.structs.replace(cpu, free_bytes=cpu.total_bytes)
        loader.ledger.reserve(everything, cpu.total_bytes)  # another load was promised all there is
        with pytest.raises(DoesNotFit, match=r"needs .* on cpu, which has .* left of"):
            await server.runtime.pool.load("echo:a")
        assert not workers()


async def test_every_byte_is_back_after_unloading(serve):
    async with serve() as server:
        pool = server.runtime.pool
        for _ in range(3):
            model = await pool.load("echo:a")
            pid = model.host.pid
            await pool.unload("echo:a")
            assert not psutil.pid_exists(pid)
        assert pool.models() == []
        assert not workers()


class Grumpy:
    """An engine that supports everything and, since no worker knows it, loads nothing."""

    name, plugin = "grumpy", "hfms_engines"
    tasks = ("generate",)

    def supports(self, card, device):
        return None

    def estimate(self, request):
        return 0


async def test_an_engine_that_cannot_load_what_it_supports_gives_way_to_the_next(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        loader._engines = [Grumpy(), *loader._engines]
        model = await server.runtime.pool.load("echo:a")
        assert model.host_now().info.engine == "echo"
        assert [c.engine.name for c in model.replicas[0].placement.candidates] == ["echo"]


async def test_when_no_engine_can_load_the_last_ones_reason_is_told(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        loader._engines = [Grumpy()]
        with pytest.raises(LoadFailed, match="grumpy"):
            await server.runtime.pool.load("echo:a")
        assert not workers()


@pytest.mark.parametrize(("switch", "most"), [({}, 64), ({"HFMS_ENABLE_BATCHING": "false"}, 1)])
async def test_without_batching_an_engine_runs_one_sequence_at_a_time(serve, switch, most):
    async with serve("echo:a", env=switch) as server:
        (model,) = server.runtime.pool.models()
        assert model.info.max_batch == most
