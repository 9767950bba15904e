"""How much of prompts one step may read while other answers wait for their next token."""

from __future__ import annotations

# Fewer are not worth a step's own cost.
_LEAST = 32
# A step that stalls no answer may take so many times as long: only those who come meanwhile wait for it.
_ALONE = 3
# One that a caller of few calls may come to wait for takes a part of it, though less at once costs more a token.
_SHARED = 0.1
# Tokens of a step before it is known what they cost.
_UNKNOWN = 256
# Weight of the newest measurement of a step without prompts.
_NEW = 0.2
# Tokens that what a token costs is averaged over: a small piece is mostly the cost of reading any.
_WINDOW = 1024


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
        self._seen = 0
        """Prompt tokens that the cost is the mean of, up to `_WINDOW`."""
        self._warm = False
        """A step has read a prompt. The first of all lays the weights out, and tells nothing of the next."""

    def tokens(self, answering: bool, shared: bool = False) -> int:
        """Prompt tokens for the next step.

        answering: whether an answer is under way. shared: whether somebody who would go before may come meanwhile.
        """
        if not self._cost:
            return min(self._most, _UNKNOWN)
        seconds = self._seconds * (_SHARED if shared else 1 if answering else _ALONE)
        return max(min(_LEAST, self._most), min(self._most, int(seconds / self._cost)))

    def took(self, seconds: float, read: int, answering: bool) -> None:
        """A step with `read` prompt tokens took so long."""
        if not read:
            self._bare = _mean(self._bare, seconds, _NEW)
        elif not self._warm:
            self._warm = True
        else:
            cost = max(0.0, seconds - (self._bare if answering else 0.0)) / read
            self._seen += read
            self._cost = _mean(self._cost, cost, read / self._seen)
            self._seen = min(self._seen, _WINDOW)


def _mean(before: float, new: float, weight: float) -> float:
    return before + weight * (new - before) if before else new
