"""Limits on a real server: who may, who may not, what is told, and that every call settles."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from hfms_cli import Call, Caller, Conversation, Picture, Sampling
from hfms_cli.config import load_config
from hfms_cli.errors import ConfigError
from hfms_middleware.rate_limit.buckets import MemoryBuckets
from hfms_middleware.rate_limit.middleware import TOKENS_PER_PICTURE, RateLimit, most_tokens, owner_of
from tests.conftest import Server
from tests.middleware.conftest import Clock, RedisServer

KEY, ADMIN = "user-key-0123456789abcdef", "admin-key-0123456789abcdef"
KEYS = {"HFMS_API_KEY": KEY, "HFMS_ADMIN_API_KEY": ADMIN}
TOKENS = "X-RateLimit-Remaining-Tokens"


def limits(**options: object) -> str:
    """The middleware's table. The breaker and the rest stay as they are."""
    return "[middleware.rate_limit]\n" + "".join(
        f"{k} = {msgspec.json.encode(v).decode()}\n" for k, v in options.items()
    )


def limiter(server: Server) -> RateLimit:
    return next(m for m in server.runtime.middlewares if isinstance(m, RateLimit))


def stopped(server: Server, clock: Clock) -> Server:
    """The same server, for which no time passes."""
    limiter(server)._buckets = MemoryBuckets(clock)
    return server


async def headers_of(server: Server, **more: object) -> dict[str, str]:
    async with server.session.get(server.url + "/v1/models", **more) as response:
        return dict(response.headers)


def completion(prompt: str = "one two three", **more: object) -> dict[str, object]:
    return {"model": "echo:a", "prompt": prompt, "max_tokens": 10, **more}


async def test_of_a_thousand_concurrent_calls_exactly_the_limit_passes(serve, clock):
    async with serve("echo:a", toml=limits(requests_per_minute=100)) as server:
        stopped(server, clock)
        url, body = server.url + "/v1/completions", completion()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask() -> tuple[int, str | None]:
                async with session.post(url, json=body) as response:
                    return response.status, response.headers.get("Retry-After")

            answers = await asyncio.gather(*(ask() for _ in range(1000)))
        assert answers.count((200, None)) == 100
        assert answers.count((429, "1")) == 900


async def test_a_refusal_is_openais_envelope_with_headers_and_is_counted(serve, clock):
    async with serve("echo:a", toml=limits(requests_per_minute=2)) as server:
        stopped(server, clock)
        assert (await headers_of(server))["X-RateLimit-Remaining"] == "1"
        async with server.session.post(server.url + "/v1/completions", json=completion(stream=True)) as response:
            assert response.status == 200
            told = [response.headers[f"X-RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset")]
            assert told == ["2", "0", "60"]
            await response.read()
        async with server.session.post(server.url + "/v1/completions", json=completion()) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "30")
            assert response.headers["X-RateLimit-Remaining"] == "0"
            error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert error["message"] == "Rate limit reached: 2 requests a minute. Try again in 30 s."
        clock.now += 30
        assert (await server.post("/v1/completions", completion()))[0] == 200
        _, status = await server.get("/status")
        assert status["middleware"]["rate_limit"]["refused"] == {"requests_per_minute": 1}
        async with server.session.get(server.url + "/metrics") as response:
            assert 'hfms_rate_limited_total{limit="requests_per_minute"} 1.0' in await response.text()


async def test_those_who_watch_the_server_need_no_limit_and_an_unlimited_server_tells_none(serve, clock):
    async with serve("echo:a", toml=limits(requests_per_minute=1)) as server:
        stopped(server, clock)
        await headers_of(server)
        for path in ("/health", "/ready", "/status"):
            assert (await server.get(path))[0] == 200
        assert (await server.get("/v1/models"))[0] == 429
        assert (await server.get("/nowhere"))[0] == 429
    async with serve("echo:a") as server:
        assert not [name for name in await headers_of(server) if "ratelimit" in name.lower()]


