"""Guessing what comes next, so that one pass can say several tokens.

A pass reads all guessed tokens and says whether each is what the model itself would have said, so the answer is the
same. A guess is what followed when the same few tokens last stood in the prompt or the answer ("prompt lookup"), or
what a smaller model says ("draft model").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_engines.blocks import Table

if TYPE_CHECKING:
    from hfms_engines.openvino_runner import Runner
    from hfms_engines.scheduler import Seq

# Tokens that must agree before a guess is made.
_AGREEING = 3
# Tokens for which a sequence whose guesses keep failing makes none.
_PAUSE = 32
# So many passes' time may drafts have cost of late more than they saved; then there are none for so many steps.
_PATIENCE = 4
_REST = 64
# A draft model that has more of a sequence to read than this, reads first.
_NEAR = 16
# Of what drafts have saved and cost so far, so much counts at the next step.
_MEMORY = 0.95


class Reach:
    """How many tokens a sequence guesses: more while that goes well, and none for a while when it does not.

    most: tokens of the longest guess.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._tokens = min(2, most)
        self._paused_until = 0

    def at(self, length: int) -> int:
        """Tokens to guess for a sequence of that length."""
        return 0 if length < self._paused_until else self._tokens

    def learn(self, guessed: int, right: int, length: int) -> None:
        """Of so many guessed tokens so many were right, in a sequence of that length."""
        if right == guessed:
            self._tokens = min(2 * self._tokens, self._most)
        elif right:
            self._tokens = right
        elif self._tokens > 1:
            self._tokens = 1
        else:
            self._paused_until = length + _PAUSE


class Guesser:
    """One sequence's guesses from what it has said itself."""

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}
        """Where it went on after these tokens, when they last stood somewhere."""
        self._reach = Reach(most)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The sequence goes on."""
        if len(self._tokens) >= _AGREEING:
            self._followed[tuple(self._tokens[-_AGREEING:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to so many tokens that may come next; often none."""
        at = self._followed.get(tuple(self._tokens[-_AGREEING:]))
        most = min(most, self._reach.at(len(self._tokens)))
        return [] if at is None else self._tokens[at : at + most]

    def learn(self, guessed: int, right: int) -> None:
        """Of so many guessed tokens so many were right."""
        self._reach.learn(guessed, right, len(self._tokens))


@dataclass(eq=False)
class _Drafted:
    """What the draft model has read of a sequence."""

    table: Table
    reach: Reach
    held: int = 0
    """Tokens in its cache."""
    sure: int = 0
    """Tokens of which it is known that the sequence has them; what is in the cache beyond that was only guessed."""


class Drafter:
    """Guesses of a smaller model with the same vocabulary, for all sequences at once: a pass a token.

    It reads a prompt when it first guesses for a sequence, in pieces as the large model does, and later what it has not
    seen. What it got wrong it reads again, over what it had. It rests where it costs more time than it saves.
    """

    def __init__(
        self, runner: Runner, *, most: int, prefill_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runner = runner
        self._most = most
        self._prefill_tokens = prefill_tokens
        self._clock = clock
        self._drafted: dict[Seq, _Drafted] = {}
        self._saved = 0.0
        """Seconds saved of late, less those that it took."""
        self._resting = 0
        """Steps."""

    def guess(self, wanted: Mapping[Seq, int]) -> dict[Seq, list[int]]:
        """Up to so many tokens that may come next, of each sequence; none where it is not worth it."""
        if self._resting:
            self._resting -= 1
            return {}
        guesses: dict[Seq, list[int]] = {}
        goals: dict[Seq, int] = {}
        for seq, most in wanted.items():
            drafted = self._drafted.get(seq)
            if drafted is None:
                drafted = self._drafted[seq] = _Drafted(self._runner.blocks.open(()), Reach(self._most))
            drafted.held = min(drafted.held, drafted.sure)
            drafted.sure = seq.length
            most = min(most, drafted.reach.at(seq.length))
            if most > 0 and self._runner.blocks.extend(drafted.table, seq.length + most):
                goals[seq] = most
        self._read_up(goals)
        began = self._clock()
        pieces = {seq: seq.tokens[self._drafted[seq].held :] for seq in goals if self._is_near(seq)}
        while pieces:
            for seq, token in zip(pieces, self._pass(pieces), strict=True):
                guesses.setdefault(seq, []).append(token)
            pieces = {seq: guesses[seq][-1:] for seq in pieces if len(guesses[seq]) < goals[seq]}
        self._saved = self._saved * _MEMORY - (self._clock() - began)
        return guesses

    def learn(self, seq: Seq, guessed: int, right: int, pass_seconds: float) -> None:
        """Of so many tokens guessed for a sequence so many were right, each of which saves a pass."""
        drafted = self._drafted[seq]
        drafted.sure += right
        drafted.reach.learn(guessed, right, seq.length)
        self._saved += right * pass_seconds
        if self._saved < -pass_seconds * _PATIENCE:
            self._saved, self._resting = 0.0, _REST

    def forget(self, seq: Seq) -> None:
        """The sequence has left its place."""
        if drafted := self._drafted.pop(seq, None):
            self._runner.blocks.close(drafted.table)

    def _is_near(self, seq: Seq) -> bool:
        return seq.length - self._drafted[seq].held <= _NEAR

    def _read_up(self, seqs: Iterable[Seq]) -> None:
        """A piece of the first sequence of which there is much to read: its prompt, mostly."""
        far = next((seq for seq in seqs if not self._is_near(seq)), None)
        if far is not None:
            held = self._drafted[far].held
            self._pass({far: far.tokens[held : min(held + self._prefill_tokens, far.length - 1)]})

    def _pass(self, pieces: Mapping[Seq, list[int]]) -> list[int]:
        """Read on, and return the likeliest next token of each."""
        drafted = [self._drafted[seq] for seq in pieces]
        logits = self._runner.forward(
            list(pieces.values()),
            starts=[d.held for d in drafted],
            tables=[d.table.blocks for d in drafted],
            tails=[1] * len(pieces),
        )
        for row, piece in zip(drafted, pieces.values(), strict=True):
            row.held += len(piece)
        return [int(token) for token in logits.argmax(axis=-1)]
