"""A Hub, or what stands between, that lies or breaks: each case ends in a clear error, and the cache is unharmed.

`docs/hostile.md` is the table of these tests.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hfms_cli import BadRequest, FetchFailed, GatedModel, HfmsError, ModelName, ModelNotFound, VerifyFailed
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from hfms_storage import hub_download, partial
from hfms_storage.hf_cache import HfCache
from tests.storage.hub import Hub, Repo

TINY = ModelName("", "org/tiny")
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Pieces so small that tiny files have several, and no pauses."""
    monkeypatch.setattr(partial, "PIECE", 100)
    monkeypatch.setattr(hub_download, "PAUSES", (0.0, 0.0, 0.0))


async def pull(storage: HfCache, name: ModelName = TINY) -> Path:
    return (await Router([storage]).pull(name, lambda done, total: None))[1]


async def refused(hub: Hub, storage: HfCache, error: type[HfmsError], match: str) -> None:
    """The pull fails so, nothing in the cache looks like a model, and afterwards a better Hub is believed."""
    with pytest.raises(error, match=match) as caught:
        await pull(storage)
    assert hub.url not in caught.value.message
    assert await storage.list() == []
    unharmed(storage)
    for field in ("down", "wrong", "cuts", "faults", "ranges", "more", "less", "sizes", "addresses", "rangeless"):
        setattr(hub, field, type(getattr(hub, field))())
    folder = await pull(storage)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == hub.repos["org/tiny"].files


def unharmed(storage: HfCache) -> None:
    """Every blob holds the bytes that its name says, and nothing lies outside the cache's own folders."""
    blobs = [p for p in storage.root.rglob("blobs/*") if p.is_file() and p.suffix != partial.SUFFIX]
    for blob in blobs:
        raw = blob.read_bytes()
        assert blob.name in (
            hashlib.sha256(raw).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest(),
        )
    folders = {p.name for p in storage.root.iterdir()} if storage.root.exists() else set()
    assert folders <= {".locks", "models--org--tiny", "CACHEDIR.TAG"}


# What comes through, however it is sent.


async def test_pieces_over_several_connections_make_the_file(hub, hf_cache, model):
    folder = await pull(hf_cache)
    assert (folder / WEIGHTS).read_bytes() == model[WEIGHTS]
    parts = sorted((first, n) for path, first, n in hub.sent if path == WEIGHTS)
    assert parts == [(0, 100), (100, 100), (200, 100), (300, 28)]


async def test_a_source_that_knows_no_ranges_sends_the_file_once(hub, hf_cache, model):
    hub.rangeless = True
    assert ((await pull(hf_cache)) / WEIGHTS).read_bytes() == model[WEIGHTS]
    assert [s for s in hub.sent if s[0] == WEIGHTS] == [(WEIGHTS, 0, len(model[WEIGHTS]))]


async def test_a_source_that_knows_no_ranges_and_breaks_off_completes(hub, hf_cache, model):
    hub.rangeless, hub.cuts = True, {WEIGHTS: [150, 210]}
    assert ((await pull(hf_cache)) / WEIGHTS).read_bytes() == model[WEIGHTS]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_hub_that_is_busy_is_asked_again(hub, hf_cache, status):
    hub.faults, hub.retry_after = {WEIGHTS: [status, status]}, "0"
    await pull(hf_cache)
    assert hub.faults == {WEIGHTS: []}


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_an_address_that_has_grown_old_is_asked_for_anew(hub, hf_cache, status):
    hub.faults = {WEIGHTS: [status]}
    await pull(hf_cache)
    assert hub.faults == {WEIGHTS: []}


async def test_a_connection_that_is_cut_in_every_piece_completes(hub, hf_cache, model):
    hub.cuts = {WEIGHTS: [1, 99, 50, 0, 27]}
    assert ((await pull(hf_cache)) / WEIGHTS).read_bytes() == model[WEIGHTS]


async def test_bytes_behind_those_that_were_asked_for_are_passed_over(hub, hf_cache, model):
    hub.more = {WEIGHTS: b"more", "config.json": b"more"}
    folder = await pull(hf_cache)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == model


# What is refused.


@pytest.mark.parametrize("path", [WEIGHTS, "config.json", "tokenizer.json"])
async def test_wrong_bytes_are_refused(hub, hf_cache, path):
    hub.wrong = {path}
    await refused(hub, hf_cache, VerifyFailed, f"`{path}` is not that file")


@pytest.mark.parametrize(
    "said", ["bytes 0-99/9999", "bytes 7-106/328", "bytes 0-327/328", "bytes 5-2/328", "bytes */328", "lines 0-99", ""]
)
async def test_a_content_range_that_lies_is_refused(hub, hf_cache, said):
    hub.ranges = {WEIGHTS: said}
    await refused(hub, hf_cache, VerifyFailed, f"another part of `{WEIGHTS}`")


