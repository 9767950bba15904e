"""The processor and its memory, within the limit that a container sets."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hfms_cli import Device, Probe


@dataclass(frozen=True)
class Memory:
    """Bytes in all, and bytes that can be had without pushing anything else out."""

    total: int
    free: int


class Cpu:
    """The one device that is always there. `root` stands for `/` in tests."""

    name = "cpu"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def probe(self) -> Probe:
        memory = host_memory(self._root)
        device = Device(
            id="cpu",
            kind="cpu",
            name=processor(self._root),
            total_bytes=memory.total,
            free_bytes=memory.free,
            torch_device="cpu",
        )
        return Probe((device,))


def host_memory(root: Path = Path("/")) -> Memory:
    """The machine's memory, or the least that a cgroup above this process leaves of it."""
    import psutil

    machine = psutil.virtual_memory()
    bounds = [Memory(machine.total, machine.available), *_cgroups(root)]
    return Memory(min(b.total for b in bounds), max(0, min(b.free for b in bounds)))


@dataclass(frozen=True)
class Layout:
    """Where a version of cgroups keeps its numbers."""

    mount: str
    limit: str
    used: str
    stat_prefix: str


V1 = Layout("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = Layout("sys/fs/cgroup", "memory.max", "memory.current", "")


def _cgroups(root: Path) -> Iterator[Memory]:
    """What each cgroup with a limit leaves, from this process's own up to the outermost."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Seen from inside a container the path can lead out of what is mounted; then only the mount itself is there.
        own = PurePosixPath("/" if ".." in path else path)
        layout = V1 if controllers else V2
        for group in (own, *own.parents):
            memory = _limited(root / layout.mount / group.relative_to("/"), layout)
            if memory is not None:
                yield memory


def _limited(group: Path, layout: Layout) -> Memory | None:
    """A cgroup's memory; None where the group is not here or has no limit."""
    try:
        limit = int((group / layout.limit).read_text())
        used = int((group / layout.used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the limit is "max", or there is no such group
        return None
    # Cached files count as used, and are dropped when memory is wanted: a model just read from disk is there twice.
    cached = sum(int(stat.get(layout.stat_prefix + key, 0)) for key in ("active_file", "inactive_file"))
    return Memory(limit, limit - used + cached)


def processor(root: Path = Path("/")) -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
