"""What handlers share: the runtime, who calls, what the access log will say, and how JSON goes out."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from hfms_cli.errors import Forbidden
from hfms_cli.hookspecs import Exchange, caller_key
from hfms_cli.serving.runtime import Runtime, Serving
from hfms_cli.types import Caller

RUNTIME = web.AppKey("runtime", Runtime)
SERVING: web.AppKey[Serving] = web.AppKey("serving")
"""What answers calls: in the owner of the models its `RUNTIME`, in a further front less."""
REQUEST_ID = web.RequestKey("request_id", str)
EXCHANGE = web.RequestKey("exchange", Exchange)
LOG: web.RequestKey[dict[str, Any]] = web.RequestKey("log", dict)

_encode = msgspec.json.Encoder().encode


def respond(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """JSON, encoded by msgspec."""
    return web.Response(body=_encode(body), status=status, headers=headers, content_type="application/json")


def log_of(request: web.Request) -> dict[str, Any]:
    """Fields of this request's access line. Never a prompt, an answer or a key."""
    return request[LOG]


def caller_of(request: web.Request) -> Caller:
    """Who calls: as the authenticating middleware says, else an anonymous caller with an address."""
    caller: Caller = request.get(caller_key(), Caller())
    return msgspec.structs.replace(caller, address=request.remote or "")


def require_admin(request: web.Request) -> None:
    """Admit administrators; where there are no keys, whoever sits at this machine. Raises Forbidden."""
    if request.app[RUNTIME].guarded:
        if not caller_of(request).admin:
            raise Forbidden("This key may not administer the server.", code="not_admin")
    elif not _from_here(request.remote):
        raise Forbidden(
            "Without keys the server can be administered from its own machine only: set HFMS_ADMIN_API_KEY.",
            code="not_admin",
        )


def _from_here(remote: str | None) -> bool:
    try:
        return ipaddress.ip_address(remote or "").is_loopback
    except ValueError:
        return False
