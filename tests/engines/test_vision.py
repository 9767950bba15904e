"""The vision engine: as transformers' own `generate`, in any batch, and calm about files of any kind."""

from __future__ import annotations

import functools
import io
import os
import zlib
from pathlib import Path

import msgspec
import pytest

from hfms_cli import (
    Adapter,
    AdapterCard,
    BadRequest,
    Call,
    ContextLengthExceeded,
    Conversation,
    LoadRequest,
    Picture,
    Sampling,
    Structure,
)
from hfms_cli.models.inspect import inspect
from hfms_engines import vision_scheduler
from hfms_engines.vision import VisionEngine, VisionOptions
from tests.engines.driving import CPU, Answers, drain

for package in ("torch", "transformers", "PIL"):
    pytest.importorskip(package)

from tests.engines.looking import FAMILIES, picture, tiny_vision  # noqa: E402 - after the packages that it needs

Content = str | list[str | bytes]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return tiny_vision(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory) -> Path:
    return tiny_vision(tmp_path_factory.mktemp("idefics3"))


def loaded(folder: Path, **options):
    engine = VisionEngine(VisionOptions(**{"kv_cache_bytes": 2**24, "max_image_pixels": 10**6} | options))
    card = inspect(folder)
    assert card.tasks == ("image-text-to-text",)
    assert engine.supports(card, CPU) is None
    return engine.load(LoadRequest(folder=folder, card=card, device=CPU))


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def idefics_model(idefics):
    return loaded(idefics)


def chat(*contents: Content) -> Conversation:
    """Of a user alone; bytes are images."""
    messages, pictures = [], []
    for i, content in enumerate(contents):
        if not isinstance(content, str):
            pictures += [
                Picture(p, f"messages[{i}].content[{k}]") for k, p in enumerate(content) if p.__class__ is bytes
            ]
            content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in content]
        messages.append({"role": "user", "content": content})
    return Conversation(messages=messages, pictures=pictures)


def call(id: str, asked: Conversation, *, n: int = 1, priority: int = 1, **sampling) -> Call:
    sampling = {"temperature": 0.0, "max_tokens": 12} | sampling
    return Call(
        id=id, model="m", task="generate", inputs=[asked], n=n, priority=priority, sampling=Sampling(**sampling)
    )


@functools.cache
def theirs(folder: Path):
    """transformers' own model and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def generated(folder: Path, asked: Conversation, tokens: int = 12) -> tuple[str, int]:
    """The text that transformers' `generate` makes greedily, and how many tokens the prompt has."""
    from PIL import Image

    model, processor = theirs(folder)
    pictures = iter(asked.pictures)
    messages = []
    for message in asked.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [
            {"type": "image", "image": Image.open(io.BytesIO(next(pictures).data))} if p["type"] == "image" else p
            for p in parts
        ]
        messages.append(message | {"content": parts})
    made = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**made, max_new_tokens=tokens, do_sample=False)
    prompt = made["input_ids"].shape[1]
    return processor.decode(out[0, prompt:], skip_special_tokens=True), prompt


CHATS = {
    "image first": chat([picture(), "what is it?"]),
    "image last": chat(["what is it?", picture(40, 70, seed=1)]),
    "two images": chat([picture(seed=2), "and", picture(200, 30, seed=3), "differ how?"]),
    "over messages": chat("first a text", [picture(seed=4)], "and now?"),
    "text alone": chat("what is it?"),
}


@pytest.mark.parametrize("asked", CHATS.values(), ids=CHATS)
def test_what_is_said_is_what_transformers_generate_says(model, folder, asked):
    model.submit(call("a", asked))
    answers = drain(model)
    text, tokens = generated(folder, asked)
    assert answers.ended == {"a": None}
    assert answers.text("a") == text
    assert answers.prompt_tokens("a") == [tokens]


def test_chats_with_images_and_without_share_a_batch_and_say_what_they_say_alone(model):
    alone = {}
    for id, asked in CHATS.items():
        model.submit(call(id, asked, max_tokens=60, ignore_eos=True))
        alone[id] = drain(model).text(id)
    assert len(set(alone.values())) == len(CHATS), "an image makes a difference"
    for id, asked in CHATS.items():
        model.submit(call(id, asked, max_tokens=60, ignore_eos=True))
    answers = Answers()
    while len(answers.chunks) < len(CHATS):
        answers.take(model.step())
    assert not answers.ended, "all are under way"
    drain(model, answers)
    assert {id: answers.text(id) for id in CHATS} == alone


