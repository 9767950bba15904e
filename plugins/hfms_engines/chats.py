"""Chats into prompts, by the model's own template."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hfms_cli import BadRequest, Conversation
from hfms_engines import limits

T = TypeVar("T")

# fmt: off
# What a client may pass to a chat template; the other arguments of `apply_chat_template` are the engine's.
_NOT_FOR_TEMPLATES = {
    "chat_template", "conversation", "max_length", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
}
# fmt: on


def templated(chat: Conversation, template: object, apply: Callable[..., T]) -> T:
    """What `apply`, a tokenizer's `apply_chat_template`, makes of a chat by its template.

    Raises BadRequest, and NoChatTemplate where there is no template.
    """
    from jinja2 import TemplateError

    if not template:
        raise limits.no_chat_template()
    extra = chat.template_kwargs or {}
    if taken := sorted(_NOT_FOR_TEMPLATES & extra.keys()):
        raise BadRequest(f"`{taken[0]}` is not a variable of chat templates.", param="chat_template_kwargs")
    try:
        return apply(chat.messages, **{"add_generation_prompt": True, **extra}, tools=chat.tools)
    except TemplateError as exc:
        raise BadRequest(f"The model's chat template refuses these messages: {exc}", param="messages") from exc
    except Exception as exc:
        raise limits.unfit_messages() from exc
