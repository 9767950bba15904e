"""Whole measurements of a real hfms server with the echo engine, where every count is known beforehand."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest

from hfms_cli.bench.dataset import Dataset, DatasetName, Lengths, Numbers, Prompts, builtin
from hfms_cli.bench.load import Endpoint, Load
from hfms_cli.bench.measure import Outcome, Wanted
from hfms_cli.bench.session import Session, Target

ECHO = '[storage]\norder = ["echo"]\n[engine]\norder = ["echo"]\n[engine.echo]\nstep_ms = 1\n'


@contextlib.contextmanager
def quiet(label: str, total: int) -> Iterator[Callable[[Outcome], None]]:
    yield lambda _: None


def session(*targets: Target, **more: object) -> Session:
    asked = Prompts(DatasetName.BUILTIN, None, 9, Lengths(50, 9), unique=True, seed=1)
    settings = {
        "endpoint": Endpoint.CHAT,
        "sampling": {"ignore_eos": True, "temperature": 0.0},
        "loads": [Load(4)],
        "repeats": 1,
        "num_prompts": 12,
        "num_warmups": 2,
        "prompts": asked,
        "wanted": Wanted(goodput={"e2el": 1e9}),
    }
    return Session(list(targets), **(settings | more))


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
@pytest.mark.parametrize("load", [Load(1), Load(4), Load(request_rate=1000.0), Load()])
async def test_counts_are_exact_under_every_load(serve, endpoint, load):
    async with serve("echo:a", toml=ECHO) as server:
        made = session(Target(server.url, "echo:a"), endpoint=endpoint, loads=[load])
        await made.measure(quiet)
    result = made.results()
    # A token of the echo is a word, and each answer has as many as were asked for.
    words = sum(len(p.text.split()) for p in Dataset(builtin(9), Numbers(1)).take(12))
    assert (result["completed"], result["failed"], result["errors"]) == (12, 0, {})
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (words, 12 * 9)
    assert result["request_goodput"] == result["request_throughput"] == 12 / result["duration"]
    for outcome in made.measured[0].run.outcomes:
        assert outcome.sent <= outcome.times[0] <= outcome.times[-1] <= outcome.ended
        assert len(outcome.times) == 9
        assert outcome.tpot * 8 + outcome.ttft == pytest.approx(outcome.e2el)


async def test_embeddings_are_measured(serve):
    async with serve("echo:a", toml=ECHO) as server:
        made = session(Target(server.url, "echo:a"), endpoint=Endpoint.EMBEDDINGS, sampling={})
        await made.measure(quiet)
    result = made.results()
    assert (result["completed"], result["backend"]) == (12, "openai-embeddings")
    assert result["total_input_tokens"] > 0


async def test_random_prompts_are_exactly_as_long_as_asked_where_a_word_is_a_token(serve):
    asked = Prompts(DatasetName.RANDOM, None, None, Lengths(50, 7), unique=True, seed=1)
    async with serve("echo:a", toml=ECHO) as server:
        made = session(Target(server.url, "echo:a"), prompts=asked)
        await made.measure(quiet)
    assert {(o.prompt_tokens, o.output_tokens) for o in made.measured[0].run.outcomes} == {(50, 7)}
    assert made.results()["length_unit"] == "tokens"


async def test_several_loads_make_an_array_of_results_in_their_order(serve):
    async with serve("echo:a", toml=ECHO) as server:
        made = session(Target(server.url, "echo:a"), loads=[Load(1), Load(3)], num_prompts=4)
        await made.measure(quiet)
    assert [(r["max_concurrency"], r["completed"]) for r in made.results()] == [(1, 4), (3, 4)]


async def test_two_targets_take_turns_and_are_asked_the_same(serve):
    labels = []

    @contextlib.contextmanager
    def noted(label: str, total: int) -> Iterator[Callable[[Outcome], None]]:
        labels.append(label)
        yield lambda _: None

    async with serve("echo:a", "echo:b", toml=ECHO) as server:
        targets = [Target(server.url, "echo:a"), Target(server.url, "echo:b")]
        made = session(*targets, loads=[Load(2), Load(4)], repeats=3, num_prompts=4)
        await made.measure(noted)
    turns = [f"c={c} {which} {n}/3" for c, n, which in itertools.product((2, 4), (1, 2, 3), "AB")]
    assert labels == turns
    result = made.results()
    assert [(r["target"], r["repeat"], r["model_id"]) for r in result["runs"]][:2] == [
        ("A", 1, "echo:a"),
        ("B", 1, "echo:b"),
    ]
    for compared, width in zip(result["comparison"], (2, 4), strict=True):
        assert (compared["max_concurrency"], compared["pairs"]) == (width, 3)
        assert compared["ratio"]["completed"] == compared["ratio"]["total_input_tokens"] == 1.0
        assert compared["A"]["total_output_tokens"] == compared["B"]["total_output_tokens"] == 4 * 9
        pairs = zip(
            *(
                [r["duration"] for r in result["runs"] if r["max_concurrency"] == width and r["target"] == t]
                for t in "AB"
            ),
            strict=True,
        )
        assert compared["ratio"]["duration"] == sorted(a / b for a, b in pairs)[1]


async def test_stopped_run_counts_in_a_comparison_only_where_there_is_no_other(serve):
    async with serve("echo:a", "echo:b", toml=ECHO) as server:
        made = session(Target(server.url, "echo:a"), Target(server.url, "echo:b"), repeats=2, num_prompts=2)
        await made.measure(quiet)
    made.measured[-1].run.whole = False  # B's second
    assert made.compared(made.loads[0])["pairs"] == 1
    for measured in made.measured:
        measured.run.whole = False
    assert made.compared(made.loads[0])["pairs"] == 2


async def test_two_loads_that_are_alike_are_compared_apart(serve):
    async with serve("echo:a", "echo:b", toml=ECHO) as server:
        targets = [Target(server.url, "echo:a"), Target(server.url, "echo:b")]
        made = session(*targets, loads=[Load(2), Load(2)], num_prompts=2)
        await made.measure(quiet)
    assert [c["pairs"] for c in made.results()["comparison"]] == [1, 1]


async def test_model_that_is_not_there_is_counted_by_status_with_the_reason(serve):
    async with serve("echo:a", toml=ECHO) as server:
        made = session(Target(server.url, "echo:nobody"))
        await made.measure(quiet)
    result = made.results()
    assert (result["completed"], result["failed"], list(result["errors"].values())) == (0, 12, [12])
    ((kind, reason),) = made.measured[0].run.failures.items()
    assert kind in ("HTTP 404", "HTTP 503")
    assert "echo:nobody" in reason


def test_key_of_a_target_is_not_in_its_repr():
    assert "sk-1" not in repr(Target("http://h", "m", "sk-1"))
