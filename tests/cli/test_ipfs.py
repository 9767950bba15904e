"""`hfms ipfs`: the verbs on the real command line, on this machine's own store and on a real node."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hfms_cli.ipfs import blocks_of_path, root_of

DATA = random.Random(21).randbytes(600_000)
HERE = {"HFMS_STORAGE_ORDER": "hf_cache", "HFMS_CONFIG": ""}


@pytest.fixture
def given(tmp_path) -> Path:
    (tmp_path / "given" / "sub").mkdir(parents=True)
    (tmp_path / "given" / "a.txt").write_bytes(b"hello")
    (tmp_path / "given" / "sub" / "b.bin").write_bytes(DATA)
    return tmp_path / "given"


@pytest.fixture
def cid(given) -> str:
    return str(root_of(blocks_of_path(given, recursive=True)))


@pytest.fixture
def ipfs(hfms):
    """Run `hfms ipfs ARGS` with only this machine's own store; answers output where it works."""

    def run(*args, env=HERE):
        done = hfms("ipfs", *args, env=env)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_a_folder_goes_in_and_comes_out_without_any_node(ipfs, given, cid, tmp_path):
    added = ipfs("add", "-r", "given")
    assert added.stdout == f"{cid}\n"
    assert "by hf_cache" in added.stderr

    head, *rows = ipfs("ls", cid).stdout.splitlines()
    assert (head.split(), [row.split()[-1] for row in rows]) == (["CID", "SIZE", "NAME"], ["a.txt", "sub"])

    got = ipfs("get", cid, "-o", "out")
    assert "by hf_cache (" in got.stderr
    assert (tmp_path / "out" / "sub" / "b.bin").read_bytes() == DATA
    assert ipfs("cat", f"ipfs://{cid}/a.txt").stdout == "hello"


def test_json_says_what_where_and_who_else_was_tried(ipfs, given, cid):
    env = {"HFMS_STORAGE_ORDER": "kubo,hf_cache", "IPFS_API": "http://127.0.0.1:9", "KUBO_CMD": "", "HFMS_CONFIG": ""}
    assert json.loads(ipfs("add", "-r", "given", "--json", env=env).stdout) == {
        "cid": cid,
        "size_bytes": 600_005,
        "backend": "hf_cache",
        "tried": {"kubo": "The node's RPC cannot be reached."},
    }
    listed = json.loads(ipfs("ls", cid, "--json").stdout)
    assert [(e["name"], e["kind"], e["size_bytes"]) for e in listed["entries"]] == [
        ("a.txt", "file", 5),
        ("sub", "folder", 0),
    ]
    assert set(listed["served"]) == {"hf_cache"}
    got = json.loads(ipfs("get", f"{cid}/sub", "-o", "sub", "--json").stdout)
    assert (got["path"], got["size_bytes"], got["tried"]) == ("sub", 600_000, {})
    assert got["served_bytes"]["hf_cache"] > 600_000


def test_an_archive_goes_out_and_in(ipfs, given, cid, tmp_path):
    ipfs("add", "-r", "given")
    ipfs("export", cid, "-o", "all.car")
    elsewhere = HERE | {"HF_HOME": str(tmp_path / "elsewhere")}
    assert ipfs("import", "all.car", env=elsewhere).stdout == f"{cid}\n"
    assert ipfs("cat", f"{cid}/a.txt", env=elsewhere).stdout == "hello"
    assert json.loads(ipfs("import", "all.car", "--json", env=elsewhere).stdout)["roots"] == [cid]


def test_a_pin_holds_until_it_is_taken_away(ipfs, hfms, given, cid):
    ipfs("add", "-r", "--no-pin", "given")
    assert ipfs("pin", cid).stdout == f"pinned {cid}\n"
    ipfs("gc")
    assert ipfs("cat", f"{cid}/a.txt").stdout == "hello"
    assert json.loads(ipfs("unpin", cid, "--json").stdout)["backend"] == "hf_cache"
    assert hfms("ipfs", "unpin", cid, env=HERE).returncode == 1
    ipfs("gc")
    assert hfms("ipfs", "cat", f"{cid}/a.txt", env=HERE).returncode == 1


