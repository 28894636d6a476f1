"""The whole method on drawn phantoms, on a Ray head of its own, in one command: `make demo`.

It draws slices, starts Ray beside whatever else runs on this machine, submits jobs/pipeline.py as
a user would submit it, prints what came out, and ends every process that it started.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import ray  # noqa: F401  # puts the psutil that Ray ships on the path

# isort: split
import psutil

from brainray.errors import BrainrayError, DataError
from brainray.mri.phantom import write_phantoms

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = Path("~/brainray-demo")
RUN_NAME = "demo"
NUM_TRAINING_PER_CLASS = 160
NUM_TESTING_PER_CLASS = 40

START_TIMEOUT_S = 180.0  # a cold disk takes most of a minute to import Ray
STOP_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 500_000_000  # the phantoms are 40 MB; the default is a third of the memory
LOG_TAIL_LINES = 20
HEADLINES = ("accuracy", "balanced_accuracy", "f1_macro", "nmi", "silhouette")


class RayDidNotStart(Exception):
    """The reason, for one line; the tail of Ray's log has been printed."""


@dataclass(frozen=True)
class RayHead:
    """A running `ray start --head --block`, in a session of its own."""

    process: subprocess.Popen[bytes]
    url: str
    """Of the dashboard and the job API."""
    token: str
    environment: Mapping[str, str]
    """For whatever talks to this head."""
    log: Path


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    out = options.out.expanduser().resolve()
    for stop_signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop_signal, _exit_on_signal)
    try:
        return run_demo(out)
    except (BrainrayError, RayDidNotStart) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, BrainrayError) else 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on where this one stopped")
        return 128 + signal.SIGINT


def run_demo(
    out: Path,
    pipeline: Sequence[str] = ("jobs/pipeline.py", "--config", "configs/demo.yaml"),
) -> int:
    """Run the pipeline on phantoms under `out`; returns its exit code.

    Raises:
        DataError: the phantoms cannot be written.
        RayDidNotStart: as it says.
    """
    _make_folder(out)
    tracking_uri = f"sqlite:///{out / 'mlflow.db'}"
    settings = {
        "source": out / "phantoms",
        "storage": out,
        "tracking.uri": tracking_uri,
        "name": RUN_NAME,
    }
    entrypoint = [sys.executable, *pipeline]
    for key, value in settings.items():
        entrypoint += ["--set", f"{key}={value}"]

    with _own_ray_head() as head:
        # Ray needs seconds to come up: the phantoms are drawn meanwhile.
        _draw_phantoms(out / "phantoms")
        _wait_until_ready(head)
        exit_code, result = _submit(head, entrypoint)
    _print_summary(exit_code, result, tracking_uri)
    return exit_code if result is not None else exit_code or 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: the pipeline's (0 done, 1 failed, 2 bad input), 130 after Ctrl-C. "
        "An interrupted\ndemo goes on where it stopped; delete the folder to start anew.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="phantoms, results and tracking database go here (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _exit_on_signal(signal_number: int, _frame: FrameType | None) -> NoReturn:
    """Unwinds as Ctrl-C does, so that what was started is ended."""
    raise SystemExit(128 + signal_number)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out} ({error.strerror}): choose another --out") from None


def _draw_phantoms(folder: Path) -> None:
    if folder.exists():
        _say(f"using the phantoms in {folder}")
        return
    _say(f"drawing phantoms into {folder}")
    write_phantoms(
        folder,
        num_training_per_class=NUM_TRAINING_PER_CLASS,
        num_testing_per_class=NUM_TESTING_PER_CLASS,
        seed=0,
    )


@contextlib.contextmanager
def _own_ray_head() -> Iterator[RayHead]:
    """A Ray head that meets no other: own ports, own folder, own token; gone on the way out."""
    # Ray puts sockets into this folder, and a socket's path holds about 100 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="brainray-", dir="/tmp"))
    token = secrets.token_hex(32)
    log = folder / "head.log"
    ports = _free_ports(7)
    command = [
        *_ray("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"),
        f"--temp-dir={folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--dashboard-host=127.0.0.1",
        f"--port={ports[0]}",
        f"--dashboard-port={ports[1]}",
        f"--dashboard-agent-listen-port={ports[2]}",
        f"--dashboard-agent-grpc-port={ports[3]}",
        f"--runtime-env-agent-port={ports[4]}",
        f"--metrics-export-port={ports[5]}",
        f"--ray-client-server-port={ports[6]}",
    ]
    environment = _environment(token)
    process: subprocess.Popen[bytes] | None = None
    _say("starting a Ray head of our own")
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the head in order
            )
        url = f"http://127.0.0.1:{ports[1]}"
        yield RayHead(process, url, token, environment, log)
    finally:
        with _undisturbed():
            if process is not None:
                _say("stopping our Ray head")
                _end_processes(process, token)
            shutil.rmtree(folder, ignore_errors=True)


