"""Logprobs, echo, best_of and suffix over HTTP: their shapes with the echo engine, and as one counts characters."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.types import Call, Chunk, TokenLogprob
from hfms_cli.web.logprobs import TextLogprobs, of_chat
from hfms_cli.web.shapes import CompletionShape, Tally
from tests.web.test_surface import CHAT, events

COMPLETION = {"model": "echo:a", "prompt": "one two three"}


async def test_completions_tell_tokens_offsets_and_the_likeliest(serve):
    async with serve("echo:a") as server:
        _, body = await server.post("/v1/completions", COMPLETION | {"logprobs": 2})
    told = body["choices"][0]["logprobs"]
    assert told["tokens"] == ["one", " two", " three"]
    assert told["text_offset"] == [0, 3, 7]
    for token, own, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) == 2
        assert top[token] == own == max(top.values())


async def test_logprobs_0_tells_the_token_itself_and_none_tells_nothing(serve):
    async with serve("echo:a") as server:
        _, body = await server.post("/v1/completions", COMPLETION | {"logprobs": 0})
        _, silent = await server.post("/v1/completions", COMPLETION)
    told = body["choices"][0]["logprobs"]
    assert [list(top) for top in told["top_logprobs"]] == [["one"], [" two"], [" three"]]
    assert silent["choices"][0]["logprobs"] is None


async def test_a_chats_logprobs_have_bytes(serve):
    async with serve("echo:a") as server:
        _, body = await server.post("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})
        _, bare = await server.post("/v1/chat/completions", CHAT | {"logprobs": True})
    told = body["choices"][0]["logprobs"]
    assert told["refusal"] is None
    assert [t["token"] for t in told["content"]] == ["one", " two", " three"]
    assert all(bytes(t["bytes"]).decode() == t["token"] for t in told["content"])
    assert [len(t["top_logprobs"]) for t in told["content"]] == [2, 2, 2]
    assert [t["top_logprobs"] for t in bare["choices"][0]["logprobs"]["content"]] == [[], [], []]


@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_tells_the_same_piece_by_piece(serve, echo):
    asked = COMPLETION | {"logprobs": 1, "n": 2, "echo": echo}
    async with serve("echo:a") as server:
        _, whole = await server.post("/v1/completions", asked)
        async with server.session.post(server.url + "/v1/completions", json=asked | {"stream": True}) as response:
            chunks = [json.loads(e) for e in (await events(response))[:-1]]
        _, chat = await server.post("/v1/chat/completions", CHAT | {"logprobs": True})
        stream = CHAT | {"logprobs": True, "stream": True}
        async with server.session.post(server.url + "/v1/chat/completions", json=stream) as response:
            deltas = [json.loads(e)["choices"][0] for e in (await events(response))[:-1]]
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        for part, total in whole["choices"][index]["logprobs"].items():
            assert [x for c in mine for x in c["logprobs"][part]] == total
    told = [t for d in deltas if d["logprobs"] for t in d["logprobs"]["content"]]
    assert told == chat["choices"][0]["logprobs"]["content"]
    for delta in deltas:
        shown = "".join(t["token"] for t in delta["logprobs"]["content"]) if delta["logprobs"] else ""
        assert shown == delta["delta"].get("content", "")


async def test_echo_shows_the_prompt_first_and_its_first_token_has_no_logprob(serve):
    async with serve("echo:a") as server:
        asked = COMPLETION | {"echo": True, "logprobs": 1, "max_tokens": 1}
        _, body = await server.post("/v1/completions", asked)
        _, only = await server.post("/v1/completions", asked | {"max_tokens": 0})
        _, plain = await server.post("/v1/completions", COMPLETION | {"echo": True, "max_tokens": 2})
    choice = body["choices"][0]
    assert choice["text"] == "one two threeone"
    assert choice["logprobs"]["tokens"] == ["one", " two", " three", "one"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7, 13]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert only["choices"][0]["text"] == "one two three"
    assert only["choices"][0]["finish_reason"] == "length"
    assert only["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    for part, total in only["choices"][0]["logprobs"].items():
        assert total == choice["logprobs"][part][:3]
    assert plain["choices"][0]["text"] == "one two threeone two"
    assert plain["choices"][0]["logprobs"] is None


async def test_best_of_makes_more_answers_than_it_sends_and_counts_them_all(serve):
    async with serve("echo:a") as server:
        status, body = await server.post(
            "/v1/completions", {"model": "echo:a", "prompt": ["a b", "c"], "n": 2, "best_of": 3}
        )
    assert status == 200
    assert [(c["index"], c["text"], c["logprobs"]) for c in body["choices"]] == [
        (0, "a b", None), (1, "a b", None), (2, "c", None), (3, "c", None)
    ]  # fmt: skip
    assert body["usage"]["completion_tokens"] == 3 * 2 + 3 * 1


def score(text: str, logprob: float | None, raw: bytes | None = None, top=()) -> TokenLogprob:
    return TokenLogprob(0, text, text.encode() if raw is None else raw, logprob, list(top))


def test_the_best_are_the_likeliest_token_for_token_and_the_prompt_does_not_count():
    call = Call(id="c", model="m", task="generate", inputs=["p"], n=3, echo=True)
    tally = Tally()
    for index, logprobs in enumerate(([-3.0], [-1.0, -1.0, -1.0, -1.0], [-1.5])):
        prompt = [score("p", None), score("q", -100.0)]
        tally.add(Chunk(index=index, text="pq", logprobs=prompt))
        for logprob in logprobs:
            tally.add(Chunk(index=index, text="x", tokens=1, logprobs=[score("x", logprob)]))
    choices = CompletionShape(call, best=2, logprobs=False).whole(tally)["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [(0, "pqxxxx"), (1, "pqx")]


def test_parts_of_a_character_are_spelt_in_bytes_and_share_its_offset():
    e, acute = "é".encode()[:1], "é".encode()[1:]
    scores = [score("a", -1.0), score("\ufffd", -2.0, e, [(1, "\ufffd", acute, -0.5)]), score("\ufffd", -3.0, acute)]
    told = TextLogprobs().of("aéb", [*scores, score("b", -1.0)])
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert told["text_offset"] == [0, 1, 1, 2]
    assert told["top_logprobs"][1] == {"bytes:\\xa9": -0.5, "bytes:\\xc3": -2.0}


def test_special_tokens_take_room_only_where_they_are_shown():
    begin = score("<s>", None, b"")
    assert TextLogprobs().of("ab", [begin, score("a", -1.0), score("b", -1.0)])["text_offset"] == [0, 0, 1]
    assert TextLogprobs().of("<s>ab", [begin, score("a", -1.0), score("b", -1.0)])["text_offset"] == [0, 3, 4]
    assert of_chat([begin])["content"][0]["bytes"] is None


@given(st.text(max_size=12), st.data())
def test_offsets_are_those_of_the_text_however_it_is_cut(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=6)) | {0, len(raw)})
    parts = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    told = TextLogprobs().of(text, [score(p.decode(errors="replace"), -1.0, p) for p in parts])
    assert told["text_offset"] == [len(raw[:a].decode(errors="ignore")) for a in cuts[:-1]]
