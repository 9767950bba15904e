"""What a call may ask of a model that generates text: the same refusals, in the same words, from every engine."""

from __future__ import annotations

from hfms_cli import BadRequest, Call, ContextLengthExceeded, Conversation, NoChatTemplate, Pair, Sampling, Speech

Entry = str | list[int] | Conversation
"""One input of a call."""


def check_call(call: Call, vocabulary: int) -> list[Entry]:
    """The inputs of a call, after what no prompt could make right was refused.

    vocabulary: tokens that the model knows. Raises BadRequest.
    """
    if call.task != "generate":
        raise BadRequest(f"The model `{call.model}` generates text; it cannot be used to {call.task}.", param="model")
    sampling = call.sampling
    if sampling.max_tokens is not None and sampling.max_tokens < (0 if call.echo else 1):
        raise BadRequest("`max_tokens` must be 1 or more; 0 is for `echo`.", param="max_tokens")
    for token in sampling.logit_bias or ():
        check_token(token, vocabulary, "logit_bias")
    for token in sampling.stop_token_ids:
        check_token(token, vocabulary, "stop_token_ids")
    entries: list[Entry] = []
    for entry in call.inputs:
        if isinstance(entry, Pair | Speech):
            raise BadRequest("Pairs of texts and recordings are for models of other kinds.", param="model")
        entries.append(entry)
    return entries


def check_token(token: int, vocabulary: int, param: str) -> None:
    """Raises BadRequest."""
    if not 0 <= token < vocabulary:
        raise BadRequest(f"Token {token} is not in the model's vocabulary, which has {vocabulary} tokens.", param=param)


def answer_limit(tokens: int, entry: Entry, sampling: Sampling, context: int) -> int:
    """Tokens that an answer to a prompt of so many tokens may have. Nothing is ever cut to fit.

    context: tokens of prompt and answer together. Raises BadRequest and ContextLengthExceeded.
    """
    where = field(entry)
    if not tokens:
        raise BadRequest("The prompt is empty.", param=where)
    limit = sampling.max_tokens if sampling.max_tokens is not None else max(1, context - tokens)
    if tokens + limit > context:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, you requested {tokens + limit} tokens"
            f" ({tokens} in the {where}, {limit} in the completion). Please reduce the length of the {where} or of"
            " the completion.",
            param=where,
        )
    return limit


def no_chat_template() -> NoChatTemplate:
    """For a conversation with a model that was not made for one."""
    return NoChatTemplate(
        "This model has no chat template, so it cannot hold a conversation; use /v1/completions.", param="messages"
    )


def unfit_messages() -> BadRequest:
    """For a conversation that the template fails on without saying why."""
    return BadRequest(
        "The model's chat template cannot make a prompt of these messages; check their roles and the types of their"
        " contents.",
        param="messages",
    )


def field(entry: Entry) -> str:
    """The request's field that an input came in."""
    return "messages" if isinstance(entry, Conversation) else "prompt"