def _ray(*arguments: str) -> list[str]:
    """The `ray` command of this very Python."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _environment(token: str) -> dict[str, str]:
    """Ours, without what points to other Ray clusters or tracking servers."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("RAY_") and key != "MLFLOW_TRACKING_URI"
    }
    no_proxy = [inherited.get("no_proxy") or inherited.get("NO_PROXY"), "127.0.0.1", "localhost"]
    return {
        **inherited,
        "NO_PROXY": ",".join(filter(None, no_proxy)),
        "no_proxy": ",".join(filter(None, no_proxy)),
        "PYTHONUNBUFFERED": "1",
        # A token of our own: the user's token file is neither needed nor written.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing is served: nothing to drain
    }


def _free_ports(count: int) -> list[int]:
    """Distinct ports that were free a moment ago; who takes one meanwhile makes Ray say so."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("", 0))
        return [listener.getsockname()[1] for listener in sockets]


def _wait_until_ready(head: RayHead) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            _get(head, "/api/jobs/")
            return
        time.sleep(0.2)
    tail = head.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    print("\n".join(tail), file=sys.stderr)
    raise RayDidNotStart(f"no job API within {START_TIMEOUT_S:.0f} s: Ray's last words are above")


def _get(head: RayHead, path: str) -> Any:
    """Ask the job API; raises OSError or HTTPException until it answers."""
    request = urllib.request.Request(
        head.url + path, headers={"Authorization": f"Bearer {head.token}"}
    )
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with local.open(request, timeout=10) as response:
        return json.load(response)


def _submit(head: RayHead, entrypoint: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """Run `ray job submit`, pass its output on; returns exit code and result line of the job."""
    submission_id = f"{RUN_NAME}-{secrets.token_hex(4)}"
    command = ["job", "submit", "--address", head.url, "--submission-id", submission_id]
    command += ["--log-color", "false", "--working-dir", ".", "--", *entrypoint]
    _say(f"ray {shlex.join(command)}")
    process = subprocess.Popen(
        _ray(*command),
        cwd=PROJECT,
        env=head.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # where we are interrupted, it is ended with the head
    )
    result_line: str | None = None
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            result_line = line
    submit_code = process.wait()
    return _exit_code(head, submission_id, submit_code), _parse_result(result_line)


def _exit_code(head: RayHead, submission_id: str, submit_code: int) -> int:
    """The job's own: `ray job submit` makes 1 of every failure."""
    if submit_code == 0:
        return 0
    try:
        return int(_get(head, f"/api/jobs/{submission_id}")["driver_exit_code"])
    except (OSError, http.client.HTTPException, KeyError, TypeError, ValueError):
        return submit_code  # it never ran, or Ray is gone


def _parse_result(line: str | None) -> dict[str, Any] | None:
    try:
        result = json.loads(line or "")
    except json.JSONDecodeError:
        return None
    return result if isinstance(result, dict) else None


def _print_summary(exit_code: int, result: dict[str, Any] | None, tracking_uri: str) -> None:
    print()
    if result is None:
        _say(f"the pipeline printed no result (exit code {exit_code}): see its output above")
        return
    if result.get("status") != "ok":
        _say(
            f"the pipeline failed (exit code {exit_code}): {result.get('error', 'no reason given')}"
        )
        return
    _say("done")
    metrics = {
        name: value
        for name, value in (result.get("metrics") or {}).items()
        if name.startswith("test/") and name.rpartition("/")[2] in HEADLINES
    }
    width = max((len(name) for name in metrics), default=0)
    for name, value in sorted(metrics.items()):
        print(
            f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name}: {value}"
        )
    print(f"\n  results   {result.get('out')}")
    for path in _pictures(Path(str(result.get("out")))):
        print(f"            {path}")
    mlflow = [str(Path(sys.executable).with_name("mlflow")), "ui"]
    print(f"  tracking  {shlex.join([*mlflow, '--backend-store-uri', tracking_uri])}")


def _pictures(out: Path) -> list[Path]:
    """Reports, and the folders that hold figures."""
    reports = sorted(out.rglob("*.html"))
    return reports + sorted({path.parent for path in out.rglob("*.png")})


def _end_processes(head: subprocess.Popen[bytes], token: str) -> None:
    """End the head in order, then, by their ids, all that is left of what it started."""
    if head.poll() is None:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(STOP_TIMEOUT_S)
    if _wait_until_gone(_family(head, token), timeout_s=2):
        for process in _family(head, token):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    head.wait()
    for process in _wait_until_gone(_family(head, token), timeout_s=5):
        print(f"demo: process {process.pid} does not end", file=sys.stderr)


def _family(head: subprocess.Popen[bytes], token: str) -> list[psutil.Process]:
    """The processes that belong to our head, dead or alive.

    They are in its session, or they have inherited its token, unlike anybody else. Neither alone
    would do: a job's driver opens a session of its own, and a worker writes its title over its
    environment.
    """
    members = []
    for process in psutil.process_iter():
        # Not ours: gone meanwhile, or somebody else's.
        with contextlib.suppress(OSError, psutil.Error):
            in_session = os.getsid(process.pid) == head.pid
            if in_session or process.environ().get("RAY_AUTH_TOKEN") == token:
                members.append(process)
    return members


def _wait_until_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still there after the time."""
    deadline = time.monotonic() + timeout_s
    while (left := [p for p in processes if _is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _is_alive(process: psutil.Process) -> bool:
    """False for a zombie too: its parent, or process 1, has yet to look at its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts off Ctrl-C and termination: ending what we started takes seconds, not minutes."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
