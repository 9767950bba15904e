"""What reaches the log, and what must not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, structlog
from hfms_cli.config import LogConfig
from hfms_cli.telemetry import logs
logs.configure(LogConfig(level={level!r}, format={format!r}))
log = structlog.get_logger("hfms.test")
def fails():
    prompt = "a-secret-" + "prompt"
    raise ValueError("the reason")
log.debug("quiet")
log.info("loud", model="m")
logging.getLogger("some.library").warning("from a library")
try:
    fails()
except ValueError:
    log.exception("it failed")
"""


def run(form: str, level: str = "info") -> str:
    """What a process with this configuration writes to stderr."""
    script = SCRIPT.format(level=level, format=form)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_the_reason_and_no_local_variable(form):
    written = run(form)
    assert "ValueError: the reason" in written
    assert "a-secret-prompt" not in written


def test_json_lines_are_one_object_each_also_those_of_libraries():
    rows = [json.loads(line) for line in run("json").splitlines()]
    assert [r["event"] for r in rows] == ["loud", "from a library", "it failed"]
    assert (rows[0]["level"], rows[0]["model"]) == ("info", "m")
    assert all("timestamp" in r for r in rows)


def test_the_level_hides_what_is_below_it():
    assert "quiet" not in run("json")
    assert "quiet" in run("json", level="debug")
    assert "loud" not in run("json", level="warning")
