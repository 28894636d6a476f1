"""Overlap of the intracranial skull strip with known brains, compared with METHOD's Otsu strip.

``--source DIR`` contains volumes, NAME.nii.gz, each with a mask of its brain, NAME_mask.nii.gz.
Heads from which the atlas was built would bias the result. Phantoms, which are also measured, are
only rough approximations.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.timing import one_thread
from brainray.log import log
from brainray.mri.intracranial import MIN_CONFIDENCE, intracranial_mask
from brainray.mri.phantom import CLASSES, make_slice
from brainray.mri.reference_heads import ReferenceSlice, dice, find_heads, reference_slices
from brainray.mri.skull_strip import otsu_mask
from brainray.mri.slices import ORIENTATIONS, Orientation
from brainray.report.style import new_figure

_MIN_BRAIN = 0.1  # of the largest brain in the plane; less is the tip of a lobe or the spinal cord
_STEP, _QUICK_STEP = 2, 5  # every n-th slice
_NUM_PHANTOMS, _NUM_QUICK_PHANTOMS = 20, 8  # per orientation
_PHANTOMS = "phantoms"


@dataclass(frozen=True)
class _Scored:
    head: str
    orientation: str
    brain: int  # pixels
    largest: int  # of its head and orientation
    dice: float  # of the mask used in preprocessing: Otsu's if the mask is not trusted
    otsu: float
    trusted: bool
    milliseconds: float


def run(options: CaseOptions) -> BenchmarkResult:
    """Mean Dice by head and orientation, share of trusted masks, and time per slice.

    Raises:
        DataError: ``--source`` contains no volume with a mask, or they do not match.
    """
    step = _QUICK_STEP if options.quick else _STEP
    scored = []
    for orientation in ORIENTATIONS:
        number = _NUM_QUICK_PHANTOMS if options.quick else _NUM_PHANTOMS
        scored += _score(_PHANTOMS, list(_phantoms(number, options.seed, orientation)))
    for head in [] if options.source is None else find_heads(options.source):
        log(head.name)
        for orientation in ORIENTATIONS:
            slices = list(reference_slices(head, orientation))[::step]
            scored += _score(head.name.removesuffix(".nii.gz"), slices)
    enough = [one for one in scored if one.brain >= _MIN_BRAIN * one.largest]
    phantom_scores = [one for one in enough if one.head == _PHANTOMS]
    head_scores = [one for one in enough if one.head != _PHANTOMS]
    measures = [
        Measure(f"phantoms, {orientation}", _by_head(its, "dice"), "Dice", at_least=0.93)
        for orientation, its in _grouped(phantom_scores, "orientation").items()
    ]
    if head_scores:
        measures += _measures_of(head_scores)
    measures.append(
        Measure("a slice", float(np.median([one.milliseconds for one in scored])), "ms")
    )
    details = {"slices": [asdict(one) for one in scored], "min_brain": _MIN_BRAIN}
    return BenchmarkResult(measures, details, _figure(scored))


def _phantoms(number: int, seed: int, orientation: Orientation) -> Iterator[ReferenceSlice]:
    for row in range(number):
        rng = np.random.default_rng([seed, row])
        drawn = make_slice(CLASSES[row % len(CLASSES)], rng, orientation=orientation)
        yield ReferenceSlice(orientation, drawn.image, drawn.brain_mask)


def _score(head: str, slices: list[ReferenceSlice]) -> list[_Scored]:
    """Score slices of one head and orientation, on one thread as in preprocessing."""
    largest = max((np.count_nonzero(one.brain) for one in slices), default=0)
    scored = []
    with one_thread():
        for one in slices:
            started = time.perf_counter()
            found = intracranial_mask(one.image)
            milliseconds = 1000.0 * (time.perf_counter() - started)
            otsu = otsu_mask(one.image)
            trusted = found.confidence >= MIN_CONFIDENCE
            scored.append(
                _Scored(
                    head,
                    one.orientation,
                    int(np.count_nonzero(one.brain)),
                    int(largest),
                    dice(found.mask if trusted else otsu, one.brain),
                    dice(otsu, one.brain),
                    trusted,
                    milliseconds,
                )
            )
    return scored


def _measures_of(scored: list[_Scored]) -> list[Measure]:
    """Measures of the heads, each with the same weight regardless of its number of slices."""
    return [
        *(
            Measure(head, _by_head(its, "dice"), "Dice")
            for head, its in _grouped(scored, "head").items()
        ),
        *(
            Measure(f"heads, {orientation}", _by_head(its, "dice"), "Dice")
            for orientation, its in _grouped(scored, "orientation").items()
        ),
        Measure("heads, mean", _by_head(scored, "dice"), "Dice", at_least=0.9),
        Measure("heads, Otsu's strip", _by_head(scored, "otsu"), "Dice"),
        Measure("heads, masks trusted", _by_head(scored, "trusted"), "share"),
    ]


def _by_head(scored: list[_Scored], figure: str) -> float:
    """Mean of the means of the heads."""
    heads = _grouped(scored, "head").values()
    return float(np.mean([np.mean([getattr(one, figure) for one in its]) for its in heads]))


def _grouped(scored: list[_Scored], key: str) -> dict[str, list[_Scored]]:
    groups: dict[str, list[_Scored]] = defaultdict(list)
    for one in scored:
        groups[getattr(one, key)].append(one)
    return groups


def _figure(scored: list[_Scored]) -> Figure:
    """Dice against the size of the brain in the slice, by orientation."""
    figure = new_figure(9.0, 3.2)
    panels = figure.subplots(1, len(ORIENTATIONS), sharey=True)
    by_orientation = _grouped(scored, "orientation")
    for axes, orientation in zip(panels, ORIENTATIONS, strict=True):
        for head, its in _grouped(by_orientation[orientation], "head").items():
            share = [one.brain / one.largest for one in its]
            axes.plot(share, [one.dice for one in its], ".", markersize=3, label=head)
        axes.axvline(_MIN_BRAIN, color="grey", linewidth=0.8)
        axes.set_title(orientation)
        axes.set_xlabel("brain / largest brain")
    panels[0].set_ylabel("Dice")
    panels[-1].legend(fontsize="x-small")
    return figure
