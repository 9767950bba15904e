"""Keys, envelopes, trust and indexes: what is not signed by somebody who may is refused, and says why."""

import base64
import os
import stat
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.errors import BadRequest, ConfigError, Conflict, NotFound, VerifyFailed
from hfms_cli.models import trust as trusting
from hfms_cli.models.index import INDEX, LIFE, Index, Offer, Seen, read_index, sign_index
from hfms_cli.models.names import parse
from hfms_cli.models.signing import KEY_FILE, Signer, is_key, open_envelope
from hfms_cli.models.trust import Trust, Trusted

NOW = datetime(2026, 11, 25, tzinfo=UTC)
CID = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"


@pytest.fixture
def signer(tmp_path):
    return Signer.make(tmp_path / "state")


@pytest.fixture
def stranger(tmp_path):
    return Signer.make(tmp_path / "stranger")


# Keys.


def test_a_key_is_made_once_is_for_this_user_alone_and_is_read_again(tmp_path):
    made = Signer.make(tmp_path)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert is_key(made.public)
    assert Signer.load(tmp_path).public == made.public
    with pytest.raises(Conflict, match="There is a key already"):
        Signer.make(tmp_path)
    assert Signer.load(tmp_path).public == made.public


def test_a_key_that_others_may_read_is_not_used(tmp_path):
    Signer.make(tmp_path)
    os.chmod(tmp_path / KEY_FILE, 0o640)
    with pytest.raises(BadRequest, match="chmod 600"):
        Signer.load(tmp_path)


def test_a_missing_or_broken_key_says_what_to_do(tmp_path):
    with pytest.raises(NotFound, match="hfms publisher init"):
        Signer.load(tmp_path)
    (tmp_path / KEY_FILE).write_text("not a key")
    os.chmod(tmp_path / KEY_FILE, 0o600)
    with pytest.raises(BadRequest, match="holds no private key"):
        Signer.load(tmp_path)


def test_a_key_of_another_kind_is_refused(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / KEY_FILE).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    os.chmod(tmp_path / KEY_FILE, 0o600)
    with pytest.raises(BadRequest, match="none for ed25519"):
        Signer.load(tmp_path)


def test_openssl_checks_what_hfms_signed(signer, tmp_path):
    """The form is everybody's: DSSE over ed25519, with a key in PEM."""
    import shutil
    import subprocess

    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    envelope = msgspec.json.decode(signer.envelope("text/x", b"some"))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    (tmp_path / "signed").write_bytes(b"DSSEv1 6 text/x 4 some")
    public = ["openssl", "pkey", "-in", str(tmp_path / "state" / KEY_FILE), "-pubout", "-out", str(tmp_path / "pub")]
    subprocess.run(public, check=True)
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(tmp_path / "pub"), "-rawin"]
    done = subprocess.run([*check, "-in", str(tmp_path / "signed"), "-sigfile", str(tmp_path / "sig")])
    assert done.returncode == 0


# Envelopes.


def test_what_was_signed_comes_out_with_who_signed_it(signer):
    assert open_envelope(signer.envelope(INDEX, b"payload"), INDEX, {signer.public}) == (b"payload", signer.public)


def changed(raw, **fields):
    return msgspec.json.encode(msgspec.json.decode(raw) | fields)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda raw: b'{"publisher": "me"}', "not signed"),
        (lambda raw: b"\xff\xfe", "not signed"),
        (lambda raw: b"", "not signed"),
        (lambda raw: b"[" * 100_000, "not signed"),
        (lambda raw: changed(raw, signatures=[]), "It is not signed"),
        (lambda raw: changed(raw, payloadType="text/other"), "of another kind"),
        (lambda raw: changed(raw, payload=base64.b64encode(b"other").decode()), "signature is wrong"),
        (lambda raw: b" " * (16 * 2**20 + 1), "too long"),
    ],
)
def test_what_is_not_signed_or_changed_is_refused(signer, make, why):
    with pytest.raises(VerifyFailed, match=why):
        open_envelope(make(signer.envelope(INDEX, b"payload")), INDEX, {signer.public})


