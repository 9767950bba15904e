"""How the router asks storages, falls back, and says what happened. The storages are small, whole and real."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hfms_cli import (
    BadRequest,
    FetchFailed,
    GatedModel,
    LoadFailed,
    Manifest,
    ModelFile,
    ModelName,
    ModelNotFound,
    VerifyFailed,
)
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from hfms_cli.receipts import Receipts

NAME = ModelName("", "org/name")


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass
class Shelf:
    """A storage of files that are given to it, written to a folder when they are fetched."""

    name: str
    folder: Path
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    """Operation -> what it raises."""
    corrupt: bool = False
    lists_late: bool = False
    """The files are known only once they are there."""
    asked: list[str] = field(default_factory=list)

    def claims(self, name):
        return name.scheme == ""

    def manifest(self, name):
        files = self.models[name.rest]
        known = not self.lists_late or (self.folder / name.rest).exists()
        listed = [ModelFile(path, len(raw), hashlib.sha256(raw).hexdigest()) for path, raw in files.items()]
        return Manifest(name=name, storage=self.name, revision="c0ffee", files=tuple(listed) if known else ())

    async def do(self, operation):
        self.asked.append(operation)
        if operation in self.fails:
            raise self.fails[operation]

    async def find(self, name):
        await self.do("find")
        return self.manifest(name) if name.rest in self.models else None

    async def fetch(self, manifest, progress):
        await self.do("fetch")
        folder = self.folder / manifest.name.rest
        folder.mkdir(parents=True, exist_ok=True)
        for path, raw in self.models[manifest.name.rest].items():
            (folder / path).write_bytes(raw[::-1] if self.corrupt else raw)
        return folder

    async def list(self):
        await self.do("list")
        return [self.manifest(ModelName("", name)) for name in self.models if (self.folder / name).exists()]

    async def remove(self, manifest):
        await self.do("remove")
        folder = self.folder / manifest.name.rest
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.fixture
def shelves(tmp_path):
    files = {"org/name": {"config.json": b"{}", "model.safetensors": b"weights"}}
    return Shelf("first", tmp_path / "first"), Shelf("second", tmp_path / "second", files)


async def test_the_first_storage_that_has_the_model_answers(shelves):
    manifest, storage = await Router(shelves).find(NAME)
    assert (manifest.storage, storage) == ("second", shelves[1])
    assert shelves[0].asked == ["find"]


async def test_later_storages_are_not_asked(shelves):
    await Router(shelves[::-1]).find(NAME)
    assert shelves[0].asked == []


async def test_a_pull_answers_a_folder_with_every_file(shelves):
    manifest, folder = await Router(shelves).pull(NAME, ignore)
    assert {f.path: (folder / f.path).read_bytes() for f in manifest.files} == shelves[1].models["org/name"]


async def test_a_storage_that_fails_at_finding_is_passed_over(shelves):
    shelves[0].fails["find"] = FetchFailed("The hub is down.")
    manifest, _ = await Router(shelves).find(NAME)
    assert manifest.storage == "second"


@pytest.mark.parametrize("breaks", ["fetch", "corrupt"])
async def test_a_storage_that_fails_at_fetching_is_passed_over(shelves, breaks):
    first, second = shelves
    first.models = second.models
    first.corrupt = breaks == "corrupt"
    first.fails = {"fetch": FetchFailed("The hub is down.")} if breaks == "fetch" else {}
    manifest, folder = await Router(shelves).pull(NAME, ignore)
    assert manifest.storage == "second"
    assert (folder / "model.safetensors").read_bytes() == b"weights"


async def test_wrong_bytes_are_never_handed_on(shelves):
    shelves[1].corrupt = True
    with pytest.raises(VerifyFailed, match="SHA-256"):
        await Router(shelves).pull(NAME, ignore)


async def test_files_that_are_known_only_once_fetched_are_verified_as_well(shelves):
    shelves[1].lists_late = True
    manifest, _ = await Router(shelves).pull(NAME, ignore)
    assert len(manifest.files) == 2
    shelves[1].corrupt = True
    with pytest.raises(VerifyFailed):
        await Router(shelves).pull(NAME, ignore)


async def test_what_was_verified_before_has_a_receipt(shelves, tmp_path):
    await Router(shelves, receipts=Receipts(tmp_path / "verified.json")).pull(NAME, ignore)
    assert hashlib.sha256(b"weights").hexdigest() in (tmp_path / "verified.json").read_text()


# What is said when there is no model.


async def test_a_missing_model_is_a_404_that_says_who_was_asked_and_what_is_near(shelves):
    await Router(shelves).pull(NAME, ignore)
    with pytest.raises(ModelNotFound) as caught:
        await Router(shelves).find(ModelName("", "org/nam"))
    assert caught.value.param == "model"
    for said in ("`org/nam`", "Did you mean `org/name`?", "first: has no such model", "second: has no such model"):
        assert said in caught.value.message


async def test_a_storages_own_reason_is_passed_on(shelves):
    shelves[0].fails["find"] = ModelNotFound("It has no revision `v9`.")
    with pytest.raises(ModelNotFound, match=r"first: It has no revision `v9`; second: has no such model\."):
        await Router(shelves).find(ModelName("", "org/other"))


async def test_names_that_no_storage_takes_are_told_by_their_scheme(shelves):
    with pytest.raises(ModelNotFound, match="`ipfs:`"):
        await Router(shelves).find(parse("ipfs://bafy"))
    assert shelves[0].asked == shelves[1].asked == []


@pytest.mark.parametrize(
    ("first", "second", "heard"),
    [
        (ModelNotFound("No."), FetchFailed("The hub is down."), FetchFailed),
        (FetchFailed("The hub is down."), ModelNotFound("No."), FetchFailed),
        (FetchFailed("The hub is down."), GatedModel("Accept the licence."), GatedModel),
        (FetchFailed("The hub is down."), BadRequest("Name one file.", param="model"), BadRequest),
    ],
)
async def test_the_most_telling_failure_is_raised_and_the_others_are_named(shelves, first, second, heard):
    shelves[0].fails["find"], shelves[1].fails["find"] = first, second
    with pytest.raises(heard) as caught:
        await Router(shelves).find(NAME)
    assert type(caught.value) is heard
    assert first.message.rstrip(".") in caught.value.message
    assert second.message.rstrip(".") in caught.value.message


async def test_the_failure_of_the_only_storage_is_raised_as_it_is(shelves):
    error = shelves[1].fails["find"] = GatedModel("Accept the licence.")
    with pytest.raises(GatedModel) as caught:
        await Router(shelves[1:]).find(NAME)
    assert caught.value is error


async def test_a_bug_in_a_storage_is_passed_over_and_its_text_stays_in_the_log(shelves):
    shelves[0].fails["find"] = KeyError("token hf_secret")
    assert (await Router(shelves).find(NAME))[1] is shelves[1]
    with pytest.raises(FetchFailed) as caught:
        await Router(shelves[:1]).find(NAME)
    assert "hf_secret" not in caught.value.message


# Listing, removing, counting.


async def test_the_list_is_of_every_storage_and_one_that_fails_is_left_out(shelves):
    first = shelves[0]
    first.models = {"org/mine": {"x": b""}}
    router = Router(shelves)
    await router.pull(ModelName("", "org/mine"), ignore)
    await router.pull(NAME, ignore)
    assert [str(m.name) for m in await router.list()] == ["org/mine", "org/name"]
    first.fails["list"] = FetchFailed("The disk is gone.")
    assert [str(m.name) for m in await router.list()] == ["org/name"]


@pytest.mark.parametrize("revision", [None, "c0ffee"])
async def test_a_removed_model_is_gone(shelves, revision):
    router = Router(shelves)
    _, folder = await router.pull(NAME, ignore)
    removed = await router.remove(ModelName("", "org/name", revision))
    assert removed.storage == "second"
    assert not folder.exists()
    assert await router.list() == []


async def test_what_is_not_on_this_disk_cannot_be_removed(shelves):
    router = Router(shelves)
    await router.pull(NAME, ignore)
    for name in (ModelName("", "org/name", "other"), ModelName("", "org/nome")):
        with pytest.raises(ModelNotFound, match="fetched to this disk"):
            await router.remove(name)
    assert len(await router.list()) == 1


async def test_a_name_that_stands_for_two_models_removes_neither(shelves):
    shelves[0].models = shelves[1].models
    for shelf in shelves:
        await Router([shelf]).pull(NAME, ignore)
    with pytest.raises(BadRequest, match=r"org/name@c0ffee` \(first\), .*\(second\)"):
        await Router(shelves).remove(NAME)
    assert len(await Router(shelves).list()) == 2


async def test_every_operation_is_counted_with_its_outcome(shelves):
    seen = []

    def observe(storage, operation, status, seconds):
        assert seconds >= 0
        seen.append((storage, operation, status))

    router = Router(shelves, observe=observe)
    await router.pull(NAME, ignore)
    await router.remove(NAME)
    shelves[1].fails["find"] = LoadFailed("Broken.")
    with pytest.raises(LoadFailed):
        await router.find(NAME)
    assert seen == [
        ("first", "find", "missing"),
        ("second", "find", "ok"),
        ("second", "fetch", "ok"),
        ("second", "verify", "ok"),
        ("first", "list", "ok"),
        ("second", "list", "ok"),
        ("second", "remove", "ok"),
        ("first", "find", "missing"),
        ("second", "find", "error"),
    ]


async def test_what_is_on_disk_is_read_anew_only_after_a_while():
    now = [0.0]
    looks = []

    class Disk:
        name = "disk"
        root = None

        def claims(self, name):
            return True

        async def list(self):
            looks.append(now[0])
            return [Manifest(name=parse("org/here"), storage="disk", revision="c", files=())] if now[0] > 3 else []

    router = Router([Disk()], clock=lambda: now[0])
    assert not await router.on_disk(parse("org/here"))
    now[0] = 4.0
    assert not await router.on_disk(parse("org/here"))
    now[0] = 5.5
    assert await router.on_disk(parse("org/here"))
    assert not await router.on_disk(parse("org/other"))
    assert looks == [0.0, 5.5]
