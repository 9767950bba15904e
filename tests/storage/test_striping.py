"""A model from two real IPFS nodes at once, also where one of them has wrong bytes under right CIDs."""

import json
import os
import struct

import pytest

from hfms_cli.ipfs import blocks_of_path, car_header, car_section, root_of
from hfms_cli.models.content import Content
from hfms_cli.models.ipfs import IpfsModels
from hfms_cli.models.names import parse
from hfms_cli.models.router import Router
from hfms_storage.kubo import Kubo, KuboOptions
from tests.storage.gateways import flipped

SIZE = 24 * 2**20


@pytest.fixture
def model(tmp_path):
    """A model of a hundred blocks that no node has yet."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(SIZE))
    return folder


@pytest.fixture
async def kubos(node, other_node):
    """A storage for each of two nodes."""
    stores = [Kubo(KuboOptions(api=n.api, command="", timeout_seconds=20)) for n in (node, other_node)]
    for number, store in enumerate(stores):
        store.name = f"node-{number}"
    yield stores
    for store in stores:
        await store.close()


async def pull(content, cid, tmp_path):
    router = Router([IpfsModels(content, tmp_path / "cache")])
    _, folder = await router.pull(parse(f"ipfs://{cid}"), lambda done, total: None)
    return folder


async def test_a_model_that_two_nodes_have_comes_from_both_and_each_block_from_one(kubos, model, tmp_path):
    for kubo in kubos:
        cid = await kubo.add_path(model, recursive=True)
    content = Content(kubos)
    folder = await pull(content, cid, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    one, two = [row["served_bytes"] for row in content.status()]
    assert min(one, two) > SIZE / 10
    assert one + two < SIZE * 1.1


async def test_a_node_with_wrong_bytes_costs_its_blocks_and_nothing_wrong_is_kept(kubos, other_node, model, tmp_path):
    honest, hostile = kubos
    cid = await honest.add_path(model, recursive=True)

    def car():
        yield car_header([root_of(blocks_of_path(model, recursive=True))])
        for name, block in blocks_of_path(model, recursive=True):
            wrong = name.codec == 0x55 and len(block) == 262_144
            yield car_section(name, flipped(block) if wrong else block)

    await other_node.ask("dag/import", body=b"".join(car()))  # this kind of node believes what it is told
    content = Content([hostile, honest])
    folder = await pull(content, cid, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    told = {row["name"]: row for row in content.status()}
    assert told["node-1"]["failures"] >= 1
    assert "are not those of" in told["node-1"]["error"]
    assert told["node-1"]["served_bytes"] < 2**20
