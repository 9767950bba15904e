"""LoRA adapters of a running server: loaded, called, listed, unloaded, and back after the engine was killed."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from hfms_cli.errors import ConfigError
from hfms_cli.models.adapters import Module, read_module
from tests.engines import tiny

pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)
pytest.importorskip("openvino")
pytest.importorskip("peft")

from tests.engines import peft_adapters
from tests.engines.test_openvino import expected
from tests.web.test_openapi import WITH_ADAPTERS, document_of, validate

TOML = """
[models]
dtype = "float32"
folders = ["{folder}"]
[engine]
order = ["{engine}"]
[engine.{engine}]
kv_cache_bytes = 4_000_000
max_loras = 3
"""
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with two adapters, and another model."""
    folder = tmp_path_factory.mktemp("lora")
    tiny.save(folder / "base", tiny.ARCHITECTURES["llama"]())
    tiny.save(folder / "stranger", tiny.ARCHITECTURES["qwen2"]())
    peft_adapters.save(folder / "sql", folder / "base", seed=1)
    peft_adapters.save(folder / "poems", folder / "base", seed=2, r=2, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture(params=["transformers", "openvino"])
def toml(request, folder, tmp_path_factory):
    text = TOML.format(folder=folder, engine=request.param)
    if request.param == "openvino":
        text += f'cache_dir = "{folder}/converted"\n'
    return text


@pytest.fixture
def torch_toml(folder):
    return TOML.format(folder=folder, engine="transformers")


def wanted(folder, adapter: str) -> list[int]:
    return expected(peft_adapters.merged(folder / "base", folder / adapter), PROMPT, 12)


async def answer(server, model: str, **more):
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    status, body = await server.post("/v1/completions", asked | more)
    return body["choices"][0]["text"] if status == 200 else (status, body["error"]["code"])


async def text_of(server, ids: list[int]) -> str:
    _, body = await server.post("/detokenize", {"model": "base", "tokens": ids})
    return body["prompt"]


async def load(server, name: str, path, **more):
    return await server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)} | more)


async def test_adapters_answer_as_peft_does_beside_their_base(serve, folder, toml):
    async with serve(str(folder / "base"), toml=toml) as server:
        alone = await answer(server, "base")
        for name in ("sql", "poems"):
            status, body = await load(server, name, folder / name)
            assert (status, body["id"], body["parent"], body["status"]["value"]) == (200, name, "base", "loaded")
        answers = await asyncio.gather(*(answer(server, m) for m in ("base", "sql", "poems", "sql", "base")))
        sql, poems = [await text_of(server, wanted(folder, name)) for name in ("sql", "poems")]
        assert answers == [alone, sql, poems, sql, alone]


