"""What a server shares with others: only what was published, to who may have it, and nothing unless it is told to."""

from __future__ import annotations

import contextlib

import pytest

from hfms_cli.errors import FetchFailed, HfmsError, NotFound
from hfms_cli.ipfs import CarReader, Cid, blocks_of_bytes, check, parse
from hfms_cli.models.names import parse as parse_name
from hfms_cli.models.publications import Publications
from hfms_cli.models.publish import publish
from hfms_cli.models.signing import Signer
from hfms_cli.models.trust import Trusted, add
from hfms_cli.types import Manifest, ModelFile
from hfms_cli.web.share import INDEX_PATH
from hfms_storage.neighbours import NeighbourOptions, Neighbours
from tests.models.test_ipfs_models import FILES, ignore

SHARING = {"HFMS_SHARE_MODELS": "true", "HFMS_STORAGE_ORDER": "hf_cache"}
KEY, ADMIN = "k" * 10 + "0123456789abcdef", "a" * 10 + "0123456789abcdef"
CAR = "application/vnd.ipld.car; version=1; order=dfs; dups=n"


@pytest.fixture
def sharing(serve, tmp_path):
    """`async with sharing(**more) as (server, done)`: a server that has published `org/model`."""

    @contextlib.asynccontextmanager
    async def start(*names, **more):
        more["env"] = SHARING | more.get("env", {})
        async with serve(**more) as server:
            yield server, [await put(server, tmp_path, name) for name in names or ("org/model",)]

    return start


async def put(server, tmp_path, name, *, store=None, more=None):
    """Publish a small model on a server's disk, as `hfms models publish` does. more: what its weights end with."""
    state, folder = server.runtime.config.state_dir, tmp_path / name.replace("/", "-")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"] + (more or name.encode()))
    files = tuple(ModelFile(p.name, p.stat().st_size) for p in folder.iterdir())
    manifest = Manifest(name=parse_name(name), storage="local", revision="r1", files=files)
    with contextlib.suppress(HfmsError):
        Signer.make(state)
    content, signer = server.runtime.router.content, Signer.load(state)
    return await publish(manifest, folder, content, Publications(state), signer, name=manifest.name, store=store)


async def get(server, path, **more):
    async with server.session.get(server.url + path, **more) as response:
        return response.status, await response.read(), response.headers


async def test_nothing_is_shared_unless_it_is_asked_for(serve, tmp_path):
    async with serve(env={"HFMS_STORAGE_ORDER": "hf_cache"}) as server:
        done = await put(server, tmp_path, "org/model")
        for path in (INDEX_PATH, f"/ipfs/{done.cid}?format=raw"):
            assert (await get(server, path))[0] == 404


async def test_blocks_and_archives_of_what_is_published_are_served_as_a_gateway_does(sharing):
    async with sharing() as (server, [done]):
        status, root, headers = await get(server, f"/ipfs/{done.cid}?format=raw")
        assert (status, headers["Content-Type"]) == (200, "application/vnd.ipld.raw")
        assert "immutable" in headers["Cache-Control"]
        check(parse(done.cid), root)
        assert (await get(server, f"/ipfs/{done.cid}?format=raw", headers={"If-None-Match": headers["ETag"]}))[0] == 304
        assert (await get(server, f"/ipfs/{done.cid}", headers={"Accept": "application/vnd.ipld.raw"}))[1] == root

        status, car, headers = await get(server, f"/ipfs/{done.cid}?format=car")
        assert (status, headers["Content-Type"]) == (200, CAR)

        async def chunks():
            yield car

        reader, held = CarReader(chunks()), set()
        assert await reader.header() == [parse(done.cid)]
        async for cid, block in reader.blocks():
            check(cid, block)
            held.add(cid)
        for file in done.manifest.files:
            assert parse(file.cid) in held


async def test_the_document_of_the_api_has_both_routes(sharing):
    async with sharing() as (server, _):
        _, document = await server.get("/openapi.json")
        block = document["paths"]["/ipfs/{cid}"]["get"]
        assert {p["name"] for p in block["parameters"]} >= {"cid", "format"}
        assert INDEX_PATH in document["paths"]


