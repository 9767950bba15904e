"""How a key is written, and what of it can be kept."""

from __future__ import annotations

import math
from hashlib import sha256

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hfms_middleware.auth.keys import ALPHABET, SECRET_LENGTH, StoredKey, is_key_id, new_secret, read_secret
from tests.middleware.auth.conftest import a_key


def test_a_secret_holds_at_least_256_bits():
    assert SECRET_LENGTH * math.log2(len(set(ALPHABET))) >= 256


def test_what_was_written_can_be_read():
    for _ in range(100):
        secret = new_secret()
        assert str(secret).startswith("hf_")
        assert len(str(secret)) == 64
        assert is_key_id(secret.id)
        assert read_secret(str(secret)) == secret
        assert secret.digest == sha256(secret.text.encode()).hexdigest()


def test_no_two_are_alike():
    made = [new_secret() for _ in range(1000)]
    assert len({s.id for s in made}) == len({s.text for s in made}) == 1000


def test_a_rotated_key_keeps_its_id():
    assert new_secret("abcdefghijkl").id == "abcdefghijkl"


@given(st.integers(0, 63), st.sampled_from(ALPHABET + "_- \n\x00é"))
def test_a_key_with_one_wrong_character_is_no_key(at, wrong):
    text = str(new_secret())
    if text[at] != wrong:
        assert read_secret(text[:at] + wrong + text[at + 1 :]) is None


@given(st.text(max_size=100))
def test_any_other_text_is_no_key_and_no_error(text):
    assert read_secret(text) is None
    assert read_secret("hf_" + text) is None


def test_a_secret_does_not_show_itself_in_logs_and_tracebacks():
    secret = new_secret()
    assert secret.text not in repr(secret)
    assert secret.text not in f"{[secret]}"


def test_what_is_kept_holds_no_secret():
    secret = new_secret()
    key = StoredKey(id=secret.id, digest=secret.digest, policy=a_key().policy, created_at=1.0)
    assert secret.text.encode() not in msgspec.json.encode(key)


def test_a_key_expires_at_its_time_and_not_before():
    key = a_key(expires_at=2000.0)
    assert key.state(1999.9) == "active"
    assert key.state(2000.0) == "expired"
    assert a_key().state(1e12) == "active"
    assert msgspec.structs.replace(key, revoked_at=1.0).state(0.0) == "revoked"