async def test_an_adapter_is_listed_with_its_parent_and_leaves_the_lists(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        await load(server, "sql", folder / "sql", base_model_name="base")
        _, body = await server.get("/v1/models")
        [row] = [row for row in body["data"] if row["id"] == "sql"]
        assert (row["parent"], row["root"], len(row["digest"])) == ("base", "sql", 64)
        assert (await server.get("/v1/models/sql"))[0] == 200
        _, body = await server.get("/models")
        assert [(r["status"]["value"], r["parent"]) for r in body["data"] if r["id"] == "sql"] == [("loaded", "base")]
        status, body = await server.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
        assert (status, body["status"]["value"]) == (200, "unloaded")
        assert (await server.get("/v1/models/sql"))[0] == 404
        assert await answer(server, "sql") == (404, "model_not_found")


async def test_loading_and_unloading_answer_what_the_document_says(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        document, there = await document_of(server), {"lora_path": str(folder / "sql")}
        for method, path in sorted(WITH_ADAPTERS):
            status, body = await server.post(path, {"lora_name": "sql"} | (there if "unload" not in path else {}))
            said = document["paths"][path][method.lower()]["responses"][str(status)]
            assert status == 200
            validate(body, said["content"]["application/json"]["schema"], document, path)


async def test_what_is_not_loaded_cannot_be_unloaded(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        status, body = await server.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert (await server.post("/v1/unload_lora_adapter", {"lora_name": "base"}))[0] == 404
        assert isinstance(await answer(server, "base"), str)


async def test_the_verb_for_models_unloads_adapters_and_a_base_takes_its_own_along(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        await load(server, "sql", folder / "sql")
        await load(server, "poems", folder / "poems")
        assert (await server.post("/models/unload", {"model": "sql"}))[0] == 200
        assert isinstance(await answer(server, "poems"), str)
        assert (await server.post("/models/unload", {"model": "base"}))[0] == 200
        assert await answer(server, "poems") == (404, "model_not_found")


async def test_a_call_in_flight_finishes_with_the_adapter_it_began_with(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        await load(server, "sql", folder / "sql")
        whole = await answer(server, "sql", max_tokens=300)
        running = asyncio.create_task(answer(server, "sql", max_tokens=300))
        parent = server.runtime.pool.find("base")
        while not parent.host.running:
            await asyncio.sleep(0)
        unloading = asyncio.create_task(server.post("/v1/unload_lora_adapter", {"lora_name": "sql"}))
        while server.runtime.pool.adapters.find("sql"):
            await asyncio.sleep(0)
        assert not running.done()
        assert await answer(server, "sql") == (404, "model_not_found")
        # The name is free at once, for another one.
        status, _ = await load(server, "sql", folder / "poems")
        assert status == 200
        assert await answer(server, "sql") == await text_of(server, wanted(folder, "poems"))
        assert await running == whole
        assert (await unloading)[0] == 200
        assert len(parent.adapters) == 1


async def test_an_adapter_takes_the_name_of_another_where_that_is_asked_for(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        await load(server, "sql", folder / "sql")
        status, body = await load(server, "sql", folder / "poems")
        assert (status, body["error"]["param"]) == (409, "lora_name")
        assert (await load(server, "sql", folder / "poems", load_inplace=True))[0] == 200
        assert await answer(server, "sql") == await text_of(server, wanted(folder, "poems"))


async def test_an_adapter_is_back_after_the_engine_was_killed(serve, folder, toml):
    async with serve(str(folder / "base"), toml=toml) as server:
        await load(server, "sql", folder / "sql")
        before = await answer(server, "sql")
        parent = server.runtime.pool.find("base")
        pid = parent.host.pid
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while parent.host is None or parent.host.pid == pid:
                await asyncio.sleep(0.02)
        assert await answer(server, "sql") == before


async def test_an_adapter_comes_back_with_a_model_that_was_evicted(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        await load(server, "sql", folder / "sql")
        before = await answer(server, "sql")
        pool = server.runtime.pool
        await pool._leave(pool.find("base"), "idle", "idle")
        assert pool.find("base").state == "unloaded"
        assert await answer(server, "sql") == before


async def test_what_does_not_fit_is_refused_and_nothing_has_changed(serve, folder, torch_toml):
    async with serve(str(folder / "base"), str(folder / "stranger"), toml=torch_toml) as server:
        # Its path is its base model's: `base` of two.
        status, body = await load(server, "sql", folder / "sql", base_model_name="nobody")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        status, body = await load(server, "no", folder / "base", base_model_name="base")
        assert (status, body["error"]["param"]) == (400, "lora_path")
        status, body = await load(server, "base", folder / "sql", base_model_name="base")
        assert (status, body["error"]["param"]) == (409, "lora_name")
        assert (await load(server, "sql", folder / "sql", base_model_name="base"))[0] == 200
        status, body = await load(server, "more", folder / "sql", base_model_name="sql")
        assert (status, body["error"]["param"]) == (400, "base_model_name")
        assert len(server.runtime.pool.find("base").adapters) == 1
        status, body = await server.post("/models/load", {"model": str(folder / "base"), "alias": "sql"})
        assert status == 409


async def test_a_path_over_http_must_be_in_the_operators_folders(serve, folder, torch_toml, tmp_path):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        status, body = await load(server, "sql", tmp_path)
        assert (status, body["error"]["param"]) == (403, "lora_path")


async def test_an_engine_that_takes_no_adapters_says_so(serve, folder, torch_toml):
    toml = torch_toml.replace('order = ["transformers"]', 'order = ["transformers", "echo"]')
    async with serve("echo:a", toml=toml) as server:
        status, body = await load(server, "sql", folder / "sql")
        assert status == 400
        assert "echo takes no LoRA adapters" in body["error"]["message"]
        assert not server.runtime.pool.find("echo:a").adapters


async def test_a_key_may_use_what_it_names_and_an_adapter_is_not_its_base(serve, folder, torch_toml):
    toml = torch_toml + '[middleware]\norder = ["auth", "cache"]\n'
    async with serve(str(folder / "base"), toml=toml, env={"HFMS_ADMIN_API_KEY": "root" * 12}) as server:
        admin = {"Authorization": f"Bearer {'root' * 12}"}
        body = {"lora_name": "sql", "lora_path": str(folder / "sql")}
        assert (await server.post("/v1/load_lora_adapter", body))[0] == 401
        asked = {"name": "a", "allowed_models": ["base"]}
        _, key = await server.post("/admin/keys/generate", asked, headers=admin)
        theirs = {"Authorization": f"Bearer {key['api_key']}"}
        assert (await server.post("/v1/load_lora_adapter", body, headers=theirs))[0] == 403
        assert (await server.post("/v1/unload_lora_adapter", {"lora_name": "sql"}, headers=theirs))[0] == 403
        assert (await server.post("/v1/load_lora_adapter", body, headers=admin))[0] == 200
        call = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        assert (await server.post("/v1/completions", call | {"model": "base"}, headers=theirs))[0] == 200
        assert (await server.post("/v1/completions", call | {"model": "sql"}, headers=theirs))[0] == 403
        _, listed = await server.get("/v1/models", headers=theirs)
        assert [row["id"] for row in listed["data"]] == ["base"]


async def test_answers_kept_of_a_base_are_not_its_adapters(serve, folder, torch_toml):
    toml = torch_toml + '[middleware]\norder = ["cache"]\n'
    async with serve(str(folder / "base"), toml=toml) as server:
        base = await answer(server, "base")
        await load(server, "sql", folder / "sql")
        assert await answer(server, "sql") != base
        asked = {"model": "sql", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        async with server.session.post(f"{server.url}/v1/completions", json=asked) as response:
            assert response.headers["x-cache"] == "hit"
            of_adapter = response.headers["x-hfms-receipt"]
        async with server.session.post(f"{server.url}/v1/completions", json=asked | {"model": "base"}) as response:
            assert response.headers["x-cache"] == "hit"
            assert response.headers["x-hfms-receipt"] != of_adapter
        async with server.session.get(f"{server.url}/metrics") as response:
            assert (
                'hfms_requests_total{endpoint="/v1/completions",model="sql",status="200"} 2.0' in await response.text()
            )


async def test_adapters_of_the_configuration_are_there_from_the_start(serve, folder, torch_toml):
    async with serve(str(folder / "base"), toml=torch_toml) as server:
        pool = server.runtime.pool
        modules = [read_module(f"sql={folder / 'sql'}"), read_module(f"torn={folder / 'base'}")]
        pool.adapters.preload(modules, [pool.find("base")])
        pool._preloaded = ["base"]
        assert pool.not_ready() == "the adapter sql is loading"
        await asyncio.wait(pool.adapters.begun.values())
        assert pool.not_ready() is None
        assert isinstance(await answer(server, "sql"), str)
        assert pool.adapters.begun["torn"].exception().param == "lora_path"


def test_modules_are_named_as_vllm_names_them():
    assert read_module("sql=org/sql") == Module("sql", "org/sql")
    told = '{"name": "sql", "path": "org/sql", "base_model_name": "org/base"}'
    assert read_module(told) == Module("sql", "org/sql", "org/base")


@pytest.mark.parametrize("text", ["sql", "=org/sql", "sql=", '{"name": "sql"}', '{"name": "a", "path": "b", "c": 1}'])
def test_a_module_that_names_no_adapter_stops_the_start(text):
    with pytest.raises(ConfigError, match="names no adapter"):
        read_module(text)
