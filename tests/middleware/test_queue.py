"""The queue: what it refuses, whom it gives up, and numbers that add up."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli import BadRequest, Call, Caller, Chunk, DeadlineExceeded, EngineFault, HfmsError, Overloaded
from hfms_cli.web.schemas import lowered
from hfms_middleware.queue.middleware import Queue
from hfms_middleware.queue.options import QueueOptions

# One call at a time, and each token takes a while.
SLOW = '[engine.echo]\nmax_batch = 1\nstep_ms = 20\n[middleware]\norder = ["auth", "queue"]\n'


def call(model: str = "m", prompt: str = "x") -> Call:
    return Call(id="1", model=model, task="generate", inputs=[prompt])


class Engine:
    """Begins a call when a test says so."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.fails: HfmsError | None = None

    async def __call__(self, call):
        await self.free.wait()
        if self.fails:
            raise self.fails
        yield Chunk(prompt_tokens=1)
        yield Chunk(text="a", tokens=1, finish_reason="stop")


async def drain(queue: Queue, engine: Engine, wanted: Call) -> list[Chunk]:
    return [chunk async for chunk in queue.call(wanted, engine)]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_full_queue_refuses_at_once_and_takes_more_when_one_has_begun():
    queue, engine = Queue(QueueOptions(max_size=2)), Engine()
    waiting = [asyncio.create_task(drain(queue, engine, call())) for _ in range(2)]
    await settle()
    with pytest.raises(Overloaded) as refused:
        await drain(queue, engine, call())
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "queue_full", 1.0)
    engine.free.set()
    assert [len(chunks) for chunks in await asyncio.gather(*waiting)] == [2, 2]
    assert len(await drain(queue, engine, call())) == 2


async def test_a_queue_is_bounded_in_tokens_too_but_takes_one_call_of_any_length():
    queue, engine = Queue(QueueOptions(max_tokens=100)), Engine()
    waiting = asyncio.create_task(drain(queue, engine, call(prompt="x" * 3000)))
    await settle()
    with pytest.raises(Overloaded, match="1000 tokens wait already"):
        await drain(queue, engine, call())
    engine.free.set()
    await waiting


async def test_a_call_that_waits_too_long_is_given_up_and_its_place_is_free():
    queue, engine = Queue(QueueOptions(timeout_seconds=0.01)), Engine()
    with pytest.raises(DeadlineExceeded) as late:
        await drain(queue, engine, call())
    assert late.value.status == 504
    assert queue.statistics()["current_size"] == 0
    assert queue.statistics()["total_timeouts"] == 1


async def test_a_call_that_has_begun_may_take_as_long_as_it_likes():
    queue = Queue(QueueOptions(timeout_seconds=0.01))

    async def slow(call):
        yield Chunk(prompt_tokens=1)
        await asyncio.sleep(0.05)
        yield Chunk(text="a", tokens=1, finish_reason="stop")

    assert len([c async for c in queue.call(call(), slow)]) == 2


async def test_each_model_has_a_queue_of_its_own_where_that_is_asked_for():
    queue, engine = Queue(QueueOptions(max_size=1, per_model=True)), Engine()
    waiting = [asyncio.create_task(drain(queue, engine, call(m))) for m in ("a", "b")]
    await settle()
    with pytest.raises(Overloaded):
        await drain(queue, engine, call("a"))
    said = queue.statistics()
    assert (said["current_size"], said["max_size"], said["utilization"]) == (2, 2, 1.0)
    assert said["queues"]["a"]["total_rejected"] == 1
    assert said["queues"]["b"]["total_rejected"] == 0
    engine.free.set()
    await asyncio.gather(*waiting)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["come", "leave", "begin", "fail"]), max_size=40))
