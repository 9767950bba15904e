"""A paged cache for torch: keys and values in blocks, which sequences share and leave behind, for `PagedScheduler`.

A layer's blocks are one tensor, [blocks, size, heads, width]. What a pass runs side by side is gathered from them, by
each row's table, into what transformers' attention takes, [rows, heads, tokens, width]; so any attention that
transformers has runs on it (sdpa, eager, and on GPUs what sdpa picks there), with the masks of the model's own
making, as in `torch_runner`.

transformers' own PagedAttentionCache packs all sequences into one row instead, with a dense mask of all tokens by all
tokens in the cache unless flash attention is installed: the mask alone grows with the square of the batch.

A pass is as many runs of the model as there are lengths of pieces: all that are under way in one, [rows, 1], and pieces
of prompts by their lengths, so nothing is padded. On CUDA and ROCm the first of these is a graph: rows and
tables are filled up to powers of two, and what was captured for such a shape is replayed.

Imports torch: for worker processes only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from transformers.cache_utils import Cache

from hfms_cli import LoadFailed
from hfms_engines.blocks import Blocks
from hfms_engines.torch_runner import Layer, Model, inference

__all__ = ["BLOCK", "PagedRunner"]

log = logging.getLogger("hfms.engine")

BLOCK = 16
"""Tokens of a block."""

# Of all tables of a graph: 16,384 tokens.
_MOST_BLOCKS = 1024


@dataclass
class Place:
    """Where the rows of one run stand, as tensors on the device.

    tables: [rows, blocks of the longest]. positions: [rows, tokens]. offsets: each row's first position, [rows].
    length: tokens that a row may look at, more than it has where others are longer.
    start: the one first position of all rows; None where they differ or are not to be known.
    """

    tables: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    length: int
    start: int | None = None


class _Pages(Layer["PagedCache"]):
    """A part of each block."""

    def _room_like(self, states: torch.Tensor) -> torch.Tensor:
        shape = (self._cache.count, BLOCK, states.shape[1], states.shape[3])
        if states.device.type != "cpu":
            return states.new_zeros(shape)
        # numpy's zeros take memory where they are written to, torch's all of it at once.
        room = numpy.zeros(math.prod(shape) * states.element_size(), numpy.uint8)
        return torch.from_numpy(room).view(states.dtype).view(shape)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states, [rows, heads, tokens, width], and return all that these rows may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self._cache.at
        blocks = at.tables.gather(1, at.positions // BLOCK)
        seen = []
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            stored[blocks, at.positions % BLOCK] = states.transpose(1, 2)
            rows = stored.index_select(0, at.tables.flatten()).unflatten(0, at.tables.shape).flatten(1, 2)
            seen.append(rows[:, : at.length].transpose(1, 2))
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.at.length, 0


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of all sequences. count: blocks, with those that `PagedRunner` keeps for itself."""

    at: Place

    def __init__(self, count: int) -> None:
        super().__init__(layers=[])
        self.count = count

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Pages(self))
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.at.length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        before: int = self.at.length - self.at.positions.shape[1]
        return before

    def get_query_offset(self, layer_idx: int = 0) -> int | torch.Tensor:
        """One number where all rows are known to stand at the same position, else [rows, 1, 1, 1] for `_by_row`."""
        return self.at.offsets[:, None, None, None] if self.at.start is None else self.at.start

    @inference
    def wipe(self, blocks: Sequence[int]) -> None:
        """Remove what blocks hold."""
        for layer in self.layers:
            if layer.is_initialized:  # one that shares another's keys and values never stores any
                for stored in (layer.keys, layer.values):
                    stored[list(blocks)] = 0


