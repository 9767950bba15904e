"""One engine process, real, with the echo engine in it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from hfms_cli.engines.host import EngineHost, HostOptions
from hfms_cli.engines.process import worker_environ
from hfms_cli.errors import BadRequest, EngineDied, LoadFailed, Overloaded
from hfms_cli.hookspecs import LoadRequest
from hfms_cli.types import Call, Chunk, Device, ModelCard, Sampling
from tests.conftest import workers

CARD = ModelCard(format="none", model_type="echo", architecture="EchoModel", tasks=("generate",), weights_bytes=0)
CPU = Device(id="cpu", kind="cpu", name="cpu", total_bytes=1, free_bytes=1, torch_device="cpu")
REQUEST = LoadRequest(folder=Path("/nowhere"), card=CARD, device=CPU)


def options(
    engine: str = "echo", *, max_calls: int = 8, heartbeat: float = 30.0, **engine_options: object
) -> HostOptions:
    return HostOptions(engine, dict(engine_options), "hfms.toml", "hfms_engines", max_calls, heartbeat)


def call(text: str = "one two three", call_id: str = "c1", **sampling: object) -> Call:
    return Call(id=call_id, model="m", task="generate", inputs=[text], sampling=Sampling(**sampling))


async def text_of(host: EngineHost, c: Call) -> str:
    return "".join([chunk.text async for chunk in host.submit(c)])


async def drain(stream: AsyncIterator[Chunk]) -> None:
    async for _ in stream:
        continue


async def test_a_call_is_answered_chunk_by_chunk_and_the_last_one_says_why_it_ended():
    host = await EngineHost.start("m", REQUEST, options())
    try:
        chunks = [c async for c in host.submit(call())]
        assert [c.text for c in chunks] == ["one", " two", " three"]
        assert [c.finish_reason for c in chunks] == [None, None, "stop"]
        assert [c.prompt_tokens for c in chunks] == [3, 0, 0]
    finally:
        await host.close()


async def test_chunks_of_one_step_are_told_to_come_together():
    host = await EngineHost.start("m", REQUEST, options(step_ms=5))
    try:
        three = Call(id="c", model="m", task="generate", inputs=["one"], n=3)
        chunks = [c async for c in host.submit(three)]
        assert [(c.index, c.more) for c in chunks] == [(0, True), (1, True), (2, True)]  # and the end comes with them
        first, *_ = [c async for c in host.submit(call())]
        assert not first.more
    finally:
        await host.close()


async def test_calls_run_side_by_side_in_one_process():
    host = await EngineHost.start("m", REQUEST, options())
    try:
        texts = await asyncio.gather(*(text_of(host, call(f"a{i} b{i}", f"c{i}")) for i in range(8)))
        assert texts == [f"a{i} b{i}" for i in range(8)]
    finally:
        await host.close()


async def test_a_worker_loads_the_plugin_of_its_engine_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "lonely.py").write_text(
        "import sys\n"
        "from hfms_cli import LoadFailed, Provider, hookimpl\n"
        "class Lonely:\n"
        "    def load(self, request):\n"
        "        raise LoadFailed(' '.join(sorted(m for m in sys.modules if m.startswith('hfms'))))\n"
        "@hookimpl\n"
        "def hfms_engines():\n"
        "    yield Provider('lonely', Lonely)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(LoadFailed) as failed:
        await EngineHost.start("m", REQUEST, dataclasses.replace(options("lonely"), plugin="lonely"))
    there = {module.partition(".")[0] for module in failed.value.message.split()}
    assert there == {"hfms_cli"}


async def test_a_plugin_that_the_worker_cannot_import_fails_the_load_with_its_reason():
    with pytest.raises(LoadFailed, match=r"no plugin provides.*No module named 'gone'"):
        await EngineHost.start("m", REQUEST, dataclasses.replace(options(), plugin="gone"))


async def test_leaving_a_stream_early_cancels_the_call_in_the_worker():
    host = await EngineHost.start("m", REQUEST, options(step_ms=5, max_batch=1))
    try:
        async with aclosing(host.submit(call(ignore_eos=True))) as stream:
            await anext(stream)
        # With room for one sequence only, a second call is answered only if the first has left.
        assert await asyncio.wait_for(text_of(host, call("next", "c2")), 5) == "next"
        assert host.running == 0
    finally:
        await host.close()


async def test_a_call_that_the_engine_refuses_raises_its_error_and_the_next_one_is_answered():
    host = await EngineHost.start("m", REQUEST, options())
    try:
        with pytest.raises(BadRequest, match="stop") as caught:
            await text_of(host, call(stop=("x",)))
        assert caught.value.param == "stop"
        assert await text_of(host, call("still here", "c2")) == "still here"
    finally:
        await host.close()


async def test_more_calls_than_the_limit_raise_overloaded():
    host = await EngineHost.start("m", REQUEST, options(max_calls=1, step_ms=5))
    try:
        async with aclosing(host.submit(call(ignore_eos=True))) as stream:
            await anext(stream)
            with pytest.raises(Overloaded):
                await text_of(host, call("b", "c2"))
    finally:
        await host.close()


async def test_kill_9_ends_every_stream_with_engine_died_and_says_how():
    host = await EngineHost.start("m", REQUEST, options(step_ms=5))
    streams = [host.submit(call(call_id=f"c{i}", ignore_eos=True)) for i in range(3)]
    for stream in streams:
        await anext(stream)
    os.kill(host.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDied):
            await drain(stream)
    assert "SIGKILL" in await host.ended
    assert not host.alive()
    with pytest.raises(EngineDied):
        await text_of(host, call())


async def test_a_hung_worker_is_ended_after_the_heartbeat_limit():
    host = await EngineHost.start("m", REQUEST, options(heartbeat=1.5))
    os.kill(host.pid, signal.SIGSTOP)
    reason = await asyncio.wait_for(host.ended, 20)
    assert "silent" in reason
    assert not psutil.pid_exists(host.pid)


async def test_close_ends_the_process_and_leaves_no_child():
    host = await EngineHost.start("m", REQUEST, options())
    await host.close()
    assert host.ended.done()
    assert not psutil.pid_exists(host.pid)


async def test_a_load_that_fails_gives_its_reason_and_leaves_no_process():
    before = set(workers())
    with pytest.raises(LoadFailed, match="no plugin provides"):
        await EngineHost.start("m", REQUEST, options("no-such-engine"))
    assert set(workers()) <= before


async def test_secrets_of_the_front_are_not_in_the_workers_environment(monkeypatch):
    monkeypatch.setenv("HFMS_ADMIN_API_KEY", "very-secret")
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    host = await EngineHost.start("m", REQUEST, options())
    try:
        assert "very-secret" not in psutil.Process(host.pid).environ().values()
        assert "very-secret" not in " ".join(psutil.Process(host.pid).cmdline())
    finally:
        await host.close()


async def test_a_worker_ends_by_itself_when_its_front_is_killed(tmp_path):
    script = tmp_path / "front.py"
    script.write_text(
        "import asyncio, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from tests.engines.test_host import EngineHost, REQUEST, options\n"
        "async def main():\n"
        "    host = await EngineHost.start('m', REQUEST, options())\n"
        "    print(host.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    front = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(Path(__file__).parents[2]), stdout=asyncio.subprocess.PIPE
    )
    worker = psutil.Process(int(await asyncio.wait_for(front.stdout.readline(), 20)))
    front.kill()
    await front.wait()
    await asyncio.to_thread(worker.wait, 10)  # raises TimeoutExpired if it lives on


def test_a_workers_threads_spin_only_briefly_unless_the_operator_says_otherwise():
    assert worker_environ({})["GOMP_SPINCOUNT"] == "1000"
    assert worker_environ({"GOMP_SPINCOUNT": "100"})["GOMP_SPINCOUNT"] == "100"
    assert worker_environ({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active", "OPENBLAS_NUM_THREADS": "1"}


def test_numpy_has_no_threads_of_its_own_unless_the_operator_says_otherwise():
    assert worker_environ({})["OPENBLAS_NUM_THREADS"] == "1"
    assert worker_environ({"OPENBLAS_NUM_THREADS": "2"})["OPENBLAS_NUM_THREADS"] == "2"


async def test_of_the_workers_that_would_spin_long_one_does_until_it_ends(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr("hfms_cli.engines.process.SPINNER", f"\0hfms-test-{os.getpid()}")

    async def started(**more) -> tuple[EngineHost, str]:
        host = await EngineHost.start("m", REQUEST, dataclasses.replace(options(), **more))
        return host, psutil.Process(host.pid).environ()["GOMP_SPINCOUNT"]

    plain, spins = await started()
    assert spins == "1000"
    first, spins = await started(spins=True)
    assert spins == "10000"
    second, spins = await started(spins=True)
    assert spins == "1000"
    await first.kill("the test ends it")
    third, spins = await started(spins=True)
    assert spins == "10000"
    for host in (plain, second, third):
        await host.close()


def test_a_worker_sees_no_key_and_no_password_of_a_store():
    secrets = ("HFMS_API_KEY", "HF_SERVER_ADMIN_API_KEY", "HF_TOKEN", "HFMS_CACHE_STORE", "HF_SERVER_RATE_LIMIT_STORE")
    assert not worker_environ(dict.fromkeys(secrets, "x")).keys() & set(secrets)
    assert worker_environ({"HFMS_STATE_DIR": "x"})["HFMS_STATE_DIR"] == "x"


async def test_a_load_tells_its_phases_before_it_is_done():
    told: list[tuple[str, float | None]] = []
    host = await EngineHost.start("m", REQUEST, options(), lambda phase, done=None: told.append((phase, done)))
    await host.close()
    assert told == [("start", None), ("load", None)]
