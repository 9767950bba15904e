"""The scheduler around a paged cache: one forward pass a step reads pieces of prompts and decodes, side by side.

    admit    the first in line get blocks, as far as there are some and as one step can read
    plan     what each sequence has not read yet: a token where it is under way, else a piece of its prompt;
             a flood sits out the pass that makes the first token of one who has less than its share
    guess    what may come next, by its structure, by what was there before or by a draft model, to be read along and
             checked, while the pass has room for more rows
    pass     all of that in one pass; who has read all makes a token, and one more for each right guess
    leave    its blocks are free, and keep what they hold until they are needed

A sequence begins when there are blocks for what it has, and grows by a block at a time. When none is left, the last
of those under way waits again and later reads again what is not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hfms_engines.blocks import Blocks, Table
from hfms_engines.scheduler import AnyRunner, Event, Scheduler, Seq
from hfms_engines.speculate import Drafter, Guesser

if TYPE_CHECKING:
    from hfms_cli import LoadedInfo
    from hfms_engines.arrays import Array
    from hfms_engines.openvino_runner import Runner

log = logging.getLogger("hfms.engine")

# Guessed tokens of one pass. While there are few rows, more of them cost next to nothing: the weights are read anyway.
_GUESSES = 8


class PagedModel(AnyRunner, Protocol):
    """A model with a paged cache: `openvino_runner` and `torch_paged` have one each, and `forward` is told of there."""

    blocks: Blocks

    def forward(
        self,
        pieces: Sequence[Sequence[int]],
        *,
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        tails: Sequence[int],
        adapters: Sequence[str] = (),
    ) -> Array: ...

    def wipe(self, blocks: Sequence[int]) -> None:
        """Remove what blocks hold that is not finite."""


@dataclass
class _Piece:
    """What a sequence reads in a pass: `tokens`, of which the last are guessed."""

    seq: Seq
    tokens: list[int]
    guesses: list[int]
    drafted: bool
    """The guesses are the draft model's."""
    tail: int
    """Tokens that the pass chooses, if every guess is right."""
    scored: int = 0
    """Tokens before the tail whose logits tell of a prompt that logprobs were asked for of."""


