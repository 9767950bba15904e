"""Make Markdown tables and plots of results, and put them into docs/benchmarks.md.

    python -m tests.benchmarks.report DIR...

DIR: where serving.py, roofline.py and frontend.py left their JSON; what is not there is left out. Several sessions of
serving.py come into the same tables, and ratios are those within one session. The results are copied beside the plots,
into docs/benchmarks/. The section is what lies between two comments in docs/benchmarks.md, and the rest of that file is
a person's.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import chart
from tests.benchmarks.install import HERE
from tests.benchmarks.roofline import ceiling

DOCS = HERE.parents[1] / "docs"
BEGIN, END = "<!-- peers: made by tests/benchmarks/report.py -->", "<!-- peers: end -->"
OURS = "hfms"
ALONE = "-alone"
ROUNDS = 1000
"""More than a session has."""


@dataclass(frozen=True)
class Results:
    """The runs of one or several sessions of serving.py. Of each session the rounds have numbers of their own."""

    sessions: list[dict[str, Any]]

    @property
    def runs(self) -> list[dict[str, Any]]:
        numbered = enumerate(self.sessions)
        return [run | {"round": ROUNDS * i + run["round"]} for i, session in numbered for run in session["runs"]]

    @property
    def widths(self) -> list[int]:
        return sorted({r["concurrency"] for r in self.runs})

    @property
    def groups(self) -> list[str]:
        return _unique(r["group"] for r in self.runs)

    def contenders(self, group: str | None = None) -> list[str]:
        """Ours first."""
        names = _unique(r["contender"] for r in self.runs if group in (None, r["group"]))
        return sorted(names, key=lambda name: not name.startswith(OURS))

    def rounds(self, contender: str, width: int | None, figure: str) -> dict[int, float]:
        """A figure by the round. width None: of any load, the largest."""
        found: dict[int, float] = {}
        for r in self.runs:
            if r["contender"] == contender and width in (None, r["concurrency"]) and r[figure] is not None:
                found[r["round"]] = max(r[figure], found.get(r["round"], 0.0))
        return found

    def median(self, contender: str, width: int | None, figure: str) -> float | None:
        values = self.rounds(contender, width, figure).values()
        return median(values) if values else None

    def ratio(self, a: str, b: str, width: int, figure: str) -> float | None:
        """The median of the rounds' ratios."""
        first, second = self.rounds(a, width, figure), self.rounds(b, width, figure)
        ratios = [first[n] / second[n] for n in first.keys() & second.keys() if second[n]]
        return median(ratios) if ratios else None

    def best(self, contenders: Sequence[str], width: int) -> str | None:
        """Who made the most tokens."""
        made = {c: self.median(c, width, "output_throughput") for c in contenders}
        known = {c: tokens for c, tokens in made.items() if tokens is not None}
        return max(known, key=known.__getitem__, default=None)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def each(results: Results, contenders: Sequence[str], cell: Callable[[str, int], str]) -> str:
    """A row for each contender, a column for each load."""
    head = ["", *(f"c = {w}" for w in results.widths)]
    return table(head, [[c, *(cell(c, w) for w in results.widths)] for c in contenders])


def throughput(results: Results, contenders: Sequence[str], ours: str | None) -> str:
    """Output tokens a second, with ours through each."""

    def cell(contender: str, width: int) -> str:
        tokens = shown(results.median(contender, width, "output_throughput"))
        if ours is None or contender == ours:
            return tokens
        return f"{tokens} ({shown(results.ratio(ours, contender, width, 'output_throughput'), 2)})"

    return each(results, contenders, cell)


def latency(results: Results, contenders: Sequence[str]) -> str:
    """TTFT p50 / p99 and TPOT p50."""

    def cell(contender: str, width: int) -> str:
        p50, p99, tpot = (
            results.median(contender, width, f"{name}_ms") for name in ("p50_ttft", "p99_ttft", "p50_tpot")
        )
        return f"{shown(p50)} / {shown(p99)}; {shown(tpot, 1)}"

    return each(results, contenders, cell)


def group_section(results: Results, group: str, plots: Path) -> str:
    """One group of equal precision."""
    contenders = results.contenders(group)
    ours = next((c for c in contenders if c.startswith(OURS)), None)
    series = {
        c: [results.median(c, w, "output_throughput") for w in results.widths]
        for c in contenders
        if not c.split()[0].endswith(ALONE)
    }
    name = f"peers-{group.replace(' ', '-')}.svg"
    title = f"Output tokens a second, {group}"
    (plots / name).write_text(chart.lines(title, "requests in flight", results.widths, series))
    return "\n\n".join(
        [
            f"#### {group}",
            f"![{title}](benchmarks/{name})",
            "Output tokens a second; in brackets hfms through it, the median of the rounds' ratios:",
            throughput(results, contenders, ours),
            "TTFT p50 / p99; TPOT p50, ms:",
            latency(results, contenders),
        ]
    )


def best_section(results: Results) -> str:
    """Each at its best, whatever the precision."""
    served = [c for c in results.contenders() if not c.split()[0].endswith(ALONE)]
    ours, peers = ([c for c in served if c.startswith(OURS) == mine] for mine in (True, False))
    head = ["", *(f"c = {w}" for w in results.widths)]
    rows: list[list[str]] = [["best of hfms"], ["best of the peers"], ["hfms / peer, output tokens a second"]]
    rows.append(["hfms / peer, TTFT p99"])
    for width in results.widths:
        a, b = results.best(ours, width), results.best(peers, width)
        for row, contender in zip(rows[:2], (a, b), strict=True):
            tokens = results.median(contender, width, "output_throughput") if contender else None
            row.append(f"{shown(tokens)} ({contender})" if contender else "-")
        for row, figure in zip(rows[2:], ("output_throughput", "p99_ttft_ms"), strict=True):
            row.append(shown(results.ratio(a, b, width, figure), 2) if a and b else "-")
    return table(head, rows)


