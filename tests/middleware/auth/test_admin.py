"""What an administrator asks for is kept as asked, or refused; nothing else happens."""

from __future__ import annotations

import json
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from hfms_cli import BadRequest, parse, parse_fields
from hfms_cli.engines.process import worker_environ
from hfms_middleware.auth.admin import LATEST, KeyRequest

NOW = 1_800_000_000.0
FIELDS = [*KeyRequest.__struct_fields__, "other"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


def held(asked: KeyRequest) -> None:
    policy = asked.policy(NOW)
    assert 0 <= policy.priority <= 3
    for limit in (policy.requests_per_minute, policy.tokens_per_minute, policy.tokens_per_day):
        assert limit is None or 1 <= limit <= 10**12
    assert policy.expires_at is None or NOW < policy.expires_at <= LATEST
    assert len(policy.name) <= 100
    assert policy.admin is asked.admin


@given(st.dictionaries(st.sampled_from(FIELDS), values))
def test_whatever_is_asked_is_within_bounds_or_a_400(fields):
    with suppress(BadRequest):
        held(parse(KeyRequest, json.dumps(fields).encode()))


@given(st.dictionaries(st.sampled_from(FIELDS), st.text() | st.integers().map(str) | st.floats().map(str)))
def test_whatever_a_form_asks_is_within_bounds_or_a_400(fields):
    with suppress(BadRequest):
        held(parse_fields(KeyRequest, fields))


def test_a_worker_sees_neither_keys_nor_their_store():
    told = ("HFMS_KEY_STORE", "HF_SERVER_KEY_STORE", "HFMS_API_KEY", "HFMS_ADMIN_API_KEY")
    assert not worker_environ(dict.fromkeys(told, "x")).keys() & set(told)
