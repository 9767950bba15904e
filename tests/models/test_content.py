"""What has a CID, from several stores together: order, fallback at every operation, and receipts that tell."""

import pytest

from hfms_cli import BadRequest, Config, ConfigError, FetchFailed, NotFound, Unavailable, Unsupported, VerifyFailed
from hfms_cli.config import load_config
from hfms_cli.ipfs import BlockStore, Cid, blocks_of_bytes, parse, root_of, walk
from hfms_cli.models.content import Content, is_content_store
from hfms_cli.models.router import open_router
from hfms_cli.plugins import PluginInfo, Plugins


class Shelf(BlockStore):
    """A store in memory, that may be down, read-only or wrong."""

    def __init__(self, name, error=None, read_only=False):
        self.name = name
        self.error = error
        self.read_only = read_only
        self.blocks = {}
        self.pins = set()
        self.closed = False

    async def block_get(self, cid):
        if self.error:
            raise self.error
        if parse(cid) not in self.blocks:
            raise NotFound("It is not on this shelf.")
        return self.blocks[parse(cid)]

    async def put_blocks(self, blocks):
        if self.error:
            raise self.error
        if self.read_only:
            await super().put_blocks(blocks)
        async for cid, block in blocks:
            self.blocks[cid] = block

    async def pin(self, cid):
        await self.block_get(cid)
        self.pins.add(cid)

    async def unpin(self, cid):
        if cid not in self.pins:
            raise NotFound("It is not pinned on this shelf.")
        self.pins.remove(cid)

    async def close(self):
        self.closed = True


class Foreign:
    """A store that is written without hfms's base class, and answers what it was told to."""

    name = "foreign"

    def __init__(self, cid):
        self.cid = cid

    async def add_bytes(self, data, *, pin=True):
        return self.cid

    async def add_path(self, path, *, recursive=False, pin=True, chunker=""):
        return self.cid

    async def block_get(self, cid):
        return b"bytes that nobody asked for"

    async def dag_export(self, cid):
        yield b"no CAR at all"


@pytest.fixture
def shelves():
    return [Shelf("read", read_only=True), Shelf("down", error=Unavailable("It is down.")), Shelf("good")]


DATA = bytes(range(256)) * 3000


async def test_what_one_store_cannot_the_next_does_and_the_receipt_says_why(shelves):
    cid, receipt = await Content(shelves).add_bytes(DATA)
    assert cid == str(root_of(blocks_of_bytes(DATA)))
    assert receipt.backend == "good"
    assert receipt.tried == {
        "read": "The backend `read` cannot keep anything, because it can only be read.",
        "down": "It is down.",
    }
    assert shelves[2].pins == {cid}


async def test_each_operation_falls_back_on_its_own(shelves, tmp_path):
    content = Content(shelves)
    (tmp_path / "file").write_bytes(DATA)
    cid, receipt = await content.add_path(tmp_path / "file", pin=False)
    assert receipt.backend == "good"
    assert (await content.pin(cid)).backend == "good"
    assert (await content.unpin(cid)).backend == "good"
    assert (await content.block_put(b"x", codec="raw"))[1].backend == "good"
    assert (await content.dag_import(lambda: shelves[2].dag_export(cid)))[1].backend == "good"
    fetch = content.fetch()
    assert b"".join([p async for p in walk.cat(fetch, parse(cid))]) == DATA
    assert set(fetch.served) == {"good"}
    assert set(fetch.tried) == {"read"}  # the one that is down was found so before, and not needed


async def test_a_store_that_failed_is_asked_last_until_its_pause_is_over(shelves):
    now = [0.0]
    content = Content([shelves[1], shelves[2]], clock=lambda: now[0])
    assert (await content.add_bytes(b"1"))[1].tried
    shelves[1].error = None
    assert (await content.add_bytes(b"2"))[1].backend == "good"
    nothing = {"served_blocks": 0, "served_bytes": 0}
    assert content.status()[0] == {"name": "down", "failures": 1, "error": "It is down.", **nothing}
    now[0] = 10.0
    assert (await content.add_bytes(b"3"))[1].backend == "down"
    assert content.status()[0] == {"name": "down", "failures": 0, "error": None, **nothing}


