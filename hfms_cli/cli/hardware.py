"""`hfms hardware`: the devices of this machine, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass

from hfms_cli.cli.options import AsJson, ConfigFile
from hfms_cli.cli.output import print_json, print_table
from hfms_cli.config import Config, load_config
from hfms_cli.errors import HfmsError
from hfms_cli.plugins import Plugins, discover
from hfms_cli.sizes import human_bytes
from hfms_cli.types import Device, Probe


@dataclass(frozen=True)
class Kind:
    """What one hardware plugin found."""

    name: str
    preferred: bool
    probe: Probe


def hardware(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List devices and their memory, or why there are none."""
    settings = load_config(config)
    kinds = probe_all(discover(settings), settings)
    first = first_choice(kinds)
    if as_json:
        print_json([_as_json(kind, first) for kind in kinds])
        return
    rows = []
    for kind in kinds:
        off = "" if kind.preferred else "not in [hardware] preferred"
        for d in kind.probe.devices:
            note = "first choice" if d is first else off
            rows.append([kind.name, d.id, d.name, human_bytes(d.total_bytes), human_bytes(d.free_bytes), note])
        if not kind.probe.devices:
            rows.append([kind.name, "-", "-", "-", "-", kind.probe.reason or "no device"])
    print_table(["KIND", "DEVICE", "NAME", "TOTAL", "FREE", "NOTE"], rows)


def probe_all(plugins: Plugins, config: Config) -> list[Kind]:
    """Ask every hardware plugin, the preferred ones first. One that fails is reported as its reason."""
    preferred = config.order("hardware")
    names = dict.fromkeys([*preferred, *plugins.names("hardware")])
    return [Kind(name, name in preferred, _probe(plugins, name, config)) for name in names]


def first_choice(kinds: list[Kind]) -> Device | None:
    """The device that a model which fits anywhere would get."""
    devices = next((k.probe.devices for k in kinds if k.preferred and k.probe.devices), ())
    return max(devices, key=lambda d: d.free_bytes, default=None)


def _probe(plugins: Plugins, name: str, config: Config) -> Probe:
    try:
        found: Probe = plugins.create("hardware", name, config).probe()
        return found
    except HfmsError as exc:
        return Probe(reason=exc.message)
    except Exception as exc:  # a broken driver raises what it likes, and must not hide the other devices
        return Probe(reason=f"the probe failed: {type(exc).__name__}: {exc}")


def _as_json(kind: Kind, first: Device | None) -> dict[str, object]:
    devices = [
        {
            "id": d.id,
            "name": d.name,
            "total_bytes": d.total_bytes,
            "free_bytes": d.free_bytes,
            "first_choice": d is first,
        }
        for d in kind.probe.devices
    ]
    return {"kind": kind.name, "preferred": kind.preferred, "devices": devices, "reason": kind.probe.reason}
