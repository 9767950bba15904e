"""The storage `kubo` against real nodes: two that talk, one that lies, and the ways in which a node is not there."""

import random
import sys
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest

from hfms_cli import FetchFailed, NotFound, VerifyFailed
from hfms_cli.ipfs import Cid, Fetch, Health, blocks_of_bytes, car_header, car_section, parse, walk
from hfms_cli.models.content import Content
from hfms_storage.hf_cache import HfCache, HfCacheOptions
from hfms_storage.kubo import Kubo, KuboOptions, _url
from tests.storage.gateways import flipped

PROGRAM = f"{sys.executable} {Path(__file__).with_name('ipfs_program.py')}"


def some(seed: int, size: int = 700_000) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
async def kubo(node):
    store = Kubo(KuboOptions(api=node.api, timeout_seconds=20))
    yield store
    await store.close()


async def test_what_hfms_adds_the_node_reads_and_holds_pinned(kubo, node):
    cid = await kubo.add_bytes(some(1), pin=True)
    assert await node.ask("cat", cid) == some(1)
    assert await node.holds_pinned(cid)
    await kubo.unpin(cid)
    assert not await node.holds_pinned(cid)


async def test_what_one_node_has_comes_through_another(node, other_node):
    theirs = Kubo(KuboOptions(api=other_node.api, timeout_seconds=20))
    ours = Kubo(KuboOptions(api=node.api, timeout_seconds=20))
    cid = await theirs.add_bytes(some(2))
    await node.connect(other_node)
    assert await ours.cat(cid) == some(2)
    await theirs.close()
    await ours.close()


async def test_a_node_that_serves_wrong_bytes_is_found_out_and_written_nowhere(kubo, node, tmp_path):
    """js-ipfs imports what it is told: a node whose disk or owner lies looks like this."""
    made = list(blocks_of_bytes(some(3)))
    root, (leaf, block) = made[-1][0], made[1]
    car = car_header([root]) + b"".join(car_section(c, flipped(b) if c == leaf else b) for c, b in made)
    await node.ask("dag/import", None, car, **{"pin-roots": "false"})
    assert await node.ask("cat", str(root)) != some(3)

    with pytest.raises(VerifyFailed, match="are not those of"):
        await kubo.get_to_path(str(root), output_path=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    # With an honest store at its side, only the bad block comes from there.
    honest = HfCache(HfCacheOptions(cache_dir=str(tmp_path / "hub")))
    await honest.block_put(block)
    content = Content([kubo, honest])
    fetch = content.fetch()
    await walk.save(fetch, root, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == some(3)
    assert fetch.served["hf_cache"] == 1
    assert "are not those of" in fetch.tried["kubo"]


@pytest.mark.parametrize("road", ["RPC", "program"])
@pytest.mark.parametrize(
    ("options", "sent"),
    [({"cid-version": "1", "raw-leaves": "true"}, "cat"), ({"cid-version": "0", "raw-leaves": "false"}, "dag_export")],
)
async def test_a_file_comes_as_its_bytes_where_its_blocks_hold_nothing_else(node, monkeypatch, road, options, sent):
    monkeypatch.setenv("IPFS_TEST_API", node.api)
    program = KuboOptions(api="http://127.0.0.1:9", command=PROGRAM)
    store = Kubo(KuboOptions(api=node.api, command="") if road == "RPC" else program)
    data = some(5, 1_500_000)
    cid, seen = parse(await node.add(data, **options)), Counter()
    fetch = Fetch([store], Health(observe=lambda source, operation, status, *_: seen.update([(operation, status)])))
    async with aclosing(walk.cat(fetch, cid)) as pieces:
        assert b"".join([piece async for piece in pieces]) == data
    assert seen[sent, "ok"] >= 6
    assert seen["block_get", "ok"] <= 3
    await store.close()


async def test_a_block_that_nobody_has_is_an_error_after_its_time(node):
    store = Kubo(KuboOptions(api=node.api, timeout_seconds=1))
    with pytest.raises((FetchFailed, NotFound)):
        await store.block_get(str(Cid.of("raw", some(4, 50))))
    await store.close()


async def test_a_node_that_is_not_there_is_said_to_be_out_of_reach():
    store = Kubo(KuboOptions(api="http://127.0.0.1:9", command=""))
    for work in (store.cat(str(Cid.of("raw", b"x"))), store.add_bytes(b"x"), store.pin(str(Cid.of("raw", b"x")))):
        with pytest.raises(FetchFailed, match="cannot be reached"):
            await work
    await store.close()


async def test_a_server_that_is_no_node_is_an_error_without_its_text():
    from aiohttp import web

    async def anything(request):
        return web.Response(text="<html>a page with a secret</html>", status=500)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", anything)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    store = Kubo(KuboOptions(api=f"http://127.0.0.1:{runner.addresses[0][1]}", command=""))
    with pytest.raises(FetchFailed) as failed:
        await store.add_bytes(b"x")
    assert failed.value.message == "The node's RPC answered 500."
    await store.close()
    await runner.cleanup()


async def test_the_program_that_fails_is_told_in_its_own_words(tmp_path, monkeypatch, node):
    monkeypatch.setenv("IPFS_TEST_API", node.api)
    store = Kubo(KuboOptions(api="http://127.0.0.1:9", command=PROGRAM))
    with pytest.raises(NotFound, match="is not pinned at the node"):
        await store.unpin(str(Cid.of("raw", some(5, 50))))
    script = tmp_path / "ipfs"
    script.write_text("#!/bin/sh\necho 'Error: no space left at /home/me/.ipfs/blocks' >&2\nexit 1\n")
    script.chmod(0o755)
    store = Kubo(KuboOptions(api="http://127.0.0.1:9", command=str(script)))
    with pytest.raises(FetchFailed) as failed:
        await store.add_bytes(b"x")
    assert failed.value.message == "The node refused: no space left at …."


async def test_the_program_that_is_silent_is_ended(tmp_path):
    script = tmp_path / "ipfs"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    script.chmod(0o755)
    store = Kubo(KuboOptions(api="http://127.0.0.1:9", command=str(script), timeout_seconds=1))
    with pytest.raises(FetchFailed, match="was silent for 1 seconds"):
        await store.block_get(str(Cid.of("raw", b"x")))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


async def test_a_cid_stands_behind_two_dashes_on_the_command_line(tmp_path):
    script = tmp_path / "ipfs"
    script.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {tmp_path}/words; done\n')
    script.chmod(0o755)
    store = Kubo(KuboOptions(api="http://127.0.0.1:9", command=str(script)))
    cid = str(Cid.of("raw", b"x"))
    await store.pin(cid)
    assert (tmp_path / "words").read_text().split() == ["pin", "add", "--timeout=60s", "--", cid]


@pytest.mark.parametrize(
    ("api", "url"),
    [
        ("http://127.0.0.1:5001", "http://127.0.0.1:5001"),
        ("https://node.example.org/api/v0", "https://node.example.org"),
        ("/ip4/127.0.0.1/tcp/5001", "http://127.0.0.1:5001"),
        ("/ip6/::1/tcp/5001", "http://[::1]:5001"),
        ("/dns/node/tcp/443/https", "https://node:443"),
    ],
)
def test_the_address_may_be_a_url_or_as_kubo_writes_it(api, url):
    assert _url(api) == url
