"""Which files of a repository a model is."""

from __future__ import annotations

from collections.abc import Collection

from hfms_cli import BadRequest, ModelNotFound, SeveralModels, choose, gguf_models, gguf_tag, no_model


def choose_files(repo: str, paths: Collection[str], quant: str, usual: str = "") -> tuple[str, ...]:
    """The files to take.

    quant: of a GGUF, as the name says it. usual: the one to take of several where it does not; empty: none.
    Raises BadRequest where a name must say which, ModelNotFound where there are none.
    """
    models = gguf_models(paths)
    try:
        files = choose(paths, quant)
    except SeveralModels:
        files = choose(paths, usual) if usual else ()
    if not files and models:
        choices = ", ".join(f"`{repo}:{tag}`" for tag in dict.fromkeys(map(gguf_tag, models)))
        raise BadRequest(f"Which GGUF model of `{repo}`? Name one: {choices}.", param="model")
    if not files:
        raise ModelNotFound(f"`{repo}` {no_model(paths)}", param="model")
    return files
