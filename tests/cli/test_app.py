"""The command line as a whole: light, complete, and with one place for errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from hfms_cli.__main__ import main
from hfms_cli.cli.app import VERBS, exit_status, own_verb, run
from hfms_cli.cli.client import Refused, Unreachable
from hfms_cli.cli.output import printable
from hfms_cli.errors import BadRequest, ConfigError, DoesNotFit, PluginError
from hfms_cli.sizes import human_bytes
from hfms_cli.version import __version__

HEAVY = (
    *("torch", "transformers", "numpy", "aiohttp", "huggingface_hub", "rich", "uvloop", "asyncio", "psutil"),
    *("packaging", "hfms_cli.ipfs", "hfms_storage.hf_cache"),
    *[f"hfms_cli.cli.{where.split(':')[0]}" for where, _ in VERBS.values()],
)


def test_help_imports_nothing_heavy_although_it_asks_every_plugin(environment, tmp_path):
    # At its exit, the process tells which modules it has: -X importtime does not show those that plugins came as.
    tell = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    done = subprocess.run(
        [sys.executable, "-c", tell + "from hfms_cli.__main__ import main; sys.exit(main())", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0
    imported = set(done.stderr.split())
    assert {"hfms_storage", "hfms_hardware", "hfms_engines", "hfms_middleware"} <= imported
    assert [name for name in HEAVY if name in imported] == []


def test_help_names_every_verb_and_every_exit_status(hfms):
    done = hfms("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("serve", "models", "chat", "bench", "plugins", "config", "hardware", "doctor"):
        assert f"\n  {verb} " in done.stdout
    for status in ("0 done", "1 failed", "2 wrong usage", "3 the server", "130 stopped"):
        assert status in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "verb",
    [
        ["serve"],
        ["chat"],
        ["bench"],
        ["hardware"],
        ["doctor"],
        *[["models", v] for v in ("list", "pull", "load", "unload", "ps", "show", "rm")],
        *[["config", v] for v in ("init", "show", "check")],
        ["plugins", "list"],
    ],
    ids=" ".join,
)
def test_every_verb_explains_itself(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        run([*verb, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"Usage: hfms {' '.join(verb)} ")


@pytest.mark.parametrize(
    "verb",
    ["hardware", "doctor", "bench", "models list", "models ps", "models show", "plugins list", "config show"],
)
def test_every_listing_can_be_json(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run([*verb.split(), "--help"])
    assert "--json" in capsys.readouterr().out


def test_installed_script_is_this_command_line():
    (script,) = entry_points(group="console_scripts", name="hfms")
    assert script.load() is main


def test_version_is_that_of_the_package(hfms):
    assert hfms("--version").stdout == f"hfms {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_for(shell, hfms):
    """Typer looks at the parent process for the shell; here its own switch names it."""
    done = hfms(env={"_HFMS_COMPLETE": f"source_{shell}"})
    assert "_HFMS_COMPLETE" in done.stdout


@pytest.mark.parametrize(("typed", "offered"), [("pl", "plugins"), ("models pu", "pull"), ("config sh", "show")])
def test_completion_offers_verbs(typed, offered, hfms):
    words = f"hfms {typed}".split()
    env = {
        "_HFMS_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    assert offered in hfms(env=env).stdout.split()


def test_unknown_verb_and_unknown_option_are_usage_errors(hfms):
    for args in (["sevre"], ["plugins", "list", "--jsno"], ["chat", "--temperature", "3"], []):
        assert hfms(*args).returncode == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadRequest("x"), 1),
        (DoesNotFit("x"), 1),
        (Refused("x"), 1),
        (ConfigError("x"), 2),
        (PluginError("x"), 2),
        (Unreachable("x"), 3),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else str(v),
)
def test_exit_status_tells_the_kind_of_error(error, status):
    assert exit_status(error) == status


def test_error_is_one_line_on_stderr_without_a_traceback(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text("[server]\nprot = 1\n")
    done = hfms("config", "show")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: hfms.toml [server]: unknown key `prot`; did you mean `port`?\n"


def test_broken_configuration_does_not_stop_help_and_stops_verbs_of_plugins(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text("[sever]\n")
    assert hfms("--help").returncode == 0
    done = hfms("keys", "list")
    assert done.returncode == 2
    assert done.stderr == "error: hfms.toml: unknown table `[sever]`; did you mean `[server]`?\n"


def test_control_characters_of_others_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9bc\td\ne\x7f") == "a[2Jbc\td\ne"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1536 * 2**20, "1.5 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes_are_shown_in_binary_units(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize("name", VERBS)
def test_line_of_a_verb_in_the_list_is_what_the_verb_says_of_itself(name):
    assert own_verb(name).help.startswith(VERBS[name][1].rstrip("."))
