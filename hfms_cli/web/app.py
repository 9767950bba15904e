"""The aiohttp application: what every request passes, whatever its route.

request id -> error envelope and access line -> the operator's middlewares -> handler
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware as AroundAll

from hfms_cli.errors import BadRequest, HfmsError, NotFound, Unauthorized
from hfms_cli.hookspecs import Middleware, begin_exchange
from hfms_cli.serving.runtime import Runtime, Serving
from hfms_cli.web import audio, docs, models, openai, openapi, responses, share, status, tokens
from hfms_cli.web.context import EXCHANGE, LOG, REQUEST_ID, RUNTIME, SERVING, caller_of, respond

log = structlog.get_logger("hfms.web")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")
CLIENT_GONE = 499
QUIET = ("/health", "/ready", "/metrics", "/ipfs/{cid}")
"""Asked so often that their lines are for debugging alone."""
ADDRESS = "X-Hfms-Address"
"""In requests that fronts pass on, and believed in no other: the client's address."""


def build_app(runtime: Runtime) -> web.Application:
    """The application, with the routes of hfms and of every plugin."""
    other_fronts = runtime.config.server.workers > 1
    app = base_app(runtime, *([_true_address] if other_fronts else []))
    app[RUNTIME] = runtime
    for module in (openai, models, status, tokens, openapi, docs):
        app.add_routes(module.routes)
    if runtime.config.server.metrics:
        app.router.add_get("/metrics", status.metrics)
    if runtime.config.server.share_models:
        share.add_routes(app, runtime)
    for middleware in runtime.middlewares:
        middleware.routes(app)
    runtime.plugins.call("hfms_routes", app)
    openapi.add_document(app)
    return app


def base_app(serving: Serving, *first: AroundAll) -> web.Application:
    """What every front has: the routes of calls, and all that a request passes on its way there."""
    app = web.Application(
        middlewares=[*first, _outermost, _operators_middlewares],
        client_max_size=serving.config.server.max_body_bytes,
    )
    app[SERVING] = serving
    app.add_routes(openai.calls)
    app.add_routes(responses.calls)
    app.add_routes(audio.calls)
    app.on_response_prepare.append(_add_headers)
    return app


@web.middleware
async def _true_address(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A request that another front passed on comes from where that front says."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None or connection.family != socket.AF_UNIX:
        return await handler(request)
    theirs = request.clone(remote=request.headers.get(ADDRESS, ""))
    response = await handler(theirs)
    # aiohttp sends the answer by the request that it made itself.
    request[REQUEST_ID], request[EXCHANGE] = theirs[REQUEST_ID], theirs[EXCHANGE]
    return response


@web.middleware
async def _outermost(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer gets an id, every error the envelope, every request one line in the log."""
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
    request[LOG] = {}
    request[EXCHANGE] = begin_exchange(request.headers)
    began = time.perf_counter()
    try:
        response = await handler(request)
    except (HfmsError, web.HTTPException) as exc:
        response = _error_response(request, exc)
    except (asyncio.CancelledError, ConnectionError):
        _account(request, CLIENT_GONE, began)
        raise
    except Exception:
        # The text may hold a prompt or a path: it is for the log and not for the caller.
        log.exception("request failed", request_id=request[REQUEST_ID], path=request.path)
        response = _error_response(request, HfmsError("The server had an error while processing your request."))
    _account(request, response.status, began)
    return response


@web.middleware
async def _operators_middlewares(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Fold the plugins' `http` around the handler, the first of [middleware] order outermost."""
    runtime = request.app[SERVING]
    for middleware in reversed(runtime.middlewares):
        if type(middleware).http is not Middleware.http:
            handler = partial(_blame, runtime, middleware, handler)
    return await handler(request)


async def _blame(
    runtime: Serving, middleware: Middleware, handler: Handler, request: web.Request
) -> web.StreamResponse:
    """A middleware's unexpected exceptions are counted under its name, those of what it wraps are not."""
    inner: list[BaseException] = []

    async def wrapped(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BaseException as exc:
            inner.append(exc)
            raise

    try:
        return await middleware.http(request, wrapped)
    except (HfmsError, web.HTTPException):
        raise
    except Exception as exc:
        if exc not in inner:
            runtime.metrics.plugin_errors.labels(middleware.name).inc()
        raise


def _error_response(request: web.Request, exc: HfmsError | web.HTTPException) -> web.StreamResponse:
    """OpenAI's envelope, with the headers that go with its status."""
    headers: dict[str, str] = {}
    if isinstance(exc, web.HTTPException):
        if exc.status < 400:
            return exc
        exc, headers = _from_aiohttp(request, exc)
    if exc.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(exc.retry_after)))
    if isinstance(exc, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    request[LOG]["error"] = exc.code
    metrics = request.app[SERVING].metrics
    metrics.errors.labels(_model_label(request), exc.code or exc.type).inc()
    return respond(exc.envelope(), status=getattr(exc, "http_status", exc.status), headers=headers)


class _PlainHttpError(HfmsError):
    """An error that aiohttp found, in our envelope."""

    type = "invalid_request_error"

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message, code=code)
        self.http_status = status


def _from_aiohttp(request: web.Request, exc: web.HTTPException) -> tuple[HfmsError, dict[str, str]]:
    match exc:
        case web.HTTPNotFound():
            return NotFound(f"Unknown URL ({request.method} {request.path}).", code="unknown_url"), {}
        case web.HTTPMethodNotAllowed():
            allow = ", ".join(sorted(exc.allowed_methods))
            text = f"Not allowed to {request.method} {request.path}; allowed: {allow}."
            return _PlainHttpError(405, text, "method_not_allowed"), {"Allow": allow}
        case web.HTTPRequestEntityTooLarge():
            limit = request.app[SERVING].config.server.max_body_bytes
            return _PlainHttpError(413, f"The body is longer than {limit} bytes.", "body_too_large"), {}
        case web.HTTPBadRequest():
            return BadRequest("The request could not be read.", code="bad_request"), {}
        case _:
            return _PlainHttpError(exc.status, exc.reason or "Error.", "http_error"), {}


def _account(request: web.Request, status_code: int, began: float) -> None:
    """The access line, and the counters that go with it."""
    runtime = request.app[SERVING]
    seconds = time.perf_counter() - began
    resource = request.match_info.route.resource
    endpoint = resource.canonical if resource is not None else "unknown"
    runtime.metrics.requests.labels(endpoint, _model_label(request), str(status_code)).inc()
    runtime.metrics.duration.labels(endpoint).observe(seconds)
    quiet = endpoint in QUIET and status_code < 500
    (log.debug if quiet else log.info)(
        "request",
        method=request.method,
        path=request.path,
        status=status_code,
        seconds=round(seconds, 4),
        request_id=request[REQUEST_ID],
        key=caller_of(request).key_id,
        **request[LOG],
    )


def _model_label(request: web.Request) -> str:
    """The model's id where it is served, else empty: what clients send must not become series."""
    asked = request[LOG].get("model")
    found = request.app[SERVING].pool.called(asked) if asked else None
    return found.id if found else ""


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """The request's id, and what middlewares want said. What a front passes on has those of the owner."""
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]
    if EXCHANGE in request:
        response.headers.update(request[EXCHANGE].answer)
