"""A front's pool and its owner, over a real socket and with a real engine. Processes: tests/cli/test_workers.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from hfms_cli.errors import BadRequest, ModelNotFound, Unavailable
from hfms_cli.serving.front import Owner
from hfms_cli.serving.owner import Front
from hfms_cli.telemetry.metrics import Metrics
from hfms_cli.types import Call, Sampling


def call(call_id: str, text: str = "one two", **sampling: object) -> Call:
    return Call(id=call_id, model="echo:a", task="generate", inputs=[text], sampling=Sampling(**sampling))


async def text(stream) -> str:
    return "".join([chunk.text async for chunk in stream])


@contextlib.asynccontextmanager
async def front_of(runtime):
    """A front's pool, and the owner's end of its socket."""
    ours, theirs = socket.socketpair()
    process = await asyncio.create_subprocess_exec("true")
    owner = Front(runtime, process, *await asyncio.open_connection(sock=ours))
    pool = Owner(*await asyncio.open_connection(sock=theirs))
    tasks = [asyncio.create_task(owner.serve()), asyncio.create_task(pool.listen(Metrics()))]
    try:
        yield pool, owner
    finally:
        await owner.end()
        await asyncio.gather(*tasks)


async def idle(host) -> None:
    async with asyncio.timeout(20):
        while host.running:
            await asyncio.sleep(0.01)


async def test_a_leased_model_answers_as_the_owners_own(serve):
    async with serve("echo:a") as server, front_of(server.runtime) as (pool, _):
        own = server.runtime.pool.find("echo:a")
        async with pool.lease("echo:a") as model:
            assert (model.id, model.info) == ("echo:a", own.info)
            assert (own.leases, server.runtime.in_flight) == (1, 1)
            assert await text(model.submit(call("c1"))) == "one two"
        async with asyncio.timeout(20):
            await own.idle.wait()
        assert pool.find("echo:a").id == "echo:a"
        assert pool.find("echo:b") is None


async def test_a_call_that_fails_or_is_left_leaves_nothing_of_it_with_the_owner(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server, front_of(server.runtime) as (pool, _):
        own = server.runtime.pool.find("echo:a")
        async with pool.lease("echo:a") as model:
            with pytest.raises(BadRequest) as caught:
                await text(model.submit(call("c1", stop=("x",))))
            assert caught.value.param == "stop"
        async with (
            pool.lease("echo:a") as model,
            contextlib.aclosing(model.submit(call("c2", ignore_eos=True))) as stream,
        ):
            await anext(stream)
        async with pool.lease("echo:a"):
            assert own.leases  # and it is never asked
        async with pool.lease("echo:a") as model:
            assert await text(model.submit(call("c3", "again"))) == "again"
        async with asyncio.timeout(20):
            await own.idle.wait()
        await idle(own.host)
        assert server.runtime.in_flight == 0


async def test_leaving_a_lease_in_the_middle_of_an_answer_cancels_it_in_the_engine(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server, front_of(server.runtime) as (pool, _):

        async def endless() -> None:
            async with pool.lease("echo:a") as model:
                await text(model.submit(call("c", ignore_eos=True)))

        task = asyncio.create_task(endless())
        host = server.runtime.pool.find("echo:a").host
        async with asyncio.timeout(20):
            while not host.running:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(host)
        assert host.outstanding == 0


async def test_what_the_owner_refuses_is_refused_in_the_same_words(serve):
    async with serve("echo:a") as server, front_of(server.runtime) as (pool, _):
        with pytest.raises(ModelNotFound, match="Did you mean `echo:a`") as unknown:
            async with pool.lease("echo:aa"):
                raise AssertionError("it was leased")
        assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
        server.runtime.draining = True
        with pytest.raises(Unavailable) as draining:
            async with pool.lease("echo:a"):
                raise AssertionError("it was leased")
        assert (draining.value.code, draining.value.retry_after) == ("draining", 5.0)


async def test_an_owner_that_goes_ends_every_call_of_its_fronts(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server:
        async with front_of(server.runtime) as (pool, owner), pool.lease("echo:a") as model:
            stream = model.submit(call("c", ignore_eos=True))
            await anext(stream)
            await owner.end()
            with pytest.raises(Unavailable):
                await text(stream)
        with pytest.raises(Unavailable):
            async with pool.lease("echo:a"):
                raise AssertionError("it was leased")


async def test_a_front_tells_its_series_when_it_is_asked(serve):
    async with serve("echo:a") as server, front_of(server.runtime) as (_, owner):
        assert b"hfms_requests_total" in await owner.count()
