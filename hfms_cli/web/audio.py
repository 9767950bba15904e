"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`: a recording in, what is said in it out.

form -> a call with the recording -> segments, one a chunk -> JSON, text, subtitles, or events
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType

from hfms_cli.errors import BadRequest
from hfms_cli.types import Call, Caller, Chunk, Recording, Sampling, Segment, Speech
from hfms_cli.web import answers
from hfms_cli.web.body import parse_fields
from hfms_cli.web.calling import CALL, answered, call_of
from hfms_cli.web.context import SERVING, log_of, respond
from hfms_cli.web.form import read_form
from hfms_cli.web.operation import operation
from hfms_cli.web.schemas import Priority, refuse_unsupported
from hfms_cli.web.sse import EventStream, encode

calls = web.RouteTableDef()

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
MEDIA: dict[str, str] = {"text": "text/plain", "srt": "text/plain", "vtt": "text/vtt"}
"""Of the formats that are not JSON."""
LISTS = ("timestamp_granularities", "include", "known_speaker_names", "known_speaker_references")
"""Fields whose names end in `[]` on the way."""


class TranslationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of `POST /v1/audio/translations`. Every field of a form is text, so none can be null."""

    file: bytes
    """WAV, FLAC, Ogg or MP3; its name means nothing."""
    model: str
    prompt: str | UnsetType = UNSET
    """What was said before, or words that are to be spelt so."""
    response_format: Format = "json"
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.0
    priority: Priority | None = None

    def call(self, call_id: str, caller: Caller) -> Call:
        return self._call(call_id, caller, translate=True)

    def _call(self, call_id: str, caller: Caller, *, language: str | None = None, translate: bool = False) -> Call:
        if not self.file:
            raise BadRequest("The file is empty.", param="file", code="invalid_audio")
        speech = Speech(
            data=self.file,
            language=language,
            prompt=self.prompt or "",
            translate=translate,
            details=self.response_format == "verbose_json",
        )
        sampling = Sampling(temperature=self.temperature)
        return Call(id=call_id, model=self.model, task="transcribe", inputs=[speech], sampling=sampling, caller=caller)


class TranscriptionRequest(
    TranslationRequest,
    kw_only=True,
    forbid_unknown_fields=True,
    rename=lambda name: f"{name}[]" if name in LISTS else None,
):
    """The form of `POST /v1/audio/transcriptions`."""

    language: str | UnsetType = UNSET
    """That is spoken: `en`, or `english`. Without it the model finds out."""
    timestamp_granularities: list[Literal["segment", "word"]] | UnsetType = UNSET
    stream: Literal["true", "false", "True", "False"] = "false"
    """Events, a segment each, as they are heard; with `json` and `text`."""
    # Not served yet: only the value that asks for nothing is taken.
    include: Any = None
    known_speaker_names: Any = None
    known_speaker_references: Any = None
    chunking_strategy: Any = None

    @property
    def streams(self) -> bool:
        return self.stream in ("true", "True")

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        return dict.fromkeys(("include", "known_speaker_names", "known_speaker_references"), (None, [])) | {
            "chunking_strategy": (None,)
        }

    def call(self, call_id: str, caller: Caller) -> Call:
        refuse_unsupported(self)
        granularities = self.timestamp_granularities
        if granularities and self.response_format != "verbose_json":
            raise BadRequest(
                "`timestamp_granularities[]` needs `response_format: verbose_json`.",
                param="timestamp_granularities[]",
            )
        if granularities and "word" in granularities:
            raise BadRequest(
                "Times of single words are not supported; ask for `segment`.",
                param="timestamp_granularities[]",
                code="unsupported_value",
            )
        if self.streams and self.response_format not in ("json", "text"):
            raise BadRequest(
                f"`{self.response_format}` cannot be streamed; ask for `json` or `text`.", param="response_format"
            )
        return self._call(call_id, caller, language=self.language or None)


@calls.post("/v1/audio/transcriptions")
@operation(
    "Inference",
    answers.Transcription,
    body=TranscriptionRequest,
    form=True,
    texts=("text/plain", "text/vtt"),
    events=answers.TranscriptEvent,
    example={"model": "org/name", "file": "the bytes of a recording"},
    **CALL,
)
async def transcriptions(request: web.Request) -> web.StreamResponse:
    """Write down what is said in a recording."""
    return await _answer(request, TranscriptionRequest)


@calls.post("/v1/audio/translations")
@operation(
    "Inference",
    answers.Transcription,
    body=TranslationRequest,
    form=True,
    texts=("text/plain", "text/vtt"),
    example={"model": "org/name", "file": "the bytes of a recording"},
    **CALL,
)
async def translations(request: web.Request) -> web.StreamResponse:
    """Write down in English what is said in a recording."""
    return await _answer(request, TranslationRequest)


async def _answer(
    request: web.Request, kind: type[TranslationRequest] | type[TranscriptionRequest]
) -> web.StreamResponse:
    limit = request.app[SERVING].config.server.max_body_bytes
    body = parse_fields(kind, await read_form(request, ("file",), limit))
    call = call_of(request, body, "trsc")
    transcript = Transcript(call)
    stream = TranscriptStream(request) if isinstance(body, TranscriptionRequest) and body.streams else None
    async with answered(request, call) as chunks:
        if stream is not None:
            try:
                with stream.telling_errors():
                    async for chunk in chunks:
                        await stream.send(*transcript.take(chunk), more=chunk.more)
                    await stream.send(transcript.done(), more=True)
            finally:
                stream.rest()
                log_of(request).update(transcript.log())
            return await stream.close()
        async for chunk in chunks:
            transcript.take(chunk)
    log_of(request).update(transcript.log())
    wanted = body.response_format
    if wanted in MEDIA:
        return web.Response(text=transcript.written(wanted), content_type=MEDIA[wanted])
    return respond(transcript.whole(verbose=wanted == "verbose_json"))


class TranscriptStream(EventStream):
    """Events that say by themselves what they are."""

    def __init__(self, request: web.Request) -> None:
        keep_alive = request.app[SERVING].config.server.keep_alive_seconds
        super().__init__(request, dict, keep_alive_seconds=keep_alive)

    def encoded(self, event: dict[str, Any]) -> bytes:
        return b"data: %b\n\n" % encode(event)


@dataclass
class Transcript:
    """What was heard so far, and the shapes that it is told in."""

    call: Call
    segments: list[Segment] = field(default_factory=list)
    recording: Recording = Recording(0.0)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def take(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds to a stream."""
        self.prompt_tokens += chunk.prompt_tokens
        self.completion_tokens += chunk.tokens
        self.recording = chunk.recording or self.recording
        if chunk.segment is None:
            return []
        began = bool(self.text())
        self.segments.append(chunk.segment)
        delta = chunk.segment.text if began else chunk.segment.text.lstrip()
        return [{"type": "transcript.text.delta", "delta": delta}] if delta else []

    def done(self) -> dict[str, Any]:
        """The last event of a stream."""
        return {"type": "transcript.text.done", "text": self.text(), "usage": self.usage()}

    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()

    def usage(self) -> dict[str, Any]:
        return {"type": "duration", "seconds": self.recording.seconds}

    def log(self) -> dict[str, Any]:
        """What the access line says of it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "audio_seconds": self.recording.seconds,
        }

    def whole(self, *, verbose: bool) -> dict[str, Any]:
        """The JSON of an answer."""
        if not verbose:
            return {"text": self.text(), "usage": self.usage()}
        (speech,) = self.call.inputs
        assert isinstance(speech, Speech)
        return {
            "task": "translate" if speech.translate else "transcribe",
            "language": "english" if speech.translate else self.recording.language,
            "duration": self.recording.seconds,
            "text": self.text(),
            "segments": [self._segment(i, segment) for i, segment in enumerate(self.segments)],
            "usage": self.usage(),
        }

    def _segment(self, number: int, segment: Segment) -> dict[str, Any]:
        told = {name: getattr(segment, name) for name in segment.__struct_fields__}
        return {"id": number, "temperature": self.call.sampling.temperature} | told

    def written(self, format: str) -> str:
        """The text, or subtitles: `srt` or `vtt`."""
        if format == "text":
            return self.text() + "\n"
        mark = "," if format == "srt" else "."
        blocks = ["WEBVTT"] if format == "vtt" else []
        for number, segment in enumerate(self.segments, 1):
            times = f"{_clock(segment.start, mark)} --> {_clock(segment.end, mark)}"
            # A line that looks like one of times would end the block that it is in.
            text = segment.text.strip().replace("-->", "->")
            blocks.append("\n".join([*([str(number)] if format == "srt" else []), times, text]))
        return "\n\n".join(blocks) + "\n\n"


def _clock(seconds: float, mark: str) -> str:
    """`01:02:03,004`"""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
