"""Tiny models of real architectures with seeded random weights, saved as a model hub would hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}"
    "{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if mood %}({{ mood }}) {% endif %}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox is off.",
    "naïve café, déjà vu, übergroß; 日本語のテキスト; Привет, мир! 👩‍👩‍👧‍👦 🤖",
    "def add(a, b):\n    return a + b\n",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Far from the usual 0.02, so that logits differ enough for argmax to be the same in every batch.
    "initializer_range": 0.3,
}
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def tokenizer(*, template: bool = True) -> Any:
    """A byte-level BPE of a few hundred tokens: any text has tokens, and most characters beyond ASCII have several."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[END, START, STOP],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=STOP, bos_token=END, pad_token=END)
    if template:
        wrapped.chat_template = TEMPLATE
    return wrapped


def save(folder: Path, config: Any, *, template: bool = True, dtype: str = "float32") -> Path:
    """A model of this configuration, with the weights that seed 0 gives."""
    import torch
    from transformers import AutoModelForCausalLM

    words = tokenizer(template=template)
    config.vocab_size = len(words)
    config.eos_token_id = [words.eos_token_id]
    config.bos_token_id = config.pad_token_id = words.bos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _config(model_type: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import AutoConfig

        settings = SIZES | more
        return AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})

    return make


SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _config("llama"),
    "qwen2": _config("qwen2"),
    "qwen3": _config("qwen3"),
    "qwen2-sliding": _config(
        "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1, layer_types=SLIDING_AND_FULL
    ),
    "mistral-sliding": _config("mistral", sliding_window=6),
    "gemma": _config("gemma"),
    "gemma2": _config("gemma2", sliding_window=6, layer_types=SLIDING_AND_FULL, query_pre_attn_scalar=8),
    "gemma3": _config("gemma3_text", sliding_window=6, layer_types=SLIDING_AND_FULL, query_pre_attn_scalar=8),
    "phi3": _config("phi3", pad_token_id=0),
    "gpt2": _config("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=512),
    "gpt_neox": _config("gpt_neox"),
    "olmo2": _config("olmo2"),
    "mixtral": _config("mixtral", num_local_experts=4),
    "cohere": _config("cohere"),
    "starcoder2": _config("starcoder2"),
    "deepseek_v3": _config(
        "deepseek_v3",
        num_key_value_heads=4,
        head_dim=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "opt": _config("opt", ffn_dim=64, word_embed_proj_dim=32),
    "falcon": _config("falcon", head_dim=None, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": _config("falcon", head_dim=None, alibi=True),
    "gpt_oss": _config("gpt_oss", num_local_experts=4, sliding_window=6),
    "gemma4": _config("gemma4_text", num_kv_shared_layers=1, layer_types=SLIDING_AND_FULL, sliding_window=6),
    "llama4": _config("llama4_text", num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=32),
}

_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
RECURRENT: dict[str, Callable[[], Any]] = {
    "mamba": _config("mamba"),
    "mamba2": _config("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "falcon_mamba": _config("falcon_mamba"),
    "falcon_h1": _config("falcon_h1", mamba_d_ssm=64, **_STATES),
    "bamba": _config("bamba", attn_layer_indices=[1], **_STATES),
    "granitemoehybrid": _config(
        "granitemoehybrid",
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
        **_STATES,
    ),
    "jamba": _config(
        "jamba",
        mamba_dt_rank=8,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
    ),
    "lfm2": _config("lfm2", layer_types=["conv", "full_attention", "conv"]),
    "qwen3_5": _config("qwen3_5_text", **_LINEAR),
    "qwen3_next": _config(
        "qwen3_next",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **_LINEAR,
    ),
}
"""Models with a state that is not keys and values."""