@pytest.mark.parametrize("size", [1, 99, 100, 327, 329, 10**15])
async def test_a_length_that_is_not_the_files_is_refused(hub, hf_cache, size):
    hub.sizes = {WEIGHTS: size}
    error = FetchFailed if size == 10**15 else VerifyFailed
    await refused(hub, hf_cache, error, "There is no room" if size == 10**15 else f"`{WEIGHTS}`")


async def test_a_length_that_is_none_is_refused(hub, hf_cache):
    hub.sizes = {WEIGHTS: -5}
    await refused(hub, hf_cache, FetchFailed, f"lists .* `{WEIGHTS}`")


async def test_an_answer_that_ends_early_as_if_all_were_well_is_refused(hub, hf_cache):
    hub.less = {WEIGHTS: 100}
    await refused(hub, hf_cache, FetchFailed, f"`{WEIGHTS}` in part")


async def test_a_connection_that_is_always_cut_is_given_up(hub, hf_cache):
    hub.cuts = {WEIGHTS: [0] * 100}
    await refused(hub, hf_cache, FetchFailed, "stopped in the middle of `org/tiny`")


@pytest.mark.parametrize("status", [400, 403, 404, 418, 429, 500, 503])
async def test_a_status_that_stays_is_told(hub, hf_cache, status):
    hub.faults = {WEIGHTS: [status] * 100}
    await refused(hub, hf_cache, FetchFailed, f"answered {status}")


async def test_a_hub_that_wants_to_be_left_alone_for_an_hour_is_given_up_at_once(hub, hf_cache):
    hub.faults, hub.retry_after = {WEIGHTS: [429] * 100}, "3600"
    await refused(hub, hf_cache, FetchFailed, "answered 429")
    assert hub.sent


async def test_a_redirect_that_leads_nowhere_is_told(hub, hf_cache):
    hub.addresses = {WEIGHTS: "http://127.0.0.1:1/nothing"}
    await refused(hub, hf_cache, FetchFailed, "could not be reached")


async def test_a_redirect_in_a_circle_is_told(hub, hf_cache):
    hub.addresses = {WEIGHTS: f"{hub.url}/org/tiny/resolve/main/{WEIGHTS}"}
    await refused(hub, hf_cache, FetchFailed, r"could not be reached|answered")


async def test_a_redirect_to_a_file_of_this_machine_reads_none(hub, hf_cache):
    hub.addresses = {WEIGHTS: "file:///etc/passwd"}
    await refused(hub, hf_cache, FetchFailed, "could not be reached")


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_hub_that_is_down_is_told(hub, hf_cache, status):
    hub.down = status
    await refused(hub, hf_cache, FetchFailed, f"answered {status}")


async def test_a_token_goes_to_the_hub_and_not_where_it_redirects_to(hub, hf_cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await pull(hf_cache)
    assert hub.tokens == {"hf_secret", ""}
    assert {token for host, token in hub.shown if host.startswith("localhost")} == {""}


@pytest.mark.parametrize("token", ["", "hf_stranger"])
async def test_a_gated_repository_is_told(hub, hf_cache, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.repos["org/tiny"].gated = True
    with pytest.raises(GatedModel, match="accept its terms"):
        await pull(hf_cache)
    assert not hf_cache.root.exists()


async def test_a_repository_that_does_not_exist_is_told(hub, hf_cache):
    with pytest.raises(ModelNotFound, match="`org/none` does not exist"):
        await pull(hf_cache, ModelName("", "org/none"))
    assert not hf_cache.root.exists()


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "a\0b.gguf", "x\\..\\y.gguf", "c:evil.gguf", "--help/../x.gguf"]
)
async def test_a_file_name_that_is_none_is_refused(hub, hf_cache, path):
    hub.repos["org/tiny"] = Repo({path if path.endswith(".gguf") else f"{path}.gguf": b"GGUF"})
    with pytest.raises(HfmsError, match=r"unsafe file name|holds no model"):
        await pull(hf_cache)
    assert not hf_cache.root.exists()


@pytest.mark.parametrize("path", ["--help.gguf", "-o.gguf", "-.gguf", "$(reboot).gguf", "a b.gguf", "%2e%2e.gguf"])
async def test_a_file_name_that_only_looks_bad_is_just_a_name(hub, hf_cache, path):
    hub.repos["org/tiny"] = Repo({path: b"GGUF"})
    assert ((await pull(hf_cache)) / path).read_bytes() == b"GGUF"


async def test_a_file_name_that_is_too_long_for_the_disk_is_told(hub, hf_cache):
    hub.repos["org/tiny"] = Repo({"x" * 4000 + ".gguf": b"GGUF"})
    with pytest.raises(FetchFailed, match="unsafe file name"):
        await pull(hf_cache)
    assert await hf_cache.list() == []


@pytest.mark.parametrize(
    "name",
    ["org/../../etc/passwd", "org/--help", "-o", "--help", "org/na\0me", "a" * 4096, "org/" + "b" * 4096, "org/x@-o"],
)
async def test_a_model_name_that_is_none_is_refused(name):
    with pytest.raises(BadRequest):
        parse(name)
