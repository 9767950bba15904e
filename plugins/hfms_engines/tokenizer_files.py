"""The tokenizer beside a converted model: written by the conversion, read with each load.

transformers' AutoTokenizer imports torch and much else, which takes longer than to compile a small model. Most classes
that it chooses among differ from the one that they are derived from in how they are made only, and what was made is in
tokenizer.json. That one alone is imported in a third of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def keep(tokenizer: Any, folder: Path) -> str:
    """Write a tokenizer. Returns what `read` wants to know of it: its class, where that need not be imported."""
    tokenizer.save_pretrained(folder)
    name = type(tokenizer).__name__
    return name if _is_common(tokenizer, folder) else ""


def read(folder: Path, common: str) -> Any:
    """The tokenizer that `keep` wrote, without torch where it can be. common: what `keep` said."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if common:
        return _common(common).from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _common(name: str) -> Any:
    """The class that most are derived from, by the name of one of them."""
    from transformers import PreTrainedTokenizerFast

    return type(name, (PreTrainedTokenizerFast,), {})


def _is_common(tokenizer: Any, folder: Path) -> bool:
    """Whether its class has no ways of its own, and reads from a folder just what the common one does."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    own = {name for k in kind.__mro__ if k not in PreTrainedTokenizerFast.__mro__ for name in vars(k)}
    # `__init__` and `model` are how it is made. What else replaces something that is called or computed is its own way.
    replaced = [getattr(kind, n) for n in own - {"__init__", "model"} if hasattr(PreTrainedTokenizerFast, n)]
    if any(isinstance(found, property) or callable(found) for found in replaced):
        return False
    try:
        return _told(_common(kind.__name__).from_pretrained(folder, local_files_only=True)) == _told(tokenizer)
    except Exception:  # then it is read as before
        return False


def _told(tokenizer: Any) -> tuple[Any, ...]:
    """All that serving asks of a tokenizer, or what that follows from."""
    some = list(range(min(len(tokenizer), 512)))
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        tokenizer.special_tokens_map,
        tokenizer.all_special_tokens,
        tokenizer.chat_template,
    )
