"""Locks in storage that let one job at a time use a name, with a check that holders are alive.

Clocks of different machines are never compared. The holder increases a counter in the lock every
few seconds; a job that wants the lock measures with its own stopwatch whether the counter changes.
If both are on one machine, the process table answers at once. A holder that finds another job's
claim, for example after its machine was suspended, ends itself.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from brainray import layout
from brainray.errors import BrainrayError, BusyError, DataError, StorageError
from brainray.log import log
from brainray.storage import Folder


@dataclass(frozen=True)
class Pace:
    """Intervals of a lock, in seconds of this process's own stopwatch."""

    beat_s: float = 5.0
    patience_s: float = 30.0
    """A holder whose counter has not changed for this long is considered dead."""
    settle_s: float = 2.0
    """Between a claim and its confirmation, if storage cannot create a file exclusively."""


@dataclass(frozen=True)
class Claim:
    """Content of a lock file."""

    owner: str  # unique to one claim of one process
    host: str
    pid: int
    place: str  # boot id of the machine and its pid namespace; empty if unknown
    born: str  # start of the process, in the machine's ticks since boot
    beat: int = 0

    @classmethod
    def for_this_process(cls) -> "Claim":
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _place(), _process_start(pid) or "")

    def is_alive_here(self) -> bool | None:
        """From this machine's process table; None if the holder may be on another machine."""
        if not self.place or self.place != _place():
            return None
        start = _process_start(self.pid)
        if start is None and _is_hidden(self.pid):
            return None
        return start == self.born


@contextmanager
def held(
    storage: Folder,
    kind: str,
    name: str,
    pace: Pace | None = None,
    *,
    in_turn: bool = False,
) -> Iterator[None]:
    """Hold the lock of ``storage/kind/name`` within the block.

    Args:
        storage: storage that the jobs share.
        kind: kind of what is locked, such as runs.
        name: name of what is locked.
        pace: intervals of the lock's heartbeat.
        in_turn: wait until another job releases the lock.

    Raises:
        BusyError: another live job holds the lock, and ``in_turn`` is not set.
    """
    lock = _Lock(storage / layout.LOCKS, kind, name, pace or Pace())
    if in_turn:
        lock.acquire_in_turn()
    else:
        lock.acquire(log)
    try:
        yield
    finally:
        lock.release()


def is_held(storage: Folder, kind: str, name: str) -> bool:
    """Whether a job is using ``storage/kind/name``.

    A job that was killed on another machine, or in another container, still counts, and so does a
    lock that cannot be read.
    """
    try:
        claim = _read_claim(storage / layout.LOCKS, _file_of(kind, name))
    except StorageError:
        return True
    return claim is not None and claim.is_alive_here() is not False


