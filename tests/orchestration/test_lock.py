"""One job at a time on a name, seen by heartbeats and processes, never by clocks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow.fs as pafs
import pytest

from brainray.errors import ConfigError, StorageError, UnreachableError
from brainray.orchestration.lock import Claim, Pace, _end_this_process, _Lock, held, is_held
from brainray.orchestration.signals import end_in_order_on_sigterm
from brainray.storage import Folder

PROJECT = Path(__file__).parents[2]
QUICK = Pace(beat_s=0.1, patience_s=0.6, settle_s=0.05)
LOCK = "locks/runs-first.json"

HOLDER = """
import sys, time
from brainray.orchestration.lock import Pace, held
from brainray.storage import Folder
with held(Folder(sys.argv[1]), "runs", "first", Pace(beat_s=0.1)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of runs/first."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def take(storage: Path) -> None:
    with held(Folder(storage), "runs", "first", QUICK):
        assert (storage / LOCK).exists()


def from_elsewhere(storage: Path) -> None:
    """Make the lock look as if its holder were on another machine."""
    claim = json.loads((storage / LOCK).read_text())
    (storage / LOCK).write_text(json.dumps(claim | {"place": "elsewhere", "host": "far"}))


def test_a_name_is_free_again_after_its_job(tmp_path: Path) -> None:
    take(tmp_path)
    assert not (tmp_path / LOCK).exists()
    take(tmp_path)


@pytest.mark.usefixtures("no_hard_links")
def test_a_name_is_locked_where_there_are_no_hard_links(tmp_path: Path) -> None:
    with (
        held(Folder(tmp_path), "runs", "first", QUICK),
        pytest.raises(ConfigError, match="another job"),
    ):
        take(tmp_path)
    take(tmp_path)


def test_a_second_job_is_refused_at_once_in_one_line(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=rf"another job \(process {holder.pid} on .*runs/first"):
        take(tmp_path)
    assert time.monotonic() - started < 0.5
    with held(Folder(tmp_path), "runs", "second", QUICK):
        pass


def test_the_lock_of_a_killed_job_is_taken_over_at_once(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    holder.kill()
    time.sleep(0.2)  # not reaped: a zombie is dead
    started = time.monotonic()
    with held(Folder(tmp_path), "runs", "first", QUICK):
        assert time.monotonic() - started < 0.5
    assert "took over" in capsys.readouterr().out.splitlines()[0]


def test_a_process_of_another_user_may_be_hidden_and_is_not_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = Claim.for_this_process()
    assert claim.is_alive_here()
    monkeypatch.setattr("brainray.orchestration.lock._process_start", lambda _: None)

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert claim.is_alive_here() is None


def test_a_holders_count_moves(tmp_path: Path) -> None:
    with held(Folder(tmp_path), "runs", "first", QUICK):
        before = json.loads((tmp_path / LOCK).read_text())["beat"]
        time.sleep(5 * QUICK.beat_s)
        assert json.loads((tmp_path / LOCK).read_text())["beat"] > before


def test_a_lock_that_another_job_has_taken_is_not_deleted(tmp_path: Path) -> None:
    winner = Claim("another", "far", 1, "elsewhere", "0")
    with held(Folder(tmp_path), "runs", "first", Pace()):  # its next look is seconds away
        Folder(tmp_path).write_json(LOCK, asdict(winner))
    assert Folder(tmp_path).read_json(LOCK)["owner"] == winner.owner


def test_a_process_that_has_the_number_of_a_dead_one_is_not_the_holder() -> None:
    assert replace(Claim.for_this_process(), born="1").is_alive_here() is False


def test_of_two_jobs_that_take_over_at_once_the_last_one_gets_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = replace(Claim.for_this_process(), owner="dead", born="1")
    Folder(tmp_path).write_json(LOCK, asdict(dead))
    rival = replace(Claim.for_this_process(), owner="rival")

    def take_over_too(lock: _Lock, claim: Claim) -> None:
        monkeypatch.undo()
        lock._write(claim)
        lock._write(rival)

    monkeypatch.setattr(_Lock, "_write", take_over_too)
    with pytest.raises(ConfigError, match="another job"):
        take(tmp_path)
    assert Folder(tmp_path).read_json(LOCK)["owner"] == "rival"


def test_a_lock_that_cannot_be_released_leaves_the_result_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("SLOW_DOWN")

    with held(Folder(tmp_path), "runs", "first", QUICK):
        monkeypatch.setattr(Folder, "delete_file", unreachable)
    assert "note: the lock of runs/first stays" in capsys.readouterr().out
    monkeypatch.undo()
    with held(Folder(tmp_path), "runs", "other", QUICK):
        pass


def test_a_holder_elsewhere_is_alive_while_its_count_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Claim("another", "far", 1, "elsewhere", "0", beat=7)
    folder = Folder(tmp_path)
    folder.write_json(LOCK, asdict(elsewhere))
    beats = iter(range(8, 100))

    def beat(_: str) -> None:
        folder.write_json(LOCK, asdict(replace(elsewhere, beat=next(beats))))

    monkeypatch.setattr("brainray.orchestration.lock.log", beat)
    with (
        pytest.raises(ConfigError, match="process 1 on far"),
        held(folder, "runs", "first", QUICK),
    ):
        pass


def test_a_holder_elsewhere_whose_count_stands_still_is_dead_whatever_the_clocks_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder(tmp_path).write_json(LOCK, asdict(Claim("another", "far", 1, "elsewhere", "0")))
    for stamp in (0, 4_000_000_000):  # a file of 1970, and one of 2096
        os.utime(tmp_path / LOCK, (stamp, stamp))
    started = time.monotonic()
    with held(Folder(tmp_path), "runs", "first", QUICK):
        assert time.monotonic() - started >= QUICK.patience_s
    lines = capsys.readouterr().out.splitlines()
    assert "watching for 0.6 s" in lines[0]
    assert "took over from process 1 on far" in lines[1]


def test_a_holder_that_was_paused_for_long_ends_itself(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    from_elsewhere(tmp_path)
    with held(Folder(tmp_path), "runs", "first", QUICK):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(timeout=10) == 1
    assert holder.stdout is not None
    assert "the lock was lost" in holder.stdout.read()


def test_a_job_that_lost_its_lock_ends_in_order_though_it_waits() -> None:
    def wait() -> None:
        threading.Timer(0.1, _end_this_process, ("taken over",)).start()
        time.sleep(30)

    before, started = signal.getsignal(signal.SIGTERM), time.monotonic()
    end_in_order_on_sigterm()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 15


def test_storage_without_exclusive_creation_settles_who_was_last(tmp_path: Path) -> None:
    class Remote(Folder):
        def __truediv__(self, name: str) -> Folder:
            folder = Folder(f"{tmp_path}/{name}")
            folder.filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
            folder.path = name
            return folder

    storage = Remote(tmp_path)
    with (
        held(storage, "runs", "first", QUICK),
        pytest.raises(ConfigError, match="another job"),
        held(storage, "runs", "first", QUICK),
    ):
        pass
    assert not (tmp_path / LOCK).exists()


def test_others_see_whether_a_job_is_at_work(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert is_held(Folder(tmp_path), "runs", "first")
    assert not is_held(Folder(tmp_path), "runs", "second")
    holder.kill()
    holder.wait()
    assert not is_held(Folder(tmp_path), "runs", "first")
    from_elsewhere(tmp_path)  # nothing is known of a process there
    assert is_held(Folder(tmp_path), "runs", "first")


def test_who_waits_for_its_turn_has_it_when_the_holder_ends(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    threading.Timer(1.0, holder.kill).start()
    with held(Folder(tmp_path), "runs", "first", QUICK, in_turn=True):
        holder.wait(timeout=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("another job (process")
    assert lines[0].endswith("is using runs/first: waiting for it to finish")
    assert len(lines) == len(set(lines))
    assert "took over" in lines[-1]


def test_a_lock_that_is_released_and_taken_between_two_polls_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Claim.for_this_process()

    def released_then_taken(lock: Any) -> None:
        monkeypatch.undo()
        Folder(tmp_path).write_json(LOCK, asdict(third))

    (tmp_path / "locks").mkdir()
    (tmp_path / LOCK).touch()
    monkeypatch.setattr(_Lock, "_read", released_then_taken)
    with pytest.raises(ConfigError, match="another job"):
        take(tmp_path)
    assert Folder(tmp_path).read_json(LOCK)["owner"] == third.owner


@pytest.mark.parametrize("error", [UnreachableError("away"), StorageError("not readable")])
def test_a_lock_that_cannot_be_read_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: StorageError
) -> None:
    with held(Folder(tmp_path), "runs", "first", QUICK):
        original = (tmp_path / LOCK).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "local_path", None)  # as on an object store
            patch.setattr(Folder, "read_bytes", Mock(side_effect=error))
            with pytest.raises(StorageError, match=str(error)):
                take(tmp_path)
            assert is_held(Folder(tmp_path), "runs", "first")
        assert json.loads((tmp_path / LOCK).read_bytes())["owner"] == json.loads(original)["owner"]


def test_a_lock_whose_writer_was_killed_while_writing_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / LOCK).write_text('{"owner": ')
    take(tmp_path)


def test_who_waits_for_its_turn_does_not_wait_for_the_dead_of_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder(tmp_path).write_json(LOCK, asdict(Claim("another", "far", 1, "elsewhere", "0")))
    with held(Folder(tmp_path), "runs", "first", QUICK, in_turn=True):
        pass
    assert "took over" in capsys.readouterr().out.splitlines()[-1]