def test_a_cat_into_a_pipe_is_bytes_and_nothing_else(environment, ipfs, given, tmp_path):
    made = ipfs("add", "given/sub/b.bin").stdout.strip()
    done = subprocess.run(
        [sys.executable, "-m", "hfms_cli", "ipfs", "cat", made],
        capture_output=True,
        env=environment | HERE,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.stdout == DATA


def test_a_backend_that_is_named_is_asked_first_and_falls_back(ipfs, hfms, given, cid):
    env = HERE | {"IPFS_API": "http://127.0.0.1:9", "KUBO_CMD": ""}
    added = ipfs("add", "-r", "given", "--backend", "kubo", env=env)
    assert "by hf_cache; not by kubo: The node's RPC cannot be reached" in added.stderr
    wrong = hfms("ipfs", "add", "-r", "given", "--backend", "kubbo", env=env)
    assert (wrong.returncode, "did you mean `kubo`?" in wrong.stderr) == (2, True)


def test_a_model_is_pulled_by_its_cid(ipfs, hfms, tmp_path):
    from tests.cli.test_models_on_disk import FILES

    (tmp_path / "model").mkdir()
    for name, data in FILES.items():
        (tmp_path / "model" / name).write_bytes(data)
    made = ipfs("add", "-r", "model").stdout.strip()
    env = HERE | {"HFMS_LOG_LEVEL": "error"}
    pulled = hfms("models", "pull", f"ipfs://{made}", "--json", env=env)
    assert pulled.returncode == 0, pulled.stderr
    told = json.loads(pulled.stdout)
    assert (told["storage"], told["revision"]) == ("ipfs", made)
    assert {p.name for p in Path(told["folder"]).iterdir()} == set(FILES)
    shown = json.loads(hfms("models", "show", f"ipfs://{made}", "--json", env=env).stdout)
    assert shown["card"]["parameters"] == 40
    assert hfms("models", "rm", f"ipfs://{made}", env=env).returncode == 0


ODD = ["--help", "-o", "../../etc/passwd", "/etc/passwd", "ipfs://", "", "b" * 4096, "\x1b[2J", "Qm/../.."]


@pytest.mark.parametrize(("name", "verb"), [*zip(ODD, itertools.cycle(["cat", "get", "pin", "export", "ls"]))])
def test_an_odd_name_is_refused_plainly_and_nothing_is_written(hfms, name, verb, tmp_path):
    before = set(os.listdir(tmp_path))
    done = hfms("ipfs", verb, "--", name, env=HERE)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stdout == ""
    assert set(os.listdir(tmp_path)) == before


def test_nothing_is_written_over(ipfs, hfms, given, cid, tmp_path):
    ipfs("add", "-r", "given")
    (tmp_path / "mine").write_text("mine")
    for verb in ("get", "export"):
        done = hfms("ipfs", verb, cid, "-o", "mine", env=HERE)
        assert (done.returncode, "is there already" in done.stderr) == (1, True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith((".mine", "mine"))} == {"mine"}


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["add", "nothing"], "There is no `nothing`"),
        (["add", "given"], "is a folder"),
        (["add", "given/a.txt", "--chunker", "rabin"], "The chunker is"),
        (["import", "nothing.car"], "There is no file"),
        (["import", "given/a.txt"], "The CAR is cut off"),
    ],
)
def test_a_mistake_is_told_in_a_line(hfms, given, args, why):
    done = hfms("ipfs", *args, env=HERE)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_no_storage_with_cids_is_said(hfms, given):
    done = hfms("ipfs", "add", "-r", "given", env=HERE | {"HFMS_STORAGE_ORDER": "local"})
    assert "No storage that keeps what has a CID is in use" in done.stderr


@pytest.mark.parametrize("by", ["rpc", "program"])
def test_a_real_node_keeps_and_gives(node, ipfs, given, cid, tmp_path, by):
    program = Path(__file__).parents[1] / "storage" / "ipfs_program.py"
    env = {"HFMS_STORAGE_ORDER": "kubo", "HFMS_CONFIG": "", "IPFS_API": node.api, "IPFS_TEST_API": node.api}
    if by == "program":
        env |= {"IPFS_API": "http://127.0.0.1:9", "KUBO_CMD": f"{sys.executable} {program}"}
    assert json.loads(ipfs("add", "-r", "given", "--json", env=env).stdout)["backend"] == "kubo"
    ipfs("get", cid, "-o", "out", env=env)
    assert (tmp_path / "out" / "sub" / "b.bin").read_bytes() == DATA
    ipfs("unpin", cid, env=env)
