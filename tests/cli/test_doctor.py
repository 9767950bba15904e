"""`hfms doctor`: what is right, what is wrong, and what to do about it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable

import pytest

from hfms_cli.cli import doctor
from hfms_cli.cli.doctor import Finding
from hfms_cli.config import Config, ModelsConfig, PluginsConfig, ServerConfig
from hfms_cli.plugins import discover


def findings(done) -> dict[str, list[dict]]:
    """By what they are about."""
    found: dict[str, list[dict]] = {}
    for row in json.loads(done.stdout):
        found.setdefault(row["about"], []).append(row)
    return found


def only(found: Iterable[Finding]) -> Finding:
    (one,) = found
    return one


@pytest.fixture
def free(unused_tcp_port) -> dict[str, str]:
    return {"HFMS_PORT": str(unused_tcp_port)}


def test_sound_machine_has_no_problem_and_exits_0(hfms, free):
    done = hfms("doctor", "--json", env=free)
    rows = json.loads(done.stdout)
    assert [r for r in rows if r["level"] == "problem"] == []
    assert done.returncode == 0
    assert list(dict.fromkeys(r["about"] for r in rows)) == [
        "python", "extras", "config", "plugins", "devices", "folders", "port", "hugging face",
    ]  # fmt: skip


def test_every_warning_and_problem_says_what_to_do(hfms, free, tmp_path):
    (tmp_path / "hfms.toml").write_text('[middleware]\norder = ["nobody"]\n[models]\nfolders = ["nowhere"]\n')
    done = hfms("doctor", "--json", env=free | {"HFMS_PROT": "1"})
    rows = [r for r in json.loads(done.stdout) if r["level"] != "ok"]
    assert len(rows) >= 4
    assert all(r["advice"] for r in rows)
    assert done.returncode == 1


def test_report_for_people_has_a_line_each_and_advice_below(hfms, free):
    out = hfms("doctor", env=free | {"HFMS_PROT": "1"}).stdout
    assert "ok       python: Python 3." in out
    assert "warning  environment: HFMS_PROT is set, and nothing reads it\n         -> did you mean HFMS_PORT?\n" in out


def test_broken_configuration_is_a_problem_and_not_a_crash(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text("[server]\nport = -1\n")
    done = hfms("doctor", "--json")
    (row,) = findings(done)["config"]
    assert (done.returncode, row["level"]) == (1, "problem")
    assert "hfms.toml [server]: `port` is -1" in row["message"]


def test_installed_extra_is_told_with_its_versions():
    (found,) = [f for f in doctor.check_extras() if "`transformers`" in f.message]
    assert found.level == "ok"
    assert "torch 2." in found.message


def test_missing_or_old_package_of_an_extra_is_a_warning_with_the_command():
    there = {"torch": "1.0", "gguf": None}
    found = doctor.check_extras(lambda package: there.get(package, doctor.installed_version(package)))
    (found,) = [f for f in found if "`transformers`" in f.message]
    assert (found.level, found.message) == ("warning", "extra `transformers`: missing or too old: gguf, torch")
    assert "pip install 'hfms[transformers]'" in found.advice


def test_disabled_plugin_is_in_order_unless_it_is_used():
    config = Config(plugins=PluginsConfig(["middleware"]))
    found = list(doctor.check_plugins(discover(config), config))
    assert any(f.level == "ok" and f.message.startswith("middleware (hfms ") and ": off" in f.message for f in found)
    assert any(f.level == "problem" and "names `auth`" in f.message for f in found)


def test_free_port_is_in_order(unused_tcp_port):
    found = only(doctor.check_port(Config(server=ServerConfig(port=unused_tcp_port))))
    assert (found.level, found.message) == ("ok", f"127.0.0.1:{unused_tcp_port} is free")


def test_port_0_needs_no_check():
    found = only(doctor.check_port(Config(server=ServerConfig(port=0))))
    assert (found.level, found.message) == ("ok", "127.0.0.1: a free port will be taken")


def port_of(server) -> int:
    return int(server.url.rpartition(":")[2])


def test_port_where_hfms_answers_is_in_order(server):
    server.replies["GET", "/health"] = (200, {"status": "ok"})
    found = only(doctor.check_port(Config(server=ServerConfig(port=port_of(server)))))
    assert (found.level, found.message) == ("ok", f"hfms answers at {server.url}")


@pytest.mark.parametrize("reply", [(200, {"status": "fine"}), (200, "hello"), (404, "")])
def test_port_where_another_web_server_answers_is_a_problem(server, reply):
    server.replies["GET", "/health"] = reply
    found = only(doctor.check_port(Config(server=ServerConfig(port=port_of(server)))))
    assert (found.level, found.message) == ("problem", f"{server.url} belongs to a program that is not hfms")


def test_port_of_a_program_that_speaks_no_http_is_a_problem():
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(20)
        port = other.getsockname()[1]

        def hang_up() -> None:
            other.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        found = only(doctor.check_port(Config(server=ServerConfig(port=port))))
        thread.join(20)
    assert found.level == "problem"


def test_address_that_is_not_this_machines_is_a_problem():
    found = only(doctor.check_port(Config(server=ServerConfig(host="192.0.2.1", port=0))))
    assert found.level == "problem"
    assert "192.0.2.1:0 cannot be listened on: " in found.message


def test_cache_folder_that_is_not_there_yet_is_judged_by_its_parent(tmp_path):
    found = doctor.cache_folder("packages", tmp_path / "a" / "b")
    assert found.level == "ok"
    assert found.message.endswith("free, not made yet")
    assert not (tmp_path / "a").exists()


def test_file_in_the_place_of_a_cache_folder_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor.cache_folder("packages", tmp_path / "file" / "cache")
    assert found.level == "problem"
    assert "cannot be written" in found.message


def test_little_room_is_a_warning(tmp_path):
    assert doctor.cache_folder("packages", tmp_path, scarce=2**62).level == "warning"


def test_folder_of_models_that_is_missing_is_a_problem(tmp_path):
    config = Config(models=ModelsConfig(folders=[str(tmp_path), str(tmp_path / "gone")]))
    problems = [f for f in doctor.check_folders(discover(config), config) if f.level == "problem"]
    assert [f.message for f in problems] == [f"[models] folders names {tmp_path / 'gone'}, which is no folder"]


def test_cache_that_a_storage_keeps_of_its_own_is_checked_too(tmp_path):
    (tmp_path / "file").write_text("")
    config = Config(options={("storage", "hf_cache"): {"cache_dir": str(tmp_path / "file")}})
    problems = [f for f in doctor.check_folders(discover(config), config) if f.level == "problem"]
    assert len(problems) == 1
    assert problems[0].message.startswith(f"{tmp_path / 'file'} (for [storage.hf_cache]) cannot be written")


def test_token_of_the_hub_is_told_and_never_shown(hfms, free):
    without = findings(hfms("doctor", "--json", env=free))["hugging face"]
    assert any(r["message"] == "no token: gated models cannot be pulled" for r in without)
    done = hfms("doctor", "--json", env=free | {"HF_TOKEN": "hf_dontshowme"})
    assert any(r["message"] == "a token is set" for r in findings(done)["hugging face"])
    assert "dontshowme" not in done.stdout + done.stderr


def test_home_of_the_hub_and_offline_are_told(hfms, free, tmp_path):
    rows = findings(hfms("doctor", "--json", env=free | {"HF_HOME": str(tmp_path / "hub")}))["hugging face"]
    assert rows[0]["message"] == f"HF_HOME is {tmp_path / 'hub'}"
    assert rows[1]["level"] == "warning"
    assert rows[1]["message"].startswith("offline")
    online = findings(hfms("doctor", "--json", env=free | {"HF_HUB_OFFLINE": "0"}))["hugging face"]
    assert not any(r["message"].startswith("offline") for r in online)


@pytest.mark.parametrize("name", ["HFMS_PROT", "HF_SERVER_PROT"])
def test_variable_that_nothing_reads_is_a_warning_without_its_value(hfms, free, name):
    done = hfms("doctor", "--json", env=free | {name: "a-secret"})
    (row,) = findings(done)["environment"]
    assert (row["level"], row["message"]) == ("warning", f"{name} is set, and nothing reads it")
    assert row["advice"] == f"did you mean {name.replace('PROT', 'PORT')}?"
    assert "a-secret" not in done.stdout


def test_variables_that_something_reads_are_not_warned_of():
    config = Config()
    plugins = discover(config)
    read = ["HFMS_PORT", "HF_SERVER_HOST", "HFMS_ENABLE_AUTH", "HFMS_CONFIG", "HF_SERVER_API_KEY", "HFMS_REQUIRE_AUTH"]
    assert list(doctor.check_variables(plugins, dict.fromkeys(read, "x"))) == []
