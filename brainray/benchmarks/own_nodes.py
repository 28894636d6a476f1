"""Further nodes of a temporary Ray head, and their sudden end."""

import contextlib
import http.client
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from brainray.orchestration.own_head import (
    LOG_TAIL_LINES,
    OBJECT_STORE_BYTES,
    START_TIMEOUT_S,
    RayDidNotStart,
    RayHead,
    free_ports,
    get_json,
    ray_command,
)


def driver_environment(head: RayHead) -> dict[str, str]:
    """Environment of a process that runs a job on this head without submission."""
    return {**head.environment, "RAY_ADDRESS": head.address}


@contextlib.contextmanager
def own_ray_node(head: RayHead, *, num_cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another node of the head's Ray cluster, on this machine; ends with the head at the latest.

    It takes some seconds to join: see ``wait_for_nodes``.
    """
    ports = free_ports(4)
    command = [
        *ray_command("start", "--block", "--disable-usage-stats", f"--address={head.address}"),
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES // 4}",
        # The default ports assume one node per machine: several would take each other's.
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={ports[0]}",
        f"--dashboard-agent-grpc-port={ports[1]}",
        f"--runtime-env-agent-port={ports[2]}",
        f"--metrics-export-port={ports[3]}",
    ]
    with head.log.with_name(f"node-{ports[0]}.log").open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=head.environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_with_children(process.pid)
        process.wait()


def wait_for_nodes(head: RayHead, count: int) -> None:
    """Wait until the Ray cluster has this many live nodes."""
    deadline = time.monotonic() + START_TIMEOUT_S
    alive = -1
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, KeyError, TypeError):
            nodes = get_json(head, "/api/v0/nodes")["data"]["result"]["result"]
            alive = sum(node["state"] == "ALIVE" for node in nodes)
            if alive == count:
                return
        time.sleep(0.5)
    for path in sorted(head.log.parent.glob("node-*.log")):
        tail = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        print(f"{path.name}:", *tail, sep="\n", file=sys.stderr)
    raise RayDidNotStart(f"{alive} instead of {count} nodes after {START_TIMEOUT_S:.0f} s")


def kill_with_children(pid: int) -> None:
    """Send SIGKILL to a process and its descendants, as if the machine went down; ignores ended
    ones.
    """
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
