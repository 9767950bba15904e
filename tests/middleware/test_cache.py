"""The cache on a real server: what it answers, whose it is, what it never keeps, and how it is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator

import aiohttp
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli import Call, Caller, Conversation, Sampling
from hfms_cli.config import load_config
from hfms_cli.errors import ConfigError
from hfms_middleware.cache.answers import OVERHEAD_BYTES, MemoryAnswers
from hfms_middleware.cache.middleware import Cache, deterministic, key_of
from tests.conftest import Server
from tests.middleware.conftest import Clock, RedisServer

ORDER = '[middleware]\norder = ["auth", "rate_limit", "cache", "breaker"]\n'
KEY, ADMIN = "user-key-0123456789abcdef", "admin-key-0123456789abcdef"
KEYS = {"HFMS_API_KEY": KEY, "HFMS_ADMIN_API_KEY": ADMIN}
STREAM = "/v1/chat/completions"


def ask(**more: object) -> dict[str, object]:
    return {"model": "echo:a", "prompt": "one two three", "temperature": 0, **more}


def chat(**more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "one two three four five six seven eight"}]
    return {"model": "echo:a", "messages": messages, "temperature": 0, **more}


def embed(**more: object) -> dict[str, object]:
    return {"model": "echo:a", "input": ["one two", "three"], **more}


def cache_of(server: Server) -> Cache:
    return next(m for m in server.runtime.middlewares if isinstance(m, Cache))


async def said(server: Server, path: str, body: dict[str, object], **headers: str) -> tuple[str | None, bytes]:
    """`x-cache`, and the body as it came."""
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        return response.headers.get("x-cache"), await response.read()


@contextlib.contextmanager
def engine_stopped(server: Server) -> Iterator[None]:
    """Whatever is answered meanwhile, the engine did not answer it."""
    pid = server.runtime.pool.find("echo:a").host.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_what_was_asked_before_is_answered_without_the_engine_and_with_the_same_usage(serve):
    async with serve("echo:a", toml=ORDER) as server:
        for path, body in (("/v1/completions", ask()), (STREAM, chat()), ("/v1/embeddings", embed())):
            how, first = await said(server, path, body)
            assert how == "miss"
            with engine_stopped(server):
                how, second = await said(server, path, body)
            assert how == "hit"
            first, second = json.loads(first), json.loads(second)
            assert first.get("choices") == second.get("choices")
            assert first.get("data") == second.get("data")
            assert first["usage"] == second["usage"]
            assert first["usage"]["total_tokens"] > 2
            assert first.get("id") is None or first["id"] != second["id"]


def events(raw: bytes) -> list[object]:
    """A stream's events without what names this answer only."""
    lines = [line[6:] for line in raw.decode().split("\n\n") if line]
    parsed = [json.loads(line) for line in lines[:-1]]
    return [{k: v for k, v in event.items() if k not in ("id", "created")} for event in parsed] + lines[-1:]


async def test_a_kept_answer_is_streamed_as_a_stream_and_a_kept_stream_is_given_whole(serve):
    async with serve("echo:a", toml=ORDER) as server:
        how, whole = await said(server, STREAM, chat())
        stream = chat(stream=True, stream_options={"include_usage": True})
        how, first = await said(server, STREAM, stream, **{"Cache-Control": "no-store"})
        assert how is None
        with engine_stopped(server):
            how, again = await said(server, STREAM, stream)
        assert how == "hit"
        assert events(again) == events(first)
        assert len(events(again)) > 8
        assert events(again)[-2]["usage"] == json.loads(whole)["usage"]
        assert (await said(server, STREAM, chat(seed=1, stream=True)))[0] == "miss"
        with engine_stopped(server):
            how, again = await said(server, STREAM, chat(seed=1))
        assert how == "hit"
        assert json.loads(again)["choices"] == json.loads(whole)["choices"]


async def test_only_what_is_deterministic_is_kept(serve):
    async with serve("echo:a", toml=ORDER) as server:
        for body in (ask(temperature=1), ask(temperature=0.5), {"model": "echo:a", "prompt": "x"}):
            for _ in range(2):
                assert (await said(server, "/v1/completions", body))[0] is None
        for _ in range(2):
            how, _ = await said(server, "/v1/completions", ask(temperature=1, seed=7))
        assert how == "hit"


