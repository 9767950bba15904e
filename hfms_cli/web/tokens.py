"""A model's tokenizer over HTTP, as vLLM has it: `/tokenize`, `/detokenize`, `/tokenizer_info`.

The tokenizer is in the engine's process, which answers between two steps: no call in line holds that up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from hfms_cli.errors import BadRequest
from hfms_cli.parsing import formats_of
from hfms_cli.types import Conversation, LoadedInfo, Question, Reply, TextOf, Tokens, Vocabulary, VocabularyOf
from hfms_cli.web import answers
from hfms_cli.web.body import parse
from hfms_cli.web.context import RUNTIME, caller_of, log_of, respond
from hfms_cli.web.dialogue import with_tools
from hfms_cli.web.operation import operation
from hfms_cli.web.schemas import DetokenizeRequest, TokenizeRequest

R = TypeVar("R", bound=Reply)

routes = web.RouteTableDef()
ERRORS = (403, 404, 429, 502, 503, 504)


class TokenizerQuery(Struct):
    """The query of `GET /tokenizer_info`."""

    model: str | None = None
    """May be left out where one model is served."""


@routes.post("/tokenize")
@operation(
    "Tokens", answers.TokenList, body=TokenizeRequest, example={"model": "org/name", "prompt": "a text"}, errors=ERRORS
)
async def tokenize(request: web.Request) -> web.StreamResponse:
    """The tokens of a text or of a chat."""
    body = parse(TokenizeRequest, await request.read())
    question, use = body.question(), body.tool_use()
    settings = request.app[RUNTIME].config.models

    def suiting(info: LoadedInfo) -> Question:
        if isinstance(question.input, Conversation):
            formats = formats_of(info.template, settings.tool_parser, settings.reasoning_parser)
            return replace(question, input=with_tools(question.input, use, formats))
        return question

    told, info = await _ask(request, body.model, suiting, Tokens)
    return respond(
        {
            "count": len(told.ids),
            "max_model_len": info.context_length,
            "tokens": told.ids,
            "token_strs": told.names if body.return_token_strs else None,
        }
    )


@routes.post("/detokenize")
@operation(
    "Tokens", answers.TokenText, body=DetokenizeRequest, example={"model": "org/name", "tokens": [1, 2]}, errors=ERRORS
)
async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of tokens."""
    body = parse(DetokenizeRequest, await request.read())
    told, _ = await _ask(request, body.model, lambda _: TextOf(body.tokens), Tokens)
    return respond({"prompt": told.text})


@routes.get("/tokenizer_info")
@operation("Tokens", answers.TokenizerInfo, query=TokenizerQuery, errors=ERRORS)
async def tokenizer_info(request: web.Request) -> web.StreamResponse:
    """What a tokenizer is, by the names of `tokenizer_config.json`."""
    told, info = await _ask(request, request.query.get("model"), lambda _: VocabularyOf(), Vocabulary)
    return respond(
        {
            "tokenizer_class": told.kind,
            "vocab_size": told.size,
            "model_max_length": info.context_length,
            "bos_token": told.bos_token,
            "eos_token": told.eos_token,
            "pad_token": told.pad_token,
            "unk_token": told.unk_token,
            "all_special_tokens": told.special_tokens,
            "chat_template": told.chat_template,
        }
    )


async def _ask(
    request: web.Request, model: str | None, question: Callable[[LoadedInfo], Question], answer: type[R]
) -> tuple[R, LoadedInfo]:
    """What a model's engine says, and what is known of the model. Raises BadRequest and what a lease raises."""
    runtime, caller = request.app[RUNTIME], caller_of(request)
    if model is None:
        usable = [m.id for m in runtime.pool.models() if caller.may_use(m.id, *m.aliases)]
        if len(usable) != 1:
            raise BadRequest(
                "Which `model`? More than one is served, or none.", param="model", code="missing_parameter"
            )
        model = usable[0]
    log_of(request)["model"] = model
    with runtime.admit():
        async with runtime.pool.lease(model, caller) as leased:
            host = leased.host_now()
            reply = await host.ask(question(host.info))
            assert isinstance(reply, answer)
            return reply, host.info
