"""The transformers engine with its cache in blocks: the tokens of `generate`, whatever is shared, cut or sent back.

Its logprobs and its structured answers are tested with those of the other engines."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli import Device
from hfms_engines.blocks import Blocks
from hfms_engines.paged import PagedScheduler
from hfms_engines.slots import SlotScheduler

# Before torch, whose environment it sets.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)

import torch

from hfms_engines import torch_paged
from tests.engines import tiny
from tests.engines.driving import ask, call, drain, gguf_card, prompts
from tests.engines.test_generation import check_equality, expected, load

SMALL = 4 * 2**20
"""Bytes: thousands of a tiny model's tokens."""


def paged(folder: Path, **options) -> PagedScheduler:
    model = load(folder, **{"cache": "paged", "max_batch": 4, "prefill_tokens": 24, "kv_cache_bytes": SMALL} | options)
    assert isinstance(model, PagedScheduler)
    return model


@pytest.fixture(scope="module")
def model(llama) -> PagedScheduler:
    """Shared, so tests leave it idle."""
    return paged(llama)


@pytest.fixture
def read(model, monkeypatch) -> list[list[int]]:
    """How many tokens of each sequence every pass reads."""
    seen: list[list[int]] = []
    forward = model._runner.forward

    def watched(pieces, **rest):
        seen.append([len(p) for p in pieces])
        return forward(pieces, **rest)

    monkeypatch.setattr(model._runner, "forward", watched)
    return seen


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_tokens_equal_those_of_generate_alone_and_in_a_changing_batch(name, tmp_path, made):
    check_equality(paged(tiny.save(tmp_path, tiny.ARCHITECTURES[name]())), made)


@pytest.mark.real_model
def test_smollm2_says_what_generate_says_from_blocks(smollm2, made):
    model = paged(smollm2, about=gguf_card(smollm2), prefill_tokens=32, kv_cache_bytes=2**27)
    check_equality(model, made, lengths=(5, 70, 33), new=16)


def test_a_prompt_that_begins_as_one_before_it_is_read_from_where_they_differ(model, read, made):
    begin, one, other = prompts(48, 9, 9, seed=5)
    model.submit(call("first", begin + one))
    drain(model)
    del read[:]
    model.submit(call("second", begin + other))
    drain(model)
    assert read[0] == [9]
    assert made["second", 0] == expected(model, begin + other, 8)


def test_a_long_prompt_is_read_in_pieces_beside_answers_under_way(model, read, made):
    short, long = prompts(5, 100, seed=6)
    model.submit(call("short", short, max_tokens=20))
    model.step()
    model.step()
    model.submit(call("long", long))
    drain(model)
    assert sum(1 in lengths and max(lengths) > 1 for lengths in read) >= 4
    assert max(map(sum, read)) <= 24 + 1
    assert (made["short", 0], made["long", 0]) == (expected(model, short, 20), expected(model, long, 8))


def test_sequences_that_outgrow_the_blocks_wait_again_and_lose_nothing(llama, made, monkeypatch):
    token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    model = paged(llama, kv_cache_bytes=256 * token)
    sent_back: list[object] = []
    send = model._send_back

    def watched(seq):
        sent_back.append(seq)
        send(seq)

    monkeypatch.setattr(model, "_send_back", watched)
    some = prompts(60, 50, 40, 30, seed=7)
    for i, prompt in enumerate(some):
        model.submit(call(f"{i}", prompt, max_tokens=60))
    drain(model)
    assert sent_back
    for i, prompt in enumerate(some):
        assert made[f"{i}", 0] == expected(model, prompt, 60)
    assert model._blocks.free == model._blocks.count


def test_blocks_that_were_never_written_to_take_no_memory(llama, made):
    process = psutil.Process()
    before = process.memory_info().rss
    model = paged(llama, kv_cache_bytes=2**32)
    ask(model, [5, 6, 7])
    assert process.memory_info().rss - before < 2**30


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_from_blocks(llama, dtype):
    model = paged(llama, dtype=dtype)
    assert model.info.dtype == dtype
    assert ask(model, [5, 6, 7], ignore_eos=True).tokens("a") == 8


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 300)), min_size=1, max_size=12))
def test_no_run_of_the_model_looks_at_more_blocks_than_the_cache_has(model, pieces):
    """Rows are filled up to the longest, and one that is long beside many that are short would fill the memory."""
    runner = copy(model._runner)
    runner.blocks = Blocks(20, torch_paged.BLOCK)
    runs = runner._runs([[0] * width for width, _ in pieces], [start for _, start in pieces])
    assert sorted(i for run in runs for i in run) == list(range(len(pieces)))
    for run in runs:
        (width,) = {pieces[i][0] for i in run}
        assert len(run) * max(runner.blocks.needed(pieces[i][1] + width) for i in run) <= 20


