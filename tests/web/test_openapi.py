"""`/openapi.json` and `/docs`: they tell of every route, and what they tell is so."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import jsonschema
import msgspec
import openapi_spec_validator
import pytest
from aiohttp import web

from hfms_cli.web import schemas
from hfms_cli.web.app import build_app
from hfms_cli.web.docs import page
from hfms_cli.web.openapi import field_docs
from hfms_cli.web.operation import operation_of
from hfms_cli.web.responses import ResponsesRequest

ADMIN = {"X-API-Key": "k-0123456789abcdefghijkl"}
ALL_PLUGINS = '[middleware]\norder = ["auth", "rate_limit", "cache", "queue", "breaker"]'
GUARDED = {"toml": ALL_PLUGINS, "env": {"HFMS_ADMIN_API_KEY": ADMIN["X-API-Key"]}}


async def document_of(server) -> dict[str, Any]:
    status, document = await server.get("/openapi.json", headers=ADMIN)
    assert status == 200
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, routes in document["paths"].items():
        for method, about in routes.items():
            yield method.upper(), path, about


# The whole surface.


async def test_every_route_is_in_the_document_and_nothing_else(serve, with_plugin_route):
    async with serve(**GUARDED) as server:
        document = await document_of(server)
        routes = build_app(server.runtime).router.routes()
    # Every GET answers HEAD too.
    there = {(r.method, r.resource.canonical) for r in routes if r.method != "HEAD"}
    assert {(method, path) for method, path, _ in operations(document)} == there
    assert ("GET", "/third/party") in there


async def test_every_route_of_our_own_says_what_it_takes_and_answers(serve):
    async with serve(**GUARDED) as server:
        routes = [r for r in build_app(server.runtime).router.routes() if r.method != "HEAD"]
    silent = {f"{r.method} {r.resource.canonical}" for r in routes if operation_of(r.handler) is None}
    untold = {f"{r.method} {r.resource.canonical}" for r in routes if not inspect.getdoc(r.handler)}
    assert (silent, untold) == (set(), set())


async def test_the_document_is_openapi_3_1(serve):
    async with serve(**GUARDED) as server:
        document = await document_of(server)
    assert document["openapi"].startswith("3.1")
    openapi_spec_validator.validate(document)


async def test_every_example_is_what_its_route_takes(serve):
    async with serve(**GUARDED) as server:
        document = await document_of(server)
    told = 0
    for _, path, about in operations(document):
        if "requestBody" in about:
            (media,) = about["requestBody"]["content"].values()
            validate(media["example"], media["schema"], document, path)
            told += 1
    assert told == sum("requestBody" in about for _, _, about in operations(document)) > 8


async def test_errors_are_the_envelope_with_the_headers_that_go_with_them(serve):
    async with serve(**GUARDED) as server:
        document = await document_of(server)
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "403", "404", "413", "429", "500", "503", "504"} <= chat.keys()
    named = document["components"]["responses"]
    assert all("x-request-id" in r["headers"] for r in named.values())
    assert {s for s, r in named.items() if "Retry-After" in r["headers"]} == {"429", "503"}
    assert "WWW-Authenticate" in named["401"]["headers"]
    assert {"x-cache", "X-RateLimit-Limit", "X-RateLimit-Reset-Tokens"} <= chat["200"]["headers"].keys()


# Keys.


async def test_routes_that_ask_for_a_key_say_so_and_the_others_do_not(serve):
    async with serve(**GUARDED) as server:
        document = await document_of(server)
        for method, path, about in operations(document):
            status, _ = await server.request(method, re.sub(r"\{\w+\}", "a" * 12, path))
            assert (status == 401) == ("security" in about) == ("401" in about["responses"]), path
    schemes = document["components"]["securitySchemes"]
    assert [s["type"] for s in schemes.values()] == ["http", "apiKey"]


async def test_without_keys_none_is_demanded_and_without_auth_none_is_spoken_of(serve):
    async with serve() as server:
        guardless = await document_of(server)
    assert all({} in about["security"] for _, path, about in operations(guardless) if path not in ("/health", "/ready"))
    async with serve(toml="[middleware]\norder = []") as server:
        document = await document_of(server)
    assert "securitySchemes" not in document["components"]
    assert "/admin/keys/list" not in document["paths"]


# Requests.


@pytest.mark.parametrize("kind", [schemas.ChatRequest, schemas.CompletionRequest, ResponsesRequest])
async def test_what_is_not_served_yet_is_not_offered(serve, kind):
    async with serve() as server:
        document = await document_of(server)
    offered = document["components"]["schemas"][kind.__name__]["properties"].keys()
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    unserved = {name for name, field in fields.items() if field.type is Any}
    assert unserved
    assert offered == fields.keys() - unserved
    (path,) = (p for m, p, a in operations(document) if a.get("requestBody") and kind.__name__ in json.dumps(a))
    example = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    # A field that takes Any is one that is refused unless it asks for nothing.
    assert unserved <= msgspec.convert(example, kind).unsupported().keys()


async def test_fields_have_the_words_that_stand_below_them(serve):
    async with serve() as server:
        document = await document_of(server)
    assert field_docs(schemas.LoadModelRequest)["wait"].startswith("False: answer 202")
    wait = document["components"]["schemas"]["LoadModelRequest"]["properties"]["wait"]
    assert wait["description"].startswith("False: answer 202")


# Answers.


def strict(schema: Any) -> Any:
    """The same schema, in which an object has no field that is not named."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return closed | {key: strict(value) for key, value in schema.items()}


