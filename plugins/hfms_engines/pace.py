"""How much of prompts one step may read while other answers wait for their next token."""

from __future__ import annotations

# Fewer are not worth a step's own cost.
_LEAST = 32
# A step that stalls no answer may take so many times as long: only those who come meanwhile wait for it.
_ALONE = 3
# Tokens of a step before it is known what they cost.
_UNKNOWN = 256
# Weight of the newest measurement.
_NEW = 0.2


class Pace:
    """A step with a large piece of a prompt in it stalls all answers under way, so it is cut to a time.

    most: prompt tokens of any step. seconds: what reading prompts may add to one that others wait for. What a
    token costs is measured as it goes, so a small model on a fast machine reads much at once, and a large one little.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._cost = 0.0
        """Seconds a prompt token."""
        self._bare = 0.0
        """Seconds of a step that reads no prompt."""

    def tokens(self, answering: bool) -> int:
        """Prompt tokens for the next step. answering: whether an answer is under way."""
        if not self._cost:
            return min(self._most, _UNKNOWN)
        seconds = self._seconds * (1 if answering else _ALONE)
        return max(min(_LEAST, self._most), min(self._most, int(seconds / self._cost)))

    def took(self, seconds: float, read: int, answering: bool) -> None:
        """A step with `read` prompt tokens took so long."""
        if not read:
            self._bare = _mean(self._bare, seconds)
        else:
            self._cost = _mean(self._cost, max(0.0, seconds - (self._bare if answering else 0.0)) / read)


def _mean(before: float, new: float) -> float:
    return before + _NEW * (new - before) if before else new
