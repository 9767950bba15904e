"""`hfms publisher` and `hfms models publish` on the real command line, and two servers on two hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import clean_environment
from tests.models.test_ipfs_models import FILES
from tests.storage.hub import Hub, Repo

ROOT = Path(__file__).parents[2]
HERE = {"HFMS_STORAGE_ORDER": "local,hf_cache", "HFMS_CONFIG": ""}


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes(FILES[name])
    return tmp_path / "model"


@pytest.fixture
def run(hfms):
    """Run `hfms ARGS`, which must end well; answers what it printed."""

    def call(*args, env=HERE):
        done = hfms(*args, env=env)
        assert done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture
def key(run) -> str:
    return run("publisher", "init").stdout.strip()


def test_a_key_is_made_shown_and_never_printed_in_private(run, hfms, tmp_path):
    made = run("publisher", "init")
    assert made.stdout.startswith("ed25519:")
    file = tmp_path / ".local" / "state" / "hfms" / "publisher.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(file) in made.stderr
    assert run("publisher", "show").stdout == made.stdout
    secret = file.read_text().splitlines()[1]
    assert secret not in made.stdout + made.stderr
    again = hfms("publisher", "init", env=HERE)
    assert (again.returncode, "There is a key already" in again.stderr) == (1, True)


def test_without_a_key_nothing_is_published_and_it_says_how_to_get_one(hfms, model):
    done = hfms("models", "publish", "./model", "--as", "org/model", env=HERE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "hfms publisher init" in done.stderr


def test_a_folder_is_published_shown_and_withdrawn(run, key, model):
    done = json.loads(run("models", "publish", "./model", "--as", "org/model", "--json").stdout)
    assert (done["model"], done["backend"], done["publisher"], done["license"]) == ("org/model", "hf_cache", key, None)
    assert json.loads(run("publisher", "show", "--json").stdout)["offers"][0]["cid"] == done["cid"]
    assert [line.split()[-1] for line in run("ipfs", "ls", done["cid"]).stdout.splitlines()[1:]] == [
        "config.json", "hfms.json", "hfms.json.sig", "model.safetensors",
    ]  # fmt: skip
    (gone,) = json.loads(run("models", "unpublish", "org/model", "--json").stdout)
    assert gone["cid"] == done["cid"]
    assert json.loads(run("publisher", "show", "--json").stdout)["offers"] == []
    freed = json.loads(run("ipfs", "gc", "--json").stdout)["freed_bytes"]["hf_cache"]
    assert freed > 500_000  # nothing holds it any more


def test_a_model_without_a_licence_is_published_with_a_warning_and_one_with_is_not(run, key, model):
    assert "names no license" in run("models", "publish", "./model", "--as", "org/model").stderr
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    done = run("models", "publish", "./model", "--as", "org/model")
    assert "names no license" not in done.stderr
    assert "apache-2.0" in done.stderr


@pytest.mark.parametrize("args", [["./model"], ["./model", "--as", "package:x"], ["./model", "--as", "--help-me"]])
def test_a_name_that_nobody_could_ask_for_is_refused(hfms, key, model, args):
    done = hfms("models", "publish", *args, env=HERE)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_a_storage_that_is_not_in_use_is_named_with_those_that_are(hfms, key, model):
    done = hfms("models", "publish", "./model", "--as", "org/model", "--to", "kubo", env=HERE)
    assert (done.returncode, "there are: hf_cache" in done.stderr) == (1, True)


def test_a_model_is_published_to_a_node_and_comes_from_there(run, key, model, node, tmp_path):
    env = HERE | {"HFMS_STORAGE_ORDER": "local,hf_cache,kubo", "IPFS_API": node.api, "KUBO_CMD": ""}
    done = json.loads(run("models", "publish", "./model", "--as", "org/m", "--to", "kubo", "--json", env=env).stdout)
    assert done["backend"] == "kubo"
    got = json.loads(run("ipfs", "get", done["cid"], "-o", "out", "--json", env=env).stdout)
    assert set(got["served"]) == {"kubo"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    away = run("models", "unpublish", "org/m", env=env | {"IPFS_API": "http://127.0.0.1:9"})
    assert "is not offered any more" in away.stdout
    assert f"warning: kubo still keeps {done['cid']}" in away.stderr
    assert f"hfms ipfs unpin {done['cid']}" in away.stderr
    run("ipfs", "unpin", done["cid"], env=env)


def test_keys_are_trusted_listed_and_trusted_no_more(run, hfms, key, tmp_path):
    run("publisher", "trust", key, "--for", "org/*", "--for", "other/one")
    (row,) = json.loads(run("publisher", "list", "--json").stdout)
    assert (row["key"], row["names"]) == (key, ["org/*", "other/one"])
    run("publisher", "untrust", key)
    assert json.loads(run("publisher", "list", "--json").stdout) == []
    for args in (["trust", "ed25519:nonsense", "--for", "*"], ["trust", key, "--for", "a b"], ["untrust", key]):
        done = hfms("publisher", *args, env=HERE)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    (tmp_path / "hfms.toml").write_text(f'[storage]\ntrusted_publishers = ["org/* {key}"]\n')
    env = {k: v for k, v in HERE.items() if k != "HFMS_CONFIG"}
    assert json.loads(run("publisher", "list", "--json", env=env).stdout)[0]["from"] == "hfms.toml"
    done = hfms("publisher", "untrust", key, env=env)
    assert (done.returncode, "take it out there" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("repo", "why"),
    [
        ({"private": True}, "it is private on the Hub"),
        ({"gated": True, "readers": frozenset({"hf_mine"})}, "it is gated on the Hub"),
    ],
)
async def test_a_gated_or_private_model_is_published_only_with_yes(hfms, key, repo, why):
    import asyncio

    files = {name: FILES[name] for name in ("config.json", "model.safetensors")}
    async with Hub({"org/model": Repo(files, license="llama3", **repo)}) as hub:
        env = HERE | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine"}

        def publish(*more):
            return asyncio.to_thread(hfms, "models", "publish", "org/model", "--json", *more, env=env)

        done = await publish()
        assert (done.returncode, done.stdout) == (1, "")
        assert why in done.stderr
        assert "--yes" in done.stderr
        done = await publish("--yes")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["license"] == "llama3"


# Two hosts.


@pytest.fixture
def hosts(tmp_path):
    """Two network namespaces that reach each other and nothing else; answers their names and addresses."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need `ip` and root")
    one, two = f"hfms1-{os.getpid()}", f"hfms2-{os.getpid()}"

    def ip(*args):
        return subprocess.run(["ip", *args], check=True, capture_output=True)

    try:
        ip("netns", "add", one)
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"no network namespaces here: {exc.stderr.decode().strip()}")
    try:
        ip("netns", "add", two)
        ip("link", "add", "hfms0", "netns", one, "type", "veth", "peer", "name", "hfms0", "netns", two)
        for name, address in ((one, "10.213.7.1/24"), (two, "10.213.7.2/24")):
            ip("-n", name, "addr", "add", address, "dev", "hfms0")
            for link in ("lo", "hfms0"):
                ip("-n", name, "link", "set", link, "up")
        yield {one: "10.213.7.1", two: "10.213.7.2"}
    finally:
        for name in (one, two):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


