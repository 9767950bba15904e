"""`hfms serve` as a process: what it prints, how it stops."""

from __future__ import annotations

import asyncio
import signal

import aiohttp
import psutil
import pytest

CHAT = {"model": "echo:a", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture
def hfms(hfms_serve):
    return hfms_serve


async def test_the_panel_names_url_models_devices_middleware_and_warnings(hfms):
    served = await hfms("echo:a", env={"HFMS_ADMIN_API_KEY": "admin123"})
    printed = await served.until("context")
    for expected in (f"{served.url}/v1", "ready  echo:a: echo on cpu", "cpu", "auth", "easily guessed"):
        assert expected in printed
    assert "admin123" not in printed


async def test_replicas_of_each_model_are_told_when_they_are_ready(hfms):
    served = await hfms("echo:a", "--replicas", "2")
    assert "2 replicas" in await served.until("ready")
    assert len(psutil.Process(served.process.pid).children()) == 2


async def test_ctrl_c_drains_the_stream_in_flight_and_leaves_no_process(hfms):
    served = await hfms("echo:a", toml="[engine.echo]\nstep_ms = 20\n")
    await served.until("ready")
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert children
    async with aiohttp.ClientSession() as session:
        body = {"model": "echo:a", "prompt": "w " * 50, "max_tokens": 50, "stream": True}
        async with session.post(served.url + "/v1/completions", json=body) as response:
            await response.content.readline()
            served.process.send_signal(signal.SIGINT)
            assert (await response.content.read()).decode().strip().endswith("[DONE]")
    async with asyncio.timeout(20):
        assert await served.process.wait() == 0
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children)


async def test_a_second_ctrl_c_stops_at_once(hfms):
    served = await hfms("echo:a", toml="[engine.echo]\nstep_ms = 50\n")
    await served.until("ready")
    async with aiohttp.ClientSession() as session:
        body = CHAT | {"ignore_eos": True, "max_tokens": 30_000, "stream": True}
        async with session.post(served.url + "/v1/chat/completions", json=body) as response:
            await response.content.readline()
            served.process.send_signal(signal.SIGINT)
            await served.until("calls in flight")
            served.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(20):
                assert await served.process.wait() == 0


async def test_an_adapter_that_cannot_be_loaded_at_the_start_is_told_and_the_server_goes_on(hfms, tmp_path):
    (tmp_path / "empty").mkdir()
    served = await hfms("echo:a", "--lora-modules", "sql=./empty")
    printed = await served.until("failed sql")
    assert "ready  echo:a" in printed


async def test_a_module_that_names_no_adapter_stops_the_start(hfms):
    served = await hfms("echo:a", "--lora-modules", "sql")
    _, told = await served.process.communicate()
    assert served.process.returncode == 2
    assert "names no adapter" in told.decode()


async def test_a_load_that_fails_is_told_and_the_server_goes_on(hfms, tmp_path):
    (tmp_path / "empty").mkdir()
    served = await hfms("./empty", "echo:a")
    for told in ("failed empty", "ready  echo:a"):  # in whatever order
        await served.until(told)
    async with (
        aiohttp.ClientSession() as session,
        session.post(served.url + "/v1/chat/completions", json=CHAT) as response,
    ):
        assert response.status == 200


async def test_of_several_models_each_is_told_how_its_load_ended(hfms):
    served = await hfms("echo:a", "./gone", "echo:b")
    for told in ("failed", "ready  echo:a", "ready  echo:b"):
        await served.until(told)


@pytest.mark.parametrize(
    ("toml", "status"),
    [
        ("exit_on_failure = true", 1),
        ('exit_on_failure = true\nrequired = ["gone/model"]', 1),
        ('exit_on_failure = true\nrequired = ["echo:a"]', None),
    ],
)
async def test_a_failed_load_ends_the_server_only_where_the_operator_says_so(hfms, toml, status):
    served = await hfms("echo:a", "gone/model", toml=f"[models]\n{toml}\n")
    if status is None:
        await served.until("ready")
        assert served.process.returncode is None
    else:
        async with asyncio.timeout(30):
            assert await served.process.wait() == status


@pytest.mark.parametrize(
    ("arguments", "toml", "said"),
    [
        (["--", "--help-me"], "", "begins with `-`"),
        (["--host", "0.0.0.0"], "", "no key is configured"),
        (["--log-level", "loud"], "", "--log-level is 'loud'"),
        ([], "[server]\nprot = 1\n", "did you mean `port`"),
        ([], '[middleware]\norder = ["queues"]\n', "which no plugin provides"),
    ],
)
async def test_what_cannot_start_says_why_on_stderr_and_exits_2(hfms, arguments, toml, said):
    served = await hfms(*arguments, toml=toml)
    _, err = await served.process.communicate()
    assert served.process.returncode == 2, err.decode()
    assert said in err.decode()
    assert "Traceback" not in err.decode()


async def test_a_port_in_use_is_told_with_what_to_do(hfms, environ, tmp_path):
    first = await hfms("echo:a")
    await first.until("ready")
    second = await hfms("echo:a")
    _, err = await second.process.communicate()
    assert second.process.returncode == 2
    assert "--port" in err.decode()
