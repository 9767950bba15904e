"""`hfms bench` as a person runs it: a process of its own against servers on loopback."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

DONE = b"data: [DONE]\n\n"
VLLM_KEYS = {
    *("date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "errors"),
    *(f"{k}_{m}_ms" for k in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl", "e2el")),
}


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def said(*texts: str, usage: bool = True) -> list[bytes]:
    counted = {"prompt_tokens": 5, "completion_tokens": len(texts)}
    return [
        *[event(choices=[{"index": 0, "delta": {"content": t}}]) for t in texts],
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        *([event(choices=[], usage=counted)] if usage else []),
        DONE,
    ]


@pytest.fixture
def bench(hfms, server):
    """Run `hfms bench` with few prompts against the scripted server."""
    server.stream = said("Hello", " world")

    def run(*args: str, **more: object) -> subprocess.CompletedProcess[str]:
        return hfms("bench", "--url", server.url, "--num-prompts", "6", *args, **more)

    return run


def rows(printed: str) -> dict[str, list[str]]:
    """Rows of the table by their title."""
    cells = [[c for c in line.split("  ") if c] for line in printed.splitlines()]
    return {row[0].strip(): [c.strip() for c in row[1:]] for row in cells if row}


def chats(server) -> list[dict]:
    return [body for _, path, body in server.asked if path == "/v1/chat/completions"]


# What it prints


def test_table_has_a_column_for_each_concurrency(bench):
    done = bench("--max-concurrency", "1,4", "--goodput", "ttft:60000 e2el:60000")
    assert done.returncode == 0
    table = rows(done.stdout)
    assert table["c=1"] == ["c=4"]
    assert table["completed"] == ["6", "6"]
    assert table["input tokens"] == ["30", "30"]
    assert table["output tokens"] == ["12", "12"]
    assert table["good requests/s"] == table["requests/s"]
    assert {f"{m} {k} (ms)" for m in ("TTFT", "TPOT", "ITL", "E2EL") for k in ("mean", "p50", "p90", "p99")} <= set(
        table
    )


def test_progress_is_told_on_standard_error(bench):
    assert bench("--max-concurrency", "2").stderr.splitlines()[-1] == "c=2: 6 of 6, 0 failed"


def test_json_has_the_names_of_vllm_and_nothing_else_is_on_standard_output(bench):
    result = json.loads(bench("--json", "--seed", "7").stdout)
    assert set(result) >= VLLM_KEYS
    assert (result["completed"], result["total_output_tokens"], result["seed"]) == (6, 12, 7)
    assert (result["model_id"], result["max_concurrency"], result["request_rate"]) == ("first-model", None, "inf")


def test_figures_asked_for_are_those_printed(bench):
    table = rows(bench("--percentile-metrics", "ttft", "--metric-percentiles", "99.9").stdout)
    assert [t for t in table if "(ms)" in t] == ["TTFT mean (ms)", "TTFT p99.9 (ms)"]


def test_answers_without_usage_are_complete_and_their_tokens_not_guessed(bench, server):
    server.stream = said("Hello", " world", usage=False)
    done = bench()
    assert done.returncode == 0
    assert rows(done.stdout)["output tokens/s"] == ["-"]
    assert "tokens are not counted: there were answers without `usage`" in done.stderr


def test_random_lengths_are_words_where_the_server_does_not_count(bench, server):
    server.stream = said("Hello", usage=False)
    done = bench("--dataset-name", "random", "--random-input-len", "20", "--no-unique-prompts", "--num-warmups", "0")
    assert "lengths are words" in done.stderr
    (asked,) = {len(body["messages"][0]["content"].split()) for body in chats(server)[-6:]}
    assert asked == 20


def test_result_is_written_and_never_over_a_file(bench, tmp_path, server):
    assert bench("--result-filename", "out.json").stderr.endswith("saved out.json\n")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["completed"] == 6
    before = len(server.asked)
    again = bench("--result-filename", "out.json")
    assert (again.returncode, len(server.asked)) == (2, before), "it must be told before anything is measured"
    assert bench("--save-result").returncode == 0
    assert len(list(tmp_path.glob("bench-*.json"))) == 1


def test_bar_is_shown_on_a_terminal_and_the_table_after_it(server, environment, tmp_path):
    server.stream = said("Hello", " world")
    here, there = pty.openpty()
    command = [sys.executable, "-m", "hfms_cli", "bench", "--url", server.url, "--num-prompts", "6"]
    env = environment | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=there, stderr=there, stdin=there, env=env, cwd=tmp_path)
    os.close(there)
    shown = b""
    try:
        while data := os.read(here, 65536):
            shown += data
    except OSError:  # Linux's word for: the other side is closed
        assert process.wait(20) == 0
    finally:
        os.close(here)
    assert b"6/6" in shown
    assert shown.index(b"6/6") < shown.index(b"requests/s")


# What it asks


def test_every_prompt_differs_at_its_start_and_a_seed_makes_them_the_same_again(bench, server):
    bench("--seed", "3", "--max-concurrency", "1,2")
    first = [body["messages"][0]["content"] for body in chats(server)]
    assert len({text[:10] for text in first}) == len(first) == 2 * (6 + 1)
    server.asked.clear()
    bench("--seed", "3", "--max-concurrency", "1,2")
    assert {body["messages"][0]["content"] for body in chats(server)} == set(first)
    server.asked.clear()
    bench("--seed", "4")
    assert not {body["messages"][0]["content"] for body in chats(server)} & set(first)


def test_options_are_sent_as_openai_names_them(bench, server):
    bench("--model", "mine", "--output-len", "5", "--ignore-eos", "--temperature", "0.5")
    body = chats(server)[-1]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("mine", 5, True, 0.5)


def test_warmups_are_asked_and_not_counted(bench, server):
    assert rows(bench("--num-warmups", "3").stdout)["completed"] == ["6"]
    assert len(chats(server)) == 9


def test_keys_come_from_the_environment_and_go_to_their_own_server_only(bench, server):
    env = {"HFMS_API_KEY": "hf_secret", "OTHER": "sk-other"}
    done = bench("--compare", server.url, "--repeats", "1", "--num-warmups", "0", env=env)
    keys = [
        h.get("Authorization") for h, (_, path, _) in zip(server.headers, server.asked, strict=True) if "chat" in path
    ]
    assert keys == ["Bearer hf_secret"] * 6 + [None] * 6
    assert "hf_secret" not in done.stdout + done.stderr
    server.headers.clear()
    server.asked.clear()
    bench("--compare", server.url, "--compare-key-env", "OTHER", "--repeats", "1", "--num-warmups", "0", env=env)
    assert {h.get("Authorization") for h in server.headers} == {"Bearer hf_secret", "Bearer sk-other"}


def test_real_server_is_measured(hfms, serving):
    url = serving("[engine.echo]\nstep_ms = 1\n")
    done = hfms("bench", "--url", url, "--num-prompts", "8", "--output-len", "6", "--ignore-eos", "--json")
    result = json.loads(done.stdout)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (8, 0, 48)


# Two servers


def test_comparison_takes_turns_and_prints_both_and_their_ratio(bench, server):
    done = bench(
        "--compare", server.url, "--compare-model", "second-model", "--num-warmups", "0", "--max-concurrency", "1"
    )
    assert [body["model"] for body in chats(server)] == [*["first-model"] * 6, *["second-model"] * 6] * 3
    assert f"A: first-model at {server.url}\nB: second-model at {server.url}\n" in done.stdout
    assert "c=1, medians, and that of the ratios of 3 pairs" in done.stdout
    table = rows(done.stdout)
    assert table["output tokens"] == ["12", "12", "1.000"]


def test_comparison_as_json_has_every_run_and_the_medians(bench, server):
    done = bench("--compare", server.url, "--repeats", "2", "--max-concurrency", "1,2", "--json")
    result = json.loads(done.stdout)
    assert [(r["target"], r["repeat"]) for r in result["runs"]] == [("A", 1), ("B", 1), ("A", 2), ("B", 2)] * 2
    assert [(c["max_concurrency"], c["pairs"]) for c in result["comparison"]] == [(1, 2), (2, 2)]
    assert result["comparison"][0]["ratio"]["completed"] == 1.0


def test_server_to_compare_with_that_is_not_there_exits_3_before_anything_is_measured(bench, server, unused_tcp_port):
    assert bench("--compare", f"http://127.0.0.1:{unused_tcp_port}").returncode == 3
    assert chats(server) == []


# Faults


def test_nobody_there_exits_3_and_says_what_to_do(hfms, unused_tcp_port):
    for more in ([], ["--model", "mine"]):
        done = hfms("bench", "--url", f"http://127.0.0.1:{unused_tcp_port}", *more)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(f"error: no server answers at http://127.0.0.1:{unused_tcp_port}; start one")


def test_some_failures_are_counted_and_shown_and_the_rest_is_measured(bench, server):
    turn = iter(range(100))
    broken = [event(error={"message": "The engine \x1b[2Jdied."})]
    server.stream = lambda _: broken if next(turn) % 3 == 0 else said("Hello")
    done = bench("--num-warmups", "0", "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["completed"], result["failed"], result["errors"]) == (4, 2, {"error in the stream": 2})
    assert "no limit: 2 x error in the stream: The engine [2Jdied.\n" in done.stderr


@pytest.mark.parametrize("status", [429, 500])
def test_all_failed_exits_1_with_the_status_and_the_servers_reason(bench, server, status):
    server.replies["POST", "/v1/chat/completions"] = (status, {"error": {"message": "Not now."}})
    done = bench()
    assert done.returncode == 1
    assert rows(done.stdout)["failed"] == ["6"]
    assert f"6 x HTTP {status}: Not now.\n" in done.stderr
    assert done.stderr.endswith("error: every request failed\n")


def test_server_that_lists_no_models_is_measured_when_one_is_named(bench, server):
    server.replies["GET", "/v1/models"] = (404, {})
    assert bench("--model", "mine").returncode == 0
    assert bench().returncode == 1


def test_server_without_models_says_so(bench, server):
    server.models = []
    assert "serves no model" in bench().stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--max-concurrency", "1,,2"], "--max-concurrency"),
        (["--request-rate", "0"], "--request-rate"),
        (["--request-rate", "nan"], "--request-rate"),
        (["--burstiness", "0"], "--burstiness"),
        (["--burstiness", "inf"], "--burstiness"),
        (["--goodput", "itl:3"], "--goodput"),
        (["--percentile-metrics", "speed"], "--percentile-metrics"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--dataset-name", "sharegpt"], "--dataset-path"),
        (["--dataset-path", "talks.json"], "--dataset-name sharegpt"),
        (["--dataset-name", "sharegpt", "--dataset-path", "nowhere.json"], "cannot be read"),
        (["--compare-model", "other"], "--compare URL"),
        (["--compare-key-env", "OTHER"], "--compare URL"),
        (["--key-env", "NOWHERE"], "NOWHERE, which is not set"),
        (["--endpoint", "images"], "--endpoint"),
        (["--num-prompts", "0"], "--num-prompts"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_options_are_usage_errors_and_nothing_is_asked_of_the_model(bench, server, options, said):
    done = bench(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert chats(server) == []


def test_ctrl_c_prints_what_was_measured_so_far_and_exits_130(server, environment, tmp_path):
    turn, hangs = iter(range(100)), threading.Event()

    def stream(_: object) -> list:
        if next(turn) < 3:
            return said("Hello", " world")
        hangs.set()
        return [*said("Hello")[:1], ...]

    server.stream = stream
    command = [sys.executable, "-m", "hfms_cli", "bench", "--url", server.url]
    process = subprocess.Popen(
        [*command, "--num-prompts", "9", "--max-concurrency", "1", "--num-warmups", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert hangs.wait(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert rows(out)["completed"] == ["3"]
    assert rows(out)["failed"] == ["0"]
    assert "stopped before the end" in err
    assert "Traceback" not in err
