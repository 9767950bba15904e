"""OpenVINO models made of other models: once, in a process of their own, kept by what they were made of.

A maker is a module of this package. Its process reads a job from stdin and fills a folder; it names its phases on
stdout, and on the last line there it says why it cannot go on; all else goes to stderr, and it ends when its stdin
does. Imports nothing heavy.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from hfms_cli import HfmsError, Leftover, LoadFailed, Quality, Report, report_nothing
from hfms_engines import model_digest

Job = TypeVar("Job", bound=msgspec.Struct)

log = logging.getLogger("hfms.engine")

ABANDONED_AFTER = 24 * 3600
"""Seconds after which a conversion is surely over."""
PACKAGES = ("openvino", "transformers", "torch")
"""Whose versions a conversion depends on."""

TEXTS = ("openvino_export", "quality", "lora_openvino", "tokenizer_files")
NOTES = ("openvino_ir", "openvino_export", "tokenizer_files")
SENTENCES = ("sentence_openvino", "sentence_torch", "openvino_export")
"""The makers of models for generation, of notes on those that came as OpenVINO's, and of models for embeddings, each
with what else its result depends on."""

QUALITY = "quality.json"
"""Beside a quantised model: what that has cost."""

_PHASE = "phase: "


def converted(
    model: Path,
    job: msgspec.Struct,
    *,
    modules: Sequence[str],
    variant: str,
    cache_dir: str,
    report: Report = report_nothing,
) -> Path:
    """The folder of the converted model, which is made where there is none. Raises LoadFailed.

    Its name tells the model, what is made of it, and by which versions. What other versions have made of the same is
    deleted when there is a new one.
    model: the folder of the model itself. modules: the maker's name in this package, and what else its result depends
    on. variant: tells apart what is made of the same model. cache_dir: empty for "hfms" in the user's cache folder.
    """
    final = folder_of(model, modules, variant, cache_dir)
    root = final.parent
    if not final.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
        try:
            _run(modules[0], job, made, report)
            # Complete or not there; whoever was faster made the same.
            if not final.is_dir():
                made.rename(final)
            for old in root.glob(f"{final.name.rpartition('-')[0]}-*"):
                if old != final:
                    log.info("deleting what other versions have made of this model")
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return final


def folder_of(model: Path, modules: Sequence[str], variant: str, cache_dir: str) -> Path:
    """Where a conversion is, once it is made; as for `converted`."""
    root = _root(cache_dir)
    return root / f"{model_digest.of_model(model, root)}-{variant}-{_digest_of_makers(modules)}"


def _root(cache_dir: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hfms"
    return Path(cache_dir or base).expanduser() / "openvino"


def leftovers(cache_dir: str) -> Iterator[Leftover]:
    """Conversions that were broken off, and what no installed version would take any more."""
    try:
        current = {_digest_of_makers(modules) for modules in (TEXTS, NOTES, SENTENCES)}
    except importlib.metadata.PackageNotFoundError:
        return  # nothing can be converted here, so nothing is known to be out of date
    for folder in sorted(_root(cache_dir).glob("*/")):
        if folder.name.rpartition("-")[2] in current:
            continue
        broken = folder.name.startswith(".making-")
        with suppress(FileNotFoundError):
            yield Leftover(
                about="a conversion that was broken off" if broken else "a conversion by other versions",
                size=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
                age_seconds=time.time() - folder.stat().st_mtime,
                paths=(str(folder),),
            )


def quality_of(folder: Path) -> Quality | None:
    """What quantisation has cost the model in a conversion's folder; None where nobody has measured."""
    try:
        return msgspec.json.decode((folder / QUALITY).read_bytes(), type=Quality)
    except FileNotFoundError:
        return None


def _remove_abandoned(root: Path) -> None:
    """Delete what conversions that were killed have left."""
    for folder in root.glob(".making-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)


def _digest_of_makers(modules: Sequence[str]) -> str:
    """Names what a conversion depends on beside the model: the code, and the versions of what it uses."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    return model_digest.of_files([Path(__file__).with_name(f"{name}.py") for name in modules], *versions)


def _run(maker: str, job: msgspec.Struct, out: Path, report: Report) -> None:
    log.info("converting the model for openvino; this is done once")
    with subprocess.Popen(
        [sys.executable, "-P", "-m", f"{__package__}.{maker}", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already, and its status says so
            child.stdin.write(msgspec.json.encode(job) + b"\n")
        reason = ""
        for line in child.stdout:
            text = line.decode(errors="replace").strip()
            if text.startswith(_PHASE):
                report(text.removeprefix(_PHASE))
            else:
                reason = text or reason
    if child.returncode:
        reason = reason or f"its conversion ended with status {child.returncode}."
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


def begin(phase: str, text: str) -> None:
    """Name what the maker's process does now: a word for whoever waits, and a line for the log."""
    print(_PHASE + phase, flush=True)
    say(text)


def say(text: str) -> None:
    """A line of the maker's process for the log."""
    print(f"openvino: {text}", file=sys.stderr, flush=True)
