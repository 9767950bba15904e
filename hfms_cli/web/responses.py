"""`POST /v1/responses`: OpenAI's newer API over the same road. Nothing is stored, so all of a dialogue comes each time.

items -> a conversation -> chunks -> items, told as one object or event by event
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from aiohttp import web
from msgspec import Meta, Struct

from hfms_cli.errors import BadRequest, HfmsError
from hfms_cli.parsing import Arguments, CallBegins, Content, Event, Reasoning
from hfms_cli.types import Call, Caller, Chunk, Conversation, LoadedInfo, Picture, Sampling, Structure
from hfms_cli.web import answers
from hfms_cli.web.body import parse
from hfms_cli.web.calling import CALL, answered, call_of
from hfms_cli.web.context import SERVING, log_of, respond
from hfms_cli.web.dialogue import Dialogue, Effort
from hfms_cli.web.operation import operation
from hfms_cli.web.pictures import Detail, check_detail, content_of, picture
from hfms_cli.web.schemas import Int64, Positive, Priority, Temperature, refuse_unsupported
from hfms_cli.web.shapes import Tally
from hfms_cli.web.sse import EventStream, encode
from hfms_cli.web.tools import Called, Function, ToolUse

calls = web.RouteTableDef()


NAMES = {"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens"}
"""Fields of this API for those of chats, by which engines and middlewares speak of errors."""


async def _respond(request: web.Request) -> web.StreamResponse:
    body = parse(ResponsesRequest, await request.read())
    call = call_of(request, body, "resp")
    effort = body.reasoning.effort if body.reasoning else None
    models = request.app[SERVING].config.models
    dialogue = Dialogue(models, body.tool_use(), effort=effort, effort_param="reasoning.effort")
    shape = ResponseShape(call, body, dialogue)
    async with answered(request, call, shape.fit) as chunks:
        if body.stream:
            return await _stream(request, shape, chunks)
        async for chunk in chunks:
            shape.take(chunk)
    log_of(request).update(shape.tally.log())
    shape.end()
    return respond(shape.response())


async def _stream(request: web.Request, shape: ResponseShape, chunks: AsyncIterator[Chunk]) -> web.StreamResponse:
    stream = ResponseStream(request, shape)
    try:
        with stream.telling_errors():
            async for chunk in chunks:
                await stream.send(*shape.begin(), *shape.take(chunk), more=chunk.more)
            await stream.send(*shape.end(), more=True)
    finally:
        stream.rest()
        log_of(request).update(shape.tally.log())
    return await stream.close()


# --- what comes in ---


class Text(Struct, kw_only=True):
    """A part of a content. What else output parts have says nothing here."""

    type: str
    text: str | None = None
    image_url: str | None = None
    """Of a part `input_image` in a user's message: `data:image/png;base64,...`."""
    detail: Detail | None = None


