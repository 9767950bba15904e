"""This machine's memory, and the limits of made cgroups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hfms_hardware.cpu import Cpu, host_memory

MB = 2**20
NO_LIMIT_V1 = 9223372036854771712


def put(root: Path, path: str, **files: object) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def member_of(root: Path, *lines: str) -> None:
    put(root, "proc/self", cgroup="\n".join(lines))


def v2(root: Path, group: str, limit: object, used: int, cached: int = 0) -> None:
    stat = f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\nshmem 9"
    values = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    put(root, f"sys/fs/cgroup/{group}", **values)


def v1(root: Path, group: str, limit: int, used: int, cached: int = 0) -> None:
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0"
    values = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    put(root, f"sys/fs/cgroup/memory/{group}", **values)


def sizes(root: Path) -> tuple[int, int]:
    memory = host_memory(root)
    return memory.total // MB, memory.free // MB


def test_this_machine_is_one_device():
    (device,) = Cpu().probe().devices
    assert (device.id, device.kind, device.torch_device) == ("cpu", "cpu", "cpu")
    assert 0 < device.free_bytes <= device.total_bytes <= psutil.virtual_memory().total
    assert device.name


def test_without_cgroups_the_memory_is_the_machines(tmp_path):
    assert host_memory(tmp_path).total == psutil.virtual_memory().total


def test_a_container_of_cgroup_v2_has_its_limit(tmp_path):
    member_of(tmp_path, "0::/")
    v2(tmp_path, "", 64 * MB, 24 * MB)
    assert sizes(tmp_path) == (64, 40)


def test_the_tightest_group_above_the_process_counts(tmp_path):
    member_of(tmp_path, "0::/user.slice/hfms.service")
    v2(tmp_path, "user.slice/hfms.service", "max", 10 * MB)
    v2(tmp_path, "user.slice", 80 * MB, 70 * MB)
    v2(tmp_path, "", 96 * MB, 20 * MB)
    assert sizes(tmp_path) == (80, 10)


def test_cached_files_are_free(tmp_path):
    member_of(tmp_path, "0::/box")
    v2(tmp_path, "box", 64 * MB, 60 * MB, cached=50 * MB)
    assert sizes(tmp_path) == (64, 54)


def test_a_container_of_cgroup_v1_has_its_limit(tmp_path):
    """In it the process is named by a path that only the host has."""
    member_of(tmp_path, "11:cpuset:/docker/ab", "4:memory:/docker/ab", "0::/")
    v1(tmp_path, "", 64 * MB, 30 * MB, cached=20 * MB)
    assert sizes(tmp_path) == (64, 54)


def test_the_groups_of_cgroup_v1_are_seen_from_the_host(tmp_path):
    member_of(tmp_path, "4:cpu,memory:/docker/ab")
    v1(tmp_path, "docker/ab", 32 * MB, 2 * MB)
    v1(tmp_path, "", NO_LIMIT_V1, 900 * MB)
    assert sizes(tmp_path) == (32, 30)


def test_no_limit_is_the_machines_memory(tmp_path):
    member_of(tmp_path, "4:memory:/", "0::/")
    v1(tmp_path, "", NO_LIMIT_V1, 10 * MB)
    v2(tmp_path, "", "max", 10 * MB)
    assert host_memory(tmp_path).total == psutil.virtual_memory().total


def test_a_group_over_its_limit_has_nothing_free(tmp_path):
    member_of(tmp_path, "0::/")
    v2(tmp_path, "", 10 * MB, 12 * MB)
    assert sizes(tmp_path) == (10, 0)


@pytest.mark.parametrize("path", ["/../../other", "/.."])
def test_a_group_outside_of_what_is_mounted_is_not_followed(tmp_path, path):
    member_of(tmp_path, f"0::{path}")
    v2(tmp_path, "", 64 * MB, 4 * MB)
    v2(tmp_path, "../../other", 1 * MB, 0)
    assert sizes(tmp_path) == (64, 60)


def test_the_processor_has_its_own_name(tmp_path):
    put(tmp_path, "proc", cpuinfo="processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu")
    assert Cpu(tmp_path).probe().devices[0].name == "Some CPU @ 3 GHz"
