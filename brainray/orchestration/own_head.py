"""A temporary Ray head, isolated from anything else that runs on this machine."""

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
from typing import Any

import psutil

from brainray.log import log
from brainray.orchestration.code_version import git_revision
from brainray.orchestration.ray_connection import WITHOUT_PREEMPTION

START_TIMEOUT_S = 180.0  # a cold disk takes most of a minute to import Ray
STOP_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 500_000_000  # the default is a third of the memory
LOG_TAIL_LINES = 20


class RayDidNotStart(Exception):
    """One-line reason why Ray did not start; the tail of its log has been printed."""


@dataclass(frozen=True)
class RayHead:
    """A running `ray start --head --block` in its own session."""

    process: subprocess.Popen[bytes]
    url: str
    """URL of the dashboard and the job API."""
    address: str
    """Address for drivers and further nodes."""
    token: str
    environment: Mapping[str, str]
    """Environment of processes that connect to this head."""
    log: Path


@contextlib.contextmanager
def own_ray_head(*, num_cpus: int | None = None) -> Iterator[RayHead]:
    """Start an isolated Ray head, with its own ports, folder and token, and stop it on exit.

    ``num_cpus`` is the number of CPUs that it offers to jobs; the machine's by default.
    """
    # Ray creates sockets in this folder, and socket paths are limited to about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="brainray-", dir="/tmp"))
    token = secrets.token_hex(32)
    output = folder / "head.log"
    ports = free_ports(7)
    command = [
        *ray_command(
            "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"
        ),
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
        *([] if num_cpus is None else [f"--num-cpus={num_cpus}"]),
    ]
    url = f"http://127.0.0.1:{ports[1]}"
    environment = _environment(token, url)
    process: subprocess.Popen[bytes] | None = None
    log("starting a temporary Ray head")
    try:
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # only we receive Ctrl-C, and stop the head in order
            )
        yield RayHead(process, url, f"127.0.0.1:{ports[0]}", token, environment, output)
    finally:
        with _undisturbed():
            if process is not None:
                log("stopping the temporary Ray head")
                _end_processes(process, token)
            shutil.rmtree(folder, ignore_errors=True)


def ray_command(*arguments: str) -> list[str]:
    """The `ray` command of this Python."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _environment(token: str, url: str) -> dict[str, str]:
    """The environment of Ray's processes: ours, without other Ray clusters or tracking servers."""
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
        # Our own token: the user's token file is neither needed nor written.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Ray's processes find each other through its dashboard, not that of another local Ray.
        "RAY_API_SERVER_ADDRESS": url,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing is served, so nothing to drain
    }


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free now; if one is taken before Ray uses it, Ray reports it."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("", 0))
        return [listener.getsockname()[1] for listener in sockets]


def wait_until_ready(head: RayHead) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            get_json(head, "/api/jobs/")
            return
        time.sleep(0.2)
    tail = head.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    print("\n".join(tail), file=sys.stderr)
    raise RayDidNotStart(f"no job API within {START_TIMEOUT_S:.0f} s: see Ray's log above")


def get_json(head: RayHead, path: str) -> Any:
    """GET from the job API; raises OSError or HTTPException until it responds."""
    request = urllib.request.Request(
        head.url + path, headers={"Authorization": f"Bearer {head.token}"}
    )
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with local.open(request, timeout=10) as response:
        return json.load(response)


def submit(
    head: RayHead, entrypoint: Sequence[str], *, name: str, working_dir: Path
) -> tuple[int, str | None]:
    """Run `ray job submit` and print its output; returns the job's exit code and result line."""
    submission_id = f"{name}-{secrets.token_hex(4)}"
    command = ["job", "submit", "--address", head.url, "--submission-id", submission_id]
    command += ["--log-color", "false", "--working-dir", "."]
    # The copy in which the job runs has no .git.
    variables = {"env_vars": {"BRAINRAY_GIT_REVISION": git_revision(), **WITHOUT_PREEMPTION}}
    command += ["--runtime-env-json", json.dumps(variables), "--", *entrypoint]
    log(f"ray {shlex.join(command)}")
    process = subprocess.Popen(
        ray_command(*command),
        cwd=working_dir,
        env=head.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # if we are interrupted, it is ended with the head
    )
    result_line: str | None = None
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            result_line = line
    submit_code = process.wait()
    return _exit_code(head, submission_id, submit_code), result_line


def _exit_code(head: RayHead, submission_id: str, submit_code: int) -> int:
    """The job's own exit code: `ray job submit` returns 1 for every failure."""
    if submit_code == 0:
        return 0
    try:
        return int(get_json(head, f"/api/jobs/{submission_id}")["driver_exit_code"])
    except (OSError, http.client.HTTPException, KeyError, TypeError, ValueError):
        return submit_code  # it never ran, or Ray has ended


def _end_processes(head: subprocess.Popen[bytes], token: str) -> None:
    """Stop the head in order, then kill by id whatever is left of the processes that it started."""
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
        log(f"process {process.pid} is still running")


def _family(head: subprocess.Popen[bytes], token: str) -> list[psutil.Process]:
    """The processes that belong to our head, dead or alive.

    Only they are in its session or have inherited its token. Both checks are needed: a job's driver
    opens its own session, and a worker overwrites its environment with its title.
    """
    members = []
    for process in psutil.process_iter():
        # Not ours: already ended, or owned by another user.
        with contextlib.suppress(OSError, psutil.Error):
            in_session = os.getsid(process.pid) == head.pid
            if in_session or process.environ().get("RAY_AUTH_TOKEN") == token:
                members.append(process)
    return members


def _wait_until_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """The processes that are still alive after the timeout."""
    deadline = time.monotonic() + timeout_s
    while (left := [p for p in processes if _is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _is_alive(process: psutil.Process) -> bool:
    """False also for a zombie, whose exit code its parent or process 1 has yet to collect."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and termination while stopping our processes, which takes seconds."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