def test_a_batch_that_takes_several_runs_says_what_one_says(model, made, monkeypatch):
    some = prompts(9, 150, 40, 12, seed=8)
    wanted = [expected(model, p, 12) for p in some]
    more: list[int] = []
    """Runs of each pass beyond those that its lengths need."""
    split = model._runner._runs

    def watched(pieces, starts):
        runs = split(pieces, starts)
        more.append(len(runs) - len(set(map(len, pieces))))
        return runs

    monkeypatch.setattr(model._runner, "_runs", watched)
    monkeypatch.setattr(model._runner.blocks, "count", 20)
    for i, prompt in enumerate(some):
        model.submit(call(f"{i}", prompt, max_tokens=12))
    drain(model)
    assert [made[f"{i}", 0] for i in range(4)] == wanted
    assert max(more) == 1


def test_cancelling_frees_the_blocks_and_leaves_the_others_alone(model, made):
    gone, stays = prompts(30, 20, seed=9)
    model.submit(call("gone", gone, max_tokens=50))
    model.submit(call("stays", stays, max_tokens=12))
    for _ in range(4):
        model.step()
    model.cancel("gone")
    drain(model)
    assert made["stays", 0] == expected(model, stays, 12)
    assert model._blocks.free == model._blocks.count


def test_a_model_that_blocks_do_not_carry_runs_in_slots_and_says_so(llama, monkeypatch, caplog):
    """No known model is such, so this one's cache forgets what it is given."""
    monkeypatch.setattr(torch_paged._Pages, "update", lambda self, keys, values, *rest, **more: (keys, values))
    model = load(llama, cache="paged", max_batch=4, prefill_tokens=24, kv_cache_bytes=SMALL)
    assert isinstance(model, SlotScheduler)
    assert model.info.batching == "slots"
    assert "runs in slots instead" in caplog.text


def test_blocks_are_for_gpus_unless_asked_for(llama, model):
    assert load(llama).info.batching == "slots"
    assert model.info.batching == "paged"


class Uncaptured(torch_paged.Graphs):
    """The fixed shapes and buffers of graphs, run again instead of replayed, as far as a CPU can."""

    def capture(self, ids, place):
        return lambda: self._runner.run_at(ids, place, 1)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_fixed_shapes_change_no_token(name, tmp_path, made):
    model = paged(tiny.save(tmp_path, tiny.ARCHITECTURES[name]()))
    runner = model._runner
    runner.use_graphs(graphs := Uncaptured(runner))
    check_equality(model, made)
    assert runner.graphs is graphs
    assert all(n & (n - 1) == 0 for shape in graphs.captured for n in shape)
    assert 1 < len(graphs.captured) < 12


class Stale(Uncaptured):
    """Replays what it was captured with, whatever it is asked since."""

    def capture(self, ids, place):
        return super().capture(ids.clone(), place)


class Full(Uncaptured):
    """There is memory for one graph, and no more."""

    def capture(self, ids, place):
        if self.captured:
            raise MemoryError
        return super().capture(ids, place)


@pytest.mark.parametrize(("kind", "why"), [(Stale, "it answers otherwise"), (Full, "MemoryError")])
def test_a_model_that_cannot_be_captured_runs_without_graphs_and_says_so(kind, why, llama, made, caplog):
    model = paged(llama)
    model._runner.use_graphs(kind(model._runner))
    check_equality(model, made)
    assert model._runner.graphs is None
    assert f"LlamaForCausalLM runs without CUDA graphs: {why}." in caplog.text


# --- on a GPU ---


@pytest.fixture(scope="module")
def gpu() -> Device:
    return Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=2**34, free_bytes=2**33, torch_device="cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_gpu_makes_the_tokens_that_generate_makes_from_blocks(name, tmp_path, made, gpu):
    folder = tiny.save(tmp_path, tiny.ARCHITECTURES[name]())
    check_equality(paged(folder, cache="auto", device=gpu), made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_a_gpu_decodes_by_graphs(llama, made, gpu):
    model = paged(llama, cache="auto", device=gpu)
    check_equality(model, made)
    assert model._runner.graphs.captured
