"""Loading and unloading at run time: `GET /models`, `POST /models/load`, `POST /models/unload`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from hfms_cli.errors import BadRequest, Forbidden
from hfms_cli.models import names
from hfms_cli.models.catalogue import Entry
from hfms_cli.models.loader import Wish
from hfms_cli.models.pool import NO_WISH, describe
from hfms_cli.types import Manifest
from hfms_cli.web import answers
from hfms_cli.web.body import parse
from hfms_cli.web.context import RUNTIME, caller_of, log_of, require_admin, respond
from hfms_cli.web.operation import operation
from hfms_cli.web.schemas import (
    LoadLoraAdapterRequest,
    LoadModelRequest,
    UnloadLoraAdapterRequest,
    UnloadModelRequest,
)

routes = web.RouteTableDef()


@routes.get("/models")
@operation("Models", answers.ModelStateList)
async def list_states(request: web.Request) -> web.StreamResponse:
    """Every model of the pool that the caller may use, and those on disk as `unloaded`."""
    runtime, caller = request.app[RUNTIME], caller_of(request)
    rows = [describe(m) for m in runtime.pool.models()]
    rows += [adapter.describe() for adapter in runtime.pool.adapters]
    seen = {row["id"] for row in rows}
    await runtime.pool.catalogue.refresh()
    rows += [_listed(entry) for entry in runtime.pool.catalogue.entries if entry.id not in seen]
    seen = {row["id"] for row in rows}
    for manifest in await runtime.router.list():
        if (model_id := names.served_id(manifest.name)) not in seen:
            rows.append(_on_disk(model_id, manifest))
    return respond({"object": "list", "data": [r for r in rows if caller.may_use(r["id"], *r["aliases"])]})


def _listed(entry: Entry) -> dict[str, Any]:
    row = {"id": entry.id, "status": {"value": "unloaded"}, "aliases": list(entry.aliases), "tasks": list(entry.tasks)}
    more = {"architecture": entry.architecture, "hardware": list(entry.hardware), "summary": entry.summary}
    return row | {key: value for key, value in more.items() if value}


def _on_disk(model_id: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "id": model_id,
        "status": {"value": "unloaded"},
        "aliases": [],
        "storage": manifest.storage,
        "revision": manifest.revision,
        "digest": manifest.digest,
        "disk_bytes": manifest.size,
    }


@routes.post("/models/load")
@operation(
    "Models",
    answers.ModelState,
    body=LoadModelRequest,
    example={"model": "org/name", "quantize": "int8"},
    also={202: answers.ModelState},
    errors=(403, 404, 409, 502, 503),
)
async def load(request: web.Request) -> web.StreamResponse:
    """Load a model. Administrators only.

    202 where `wait` is false: it is being loaded, and `GET /models` tells the progress.
    """
    require_admin(request)
    body = parse(LoadModelRequest, await request.read())
    log_of(request)["model"] = body.model
    runtime = request.app[RUNTIME]
    name = body.model
    if body.revision is not None:
        if "@" in name:
            raise BadRequest("Give the revision in the name or in `revision`, not in both.", param="revision")
        name = f"{name}@{body.revision}"
    await runtime.pool.catalogue.refresh()
    if runtime.pool.catalogue.find(name) is None:
        _refuse_foreign_path(name, runtime.config.models.folders)
    if body.draft_model is not None:
        _refuse_foreign_path(body.draft_model, runtime.config.models.folders, param="draft_model")
    wishes = _wishes(body, runtime.config.models.replicas)
    model = runtime.pool.begin(name, wishes, body.alias, pinned=body.pinned, idle_seconds=body.idle_seconds)
    if not body.wait:
        return respond(describe(model), status=202)
    await asyncio.shield(model.ready)
    return respond(describe(model))


@routes.post("/models/unload")
@operation("Models", answers.ModelState, body=UnloadModelRequest, example={"model": "org/name"}, errors=(403, 404))
async def unload(request: web.Request) -> web.StreamResponse:
    """Let the calls in flight of a model or of an adapter finish, and give back its memory. Administrators only."""
    require_admin(request)
    body = parse(UnloadModelRequest, await request.read())
    log_of(request)["model"] = body.model
    pool, drain_seconds = request.app[RUNTIME].pool, request.app[RUNTIME].config.server.drain_seconds
    unload = pool.adapters.unload if pool.adapters.find(body.model) else pool.unload
    model = await unload(body.model, drain_seconds)
    return respond({"id": model.id, "status": {"value": "unloaded"}})


@routes.post("/v1/load_lora_adapter")
@operation(
    "Models",
    answers.ModelState,
    body=LoadLoraAdapterRequest,
    example={"lora_name": "sql", "lora_path": "org/sql-adapter"},
    errors=(403, 404, 409, 502, 503),
)
async def load_lora_adapter(request: web.Request) -> web.StreamResponse:
    """Load a LoRA adapter beside its model, under a name of its own. Administrators only."""
    require_admin(request)
    body = parse(LoadLoraAdapterRequest, await request.read())
    log_of(request)["model"] = body.lora_name
    runtime = request.app[RUNTIME]
    _refuse_foreign_path(body.lora_path, runtime.config.models.folders, param="lora_path")
    adapter = await runtime.pool.adapters.load(
        body.lora_name, body.lora_path, body.base_model_name, replace=body.load_inplace
    )
    return respond(adapter.describe())


@routes.post("/v1/unload_lora_adapter")
@operation("Models", answers.ModelState, body=UnloadLoraAdapterRequest, example={"lora_name": "sql"}, errors=(403, 404))
async def unload_lora_adapter(request: web.Request) -> web.StreamResponse:
    """Serve an adapter no more; calls in flight finish with it. Administrators only."""
    require_admin(request)
    body = parse(UnloadLoraAdapterRequest, await request.read())
    log_of(request)["model"] = body.lora_name
    runtime = request.app[RUNTIME]
    adapter = await runtime.pool.adapters.unload(body.lora_name, runtime.config.server.drain_seconds)
    return respond({"id": adapter.id, "status": {"value": "unloaded"}, "parent": adapter.parent.id})


def _wishes(body: LoadModelRequest, usual: int) -> tuple[Wish, ...]:
    """One for each replica; none where the request says nothing of how the model is to run."""
    wish = Wish(
        device=body.hardware, engine=body.engine, dtype=body.dtype, quantize=body.quantize, draft=body.draft_model
    )
    if isinstance(body.replicas, list):
        return tuple(
            Wish(
                device=r.hardware or wish.device,
                engine=r.engine or wish.engine,
                dtype=r.dtype or wish.dtype,
                quantize=r.quantize or wish.quantize,
                draft=wish.draft,
            )
            for r in body.replicas
        )
    if body.replicas is None and wish == NO_WISH:
        return ()
    return (wish,) * (body.replicas or usual)


def _refuse_foreign_path(name: str, folders: list[str], param: str = "model") -> None:
    """A path that comes over HTTP must lie in a folder that the operator named."""
    parsed = names.parse(name)
    if parsed.scheme != "path":
        return
    path = Path(parsed.rest).resolve()
    if not any(path.is_relative_to(Path(f).expanduser().resolve()) for f in folders):
        raise Forbidden("Over HTTP only models in the folders of [models] folders can be loaded by path.", param=param)
