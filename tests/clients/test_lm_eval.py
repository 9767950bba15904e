"""lm-eval asks a running server, and finds what it finds with the model in its own process."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.install import TORCH, safetensors, venv

pytestmark = pytest.mark.real_model

QUESTIONS = [
    ("The capital of France is", [" Paris", " London", " made of cheese"], 0),
    ("Two and two make", [" four", " five", " a nice couple of shoes"], 0),
    ("Cats like to eat", [" stones and iron", " fish", " the moon"], 1),
    ("In winter it is often", [" cold", " hot", " purple"], 0),
    ("A bird can", [" fly", " read Latin", " be a number"], 0),
]
TEXTS = [
    "The sea is wide and blue. Ships sail on it, and fish swim in it.",
    "Naïve café — 東京 🙂 and plain words again.",
]
ASKED = ["Name a colour.", "What is the capital of France?"]
TASKS = {
    "local_choice": (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n",
        [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
    ),
    "local_text": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n",
        [{"text": text} for text in TEXTS],
    ),
    "local_chat": (
        "output_type: generate_until\ndoc_to_text: '{{asked}}'\ndoc_to_target: ''\n"
        "generation_kwargs: {until: ['\\n\\n'], max_gen_toks: 16, do_sample: false, temperature: 0}\n"
        "metric_list: [{metric: exact_match}]\n",
        [{"asked": asked} for asked in ASKED],
    ),
}


@pytest.fixture(scope="module")
def lm_eval(model_cache: Path) -> Path:
    """The program, in an environment of its own: it needs many packages that a server has no use for."""
    try:
        programs = venv(model_cache / "lm-eval" / "venv", [TORCH], ["lm-eval[api,hf]==0.4.13", "transformers==5.24.0"])
    except SystemExit as exc:
        pytest.skip(f"lm-eval could not be installed from PyPI: {str(exc)[-300:]}")
    return programs / "lm-eval"


@pytest.fixture(scope="module")
def folder(model_cache: Path) -> Path:
    """SmolLM2 as float32 safetensors."""
    return safetensors(model_cache, Path(sys.executable).parent)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The folder with the tasks and their data, all of it local."""
    made = tmp_path / "tasks"
    made.mkdir()
    for name, (how, rows) in TASKS.items():
        data = made / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        )
        (made / f"{name}.yaml").write_text(source + how)
    return made


async def evaluate(lm_eval: Path, tasks: Path, names: str, model: str, *arguments: str) -> dict[str, list[Any]]:
    """Answers by task, in the order of its rows: of a likelihood its number, of a chat its text."""
    out = tasks.parent / model
    process = await asyncio.create_subprocess_exec(
        str(lm_eval), "run", "--model", model, "--include_path", str(tasks), "--tasks", *names.split(","),
        "--log_samples", "--output_path", str(out), "--batch_size", "1", *arguments,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tasks.parent), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode(errors="replace")[-3000:]
    found = {}
    for name in names.split(","):
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[name] = [answer for row in rows for answers in row["resps"] for answer in answers]
    return found


async def test_likelihoods_and_chats_are_those_of_the_model_in_process(serve, lm_eval, folder, tasks):
    names = "local_choice,local_text"
    own = await evaluate(lm_eval, tasks, names, "hf", "--model_args", f"pretrained={folder},dtype=float32")
    chats = await evaluate(
        lm_eval, tasks / ".." / "tasks", "local_chat", "hf", "--model_args", f"pretrained={folder},dtype=float32",
        "--apply_chat_template",
    )  # fmt: skip
    async with serve(str(folder), toml='[models]\ndtype = "float32"') as server:
        (model,) = server.runtime.pool.names()
        common = f"model={model},tokenizer={folder},num_concurrent=2"
        served = await evaluate(
            lm_eval, tasks, names, "local-completions", "--model_args",
            f"{common},base_url={server.url}/v1/completions",
        )  # fmt: skip
        chatted = await evaluate(
            lm_eval, tasks, "local_chat", "local-chat-completions", "--apply_chat_template", "--model_args",
            f"{common},base_url={server.url}/v1/chat/completions",
        )  # fmt: skip
    for name in names.split(","):
        pairs = list(zip(map(likelihood, served[name]), map(likelihood, own[name]), strict=True))
        assert len(pairs) == (15 if name == "local_choice" else 2)
        assert max(abs(a - b) for a, b in pairs) < 1e-3, pairs
    assert [answer[1] for answer in served["local_choice"]] == [answer[1] for answer in own["local_choice"]]
    assert chatted == chats


def likelihood(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, list) else answer)