class Item(Struct, kw_only=True, forbid_unknown_fields=True):
    """One item of a dialogue: a message, a call, what it gave, or reasoning. Those of answers come back as they are."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Text] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Text] | None = None
    id: str | None = None
    status: str | None = None
    summary: list[Text] | None = None
    encrypted_content: None = None
    phase: str | None = None


class ResponseTool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def function(self) -> Function:
        return Function(name=self.name, description=self.description, parameters=self.parameters, strict=self.strict)


class ChosenTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class TextFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: None = None


class ReasoningOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: None = None


class ResponsesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/responses`."""

    model: str
    input: str | Annotated[list[Item], Meta(min_length=1)]
    instructions: str | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Int64 | None = None
    stream: bool | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    user: str | None = None
    priority: Priority | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, and only taken where they ask for nothing.
    store: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    include: Any = None
    truncation: Any = None
    service_tier: Any = None
    top_logprobs: Any = None
    max_tool_calls: Any = None
    prompt: Any = None
    stream_options: Any = None

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        return {
            "store": (None, False),
            "previous_response_id": (None,),
            "conversation": (None,),
            "background": (None, False),
            "include": (None, []),
            "truncation": (None, "disabled"),
            "service_tier": (None, "auto", "default"),
            "top_logprobs": (None, 0),
            "max_tool_calls": (None,),
            "prompt": (None,),
            "stream_options": (None, {}, {"include_obfuscation": False}),
        }

    def tool_use(self) -> ToolUse | None:
        """What the model may call. Raises BadRequest."""
        asked = f"={self.tool_choice.name}" if isinstance(self.tool_choice, ChosenTool) else self.tool_choice
        return ToolUse.of([tool.function() for tool in self.tools or ()], asked, self.parallel_tool_calls)

    def call(self, call_id: str, caller: Caller) -> Call:
        refuse_unsupported(self)
        chosen = {
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "structure": self._structure(),
        }
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        pictures: list[Picture] = []
        messages += self._messages(pictures)
        if not messages:
            raise BadRequest("`input` holds reasoning alone; add a message.", param="input")
        return Call(
            id=call_id,
            model=self.model,
            task="generate",
            inputs=[
                Conversation(messages=messages, template_kwargs=self.chat_template_kwargs or None, pictures=pictures)
            ],
            sampling=Sampling(**{k: v for k, v in chosen.items() if v is not None}),  # type: ignore[arg-type]
            caller=caller,
        )

    def _structure(self) -> Structure | None:
        asked = self.text.format if self.text else None
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return Structure(kind="json_object", param="text.format")
        if asked.schema is None or asked.name is None:
            missing = "schema" if asked.schema is None else "name"
            raise BadRequest(f"A format of type `json_schema` needs `{missing}`.", param=f"text.format.{missing}")
        return Structure(kind="json_schema", spec=encode(asked.schema).decode(), param="text.format.schema")

    def _messages(self, pictures: list[Picture]) -> list[dict[str, Any]]:
        """The dialogue as templates take it: reasoning and calls are parts of an assistant's message.

        Images are added to `pictures`, in the order of the parts that stand for them.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: list[dict[str, Any]] = []
        thought = ""
        names: dict[str, str] = {}
        for i, item in enumerate(self.input):
            at = f"input[{i}]"
            match item.type:
                case "message":
                    if item.role is None:
                        raise BadRequest(f"`role` is missing in `{at}`.", param=f"{at}.role")
                    role = "system" if item.role == "developer" else item.role
                    seen = pictures if role == "user" else None
                    content = _content(item.content, f"{at}.content", seen)
                    message: dict[str, Any] = {"role": role, "content": content}
                    if role == "assistant" and thought:
                        message["reasoning_content"] = thought
                    messages.append(message)
                    thought = ""
                case "reasoning":
                    thought += str(_content(item.content or [], f"{at}.content"))
                case "function_call":
                    call_id, name = _needed(item, at, "call_id"), _needed(item, at, "name")
                    arguments = Called(name, _needed(item, at, "arguments")).plain(at)
                    if not messages or messages[-1]["role"] != "assistant":
                        messages.append({"role": "assistant", "content": ""})
                        if thought:
                            messages[-1]["reasoning_content"] = thought
                        thought = ""
                    names[call_id] = name
                    messages[-1].setdefault("tool_calls", []).append(
                        {"id": call_id, "type": "function", "function": arguments}
                    )
                case "function_call_output":
                    call_id = _needed(item, at, "call_id")
                    message = {
                        "role": "tool",
                        "tool_call_id": call_id,
                        "content": _content(item.output, f"{at}.output"),
                    }
                    messages.append(message | ({"name": names[call_id]} if call_id in names else {}))
        return messages


def _needed(item: Item, at: str, field: str) -> str:
    value: str | None = getattr(item, field)
    if value is None:
        raise BadRequest(f"`{field}` is missing in `{at}`.", param=f"{at}.{field}", code="missing_parameter")
    return value


def _content(
    content: str | list[Text] | None, at: str, pictures: list[Picture] | None = None
) -> str | list[dict[str, Any]]:
    """A content as templates take it. pictures: where its images go; None: it may have none. Raises BadRequest."""
    if content is None:
        raise BadRequest(f"`{at}` is missing.", param=at, code="missing_parameter")
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for k, part in enumerate(content):
        if part.type == "input_image" and part.image_url is not None and pictures is not None:
            check_detail(part.detail, f"{at}[{k}].detail")
            pictures.append(picture(part.image_url, f"{at}[{k}].image_url"))
            parts.append({"type": "image"})
        elif part.type in ("input_text", "output_text", "reasoning_text", "text") and part.text is not None:
            parts.append({"type": "text", "text": part.text})
        else:
            raise BadRequest(
                f"Parts of type `{part.type[:40]}` are not supported here; send text, or in a user's message"
                " `input_image` with `image_url`.",
                param=f"{at}[{k}].type",
                code="unsupported_value",
            )
    return content_of(parts)


@calls.post("/v1/responses")
@operation(
    "Inference",
    answers.Response,
    body=ResponsesRequest,
    events=answers.ResponseEvent,
    example={"model": "org/name", "input": "What is the capital of France?", "max_output_tokens": 64, "temperature": 0},
    **CALL,
)
async def responses(request: web.Request) -> web.StreamResponse:
    """Answer a text or a dialogue, in OpenAI's newer shape. Nothing is stored."""
    try:
        return await _respond(request)
    except HfmsError as exc:
        exc.param = NAMES.get(exc.param or "", exc.param)
        raise