class PagedScheduler(Scheduler):
    """A loaded model whose cache comes in blocks.

    guess_tokens: the longest guess at what comes next; 0: none. draft: a smaller model that guesses, where what was
    there before says nothing. share: whether prompts of different keys may share blocks.
    """

    _runner: PagedModel

    def __init__(
        self,
        runner: PagedModel,
        info: LoadedInfo,
        *,
        prefill_tokens: int,
        stall_seconds: float,
        guess_tokens: int = 0,
        draft: Runner | None = None,
        share: bool = False,
    ) -> None:
        super().__init__(runner, info, prefill_tokens=prefill_tokens, stall_seconds=stall_seconds)
        self._blocks = runner.blocks
        self._share = share
        self._tables: dict[Seq, Table] = {}
        self._guess_tokens = guess_tokens
        self._guessers: dict[Seq, Guesser] = {}
        self._drafter: Drafter | None = None
        if draft is not None and guess_tokens:
            self._drafter = Drafter(draft, most=guess_tokens, prefill_tokens=prefill_tokens, clock=self._clock)
        self._sat_out = False
        """Somebody had to, in the last pass."""

    def step(self) -> list[Event]:
        """A token or more of each sequence under way, and as much of prompts as the pace allows."""
        events: list[Event] = []
        self._compiled(events)
        answering = any(s.length - s.cached == 1 for s in self._rows)
        self._admit(answering, events)
        self._make_room()
        pieces = self._plan(answering)
        if not pieces:
            return events
        began = self._clock()
        choosing = [p for p in pieces if p.tail]
        scores: list[Callable[[], None]] = []

        def work() -> list[int]:
            logits = self._runner.forward(
                [p.tokens for p in pieces],
                starts=[p.seq.cached for p in pieces],
                tables=[self._tables[p.seq].blocks for p in pieces],
                tails=[p.scored + p.tail for p in pieces],
                adapters=[p.seq.call.adapter for p in pieces],
            )
            if any(p.scored for p in pieces):
                logits = self._without_scored(pieces, logits, scores)
            samplers = [s for p in choosing for s in p.seq.sampler.along(p.guesses)]
            return self._choose(logits, [p.seq for p in choosing for _ in range(p.tail)], samplers)

        chosen = self._attempt(work, [p.seq for p in pieces], events)
        if chosen is None:
            return events
        read = sum(len(p.tokens) for p in pieces if len(p.tokens) - len(p.guesses) > 1)
        beside = any(len(p.tokens) - len(p.guesses) == 1 for p in pieces)
        seconds = self._clock() - began
        self._pace.took(seconds, read, beside)
        for keep in scores:
            keep()
        said = iter(chosen)
        for piece in pieces:
            self._conclude(piece, [next(said) for _ in range(piece.tail)], seconds, events)
        return events

    def _without_scored(self, pieces: list[_Piece], logits: Array, scores: list[Callable[[], None]]) -> Array:
        """Look at the rows that tell of prompts, and return those that tokens are chosen from."""
        at = 0
        choosing: list[int] = []
        for piece in pieces:
            if piece.scored:
                scores.append(self._score_prompt(piece.seq, logits[at : at + piece.scored]))
            at += piece.scored
            choosing += range(at, at + piece.tail)
            at += piece.tail
        return logits[choosing]

    def _conclude(self, piece: _Piece, chosen: list[int], seconds: float, events: list[Event]) -> None:
        """Take what the pass says of one sequence: tokens up to the first that was guessed wrong.

        seconds: what the pass took.
        """
        seq, guesses = piece.seq, piece.guesses
        if seq not in self._tables:
            return  # another sequence of its call has just failed
        right = 0
        while right < len(guesses) and chosen[right] == guesses[right]:
            right += 1
        made = chosen[: right + 1]
        self._was_read(seq, len(piece.tokens) - len(guesses) + right)
        table = self._tables[seq]
        # Looked at before the tokens are put together, which costs more.
        if -1 not in made and seq.cached // self._blocks.size > len(table.names):
            self._blocks.publish(table, (seq.tokens + made)[: seq.cached])
        if guesses and piece.drafted and self._drafter:
            self._drafter.learn(seq, len(guesses), right, seconds)
        elif guesses:
            self._guessers[seq].learn(len(guesses), right)
        for token in made:
            if seq in self._guessers:
                self._guessers[seq].add(token)
            self._advance([seq], [token], events)
            if seq not in self._tables:
                return

    def _most(self, seq: Seq, answering: bool) -> int:
        """Prompt tokens of the next step, if `seq` reads: fewer where its key crowds out others."""
        return self._pace.tokens(answering, shared=self._line.crowds(seq.key))

    def _plan(self, under_way: bool) -> list[_Piece]:
        """What each sequence reads in this step. under_way: whether there are answers that it holds up."""
        pieces = []
        reading = self._reading()
        taking_part = self._taking_part(reading, under_way)
        answering = [s for s in taking_part if s.length - s.cached == 1]
        guessed = self._guesses(answering)
        for seq in answering:
            guesses, drafted = guessed.get(seq, ([], False))
            tokens = [(seq.made or seq.prompt.ids)[-1], *guesses]
            pieces.append(_Piece(seq, tokens, guesses, drafted, tail=len(tokens)))
        read = 0
        for seq in reading:
            width = self._most(seq, under_way) - read
            if width <= 0 or seq not in taking_part:
                continue
            if seq.prompt.unscored:
                width = min(width, self._score_tokens)
            tokens = seq.tokens[seq.cached : seq.cached + width]
            read += len(tokens)
            tail, scored = int(seq.cached + len(tokens) == seq.length), self._to_score(seq, len(tokens))
            pieces.append(_Piece(seq, tokens, [], False, tail, scored))
        return pieces

    def _taking_part(self, reading: list[Seq], answering: bool) -> list[Seq]:
        """Who is in the next pass.

        Where it makes the first token of one prompt, those who would give way to it sit out, so that it is quick: with
        64 rows beside it, a short prompt takes several times as long. Never twice running, or they would stand still.
        """
        everyone = self._rows
        first = reading[0] if reading and not self._sat_out else None
        self._sat_out = False
        if first and first.length - first.cached <= self._most(first, answering):
            share = self._shares()
            everyone = [s for s in self._rows if not self._gives_way(s, first, share)]
            self._sat_out = len(everyone) < len(self._rows)
        return everyone

    def _reading(self) -> list[Seq]:
        """Those with more than a token to read: the highest priority first, then the key that has had least."""
        reading = [s for s in self._rows if s.length - s.cached > 1]
        return sorted(reading, key=lambda s: (self._merit(s), -s.order), reverse=True)

    def _guesses(self, answering: list[Seq]) -> dict[Seq, tuple[list[int], bool]]:
        """What may follow each, and whether the draft model says so, as far as the pass has room for more rows."""
        spare = _GUESSES - len(answering)
        found: dict[Seq, tuple[list[int], bool]] = {}
        unknown: dict[Seq, int] = {}
        for seq in answering:
            # A guess can be checked where the likeliest token is taken.
            most = min(spare, self._guess_tokens, seq.limit - len(seq.made) - 1)
            if most > 0 and seq.sampler.foreseeable:
                if guesses := self._guess(seq, most):
                    spare -= len(guesses)
                    found[seq] = guesses, False
                else:
                    unknown[seq] = most
        share = spare // len(unknown) if unknown else 0
        if self._drafter and share > 0:
            for seq, guesses in self._draft(self._drafter, {s: min(m, share) for s, m in unknown.items()}).items():
                found[seq] = guesses, True
        return found

    def _draft(self, drafter: Drafter, wanted: dict[Seq, int]) -> dict[Seq, list[int]]:
        try:
            guesses = drafter.guess(wanted)
        except Exception:
            log.exception("the draft model failed, and is not asked again")
            self._drafter = None
            return {}
        guesses = {s: s.sampler.matcher.fitting(g) if s.sampler.matcher else g for s, g in guesses.items()}
        return {s: g for s, g in guesses.items() if self._blocks.extend(self._tables[s], s.length + len(g))}

    def _guess(self, seq: Seq, most: int) -> list[int]:
        """What has to follow, or followed when it last stood like this, where there are blocks for it."""
        guesser = self._guessers.get(seq)
        if guesser is None:
            guesser = self._guessers[seq] = Guesser(seq.tokens, self._guess_tokens)
        guesses = guesser.guess(most)
        if (matcher := seq.sampler.matcher) is not None:
            guesses = matcher.forced()[:most] or matcher.fitting(guesses)
        return guesses if self._blocks.extend(self._tables[seq], seq.length + len(guesses)) else []

    def _admit(self, answering: bool, events: list[Event]) -> None:
        """Let in the first in line while there is room, and as long as this step can read more of prompts.

        Nobody is let in earlier than needed: by then another may have read what both begin with.
        """
        while (seq := self._line.first()) is not None:
            before = [s for s in self._reading() if self._merit(s) >= self._merit(seq)]
            if sum(s.length - s.cached for s in before) >= self._most(seq, answering):
                return
            # Another choice of this call may be about to read what this one can share.
            full = (len(seq.prompt.ids) - 1) // self._blocks.size * self._blocks.size
            if self._blocks.share and any(s.prompt is seq.prompt and s.cached < full for s in self._rows):
                return
            while (table := self._place(seq)) is None:
                other = self._yielding(seq)
                if other is None:
                    return
                self._send_back(other)
            self._let_in(seq, events)
            seq.cached = len(table.names) * self._blocks.size
            self._tables[seq] = table
            self._rows.append(seq)

    def _merit(self, seq: Seq) -> tuple[int, float]:
        return seq.priority, -self._line.had(seq.key)

    def _place(self, seq: Seq) -> Table | None:
        """Blocks for all that a sequence has; None where there is no room."""
        if len(self._rows) >= self.info.max_batch:
            return None
        # What blocks hold already cannot be scored.
        known = [] if seq.prompt.unscored else seq.tokens
        # The same tokens have other keys and values by another adapter.
        table = self._blocks.open(known, f"{seq.call.adapter} {'' if self._share else seq.call.tenant}")
        # A block to grow for each that is under way; alone, a sequence always fits.
        spare = len(self._rows)
        more = self._blocks.needed(seq.length) - len(table.blocks)
        if self._blocks.free < more + spare or not self._blocks.extend(table, seq.length):
            self._blocks.close(table)
            return None
        return table

    def _make_room(self) -> None:
        """Give each its next block; send the last back to wait where there is none."""
        while any(not self._blocks.extend(self._tables[s], s.length) for s in self._rows):
            self._send_back(self._last(self._rows))

    def _leave(self, seq: Seq) -> None:
        self._rows.remove(seq)
        self._guessers.pop(seq, None)
        if self._drafter:
            self._drafter.forget(seq)
        self._blocks.close(self._tables.pop(seq))

    def _wipe(self, seq: Seq) -> None:
        self._runner.wipe(self._blocks.disown(self._tables[seq]))
