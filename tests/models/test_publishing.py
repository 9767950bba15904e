"""From one disk to another: published, offered, found, fetched; and every way in which an offer is refused."""

import hashlib
import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from hfms_cli.errors import BadRequest, FetchFailed, ModelNotFound, NotFound, VerifyFailed
from hfms_cli.ipfs import parse as parse_cid
from hfms_cli.models.content import Content
from hfms_cli.models.index import LIFE, Seen, read_index
from hfms_cli.models.ipfs import IpfsModels
from hfms_cli.models.names import parse
from hfms_cli.models.neighbours import Neighbours
from hfms_cli.models.publications import Publications, Shared
from hfms_cli.models.publish import MANIFEST, publish
from hfms_cli.models.router import Router
from hfms_cli.models.signing import Signer
from hfms_cli.models.trust import Trust, Trusted
from hfms_cli.types import Manifest, ModelFile
from tests.models.test_content import Shelf
from tests.models.test_ipfs_models import FILES, ignore

NAME = parse("org/model")


class Publisher:
    """A machine that publishes: its key, its shelf, its state folder; the time is what a test says."""

    def __init__(self, root, model):
        self.state, self.model = root / "state", model
        self.signer = Signer.make(self.state)
        self.shelf = Shelf("shelf")
        self.content = Content([self.shelf])
        self.now = datetime(2026, 11, 25, tzinfo=UTC)
        self.publications = Publications(self.state, clock=lambda: self.now)

    async def publish(self, name="org/model", revision="r1", sha256=None, **more):
        files = tuple(
            ModelFile(p.name, p.stat().st_size, sha256 and sha256.get(p.name)) for p in sorted(self.model.iterdir())
        )
        manifest = Manifest(name=parse("org/source"), storage="local", revision=revision, files=files)
        return await publish(
            manifest, self.model, self.content, self.publications, self.signer, name=parse(name),
            clock=lambda: self.now, **more,
        )  # fmt: skip

    async def indexes(self):
        raw = self.publications.raw()
        return [("here", NotFound("It shares nothing.") if raw is None else raw)]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes(FILES[name])
    return tmp_path / "model"


@pytest.fixture
def publisher(tmp_path, model):
    return Publisher(tmp_path / "publisher", model)


@pytest.fixture
def stranger(tmp_path, model):
    return Publisher(tmp_path / "stranger", model)


def neighbours(publisher, tmp_path, *, trusted="*", content=None, key=None, **more):
    """The storage of a machine that has `publisher` for a neighbour."""
    trust = Trust([Trusted(key or publisher.signer.public, (trusted,))] if trusted else [])
    root = tmp_path / "cache" / "neighbours"
    clock = more.pop("clock", lambda: publisher.now)
    return Neighbours(publisher, content or publisher.content, trust, root, clock=clock, **more)


async def test_a_published_model_comes_by_its_name_with_every_file_checked(publisher, tmp_path):
    done = await publisher.publish(license="apache-2.0")
    manifest, folder = await Router([neighbours(publisher, tmp_path)]).pull(NAME, ignore)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        n: FILES[n] for n in ("config.json", "model.safetensors")
    }
    assert (manifest.storage, manifest.revision, manifest.source) == ("neighbours", "r1", f"ipfs://{done.cid}")
    assert {f.sha256 for f in manifest.files} == {
        hashlib.sha256(FILES[n]).hexdigest() for n in ("config.json", "model.safetensors")
    }


async def test_what_is_published_is_a_folder_for_everybody_with_a_manifest_that_can_be_read(publisher, tmp_path):
    done = await publisher.publish(license="mit")
    _, folder = await Router([IpfsModels(publisher.content, tmp_path / "ipfs")]).pull(
        parse(f"ipfs://{done.cid}"), ignore
    )
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    said = json.loads((folder / "hfms.json").read_bytes())
    assert (said["name"], said["revision"], said["license"]) == ("org/model", "r1", "mit")
    assert [f["path"] for f in said["files"]] == ["config.json", "model.safetensors"]
    for file in said["files"]:
        assert await publisher.shelf.cat(file["cid"]) == FILES[file["path"]]
        assert file["sha256"] == hashlib.sha256(FILES[file["path"]]).hexdigest()
    assert said["publisher"] == publisher.signer.public
    assert said["tool"].startswith("hfms ")


