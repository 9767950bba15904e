"""Answers that have a shape: JSON of a schema, a regex, a choice, a grammar. By llguidance; for worker processes only.

    check    a process of its own makes a grammar of the structure (`structure_check`): what is too much ends there
    compile  a thread makes a matcher of the grammar, beside the steps; it is kept for the next call that asks the same
    follow   each sequence has a matcher of its own, which says before each token which ones may come

A matcher lets the tokens that end an answer through only where the structure may end, and where it can only end, the
answer ends by itself.

A structure of kind `grammar` may hold literal text around JSON, in Lark with llguidance's `%json`, so a call of a tool
can be written as

    %llguidance {}
    start: "<tool_call>\\n" call "\\n</tool_call>"
    call: %json {"type": "object", "properties": {"name": {"const": "f"}, "arguments": {...}}, ...}

`"x-guidance": {"whitespace_pattern": " ?"}` in such a schema bounds the blanks between its parts, as is done here for
schemas that come by themselves (`structure_check.WHITESPACE`). Where the text is a special token of the model, it is
named without quotes: `start: <|tool_call|> call`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfms_cli import BadRequest, Structure
from hfms_engines import structure_check
from hfms_engines.beside import Beside
from hfms_engines.vocabulary import BYTES

if TYPE_CHECKING:
    from hfms_engines.arrays import Array

T = TypeVar("T")

STUCK = "It has become too much work to say what fits the structure that was asked for; ask for a simpler one."

# Bytes of a structure.
LARGEST = 128 * 1024
# Compiled structures that a model keeps.
_KEPT = 64
# Beyond what the check has: what passes there must pass here.
_STACK_BYTES = 64 << 20

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def invalid(structure: Structure, why: str) -> BadRequest:
    """The error of a structure that cannot be followed."""
    what = {"json_object": "JSON", "json_schema": "JSON schema", "choice": "choice"}.get(structure.kind, structure.kind)
    return BadRequest(f"The {what} cannot be followed: {why}", param=structure.param, code="invalid_schema")


class Matcher:
    """Where one sequence stands in its structure."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def copy(self) -> Matcher:
        """One that stands at the same place, and goes on by itself."""
        return Matcher(self._inner.deep_copy())

    def bar(self, row: Array, going_on: Collection[int] = ()) -> None:
        """Take from a row of logits, [vocabulary], what may not come next.

        going_on: tokens that end an answer, where they may come only if nothing else can.
        """
        # Here, for llama.cpp's answers have a structure without numpy.
        import numpy as np

        from hfms_engines.arrays import like, namespace

        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        if self.stuck:
            return
        barred = np.unpackbits(bits, count=len(row), bitorder="little") == 0
        if going_on:
            more = barred.copy()
            more[list(going_on)] = True
            barred = barred if more.all() else more
        row[like(row, barred, namespace(row).bool)] = -inf

    def took(self, token: int) -> None:
        """The sequence goes on with this token."""
        self._inner.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing more can come."""
        return bool(self._inner.is_stopped()) and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether it has become too much work to say what may come next."""
        return bool(self._inner.is_error())

    def forced(self) -> list[int]:
        """The tokens that likely come next, for their text is the only one that may."""
        forced: list[int] = self._inner.compute_ff_tokens()
        return forced

    def fitting(self, tokens: list[int]) -> list[int]:
        """These, up to the first that may not come."""
        return tokens[: self._inner.validate_tokens(list(tokens))]


class Matchers:
    """Makes matchers for one model's tokens.

    vocabulary: tokens of its logits. stop_ids: those that end an answer. silent_ids: those without text.
    """

    def __init__(
        self, tokenizer: Any, *, vocabulary: int, stop_ids: Collection[int], silent_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._size = vocabulary + 1
        # What ends an answer where nothing does: a token that the model has not.
        self._stop_ids = sorted(stop_ids) or [vocabulary]
        self._special = {i: tokenizer.convert_ids_to_tokens(i) or "" for i in silent_ids if i < vocabulary}
        self._checker = Checker(self._special | {i: "" for i in self._stop_ids if i not in self._special}, self._size)
        self._known: Any = None
        """llguidance's view of the tokenizer, once it was needed."""

    def make(self, structure: Structure) -> Matcher:
        """A matcher to copy. Raises BadRequest."""
        grammar = self._checker.check(structure)
        from llguidance import LLMatcher

        if self._known is None:
            self._known = self._view(structure)
        inner = LLMatcher(self._known, grammar, log_level=0, limits=structure_check.limits())
        # Those that are copied from it need not find out again what may come first.
        if not inner.is_error():
            inner.compute_bitmask()
        if inner.is_error():
            raise invalid(structure, structure_check.plain(inner.get_error()))
        return Matcher(inner)

    def close(self) -> None:
        self._checker.close()

    def _view(self, structure: Structure) -> Any:
        """Of the tokens' bytes: to read a tokenizer's own file takes several times as long, and stops all else."""
        from llguidance import LLTokenizer

        words = self._tokenizer
        texts = bytes_of(words)
        if texts is None:
            raise BadRequest(
                "This model's tokenizer does not say which bytes its tokens stand for, so its answers cannot be"
                " constrained.",
                param=structure.param,
                code="unsupported_parameter",
            )

        def encode(text: bytes) -> list[int]:
            ids: list[int] = words(text.decode(errors="ignore"), add_special_tokens=False)["input_ids"]
            return ids

        made = structure_check.tokenizer_of(
            [texts.get(i, b"") for i in range(self._size)],
            special={*self._special, *self._stop_ids},
            ends=self._stop_ids,
            encode=encode,
        )
        # In two parts, between which other threads can run.
        return made.with_slices(LLTokenizer.general_slices())


class Followers:
    """Makes what another library's grammar is followed by: it constrains, and says nothing when it gives that up."""

    def __init__(self) -> None:
        self._checker = Checker({0: "<|end|>"}, vocabulary=1, layout=structure_check.ONE_LINE)
        self._bytes: Any = None

    def make(self, structure: Structure) -> Follower:
        """Raises BadRequest."""
        grammar = self._checker.check(structure)
        from llguidance import LLMatcher

        self._bytes = self._bytes or structure_check.bytes_and({256: b"<|end|>"}, 257, 256)
        inner = LLMatcher(self._bytes, grammar, log_level=0, limits=structure_check.limits())
        return Follower(grammar, inner, structure.param)

    def close(self) -> None:
        self._checker.close()


class Follower:
    """Checks a text as it comes."""

    def __init__(self, grammar: str, inner: Any, param: str) -> None:
        self.grammar = grammar
        self.param = param
        self._inner = inner

    def copy(self) -> Follower:
        return Follower(self.grammar, self._inner.deep_copy(), self.param)

    def follows(self, text: str) -> bool:
        """Whether all so far can still become what was asked for."""
        return not text or bool(self._inner.consume_tokens(list(text.encode())))

    def complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._inner.is_accepting())


