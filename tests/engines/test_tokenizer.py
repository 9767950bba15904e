"""A real model's tokenizer over HTTP, from its real process."""

from __future__ import annotations

import pytest

from tests.conftest import SMOLLM2


@pytest.mark.real_model
async def test_a_real_models_tokens_are_those_of_its_tokenizer(serve, smollm2_words):
    words = smollm2_words
    messages = [{"role": "user", "content": "What is 日本?"}]
    async with serve(SMOLLM2) as server:
        text = "The capital of 日本 is Tōkyō.<|im_end|>"
        _, told = await server.post("/tokenize", {"model": SMOLLM2, "prompt": text, "return_token_strs": True})
        assert told["tokens"] == words(text)["input_ids"]
        assert told["token_strs"] == words.convert_ids_to_tokens(told["tokens"])
        assert (await server.post("/detokenize", {"tokens": told["tokens"]}))[1] == {"prompt": text}
        for begins in (True, False):
            asked = {"messages": messages, "add_generation_prompt": begins}
            _, chat = await server.post("/tokenize", asked)
            expected = words.apply_chat_template(messages, add_generation_prompt=begins, return_dict=False)
            assert chat["tokens"] == expected
            assert chat["token_strs"] is None
        _, about = await server.get("/tokenizer_info")
        assert about["eos_token"] == words.eos_token
        assert about["chat_template"] == words.chat_template
        assert about["vocab_size"] == len(words)
        assert about["model_max_length"] == told["max_model_len"] == 8192
        status, refused = await server.post("/detokenize", {"tokens": [10**6]})
        assert (status, refused["error"]["param"]) == (400, "tokens")


@pytest.fixture
def smollm2_words(smollm2):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2, gguf_file=next(smollm2.glob("*.gguf")).name)
