"""What a process and its children hold."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from hfms_cli.engines.resident import tree_bytes

HOLD = "import sys; held = bytearray(64 << 20); print('holds', flush=True); sys.stdin.read()"
START = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("holds", flush=True)
sys.stdin.read()
child.communicate()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are seen on Linux only")
def test_what_a_process_has_started_counts_as_its_own():
    with subprocess.Popen([sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        try:
            parent.stdout.readline()
            alone = psutil.Process(parent.pid).memory_info().rss
            assert tree_bytes(psutil.Process(parent.pid)) - alone >= 64 << 20
        finally:
            parent.communicate()
