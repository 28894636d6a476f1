"""Several machines, as a user would join them with ``ray start``, played on this one.

Each has its own network (a namespace, wired to the others by a bridge), name, shared memory, and
its own file system at the path of homes, temporary files and Ray's sessions. They share the storage
path, the slices and the installed code. Root's rights are needed.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient

from brainray import layout
from brainray.benchmarks.own_nodes import kill_with_children
from brainray.config_text import to_yaml
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[1]
SUBNET = "10.203.71"
HEAD = f"{SUBNET}.1"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]

# Mounts and the name go with the namespaces, and these with the last process in them.
BECOME_A_MACHINE = """
set -e
hostname "$1"
mount -t tmpfs none "$HOME"
mkdir "$TMPDIR"
mount -t tmpfs none /dev/shm
mount --bind "$2" /etc/hosts
shift 2
touch "$HOME/ready"
exec "$@"
"""

COUNT_NODES = """
import ray
ray.init(logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
"""


class Machines:
    """Three machines; the first is the head's and the one that jobs are submitted from."""

    def __init__(self, names: list[str], private: Path, hosts: Path) -> None:
        self.names = names
        self.private = private
        self.hosts = hosts
        own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = own | {
            "HOME": str(private),
            "PATH": f"{Path(sys.executable).parent}:{own['PATH']}",
            "TMPDIR": str(private / "tmp"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "no_proxy": "*",
        }

    @contextlib.contextmanager
    def node(self, number: int, *options: str) -> Iterator[int]:
        """``ray start`` on a machine; gives its process, which is in the machine's namespaces."""
        isolated = ["ip", "netns", "exec", self.names[number], "unshare", "--mount", "--uts"]
        isolated += ["bash", "-c", BECOME_A_MACHINE, "bash", self.names[number], str(self.hosts)]
        command = [*RAY, "start", "--block", "--disable-usage-stats", *options]
        command += [f"--node-ip-address={SUBNET}.{number + 1}", "--object-store-memory=150000000"]
        with self.hosts.with_name(f"node-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [*isolated, *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            # Who enters too early is on this machine still.
            while self.run(process.pid, "test", "-e", f"{self.private}/ready").returncode != 0:
                assert process.poll() is None, f"machine {number} does not start"
                time.sleep(0.1)
            yield process.pid
        finally:
            kill_with_children(process.pid)
            process.wait()

    def run(self, pid: int, *command: str) -> subprocess.CompletedProcess[str]:
        """A command on the machine of that process."""
        return subprocess.run(
            ["nsenter", f"--target={pid}", "--mount", "--net", "--uts", "--", *command],
            env=self.environment | {"RAY_ADDRESS": f"{HEAD}:6379"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def wait_for_nodes(self, pid: int, count: int) -> None:
        deadline = time.monotonic() + 180
        while self.run(pid, sys.executable, "-c", COUNT_NODES).stdout.strip() != str(count):
            assert time.monotonic() < deadline, f"no {count} nodes"

    def submit(
        self, pid: int, job: str, config: Path, *settings: str, options: Sequence[str] = ()
    ) -> dict:
        """The result line of a job that is submitted as README says."""
        submitted = ["job", "submit", f"--address=http://{HEAD}:8265", f"--working-dir={PROJECT}"]
        command = ["python", f"jobs/{job}.py", "--config", str(config), "--set", *settings]
        done = self.run(pid, *RAY, *submitted, *options, "--", *command)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert lines, done.stdout + done.stderr
        return dict(json.loads(lines[-1]))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    tag = secrets.token_hex(2)
    names = [f"brainray-{tag}-{number}" for number in range(3)]
    hosts = tmp_path / "hosts"
    # As on Debian, each machine's own name leads to itself only.
    hosts.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {' '.join(names)}", ""]))
    with contextlib.ExitStack() as stack:
        # Ray puts sockets below, and a socket's path holds about 100 characters at most.
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="br-", dir="/tmp")))
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
                ip("-netns", name, "link", "set", "lo", "up")
            ip("-netns", names[0], "link", "add", "bridge", "type", "bridge")
            ip("-netns", names[0], "addr", "add", f"{HEAD}/24", "dev", "bridge")
            ip("-netns", names[0], "link", "set", "bridge", "up")
            for number, name in enumerate(names[1:], start=2):
                wire = ["link", "add", f"port{number}", "netns", names[0], "type", "veth"]
                ip(*wire, "peer", "name", "eth0", "netns", name)
                ip("-netns", names[0], "link", "set", f"port{number}", "master", "bridge", "up")
                ip("-netns", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
                ip("-netns", name, "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"networks cannot be made here: {getattr(error, 'stderr', error)}")
        yield Machines(names, private, hosts)


def test_machines_that_share_the_storage_path_alone_run_the_whole_pipeline_and_a_sweep(
    phantoms: Path, tmp_path: Path, machines: Machines
) -> None:
    config = tmp_path / "config.yaml"
    space = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    settings = [f"source={phantoms}", f"tune.space={json.dumps(space)}", "tune.num_trials=2"]
    settings += ["tune.algorithm=random", "tune.scheduler=none"]
    config.write_text(to_yaml(tiny_config(tmp_path, *settings)))
    join = f"--address={HEAD}:6379"
    with (
        machines.node(0, "--head", "--num-cpus=2", f"--dashboard-host={HEAD}") as head,
        machines.node(1, join, "--num-cpus=1") as other,
        machines.node(2, join, "--num-cpus=1"),
    ):
        machines.wait_for_nodes(head, 3)
        # Four workers of a CPU fit on three machines only.
        whole = machines.submit(head, "pipeline", config, "name=mri", "train.num_workers=4")
        assert whole["status"] == "ok", whole
        # Only the driver's machine, which is not the head's, has the file that trials start from.
        weights = f"{machines.private}/weights"
        model = tmp_path / "runs" / "mri" / layout.BEST / layout.MODEL
        assert machines.run(other, "cp", str(model), weights).returncode == 0
        sweep = ["name=search", "dataset=mri", "train.num_workers=2", f"encoder.weights={weights}"]
        elsewhere = [f'--entrypoint-resources={{"node:{SUBNET}.2": 0.001}}']
        searched = machines.submit(head, "tune", config, *sweep, options=elsewhere)
        assert searched["status"] == "ok", searched
    history = Folder(tmp_path / "runs" / "mri").read_json_lines(layout.METRICS)
    assert [row["train/num_workers"] for row in history] == [4.0, 4.0]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [found.experiment_id for found in client.search_experiments()]
    status_by_name = {run.info.run_name: run.info.status for run in client.search_runs(experiments)}
    assert status_by_name["mri"] == "FINISHED"
    assert sum(name.startswith("search-") for name in status_by_name) == 2
    assert set(status_by_name.values()) == {"FINISHED"}
    trials = list((tmp_path / "runs").glob("search-*/summary.json"))
    assert len(trials) == 2
    assert not list(machines.private.rglob("*"))  # each machine has written to its own
