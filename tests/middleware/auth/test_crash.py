"""No key that was told is lost when its creator is killed. 200 cycles: `python -m tests.middleware.auth.crash`."""

from __future__ import annotations

from tests.middleware.auth.crash import cycles


def test_no_key_that_was_told_is_lost_by_kill_9(store_url, tmp_path):
    told, lost = cycles(store_url, tmp_path, count=8, seed=1)
    assert told >= 8
    assert lost == []
