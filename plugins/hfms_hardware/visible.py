"""Which devices an environment variable such as CUDA_VISIBLE_DEVICES leaves, by the rules of CUDA."""

from __future__ import annotations

from collections.abc import Sequence


def visible(value: str | None, uuids: Sequence[str]) -> list[int]:
    """Positions in `uuids` of the devices that are left, in the order that the variable gives them.

    value: positions and UUIDs (or their beginnings), separated by commas; None, where the variable is not set, leaves
    all. What names no device, or more than one, hides itself and all that follows; a device named twice hides all.
    """
    if value is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for word in (part.strip() for part in value.split(",")):
        if word.isdecimal():
            named = [int(word)] if int(word) < len(uuids) else []
        else:
            named = [i for i, uuid in enumerate(uuids) if "-" in word and uuid.lower().startswith(word.lower())]
        if len(named) != 1:
            break
        if named[0] in chosen:
            return []
        chosen += named
    return chosen
