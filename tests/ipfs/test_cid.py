"""CIDs: read in every base, printed in one, and checked against bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.errors import BadRequest, VerifyFailed
from hfms_cli.ipfs import CODECS, Cid, check, parse
from hfms_cli.ipfs.cid import decode

HELLO = "bafkreibm6jg3ux5qumhcn2b3flc3tyu6dmlb4xa7u5bf44yegnrjhc4yeq"
SAME = [
    HELLO,
    HELLO.upper(),
    "zb2rhZfjRh2FHHB2RkHVEvL2vJnCTcu7kwRqgVsf9gpkLgteo",
    "f01551220" + "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    "k2cwuebwvb6kdiwob4sb2yqnz38r0yv0dqhxbxqf4bifdhxaydvr7wbt",
]


def test_hello_has_the_cid_that_kubo_gives_it():
    assert str(Cid.of("raw", b"hello")) == HELLO


@pytest.mark.parametrize("text", SAME[:4])
def test_a_cid_is_read_in_every_base_and_printed_in_one(text):
    assert str(parse(text)) == HELLO


def test_an_old_cid_stays_what_it_was():
    text = "QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn"
    assert str(parse(text)) == text
    assert parse(text).same_block(parse("bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354"))


@given(st.binary(max_size=100), st.sampled_from(sorted(CODECS)), st.binary(max_size=10))
@settings(deadline=None)
def test_a_cid_survives_text_and_bytes(data, codec, behind):
    cid = Cid.of(codec, data)
    assert parse(str(cid)) == cid
    assert decode(bytes(cid) + behind) == (cid, len(bytes(cid)))


@given(st.binary(min_size=1, max_size=200), st.integers(0), st.integers(1, 255))
@settings(deadline=None)
def test_no_changed_byte_passes(data, at, change):
    cid = Cid.of("raw", data)
    check(cid, data)
    wrong = bytearray(data)
    wrong[at % len(data)] ^= change
    with pytest.raises(VerifyFailed):
        check(cid, bytes(wrong))


@given(st.text())
@settings(deadline=None)
def test_text_that_is_no_cid_is_refused_by_name(text):
    try:
        cid = parse(text)
    except BadRequest as exc:
        assert (exc.param, exc.code) == ("cid", "invalid_cid")  # noqa: PT017
    else:
        assert str(cid)[0] in "bQ"


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_bytes_that_are_no_cid_raise_nothing_else(raw):
    try:
        cid, end = decode(raw)
    except ValueError:
        return
    assert bytes(cid)[:end] == raw[: len(bytes(cid))] or end <= len(raw)


@pytest.mark.parametrize(
    "raw",
    [
        bytes([1, 0x55, 0x12, 4]) + b"abcd",  # four bytes of SHA-256: easy to forge
        bytes([1, 0x55, 0x11, 20]) + bytes(20),  # SHA-1
        bytes([1, 0x55, 0xD5, 1, 16]) + bytes(16),  # MD5
        bytes([2, 0x55, 0x12, 32]) + bytes(32),  # version 2
        bytes([1, 0x55, 0x12, 32]) + bytes(31),  # cut off
    ],
)
def test_hashes_that_prove_nothing_are_refused(raw):
    with pytest.raises(BadRequest):
        parse("f" + raw.hex())


@pytest.mark.parametrize("text", ["-o", "--help", "../../etc/passwd", "a\0b", "b" + "a" * 4096, "Qm" + "1" * 44, ""])
def test_what_could_be_an_option_or_a_path_is_no_cid(text):
    with pytest.raises(BadRequest) as failed:
        parse(text)
    assert len(failed.value.message) < 120
