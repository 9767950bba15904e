"""The checks, a module a group."""

GROUPS = (
    "models", "completions", "sampling", "chat", "streaming", "errors", "logprobs", "structured output", "tools",
    "embeddings", "rerank", "tokenize", "responses",
)  # fmt: skip