def test_a_strangers_signature_is_refused_also_under_a_trusted_name(signer, stranger):
    forged = stranger.envelope(INDEX, b"payload")
    with pytest.raises(VerifyFailed, match="whom nobody here trusts"):
        open_envelope(forged, INDEX, {signer.public})
    signature = msgspec.json.decode(forged)["signatures"][0]
    renamed = changed(forged, signatures=[signature | {"keyid": signer.public}])
    with pytest.raises(VerifyFailed, match="signature is wrong"):
        open_envelope(renamed, INDEX, {signer.public})


def test_a_signature_for_one_kind_of_document_is_none_for_another(signer):
    envelope = changed(signer.envelope("text/manifest", b"payload"), payloadType=INDEX)
    with pytest.raises(VerifyFailed, match="signature is wrong"):
        open_envelope(envelope, INDEX, {signer.public})


@given(st.data())
def test_no_changed_byte_of_an_envelope_is_believed(data):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signer = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    raw = signer.envelope(INDEX, b"the payload")
    at, change = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
    torn = raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :]
    try:
        payload, key = open_envelope(torn, INDEX, {signer.public})
    except VerifyFailed:
        return
    assert (payload, key) == (b"the payload", signer.public)  # as where only the writing differs


# Trust.


@pytest.mark.parametrize(
    ("names", "name", "may"),
    [
        ("org/*", "org/model", True),
        ("org/*", "org/model:Q4_0", True),
        ("org/*", "other/model", False),
        ("org/*", "organisation/model", False),
        ("org/one", "org/one", True),
        ("org/one", "org/one-more", False),
        ("org/one,org/two", "org/two", True),
        ("*", "any/thing", True),
    ],
)
def test_a_key_speaks_for_the_names_it_is_trusted_for_and_no_other(signer, names, name, may):
    trust = Trust([Trusted.parse(f"{names} {signer.public}")])
    assert trust.speaks_for(signer.public, name) is may


def test_a_key_alone_speaks_for_every_name_and_another_for_none(signer, stranger, tmp_path):
    trust = Trust.load([signer.public], tmp_path)
    assert trust.speaks_for(signer.public, "any/thing")
    assert not trust.speaks_for(stranger.public, "any/thing")


@pytest.mark.parametrize(
    "line", ["", "ed25519:short", "org/* rsa:AAAA", "org/*", "org/*, ed25519:" + "A" * 43, "[a]/* ed25519:" + "A" * 43]
)
def test_a_line_that_trusts_nobody_is_a_wrong_setting(line, tmp_path):
    with pytest.raises(ConfigError, match="trusted_publishers"):
        Trust.load([line], tmp_path)


def test_a_key_is_written_in_one_way_only():
    assert is_key("ed25519:" + "A" * 43)
    assert not is_key("ed25519:" + "A" * 42 + "B")  # the same 32 bytes, were it read
    assert not is_key("ed25519:" + "A" * 43 + "\n")


def test_trust_is_added_and_taken_back_in_the_state_folder(signer, tmp_path):
    new = Trusted.parse(f"org/* {signer.public}")
    for _ in range(2):
        trusting.add(tmp_path, new)
    assert trusting.read_file(tmp_path) == [new]
    assert Trust.load([], tmp_path).speaks_for(signer.public, "org/x")
    trusting.remove(tmp_path, signer.public)
    assert not Trust.load([], tmp_path).keys
    with pytest.raises(NotFound):
        trusting.remove(tmp_path, signer.public)


# Indexes.


def offer(name="org/model", revision="abc", tag=None):
    return Offer(name=name, revision=revision, tag=tag, cid=CID, size=1)


def trusting_all(signer):
    return Trust([Trusted(signer.public, ("*",))])


