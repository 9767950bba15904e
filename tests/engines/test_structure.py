"""Answers with a structure, by both text engines on a tiny random model: what is promised holds at any temperature."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from hfms_cli import BadRequest, Caller, LoadRequest, ModelCard, Structure
from hfms_engines.generation import GenerationEngine, GenerationOptions
from hfms_engines.openvino import OpenVinoEngine, OpenVinoOptions

# Before torch, whose environment it sets.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema

from hfms_engines import structure, structure_check
from tests.engines import tiny
from tests.engines.driving import CPU, Answers, call, drain

PROMPT = [5, 6, 7]
POINT = {
    "type": "object",
    "properties": {"latitude": {"type": "integer"}, "longitude": {"type": "integer"}},
    "required": ["latitude", "longitude"],
    "additionalProperties": False,
}
SLOW = {"type": "integer", "multipleOf": 999_983}
"""What llguidance works on for ten seconds."""


def load(folder: Path, engine: str, conversions: Path, **options):
    config = json.loads((folder / "config.json").read_text())
    card = ModelCard(
        format="safetensors",
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        tasks=("generate",),
        weights_bytes=2**20,
        dtype="float32",
    )
    request = LoadRequest(folder=folder, card=card, device=CPU, dtype="float32")
    if engine == "openvino":
        return OpenVinoEngine(OpenVinoOptions(cache_dir=str(conversions), kv_cache_bytes=2**24, **options)).load(
            request
        )
    return GenerationEngine(GenerationOptions(**options)).load(request)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama"), tiny.ARCHITECTURES["llama"]())


@pytest.fixture(scope="module")
def conversions(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conversions")


@pytest.fixture(scope="module", params=["transformers", "paged", "openvino"])
def model(request, llama, conversions):
    """Shared, so tests leave it idle."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    paged = {"cache": "paged", "kv_cache_bytes": 2**24} if request.param == "paged" else {}
    loaded = load(llama, request.param, conversions, max_batch=8, **paged)
    yield loaded
    loaded.close()


def structured(id: str, kind: str, spec, *, prompt=PROMPT, n: int = 1, **sampling):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    sampling = {"temperature": 2.0, "seed": 1, "max_tokens": 400} | sampling
    return call(id, prompt, n=n, structure=Structure(kind=kind, spec=text), **sampling)


def told(model, kind: str, spec, **more) -> Answers:
    model.submit(structured("a", kind, spec, **more))
    return drain(model)


def error(model, kind: str, spec) -> BadRequest:
    refused = told(model, kind, spec).ended["a"]
    assert isinstance(refused, BadRequest)
    assert (refused.status, refused.code, refused.param) == (400, "invalid_schema", "response_format")
    return refused


# --- whatever the schema, what ends by itself fits it ---

names = st.text('abcé_ "\\', min_size=1, max_size=3)
integers = st.tuples(st.integers(-99, 99), st.integers(0, 50)).map(
    lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}
)
numbers = st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(
    lambda b: {"type": "number", "minimum": b[0] / 2, "maximum": b[0] / 2 + b[1]}
)
strings = st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
    lambda b: {"type": "string", "minLength": b[0], "maxLength": b[0] + b[1]}
)
leaves = st.one_of(
    integers,
    numbers,
    strings,
    st.sampled_from(["^[a-c]{1,3}$", r"^\d\d-\w$", "^(?:yes|no)$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
    st.lists(st.one_of(st.none(), st.integers(-9, 9), names), min_size=1, max_size=3).map(lambda v: {"enum": v}),
    names.map(lambda v: {"const": {v: [v]}}),
    st.just({"type": ["boolean", "null"]}),
    st.just({"$ref": "#/$defs/pair"}),
)


def objects(children):
    return st.dictionaries(names, children, max_size=3).flatmap(
        lambda properties: (
            st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": required,
                    "additionalProperties": False,
                }
            )
            if properties
            else st.just({"type": "object", "additionalProperties": integers_of_few(), "maxProperties": 2})
        )
    )


