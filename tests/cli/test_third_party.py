"""A package of somebody else's, installed by pip and found through its entry point; and a broken one beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "hfms-shout"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has built and installed a copy of the example."""
    source = tmp_path_factory.mktemp("source") / "hfms-shout"
    shutil.copytree(EXAMPLE, source)
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def environment(environment, installed) -> dict[str, str]:
    return environment | {"PYTHONPATH": str(installed)}


@pytest.fixture
def broken_too(environment, tmp_path) -> dict[str, str]:
    """The environment with one more package, whose plugin cannot be imported."""
    folder = tmp_path / "broken"
    info = folder / "hfms_broken-0.3.dist-info"
    info.mkdir(parents=True)
    (folder / "hfms_broken.py").write_text("import a_module_that_nobody_has\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hfms-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[hfms]\nbroken = hfms_broken\n")
    return environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}:{folder}"}


def listed(done: subprocess.CompletedProcess[str]) -> dict[str, dict]:
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_pip_installed_plugin_is_found_by_its_entry_point(hfms):
    shout = listed(hfms("plugins", "list", "--json"))["shout"]
    assert shout == {
        "name": "shout",
        "module": "hfms_shout",
        "package": "hfms-shout",
        "version": "1.0.0",
        "enabled": True,
        "provides": ["middleware:shout", "hfms_commands", "hfms_routes"],
        "in_use": ["hfms_commands", "hfms_routes"],
        "error": None,
    }


def test_order_of_the_configuration_puts_it_in_use(hfms):
    rows = listed(hfms("plugins", "list", "--json", env={"HFMS_MIDDLEWARE": "auth,shout"}))
    assert "middleware:shout" in rows["shout"]["in_use"]


def test_its_verb_is_a_verb_of_hfms(hfms):
    assert "Print TEXT in capitals." in hfms("--help").stdout
    assert hfms("shout", "hello").stdout == "HELLO\n"


def test_its_option_is_read_shown_and_checked_as_any_other(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text('[middleware]\norder = ["shout"]\n[middleware.shout]\nsuffix = "!"\n')
    shown = json.loads(hfms("config", "show", "--json", "--origin").stdout)
    assert shown["middleware"]["shout"] == {"suffix": {"value": "!", "origin": "file"}}
    shown = json.loads(hfms("config", "show", "--json", "--origin", env={"HFMS_SHOUT_SUFFIX": "?"}).stdout)
    assert shown["middleware"]["shout"] == {"suffix": {"value": "?", "origin": "HFMS_SHOUT_SUFFIX"}}
    (tmp_path / "hfms.toml").write_text('[middleware.shout]\nsufix = "!"\n')
    done = hfms("config", "check")
    assert done.returncode == 2
    assert "hfms.toml [middleware.shout]: unknown key `sufix`; did you mean `suffix`?" in done.stderr


def test_disabled_it_brings_nothing(hfms):
    off = {"HFMS_DISABLED_PLUGINS": "shout"}
    row = listed(hfms("plugins", "list", "--json", env=off))["shout"]
    assert (row["enabled"], row["provides"], row["in_use"]) == (False, [], [])
    done = hfms("shout", "hello", env=off)
    assert done.returncode == 2
    assert "No such command 'shout'" in done.stderr


def test_broken_package_beside_it_costs_only_itself(hfms, broken_too):
    rows = listed(hfms("plugins", "list", "--json", env=broken_too))
    assert rows["broken"]["error"] == "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    assert rows["broken"]["package"] == "hfms-broken"
    others = {name: row["error"] for name, row in rows.items() if name != "broken"}
    assert others == {"engines": None, "hardware": None, "middleware": None, "shout": None, "storage": None}
    assert hfms("shout", "hello", env=broken_too).stdout == "HELLO\n"


def test_table_for_people_says_why_it_failed(hfms, broken_too):
    out = hfms("plugins", "list", env=broken_too).stdout
    assert "failed: ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in out


def test_broken_package_stops_what_asks_for_it_and_says_why(hfms, broken_too, tmp_path):
    (tmp_path / "hfms.toml").write_text('[middleware]\norder = ["broken"]\n')
    done = hfms("config", "check", env=broken_too)
    assert done.returncode == 2
    assert "[middleware] order names `broken`, which no plugin provides" in done.stderr
    assert "a_module_that_nobody_has" in done.stderr


def test_it_stands_around_every_call_of_a_real_server(hfms, serving):
    url = serving('[middleware]\norder = ["auth", "shout"]\n[middleware.shout]\nsuffix = "!"\n')
    assert hfms("chat", "hello there", "--url", url).stdout == "HELLO THERE!\n"


def test_its_route_is_a_route_of_the_server_behind_the_same_door(serving):
    url = serving(env={"HFMS_API_KEY": "a-key-that-nobody-guesses-7"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/shout/hello")
    assert refused.value.code == 401
    asked = urllib.request.Request(f"{url}/shout/hello", headers={"X-API-Key": "a-key-that-nobody-guesses-7"})
    with urllib.request.urlopen(asked) as answer:
        assert json.load(answer) == {"shout": "HELLO"}