async def test_each_key_has_its_own_bucket_and_its_own_limits_win(serve, clock):
    async with serve("echo:a", env=KEYS, toml=limits(requests_per_minute=1)) as server:
        stopped(server, clock)
        user = {"Authorization": f"Bearer {KEY}"}
        assert (await headers_of(server, headers=user))["X-RateLimit-Limit"] == "1"
        assert (await server.get("/v1/models", headers=user))[0] == 429
        admin, wish = {"Authorization": f"Bearer {ADMIN}"}, {"name": "vip", "rate_limit": 3, "token_limit": 25}
        status, made = await server.post("/admin/keys/generate", wish, headers=admin)
        assert status == 200, made
        vip = {"Authorization": f"Bearer {made['api_key']}"}
        told = await headers_of(server, headers=vip)
        assert [told["X-RateLimit-Limit"], told["X-RateLimit-Remaining"], told[TOKENS]] == ["3", "2", "25"]
        assert (await server.post("/v1/completions", completion(), headers=vip))[0] == 200  # three words and three
        told = await headers_of(server, headers=vip)
        assert [told["X-RateLimit-Limit-Tokens"], told["X-RateLimit-Remaining"], told[TOKENS]] == ["25", "0", "19"]
        assert (await server.get("/v1/models", headers=vip))[0] == 429


def test_an_anonymous_callers_bucket_is_that_of_its_address_and_of_its_network_where_a_host_has_many():
    def owner(address: str) -> str:
        return owner_of(Caller(address=address))

    assert owner("192.0.2.1") != owner("192.0.2.2")
    assert owner("2001:db8:1:2::1") == owner("2001:db8:1:2:ffff::9") == "address:2001:db8:1:2::/64"
    assert owner("2001:db8:1:3::1") != owner("2001:db8:1:2::1")
    assert owner("::ffff:192.0.2.1") == owner("192.0.2.1")
    assert owner_of(Caller(key_id="k", address="192.0.2.1")) == "key:k"
    assert owner("") == "address:"


def test_what_a_call_may_come_to_counts_prompts_choices_and_answers():
    def most(**more: object) -> int:
        call = Call(**({"id": "1", "model": "m", "task": "generate", "inputs": ["x" * 298]} | more))
        return most_tokens(call, 512)

    assert most(sampling=Sampling(max_tokens=7)) == 100 + 7
    assert most() == 100 + 512
    assert most(n=3, sampling=Sampling(max_tokens=7), inputs=[[1, 2, 3], [4]]) == 4 + 2 * 3 * 7
    assert most(task="embed") == 100
    assert most(inputs=["文" * 10], task="embed") == 11
    assert most(inputs=[Conversation(messages=[{"role": "user", "content": "x" * 300}])], task="embed") > 100


def test_an_image_counts_as_an_image_and_not_as_the_text_that_its_bytes_would_be():
    def most(*pictures: Picture) -> int:
        chat = Conversation(messages=[{"role": "user", "content": [{"type": "image"}]}], pictures=[*pictures])
        return most_tokens(Call(id="1", model="m", task="generate", inputs=[chat]), 512)

    small, large = Picture(b"x", "messages"), Picture(bytes(2**20), "messages")
    assert most(small) == most(large) == most() + TOKENS_PER_PICTURE
    assert most(small, large) == most() + 2 * TOKENS_PER_PICTURE


