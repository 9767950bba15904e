"""What engines say that a model takes, against what its worker process takes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from hfms_cli import Call, Device, LoadRequest, Sampling
from hfms_cli.engines.host import EngineHost, HostOptions
from hfms_cli.models import names
from hfms_cli.models.inspect import inspect
from hfms_engines.generation import GenerationEngine, GenerationOptions
from hfms_engines.memory import MIB, cache_bytes
from hfms_engines.openvino import OpenVinoEngine, OpenVinoOptions
from tests.conftest import SMOLLM2
from tests.engines import tiny

pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("openvino", exc_type=ImportError)

CPU = Device(id="cpu", kind="cpu", name="this machine", total_bytes=2**34, free_bytes=2**33, torch_device="cpu")
MEDIUM = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
MEDIUM |= {"num_key_value_heads": 4, "head_dim": 64, "initializer_range": 0.02}


def test_a_cache_takes_what_was_asked_for_or_a_quarter_of_what_is_free_beside_the_rest(tmp_path):
    request = LoadRequest(folder=tmp_path, card=inspect(tiny.save(tmp_path, tiny.ARCHITECTURES["llama"]())), device=CPU)
    assert cache_bytes(request, 0, held=2**32) == 2**30
    assert cache_bytes(request, 7, held=2**32) == 7
    assert cache_bytes(request, 0, held=2**34) == 0


@pytest.fixture(scope="module")
def random_models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tiny": tiny.save(root / "tiny", tiny.ARCHITECTURES["llama"]()),
        "medium": tiny.save(root / "medium", tiny._config("llama", **MEDIUM)()),
    }


ENGINES = [
    ("transformers", "auto", "none"),
    ("openvino", "auto", "none"),
    ("openvino", "float32", "int8"),
    ("openvino", "auto", "int4"),
]


@pytest.mark.parametrize(("engine", "dtype", "quantize"), ENGINES)
@pytest.mark.parametrize(("name", "cache"), [("tiny", 1), ("medium", 16)])
async def test_an_estimate_is_within_a_tenth_of_what_a_random_model_takes(
    random_models, name, cache, engine, dtype, quantize, tmp_path_factory
):
    folder = random_models[name]
    estimate, taken = await measured(folder, engine, dtype, quantize, cache * MIB, tmp_path_factory.mktemp("cache"))
    assert estimate == pytest.approx(taken, rel=0.1)


@pytest.mark.real_model
@pytest.mark.parametrize(("engine", "dtype", "quantize"), ENGINES)
async def test_an_estimate_is_within_a_tenth_of_what_smollm2_takes(serve, model_cache, engine, dtype, quantize):
    async with serve() as server:
        _, folder = await server.runtime.router.pull(names.parse(SMOLLM2), lambda done, total: None)
    estimate, taken = await measured(folder, engine, dtype, quantize, 64 * MIB, model_cache)
    assert estimate == pytest.approx(taken, rel=0.1)


async def measured(
    folder: Path, engine: str, dtype: str, quantize: str, cache: int, cache_dir: Path
) -> tuple[int, int]:
    """The estimate, and the most that the worker held while calls filled its cache. Bytes."""
    options = {"kv_cache_bytes": cache}
    if engine == "openvino":
        options |= {"cache_dir": str(cache_dir), "speculative_tokens": 0}
        estimating = OpenVinoEngine(OpenVinoOptions(**options))
    else:
        estimating = GenerationEngine(GenerationOptions(**options))
    card = inspect(folder, [f.name for f in folder.iterdir()])
    request = LoadRequest(
        folder=folder, card=card, device=CPU, dtype=dtype, quantize="auto" if quantize == "none" else quantize
    )
    host = await EngineHost.start("m", request, HostOptions(engine, options, "hfms.toml", "hfms_engines"))
    process = psutil.Process(host.pid)
    # A first load converts elsewhere, so here there is no torch either.
    assert any("libtorch" in m.path for m in process.memory_maps()) == (engine != "openvino")
    most = 0

    async def ask(number: int) -> None:
        nonlocal most
        prompt = [(number * 7 + i * 13) % 300 for i in range(100)]
        sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
        async for _ in host.submit(
            Call(id=str(number), model="m", task="generate", inputs=[prompt], sampling=sampling)
        ):
            most = max(most, process.memory_info().rss)

    try:
        for half in range(2):
            await asyncio.gather(*(ask(12 * half + i) for i in range(12)))
    finally:
        await host.close()
    return estimating.estimate(request), most
