"""What can be asked."""

from __future__ import annotations

from hfms_cli.conformance.server import Server, segment
from hfms_cli.conformance.suite import check, expect


@check("models", "lists models, each with its id")
async def lists(server: Server) -> None:
    body = (await server.get("/v1/models")).ok()
    expect(body.get("object") == "list", f"`object` is {body.get('object')!r}")
    expect(body["data"] and all(isinstance(m.get("id"), str) for m in body["data"]), "a model has no `id`")


@check("models", "marks each entry as a model, with owner and time")
async def marks(server: Server) -> None:
    listed = (await server.get("/v1/models")).ok()["data"]
    expect(listed, "no model is listed")
    for model in listed:
        expect(model.get("object") == "model", f"`object` is {model.get('object')!r}")
        expect(isinstance(model.get("created"), int), f"`created` is {model.get('created')!r}")
        expect(isinstance(model.get("owned_by"), str), f"`owned_by` is {model.get('owned_by')!r}")


@check("models", "shows one model by its id")
async def shows(server: Server) -> None:
    body = (await server.get(f"/v1/models/{segment(server.model)}")).ok()
    expect(body.get("id") == server.model, f"`id` is {body.get('id')!r}")


@check("models", "answers 404 for a model that is not there")
async def unknown(server: Server) -> None:
    (await server.get("/v1/models/there-is-no-such-model")).refused(404)
