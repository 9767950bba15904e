"""Folders of models and of cards."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.errors import Forbidden
from hfms_cli.models.catalogue import Catalogue, scan
from hfms_cli.types import Caller
from hfms_engines.echo import EchoEngine
from tests.models.test_inspect import write_gguf

ECHO = {"architectures": ["EchoModel"], "model_type": "echo"}


def make_model(folder: Path, config=ECHO) -> Path:
    """A folder that the echo engine serves, with a weights file without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header = b"{}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


@pytest.fixture
def house(tmp_path) -> Path:
    house = tmp_path / "house"
    make_model(house / "small")
    make_model(house / "org" / "large")
    return house


def looked(*folders: Path) -> Catalogue:
    catalogue = Catalogue([str(folder) for folder in folders])
    catalogue.look()
    return catalogue


def test_models_are_listed_by_their_place_in_the_folder_with_what_their_files_say(house):
    catalogue = looked(house)
    assert {e.id: (e.architecture, e.tasks) for e in catalogue.entries} == {
        "small": ("EchoModel", EchoEngine.tasks),
        "org/large": ("EchoModel", EchoEngine.tasks),
    }
    assert str(catalogue.find("org/large").name) == str(house / "org" / "large")
    assert catalogue.faults == []


def test_what_a_model_has_in_folders_of_its_own_is_no_model(house):
    make_model(house / "small" / "2_Dense")
    assert {e.id for e in looked(house).entries} == {"small", "org/large"}


def test_gguf_files_are_models_and_a_folder_made_for_one_has_its_name(tmp_path):
    (tmp_path / "house" / "alone").mkdir(parents=True)
    (tmp_path / "house" / "several").mkdir()
    for name in ("loose", "alone/whatever.Q4_1", "several/x.Q4_1", "several/x.Q8_0"):
        write_gguf(tmp_path / "house" / f"{name}.gguf")
    assert {e.id: e.tasks for e in looked(tmp_path / "house").entries} == dict.fromkeys(
        ("loose", "alone", "several/x.Q4_1", "several/x.Q8_0"), ("generate",)
    )


def test_a_card_gives_a_model_a_name_aliases_and_a_way_to_be_loaded(house):
    (house / "chat.toml").write_text(
        'name = "house/chat"\nsource = "./small"\nsummary = "For talks."\naliases = ["chat"]\nhardware = ["cuda"]\n'
        'tasks = ["generate"]\n[load]\nquantize = "int4"\nreplicas = 2\npinned = true\nidle_seconds = 60\n'
    )
    entry = looked(house).find("chat")
    assert (entry.id, str(entry.name), entry.summary) == ("house/chat", str(house / "small"), "For talks.")
    assert (entry.tasks, entry.architecture, entry.hardware) == (("generate",), "EchoModel", ("cuda",))
    assert [w.quantize for w in entry.wishes(1)] == ["int4", "int4"]
    assert (entry.loading.pinned, entry.loading.idle_seconds) == (True, 60.0)


def test_two_cards_may_have_one_source_each_with_a_way_of_its_own_to_load_it(house):
    for quantize in ("int8", "int4"):
        (house / f"{quantize}.toml").write_text(f'source = "org/name@v1"\n[load]\nquantize = "{quantize}"\n')
    catalogue = looked(house)
    assert {n: catalogue.find(n).wishes(1)[0].quantize for n in ("int8", "int4")} == {"int8": "int8", "int4": "int4"}
    assert catalogue.find("int4").name.revision == "v1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('sorce = "org/name"', "unknown key `sorce`; did you mean `source`?"),
        ('source = "org/name"\n[load]\ndevice = "cpu"', "[load]: unknown key `device`"),
        ('source = "org/name"\n[load]\nquantize = "int3"', "`quantize` is 'int3', which is not one of"),
        ('source = "org/name"\n[load]\nreplicas = 0', "`replicas` is 0"),
        ('source = "org/name"\nload = 1', "`load` must be a table"),
        ('source = "org/name"\ntasks = ["generat"]', "did you mean 'generate'?"),
        ('source = "org/name"\ntasks = "generate"', "which is not a list of strings"),
        ('source = "org/name"\nname = "--help"', "`name`: The model name `--help` begins with `-`"),
        ('source = "org/name"\nname = "../../etc/passwd"', "reads as a path"),
        ('source = "org/name"\nname = "a\\u0000b"', "control characters"),
        ('source = "org/name"\naliases = ["-o"]', "`aliases`"),
        ('source = "org/name"\nname = "' + "n" * 4096 + '"', "longer than 512"),
        ('source = "../outside"', "leads out of the folder"),
        ('source = "./link"', "leads out of the folder"),
        ('source = "./nothing"', "is a path where nothing is"),
        ('source = "-o"', "`source`: The model name `-o` begins with `-`"),
        ("", "`source` is missing"),
        ("source = ", "is not valid TOML"),
        ('source = "org/name"\nname = "small"', "`small` is already a name of `small`"),
    ],
)
def test_a_bad_card_is_told_with_its_file_and_key_and_stops_no_other(house, text, told):
    (house.parent / "outside").mkdir()
    (house / "link").symlink_to(house.parent / "outside")
    (house / "bad.toml").write_text(text)
    (house / "good.toml").write_text('source = "org/name"')
    catalogue = looked(house)
    about = [fault for fault in catalogue.faults if told in fault]
    assert about, catalogue.faults
    assert about[0].startswith(("house/bad.toml: ", "house/small: "))
    assert str(house.parent) not in "".join(catalogue.faults)
    assert {"good", "org/large", "small"} <= {e.id for e in catalogue.entries}


