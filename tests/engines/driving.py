"""A loaded model, driven as a worker process drives it: calls go in, steps are made, answers are gathered."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from hfms_cli import Call, Chunk, Device, HfmsError, LoadedModel, ModelCard, Sampling

CPU = Device(id="cpu", kind="cpu", name="this machine", total_bytes=2**34, free_bytes=2**33, torch_device="cpu")


def call(id: str, *inputs, n: int = 1, **sampling) -> Call:
    sampling = {"temperature": 0.0, "max_tokens": 8} | sampling
    return Call(id=id, model="m", task="generate", inputs=list(inputs), n=n, sampling=Sampling(**sampling))


class Answers:
    """What a model said: text, tokens and end of each choice, and how each call ended."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[Chunk]] = defaultdict(list)
        self.ended: dict[str, HfmsError | None] = {}

    def take(self, events) -> None:
        for call_id, outcome in events:
            assert call_id not in self.ended, "a call that has ended says no more"
            if isinstance(outcome, Chunk):
                self.chunks[call_id].append(outcome)
            else:
                self.ended[call_id] = outcome

    def text(self, call_id: str, index: int = 0) -> str:
        return "".join(c.text for c in self.chunks[call_id] if c.index == index)

    def finish(self, call_id: str, index: int = 0) -> str | None:
        return [c for c in self.chunks[call_id] if c.index == index][-1].finish_reason

    def tokens(self, call_id: str, index: int = 0) -> int:
        return sum(c.tokens for c in self.chunks[call_id] if c.index == index)

    def prompt_tokens(self, call_id: str) -> list[int]:
        return [c.prompt_tokens for c in self.chunks[call_id] if c.prompt_tokens]


def drain(model: LoadedModel, answers: Answers | None = None) -> Answers:
    answers = answers or Answers()
    while model.busy():
        answers.take(model.step())
    return answers


def ask(model: LoadedModel, *inputs, **sampling) -> Answers:
    model.submit(call("a", *inputs, **sampling))
    return drain(model)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    import torch

    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=chance).tolist() for n in lengths]


def gguf_card(folder: Path) -> ModelCard:
    file = next(folder.glob("*.gguf"))
    return ModelCard(
        format="gguf",
        model_type="llama",
        architecture="llama",
        tasks=("generate",),
        weights_bytes=file.stat().st_size,
        parameters=134_515_008,
        dtype="Q4_1",
        context_length=8192,
        weights=(file.name,),
    )
