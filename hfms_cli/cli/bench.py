"""`hfms bench`: measure any server that speaks OpenAI's API, or two of them in turns."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from hfms_cli.bench import dataset
from hfms_cli.bench.dataset import DatasetName
from hfms_cli.bench.load import Endpoint, Load
from hfms_cli.bench.measure import Outcome, Wanted, parse_goodput, parse_metrics, parse_percentiles
from hfms_cli.bench.session import NAMES, Session, Target, Told
from hfms_cli.cli.chat import DEFAULT_KEY_ENV
from hfms_cli.cli.client import Client, Refused
from hfms_cli.cli.loop import fast_loop
from hfms_cli.cli.options import AsJson
from hfms_cli.cli.output import console, print_json, print_table, printable
from hfms_cli.errors import ConfigError


def bench(
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The model; by default the first of /v1/models.")] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="What to ask for.")] = Endpoint.CHAT,
    key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"The environment variable with the key.  [default: {DEFAULT_KEY_ENV}]"),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 100,
    max_concurrency: Annotated[
        str | None,
        typer.Option(metavar="N[,N]...", help="Requests in flight at most; a run for each.  [default: no limit]"),
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests a second, or inf: each as soon as may be.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="Of arrivals: 1 is Poisson, less comes in bursts.")] = 1.0,
    dataset_name: Annotated[DatasetName, typer.Option(help="Where prompts come from.")] = DatasetName.BUILTIN,
    dataset_path: Annotated[Path | None, typer.Option(help="The file of sharegpt: JSON or JSON by the line.")] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer in tokens.  [default: builtin 128, random --random-output-len, sharegpt as it was]",
        ),
    ] = None,
    random_input_len: Annotated[int, typer.Option(min=1, help="Prompt of random, as the server counts it.")] = 1024,
    random_output_len: Annotated[int, typer.Option(min=1, help="Longest answer of random, in tokens.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(min=0, max=0.99, help="Lengths of random lie within this part of those given.")
    ] = 0.0,
    unique_prompts: Annotated[
        bool, typer.Option(help="Start each prompt with a number of its own, so that no prefix cache answers it.")
    ] = True,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before each load that are not measured.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of prompts and arrivals.  [default: a new one each time]")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Ask for answers of full length.")] = False,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is exact, 2 is wild.")] = 0.0,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="NAME:MS", help='Limits of a good request, such as "ttft:500 tpot:50".')
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Latencies to report.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to report.")] = "50,90,99",
    compare: Annotated[
        str | None, typer.Option(metavar="URL", help="A second server, measured in turns with the first.")
    ] = None,
    compare_model: Annotated[str | None, typer.Option(help="Its model; by default its first.")] = None,
    compare_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with its key.  [default: no key]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each server under each load of --compare.")] = 3,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the JSON into a file too.")] = False,
    result_filename: Annotated[
        Path | None, typer.Option(help="That file, never an old one.  [default: bench-TIME.json]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a server: throughput, latencies, errors.

    Any server that speaks OpenAI's API; options and results are named as those of `vllm bench serve`. With --compare,
    two servers in turns, with the ratio of each figure.
    """
    import asyncio

    seed = secrets.randbelow(10**6) if seed is None else seed
    if not request_rate > 0:
        raise ConfigError("--request-rate takes a number of requests a second above 0, or inf")
    if not 0 < burstiness < math.inf:
        raise ConfigError("--burstiness takes a number above 0; 1 makes arrivals a Poisson process")
    if (dataset_name is DatasetName.SHAREGPT) != (dataset_path is not None):
        raise ConfigError("--dataset-name sharegpt and --dataset-path FILE need each other")
    if compare is None and (compare_model or compare_key_env):
        raise ConfigError("--compare-model and --compare-key-env need --compare URL")
    sampling: dict[str, Any] = {"temperature": temperature} | ({"ignore_eos": True} if ignore_eos else {})
    servers = [(Client(url, key_of("--key-env", key_env) if key_env else os.environ.get(DEFAULT_KEY_ENV)), model)]
    if compare is not None:
        # Never the default key: it is meant for another server.
        key = key_of("--compare-key-env", compare_key_env) if compare_key_env else None
        servers.append((Client(compare, key), compare_model))
    loads = [Load(width, request_rate, burstiness, seed) for width in parse_concurrency(max_concurrency)]
    lengths = dataset.Lengths(random_input_len, output_len or random_output_len, random_range_ratio)
    prompts = dataset.Prompts(dataset_name, dataset_path, output_len, lengths, unique_prompts, seed)
    limits = parse_goodput(" ".join(goodput or ()))
    wanted = Wanted(parse_metrics(percentile_metrics), parse_percentiles(metric_percentiles), limits)
    if save_result and result_filename is None:
        result_filename = Path(f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}.json")
    if result_filename is not None and result_filename.exists():
        raise ConfigError(f"--result-filename {result_filename} is there already; name another")

    stopped = False
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        targets = [runner.run(find_target(client, name)) for client, name in servers]
        rounds = repeats if compare is not None else 1
        session = Session(targets, endpoint, sampling, loads, rounds, num_prompts, num_warmups, prompts, wanted)
        try:
            runner.run(session.measure(showing))
        except KeyboardInterrupt:
            stopped = True
    if session.begun:
        report(session, as_json, result_filename)
    if stopped:
        print("stopped before the end", file=sys.stderr)
        raise typer.Exit(130)
    if not any(m.run.completed for m in session.measured):
        raise Refused("every request failed")