async def test_no_store_neither_reads_nor_writes_and_no_cache_only_writes(serve):
    async with serve("echo:a", toml=ORDER) as server:
        path = "/v1/completions"
        assert (await said(server, path, ask(), **{"Cache-Control": "no-store"}))[0] is None
        assert (await said(server, path, ask(), **{"cache-control": "max-age=0, No-Store"}))[0] is None
        assert cache_of(server).stats()["entries"] == 0
        assert (await said(server, path, ask(), **{"Cache-Control": "no-cache"}))[0] == "miss"
        assert (await said(server, path, ask(), **{"Cache-Control": "no-cache"}))[0] == "miss"
        assert (await said(server, path, ask()))[0] == "hit"
        assert (await said(server, path, ask(), **{"Cache-Control": "no-store"}))[0] is None


@pytest.mark.parametrize(("shared", "second"), [(False, "miss"), (True, "hit")])
async def test_a_key_sees_only_its_own_answers_unless_they_are_shared(serve, shared, second):
    toml = ORDER + f"[middleware.cache]\nshared = {str(shared).lower()}\n"
    async with serve("echo:a", env=KEYS, toml=toml) as server:
        found = [
            (await said(server, "/v1/completions", ask(), Authorization=f"Bearer {key}"))[0]
            for key in (KEY, ADMIN, KEY, ADMIN)
        ]
        assert found == ["miss", second, "hit", "hit"]


CALL = Call(id="1", model="m", task="generate", inputs=["x"], digest="d", caller=Caller(key_id="k", address="a"))


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: x + 0.0)  # -0.0 is 0.0, and asks the same in other words


samplings = st.builds(
    Sampling,
    max_tokens=st.none() | st.integers(1, 9),
    min_tokens=st.integers(0, 3),
    temperature=between(0, 2),
    top_p=between(0.1, 1),
    top_k=st.integers(0, 3),
    min_p=between(0, 1),
    presence_penalty=between(-2, 2),
    frequency_penalty=between(-2, 2),
    repetition_penalty=between(0.5, 2),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 9), between(-1, 1), min_size=1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)


@given(one=samplings, other=samplings)
def test_keys_are_equal_just_where_all_that_was_asked_is(one, other):
    first = key_of(msgspec.structs.replace(CALL, sampling=one), shared=False)
    second = key_of(msgspec.structs.replace(CALL, sampling=other), shared=False)
    assert (first == second) == (one == other)


def test_a_dict_asks_the_same_in_whatever_order_it_is_written():
    def of(**kwargs: object) -> str:
        return key_of(
            msgspec.structs.replace(CALL, inputs=[Conversation(messages=[kwargs], template_kwargs=kwargs)]),
            shared=False,
        )

    assert of(role="user", content="x") == of(content="x", role="user")
    assert of(role="user", content="x") != of(role="user", content="y")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"id": "2", "model": "alias", "priority": 3}, True),
        ({"digest": "another revision"}, False),
        ({"inputs": ["y"]}, False),
        ({"inputs": ["x", "x"]}, False),
        ({"inputs": [[1]]}, False),
        ({"n": 2}, False),
        ({"task": "embed"}, False),
        ({"dimensions": 5}, False),
        ({"caller": Caller(key_id="k", address="elsewhere")}, True),
        ({"caller": Caller(key_id="other", address="a")}, False),
        ({"caller": Caller(address="a")}, False),
    ],
)
def test_the_key_holds_model_parameters_and_tenant_and_not_the_calls_name(change, same):
    changed = msgspec.structs.replace(CALL, **change)
    assert (key_of(changed, shared=False) == key_of(CALL, shared=False)) is same
    if "caller" in change:
        assert key_of(changed, shared=True) == key_of(CALL, shared=True)
        assert key_of(changed, shared=True) != key_of(CALL, shared=False)


def test_a_group_is_one_tenant_and_no_group_is_named_like_a_key():
    def of(**who):
        return key_of(msgspec.structs.replace(CALL, caller=Caller(**who)), shared=False)

    assert of(key_id="a", cache_group="team") == of(key_id="b", cache_group="team")
    assert of(key_id="a", cache_group="team") != of(key_id="a")
    assert of(key_id="a", cache_group="b") != of(key_id="b")
    assert of(key_id="a") != of(address="a")


