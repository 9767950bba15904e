"""Middlewares on the road: their order, what they may do, and that nothing is left open."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import EntryPoint

import aiohttp
import msgspec
import pytest
from aiohttp import web

from hfms_cli import Call, Chunk, ConfigError, HfmsError, Middleware, Proceed, Provider, exchange, hookimpl
from hfms_cli.config import load_config
from hfms_cli.plugins import discover
from hfms_cli.serving.runtime import Runtime
from hfms_cli.web.app import build_app


class Wrap(Middleware):
    """Writes its name around every chunk, and into a diary when it is entered and left."""

    diary: list[str] = []  # noqa: RUF012

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        self.diary.append(f"enter {self.name}")
        try:
            async for chunk in proceed(call):
                yield msgspec.structs.replace(chunk, text=f"{self.name}({chunk.text})")
        finally:
            self.diary.append(f"leave {self.name}")


class Short(Middleware):
    """Answers without the engine."""

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        yield Chunk(text="cached", tokens=1, finish_reason="stop")


class Broken(Middleware):
    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        async for chunk in proceed(call):
            raise ZeroDivisionError(chunk.text)
        yield Chunk()


class Forgetful(Middleware):
    def needs_one_front(self) -> str | None:
        return "it counts in memory"


class Refuse(Middleware):
    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        raise HfmsError("not today")
        yield Chunk()


class Patient(Middleware):
    """Sees an answer through although its caller has left, as a cache does for others who wait for it."""

    seen: list[str] = []  # noqa: RUF012

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        chunks = proceed(call)
        try:
            yield await anext(chunks)
        finally:
            self.seen.extend([c.text async for c in chunks])


class Curious(Middleware):
    """Keeps what it sees of a call, and answers with headers."""

    seen: list[Call] = []  # noqa: RUF012

    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        self.seen.append(call)
        exchange().answer["x-said"] = exchange().asked.get("X-Say", "nothing")
        if exchange().asked.get("X-Fail"):
            raise HfmsError("not today")
        async for chunk in proceed(call):
            yield chunk


@pytest.fixture
def runtime(serve, environ, tmp_path):
    """A runtime whose middlewares come from a plugin of this test, in the order given."""
    plugin = types.ModuleType("road_test_plugin")

    @hookimpl
    def hfms_middlewares():
        kinds = (
            ("a", Wrap),
            ("b", Wrap),
            ("short", Short),
            ("broken", Broken),
            ("refuse", Refuse),
            ("patient", Patient),
            ("curious", Curious),
            ("forgetful", Forgetful),
        )
        for name, kind in kinds:
            yield Provider(name, kind)

    plugin.hfms_middlewares = hfms_middlewares
    sys.modules["road_test_plugin"] = plugin
    for kept in (Wrap.diary, Patient.seen, Curious.seen):
        kept.clear()

    async def build(*order: str, step_ms: int = 0, alias: str | None = None, workers: int = 1) -> Runtime:
        from importlib.metadata import entry_points

        file = tmp_path / "road.toml"
        server = f"[server]\nworkers = {workers}\n"
        file.write_text(f"{server}[middleware]\norder = {list(order)}\n[engine.echo]\nstep_ms = {step_ms}\n")
        config = load_config(file, environ=environ)
        points = [*entry_points(group="hfms"), EntryPoint("road", "road_test_plugin", "hfms")]
        plugins = discover(config, points)
        made = Runtime.build(config, plugins, *(plugins.in_use(kind, config) for kind in ("hardware", "engine")))
        await made.pool.load("echo:a", alias=alias)
        return made

    yield build
    del sys.modules["road_test_plugin"]


def call(**more: object) -> Call:
    return Call(id="c", model="echo:a", task="generate", inputs=["one two"], **more)


async def text(runtime: Runtime) -> str:
    return "".join([c.text async for c in runtime.road.answer(call())])


async def test_the_first_middleware_of_the_order_is_outermost(runtime):
    made = await runtime("a", "b")
    try:
        assert await text(made) == "a(b(one))a(b( two))"
        assert Wrap.diary == ["enter a", "enter b", "leave b", "leave a"]
    finally:
        await made.close()


async def test_a_middleware_may_answer_without_the_engine(runtime):
    made = await runtime("a", "short", "b")
    try:
        assert await text(made) == "a(cached)"
        assert "enter b" not in Wrap.diary
    finally:
        await made.close()


async def test_leaving_early_closes_every_stretch_of_the_road_at_once(runtime):
    made = await runtime("a", "b", step_ms=5)
    try:
        async with aclosing(made.road.answer(call())) as chunks:
            await anext(chunks)
        assert Wrap.diary == ["enter a", "enter b", "leave a", "leave b"]
        (model,) = made.pool.models()
        assert (model.host.running, model.leases) == (0, 0)
    finally:
        await made.close()


async def test_cancelling_the_caller_closes_every_stretch_of_the_road(runtime):
    made = await runtime("a", "b", step_ms=200)
    try:
        task = asyncio.create_task(text(made))
        async with asyncio.timeout(10):
            while "enter b" not in Wrap.diary:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(Wrap.diary) == ["enter a", "enter b", "leave a", "leave b"]
        assert made.pool.models()[0].leases == 0
    finally:
        await made.close()


async def test_a_middlewares_own_fault_is_counted_under_its_name_and_a_refusal_is_not(runtime):
    made = await runtime("a", "broken")
    try:
        with pytest.raises(ZeroDivisionError):
            await text(made)
        rendered = made.metrics.render().decode()
        assert 'hfms_plugin_errors_total{plugin="broken"} 1.0' in rendered
    finally:
        await made.close()
    made = await runtime("refuse")
    try:
        with pytest.raises(HfmsError, match="not today"):
            await text(made)
        assert "hfms_plugin_errors_total{" not in made.metrics.render().decode()
    finally:
        await made.close()


async def test_a_middleware_is_closed_before_what_it_opened_and_may_see_the_answer_through(runtime):
    made = await runtime("a", "patient", "b", step_ms=5)
    try:
        async with aclosing(made.road.answer(call())) as chunks:
            await anext(chunks)
        assert Wrap.diary == ["enter a", "enter b", "leave a", "leave b"]
        assert Patient.seen == ["b( two)"]
        (model,) = made.pool.models()
        assert (model.host.running, model.leases) == (0, 0)
    finally:
        await made.close()


async def test_middlewares_see_a_models_id_and_digest_whatever_it_was_called_by(runtime):
    made = await runtime("curious", alias="short-name")
    try:
        await text(made)
        async for _ in made.road.answer(msgspec.structs.replace(call(), model="short-name")):
            continue
        first, second = Curious.seen
        assert (first.model, second.model) == ("echo:a", "echo:a")
        assert first.digest == second.digest
        assert len(first.digest) == 64
    finally:
        await made.close()


async def test_a_middlewares_call_reads_and_writes_headers_of_streams_wholes_and_errors(runtime):
    made = await runtime("curious")
    runner = web.AppRunner(build_app(made), handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
        async with aiohttp.ClientSession() as session:
            for stream in (False, True):
                body = {"model": "echo:a", "prompt": "hi", "stream": stream}
                async with session.post(url, json=body, headers={"x-say": "hello"}) as response:
                    assert (response.status, response.headers["x-said"]) == (200, "hello")
                    await response.read()
            async with session.post(url, json=body, headers={"X-Fail": "yes"}) as response:
                assert (response.status, response.headers["x-said"]) == (500, "nothing")
            # An answer's headers are its own, also on a connection that is used again.
            async with session.get(url) as response:
                assert "x-said" not in response.headers
    finally:
        await runner.cleanup()
        await made.close()


async def test_a_middleware_that_counts_in_memory_refuses_several_fronts(runtime):
    with pytest.raises(ConfigError, match=r"`forgetful` needs `workers = 1`: it counts in memory") as caught:
        await runtime("a", "forgetful", workers=2)
    assert caught.value.param == "workers"
    made = await runtime("forgetful")
    await made.close()