@pytest.mark.parametrize("answer", ["bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku", "--help", ""])
async def test_a_store_that_answers_with_another_cid_is_not_believed(answer, tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    good = Shelf("good")
    for verb in (lambda c: c.add_bytes(DATA), lambda c: c.add_path(tmp_path / "file")):
        cid, receipt = await verb(Content([Foreign(answer), good]))
        assert (cid, receipt.backend) == (str(root_of(blocks_of_bytes(DATA))), "good")
        assert "is not `" in receipt.tried["foreign"]
        with pytest.raises(VerifyFailed):
            await verb(Content([Foreign(answer)]))


async def test_a_foreign_store_that_lies_is_read_around():
    good = Shelf("good")
    cid = await good.add_bytes(DATA)
    fetch = Content([Foreign(""), good]).fetch()
    assert b"".join([p async for p in walk.cat(fetch, parse(cid))]) == DATA
    assert set(fetch.served) == {"good"}


async def test_the_callers_own_mistake_is_told_once_and_blames_no_store(shelves, tmp_path):
    content = Content([shelves[0], shelves[2]])
    with pytest.raises(BadRequest, match="is a folder"):
        await content.add_path(tmp_path)
    assert [s["failures"] for s in content.status()] == [0, 0]


async def test_the_error_of_many_stores_says_what_each_said(shelves):
    shelves[2].error = FetchFailed("Its disk is full.")
    with pytest.raises(FetchFailed) as failed:
        await Content(shelves).add_bytes(b"x")
    for said in ("read: The backend `read` cannot keep anything", "down: It is down", "good: Its disk is full"):
        assert said in failed.value.message
    with pytest.raises(Unsupported, match="see `\\[storage\\] order`"):
        await Content([]).add_bytes(b"x")


@pytest.mark.parametrize("form", ["{}", "ipfs://{}", "/ipfs/{}", "{}/"])
async def test_a_path_below_a_cid_is_found(form, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "file").write_bytes(b"deep")
    shelf = Shelf("good")
    cid = await shelf.add_path(tmp_path / "in", recursive=True)
    content = Content([shelf])
    assert str(await content.resolve(content.fetch(), form.format(cid))) == cid
    found = await content.resolve(content.fetch(), form.format(cid).rstrip("/") + "/sub/file")
    assert found == Cid.of("raw", b"deep")
    with pytest.raises(NotFound):
        await content.resolve(content.fetch(), f"{cid}/../../etc/passwd")


async def test_all_are_closed(shelves):
    await Content(shelves).close()
    assert all(s.closed for s in shelves)


def plugins_with(*records):
    import types

    from hfms_cli import Provider, hookimpl

    module = types.ModuleType("shelves")

    @hookimpl
    def hfms_storages():
        for name in records:
            yield Provider(name, lambda name=name: Shelf(name))

    module.hfms_storages = hfms_storages
    plugins = Plugins()
    plugins.add(PluginInfo("shelves", "shelves", "", ""), module)
    return plugins


def test_the_configuration_says_the_order_and_the_backend_to_ask_first(tmp_path):
    environ = {"HFMS_STATE_DIR": str(tmp_path), "HFMS_CONFIG": "", "HFMS_STORAGE_ORDER": "a,b"}
    router = open_router(load_config(environ=environ), plugins_with("a", "b", "c"))
    assert [s.name for s in router.content.stores] == ["a", "b"]
    assert [s.name for s in router.storages] == ["ipfs"]
    for backend, order in (("b", ["b", "a"]), ("c", ["c", "a", "b"])):
        config = load_config(environ=environ | {"IPFS_BACKEND": backend})
        assert [s.name for s in open_router(config, plugins_with("a", "b", "c")).content.stores] == order


def test_a_backend_that_keeps_nothing_with_a_cid_is_a_wrong_setting(tmp_path):
    import hfms_storage

    plugins = Plugins()
    plugins.add(PluginInfo("storage", "hfms_storage", "hfms", "0"), hfms_storage)
    environ = {"HFMS_STATE_DIR": str(tmp_path), "HFMS_CONFIG": "", "HFMS_STORAGE_ORDER": "local"}
    with pytest.raises(ConfigError, match="IPFS_BACKEND is `local`"):
        open_router(load_config(environ=environ | {"HFMS_IPFS_BACKEND": "local"}), plugins)
    assert not is_content_store(plugins.create("storage", "local", Config()))
