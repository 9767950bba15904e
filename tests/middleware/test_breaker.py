"""The breaker: when it opens, what it lets through, when it closes, and what does not count."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli import BadRequest, Call, Chunk, EngineDied, EngineFault, HfmsError, Overloaded, Unavailable
from hfms_cli.config import load_config
from hfms_cli.errors import ConfigError
from hfms_middleware.breaker import BreakerOptions, CircuitBreaker
from tests.conftest import Server
from tests.middleware.conftest import Clock

CALL = Call(id="1", model="m", task="generate", inputs=["x"])
OTHER = Call(id="1", model="other", task="generate", inputs=["x"])


def made(clock: Clock, **options: object) -> CircuitBreaker:
    return CircuitBreaker(BreakerOptions(**options), clock)


def engine(*outcomes: Chunk | HfmsError):
    """An engine that answers so."""

    async def proceed(call):
        for outcome in outcomes:
            if isinstance(outcome, HfmsError):
                raise outcome
            yield outcome

    return proceed


GOOD = engine(Chunk(text="a"), Chunk(text="b", finish_reason="stop"))
BROKEN = engine(EngineFault("broken"))
DIED = engine(Chunk(text="a"), EngineDied("died"))


async def call(breaker: CircuitBreaker, proceed, call: Call = CALL) -> str:
    """`good`, or the code of the error."""
    try:
        assert [c.text async for c in breaker.call(call, proceed)] == ["a", "b"]
    except HfmsError as exc:
        return exc.code
    return "good"


def state(breaker: CircuitBreaker, model: str = "m") -> str:
    return breaker.status()["models"][model]["state"]


async def failed(breaker: CircuitBreaker, times: int) -> None:
    for i in range(times):
        assert await call(breaker, DIED if i % 2 else BROKEN) in ("engine_died", "engine_error")


async def test_five_failures_in_a_row_open_it_for_that_model_alone(clock):
    breaker = made(clock)
    await failed(breaker, 4)
    assert state(breaker) == "closed"
    await failed(breaker, 1)
    assert state(breaker) == "open"
    clock.now += 20
    with pytest.raises(Unavailable) as refused:
        await anext(breaker.call(CALL, GOOD))
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (503, "breaker_open", 40)
    assert await call(breaker, GOOD, OTHER) == "good"


async def test_a_good_answer_begins_the_count_anew(clock):
    breaker = made(clock)
    for _ in range(3):
        await failed(breaker, 4)
        assert await call(breaker, GOOD) == "good"
    assert state(breaker) == "closed"


@pytest.mark.parametrize(
    "proceed",
    [
        engine(BadRequest("no")),
        engine(Overloaded("later")),
        engine(Chunk(text="a"), Unavailable("the queue timed out", code="queue_timeout")),
        engine(HfmsError("not the engine's")),
    ],
)
async def test_what_the_engine_did_not_do_counts_neither_for_nor_against(clock, proceed):
    breaker = made(clock)
    await failed(breaker, 4)
    for _ in range(10):
        assert await call(breaker, proceed) != "good"
    assert state(breaker) == "closed"
    await failed(breaker, 1)
    assert state(breaker) == "open"


async def test_a_caller_who_leaves_counts_neither_for_nor_against(clock):
    breaker = made(clock)
    await failed(breaker, 4)
    for _ in range(10):
        async with aclosing(breaker.call(CALL, GOOD)) as chunks:
            await anext(chunks)
    assert state(breaker) == "closed"
    await failed(breaker, 1)
    assert state(breaker) == "open"


async def test_after_sixty_seconds_one_call_at_a_time_is_let_through_and_two_good_ones_close_it(clock):
    breaker = made(clock)
    await failed(breaker, 5)
    clock.now += 59.9
    assert await call(breaker, GOOD) == "breaker_open"
    clock.now += 0.1
    assert state(breaker) == "half-open"
    probe = breaker.call(CALL, GOOD)
    await anext(probe)
    for _ in range(10):
        assert await call(breaker, GOOD) == "breaker_open"
    assert [c.text async for c in probe] == ["b"]
    assert state(breaker) == "half-open"
    assert await call(breaker, GOOD) == "good"
    assert state(breaker) == "closed"
    await failed(breaker, 4)
    assert state(breaker) == "closed"


async def test_a_call_that_fails_half_open_opens_it_for_the_whole_time_again(clock):
    breaker = made(clock)
    await failed(breaker, 5)
    clock.now += 60
    assert await call(breaker, GOOD) == "good"
    await failed(breaker, 1)
    clock.now += 59
    assert await call(breaker, GOOD) == "breaker_open"
    clock.now += 1
    assert [await call(breaker, GOOD) for _ in range(2)] == ["good", "good"]
    assert state(breaker) == "closed"


@pytest.mark.parametrize("leaves", ["between chunks", "while it waits"])
async def test_a_caller_who_leaves_half_open_makes_room_for_the_next(clock, leaves):
    breaker = made(clock)
    await failed(breaker, 5)
    clock.now += 60
    if leaves == "between chunks":
        async with aclosing(breaker.call(CALL, GOOD)) as chunks:
            await anext(chunks)
    else:

        async def never(call):
            await asyncio.Event().wait()
            yield Chunk()

        task = asyncio.create_task(call(breaker, never))
        await asyncio.sleep(0)
        assert await call(breaker, GOOD) == "breaker_open"
        task.cancel()
        await asyncio.wait([task])
    assert [await call(breaker, GOOD) for _ in range(2)] == ["good", "good"]
    assert state(breaker) == "closed"


async def test_calls_from_before_it_opened_say_nothing_about_after(clock):
    breaker = made(clock)
    old = [breaker.call(CALL, proceed) for proceed in (DIED, GOOD, GOOD, GOOD)]
    for chunks in old:
        await anext(chunks)
    await failed(breaker, 5)
    clock.now += 60
    with pytest.raises(EngineDied):
        await anext(old[0])
    for chunks in old[1:]:
        assert [c.text async for c in chunks] == ["b"]
    assert state(breaker) == "half-open"


async def test_calls_that_fail_together_are_one_failure(clock):
    breaker = made(clock)
    for failures in range(1, 5):
        together = [breaker.call(CALL, DIED) for _ in range(9)]
        for chunks in together:
            await anext(chunks)
        for chunks in together:
            with pytest.raises(EngineDied):
                await anext(chunks)
        assert breaker.status()["models"]["m"] == {"state": "closed", "failures_in_a_row": failures}
    await failed(breaker, 1)
    assert state(breaker) == "open"


@given(
    steps=st.lists(st.tuples(st.sampled_from(["enter", "good", "fault", "gone", "time"]), st.integers(0, 9))),
    failures=st.integers(1, 3),
    successes=st.integers(1, 3),
)
def test_half_open_never_more_than_one_call_is_inside(steps, failures, successes):
    async def run() -> None:
        clock = Clock()
        breaker = made(clock, failures=failures, successes=successes, open_seconds=5)
        inside: list = []
        probes: list = []
        for what, which in steps:
            if what == "time":
                clock.now += which
            elif what == "enter":
                before = breaker.status()["models"].get("m", {"state": "closed"})["state"]
                outcome = asyncio.get_running_loop().create_future()

                async def proceed(call, outcome=outcome):
                    yield Chunk(text="a")
                    if outcome.result() == "fault":
                        raise EngineFault("broken")

                chunks = breaker.call(CALL, proceed)
                try:
                    await anext(chunks)
                except Unavailable:
                    assert before == "open" or (before == "half-open" and probes)
                    continue
                assert before == "closed" or (before == "half-open" and not probes)
                inside.append((chunks, outcome))
                if before == "half-open":
                    probes.append(chunks)
            elif inside:
                chunks, outcome = inside.pop(which % len(inside))
                outcome.set_result(what)
                if what == "gone":
                    await chunks.aclose()
                else:
                    try:
                        assert [c async for c in chunks] == []
                    except EngineFault:
                        assert what == "fault"
                if chunks in probes:
                    probes.remove(chunks)
        for chunks, _ in inside:
            await chunks.aclose()

    asyncio.run(run())


# On a real server.


def breaker_of(server: Server) -> CircuitBreaker:
    return next(m for m in server.runtime.middlewares if isinstance(m, CircuitBreaker))


COMPLETION = {"model": "echo:a", "prompt": "a b c"}
LONG = COMPLETION | {"ignore_eos": True, "max_tokens": 20_000}


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def killed(server: Server, calls: int) -> None:
    """Kill the worker while it holds so many calls, and wait until there is a new one."""
    model = server.runtime.pool.find("echo:a")
    tasks = [asyncio.create_task(server.post("/v1/completions", LONG)) for _ in range(calls)]
    await until(lambda: model.host.running == calls)
    pid = model.host.pid
    os.kill(pid, signal.SIGKILL)
    assert {(status, body["error"]["code"]) for status, body in await asyncio.gather(*tasks)} == {(503, "engine_died")}
    await until(lambda: model.state == "loaded" and model.host.pid != pid)


async def test_a_worker_that_is_killed_again_opens_it_and_it_closes_when_the_new_one_answers(serve, clock):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 10\n[middleware.breaker]\nfailures = 2\n") as server:
        breaker_of(server)._clock = clock
        await killed(server, 5)
        assert state(breaker_of(server), "echo:a") == "closed"  # one crash, however many calls it took along
        await killed(server, 3)
        clock.now += 12
        async with server.session.post(server.url + "/v1/completions", json=COMPLETION) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "48")
            assert (await response.json())["error"]["code"] == "breaker_open"
        section = (await server.get("/status"))[1]["middleware"]["breaker"]
        assert section["models"]["echo:a"] == {"state": "open", "failures_in_a_row": 2}

        async def metric() -> str:
            async with server.session.get(server.url + "/metrics") as response:
                return await response.text()

        assert 'hfms_breaker_state{model="echo:a"} 1.0' in await metric()
        clock.now += 48
        assert 'hfms_breaker_state{model="echo:a"} 2.0' in await metric()
        model = server.runtime.pool.find("echo:a")
        async with server.session.post(server.url + "/v1/completions", json=LONG | {"stream": True}) as response:
            assert response.status == 200
            statuses = await asyncio.gather(*(server.post("/v1/completions", COMPLETION) for _ in range(20)))
            assert {status for status, _ in statuses} == {503}
            assert model.host.running == 1
        await until(lambda: model.host.running == 0)  # its client left: the next may try
        for _ in range(2):
            assert (await server.post("/v1/completions", COMPLETION))[0] == 200
        assert 'hfms_breaker_state{model="echo:a"} 0.0' in await metric()
        assert {
            s for s, _ in await asyncio.gather(*(server.post("/v1/completions", COMPLETION) for _ in range(9)))
        } == {200}


async def test_bad_requests_and_callers_who_leave_never_open_it(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 10\n[middleware.breaker]\nfailures = 1\n") as server:
        for _ in range(3):
            assert (await server.post("/v1/completions", COMPLETION | {"stop": "x"}))[0] == 400
            async with server.session.post(server.url + "/v1/completions", json=LONG | {"stream": True}) as response:
                assert response.status == 200
        await until(lambda: server.runtime.in_flight == 0)
        assert (await server.post("/v1/completions", COMPLETION))[0] == 200
        await killed(server, 1)
        assert (await server.post("/v1/completions", COMPLETION))[1]["error"]["code"] == "breaker_open"


@pytest.mark.parametrize("prefix", ["HFMS_", "HF_SERVER_"])
async def test_the_switch_takes_it_out_with_all_that_belongs_to_it_and_puts_it_back(serve, prefix, tmp_path):
    async with serve("echo:a", env={f"{prefix}ENABLE_CIRCUIT_BREAKER": "false"}) as server:
        await killed(server, 5)
        assert (await server.post("/v1/completions", COMPLETION))[0] == 200
        assert "breaker" not in (await server.get("/status"))[1]["middleware"]
        async with server.session.get(server.url + "/metrics") as response:
            assert "hfms_breaker_state" not in await response.text()
    file = tmp_path / "none.toml"
    file.write_text('[middleware]\norder = ["auth"]\n')
    assert load_config(file, environ={f"{prefix}ENABLE_CIRCUIT_BREAKER": "yes"}).middleware.order == ["auth", "breaker"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("failures = 0", "`failures` is 0, which is not an integer of 1 or more"),
        ("open_seconds = -1", "`open_seconds` is -1, which is not a number of 0 or more"),
        ("successes = true", "`successes` is True, which is not an integer of 1 or more"),
        ("failure = 3", "unknown key `failure`; did you mean `failures`?"),
    ],
)
async def test_a_bad_setting_stops_the_start_and_says_what_was_meant(serve, line, said):
    with pytest.raises(ConfigError) as refused:
        async with serve(toml=f"[middleware.breaker]\n{line}\n"):
            raise AssertionError("it started")
    assert said in refused.value.message
    assert "[middleware.breaker]" in refused.value.message