async def test_the_same_model_published_twice_has_one_offer_and_a_higher_number(publisher):
    first, second = await publisher.publish(), await publisher.publish()
    assert second.index.sequence > first.index.sequence
    assert [o.cid for o in second.index.offers] == [second.cid] == [first.cid]


async def test_revisions_and_tags_are_told_apart(publisher, tmp_path):
    await publisher.publish(revision="r1")
    (publisher.model / "config.json").write_bytes(FILES["config.json"] + b" ")
    await publisher.publish(name="org/model@v2", revision="r2")
    storage = neighbours(publisher, tmp_path)
    for name, revision in {"org/model": "r1", "org/model@v2": "r2", "org/model@r2": "r2", "org/model@r1": "r1"}.items():
        assert (await storage.find(parse(name))).revision == revision
    assert await storage.find(parse("org/model@v3")) is None


@pytest.mark.parametrize("name", ["package:model", "/folder", "model", "ipfs:bafy"])
async def test_only_a_name_that_can_be_asked_for_is_published(publisher, name):
    with pytest.raises(BadRequest, match="--as org/name"):
        await publisher.publish(name=name)
    assert publisher.publications.index() is None


async def test_a_store_that_is_named_is_the_only_one_asked(publisher):
    with pytest.raises(BadRequest, match="there are: shelf"):
        await publisher.publish(store="kubo")
    publisher.shelf.error = FetchFailed("It is full.")
    publisher.content = Content([publisher.shelf, Shelf("other")])
    with pytest.raises(FetchFailed, match="It is full"):
        await publisher.publish(store="shelf")
    assert (await publisher.publish()).receipt.backend == "other"


async def test_a_file_that_is_not_what_was_verified_is_not_signed(publisher):
    with pytest.raises(VerifyFailed, match="not what it was"):
        await publisher.publish(sha256={"config.json": "0" * 64})


async def test_what_is_withdrawn_is_found_no_more_and_its_blocks_are_not_shared(publisher, tmp_path):
    done = await publisher.publish()
    shared = Shared(publisher.publications)
    assert [offer.cid for offer, store in shared.holding(parse_cid(done.cid))] == [done.cid]
    gone, stores = publisher.publications.withdraw(publisher.signer, NAME)
    assert ([o.cid for o in gone], stores) == ([done.cid], {done.cid: "shelf"})
    assert shared.holding(parse_cid(done.cid)) == []
    assert await neighbours(publisher, tmp_path).find(NAME) is None
    with pytest.raises(ModelNotFound):
        publisher.publications.withdraw(publisher.signer, NAME)


async def test_every_block_of_what_is_published_is_shared_and_no_other(publisher):
    other = await publisher.shelf.add_bytes(b"somebody's own file")
    await publisher.publish()
    shared = Shared(publisher.publications)
    held = {cid for cid in publisher.shelf.blocks if shared.holding(cid)}
    assert held == set(publisher.shelf.blocks) - {parse_cid(other)}


async def test_an_index_is_signed_anew_before_it_ends_where_the_key_is_here(publisher, tmp_path):
    await publisher.publish()
    first = publisher.publications.raw()
    publisher.now += LIFE / 2 - timedelta(seconds=1)
    assert publisher.publications.raw() == first
    publisher.now += timedelta(seconds=1)
    second = publisher.publications.raw()
    trust, seen = Trust([Trusted(publisher.signer.public, ("*",))]), Seen()
    one = read_index(first, trust, seen, publisher.now)
    two = read_index(second, trust, seen, publisher.now)
    assert two.sequence > one.sequence
    assert (two.offers, two.expires_at) == (one.offers, publisher.now + LIFE)
    (publisher.state / "publisher.key").unlink()
    publisher.now += LIFE / 2
    assert publisher.publications.raw() == second


