"""Which blocks of the key-value cache belong to which sequence, and what the free ones still hold.

A block holds the keys and values of `size` tokens. It is named by a digest of these tokens, of all before them, and of
whose they are, so a sequence that begins as another of the same owner did shares its blocks, and reads only what is
new. Nobody can tell by the time of an answer what others have asked. Free blocks keep their names until
they are needed, the one that was free longest first. Before them go those without a name, the one that was used last
first, so that memory which nobody has written to is not taken without need.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Table:
    """The blocks of one sequence, in order. owner: with whose sequences it may share them."""

    owner: str = ""
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Of those at its beginning that are full and can be shared."""


class Blocks:
    """All blocks of a cache.

    share: whether blocks are kept under their names and found again.
    """

    def __init__(self, count: int, size: int, *, share: bool = True) -> None:
        self.count = count
        self.size = size
        self.share = share
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._users = [0] * count
        self._by_name: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, length: int) -> int:
        """Blocks for so many tokens."""
        return -(-length // self.size)

    def open(self, tokens: Sequence[int], owner: str = "") -> Table:
        """A table with the blocks that already hold the beginning of these tokens; never all of them.

        A pass over no tokens says nothing, so the last token is always left to read.
        """
        table = Table(owner)
        if self.share:
            for name in self._names(table, tokens, (len(tokens) - 1) // self.size):
                block = self._by_name.get(name)
                if block is None:
                    break
                self._users[block] += 1
                self._free.pop(block, None)
                table.blocks.append(block)
                table.names.append(name)
        return table

    def extend(self, table: Table, length: int) -> bool:
        """Give a table room for so many tokens; False, and nothing changed, where there are too few blocks."""
        more = self.needed(length) - len(table.blocks)
        if more > len(self._free):
            return False
        for _ in range(more):
            block, _ = self._free.popitem(last=False)
            self._unname(block)
            self._users[block] = 1
            table.blocks.append(block)
        return True

    def publish(self, table: Table, tokens: Sequence[int]) -> None:
        """Let others find the full blocks of a table, which holds these tokens."""
        if not self.share or len(tokens) // self.size == len(table.names):
            return
        for name in self._names(table, tokens, len(tokens) // self.size):
            block = table.blocks[len(table.names)]
            table.names.append(name)
            if name not in self._by_name:
                self._by_name[name] = block
                self._name[block] = name

    def close(self, table: Table) -> None:
        """Take the blocks back. The end of a sequence is forgotten before its beginning, which others may have too."""
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                if block not in self._name:
                    self._free.move_to_end(block, last=False)
        table.blocks.clear()
        table.names.clear()

    def disown(self, table: Table) -> list[int]:
        """Let nobody find the blocks of a table any more; those that only it uses are returned."""
        for block in table.blocks:
            self._unname(block)
        return [block for block in table.blocks if self._users[block] == 1]

    def _unname(self, block: int) -> None:
        if name := self._name.pop(block, None):
            del self._by_name[name]

    def _names(self, table: Table, tokens: Sequence[int], count: int) -> list[bytes]:
        """Names of the first `count` blocks of these tokens, less those that the table has."""
        names = []
        name = table.names[-1] if table.names else table.owner.encode()
        for i in range(len(table.names), count):
            held = array("q", tokens[i * self.size : (i + 1) * self.size])
            name = hashlib.sha256(name + held.tobytes()).digest()
            names.append(name)
        return names
