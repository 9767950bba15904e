"""An engine of hfms in this process, asked as its worker asks it: no HTTP, no other process. See `do_jobs`.

    python -m tests.benchmarks.hfms_alone MODEL ENGINE --config FILE

What `hfms serve` with the same file loses beside this is what the server costs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hfms_cli import Call, LoadRequest, Sampling, TokensOf
from hfms_cli.config import load_config
from hfms_cli.models.inspect import inspect
from hfms_cli.plugins import discover
from hfms_hardware.cpu import Cpu
from tests.benchmarks.genai_server import do_jobs


class Engine:
    """A loaded model."""

    def __init__(self, model: Path, name: str, config_file: Path) -> None:
        config = load_config(config_file)
        (device,) = Cpu().probe().devices
        folder = model.parent if model.is_file() else model
        request = LoadRequest(folder=folder, card=inspect(model), device=device, dtype=config.models.dtype)
        self._model = discover(config).create("engine", name, config).load(request)

    def encode(self, text: str) -> list[int]:
        return list(self._model.ask(TokensOf(text)).ids)

    def add(self, key: int, ids: list[int], limit: int) -> None:
        sampling = Sampling(temperature=0.0, max_tokens=limit, ignore_eos=True)
        self._model.submit(Call(id=str(key), model="m", task="generate", inputs=[ids], sampling=sampling))

    @property
    def busy(self) -> bool:
        return bool(self._model.busy())

    def step(self) -> list[tuple[int, list[int], bool]]:
        """Of each request that got tokens: its key, as many numbers as it got tokens, and whether it has ended."""
        said: dict[str, int] = {}
        ended = set()
        for call, chunk in self._model.step():
            if chunk is None:
                ended.add(call)
            elif isinstance(chunk, Exception):
                raise chunk
            else:
                said[call] = said.get(call, 0) + chunk.tokens
        return [(int(call), [0] * said.get(call, 0), call in ended) for call in {**said, **dict.fromkeys(ended)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("engine")
    parser.add_argument("--config", type=Path, required=True)
    args = parser.parse_args()
    engine = Engine(args.model, args.engine, args.config)
    do_jobs(engine, engine.encode)


if __name__ == "__main__":
    main()
