"""`hfms models discover`: what can be served here, searched by task, architecture and hardware."""

from __future__ import annotations

import json

import pytest

from tests.models.test_catalogue import make_model
from tests.models.test_inspect import write_gguf


@pytest.fixture
def discover(hfms, tmp_path):
    make_model(tmp_path / "house" / "talker")
    write_gguf(tmp_path / "house" / "llama.gguf")
    (tmp_path / "house" / "far.toml").write_text(
        'source = "org/far"\ntasks = ["embed"]\narchitecture = "BertModel"\nhardware = ["cuda"]\naliases = ["f"]\n'
    )
    (tmp_path / "hfms.toml").write_text('[models]\nfolders = ["house"]\n[models.aliases]\nt = "talker"\n')

    def run(*options: str):
        return hfms("models", "discover", *options)

    return run


def ids(done) -> set[str]:
    assert done.returncode == 0, done.stderr
    return {row["model"] for row in json.loads(done.stdout)}


def test_every_model_is_listed_with_what_it_is_and_what_can_run_it(discover):
    rows = {row["model"]: row for row in json.loads(discover("--json").stdout)}
    assert rows.keys() == {"talker", "llama", "far"}
    assert rows["talker"]["tasks"] == ["generate", "embed", "score", "transcribe", "image-text-to-text"]
    assert (rows["talker"]["hardware"], rows["talker"]["aliases"]) == (["cpu"], ["t"])
    assert (rows["far"]["hardware"], rows["far"]["aliases"]) == (["cuda"], ["f"])
    assert rows["llama"]["architecture"] == "llama"


def test_an_alias_that_a_verb_has_made_is_listed_with_its_model(discover, hfms):
    assert hfms("models", "alias", "mine", "talker").returncode == 0
    rows = {row["model"]: row for row in json.loads(discover("--json").stdout)}
    assert sorted(rows["talker"]["aliases"]) == ["mine", "t"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--task", "embed"], {"talker", "far"}),
        (["--architecture", "bert*"], {"far"}),
        (["--hardware", "cuda"], {"far"}),
        (["--hardware", "cpu", "--task", "score"], {"talker"}),
        (["--hardware", "abacus"], set()),
    ],
)
def test_models_are_searched_by_task_architecture_and_hardware(discover, options, found):
    assert ids(discover("--json", *options)) == found


def test_a_task_that_is_none_is_refused(discover):
    done = discover("--task", "sing")
    assert done.returncode == 1
    assert "there are generate, embed, score" in done.stderr


def test_a_bad_card_is_told_on_standard_error_and_the_others_are_listed(discover, tmp_path):
    (tmp_path / "house" / "bad.toml").write_text("sorce = 1")
    done = discover()
    assert "warning: house/bad.toml: card: unknown key `sorce`; did you mean `source`?" in done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"MODEL", "talker", "llama", "far"}
