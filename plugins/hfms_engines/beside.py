"""What some calls wait for, made in a thread beside the steps, so that no other call is held up by it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from hfms_cli import EngineFault, HfmsError

log = logging.getLogger("hfms.engine")

T = TypeVar("T")


class Beside(Generic[T]):
    """Calls that wait for something to be made. One thing is made at a time, in the order in which they came.

    failed: what is told of a call whose thing could not be made, where that is nobody's fault but ours.
    """

    def __init__(self, failed: str, *, name: str, stack_bytes: int = 0) -> None:
        """stack_bytes: of the thread; 0: as many as usual."""
        self._failed = failed
        self._name, self._stack_bytes = name, stack_bytes
        self._waiting: dict[str, tuple[Future[T], Callable[[T], None]]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Have something made."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            before = threading.stack_size(self._stack_bytes)
            self._thread.submit(int)  # which starts the thread
            threading.stack_size(before)
        return self._thread.submit(work)

    def wait_for(self, call_id: str, made: Future[T], then: Callable[[T], None]) -> None:
        """Let a call wait; `deliver` calls `then`, which may raise HfmsError."""
        self._waiting[call_id] = made, then

    def deliver(self, seconds: float) -> list[tuple[str, HfmsError]]:
        """Let calls go on for which it is made, and name those that cannot. Waits so long for the first."""
        if not self._waiting:
            return []
        wait([made for made, _ in self._waiting.values()], seconds, FIRST_COMPLETED)
        failed: list[tuple[str, HfmsError]] = []
        for call_id, (made, then) in list(self._waiting.items()):
            if not made.done():
                continue
            del self._waiting[call_id]
            try:
                then(made.result())
            except HfmsError as exc:
                failed.append((call_id, exc))
            except Exception as exc:
                log.error("what a call waited for could not be made", exc_info=exc)
                failed.append((call_id, EngineFault(self._failed)))
        return failed

    def drop(self, call_id: str) -> Future[T] | None:
        """A call waits no longer; what it has waited for, which others may wait for as well."""
        made, _ = self._waiting.pop(call_id, (None, None))
        return made

    def close(self) -> None:
        """Waits for what is being made."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
