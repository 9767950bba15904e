"""`GET /openapi.json`: OpenAPI 3.1, made from the route table and from the types that validate requests.

A route that a plugin adds is there too; `operation` is how it says more than its path. What a middleware changes of the
surface (keys, headers) it adds itself: `Middleware.document`.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import msgspec
from aiohttp import web

from hfms_cli.version import __version__
from hfms_cli.web.answers import ErrorEnvelope
from hfms_cli.web.context import RUNTIME, respond
from hfms_cli.web.operation import Operation, operation, operation_of

DOCUMENT: web.AppKey[Callable[[], dict[str, Any]]] = web.AppKey("openapi")
"""What is the same in every document of an application."""
JSON = "application/json"
FORM = "multipart/form-data"
REF = "#/components/schemas/{name}"

ERRORS = {
    400: "The request is wrong; `param` names the field.",
    403: "The caller may not do this, or not with this model.",
    404: "There is no such thing; of a model, close names are told.",
    409: "It is there already, and differs.",
    413: "The body is too long.",
    429: "Too much was asked; `Retry-After` says when to come again.",
    500: "The server or an engine failed.",
    502: "A source of models did not deliver.",
    503: "Not now: a model loads or failed, or the server shuts down; `Retry-After` says when to come again.",
    504: "The call's time was over before it could be answered.",
}
HEADERS = {
    "x-request-id": "The request's id: the client's `X-Request-Id` where that was a plain one.",
    "Retry-After": "Seconds.",
}
RETRY = (429, 503)

routes = web.RouteTableDef()


@routes.get("/openapi.json")
@operation("Server", dict[str, Any])
async def openapi(request: web.Request) -> web.StreamResponse:
    """This document."""
    same = await asyncio.to_thread(request.app[DOCUMENT])  # the first time reads source files
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(same))
    for middleware in request.app[RUNTIME].middlewares:
        middleware.document(document)
    return respond(document)


def add_document(app: web.Application) -> None:
    """Let `GET /openapi.json` know the routes; it is made when it is first asked for, and then kept."""
    made: Callable[[], dict[str, Any]] = cache(lambda: build(app))
    app[DOCUMENT] = made


def build(app: web.Application) -> dict[str, Any]:
    """The document of all routes that the application has."""
    found = [(route, operation_of(route.handler)) for route in _routes(app)]
    said = [o for _, o in found if o is not None]
    schemas = _schemas((o.body for o in said), sent=True) | _schemas(
        [ErrorEnvelope, *(t for o in said for t in (o.answer, o.events, *o.also.values()))], sent=False
    )
    paths: dict[str, dict[str, Any]] = {}
    for route, about in found:
        path = route.resource.canonical if route.resource else ""
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, about)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hfms",
            "version": __version__,
            "description": "The Hugging Face model server: OpenAI's API for the models on your own machines.",
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(o.tag for o in said)],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {str(status): _error(status) for status in ERRORS},
            "headers": {
                name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()
            },
        },
    }  # fmt: skip


def _routes(app: web.Application) -> Iterator[web.AbstractRoute]:
    """Every route but HEAD, which each GET answers too, and `*`, which names no method."""
    return (route for route in app.router.routes() if route.method not in ("HEAD", "*"))


def _operation(route: web.AbstractRoute, path: str, about: Operation | None) -> dict[str, Any]:
    summary, _, description = (inspect.getdoc(route.handler) or f"{route.method} {path}").partition("\n\n")
    entry: dict[str, Any] = {
        "summary": " ".join(summary.split()).rstrip("."),
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
    }
    if description:
        entry["description"] = description
    about = about or Operation("Plugins", None)
    entry["tags"] = [about.tag]
    parameters = [*_of_path(route), *_of_query(about), *_of_headers(about)]
    if parameters:
        entry["parameters"] = parameters
    statuses = {*about.errors, 500}
    if about.query is not None:
        statuses.add(400)
    if about.body is not None:
        media: dict[str, Any] = {"schema": _schema_of(about.body)}
        if about.example is not None:
            media["example"] = about.example
        entry["requestBody"] = {"required": about.body_required, "content": {FORM if about.form else JSON: media}}
        statuses |= {400, 413}
    responses = {"200": _good(200, about.answer, about.events)}
    responses["200"].setdefault("content", {}).update({kind: {"schema": {"type": "string"}} for kind in about.texts})
    responses |= {str(status): _good(status, kind, None) for status, kind in about.also.items()}
    for name, text in about.tells.items():
        responses["200"]["headers"][name] = {"description": text, "schema": {"type": "string"}}
    entry["responses"] = responses | {str(s): {"$ref": f"#/components/responses/{s}"} for s in sorted(statuses)}
    return entry


def _of_path(route: web.AbstractRoute) -> Iterator[dict[str, Any]]:
    """The variable parts of a path, with what aiohttp lets in."""
    pattern = route.resource.get_info().get("pattern") if route.resource else None
    if pattern is None:
        return
    within = dict(re.findall(r"\(\?P<(\w+)>([^()]+)\)", pattern.pattern))
    for name in pattern.groupindex:
        schema = {"type": "string", "minLength": 1}
        if name in within:
            schema["pattern"] = f"^{within[name]}$"
        yield {"name": name, "in": "path", "required": True, "schema": schema}


def _of_query(about: Operation) -> Iterator[dict[str, Any]]:
    if about.query is not None:
        schema = next(iter(_schemas([about.query], sent=True).values()))
        for name, kind in schema["properties"].items():
            yield {"name": name, "in": "query", "required": name in schema["required"], "schema": kind}


def _of_headers(about: Operation) -> Iterator[dict[str, Any]]:
    for name, kind in about.headers.items():
        yield {"name": name, "in": "header", "schema": _schema_of(kind)}


def _good(status: int, kind: Any, events: Any) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(kind, str):
        content[kind] = {"schema": {"type": "string"}}
    elif kind is not None:
        content[JSON] = {"schema": _schema_of(kind)}
    if events is not None:
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "description": "An event, with `stream: true`; that of chats and completions ends with `[DONE]`.",
                "properties": {
                    "data": {
                        "anyOf": [
                            {"type": "string", "contentMediaType": JSON, "contentSchema": _schema_of(events)},
                            {"const": "[DONE]"},
                        ]
                    }
                },
                "required": ["data"],
            }
        }
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase, "headers": _headers("x-request-id")}
    return answer | ({"content": content} if content else {})


def _error(status: int) -> dict[str, Any]:
    names = ("x-request-id", "Retry-After") if status in RETRY else ("x-request-id",)
    return {
        "description": ERRORS[status],
        "headers": _headers(*names),
        "content": {JSON: {"schema": _schema_of(ErrorEnvelope)}},
    }


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


# Types as JSON Schema.


@cache
def _schema_of(kind: Any) -> dict[str, Any]:
    return msgspec.json.schema_components([kind], ref_template=REF)[0][0]


def _schemas(kinds: Iterable[Any], *, sent: bool) -> dict[str, Any]:
    """Schemas by name, each field with the docstring that follows it.

    sent: they are of requests, where a field that takes `Any` is one that is known and not served yet.
    """
    types = [k for k in kinds if k is not None and not isinstance(k, str)]
    schemas = msgspec.json.schema_components(types, ref_template=REF)[1]
    docs = {cls.__name__: field_docs(cls) for cls in _structs(types)}
    for name, schema in schemas.items():
        fields: dict[str, Any] = schema.get("properties", {})
        required = schema.get("required", [])
        for field, about in list(fields.items()):
            if about.get("default", 0) is None:
                del about["default"]  # what a missing field means is not `null`
            if sent and not about and field not in required:
                del fields[field]
            elif sent and about.pop("contentEncoding", None):  # bytes come as the file of a form
                fields[field] = about | {"format": "binary", "description": docs.get(name, {}).get(field, "A file.")}
            elif text := docs.get(name, {}).get(field):
                fields[field] = about | {"description": text}
    return schemas


def _structs(kinds: Iterable[Any]) -> set[type[msgspec.Struct]]:
    """Every Struct that types are made of."""
    found: set[type[msgspec.Struct]] = set()

    def walk(node: Any) -> None:
        if isinstance(node, msgspec.inspect.StructType):
            if node.cls in found:
                return
            found.add(node.cls)
        if isinstance(node, msgspec.inspect.Type | msgspec.inspect.Field):
            for name in node.__struct_fields__:
                walk(getattr(node, name))
        elif isinstance(node, tuple):
            for item in node:
                walk(item)

    walk(msgspec.inspect.multi_type_info(kinds))
    return found


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The strings that stand below a class's fields, those of its bases too."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(msgspec.Struct)]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a class that has no file
            continue
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for one, after in pairwise(body):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
                docs[one.target.id] = inspect.cleandoc(str(ast.literal_eval(after.value)))
    return docs
