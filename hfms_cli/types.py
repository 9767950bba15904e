"""What travels the two roads: calls and chunks on the one, names, manifests and devices on the other.

Everything here is a msgspec Struct, so that it can cross the wire to an engine's process unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Literal

from msgspec import Struct

__all__ = [
    "PRIORITIES",
    "Adapter",
    "AdapterCard",
    "Call",
    "CallInput",
    "Caller",
    "Chunk",
    "Conversation",
    "Device",
    "Footprint",
    "Leftover",
    "LoadedInfo",
    "Manifest",
    "ModelCard",
    "ModelFile",
    "ModelName",
    "Pair",
    "Picture",
    "Probe",
    "Quality",
    "Quantize",
    "Question",
    "Recording",
    "Reply",
    "Sampling",
    "Segment",
    "Speech",
    "Structure",
    "Task",
    "Terms",
    "TextOf",
    "TokenLogprob",
    "Tokens",
    "TokensOf",
    "Vocabulary",
    "VocabularyOf",
]

Task = Literal["generate", "embed", "score", "transcribe", "image-text-to-text"]
"""What a model can do. The last is what `generate` does with chats that have images: no call asks for it by itself."""
Quantize = Literal["auto", "none", "int8", "int4"]
FinishReason = Literal["stop", "length"]
Octets = bytes
"""Bytes, for structs that have a field of that name."""

PRIORITIES = ("low", "normal", "high", "critical")
"""By rank: `Call.priority` and `Caller.priority` are indices of these."""


class Structure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer must look like. The engine lets only such tokens be chosen as can still become that."""

    kind: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    spec: str = ""
    """The schema as JSON, the regex, the grammar, or the choices as a JSON list of strings."""
    param: str = "response_format"
    """The request's field that it came in, for errors."""


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Names and meanings are vLLM's."""

    max_tokens: int | None = None
    """None: as many as the context still holds."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """For each token its log-probability, and those of so many of the likeliest (0: only its own).

    Of what the model itself says, before temperature, penalties and masks; vLLM calls that `raw_logprobs`.
    """
    stop_token_ids: tuple[int, ...] = ()
    """End the answer as the model's own do, also with `ignore_eos`."""
    include_stop: bool = False
    """Whether the stop string that was met is part of the answer."""
    skip_special_tokens: bool = True
    """Whether tokens such as `<|im_start|>` have no text in the answer."""
    structure: Structure | None = None


class Picture(Struct, frozen=True):
    """An image in a chat."""

    data: Octets
    """Of a file, as it came: what decodes it is the engine's process."""
    param: str
    """The request's field that it came in, for errors."""