def integers_of_few():
    return {"type": "integer", "minimum": 0, "maximum": 9}


schemas = st.recursive(
    leaves,
    lambda children: st.one_of(
        objects(children),
        st.tuples(children, st.integers(0, 2)).map(
            lambda c: {"type": "array", "items": c[0], "minItems": c[1], "maxItems": c[1] + 1}
        ),
        st.lists(children, min_size=1, max_size=3).map(lambda c: {"anyOf": c}),
        st.lists(children, min_size=1, max_size=2).map(lambda c: {"type": "array", "prefixItems": c, "items": False}),
    ),
    max_leaves=4,
).map(lambda s: s | {"$defs": {"pair": {"type": "array", "items": {"enum": ["l", "r"]}, "minItems": 2, "maxItems": 2}}})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=schemas, temperature=st.sampled_from([0.0, 1.0, 2.0]), seed=st.integers(0, 9))
def test_every_answer_that_ends_fits_its_schema(model, schema, temperature, seed):
    answers = told(model, "json_schema", schema, n=3, temperature=temperature, seed=seed, max_tokens=480)
    assert answers.ended == {"a": None}
    for i in range(3):
        if answers.finish("a", i) == "stop":
            jsonschema.validate(json.loads(answers.text("a", i)), schema, jsonschema.Draft202012Validator)
        else:
            assert answers.tokens("a", i) == 480


def test_a_json_object_is_one_whatever_is_in_it(model):
    answers = told(model, "json_object", "", n=8, max_tokens=480)
    ended = [answers.text("a", i) for i in range(8) if answers.finish("a", i) == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.text(max_size=5).filter(lambda t: "\0" not in t), min_size=1, max_size=4))
def test_an_answer_is_one_of_the_choices(model, choices):
    answers = told(model, "choice", choices)
    assert answers.text("a") in choices
    assert answers.finish("a") == "stop"


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-f]{1,4}", r"(?:é|日本|/){2,5}", "a|ab|abc", "x*", ""])
def test_an_answer_matches_its_regex(model, pattern):
    answers = told(model, "regex", pattern, max_tokens=480)
    assert answers.finish("a") == "stop"
    assert re.fullmatch(pattern, answers.text("a"))


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= "a" tail\ntail ::= [0-9] "z" | "(" root ")"', r"(a\()*a[0-9]z\)*"),
        ('start: "a" tail\ntail: /[0-9]/ "z" | "(" start ")"', r"(a\()*a[0-9]z\)*"),
        (f'start: "<call>\\n" body "\\n</call>"\nbody: %json {json.dumps(POINT)}', r"(?s)<call>\n\{.*\}\n</call>"),
    ],
    ids=["gbnf", "lark", "lark with JSON"],
)
def test_an_answer_fits_its_grammar(model, grammar, pattern):
    answers = told(model, "grammar", grammar, max_tokens=480)
    assert answers.finish("a") == "stop"
    assert re.fullmatch(pattern, answers.text("a"))


def test_a_grammar_names_special_tokens_without_quotes(model, made):
    answers = told(model, "grammar", f'start: {tiny.START} "x"')
    assert answers.text("a") == "x"
    assert made["a", 0][0] == model._runner.tokenizer.convert_ids_to_tokens(made["a", 0]).index(tiny.START) + 1


# --- beside the other parameters ---


def test_an_answer_that_reaches_its_limit_says_length(model):
    answers = told(model, "json_schema", POINT, max_tokens=3)
    assert (answers.finish("a"), answers.tokens("a")) == ("length", 3)
    assert answers.text("a").startswith("{")


