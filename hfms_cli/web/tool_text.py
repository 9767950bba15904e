"""Tools for a model whose chat template takes none: what it may call, and what came of it, told in its messages.

The words and the format are those of Hermes and Qwen, which most models have seen.
"""

from __future__ import annotations

from typing import Any

import msgspec

_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_BEHIND = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def told(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, system: bool) -> list[dict[str, Any]]:
    """Messages for such a template. system: it takes a system message; else the first message of a user tells."""
    plain = _without_calls(messages)
    if not tools:
        return plain
    text = _BEFORE + "\n".join(map(_json, tools)) + _BEHIND
    role = "system" if system else "user"
    at = next((i for i, message in enumerate(plain) if message["role"] == role), None)
    if at is None or (system and at > 0):
        return [{"role": role, "content": text}, *plain]
    content = plain[at]["content"]
    parts = (content, text) if system else (text, content)
    if isinstance(content, str):
        joined: Any = "\n\n".join(parts)
    else:
        said = {"type": "text", "text": text}
        joined = [*content, said] if system else [said, *content]
    return [*plain[:at], plain[at] | {"content": joined}, *plain[at + 1 :]]


def _without_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls as text of who made them, and what came of them as a user's message; of several together, as one."""
    plain: list[dict[str, Any]] = []
    before = ""
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before == "tool":
                plain[-1] = plain[-1] | {"content": f"{plain[-1]['content']}\n{text}"}
            else:
                plain.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            texts = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in calls]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append(rest | {"content": "\n".join(filter(None, [message["content"], *texts]))})
        else:
            plain.append(message)
        before = message["role"]
    return plain


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
