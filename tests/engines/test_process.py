"""A worker's process that is begun ahead of its model."""

from __future__ import annotations

import asyncio

import pytest

from hfms_cli.engines.host import EngineHost
from hfms_cli.engines.process import Ahead, Process
from hfms_cli.errors import LoadFailed
from tests.conftest import workers
from tests.engines.test_host import REQUEST, call, options, text_of


class Engine:
    """What the front knows of one."""

    def __init__(self, name: str = "echo", **more: object) -> None:
        self.name = name
        vars(self).update(more)


async def begun(engine: Engine) -> Ahead:
    ahead = await Ahead.begin()
    ahead.prepare(engine)
    return ahead


async def test_the_first_load_of_its_engine_takes_it_and_the_next_starts_another():
    ahead = await begun(Engine())
    (waiting,) = workers()
    first = await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    second = await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    try:
        assert first.pid == waiting.pid != second.pid
        assert await text_of(first, call("one two")) == await text_of(second, call("one two")) == "one two"
        await ahead.close()  # it is the host's now
        assert await text_of(first, call("three")) == "three"
    finally:
        await first.close()
        await second.close()
    assert not workers()


@pytest.mark.parametrize("engine", [Engine("another"), Engine(spins=True)])
async def test_a_load_by_an_engine_that_it_is_not_ready_for_ends_it(engine):
    ahead = await begun(engine)
    (waiting,) = workers()
    host = await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    assert [w.pid for w in workers()] == [host.pid] != [waiting.pid]
    await host.close()
    assert not workers()


async def test_it_has_imported_what_the_engine_needs_and_a_module_that_fails_costs_nothing():
    ahead = await begun(Engine(imports=("no_such_module", "hfms_engines.echo", "sqlite3.dump")))
    host = await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    try:
        assert any("_sqlite3" in m.path for m in workers()[0].memory_maps())
        assert await text_of(host, call("one two")) == "one two"
    finally:
        await host.close()


async def test_it_tells_when_a_load_has_come_so_far():
    ahead = await begun(Engine("another"))
    assert not ahead.asked_for.is_set()
    host = await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    assert ahead.asked_for.is_set()
    await host.close()


async def test_one_that_died_meanwhile_fails_the_load_and_not_the_next():
    ahead = await begun(Engine())
    (waiting,) = workers()
    waiting.kill()
    with pytest.raises(LoadFailed, match="SIGKILL"):
        await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    host = await EngineHost.start("m", REQUEST, options(), ahead=ahead)
    await host.close()


async def test_one_that_nobody_takes_ends_with_the_server():
    ahead = await begun(Engine())
    assert workers()
    await ahead.close()
    await ahead.close()
    assert not workers()


async def test_a_start_that_is_cancelled_leaves_no_process():
    for turns in range(6):
        starting = asyncio.create_task(Process.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    async with asyncio.timeout(20):
        while workers():
            await asyncio.sleep(0.02)