def test_seeds_give_the_same_answers_in_any_batch_and_choices_differ(model):
    alone = told(model, "json_schema", POINT, n=3, seed=7)
    texts = [alone.text("a", i) for i in range(3)]
    assert len(set(texts)) == 3
    model.submit(structured("other", "regex", "[a-z]{9,30}", seed=3))
    model.submit(call("free", [9, 8, 7], max_tokens=30))
    model.submit(structured("a", "json_schema", POINT, n=3, seed=7))
    together = drain(model)
    assert [together.text("a", i) for i in range(3)] == texts


def test_free_answers_beside_structured_ones_are_what_they_are_alone(model, made):
    model.submit(call("free", [9, 8, 7], max_tokens=30, ignore_eos=True))
    drain(model)
    alone = list(made["free", 0])
    model.submit(structured("a", "json_schema", POINT))
    model.submit(call("beside", [9, 8, 7], max_tokens=30, ignore_eos=True))
    drain(model)
    assert made["beside", 0] == alone


def test_neither_bias_nor_penalties_nor_limits_on_choice_lead_out_of_the_structure(model):
    wish = model._runner.tokenizer.encode("z")[0]
    answers = told(
        model,
        "json_schema",
        POINT,
        logit_bias={wish: 100.0},
        presence_penalty=2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.9,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
    )
    jsonschema.validate(json.loads(answers.text("a")), POINT)


def test_a_structure_that_may_end_goes_on_until_min_tokens_and_one_that_must_end_does_not(model):
    answers = told(model, "regex", "ab*", min_tokens=20, max_tokens=100)
    assert answers.tokens("a") >= 20
    assert re.fullmatch("ab*", answers.text("a"))
    assert told(model, "choice", ["a"], min_tokens=20).text("a") == "a"
    assert told(model, "choice", [""], min_tokens=20).text("a") == ""


def test_ignore_eos_goes_on_while_the_structure_can(model):
    answers = told(model, "regex", "ab*", ignore_eos=True, max_tokens=30)
    assert (answers.finish("a"), answers.tokens("a")) == ("length", 30)
    assert told(model, "regex", "ab{3}", ignore_eos=True).finish("a") == "stop"


def test_a_stop_string_ends_a_structured_answer(model):
    answers = told(model, "regex", "[0-9]{5}x[0-9]{5}", stop=("x",))
    assert re.fullmatch("[0-9]{5}", answers.text("a"))
    assert answers.finish("a") == "stop"


@pytest.mark.parametrize("engine", ["transformers", "openvino"])
def test_one_that_waits_again_goes_on_where_its_structure_was(llama, conversions, engine):
    model = load(llama, engine, conversions, max_batch=1)
    try:
        asked = structured("low", "json_schema", POINT, seed=5)
        model.submit(asked)
        alone = drain(model).text("low")
        model.submit(msgspec.structs.replace(asked, priority=0, caller=Caller(key_id="one")))
        answers = Answers()
        while answers.tokens("low") < 4:
            answers.take(model.step())
        model.submit(msgspec.structs.replace(call("high", [4, 5], max_tokens=5), priority=3))
        while "high" not in answers.ended:
            answers.take(model.step())
            assert "low" not in answers.ended
        drain(model, answers)
        assert answers.text("low") == alone
    finally:
        model.close()


# --- guessing ---


def test_forced_tokens_are_read_along_and_answers_are_the_same_without_guesses(llama, conversions, made, monkeypatch):
    pytest.importorskip("openvino")
    passes: dict[int, int] = {}
    for guessed in (0, 8):
        model = load(llama, "openvino", conversions, speculative_tokens=guessed)
        try:
            forward, count = model._runner.forward, [0]

            def counted(*args, forward=forward, count=count, **more):
                count[0] += 1
                return forward(*args, **more)

            monkeypatch.setattr(model._runner, "forward", counted)
            for k, spec in enumerate((POINT, {"type": "array", "items": POINT, "minItems": 2, "maxItems": 2})):
                model.submit(structured(f"{guessed} {k}", "json_schema", spec, temperature=0.0, max_tokens=300))
            drain(model)
            passes[guessed] = count[0]
        finally:
            model.close()
    for k in range(2):
        assert made[f"0 {k}", 0] == made[f"8 {k}", 0]
    assert passes[8] < passes[0]


