"""A cost model: measured time of each stage, extrapolated to runs on large clusters.

Every stage is timed at four or more sizes, a line is fitted to time against work, and the line is
checked at a held-out size. Two large runs are then estimated: file preprocessing and the silhouette
from the fitted lines, everything else from counted work and assumed rates of GPUs, networks and the
search for duplicates, each with its source and marked as unmeasured.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import embedding_like, perturbed
from brainray.benchmarks.timing import one_thread, wait
from brainray.clustering.gmm import GaussianMixture
from brainray.clustering.kmeans import KMeans
from brainray.clustering.metrics import MAX_SILHOUETTE_ROWS, silhouette
from brainray.clustering.pca import PCA
from brainray.config import NearDuplicateConfig, PreprocessConfig, TrainConfig
from brainray.engine.forward import autocast
from brainray.engine.recipe import build_optimizer, resolve_precision
from brainray.log import log
from brainray.models.encoder import Encoder
from brainray.mri.duplicates import near_duplicate_pairs
from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.resize import thumbnail
from brainray.orchestration.preprocessing.slice_rows import preprocess_file
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.report.style import BLUE, VERMILLION, new_figure, tidy
from brainray.report.table import markdown_table

MAX_ERROR = 0.15
EMBEDDING_DIM, PCA_DIM, NUM_CLASSES = 512, 32, 4
NUM_ITERATIONS = 10
THUMBNAIL_BYTES = 96 * 96
_BATCH = 32
_MAX_ROWS = 400_000
_FINGERPRINTS = (9_000, 11_000, 14_000, 18_000)
_NUM_FILES = 20
_NUM_ALIKE = 4
_FILES = f"preprocess {_NUM_FILES} files"


class Size(NamedTuple):
    """Parameters of a stage's time; a stage uses those that it needs."""

    rows: int = 0
    side: int = 0  # pixels
    features: int = 0
    clusters: int = 0


@dataclass(frozen=True)
class Stage:
    """A timed stage, modelled as seconds = fixed + rate * work(size)."""

    name: str
    unit: str  # of the work
    work: Callable[[Size], float]
    prepare: Callable[[Size], Callable[[], object]]  # returns the callable to time
    sizes: Sequence[Size]
    held_out: Size
    rounds: int = 4  # over all sizes, so that other load hits all alike; the fastest counts


@dataclass(frozen=True)
class Fit:
    """The fitted line of a stage, and its error at the held-out size."""

    fixed_s: float
    rate_s: float  # seconds per unit of work
    error: float  # relative, absolute value
    points: list[tuple[float, float]]  # (work, seconds), the held-out one last


class Rate(NamedTuple):
    """An assumption about hardware that is not available here."""

    value: float
    unit: str
    source: str


ASSUMED = {
    "gpu_bf16": Rate(312e12, "FLOP/s", "NVIDIA A100 data sheet, dense bf16 peak"),
    "gpu_fp64": Rate(9.7e12, "FLOP/s", "NVIDIA A100 data sheet, fp64 peak"),
    "utilisation": Rate(0.25, "of peak", "assumption: small convolutions reach a quarter"),
    "network": Rate(12.5e9, "B/s", "assumption: 100 Gbit/s between nodes"),
    "latency": Rate(50e-6, "s", "assumption: one collective between nodes"),
    "node_cpus": Rate(96, "CPUs", "assumption: per node of 8 GPUs"),
    "cpu_efficiency": Rate(0.5, "of ideal", "assumption: many CPUs working in parallel"),
    "search_copies": Rate(2.9e-3, "CPU s", "per slice of 500,000, from benchmark duplicates"),
    "gpu_hour": Rate(2.5, "USD", "assumption: on-demand price of one such GPU"),
}


def run(options: CaseOptions) -> BenchmarkResult:
    """Time of each stage by work, checked at an unseen size and extrapolated to large runs."""
    fits: dict[str, Fit] = {}
    measures = []
    stages = _stages(options.quick, options.seed)
    for stage in stages:
        fits[stage.name] = fit = _fit(stage)
        log(f"{stage.name}: error {fit.error:.1%} at the held-out size")
        measures += [
            Measure(f"{stage.name}: error at an unseen size", fit.error, at_most=MAX_ERROR),
            Measure(f"{stage.name}: rate", fit.rate_s, f"s/{stage.unit}"),
        ]
    plans = [Plan(1_000_000, 8), Plan(10_000_000, 64)]
    costs = {str(plan): plan.costs(fits) for plan in plans}
    details = {
        "fits": {name: vars(fit) for name, fit in fits.items()},
        "assumed": {name: rate._asdict() for name, rate in ASSUMED.items()},
        "costs": costs,
        "threads": torch.get_num_threads(),
    }
    return BenchmarkResult(
        measures,
        details,
        _figure(fits, {stage.name: stage.unit for stage in stages}),
        report=_report(fits, costs),
    )