def test_an_index_says_what_names_and_revisions_mean_the_newest_first(signer):
    old, new, tagged = offer(revision="1"), offer(revision="2"), offer(revision="3", tag="v3")
    raw = sign_index(signer, (old, new, tagged), 0, NOW)
    index = read_index(raw, trusting_all(signer), Seen(), NOW)
    for name, found in {
        "org/model": new,
        "org/model@1": old,
        "org/model@2": new,
        "org/model@v3": tagged,
        "org/model@3": tagged,
        "org/model@4": None,
        "org/other": None,
        "package:model": None,
    }.items():
        assert index.find(parse(name)) == found


def test_an_index_ends_and_does_not_begin_in_the_future(signer):
    raw = sign_index(signer, (offer(),), 0, NOW)
    trust = trusting_all(signer)
    read_index(raw, trust, Seen(), NOW + LIFE - timedelta(seconds=1))
    with pytest.raises(VerifyFailed, match="expired at 2026-12-02"):
        read_index(raw, trust, Seen(), NOW + LIFE)
    with pytest.raises(VerifyFailed, match="yet to come"):
        read_index(raw, trust, Seen(), NOW - timedelta(hours=1))


def test_an_index_never_goes_back_also_after_a_new_start(signer, tmp_path):
    trust, file = trusting_all(signer), tmp_path / "seen.json"
    old = sign_index(signer, (offer(revision="1"),), 0, NOW)
    new = sign_index(signer, (offer(revision="2"),), 10**10, NOW)
    read_index(old, trust, Seen(file), NOW)
    read_index(new, trust, Seen(file), NOW)
    read_index(new, trust, Seen(file), NOW)
    for seen in (Seen(file), (kept := Seen(file))):
        with pytest.raises(VerifyFailed, match="rolled back"):
            read_index(old, trust, seen, NOW)
    with pytest.raises(VerifyFailed, match="same number"):
        read_index(sign_index(signer, (), 10**10, NOW), trust, kept, NOW)


def test_numbers_are_each_publishers_own(signer, stranger):
    seen, trust = Seen(), Trust([Trusted(signer.public, ("*",)), Trusted(stranger.public, ("*",))])
    read_index(sign_index(signer, (), 10**11, NOW), trust, seen, NOW)
    read_index(sign_index(stranger, (), 0, NOW), trust, seen, NOW)


def test_a_broken_memory_of_numbers_is_no_reason_to_forget_them(signer, tmp_path):
    (tmp_path / "seen.json").write_bytes(b"{")
    with pytest.raises(VerifyFailed, match=r"seen\.json in the state folder is broken"):
        read_index(sign_index(signer, (), 0, NOW), trusting_all(signer), Seen(tmp_path / "seen.json"), NOW)


def test_an_index_in_the_name_of_another_publisher_is_refused(signer, stranger):
    said = Index(publisher=stranger.public, sequence=1, issued_at=NOW, expires_at=NOW + LIFE)
    with pytest.raises(VerifyFailed, match="another key than it says"):
        read_index(signer.envelope(INDEX, msgspec.json.encode(said)), trusting_all(signer), Seen(), NOW)


@pytest.mark.parametrize("payload", [b"{}", b"[]", b"\xff", b'{"publisher":1}'])
def test_what_is_signed_and_no_index_is_refused(signer, payload):
    with pytest.raises(VerifyFailed, match="no index"):
        read_index(signer.envelope(INDEX, payload), trusting_all(signer), Seen(), NOW)


def test_a_naive_time_is_refused(signer):
    said = {
        "publisher": signer.public,
        "sequence": 1,
        "issued_at": "2026-11-25T00:00:00",
        "expires_at": "2027-01-01T00:00:00",
    }
    with pytest.raises(VerifyFailed, match="no index"):
        read_index(signer.envelope(INDEX, msgspec.json.encode(said)), trusting_all(signer), Seen(), NOW)