def test_answers_under_way_go_on_while_images_are_looked_at_piece_by_piece(idefics_model):
    idefics_model.submit(call("runs", chat("a"), max_tokens=100, ignore_eos=True))
    answers = Answers()
    while not answers.tokens("runs"):
        answers.take(idefics_model.step())
    idefics_model.submit(call("looks", chat([picture(), picture(seed=1)])))
    while not answers.prompt_tokens("looks"):
        answers.take(idefics_model.step())
    before = answers.tokens("runs")
    while not answers.tokens("looks"):
        answers.take(idefics_model.step())
    assert answers.tokens("runs") - before >= 10, "each image has five tiles"
    drain(idefics_model, answers)


def test_a_prompt_is_read_in_pieces_that_cut_through_its_images(idefics):
    model = loaded(idefics, prefill_tokens=7)
    asked = CHATS["two images"]
    model.submit(call("a", asked))
    assert drain(model).text("a") == generated(idefics, asked)[0]


def test_a_seed_makes_the_same_choices_again_and_each_of_n_its_own(idefics_model):
    asked = chat([picture(), "what is it?"])
    said = []
    for _ in range(2):
        idefics_model.submit(call("a", asked, n=3, temperature=1.5, seed=7))
        answers = drain(idefics_model)
        assert len(answers.prompt_tokens("a")) == 1
        said.append([answers.text("a", i) for i in range(3)])
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def test_who_has_to_begin_anew_or_was_not_kept_is_decoded_again_and_says_the_same(idefics, monkeypatch):
    model = loaded(idefics, max_batch=1)
    asked = chat([picture(), "what is it?"])
    model.submit(call("alone", asked))
    alone = drain(model).text("alone")
    monkeypatch.setattr(vision_scheduler, "KEPT_BYTES", 0)
    model.submit(call("low", asked, priority=0))
    answers = Answers()
    while answers.tokens("low") < 3:
        answers.take(model.step())
    model.submit(call("critical", chat("a"), priority=3))
    drain(model, answers)
    assert list(answers.ended) == ["critical", "low"], "the low one gave its place up"
    assert answers.text("low") == alone


def test_an_answer_that_says_the_mark_of_an_image_and_begins_anew_goes_on(idefics):
    model = loaded(idefics, max_batch=1)
    mark = theirs(idefics)[1].image_token_id
    model.submit(call("low", chat([picture()]), priority=0, logit_bias={mark: 100}, ignore_eos=True))
    answers = Answers()
    while answers.tokens("low") < 3:
        answers.take(model.step())
    model.submit(call("critical", chat("a"), priority=3))
    drain(model, answers)
    assert answers.ended == {"critical": None, "low": None}
    assert answers.tokens("low") == 12


def test_a_structure_and_logprobs_hold_with_an_image(idefics_model):
    structure = Structure(kind="choice", spec='["a cat", "a dog"]')
    asked = chat([picture(), "what is it?"])
    idefics_model.submit(call("a", asked, structure=structure, logprobs=2))
    answers = drain(idefics_model)
    assert answers.text("a") in ("a cat", "a dog")
    scores = [score for chunk in answers.chunks["a"] for score in chunk.logprobs or ()]
    assert scores
    assert all(len(score.top) == 2 for score in scores)


def test_a_prompt_that_is_too_long_with_its_images_is_refused_with_its_length(idefics_model):
    asked = chat([picture(64, 64, seed=i) for i in range(8)])
    idefics_model.submit(call("a", asked, max_tokens=400))
    error = drain(idefics_model).ended["a"]
    assert isinstance(error, ContextLengthExceeded)
    assert error.param == "messages"


