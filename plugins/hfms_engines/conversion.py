"""OpenVINO models made of other models: once, in a process of their own, kept by what they were made of.

A maker is a module of this package. Its process reads a job from stdin and fills a folder; it says why it cannot on the
last line of its stdout, all else goes to stderr, and it ends when its stdin does. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from hfms_cli import HfmsError, LoadFailed

Job = TypeVar("Job", bound=msgspec.Struct)

log = logging.getLogger("hfms.engine")

ABANDONED_AFTER = 24 * 3600
"""Seconds after which a conversion is surely over."""


def converted(model: Path, job: msgspec.Struct, *, modules: Sequence[str], variant: str, cache_dir: str) -> Path:
    """The folder of the converted model, which is made where there is none. Raises LoadFailed.

    model: the folder of the model itself. modules: the maker's name in this package, and what else its result depends
    on. variant: tells apart what is made of the same model. cache_dir: empty for "hfms" in the user's cache folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfms"
    root = Path(cache_dir or base).expanduser() / "openvino"
    final = root / f"{_digest(model, modules)}-{variant}"
    if not final.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
        try:
            _run(modules[0], job, made)
            # Complete or not there; whoever was faster made the same.
            if not final.is_dir():
                made.rename(final)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return final


def _remove_abandoned(root: Path) -> None:
    """Delete what conversions that were killed have left."""
    for folder in root.glob(".making-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)


def _digest(model: Path, modules: Sequence[str]) -> str:
    """Names a conversion by all that it depends on: the model's files, what reads them, and the versions of both."""
    digest = hashlib.sha256()
    for package in ("openvino", "transformers", "torch"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    code = [Path(__file__).with_name(f"{name}.py") for name in modules]
    for file in [*code, *sorted(p for p in model.rglob("*") if p.is_file())]:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _run(maker: str, job: msgspec.Struct, out: Path) -> None:
    log.info("converting the model for openvino; this is done once")
    with subprocess.Popen(
        [sys.executable, "-P", "-m", f"{__package__}.{maker}", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(msgspec.json.encode(job) + b"\n")
        child.stdin.flush()
        said = child.stdout.read().decode(errors="replace").strip()
    if child.returncode:
        reason = said.splitlines()[-1] if said else f"its conversion ended with status {child.returncode}."
        raise LoadFailed(f"openvino cannot take this model: {reason}")


def main(kind: type[Job], make: Callable[[Job, Path], None]) -> None:
    """The maker's process: `python -m hfms_engines.MAKER OUT < job`."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    # Whoever wanted the model may be gone before it is made.
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
    try:
        make(job, Path(sys.argv[1]))
    except HfmsError as exc:
        print(exc.message)
        sys.exit(1)
    except Exception as exc:
        print(f"{type(exc).__name__}.")
        raise


def say(text: str) -> None:
    """A line of the maker's process for the log."""
    print(f"openvino: {text}", file=sys.stderr, flush=True)
