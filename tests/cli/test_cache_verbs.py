"""`hfms cache`: there as long as the cache is in the order, and about the server that runs."""

from __future__ import annotations

import json
import urllib.request

import pytest

ON = '[middleware]\norder = ["cache"]\n'


def ask(url: str) -> None:
    body = {"model": "echo:tiny", "input": "hello"}
    request = urllib.request.Request(
        url + "/v1/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def test_stats_and_clear_are_of_the_running_server(hfms, serving, tmp_path):
    url = serving(ON)
    (tmp_path / "hfms.toml").write_text(ON)
    ask(url)
    ask(url)
    stats = json.loads(hfms("cache", "stats", "--url", url, "--json").stdout)
    assert (stats["hits"], stats["misses"], stats["entries"]) == (1, 1, 1)
    table = hfms("cache", "stats", "--url", url).stdout.splitlines()
    assert [line.split() for line in table[:3]] == [["WHAT", "VALUE"], ["hits", "1"], ["misses", "1"]]
    assert hfms("cache", "clear", "--url", url).stdout == "answers forgotten: 1\n"
    assert json.loads(hfms("cache", "clear", "--url", url, "--json").stdout) == {"cleared": 0}


def test_a_server_without_a_cache_says_so(hfms, serving, tmp_path):
    url = serving()
    (tmp_path / "hfms.toml").write_text(ON)
    done = hfms("cache", "stats", "--url", url)
    assert done.returncode == 1
    assert "Unknown URL (GET /admin/cache/stats)" in done.stderr


def test_the_verb_goes_with_the_middleware(hfms):
    assert "cache" not in hfms("--help").stdout.split()
    assert hfms("cache", "stats").returncode == 2
    with_it = {"HFMS_ENABLE_CACHING": "1"}
    assert "cache" in hfms("--help", env=with_it).stdout.split()
    assert hfms("cache", "stats", "--url", "http://127.0.0.1:1", env=with_it).returncode == 3


@pytest.mark.parametrize("verb", ["stats", "clear"])
def test_without_an_administrators_key_it_is_refused_and_with_it_it_works(hfms, serving, tmp_path, verb):
    key = {"HFMS_ADMIN_API_KEY": "admin-key-0123456789abcdef"}
    url = serving('[middleware]\norder = ["auth", "cache"]\n', env=key)
    (tmp_path / "hfms.toml").write_text(ON)
    refused = hfms("cache", verb, "--url", url)
    assert (refused.returncode, "401" in refused.stderr) == (1, True)
    assert hfms("cache", verb, "--url", url, env=key).returncode == 0
