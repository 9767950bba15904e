"""Bytes for people."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """`1.5 GiB` for 1610612736."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
