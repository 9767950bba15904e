"""Middlewares on the road: their order, what they may do, and that nothing is left open."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import EntryPoint

import msgspec
import pytest

from hfms_cli import Call, Chunk, HfmsError, Middleware, Proceed, Provider, hookimpl
from hfms_cli.config import load_config
from hfms_cli.plugins import discover
from hfms_cli.serving.runtime import Runtime


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


class Refuse(Middleware):
    async def call(self, call: Call, proceed: Proceed) -> AsyncIterator[Chunk]:
        raise HfmsError("not today")
        yield Chunk()


@pytest.fixture
def runtime(serve, environ, tmp_path):
    """A runtime whose middlewares come from a plugin of this test, in the order given."""
    plugin = types.ModuleType("road_test_plugin")

    @hookimpl
    def hfms_middlewares():
        for name, kind in (("a", Wrap), ("b", Wrap), ("short", Short), ("broken", Broken), ("refuse", Refuse)):
            yield Provider(name, kind)

    plugin.hfms_middlewares = hfms_middlewares
    sys.modules["road_test_plugin"] = plugin
    Wrap.diary.clear()

    async def build(*order: str, step_ms: int = 0) -> Runtime:
        from importlib.metadata import entry_points

        file = tmp_path / "road.toml"
        file.write_text(f"[middleware]\norder = {list(order)}\n[engine.echo]\nstep_ms = {step_ms}\n")
        config = load_config(file, environ=environ)
        points = [*entry_points(group="hfms"), EntryPoint("road", "road_test_plugin", "hfms")]
        made = Runtime.build(config, discover(config, points))
        await made.pool.load("echo:a")
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
        assert sorted(Wrap.diary) == ["enter a", "enter b", "leave a", "leave b"]
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