def cost_section(results: Results) -> str:
    """Memory and start."""
    rows = []
    for c in results.contenders():
        starts = list(results.rounds(c, None, "start_seconds").values())
        later = median(starts[1:]) if starts[1:] else None
        memory = [shown(results.median(c, None, f"{kind}_mb")) for kind in ("rss", "pss")]
        rows.append([c, *memory, shown(starts[0], 1), shown(later, 1)])
    return table(["", "RSS, MB", "of it its own (PSS)", "first start, s", "later ones"], rows)


def roof_section(results: Results, rates: dict[str, Any]) -> str:
    """What of the ceiling each reached."""

    def cell(contender: str, width: int) -> str:
        runs = [r for r in results.runs if r["contender"] == contender and r["concurrency"] == width]
        tokens = results.median(contender, width, "output_throughput")
        if not runs or tokens is None:
            return "-"
        asked, said = (runs[0][f"total_{kind}_tokens"] / runs[0]["completed"] for kind in ("input", "output"))
        return f"{100 * tokens / ceiling(rates, runs[0]['group'], width, asked, said):.0f}%"

    read = ", ".join(f"{rate / 1e9:.0f} ({what})" for what, rate in rates["read_bytes_per_second"].items())
    products = ", ".join(f"{rate / 1e9:,.0f} ({what})" for what, rate in rates["operations_per_second"].items())
    return (
        f"Reading, GB/s over as many bytes as the weights take, and over 2 GiB: {read}. "
        f"Matrix products, GFLOP/s: {products}. Reached of what these allow:\n\n"
        + each(results, results.contenders(), cell)
    )


def front_section(front: dict[str, Any]) -> str:
    """The server's own cost."""
    rows = []
    for step, width in _unique((r["step_ms"], r["concurrency"]) for r in front["runs"]):

        def of(kind: str, way: str, figure: str, step: float = step, width: int = width) -> float:
            wanted = {"step_ms": step, "concurrency": width, "kind": kind, "way": way}
            return float(median(r[figure] for r in front["runs"] if wanted.items() <= r.items()))

        alone, served = (of("stream", way, "output_throughput") for way in ("engine", "http"))
        rows.append(
            [
                f"{step:g} ms, c = {width}",
                *(shown(alone), shown(served), shown(served / alone, 3)),
                shown(of("stream", "http", "front_us_per_token"), 1),
                shown(of("request", "http", "front_us_per_request")),
                shown(of("request", "http", "request_throughput")),
            ]
        )
    head = ["step, concurrency", "engine alone, tok/s", "over HTTP", "ratio"]
    return table([*head, "front's CPU, µs a token", "µs a request of one token", "such requests/s"], rows)


def conditions(session: dict[str, Any]) -> str:
    """Machine, versions and method of a session, in a paragraph."""
    m, runs = session["machine"], session["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in session["versions"].items())
    most = {name: max((run[name] for run in runs), default=0.0) for name in ("round", "load_average", "others_cores")}
    shared = "all begin alike" if session["shared_prefix"] else "none begins as another does"
    lines = [
        f"{session['date']}, {m['cores']} cores of {m['cpu']} ({', '.join(m['flags'])}), {m['memory_gib']} GiB, Linux "
        f"{m['kernel']}, Python {m['python']}. {versions}.",
        f"SmolLM2-135M-Instruct, {session['output_len']} tokens an answer, greedy; of the prompts {shared}. Rounds: "
        f"{most['round']}, one contender up at a time; medians. Load average up to {most['load_average']:.1f} and "
        f"other processes on up to {most['others_cores']:.2f} cores while measuring.",
        f"Command: `python -m tests.benchmarks.serving {session['command']}`.",
        *(f"{f['contender']} failed in round {f['round']}." for f in session["failures"]),
    ]
    return "\n".join(lines)


def read(folders: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """What each folder has under this name."""
    return [json.loads(file.read_text()) for folder in folders if (file := folder / f"{name}.json").exists()]


def section(folders: Sequence[Path], plots: Path) -> str:
    """All that there is in folders of results."""
    sessions, rates, fronts = (read(folders, name) for name in ("serving", "roofline", "frontend"))
    parts = []
    if sessions:
        results = Results(sessions)
        parts += [*map(conditions, sessions), "### Each at its best", best_section(results), "### At equal precision"]
        parts += [group_section(results, group, plots) for group in results.groups]
        parts += ["### Memory and start", cost_section(results)]
        if rates:
            parts += ["### Of what the machine allows", roof_section(results, rates[-1])]
    if fronts:
        parts += ["### The server's own cost", front_section(fronts[-1])]
    for i, session in enumerate(sessions):
        (plots / f"serving-{i + 1}.json").write_text(json.dumps(session, indent=1) + "\n")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder with benchmarks.md")
    args = parser.parse_args()
    plots = args.docs / "benchmarks"
    plots.mkdir(exist_ok=True)
    text = section(args.folders, plots)
    page = args.docs / "benchmarks.md"
    old = page.read_text()
    if BEGIN not in old:
        old += f"\n## Beside its peers\n\n{BEGIN}\n{END}\n"
    new = f"{BEGIN}\n\n{text}\n\n{END}"
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: new, old, flags=re.DOTALL))


if __name__ == "__main__":
    main()