# --- what cannot be followed ---


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "`not` (in `#`)"),
        ({"if": {}, "then": {}}, "`if`"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "array", "items": {"contains": {}}}, "`contains` (in `#/items`)"),
        ({"properties": {"a": {"dependentRequired": {"b": ["c"]}}}}, "`dependentRequired` (in `#/properties/a`)"),
        ({"propertyNames": {"pattern": "a"}}, "`propertyNames`"),
        ({"$defs": {"x": {"minLenght": 3}}}, "`minLenght` (in `#/$defs/x`)"),
        ({"anyOf": [{"type": "string", "nullable": True}]}, "`nullable` (in `#/anyOf/0`)"),
        ({"x-guidance": {"lenient": True}}, "`x-guidance`"),
        ({"type": "object", "minProperties": 2}, "`minProperties`"),
        ({"type": "string", "format": "password"}, "format: password"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
        ({"$ref": "#/$defs/gone"}, "/$defs/gone"),
        ({"$ref": "https://example.org/s.json"}, "example.org"),
        ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "no text fits it"),
        ({"type": "text"}, "text"),
        ({"type": 5}, "type"),
        ({"properties": []}, "`#/properties` must be an object"),
        ({"items": 3}, "`#/items` is no schema"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ('{"type": ', "line 1"),
        ("[1]", "`#` is no schema"),
        ('{"minimum": NaN}', "NaN"),
        ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
        ('{"items":' * 300 + "true" + "}" * 300, "recursion limit"),
        (SLOW, "too long"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_and_says_why(model, schema, word):
    message = error(model, "json_schema", schema).message
    assert message.startswith("The JSON schema cannot be followed: ")
    assert word in message
    assert told(model, "choice", ["fine"]).text("a") == "fine"


@pytest.mark.parametrize(
    ("kind", "spec", "word"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "(?<=a)b", "look-around"),
        ("grammar", "start: missing", '"missing"'),
        ("grammar", "root ::= (", "Expected"),
        ("grammar", "", "root"),
        ("grammar", "start: <|no_such_token|>", "no_such_token"),
        # Each would end the process that compiles it: its stack, its memory, its time.
        ("grammar", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(8000)) + 'a8000: "x"', "too long"),
        ("grammar", "start: A0\n" + "".join(f'A{i}: A{i + 1} "b"\n' for i in range(6000)) + 'A6000: "x"', "too long"),
        ("grammar", "root ::= " + "(" * 60_000, "nested too deeply"),
    ],
)
def test_a_bad_regex_or_grammar_is_refused_and_the_next_is_answered(model, kind, spec, word):
    assert word in error(model, kind, spec).message
    assert told(model, "choice", ["fine"]).text("a") == "fine"


def test_what_is_too_large_is_refused_at_once(model):
    with pytest.raises(BadRequest, match="larger than 128 KiB") as refused:
        model.submit(structured("a", "regex", "a" * 140_000))
    assert refused.value.code == "invalid_schema"
    assert not model.busy()


def test_a_grammar_that_becomes_too_much_work_fails_its_call_alone(model):
    grammar = "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(30)) + 'a30: "x"'
    model.submit(structured("free", "regex", "[a-z]{40}"))
    model.submit(structured("a", "grammar", grammar))
    answers = drain(model)
    assert isinstance(answers.ended["a"], BadRequest)
    assert answers.ended["a"].code == "invalid_schema"
    assert answers.ended["free"] is None
    assert re.fullmatch("[a-z]{40}", answers.text("free"))


# --- compiling beside the steps ---


