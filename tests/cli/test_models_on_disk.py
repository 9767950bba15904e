"""`hfms models list|pull|show|rm`: a package with a tiny model in it, fetched by pip from an index on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pty
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}


def safetensors() -> bytes:
    """One tensor of 40 numbers, as the format has it."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(160)


FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors()}
SIZE = sum(map(len, FILES.values()))


def wheel(folder: Path, name: str, version: str) -> Path:
    """A package that holds the model, as a wheel."""
    package, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    content = {f"{package}/model/{file}": data for file, data in FILES.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for file, data in content.items()
    ]
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in content.items():
            archive.writestr(file, data)
    return path


@pytest.fixture
def index(server, tmp_path) -> dict[str, str]:
    """A package index with `tiny-model` 1.0 and 1.1; the environment that names it."""
    links = ""
    for version in ("1.0", "1.1"):
        made = wheel(tmp_path, "tiny-model", version)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        links += f'<a href="/files/{made.name}#sha256={digest}">{made.name}</a>\n'
        server.files[f"/files/{made.name}"] = made.read_bytes(), "application/octet-stream"
    server.files["/simple/tiny-model/"] = f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html"
    return {"PIP_INDEX_URL": f"{server.url}/simple", "PIP_CONFIG_FILE": os.devnull, "HFMS_LOG_LEVEL": "error"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder of the operator's own."""
    made = tmp_path / "mine"
    made.mkdir()
    for name, data in FILES.items():
        (made / name).write_bytes(data)
    return made


def test_pulled_model_is_listed_shown_and_deleted(hfms, index):
    assert json.loads(hfms("models", "list", "--json", env=index).stdout) == []
    pulled = json.loads(hfms("models", "pull", "package:tiny-model@1.0", "--json", env=index).stdout)
    assert {p.name for p in Path(pulled["folder"]).iterdir()} == set(FILES)

    (row,) = json.loads(hfms("models", "list", "--json", env=index).stdout)
    assert (row["storage"], row["revision"], row["size_bytes"]) == ("package", "1.0", SIZE)
    assert row["model"].startswith("package:tiny-model")
    assert row["tasks"] == ["generate"]

    shown = json.loads(hfms("models", "show", "package:tiny-model", "--json", env=index).stdout)
    assert shown["card"]["architecture"] == "LlamaForCausalLM"
    assert shown["card"]["parameters"] == 40
    assert {f["path"]: f["sha256"] for f in shown["files"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }

    deleted = hfms("models", "rm", "package:tiny-model", env=index)
    assert (deleted.returncode, deleted.stdout.split(" (")[0]) == (0, "deleted package:tiny-model")
    assert not Path(pulled["folder"]).exists()
    assert json.loads(hfms("models", "list", "--json", env=index).stdout) == []


def test_pull_tells_where_the_model_is_and_how_far_it_is_on_stderr(hfms, index):
    done = hfms("models", "pull", "package:tiny-model", env=index)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("package:tiny-model (")
    assert "package) is in /" in done.stdout
    assert done.stderr.splitlines()[0].startswith("package:tiny-model: ")
    assert all(" of " in line for line in done.stderr.splitlines())


def test_pull_shows_a_bar_on_a_terminal(environment, index, tmp_path):
    here, there = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "hfms_cli", "models", "pull", "package:tiny-model"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=there,
        env=environment | index | {"TERM": "xterm", "COLUMNS": "120"},
        cwd=tmp_path,
        timeout=60,
    )
    os.close(there)
    seen = os.read(here, 65536).decode(errors="replace")  # a terminal hands out 4 KiB at most
    os.close(here)
    assert done.returncode == 0, seen
    assert "package:tiny-model" in seen
    assert "━━━" in seen
    assert done.stdout.startswith(b"package:tiny-model (")


def test_table_of_models_has_a_row_each(hfms, index):
    for version in ("1.0", "1.1"):
        assert hfms("models", "pull", f"package:tiny-model@{version}", env=index).returncode == 0
    head, *rows = hfms("models", "list", env=index).stdout.splitlines()
    assert head.split() == ["MODEL", "STORAGE", "REVISION", "SIZE", "TASKS"]
    assert {row.split()[2] for row in rows} == {"1.0", "1.1"}


def test_show_of_what_is_not_here_fetches_nothing_and_says_how_to(hfms, index, server):
    done = hfms("models", "show", "package:tiny-model", env=index)
    assert done.returncode == 0, done.stderr
    assert "no; `hfms models pull package:tiny-model` fetches it" in done.stdout
    assert json.loads(hfms("models", "list", "--json", env=index).stdout) == []


def test_folder_of_the_operators_own_is_shown_and_never_deleted(hfms, folder):
    shown = hfms("models", "show", "./mine")
    assert shown.returncode == 0, shown.stderr
    assert "architecture    LlamaForCausalLM\n" in shown.stdout
    assert "context length  64\n" in shown.stdout
    assert hfms("models", "rm", "./mine").returncode == 1
    assert {p.name for p in folder.iterdir()} == set(FILES)


def test_model_that_nobody_has_is_an_error_with_who_was_asked(hfms, index):
    done = hfms("models", "pull", "package:tiny-modle", env=index)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: The model `package:tiny-modle` does not exist")


@pytest.mark.parametrize("verb", ["pull", "show", "rm"])
@pytest.mark.parametrize("name", ["", "a/b/c", "x y", "..\x1b[2J", "org/name@--upload-pack=x"])
def test_name_that_is_none_is_refused_plainly(hfms, verb, name):
    done = hfms("models", verb, "--", name)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr


def test_storages_are_asked_in_the_order_of_the_configuration(hfms, folder):
    done = hfms("models", "show", "./mine", env={"HFMS_STORAGE_ORDER": "package"})
    assert done.returncode == 1
    assert "No storage that is in use takes" in done.stderr