async def test_only_what_was_published_is_served_also_of_what_lies_beside_it(sharing):
    async with sharing() as (server, _):
        store = server.runtime.router.content.named("hf_cache")
        private = await store.add_bytes(b"somebody's own file")
        for cid in (private, str(Cid.of("raw", b"nowhere"))):
            for kind in ("raw", "car"):
                status, body, _ = await get(server, f"/ipfs/{cid}?format={kind}")
                assert status == 404
                assert b"no part of what is published here" in body


async def test_no_other_store_is_asked_for_a_published_block_that_is_lost(sharing):
    """Else anybody could make this server fetch things."""
    async with sharing(
        env={"HFMS_STORAGE_ORDER": "hf_cache,kubo", "IPFS_API": "http://127.0.0.1:9", "KUBO_CMD": ""}
    ) as (
        server,
        [done],
    ):
        store = server.runtime.router.content.named("hf_cache")
        lost = parse(done.manifest.files[0].cid)
        store._file(lost).unlink()
        before = server.runtime.router.content.status()
        status, body, _ = await get(server, f"/ipfs/{lost}?format=raw")
        assert (status, b"not on this disk" in body) == (404, True)
        assert (await get(server, f"/ipfs/{lost}?format=car"))[0] == 404
        assert server.runtime.router.content.status() == before


async def test_a_block_of_two_models_comes_from_the_store_that_is_there(sharing, node, tmp_path):
    both = {"HFMS_STORAGE_ORDER": "kubo,hf_cache", "IPFS_API": node.api, "KUBO_CMD": ""}
    async with sharing(env=both) as (server, [alone]):
        one = await put(server, tmp_path, "org/one", store="kubo", more=b"alike")
        two = await put(server, tmp_path, "org/two", store="hf_cache", more=b"alike")
        (common,) = {done.manifest.files[0].cid for done in (one, two)}
        server.runtime.router.content.named("kubo")._rpc._url = "http://127.0.0.1:9"
        assert (await get(server, f"/ipfs/{common}?format=car"))[0] == 200
        assert (await get(server, f"/ipfs/{alone.cid}?format=raw"))[0] == 502


@pytest.mark.parametrize("path", ["", "?format=tar", "?format=dag-json", "?format=RAW"])
async def test_a_format_that_is_no_block_is_a_400_that_names_it(sharing, path):
    async with sharing() as (server, [done]):
        status, body = await server.get(f"/ipfs/{done.cid}{path}")
        assert (status, body["error"]["param"]) == (400, "format")


@pytest.mark.parametrize("cid", ["x", "..%2f..%2fetc%2fpasswd", "--help", "b" * 4000])
async def test_what_is_no_cid_is_a_400(sharing, cid):
    async with sharing() as (server, _):
        status, body = await server.get(f"/ipfs/{cid}?format=raw")
        assert (status, body["error"]["code"]) == (400, "invalid_cid")


async def test_with_keys_every_shared_route_asks_for_one_unless_it_is_opened(sharing):
    keys = {"HFMS_API_KEY": KEY}
    async with sharing(env=keys) as (server, [done]):
        for path in (INDEX_PATH, f"/ipfs/{done.cid}?format=raw"):
            assert (await get(server, path))[0] == 401
            assert (await get(server, path, headers={"Authorization": f"Bearer {KEY}"}))[0] == 200
    # What lies beside the opened paths stays shut.
    async with sharing("org/other", env=keys, toml="[middleware.auth]\nopen_shared = true\n") as (server, [done]):
        for path in (INDEX_PATH, f"/ipfs/{done.cid}?format=raw"):
            assert (await get(server, path))[0] == 200
        for path in ("/ipfs", "/.well-known/hfms", "/ipfsx/a", "/status", "/v1/models"):
            assert (await get(server, path))[0] == 401


async def test_a_key_for_some_models_gets_their_blocks_and_no_others(sharing):
    async with sharing("org/mine", "org/theirs", env={"HFMS_ADMIN_API_KEY": ADMIN}) as (server, [mine, theirs]):
        body = {"name": "n", "allowed_models": ["org/mine"]}
        admin = {"Authorization": f"Bearer {ADMIN}"}
        status, made = await server.post("/admin/keys/generate", body, headers=admin)
        assert status in (200, 201), made
        headers = {"Authorization": f"Bearer {made['api_key']}"}
        assert (await get(server, f"/ipfs/{mine.cid}?format=raw", headers=headers))[0] == 200
        assert (await get(server, f"/ipfs/{theirs.cid}?format=raw", headers=headers))[0] == 404
        status, refusal = await server.get(INDEX_PATH, headers=headers)
        assert (status, refusal["error"]["code"]) == (403, "forbidden")


