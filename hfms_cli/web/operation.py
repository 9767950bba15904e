"""What a route says of itself for `/openapi.json`, where it is registered, so that the two change together.

    @routes.post("/v1/embeddings")
    @operation("Inference", EmbeddingAnswer, body=EmbeddingRequest, example={...}, errors=(404,))
    async def embeddings(request): ...

The handler's docstring is the summary and, after its first line, the description. Types are those that validate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Handler = TypeVar("Handler", bound=Callable[..., Any])
_ATTRIBUTE = "hfms_operation"


@dataclass(frozen=True)
class Operation:
    """tag: the group it is shown in. answer: type of the JSON of a 200, or the name of another media type.

    body: type of the JSON that is sent, or with `form` of the fields of a form. example: of such a body.
    body_required: False where all of it may be left out.
    events: type of the JSON of each event, where `stream: true` asks for some. also: further good statuses, with the
    types of their JSON. errors: statuses of errors beside those that every route may answer. headers: those of the
    request that count, with their types. query: a type whose fields are those of the query. tells: headers of the
    answer, each with a sentence. texts: further media types of a 200, which are plain text.
    """

    tag: str
    answer: Any
    body: Any = None
    example: Mapping[str, Any] | None = None
    body_required: bool = True
    events: Any = None
    also: Mapping[int, Any] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    headers: Mapping[str, Any] = field(default_factory=dict)
    query: Any = None
    tells: Mapping[str, str] = field(default_factory=dict)
    form: bool = False
    texts: tuple[str, ...] = ()


def operation(tag: str, answer: Any, **more: Any) -> Callable[[Handler], Handler]:
    """Mark a handler; `more` is what `Operation` has."""
    said = Operation(tag, answer, **more)

    def mark(handler: Handler) -> Handler:
        vars(handler)[_ATTRIBUTE] = said
        return handler

    return mark


def operation_of(handler: Any) -> Operation | None:
    """What a handler says of itself; None where it says nothing."""
    found = getattr(handler, _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None
