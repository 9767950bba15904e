"""A form with a file in it (`multipart/form-data`), read into memory piece by piece up to a limit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from aiohttp import BodyPartReader, hdrs, http_exceptions, web

from hfms_cli.errors import BadRequest

MAX_FIELDS = 64
PIECE = 2**18


async def read_form(request: web.Request, files: Collection[str], limit: int) -> dict[str, Any]:
    """The fields by name: those named in `files` as bytes, the others as text, and as lists where a name ends in `[]`.

    limit: bytes of all fields together; beyond it HTTPRequestEntityTooLarge. Raises BadRequest for what is no form.
    """
    if request.content_type != "multipart/form-data":
        raise BadRequest("Send a form: multipart/form-data, with the recording in the field `file`.", code="not_a_form")
    if (request.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length or 0)
    found: dict[str, Any] = {}
    size = count = 0
    try:
        async for part in await request.multipart():
            count += 1
            if not isinstance(part, BodyPartReader) or not part.name or count > MAX_FIELDS:
                raise BadRequest(f"A form has up to {MAX_FIELDS} fields, each with a name of its own.", code="bad_form")
            if part.headers.get(hdrs.CONTENT_TRANSFER_ENCODING, "binary").lower() not in ("binary", "7bit", "8bit"):
                raise BadRequest("A field of a form comes as it is, in no transfer encoding.", param=part.name)
            value = bytearray()
            while piece := await part.read_chunk(PIECE):
                size += len(piece)
                if size > limit:
                    raise web.HTTPRequestEntityTooLarge(limit, size)
                value += piece
            _add(found, part.name, bytes(value) if part.name in files else _text(part.name, value))
    except (ValueError, AssertionError, EOFError, http_exceptions.HttpProcessingError) as exc:
        raise BadRequest("The form cannot be read: its parts are not as they should be.", code="bad_form") from exc
    return found


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    if name.endswith("[]"):
        found.setdefault(name, []).append(value)
    elif name in found:
        raise BadRequest(f"`{name}` is there twice.", param=name)
    else:
        found[name] = value


def _text(name: str, value: bytearray) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"`{name}` is not UTF-8.", param=name) from None
