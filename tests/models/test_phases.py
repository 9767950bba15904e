"""Where the seconds of a load go."""

from __future__ import annotations

from hfms_cli.models.phases import Phases


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_phase_ends_where_the_next_begins_and_one_that_comes_again_is_added_up():
    clock = Clock()
    phases = Phases(clock)
    for phase, seconds in (("fetch", 2.0), ("verify", 0.5), ("start", 1.0), ("fetch", 0.25)):
        phases(phase)
        clock.now += seconds
    phases.end()
    clock.now += 50
    assert phases.seconds() == {"fetch": 2.25, "verify": 0.5, "start": 1.0}


def test_progress_belongs_to_the_phase_that_runs():
    clock = Clock()
    phases = Phases(clock)
    phases("convert", 0.25)
    clock.now += 1
    phases("convert", 0.5)
    assert (phases.now, phases.done, phases.seconds()) == ("convert", 0.5, {})
    phases("compile")
    assert (phases.now, phases.done, phases.seconds()) == ("compile", None, {"convert": 1.0})
