"""schemathesis over `/openapi.json` of running servers, with every check that it has: nothing answers 5xx, and the
document is true of what is answered, also to requests that are wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMOLLM2

KEY = "k-0123456789abcdefghijkl"
PLUGINS = '[middleware]\norder = ["auth", "cache", "breaker"]\n[models]\nload_on_request = false\n'
NO_HUB = '[storage]\norder = ["local", "echo"]\n'
"""A Hub that cannot be reached is a 502, rightly."""


def about(document: dict[str, Any], model: str, longest: int | None = None) -> dict[str, Any]:
    """The document as of a server with one model, so that requests get as far as the engine.

    longest: of answers in tokens, and of their number; more would only take time.
    """
    document = json.loads(json.dumps(document).replace('"org/name"', json.dumps(model)))
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if properties.get("model") == {"type": "string"} and schema.get("additionalProperties") is False:
            properties["model"] = {"const": model}
            if longest is not None:
                if "max_tokens" in properties:
                    # Without a word on that, a chat goes on until the model ends it.
                    schema.setdefault("required", []).append("max_tokens")
                for name in {
                    "max_tokens",
                    "max_completion_tokens",
                    "max_output_tokens",
                    "min_tokens",
                    "n",
                    "best_of",
                } & properties.keys():
                    properties[name] = {"type": "integer", "minimum": 1, "maximum": longest}
    for routes in document["paths"].values():
        for operation in routes.values():
            example = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example", {})
            if longest is not None and "max_tokens" in example:
                example["max_tokens"] = longest
    return document


async def run(server, document: dict[str, Any], folder: Path, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    """schemathesis's status and words, and what it saw."""
    file, seen = folder / "openapi.json", folder / "seen.ndjson"
    file.write_text(json.dumps(document))
    # What fits together, and what an engine can do, is not for types to say, so 400 is an answer to good types, too.
    expected = '["2xx", "400", "401", "403", "404", "409", "413", "429"]'
    (folder / "schemathesis.toml").write_text(
        f'[auth.openapi.bearer]\nbearer = "{KEY}"\n[auth.openapi.key]\napi_key = "{KEY}"\n'
        f"[checks.positive_data_acceptance]\nexpected-statuses = {expected}\n"
    )
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(folder / "schemathesis.toml"), "run",
        str(file), "--url", server.url, "--checks", "all", "--seed", "1", "--no-color",
        "--report", "ndjson", "--report-ndjson-path", str(seen), *options,
        cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode(), [json.loads(line) for line in seen.read_text().splitlines()]


def answered(seen: list[dict[str, Any]]) -> set[str]:
    """The operations that gave a good answer."""
    recorders = [event.get("ScenarioFinished", {}).get("recorder", {}) for event in seen]
    return {
        recorder["label"]
        for recorder in recorders
        for exchange in recorder.get("interactions", {}).values()
        if exchange["response"] and exchange["response"]["status_code"] == 200
    }


def let_wrong_keys_pass_quickly(server) -> None:
    """One of the checks sends wrong keys, many times; the door would make it wait longer each time."""
    (auth,) = (m for m in server.runtime.middlewares if m.name == "auth")
    auth._throttle.failed = lambda address: 0.0


@pytest.mark.parametrize("part", ["inference", "the rest"])
async def test_every_route_holds_what_the_document_says(serve, tmp_path, part):
    async with serve("echo:a", toml=PLUGINS + NO_HUB, env={"HFMS_ADMIN_API_KEY": KEY}) as server:
        let_wrong_keys_pass_quickly(server)
        _, document = await server.get("/openapi.json", headers={"X-API-Key": KEY})
        document = about(document, "echo:a")
        chosen = ["--include-tag", "Inference"] if part == "inference" else ["--exclude-tag", "Inference"]
        # Unloading the model would leave nothing to ask.
        status, said, seen = await run(
            server, document, tmp_path, *chosen, "--exclude-path", "/models/unload", "--max-examples", "10"
        )
    assert status == 0, said
    if part == "inference":
        paths = (
            "chat/completions",
            "completions",
            "responses",
            "embeddings",
            "rerank",
            "score",
            "audio/transcriptions",
        )
        assert answered(seen) >= {f"POST /v1/{path}" for path in paths}


@pytest.mark.real_model
async def test_a_real_model_answers_no_request_with_5xx(serve, tmp_path):
    async with serve(SMOLLM2, toml=PLUGINS, env={"HFMS_ADMIN_API_KEY": KEY}) as server:
        let_wrong_keys_pass_quickly(server)
        _, document = await server.get("/openapi.json", headers={"X-API-Key": KEY})
        status, said, seen = await run(
            server, about(document, SMOLLM2, longest=2), tmp_path, "--mode", "positive",
            "--include-path-regex", "^/v1/(chat/)?completions$", "--max-examples", "10", "--phases",
            "examples,coverage,fuzzing",
        )  # fmt: skip
    assert status == 0, said
    assert answered(seen) == {"POST /v1/chat/completions", "POST /v1/completions"}
