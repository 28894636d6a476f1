"""Simulated active learning: slices proposed by ``jobs/label.py`` against random slices.

Slices start with few labels. A run is trained, ``jobs/label.py`` proposes slices, these get their
true labels in the labels table, and a new run is trained. Another run gets labels for the same
number of random slices. Test metrics are only read at the end.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure

from brainray import layout
from brainray.benchmarks.cases import QUICK_SETTINGS
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.config import Config
from brainray.errors import ConfigError, DataError
from brainray.log import log
from brainray.mri.phantom import write_phantoms
from brainray.orchestration.prediction.labels import choose_next_labels
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.preprocessing.source import list_source
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.sweep.trials import trial_config
from brainray.orchestration.training.driver import train
from brainray.report.style import new_figure
from brainray.schema import TEST, UNLABELLED_ROLE
from brainray.storage import Folder

_METRICS = ("accuracy", "balanced_accuracy")
_SUBSETS = ("all", "clean")


@dataclass(frozen=True)
class _Size:
    """Size of a simulation."""

    num_initial: int  # initial labels
    num_added: int  # labels added, proposed or random
    num_draws: int
    settings: dict[str, Any]  # by dotted key; they override --config


_FULL = _Size(200, 200, 3, {})
_QUICK = _Size(40, 40, 1, QUICK_SETTINGS["next_labels"])
_NUM_PHANTOMS = (60, 40)  # of each class, for training and for testing


def run(options: CaseOptions) -> BenchmarkResult:
    """Accuracy after labelling the proposals of jobs/label.py against random slices.

    Three label draws with 200 initial and 200 added labels, trained with the settings of --config;
    with ``quick`` one draw with 40 labels, few epochs and small slices. ``source`` has
    ``Training/`` and ``Testing/`` class folders; without it, phantoms are used. All runs are kept
    under storage, and finished runs are not repeated.

    Raises:
        ConfigError: with ``split.mode=grouped`` the test slices would be others than those of
            ``Testing/``, which have labels from the start.
        DataError: ``source`` has no test slices, or too few of a class to draw labels from.
    """
    if options.config.split.mode == "grouped":
        raise ConfigError(
            "split.mode=grouped draws test slices, but this case labels those of Testing/ from "
            "the start: use official or purge"
        )
    attach_to_ray()
    size = _QUICK if options.quick else _FULL
    folder = options.storage / "benchmarks" / "next_labels"
    folder.mkdir(parents=True, exist_ok=True)
    source = options.source
    if source is None:
        source = folder / f"phantoms-{options.seed}"
        num_training, num_testing = _NUM_PHANTOMS
        if not source.exists():
            write_phantoms(
                source,
                num_training_per_class=num_training,
                num_testing_per_class=num_testing,
                seed=options.seed,
                size=128,
            )
    draws = [
        _Simulation(folder, source, size, options, options.seed + number).run()
        for number in range(size.num_draws)
    ]
    return BenchmarkResult(_measures(draws), {"draws": draws, "size": vars(size)}, _figure(draws))


class _Simulation:
    """One draw of initial labels, to which proposed or random ones are added."""

    def __init__(
        self, folder: Path, source: Path, size: _Size, options: CaseOptions, seed: int
    ) -> None:
        self.folder, self.source, self.size, self.seed = folder, source, size, seed
        self.storage, self.base = options.storage, options.config
        files = list_source(Folder(source), None, {}).files
        self.truth = {file.path: (file.label, file.split) for file in files}
        if all(split != TEST for _, split in self.truth.values()):
            raise DataError(
                f"{source} has no test slices: give a folder with Training/ and Testing/"
            )
        self.training = sorted(path for path, (_, split) in self.truth.items() if split != TEST)

    def run(self) -> dict[str, dict[str, float]]:
        """Test metrics by arm: initial labels, with random labels added, with proposed ones."""
        rng = np.random.default_rng(self.seed)
        first = self._first(rng)
        config = self._config("first")
        metrics = {"first": self._train(config, first)}
        chosen = choose_next_labels(config.model_copy(update={"run": config.name})).table
        seen = (Folder(self.storage) / layout.RUNS / str(config.name)).read_table(layout.SEEN)
        # The same pool as for the proposals, which has no byte-identical copies.
        pool = sorted(seen.filter(pc.equal(seen["role"], UNLABELLED_ROLE))["path"].to_pylist())
        drawn = rng.choice(pool, self.size.num_added, replace=False).tolist()
        added = {"random": drawn, "chosen": chosen["path"].to_pylist()}
        for arm, paths in added.items():
            metrics[arm] = self._train(self._config(arm), [*first, *paths])
        return metrics

    def _first(self, rng: np.random.Generator) -> list[str]:
        """Random slices, the same number of each class."""
        classes = sorted({str(self.truth[path][0]) for path in self.training})
        each = self.size.num_initial // len(classes)
        chosen: list[str] = []
        for name in classes:
            members = [path for path in self.training if self.truth[path][0] == name]
            if len(members) < 2 * each:
                raise DataError(
                    f"class {name!r} has {len(members)} training slices, but this case labels "
                    f"{each} of each class and proposes others: give a larger --source, or --quick"
                )
            chosen += rng.choice(members, each, replace=False).tolist()
        return chosen

    def _config(self, arm: str) -> Config:
        name = f"next-labels-{arm}-{self.size.num_initial}-{self.seed}"
        settings = self.size.settings | {
            "storage": str(self.storage),
            "source": str(self.source),
            "labels": str(self.folder / f"{name}.csv"),
            "dataset": name,
            "seed": self.seed,
            "split.seed": self.seed,
            "split.labelled_fraction": 1.0,
            "evaluation.tsne_epochs": [],
            "label.num_slices": self.size.num_added,
        }
        return trial_config(self.base, settings, name)

    def _train(self, config: Config, labelled: Sequence[str]) -> dict[str, float]:
        log(f"{config.name}: {len(labelled)} labels")
        readable = set(labelled)
        with Path(str(config.labels)).open("w", newline="", encoding="utf-8") as table:
            rows = csv.writer(table)
            rows.writerow(["path", "label", "split"])
            for path, (label, split) in sorted(self.truth.items()):
                known = split == TEST or path in readable
                rows.writerow([path, label if known else "", split])
        preprocess(config)
        metrics = train(config).metrics
        return {
            f"{subset}/{predictor}/{metric}": metrics[f"test/{subset}/{predictor}/{metric}"]
            for subset in _SUBSETS
            for predictor in ("head", "cluster")
            for metric in _METRICS
        }


def _measures(draws: Sequence[dict[str, dict[str, float]]]) -> list[Measure]:
    """Means over the draws; the lead of proposed over random labels should be positive."""
    measures = []
    for subset in _SUBSETS:
        for metric in _METRICS:
            key = f"{subset}/head/{metric}"
            means = {
                arm: float(np.mean([draw[arm][key] for draw in draws]))
                for arm in ("first", "random", "chosen")
            }
            measures += [Measure(f"{key}, {arm}", value) for arm, value in means.items()]
            lead = means["chosen"] - means["random"]
            measures.append(Measure(f"{key}, chosen - random", lead, at_least=0.0))
    return measures


def _figure(draws: Sequence[dict[str, dict[str, float]]]) -> Figure:
    figure = new_figure(5.0, 4.0)
    axes = figure.subplots()
    arms = ("first", "random", "chosen")
    for number, draw in enumerate(draws, start=1):
        values = [draw[arm]["clean/head/accuracy"] for arm in arms]
        axes.plot(arms, values, "o-", label=f"draw {number}")
    axes.set_xlabel("labels")
    axes.set_ylabel("accuracy of the head, clean test slices")
    axes.legend()
    return figure