async def test_tokens_are_set_aside_while_a_call_runs_and_settled_when_it_ends(serve, clock):
    toml = limits(tokens_per_minute=1000) + "[engine.echo]\nstep_ms = 20\n"
    async with serve("echo:a", toml=toml) as server:
        stopped(server, clock)
        assert (await headers_of(server))[TOKENS] == "1000"
        body = completion(" w" * 10, max_tokens=100, stream=True)  # 22 bytes as JSON: 8 tokens at most
        async with server.session.post(server.url + "/v1/completions", json=body) as response:
            assert response.headers[TOKENS] == str(1000 - 100 - 8)
            assert (await headers_of(server))[TOKENS] == str(1000 - 100 - 8)
            await response.read()
        assert (await headers_of(server))[TOKENS] == str(1000 - 20)  # ten words read, ten written
        async with server.session.post(server.url + "/v1/completions", json=completion("a b")) as response:
            assert response.headers[TOKENS] == str(1000 - 20 - 4)  # a whole answer tells what it came to
        await server.post("/v1/embeddings", {"model": "echo:a", "input": ["a b c", "d"]})
        assert (await headers_of(server))[TOKENS] == str(1000 - 20 - 4 - 4)


async def until_told(server: Server, tokens: int) -> None:
    async with asyncio.timeout(10):
        while (await headers_of(server))[TOKENS] != str(tokens):
            await asyncio.sleep(0.01)


async def test_a_stream_whose_reader_leaves_settles_for_what_was_made(serve, clock):
    toml = limits(tokens_per_minute=1000) + "[engine.echo]\nstep_ms = 200\n"
    async with serve("echo:a", toml=toml) as server:
        stopped(server, clock)
        body = completion("a b c d e", max_tokens=500, stream=True)
        async with server.session.post(server.url + "/v1/completions", json=body) as response:
            assert response.status == 200
            await response.content.readline()
        await until_told(server, 1000 - 5 - 1)


async def test_a_call_that_is_refused_or_dies_gives_back_what_it_did_not_use(serve, clock):
    toml = limits(tokens_per_minute=1000) + "[engine.echo]\nstep_ms = 100\n"
    async with serve("echo:a", toml=toml) as server:
        stopped(server, clock)
        assert (await server.post("/v1/completions", completion(stop="x")))[0] == 400
        assert (await server.post("/v1/completions", completion("a b", max_tokens=600)))[0] == 200
        await until_told(server, 1000 - 4)
        ask = asyncio.create_task(server.post("/v1/completions", completion("a b c", ignore_eos=True, max_tokens=300)))
        model = server.runtime.pool.find("echo:a")
        async with asyncio.timeout(10):
            while not model.host.running:
                await asyncio.sleep(0.01)
        os.kill(model.host.pid, signal.SIGKILL)
        assert (await ask)[0] == 503
        async with asyncio.timeout(10):
            while int((await headers_of(server))[TOKENS]) < 1000 - 4 - 3 - 300 + 1:
                await asyncio.sleep(0.01)


async def test_a_call_beyond_what_is_left_waits_and_one_larger_than_the_bucket_is_not_refused_for_ever(serve, clock):
    async with serve("echo:a", toml=limits(tokens_per_minute=60, tokens_per_day=100)) as server:
        stopped(server, clock)
        status, body = await server.post("/v1/completions", completion(" a" * 30, max_tokens=5000))
        assert (status, body["usage"]["total_tokens"]) == (200, 60)
        status, body = await server.post("/v1/completions", completion("a", max_tokens=9))
        assert (status, body["error"]["message"]) == (
            429,
            "Rate limit reached: 60 tokens a minute. Try again in 10 s.",
        )
        clock.now += 60
        status, body = await server.post("/v1/completions", completion(" a" * 60, max_tokens=5000))
        assert (status, "100 tokens a day" in body["error"]["message"]) == (429, True)


async def test_answers_from_a_cache_cost_no_tokens_unless_they_are_to(serve, clock):
    for count, cost in ((False, 0), (True, 6)):
        toml = limits(tokens_per_minute=1000, count_cached=count)
        async with serve("echo:a", toml=toml, env={"HFMS_ENABLE_CACHING": "1"}) as server:
            stopped(server, clock)
            for spent in (6, 6 + cost):
                await server.post("/v1/completions", completion(temperature=0))
                assert (await headers_of(server))[TOKENS] == str(1000 - spent)


# Several servers, one Redis.


