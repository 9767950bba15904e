"""The scheduler around a paged cache: one forward pass a step reads pieces of prompts and decodes, side by side.

    submit   call -> sequences, in order of arrival, in `_waiting`
    admit    the first of them get blocks, as far as there are some and as one step can read
    plan     what each sequence has not read yet: one token where it is under way, else a piece of its prompt
    pass     all of that in one pass; who has read all makes a token
    leave    its blocks are free, and keep what they hold until they are needed

A sequence begins when there are blocks for what it has, and grows by a block at a time. When none is left, the newest
waits again and later reads again what is not kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfms_engines.blocks import Table
from hfms_engines.generation import Event, Scheduler, _Sequence

if TYPE_CHECKING:
    from hfms_cli import LoadedInfo
    from hfms_engines.openvino_runner import Runner


class PagedScheduler(Scheduler):
    """A loaded model whose cache comes in blocks."""

    _runner: Runner

    def __init__(self, runner: Runner, info: LoadedInfo, *, prefill_tokens: int) -> None:
        super().__init__(runner, info, prefill_tokens=prefill_tokens)
        self._blocks = runner.blocks
        self._tables: dict[_Sequence, Table] = {}

    def step(self) -> list[Event]:
        """One token of each sequence under way, and up to `prefill_tokens` of prompts."""
        events: list[Event] = []
        self._admit()
        self._make_room()
        pieces = self._plan()
        if not pieces:
            return events
        seqs = list(pieces)
        done = [s for s in seqs if s.cached + len(pieces[s]) == s.length]

        def work() -> list[int]:
            logits = self._runner.forward(
                list(pieces.values()),
                starts=[s.cached for s in seqs],
                tables=[self._tables[s].blocks for s in seqs],
                wanted=[seqs.index(s) for s in done],
            )
            return self._choose(logits, done)

        tokens = self._attempt(work, seqs, events)
        if tokens is None:
            return events
        for seq, piece in pieces.items():
            seq.cached += len(piece)
        sound = {s for s, token in zip(done, tokens, strict=True) if token >= 0}
        for seq in seqs:
            # Looked at before its tokens are put together, which costs more.
            if (seq in sound or seq not in done) and seq.cached // self._blocks.size > len(self._tables[seq].names):
                self._blocks.publish(self._tables[seq], seq.tokens[: seq.cached])
        self._advance(done, tokens, events)
        return events

    def _plan(self) -> dict[_Sequence, list[int]]:
        """What each sequence reads in this step."""
        left = self._prefill_tokens
        pieces: dict[_Sequence, list[int]] = {}
        for seq in self._rows:
            unread = seq.length - seq.cached
            if unread == 1:
                pieces[seq] = [(seq.made or seq.prompt.ids)[-1]]
            elif left:
                pieces[seq] = seq.tokens[seq.cached : seq.cached + min(unread, left)]
                left -= len(pieces[seq])
        return pieces

    def _admit(self) -> None:
        """Let in the first in line while there is room, and as long as this step can read more of prompts.

        Nobody is let in earlier than needed: by then another may have read what both begin with.
        """
        unread = sum(s.length - s.cached for s in self._rows if s.length - s.cached > 1)
        while self._waiting and len(self._rows) < self.info.max_batch and unread < self._prefill_tokens:
            seq = self._waiting[0]
            # Another choice of this call may be about to read what this one can share.
            full = (len(seq.prompt.ids) - 1) // self._blocks.size * self._blocks.size
            if self._blocks.share and any(s.prompt is seq.prompt and s.cached < full for s in self._rows):
                return
            table = self._blocks.open(seq.tokens)
            # A block to grow for each that is under way; alone, a sequence always fits.
            spare = len(self._rows)
            more = self._blocks.needed(seq.length) - len(table.blocks)
            if self._blocks.free < more + spare or not self._blocks.extend(table, seq.length):
                self._blocks.close(table)
                return
            self._let_in()
            seq.cached = len(table.names) * self._blocks.size
            self._tables[seq] = table
            self._rows.append(seq)
            unread += seq.length - seq.cached

    def _make_room(self) -> None:
        """Give each its next block; send the newest back to wait where there is none."""
        for seq in sorted(self._rows, key=lambda s: s.order):
            while seq in self._tables and not self._blocks.extend(self._tables[seq], seq.length):
                newest = max(self._rows, key=lambda s: s.order)
                self._leave(newest)
                newest.cached = 0
                self._waiting.appendleft(newest)

    def _leave(self, seq: _Sequence) -> None:
        self._rows.remove(seq)
        self._blocks.close(self._tables.pop(seq))

    def _wipe(self, seq: _Sequence) -> None:
        self._runner.wipe(self._blocks.disown(self._tables[seq]))
