"""The intracranial strip against brains that are known, beside METHOD's Otsu strip.

``--source DIR`` holds volumes, NAME.nii.gz, each with a mask of its brain, NAME_mask.nii.gz. Heads
that the atlas was made of would flatter it. Phantoms, which are measured as well, are caricatures.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.mri.intracranial import MIN_CONFIDENCE, intracranial_mask
from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.reference_heads import PLANES, ReferenceSlice, find_heads, reference_slices
from brainray.mri.skull_strip import otsu_mask

_MIN_BRAIN = 0.1  # of the largest brain in the plane: less is the tip of a lobe, or the spinal cord
_NUM_PHANTOMS = 40  # in each plane


@dataclass(frozen=True)
class _Scored:
    head: str
    plane: str
    brain: int  # pixels
    largest: int  # of its head and plane
    dice: float  # of what preprocessing keeps: of Otsu's strip where the mask is not trusted
    otsu: float
    trusted: bool
    milliseconds: float


def run(options: CaseOptions) -> BenchmarkResult:
    """Mean Dice by head and plane, how many masks are trusted, and the time that a slice takes.

    Raises:
        DataError: ``--source`` holds no volume with a mask, or they do not fit.
    """
    step = 5 if options.quick else 2
    scored = list(_of_phantoms(_NUM_PHANTOMS // step, options.seed))
    heads = [] if options.source is None else find_heads(options.source)
    for head in heads:
        options.log(f"{head.name}")
        for plane in PLANES:
            slices = list(reference_slices(head, plane))[::step]
            scored += _score(head.name.removesuffix(".nii.gz"), slices)
    enough = [one for one in scored if one.brain >= _MIN_BRAIN * one.largest]
    measures = [
        Measure(
            f"phantoms, {plane}", _mean_dice(enough, head="phantoms", plane=plane), "Dice", 0.93
        )
        for plane in PLANES
    ]
    if heads:
        measures += _of_heads([one for one in enough if one.head != "phantoms"])
    measures.append(
        Measure("a slice", float(np.median([one.milliseconds for one in scored])), "ms")
    )
    details = {"slices": [one.__dict__ for one in scored], "min_brain": _MIN_BRAIN}
    return BenchmarkResult(measures, details, _figure(scored))


def _of_phantoms(number: int, seed: int) -> Iterator[_Scored]:
    for plane in PLANES:
        drawn = [
            make_slice(
                CLASSES[row % len(CLASSES)], np.random.default_rng([seed, row]), orientation=plane
            )
            for row in range(number)
        ]
        yield from _score(
            "phantoms", [ReferenceSlice(plane, one.image, one.brain_mask) for one in drawn]
        )


def _score(head: str, slices: list[ReferenceSlice]) -> Iterator[_Scored]:
    """Slices of one head and plane; OpenCV on one thread, as in preprocessing."""
    largest = max((np.count_nonzero(one.brain) for one in slices), default=0)
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    for one in slices:
        started = time.perf_counter()
        found = intracranial_mask(one.image)
        milliseconds = 1000.0 * (time.perf_counter() - started)
        of_otsu = otsu_mask(one.image)
        trusted = found.confidence >= MIN_CONFIDENCE
        yield _Scored(
            head,
            one.plane,
            int(np.count_nonzero(one.brain)),
            int(largest),
            dice(found.mask if trusted else of_otsu, one.brain),
            dice(of_otsu, one.brain),
            trusted,
            milliseconds,
        )
    cv2.setNumThreads(num_threads)


def dice(mask: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Overlap of two masks (H, W), from 0 to 1 (Dice 1945)."""
    return float(2.0 * (mask & reference).sum() / (mask.sum() + reference.sum()))


def _of_heads(scored: list[_Scored]) -> list[Measure]:
    heads = sorted({one.head for one in scored})
    measures = [Measure(head, _mean_dice(scored, head=head), "Dice") for head in heads]
    measures += [
        Measure(f"heads, {plane}", _mean_dice(scored, plane=plane), "Dice") for plane in PLANES
    ]
    mean = float(np.mean([measure.value for measure in measures[: len(heads)]]))
    return [
        *measures,
        Measure("heads, mean", mean, "Dice", 0.9),
        Measure("heads, Otsu's strip", float(np.mean([one.otsu for one in scored])), "Dice"),
        Measure("heads, masks trusted", float(np.mean([one.trusted for one in scored])), "share"),
    ]


def _mean_dice(scored: list[_Scored], head: str | None = None, plane: str | None = None) -> float:
    wanted = [one for one in scored if head in (None, one.head) and plane in (None, one.plane)]
    return float(np.mean([one.dice for one in wanted]))


def _figure(scored: list[_Scored]) -> Figure:
    """Dice against the size of the brain in the slice, by plane."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    for axes, plane in zip(figure.subplots(1, len(PLANES), sharey=True), PLANES, strict=True):
        by_head: dict[str, list[_Scored]] = defaultdict(list)
        for one in scored:
            if one.plane == plane:
                by_head[one.head].append(one)
        for head, its in by_head.items():
            share = [one.brain / one.largest for one in its]
            axes.plot(share, [one.dice for one in its], ".", markersize=3, label=head)
        axes.axvline(_MIN_BRAIN, color="grey", linewidth=0.8)
        axes.set_title(plane)
        axes.set_xlabel("brain / largest brain")
    figure.axes[0].set_ylabel("Dice")
    figure.axes[-1].legend(fontsize="x-small")
    return figure
