"""Conversations with tools and reasoning in real engines: prompts as transformers makes them, marks that are shown."""

from __future__ import annotations

import json

import msgspec
import pytest

from hfms_cli import BadRequest, Caller, Conversation
from hfms_cli.config import ModelsConfig
from hfms_cli.parsing import Arguments, CallBegins, Content, Reasoning, formats_of
from hfms_cli.web.body import parse
from hfms_cli.web.dialogue import Dialogue
from hfms_cli.web.schemas import ChatRequest
from hfms_cli.web.tool_text import told
from tests.chat_templates import TEMPLATES
from tests.engines import tiny
from tests.engines.driving import call, drain

pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)

from tests.engines.test_generation import load

SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|eot_id|>"]

WEATHER = {
    "name": "weather",
    "description": "The weather of a city: “now”.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}},
        "required": ["city"],
    },
}
ARGUMENTS = {"city": 'Zürich "<City>"\n\'s', "days": 3, "where": {"lat": [47.4, -8], "ok": None}}
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
USER = {"role": "user", "content": "How is the weather?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"sky": "clear"}'}
DIALOGUES = [
    [USER],
    [SYSTEM, USER],
    [USER, {"role": "assistant", "content": "Clear. 🙂"}, USER],
    [USER, CALLED, RESULT],
    [SYSTEM, USER, CALLED, RESULT, {"role": "assistant", "content": "It is clear."}, USER],
    [USER, {"role": "assistant", "content": "Clear.", "reasoning_content": "hm"}, USER],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("llama"), tiny.ARCHITECTURES["llama"]())
    loaded = load(folder)
    # The template and the special tokens are the tokenizer's alone; ids beyond the model's own are never chosen.
    loaded._runner.tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return loaded


@pytest.fixture
def templated(model, monkeypatch):
    """The model with another template."""

    def use(name):
        monkeypatch.setattr(model._runner.tokenizer, "chat_template", TEMPLATES[name])
        monkeypatch.setattr(model, "info", msgspec.structs.replace(model.info, template=TEMPLATES[name]))
        return model

    return use


def fitted(model, body):
    """The call that a request of a client becomes for a model."""
    request = parse(ChatRequest, json.dumps({"model": "m", **body}).encode())
    return Dialogue(ModelsConfig(), request.tool_use()).fit(request.call("a", Caller()), model.info)


def as_transformers_has_it(messages):
    """Arguments as objects, and no null content: what its documentation asks for."""
    plain = json.loads(json.dumps(messages))
    for message in plain:
        message["content"] = message["content"] or ""
        for made in message.get("tool_calls", ()):
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        if message["role"] == "tool":
            message["name"] = "weather"
    return plain


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": WEATHER}]])
@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_apply_chat_template(templated, name, dialogue, tools):
    model = templated(name)
    body = {"messages": dialogue} | ({"tools": tools} if tools else {})
    (chat,) = fitted(model, body).inputs
    messages = as_transformers_has_it(dialogue)
    if not formats_of(TEMPLATES[name]).templated:
        messages, tools = told(messages, tools, system=True), None
    expected = model._runner.tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert model._tokens(chat) == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (name, count)
        for name in TEMPLATES
        for count in (1, 2)
        if name != "thinks-at-once" and (name, count) != ("llama3.1", 2)
    ],
)
def test_what_a_template_writes_for_calls_is_read_as_those_calls(templated, name, count):
    model = templated(name)
    tools = [{"type": "function", "function": WEATHER}]
    calls = [CALL | {"id": f"a1b2c3d4{i}"} for i in range(count)]
    messages = as_transformers_has_it([USER, CALLED | {"tool_calls": calls}])
    render = model._runner.tokenizer.apply_chat_template
    prompt = render(messages[:1], tools=tools, tokenize=False, add_generation_prompt=True)
    whole = render(messages, tools=tools, tokenize=False)
    assert whole.startswith(prompt)
    answer = whole.removeprefix(prompt).rstrip("\n").removesuffix("<|im_end|>").removesuffix("<|eot_id|>")
    parser = formats_of(TEMPLATES[name]).parser({"weather": WEATHER["parameters"]})
    events = [event for character in answer for event in parser.feed(character)] + parser.end()
    made = [event.name for event in events if isinstance(event, CallBegins)]
    assert made == ["weather"] * count
    assert not [event for event in events if isinstance(event, Content | Reasoning)]
    arguments = "".join(event.text for event in events if isinstance(event, Arguments))
    assert json.JSONDecoder().raw_decode(arguments)[0] == ARGUMENTS


def test_special_tokens_are_left_out_of_an_answer_unless_they_are_marks(model):
    word = model._runner.tokenizer.encode("dog")[0]
    start = model._runner.tokenizer.convert_tokens_to_ids(tiny.START)

    def say(**more):
        told = call("a", [5, 6], max_tokens=6, temperature=1.0, seed=3, logit_bias={start: 100.0, word: 100.0})
        model.submit(msgspec.structs.replace(told, **more))
        return drain(model).text("a")

    plain, shown = say(), say(marks=(tiny.START,))
    assert tiny.START in shown
    assert tiny.START not in plain
    assert shown.replace(tiny.START, "") == plain


@pytest.mark.parametrize(
    ("name", "more", "opening"),
    [
        ("thinks-at-once", {}, "<think>\n"),
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}, "</think>\n\n"),
        ("qwen3", {}, ""),
    ],
)
def test_an_answer_begins_with_the_mark_that_the_prompt_ends_with(templated, name, more, opening):
    model = templated(name)
    made = fitted(model, {"messages": [USER], "max_tokens": 3, "temperature": 0, "n": 2, **more})
    model.submit(made)
    answers = drain(model)
    model.submit(msgspec.structs.replace(made, id="b", marks=()))
    plain = drain(model)
    for index in range(2):
        assert answers.text("a", index) == opening + plain.text("b", index)


def test_a_model_that_thinks_at_once_answers_with_reasoning(templated):
    model = templated("thinks-at-once")
    request = parse(ChatRequest, json.dumps({"model": "m", "messages": [USER], "max_tokens": 4}).encode())
    dialogue = Dialogue(ModelsConfig(), None)
    model.submit(dialogue.fit(request.call("a", Caller()), model.info))
    for chunk in drain(model).chunks["a"]:
        dialogue.hear(chunk)
    heard = dialogue.heard(0)
    assert not heard.content
    assert "".join(heard.reasoning).strip()
    assert heard.reasoning_tokens == 4


def test_tools_are_no_variable_that_clients_may_pass_to_a_template(templated):
    model = templated("qwen3")
    with pytest.raises(BadRequest) as refused:
        model.submit(call("a", Conversation(messages=[USER], template_kwargs={"tools": []})))
    assert refused.value.param == "chat_template_kwargs"