class PagedRunner(Model):
    """A model that `torch_runner` has loaded and proven, with a cache in blocks.

    tokens: what the cache holds. share: whether blocks are kept and found again. graphs: whether CUDA graphs are tried.
    Raises LoadFailed where the model answers otherwise from blocks.
    """

    def __init__(self, model: Model, *, tokens: int, share: bool, graphs: bool = True) -> None:
        self.take(model)
        self.blocks = Blocks(tokens // BLOCK, BLOCK, share=share)
        # One that stays zero, behind the end of short tables, and one that rows without a sequence write to.
        self.nothing, self.anything = self.blocks.count, self.blocks.count + 1
        self.pages = PagedCache(self.blocks.count + 2)
        self.graphs: Graphs | None = None
        self._prove()
        if graphs and self.device.type == "cuda":
            self.use_graphs(Graphs(self))

    @inference
    def forward(
        self,
        pieces: Sequence[Sequence[int]],
        *,
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        tails: Sequence[int],
        adapters: Sequence[str] = (),
    ) -> torch.Tensor:
        """Run pieces of sequences, and return the logits of as many of each one's last tokens as `tails` says.

        starts: how many tokens of each sequence are in its blocks. tables: its blocks, enough for the piece too.
        adapters: the id of each one's, empty for the model as it is; without any, all are.
        Returns [sum of tails, vocabulary] float32.
        """
        said: list[torch.Tensor] = []
        owners: list[int] = []
        """Of the rows in `said`: the piece that each is of."""
        for run in self._runs(pieces, starts):
            keep = max(1, *(tails[i] for i in run))
            logits = self._forward(
                [pieces[i] for i in run],
                [starts[i] for i in run],
                [tables[i][: self.blocks.needed(starts[i] + len(pieces[i]))] for i in run],
                keep,
                [adapters[i] for i in run] if any(adapters) else [],
            )
            wanted = [row * keep + k for row, i in enumerate(run) for k in range(keep - tails[i], keep)]
            said.append(logits.flatten(0, 1)[wanted].float())  # a copy: a graph's are overwritten
            owners += [i for i in run for _ in range(tails[i])]
        in_order = sorted(range(len(owners)), key=owners.__getitem__)
        return torch.cat(said)[in_order] if len(said) > 1 else said[0]

    def _runs(self, pieces: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """Which pieces run side by side: those of one length, as many as fill no more blocks than the cache has.

        Beside a long row the others are filled up to it, so rows that are about as long go together.
        """
        runs: list[list[int]] = []
        for width in dict.fromkeys(map(len, pieces)):
            alike = [i for i, piece in enumerate(pieces) if len(piece) == width]
            if len(alike) * self.blocks.needed(max(starts[i] for i in alike) + width) <= self.blocks.count:
                runs.append(alike)
                continue
            runs.append([])
            for i in sorted(alike, key=lambda i: starts[i]):
                if (len(runs[-1]) + 1) * self.blocks.needed(starts[i] + width) > self.blocks.count:
                    runs.append([])
                runs[-1].append(i)
        return [run for run in runs if run]

    def _forward(
        self,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        keep: int,
        adapters: Sequence[str],
    ) -> torch.Tensor:
        """Rows of one length, each with the blocks that it has read and will: [rows or more, keep, vocabulary]."""
        self.changes.choose(adapters)
        width = len(tokens[0])
        columns = max(map(len, tables))
        # What an adapter adds is of this pass, and is in no graph.
        if self.graphs and width == 1 and not any(adapters) and self.graphs.takes(len(tokens), columns):
            try:
                return self.graphs.run(tokens, starts, tables)
            except Exception as exc:
                self._give_up_graphs(type(exc).__name__)
        place = self.place(starts, tables, width, columns)
        place.length = max(starts) + width
        place.start = starts[0] if len(set(starts)) == 1 else None
        return self.run_at(torch.tensor(tokens, device=self.device), place, keep)

    def place(self, starts: Sequence[int], tables: Sequence[Sequence[int]], width: int, columns: int) -> Place:
        """Where rows stand whose tables are filled up to so many columns, and who may look at all of these."""
        filled = [[*table, *[self.nothing] * (columns - len(table))] for table in tables]
        offsets = torch.tensor(starts, device=self.device)
        return Place(
            torch.tensor(filled, device=self.device),
            offsets[:, None] + torch.arange(width, device=self.device),
            offsets,
            columns * BLOCK,
        )

    def run_at(self, ids: torch.Tensor, place: Place, keep: int) -> torch.Tensor:
        """[rows, keep, vocabulary]"""
        self.pages.at = place
        return self.run(ids, place.positions, self.pages, keep)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Remove what blocks hold, such as values that are not finite, which would spoil the next sequence in them."""
        self.pages.wipe(blocks)

    def release(self) -> None:
        """Nothing: what blocks hold is for the next call that begins alike."""

    def use_graphs(self, graphs: Graphs) -> None:
        """From now on, where the model can be captured and says the same then."""
        self.graphs = graphs
        try:
            self._prove()
        except LoadFailed:
            self._give_up_graphs("it answers otherwise")

    def _give_up_graphs(self, why: str) -> None:
        """Go on without them. Raises what tells that the device is lost, where it is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.graphs = None
        self.trim()
        log.warning("%s runs without CUDA graphs: %s.", type(self.model).__name__, why)

    @inference
    def _prove(self) -> None:
        """Refuse a model that answers otherwise from blocks than without a cache. Also takes the blocks' memory.

        Two rows, read to different lengths, one of them in two pieces, go on side by side, and once more, which tells
        a graph that replays what it was captured with.
        """
        ids = [i % self.vocabulary for i in range(5, BLOCK + 9)]
        end = len(ids) - 2
        both = first, second = [0, 1], [2]
        try:
            whole = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0].float()
            self.forward([ids[:7], ids[:4]], starts=[0, 0], tables=both, tails=[0, 0])
            self.forward([ids[7:end]], starts=[7], tables=[first], tails=[0])
            ours = [
                self.forward([ids[end + n :][:1], ids[4 + n :][:1]], starts=[end + n, 4 + n], tables=both, tails=[1, 1])
                for n in range(2)
            ]
        except Exception as exc:
            if self.is_out_of_memory(exc):
                raise
            raise LoadFailed(f"{type(self.model).__name__} does not take a cache in blocks.") from exc
        self.wipe([*first, *second])
        if not self.is_same(torch.cat(ours), whole[[end, 4, end + 1, 5]]):
            raise LoadFailed(f"{type(self.model).__name__} answers otherwise from a cache in blocks.")


@dataclass
class _Graph:
    """A captured pass: what it reads, and how it is run again."""

    ids: torch.Tensor
    place: Place
    replay: Callable[[], torch.Tensor]


class Graphs:
    """Passes over one token a row, captured once for each shape and replayed: kernels cost more to launch than to run.

    A shape is rows and columns of tables, each filled up to a power of two.
    """

    def __init__(self, runner: PagedRunner) -> None:
        self._runner = runner
        self.captured: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None

    @staticmethod
    def takes(rows: int, columns: int) -> bool:
        """Whether a pass is small: in a large one kernels take longer than their launch, and filling up costs more."""
        return _power(rows) * _power(columns) <= _MOST_BLOCKS

    def run(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """[rows or more, 1, vocabulary], good until the next run."""
        runner = self._runner
        rows, columns = _power(len(tokens)), _power(max(map(len, tables)))
        spare = rows - len(tokens)
        ids = torch.tensor([*tokens, *[[0]] * spare], device=runner.device)
        place = runner.place([*starts, *[0] * spare], [*tables, *[[runner.anything]] * spare], 1, columns)
        graph = self.captured.get((rows, columns))
        if graph is None:
            graph = self.captured[rows, columns] = _Graph(ids, place, self.capture(ids, place))
        else:
            graph.ids.copy_(ids)
            for name in ("tables", "positions", "offsets"):
                getattr(graph.place, name).copy_(getattr(place, name))
        return graph.replay()

    def capture(self, ids: torch.Tensor, place: Place) -> Callable[[], torch.Tensor]:
        """A pass over what these tensors hold when it is called."""
        runner = self._runner
        # A capture that fails would leave its own stream behind as the current one.
        with torch.cuda.device(runner.device), torch.cuda.stream(torch.cuda.current_stream(runner.device)):
            # What libraries set up at first use must not happen while a graph is captured.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                runner.run_at(ids, place, 1)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                made = runner.run_at(ids, place, 1)
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return made

        return replay


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
