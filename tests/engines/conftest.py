"""What tests of engines share."""

from __future__ import annotations

from collections import defaultdict

import pytest


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Token ids that each choice was given: chunks do not carry them."""
    from hfms_engines import scheduler

    seen: dict[tuple[str, int], list[int]] = defaultdict(list)
    take = scheduler.Seq.take

    def watched(self, token):
        seen[self.call.id, self.index].append(token)
        return take(self, token)

    monkeypatch.setattr(scheduler.Seq, "take", watched)
    return seen