@contextlib.asynccontextmanager
async def processes(count: int, folder: Path, environ: dict[str, str], toml: str) -> AsyncIterator[list[str]]:
    """So many real `hfms serve echo:a`; their addresses."""
    (folder / "three.toml").write_text("[server]\nport = 0\n" + toml)
    started = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hfms_cli", "serve", "echo:a", "--config", "three.toml"),
            cwd=folder,
            env=environ,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(count)
    ]
    try:
        urls = []
        for process in started:
            printed = ""
            while "ready " not in printed:
                line = await process.stdout.readline()
                assert line, printed
                printed += line.decode()
            urls.append(re.search(r"http://[0-9.]+:\d+", printed)[0])
        yield urls
    finally:
        for process in started:
            process.terminate()
        await asyncio.gather(*(process.communicate() for process in started))


async def test_three_server_processes_on_one_redis_let_the_limit_pass_and_not_one_more(redis_server, environ, tmp_path):
    toml = limits(requests_per_minute=60, store=redis_server.url)
    async with processes(3, tmp_path, environ | KEYS, toml) as urls, aiohttp.ClientSession() as session:

        async def ask(url: str) -> int:
            async with session.get(url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}) as response:
                return response.status

        began = time.monotonic()
        answers = await asyncio.gather(*(ask(url) for _ in range(100) for url in urls))
        refilled = math.floor(time.monotonic() - began)  # one a second, by Redis's clock
        assert set(answers) == {200, 429}
        assert 60 <= answers.count(200) <= 60 + refilled


async def test_a_thousand_concurrent_calls_wait_for_redis_and_none_takes_that_for_its_absence(serve, redis_server):
    toml = limits(requests_per_minute=60, store=redis_server.url)
    connector = aiohttp.TCPConnector(limit=0)
    async with serve("echo:a", toml=toml) as server, aiohttp.ClientSession(connector=connector) as session:

        async def ask() -> int:
            async with session.post(server.url + "/v1/completions", json=completion()) as response:
                return response.status

        began = time.monotonic()
        answers = await asyncio.gather(*(ask() for _ in range(1000)))
        refilled = math.floor(time.monotonic() - began)  # one a second
        assert set(answers) == {200, 429}
        assert 60 <= answers.count(200) <= 60 + refilled


async def test_without_redis_a_closed_limiter_refuses_says_so_and_recovers(serve, redis_server: RedisServer, clock):
    async with serve("echo:a", toml=limits(requests_per_minute=100, store=redis_server.url)) as server:
        link = limiter(server)._link
        link._clock = clock
        assert (await server.get("/v1/models"))[0] == 200
        redis_server.stop()
        async with server.session.get(server.url + "/v1/models") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert (await response.json())["error"]["code"] == "rate_limiter_unavailable"
        assert (await server.get("/ready"))[0] == 200
        section = (await server.get("/status"))[1]["middleware"]["rate_limit"]
        assert (section["reachable"], section["error"], section["on_error"]) == (False, "ConnectionError", "closed")
        redis_server.start()
        clock.now += 2
        assert (await server.get("/v1/models"))[0] == 200
        assert (await server.get("/status"))[1]["middleware"]["rate_limit"]["reachable"] is True


async def test_without_redis_an_open_limiter_lets_pass(serve, redis_server: RedisServer):
    toml = limits(requests_per_minute=1, tokens_per_minute=1000, on_error="open", store=redis_server.url)
    async with serve("echo:a", toml=toml) as server:
        assert (await server.post("/v1/completions", completion()))[0] == 200
        assert (await server.post("/v1/completions", completion()))[0] == 429
        redis_server.stop()
        for _ in range(5):
            assert (await server.post("/v1/completions", completion()))[0] == 200


