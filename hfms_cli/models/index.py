"""A publisher's index: which CID each name and revision has. Signed, with a number that only grows, and with an end.

An old index would bring back what was withdrawn, or a revision with a fault. So whoever reads indexes remembers the
highest number of each publisher, and takes none below it, and none that has expired.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import structlog

from hfms_cli.errors import VerifyFailed
from hfms_cli.models.signing import Signer, open_envelope
from hfms_cli.models.trust import Trust
from hfms_cli.types import ModelName

__all__ = ["INDEX", "LIFE", "Index", "Offer", "Seen", "read_index", "sign_index"]

log = structlog.get_logger("hfms.models")

INDEX = "application/vnd.hfms.index+json"
LIFE = timedelta(days=7)
"""How long a signed index is good. A server that shares models signs anew when half of it is over."""
CLOCKS_DIFFER = timedelta(minutes=5)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One revision of one model."""

    name: str
    """`org/name`, or `org/name:QUANT`."""
    revision: str
    tag: str | None = None
    """What the revision is called beside its commit; None: it is what the bare name means."""
    cid: str
    size: int
    """Bytes of its files."""

    def stands_for(self, name: ModelName) -> bool:
        if name.scheme or name.rest != self.name:
            return False
        return self.tag is None if name.revision is None else name.revision in (self.revision, self.tag)


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What a publisher offers, oldest first."""

    publisher: str
    sequence: int
    """Grows with every index that the publisher signs."""
    issued_at: datetime
    expires_at: datetime
    offers: tuple[Offer, ...] = ()

    def find(self, name: ModelName) -> Offer | None:
        """The newest that a name can mean."""
        return next((o for o in reversed(self.offers) if o.stands_for(name)), None)


def sign_index(signer: Signer, offers: tuple[Offer, ...], last: int, now: datetime) -> bytes:
    """A new index in its envelope. last: the number of the one before."""
    # By the clock, so that a publisher who lost the state folder and not the key is still believed.
    sequence = max(last + 1, int(now.timestamp()))
    index = Index(publisher=signer.public, sequence=sequence, issued_at=now, expires_at=now + LIFE, offers=offers)
    return signer.envelope(INDEX, msgspec.json.encode(index))


def read_index(raw: bytes, trust: Trust, seen: Seen, now: datetime) -> Index:
    """The index in an envelope, checked in every way. Raises VerifyFailed, saying what is wrong."""
    payload, key = open_envelope(raw, INDEX, trust.keys)
    try:
        index = msgspec.json.decode(payload, type=Index)
        late, early = now >= index.expires_at, index.issued_at > now + CLOCKS_DIFFER
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError) as exc:
        raise VerifyFailed("It is signed, and yet no index that hfms can read.") from exc
    if index.publisher != key:
        raise VerifyFailed("It is signed by another key than it says.")
    if late:
        raise VerifyFailed(f"It expired at {index.expires_at:%Y-%m-%d %H:%M} UTC.")
    if early:
        raise VerifyFailed(
            f"It was signed at {index.issued_at:%Y-%m-%d %H:%M} UTC, which is yet to come: see the clocks."
        )
    seen.check(key, index.sequence, hashlib.sha256(payload).hexdigest())
    return index


class Seen:
    """The highest number of each publisher's indexes, kept between runs."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._highest: dict[str, tuple[int, str]] = {}

    def check(self, key: str, sequence: int, digest: str) -> None:
        """Raise VerifyFailed for an index that is older than one seen before, or another one with the same number."""
        self._highest |= {k: h for k, h in self._kept() if h[0] > self._highest.get(k, (0, ""))[0]}
        highest, known = self._highest.get(key, (0, digest))
        if sequence < highest:
            raise VerifyFailed(f"It is older than one seen before ({sequence} after {highest}): it was rolled back.")
        if sequence == highest and digest != known:
            raise VerifyFailed(f"It is another one with the same number ({sequence}): one of them is forged.")
        if sequence > highest or key not in self._highest:
            self._highest[key] = (sequence, digest)
            self._keep()

    def _kept(self) -> Iterator[tuple[str, tuple[int, str]]]:
        if self._path is not None:
            with suppress(FileNotFoundError):
                try:
                    kept = msgspec.json.decode(self._path.read_bytes(), type=dict[str, tuple[int, str]])
                except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
                    raise VerifyFailed(f"{self._path.name} in the state folder is broken; delete it.") from exc
                yield from kept.items()

    def _keep(self) -> None:
        if self._path is None:
            return
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(self._highest))
            draft.replace(self._path)
        except OSError as exc:
            log.warning("the numbers of indexes cannot be kept", error=exc.strerror)


Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)