# What is refused.


async def refused(storage, match):
    with pytest.raises(VerifyFailed, match=match):
        await storage.find(NAME)


async def test_an_offer_of_somebody_who_is_not_trusted_is_refused(publisher, tmp_path):
    await publisher.publish()
    await refused(neighbours(publisher, tmp_path, trusted=None), "whom nobody here trusts")


async def test_a_key_that_is_trusted_for_one_org_cannot_speak_for_another(publisher, tmp_path):
    await publisher.publish()
    await refused(neighbours(publisher, tmp_path, trusted="other/*"), "not to speak for `org/model`")


async def test_an_expired_offer_is_refused(publisher, tmp_path):
    await publisher.publish()
    raw = publisher.publications.raw()
    later = publisher.now + LIFE + timedelta(days=1)

    class Old:
        signer, content, now = publisher.signer, publisher.content, later

        async def indexes(self):
            return [("old", raw)]

    await refused(neighbours(Old(), tmp_path), "expired")


async def test_an_offer_that_was_rolled_back_is_refused(publisher, tmp_path):
    await publisher.publish()
    old = publisher.publications.raw()
    publisher.publications.withdraw(publisher.signer, NAME)
    storage = neighbours(publisher, tmp_path, seen=Seen(tmp_path / "seen"))
    assert await storage.find(NAME) is None

    class Rollback:
        signer, content, now = publisher.signer, publisher.content, publisher.now

        async def indexes(self):
            return [("replay", old)]

    await refused(neighbours(Rollback(), tmp_path, seen=Seen(tmp_path / "seen")), "rolled back")


@pytest.mark.parametrize("raw", [b"", b"{}", b"<html>", b'{"payloadType": "x", "payload": "", "signatures": []}'])
async def test_an_unsigned_index_is_refused(publisher, tmp_path, raw):
    publisher.publications.folder.mkdir(parents=True)

    class Unsigned:
        signer, content, now = publisher.signer, publisher.content, publisher.now

        async def indexes(self):
            return [("unsigned", raw)]

    await refused(neighbours(Unsigned(), tmp_path), "unsigned: It is")


class Forging:
    """A trusted publisher's index over a folder whose manifest is another one than it should be."""

    def __init__(self, publisher, envelope):
        self.signer, self.now = publisher.signer, publisher.now
        self.publisher, self.envelope = publisher, envelope
        self.content = Content([Shelf("forged")])

    async def indexes(self):
        from hfms_cli.models.index import Offer, sign_index

        tree = {"hfms.json.sig": self.envelope, "config.json": b"{}"}
        cid, _, _ = await self.content.add_tree(tree)
        offer = Offer(name="org/model", revision="r1", cid=cid, size=1)
        return [("forger", sign_index(self.signer, (offer,), 0, self.now))]


async def test_a_manifest_of_another_model_or_publisher_or_none_is_refused(publisher, stranger, tmp_path):
    good = (await publisher.publish()).manifest
    encode = msgspec.json.encode
    replace = msgspec.structs.replace
    for envelope, why in (
        (publisher.signer.envelope(MANIFEST, encode(replace(good, name="org/other"))), "is that of `org/other@r1`"),
        (publisher.signer.envelope(MANIFEST, encode(replace(good, revision="r2"))), "is that of `org/model@r2`"),
        (publisher.signer.envelope(MANIFEST, encode(replace(good, publisher=stranger.signer.public))), "somebody else"),
        (stranger.signer.envelope(MANIFEST, encode(good)), "whom nobody here trusts"),
        (publisher.signer.envelope(MANIFEST, encode(replace(good, files=()))), "names no files"),
        (publisher.signer.envelope(MANIFEST, encode(replace(good, files=good.files * 2))), "or one twice"),
        (publisher.signer.envelope(MANIFEST, b"{}"), "none that hfms can read"),
        (publisher.signer.envelope("application/vnd.hfms.index+json", encode(good)), "another kind"),
        (encode(good), "not signed"),
    ):
        await refused(neighbours(Forging(publisher, envelope), tmp_path), why)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a\\b", "a\0b", "c:x", ""])
