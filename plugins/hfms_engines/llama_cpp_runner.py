"""A GGUF model in llama.cpp's own server, which lives in this process. For worker processes only.

llama.cpp runs a loop of its own, in a thread of its own: it batches what is in its slots, step by step. Here

    submit   call -> prompts as tokens -> sequences, in the line; what answers must look like is checked before that
    begin    who is next in line takes a slot, if there is one, and if the cache has room for all that it may need
    hear     llama.cpp says each token to the sequence's thread, which waits for nothing else
    step     hands on what was heard

A call that asks for what a stream of llama.cpp's does not tell is answered a request a token (`llama_cpp_steps`).

The threads only wait for llama.cpp, so their number costs nothing. Prompts become tokens before anything runs, so
that what does not fit is refused with the right count. llama.cpp does that at its HTTP door only; the door is a socket
in a folder that only this user can enter, and asks for a secret.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import msgspec
import xllamacpp

from hfms_cli import (
    BadRequest,
    Call,
    Chunk,
    Conversation,
    EngineFault,
    HfmsError,
    LoadedInfo,
    LoadFailed,
    LoadRequest,
    Question,
    Reply,
    TextOf,
    Tokens,
    TokensOf,
    Vocabulary,
    VocabularyOf,
)
from hfms_engines import limits, middle
from hfms_engines.calls import Choice, OpenCall, Prompt
from hfms_engines.line import Line
from hfms_engines.llama_cpp_steps import PromptScores, Reader, Step, Steps, Words
from hfms_engines.machine import physical_cores
from hfms_engines.structure import STUCK, Follower, Followers, Workshop
from hfms_engines.text import StopStrings, opened

__all__ = ["LlamaCpp", "load"]

log = logging.getLogger("hfms.engine")

T = TypeVar("T")
Event = tuple[str, Chunk | HfmsError | None]

LONGEST_STEP = 0.05
"""Seconds that a step waits for llama.cpp to say something; new calls and cancels are seen between two steps."""

# As in the other engines: below this, a temperature means the likeliest token.
GREEDY = 1e-5
# The other engines' order, which is vLLM's; llama.cpp's own applies the temperature last.
SAMPLERS = ("penalties", "temperature", "min_p", "top_k", "top_p")
# What llama.cpp does as asked only where it is asked for each token by itself, with what it is otherwise.
BY_STEPS: dict[str, Any] = {
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logprobs": None,
    "stop_token_ids": (),
    "skip_special_tokens": True,
}


# --- what llama.cpp says, as far as it is needed ---


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Timings(msgspec.Struct):
    predicted_n: int = 0
    """Tokens so far, with the one that ends the answer."""


class _Failure(msgspec.Struct):
    message: str = ""


class _Said(msgspec.Struct):
    choices: list[_Choice] = []
    timings: _Timings = msgspec.field(default_factory=_Timings)
    error: _Failure | None = None


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Piece(msgspec.Struct):
    id: int
    piece: str | list[int]
    """Its bytes, where they are no text."""

    @property
    def text(self) -> str:
        return self.piece if isinstance(self.piece, str) else bytes(self.piece).decode(errors="replace")


class _Pieces(msgspec.Struct):
    tokens: list[_Piece]


class _Detokenized(msgspec.Struct):
    content: str


class _Prompted(msgspec.Struct):
    prompt: str


class _Meta(msgspec.Struct):
    n_vocab: int


class _Model(msgspec.Struct):
    meta: _Meta


class _Models(msgspec.Struct):
    data: list[_Model]


class _Erased(msgspec.Struct):
    n_erased: int


class _Props(msgspec.Struct):
    bos_token: str = ""
    eos_token: str = ""
    chat_template: str = ""


# --- a sequence ---


@dataclass(eq=False)
class _Sequence(Choice):
    """One choice of a call, as llama.cpp tells of it."""

    request: dict[str, Any]
    stops: StopStrings
    follower: Follower | None = None
    steps: Steps | None = None
    """Where it is made a request a token."""
    slot: int = -1
    """Where it runs."""
    made: int = 0
    """Tokens that chunks have told of."""
    finished: bool = False
    """llama.cpp has said its last word on it."""
    told: bool = False
    """The caller has been told that word."""
    begun: bool = False
    """There was a chunk of it."""

    @property
    def needs(self) -> int:
        """Tokens of cache that it can come to fill."""
        return len(self.prompt.ids) + self.limit

    def take(self, said: _Said) -> Chunk | None:
        """What one word from llama.cpp means for the caller; None: nothing, for it is about the prompt.

        Raises BadRequest where it is not what was asked for: llama.cpp drops a grammar that becomes too much work.
        """
        choice = said.choices[0]
        if self.follower is not None and not (
            self.follower.follows(choice.text) and (choice.finish_reason != "stop" or self.follower.complete())
        ):
            raise BadRequest(STUCK, param=self.follower.param, code="invalid_schema")
        new, self.made = said.timings.predicted_n - self.made, said.timings.predicted_n
        text, stopped = self.stops.feed(choice.text)
        if choice.finish_reason and not stopped:
            text += self.stops.flush()
        self.finished = stopped or choice.finish_reason is not None
        if not (new or text or self.finished):
            return None
        if not self.begun:
            self.begun = True
            text = self.prompt.text + text
        reason = "stop" if stopped else choice.finish_reason
        return Chunk(
            index=self.index,
            text=text,
            tokens=new,
            finish_reason=None if reason is None else "length" if reason == "length" else "stop",
        )


class LlamaCpp:
    """A loaded model. Counts of tokens include the one that ends an answer, as vLLM's do."""

    def __init__(
        self,
        server: Any,
        door: Door,
        info: LoadedInfo,
        *,
        cache_tokens: int,
        prefill_tokens: int,
        prefix_cache: bool,
        shared: bool,
    ) -> None:
        """shared: the slots share one cache, so that what one has kept makes each step of the others longer."""
        self.info = info
        self._server = server
        self._door = door
        self._vocabulary = door.ask("GET", "/v1/models", None, _Models).data[0].meta.n_vocab
        props = door.ask("GET", "/props", None, _Props)
        self._first_token = props.bos_token
        if info.chat:
            self.info = msgspec.structs.replace(info, template=props.chat_template)
        self._words = Words(self._detokenize, self._tokenize("a")[-1], self._vocabulary)
        self._cache_tokens = cache_tokens
        self._prefill_tokens = prefill_tokens
        self._prefix_cache = prefix_cache
        self._vacates = shared and not prefix_cache
        """A slot forgets what it has read as soon as a sequence leaves it."""
        # llama.cpp has llguidance in it, and takes its grammars.
        followers = Followers()
        self._structures = Workshop(followers.make, followers.close)
        self._calls: dict[str, OpenCall] = {}
        self._line: Line[_Sequence] = Line()
        self._running: dict[_Sequence, threading.Thread] = {}
        """In slots, those that were cancelled and have not stopped yet among them."""
        self._slots: list[list[int]] = [[] for _ in range(info.max_batch)]
        """The prompt that each has read last."""
        self._heard: SimpleQueue[tuple[_Sequence, Chunk | HfmsError | None]] = SimpleQueue()
        """Filled by the threads; None: the sequence has left its slot."""

    # --- calls in ---

    def submit(self, call: Call) -> None:
        """Raises BadRequest, ContextLengthExceeded and NoChatTemplate."""
        entries = limits.check_call(call, self._vocabulary)
        if call.id in self._calls:
            raise BadRequest("A call with this id is under way.")
        if call.suffix:
            raise middle.no_middle()
        by_steps = self._check_steps(call)
        prompts = [self._prompt(entry, call) for entry in entries]
        most = [
            limits.answer_limit(len(prompt.ids), entry, call.sampling, self.info.context_length)
            for prompt, entry in zip(prompts, entries, strict=True)
        ]
        kept = OpenCall.of(call)

        def enter(follower: Follower | None = None) -> None:
            grammar = "" if follower is None else follower.grammar
            for i, (prompt, limit) in enumerate(zip(prompts, most, strict=True)):
                scores = (
                    PromptScores(call.sampling.logprobs or 0)
                    if call.echo and call.sampling.logprobs is not None
                    else None
                )
                for k in range(call.n):
                    index = i * call.n + k
                    request = self._request(prompt.ids, limit, call, choice=k, grammar=grammar)
                    stops = StopStrings(call.sampling.stop, include=call.sampling.include_stop)
                    own = follower and follower.copy()
                    seq = _Sequence(kept, index, prompt, limit, request, stops, own)
                    if by_steps:
                        seq.steps = Steps(index, prompt, limit, call.sampling, _seeds(call, k), call.marks, scores)
                    self._line.enter(seq)

        if call.sampling.structure is None:
            enter()
        else:
            self._structures.order(call.id, call.sampling.structure, enter)
        self._calls[call.id] = kept

    @staticmethod
    def _check_steps(call: Call) -> bool:
        """Whether a call is to be answered a request a token. Raises BadRequest where that cannot be done."""
        sampling = call.sampling
        asked = [name for name, usual in BY_STEPS.items() if getattr(sampling, name) != usual]
        asked += ["max_tokens"] * (sampling.max_tokens == 0)
        penalised = next((name for name in asked if name.endswith("_penalty")), None)
        beside = None
        if sampling.structure is not None:
            beside = sampling.structure.param
            asked += ["ignore_eos"] * sampling.ignore_eos
        elif penalised and sampling.repetition_penalty != 1:
            # llama.cpp counts the same tokens for both, and these count the answer's, that one the prompt's too.
            beside, asked = "repetition_penalty", [penalised]
        if asked and beside:
            raise BadRequest(f"The engine llama_cpp does not support `{asked[0]}` beside `{beside}`.", param=asked[0])
        return bool(asked)

    def _prompt(self, entry: limits.Entry, call: Call) -> Prompt:
        if isinstance(entry, Conversation):
            text = self._chat(entry)
            return Prompt(self._tokenize(text), text=opened(text, call.marks))
        ids = self._tokens(entry)
        if not call.echo:
            return Prompt(ids)
        return Prompt(ids, text=entry if isinstance(entry, str) else self._detokenize(ids))

    def _tokens(self, entry: str | list[int]) -> list[int]:
        if isinstance(entry, str):
            return self._tokenize(entry) or self._tokenize(self._first_token)
        for token in entry:
            limits.check_token(token, self._vocabulary, "prompt")
        return entry

    def _tokenize(self, text: str) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._door.ask("POST", "/tokenize", body, _Tokens).tokens

    def _detokenize(self, ids: list[int]) -> str:
        return self._door.ask("POST", "/detokenize", {"tokens": ids}, _Detokenized).content

    def ask(self, question: Question) -> Reply:
        """What llama.cpp says of its tokenizer. Raises BadRequest and NoChatTemplate."""
        match question:
            case VocabularyOf():
                props = self._door.ask("GET", "/props", None, _Props)
                return Vocabulary(
                    kind="llama.cpp",
                    size=self._vocabulary,
                    bos_token=props.bos_token or None,
                    eos_token=props.eos_token or None,
                    chat_template=(props.chat_template or None) if self.info.chat else None,
                )
            case TextOf(ids):
                for token in ids:
                    limits.check_token(token, self._vocabulary, "tokens")
                return Tokens(ids, [], self._detokenize(ids))
            case TokensOf(item, special):
                if isinstance(item, Conversation):
                    item = self._chat(item)
                body = {"content": item, "add_special": special, "parse_special": True, "with_pieces": True}
                pieces = self._door.ask("POST", "/tokenize", body, _Pieces).tokens
                return Tokens([piece.id for piece in pieces], [piece.text for piece in pieces])

    def _chat(self, chat: Conversation) -> str:
        if not self.info.chat:
            raise limits.no_chat_template()
        extra = dict(chat.template_kwargs or {})
        body = {
            "messages": chat.messages,
            "tools": chat.tools or [],
            "add_generation_prompt": bool(extra.pop("add_generation_prompt", True)),
            "chat_template_kwargs": extra,
        }
        try:
            return self._door.ask("POST", "/apply-template", body, _Prompted).prompt
        except DoorClosed as exc:
            raise limits.unfit_messages() from exc

    def _request(self, ids: list[int], limit: int, call: Call, *, choice: int, grammar: str) -> dict[str, Any]:
        """One sequence in llama.cpp's words. What is not said here would be as the model's file says."""
        sampling = call.sampling
        repeats = sampling.repetition_penalty != 1
        body: dict[str, Any] = {
            "prompt": ids,
            "n_predict": limit,
            "samplers": SAMPLERS,
            "temperature": sampling.temperature if sampling.temperature >= GREEDY else 0.0,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "min_keep": 0,
            "mirostat": 0,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": len(ids) + limit if repeats else 0,
            "logit_bias": list((sampling.logit_bias or {}).items()),
            "ignore_eos": sampling.ignore_eos,
            "grammar": grammar,
            # Of special tokens, which have no text but these.
            "preserved_tokens": call.marks,
            "cache_prompt": self._prefix_cache,
            "stream": True,
            # So a thread hears of every step, also while its prompt is read, and can stop there.
            "return_progress": True,
            # Some tokens have no text of their own; this counts them.
            "timings_per_token": True,
        }
        if sampling.seed is not None:
            body["seed"] = _seed(sampling.seed, choice)
        return body

    def cancel(self, call_id: str) -> None:
        self._forget(call_id)

    # --- the state of things ---

    def busy(self) -> bool:
        return bool(self._calls)

    def waiting(self) -> int:
        return sum(not call.begun for call in self._calls.values())

    def close(self) -> None:
        """Waits for the slots to become free: a few steps of llama.cpp's."""
        for call_id in list(self._calls):
            self._forget(call_id)
        for thread in self._running.values():
            thread.join()
        self._structures.close()
        self._server = None
        self._door.close()

    # --- one step ---

    def step(self) -> list[Event]:
        """What llama.cpp has said since the last step; waits for it, but not longer than `LONGEST_STEP`."""
        events: list[Event] = []
        for call_id, error in self._structures.deliver(0 if self._running else LONGEST_STEP):
            self._forget(call_id)
            events.append((call_id, error))
        self._begin(events)
        if events:
            return events
        try:
            heard = [self._heard.get(timeout=LONGEST_STEP)]
            while not self._heard.empty():
                heard.append(self._heard.get())
        except Empty:
            return events
        for seq, outcome in heard:
            if outcome is None:
                del self._running[seq]
            if seq.call.gone:
                continue
            if outcome is None and not seq.finished:
                outcome = EngineFault("The model ended this answer too early.")
            if isinstance(outcome, Chunk):
                self._tell(seq, outcome, events)
            elif outcome is not None:
                self._forget(seq.call.id)
                events.append((seq.call.id, outcome))
        self._begin(events)
        return events

    def _tell(self, seq: _Sequence, chunk: Chunk, events: list[Event]) -> None:
        events.append((seq.call.id, chunk))
        self._line.charge(seq.key, chunk.tokens)
        if chunk.finish_reason:
            seq.told = True
            self._line.leave(seq)
            seq.call.unfinished -= 1
            if not seq.call.unfinished:
                del self._calls[seq.call.id]
                events.append((seq.call.id, None))

    def _begin(self, events: list[Event]) -> None:
        """Let in who is next, while there are slots, and room for the longest answers of all that run.

        llama.cpp has no way to make a sequence wait that has begun.
        """
        while len(self._running) < self.info.max_batch and (seq := self._line.first()):
            if sum(s.needs for s in self._running) + seq.needs > self._cache_tokens:
                return
            self._line.take(seq)
            self._line.charge(seq.key, len(seq.prompt.ids))
            seq.slot = self._place(seq.prompt.ids)
            seq.call.begun = True
            if not seq.prompt.reported:
                seq.prompt.reported = True
                events.append((seq.call.id, Chunk(index=seq.index, prompt_tokens=len(seq.prompt.ids))))
            thread = threading.Thread(target=self._run, args=(seq,), name=f"sequence {seq.index}", daemon=True)
            self._running[seq] = thread
            thread.start()

    def _place(self, ids: list[int]) -> int:
        """A free slot for a prompt: the one that has last read most of what it begins with."""
        taken = {s.slot for s in self._running}
        free = [i for i in range(len(self._slots)) if i not in taken]
        slot = max(free, key=lambda i: _shared(self._slots[i], ids)) if self._prefix_cache else free[0]
        self._slots[slot] = ids
        return slot

    def _forget(self, call_id: str) -> None:
        call = self._calls.pop(call_id, None)
        self._structures.drop(call_id)
        if call is not None:
            call.gone = True
            waiting = [s for s in self._line if s.call is call]
            for seq in [*waiting, *(s for s in self._running if s.call is call and not s.told)]:
                self._line.leave(seq)

    # --- in the threads ---

    def _run(self, seq: _Sequence) -> None:
        try:
            if seq.steps is None:
                self._stream(seq, {}, partial(self._hear, seq))
            else:
                self._walk(seq, seq.steps)
        except HfmsError as exc:
            self._heard.put((seq, exc))
        except Exception:
            log.exception("llama.cpp did not take a sequence")
        finally:
            if self._vacates:
                self._vacate(seq.slot)
            self._heard.put((seq, None))

    def _vacate(self, slot: int) -> None:
        try:
            self._door.ask("POST", f"/slots/{slot}?action=erase", {}, _Erased)
        except DoorClosed as exc:
            self._vacates = False
            log.warning("llama.cpp keeps what idle slots have read, which makes its steps longer: %s", exc)

    def _stream(self, seq: _Sequence, changes: dict[str, Any], hear: Callable[[bytes], bool]) -> None:
        self._server.handle_completions(msgspec.json.encode(seq.request | {"id_slot": seq.slot} | changes), hear)

    def _walk(self, seq: _Sequence, steps: Steps) -> None:
        """Make an answer a request a token."""
        # A long prompt is read first, as a stream, which can be stopped. In whole steps, as it would be read otherwise.
        whole = (len(seq.prompt.ids) - 1) // self._prefill_tokens * self._prefill_tokens
        if whole and steps.scores is None:
            self._stream(seq, {"prompt": seq.prompt.ids[:whole], "n_predict": 1}, lambda _: seq.call.gone)
            if seq.call.gone:
                return
            seq.request["cache_prompt"] = True

        def ask(changes: dict[str, Any]) -> Step:
            said: list[bytes] = []

            def hear(data: bytes) -> bool:
                said.append(data)
                return False

            alone = {"n_predict": 1, "stream": False, "return_tokens": True, "verbose": True}
            self._stream(seq, alone | changes, hear)
            seq.request["cache_prompt"] = True
            if error := msgspec.json.decode(said[0], type=_Said).error:
                raise _failed(error)
            return msgspec.json.decode(said[0], type=Step)

        for chunk in steps.chunks(Reader(ask, self._words)):
            if seq.call.gone:
                return
            if chunk is not None:
                seq.finished = chunk.finish_reason is not None
                self._heard.put((seq, chunk))

    def _hear(self, seq: _Sequence, data: bytes) -> bool:
        """Take a word from llama.cpp; True: the sequence leaves its slot now."""
        if seq.call.gone:
            return True
        try:
            said = msgspec.json.decode(data, type=_Said)
            if said.error:
                raise _failed(said.error)
            outcome: Chunk | HfmsError | None = seq.take(said)
        except HfmsError as exc:
            outcome = exc
        except Exception:
            log.exception("llama.cpp said what was not understood")
            outcome = EngineFault("The model's output could not become text.")
        if outcome is not None:
            self._heard.put((seq, outcome))
        return seq.finished or isinstance(outcome, HfmsError)


