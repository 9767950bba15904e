"""What a server is asked: built-in prompts, ShareGPT's, or words at random.

Each prompt starts with a number that no other has: a server with a prefix cache would otherwise answer from it, and
be measured at that. Lengths are tokens where the server's own `usage` tells how it counts (`calibrate`), else words.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from hfms_cli.bench.measure import Outcome
from hfms_cli.errors import ConfigError

DEFAULT_OUTPUT_LEN = 128
PROBE_WORDS = (32, 288)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and how many tokens may answer it."""

    text: str
    output_len: int


@dataclass(frozen=True)
class Scale:
    """How a server counts: `overhead` tokens for what it puts around a prompt and for the prompt's number, and
    `per_word` for each word."""

    overhead: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: int) -> int:
        """Words of a prompt that the server counts as so many tokens; at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))

    def tokens(self, words: int) -> int:
        """Tokens of so many words by themselves; at least one."""
        return max(1, round(words * self.per_word))


IN_WORDS = Scale()
"""For a server that does not tell: each word counts as a token."""


@dataclass(frozen=True)
class Lengths:
    """Tokens to ask with and for. range_ratio r: lengths lie evenly from (1 - r) to (1 + r) times those given."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0

    def draw(self, mean: int, rng: random.Random) -> int:
        low, high = math.floor(mean * (1 - self.range_ratio)), math.ceil(mean * (1 + self.range_ratio))
        return max(1, rng.randint(low, high))


class Numbers:
    """Ten digits for each prompt, from a seed: none comes twice in ten thousand million."""

    LIMIT = 10**10
    STRIDE = 7_368_787_721  # prime to LIMIT, so all numbers come once; large, so that neighbours begin differently

    def __init__(self, seed: int) -> None:
        self._start = seeded("numbers", seed).randrange(self.LIMIT)
        self._count = count()

    def put_on(self, text: str) -> str:
        """The text behind the next number."""
        return f"{(self._start + next(self._count) * self.STRIDE) % self.LIMIT:010} {text}"


class DatasetName(StrEnum):
    """Where prompts come from."""

    BUILTIN = "builtin"
    RANDOM = "random"
    SHAREGPT = "sharegpt"


class Dataset:
    """Prompts by the batch. `source` yields texts and output lengths, afresh for each batch and without end."""

    def __init__(self, source: Callable[[], Iterator[Prompt]], numbers: Numbers | None) -> None:
        self._source = source
        self._numbers = numbers

    def take(self, size: int) -> list[Prompt]:
        """The first `size` prompts of the source, each with a number of its own where there are numbers."""
        prompts = islice(self._source(), size)
        if self._numbers is None:
            return list(prompts)
        return [Prompt(self._numbers.put_on(p.text), p.output_len) for p in prompts]


@dataclass(frozen=True)
class Prompts:
    """What to ask with. path: sharegpt's file. output_len: None for what the dataset itself says."""

    name: DatasetName
    path: Path | None
    output_len: int | None
    lengths: Lengths
    unique: bool
    seed: int

    async def prepare(self, send: Callable[[Prompt], Awaitable[Outcome]]) -> tuple[Dataset, str]:
        """The dataset, and what its lengths are counted in: `tokens` or `words`.

        send: asks the server, once where its way of counting matters. Raises ConfigError for a file that is no dataset.
        """
        rng = seeded("prompts", self.seed)
        numbers = Numbers(self.seed) if self.unique else None
        if self.name is DatasetName.BUILTIN:
            return Dataset(builtin(self.output_len or DEFAULT_OUTPUT_LEN), numbers), "tokens"
        talks = None if self.path is None else read_talks(self.path)
        if talks is not None and self.output_len is not None:
            return Dataset(sharegpt(talks, self.output_len, IN_WORDS, rng), numbers), "tokens"
        scale = await calibrate(send, numbers, rng)
        if talks is not None:
            source = sharegpt(talks, None, scale or IN_WORDS, rng)
        else:
            source = at_random(self.lengths, scale or IN_WORDS, rng)
        return Dataset(source, numbers), "tokens" if scale else "words"


def builtin(output_len: int) -> Callable[[], Iterator[Prompt]]:
    """hfms's own prompts, from one line to a page, in an order that mixes them."""
    texts = _shipped("prompts.txt").split("\n---\n")
    return lambda: cycle([Prompt(text.strip(), output_len) for text in texts])


def at_random(lengths: Lengths, scale: Scale, rng: random.Random) -> Callable[[], Iterator[Prompt]]:
    """Words without meaning; every batch has new ones."""

    def source() -> Iterator[Prompt]:
        while True:
            words = scale.words(lengths.draw(lengths.input_len, rng))
            yield Prompt(words_at_random(words, rng), lengths.draw(lengths.output_len, rng))

    return source


def sharegpt(
    talks: Sequence[tuple[str, str]], output_len: int | None, scale: Scale, rng: random.Random
) -> Callable[[], Iterator[Prompt]]:
    """Questions of talks, shuffled; each is answered as long as it was there, unless `output_len` says otherwise."""
    prompts = [Prompt(asked, output_len or scale.tokens(len(said.split()))) for asked, said in talks]
    rng.shuffle(prompts)
    return lambda: cycle(prompts)


def read_talks(path: Path) -> list[tuple[str, str]]:
    """First question and answer of each of ShareGPT's talks.

    The file is a JSON array, or JSON by the line, of `{"conversations": [{"value": question}, {"value": answer}]}`.
    Others are passed over. Raises ConfigError.
    """
    try:
        text = path.read_text("utf-8")
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as exc:
        raise ConfigError(f"--dataset-path {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"--dataset-path {path} is neither a JSON array nor JSON by the line") from exc
    talks = [talk for row in rows if (talk := _first_turns(row))]
    if not talks:
        raise ConfigError(f"--dataset-path {path} has no talk with a question and an answer, as ShareGPT's have")
    return talks


def _first_turns(row: Any) -> tuple[str, str] | None:
    try:
        asked, said = (turn["value"].strip() for turn in row["conversations"][:2])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return (asked, said) if asked and said else None


def words_at_random(size: int, rng: random.Random) -> str:
    """So many words, a space between each."""
    return " ".join(rng.choices(_words(), k=size))


@functools.cache
def _words() -> list[str]:
    """Words that common vocabularies have whole, so that the tokens of a prompt follow from its words."""
    return _shipped("words.txt").split()


def _shipped(name: str) -> str:
    return files("hfms_cli.bench").joinpath(name).read_text("utf-8")


def seeded(purpose: str, seed: int) -> random.Random:
    """Chance that can be had again; each purpose has its own, so that one does not move the others."""
    return random.Random(f"{purpose} {seed}")  # noqa: S311 -- nothing here is a secret


async def calibrate(
    send: Callable[[Prompt], Awaitable[Outcome]], numbers: Numbers | None, rng: random.Random
) -> Scale | None:
    """How the server counts, from its `usage` of a short and a longer prompt; None where it does not tell."""
    tokens: list[int] = []
    for size in PROBE_WORDS:
        text = words_at_random(size, rng)
        outcome = await send(Prompt(text if numbers is None else numbers.put_on(text), 1))
        if outcome.error is not None or not outcome.prompt_tokens:
            return None
        tokens.append(outcome.prompt_tokens)
    return scale_of(PROBE_WORDS, tokens)


def scale_of(words: Sequence[int], tokens: Sequence[int]) -> Scale | None:
    """The line through two counts; None where more words are not more tokens."""
    per_word = (tokens[1] - tokens[0]) / (words[1] - words[0])
    return Scale(tokens[0] - per_word * words[0], per_word) if per_word > 0 else None
