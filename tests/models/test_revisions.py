"""Revisions of one model side by side, out of the Hub's cache, without the Hub."""

from __future__ import annotations

import pytest

from tests.models.test_catalogue import make_model

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def two_revisions(tmp_path) -> str:
    """The settings of a cache with `org/tiny` twice: `main` is the first commit, `v2` the second."""
    repo = tmp_path / "hub" / "models--org--tiny"
    for commit, ref in ((FIRST, "main"), (SECOND, "v2")):
        snapshot = make_model(repo / "snapshots" / commit)
        (repo / "blobs").mkdir(exist_ok=True)
        for file in list(snapshot.iterdir()):  # as the Hub's library keeps them: links to blobs
            blob = repo / "blobs" / f"{commit[0]}-{file.name}"
            file.rename(blob)
            file.symlink_to(f"../../blobs/{blob.name}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return f'[storage.hf_cache]\ncache_dir = "{tmp_path}/hub"\n'


async def test_two_revisions_of_one_model_are_served_side_by_side_and_the_plain_name_is_the_default(
    serve, two_revisions
):
    async with serve(toml=two_revisions) as server:
        for name in ("org/tiny", "org/tiny@v2"):
            status, body = await server.post("/v1/completions", {"model": name, "prompt": "hi"})
            assert (status, body.get("error")) == (200, None)
        _, listed = await server.get("/models")
        rows = {row["id"]: row for row in listed["data"]}
        assert {i: (r["status"]["value"], r["revision"]) for i, r in rows.items()} == {
            "org/tiny": ("loaded", FIRST),
            "org/tiny@v2": ("loaded", SECOND),
        }
        assert rows["org/tiny"]["pid"] != rows["org/tiny@v2"]["pid"]
        _, listed = await server.get("/v1/models")
        told = {m["id"]: m for m in listed["data"]}
        assert {i: m["digest"] for i, m in told.items()} == {i: r["digest"] for i, r in rows.items()}
        assert told["org/tiny"]["digest"] != told["org/tiny@v2"]["digest"]
        assert await server.post("/models/unload", {"model": "org/tiny@v2"}) == (
            200,
            {"id": "org/tiny@v2", "status": {"value": "unloaded"}},
        )
        assert server.runtime.pool.find("org/tiny").state == "loaded"


async def test_a_digest_is_the_same_before_and_after_a_load(serve, two_revisions):
    async with serve(toml=two_revisions) as server:
        _, before = await server.get("/v1/models/org/tiny")
        await server.runtime.pool.load("org/tiny")
        _, after = await server.get("/v1/models/org/tiny")
        assert before["digest"] == after["digest"]
        assert (before["revision"], len(before["digest"])) == (FIRST, 64)


async def test_a_commit_and_a_name_that_stands_for_it_are_one_model(serve, two_revisions):
    async with serve(toml=two_revisions) as server:
        for name in ("org/tiny@v2", f"org/tiny@{SECOND}"):
            assert (await server.post("/v1/completions", {"model": name, "prompt": "hi"}))[0] == 200
        assert [m.id for m in server.runtime.pool.models()] == ["org/tiny@v2"]
        status, body = await server.post("/models/unload", {"model": f"org/tiny@{SECOND}"})
        assert (status, body["id"]) == (200, "org/tiny@v2")
        assert (await server.post("/models/unload", {"model": f"org/tiny@{SECOND}"}))[0] == 404


async def test_an_alias_of_the_configuration_may_name_a_revision(serve, two_revisions):
    async with serve(toml=two_revisions + '[models.aliases]\nnew = "org/tiny@v2"') as server:
        assert (await server.post("/v1/completions", {"model": "new", "prompt": "hi"}))[0] == 200
        assert server.runtime.pool.find("new").manifest.revision == SECOND
        assert (await server.get("/v1/models/new"))[1]["root"] == "org/tiny@v2"