def validate(body: Any, schema: Any, document: dict[str, Any], where: str) -> None:
    whole = {"components": strict(document["components"]), **strict(schema)}
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(whole).iter_errors(body))
    assert error is None, f"{where}: {error.json_path}: {error.message}"


MESSAGES = [{"role": "user", "content": "one two"}]
CALLS = [
    ("POST", "/v1/chat/completions", {"model": "echo:a", "messages": MESSAGES, "n": 2}),
    ("POST", "/v1/completions", {"model": "echo:a", "prompt": ["one", "two"], "max_tokens": 1}),
    ("POST", "/v1/responses", {"model": "echo:a", "input": "one two"}),
    ("POST", "/tokenize", {"model": "echo:a", "prompt": "one two"}),
    ("POST", "/detokenize", {"model": "echo:a", "tokens": [1, 2]}),
    ("GET", "/tokenizer_info", None),
    ("POST", "/v1/embeddings", {"model": "echo:a", "input": ["one", "two"]}),
    ("POST", "/v1/embeddings", {"model": "echo:a", "input": "one", "encoding_format": "base64"}),
    ("POST", "/v1/rerank", {"model": "echo:a", "query": "q", "documents": ["a", "b"]}),
    ("POST", "/rerank", {"model": "echo:a", "query": "q", "documents": ["a"], "return_documents": False}),
    ("POST", "/v1/score", {"model": "echo:a", "text_1": "q", "text_2": ["a", "b"]}),
    ("POST", "/score", {"model": "echo:a", "text_1": "q", "text_2": "a"}),
    ("POST", "/v1/audio/transcriptions", {"model": "echo:a", "response_format": "verbose_json"}),
    ("POST", "/v1/audio/transcriptions", {"model": "echo:a", "response_format": "vtt"}),
    ("POST", "/v1/audio/translations", {"model": "echo:a"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/{id}", None),
    ("GET", "/models", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/status", None),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
    ("GET", "/docs", None),
    ("GET", "/admin/keys/list", None),
    ("GET", "/admin/keys/export", None),
    ("POST", "/admin/keys/import", {"keys": []}),
    ("GET", "/admin/keys/audit", None),
    ("GET", "/admin/cache/stats", None),
    ("GET", "/admin/queue/stats", None),
    ("POST", "/admin/cache/clear", None),
    ("POST", "/admin/keys/generate", {"name": "a"}),
    ("GET", "/admin/keys/{key_id}", None),
    ("POST", "/admin/keys/{key_id}/rotate", {"grace_seconds": 60}),
    ("POST", "/admin/keys/{key_id}/revoke", None),
    ("POST", "/models/load", {"model": "echo:b", "wait": False}),
    ("POST", "/models/unload", {"model": "echo:b"}),
    ("POST", "/models/load", {"model": "echo:b", "replicas": 2}),
    ("POST", "/models/unload", {"model": "echo:b"}),
]
WRONG = [
    ("POST", "/v1/chat/completions", {"model": "echo:a"}, 400),
    ("POST", "/v1/responses", {"model": "echo:a", "input": [{"type": "reasoning", "summary": []}]}, 400),
    ("POST", "/v1/chat/completions", {"model": "nobody:a", "messages": MESSAGES}, 404),
    ("GET", "/v1/models/nobody", None, 404),
    ("GET", "/admin/keys/aaaaaaaaaaaa", None, 404),
]
# What echo cannot do is held to the document where an engine does it: tests/models/test_lora.py.
WITH_ADAPTERS = {("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")}


def as_form(fields: dict[str, str]) -> aiohttp.FormData:
    form = aiohttp.FormData(fields)
    form.add_field("file", b"one two", filename="a.wav")
    return form


async def test_what_is_answered_is_what_the_document_says(serve):
    async with serve("echo:a", **GUARDED) as server:
        document = await document_of(server)
        filled = {"id": "echo:a"}
        for method, path, body in CALLS:
            url = server.url + path.format(**filled) if "{" in path else server.url + path
            sent = {"data": as_form(body)} if "/audio/" in path else {"json": body}
            async with server.session.request(method, url, headers=ADMIN, **sent) as response:
                said = document["paths"][path][method.lower()]["responses"][str(response.status)]
                text = await response.text()
                assert response.status < 300, f"{path}: {text}"
                (media,) = {response.content_type} & said["content"].keys()
                assert said["headers"].keys() & {"x-request-id"} <= {h.lower() for h in response.headers}
            if media == "application/json":
                answer = json.loads(text)
                validate(answer, said["content"][media]["schema"], document, path)
                if path == "/admin/keys/generate":
                    filled["key_id"] = answer["key_id"]
        for method, url, body, expected in WRONG:
            status, answer = await server.request(method, url, json=body, headers=ADMIN)
            assert status == expected
            validate(answer, {"$ref": "#/components/schemas/ErrorEnvelope"}, document, url)
    called = {(method, path) for method, path, _ in CALLS}
    assert called | WITH_ADAPTERS == {(method, path) for method, path, _ in operations(document)}


@pytest.mark.parametrize(
    "usage", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_event_of_a_stream_is_what_the_document_says(serve, path, usage):
    asked = {"messages": MESSAGES} if "chat" in path else {"prompt": "one two"}
    body = {"model": "echo:a", **asked, "stream": True, "stream_options": usage}
    async with serve("echo:a") as server:
        document = await document_of(server)
        async with server.session.post(server.url + path, json=body) as response:
            *events, last = re.findall(r"^data: (.*)$", await response.text(), re.MULTILINE)
    assert last == "[DONE]"
    media = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    for event in events:
        validate(json.loads(event), media["schema"]["properties"]["data"]["anyOf"][0]["contentSchema"], document, path)


# The page.


async def test_the_page_is_served_with_a_policy_that_lets_in_nothing_from_elsewhere(serve):
    async with serve() as server, server.session.get(server.url + "/docs") as response:
        html, policy = await response.text(), response.headers["Content-Security-Policy"]
        assert response.content_type == "text/html"
    assert html == page()[0]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "unsafe" not in policy
    assert not re.search(r"(?:https?:)?//[a-z]+\.|innerHTML|\son[a-z]+=|<link|src=", html)


@pytest.fixture
def with_plugin_route(monkeypatch):
    """A third party's plugin with a route that says nothing of itself."""
    import hfms_engines

    def hfms_routes(app: web.Application) -> None:
        async def third_party(request: web.Request) -> web.Response:
            return web.json_response({})

        app.router.add_get("/third/party", third_party)

    from hfms_cli import hookimpl

    monkeypatch.setattr(hfms_engines, "hfms_routes", hookimpl(hfms_routes), raising=False)
