"""A short call right after a load, so that the first caller does not pay for what an engine does once.

It goes to the engine as any call does, and so it warms whatever a call needs, of whatever engine.
"""

from __future__ import annotations

import asyncio
import io
import struct
import wave
import zlib

import structlog

from hfms_cli.engines.host import EngineHost
from hfms_cli.errors import BadRequest, HfmsError, LoadFailed
from hfms_cli.types import Call, CallInput, Conversation, Pair, Picture, Sampling, Speech, Task

log = structlog.get_logger("hfms.models")

TEXT = "The quick brown fox jumps over the lazy dog."
TOKENS = 2
"""One is made by the pass that reads the prompt, and the next one by a pass of its own."""


async def warm_up(host: EngineHost, seconds: float) -> None:
    """Have the engine answer a call of each kind that it takes; where it cannot, end it.

    seconds: the longest time that this may take. Raises LoadFailed.
    """
    try:
        async with asyncio.timeout(seconds):
            for task in host.info.tasks:
                await _answered(host, task)
    except TimeoutError:
        await host.kill("the warm-up took too long")
        raise LoadFailed(
            f"{host.model} did not answer a first call within {seconds:g} s ([models] load_seconds)"
        ) from None
    except HfmsError as exc:
        await host.close()
        raise LoadFailed(f"{host.model} could not answer a first call: {exc.message}") from exc
    except BaseException:
        await host.kill("the load was cancelled")
        raise


async def _answered(host: EngineHost, task: Task) -> None:
    asked: CallInput = TEXT
    if task == "score":
        asked = Pair(TEXT, TEXT)
    elif task == "transcribe":
        asked = Speech(data=_silence())
    elif task == "image-text-to-text":
        content = [{"type": "image"}, {"type": "text", "text": TEXT}]
        asked = Conversation(messages=[{"role": "user", "content": content}], pictures=[Picture(_grey(), "messages")])
    sampling = Sampling(max_tokens=TOKENS, temperature=0.0)
    done: Task = "generate" if task == "image-text-to-text" else task
    try:
        async for _ in host.submit(
            Call(id=f"warm-up-{task}", model=host.model, task=done, inputs=[asked], sampling=sampling)
        ):
            continue
    except BadRequest as exc:  # a model that takes other texts than this one
        log.info("no warm-up", model=host.model, task=task, reason=exc.message)


def _silence() -> bytes:
    """A second of it, as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(32_000))
    return file.getvalue()


def _grey(size: int = 64) -> bytes:
    """A grey square, as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * size) * size
    head = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
