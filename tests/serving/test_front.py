"""A front's pool and its owner, over a real socket and with a real engine. Processes: tests/cli/test_workers.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from hfms_cli import Chunk, Middleware, Overloaded, Proceed, exchange, in_owner
from hfms_cli.errors import BadRequest, HfmsError, ModelNotFound, Unavailable
from hfms_cli.hookspecs import begin_exchange
from hfms_cli.serving.frames import headers_sent, headers_to_send
from hfms_cli.serving.front import FrontRuntime, Owner
from hfms_cli.serving.owner import Front
from hfms_cli.serving.road import Road
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
        assert pool.called("echo:a").id == "echo:a"
        assert pool.called("echo:b") is None


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


class Counting(Middleware):
    """Counts in the owner, and says in a header what it was asked in one."""

    name = "counting"

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    @in_owner
    async def names(self) -> list[str]:
        return sorted(self.counts)

    @in_owner
    async def count(self, who: str, steps: tuple[int, ...]) -> dict[str, int]:
        if sum(steps) < 0:
            raise Overloaded("It cannot count backwards.", code="backwards", retry_after=2.5)
        self.counts[who] = self.counts.get(who, 0) + 12 // len(steps) * sum(steps)
        return self.counts

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        exchange().answer["x-said"] = exchange().asked.get("X-Say", "nothing")
        async for chunk in proceed(call):
            yield chunk
        exchange().answer["x-late"] = "later"


async def test_a_method_marked_in_owner_counts_there_whoever_calls_it(serve):
    async with serve("echo:a") as server, front_of(server.runtime) as (owner, _):
        own, theirs = Counting(), Counting()  # as two processes have them
        server.runtime.middlewares.append(own)
        theirs.owner = owner.ask
        assert await own.count("a", (1,)) == {"a": 12}
        assert await theirs.count("b", (1, 2)) == {"a": 12, "b": 18}
        assert await theirs.names() == ["a", "b"]
        assert (own.counts, theirs.counts) == ({"a": 12, "b": 18}, {})
        with pytest.raises(Overloaded, match="backwards") as refused:
            await theirs.count("a", (-1,))
        assert (refused.value.code, refused.value.retry_after) == ("backwards", 2.5)
        with pytest.raises(HfmsError) as broken:  # a fault of its own, of which nobody is told more
            await theirs.count("secret", ())
        assert (broken.value.status, "secret" in broken.value.message) == (500, False)
        assert await theirs.count("b", (1,)) == {"a": 12, "b": 30}


def test_a_method_in_owner_without_type_hints_is_refused_when_it_is_defined():
    async def method(self, steps, who: str):
        return steps

    with pytest.raises(TypeError, match="method is `in_owner` and needs type hints for steps, return"):
        in_owner(method)


async def test_middlewares_around_a_call_read_and_write_its_headers_from_the_owner(serve):
    async with serve("echo:a") as server, front_of(server.runtime) as (owner, _):
        server.runtime.road = Road(server.runtime.pool, [Counting()], server.runtime.metrics)
        said = begin_exchange(CIMultiDict({"x-say": "hello \udcff"}), {"x-front": "1"}).answer
        async with owner.lease("echo:a") as model, contextlib.aclosing(model.submit(call("c"))) as chunks:
            await anext(chunks)
            assert (said["x-said"], said["x-front"]) == ("hello \udcff", "1")
            await text(chunks)
            assert said["x-late"] == "later"
        said = begin_exchange({}).answer
        with pytest.raises(BadRequest):
            async with owner.lease("echo:a") as model:
                await text(model.submit(call("c", stop=("x",))))
        assert said == {"x-said": "nothing"}


async def test_a_front_has_the_middlewares_around_http_alone(serve):
    async with serve("echo:a") as server, front_of(server.runtime) as (owner, _):
        front = FrontRuntime.build(server.runtime.config, server.runtime.plugins, owner)
        try:
            assert [m.name for m in server.runtime.middlewares] == ["auth", "rate_limit", "queue", "breaker"]
            assert [m.name for m in front.middlewares] == ["auth", "rate_limit"]
        finally:
            await front.close()


headers = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from([chr(0xDC80 + n) for n in range(128)]))


@given(st.dictionaries(headers, headers))
def test_whatever_a_client_sends_as_a_header_arrives(sent):
    # What aiohttp makes of bytes that are no text; it never makes text of two such characters.
    sent = {
        name: value.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        for name, value in sent.items()
    }
    assert dict(headers_sent(headers_to_send(sent))) == sent