# --- what goes out ---


@dataclass
class Made:
    """An item of the answer that grows: reasoning, a message, or a call."""

    kind: Literal["reasoning", "message", "function_call"]
    index: int
    """Among the answer's items."""
    name: str = ""
    call_id: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def item(self, status: str) -> dict[str, Any]:
        """As the API has it. While it is in progress, its text is told by events and not here."""
        text = "" if status == "in_progress" else self.text
        match self.kind:
            case "function_call":
                more: dict[str, Any] = {"call_id": self.call_id, "name": self.name, "arguments": text}
            case "message":
                more = {"role": "assistant", "content": [self.part(text)] if status != "in_progress" else []}
            case "reasoning":
                more = {"summary": [], "content": [self.part(text)] if status != "in_progress" else []}
        return {"type": self.kind, "id": self.id, "status": status, **more}

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _about(self) -> dict[str, Any]:
        where: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        return where if self.kind == "function_call" else where | {"content_index": 0}

    def begins(self) -> list[dict[str, Any]]:
        added = {"type": "response.output_item.added", "output_index": self.index, "item": self.item("in_progress")}
        if self.kind == "function_call":
            return [added]
        return [added, {"type": "response.content_part.added", **self._about(), "part": self.part("")}]

    def grows(self, text: str) -> dict[str, Any]:
        self.pieces.append(text)
        return {"type": f"response.{_WORDS[self.kind]}.delta", **self._about(), "delta": text, **self._logprobs()}

    def ends(self, status: str) -> list[dict[str, Any]]:
        done: dict[str, Any] = {"type": f"response.{_WORDS[self.kind]}.done", **self._about()}
        item = {"type": "response.output_item.done", "output_index": self.index, "item": self.item(status)}
        if self.kind == "function_call":
            return [done | {"name": self.name, "arguments": self.text}, item]
        part = {"type": "response.content_part.done", **self._about(), "part": self.part(self.text)}
        return [done | {"text": self.text} | self._logprobs(), part, item]

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.kind == "message" else {}


_WORDS = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}