def test_numbers_add_up_whatever_becomes_of_the_calls(fates):
    async def run() -> None:
        queue = Queue(QueueOptions(max_size=3))
        waiting: list[tuple[Engine, asyncio.Task]] = []
        for fate in fates:
            if fate == "come" or not waiting:
                engine = Engine()
                waiting.append((engine, asyncio.create_task(drain(queue, engine, call()))))
            else:
                engine, task = waiting.pop(0)
                if fate == "leave":
                    task.cancel()
                elif fate == "fail":
                    engine.fails = EngineFault("broken")
                engine.free.set()
                with contextlib.suppress(HfmsError, asyncio.CancelledError):
                    await task
            await settle()
            n = queue.statistics()
            assert n["total_queued"] == sum(
                n[f] for f in ("total_processed", "total_timeouts", "total_rejected", "total_cancelled", "current_size")
            )
            assert 0 <= n["current_size"] <= 3
            assert n["current_tokens"] == 0
        for engine, task in waiting:
            engine.free.set()
            with contextlib.suppress(HfmsError):
                await task
        assert queue.statistics()["current_size"] == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("asked", "ceiling", "given_"), [(None, 2, 2), ("low", 2, 0), ("CRITICAL", 1, 1), ("High", 3, 2), ("normal", 0, 0)]
)
def test_priority_comes_from_the_key_and_a_client_may_only_lower_it(asked, ceiling, given_):
    assert lowered(asked, "priority", Caller(priority=ceiling)) == given_


def test_a_priority_that_is_none_is_refused_by_its_name():
    with pytest.raises(BadRequest) as refused:
        lowered("urgent", "X-Priority", Caller())
    assert refused.value.param == "X-Priority"


async def test_over_http_a_full_queue_is_429_a_late_call_504_and_the_statistics_say_so(serve):
    toml = SLOW + "[middleware.queue]\nmax_size = 1\ntimeout_seconds = 0.3\n"
    async with serve("echo:a", toml=toml) as server:
        body = {"model": "echo:a", "prompt": "a b c", "max_tokens": 4000, "ignore_eos": True}
        async with server.session.post(server.url + "/v1/completions", json=body | {"stream": True}) as running:
            await running.content.readline()  # it has begun
            late = asyncio.create_task(server.post("/v1/completions", body))
            while server.runtime.status()["middleware"]["queue"]["current_size"] == 0:
                await asyncio.sleep(0.001)
            async with server.session.post(server.url + "/v1/completions", json=body) as full:
                assert full.status == 429
                assert full.headers["Retry-After"]
                assert (await full.json())["error"]["code"] == "queue_full"
            status, answer = await late
            assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
            running.close()
        status, said = await server.get("/admin/queue/stats")
        assert status == 200
        assert {k: said[k] for k in ("current_size", "max_size", "total_queued", "total_processed")} == {
            "current_size": 0,
            "max_size": 1,
            "total_queued": 3,
            "total_processed": 1,
        }
        assert (said["total_timeouts"], said["total_rejected"], said["utilization"]) == (1, 1, 0.0)
        async with server.session.get(server.url + "/metrics") as page:
            assert 'hfms_request_queue_time_seconds_count{model="echo:a",priority="normal"}' in await page.text()


async def test_without_it_there_is_no_route_and_nothing_is_refused(serve):
    async with serve("echo:a", toml='[middleware]\norder = ["auth"]\n') as server:
        assert (await server.get("/admin/queue/stats"))[0] == 404


async def test_a_priority_in_the_body_or_the_header_must_be_one(serve):
    async with serve("echo:a", toml=SLOW) as server:
        body = {"model": "echo:a", "prompt": "a"}
        status, answer = await server.post("/v1/completions", body | {"priority": "urgent"})
        assert (status, answer["error"]["param"]) == (400, "priority")
        status, answer = await server.post("/v1/completions", body, headers={"X-Priority": "urgent"})
        assert (status, answer["error"]["param"]) == (400, "X-Priority")
        assert (await server.post("/v1/completions", body, headers={"X-Priority": "LOW"}))[0] == 200