async def test_a_redis_that_hangs_holds_one_call_up_and_not_every_call(serve, redis_server: RedisServer, clock):
    async with serve("echo:a", toml=limits(requests_per_minute=100, store=redis_server.url)) as server:
        limiter(server)._link._clock = clock
        assert (await server.get("/v1/models"))[0] == 200
        redis_server.hang()
        statuses = await asyncio.gather(*(server.get("/v1/models") for _ in range(50)))
        assert {status for status, _ in statuses} == {503}
        # The clock stands still: had each of these asked again, they would have waited a second each.
        assert limiter(server)._link.error == "TimeoutError"
        for _ in range(20):
            assert (await server.get("/v1/models"))[0] == 503


async def test_tokens_settle_on_redis_although_the_reader_left(serve, redis_server: RedisServer):
    toml = limits(tokens_per_day=100_000, tokens_per_minute=1, store=redis_server.url)
    toml = toml.replace("tokens_per_minute = 1\n", "tokens_per_minute = 100000\n")
    async with serve("echo:a", toml=toml + "[engine.echo]\nstep_ms = 100\n") as server:
        body = completion("a b c d e", max_tokens=50_000, stream=True)
        async with server.session.post(server.url + "/v1/completions", json=body) as response:
            await response.content.readline()
            assert int((await headers_of(server))[TOKENS]) < 60_000
        async with asyncio.timeout(10):
            while int((await headers_of(server))[TOKENS]) < 90_000:
                await asyncio.sleep(0.01)


# Settings.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("requests_per_minute = -1", "`requests_per_minute` is -1, which is not an integer from 0 to 1000000000000"),
        ("tokens_per_minute = 1000000000000000000", "`tokens_per_minute` is 1000000000000000000, which is not"),
        ("tokens_per_day = 1.5", "`tokens_per_day` is 1.5, which is not an integer"),
        ('requests_per_minute = "many"', "`requests_per_minute` is 'many', which is not an integer"),
        ("requests_per_minutes = 5", "unknown key `requests_per_minutes`; did you mean `requests_per_minute`?"),
        ('on_error = "opened"', '`on_error` is \'opened\', which is not one of "closed", "open"; did you mean "open"?'),
        ('store = "http://:hunter2@x"', "[middleware.rate_limit] store must be"),
        ('store = "redis://:hunter2@x:port"', "[middleware.rate_limit] store is not a usable address"),
    ],
)
async def test_a_bad_setting_stops_the_start_and_says_what_was_meant(serve, line, said):
    with pytest.raises(ConfigError) as refused:
        async with serve(toml=f"[middleware.rate_limit]\n{line}\n"):
            raise AssertionError("it started")
    assert said in refused.value.message
    assert "hunter2" not in refused.value.message
    assert "[middleware.rate_limit]" in refused.value.message


@pytest.mark.parametrize("prefix", ["HFMS_", "HF_SERVER_"])
async def test_switch_and_default_limit_come_from_the_environment(serve, prefix, tmp_path):
    file = tmp_path / "none.toml"
    file.write_text('[middleware]\norder = ["auth", "breaker"]\n')
    on = load_config(file, environ={f"{prefix}ENABLE_RATE_LIMITING": "true"}).middleware.order
    assert on == ["auth", "rate_limit", "breaker"]
    async with serve(env={f"{prefix}DEFAULT_RATE_LIMIT": "7"}) as server:
        assert (await headers_of(server))["X-RateLimit-Limit"] == "7"
    off = {f"{prefix}DEFAULT_RATE_LIMIT": "7", f"{prefix}ENABLE_RATE_LIMITING": "false"}
    async with serve(env=off) as server:
        assert "X-RateLimit-Limit" not in await headers_of(server)
        assert "rate_limit" not in (await server.get("/status"))[1]["middleware"]
        async with server.session.get(server.url + "/metrics") as response:
            assert "hfms_rate_limited" not in await response.text()


async def test_a_limiter_that_would_see_no_keys_warns(serve):
    async with serve(toml='[middleware]\norder = ["rate_limit", "auth"]\n') as server:
        assert any("rate_limit stands before auth" in warning for warning in server.runtime.warnings)