def key_of(option: str, name: str) -> str:
    """The key in an environment variable. Raises ConfigError where it is not set."""
    if name not in os.environ:
        raise ConfigError(f"{option} names {name}, which is not set")
    return os.environ[name]


def parse_concurrency(text: str | None) -> list[int | None]:
    """Limits from `1,4,16`; without it one run without a limit. Raises ConfigError."""
    if text is None:
        return [None]
    words = text.split(",")
    if not all(w.strip().isdecimal() and int(w) > 0 for w in words):
        raise ConfigError(f"--max-concurrency is {text!r}; it takes whole numbers above 0, such as 1,4,16")
    return [int(w) for w in words]


async def find_target(client: Client, model: str | None) -> Target:
    """A server and its model, and so whether it is there at all. Raises Unreachable, Refused."""
    async with client:
        try:
            names = await client.models()
        except Refused:
            if model is None:
                raise
            names = []  # a server need not list its models to have one
    if model is None and not names:
        raise Refused(f"{client.url} serves no model; load one, or name it with --model")
    return Target(client.url, model or names[0], client.key)


def report(session: Session, as_json: bool, file: Path | None) -> None:
    """Print what was measured, write it into `file`, and tell on standard error what went wrong."""
    if as_json:
        print_json(session.results())
    else:
        print(conditions(session))
        if len(session.targets) > 1:
            for load in session.loads_begun:
                print_comparison(session, load)
        else:
            columns = [m.load.label for m in session.begun]
            figures = [session.figures(m) for m in session.begun]
            print_table(["", *columns], [[title, *(shown(f[key]) for f in figures)] for key, title in rows(session)])
    tell_faults(session)
    if file is not None:
        write(file, session.results())


def print_comparison(session: Session, load: Load) -> None:
    """A table of A, B and A/B."""
    compared = session.compared(load)
    a, b, ratio = compared["A"], compared["B"], compared["ratio"]
    print(f"\n{load.label}, medians, and that of the ratios of {compared['pairs']} pairs")
    cells = [[title, shown(a.get(k)), shown(b.get(k)), shown(ratio.get(k), 3)] for k, title in rows(session)]
    print_table(["", "A", "B", "A/B"], cells)


