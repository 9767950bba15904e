"""The scheduler around slots, as torch has them: one pass decodes all rows, another reads prompts.

A call is answered by sequences, one for each input and choice. Each step runs every sequence that is under way one
token further, in one forward pass, and then reads prompts in another: several short ones, or a piece of a long one. So
sequences join, leave and are cancelled between any two steps.

    fill     the first in line move to the slots behind the rows, and their prompts are read
    decode   they are in `_rows`, and each step makes one token of each
    leave    the last row moves into the free slot, so that rows stay without gaps

Slots are as long as the longest sequence in them, so memory is slots times longest. A sequence begins when there is
room for it as it is. If those under way outgrow the cache, the last of them waits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hfms_engines.scheduler import Event, Scheduler, Seq

if TYPE_CHECKING:
    import torch

    from hfms_cli import LoadedInfo
    from hfms_engines.torch_apart import ApartRunner
    from hfms_engines.torch_runner import Runner


class SlotScheduler(Scheduler):
    """A loaded model whose cache comes in slots, or that keeps a state for each."""

    _runner: Runner | ApartRunner

    def __init__(
        self, runner: Runner | ApartRunner, info: LoadedInfo, *, prefill_tokens: int, stall_seconds: float
    ) -> None:
        super().__init__(runner, info, prefill_tokens=prefill_tokens, stall_seconds=stall_seconds)
        self._cache = runner.cache
        self._filling: list[Seq] = []
        """Let in, and not read to the end. Where the first is partly read, it is in the slot behind the rows."""

    # --- one step ---

    def step(self) -> list[Event]:
        """One token of each sequence under way, and as much of prompts as the pace allows."""
        events: list[Event] = []
        self._compiled(events)
        self._make_room()
        if self._rows:
            self._decode(events)
            self._make_room()
        self._fill(events)
        if not self.busy():
            self._runner.release()
        return events

    def _decode(self, events: list[Event]) -> None:
        rows = list(self._rows)

        def work() -> list[int]:
            logits = self._forward(rows, [[s.made[-1]] for s in rows], [s.cached for s in rows], first=0)
            return self._choose(logits, rows)

        tokens = self._attempt(work, rows, events)
        if tokens is not None:
            for seq in rows:
                seq.cached += 1
            self._advance(rows, tokens, events)

    def _fill(self, events: list[Event]) -> None:
        most = self._pace.tokens(bool(self._rows))
        self._admit(most, events)
        if not self._filling:
            return
        pictures = self._filling[0].prompt.pictures
        if pictures is not None and not pictures.seen:
            self._attempt(pictures.look, self._filling, events)
            return
        began = self._clock()
        # One sequence reads each prompt, and the others that have the same copy what it has read.
        readers = self._readers(self._filling)
        copiers = [s for s in self._filling if s not in readers]
        family = readers + copiers
        if readers[0].prompt.unscored:  # and so alone
            most = min(most, self._score_tokens)
        if pictures is not None and (unread := len(readers[0].prompt.ids) - readers[0].cached) > 0:
            most = min(most, unread)  # what stands for an image in an answer is none
        width = min(most, max(s.length - s.cached for s in readers))
        pieces = [s.tokens[s.cached : s.cached + width] for s in readers]
        last = all(s.cached + len(piece) == s.length for s, piece in zip(readers, pieces, strict=True))

        scored = self._to_score(readers[0], width)
        scores: list[Callable[[], None]] = []

        def work() -> list[int]:
            short = [width - len(piece) for piece in pieces]
            tokens = [piece[:1] * n + piece for n, piece in zip(short, pieces, strict=True)]
            starts = [s.cached - n for n, s in zip(short, readers, strict=True)]
            first = len(self._rows)
            begin = readers[0].cached
            logits = self._forward(
                readers,
                tokens,
                starts,
                first=first,
                tail=scored + last if scored else 1,
                beside=pictures.beside(begin, begin + width) if pictures is not None else {},
            )
            if scored:
                scores.append(self._score_prompt(readers[0], logits[:scored]))
            if not last:
                return []
            logits = logits[-len(readers) :]
            source = [next(i for i, r in enumerate(readers) if r.prompt is s.prompt and not r.made) for s in copiers]
            for slot, i in enumerate(source, first + len(readers)):
                self._cache.copy(first + i, slot, readers[i].length)
            return self._choose(logits[[*range(len(readers)), *source]], family)

        tokens = self._attempt(work, self._filling, events)
        if tokens is None:
            return
        self._pace.took(self._clock() - began, width * len(readers), answering=False)
        for keep in scores:
            keep()
        for seq, piece in zip(readers, pieces, strict=True):
            self._was_read(seq, len(piece))
        if last:
            for seq in copiers:
                seq.cached = seq.length
            self._rows += family
            self._filling = []
            self._advance(family, tokens, events)

    @staticmethod
    def _readers(seqs: Iterable[Seq]) -> list[Seq]:
        """The first sequence of each prompt; one that has waited again has more to read than others with its prompt."""
        first: dict[int, Seq] = {}
        for seq in seqs:
            first.setdefault(id(seq if seq.made else seq.prompt), seq)
        return list(first.values())

    def _forward(
        self,
        seqs: list[Seq],
        tokens: list[list[int]],
        starts: list[int],
        *,
        first: int,
        tail: int = 1,
        beside: Mapping[str, Any] = {},
    ) -> torch.Tensor:
        self._cache.reserve(*self._slots())
        adapters = [s.call.adapter for s in seqs]
        return self._runner.forward(tokens, starts, first, tail=tail, adapters=adapters, beside=beside)

    def _admit(self, most: int, events: list[Event]) -> None:
        """Let in the first in line: as many as there are slots and room for, and as one pass can read."""
        while (seq := self._line.first()) is not None:
            readers = self._readers([*self._filling, seq])
            together = len(readers) * max(s.length for s in readers) <= most
            if len(readers) > 1 and (not together or any(s.prompt.alone for s in readers)):
                return
            while not self._fits(seq):
                other = self._yielding(seq)
                if other is None:
                    return
                self._send_back(other)
            self._let_in(seq, events)
            self._filling.append(seq)

    def _fits(self, seq: Seq) -> bool:
        used = [*self._rows, *self._filling, seq]
        longest = max(s.length + min(s.limit, 1) for s in used)
        return len(used) <= self.info.max_batch and self._cache.fits(len(used), longest)

    # --- slots ---

    def _slots(self) -> tuple[int, int]:
        """Slots in use, and the longest sequence that the next pass makes of them."""
        used = [*self._rows, *self._filling]
        return len(used), max((s.length for s in used), default=0)

    def _make_room(self) -> None:
        """Send back to wait while those under way outgrow the cache: first who has made nothing yet."""
        while not self._cache.fits(*self._slots()):
            self._send_back(self._filling[-1] if self._filling else self._last(self._rows))

    def _leave(self, seq: Seq) -> None:
        """Take a sequence out of its slot, and close the gap."""
        if seq in self._filling:
            self._filling.remove(seq)
            return
        at, last = self._rows.index(seq), len(self._rows) - 1
        self._cache.copy(last, at, self._rows[last].cached)
        self._rows[at] = self._rows[last]
        self._rows.pop()
        if self._filling:
            self._cache.copy(last + 1, last, self._filling[0].cached)

    def _wipe(self, seq: Seq) -> None:
        self._cache.wipe(self._rows.index(seq))

    def _under_way(self) -> list[Seq]:
        return self._rows + self._filling
