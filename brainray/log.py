"""Log lines for the user, and a stopwatch."""

import time

from brainray.redaction import redacted


def log(message: str) -> None:
    """Print a line to stdout immediately, without secrets."""
    print(redacted(message), flush=True)


class ProgressLines:
    """Progress of countable work: a line every ``every_s`` seconds, with the remaining time.

    If any line was logged, there is also a final one.
    """

    def __init__(self, verb: str, noun: str, *, every_s: float = 10.0) -> None:
        """Lines read "VERB 10 of 20 NOUN, 5 s left"."""
        self._verb, self._noun, self._every_s = verb, noun, every_s
        self._started = self._last = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Report what is done so far; logs a line only if one is due."""
        now = time.monotonic()
        has_logged = self._last > self._started
        if done and (now - self._last >= self._every_s or (done == total and has_logged)):
            self._last = now
            left = (total - done) * (now - self._started) / done
            log(f"{self._verb} {done:,} of {total:,} {self._noun}, {left:.0f} s left")


class Stopwatch:
    """Measures consecutive stages of work."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}  # by stage, in their order

    def lap(self, stage: str) -> None:
        """Count the time since the last lap, or since the start, as this stage's."""
        now = time.monotonic()
        self.seconds[stage] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started
