"""The guide for plugin authors is true: each of its examples is a plugin that loads, and each hook has one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hfms_cli import Call, Caller, Chunk, Device, LoadRequest, ModelCard, ModelName, NotFound, Overloaded
from hfms_cli.config import Config
from hfms_cli.hookspecs import KINDS, Hooks
from hfms_cli.plugins import PluginInfo, Plugins

GUIDE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(Hooks) if name.startswith("hfms_")]


def example(hook: str) -> ModuleType:
    """The example below a hook's heading, as a module."""
    section = re.search(rf"^### {hook}\n(.*?)(?=^##|\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/plugins.md has no section on {hook}"
    (code,) = re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    module = ModuleType(f"guide_{hook}")
    sys.modules[module.__name__] = module  # as an import would; dataclasses look there
    exec(compile(code, f"docs/plugins.md: {hook}", "exec", dont_inherit=True), vars(module))
    return module


def loaded(hook: str) -> tuple[Plugins, PluginInfo]:
    plugins, info = Plugins(), PluginInfo(hook, "guide", "guide", "1")
    plugins.add(info, example(hook))
    return plugins, info


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_loads(hook):
    _, info = loaded(hook)
    assert info.error is None
    assert [p.partition(":")[0] for p in info.provides] == [next((k for k, h in KINDS.items() if h == hook), hook)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_record_of_the_guide_can_be_made(kind):
    plugins, _ = loaded(KINDS[kind])
    (name,) = plugins.names(kind)
    assert plugins.create(kind, name, Config()).name == name


def call_of(who: str) -> Call:
    return Call(id="1", model="m", task="generate", inputs=["abc", "xyz"], n=2, caller=Caller(key_id=who))


async def test_middleware_of_the_guide_gives_one_answer_at_a_time():
    plugins, _ = loaded("hfms_middlewares")
    polite = plugins.create("middleware", "polite", Config())

    async def proceed(call):
        yield Chunk(text="one")
        yield Chunk(text="two")

    first = polite.call(call_of("ann"), proceed)
    assert (await anext(first)).text == "one"
    with pytest.raises(Overloaded):
        await anext(polite.call(call_of("ann"), proceed))
    assert (await anext(polite.call(call_of("bob"), proceed))).text == "one"
    await first.aclose()
    assert [c.text async for c in polite.call(call_of("ann"), proceed)] == ["one", "two"]
    assert polite.status() == {"refused": 1}


async def test_content_store_of_the_guide_keeps_and_gives():
    from hfms_cli.models.content import Content

    plugins, _ = loaded("A content store")
    store = plugins.create("storage", "memory", Config())
    cid, receipt = await Content([store]).add_bytes(bytes(600_000))
    assert (receipt.backend, await store.cat(cid)) == ("memory", bytes(600_000))
    await store.unpin(cid)
    with pytest.raises(NotFound):
        await store.unpin(cid)


async def test_storage_of_the_guide_finds_folders_and_no_paths(tmp_path):
    (tmp_path / "root" / "tiny").mkdir(parents=True)
    (tmp_path / "root" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    plugins, _ = loaded("hfms_storages")
    share = plugins.create("storage", "share", Config(environ={"HFMS_SHARE_ROOT": str(tmp_path / "root")}))
    found = await share.find(ModelName("share", "tiny"))
    assert [f.path for f in found.files] == ["config.json"]
    assert await share.fetch(found, lambda done, total: None) == tmp_path / "root" / "tiny"
    assert await share.find(ModelName("share", "../secret")) is None
    assert share.claims(ModelName("share", "x"))
    assert not share.claims(ModelName("", "x"))


def test_hardware_of_the_guide_says_why_there_is_none():
    plugins, _ = loaded("hfms_hardware")
    assert "is not there" in plugins.create("hardware", "fastcard", Config()).probe().reason


def test_engine_of_the_guide_answers_every_choice(tmp_path):
    plugins, _ = loaded("hfms_engines")
    engine = plugins.create("engine", "backwards", Config())
    card = ModelCard(
        format="none", model_type="backwards", architecture="Backwards", tasks=("generate",), weights_bytes=0
    )
    device = Device(id="cpu", kind="cpu", name="cpu", total_bytes=1, free_bytes=1)
    assert engine.supports(card, device) is None
    model = engine.load(LoadRequest(folder=tmp_path, card=card, device=device))
    model.submit(call_of("ann"))
    assert model.busy()
    *chunks, end = model.step()
    assert [(c.index, c.text) for _, c in chunks] == [(0, "cba"), (1, "cba"), (2, "zyx"), (3, "zyx")]
    assert end == ("1", None)
    assert not model.busy()