KEY = "a-key-of-the-first-server-0123456789"
ASK = """
import json, sys, urllib.request
body = json.dumps({"model": sys.argv[2], "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}).encode()
ask = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(ask, timeout=120).read().decode())
"""


@contextlib.contextmanager
def serving(host, folder, *args, env):
    """`hfms serve` on a host, until the context ends; ready when it says so."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-m", "hfms_cli", "serve", "--port", "8000", *args],
            cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process, log
    finally:
        process.terminate()
        process.wait(60)


def asked(host, code, *args):
    """What a program on a host prints; asked again until it ends well."""
    import time

    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(
            ["ip", "netns", "exec", host, sys.executable, "-c", code, *args], capture_output=True, text=True
        )
        if done.returncode == 0:
            return done.stdout
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.2)


def test_a_server_pulls_from_another_host_with_the_hub_out_of_reach_and_answers_a_chat(hosts, tmp_path):
    from tests.engines import tiny

    pytest.importorskip("transformers")
    (one, address), (two, _) = hosts.items()
    homes = {host: tmp_path / host for host in hosts}
    for home in homes.values():
        home.mkdir()
    tiny.save(homes[one] / "model", tiny.ARCHITECTURES["llama"]())

    def environment(host, **more):
        base = clean_environment(homes[host], HFMS_STORAGE_ORDER="local,neighbours,hf_cache", **more)
        return base | {"HF_HUB_OFFLINE": "0"}  # it may ask the Hub, and cannot reach it

    def hfms(host, *args):
        command = [sys.executable, "-m", "hfms_cli", *args]
        done = subprocess.run(command, cwd=homes[host], env=environment(host), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    key = hfms(one, "publisher", "init")
    hfms(one, "models", "publish", "./model", "--as", "team/tiny")
    url = f"http://{address}:8000"
    (homes[two] / "hfms.toml").write_text(
        f'[storage]\ntrusted_publishers = ["team/* {key}"]\n'
        f'[storage.neighbours]\nurls = ["{url}"]\nkeys = {{"{url}" = "{KEY}"}}\n'
        '[engine]\norder = ["transformers"]\n'
    )
    first = environment(one, HFMS_SHARE_MODELS="true", HFMS_API_KEY=KEY)
    with serving(one, homes[one], "--host", address, env=first):
        asked(two, "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])", f"{url}/health")
        with serving(two, homes[two], "team/tiny", "other/model", env=environment(two)) as (_, log):
            health = "http://127.0.0.1:8000/health"
            asked(two, "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])", health)
            chat = json.loads(asked(two, ASK, "http://127.0.0.1:8000/v1/chat/completions", "team/tiny"))
            status = (
                "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/status').read().decode())"
            )
            content = json.loads(asked(two, status))["storage"]["content"]
    assert chat["choices"][0]["finish_reason"] in ("stop", "length")
    assert chat["usage"]["completion_tokens"] >= 1
    served = {row["name"]: row["served_bytes"] for row in content}
    assert served[f"neighbour {address}:8000"] > 100_000
    said = log.read_text()
    assert "ready  team/tiny" in said
    assert "failed other/model" in said  # nobody offers it, and the Hub cannot be reached
    assert KEY not in said
    # The second server's own disk has it now: it starts alone.
    listed = hfms(two, "models", "list", "--json")
    assert [(m["model"], m["storage"]) for m in json.loads(listed)] == [("team/tiny", "neighbours")]
