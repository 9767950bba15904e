"""The race, over real worker processes of the echo engine, whose speed is an option."""

from __future__ import annotations

import pytest

from hfms_cli.errors import BadRequest, LoadFailed
from hfms_cli.models import names
from hfms_cli.models.loader import Wish
from hfms_cli.tune.candidates import Knobs
from hfms_cli.tune.roofline import Roofline
from hfms_cli.tune.session import Plan, Tuner
from tests.conftest import workers

MACHINE = Roofline(bytes_per_second=1e9)
PLAN = Plan(concurrency=4, output_len=8, repeats=2)
ECHO = names.parse("echo:a")


def tuner(server, plan: Plan = PLAN, **knobs: int) -> Tuner:
    return Tuner(server.runtime.pool.loader, {"echo": Knobs(knobs)}, plan)


async def test_the_best_is_remembered_and_the_next_load_is_run_so(serve):
    async with serve(toml="[engine.echo]\nstep_ms = 2") as server:
        result = await tuner(server, max_batch=64).tune(ECHO, Wish(), MACHINE)
        assert set(result.best) == {"latency", "throughput"}
        # The whole batch at once is faster than half of it after the other half, by much more than noise.
        assert result.best["throughput"].choice.options.get("max_batch") in (None, 4)
        assert not workers()
        model = await server.runtime.pool.load("echo:a")
        assert model.replicas[0].placement.candidates[0].tuned == "throughput"


async def test_every_candidate_is_asked_the_same_and_duplicates_are_dropped(serve):
    async with serve() as server:
        result = await tuner(server).tune(ECHO, Wish(), MACHINE)
        [trial] = result.trials  # `auto`, `float32` and `bfloat16` are one to this engine
        assert [len(trial.runs[width]) for width in (1, 4)] == [2, 2]
        assert all(o.output_tokens == 8 for runs in trial.runs.values() for run in runs for o in run.outcomes)
        [row] = result.as_json()["trials"]
        assert row["best_for"] == ["latency", "throughput"]
        assert row["output_tokens_per_second"] > 0
        assert row["ttft_ms"] > 0
        assert row["memory_bytes"] > 0


async def test_one_at_a_time_tunes_for_latency_only(serve):
    async with serve() as server:
        result = await tuner(server, Plan(concurrency=1, output_len=4, repeats=1)).tune(ECHO, Wish(), MACHINE)
        assert set(result.best) == {"latency"}
        model = await server.runtime.pool.load("echo:a")
        assert model.replicas[0].placement.candidates[0].tuned == "latency"


class Rounding:
    """An engine that says it quantises, and whose worker is the echo engine's under another name."""

    name, plugin = "grumpy", "hfms_engines"
    tasks = ("generate",)
    quantizes = ("int8",)

    def supports(self, card, device):
        return None

    def estimate(self, request):
        return 0


async def test_what_cannot_be_loaded_is_told_with_the_reason_and_the_others_are_measured(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        loader._engines = [Rounding(), *loader._engines]
        result = await tuner(server).tune(ECHO, Wish(), MACHINE)
        assert {choice.engine for choice, _ in result.failures} == {"grumpy"}
        assert {choice.quantize for choice, _ in result.failures} == {"auto", "int8"}
        assert [t.choice.engine for t in result.trials] == ["echo"]


async def test_where_nothing_runs_nothing_is_remembered(serve):
    async with serve() as server:
        loader = server.runtime.pool.loader
        loader._engines = [Rounding()]
        with pytest.raises(LoadFailed, match="grumpy"):
            await tuner(server).tune(ECHO, Wish(), MACHINE)
        manifest, _ = await loader.router.find(ECHO)
        assert loader.tuned.find(manifest, "auto", loader.fingerprint()) is None


async def test_a_model_that_writes_no_text_is_refused(serve, monkeypatch):
    from hfms_cli.models import loader as module

    embeds = module.inspect

    async with serve() as server:
        monkeypatch.setattr(module, "inspect", lambda *args: module.replace(embeds(*args), tasks=("embed",)))
        with pytest.raises(BadRequest, match="does not generate text"):
            await tuner(server).tune(ECHO, Wish(), MACHINE)
