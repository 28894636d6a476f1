"""Training while processes are killed: final weights equal to an undisturbed run, no growth."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

import brainray
from brainray import layout
from brainray.benchmarks.own_nodes import (
    driver_environment,
    kill_with_children,
    own_ray_node,
    wait_for_nodes,
)
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.engine.state import load_checkpoint
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.phantom import write_phantoms
from brainray.orchestration.own_head import (
    RayDidNotStart,
    RayHead,
    own_ray_head,
    wait_until_ready,
)
from brainray.report.style import BLUE, ORANGE, new_figure
from brainray.storage import Folder

JOBS = Path(brainray.__file__).parents[1] / "jobs"
NUM_WORKERS = 2
MAX_GROWTH = 1.15
_SAMPLE_S = 2.0
_JOB_TIMEOUT_S = 900.0  # of one submission
_LATE_ATTEMPTS = 3  # undisturbed, to finish a run after the killing


@dataclass(frozen=True)
class Scale:
    """Duration and intensity."""

    minutes: float
    kill_every_s: tuple[float, float]
    num_epochs: int  # of a run; when it is complete, a new one starts


QUICK = Scale(minutes=4.0, kill_every_s=(30.0, 45.0), num_epochs=8)
FULL = Scale(minutes=20.0, kill_every_s=(60.0, 90.0), num_epochs=30)


def run(options: CaseOptions) -> BenchmarkResult:
    """Compare runs whose processes are killed at random with an undisturbed run."""
    scale, source = QUICK if options.quick else FULL, options.source
    if not (JOBS / "train.py").is_file():
        raise DataError(f"{JOBS} contains no jobs: run the soak benchmark from a checkout")
    with tempfile.TemporaryDirectory(prefix="brainray-soak-") as temporary:
        storage = Path(temporary)
        config = _write_config(storage, scale)
        if source is None:
            source = storage / "phantoms"
            write_phantoms(
                source,
                num_training_per_class=40,
                num_testing_per_class=8,
                seed=options.seed,
                size=96,
            )
        with contextlib.ExitStack() as stack:
            cluster = _Cluster(stack)
            cluster.start()
            _finish(cluster, "preprocess", config, f"source={source}", "name=mri")
            log("an undisturbed run")
            growth = _Growth()
            with growth.watching():
                _finish(cluster, "train", config, "name=undisturbed", "dataset=mri")
            log(f"killing for {scale.minutes:g} minutes")
            soaked = _soak(cluster, config, scale, random.Random(options.seed))
        killed, names = soaked.killed, soaked.finished
        expected = _weights(storage, "undisturbed")
        num_same = sum(_equal(expected, _weights(storage, name)) for name in names)
        num_lost = sum(_num_missing(storage, name, scale.num_epochs) for name in names)
    memory, descriptors = growth.ratios()
    measures = [
        Measure("runs finished under the killer", len(names), at_least=1),
        Measure("of them with the weights of the undisturbed run", num_same, at_least=len(names)),
        Measure("epochs missing or twice in their logs", num_lost, at_most=0),
        Measure(f"submissions that hung for {_JOB_TIMEOUT_S:g} s", soaked.num_hung, at_most=0),
        Measure(
            "submissions that failed although nothing was killed", soaked.num_failed, at_most=0
        ),
        Measure("kills", sum(killed.values()), at_least=1),
        *(Measure(f"kills of a {kind}", count) for kind, count in sorted(killed.items())),
        Measure("memory, last third of an undisturbed run", memory, "x", at_most=MAX_GROWTH),
        Measure("file descriptors, likewise", descriptors, "x", at_most=MAX_GROWTH),
    ]
    return BenchmarkResult(measures, {"samples": growth.samples}, growth.figure())


def _write_config(storage: Path, scale: Scale) -> Path:
    settings = {
        "storage": str(storage),
        "preprocess": {"image_size": 64},
        "split": {"labelled_fraction": 0.5},
        "train": {
            "image_size": 64,
            "num_epochs": scale.num_epochs,
            "num_workers": NUM_WORKERS,
            "device": "cpu",  # both nodes are this machine, and would take the same GPU
            "cpus_per_worker": 1,
            "batch_size_per_worker": 16,
            "labelled_batch_size_per_worker": 16,
            "precision": "fp32",
            "max_failures": 100,
            "collective_timeout_s": 120,
        },
        "clustering": {"pca_dim": 8},
        "evaluation": {"tsne_epochs": [1], "bootstrap_resamples": 50},
    }
    path = storage / "soak.yaml"
    path.write_text(json.dumps(settings))  # JSON is valid YAML
    return path


class _Cluster:
    """A Ray head and another node, restarted when they are gone."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack  # ends both
        self.head: RayHead | None = None
        self.node: subprocess.Popen[bytes] | None = None

    def start(self) -> RayHead:
        """Start both nodes if they are not running."""
        if self.head is not None and self.head.process.poll() is not None:
            self._stack.close()
            self.head = self.node = None
        if self.head is None:
            self.head = self._stack.enter_context(own_ray_head(num_cpus=1))
            wait_until_ready(self.head)
        if self.node is None or self.node.poll() is not None:
            self.node = self._stack.enter_context(own_ray_node(self.head, num_cpus=1))
            wait_for_nodes(self.head, 2)
        return self.head