async def test_a_manifest_with_a_path_that_leads_elsewhere_is_refused(publisher, tmp_path, path):
    good = (await publisher.publish()).manifest
    file = msgspec.structs.replace(good.files[0], path=path)
    envelope = publisher.signer.envelope(MANIFEST, msgspec.json.encode(msgspec.structs.replace(good, files=(file,))))
    before = sorted(tmp_path.rglob("*"))
    await refused(neighbours(Forging(publisher, envelope), tmp_path), "none that hfms can read")
    assert sorted(tmp_path.rglob("*")) == before


async def test_a_file_that_is_right_by_its_cid_and_wrong_by_its_sha256_is_not_kept(publisher, tmp_path):
    """As where a publisher signs for two different files: neither is taken."""
    good = (await publisher.publish()).manifest
    file = msgspec.structs.replace(good.files[0], sha256="0" * 64)
    forged = msgspec.structs.replace(good, files=(file, good.files[1]))
    forging = Forging(publisher, publisher.signer.envelope(MANIFEST, msgspec.json.encode(forged)))
    storage = neighbours(forging, tmp_path, content=Content([publisher.shelf, *forging.content.stores]))
    with pytest.raises(VerifyFailed, match="has not the SHA-256 that its manifest says"):
        await Router([storage]).pull(NAME, ignore)
    assert await storage.list() == []
    assert not list(storage.root.glob(".fetch-*"))


async def test_a_wrong_block_of_a_neighbour_is_not_taken_and_another_neighbours_is(publisher, tmp_path):
    await publisher.publish()
    good = Shelf("good")
    good.blocks = dict(publisher.shelf.blocks)
    for cid, block in publisher.shelf.blocks.items():
        if len(block) > 100_000:
            publisher.shelf.blocks[cid] = bytes(len(block))
    with pytest.raises(VerifyFailed, match="are not those of"):
        await Router([neighbours(publisher, tmp_path)]).pull(NAME, ignore)
    content = Content([publisher.shelf, good])
    _, folder = await Router([neighbours(publisher, tmp_path, content=content)]).pull(NAME, ignore)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


async def test_after_a_refusal_the_next_neighbour_is_asked_and_then_the_next_storage(publisher, stranger, tmp_path):
    await stranger.publish()
    await publisher.publish()

    class Both:
        signer, now = publisher.signer, publisher.now
        content = Content([stranger.shelf, publisher.shelf])

        async def indexes(self):
            return [*await stranger.indexes(), *await publisher.indexes()]

    found = await neighbours(Both(), tmp_path).find(NAME)
    assert found.revision == "r1"

    class Hub:
        name, root = "hub", None

        def claims(self, name):
            return True

        async def find(self, name):
            return Manifest(name=name, storage="hub", revision="from the hub", files=())

        async def list(self):
            return ()

    refusing = neighbours(stranger, tmp_path, key=publisher.signer.public)
    manifest, storage = await Router([refusing, Hub()]).find(NAME)
    assert (manifest.revision, storage.name) == ("from the hub", "hub")
    with pytest.raises(VerifyFailed, match="What neighbours offer is refused"):
        await Router([refusing]).find(NAME)


async def test_what_was_fetched_serves_when_no_neighbour_answers_and_can_be_removed(publisher, tmp_path):
    await publisher.publish()
    await Router([neighbours(publisher, tmp_path)]).pull(NAME, ignore)

    class Gone:
        signer, content, now = publisher.signer, Content([]), publisher.now

        async def indexes(self):
            return [("gone", FetchFailed("The neighbour cannot be reached."))]

    router = Router([neighbours(Gone(), tmp_path)])
    _, folder = await router.pull(NAME, ignore)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [str(m.name) for m in await router.list()] == ["org/model"]
    await router.remove(NAME)
    assert await router.list() == []
    with pytest.raises(FetchFailed, match=r"Neighbours did not answer\. gone: The neighbour cannot be reached"):
        await router.pull(NAME, ignore)
