"""A recording's file as sound: one channel, at the rate that the model wants. For worker processes only.

Files come from anybody. A few megabytes of FLAC can hold days of silence, so what is decoded is counted while it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy
import soundfile
import soxr

from hfms_cli import BadRequest

CONTAINERS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
# Numbers that are decoded between two pauses.
PIECE = 2**20
RATES = (1_000, 768_000)


def decoded(data: bytes, *, rate: int, longest: float) -> Iterator[Any]:
    """The sound in pieces, each float32 [samples] at `rate` a second.

    longest: seconds that it may have. Raises BadRequest.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in CONTAINERS or not RATES[0] <= file.samplerate <= RATES[1]:
                raise _not_sound()
            resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32")
            room = int(longest * file.samplerate)
            while True:
                piece = file.read(max(1, PIECE // file.channels), dtype="float32", always_2d=True)
                room -= len(piece)
                if room < 0:
                    raise BadRequest(
                        f"The recording is longer than {longest:g} s ([engine.speech] max_seconds); split it.",
                        param="file",
                        code="audio_too_long",
                    )
                if not numpy.isfinite(piece).all():
                    raise _not_sound()
                last = len(piece) == 0
                yield resampler.resample_chunk(piece.mean(axis=1), last=last)
                if last:
                    return
    except soundfile.SoundFileError as exc:
        raise _not_sound() from exc


def _not_sound() -> BadRequest:
    return BadRequest(
        "The file is no recording that can be decoded here; send WAV, FLAC, Ogg or MP3, whole.",
        param="file",
        code="invalid_audio",
    )
