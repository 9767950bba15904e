"""Engines that come with hfms."""

from __future__ import annotations

from collections.abc import Iterator

from hfms_cli import Engine, Provider, Storage, hookimpl
from hfms_engines.echo import EchoEngine, EchoOptions, EchoStorage
from hfms_engines.embeddings import Embeddings, EmbeddingsOptions
from hfms_engines.generation import GenerationEngine, GenerationOptions
from hfms_engines.llama_cpp import LlamaCppEngine, LlamaCppOptions
from hfms_engines.openvino import OpenVinoEngine, OpenVinoOptions
from hfms_engines.speech import SpeechEngine, SpeechOptions
from hfms_engines.vision import VisionEngine, VisionOptions


@hookimpl
def hfms_engines() -> Iterator[Provider[Engine]]:
    yield Provider("echo", EchoEngine, EchoOptions, summary="Answers with the prompt: for tests and measurements.")
    yield Provider("openvino", OpenVinoEngine, OpenVinoOptions, summary="Text generation on CPUs, fast and batched.")
    yield Provider("transformers", GenerationEngine, GenerationOptions, summary="Text generation by torch, batched.")
    yield Provider("llama_cpp", LlamaCppEngine, LlamaCppOptions, summary="Text generation from GGUF, without torch.")
    yield Provider("speech", SpeechEngine, SpeechOptions, summary="What is said in recordings, by Whisper and torch.")
    yield Provider("vision", VisionEngine, VisionOptions, summary="Answers about images, by torch.")
    yield Provider(
        "embeddings", Embeddings, EmbeddingsOptions, summary="Embeddings and scores of pairs, as sentence-transformers."
    )


@hookimpl
def hfms_storages() -> Iterator[Provider[Storage]]:
    yield Provider("echo", EchoStorage, summary="The models of the echo engine: `echo:NAME`.")
