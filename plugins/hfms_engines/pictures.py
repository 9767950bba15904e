"""An image's file as pixels. For worker processes only.

Files come from anybody. A few kilobytes of PNG can hold a thousand million pixels, so the size that a file claims to
have is looked at before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from hfms_cli import BadRequest, Picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
LONGEST = 200
"""Times its other side that an image may be long: some models scale the shorter one to a size of theirs."""


@dataclass(frozen=True)
class Bounds:
    """What the images of a call may come to."""

    count: int
    pixels: int
    """Of all together."""
    bytes: int
    """Of each one's file."""

    def check(self, pictures: Sequence[Picture]) -> None:
        """Raises BadRequest for what is plain without decoding."""
        if len(pictures) > self.count:
            raise BadRequest(
                f"There are {len(pictures)} images, and this server takes {self.count} in a chat ([engine.vision]"
                " max_images).",
                param=pictures[self.count].param,
                code="too_many_images",
            )
        for picture in pictures:
            if len(picture.data) > self.bytes:
                raise _too_large(f"its file has more than {self.bytes} bytes", "max_image_bytes", picture)

    def _too_many_pixels(self, picture: Picture) -> BadRequest:
        return _too_large(f"a chat's images may have {self.pixels} pixels together", "max_image_pixels", picture)

    def decoded(self, pictures: Sequence[Picture]) -> list[Any]:
        """The images as PIL has them: RGB, upright; of several frames the first. Raises BadRequest."""
        images: list[Any] = []
        room = self.pixels
        for picture in pictures:
            images.append(self._decoded(picture, room))
            room -= images[-1].width * images[-1].height
        return images

    def _decoded(self, picture: Picture, room: int) -> Any:
        """room: pixels that it may have."""
        try:
            with Image.open(io.BytesIO(picture.data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > room:
                    raise self._too_many_pixels(picture)
                if max(width, height) > LONGEST * min(width, height):
                    raise BadRequest(
                        f"One side of the image is more than {LONGEST} times as long as the other.",
                        param=picture.param,
                        code="invalid_image",
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
        except (BadRequest, MemoryError):
            raise
        except Image.DecompressionBombError as exc:
            raise self._too_many_pixels(picture) from exc
        except Exception as exc:  # whatever a decoder stumbles over
            raise BadRequest(
                "This is no image that can be decoded here; send PNG, JPEG, WebP or GIF, whole.",
                param=picture.param,
                code="invalid_image",
            ) from exc


def _too_large(why: str, setting: str, picture: Picture) -> BadRequest:
    return BadRequest(
        f"The image is too large: {why} ([engine.vision] {setting}); send a smaller one.",
        param=picture.param,
        code="image_too_large",
    )
