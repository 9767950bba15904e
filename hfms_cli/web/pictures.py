"""Images in chats, as clients send them: `data:` URLs. What they show is for the engine's process to decode.

Nothing is fetched. A server that fetches what its callers name can be sent to addresses that only it can reach.
"""

from __future__ import annotations

import binascii
import re
from typing import Any, Literal

from msgspec import Struct

from hfms_cli.errors import BadRequest
from hfms_cli.types import Picture

_DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)

Detail = Literal["auto", "low", "high"]


class ImageUrl(Struct, kw_only=True, forbid_unknown_fields=True):
    """An image: `data:image/png;base64,...`."""

    url: str
    detail: Detail | None = None
    """Only `auto`: the model's own files say how finely an image is looked at."""


def picture(url: str, param: str) -> Picture:
    """The image that a URL holds. param: the request's field that it came in. Raises BadRequest."""
    head = _DATA.match(url)
    if head is None:
        raise BadRequest(
            "An image must be a `data:` URL, as `data:image/png;base64,...`; this server fetches nothing from other"
            " addresses, so send the image itself.",
            param=param,
            code="invalid_image_url",
        )
    try:
        return Picture(binascii.a2b_base64(url[head.end() :], strict_mode=True), param)
    except ValueError:
        raise BadRequest("The image's data is not valid base64.", param=param, code="invalid_image") from None


def check_detail(detail: Detail | None, param: str) -> None:
    """Raises BadRequest."""
    if detail not in (None, "auto"):
        raise BadRequest(
            "The model's own files say how finely an image is looked at; leave `detail` out, or send `auto`.",
            param=param,
            code="unsupported_value",
        )


def content_of(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A message's content as templates take it: one text where it has no images, since few templates take parts."""
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)
