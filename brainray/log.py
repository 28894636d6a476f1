"""Lines that tell a user what is done."""

import time
from collections.abc import Callable

from brainray.redaction import redacted

Log = Callable[[str], None]

_EVERY_S = 10.0


def log(message: str) -> None:
    """A line of progress on stdout, at once."""
    print(redacted(message), flush=True)


class ProgressLines:
    """Of work that is counted: a line every ten seconds, with the time that is left.

    Where there was one, there is a last one when all is done.
    """

    def __init__(self, verb: str, noun: str, log: Log) -> None:
        """For lines such as "VERB 10 of 20 NOUN, 5 s left"."""
        self._verb, self._noun, self._log = verb, noun, log
        self._started = self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        """How much is done by now; between two lines it says nothing."""
        now = time.monotonic()
        has_told = self._last > self._started
        if done and (now - self._last >= _EVERY_S or (done == total and has_told)):
            self._last = now
            left = (total - done) * (now - self._started) / done
            self._log(f"{self._verb} {done:,} of {total:,} {self._noun}, {left:.0f} s left")
