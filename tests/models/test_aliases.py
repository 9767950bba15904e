"""More names for models: of the configuration, and of `hfms models alias`."""

from __future__ import annotations

import json
import sys

import pytest

from hfms_cli.errors import BadRequest, Conflict, NotFound
from hfms_cli.models.aliases import LOOK_SECONDS, Aliases
from tests.storage.verbs import hfms


@pytest.fixture
def aliases(tmp_path):
    return Aliases({"house": "org/house"}, tmp_path)


def test_an_alias_that_was_made_is_seen_at_once_here_and_by_others_when_they_look_again(aliases, tmp_path):
    now = [0.0]
    other = Aliases({"house": "org/house"}, tmp_path, lambda: now[0])
    assert dict(other) == {"house": "org/house"}
    aliases.add("mine", "org/name@v1")
    assert aliases["mine"] == "org/name@v1"
    assert "mine" not in other
    now[0] += LOOK_SECONDS
    assert other["mine"] == "org/name@v1"
    aliases.add("mine", "org/other")
    now[0] += LOOK_SECONDS
    assert other["mine"] == "org/other"
    aliases.remove("mine")
    assert "mine" not in aliases
    now[0] += LOOK_SECONDS
    assert "mine" not in other


def test_what_others_have_made_is_kept_also_by_one_that_has_not_looked_again(aliases, tmp_path):
    other = Aliases({}, tmp_path, lambda: 0.0)
    assert not dict(other)
    aliases.add("mine", "org/name")
    other.add("yours", "org/other")
    assert dict(Aliases({}, tmp_path)) == {"mine": "org/name", "yours": "org/other"}


def test_what_the_configuration_says_is_changed_only_there(aliases):
    with pytest.raises(Conflict, match=r"\[models\] aliases"):
        aliases.add("house", "org/other")
    with pytest.raises(Conflict, match=r"\[models\] aliases"):
        aliases.remove("house")


@pytest.mark.parametrize(("alias", "model"), [("", "org/x"), ("-o", "org/x"), ("a\0", "org/x"), ("a", "a/b/c")])
def test_what_is_no_name_is_refused(aliases, alias, model):
    with pytest.raises(BadRequest):
        aliases.add(alias, model)


def test_an_alias_of_an_alias_is_refused(aliases):
    aliases.add("mine", "org/name")
    with pytest.raises(Conflict, match="is an alias itself"):
        aliases.add("yours", "mine")


def test_removing_what_is_not_there_says_what_is(aliases):
    with pytest.raises(NotFound, match="there are: house"):
        aliases.remove("hose")


def test_a_file_that_is_not_ours_is_no_alias(aliases, tmp_path):
    (tmp_path / "aliases.json").write_text("[1]")
    assert dict(aliases) == {"house": "org/house"}
    aliases.add("mine", "org/name")
    assert aliases["mine"] == "org/name"


async def test_a_running_server_answers_to_an_alias_that_is_made_meanwhile(serve, environ):
    async with serve("echo:a") as server:
        body = {"model": "mine", "prompt": "hello", "max_tokens": 4}
        assert (await server.post("/v1/completions", body))[0] == 404
        env = environ | {"PATH": sys.prefix + "/bin"}
        status, out, err = await hfms(env, "alias", "mine", "echo:a", "--json")
        assert (status, json.loads(out)) == (0, {"mine": "echo:a"}), err
        assert (await server.post("/v1/completions", body))[0] == 200
        _, listed = await server.get("/v1/models")
        assert "mine" in {row["id"] for row in listed["data"]}
        assert (await hfms(env, "alias", "mine", "--remove"))[0] == 0
        assert (await server.post("/v1/completions", body))[0] == 404
        assert (await hfms(env, "alias", "mine"))[0] == 2