def test_an_answer_under_way_goes_on_while_a_schema_is_compiled(model):
    model.submit(call("free", PROMPT, max_tokens=500, ignore_eos=True))
    answers = Answers()
    while not answers.tokens("free"):
        answers.take(model.step())
    model.submit(structured("slow", "json_schema", SLOW | {"title": "unseen"}))
    before = answers.tokens("free")
    while "slow" not in answers.ended and "free" not in answers.ended:
        answers.take(model.step())
    assert answers.tokens("free") > before + 3
    model.cancel("free")
    drain(model, answers)
    assert "too long" in answers.ended["slow"].message


def test_a_structure_is_compiled_once_and_its_refusal_kept(model, monkeypatch):
    compiled = []
    check = structure.Checker.check
    monkeypatch.setattr(structure.Checker, "check", lambda self, s: compiled.append(s.spec) or check(self, s))
    for _ in range(3):
        assert re.fullmatch("[0-4]{3}", told(model, "regex", "[0-4]{3}").text("a"))
        assert "cannot be enforced" in error(model, "json_schema", {"not": {"const": 1}}).message
    assert compiled == ["[0-4]{3}", '{"not": {"const": 1}}']


def test_calls_that_are_cancelled_say_no_more_while_compiled_and_while_answered(model):
    model.submit(structured("early", "json_schema", SLOW | {"title": "cancelled"}))
    model.cancel("early")
    assert not model.busy()
    model.submit(structured("late", "regex", "[a-z]{300}"))
    answers = Answers()
    while answers.tokens("late") < 3:
        answers.take(model.step())
    model.cancel("late")
    assert not model.busy()
    assert not answers.ended
    assert told(model, "choice", ["fine"]).text("a") == "fine"


def test_closing_ends_the_checker(llama, conversions):
    model = load(llama, "transformers", conversions)
    told(model, "choice", ["fine"])
    child = model._structures._close.__self__._checker._child
    model.close()
    assert child.returncode is not None


# --- tokens and their bytes ---


def sentencepiece_like():
    """A vocabulary as Llama 2's: spaces are U+2581, and what it has no token for is bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *'\u2581abcé{}:"1', "\u2581a", "ab"]
    made = tokenizers.Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(words)}, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("words", [tiny.tokenizer(), sentencepiece_like()], ids=["byte level", "byte fallback"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_the_bytes_of_tokens_are_those_of_their_text(words, data):
    texts = structure.bytes_of(words)
    ids = data.draw(st.lists(st.sampled_from(sorted(set(texts) - set(words.all_special_ids))), min_size=1, max_size=12))
    joined = b"".join(texts[i] for i in ids)
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        reject()  # decoders differ in how much of what is no text they replace
    assert words.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_tokenizer_of_another_kind_is_refused_by_name():
    from transformers import BertTokenizerFast

    words = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    made = structure.Matchers(words, vocabulary=6, stop_ids=[3], silent_ids=words.all_special_ids)
    try:
        with pytest.raises(BadRequest, match="tokenizer") as refused:
            made.make(Structure(kind="choice", spec='["a"]', param="guided_choice"))
        assert refused.value.param == "guided_choice"
    finally:
        made.close()


def test_where_no_token_ends_an_answer_it_ends_when_its_structure_must():
    import torch

    words = tiny.tokenizer()
    made = structure.Matchers(words, vocabulary=len(words), stop_ids=[], silent_ids=words.all_special_ids)
    try:
        matcher = made.make(Structure(kind="choice", spec='["a"]')).copy()
        row = torch.zeros(len(words))
        matcher.bar(row)
        assert row.isfinite().nonzero().flatten().tolist() == words.encode("a")
        matcher.took(words.encode("a")[0])
        assert matcher.complete
    finally:
        made.close()


def test_blanks_between_parts_of_json_are_bounded():
    fits = re.compile(structure_check.WHITESPACE).fullmatch
    assert fits(" ")
    assert fits("\n" + " " * 40)
    assert not fits("  ")
    assert not fits("\n\n")