def _stages(quick: bool, seed: int) -> list[Stage]:
    shrink = 4 if quick else 1

    def rows(share: int, *counts: int) -> list[Size]:
        return [Size(count // shrink // share, features=64, clusters=16) for count in counts]

    def sides(*pixels: int) -> list[Size]:
        return [Size(_BATCH, side=side) for side in pixels]

    def products(size: Size, power: int) -> float:
        return size.rows * size.features**power * size.clusters * NUM_ITERATIONS

    embedding_stages: list[tuple[str, Callable[[Size], Callable[[], object]], int, int]] = [
        ("k-means", lambda size: partial(_kmeans, size, seed), 1, 1),
        ("mixture, diag", lambda size: partial(_mixture, size, seed, "diag"), 1, 1),
        ("mixture, full", lambda size: partial(_mixture, size, seed, "full"), 2, 8),
    ]
    return [
        Stage(
            _FILES,
            "pixel",
            lambda size: _NUM_FILES * size.side**2,
            partial(_prepare_files, seed=seed),
            # Smaller ones are enlarged for the store, with a different interpolation.
            [Size(side=side) for side in (256, 320, 384, 512, 768)],
            Size(side=448),
        ),
        Stage(
            "find near-duplicates",
            "slice",
            lambda size: size.rows,
            partial(_prepare_duplicates, seed=seed),
            # Fewer than 8,192 are all compared with each other, which scales differently.
            [
                Size(count)
                for count in ((9_000, 10_000, 11_000, 12_000) if quick else _FINGERPRINTS)
            ],
            Size(11_500 if quick else 16_000),
            rounds=1,
        ),
        Stage(
            "train on a batch",
            "FLOP",
            lambda size: 3 * _forward_flops(size.side) * size.rows,
            _prepare_step,
            sides(64, 96, 128, 160, 224),
            Size(_BATCH, side=192),
        ),
        Stage(
            "embed a batch",
            "FLOP",
            lambda size: _forward_flops(size.side) * size.rows,
            _prepare_embedding,
            sides(64, 96, 128, 160, 224),
            Size(_BATCH, side=192),
        ),
        Stage(
            "PCA",
            "multiplication",
            lambda size: size.rows * size.features**2,
            partial(_prepare_pca, seed=seed),
            [Size(count // shrink, features=512) for count in (10_000, 20_000, 30_000, 50_000)],
            Size(40_000 // shrink, features=512),
        ),
        *(
            Stage(
                name,
                "multiplication",
                partial(products, power=power),
                prepare,
                rows(share, 50_000, 100_000, 200_000, _MAX_ROWS),
                rows(share, 300_000)[0],
            )
            for name, prepare, power, share in embedding_stages
        ),
        Stage(
            "silhouette",
            "pair",
            lambda size: size.rows**2,
            partial(_prepare_silhouette, seed=seed),
            [Size(count // shrink) for count in (2_000, 3_000, 4_000, MAX_SILHOUETTE_ROWS)],
            Size(3_500 // shrink),
        ),
    ]


def _fit(stage: Stage) -> Fit:
    """Non-negative least squares of the relative errors."""
    works = {size: stage.prepare(size) for size in (*stage.sizes, stage.held_out)}
    rounds = [{size: _seconds(work) for size, work in works.items()} for _ in range(stage.rounds)]
    seconds = {size: min(found[size] for found in rounds) for size in works}
    work = np.array([stage.work(size) for size in stage.sizes])
    measured = np.array([seconds[size] for size in stage.sizes])
    unit = work.max()  # both columns of the same magnitude
    design = np.stack([np.ones_like(work), work / unit], axis=1) / measured[:, None]
    (fixed, rate), _ = nnls(design, np.ones(len(work)))
    expected = fixed + rate / unit * stage.work(stage.held_out)
    points = [(stage.work(size), value) for size, value in seconds.items()]
    error = abs(expected / seconds[stage.held_out] - 1)
    return Fit(float(fixed), float(rate / unit), float(error), points)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _prepare_files(size: Size, seed: int) -> Callable[[], object]:
    contents = []
    for number in range(_NUM_FILES):
        image = _phantom(number, seed)
        enlarged = cv2.resize(image, (size.side, size.side), interpolation=cv2.INTER_AREA)
        contents.append(cv2.imencode(".jpg", enlarged)[1].tobytes())
    file = FoundFile("slice.jpg", num_bytes=0, mtime_ns=0)

    def many() -> None:
        with one_thread():
            for content in contents:
                preprocess_file(content, file, PreprocessConfig(), b"0" * 32)

    return many


def _prepare_duplicates(size: Size, seed: int) -> Callable[[], object]:
    prints = np.stack([_fingerprint(number, seed) for number in range(size.rows)])
    return lambda: near_duplicate_pairs(prints, NearDuplicateConfig())


@cache
def _fingerprint(number: int, seed: int) -> NDArray[np.uint8]:
    """(9216,) fingerprint of a slice; groups of ``_NUM_ALIKE`` consecutive slices look alike."""
    rng = np.random.default_rng([seed, number])
    phantom = _phantom(number // _NUM_ALIKE, seed)
    return thumbnail(perturbed(phantom, phantom.shape[0], rng)).ravel()


@cache
def _phantom(number: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([seed, number])
    return make_slice(CLASSES[number % len(CLASSES)], rng).image


def _prepare_step(size: Size) -> Callable[[], object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder("resnet18", NUM_CLASSES).to(device).to(memory_format=torch.channels_last)
    optimizer, _ = build_optimizer(encoder, TrainConfig(), 1000)
    images = torch.randn(size.rows, 1, size.side, size.side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(size.rows, device=device) % NUM_CLASSES
    precision = resolve_precision("auto", device)

    def step() -> None:
        encoder.train()
        with autocast(device, precision):
            logits = encoder(images).logits
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)

    return step


def _prepare_embedding(size: Size) -> Callable[[], object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder("resnet18", NUM_CLASSES).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(size.rows, 1, size.side, size.side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    precision = resolve_precision("auto", device)

    @torch.inference_mode()
    def embedding() -> None:
        encoder.eval()
        with autocast(device, precision):
            encoder(images)
        wait(device)

    return embedding


def _prepare_pca(size: Size, seed: int) -> Callable[[], object]:
    rows = torch.from_numpy(embedding_like(size.rows, size.features, NUM_CLASSES, seed)).double()
    return lambda: PCA(PCA_DIM).fit(rows)


def _kmeans(size: Size, seed: int) -> object:
    rows = _rows(size, seed)
    return KMeans(size.clusters, max_iter=NUM_ITERATIONS, tol=0.0).fit(
        rows, init_centers=rows[: size.clusters].clone()
    )


def _mixture(size: Size, seed: int, covariance_type: str) -> object:
    rows = _rows(size, seed)
    hard = nn.functional.one_hot(torch.arange(size.rows) % size.clusters, size.clusters)
    mixture = GaussianMixture(
        size.clusters,
        "full" if covariance_type == "full" else "diag",
        max_iter=NUM_ITERATIONS,
        tol=0.0,
    )
    return mixture.fit(rows, init_responsibilities=hard.float())


@cache
def _drawn(num_features: int, num_clusters: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(embedding_like(_MAX_ROWS, num_features, num_clusters, seed))


def _rows(size: Size, seed: int) -> torch.Tensor:
    """The first rows of one random set, so that all sizes share their clusters and start."""
    return _drawn(size.features, size.clusters, seed)[: size.rows]


def _prepare_silhouette(size: Size, seed: int) -> Callable[[], object]:
    rows = embedding_like(size.rows, EMBEDDING_DIM, NUM_CLASSES, seed)
    clusters = np.arange(size.rows) % NUM_CLASSES
    return lambda: silhouette(rows, clusters)


@cache
def _forward_flops(side: int) -> float:
    """FLOPs of a forward pass of one slice, counted by torch."""
    encoder = Encoder("resnet18", NUM_CLASSES).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 1, side, side))
    return float(counter.get_total_flops())


class Plan(NamedTuple):
    """A hypothetical run: slices of 256 px, on nodes of 8 GPUs each."""

    num_slices: int
    num_gpus: int
    side: int = 256  # pixels
    num_clusters: int = 16
    iterations: int = 20  # of K-means and of the mixture in each epoch
    num_epochs: int = 20
    batch: int = 256  # slices per step on each GPU

    def __str__(self) -> str:
        return f"{self.num_slices:,} slices on {self.num_gpus} GPUs"

    def costs(self, fits: dict[str, Fit]) -> dict[str, float]:
        """Seconds by stage, memory by location and cost in dollars, with the assumed rates."""
        mine = self.num_slices / self.num_gpus
        tensor_rate = ASSUMED["gpu_bf16"].value * ASSUMED["utilisation"].value
        double_rate = ASSUMED["gpu_fp64"].value * ASSUMED["utilisation"].value
        num_nodes = math.ceil(self.num_gpus / 8)
        cpus = ASSUMED["node_cpus"].value * num_nodes
        forward = _forward_flops(self.side)
        # Every unlabelled slice once, and as many labelled ones.
        steps = mine / self.batch
        num_parameters = sum(p.numel() for p in Encoder("resnet18", NUM_CLASSES).parameters())
        exchange = 2 * 4 * num_parameters / ASSUMED["network"].value + ASSUMED["latency"].value
        full_covariance = PCA_DIM**2 * self.num_clusters * 2 * self.iterations
        clustering = mine * (2 * EMBEDDING_DIM**2 + 2 * full_covariance) / double_rate
        statistics = self.num_clusters * PCA_DIM**2 * 8 / ASSUMED["network"].value
        num_test = min(0.2 * self.num_slices, MAX_SILHOUETTE_ROWS)
        train_s = steps * 2 * self.batch * 3 * forward / tensor_rate
        gathered = self.num_slices * 4 * (2 + 2 * self.num_clusters + PCA_DIM + NUM_CLASSES)
        epoch = {
            "train": train_s,
            "exchange gradients": steps * exchange if num_nodes > 1 else 0.0,
            "embed": mine * 1.2 * forward / tensor_rate,
            "re-cluster": clustering
            + 2 * self.iterations * (ASSUMED["latency"].value + statistics),
            "gather for the checkpoint": gathered / ASSUMED["network"].value,
            "silhouette on one CPU": num_test**2 * fits["silhouette"].rate_s,
        }
        files = fits[_FILES]
        per_file = files.fixed_s / _NUM_FILES + files.rate_s * 512**2
        efficiency = ASSUMED["cpu_efficiency"].value
        node_cpus = ASSUMED["node_cpus"].value * efficiency
        once = {
            "preprocess, 512 px files": self.num_slices * per_file / (cpus * efficiency),
            "find near-duplicates on one node": (
                self.num_slices * ASSUMED["search_copies"].value / node_cpus
            ),
        }
        total = sum(once.values()) + self.num_epochs * sum(epoch.values())
        return (
            {f"once: {name} (s)": value for name, value in once.items()}
            | {f"each epoch: {name} (s)": value for name, value in epoch.items()}
            | {
                "memory: slices on each GPU (GB)": mine * self.side**2 / 1e9,
                "memory: embeddings on each GPU, float64 (GB)": mine * 3 * EMBEDDING_DIM * 8 / 1e9,
                "memory: gathered on every rank (GB)": gathered / 1e9,
                "disk: fingerprints on one node (GB)": self.num_slices * THUMBNAIL_BYTES / 1e9,
                "whole run (h)": total / 3600,
                "whole run (USD)": total / 3600 * self.num_gpus * ASSUMED["gpu_hour"].value,
            }
        )


def _figure(fits: dict[str, Fit], units: dict[str, str]) -> Figure:
    """Seconds against work for each stage, with the fitted line and the held-out size."""
    columns = 3
    figure = new_figure(4.0 * columns, 3.0 * math.ceil(len(fits) / columns))
    for number, (name, fit) in enumerate(fits.items(), start=1):
        axes = figure.add_subplot(math.ceil(len(fits) / columns), columns, number)
        work, seconds = np.array(fit.points).T
        line = np.linspace(work.min(), work.max())
        axes.plot(line, fit.fixed_s + fit.rate_s * line, color="#BBBBBB")
        axes.plot(work[:-1], seconds[:-1], "o", color=BLUE, label="fitted")
        axes.plot(work[-1:], seconds[-1:], "D", color=VERMILLION, label="held out")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"work ({units[name]})")
        axes.locator_params(axis="x", nbins=4)
        axes.set_ylabel("s")
        tidy(axes, grid="y")
        if number == 1:
            axes.legend(frameon=False)
    return figure


def _report(fits: dict[str, Fit], costs: dict[str, dict[str, float]]) -> str:
    """The cost model as Markdown."""
    fitted = markdown_table(
        ["stage", "fixed (s)", "rate (s per unit of work)", "error at an unseen size"],
        [
            [name, f"{fit.fixed_s:.3g}", f"{fit.rate_s:.3g}", f"{fit.error:.1%}"]
            for name, fit in fits.items()
        ],
        num_text_columns=1,
    )
    carried = markdown_table(
        ["unmeasured", *costs],
        [
            [name, *(f"{found[name]:,.3g}" for found in costs.values())]
            for name in next(iter(costs.values()))
        ],
        num_text_columns=1,
    )
    assumed = markdown_table(
        ["assumption", "source", "value"],
        [[name, rate.source, f"{rate.value:.3g} {rate.unit}"] for name, rate in ASSUMED.items()],
        num_text_columns=2,
    )
    return f"## Measured\n\n{fitted}\n\n## Extrapolated to large runs\n\n{carried}\n\n{assumed}\n"