def _claims(width: int, height: int) -> bytes:
    """A PNG of zeros: large, and short as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def _lies(width: int, height: int) -> bytes:
    """A small PNG that claims to have this size."""
    data = bytearray(picture(8, 8))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


HOSTILE = {
    "nothing": (b"", "invalid_image"),
    "random": (os.urandom(4096), "invalid_image"),
    "a page": (b"<html><img src=x></html>", "invalid_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "invalid_image"),
    "another format": (picture(format="BMP"), "invalid_image"),
    "cut": (picture(300, 300)[:2000], "invalid_image"),
    "a header alone": (picture()[:33], "invalid_image"),
    "a size that lies": (_lies(900, 900), "invalid_image"),
    "many pixels": (_claims(1001, 1000), "image_too_large"),
    "a bomb": (_lies(30_000, 30_000), "image_too_large"),
    "a line": (_claims(900, 1), "invalid_image"),
    "a long file": (picture(700, 700), "image_too_large"),
}


@pytest.mark.parametrize(("data", "code"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_no_fit_image_is_refused_by_name(idefics, data, code):
    model = loaded_once(idefics)
    asked = chat("first", ["what is it?", data])
    try:
        model.submit(call("a", asked))
        error = drain(model).ended["a"]
    except BadRequest as exc:
        error = exc
    assert isinstance(error, BadRequest)
    assert (error.param, error.code) == ("messages[1].content[1]", code)
    assert not model.busy()


@functools.cache
def loaded_once(folder: Path):
    return loaded(folder, max_images=2, max_image_bytes=10**6)


def test_too_many_images_are_refused_at_once(idefics):
    model = loaded_once(idefics)
    with pytest.raises(BadRequest) as caught:
        model.submit(call("a", chat([picture()] * 3)))
    assert (caught.value.param, caught.value.code) == ("messages[0].content[2]", "too_many_images")
    assert not model.busy()


def test_pixels_are_counted_of_all_images_together(idefics):
    model = loaded_once(idefics)
    model.submit(call("a", chat([_claims(1000, 600), _claims(1000, 401)])))
    error = drain(model).ended["a"]
    assert isinstance(error, BadRequest)
    assert (error.param, error.code) == ("messages[0].content[1]", "image_too_large")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_images_of_every_format_and_mode_are_seen(idefics_model, format, mode):
    if format == "JPEG" and mode in ("P", "RGBA"):
        mode = "CMYK"
    mode = "RGB" if format == "WEBP" and mode in ("L", "P") else mode
    idefics_model.submit(call("a", chat([picture(format=format, mode=mode), "what is it?"])))
    answers = drain(idefics_model)
    assert answers.ended == {"a": None}
    assert answers.prompt_tokens("a") == [60]


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (7, 3), (999, 5)])
def test_images_of_odd_sizes_are_seen(model, size):
    model.submit(call("a", chat([picture(*size), "what is it?"])))
    assert drain(model).ended == {"a": None}


def test_a_text_with_marks_of_images_of_its_own_is_refused(model):
    model.submit(call("a", chat([picture(), "what is <image>?"])))
    error = drain(model).ended["a"]
    assert isinstance(error, BadRequest)
    assert error.param == "messages"


def test_a_cancelled_call_leaves_whether_it_is_read_waits_or_runs(idefics_model):
    asked = chat([picture(), "what is it?"])
    idefics_model.submit(call("reading", asked))
    idefics_model.cancel("reading")
    assert not idefics_model.busy()
    idefics_model.submit(call("runs", asked, max_tokens=100, ignore_eos=True))
    answers = Answers()
    while not answers.tokens("runs"):
        answers.take(idefics_model.step())
    idefics_model.cancel("runs")
    assert not idefics_model.busy()
    idefics_model.submit(call("after", asked))
    assert drain(idefics_model).ended == {"after": None}


def test_a_prompt_that_is_a_text_is_gone_on_with(idefics_model):
    idefics_model.submit(msgspec.structs.replace(call("a", chat("x")), inputs=["The quick brown"]))
    assert drain(idefics_model).finish("a") == "length"


def test_other_families_and_missing_packages_are_refused_by_name(idefics):
    card = inspect(idefics)
    other = msgspec.structs.replace(card, model_type="qwen2_5_vl")
    assert "this is qwen2_5_vl" in (VisionEngine().supports(other, CPU) or "")
    engine = VisionEngine(find=lambda name: None if name == "PIL" else True)
    assert engine.supports(card, CPU) == "pillow not installed; run: pip install 'hfms[vision]'"


def test_an_adapter_is_refused_with_the_reason(idefics_model):
    adapter = Adapter("a", "/nowhere", AdapterCard(r=4, lora_alpha=8, target_modules="all-linear"))
    with pytest.raises(BadRequest, match="as this model is run, it takes none"):
        idefics_model.add_adapter(adapter)
