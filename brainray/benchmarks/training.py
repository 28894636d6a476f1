"""Training steps and epochs against a bare PyTorch loop over a tensor in memory (upper bound)."""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainray import dist, layout
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.roofline import measured_peaks, training_work
from brainray.benchmarks.samples import load_slices, perturbed
from brainray.benchmarks.timing import OURS, relative_times, side_by_side, timed_on_rank, wait
from brainray.config import AugmentConfig, TrainConfig
from brainray.config_text import load_config
from brainray.engine.epoch import EpochData
from brainray.engine.forward import autocast
from brainray.engine.loop import train_epoch
from brainray.engine.recipe import build_optimizer, resolve_precision
from brainray.engine.shard import CachedImages, Images, PixelScale, SliceShard, StreamedImages
from brainray.log import log
from brainray.models.encoder import Encoder
from brainray.models.objective import Objective, StepSizes, Targets
from brainray.models.soft_kmeans import SoftKMeans
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.resources import KEEPING_MEMORY
from brainray.orchestration.training.driver import train

BATCH = 64  # labelled slices, and the same number of unlabelled ones
NUM_CLASSES, NUM_CLUSTERS = 4, 4
MIN_STEP, MIN_EPOCH, MIN_STREAMING, MIN_SCALING = 0.97, 0.90, 0.85, 0.9
MAX_RECLUSTERING, MAX_MEMORY_GROWTH = 0.03, 1.1

_BARE, _PLAIN = "bare loop", "bare loop, memory not kept"
_SCALE = PixelScale(mean=0.3, std=0.25)