def test_a_card_may_name_what_lies_elsewhere_by_its_absolute_path(house, tmp_path):
    make_model(tmp_path / "elsewhere")
    (house / "far.toml").write_text(f'source = "{tmp_path}/elsewhere"')
    assert str(looked(house).find("far").name) == str(tmp_path / "elsewhere")


def test_a_torn_model_is_told_and_stops_no_other(house):
    (house / "small" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    (house / "small" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    catalogue = looked(house)
    assert [e.id for e in catalogue.entries] == ["org/large"]
    assert catalogue.faults[0].startswith("house/small: ")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    assert looked(tmp_path / "gone").faults == ["gone: there is no such folder ([models] folders)"]


def test_of_two_folders_the_first_keeps_a_name_that_both_have(house, tmp_path):
    make_model(tmp_path / "other" / "small")
    catalogue = looked(house, tmp_path / "other")
    assert str(catalogue.find("small").name) == str(house / "small")
    assert catalogue.faults == ["other/small: `small` is already a name of `small`"]


async def test_folders_are_read_again_only_once_something_in_them_has_changed(house):
    now = [0.0]
    catalogue = Catalogue([str(house)], clock=lambda: now[0])
    await catalogue.refresh()
    before = catalogue.entries
    make_model(house / "new")
    await catalogue.refresh()
    assert catalogue.entries is before  # not due
    now[0] += 6
    await catalogue.refresh()
    assert catalogue.find("new") is not None
    before = catalogue.entries
    now[0] += 6
    await catalogue.refresh()
    assert catalogue.entries is before


@given(st.text(max_size=40))
def test_whatever_a_card_holds_it_is_an_entry_or_a_fault(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("cards")
    (folder / "card.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    for _, found in scan(folder):
        assert isinstance(found, str) or found.id


async def test_a_call_loads_what_lies_in_a_folder_by_name_or_by_a_cards_alias(serve, house):
    (house / "chat.toml").write_text('source = "./small"\naliases = ["talk"]\n[load]\nidle_seconds = 77\n')
    async with serve(toml=f'[models]\nfolders = ["{house}"]') as server:
        for name in ("org/large", "talk"):
            status, body = await server.post("/v1/completions", {"model": name, "prompt": "hi"})
            assert (status, body["choices"][0]["text"]) == (200, "hi")
        _, listed = await server.get("/models")
        rows = {row["id"]: row for row in listed["data"]}
        assert {i: r["status"]["value"] for i, r in rows.items()} == {
            "org/large": "loaded",
            "chat": "loaded",
            "small": "unloaded",
        }
        assert (rows["chat"]["aliases"], rows["chat"]["idle_seconds"]) == (["talk"], 77)
        _, listed = await server.get("/v1/models")
        assert {m["id"] for m in listed["data"]} == {"org/large", "chat", "talk", "small"}


async def test_a_key_may_use_what_a_card_names_only_where_it_is_allowed(serve, house):
    (house / "chat.toml").write_text('source = "./small"\naliases = ["talk"]')
    async with serve(toml=f'[models]\nfolders = ["{house}"]') as server:
        with pytest.raises(Forbidden):
            async with server.runtime.pool.lease("talk", Caller(allowed_models=("other",))):
                raise AssertionError("it was leased")
        async with server.runtime.pool.lease("talk", Caller(allowed_models=("chat",))) as model:
            assert model.id == "chat"


async def test_a_card_whose_model_is_not_on_this_disk_fetches_nothing_for_a_caller(serve, house):
    (house / "far.toml").write_text('source = "org/far"')
    async with serve(toml=f'[models]\nfolders = ["{house}"]') as server:
        status, body = await server.post("/v1/completions", {"model": "far", "prompt": "hi"})
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert "hfms models pull org/far" in body["error"]["message"]
        _, listed = await server.get("/v1/models")
        assert "far" not in {m["id"] for m in listed["data"]}


async def test_status_tells_what_is_wrong_in_the_folders(serve, house):
    (house / "bad.toml").write_text("sorce = 1")
    async with serve(toml=f'[models]\nfolders = ["{house}"]') as server:
        _, status = await server.get("/status")
        assert status["folders"]["models"] == 2
        assert "did you mean `source`" in status["folders"]["faults"][0]
