"""`hfms models tune`: real worker processes of the echo engine, and what is printed and remembered of them."""

from __future__ import annotations

import json

from tests.cli.conftest import ECHO

QUICK = ("--concurrency", "2", "--output-len", "4", "--repeats", "1")


def tuned(hfms, tmp_path, *args: str, toml: str = ""):
    (tmp_path / "hfms.toml").write_text(ECHO + toml)
    return hfms("models", "tune", "echo:tiny", *QUICK, *args)


def test_tune_prints_a_table_and_what_is_best_and_keeps_it(hfms, tmp_path):
    done = tuned(hfms, tmp_path)
    assert done.returncode == 0, done.stderr
    about, head, *rows = done.stdout.splitlines()
    assert about.startswith("echo:tiny: memory is read at ")
    assert head.split()[:4] == ["ENGINE", "DTYPE", "WEIGHTS", "LIMITS"]
    assert rows[0].split()[:2] == ["echo", "none"]
    assert any(row.startswith("best for latency: echo ") for row in rows)
    assert any(row.startswith("best for throughput: echo ") for row in rows)
    assert "loading echo " in done.stderr
    [record] = tmp_path.rglob("tuned/*.json")
    assert set(json.loads(record.read_text())["best"]) == {"latency", "throughput"}


def test_json_has_every_trial_the_roofline_and_the_best(hfms, tmp_path):
    done = tuned(hfms, tmp_path, "--json", toml="[engine.echo]\nmax_batch = 7\n")
    result = json.loads(done.stdout)
    assert result["model"] == "echo:tiny"
    assert result["roofline"]["bytes_per_second"] > 0
    # What the operator has set is not varied.
    assert all(trial["options"] == {} for trial in result["trials"])
    assert result["best"]["latency"]["engine"] == "echo"


def test_what_is_not_here_is_refused_by_name(hfms, tmp_path):
    done = tuned(hfms, tmp_path, "--engine", "nope")
    assert done.returncode == 1
    assert "no engine `nope` here" in done.stderr
    done = tuned(hfms, tmp_path, "--quantize", "int4")
    assert done.returncode == 1
    assert "it cannot make int4 weights" in done.stderr


def test_storages_that_keep_what_has_a_cid_are_in_nobodys_way(hfms, tmp_path):
    (tmp_path / "hfms.toml").write_text(ECHO)
    usual = {"HFMS_STORAGE_ORDER": "ipfs_kit,hf_cache,kubo,echo"}
    done = hfms("models", "tune", "echo:tiny", *QUICK, env=usual)
    assert done.returncode == 0, done.stderr
    nowhere = hfms("models", "tune", "./nowhere", *QUICK, env=usual)
    assert (nowhere.returncode, "Traceback" in nowhere.stderr) == (1, False)
