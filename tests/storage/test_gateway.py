"""Gateways that are good, and every way of being bad: each ends in a clear error, and nothing wrong is written."""

import asyncio
import random

import pytest
from aiohttp import web

from hfms_cli import ConfigError, FetchFailed, HfmsError, NotFound, VerifyFailed
from hfms_cli.ipfs import blocks_of_bytes, lanes, parse, walk
from hfms_cli.models.content import Content
from hfms_storage.gateway import GatewayOptions, Gateways
from tests.storage.gateways import TrustlessGateway

DATA = random.Random(5).randbytes(3 * 2**20)
MADE = list(blocks_of_bytes(DATA))
ROOT = MADE[-1][0]


@pytest.fixture
async def gateways():
    """Three gateways that have the file, and the store over them."""
    async with TrustlessGateway(dict(MADE)) as a, TrustlessGateway(dict(MADE)) as b, TrustlessGateway(dict(MADE)) as c:
        yield [a, b, c]


@pytest.fixture
async def content(gateways):
    store = Gateways(GatewayOptions(urls=[g.url for g in gateways], timeout_seconds=5))
    content = Content([store], patience=1)
    yield content
    await content.close()


async def read(content):
    fetch = content.fetch()
    return b"".join([piece async for piece in walk.cat(fetch, ROOT)]), fetch


async def test_a_file_comes_as_one_car_where_only_one_has_it(content, gateways):
    for other in gateways[1:]:
        other.blocks.clear()
    data, fetch = await read(content)
    assert data == DATA
    assert gateways[0].asked == [("raw", str(ROOT)), ("car", str(ROOT))]
    assert gateways[1].asked == gateways[2].asked == [("raw", str(ROOT))]
    assert fetch.served == {f"gateway {gateways[0].url.removeprefix('http://')}": len(MADE) + 1}


async def test_a_file_comes_block_by_block_where_there_is_no_car(content, gateways):
    gateways[0].cars = False
    for other in gateways[1:]:
        other.blocks.clear()
    assert (await read(content))[0] == DATA
    assert set(gateways[0].raw_asked) == {str(cid) for cid, _ in MADE}


async def test_what_all_have_comes_from_all_of_them_and_each_block_once(content, gateways, monkeypatch):
    """Each gateway answers only when all three were asked for a block below the root, so none could do it alone."""
    monkeypatch.setattr(lanes, "LATE_LEAST", 60.0)  # however slow this machine is
    asked, everybody = set(), asyncio.Event()

    def waits_for_the_others(gateway):
        async def answer(request):
            cid = parse(request.match_info["cid"])
            if cid != ROOT:
                asked.add(gateway.url)
                if len(asked) == 3:
                    everybody.set()
                await everybody.wait()
            return web.Response(body=gateway.blocks[cid])

        return answer

    for gateway in gateways:
        gateway.answer = waits_for_the_others(gateway)
    data, fetch = await read(content)
    assert data == DATA
    assert len(fetch.served_bytes) == 3
    leaves = [cid for gateway in gateways for cid in gateway.raw_asked if cid != str(ROOT)]
    assert sorted(leaves) == sorted(str(cid) for cid, _ in MADE[:-1])
    assert {row["served_bytes"] for row in content.status()} == set(fetch.served_bytes.values())


async def test_only_the_bad_block_is_fetched_from_another_and_who_sent_it_is_set_aside(content, gateways):
    gateways[2].blocks.clear()
    gateways[0].wrong = {MADE[4][0]}
    gateways[1].blocks.pop(MADE[4][0])
    gateways[2].blocks[MADE[4][0]] = MADE[4][1]
    data, fetch = await read(content)
    assert data == DATA
    assert [cid for kind, cid in gateways[2].asked] == [str(ROOT), str(MADE[4][0])]
    at = gateways[0].raw_asked
    if str(MADE[4][0]) in at:  # it was asked while the other was busy; then for nothing that the other has
        assert "are not those of" in fetch.tried[f"gateway {gateways[0].url.removeprefix('http://')}"]
        assert content.status()[0]["failures"] == 1


