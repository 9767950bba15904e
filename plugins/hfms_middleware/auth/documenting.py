"""What keys change of `/openapi.json`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of this server."},
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key, where no `Authorization` is sent.",
    },
}


def document_keys(document: dict[str, Any], open_paths: Collection[str], *, needed: bool) -> None:
    """Say where a key is sent, and what becomes of who has none. needed: there are keys, so one is asked for."""
    components = document["components"]
    components["securitySchemes"] = SCHEMES
    components["headers"]["WWW-Authenticate"] = {"description": "`Bearer`.", "schema": {"type": "string"}}
    refusal = components["responses"]["403"]
    components["responses"]["401"] = refusal | {
        "description": "There is no key, or it is not a good one.",
        "headers": refusal["headers"] | {"WWW-Authenticate": {"$ref": "#/components/headers/WWW-Authenticate"}},
    }
    for path, routes in document["paths"].items():
        if path in open_paths:
            continue
        for operation in routes.values():
            operation["security"] = [*([] if needed else [{}]), *({name: []} for name in SCHEMES)]
            # 429: too many wrong keys; 503: the store of keys does not answer.
            refusals = {str(s): {"$ref": f"#/components/responses/{s}"} for s in (401, 429, 503)}
            operation["responses"] = dict(sorted((operation["responses"] | refusals).items()))
