"""Tokenizers beside conversions: read without torch where that says the same, and by their own class elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hfms_engines import tokenizer_files
from tests.engines import tiny

transformers = pytest.importorskip("transformers")

TEXT = "The fox is off; naïve café, 日本語 🤖 <|im_start|>"
CHAT = [{"role": "user", "content": "What is 日本?"}]
READ = """
import json, sys
from pathlib import Path
from hfms_engines import tokenizer_files
folder, common = sys.argv[1:]
words = tokenizer_files.read(Path(folder), common)
text, chat = json.load(sys.stdin)
ids = words(text)["input_ids"]
print(json.dumps([
    type(words).__name__, ids, words.decode(ids, skip_special_tokens=True), words.convert_ids_to_tokens(ids[0]),
    words.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=True) if chat else None,
    "torch" in sys.modules,
]))
"""


def read(folder, common: str, chat=CHAT):
    """What a process of its own reads, and whether it has imported torch."""
    run = [sys.executable, "-c", READ, str(folder), common]
    said = subprocess.run(run, input=json.dumps([TEXT, chat]), capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


def says(words, chat=CHAT):
    ids = words(TEXT)["input_ids"]
    told = [type(words).__name__, ids, words.decode(ids, skip_special_tokens=True), words.convert_ids_to_tokens(ids[0])]
    ask = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
    return [*told, words.apply_chat_template(chat, **ask) if chat else None]


def vocabulary() -> dict[str, object]:
    """Of the tiny model, as the classes of transformers want it."""
    model = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(m) for m in model["merges"]]}


MADE = {
    "PreTrainedTokenizerFast": tiny.tokenizer,
    "Qwen2Tokenizer": lambda: transformers.Qwen2Tokenizer(**vocabulary(), chat_template=tiny.TEMPLATE),
    "GPT2Tokenizer": lambda: transformers.GPT2Tokenizer(**vocabulary(), add_prefix_space=True),
    # It has methods beside the common ones, and changes none of these.
    "CohereTokenizer": lambda: transformers.CohereTokenizer(**vocabulary()),
    "LlamaTokenizer": lambda: transformers.LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "e": 5, "▁a": 6}, merges=[("▁", "a")]
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_no_more_than_the_common_class_is_read_without_torch_and_says_the_same(name, tmp_path):
    words = MADE[name]()
    chat = CHAT if words.chat_template else None
    common = tokenizer_files.keep(words, tmp_path)
    assert common == type(words).__name__
    *told, torch = read(tmp_path, common, chat)
    assert told == says(words, chat)
    assert not torch


class Shouting(transformers.PreTrainedTokenizerFast):
    """With a way of its own to say what tokens stand for."""

    def _decode(self, *args, **more):
        return super()._decode(*args, **more).upper()


class Moody(transformers.PreTrainedTokenizerFast):
    """Whose file makes another backend of the common class than it has."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.backend_tokenizer.post_processor = None


@pytest.mark.parametrize("kind", [Shouting, Moody])
def test_a_class_with_ways_of_its_own_is_not_taken_for_the_common_one(kind, tmp_path):
    backend = tiny.tokenizer().backend_tokenizer
    assert tokenizer_files.keep(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path / "common")
    assert tokenizer_files.keep(kind(tokenizer_object=backend), tmp_path / "own") == ""


def test_without_that_word_transformers_chooses_the_class(tmp_path):
    words = tiny.tokenizer()
    tokenizer_files.keep(words, tmp_path)
    *told, torch = read(tmp_path, "")
    assert told == says(words)
    assert torch
