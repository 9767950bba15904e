"""Several engine processes of one model: where they go, who gets which call, and what happens when one dies."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

import psutil
import pytest

from hfms_cli.errors import DoesNotFit, EngineDied
from hfms_cli.models import names
from hfms_cli.models.loader import Wish
from hfms_cli.types import Call, Device, Probe, Sampling
from tests.conftest import workers

SLOW = "[engine.echo]\nstep_ms = 5"
TWO = (Wish(), Wish())


def call(call_id: str, tokens: int = 10_000) -> Call:
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    return Call(id=call_id, model="echo:a", task="generate", inputs=["one two"], sampling=sampling)


async def drain(stream) -> None:
    async for _ in stream:
        continue


async def until(true, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


async def test_each_replica_is_a_process_of_its_own_and_is_listed_with_what_it_does(serve):
    async with serve() as server:
        status, row = await server.post("/models/load", {"model": "echo:a", "replicas": 3})
        assert (status, row["status"]["value"]) == (200, "loaded")
        assert len({r["pid"] for r in row["replicas"]}) == 3
        assert [(r["device"], r["status"]["value"], r["outstanding_tokens"]) for r in row["replicas"]] == [
            ("cpu", "loaded", 0)
        ] * 3
        assert row["memory_bytes"] == sum(r["memory_bytes"] for r in row["replicas"])
        assert row["load_phases"].keys() == {"fetch", "verify", "start", "load", "warm-up"}
        _, status = await server.get("/status")
        assert [r["pid"] for r in status["models"][0]["replicas"]] == [r["pid"] for r in row["replicas"]]
        async with server.session.get(server.url + "/metrics") as response:
            text = await response.text()
        assert 'hfms_model_replicas{model="echo:a",state="loaded"} 3.0' in text
        assert 'hfms_model_load_duration_seconds_count{model="echo:a"} 3.0' in text


async def test_a_call_goes_to_the_replica_with_the_fewest_tokens_outstanding(serve):
    async with serve(toml=SLOW + "\n[models]\nreplicas = 2") as server:
        model = await server.runtime.pool.load("echo:a")
        first, second = model.hosts
        async with aclosing(server.runtime.road.answer(call("long"))) as long:
            await anext(long)
            for n in range(3):  # three short ones are still less than the long one
                assert [c.tokens async for c in server.runtime.road.answer(call(f"c{n}", 4))] == [1] * 4
                assert (first.running, second.running) == (1, 0)
            assert first.outstanding > 9_000
            assert second.outstanding == 0
        assert first.outstanding == 0


async def test_a_replica_that_is_killed_ends_only_its_own_calls_and_comes_back(serve):
    async with serve(toml=SLOW) as server:
        model = await server.runtime.pool.load("echo:a", TWO)
        streams = [server.runtime.road.answer(call(f"c{n}")) for n in range(2)]
        for stream in streams:
            await anext(stream)
        lost, kept = model.hosts
        os.kill(lost.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await drain(streams[0])
        assert (await anext(streams[1])).tokens == 1
        assert (model.state, server.runtime.not_ready()) == ("loaded", None)
        assert (await server.get("/ready"))[0] == 200
        status, _ = await server.post("/v1/completions", {"model": "echo:a", "prompt": "hi"})
        assert status == 200
        await until(lambda: len(model.hosts) == 2)
        assert model.hosts[1] is kept
        assert model.hosts[0].pid != lost.pid
        await streams[1].aclose()


async def test_one_that_dies_too_often_says_so_beside_one_that_serves(serve):
    async with serve(toml="[engine]\nrestart_limit = 0") as server:
        model = await server.runtime.pool.load("echo:a", TWO)
        os.kill(model.hosts[0].pid, signal.SIGKILL)
        await until(lambda: model.replicas[0].state == "failed")
        _, listed = await server.get("/models")
        (row,) = listed["data"]
        assert row["status"]["value"] == "loaded"
        assert [r["status"]["value"] for r in row["replicas"]] == ["failed", "loaded"]
        assert "SIGKILL" in row["replicas"][0]["status"]["reason"]
        assert (await server.post("/v1/completions", {"model": "echo:a", "prompt": "hi"}))[0] == 200


async def test_unloading_lets_calls_on_every_replica_finish_and_leaves_no_process(serve):
    async with serve(toml=SLOW) as server:
        model = await server.runtime.pool.load("echo:a", TWO)
        pids = [h.pid for h in model.hosts]

        async def answer(call_id: str) -> int:
            return len([c async for c in server.runtime.road.answer(call(call_id, 40))])

        answers = [asyncio.create_task(answer(f"c{n}")) for n in range(2)]
        await until(lambda: [h.running for h in model.hosts] == [1, 1])
        await server.runtime.pool.unload("echo:a")
        assert await asyncio.gather(*answers) == [40, 40]
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert not workers()


async def test_replicas_that_do_not_fit_together_are_refused_before_any_process_starts(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        (cpu,) = [d for d in loader.devices() if d.id == "cpu"]
        room_for_one = cpu.free_bytes - 100 * 2**20  # the echo takes 64 MiB
        loader.ledger.reserve(cpu, room_for_one)
        with pytest.raises(DoesNotFit, match="room for 1 replicas") as caught:
            await server.runtime.pool.load("echo:a", (Wish(),) * 40)
        assert caught.value.param == "replicas"
        assert not workers()


async def test_each_replica_may_have_wishes_of_its_own(serve):
    async with serve() as server:
        asked = {"model": "echo:a", "replicas": [{"engine": "echo"}, {"engine": "echo", "hardware": "cpu"}]}
        status, row = await server.post("/models/load", asked)
        assert (status, [r["engine"] for r in row["replicas"]]) == (200, ["echo", "echo"])
        assert (await server.post("/models/load", asked))[0] == 200  # the same again changes nothing
        status, body = await server.post("/models/load", asked | {"replicas": 3})
        assert (status, body["error"]["param"]) == (409, "model")
        status, body = await server.post("/models/load", {"model": "echo:b", "replicas": [{"engine": "steam"}]})
        assert (status, body["error"]["param"]) == (400, "engine")


@pytest.mark.parametrize("replicas", [0, -1, 257, "two", [], [{"engin": "echo"}]])
async def test_a_wrong_number_of_replicas_is_refused_by_name(serve, replicas):
    async with serve() as server:
        status, body = await server.post("/models/load", {"model": "echo:a", "replicas": replicas})
        assert status == 400
        assert body["error"]["param"].startswith("replicas")


class Machine:
    """Two GPUs of 100 MiB and a CPU with a lot of room."""

    def probe(self) -> Probe:
        sizes = {"cuda:0": 100, "cuda:1": 100, "cpu": 10_000}
        return Probe(
            tuple(
                Device(id=d, kind=d.split(":")[0], name=d, total_bytes=m * 2**20, free_bytes=m * 2**20)
                for d, m in sizes.items()
            )
        )


class Anywhere:
    """An engine that takes 40 MiB, and less where less is free."""

    name = "anywhere"

    def supports(self, card, device):
        return None

    def estimate(self, request):
        return min(40 * 2**20, request.device.free_bytes + 1)


async def test_replicas_spread_over_the_devices_of_the_best_kind_and_then_go_to_the_next(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        loader._hardware, loader._engines = [Machine()], [Anywhere()]
        placed = await loader.place(names.parse("echo:a"), (Wish(),) * 6, lambda *_: None)
        devices = [p.candidates[0].request.device for p in placed]
        assert [d.id for d in devices] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cpu", "cpu"]
        # Each plans with what those before it leave free.
        assert [d.free_bytes // 2**20 for d in devices] == [100, 100, 60, 60, 10_000, 9_960]


async def test_replicas_start_together_once_the_first_one_has_loaded(serve):
    async with serve() as server:
        pool = server.runtime.pool
        model = pool.begin("echo:a", (Wish(),) * 3)
        most_before_the_first = 0
        while not model.hosts:
            most_before_the_first = max(most_before_the_first, len(workers()))
            await asyncio.sleep(0.005)
        assert most_before_the_first == 1
        await model.ready
        assert len(model.hosts) == 3
