"""What the server answers, as types: for `/openapi.json`, and held against real answers in the tests.

Fields that are there only sometimes are UNSET by default, so the document does not require them.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from hfms_cli.types import FinishReason, Quality, Quantize, Task


class ErrorBody(Struct):
    message: str
    """What was wrong and what to do."""
    type: str
    param: str | None
    """The field at fault."""
    code: str | None
    """One word for programs."""


class ErrorEnvelope(Struct):
    """Every error, on every route, and the last event of a stream that failed."""

    error: ErrorBody


class AudioUsage(Struct):
    type: Literal["duration"]
    seconds: float


class TranscribedSegment(Struct):
    id: int
    seek: int
    """Where the window that it was heard in begins, in hundredths of a second."""
    start: float
    """Seconds, as `end`."""
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    """Of the window's tokens, as what follows is the window's."""
    compression_ratio: float
    no_speech_prob: float


class Transcription(Struct):
    """All but `text` and `usage` only as `verbose_json`."""

    text: str
    usage: AudioUsage
    task: Literal["transcribe", "translate"] | UnsetType = UNSET
    language: str | UnsetType = UNSET
    duration: float | UnsetType = UNSET
    segments: list[TranscribedSegment] | UnsetType = UNSET


class TranscriptEvent(Struct):
    """One event of a streamed transcription."""

    type: Literal["transcript.text.delta", "transcript.text.done"]
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    usage: AudioUsage | UnsetType = UNSET


class CompletionDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | UnsetType = UNSET
    """Of models that think before they answer."""


class PromptUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class TextLogprobs(Struct):
    """A place in each list for each token; a prompt's first token has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]
    refusal: None


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    """Unix seconds."""
    model: str
    system_fingerprint: str
    """The same for answers of the same weights, template, precision, engine and version."""
    choices: list[CompletionChoice]
    """The k-th choice of prompt i has the index `i * n + k`."""
    usage: Usage


class CompletionEvent(Struct):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    """The same for answers of the same weights, template, precision, engine and version."""
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    """With `stream_options.include_usage`: null, and in the last event, which has no choices, the usage."""


class CalledFunction(Struct):
    name: str
    arguments: str
    """JSON."""


class ToolCall(Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswerMessage(Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatCompletion(Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    """Unix seconds."""
    model: str
    system_fingerprint: str
    """The same for answers of the same weights, template, precision, engine and version."""
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Struct):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """The first of a call has its id and name; the arguments add up."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct):
    """What an event adds to a choice's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatEventChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatEvent(Struct):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    """The same for answers of the same weights, template, precision, engine and version."""
    choices: list[ChatEventChoice]
    usage: Usage | UnsetType | None = UNSET
    """With `stream_options.include_usage`: null, and in the last event, which has no choices, the usage."""


class InputDetails(Struct):
    cached_tokens: int


class OutputDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Struct):
    reason: Literal["max_output_tokens"]


class Response(Struct):
    """What was asked is told again beside the answer."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    """Items of type `message`, `reasoning` and `function_call`."""
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(Struct):
    """`response.created` first, `response.completed`, `.incomplete` or `.failed` last; each type has its own fields."""

    type: str
    sequence_number: int


class TokenList(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenText(Struct):
    prompt: str


class TokenizerInfo(Struct):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    all_special_tokens: list[str]
    chat_template: str | None


class Embedding(Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or with `encoding_format: base64` little-endian float32."""


class EmbeddingList(Struct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class RankedText(Struct):
    text: str


class Ranked(Struct):
    index: int
    """Of the document in the request."""
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(Struct):
    id: str
    model: str
    results: list[Ranked]
    """The best first."""
    usage: PromptUsage


class Score(Struct):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class ServedModel(Struct):
    """A name that a call may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The model that an alias stands for; else the same as `id`."""
    max_model_len: int | UnsetType = UNSET
    """Tokens of its context, once it is loaded."""
    tasks: list[Task] | UnsetType = UNSET
    revision: str | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    """Of the files of that revision."""
    parent: str | UnsetType = UNSET
    """Of a LoRA adapter: the model that it changes."""


class ServedModelList(Struct):
    object: Literal["list"]
    data: list[ServedModel]


class State(Struct):
    """How a model or a replica is."""

    value: Literal["unloaded", "loading", "loaded", "restarting", "failed", "unloading"]
    reason: str | UnsetType = UNSET
    phase: str | UnsetType = UNSET
    """What its load does now."""
    progress: float | UnsetType = UNSET
    """The share of that phase that is done, 0 to 1."""


class ReplicaState(Struct, kw_only=True):
    """One engine process of a model. What is known only of a process that runs is missing where there is none."""

    status: State
    engine: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    dtype: str | UnsetType = UNSET
    quantize: Quantize | UnsetType = UNSET
    quality: Quality | UnsetType = UNSET
    batching: str | UnsetType = UNSET
    """How calls run together: `paged`, in one cache of blocks; `slots`, each in a place of its own; `apart`, one after
    the other, a token of each in turn."""
    tasks: list[Task] | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    pid: int | UnsetType = UNSET
    memory_bytes: int | UnsetType = UNSET
    requests_running: int | UnsetType = UNSET
    requests_waiting: int | UnsetType = UNSET
    outstanding_tokens: int | UnsetType = UNSET
    load_seconds: float | UnsetType = UNSET
    load_phases: dict[str, float] | UnsetType = UNSET
    """Seconds of each phase."""
    tuned: Any = UNSET
    """The choice of `hfms models tune` that is in force."""


class ModelState(ReplicaState, kw_only=True):
    """A model; what its replicas differ in is that of the first that runs, and counts are of all."""

    id: str
    aliases: list[str] | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    """It is not unloaded to make room, nor when idle."""
    idle_seconds: float | UnsetType = UNSET
    """It is unloaded when nobody has called it for so long; 0: never."""
    last_used: float | UnsetType | None = UNSET
    """Unix seconds of the last call."""
    storage: str | UnsetType = UNSET
    revision: str | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    summary: str | UnsetType = UNSET
    hardware: list[str] | UnsetType = UNSET
    """Kinds of device that a card means it for."""
    disk_bytes: int | UnsetType = UNSET
    """Of a model that is on disk only."""
    format: str | UnsetType = UNSET
    architecture: str | UnsetType = UNSET
    estimated_bytes: int | UnsetType = UNSET
    replicas: list[ReplicaState] | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    """Of a LoRA adapter: the model that it changes, whose state is its own."""


class ModelStateList(Struct):
    object: Literal["list"]
    data: list[ModelState]


class Word(Struct):
    """How the server is, in a word."""

    status: str


class DeviceState(Struct):
    id: str
    name: str
    total_bytes: int
    free_bytes: int


class HardwareState(Struct):
    """A kind of hardware: its devices, or why there are none."""

    name: str
    devices: list[DeviceState]
    reason: str | None


class PluginState(Struct):
    name: str
    package: str
    version: str
    enabled: bool
    error: str | None


class FoldersState(Struct):
    models: int
    faults: list[str]
    """What is wrong in the folders of models, and where."""


class ServerStatus(Struct):
    version: str
    uptime_seconds: float
    ready: bool
    draining: bool
    requests_in_flight: int
    fronts: list[int]
    """Process ids of those beside the one that answers."""
    models: list[ModelState]
    hardware: list[HardwareState]
    plugins: list[PluginState]
    folders: FoldersState
    storage: dict[str, Any]
    middleware: dict[str, dict[str, Any]]
    """A section of each middleware, by its name."""
    warnings: list[str]
