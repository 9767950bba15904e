"""`hfms config`: the example is generated and true, `show` tells what is in force and why, `check` finds mistakes."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from hfms_cli.cli.config import example, toml
from hfms_cli.config import TABLES, Config, load_config
from hfms_cli.hookspecs import KINDS
from hfms_cli.plugins import GROUP, discover
from hfms_cli.settings import settings_of

EXAMPLE = Path(__file__).parents[2] / "hfms.toml.example"


@pytest.fixture(scope="module")
def first_party():
    return discover(Config(), [p for p in entry_points(group=GROUP) if p.dist and p.dist.name == "hfms"])


def test_example_file_is_what_the_code_generates(first_party):
    """After a change of settings: `hfms config init --force hfms.toml.example`, with no other plugins installed."""
    assert EXAMPLE.read_text(encoding="utf-8") == example(first_party, package="hfms")


def test_example_changes_nothing_as_it_stands(first_party):
    config = load_config(EXAMPLE, environ={})
    assert set(config.origins.values()) == {"default"}
    assert list(first_party.faults(config)) == []


def test_example_with_every_setting_taken_in_is_still_the_defaults(first_party, tmp_path):
    active = re.sub(r"^#(\w+ = )", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    path = tmp_path / "hfms.toml"
    path.write_text(active)
    config = load_config(path, environ={})
    assert set(config.origins.values()) == {"file"}
    assert all(getattr(config, name) == cls() for name, cls, _ in TABLES)
    for kind in KINDS:
        for name in first_party.names(kind):
            options = first_party.record(kind, name).options
            assert config.plugin_options(kind, name, options) == options()


def test_example_says_of_each_setting_what_it_is_and_how_else_to_set_it(first_party):
    text = EXAMPLE.read_text(encoding="utf-8")
    tables = [cls for _, cls, _ in TABLES]
    tables += [first_party.record(kind, name).options for kind in KINDS for name in first_party.names(kind)]
    for table in tables:
        for s in settings_of(table):
            assert s.help in text
            assert not s.env or f"HFMS_{s.env}, HF_SERVER_{s.env}" in text


def test_init_writes_a_file_that_check_passes(hfms, tmp_path):
    done = hfms("config", "init")
    assert (done.returncode, done.stdout) == (0, "wrote hfms.toml\n")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["hfms.toml"]
    done = hfms("config", "check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hfms.toml: ok\n", "")


def test_init_does_not_overwrite_unless_forced(hfms, tmp_path):
    (tmp_path / "mine.toml").write_text("# mine\n")
    done = hfms("config", "init", "mine.toml")
    assert done.returncode == 1
    assert done.stderr == "error: mine.toml is there already; --force replaces it\n"
    assert (tmp_path / "mine.toml").read_text() == "# mine\n"
    assert hfms("config", "init", "--force", "mine.toml").returncode == 0
    assert "[server]" in (tmp_path / "mine.toml").read_text()


@pytest.mark.parametrize("path", ["no/such/folder/hfms.toml", "folder"])
def test_init_that_cannot_write_says_so_and_leaves_nothing(hfms, tmp_path, path):
    (tmp_path / "folder").mkdir()
    done = hfms("config", "init", "--force", path)
    assert done.returncode == 1
    assert f"error: {path} cannot be written: " in done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder"]


def test_show_is_toml_of_what_is_in_force(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text('[server]\nport = 1234\n[models.aliases]\n"gpt 4" = "org/name"\n')
    shown = tomllib.loads(hfms("config", "show", env={"HFMS_HOST": "::1"}).stdout)
    assert (shown["server"]["host"], shown["server"]["port"]) == ("::1", 1234)
    assert shown["models"]["aliases"] == {"gpt 4": "org/name"}


def test_show_says_where_each_value_comes_from(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text("[server]\nport = 1234\n")
    env = {"HFMS_HOST": "::1", "HF_SERVER_LOG_LEVEL": "debug", "HFMS_ENABLE_AUTH": "no"}
    lines = hfms("config", "show", "--origin", env=env).stdout.splitlines()
    assert "port = 1234  # file" in lines
    assert 'host = "::1"  # HFMS_HOST' in lines
    assert 'level = "debug"  # HF_SERVER_LOG_LEVEL' in lines
    assert 'order = ["rate_limit", "queue", "breaker"]  # default, HFMS_ENABLE_AUTH' in lines
    assert "insecure = false  # default" in lines


def test_show_as_json_nests_as_toml_does(hfms):
    plain = json.loads(hfms("config", "show", "--json", env={"HFMS_PORT": "99"}).stdout)
    assert plain["server"]["port"] == 99
    assert plain["middleware"]["auth"]["require"] is False
    told = json.loads(hfms("config", "show", "--json", "--origin", env={"HFMS_PORT": "99"}).stdout)
    assert told["server"]["port"] == {"value": 99, "origin": "HFMS_PORT"}


def test_secrets_are_never_shown(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text('[middleware.auth]\napi_key = "from-the-file"\n')
    for args in (["show"], ["show", "--json"], ["show", "--origin"], ["show", "--json", "--origin"], ["check"]):
        done = hfms("config", *args, env={"HFMS_ADMIN_API_KEY": "from-the-environment"})
        assert done.returncode == 0
        assert "from-the" not in done.stdout + done.stderr
    assert '# api_key = "(hidden)"' in hfms("config", "show").stdout
    assert 'admin_api_key = ""' in hfms("config", "show").stdout


def test_show_reads_the_file_that_it_is_told_to(hfms, tmp_path):
    (tmp_path / "other.toml").write_text("[server]\nport = 77\n")
    assert "port = 77\n" in hfms("config", "show", "--config", "other.toml").stdout
    assert "port = 77\n" in hfms("config", "show", env={"HFMS_CONFIG": "other.toml"}).stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sever]", "bad.toml: unknown table `[sever]`; did you mean `[server]`?"),
        ("[server]\nprot = 1", "bad.toml [server]: unknown key `prot`; did you mean `port`?"),
        ("[server]\nport = 70000", "bad.toml [server]: `port` is 70000, which is not an integer from 0 to 65535"),
        ("[log]\nlevel = 'wanring'", 'did you mean "warning"?'),
        ("[middleware.auth]\nrequier = true", "[middleware.auth]: unknown key `requier`; did you mean `require`?"),
        ("[middleware.auth]\nrequire = 1", "bad.toml [middleware.auth]: `require` is 1, which is not true or false"),
        (
            "[middleware]\norder = ['auht']",
            "bad.toml [middleware] order names `auht`, which no plugin provides; did you mean `auth`?",
        ),
        ("[engine.trnsformers]\nx = 1", "bad.toml [engine.trnsformers] names `trnsformers`, which no plugin provides"),
        (
            "[hardware]\npreferred = ['gpu']",
            "bad.toml [hardware] preferred names `gpu`, which no plugin provides; did you mean `cpu`?",
        ),
        ("port = ", "bad.toml: is not valid TOML"),
    ],
)  # fmt: skip
def test_check_names_what_is_wrong_and_exits_2(hfms, tmp_path, text, said):
    (tmp_path / "bad.toml").write_text(text)
    done = hfms("config", "check", "bad.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_check_tells_all_faults_of_plugins_at_once(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text("[middleware]\norder = ['one-such', 'two-such']\n")
    done = hfms("config", "check")
    assert "`one-such`" in done.stderr
    assert "`two-such`" in done.stderr


def test_check_reads_the_environment_too(hfms):
    done = hfms("config", "check", env={"HF_SERVER_PORT": "many"})
    assert done.returncode == 2
    assert "HF_SERVER_PORT is 'many', which is not an integer from 0 to 65535" in done.stderr


def test_check_names_the_variable_that_names_no_plugin(hfms):
    done = hfms("config", "check", env={"HFMS_STORAGE_ORDER": "local,kubbo"})
    assert done.returncode == 2
    assert "HFMS_STORAGE_ORDER [storage] order names `kubbo`" in done.stderr


def test_check_without_a_file_says_so(hfms):
    assert hfms("config", "check").stdout == "no hfms.toml here; defaults and environment: ok\n"


def test_check_of_a_file_that_is_not_there_fails(hfms):
    done = hfms("config", "check", "nowhere.toml")
    assert done.returncode == 2
    assert "nowhere.toml: cannot be read: No such file or directory" in done.stderr


@pytest.mark.parametrize(
    "value",
    ['a "quoted" \\ text\n\x7f', ["a", 'b"'], [], {}, {"a b": "c", "d": 'e"'}, True, 7, 0.5, 1e300, ["\U0001f30d"]],
    ids=repr,
)
def test_values_are_written_as_toml_on_one_line(value):
    line = f"x = {toml(value)}"
    assert "\n" not in line
    assert tomllib.loads(line) == {"x": value}
