"""Signals that ask a run to stop: Ctrl-C, and those that schedulers send before they kill a job."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Interrupted(BaseException):
    """Stopped by a signal; the run can be resumed. Not an Exception, so that no error handler catches it."""

    status = 75  # EX_TEMPFAIL of <sysexits.h>: "try again later"


class StopRequest:
    """Record whether a signal has asked to stop.

    During training steps (`stepping`) a signal is only recorded, and training stops after the step. At other times it
    raises Interrupted at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal
        self.stepping = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in a block, then restore the former handlers."""
        former = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            if in_main_thread():
                for number, handler in former.items():
                    signal.signal(number, handler)

    def listen(self) -> None:
        """Install the handlers. Call it again when training starts: Lightning installs its own then."""
        if in_main_thread():  # Python allows handlers only there
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.name:
            raise Interrupted(f"stopped by {self.name}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.name is not None
        self.name = signal.Signals(number).name
        if again and number == signal.SIGINT:  # a second Ctrl-C does not wait for the end of the step
            raise Interrupted("stopped by a second SIGINT, at once")
        if not self.stepping:
            self.check()


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
