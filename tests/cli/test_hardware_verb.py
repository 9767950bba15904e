"""`hfms hardware`: what each plugin found, in the operator's order, and what would be chosen."""

from __future__ import annotations

import json

from hfms_cli import Device, HfmsError, Probe, Provider
from hfms_cli.cli.hardware import first_choice, probe_all
from hfms_cli.config import Config, HardwareConfig
from hfms_cli.plugins import PluginInfo, Plugins


class Found:
    """A hardware that finds what it was made with."""

    def __init__(self, found: Probe | Exception) -> None:
        self.found = found

    def probe(self) -> Probe:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def device(name: str, free: int) -> Device:
    return Device(id=name, kind=name.partition(":")[0], name=name, total_bytes=100, free_bytes=free)


def plugins_with(**kinds: Probe | Exception) -> Plugins:
    plugins = Plugins()
    info = PluginInfo("tests", "tests", "tests", "1")
    for name, found in kinds.items():
        plugins._add_record("hardware", Provider(name, lambda found=found: Found(found)), info)
    return plugins


def probed(preferred: list[str], **kinds: Probe | Exception):
    return probe_all(plugins_with(**kinds), Config(hardware=HardwareConfig(preferred)))


def test_preferred_kinds_come_first_and_the_others_are_shown_too():
    kinds = probed(["b", "a"], a=Probe(), b=Probe(), c=Probe())
    assert [(k.name, k.preferred) for k in kinds] == [("b", True), ("a", True), ("c", False)]


def test_device_with_most_free_memory_of_the_first_kind_that_has_any_is_first():
    gpus = Probe((device("gpu:0", 10), device("gpu:1", 30)))
    kinds = probed(["none", "gpu", "cpu"], none=Probe(reason="no driver"), gpu=gpus, cpu=Probe((device("cpu", 90),)))
    assert first_choice(kinds).id == "gpu:1"


def test_kind_that_is_not_preferred_is_never_first():
    assert first_choice(probed([], cpu=Probe((device("cpu", 90),)))) is None


def test_probe_that_fails_is_a_reason_and_hides_no_other():
    kinds = probed(["a", "b", "c"], a=RuntimeError("driver crashed"), b=HfmsError("no licence"), c=Probe())
    assert [k.probe.reason for k in kinds] == [
        "the probe failed: RuntimeError: driver crashed",
        "no licence",
        None,
    ]


def test_preferred_kind_that_no_plugin_provides_says_so():
    (kind, _) = probed(["gpuu"], gpu=Probe())
    assert kind.probe.reason == "[hardware] preferred names `gpuu`, which no plugin provides; did you mean `gpu`?"


def test_cpu_of_this_machine_is_listed_with_its_memory(hfms):
    rows = {row["kind"]: row for row in json.loads(hfms("hardware", "--json").stdout)}
    (cpu,) = rows["cpu"]["devices"]
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"]
    assert list(rows) == ["cuda", "rocm", "mps", "openvino", "cpu"]


def test_every_kind_without_devices_says_why_not(hfms):
    rows = json.loads(hfms("hardware", "--json").stdout)
    assert all(row["devices"] or row["reason"] for row in rows)


def test_exactly_one_device_is_the_first_choice(hfms):
    rows = json.loads(hfms("hardware", "--json").stdout)
    assert [d["first_choice"] for row in rows for d in row["devices"]].count(True) == 1
    assert hfms("hardware").stdout.count("first choice") == 1


def test_operator_can_turn_a_kind_off(hfms):
    out = hfms("hardware", env={"HFMS_HARDWARE": "cuda"}).stdout
    assert "not in [hardware] preferred" in out
