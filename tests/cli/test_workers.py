"""`hfms serve --workers`: several fronts on one port, as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

SLOW = "[engine.echo]\nstep_ms = 20\n"
ADMIN = "an-admin-key-that-nobody-guesses-7"
USER = "a-user-key-that-nobody-guesses-8"
COMPLETION = {"model": "echo:a", "prompt": "one two three"}


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A new connection for each request, so that the kernel spreads them over the fronts."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        yield session


async def served_status(session, url, **more) -> dict:
    async with session.get(url + "/status", **more) as response:
        return await response.json()


async def until(true, seconds: float = 60):
    async with asyncio.timeout(seconds):
        while not (found := await true()):
            await asyncio.sleep(0.05)
        return found


async def all_fronts(session, url, count: int, **more) -> list[int]:
    """The fronts beside the owner, once they are there."""

    async def there():
        pids = (await served_status(session, url, **more))["fronts"]
        return pids if len(pids) == count else None

    return await until(there)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def fronts_of(log: bytes, path: str = "/v1/completions") -> set[int]:
    """Who answered such requests; 0 is the owner."""
    lines = [json.loads(line) for line in log.splitlines() if b'"request"' in line]
    return {line.get("front", 0) for line in lines if line["path"] == path}


def counted(text: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def test_all_fronts_answer_and_metrics_are_one_truth(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3")
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)
        receipts: set[str] = set()

        async def ask() -> str:
            async with session.post(served.url + "/v1/completions", json=COMPLETION) as response:
                assert response.headers["x-request-id"].startswith("req-")
                receipts.add(response.headers["x-hfms-receipt"])
                return (await response.json())["choices"][0]["text"]

        assert await asyncio.gather(*(ask() for _ in range(60))) == ["one two three"] * 60
        assert len(receipts) == 1
        async with session.get(served.url + "/metrics") as response:
            text = await response.text()
        assert counted(text, "hfms_requests_total", endpoint="/v1/completions", status="200") == 60
        assert counted(text, "hfms_generation_tokens_total", model="echo:a") == 180
        assert counted(text, "hfms_model_replicas", model="echo:a", state="loaded") == 1
        assert len((await served_status(session, served.url))["models"][0]["replicas"]) == 1
    served.process.send_signal(signal.SIGTERM)
    _, log = await served.process.communicate()
    assert fronts_of(log) == {0, 1, 2}


async def test_every_front_asks_for_a_key_and_believes_no_address_that_a_client_claims(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "2", env={"HFMS_API_KEY": USER, "HFMS_ADMIN_API_KEY": ADMIN})
    await served.until("ready")
    user, admin = {"Authorization": f"Bearer {USER}"}, {"Authorization": f"Bearer {ADMIN}"}
    async with client() as session:
        await all_fronts(session, served.url, 1, headers=user)

        async def statuses(path: str, body: object, **headers: str) -> set[int]:
            async def ask() -> int:
                async with session.post(served.url + path, json=body, headers=headers) as response:
                    return response.status

            return set(await asyncio.gather(*(ask() for _ in range(20))))

        assert await statuses("/v1/completions", COMPLETION) == {401}
        assert await statuses("/v1/completions", COMPLETION, **user) == {200}
        assert await statuses("/models/load", {"model": "echo:a"}) == {401}
        assert await statuses("/models/load", {"model": "echo:a"}, **user) == {403}
        assert await statuses("/models/load", {"model": "echo:a"}, **admin) == {200}
        assert await statuses("/status", {}, **{"X-Hfms-Address": "127.0.0.1"}) == {401}


async def test_a_key_of_the_store_and_what_it_may_hold_in_every_front(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "2", env={"HFMS_ADMIN_API_KEY": ADMIN})
    await served.until("ready")
    admin = {"Authorization": f"Bearer {ADMIN}"}
    async with client() as session:
        await all_fronts(session, served.url, 1, headers=admin)
        wanted = {"name": "narrow", "allowed_models": ["echo:a"]}
        async with session.post(served.url + "/admin/keys/generate", json=wanted, headers=admin) as response:
            made = await response.json()
        key = {"Authorization": f"Bearer {made['api_key']}"}

        async def statuses(model: str) -> set[int]:
            async def ask() -> int:
                body = COMPLETION | {"model": model}
                async with session.post(served.url + "/v1/completions", json=body, headers=key) as response:
                    return response.status

            return set(await asyncio.gather(*(ask() for _ in range(16))))

        async def known():
            return await statuses("echo:a") == {200}

        await until(known)
        assert await statuses("echo:b") == {403}
        async with session.post(f"{served.url}/admin/keys/{made['key_id']}/revoke", headers=admin) as response:
            assert response.status == 200

        async def refused():  # 429: too many wrong keys from one address
            return await statuses("echo:a") <= {401, 429}

        await until(refused)


async def test_without_keys_administering_is_open_to_this_machine_through_any_front(hfms_serve):
    served = await hfms_serve("--workers", "2")
    await served.until("Config")
    async with client() as session:
        await all_fronts(session, served.url, 1)
        for n in range(12):
            claimed = {"X-Hfms-Address": "8.8.8.8"}
            body = {"model": f"echo:{n % 2}"}
            async with session.post(served.url + "/models/load", json=body, headers=claimed) as response:
                assert response.status == 200
            call = COMPLETION | body
            async with session.post(served.url + "/v1/completions", json=call) as response:
                assert response.status == 200


async def test_errors_are_the_same_through_every_front(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "2", toml="[server]\nmax_body_bytes = 2048\n")
    await served.until("ready")
    cases = [
        ("POST", "/v1/completions", {"model": "echo:no", "prompt": "x"}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"model": "echo:a", "prompt": "x", "stop": "y"}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"model": "echo:a", "prompt": "x" * 4000}, 413, "body_too_large"),
        ("POST", "/models/load", {"model": "x" * 4000}, 413, "body_too_large"),
        ("GET", "/v1/completions", None, 405, "method_not_allowed"),
        ("GET", "/nowhere?a=%2F", None, 404, "unknown_url"),
        ("GET", "/v1/models/nothing", None, 404, "model_not_found"),
    ]
    async with client() as session:
        await all_fronts(session, served.url, 1)
        for method, path, body, status, code in cases * 6:
            async with session.request(method, served.url + path, json=body) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (status, code)
                assert response.headers["x-request-id"].startswith("req-")
                assert ("Allow" in response.headers) == (status == 405)


async def stream(session, url: str, tokens: int, began: asyncio.Queue | None = None) -> bytes:
    """All that a stream says, [DONE] included; b"" where it broke off."""
    body = {"model": "echo:a", "prompt": "w", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with contextlib.suppress(aiohttp.ClientError):
        async with session.post(url + "/v1/completions", json=body | {"ignore_eos": True}) as response:
            said = await response.content.readline()
            if began is not None:
                began.put_nowait(None)
            return said + await response.content.read()
    return b""


async def test_sigterm_drains_the_streams_of_every_front_and_leaves_no_process(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3", toml=SLOW)
    await served.until("ready")
    async with client() as session:
        pids = await all_fronts(session, served.url, 2)
        children = psutil.Process(served.process.pid).children(recursive=True)
        assert set(pids) < {c.pid for c in children}
        began: asyncio.Queue = asyncio.Queue()
        streams = [asyncio.create_task(stream(session, served.url, 60, began)) for _ in range(12)]
        for _ in streams:
            await asyncio.wait_for(began.get(), 30)
        served.process.send_signal(signal.SIGTERM)
        said = await asyncio.gather(*streams)
        assert all(s.strip().endswith(b"[DONE]") and s.count(b"data: ") == 61 for s in said)
    async with asyncio.timeout(30):
        assert await served.process.wait() == 0
    assert all(gone(c.pid) for c in children)


async def test_a_front_that_is_killed_takes_only_its_connections_and_comes_back(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "2", toml=SLOW)
    await served.until("ready")
    async with client() as session:
        (pid,) = await all_fronts(session, served.url, 1)
        began: asyncio.Queue = asyncio.Queue()
        streams = [asyncio.create_task(stream(session, served.url, 80, began)) for _ in range(16)]
        for _ in streams:
            await asyncio.wait_for(began.get(), 30)
        os.kill(pid, signal.SIGKILL)
        said = await asyncio.gather(*streams)
        whole = [s for s in said if s.strip().endswith(b"[DONE]")]
        assert 0 < len(whole) < 16
        (new,) = await all_fronts(session, served.url, 1)
        assert new != pid

        async def idle():  # what the dead front had asked for is cancelled
            return (await served_status(session, served.url))["models"][0]["requests_running"] == 0

        await until(idle)
        said = await asyncio.gather(*(stream(session, served.url, 2) for _ in range(12)))
        assert all(s.strip().endswith(b"[DONE]") for s in said)


async def test_when_the_owner_is_killed_fronts_and_engines_end(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3", toml=SLOW)
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)
        children = psutil.Process(served.process.pid).children(recursive=True)
        assert len(children) == 3
        began: asyncio.Queue = asyncio.Queue()
        streams = [asyncio.create_task(stream(session, served.url, 30_000, began)) for _ in range(8)]
        for _ in streams:
            await asyncio.wait_for(began.get(), 30)
        served.process.kill()
        said = await asyncio.wait_for(asyncio.gather(*streams), 30)
        assert not any(b"[DONE]" in s for s in said)

    async def ended():
        return all(gone(c.pid) for c in children)

    await until(ended)


async def test_a_client_that_leaves_ends_its_generation_through_any_front(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "2", toml=SLOW)
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 1)
        began: asyncio.Queue = asyncio.Queue()
        streams = [asyncio.create_task(stream(session, served.url, 30_000, began)) for _ in range(12)]
        for _ in streams:
            await asyncio.wait_for(began.get(), 30)
        for task in streams:
            task.cancel()

        async def idle():
            status = await served_status(session, served.url)
            return (status["requests_in_flight"], status["models"][0]["requests_running"]) == (0, 0)

        await until(idle)


async def test_unloading_waits_for_the_calls_of_every_front(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "2", toml=SLOW)
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 1)
        began: asyncio.Queue = asyncio.Queue()
        streams = [asyncio.create_task(stream(session, served.url, 60, began)) for _ in range(12)]
        for _ in streams:
            await asyncio.wait_for(began.get(), 30)
        async with session.post(served.url + "/models/unload", json={"model": "echo:a"}) as response:
            assert response.status == 200
        assert all(s.strip().endswith(b"[DONE]") for s in await asyncio.gather(*streams))


@pytest.mark.parametrize("prefix", ["HFMS_", "HF_SERVER_"])
async def test_the_variable_sets_the_number_of_fronts_and_a_port_in_use_is_no_share(hfms_serve, prefix):
    first = await hfms_serve("echo:a", env={prefix + "WORKERS": "2"})
    await first.until("ready")
    async with client() as session:
        await all_fronts(session, first.url, 1)
    second = await hfms_serve("echo:a", "--workers", "2")
    _, err = await second.process.communicate()
    assert (second.process.returncode, b"--port" in err) == (2, True)


# What middlewares know is one truth, though every front answers.


async def ask(session, url, **more) -> tuple[int, dict, dict]:
    """Status, headers and body of a completion."""
    async with session.post(url + "/v1/completions", json=COMPLETION | more) as response:
        return response.status, response.headers, await response.json(content_type=None)


async def ended(served) -> bytes:
    """The log of a server that is told to stop."""
    served.process.send_signal(signal.SIGTERM)
    _, log = await served.process.communicate()
    return log


async def test_exactly_as_many_requests_pass_as_the_limit_says_whichever_front_they_come_to(hfms_serve):
    # A bucket of four takes 15 s for each that it gets back.
    served = await hfms_serve("echo:a", "--workers", "3", toml="[middleware.rate_limit]\nrequests_per_minute = 4\n")
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)
        answers = await asyncio.gather(*(ask(session, served.url) for _ in range(24)))
        passed = [headers for status, headers, _ in answers if status == 200]
        refused = [(headers, body) for status, headers, body in answers if status == 429]
        assert (len(passed), len(refused)) == (4, 20)
        assert sorted(headers["X-RateLimit-Remaining"] for headers in passed) == ["0", "1", "2", "3"]
        assert {headers["X-RateLimit-Remaining"] for headers, _ in refused} == {"0"}
        assert {body["error"]["code"] for _, body in refused} == {"rate_limit_exceeded"}
        status = await served_status(session, served.url)
        assert status["middleware"]["rate_limit"]["refused"] == {"requests_per_minute": 20}
        async with session.get(served.url + "/metrics") as response:
            assert counted(await response.text(), "hfms_rate_limited_total", limit="requests_per_minute") == 20
    assert fronts_of(await ended(served)) == {0, 1, 2}


async def test_tokens_are_set_aside_and_settled_in_one_bucket_for_all_fronts(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3", toml="[middleware.rate_limit]\ntokens_per_day = 40\n")
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)
        # Each sets aside 5 + 3 tokens and uses 6: the seventh finds 4 left.
        answers = [await ask(session, served.url, max_tokens=3) for _ in range(16)]
        assert [status for status, _, _ in answers] == [200] * 6 + [429] * 10
        # A call that is refused at once gives back what it set aside, in whatever front.
        big = [await ask(session, served.url, max_tokens=10) for _ in range(4)]
        assert {body["error"]["code"] for _, _, body in big} == {"rate_limit_exceeded"}


async def test_an_answer_is_kept_once_for_all_fronts_and_headers_go_both_ways(hfms_serve):
    order = '[middleware]\norder = ["auth", "cache", "queue"]\n'
    served = await hfms_serve("echo:a", "--workers", "3", toml=order)
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)

        async def said(**headers: str) -> list[str | None]:
            found = []
            for n in range(16):
                body = COMPLETION | {"temperature": 0, "stream": bool(n % 2)}
                async with session.post(served.url + "/v1/completions", json=body, headers=headers) as response:
                    assert b"three" in await response.read()
                    found.append(response.headers.get("x-cache"))
            return found

        assert await said() == ["miss"] + ["hit"] * 15
        assert await said(**{"cache-control": "no-store"}) == [None] * 16
        async with session.get(served.url + "/admin/cache/stats") as response:
            stats = await response.json()
        assert (stats["hits"], stats["misses"]) == (15, 1)
        async with session.post(served.url + "/admin/cache/clear") as response:
            assert (await response.json())["cleared"] == 1
        assert await said() == ["miss"] + ["hit"] * 15
    assert fronts_of(await ended(served)) == {0, 1, 2}


ONE_AT_A_TIME = "[engine.echo]\nstep_ms = 20\nmax_batch = 1\n[middleware.queue]\nmax_size = 6\n"


async def queue_statistics(session, url) -> dict:
    async with session.get(url + "/admin/queue/stats") as response:
        return await response.json()


async def waiting(session, url, count: int) -> dict:
    async def there():
        stats = await queue_statistics(session, url)
        return stats if stats["current_size"] == count else None

    return await until(there)


def adds_up(stats: dict) -> bool:
    ends = ("total_processed", "total_timeouts", "total_rejected", "total_cancelled", "current_size")
    return stats["total_queued"] == sum(stats[end] for end in ends)


async def test_one_queue_bounds_what_waits_in_all_fronts_and_its_numbers_add_up(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3", toml=ONE_AT_A_TIME)
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)
        began: asyncio.Queue = asyncio.Queue()
        running = asyncio.create_task(stream(session, served.url, 30_000, began))
        await asyncio.wait_for(began.get(), 30)
        tasks = [asyncio.create_task(ask(session, served.url)) for _ in range(20)]

        async def refused():
            return sum(task.done() for task in tasks) == 14

        await until(refused)
        assert {task.result()[2]["error"]["code"] for task in tasks if task.done()} == {"queue_full"}
        stats = await waiting(session, served.url, 6)
        assert (stats["total_queued"], stats["total_rejected"], stats["total_processed"]) == (21, 14, 1)
        running.cancel()
        await asyncio.wait(tasks)
        assert sorted(task.result()[0] for task in tasks) == [200] * 6 + [429] * 14
        stats = await waiting(session, served.url, 0)
        assert (stats["total_queued"], stats["total_rejected"], stats["total_processed"]) == (21, 14, 7)
        assert (stats["current_tokens"], adds_up(stats)) == (0, True)


async def test_a_front_that_is_killed_while_its_calls_wait_leaves_nothing_counted(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3", toml=ONE_AT_A_TIME.replace("= 6", "= 40"))
    await served.until("ready")
    async with client() as session:
        pids = await all_fronts(session, served.url, 2)
        tasks = [asyncio.create_task(stream(session, served.url, 30_000)) for _ in range(25)]
        await waiting(session, served.url, 24)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

        async def left():
            stats = await queue_statistics(session, served.url)
            alive = sum(not task.done() for task in tasks)
            # One of those that are left runs; those of the dead fronts have left the line.
            return alive < 25 and stats["current_size"] == max(0, alive - 1) and stats

        stats = await until(left)
        assert adds_up(stats)
        for task in tasks:
            task.cancel()
        stats = await waiting(session, served.url, 0)
        assert (stats["total_queued"], stats["current_tokens"], adds_up(stats)) == (25, 0, True)

        async def idle():
            return (await served_status(session, served.url))["requests_in_flight"] == 0

        await until(idle)


async def test_a_breaker_that_opens_is_open_in_every_front(hfms_serve):
    toml = SLOW + "[middleware.breaker]\nfailures = 1\n"
    served = await hfms_serve("echo:a", "--workers", "3", toml=toml)
    await served.until("ready")
    async with client() as session:
        await all_fronts(session, served.url, 2)
        began: asyncio.Queue = asyncio.Queue()
        failing = asyncio.create_task(stream(session, served.url, 30_000, began))
        await asyncio.wait_for(began.get(), 30)
        (engine,) = (await served_status(session, served.url))["models"][0]["replicas"]
        os.kill(engine["pid"], signal.SIGKILL)
        assert b"engine_died" in await failing

        async def back():
            (replica,) = (await served_status(session, served.url))["models"][0]["replicas"]
            return replica.get("pid", engine["pid"]) != engine["pid"]

        await until(back)
        answers = await asyncio.gather(*(ask(session, served.url) for _ in range(16)))
        assert {(status, body["error"]["code"]) for status, _, body in answers} == {(503, "breaker_open")}
        status = await served_status(session, served.url)
        assert status["middleware"]["breaker"]["models"]["echo:a"]["state"] == "open"
        async with session.get(served.url + "/metrics") as response:
            assert counted(await response.text(), "hfms_breaker_state", model="echo:a") == 1
    assert fronts_of(await ended(served)) == {0, 1, 2}


async def test_wrong_keys_are_counted_by_address_over_all_fronts(hfms_serve):
    served = await hfms_serve("echo:a", "--workers", "3", env={"HFMS_ADMIN_API_KEY": ADMIN})
    await served.until("ready")
    admin, wrong = {"Authorization": f"Bearer {ADMIN}"}, {"Authorization": "Bearer wrong"}
    async with client() as session:
        await all_fronts(session, served.url, 2, headers=admin)

        async def knock() -> int:
            async with session.post(served.url + "/v1/completions", json=COMPLETION, headers=wrong) as response:
                return response.status

        # Ten are free; no front alone has had as many.
        statuses = await asyncio.gather(*(knock() for _ in range(14)))
        assert set(statuses) == {401, 429}
        status = await served_status(session, served.url, headers=admin)
        assert status["middleware"]["auth"]["failures"] == {"unknown": 14}
        async with session.get(served.url + "/metrics", headers=admin) as response:
            assert counted(await response.text(), "hfms_auth_failures_total", reason="unknown") == 14
