"""Tiny models that look at images, with seeded random weights and real processors, and images to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engines.tiny import SIZES, tokenizer

# As SmolVLM's: contents come in parts.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['content'][0]['type'] == 'image' %}:{% else %}: "
    "{% endif %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip


def _words(*marks: str) -> Any:
    words = tokenizer(template=False)
    words.add_special_tokens({"additional_special_tokens": ["<image>", *marks]})
    return words


def _text_config(words: Any, family: str = "llama") -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family, **SIZES, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
    )  # fmt: skip


def _idefics3() -> tuple[Any, Any]:
    """SmolVLM's first: an image is cut into tiles of 32 pixels, which are 4 tokens each."""
    from transformers import Idefics3Config, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = _words("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles)
    config = Idefics3Config(
        vision_config=VISION, text_config=_text_config(words), scale_factor=2, tie_word_embeddings=False,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return config, Idefics3Processor(images, words, image_seq_len=4, chat_template=TEMPLATE)


def _llava() -> tuple[Any, Any]:
    """An image is scaled and cropped to 32 by 32, and is 16 tokens."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = _words()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=_text_config(words),
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {"idefics3": _idefics3, "llava": _llava}


def tiny_vision(folder: Path, family: str = "idefics3") -> Path:
    """As a model hub would hold it."""
    import torch
    from transformers import AutoModelForImageTextToText

    config, processor = FAMILIES[family]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(width: int = 90, height: int = 60, *, seed: int = 0, format: str = "PNG", mode: str = "RGB") -> bytes:
    """A file with an image of noise."""
    import numpy
    from PIL import Image

    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype="uint8")
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, format)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
