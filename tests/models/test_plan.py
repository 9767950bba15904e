"""`hfms models plan`: what is known of a model before any of it is fetched, and where it would fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from hfms_cli import Device, LoadRequest, ModelName, Probe
from hfms_cli.config import load_config
from hfms_cli.errors import Unsupported
from hfms_cli.models.inspect import inspect
from hfms_cli.models.names import parse
from hfms_cli.models.plan import Plan, Served, look, options, served_by
from hfms_cli.models.router import Router
from hfms_cli.plugins import discover
from tests.storage.conftest import hf_cache, hub, hub_client, model  # noqa: F401
from tests.storage.hub import Repo
from tests.storage.verbs import hfms

MIB = 2**20
NOTHING = Served()
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}


class Machine:
    """Hardware with so much free memory."""

    name = "cpu"

    def __init__(self, free: int) -> None:
        self.free = free

    def probe(self) -> Probe:
        device = Device(
            id="cpu", kind="cpu", name="CPU", total_bytes=64 * 2**30, free_bytes=self.free, torch_device="cpu"
        )
        return Probe((device,))


def engines(names: list[str]) -> list[Any]:
    config = load_config(None, environ={"HFMS_OPTIONS": ""})
    plugins = discover(config)
    return [plugins.create("engine", name, config) for name in names]


def planned(seen: Any, free: int, served: Served = NOTHING, names: tuple[str, ...] = ("transformers",)) -> Plan:
    return options(seen, load_config(None, environ={}), engines([*names]), [Machine(free)], served)


@pytest.fixture
def large() -> dict[str, bytes]:
    """Three million parameters in two shards."""
    parts = {f"model-0000{i}-of-00002.safetensors": {f"w{i}": np.zeros((1500, 1000), np.float32)} for i in (1, 2)}
    index = {"weight_map": {name: part for part, tensors in parts.items() for name in tensors}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}" * 100_000,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{part: save(tensors) for part, tensors in parts.items()},
    }


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    """A GGUF whose header is longer than what is fetched of it at first."""
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_token_list([f"token {i}" for i in range(200_000)])
    writer.add_tensor("a", np.zeros((1024, 1024), np.float32))
    writer.add_tensor("b", np.zeros((2048, 2048), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


# What is not on this disk.


async def test_a_model_that_is_not_here_is_known_by_its_headers(hub, hf_cache, large):  # noqa: F811
    hub.repos["org/large"] = Repo(large)
    router = Router([hf_cache])
    seen = await look(router, ModelName("", "org/large"))
    assert (seen.here, seen.to_fetch, seen.card.parameters) == (False, sum(map(len, large.values())), 3_000_000)
    assert sum(n for _, _, n in hub.sent) < 10_000
    assert not hf_cache.root.exists()
    manifest, folder = await router.pull(ModelName("", "org/large"), lambda done, total: None)
    assert seen.card == inspect(folder, [f.path for f in manifest.files])
    here = await look(router, ModelName("", "org/large"))
    assert (here.here, here.to_fetch, here.card) == (True, 0, seen.card)


async def test_an_openvino_model_that_is_not_here_is_known_by_its_graph(hub, hf_cache, large):  # noqa: F811
    graph = b'<net><data element_type="f16" shape="1000, 500" offset="0" size="1000000"/></net>'
    files = {"config.json": large["config.json"], "openvino_model.xml": graph, "openvino_model.bin": bytes(10**6)}
    hub.repos["org/graph"] = Repo(files)
    router = Router([hf_cache])
    seen = await look(router, parse("org/graph"))
    assert (seen.card.format, seen.card.parameters, seen.card.dtype) == ("openvino", 500_000, "float16")
    assert sum(n for _, _, n in hub.sent) < 1000
    manifest, folder = await router.pull(parse("org/graph"), lambda done, total: None)
    assert seen.card == inspect(folder, [f.path for f in manifest.files])


async def test_a_gguf_that_is_not_here_is_known_by_its_header_however_long(hub, hf_cache, gguf):  # noqa: F811
    hub.repos["org/gguf"] = Repo({"m-Q8_0.gguf": gguf, "m-Q4_0.gguf": b"GGUF"})
    router = Router([hf_cache])
    seen = await look(router, parse("org/gguf:Q8_0"))
    assert MIB < sum(n for _, _, n in hub.sent) < len(gguf) / 2
    manifest, folder = await router.pull(parse("org/gguf:Q8_0"), lambda done, total: None)
    assert seen.card == inspect(folder, [f.path for f in manifest.files])
    assert seen.card.parameters == 1024 * 1024 + 2048 * 2048


async def test_a_gguf_in_parts_that_is_not_here_is_known_by_the_headers_of_all_of_them(
    hub,  # noqa: F811
    hf_cache,  # noqa: F811
    tmp_path,
):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m-F32.gguf", "llama", split_max_tensors=1)
    for name in "abc":
        writer.add_tensor(name, np.zeros((1024, 1024), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.repos["org/parts"] = Repo({p.name: p.read_bytes() for p in tmp_path.glob("*.gguf")})
    seen = await look(Router([hf_cache]), parse("org/parts:F32"))
    assert (len(seen.card.weights), seen.card.parameters, seen.to_fetch > 12 * MIB) == (3, 3 * 2**20, True)
    manifest, folder = await Router([hf_cache]).pull(parse("org/parts:F32"), lambda done, total: None)
    assert seen.card == inspect(folder, [f.path for f in manifest.files])


async def test_a_source_that_knows_no_ranges_is_planned_all_the_same(hub, hf_cache, large):  # noqa: F811
    hub.repos["org/large"], hub.rangeless = Repo(large), True
    assert (await look(Router([hf_cache]), ModelName("", "org/large"))).card.parameters == 3_000_000


async def test_a_storage_that_sends_no_parts_says_what_to_do(hub, hf_cache, monkeypatch):  # noqa: F811
    monkeypatch.delattr(type(hf_cache), "peek")
    with pytest.raises(Unsupported, match="`hfms models pull org/tiny` first"):
        await look(Router([hf_cache]), ModelName("", "org/tiny"))


# Where it fits.


async def test_what_a_plan_says_is_what_a_load_would_set_aside(hub, hf_cache, large):  # noqa: F811
    hub.repos["org/large"] = Repo(large)
    seen = await look(Router([hf_cache]), ModelName("", "org/large"))
    names = ("transformers", "openvino")
    device = Machine(8 * 2**30).probe().devices[0]
    for option in planned(seen, 8 * 2**30, names=names).options:
        (engine,) = engines([option.engine])
        request = LoadRequest(Path("/"), seen.card, device, option.dtype, quantize=option.quantize)
        assert option.total == engine.estimate(request)
        assert option.parts.total == option.total
    assert {o.engine for o in planned(seen, 8 * 2**30, names=names).options} == {*names}


async def test_a_model_fits_where_there_is_room_and_nowhere_else(hub, hf_cache, large):  # noqa: F811
    hub.repos["org/large"] = Repo(large)
    seen = await look(Router([hf_cache]), ModelName("", "org/large"))
    roomy = planned(seen, 2**34)
    assert roomy.best is not None
    assert roomy.best.usual
    assert roomy.best.unload == ()
    assert planned(seen, 10 * MIB).best is None
    least = min(o.total for o in planned(seen, 10 * MIB).options)
    assert planned(seen, least).best is not None
    assert planned(seen, least - 1).best is None


async def test_a_running_servers_idle_model_is_named_where_its_end_makes_room(serve, hub, hf_cache, large):  # noqa: F811
    hub.repos["org/large"] = Repo(large)
    seen = await look(Router([hf_cache]), ModelName("", "org/large"))
    async with serve("echo:a") as server:
        _, answer = await server.get("/models")
    devices = Machine(0).probe().devices
    served = served_by(answer["data"], devices)
    assert [h.id for h in served.held] == ["echo:a"]
    needs = min(o.total for o in planned(seen, 10 * MIB).options)
    gives = served.held[0].frees["cpu"]
    assert gives > MIB
    free = needs - gives // 2 + served.promised.get("cpu", 0)
    best = planned(seen, free, served).best
    assert best is not None
    assert best.unload == ("echo:a",)
    assert planned(seen, needs - 2 * gives, served).best is None


# The verb.


async def test_the_verb_tells_by_its_exit_status_whether_the_model_fits(hub, large, tmp_path, environ):  # noqa: F811
    hub.repos["org/large"] = Repo(large)
    env = environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HFMS_PORT": "1", "PATH": sys.prefix + "/bin"}
    status, out, err = await hfms(env, "plan", "org/large", "--json")
    told = json.loads(out)
    assert (status, told["fits"], told["on_disk"], told["server"]) == (0, True, False, None), err
    assert told["weights_bytes"] == 12_000_000
    assert [o["best"] for o in told["options"]].count(True) == 1
    status, out, _ = await hfms(env, "plan", "org/large")
    assert status == 0
    assert "to fetch" in out
    assert "It fits on cpu by " in out
