"""Loading and unloading at run time."""

from __future__ import annotations

import asyncio

import psutil

from hfms_cli.ipfs import parse

CHAT = {"model": "echo:a", "messages": [{"role": "user", "content": "hi"}]}


async def test_load_and_unload_over_http_change_what_is_served(serve):
    async with serve() as server:
        status, body = await server.post("/models/load", {"model": "echo:a", "alias": "small", "hardware": "cpu"})
        assert (status, body["status"]["value"], body["device"]) == (200, "loaded", "cpu")
        assert (await server.post("/v1/chat/completions", CHAT | {"model": "small"}))[0] == 200
        pid = body["pid"]
        _, listed = await server.get("/models")
        assert [(m["id"], m["status"]["value"], m["aliases"]) for m in listed["data"]] == [
            ("echo:a", "loaded", ["small"])
        ]
        status, body = await server.post("/models/unload", {"model": "small"})
        assert (status, body) == (200, {"id": "echo:a", "status": {"value": "unloaded"}})
        assert not psutil.pid_exists(pid)
        status, body = await server.post("/v1/chat/completions", CHAT)
        assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_concurrent_loads_of_one_model_are_one_process(serve):
    async with serve() as server:
        answers = await asyncio.gather(*(server.post("/models/load", {"model": "echo:a"}) for _ in range(5)))
        assert {status for status, _ in answers} == {200}
        assert len({body["pid"] for _, body in answers}) == 1


async def test_where_calls_do_not_wait_for_a_load_they_get_503_until_it_is_done(serve):
    async with serve(toml="[models]\nload_wait_seconds = 0") as server:
        status, body = await server.post("/models/load", {"model": "echo:a", "wait": False})
        assert (status, body["status"]["value"]) == (202, "loading")
        async with server.session.post(server.url + "/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
            assert (await response.json())["error"]["code"] == "model_loading"
        await server.runtime.pool.find("echo:a").ready
        assert (await server.post("/v1/chat/completions", CHAT))[0] == 200


async def test_a_path_over_http_must_lie_in_a_folder_of_the_operator(serve, tmp_path):
    (tmp_path / "open").mkdir()
    async with serve(toml=f'[models]\nfolders = ["{tmp_path}/open"]') as server:
        for path in (f"{tmp_path}/secret", f"{tmp_path}/open/../secret", "/etc"):
            status, body = await server.post("/models/load", {"model": path})
            assert (status, body["error"]["param"]) == (403, "model")
        status, body = await server.post("/models/load", {"model": f"{tmp_path}/open/nothing"})
        assert status in (404, 503)


async def test_an_unknown_device_engine_or_model_is_named(serve):
    async with serve() as server:
        status, body = await server.post("/models/load", {"model": "echo:a", "hardware": "abacus"})
        assert (status, body["error"]["param"]) == (400, "device")
        status, body = await server.post("/models/load", {"model": "echo:b", "engine": "steam"})
        assert (status, body["error"]["param"]) == (400, "engine")
        status, body = await server.post("/models/load", {"model": "--help"})
        assert (status, body["error"]["param"]) == (400, "model")
        status, body = await server.post("/models/unload", {"model": "echo:zzz"})
        assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_failed_load_shows_its_reason_and_can_be_tried_again(serve, tmp_path):
    folder = tmp_path / "models" / "broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")  # torn in its header
    async with serve(toml=f'[models]\nfolders = ["{tmp_path}/models"]') as server:
        status, body = await server.post("/models/load", {"model": str(folder)})
        assert status == 503
        assert body["error"]["code"] == "load_failed"
        _, listed = await server.get("/models")
        (row,) = listed["data"]
        assert row["status"]["value"] == "failed"
        assert row["status"]["reason"]
        assert (await server.post("/models/load", {"model": str(folder)}))[0] == 503


async def test_unloading_waits_for_the_call_in_flight(serve):
    async with serve("echo:a", toml="[engine.echo]\nstep_ms = 5") as server:
        call = asyncio.create_task(
            server.post("/v1/completions", {"model": "echo:a", "prompt": "w " * 40, "max_tokens": 40})
        )
        model = server.runtime.pool.find("echo:a")
        async with asyncio.timeout(10):
            while not model.leases:
                await asyncio.sleep(0.01)
        status, _ = await server.post("/models/unload", {"model": "echo:a"})
        assert status == 200
        status, body = await call
        assert (status, body["usage"]["completion_tokens"]) == (200, 40)


async def test_status_tells_how_each_source_of_what_has_a_cid_is(serve):
    async with serve("echo:a", toml='[storage]\norder = ["echo", "hf_cache", "kubo"]') as server:
        cid, _ = await server.runtime.router.content.add_bytes(b"x", pin=False)
        await server.runtime.router.content.fetch().get(parse(cid))
        _, status = await server.get("/status")
        assert status["storage"] == {
            "order": ["echo", "hf_cache", "kubo"],
            "content": [
                {"name": "hf_cache", "failures": 0, "error": None, "served_blocks": 1, "served_bytes": 1},
                {"name": "kubo", "failures": 0, "error": None, "served_blocks": 0, "served_bytes": 0},
            ],
        }
        async with server.session.get(f"{server.url}/metrics") as response:
            told = await response.text()
        assert 'operation="add_bytes"' in told
        assert 'hfms_storage_bytes_total{backend="hf_cache"} 1.0' in told
        assert cid.startswith("bafkrei")


async def test_a_model_tells_how_long_each_phase_of_its_load_took(serve):
    async with serve() as server:
        _, row = await server.post("/models/load", {"model": "echo:a"})
        assert list(row["load_phases"]) == ["fetch", "verify", "start", "load", "warm-up"]
        assert row["load_phases"]["start"] + row["load_phases"]["load"] <= row["load_seconds"] + 0.01
        assert "phase" not in row["status"]  # it is over
