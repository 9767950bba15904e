"""guidellm, another tool that measures servers, completes a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfms_cli.bench.dataset import Prompt
from tests.benchmarks.guidellm import ask_guidellm
from tests.benchmarks.install import TORCH, venv


@pytest.fixture(scope="module")
def programs(model_cache: Path) -> Path:
    """guidellm's, in an environment of its own."""
    try:
        return venv(model_cache / "guidellm" / "venv", [TORCH], ["guidellm==0.8.1"])
    except SystemExit as exc:
        pytest.skip(f"guidellm could not be installed from PyPI: {str(exc)[-300:]}")


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
async def test_guidellm_completes_a_run_without_an_error(serve, programs, tmp_path, route):
    prompts = [Prompt(f"{number} " + "word " * 30, 16) for number in range(8)]
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 1") as server:
        figures = await ask_guidellm(programs, server.url, prompts, 2, tmp_path, route=route)
    assert (figures["completed"], figures["failed"]) == (8, 0)
    assert figures["total_output_tokens"] == 8 * 16
