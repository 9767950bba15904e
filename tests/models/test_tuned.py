"""What `hfms models tune` has found, kept and used."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hfms_cli.models.tuned import Choice, Tuned, TunedStore, fingerprint
from hfms_cli.types import Device, Manifest, ModelFile, ModelName

MANIFEST = Manifest(name=ModelName("", "a/b"), storage="x", revision="1", files=(ModelFile("w", 3),))
CPU = Device(id="cpu", kind="cpu", name="Fast", total_bytes=2**34, free_bytes=2**33)
FAST, MANY = Choice(engine="one", device="cpu"), Choice(engine="two", device="cpu", options={"threads": 3})


@pytest.fixture
def store(tmp_path) -> TunedStore:
    return TunedStore(tmp_path)


def keep(store: TunedStore, now: dict[str, str], **best: Choice):
    return store.save(MANIFEST, Tuned(model="a/b", fingerprint=now, best=best))


NOW = fingerprint([CPU], [])


def test_auto_takes_throughput_and_latency_where_only_that_was_tuned(store):
    keep(store, NOW, latency=FAST, throughput=MANY)
    assert store.find(MANIFEST, "auto", NOW) == ("throughput", MANY)
    assert store.find(MANIFEST, "latency", NOW) == ("latency", FAST)
    keep(store, NOW, latency=FAST)
    assert store.find(MANIFEST, "auto", NOW) == ("latency", FAST)
    assert store.find(MANIFEST, "throughput", NOW) is None


def test_a_record_is_of_the_models_bytes_and_not_of_its_name(store):
    keep(store, NOW, latency=FAST)
    assert store.find(replace(MANIFEST, name=ModelName("", "c/d")), "auto", NOW) == ("latency", FAST)
    assert store.find(replace(MANIFEST, revision="2"), "auto", NOW) is None


@pytest.mark.parametrize(
    "devices",
    [[replace(CPU, name="Slow")], [replace(CPU, total_bytes=2**35)], [CPU, replace(CPU, id="cuda:0", kind="cuda")]],
)
def test_a_record_of_another_machine_is_passed_over(store, devices):
    keep(store, NOW, latency=FAST)
    assert store.find(MANIFEST, "auto", fingerprint(devices, [])) is None


def test_what_else_is_free_now_makes_no_other_machine():
    assert fingerprint([replace(CPU, free_bytes=1)], []) == NOW


def test_a_record_of_other_versions_is_passed_over(store):
    class Engine:
        packages = ("pytest", "no-such-package")

    now = fingerprint([CPU], [Engine()])
    assert (now["pytest"], now["no-such-package"]) == (pytest.__version__, "not installed")
    keep(store, now | {"pytest": "1.0"}, latency=FAST)
    assert store.find(MANIFEST, "auto", now) is None


def test_a_torn_record_is_passed_over_and_a_new_one_replaces_it(store):
    file = keep(store, NOW, latency=FAST)
    file.write_bytes(file.read_bytes()[:20])
    assert store.find(MANIFEST, "auto", NOW) is None
    keep(store, NOW, latency=MANY)
    assert store.find(MANIFEST, "auto", NOW) == ("latency", MANY)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("choice", "asked", "kept"),
    [
        (FAST, ("auto", "auto"), True),
        (FAST, ("float32", "auto"), False),
        (replace(FAST, dtype="float32"), ("float32", "auto"), True),
        (replace(FAST, quantize="int8"), ("auto", "none"), False),
        (replace(FAST, quantize="int8"), ("auto", "int8"), True),
    ],
)
def test_a_choice_is_used_only_where_nothing_else_was_asked_for(choice, asked, kept):
    assert choice.keeps_to(*asked) is kept


async def remember(serve, choice: Choice) -> None:
    """Keep a choice for `echo:a`, as a tuning would."""
    async with serve() as server:
        loader = server.runtime.pool.loader
        manifest, _ = await loader.router.find(ModelName("echo", "a"))
        loader.tuned.save(manifest, Tuned(model="echo:a", fingerprint=loader.fingerprint(), best={"latency": choice}))


async def test_a_tuned_choice_is_in_force_and_get_models_says_so(serve):
    await remember(serve, Choice(engine="echo", device="cpu", options={"max_batch": 3}))
    async with serve("echo:a") as server:
        _, body = await server.get("/models")
        row = next(r for r in body["data"] if r["id"] == "echo:a")
        assert row["tuned"] == "latency"
        assert server.runtime.pool.find("echo:a").hosts[0].info.max_batch == 3


async def test_what_the_operator_has_set_wins_over_what_was_tuned(serve):
    await remember(serve, Choice(engine="echo", device="cpu", options={"max_batch": 3}))
    async with serve("echo:a", toml="[engine.echo]\nmax_batch = 5") as server:
        assert server.runtime.pool.find("echo:a").hosts[0].info.max_batch == 5
    async with serve("echo:a", toml='[models]\nprofile = "throughput"') as server:
        _, body = await server.get("/models")
        assert not any("tuned" in row for row in body["data"])


async def test_a_tuned_engine_that_cannot_load_any_more_gives_way(serve):
    await remember(serve, Choice(engine="echo", device="cpu", options={"no_such_option": 1}))
    async with serve("echo:a") as server:
        _, body = await server.get("/models")
        row = next(r for r in body["data"] if r["id"] == "echo:a")
        assert (row["status"]["value"], "tuned" in row) == ("loaded", False)


async def test_an_engine_that_cannot_quantise_refuses_by_name(serve):
    async with serve() as server:
        status, body = await server.post("/models/load", {"model": "echo:a", "quantize": "int4"})
        assert status == 503
        assert "echo on cpu: it cannot make int4 weights" in body["error"]["message"]
        status, body = await server.post("/models/load", {"model": "echo:b", "quantize": "int3"})
        assert (status, body["error"]["param"]) == (400, "quantize")
        status, body = await server.post("/models/load", {"model": "echo:c", "quantize": "none"})
        assert (status, body["quantize"]) == (200, "none")