def test_anonymous_callers_of_two_addresses_are_two_tenants():
    one, other = (msgspec.structs.replace(CALL, caller=Caller(address=a)) for a in ("192.0.2.1", "192.0.2.2"))
    assert key_of(one, shared=False) != key_of(other, shared=False)


def test_embeddings_are_deterministic_and_texts_at_temperature_0_or_with_a_seed():
    def of(**more: object) -> bool:
        return deterministic(msgspec.structs.replace(CALL, **more))

    assert of(task="embed")
    assert of(sampling=Sampling(temperature=0))
    assert of(sampling=Sampling(seed=0))
    assert not of()
    assert not of(sampling=Sampling(temperature=0.01))


# One flight.


SLOW = ORDER + "[engine.echo]\nstep_ms = 60\n"


async def until(condition) -> None:
    """Wait for what another process or task brings about."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_identical_requests_in_the_air_are_one_call_of_the_engine(serve):
    async with serve("echo:a", toml=SLOW) as server:
        host = server.runtime.pool.find("echo:a").host
        tasks = [asyncio.create_task(said(server, STREAM, chat(stream=i % 2 == 0))) for i in range(8)]
        await until(lambda: server.runtime.in_flight == 8)
        assert host.running == 1
        answers = await asyncio.gather(*tasks)
        assert sorted(how for how, _ in answers) == ["miss"] + ["shared"] * 7
        assert len({raw.count(b'"content":"') for _, raw in answers[1::2]}) == 1
        assert (await said(server, STREAM, chat()))[0] == "hit"
        assert cache_of(server).stats() | {"bytes": 0} == {
            "hits": 1, "misses": 1, "shared": 7, "in_flight": 0,
            "store": "memory", "entries": 1, "bytes": 0, "max_bytes": 256 * 2**20,
        }  # fmt: skip


@pytest.mark.parametrize("streams", [True, False])
async def test_a_leader_that_leaves_does_not_take_its_followers_along(serve, streams):
    async with serve("echo:a", toml=SLOW) as server:
        model = server.runtime.pool.find("echo:a")
        leader = asyncio.create_task(said(server, STREAM, chat(stream=streams)))
        await until(lambda: model.host.running == 1)
        follower = asyncio.create_task(said(server, STREAM, chat(stream=True)))
        await until(lambda: server.runtime.in_flight == 2)
        leader.cancel()
        how, raw = await follower
        assert how == "shared"
        assert len(events(raw)) == 11  # a role, eight words, the finish, [DONE]
        await until(lambda: (model.host.running, model.leases, server.runtime.in_flight) == (0, 0, 0))
        assert (await said(server, STREAM, chat()))[0] == "hit"
        assert "hfms_plugin_errors_total{" not in server.runtime.metrics.render().decode()


async def test_a_leader_of_a_stream_that_leaves_between_two_chunks_does_not_either(serve):
    async with serve("echo:a", toml=SLOW) as server:
        model = server.runtime.pool.find("echo:a")
        async with aiohttp.ClientSession() as session:
            leader = await session.post(server.url + STREAM, json=chat(stream=True))
            await leader.content.readline()
            follower = asyncio.create_task(said(server, STREAM, chat()))
            await until(lambda: server.runtime.in_flight == 2)
            leader.close()
            how, raw = await follower
            assert (how, json.loads(raw)["usage"]["completion_tokens"]) == ("shared", 8)
        await until(lambda: (model.host.running, model.leases) == (0, 0))


async def test_a_follower_that_leaves_costs_nothing_and_when_all_leave_the_engine_stops(serve):
    async with serve("echo:a", toml=SLOW) as server:
        model = server.runtime.pool.find("echo:a")
        long = chat(ignore_eos=True, max_tokens=20_000)
        leader = asyncio.create_task(said(server, STREAM, long))
        await until(lambda: model.host.running == 1)
        followers = [asyncio.create_task(said(server, STREAM, long)) for _ in range(2)]
        await until(lambda: server.runtime.in_flight == 3)
        followers[0].cancel()
        await until(lambda: server.runtime.in_flight == 2)
        assert model.host.running == 1
        leader.cancel()
        followers[1].cancel()
        await until(lambda: (model.host.running, model.leases, server.runtime.in_flight) == (0, 0, 0))
        await until(lambda: cache_of(server).stats()["in_flight"] == 0)
        assert cache_of(server).stats()["entries"] == 0


async def test_who_comes_right_after_a_caller_who_left_is_answered_anew(serve):
    async with serve("echo:a", toml=SLOW) as server:
        model = server.runtime.pool.find("echo:a")
        for _ in range(5):
            gone = asyncio.create_task(said(server, STREAM, chat()))
            await until(lambda: model.host.running == 1)
            gone.cancel()
            how, raw = await said(server, STREAM, chat())
            assert how in ("miss", "shared")  # shared, where the server had not yet heard that the other left
            assert json.loads(raw)["usage"]["completion_tokens"] == 8
            await cache_of(server).clear()


# What fails.


async def test_a_failed_answer_is_never_kept(serve):
    async with serve("echo:a", toml=SLOW) as server:
        for _ in range(2):
            how, raw = await said(server, "/v1/completions", ask(stop="x"))
            assert (how, json.loads(raw)["error"]["param"]) == ("miss", "stop")
        model = server.runtime.pool.find("echo:a")
        tasks = [asyncio.create_task(said(server, STREAM, chat(stream=i == 0))) for i in range(3)]
        await until(lambda: model.host.running == 1 and server.runtime.in_flight == 3)
        os.kill(model.host.pid, signal.SIGKILL)
        for _, raw in await asyncio.gather(*tasks):
            assert b'"engine_died"' in raw
        assert cache_of(server).stats()["entries"] == 0
        await until(lambda: model.state == "loaded" and not model.host.ended.done())
        how, raw = await said(server, STREAM, chat())
        assert (how, json.loads(raw)["usage"]["completion_tokens"]) == ("miss", 8)


# Bounds.


@settings(deadline=None)
@given(
    room=st.integers(1, 6),
    puts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4000), st.floats(0, 6)), max_size=60),
)
def test_memory_never_holds_more_bytes_than_it_may_nor_longer_nor_anything_else(room, puts):
    async def run() -> None:
        clock, bound = Clock(), room * (1000 + OVERHEAD_BYTES)
        kept = MemoryAnswers(bound, 10.0, clock)
        last: dict[str, tuple[bytes, float]] = {}
        for key, size, wait in puts:
            clock.now += wait
            value = os.urandom(1) * size
            await kept.put(str(key), value)
            last[str(key)] = value, clock.now
            assert kept.status()["bytes"] <= bound
            for name, (expected, at) in last.items():
                found = await kept.get(name)
                assert found is None or (found == expected and clock.now < at + 10)
            if size + OVERHEAD_BYTES <= bound:
                assert await kept.get(str(key)) == value

    asyncio.run(run())


async def test_the_answer_that_was_unused_longest_makes_room():
    kept = MemoryAnswers(3 * (100 + OVERHEAD_BYTES), 10.0, Clock())
    for name in "abc":
        await kept.put(name, bytes(100))
    assert await kept.get("a") is not None
    await kept.put("d", bytes(100))
    assert [name for name in "abcd" if await kept.get(name) is not None] == ["a", "c", "d"]


# Redis.


def on_redis(redis: RedisServer, **more: object) -> str:
    lines = "".join(f"{k} = {v}\n" for k, v in more.items())
    return ORDER + f'[middleware.cache]\nstore = "{redis.url}"\n{lines}'


async def test_servers_on_one_redis_share_answers_and_forget_them_together(serve, redis_server):
    toml = on_redis(redis_server)
    async with serve("echo:a", toml=toml) as one, serve("echo:a", toml=toml) as other:
        assert (await said(one, "/v1/embeddings", embed()))[0] == "miss"
        await asyncio.gather(*cache_of(one)._landing)
        with engine_stopped(other):
            how, raw = await said(other, "/v1/embeddings", embed())
        assert (how, json.loads(raw)["usage"]["total_tokens"]) == ("hit", 3)
        assert await other.post("/admin/cache/clear", {}) == (200, {"cleared": 1})
        assert (await said(one, "/v1/embeddings", embed()))[0] == "miss"


async def test_answers_on_redis_expire_and_what_cannot_be_read_there_is_a_miss(serve, redis_server):
    from redis.asyncio import Redis

    async with serve("echo:a", toml=on_redis(redis_server, ttl_seconds=100)) as server:
        await said(server, "/v1/embeddings", embed())
        await asyncio.gather(*cache_of(server)._landing)
        async with Redis.from_url(redis_server.url) as redis:
            (key,) = await redis.keys("hfms:cache:*")
            assert 90_000 < await redis.pttl(key) <= 100_000
            await redis.set(key, b"\x80\x04not msgpack")
        assert (await said(server, "/v1/embeddings", embed()))[0] == "miss"


async def test_without_redis_the_engine_answers_and_status_says_why(serve, redis_server, clock):
    async with serve("echo:a", toml=on_redis(redis_server)) as server:
        cache_of(server)._answers._link._clock = clock
        await said(server, "/v1/embeddings", embed())
        redis_server.stop()
        for _ in range(2):
            how, raw = await said(server, "/v1/embeddings", embed())
            assert (how, json.loads(raw)["usage"]["total_tokens"]) == ("miss", 3)
        section = (await server.get("/status"))[1]["middleware"]["cache"]
        assert (section["store"], section["reachable"]) == ("redis", False)
        redis_server.start()
        clock.now += 2
        assert (await said(server, "/v1/embeddings", embed()))[0] == "miss"
        await asyncio.gather(*cache_of(server)._landing)
        assert (await said(server, "/v1/embeddings", embed()))[0] == "hit"


# Looking at it.


async def test_statistics_and_clearing_are_for_administrators_and_go_with_the_cache(serve):
    async with serve("echo:a", env=KEYS, toml=ORDER) as server:
        user, admin = ({"Authorization": f"Bearer {key}"} for key in (KEY, ADMIN))
        assert (await server.get("/admin/cache/stats"))[0] == 401
        assert (await server.get("/admin/cache/stats", headers=user))[0] == 403
        assert (await server.post("/admin/cache/clear", {}, headers=user))[0] == 403
        for _ in range(3):
            await said(server, "/v1/embeddings", embed(), **user)
        status, stats = await server.get("/admin/cache/stats", headers=admin)
        assert (status, stats["hits"], stats["misses"], stats["entries"]) == (200, 2, 1, 1)
        assert OVERHEAD_BYTES < stats["bytes"] < 2 * OVERHEAD_BYTES
        async with server.session.get(server.url + "/metrics", headers=admin) as response:
            metrics = await response.text()
        assert 'hfms_cache_hits_total{kind="hit"} 2.0' in metrics
        assert "hfms_cache_misses_total 1.0" in metrics
        assert await server.post("/admin/cache/clear", {}, headers=admin) == (200, {"cleared": 1})
        assert (await said(server, "/v1/embeddings", embed(), **user))[0] == "miss"
    async with serve() as server:
        assert (await server.get("/admin/cache/stats"))[0] == 404
        async with server.session.get(server.url + "/metrics") as response:
            assert "hfms_cache" not in await response.text()


async def test_what_is_in_the_air_while_the_cache_is_emptied_is_not_kept(serve):
    async with serve("echo:a", toml=SLOW) as server:
        task = asyncio.create_task(said(server, STREAM, chat()))
        await until(lambda: cache_of(server).stats()["in_flight"] == 1)
        await cache_of(server).clear()
        assert (await task)[0] == "miss"
        await asyncio.gather(*cache_of(server)._landing)
        assert cache_of(server).stats()["entries"] == 0


@pytest.mark.parametrize("prefix", ["HFMS_", "HF_SERVER_"])
def test_the_switch_puts_the_cache_in_its_usual_place(prefix, tmp_path):
    file = tmp_path / "none.toml"
    file.write_text('[middleware]\norder = ["auth", "rate_limit", "breaker"]\n')
    order = load_config(file, environ={f"{prefix}ENABLE_CACHING": "true"}).middleware.order
    assert order == ["auth", "rate_limit", "cache", "breaker"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_bytes = -1", "`max_bytes` is -1, which is not an integer from 1024 to"),
        ("ttl_seconds = 0", "`ttl_seconds` is 0, which is not a number from 0.001"),
        ("ttl = 5", "unknown key `ttl`"),
        ('store = "memcached"', '[middleware.cache] store must be "memory" or'),
    ],
)
async def test_a_bad_setting_stops_the_start_and_says_what_was_meant(serve, line, said):
    with pytest.raises(ConfigError) as refused:
        async with serve(toml=ORDER + f"[middleware.cache]\n{line}\n"):
            raise AssertionError("it started")
    assert said in refused.value.message
