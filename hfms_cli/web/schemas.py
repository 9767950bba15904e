"""The OpenAI API as types: JSON -> Call on the way in. A field that is not here is refused by its name.

msgspec checks types strictly while it parses (`"stream": 0` is no boolean), so what these classes say is what holds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from hfms_cli.errors import BadRequest
from hfms_cli.types import (
    PRIORITIES,
    Call,
    Caller,
    CallInput,
    Conversation,
    Pair,
    Picture,
    Quantize,
    Sampling,
    TokensOf,
)
from hfms_cli.web.dialogue import Effort
from hfms_cli.web.pictures import ImageUrl, check_detail, content_of, picture
from hfms_cli.web.structure import ResponseFormat, Structured
from hfms_cli.web.tools import NamedChoice, Tool, ToolCall, ToolChoice, ToolUse

Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Bias = Annotated[
    dict[str, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(extra_json_schema={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
]
Prompt = str | list[str | Natural | list[Natural]]

Priority = Literal["low", "normal", "high", "critical", "LOW", "NORMAL", "HIGH", "CRITICAL"]

TopLogprobs = Annotated[int, Meta(ge=0, le=20)]

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_REPLICAS = 256


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: every event tells the usage so far, not only the last."""


class Generate(Structured, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat have in common: how tokens are chosen, and how the answer is sent."""

    model: str
    temperature: Temperature | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: Bias | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    min_tokens: Natural | None = None
    stop_token_ids: list[Natural] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    max_tokens: Positive | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Priority | None = None
    # Not served yet: only the value that asks for nothing is taken.
    store: Any = None
    metadata: Any = None
    service_tier: Any = None

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        """Fields that are known and not served, with the values that ask for nothing."""
        return {
            "store": (None, False),
            "metadata": (None, {}),
            "service_tier": (None, "auto", "default"),
        }

    def sampling(
        self, max_tokens: int | None, logprobs: int | None, response_format: ResponseFormat | None = None
    ) -> Sampling:
        """The engine's view. Raises BadRequest for what the types cannot say."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS or "" in stop:
            raise BadRequest(f"`stop` takes up to {MAX_STOPS} strings, none of them empty.", param="stop")
        if self.min_tokens and max_tokens is not None and self.min_tokens > max_tokens:
            raise BadRequest("`min_tokens` is larger than `max_tokens`.", param="min_tokens")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("`stream_options` needs `stream: true`.", param="stream_options")
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self._bias(),
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "include_stop": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
            "structure": self.structure(response_format),
        }
        return Sampling(stop=tuple(stop), **{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]

    def _bias(self) -> dict[int, float] | None:
        try:
            return (
                {msgspec.convert(int(k), Natural): v for k, v in self.logit_bias.items()} if self.logit_bias else None
            )
        except ValueError:  # msgspec's own is one
            raise BadRequest("The keys of `logit_bias` must be token ids.", param="logit_bias") from None


class CompletionRequest(Generate, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: Natural | None = None
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    def call(self, call_id: str, caller: Caller) -> Call:
        refuse_unsupported(self)
        self._check()
        # The best are those that the model finds likeliest, so it has to tell.
        logprobs = self.logprobs if self.logprobs is not None or not self.chooses else 0
        return Call(
            id=call_id,
            model=self.model,
            task="generate",
            inputs=inputs_of(self.prompt, "prompt"),
            sampling=self.sampling(16 if self.max_tokens is None else self.max_tokens, logprobs),
            n=self.best_of or self.n or 1,
            caller=caller,
            echo=bool(self.echo),
            suffix=self.suffix or "",
        )

    @property
    def chooses(self) -> bool:
        """Whether more answers are made than are sent."""
        return (self.best_of or 1) > (self.n or 1)

    def _check(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("`max_tokens` must be 1 or more; 0 is for `echo`.", param="max_tokens")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise BadRequest("`best_of` is smaller than `n`.", param="best_of")
        if self.stream and self.chooses:
            raise BadRequest("`best_of` cannot be streamed: the best is known when all are complete.", param="best_of")
        if self.suffix and self.echo:
            raise BadRequest("`suffix` and `echo` do not go together.", param="suffix")


class Part(Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None

    def plain(self, at: str, pictures: list[Picture]) -> dict[str, Any]:
        """The part as templates take it; an image stands in `pictures` from then on. Raises BadRequest."""
        if self.type == "text" and self.text is not None:
            return {"type": "text", "text": self.text}
        if self.type == "image_url" and self.image_url is not None:
            check_detail(self.image_url.detail, f"{at}.image_url.detail")
            pictures.append(picture(self.image_url.url, f"{at}.image_url.url"))
            return {"type": "image"}
        if self.type in ("text", "image_url"):
            raise BadRequest(f"`{self.type}` is missing.", param=f"{at}.{self.type}", code="missing_parameter")
        raise BadRequest(
            f"Parts of type `{self.type[:40]}` are not supported; send `text`, or `image_url` in a user's message.",
            param=f"{at}.type",
            code="unsupported_value",
        )


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a chat. Fields that answers carry and that mean nothing here may come back as null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | UnsetType | None = UNSET
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None

    def plain(self, at: str, pictures: list[Picture]) -> dict[str, Any]:
        """The message as templates take it; its images are added to `pictures`. Raises BadRequest."""
        for field in ("refusal", "annotations", "audio", "function_call"):
            if getattr(self, field) not in (None, []):
                raise BadRequest(f"`{field}` is not supported yet.", param=f"{at}.{field}", code="unsupported_value")
        self._check_role(at)
        content: Any = self.content
        if content is UNSET and self.tool_calls:
            content = None
        if content is UNSET or (content is None and self.role != "assistant"):
            raise BadRequest(f"`content` is missing in a message of role `{self.role}`.", param=f"{at}.content")
        if isinstance(content, list):
            before = len(pictures)
            content = content_of([part.plain(f"{at}.content[{k}]", pictures) for k, part in enumerate(content)])
            if len(pictures) > before and self.role != "user":
                raise BadRequest(
                    f"Images are for messages of role `user`, not `{self.role}`.",
                    param=pictures[before].param,
                    code="unsupported_value",
                )
        # Templates of open models know `system` and not OpenAI's newer word for it.
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [c.plain(f"{at}.tool_calls[{i}]") for i, c in enumerate(self.tool_calls)]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    def _check_role(self, at: str) -> None:
        """Calls are an assistant's, and what they gave is a tool's."""
        if self.tool_calls and self.role != "assistant":
            raise BadRequest("Only an assistant's message has `tool_calls`.", param=f"{at}.tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise BadRequest("`tool_call_id` is missing in a message of role `tool`.", param=f"{at}.tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise BadRequest("Only a tool's message has `tool_call_id`.", param=f"{at}.tool_call_id")


class ChatRequest(Generate, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    reasoning_effort: Effort | None = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        return Generate.unsupported(self) | {
            "functions": (None, []),
            "function_call": (None, "none", "auto"),
            "modalities": (None, ["text"]),
            "audio": (None,),
            "prediction": (None,),
        }

    def call(self, call_id: str, caller: Caller) -> Call:
        refuse_unsupported(self)
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise BadRequest("Send `max_tokens` or `max_completion_tokens`, not both.", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        pictures: list[Picture] = []
        conversation = Conversation(
            messages=conversation_of(self.messages, pictures),
            template_kwargs=self.chat_template_kwargs,
            pictures=pictures,
        )
        return Call(
            id=call_id,
            model=self.model,
            task="generate",
            inputs=[conversation],
            sampling=self.sampling(
                self.max_completion_tokens or self.max_tokens,
                (self.top_logprobs or 0) if self.logprobs else None,
                self.response_format,
            ),
            n=self.n or 1,
            caller=caller,
        )

    def tool_use(self) -> ToolUse | None:
        """What the model may call. Raises BadRequest."""
        choice = self.tool_choice
        asked = f"={choice.function.name}" if isinstance(choice, NamedChoice) else choice
        return ToolUse.of([tool.function for tool in self.tools or ()], asked, self.parallel_tool_calls)


def conversation_of(messages: list[Message], pictures: list[Picture]) -> list[dict[str, Any]]:
    """Messages as templates take them; some of those want a tool's name, which OpenAI's messages need not have.

    Their images are added to `pictures`, in the order of the parts that stand for them.
    """
    plain = [m.plain(f"messages[{i}]", pictures) for i, m in enumerate(messages)]
    called = {call["id"]: call["function"]["name"] for m in plain for call in m.get("tool_calls", ())}
    for message in plain:
        if message["role"] == "tool" and message["tool_call_id"] in called:
            message.setdefault("name", called[message["tool_call_id"]])
    return plain


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /tokenize`, as vLLM has it: a text, or a chat."""

    model: str | None = None
    """None: the one that is loaded, where it is the only one."""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def question(self) -> TokensOf:
        """Raises BadRequest for what the types cannot say."""
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("Send `prompt` or `messages`, and not both.", param="prompt")
        if self.prompt is not None:
            for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise BadRequest(f"`{name}` is for `messages`.", param=name)
            return TokensOf(self.prompt, self.add_special_tokens is not False)
        if self.add_special_tokens:
            raise BadRequest(
                "`add_special_tokens` is for `prompt`; a chat template says itself which tokens it begins with.",
                param="add_special_tokens",
            )
        named = {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }
        if self.add_generation_prompt is None and self.continue_final_message:
            named["add_generation_prompt"] = False
        pictures: list[Picture] = []
        messages = conversation_of(self.messages or [], pictures)
        if pictures:
            raise BadRequest(
                "The tokens of images are not told here; the `usage` of an answer counts them.",
                param=pictures[0].param,
                code="unsupported_value",
            )
        chat = Conversation(
            messages=messages,
            template_kwargs=(self.chat_template_kwargs or {}) | {k: v for k, v in named.items() if v is not None},
        )
        return TokensOf(chat)

    def tool_use(self) -> ToolUse | None:
        """What the model may call. Raises BadRequest."""
        return ToolUse.of([tool.function for tool in self.tools or ()], None, None)


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /detokenize`, as vLLM has it."""

    tokens: list[Natural]
    model: str | None = None


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/embeddings`."""

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    priority: Priority | None = None

    def call(self, call_id: str, caller: Caller) -> Call:
        return Call(
            id=call_id,
            model=self.model,
            task="embed",
            inputs=inputs_of(self.input, "input"),
            dimensions=self.dimensions,
            caller=caller,
        )


class Document(Struct, forbid_unknown_fields=True):
    """A document, where it is not given as its text alone."""

    text: str


class RerankRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/rerank`, as Jina and Cohere have it."""

    model: str
    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1)]
    top_n: Positive | None = None
    return_documents: bool | None = None
    user: str | None = None
    priority: Priority | None = None

    def texts(self) -> list[str]:
        return [d if isinstance(d, str) else d.text for d in self.documents]

    def call(self, call_id: str, caller: Caller) -> Call:
        pairs: list[CallInput] = [Pair(self.query, text) for text in self.texts()]
        return Call(id=call_id, model=self.model, task="score", inputs=pairs, caller=caller)


class ScoreRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/score`, as vLLM has it: one text against each of many, or as many against as many."""

    model: str
    text_1: str | Annotated[list[str], Meta(min_length=1)]
    text_2: str | Annotated[list[str], Meta(min_length=1)]
    user: str | None = None
    priority: Priority | None = None

    def call(self, call_id: str, caller: Caller) -> Call:
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise BadRequest(
                f"`text_1` has {len(first)} texts and `text_2` has {len(second)}; give one in `text_1`, or as many.",
                param="text_1",
            )
        pairs: list[CallInput] = [Pair(one, other) for one, other in zip(first, second, strict=True)]
        return Call(id=call_id, model=self.model, task="score", inputs=pairs, caller=caller)


class ReplicaRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What one replica is to have of its own; the rest is that of the load."""

    hardware: str | None = None
    engine: str | None = None
    dtype: DType | None = None
    quantize: Quantize | None = None


class LoadModelRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /models/load`."""

    model: str
    hardware: str | None = None
    engine: str | None = None
    dtype: DType | None = None
    quantize: Quantize | None = None
    draft_model: Annotated[str, Meta(min_length=1)] | None = None
    """A smaller model of the same vocabulary, which guesses what this one will say."""
    replicas: (
        Annotated[int, Meta(ge=1, le=MAX_REPLICAS)]
        | Annotated[list[ReplicaRequest], Meta(min_length=1, max_length=MAX_REPLICAS)]
        | None
    ) = None
    """How many, or each of them: `[{"engine": "openvino"}, {"engine": "transformers"}]`."""
    revision: str | None = None
    alias: str | None = None
    pinned: bool | None = None
    """It is not unloaded to make room, nor when idle."""
    idle_seconds: Annotated[float, Meta(ge=0)] | None = None
    """It is unloaded when nobody has called it for so long; 0: never."""
    wait: bool = True
    """False: answer 202 at once; `GET /models` tells the progress."""


class UnloadModelRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /models/unload`."""

    model: str


class LoadLoraAdapterRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/load_lora_adapter`, in vLLM's words."""

    lora_name: str
    """What calls name as their `model`."""
    lora_path: str
    """Where it comes from: any name that a model may have."""
    base_model_name: str | None = None
    """The model that it is for; by default the one that it names itself, or the only one."""
    load_inplace: bool = False
    """It may take the name of another adapter, whose calls in flight finish with that one."""


class UnloadLoraAdapterRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str


def lowered(asked: str | None, param: str, caller: Caller) -> int:
    """The priority of a call: its key's, or a lower one that it asks for. Raises BadRequest."""
    if asked is None:
        return caller.priority
    if asked.lower() not in PRIORITIES:
        raise BadRequest(f"A priority is one of {', '.join(PRIORITIES)}, not `{asked[:40]}`.", param=param)
    return min(caller.priority, PRIORITIES.index(asked.lower()))


def inputs_of(prompt: Prompt, param: str) -> list[CallInput]:
    """One input or many: `"text"`, `["text", ...]`, `[1, 2, ...]`, `[[1, 2], ...]`."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        what = "is empty" if not prompt else "mixes strings and token ids"
        raise BadRequest(f"`{param}` {what}.", param=param)
    if kinds == {int}:
        return [list(prompt)]  # type: ignore[arg-type]
    return list(prompt)  # type: ignore[arg-type]


class Partial(Protocol):
    """A request with fields that are not served."""

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        """Those fields, with the values that ask for nothing."""
        ...


def refuse_unsupported(request: Partial) -> None:
    """Raises BadRequest."""
    for name, accepted in request.unsupported().items():
        value = getattr(request, name)
        if not any(value == a and type(value) is type(a) for a in accepted):
            raise BadRequest(f"`{name}` is not supported yet.", param=name, code="unsupported_parameter")
