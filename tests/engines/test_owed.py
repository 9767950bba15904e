"""What calls owe, and that balancing by it is exact."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.engines import wire
from hfms_cli.engines.host import EngineHost, HostOptions
from hfms_cli.engines.owed import TOKENS_A_PICTURE, Owed
from hfms_cli.models.pool import least_outstanding
from hfms_cli.types import Call, Chunk, Conversation, Device, LoadedInfo, Picture, Sampling

CONTEXT = 100
CPU = Device(id="cpu", kind="cpu", name="cpu", total_bytes=1, free_bytes=1)
INFO = LoadedInfo(
    engine="test", device="cpu", dtype="none", tasks=("generate",), context_length=CONTEXT, max_batch=1, memory_bytes=0
)

inputs = st.lists(st.text(max_size=50) | st.lists(st.integers(0, 9), max_size=20), min_size=1, max_size=3)
calls = st.builds(
    Call,
    id=st.just("c"),
    model=st.just("m"),
    task=st.sampled_from(["generate", "embed"]),
    inputs=inputs,
    n=st.integers(1, 3),
    sampling=st.builds(Sampling, max_tokens=st.none() | st.integers(1, 50)),
)
chunks = st.builds(
    Chunk,
    index=st.integers(0, 12),  # also of choices that there are not: engines are plugins
    tokens=st.integers(0, 40),
    prompt_tokens=st.integers(0, 3),
    finish_reason=st.sampled_from([None, None, "stop"]),
)


@given(calls, st.lists(chunks))
def test_what_is_left_and_what_was_paid_are_always_the_whole_and_neither_is_negative(call, said):
    owed = Owed(call, CONTEXT)
    whole, paid = owed.left, 0
    for chunk in said:
        now = owed.pay(chunk)
        paid += now
        assert now >= 0
        assert owed.left >= 0
        assert owed.left + paid == whole


@given(calls)
def test_nothing_is_owed_once_every_prompt_is_read_and_every_answer_has_ended(call):
    owed = Owed(call, CONTEXT)
    for index in range(len(call.inputs) * call.n):
        first = index % call.n == 0
        owed.pay(Chunk(index=index, tokens=1, prompt_tokens=1 if first else 0, finish_reason="stop"))
    assert owed.left == 0


def test_a_call_owes_its_prompts_and_the_longest_answers_that_it_allows():
    def owes(*inputs, **more):
        return Owed(Call(id="c", model="m", task="generate", inputs=list(inputs), **more), CONTEXT).left

    chat = Conversation(messages=[{"role": "user", "content": "a" * 40}])
    assert owes([1, 2, 3], sampling=Sampling(max_tokens=10)) == 13
    assert owes([1, 2, 3], n=4, sampling=Sampling(max_tokens=10)) == 43
    assert owes([1, 2, 3]) == CONTEXT
    assert owes(chat, sampling=Sampling(max_tokens=1)) == 12
    tools = [{"a": "b" * 72}]  # 82 characters of JSON
    with_tools = Conversation(messages=chat.messages, tools=tools)
    assert owes(with_tools, sampling=Sampling(max_tokens=1)) == 32
    seen = Conversation(messages=chat.messages, pictures=[Picture(bytes(2**20), "messages")])
    assert owes(seen, sampling=Sampling(max_tokens=1)) == 12 + TOKENS_A_PICTURE


@dataclass
class Wired:
    """A host, and in place of its worker this test at the other end of the socket."""

    host: EngineHost
    worker: asyncio.StreamWriter
    receiving: asyncio.Task[None]
    steps: int = 0
    answers: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @classmethod
    async def make(cls) -> Wired:
        ours, theirs = socket.socketpair()
        host = EngineHost("m", CPU, HostOptions("test", {}, "hfms.toml", "hfms_engines", 3))
        host.info = INFO
        host._reader, host._writer = await asyncio.open_connection(sock=ours)
        _, worker = await asyncio.open_connection(sock=theirs)
        return cls(host, worker, asyncio.create_task(host._receive()))

    async def submit(self, call: Call) -> None:
        async def answer() -> None:
            async for _ in self.host.submit(call):
                continue

        self.answers[call.id] = asyncio.create_task(answer())
        await asyncio.sleep(0)

    async def step(self, *events: wire.Event) -> None:
        self.steps += 1
        self.worker.write(wire.pack(wire.Step(list(events), 0, self.steps)))
        while self.host.memory_bytes != self.steps:
            await asyncio.sleep(0)

    async def leave(self, call_id: str) -> None:
        task = self.answers.pop(call_id)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def close(self) -> None:
        for call_id in list(self.answers):
            await self.leave(call_id)
        self.receiving.cancel()
        for writer in (self.host._writer, self.worker):
            writer.close()


operations = st.lists(
    st.tuples(st.just("submit"), calls)
    | st.tuples(st.just("chunk"), st.integers(0, 99), chunks)
    | st.tuples(st.just("done"), st.integers(0, 99))
    | st.tuples(st.just("leave"), st.integers(0, 99)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_the_least_is_always_picked_and_when_all_calls_are_over_nothing_is_outstanding(todo):
    async def play() -> None:
        engines = [await Wired.make() for _ in range(3)]
        hosts = [e.host for e in engines]
        open_calls: list[tuple[Wired, str]] = []
        for number, (what, *about) in enumerate(todo):
            if what == "submit":
                with_room = [h for h in hosts if not h.full]
                if not with_room:
                    continue
                picked = least_outstanding(hosts)
                assert picked.outstanding == min(h.outstanding for h in with_room)
                engine = engines[hosts.index(picked)]
                call_id = f"c{number}"
                (call,) = about
                await engine.submit(Call(id=call_id, model="m", task=call.task, inputs=call.inputs, n=call.n))
                open_calls.append((engine, call_id))
            elif open_calls:
                engine, call_id = open_calls[about[0] % len(open_calls)]
                if what == "chunk":
                    await engine.step(wire.Event(call_id, chunk=about[1]))
                else:
                    open_calls.remove((engine, call_id))
                    if what == "done":
                        await engine.step(wire.Event(call_id))
                        await engine.answers.pop(call_id)
                    else:
                        await engine.leave(call_id)
            assert all(h.outstanding >= 0 for h in hosts)
            assert all(h.outstanding == 0 for h in hosts if not h.running)
        for engine in engines:
            await engine.close()
        assert [h.outstanding for h in hosts] == [0, 0, 0]

    asyncio.run(play())