class Workshop(Beside[T]):
    """Makes of structures what calls need of them, beside the steps, and keeps it.

    make: called in a thread of its own, one at a time.
    """

    def __init__(self, make: Callable[[Structure], T], close: Callable[[], None]) -> None:
        super().__init__(
            "What the answer must look like could not be compiled.", name="structures", stack_bytes=_STACK_BYTES
        )
        self._make = make
        self._close = close
        self._kept: OrderedDict[Structure, Future[T]] = OrderedDict()

    def order(self, call_id: str, structure: Structure, then: Callable[[T], None]) -> None:
        """Have it made; `deliver` calls `then`. Raises BadRequest for what is plainly too large."""
        if len(structure.spec.encode()) > LARGEST:
            raise invalid(structure, f"it is larger than {LARGEST // 1024} KiB.")
        made = self._kept.pop(structure, None) or self.begin(partial(self._make, structure))
        self._kept[structure] = made
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        self.wait_for(call_id, made, then)

    def close(self) -> None:
        if self._thread is not None:
            super().close()
            self._close()


def bytes_of(tokenizer: Any) -> dict[int, bytes] | None:
    """The bytes that each token stands for; None where they cannot be known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = repr(getattr(backend, "decoder", None))
    if "ByteLevel" in decoder:

        def read(word: str) -> bytes:
            known = [BYTES.get(letter) for letter in word]
            # What was added to the vocabulary by hand stands there as it is.
            return word.encode() if None in known else bytes(b for b in known if b is not None)

    elif "ByteFallback" in decoder or "Metaspace" in decoder:

        def read(word: str) -> bytes:
            byte = _BYTE.fullmatch(word)
            return bytes.fromhex(byte[1]) if byte else word.replace("\u2581", " ").encode()

    else:
        return None
    assert backend is not None
    return {i: read(word) for word, i in backend.get_vocab(True).items()}


class Checker:
    """The process of `structure_check`. It is started again after a structure has ended it.

    special: names of special tokens, among them the one that ends an answer. vocabulary: tokens in all.
    layout: what may stand between parts of JSON.
    """

    def __init__(
        self, special: dict[int, str], vocabulary: int, *, layout: dict[str, Any] = structure_check.LAYOUT
    ) -> None:
        self._layout = layout
        self._about = {"special": special, "vocabulary": vocabulary, "end": max(special)}
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, structure: Structure) -> str:
        """A grammar, in Lark. Raises BadRequest."""
        if importlib.util.find_spec("llguidance") is None:
            raise BadRequest(
                f"This server cannot take `{structure.param}`; run: pip install llguidance",
                param=structure.param,
                code="unsupported_parameter",
            )
        child = self._child = self._child or self._start()
        answer = self._ask(child, {"kind": structure.kind, "spec": structure.spec, "layout": self._layout})
        if answer is None:
            self.close()
            raise invalid(structure, "it takes too long, or too much memory, to compile.")
        if "error" in answer:
            raise invalid(structure, answer["error"])
        return answer["grammar"]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        # What a compiler that fails has to say may hold what a caller has sent.
        child = subprocess.Popen(
            [sys.executable, "-P", str(Path(structure_check.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdin is not None
        child.stdin.write(json.dumps(self._about).encode() + b"\n")
        return child

    @staticmethod
    def _ask(child: subprocess.Popen[bytes], job: dict[str, Any]) -> dict[str, str] | None:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            return None
        answer: dict[str, str] | None = json.loads(line) if line else None
        return answer
