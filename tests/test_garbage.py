"""What is here at the start is looked through no more; garbage from before and from after it goes all the same."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from hfms_cli.garbage import collect_rarely, settle

class Knot:
    def __init__(self):
        self.own = self

gc.disable()
collect_rarely()
early = weakref.ref(Knot())
kept = Knot()
settle()
late = weakref.ref(Knot())
print(early() is None, late() is None, any(o is kept for o in gc.get_objects()), gc.get_freeze_count() > 1000)
gc.collect()
print(late() is None)
"""


def test_what_settled_is_looked_through_no_more_and_garbage_still_goes():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False", "False", "True", "True"]
