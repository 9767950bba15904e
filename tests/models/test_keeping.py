"""Which models stay in memory, which leave it, and what calls hear of those that are not there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal

import psutil
import pytest

from hfms_cli.errors import DoesNotFit, LoadFailed, Overloaded, Unavailable
from hfms_cli.models.loader import Wish
from hfms_cli.types import Device, Probe
from tests.conftest import workers

MIB = 2**20
ECHO = 64
"""MiB that the echo engine says that it takes."""


class Small:
    """A machine with so many MiB, less what these tests' worker processes hold."""

    name = "cpu"

    def __init__(self, mib: int) -> None:
        self.total = mib * MIB

    def probe(self) -> Probe:
        taken = 0
        for worker in workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                taken += worker.memory_info().rss
        free = max(0, self.total - taken)
        return Probe((Device(id="cpu", kind="cpu", name="small", total_bytes=self.total, free_bytes=free),))


@contextlib.asynccontextmanager
async def room_for_two(serve, toml=""):
    """A server whose machine holds two models and not three."""
    async with serve(toml=toml) as server:
        server.runtime.pool.loader._hardware = [Small(2 * ECHO + ECHO // 2)]
        yield server.runtime.pool


def loaded(pool) -> set[str]:
    return {model.id for model in pool.models() if model.state == "loaded"}


async def call(pool, name: str) -> None:
    async with pool.lease(name):
        await asyncio.sleep(0)


async def test_the_least_recently_used_model_makes_room(serve):
    async with room_for_two(serve) as pool:
        await pool.load("echo:a")
        await pool.load("echo:b")
        await call(pool, "echo:a")
        await pool.load("echo:c")
        assert loaded(pool) == {"echo:a", "echo:c"}
        assert (pool.find("echo:b").state, pool.find("echo:b").reason) == ("unloaded", "made room for echo:c")
        assert len(workers()) == 2


async def test_an_evicted_model_is_loaded_again_when_it_is_called(serve):
    async with room_for_two(serve) as pool:
        for name in ("echo:a", "echo:b", "echo:c"):
            await pool.load(name)
        await pool.load("echo:a", alias="first")
        await pool.load("echo:b")
        assert "echo:a" in loaded(pool)
        await call(pool, "echo:c")
        assert loaded(pool) == {"echo:b", "echo:c"}
        await call(pool, "first")  # what it was called by comes back, too
        assert loaded(pool) == {"echo:a", "echo:c"}


async def test_a_model_in_use_or_pinned_is_never_evicted(serve):
    async with room_for_two(serve, '[models]\npinned = ["echo:b"]') as pool:
        await pool.load("echo:a")
        await pool.load("echo:b")
        async with pool.lease("echo:a"):
            with pytest.raises(DoesNotFit):
                await pool.load("echo:c")
        assert loaded(pool) == {"echo:a", "echo:b"}
        await pool.load("echo:c")
        assert loaded(pool) == {"echo:b", "echo:c"}


async def test_a_load_that_cannot_fit_evicts_nothing(serve):
    async with room_for_two(serve) as pool:
        await pool.load("echo:a")
        await pool.load("echo:b")
        pids = {worker.pid for worker in workers()}
        with pytest.raises(DoesNotFit):
            await pool.load("echo:c", (Wish(),) * 3)
        assert loaded(pool) == {"echo:a", "echo:b"}
        assert {worker.pid for worker in workers()} == pids


async def test_loads_at_the_same_time_do_not_count_on_the_same_bytes(serve):
    async with room_for_two(serve) as pool:
        ended = await asyncio.gather(*(pool.load(f"echo:{n}") for n in range(5)), return_exceptions=True)
        assert len(workers()) == len(loaded(pool)) <= 2
        assert all(isinstance(outcome, DoesNotFit) or outcome.id for outcome in ended)
        assert pool.loader.ledger.available(pool.loader.devices()[0]) >= 0


async def test_models_that_are_loaded_at_start_do_not_evict_each_other(serve):
    async with room_for_two(serve) as pool:
        loads = pool.preload(["echo:a", "echo:b", "echo:c"])
        await asyncio.wait([model.ready for model in loads])
        assert len(loaded(pool)) == 2
        (left_out,) = [model for model in loads if model.state == "failed"]
        assert "needs 64.0 MiB" in left_out.reason


async def test_what_a_model_takes_beyond_its_estimate_counts_when_it_is_evicted_and_loaded_again(serve):
    async with serve("echo:a") as server:
        pool = server.runtime.pool
        (model,) = pool.models()
        (replica,) = model.replicas
        taken, estimate = replica.reservation.taken(), replica.placement.size
        # As if it had been expected to take half of what it takes.
        replica.reservation.size = taken // 2
        replica.placement.candidates = [dataclasses.replace(replica.placement.candidates[0], size=taken // 2)]
        assert model.held.frees == {"cpu": taken}
        await pool.unload("echo:a")
        again = await pool.load("echo:a")
        assert again.replicas[0].placement.size == pytest.approx(2 * estimate, rel=0.01)


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_model_that_nobody_calls_is_unloaded_after_its_time_and_comes_back_when_called(serve):
    async with serve("echo:a", "echo:b") as server:
        pool, clock = server.runtime.pool, Clock()
        pool._clock = clock
        pool.begin("echo:a", idle_seconds=60.0)
        await call(pool, "echo:a")
        clock.now += 59
        assert await pool.unload_idle() == pytest.approx(1.0)
        assert loaded(pool) == {"echo:a", "echo:b"}
        clock.now += 1
        assert await pool.unload_idle() is None
        assert loaded(pool) == {"echo:b"}
        assert pool.find("echo:a").reason == "idle for 60 s"
        assert server.runtime.not_ready() is None
        await call(pool, "echo:a")
        assert loaded(pool) == {"echo:a", "echo:b"}


async def test_a_model_in_use_or_pinned_is_never_too_long_idle(serve):
    async with serve("echo:a", "echo:b", toml='[models]\nidle_seconds = 5\npinned = ["echo:b"]') as server:
        pool, clock = server.runtime.pool, Clock()
        pool._clock = clock
        async with pool.lease("echo:a"):
            clock.now += 100
            assert await pool.unload_idle() == 5
            assert loaded(pool) == {"echo:a", "echo:b"}
        clock.now += 5
        await pool.unload_idle()
        assert loaded(pool) == {"echo:b"}


async def test_idle_models_are_looked_for_without_being_asked(serve):
    async with serve("echo:a", toml="[models]\nidle_seconds = 0.2") as server:
        model = server.runtime.pool.find("echo:a")
        async with asyncio.timeout(20):
            while model.state != "unloaded":
                await asyncio.sleep(0.02)
        assert not workers()
        status, body = await server.post("/v1/completions", {"model": "echo:a", "prompt": "hi"})
        assert (status, body["choices"][0]["text"]) == (200, "hi")
        text = (await server.runtime.render_metrics()).decode()
        assert 'hfms_model_unloads_total{model="echo:a",why="idle"}' in text


async def test_a_server_whose_models_are_all_unloaded_stays_ready_only_where_calls_bring_them_back(serve):
    for on_request, ready in (("true", True), ("false", False)):
        async with serve("echo:a", toml=f"[models]\nload_on_request = {on_request}") as server:
            pool, clock = server.runtime.pool, Clock()
            pool._clock = clock
            pool.begin("echo:a", idle_seconds=1.0)
            clock.now += 1e9
            await pool.unload_idle()
            assert loaded(pool) == set()
            assert (server.runtime.not_ready() is None) is ready
            if not ready:
                with pytest.raises(Unavailable, match="is not loaded"):
                    await call(pool, "echo:a")


async def test_calls_wait_for_a_load_and_are_told_of_its_failure(serve):
    async with serve() as server:
        pool = server.runtime.pool
        model = pool.begin("echo:a")
        waiting = [asyncio.create_task(call(pool, "echo:a")) for _ in range(3)]
        await asyncio.sleep(0)
        assert model.waiting == 3
        await asyncio.gather(*waiting)
        assert (model.waiting, model.state) == (0, "loaded")
        broken = pool.begin("echo:b", (Wish(engine="steam"),))
        with pytest.raises(Exception, match="no engine `steam`"):
            await call(pool, "echo:b")
        assert broken.state == "failed"


async def test_no_more_calls_wait_for_a_load_than_an_engine_holds(serve):
    async with serve(toml="[engine]\nmax_calls = 2") as server:
        pool = server.runtime.pool
        pool.begin("echo:a")
        waiting = [asyncio.create_task(call(pool, "echo:a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await call(pool, "echo:a")
        await asyncio.gather(*waiting)


SLOW_LOAD = "[models]\nload_wait_seconds = 0.05\n"


async def test_a_call_waits_no_longer_for_a_load_than_the_operator_says(serve):
    async with serve(toml=SLOW_LOAD) as server:
        server.runtime.pool.begin("echo:a")
        async with server.session.post(
            server.url + "/v1/completions", json={"model": "echo:a", "prompt": "hi", "stream": True}
        ) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "2")
            assert (await response.json())["error"]["code"] == "model_loading"
        await server.runtime.pool.find("echo:a").ready  # the load goes on


async def test_the_queues_deadline_counts_while_a_model_loads(serve):
    async with serve(toml="[middleware.queue]\ntimeout_seconds = 0.05") as server:
        server.runtime.pool.begin("echo:a")
        status, body = await server.post("/v1/completions", {"model": "echo:a", "prompt": "hi"})
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_caller_who_leaves_while_it_waits_does_not_end_the_load(serve):
    async with serve() as server:
        pool = server.runtime.pool
        model = pool.begin("echo:a")
        gone = asyncio.create_task(call(pool, "echo:a"))
        await asyncio.sleep(0)
        gone.cancel()
        await model.ready
        assert (model.waiting, model.leases, model.state) == (0, 0, "loaded")


class Picky:
    """An engine that supports nothing."""

    name = "picky"

    def supports(self, card, device):
        return "runs nothing"


async def test_a_failed_load_is_not_tried_again_by_calls_until_its_pause_is_over_and_the_pause_doubles(serve):
    async with serve(toml="[models]\nretry_seconds = 10") as server:
        pool, clock = server.runtime.pool, Clock()
        pool._clock = clock
        pool.loader._engines = [Picky()]
        with pytest.raises(Exception, match="No engine"):
            await pool.load("echo:a")
        model = pool.find("echo:a")
        for pause in (10, 20, 40):
            clock.now += pause - 1
            tried = model.task
            with pytest.raises(LoadFailed, match="No engine") as told:
                await call(pool, "echo:a")
            assert (model.task is tried, told.value.retry_after) == (True, pytest.approx(1))
            clock.now += 1
            with pytest.raises(LoadFailed):
                await call(pool, "echo:a")
            assert model.task is not tried


async def test_a_model_whose_engine_died_too_often_is_loaded_by_a_call_once_its_pause_is_over(serve):
    async with serve("echo:a", toml="[engine]\nrestart_limit = 0") as server:
        pool, clock = server.runtime.pool, Clock()
        pool._clock = clock
        model = pool.find("echo:a")
        os.kill(model.host.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while model.state != "failed":
                await asyncio.sleep(0.02)
        with pytest.raises(LoadFailed, match="ended 1 times"):
            await call(pool, "echo:a")
        clock.now += 31
        await call(pool, "echo:a")
        assert model.state == "loaded"


async def test_a_load_that_hangs_is_killed_and_said_to_have_hung(serve):
    async with serve(toml="[models]\nload_seconds = 5\n[engine.echo]\nstep_ms = 60000") as server:
        with pytest.raises(LoadFailed, match="did not answer a first call within 5 s"):
            await server.runtime.pool.load("echo:a")
        assert not workers()


async def test_a_required_model_that_failed_keeps_the_server_from_being_ready_and_others_do_not(serve):
    for required, ready in (("echo:b", True), ("gone/model", False)):
        async with serve(toml=f'[models]\nrequired = ["{required}"]') as server:
            pool = server.runtime.pool
            loads = pool.preload(["echo:b", "gone/model"])
            assert (await server.get("/ready"))[0] == 503
            await asyncio.wait([model.ready for model in loads])
            status, body = await server.get("/ready")
            assert status == (200 if ready else 503)
            assert ready or "gone/model could not be loaded" in body["error"]["message"]


async def test_ready_waits_for_what_is_loaded_at_start_and_says_what_it_does(serve):
    async with serve("echo:a") as server:
        server.runtime.pool.begin("echo:b")
        assert (await server.get("/ready"))[0] == 200  # asked for later
        (model,) = server.runtime.pool.preload(["echo:c"])
        async with asyncio.timeout(20):
            while not workers() or model.replicas == []:
                await asyncio.sleep(0.01)
        status, body = await server.get("/ready")
        assert status == 503
        assert "echo:c is loading (start" in body["error"]["message"]
        await model.ready
        assert (await server.get("/ready"))[0] == 200
