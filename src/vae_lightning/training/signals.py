"""Signals that ask a run to stop: Ctrl-C, and what schedulers send before they kill."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(BaseException):
    """A signal asked to stop, and the run can be resumed. No Exception, so that nothing takes it for an error."""

    status = 75  # EX_TEMPFAIL of <sysexits.h>: "try again later"


class StopRequest:
    """Whether a signal has asked to stop. While steps run it is noted for the end of the step; else it acts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.stepping = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        former = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            if in_main_thread():
                for number, handler in former.items():
                    signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals; Lightning takes some of them when it starts to train, and has to be asked for them back."""
        if in_main_thread():  # Python allows it nowhere else
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.name:
            raise Interrupted(f"stopped by {self.name}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.name is not None
        self.name = signal.Signals(number).name
        if again and number == signal.SIGINT:
            raise Interrupted("stopped by a second SIGINT, at once")  # a second Ctrl-C does not wait
        if not self.stepping:
            self.check()


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
