"""A tiny Whisper with seeded random weights, and recordings of noise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "de", "fr")


def tiny_whisper(folder: Path) -> Path:
    """As a model hub would hold it: byte-level words, then Whisper's marks and times."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)} | {"<|endoftext|>": 256}, merges=[]
    )
    marks = ["<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>", "<|transcribe|>"]
    marks += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    ids = tokenizer.convert_tokens_to_ids
    end, begin = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=80, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=1500, max_target_positions=64, init_std=0.3, eos_token_id=end, bos_token_id=end,
        pad_token_id=end, decoder_start_token_id=begin, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=end, bos_token_id=end, decoder_start_token_id=begin, max_length=64,
        is_multilingual=True, lang_to_id={f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: ids(f"<|{task}|>") for task in ("translate", "transcribe")},
        no_timestamps_token_id=ids("<|notimestamps|>"), prev_sot_token_id=ids("<|startofprev|>"),
        max_initial_timestamp_index=50, begin_suppress_tokens=[ids(" "), end] if ids(" ") else [end],
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)
    return folder


def noise(seconds: float, *, rate: int = 16_000, seed: int = 0) -> Any:
    """float32 [samples]: a tone that wanders, under noise."""
    import numpy

    chance = numpy.random.default_rng(seed)
    at = numpy.arange(int(seconds * rate)) / rate
    tone = numpy.sin(2 * numpy.pi * (300 + 200 * numpy.sin(at + seed)) * at)
    return (0.2 * tone + 0.05 * chance.standard_normal(len(at))).astype("float32")


def recording(seconds: float, *, rate: int = 16_000, seed: int = 0, format: str = "WAV", channels: int = 1) -> bytes:
    """A file of it."""
    import numpy
    import soundfile

    file = io.BytesIO()
    sound = numpy.stack([noise(seconds, rate=rate, seed=seed)] * channels, axis=1)
    soundfile.write(file, sound, rate, format=format, **({"subtype": "FLOAT"} if format == "WAV" else {}))
    return file.getvalue()