async def test_a_gateway_that_lies_always_is_skipped(content, gateways):
    gateways[0].wrong = {cid for cid, _ in MADE}
    assert (await read(content))[0] == DATA
    assert (await read(content))[0] == DATA
    assert len(gateways[0].asked) == 1  # once, and then it was known
    assert content.status()[0]["failures"] == 1
    assert content.status()[1]["failures"] == 0


async def test_blocks_out_of_order_are_put_in_order(content, gateways):
    gateways[0].order = lambda cids: [cids[0], *cids[:0:-1]]
    assert (await read(content))[0] == DATA


async def endless_block(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(2**16))


async def drips(request):
    """Bytes that come in time, each of them, and never make a block."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"\x80")
        await asyncio.sleep(0.05)


async def to_a_file(request):
    return web.Response(status=302, headers={"Location": "file:///etc/passwd"})


async def to_another_host(request):
    return web.Response(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data"})


async def in_circles(request):
    return web.Response(status=302, headers={"Location": str(request.rel_url)})


async def to_nowhere(request):
    return web.Response(status=302)


async def teapot(request):
    return web.Response(status=418)


async def page(request):
    return web.Response(text="<html>Welcome to our gateway!</html>", content_type="text/html")


async def hangs_up(request):
    request.transport.close()
    return web.Response()


BAD = {
    endless_block: "more than a block can hold",
    drips: "did not answer within",
    to_a_file: "another place",
    to_another_host: "another place",
    in_circles: "from one address to the next",
    to_nowhere: "from one address to the next",
    teapot: "answered 418",
    page: "are not those of",
    hangs_up: "cannot be reached, or broke off",
}


@pytest.mark.parametrize("answer", BAD, ids=lambda answer: answer.__name__)
async def test_a_bad_gateway_alone_is_a_clear_error_and_writes_nothing(content, gateways, answer, tmp_path):
    for gateway in gateways:
        gateway.answer = answer
    with pytest.raises(FetchFailed) as failed:
        await walk.save(content.fetch(), ROOT, tmp_path / "out")
    assert BAD[answer] in failed.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", BAD, ids=lambda answer: answer.__name__)
async def test_a_bad_gateway_costs_nothing_but_time_where_another_is_good(content, gateways, answer):
    gateways[0].answer = answer
    assert (await read(content))[0] == DATA


async def test_what_no_gateway_has_is_not_found(content, gateways):
    for gateway in gateways:
        gateway.blocks.clear()
    with pytest.raises(NotFound, match="does not have it"):
        await read(content)


async def test_all_gateways_that_lie_are_named(content, gateways):
    for gateway in gateways:
        gateway.wrong = {MADE[2][0]}
    with pytest.raises(VerifyFailed) as failed:
        await read(content)
    assert failed.value.message.count("are not those of") == 3


@pytest.mark.parametrize("url", ["file:///etc", "x", "http://", "http://me:secret@host", "http://host?x=1"])
def test_an_address_that_is_none_is_a_wrong_setting_and_not_shown(url):
    with pytest.raises(ConfigError) as failed:
        Gateways(GatewayOptions(urls=[url]))
    assert "secret" not in failed.value.message


async def test_a_gateway_that_gives_each_cid_a_host_is_followed():
    """As public ones do: https://<cid>.ipfs.example.org. Here `<cid>.localhost`, which is this machine."""
    from hfms_storage.gateway import Gateway

    gateway = Gateway("http://localhost:1", 1)
    there = gateway._elsewhere("http://localhost:1/ipfs/x", "http://bafy.ipfs.localhost:1/")
    assert there.host == "bafy.ipfs.localhost"
    with pytest.raises(HfmsError):
        gateway._elsewhere("http://localhost:1/ipfs/x", "http://evil-localhost:1/")
    await gateway.close()