class _Lock:
    def __init__(self, folder: Folder, kind: str, name: str, pace: Pace) -> None:
        self._folder = folder
        self._file = _file_of(kind, name)
        self._key = f"{kind}/{name}"
        self._pace = pace
        self._claim = Claim.for_this_process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self, say: Callable[[str], None]) -> None:
        while not self._claim_new():
            if self._holder_is_dead(say):
                self._write(self._claim)
                self._confirm()
                break
        self._thread.start()

    def acquire_in_turn(self) -> None:
        """Acquire as soon as no live job holds the lock; logs each message once while waiting."""
        logged: set[str] = set()

        def say_once(text: str) -> None:
            if text not in logged:
                logged.add(text)
                log(text)

        while True:
            try:
                self.acquire(say_once)
            except BusyError as refusal:
                say_once(f"{str(refusal).partition(':')[0]}: waiting for it to finish")
                time.sleep(self._pace.beat_s)
            else:
                return

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        try:
            found = self._read()
            if found is not None and found.owner == self._claim.owner:
                self._folder.delete_file(self._file)
        except (OSError, BrainrayError) as problem:  # the work is done, or has its own error
            log(f"note: the lock of {self._key} stays, until the next job finds it dead: {problem}")

    def _claim_new(self) -> bool:
        """Take the lock if nobody holds it; returns whether it was free."""
        if self._folder.local_path is not None:
            return self._folder.create_file(self._file, _encoded(self._claim))
        if self._read() is not None:
            return False
        self._write(self._claim)
        self._confirm()
        return True

    def _confirm(self) -> None:
        """Among simultaneous claims, the last one written gets the lock."""
        time.sleep(self._pace.settle_s)
        found = self._read()
        if found is None or found.owner != self._claim.owner:
            raise self._refusal(found)

    def _holder_is_dead(self, say: Callable[[str], None]) -> bool:
        """False if the lock has been released meanwhile; raises BusyError for a live holder."""
        first = self._read()
        if first is None and self._folder.exists(self._file):  # is it being written?
            time.sleep(self._pace.settle_s)
            first = self._read()
            if first is None:
                return self._folder.exists(self._file)  # no: its writer was killed
        if first is None:
            return False
        alive = first.is_alive_here()
        if alive:
            raise self._refusal(first)
        if alive is None:
            say(
                f"{self._key} was locked by process {first.pid} on {first.host}: watching for "
                f"{self._pace.patience_s:g} s whether it is alive"
            )
            if not self._stays_as(first):
                return False
        say(f"{self._key}: took over from process {first.pid} on {first.host}, which has ended")
        return True

    def _stays_as(self, first: Claim) -> bool:
        """Watch a claim: False once it is released; raises BusyError if its holder is alive."""
        deadline = time.monotonic() + self._pace.patience_s
        while time.monotonic() < deadline:
            time.sleep(self._pace.beat_s / 5)
            now = self._read()
            if now is None:
                return False
            if (now.owner, now.beat) != (first.owner, first.beat):
                raise self._refusal(now)
        return True

    def _refusal(self, holder: Claim | None) -> BusyError:
        by = "" if holder is None else f" (process {holder.pid} on {holder.host})"
        return BusyError(
            f"another job{by} is using {self._key}: wait until it finishes, or choose another name"
        )

    def _keep(self) -> None:
        mine = self._claim
        while not self._ended.wait(self._pace.beat_s):
            try:
                found = self._read()
                if found is not None and found.owner != mine.owner:
                    _end_this_process(str(self._refusal(found)))
                    return
                mine = replace(mine, beat=mine.beat + 1)
                self._write(mine)
            except (OSError, BrainrayError):  # storage is unreachable: nobody else can claim either
                continue

    def _read(self) -> Claim | None:
        return _read_claim(self._folder, self._file)

    def _write(self, claim: Claim) -> None:
        self._folder.write_bytes(self._file, _encoded(claim))


def _file_of(kind: str, name: str) -> str:
    return f"{kind}-{name}.json"


def _read_claim(folder: Folder, file: str) -> Claim | None:
    """None if there is no lock, or if it is being written.

    Raises:
        StorageError: there may be one, but it cannot be read.
    """
    try:
        return Claim(**json.loads(folder.read_bytes(file)))
    except StorageError:
        raise
    except (DataError, ValueError, TypeError):
        return None


def _encoded(claim: Claim) -> bytes:
    return json.dumps(asdict(claim)).encode()


def _end_this_process(reason: str) -> None:
    """End as on SIGTERM if a job handles it, else at once: two jobs must not write one run."""
    print(f"stopping: the lock was lost; {reason}", flush=True)
    if callable(signal.getsignal(signal.SIGTERM)):
        os.kill(os.getpid(), signal.SIGTERM)  # wakes the main thread, also from a wait
    else:
        os._exit(1)


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _is_hidden(pid: int) -> bool:
    """Whether it is another user's process, which some systems leave out of /proc (hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _process_start(pid: int) -> str | None:
    """Start of a process in ticks since boot, independent of clocks; None if it is dead."""
    try:
        # The name before the last bracket may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
