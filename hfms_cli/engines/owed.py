"""How many tokens a call still asks of its engine: what calls are balanced by.

A call owes its prompts until the engine has read them, and the longest answers that it allows until they are made or
ended. Only the engine knows how many tokens a text has: here every four characters count as one, which is near enough
to compare engines by.
"""

from __future__ import annotations

import msgspec

from hfms_cli.types import Call, CallInput, Chunk, Conversation, Pair, Speech

CHARACTERS_A_TOKEN = 4
TOKENS_A_PICTURE = 512
"""Whatever its size: models make 64 to some thousands of one, and only they know."""
BYTES_A_TOKEN = 320
"""Of a recording, of which a second takes some 16,000 bytes where it is compressed a little, and is 50 tokens."""


class Owed:
    """Of one call; `left` falls with each chunk, and is never negative."""

    def __init__(self, call: Call, context_length: int) -> None:
        """context_length: where the call sets no limit, an answer may fill it."""
        prompts = [_tokens_of(item) for item in call.inputs]
        self._choices = call.n
        self._prompts = dict(enumerate(prompts))
        self._answers: dict[int, int] = {}
        if call.task == "generate":
            for which, prompt in enumerate(prompts):
                most = call.sampling.max_tokens
                limit = max(1, context_length - prompt) if most is None else most
                for choice in range(call.n):
                    self._answers[which * call.n + choice] = limit
        self.left = sum(prompts) + sum(self._answers.values())

    def pay(self, chunk: Chunk) -> int:
        """Take off what the chunk stands for, and answer how much that was."""
        paid = self._prompts.pop(chunk.index // self._choices, 0) if chunk.prompt_tokens else 0
        if before := self._answers.get(chunk.index):
            after = 0 if chunk.finish_reason else max(0, before - chunk.tokens)
            self._answers[chunk.index] = after
            paid += before - after
        self.left -= paid
        return paid


def _tokens_of(item: CallInput) -> int:
    if isinstance(item, list):
        return len(item)
    if isinstance(item, Pair):
        return sum(map(_tokens_of, msgspec.structs.astuple(item)))
    if isinstance(item, Conversation):
        tools = len(msgspec.json.encode(item.tools)) // CHARACTERS_A_TOKEN if item.tools else 0
        texts = sum(_tokens_of(str(message.get("content") or "")) for message in item.messages)
        return tools + texts + TOKENS_A_PICTURE * len(item.pictures)
    if isinstance(item, Speech):
        return 1 + len(item.data) // BYTES_A_TOKEN
    return 1 + len(item) // CHARACTERS_A_TOKEN