class Conversation(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """A chat, before the model's own template turns it into a prompt."""

    messages: list[dict[str, Any]]
    template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call, as templates take them: `{"type": "function", "function": {...}}`."""
    pictures: list[Picture] = []
    """Images, in the order of the parts `{"type": "image"}` that stand for them in the messages' contents."""


class Pair(Struct, frozen=True, tag=True):
    """Two texts that a cross-encoder scores: how well the second answers the first."""

    query: str
    document: str


class Speech(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """A recording of which a speech model writes down what is said."""

    data: Octets
    """Of a file, as it came: what decodes it is the engine's process."""
    language: str | None = None
    """That is spoken, as a code (`en`) or an English name; None: the model finds out."""
    prompt: str = ""
    """What was said before, or words that are to be spelt so."""
    translate: bool = False
    """Write it down in English."""
    details: bool = False
    """Find out `no_speech_prob` too, which costs a pass for each window."""


class Caller(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who asks, as the middleware that authenticated them says. Never taken from what a client claims."""

    key_id: str | None = None
    """None: anonymous."""
    name: str = ""
    """For people; two keys may have the same, and none means anything."""
    admin: bool = False
    address: str = ""
    priority: int = 1
    """The highest that a call may ask for: 0 low, 1 normal, 2 high, 3 critical."""
    requests_per_minute: int | None = None
    """None, here and below: what the server allows to everybody."""
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    allowed_models: tuple[str, ...] = ()
    """Globs over names of models; empty: every model."""
    cache_group: str = ""
    """Callers of one group share what is kept of their prompts and answers; empty: with nobody."""

    @property
    def tenant(self) -> str:
        """Whose it is, what is kept of a call to answer the next one sooner. Nobody else can tell that it is there."""
        if self.cache_group:
            return f"group:{self.cache_group}"
        return f"key:{self.key_id}" if self.key_id else f"address:{self.address}"

    def may_use(self, *names: str) -> bool:
        """Whether any of a model's names is allowed: its id, and the alias that it was asked for by."""
        return not self.allowed_models or any(fnmatchcase(n, glob) for n in names for glob in self.allowed_models)


CallInput = str | list[int] | Conversation | Pair | Speech
"""A text, its token ids, a chat, for the task `score` alone a pair, or for the task `transcribe` alone a recording."""


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request on its way to an engine: every input, answered `n` times.

    Choice `i * n + k` of the answer is the k-th answer to input `i`.
    """

    id: str
    model: str
    task: Task
    inputs: list[CallInput]
    sampling: Sampling = Sampling()
    n: int = 1
    dimensions: int | None = None
    caller: Caller = Caller()
    priority: int = 1
    """0 LOW, 1 NORMAL, 2 HIGH, 3 CRITICAL: who goes first where there is not room for all."""
    digest: str = ""
    """Of the model and its precision, once the road knows: where it is the same, the same bytes answer."""
    echo: bool = False
    """Each answer begins with its prompt, and with logprobs those of the prompt's tokens. `max_tokens` may be 0."""
    suffix: str = ""
    """What comes after the answer: the model fills in the middle."""
    waited: float = 0.0
    """Seconds that it has waited for its model to load."""
    marks: tuple[str, ...] = ()
    """Words of the model's own format, such as `<think>`, that the answer's text must have.

    Those that are special tokens are not left out of it, and one that a chat's prompt ends with comes first.
    """
    adapter: str = ""
    """`Adapter.id` of the one that answers; empty: the model as it is. Set where the call goes to its engine."""


class TokenLogprob(Struct, array_like=True, frozen=True):
    """One token, and how likely the model found it."""

    id: int
    text: str
    """For people: a part of a character is U+FFFD, a special token its name."""
    bytes: Octets
    """What it adds to the text; those of all tokens together are the text. Empty for special tokens."""
    logprob: float | None
    """None: the first of a prompt, which nothing comes before."""
    top: list[tuple[int, str, Octets, float]] = []
    """The likeliest tokens in its place, best first, as many as were asked for."""


class Segment(Struct, array_like=True, frozen=True, omit_defaults=True):
    """A stretch of a recording, and what is said in it."""

    start: float
    """Seconds from the beginning, as `end`."""
    end: float
    text: str
    tokens: list[int] = []
    """Those that mark times too."""
    seek: int = 0
    """Where the window that it was heard in begins, in hundredths of a second."""
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    """Bytes of the window's text through those of it compressed: text that repeats itself has a high one."""
    no_speech_prob: float = 0.0
    """How likely nobody speaks in the window."""


class Recording(Struct, array_like=True, frozen=True, omit_defaults=True):
    """What an engine found out about a recording."""

    seconds: float
    language: str = ""
    """Its English name, in small letters."""


class Chunk(Struct, array_like=True, omit_defaults=True):
    """What an engine says in one step about one choice of a call."""

    index: int = 0
    text: str = ""
    tokens: int = 0
    """New tokens that this chunk stands for; they are not always visible in `text`."""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    """Set once an input, on the first chunk that is about it."""
    vector: bytes | None = None
    """An embedding: little-endian float32."""
    score: float | None = None
    more: bool = False
    """What follows is here already: whoever sends this on may wait for it, and send both at once."""
    logprobs: list[TokenLogprob] | None = None
    """Of the tokens whose text ends in this chunk; a token without text goes with the next that has some."""
    segment: Segment | None = None
    """Of a recording; its text is the chunk's."""
    recording: Recording | None = None
    """Set once a recording, on the first chunk that is about it."""

    @property
    def begins(self) -> bool:
        """Whether it only says that an input has left the line and is being read."""
        said = self.tokens or self.text or self.finish_reason or self.vector or self.segment
        return not (said or self.score is not None)


class TokensOf(Struct, frozen=True, tag=True):
    """Asks an engine what the tokens of a text or a chat are. special: with those that a text begins or ends with."""

    input: str | Conversation
    special: bool = True


class TextOf(Struct, frozen=True, tag=True):
    """Asks an engine for the text of tokens, special ones too."""

    ids: list[int]


class VocabularyOf(Struct, frozen=True, tag=True):
    """Asks an engine about the model's tokenizer."""


class Tokens(Struct, frozen=True, tag=True):
    """Answers `TokensOf` and `TextOf`. names: of the tokens, as the vocabulary has them."""

    ids: list[int]
    names: list[str]
    text: str = ""


class Vocabulary(Struct, frozen=True, tag=True):
    """Answers `VocabularyOf`. Names that the tokenizer does not have are None."""

    kind: str
    size: int
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    special_tokens: list[str] = []
    chat_template: str | None = None


Question = TokensOf | TextOf | VocabularyOf
"""What an engine answers at once, between two steps, whoever is waiting."""
Reply = Tokens | Vocabulary


class ModelName(Struct, frozen=True):
    """A model's name, taken apart: `scheme:rest@revision`. Hub names have no scheme; local paths have `path`."""

    scheme: str
    rest: str
    revision: str | None = None

    def __str__(self) -> str:
        head = self.rest if self.scheme in ("", "path") else f"{self.scheme}:{self.rest}"
        return f"{head}@{self.revision}" if self.revision else head


class ModelFile(Struct, frozen=True):
    """One file of a model. `path` is relative and POSIX, and never leaves the model's folder."""

    path: str
    size: int
    sha256: str | None = None
    """Lower-case hex; None where the source does not publish one."""
    oid: str | None = None
    """Git's SHA-1 of the file (`git hash-object`), lower-case hex: what a git repository says of its small files."""

    def safe_path(self) -> PurePosixPath:
        """The path, or ValueError where it is absolute, climbs out, holds a NUL or a backslash, or fits no disk."""
        path = PurePosixPath(self.path)
        bad = path.is_absolute() or ".." in path.parts or not path.parts
        long = any(len(part.encode(errors="replace")) > 255 for part in path.parts) or len(self.path) > 1024
        if bad or long or "\0" in self.path or "\\" in self.path or ":" in path.parts[0]:
            raise ValueError(f"unsafe file name {self.path[:64]!r}")
        return path


class Manifest(Struct, frozen=True, kw_only=True):
    """What a storage says a name stands for, before any of it is fetched."""

    name: ModelName
    storage: str
    revision: str
    """A commit, a version or a digest: the same revision is always the same bytes."""
    files: tuple[ModelFile, ...]
    source: str = ""
    """Where the files come from, for people: a URL or a folder."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(f.size for f in self.files)

    @property
    def digest(self) -> str:
        """`digest_of` all files: the same under any name."""
        return self.digest_of([f.path for f in self.files])

    def digest_of(self, paths: Sequence[str]) -> str:
        """SHA-256, in hex, of some files' names and hashes; of a file without one, its size and the revision."""
        wanted = set(paths)
        files = sorted((f.path, f.sha256 or f"{f.size} {self.revision}") for f in self.files if f.path in wanted)
        told = [part for file in files for part in file] or [self.revision]
        return hashlib.sha256("\0".join(told).encode()).hexdigest()


class Terms(Struct, frozen=True):
    """Under what terms a model may be passed on."""

    license: str = ""
    """As its card names it; empty: it names none."""
    restricted: str = ""
    """Why not everybody may have it, for people; empty: everybody may."""


class Leftover(Struct, frozen=True, kw_only=True):
    """Something on this disk that nothing refers to any more."""

    about: str
    """What it is, for people."""
    size: int
    """Bytes that its end gives back."""
    age_seconds: float
    """Since it was last written."""
    paths: tuple[str, ...]
    """Files and folders, absolute; together they are the whole of it."""
    model: ModelName | None = None
    """The model that it is, or was to become, where that is known."""


class ModelCard(Struct, frozen=True, kw_only=True):
    """What a model's own files say of it, read without torch."""

    format: Literal["safetensors", "gguf", "openvino", "onnx", "pickle", "none"]
    model_type: str
    """`config.json`'s `model_type`, or GGUF's `general.architecture`."""
    architecture: str
    tasks: tuple[Task, ...]
    weights_bytes: int
    parameters: int = 0
    """0: unknown."""
    dtype: str = ""
    context_length: int = 0
    """0: unknown."""
    weights: tuple[str, ...] = ()
    """Weight files, relative to the model's folder."""
    remote_code: bool = False
    """The model asks for its own Python code to be run (`auto_map`)."""
    token_cache_bytes: int = 0
    """At most so much do the keys and values of one token take in half precision. From GGUF; 0: unknown, or none."""
    chat_template: bool = False
    """A GGUF file has one. What other formats have is for their tokenizers to say."""


class Device(Struct, frozen=True, kw_only=True):
    """A device as one hardware plugin sees it. Bytes are of the device's own memory."""

    id: str
    """`cpu`, `cuda:0`, `rocm:1`, `mps`, `openvino:CPU`."""
    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    torch_device: str | None = None
    """What torch calls it (`cuda:0` for a ROCm build, too); None where torch cannot use it."""
    shares: str | None = None
    """The device whose memory this one uses, where it has none of its own: `cpu` for an integrated GPU."""

    @property
    def memory(self) -> str:
        """Whose memory a model on this device takes. Devices that name the same one share it."""
        return self.shares or self.id


class Footprint(Struct, frozen=True):
    """What a model takes of a device's memory, in bytes."""

    weights: int
    cache: int
    """For keys and values."""
    work: int
    """The process with its libraries, and the most that a pass takes beside the rest."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


class Probe(Struct, frozen=True):
    """Devices, or why there are none."""

    devices: tuple[Device, ...] = ()
    reason: str | None = None


class Quality(Struct, frozen=True, kw_only=True):
    """What quantisation did to a model, measured on a text."""

    tokens: int
    """Of the text."""
    perplexity: float
    perplexity_before: float
    agreement: float
    """Share of places in which the model's first choice is still the same, 0 to 1."""


class LoadedInfo(Struct, frozen=True, kw_only=True):
    """What a worker says of the model that it holds."""

    engine: str
    device: str
    dtype: str
    tasks: tuple[Task, ...]
    context_length: int
    max_batch: int
    """Sequences that can run at once."""
    memory_bytes: int
    chat: bool = False
    """The model has a chat template."""
    dimensions: int = 0
    """Of its embeddings; 0 where it makes none."""
    quantize: Quantize = "none"
    """What the engine has made of the weights."""
    quality: Quality | None = None
    """What that has cost, where it was measured."""
    weights_bytes: int = 0
    """Bytes that one token of one stream reads of the weights; 0: unknown."""
    template: str = ""
    """The chat template's own text; empty where there is none. It says which format calls and reasoning have."""
    batching: str = ""
    """How calls run together: "paged", in one cache of blocks; "slots", each in its own place; "apart", one after the
    other, a token of each in turn; empty: unknown."""


class AdapterCard(Struct, frozen=True, kw_only=True):
    """How a LoRA adapter changes a model, in the words of PEFT's `adapter_config.json`: all of it that is honoured.

    A linear layer whose name fits `target_modules` adds `scale * B @ A @ x` to what it says; A is [r, inputs], B is
    [outputs, r], and `scale` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    """

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    """Ends of names; as one text, a regular expression for whole names, or `all-linear`."""
    exclude_modules: str | list[str] = []
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    """`r` of the layers whose names end with a regular expression."""
    alpha_pattern: dict[str, float] = {}
    base_model_name_or_path: str = ""
    """What it was trained on, as its maker calls that; empty: it does not say."""


class Adapter(Struct, frozen=True):
    """A LoRA adapter, as an engine gets it: `adapter_model.safetensors` in `folder`."""

    id: str
    """Names this load of it, and no other."""
    folder: str
    card: AdapterCard
