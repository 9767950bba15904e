"""Guessing what comes next from what was there before.

A guess is what followed when the same few tokens last stood in the prompt or the answer ("prompt lookup"). One pass
reads all guessed tokens and says whether each is what the model itself would have said, so the answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterable

# Tokens that must agree before a guess is made.
_AGREEING = 3
# Tokens for which a sequence whose guesses keep failing makes none.
_PAUSE = 32


class Guesser:
    """One sequence's guesses. It guesses more while that goes well, and pauses when it does not.

    most: tokens of the longest guess.
    """

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}
        """Where it went on after these tokens, when they last stood somewhere."""
        self._most = most
        self._reach = min(2, most)
        self._paused_until = 0
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The sequence goes on."""
        if len(self._tokens) >= _AGREEING:
            self._followed[tuple(self._tokens[-_AGREEING:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to so many tokens that may come next; often none."""
        if len(self._tokens) < self._paused_until:
            return []
        at = self._followed.get(tuple(self._tokens[-_AGREEING:]))
        return [] if at is None else self._tokens[at : at + min(most, self._reach)]

    def learn(self, guessed: int, right: int) -> None:
        """Of so many guessed tokens so many were right."""
        if right == guessed:
            self._reach = min(2 * self._reach, self._most)
        elif right:
            self._reach = right
        elif self._reach > 1:
            self._reach = 1
        else:
            self._paused_until = len(self._tokens) + _PAUSE