def _failed(error: _Failure) -> EngineFault:
    log.error("llama.cpp failed on a sequence: %s", error.message)
    return EngineFault("The model failed on this request.")


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _seed(seed: int, *of: int) -> int:
    """llama.cpp's seeds have 32 bits, of which all set means none; answers to one seed differ by their choice."""
    name = "/".join(map(str, (seed, *of)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (2**32 - 1)


def _seeds(call: Call, choice: int) -> Callable[[int], int | None]:
    """For each token of a choice that is made a request a token."""
    seed = call.sampling.seed
    return lambda place: None if seed is None else _seed(seed, choice, place)


# --- llama.cpp's door ---


class DoorClosed(Exception):
    """llama.cpp did not do what it was asked for."""


@dataclass
class Door:
    """llama.cpp's HTTP server, on a socket that nobody else can reach."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hfms-llama-")))
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def path(self) -> str:
        return str(self.folder / "s.sock")

    def ask(self, method: str, path: str, body: Any, answer: type[T]) -> T:
        """Raises DoorClosed."""
        connection = _UnixConnection(self.path)
        try:
            headers = {"Authorization": f"Bearer {self.secret}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else msgspec.json.encode(body), headers)
            response = connection.getresponse()
            data = response.read()
            if response.status != 200:
                raise DoorClosed(f"{path}: {response.status}")
            return msgspec.json.decode(data, type=answer)
        except (OSError, http.client.HTTPException, msgspec.MsgspecError) as exc:
            raise DoorClosed(path) from exc
        finally:
            connection.close()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("llama.cpp")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


# --- loading ---


def load(
    request: LoadRequest,
    *,
    cache_tokens: int,
    max_batch: int,
    prefill_tokens: int,
    prefix_cache: bool,
    memory_bytes: int,
    threads: int = 0,
) -> LlamaCpp:
    """Start llama.cpp with a model in it. Call it in the main thread. Raises LoadFailed.

    threads: 0: one for each physical core.
    """
    card = request.card
    if request.dtype != "auto":
        raise LoadFailed("llama.cpp runs a GGUF in the types that it holds; set [models] dtype to auto.")
    # When llama.cpp aborts, it would have a debugger print what is on the stack.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    door = Door()
    params = xllamacpp.CommonParams()
    params.model.path = str(request.folder / card.weights[0])  # llama.cpp finds the other parts by their names
    params.hostnames, params.api_keys = [door.path], [door.secret]
    # One for what `submit` asks, and one for each slot that waits for a step to be emptied.
    params.n_threads_http = 1 + max_batch
    params.endpoint_slots = params.ui = False
    params.endpoint_metrics = True
    params.verbosity = 1  # errors; more would hold prompts
    params.n_parallel = max_batch
    params.n_ctx = cache_tokens
    # One cache for all slots, so that one text can be as long as the model allows. Each step looks through all of it
    # that is in use, so where there is room for such a text in each slot, each has a cache of its own.
    context = min(card.context_length or cache_tokens, cache_tokens)
    params.kv_unified = cache_tokens < max_batch * context
    params.slot_save_path = f"{door.folder}/"  # llama.cpp erases a slot only where it could also save it
    params.fit_params = False
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.n_batch = max(prefill_tokens, max_batch, 2)  # a token of each slot fits, and the two of the warm-up
    params.n_ubatch = min(params.n_ubatch, params.n_batch)
    params.prefill_assistant = False  # the last message is over, whoever said it
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or physical_cores()
    # llama.cpp takes the process's signals for itself.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as exc:
        door.close()
        raise LoadFailed(
            f"llama.cpp cannot load this GGUF: it does not know the architecture `{card.architecture}`, the file is"
            " damaged, or memory is short; the log says which."
        ) from exc
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    server.handle_metrics()  # answered once its loop turns; if it were ended before that, it would never end
    info = LoadedInfo(
        engine="llama_cpp",
        device=request.device.id,
        dtype=card.dtype,
        tasks=("generate",),
        context_length=context,
        max_batch=max_batch,
        memory_bytes=memory_bytes,
        chat=card.chat_template,
        weights_bytes=card.weights_bytes,
    )
    return LlamaCpp(
        server,
        door,
        info,
        cache_tokens=cache_tokens,
        prefill_tokens=params.n_batch,
        prefix_cache=prefix_cache,
        shared=params.kv_unified,
    )
