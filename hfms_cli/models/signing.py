"""Signatures of publishers: keys as text, and signed documents in DSSE envelopes.

    ed25519:wGhPq...            a public key: its 32 bytes in base64url, without padding
    <state>/publisher.key       the private key, as PEM (PKCS#8), which only this user may read

DSSE (https://github.com/secure-systems-lab/dsse) signs what a document is together with its bytes, so that one kind can
never pass for another, and nothing has to be written again in just the same way to be checked.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from hfms_cli.errors import BadRequest, Conflict, NotFound, Unsupported, VerifyFailed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["KEY_FILE", "Signer", "is_key", "open_envelope"]

KEY_FILE = "publisher.key"
LONGEST = 16 * 2**20
"""Bytes of an envelope; an index of 10,000 models takes some 3 MiB."""
_KEY = re.compile(r"ed25519:[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")


class Signature(msgspec.Struct, frozen=True):
    keyid: str
    sig: bytes


class Envelope(msgspec.Struct, frozen=True):
    payloadType: str
    payload: bytes
    signatures: list[Signature] = []


class Signer:
    """Signs with the private key of this machine's publisher."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes_raw()
        self.public = "ed25519:" + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    @classmethod
    def make(cls, state_dir: Path) -> Signer:
        """A new key, kept in the state folder. Raises Conflict where there is one already."""
        ed25519 = _ed25519()
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ed25519.Ed25519PrivateKey.generate()
        path = state_dir / KEY_FILE
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        except FileExistsError:
            raise Conflict(f"There is a key already ({path}); what it has signed would become worthless.") from None
        except OSError as exc:
            raise BadRequest(f"The key cannot be written to {path}: {exc.strerror}.") from exc
        return cls(key)

    @classmethod
    def load(cls, state_dir: Path) -> Signer:
        """Raises NotFound where there is no key, BadRequest where it is broken or others may read it."""
        ed25519 = _ed25519()
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        path = state_dir / KEY_FILE
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                raw = file.read(2**16)
        except FileNotFoundError:
            raise NotFound("There is no publisher's key here: make one with `hfms publisher init`.") from None
        except OSError as exc:
            raise BadRequest(f"The publisher's key {path} cannot be read: {exc.strerror}.") from exc
        if os.name == "posix" and mode & 0o077:
            raise BadRequest(f"Others may read the publisher's key: `chmod 600 {path}`.")
        try:
            key = load_pem_private_key(raw, password=None)
        except (ValueError, TypeError) as exc:
            raise BadRequest(f"{path} holds no private key in PEM without a password.") from exc
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise BadRequest(f"The key in {path} is none for ed25519.")
        return cls(key)

    def envelope(self, kind: str, payload: bytes) -> bytes:
        """A document with its signature. kind: its media type."""
        signature = Signature(self.public, self._key.sign(_signed(kind, payload)))
        return msgspec.json.encode(Envelope(kind, payload, [signature]))


def is_key(text: str) -> bool:
    """Whether a text is a public key, in the one way in which it is written."""
    return _KEY.fullmatch(text) is not None


def open_envelope(raw: bytes, kind: str, trusted: Container[str]) -> tuple[bytes, str]:
    """The document in an envelope, and the trusted key that signed it.

    Raises VerifyFailed, saying whether it is unsigned, signed by nobody who is trusted, or wrongly signed.
    """
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    if len(raw) > LONGEST:
        raise VerifyFailed("It is too long to be read.")
    try:
        envelope = msgspec.json.decode(raw, type=Envelope)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise VerifyFailed("It is not signed: it is no DSSE envelope.") from exc
    if envelope.payloadType != kind:
        raise VerifyFailed(f"It is a document of another kind, not `{kind}`.")
    if not envelope.signatures:
        raise VerifyFailed("It is not signed.")
    known = [s for s in envelope.signatures if is_key(s.keyid) and s.keyid in trusted]
    if not known:
        shown = next((s.keyid for s in envelope.signatures if is_key(s.keyid)), "a key that hfms cannot read")
        raise VerifyFailed(
            f"It is signed by `{shown}`, whom nobody here trusts (`hfms publisher trust` if you know better)."
        )
    for signature in known:
        public = base64.urlsafe_b64decode(signature.keyid.removeprefix("ed25519:") + "=")
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature.sig, _signed(kind, envelope.payload))
        except (InvalidSignature, ValueError):
            continue
        return envelope.payload, signature.keyid
    raise VerifyFailed("Its signature is wrong: it was changed after it was signed, or another key signed it.")


def _signed(kind: str, payload: bytes) -> bytes:
    """What is signed: DSSE's "pre-authentication encoding"."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def _ed25519() -> ModuleType:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise Unsupported("Signatures need the package `cryptography`: pip install 'hfms[publish]'.") from exc
    return ed25519