def run(options: CaseOptions) -> BenchmarkResult:
    """Steps, epochs through Ray, streaming and two workers against a bare loop in memory.

    Our training and the bare loop both run in processes that keep freed memory, as Ray workers do;
    the gain from that alone is measured separately.
    """
    sides = (64, 128) if options.quick else (128, 224)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    slices = load_slices(options.source, options.seed)
    measures: list[Measure] = []
    milliseconds: dict[str, dict[str, float]] = {}
    steps = 4 if options.quick else 6
    for side in sides:
        log(f"steps at {side} px")
        pixels = _pixels(slices, 4 * BATCH, side)
        seconds = _as_worker(_timed_steps, pixels, device, steps)
        seconds[_PLAIN] = _alone(_timed_bare, pixels, device, steps)
        milliseconds[f"step at {side} px"] = {
            name: 1e3 * found / steps for name, found in seconds.items()
        }
        ratio, gain = seconds[_BARE] / seconds[OURS], seconds[_PLAIN] / seconds[_BARE]
        measures += [
            Measure(f"step at {side} px: against the bare loop", ratio, "x", at_least=MIN_STEP),
            Measure(f"step at {side} px: what keeping memory gains the bare loop", gain, "x"),
            Measure(f"step at {side} px", 2 * BATCH * steps / seconds[OURS], "images/s"),
            _as_worker(_roofline, pixels, device, seconds[OURS] / steps, side),
        ]
    log("streaming, four times the cache")
    pixels = _pixels(slices, 16 * BATCH, sides[0])
    measures += _as_worker(_streaming, pixels, device, 8 if options.quick else 16)
    if device.type == "cpu":
        log("one and two workers of one thread")
        measures.append(_two_workers(sides[0], options.seed))
    num_slices = 1500 if options.quick else 5600
    log(f"whole epochs through Ray Train, {num_slices} slices at {sides[0]} px")
    measures += _whole_epoch(slices, num_slices, sides[0], options.seed, device)
    details = {"milliseconds": milliseconds, "threads": torch.get_num_threads(), "batch": BATCH}
    return BenchmarkResult(measures, details, relative_times(milliseconds))


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``work(*arguments)`` in its own process with all threads."""
    (result,) = dist.run_on_ranks(work, 1, *arguments, num_threads=torch.get_num_threads())
    return result


def _as_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    """Like `_alone`, in a process that keeps freed memory, as worker processes do."""
    with _keeping_memory():
        return _alone(work, *arguments)


@contextmanager
def _keeping_memory() -> Iterator[None]:
    """Start processes with the environment of CPU workers."""
    before = os.environ.copy()
    os.environ.update(KEEPING_MEMORY)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _timed_steps(pixels: Tensor, device: torch.device, steps: int) -> dict[str, float]:
    """Median seconds of ``steps`` steps of ours and the bare loop, alternating."""
    pixels = pixels.to(device)
    contestants = {OURS: _ours(CachedImages(pixels), steps), _BARE: _bare(pixels, steps)}
    timed = side_by_side(contestants, rounds=5)
    return {name: found.seconds for name, found in timed.items()}


def _timed_bare(pixels: Tensor, device: torch.device, steps: int) -> float:
    return side_by_side({_BARE: _bare(pixels.to(device), steps)}, rounds=5)[_BARE].seconds


def _roofline(pixels: Tensor, device: torch.device, step_s: float, side: int) -> Measure:
    """Share of the roofline that our step reaches."""
    low = resolve_precision("auto", device) == "bf16"
    peaks = measured_peaks(torch.bfloat16 if low else torch.float32, device)
    encoder = Encoder("resnet18", NUM_CLASSES).to(device).to(memory_format=torch.channels_last)
    images = _standardised(pixels[: 2 * BATCH].to(device))
    work = training_work(encoder, images, bytes_per_number=2 if low else 4)
    name = f"step at {side} px: share of the roofline ({peaks.limit(work)})"
    return Measure(name, peaks.seconds(work) / step_s)


def _pixels(slices: list[NDArray[np.uint8]], count: int, side: int) -> Tensor:
    """(count, 1, side, side) uint8."""
    small = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in slices]
    return torch.from_numpy(np.stack([small[row % len(small)] for row in range(count)])[:, None])


def _shard(images: Images) -> SliceShard:
    labels = torch.arange(len(images), device=images.device) % NUM_CLASSES
    return SliceShard(images, torch.arange(len(images), device=images.device), labels)


def _ours(
    images: Images, steps: int, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Callable[[], None]:
    """An epoch of the engine with joint objective and augmentation, as in real runs."""
    device = images.device
    encoder = Encoder("resnet18", NUM_CLASSES).to(device).to(memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(encoder, TrainConfig(), 10_000)
    model = wrap(encoder)
    shard = _shard(images)
    targets = Targets(
        responsibilities=torch.full((len(images), NUM_CLUSTERS), 1 / NUM_CLUSTERS, device=device),
        pseudo_labels=torch.zeros(len(images), dtype=torch.int64, device=device),
        confidences=torch.ones(len(images), device=device),
        centers=torch.zeros(NUM_CLUSTERS, encoder.embedding_dim, device=device),
        class_of_cluster=torch.arange(NUM_CLUSTERS, device=device),
        ramp=1.0,
    )

    def epoch() -> None:
        train_epoch(
            model,
            optimizer,
            scheduler,
            EpochData(
                labelled=shard,
                unlabelled=shard,
                objective=Objective((SoftKMeans(0.5),)),
                targets=targets,
                sizes=StepSizes(BATCH, BATCH),
                num_steps=steps,
                scale=_SCALE,
                augmentation=AugmentConfig(),
                augmentation_unlabelled=AugmentConfig(policy="none"),
                seed=0,
            ),
            precision=resolve_precision("auto", device),
        )
        wait(device)

    return epoch


def _bare(pixels: Tensor, steps: int) -> Callable[[], None]:
    """The loop that a careful user would write: same network, precision, batch and optimiser."""
    device = pixels.device
    network = _torchvision_network(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    labels = torch.arange(len(pixels), device=device) % NUM_CLASSES
    precision = resolve_precision("auto", device)

    def epoch() -> None:
        network.train()
        for _ in range(steps):
            rows = torch.randint(len(pixels), (2 * BATCH,), device=device)
            with autocast(device, precision):
                logits = network(_standardised(pixels[rows]))
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        wait(device)

    return epoch


def _torchvision_network(device: torch.device) -> nn.Module:
    network = torchvision.models.resnet18(weights=None, num_classes=NUM_CLASSES)
    stem = network.conv1
    network.conv1 = nn.Conv2d(
        1, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False
    )
    return network.to(device).to(memory_format=torch.channels_last)


def _standardised(pixels: Tensor) -> Tensor:
    images = (pixels.float() / 255 - _SCALE.mean) / _SCALE.std
    return images.contiguous(memory_format=torch.channels_last)


def _streaming(pixels: Tensor, device: torch.device, steps: int) -> list[Measure]:
    """Training from a file four times as large as the cache, against training from the cache."""
    streamed = StreamedImages(len(pixels), pixels.shape[-1], device)
    for row, image in enumerate(pixels):
        streamed.put(row, image[0].numpy())
    cached = CachedImages(pixels[: 4 * BATCH].to(device))
    from_file = _ours(streamed, steps)
    from_file()
    before = psutil.Process().memory_info().rss
    timed = side_by_side({"cached": _ours(cached, steps), "streamed": from_file}, rounds=3)
    growth = psutil.Process().memory_info().rss / before
    ratio = timed["cached"].seconds / timed["streamed"].seconds
    return [
        Measure("streaming against the cache", ratio, "x", at_least=MIN_STREAMING),
        Measure("streaming: memory after against before", growth, "x", at_most=MAX_MEMORY_GROWTH),
    ]


def _two_workers(side: int, seed: int) -> Measure:
    """Two workers of one thread against one, each with as many steps: share of the ideal.

    Both are started several times, in alternation; a start is as slow as its slowest rank.
    """
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with _keeping_memory():
        for number in range(3):
            for num_ranks in (1, 2) if number % 2 == 0 else (2, 1):
                found = dist.run_on_ranks(_timed_rank, num_ranks, side, seed)
                seconds[num_ranks].append(max(found))
    one, two = (statistics.median(found) for found in seconds.values())
    name = "two workers of one thread: share of ideal"
    return Measure(name, one / two, "x", at_least=MIN_SCALING)


def _timed_rank(side: int, seed: int) -> float:
    """Median seconds of a DDP epoch on this rank, each time from when all ranks are ready."""
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (4 * BATCH, 1, side, side), dtype=torch.uint8)
    epoch = _ours(CachedImages(pixels), steps=4, wrap=DistributedDataParallel)
    return timed_on_rank(epoch, rounds=5).seconds


def _whole_epoch(
    slices: list[NDArray[np.uint8]], num_slices: int, side: int, seed: int, device: torch.device
) -> list[Measure]:
    """The last epoch of a real run through Ray Train against the bare loop.

    The loop trains and embeds as many slices, extrapolated from a part. It cannot alternate with
    the run's epochs: it is measured before the run and after it, and the mean is taken. How much it
    has changed in between is a measure of its own: other load on the machine may account for as
    much of the result.
    """
    attach_to_ray()
    with tempfile.TemporaryDirectory(prefix="brainray-benchmark-") as temporary:
        folder = Path(temporary)
        _write_source(folder / "source", slices, num_slices, seed)
        settings = [
            f"storage={folder}",
            f"source={folder / 'source'}",
            f"train.image_size={side}",
            f"preprocess.image_size={side}",
            "preprocess.subject.estimate=false",
            "split.mode=grouped",
            "split.test_fraction=0.1",
            f"train.batch_size_per_worker={BATCH}",
            f"train.labelled_batch_size_per_worker={BATCH}",
            "train.num_workers=1",
            "train.num_epochs=3",
            "evaluation.tsne_epochs=[]",
        ]
        preprocess(load_config(None, [*settings, "name=slices"]))
        config = load_config(None, [*settings, "name=run", "dataset=slices"])
        pixels, at_once = _pixels(slices, 8 * BATCH, side), config.train.embed_batch_size
        loops = [_as_worker(_bare_costs, pixels, device, at_once)]
        trained = train(config)
        history = trained.run.folder.read_json_lines(layout.METRICS)
        num_fitted = trained.run.record.num_slices
    last = history[-1]  # with warm allocators and thread pools
    steps = -(-num_fitted["unlabelled"] // BATCH)
    num_embedded = num_fitted["unlabelled"] + num_fitted["labelled"]
    loops.append(_as_worker(_bare_costs, pixels, device, at_once))
    before_s, after_s = (loop.seconds(steps, num_embedded) for loop in loops)
    return [
        Measure("epoch through Ray Train", last["time/epoch_s"], "s"),
        Measure(
            "epoch against the bare loop's train + embed",
            (before_s + after_s) / 2 / last["time/epoch_s"],
            "x",
            at_least=MIN_EPOCH,
        ),
        Measure("bare loop's train + embed, before the run against after", before_s / after_s, "x"),
        Measure(
            "re-clustering, share of the epoch",
            last["time/recluster_s"] / last["time/epoch_s"],
            at_most=MAX_RECLUSTERING,
        ),
        *(
            Measure(f"epoch: {part}", last[f"time/{part}_s"], "s")
            for part in ("train", "data_wait", "embed", "recluster", "evaluate", "report")
        ),
    ]


def _write_source(folder: Path, slices: list[NDArray[np.uint8]], count: int, seed: int) -> None:
    """Write class folders of slices, perturbed so that no two are copies."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        image = perturbed(slices[number % len(slices)], 224, rng)
        path = folder / f"class{number % NUM_CLASSES}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)


@dataclass(frozen=True)
class _BareCosts:
    """Seconds of the bare loop."""

    step_s: float
    embedded_slice_s: float

    def seconds(self, num_steps: int, num_embedded: int) -> float:
        """Of an epoch."""
        return self.step_s * num_steps + self.embedded_slice_s * num_embedded


def _bare_costs(pixels: Tensor, device: torch.device, embed_batch_size: int) -> _BareCosts:
    """Measured on eight steps and on the embedding of ``pixels``."""
    pixels = pixels.to(device)
    num_steps = 8
    network = _torchvision_network(device)

    @torch.inference_mode()
    def embedding() -> None:
        network.eval()
        with autocast(device, resolve_precision("auto", device)):
            for batch in pixels.split(embed_batch_size):
                network(_standardised(batch))
        wait(device)

    timed = side_by_side({"train": _bare(pixels, num_steps), "embed": embedding}, rounds=3)
    return _BareCosts(timed["train"].seconds / num_steps, timed["embed"].seconds / len(pixels))
