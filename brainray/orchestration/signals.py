"""How a job ends when a signal asks it to."""

import signal
import threading
from types import FrameType


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end; no ``except Exception`` may catch this.

    ``ray.get`` passes on only a KeyboardInterrupt (as a plain one) from a signal handler; it
    swallows any other exception and keeps waiting.
    """


def end_in_order_on_sigterm() -> None:
    """End as after an error: release locks, update MLflow, print one JSON line."""

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise Terminated(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
