"""How a job ends when a signal asks it to."""

import signal
import threading
from types import FrameType


def end_in_order_on_sigterm() -> None:
    """End as after an error: release locks, update MLflow, print one JSON line."""

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        # ``ray.get`` swallows any other exception of a signal handler, and keeps waiting.
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