async def test_a_model_published_or_withdrawn_beside_a_running_server_is_seen(sharing, tmp_path):
    async with sharing() as (server, [done]):
        more = await put(server, tmp_path, "org/more")
        assert (await get(server, f"/ipfs/{more.cid}?format=raw"))[0] == 200
        state = server.runtime.config.state_dir
        Publications(state).withdraw(Signer.load(state), parse_name("org/model"))
        assert (await get(server, f"/ipfs/{done.cid}?format=raw"))[0] == 404
        assert (await get(server, f"/ipfs/{more.cid}?format=raw"))[0] == 200


# The other side: the storage `neighbours`.


async def test_a_server_gets_a_model_from_another_by_its_name(sharing, serve, tmp_path):
    async with sharing(env={"HFMS_API_KEY": KEY, "HFMS_STATE_DIR": str(tmp_path / "first")}) as (first, [done]):
        add(tmp_path / "state", Trusted.parse(f"org/* {done.manifest.publisher}"))
        toml = f'[storage.neighbours]\nurls = ["{first.url}"]\nkeys = {{"{first.url}" = "{KEY}"}}\n'
        async with serve(toml=toml, env={"HFMS_STORAGE_ORDER": "neighbours"}) as second:
            router = second.runtime.router
            manifest, folder = await router.pull(parse_name("org/model"), ignore)
            assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"] + b"org/model"
            assert manifest.storage == "neighbours"
            _, status = await second.get("/status")
            (row,) = status["storage"]["content"]
            assert row["name"] == f"neighbour {first.url.removeprefix('http://')}"
            assert row["served_bytes"] > 500_000  # of 800,000: the file repeats itself
            metrics = (await get(second, "/metrics"))[1].decode()
            assert f'hfms_storage_bytes_total{{backend="{row["name"]}"}}' in metrics
            assert KEY not in str(status) + metrics


async def test_a_neighbour_that_wants_another_key_says_so_and_the_key_is_in_no_error(sharing, serve):
    async with sharing(env={"HFMS_API_KEY": KEY}) as (server, [done]):
        for keys in ({}, {server.url: "a-key-that-is-wrong"}):
            store = Neighbours(NeighbourOptions(urls=[server.url], keys=keys))
            ((name, error),) = await store.indexes()
            assert name == f"neighbour {server.url.removeprefix('http://')}"
            assert "set one for its URL in [storage.neighbours] keys" in error.message
            with pytest.raises(FetchFailed) as failed:
                await store.block_get(done.cid)
            assert "a-key-that-is-wrong" not in str(failed.value) + error.message
            await store.close()


async def test_a_neighbour_that_shares_nothing_or_is_not_there_is_told(serve):
    async with serve(env={"HFMS_STORAGE_ORDER": "hf_cache"}) as server:
        store = Neighbours(NeighbourOptions(urls=[server.url, "http://127.0.0.1:9"]))
        nothing, nobody = [error for _, error in await store.indexes()]
        assert isinstance(nothing, NotFound)
        assert isinstance(nobody, FetchFailed)
        await store.close()


async def test_a_neighbours_redirect_is_not_followed_as_the_key_would_go_with_it():
    from tests.storage.gateways import TrustlessGateway
    from tests.storage.test_gateway import in_circles

    made = dict(blocks_of_bytes(b"x"))
    async with TrustlessGateway(made, answer=in_circles) as gateway:
        store = Neighbours(NeighbourOptions(urls=[gateway.url], keys={gateway.url + "/": KEY}))
        with pytest.raises(FetchFailed, match="from one address to the next"):
            await store.block_get(str(next(iter(made))))
        assert len(gateway.asked) == 1
        await store.close()


def test_a_key_for_a_server_that_is_not_asked_is_a_wrong_setting_and_not_shown():
    from hfms_cli import ConfigError

    with pytest.raises(ConfigError) as failed:
        Neighbours(NeighbourOptions(urls=["http://a"], keys={"http://b": KEY}))
    assert KEY not in failed.value.message
