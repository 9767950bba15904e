"""One reader for every table: precedence, types, ranges, and messages that say what was meant."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.errors import ConfigError
from hfms_cli.settings import describe, origins, read_table, setting, settings_of


@dataclass(frozen=True)
class Everything:
    """A table with every type that a setting may have."""

    text: str = setting("plain", "Some text.", env="TEXT")
    count: int = setting(3, "How many.", env="COUNT", ge=1, le=10)
    share: float = setting(0.5, "How much.", env="SHARE", ge=0, le=1)
    wanted: bool = setting(False, "Whether.", env="WANTED")
    names: list[str] = setting(lambda: ["a"], "Which.", env="NAMES")
    pairs: dict[str, str] = setting(dict, "What is what.")
    mode: str = setting("slow", "How.", env="MODE", choices=("slow", "fast"))
    limit: int | None = setting(None, "At most.", env="LIMIT", ge=0)
    key: str | None = setting(None, "A secret.", env="KEY", secret=True, choices=("open", "sesame"))


def read(values: dict[str, Any] | None = None, environ: dict[str, str] | None = None, **flags: Any) -> Everything:
    return read_table(Everything, values or {}, where="my.toml [all]", environ=environ or {}, overrides=flags)


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*args, **kwargs)
    return caught.value.message


def test_nothing_given_means_the_defaults():
    assert read() == Everything("plain", 3, 0.5, False, ["a"], {}, "slow", None, None)


def test_defaults_that_are_lists_are_not_shared():
    assert read().names is not read().names


def test_flag_wins_over_new_variable_over_old_variable_over_file_over_default():
    values, old = {"count": 4}, {"HF_SERVER_COUNT": "5"}
    new = old | {"HFMS_COUNT": "6"}
    assert read().count == 3
    assert read(values).count == 4
    assert read(values, old).count == 5
    assert read(values, new).count == 6
    assert read(values, new, count=7).count == 7


def test_origins_tell_the_same_precedence():
    values, old = {"count": 4}, {"HF_SERVER_COUNT": "5"}

    def origin(environ: dict[str, str], **flags: Any) -> str:
        return origins(Everything, values, environ=environ, overrides=flags)["count"]

    assert origins(Everything, {}, environ={})["count"] == "default"
    assert origin({}) == "file"
    assert origin(old) == "HF_SERVER_COUNT"
    assert origin(old | {"HFMS_COUNT": "6"}) == "HFMS_COUNT"
    assert origin(old, count=7) == "flag"


def test_flag_that_is_none_was_not_given():
    assert read({"count": 4}, count=None).count == 4


def test_flag_that_is_false_was_given():
    assert read({"wanted": True}, wanted=False).wanted is False


@pytest.mark.parametrize(
    ("text", "value"),
    [(t, True) for t in ("1", "true", "YES", " on ")] + [(t, False) for t in ("0", "False", "no", "off", "")],
)
def test_variables_know_the_usual_words_for_true_and_false(text, value):
    assert read({"wanted": not value}, {"HFMS_WANTED": text}).wanted is value


def test_variables_are_read_as_their_type():
    environ = {
        "HFMS_TEXT": " 7 ",
        "HFMS_COUNT": "7",
        "HFMS_SHARE": "1",
        "HFMS_NAMES": "a, b ,,c",
        "HFMS_LIMIT": "12",
        "HFMS_MODE": "fast",
    }
    got = read({}, environ)
    assert (got.text, got.count, got.share, got.names, got.limit, got.mode) == (
        "7", 7, 1.0, ["a", "b", "c"], 12, "fast",
    )  # fmt: skip


def test_empty_variable_of_an_optional_setting_unsets_it():
    assert read({"limit": 5}, {"HFMS_LIMIT": ""}).limit is None


def test_unknown_key_names_file_table_key_and_what_was_meant():
    assert message({"cuont": 3}) == "my.toml [all]: unknown key `cuont`; did you mean `count`?"


def test_unknown_key_that_resembles_nothing_lists_the_keys():
    text = message({"zzzzzz": 3})
    assert text.startswith("my.toml [all]: unknown key `zzzzzz`; known keys: text, count, share")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": "3"}, "my.toml [all]: `count` is '3', which is not an integer from 1 to 10"),
        ({"count": 3.0}, "my.toml [all]: `count` is 3.0, which is not an integer from 1 to 10"),
        ({"count": True}, "my.toml [all]: `count` is True, which is not an integer from 1 to 10"),
        ({"count": 0}, "my.toml [all]: `count` is 0, which is not an integer from 1 to 10"),
        ({"count": 11}, "my.toml [all]: `count` is 11, which is not an integer from 1 to 10"),
        ({"share": float("nan")}, "my.toml [all]: `share` is nan, which is not a number from 0 to 1"),
        ({"share": True}, "my.toml [all]: `share` is True, which is not a number from 0 to 1"),
        ({"wanted": 1}, "my.toml [all]: `wanted` is 1, which is not true or false"),
        ({"wanted": "true"}, "my.toml [all]: `wanted` is 'true', which is not true or false"),
        ({"text": 5}, "my.toml [all]: `text` is 5, which is not a string"),
        ({"names": "a"}, "my.toml [all]: `names` is 'a', which is not a list of strings"),
        ({"names": ["a", 1]}, "my.toml [all]: `names` is ['a', 1], which is not a list of strings"),
        ({"pairs": {"a": 1}}, "my.toml [all]: `pairs` is {'a': 1}, which is not a table of strings"),
        ({"limit": -1}, "my.toml [all]: `limit` is -1, which is not an integer of 0 or more"),
        (
            {"mode": "fats"},
            'my.toml [all]: `mode` is \'fats\', which is not one of "slow", "fast"; did you mean "fast"?',
        ),
    ],
)
def test_bad_value_names_file_table_key_and_what_it_may_be(values, said):
    assert message(values) == said


def test_bad_variable_is_named_as_it_was_set():
    assert message({}, {"HF_SERVER_COUNT": "many"}) == (
        "HF_SERVER_COUNT is 'many', which is not an integer from 1 to 10"
    )


def test_bad_flag_is_named_as_it_was_typed():
    assert message({}, {}, count=99).startswith("--count is 99")


@pytest.mark.parametrize("given_in", ["file", "environment", "flag"])
def test_secret_is_in_no_message(given_in):
    secret = "hunter2"
    said = {
        "file": lambda: message({"key": secret}),
        "environment": lambda: message({}, {"HFMS_KEY": secret}),
        "flag": lambda: message({}, {}, key=secret),
    }[given_in]()
    assert secret not in said
    assert "(hidden)" in said


def values_of(s) -> st.SearchStrategy[Any]:
    """Every value that a setting's type and range allow."""
    if s.choices:
        return st.sampled_from(s.choices)
    text = st.text(st.characters(codec="utf-8"))
    low, high = s.ge, s.le
    return {
        "text": text,
        "count": st.integers(low, high),
        "share": st.floats(low, high),
        "wanted": st.booleans(),
        "names": st.lists(text),
        "pairs": st.dictionaries(text, text),
        "limit": st.integers(low, 2**63 - 1),
    }[s.name]


@given(st.fixed_dictionaries({}, optional={s.name: values_of(s) for s in settings_of(Everything)}))
def test_any_value_of_the_right_type_and_range_survives_toml(values):
    got = read(tomllib.loads(tomli_w.dumps(values)))
    assert {name: getattr(got, name) for name in values} == values


@given(st.integers() | st.text() | st.booleans() | st.none() | st.lists(st.integers()) | st.floats())
def test_whatever_is_put_in_either_fits_or_is_a_config_error(value):
    for s in settings_of(Everything):
        try:
            got = getattr(read({s.name: value}), s.name)
        except ConfigError:
            continue
        assert got == value


def test_every_type_can_be_described():
    assert [describe(s) for s in settings_of(Everything)] == [
        "a string",
        "an integer from 1 to 10",
        "a number from 0 to 1",
        "true or false",
        "a list of strings",
        "a table of strings",
        'one of "slow", "fast"',
        "an integer of 0 or more",
        'one of "open", "sesame"',
    ]
