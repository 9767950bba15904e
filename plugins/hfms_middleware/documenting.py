"""What several middlewares add to `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def say_headers(document: dict[str, Any], headers: Mapping[str, str]) -> None:
    """Add headers, each with a sentence, to the answers of all calls."""
    for routes in document["paths"].values():
        for operation in routes.values():
            if "Inference" in operation["tags"]:
                said = operation["responses"]["200"]["headers"]
                said |= {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()}