def _job(head: RayHead, name: str, config: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(JOBS / f"{name}.py"), "--config", str(config)]
    paths = [str(JOBS.parent), head.environment.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [*command, "--set", *settings],
        env={**driver_environment(head), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _finish(cluster: _Cluster, name: str, config: Path, *settings: str) -> None:
    process = _job(cluster.start(), name, config, *settings)
    try:
        code = process.wait(_JOB_TIMEOUT_S)
    finally:
        kill_with_children(process.pid)
    if code != 0:
        raise DataError(
            f"the undisturbed job {name} exited with code {code}: run it by hand to see why"
        )


@dataclass
class _Soaked:
    """What became of the submissions."""

    killed: Counter[str] = field(default_factory=Counter)  # processes, by kind
    finished: list[str] = field(default_factory=list)  # runs
    num_hung: int = 0  # submissions that had not ended after `_JOB_TIMEOUT_S`
    num_failed: int = 0  # that ended with an error although none of their processes was killed


def _soak(cluster: _Cluster, config: Path, scale: Scale, dice: random.Random) -> _Soaked:
    """Resubmit jobs, as a user's script would, while their processes are killed."""
    soaked = _Soaked()
    ends = time.monotonic() + 60 * scale.minutes
    num_late = 0
    while time.monotonic() < ends or (not soaked.finished and num_late < _LATE_ATTEMPTS):
        num_late += time.monotonic() >= ends
        name = f"soak-{len(soaked.finished) + 1}"
        try:
            process = _job(cluster.start(), "train", config, f"name={name}", "dataset=mri")
        except RayDidNotStart as reason:
            log(f"{reason}: trying again")
            continue
        kills_before = soaked.killed.total()
        stop = threading.Event()
        killer = threading.Thread(
            target=_kill_at_random, args=(cluster, process, scale, dice, ends, stop, soaked.killed)
        )
        killer.start()
        code: int | None = None
        try:
            code = process.wait(_JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            soaked.num_hung += 1
            log(f"{name} hangs")
        finally:
            stop.set()
            killer.join()
            kill_with_children(process.pid)
        num_kills = soaked.killed.total()
        log(f"{name}: exit code {code}, {num_kills} kills so far")
        if code == 0:
            soaked.finished.append(name)
        elif code is not None and num_kills == kills_before:
            soaked.num_failed += 1
    return soaked


def _kill_at_random(
    cluster: _Cluster,
    driver: subprocess.Popen[str],
    scale: Scale,
    dice: random.Random,
    ends: float,
    stop: threading.Event,
    killed: Counter[str],
) -> None:
    while not stop.wait(dice.uniform(*scale.kill_every_s)) and time.monotonic() < ends:
        victims = _victims(cluster, driver)
        kind = dice.choice(sorted(victims))
        log(f"killing the {kind}")
        kill_with_children(victims[kind])
        killed[kind] += 1
        if kind == "node":  # like a spot instance that is replaced
            with contextlib.suppress(RayDidNotStart):
                cluster.start()


def _victims(cluster: _Cluster, driver: subprocess.Popen[str]) -> dict[str, int]:
    """Process ids by kind; any one of the workers."""
    assert cluster.head is not None
    found = {"driver": driver.pid, "head": cluster.head.process.pid}
    roots = [cluster.head.process]
    if cluster.node is not None:
        found["node"] = cluster.node.pid
        roots.append(cluster.node)
    for process in _family(roots):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::RayTrainWorker"):
                found["worker"] = process.pid
            elif title.startswith("ray::TrainController"):
                found["controller"] = process.pid
    return found


def _family(roots: list[subprocess.Popen[bytes]]) -> Iterator[psutil.Process]:
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from psutil.Process(root.pid).children(recursive=True)


@dataclass
class _Growth:
    """Memory and file descriptors of the processes that exist during a run."""

    samples: list[dict[str, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(_SAMPLE_S):
            memory = descriptors = workers = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = " ".join(process.cmdline())
                    is_worker = title.startswith("ray::RayTrainWorker")
                    if is_worker or "train.py" in title or title.startswith("ray::TrainContr"):
                        memory += process.memory_info().rss
                        descriptors += process.num_fds()
                        workers += is_worker
            if workers == NUM_WORKERS:
                self.samples.append({"bytes": float(memory), "descriptors": float(descriptors)})

    def ratios(self) -> tuple[float, float]:
        """Median of the last third over that of the middle third, when everything is loaded."""
        third = len(self.samples) // 3
        if third == 0:
            raise DataError("the undisturbed run was too short to measure its memory")
        return tuple(  # type: ignore[return-value]
            median(sample[key] for sample in self.samples[-third:])
            / median(sample[key] for sample in self.samples[third : 2 * third])
            for key in ("bytes", "descriptors")
        )

    def figure(self) -> Figure:
        figure = new_figure(7.0, 3.2)
        axes = figure.subplots()
        seconds = [_SAMPLE_S * number for number in range(len(self.samples))]
        axes.plot(seconds, [sample["bytes"] / 2**20 for sample in self.samples], color=BLUE)
        axes.set_xlabel("seconds of an undisturbed run")
        axes.set_ylabel("MiB of driver, controller, workers", color=BLUE)
        other = axes.twinx()
        other.plot(seconds, [sample["descriptors"] for sample in self.samples], color=ORANGE)
        other.set_ylabel("file descriptors", color=ORANGE)
        return figure


def _weights(storage: Path, name: str) -> dict[str, Any]:
    folder = Folder(storage) / layout.RUNS / name / layout.LAST
    return dict(load_checkpoint(folder).encoder.state_dict())


def _equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def _num_missing(storage: Path, name: str, num_epochs: int) -> int:
    """Number of epochs that are missing or repeated in a run's log."""
    folder = Folder(storage) / layout.RUNS / name
    logged = Counter(int(row["epoch"]) for row in folder.read_json_lines(layout.METRICS))
    return sum(logged[epoch] != 1 for epoch in range(1, num_epochs + 1))
