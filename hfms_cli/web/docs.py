"""`GET /docs`: a page that renders `/openapi.json` and can send requests. One file, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from aiohttp import web

from hfms_cli.web.operation import operation

routes = web.RouteTableDef()


@routes.get("/docs")
@operation("Server", "text/html")
async def docs(request: web.Request) -> web.StreamResponse:
    """The API as a page for people."""
    html, policy = page()
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return web.Response(text=html, content_type="text/html", headers=headers)


@cache
def page() -> tuple[str, str]:
    """The page, and the policy that lets run what is in it and nothing else."""
    html = files(__package__).joinpath("docs.html").read_text(encoding="utf-8")
    script, style = (_hash(html, name) for name in ("script", "style"))
    return html, (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(html: str, element: str) -> str:
    (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