def conditions(session: Session) -> str:
    """A line for each server, and one for what it is asked."""
    letters = [f"{letter}: " for letter in NAMES] if len(session.targets) > 1 else [""]
    lines = [f"{a}{printable(t.model)} at {t.url}" for a, t in zip(letters, session.targets, strict=True)]
    rate = session.loads[0].request_rate
    pace = "" if math.isinf(rate) else f", {rate:g} a second"
    asked = f"{session.num_prompts} {session.prompts.name} prompts a run{pace}"
    return "\n".join([*lines, f"{asked}, {session.endpoint}, seed {session.prompts.seed}"])


def rows(session: Session) -> list[tuple[str, str]]:
    """Key and title of each row of a table."""
    wanted, streamed = session.wanted, session.endpoint is not Endpoint.EMBEDDINGS
    latencies = [m for m in wanted.metrics if streamed or m == "e2el"]
    statistics = ["mean", *(f"p{p:g}" for p in wanted.percentiles)]
    return [
        ("completed", "completed"),
        ("failed", "failed"),
        ("duration", "duration (s)"),
        ("total_input_tokens", "input tokens"),
        *([("total_output_tokens", "output tokens")] if streamed else []),
        ("request_throughput", "requests/s"),
        *([("request_goodput", "good requests/s")] if wanted.goodput else []),
        *([("output_throughput", "output tokens/s")] if streamed else []),
        ("total_token_throughput", "all tokens/s"),
        *[(f"{s}_{m}_ms", f"{m.upper()} {s} (ms)") for m in latencies for s in statistics],
    ]


def tell_faults(session: Session) -> None:
    """What failed and how often, and what the figures therefore do not say."""
    for m in session.begun:
        times = Counter(o.error for o in m.run.outcomes)
        for kind, reason in m.run.failures.items():
            said = f": {printable(reason)}" if reason else ""
            print(f"{session.label(m)}: {times[kind]} x {kind}{said}", file=sys.stderr)
    if session.length_unit == "words":
        print("lengths are words: the server did not say how many tokens a prompt has", file=sys.stderr)
    if any(o.prompt_tokens is None for m in session.begun for o in m.run.completed):
        print("tokens are not counted: there were answers without `usage`", file=sys.stderr)


def shown(value: float | None, digits: int = 2) -> str:
    """A figure for people."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def write(file: Path, data: Any) -> None:
    """Write JSON, never over a file. Raises ConfigError."""
    try:
        with file.open("x", encoding="utf-8") as out:
            json.dump(data, out, indent=2, ensure_ascii=False)
            out.write("\n")
    except OSError as exc:
        raise ConfigError(f"{file} was not written: {exc.strerror}") from exc
    print(f"saved {file}", file=sys.stderr)


@contextmanager
def showing(label: str, total: int) -> Iterator[Told]:
    """A function that takes each outcome and shows how far a run is, on standard error."""
    with _bar(label, total) if sys.stderr.isatty() else _lines(label, total) as told:
        yield told


@contextmanager
def _bar(label: str, total: int) -> Iterator[Told]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed", markup=False),
        TimeRemainingColumn(),
    )
    # Twice a second, and gone at the end: drawing takes time from what is measured.
    with Progress(*columns, console=console(stderr=True), refresh_per_second=2, transient=True) as bar:
        task = bar.add_task(label, total=total, failed=0)
        failed = 0

        def told(outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.error is not None
            bar.update(task, advance=1, failed=failed)

        yield told


@contextmanager
def _lines(label: str, total: int) -> Iterator[Told]:
    """A line at each quarter: a log is not to fill with them."""
    done = failed = 0

    def told(outcome: Outcome) -> None:
        nonlocal done, failed
        before, done = done * 4 // total, done + 1
        failed += outcome.error is not None
        if done * 4 // total > before:
            print(f"{label}: {done} of {total}, {failed} failed", file=sys.stderr, flush=True)

    yield told
