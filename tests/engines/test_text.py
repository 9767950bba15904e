"""Incremental decoding against the decoder itself, and stop strings against a search of the whole text."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfms_engines.text import Detokenizer, StopStrings, decoder_of

BROKEN = "\ufffd"
timeless = settings(deadline=None)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN))


@functools.cache
def byte_level():
    pytest.importorskip("transformers")
    from tests.engines import tiny

    return tiny.tokenizer()


@functools.cache
def byte_fallback():
    """As SentencePiece vocabularies are converted: spaces are marks, and what has no token is spelled in bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@functools.cache
def slow():
    """A tokenizer written in Python, whose tokens are bytes."""
    return pytest.importorskip("transformers").ByT5Tokenizer()


def decoder(tokenizer):
    """What transformers says."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def said(tokenizer, ids, **more):
    """What each token adds, and what the end adds."""
    words = Detokenizer(decoder_of(tokenizer), skip=set(tokenizer.all_special_ids), **more)
    return [*(words.feed(i) for i in ids), words.flush()]


# --- incremental decoding ---


@timeless
@given(texts)
@example("👩‍👩‍👧‍👦 日本語 é\u0301")
def test_every_character_is_said_as_soon_as_its_last_byte_is_there(text):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    pieces = said(tokenizer, ids)
    for end in range(1, len(ids) + 1):
        whole = decoder(tokenizer)(ids[:end]).rstrip(BROKEN)
        assert "".join(pieces[:end]) == whole
    assert pieces[-1] == ""
    assert "".join(pieces) == text


@timeless
@given(st.lists(st.integers(0, 319)))
def test_any_tokens_say_in_pieces_what_they_say_at_once(ids):
    tokenizer = byte_level()
    assert "".join(said(tokenizer, ids)) == decoder(tokenizer)(ids)


@timeless
@given(texts, texts)
def test_an_answer_goes_on_where_a_prompt_broke_off_within_a_character(before, after):
    tokenizer = byte_level()
    ids = tokenizer(before + after)["input_ids"]
    for cut in range(len(ids)):
        prompt = decoder(tokenizer)(ids[:cut])
        answer = "".join(said(tokenizer, ids[cut:], context=ids[:cut]))
        assert prompt.rstrip(BROKEN) + answer == before + after


def test_a_character_that_never_comes_is_said_as_broken_at_the_end():
    tokenizer = byte_level()
    ids = tokenizer("a 🤖")["input_ids"][:-1]
    *pieces, end = said(tokenizer, ids)
    assert "".join(pieces) == "a "
    assert end == BROKEN


def test_special_tokens_say_nothing_and_part_no_character():
    tokenizer = byte_level()
    first, *rest = tokenizer("é日")["input_ids"]
    special = tokenizer.eos_token_id
    assert len(rest) > 1
    assert "".join(said(tokenizer, [special, first, special, *rest, special])) == "é日"


def test_endless_special_tokens_keep_no_window():
    seen = []
    words = Detokenizer(lambda ids: seen.append(len(ids)) or "a" * len(ids), skip={0})
    for token in [1, *[0] * 100, 2]:
        words.feed(token)
    assert max(seen) <= 2


@timeless
@given(st.text("ab é日🤖"))
def test_byte_fallback_says_in_pieces_what_it_says_at_once(text):
    tokenizer = byte_fallback()
    ids = tokenizer(text)["input_ids"]
    assert "".join(said(tokenizer, ids)) == decoder(tokenizer)(ids)


def test_the_space_before_a_word_depends_on_the_prompt():
    tokenizer = byte_fallback()
    prompt, answer = tokenizer("ab")["input_ids"], tokenizer("ab é a")["input_ids"]
    assert "".join(said(tokenizer, answer)) == "ab é a"
    assert "".join(said(tokenizer, answer, context=prompt)) == " ab é a"


@timeless
@given(texts)
def test_slow_tokenizers_say_in_pieces_what_they_say_at_once(text):
    tokenizer = slow()
    ids = tokenizer(text)["input_ids"]
    pieces = said(tokenizer, ids)
    assert "".join(pieces) == decoder(tokenizer)(ids)
    assert not any(BROKEN in p for p in pieces)


# --- stop strings ---


def cut(text, at):
    """The text in pieces, cut at these places."""
    places = [0, *sorted(p % (len(text) + 1) for p in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


def first_stop(text, stops):
    """Where the first stop string begins: the one that is complete first, and of several the longest."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begins:
            return min(begins)
    return None


def shown(pieces, stops):
    filter_ = StopStrings(stops)
    out = []
    for piece in pieces:
        text, stopped = filter_.feed(piece)
        out.append(text)
        if stopped:
            return out, True
    return [*out, filter_.flush()], False


short = st.text("ab¶", max_size=30)


@timeless
@given(short, st.lists(st.text("ab¶", min_size=1, max_size=5), max_size=4), st.lists(st.integers(0)))
def test_what_is_shown_is_the_text_up_to_the_first_stop_string(text, stops, at):
    out, stopped = shown(cut(text, at), stops)
    begins = first_stop(text, stops)
    assert stopped == (begins is not None)
    assert "".join(out) == text[:begins]


@timeless
@given(short, st.lists(st.text("ab¶", min_size=1, max_size=5), min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stops):
    filter_ = StopStrings(stops)
    so_far, out = "", ""
    for char in text:
        piece, stopped = filter_.feed(char)
        so_far, out = so_far + char, out + piece
        if stopped:
            break
        held = so_far[len(out) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_text_that_cannot_begin_a_stop_string_is_not_delayed():
    filter_ = StopStrings(["\n\n", "END"])
    assert filter_.feed("Hello") == ("Hello", False)
    assert filter_.feed(" E") == (" ", False)
    assert filter_.feed("N") == ("", False)
    assert filter_.feed("O") == ("ENO", False)
    assert filter_.feed("\n") == ("", False)
    assert filter_.feed("x END y") == ("\nx ", True)


@timeless
@given(texts, st.integers(0))
def test_a_stop_string_is_met_across_tokens_that_cut_its_characters(text, at):
    if not text:
        return
    stop = text[at % len(text) :]
    tokenizer = byte_level()
    out, stopped = shown(said(tokenizer, tokenizer(text + " and more")["input_ids"]), [stop])
    assert stopped
    assert "".join(out) == text[: text.index(stop)]
