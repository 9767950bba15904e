"""How much of each device's memory is spoken for, so that two loads cannot both count on the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfms_cli.errors import DoesNotFit
from hfms_cli.sizes import human_bytes
from hfms_cli.types import Device

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(eq=False)
class Reservation:
    """Bytes that a model may take. What it has taken already shows in the device's free memory by itself."""

    memory: str
    """The device whose memory it is."""
    size: int
    taken: Callable[[], int] = lambda: 0

    @property
    def outstanding(self) -> int:
        """Bytes promised and not yet taken."""
        return max(0, self.size - self.taken())

    @property
    def held(self) -> int:
        """Bytes that others can count on once it is released: what was taken, where that is more than was promised."""
        return max(self.size, self.taken())


class Ledger:
    """Reservations by the device whose memory they are of."""

    def __init__(self) -> None:
        self._reservations: list[Reservation] = []

    def available(self, device: Device) -> int:
        """Bytes that a new model can count on, by the device's own measure and what others were promised."""
        promised = sum(r.outstanding for r in self._reservations if r.memory == device.memory)
        return device.free_bytes - promised

    def reserve(self, device: Device, size: int) -> Reservation:
        """Promise `size` bytes until `release`. Raises DoesNotFit, saying what is missing."""
        available = self.available(device)
        if size > available:
            raise DoesNotFit(
                f"The model needs {human_bytes(size)} on {device.id}, which has {human_bytes(max(0, available))} left "
                f"of {human_bytes(device.total_bytes)}. Unload another model, or choose a smaller one or precision."
            )
        reservation = Reservation(device.memory, size)
        self._reservations.append(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        self._reservations.remove(reservation)

    @contextmanager
    def reserved_if_loaded(self, device: Device, size: int) -> Iterator[Reservation]:
        """A reservation that outlives the block only if the block succeeds."""
        reservation = self.reserve(device, size)
        try:
            yield reservation
        except BaseException:
            self.release(reservation)
            raise