class ResponseShape:
    """`response` objects and the events that they grow by."""

    def __init__(self, call: Call, body: ResponsesRequest, dialogue: Dialogue) -> None:
        self._call = call
        self._body = body
        self._dialogue = dialogue
        self.tally = Tally()
        self._created = int(time.time())
        self._made: list[Made] = []
        self._statuses: list[str] = []
        """Of the items that are complete, or as complete as they will be."""
        self._begun = False
        self._finish: str | None = None
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None

    def fit(self, call: Call, info: LoadedInfo) -> Call:
        return self._dialogue.fit(call, info)

    def begin(self) -> list[dict[str, Any]]:
        """The events that come before all others; none where they were told already."""
        if self._begun:
            return []
        self._begun = True
        kinds = ("response.created", "response.in_progress")
        return [{"type": kind, "response": self.response()} for kind in kinds]

    def take(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds."""
        self.tally.add(chunk)
        self._finish = chunk.finish_reason or self._finish
        return [told for event, at in self._dialogue.hear(chunk) for told in self._add(event, at)]

    def _add(self, event: Event, at: int) -> list[dict[str, Any]]:
        match event:
            case CallBegins(name):
                call_id = self._dialogue.heard(0).calls[at].id
                return self._open(Made("function_call", len(self._made), name=name, call_id=call_id))
            case Arguments(text):
                return [self._made[-1].grows(text)]
            case Content(text):
                kind: Literal["message", "reasoning"] = "message"
            case Reasoning(text):
                kind = "reasoning"
        last = self._made[-1] if self._made else None
        opened = [] if last and last.kind == kind else self._open(Made(kind, len(self._made)))
        return [*opened, self._made[-1].grows(text)]

    def _open(self, made: Made) -> list[dict[str, Any]]:
        closed = self._close("completed")
        self._made.append(made)
        return closed + made.begins()

    def _close(self, status: str) -> list[dict[str, Any]]:
        if len(self._statuses) == len(self._made):
            return []
        self._statuses.append(status)
        return self._made[-1].ends(status)

    def end(self) -> list[dict[str, Any]]:
        """The last events."""
        self._status = "incomplete" if self._finish == "length" else "completed"
        empty = [] if self._made else self._open(Made("message", 0))
        closed = self._close(self._status)
        return [*empty, *closed, {"type": f"response.{self._status}", "response": self.response()}]

    def fail(self, error: HfmsError) -> dict[str, Any]:
        """The last event where the answer broke off."""
        self._close("incomplete")
        self._status = "failed"
        self._error = {"code": error.code or error.type, "message": error.message}
        return {"type": "response.failed", "response": self.response()}

    def response(self) -> dict[str, Any]:
        """The whole object, as it is now."""
        body = self._body
        tools = [
            {"type": "function", "name": t.name, "description": t.description, "parameters": t.parameters,
             "strict": bool(t.strict)}
            for t in body.tools or ()
        ]  # fmt: skip
        asked = body.text.format if body.text and body.text.format else None
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._call.model,
            "output": [made.item(status) for made, status in zip(self._made, self._statuses, strict=False)],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": self._call.sampling.temperature,
            "text": {"format": _said(asked) if asked else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": tools,
            "top_p": self._call.sampling.top_p,
            "truncation": "disabled",
            "usage": None if self._status == "in_progress" else self._usage(),
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "input_tokens": tally.prompt_tokens,
            # Engines do not tell what they had in their caches; clients' types want a number.
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tally.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._dialogue.reasoning_tokens()},
            "total_tokens": tally.prompt_tokens + tally.completion_tokens,
        }


def _said(asked: TextFormat) -> dict[str, Any]:
    return {name: value for name in asked.__struct_fields__ if (value := getattr(asked, name)) is not None}


class ResponseStream(EventStream):
    """Events with a name and a number each. The last of them tells how it ended, so no `[DONE]` follows."""

    farewell = b""

    def __init__(self, request: web.Request, shape: ResponseShape) -> None:
        keep_alive = request.app[SERVING].config.server.keep_alive_seconds
        super().__init__(request, dict, keep_alive_seconds=keep_alive)
        self._shape = shape
        self._number = 0

    def encoded(self, event: dict[str, Any]) -> bytes:
        numbered = event | {"sequence_number": self._number}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode(numbered))

    def failure(self, error: HfmsError) -> bytes:
        return self.encoded(self._shape.fail(error))
