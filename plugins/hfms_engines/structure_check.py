"""A structure that a caller asks for -> a grammar that llguidance follows. Runs in a process of its own.

Schemas, regexes and grammars come from callers, and some take a compiler for ever, or its stack. So each is compiled
here first, where only this process can be lost: within `SECONDS` of processor time, and with less stack than the
engines have. What comes back is Lark, whatever was asked for.

`structure.Checker` starts this file as a program; it imports nothing of hfms, so that it starts fast.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

SECONDS = 1.0
_STACK_BYTES = 4 << 20
_MEMORY_BYTES = 2 << 30

# Between parts of JSON: one blank, or a new line with its indent. A model may not fill its answer with blanks.
WHITESPACE = r"[ \t]|\r?\n[ \t]{0,40}"
LAYOUT = {"whitespace_pattern": WHITESPACE}
# JSON on one line, for older llguidances: they let such a pattern come any number of times, and take no other.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# fmt: off
_ENFORCED = {
    "$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties", "minLength",
    "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}
_ENFORCED_BELOW = {"items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "oneOf", "allOf"}
_ENFORCED_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
_SAY_NOTHING = {
    "$anchor", "$schema", "$id", "id", "$comment", "title", "description", "default", "deprecated", "discriminator",
    "example", "examples", "readOnly", "writeOnly", "contentMediaType", "contentEncoding",
}
# fmt: on


def limits() -> Any:
    """What following a grammar may cost: a step some 20 ms, and a sequence's automaton some 40 MB."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class Refused(Exception):
    """What is wrong with a structure, for whoever sent it."""


def grammar_of(kind: str, spec: str, layout: dict[str, Any]) -> str:
    """Lark for a structure. Raises Refused, and what its parsers raise.

    layout: what may stand between parts of JSON.
    """
    if kind == "json_object":
        return _json({"type": "object"}, layout)
    if kind == "json_schema":
        schema = json.loads(spec, parse_constant=_no_constant)
        check_schema(schema)
        return _json(schema if isinstance(schema, dict) else {"allOf": [schema]}, layout)
    if kind == "choice":
        return f"%llguidance {{}}\nstart: CHOICE\nCHOICE: {'|'.join(map(json.dumps, json.loads(spec)))}\n"
    if kind == "regex":
        from llguidance._lib import regex_to_lark

        return f"%llguidance {{}}\nstart: /{regex_to_lark(spec)}/\n"
    from llguidance.gbnf_to_lark import any_to_lark

    lark = any_to_lark(spec)
    return lark if lark.lstrip().startswith("%llguidance") else f"%llguidance {{}}\n{lark}"


def _json(schema: dict[str, Any], layout: dict[str, Any]) -> str:
    return f"%llguidance {{}}\nstart: %json {json.dumps({'x-guidance': layout} | schema)}\n"


def _no_constant(name: str) -> Any:
    raise Refused(f"{name} is no JSON.")


def check_schema(schema: Any) -> None:
    """Refuse what llguidance would pass over without a word. Raises Refused."""
    below = [(schema, "#")]
    while below:
        node, at = below.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise Refused(f"`{at}` is no schema: it must be an object, true or false.")
        for word, value in node.items():
            if word in _ENFORCED_BELOW:
                several = enumerate(value) if isinstance(value, list) else [("", value)]
                below += [(child, f"{at}/{word}/{i}".rstrip("/")) for i, child in several]
            elif word in _ENFORCED_BY_NAME:
                if not isinstance(value, dict):
                    raise Refused(f"`{at}/{word}` must be an object.")
                below += [(child, f"{at}/{word}/{name}") for name, child in value.items()]
            elif not (word in _ENFORCED or word in _SAY_NOTHING or (word.startswith("x-") and word != "x-guidance")):
                raise Refused(f"the keyword `{word}` (in `{at}`) cannot be enforced.")
        # Names that the schema does not know may come twice, and then count once.
        least, certain = node.get("minProperties", 0), node.get("required", ())
        if isinstance(least, int) and isinstance(certain, list | tuple) and least > max(1, len(certain)):
            raise Refused(f"`minProperties` (in `{at}`) cannot be enforced beyond what is `required`.")


def _answer(job: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    from llguidance import LLMatcher

    try:
        grammar = grammar_of(job["kind"], job["spec"], job["layout"])
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return {"error": plain(matcher.get_error())}
    except Refused as exc:
        return {"error": str(exc)}
    except RecursionError:
        return {"error": "it is nested too deeply."}
    except Exception as exc:
        return {"error": plain(str(exc))}
    return {"grammar": grammar}


def plain(error: str) -> str:
    """llguidance's own words, without the grammar that it repeats after them."""
    if error.startswith("NoExtension"):
        return "no text fits it."
    if error.startswith("panic"):
        return "it makes the compiler fail."
    text = error.split("\n   1 |")[0].split("\n<state>")[0].split("; following special tokens")[0]
    text = text.partition("failed to compile JSON schema: ")[2] or text
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "use anyOf")
    return " ".join(text.split())[:300]


class _Words:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Collection[int], end: int, encode: Callable[[bytes], list[int]]
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, list(special), end
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


def tokenizer_of(
    tokens: Sequence[bytes], *, special: Collection[int], ends: Sequence[int], encode: Callable[[bytes], list[int]]
) -> Any:
    """llguidance's view of a tokenizer.

    tokens: the bytes of each; those of special ones are their names. ends: those that end an answer.
    encode: text to tokens.
    """
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    words = TokenizerWrapper(_Words(tokens, special, ends[0], encode))
    return LLTokenizer(words, n_vocab=len(tokens), eos_token=list(ends), slices=[])


def bytes_and(special: dict[int, bytes], vocabulary: int, end: int) -> Any:
    """A tokenizer with a model's special tokens; each other token is a single byte, or none."""
    tokens = [special.get(i, b"") for i in range(max(vocabulary, len(special) + 256))]
    free = [i for i in range(len(tokens)) if i not in special][:256]
    for byte, i in enumerate(free):
        tokens[i] = bytes([byte])
    return tokenizer_of(tokens, special=special, ends=[end], encode=lambda text: [free[byte] for byte in text])


def main() -> None:
    """Read what the tokenizer is like, then a structure a line; write its grammar, or what is wrong with it."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    about = json.loads(sys.stdin.buffer.readline())
    special = {int(i): name.encode() for i, name in about["special"].items()}
    tokenizer = bytes_and(special, about["vocabulary"], about["end"])
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
        answer = _answer(json.loads(line), tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
