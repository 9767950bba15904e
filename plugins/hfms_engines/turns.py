"""Work that is one long call of somebody else's, run a piece at a time.

The call has a thread of its own, which goes on only while `go_on` waits for it. So only one of the two runs at any
moment, as if there were no thread, and what is between two pauses is one step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Dropped(BaseException):
    """Raised in the work by its pause, where nobody wants it any more. No Exception, so that nothing handles it."""


class Turns:
    """work: is given a function to call between its pieces. Begins with the first `go_on`."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._work = work
        self._dropped = False
        self._error: BaseException | None = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="turns", daemon=True)
        self._begun = False

    def go_on(self) -> bool:
        """Let it run to its next pause; whether it is done. Raises what it raised."""
        if self._begun:
            self._theirs.release()
        else:
            self._begun = True
            self._thread.start()
        self._mine.acquire()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return not self._thread_runs

    def drop(self) -> None:
        """End it where it stands."""
        if self._begun and self._thread_runs:
            self._dropped = True
            self._theirs.release()
            self._thread.join()

    _thread_runs = True

    def _run(self) -> None:
        try:
            self._work(self._pause)
        except Dropped:
            pass
        except BaseException as exc:
            self._error = exc
        self._thread_runs = False
        self._mine.release()

    def _pause(self) -> None:
        self._mine.release()
        self._theirs.acquire()
        if self._dropped:
            raise Dropped
