"""Estimated subject groups: errors of links and groups, and leakage through a split by them.

The ground truth comes from series of phantoms and, if the folder contains some, from NIfTI volumes
in three planes. Phantoms of different subjects differ more than people do, so their results check
the method and are an upper bound, not an estimate for real heads. Pictures in folders of classes do
not tell who they show, but which links join two classes, and therefore two subjects.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import pictures_by_class
from brainray.config import SubjectConfig
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.nifti import decode_nifti
from brainray.mri.phantom import CLASSES, make_series
from brainray.mri.resize import thumbnail
from brainray.mri.slices import ORIENTATIONS, DecodeOptions, RejectedImage
from brainray.mri.split import draw_test
from brainray.mri.subjects import (
    Described,
    estimate_subjects,
    find_same_subject,
    merge_links,
    mutual_links,
    same_view_groups,
)
from brainray.report.style import new_figure

_JPEG_QUALITY = 80
_MIN_SIDE = 32  # pixels of a volume's slice
_PHANTOM_SERIES_LENGTH = 8
_PHANTOM_SIDE = 128  # pixels
_SLICES_PER_PLANE = 24  # of a volume; spaced as in a clinical series
_TEST_FRACTION = 0.2
_SWEEP = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # minimum similarity


@dataclass(frozen=True)
class KnownSlices:
    """Slices with known subjects, in an order in which neighbours of a series are adjacent."""

    thumbnails: NDArray[np.uint8]  # (N, S * S)
    subjects: NDArray[np.str_]  # (N,)
    series: NDArray[np.str_]  # (N,): subject and plane


def run(options: CaseOptions) -> BenchmarkResult:
    """Errors of estimated subject groups, and leakage of a split by them and of a random one.

    Raises:
        DataError: a volume cannot be read.
    """
    settings = SubjectConfig()
    sets = {"phantoms": _phantoms(60 if options.quick else 240, options.seed)}
    volumes = [] if options.source is None else sorted(options.source.rglob("*.nii*"))
    if len(volumes) > 1:
        sets["volumes"] = _volumes(volumes, options.seed)
    else:
        log(f"{len(volumes)} NIfTI volumes: skipped, since at least two are needed")
    measures: list[Measure] = []
    thumbnails, classes = pictures_by_class(options.source)
    if len(set(classes)) > 1:
        log(f"pictures: {len(classes)} slices of {len(set(classes))} classes")
        measures += [
            replace(measure, name=f"pictures/{measure.name}")
            for measure in measure_by_class(thumbnails, classes, settings)
        ]
    sweeps: dict[str, list[dict[str, float]]] = {}
    for name, known in sets.items():
        log(f"{name}: {len(known.subjects)} slices of {len(set(known.subjects))} subjects")
        measures += [
            replace(measure, name=f"{name}/{measure.name}")
            for measure in measure_errors(known, settings, options.seed)
        ]
        sweeps[name] = [
            {
                "link_similarity": least,
                **_pair_errors(known, settings.model_copy(update={"link_similarity": least})),
            }
            for least in _SWEEP
        ]
    details = {"settings": settings.model_dump(), "sweeps": sweeps, "num_volumes": len(volumes)}
    return BenchmarkResult(measures, details, _figure(sweeps))


def measure_errors(known: KnownSlices, settings: SubjectConfig, seed: int) -> list[Measure]:
    """Errors of links, groups and the pairwise decision, and leakage of a split by groups."""
    links = mutual_links(Described.of(known.thumbnails), settings)
    is_right = known.subjects[links.first] == known.subjects[links.second]
    linked = set(zip(links.first.tolist(), links.second.tolist(), strict=True))
    neighbours = np.flatnonzero(known.series[:-1] == known.series[1:]).tolist()
    pairs = _pair_errors(known, settings)
    groups = _estimate(known, settings)
    single = np.array([str(number) for number in range(len(groups))])
    grouped_leak, random_leak = (_leak(known, parts, seed) for parts in (groups, single))
    beside, beside_random = (_leak_to_next(known, parts, seed) for parts in (groups, single))
    return [
        Measure("link precision", _mean(is_right)),
        Measure("neighbour recall", _mean([(row, row + 1) in linked for row in neighbours])),
        Measure("group precision", pairs["precision"], at_least=0.9),
        Measure("group recall", pairs["recall"]),
        Measure("slices with a neighbour in group", _with_neighbour(known, groups)),
        Measure("leak, random split", random_leak),
        Measure("leak, grouped split", grouped_leak),
        Measure("leak, grouped / random", grouped_leak / max(random_leak, 1e-9), "x", at_most=0.5),
        Measure("leak to next slice, random split", beside_random),
        Measure("leak to next slice, grouped split", beside),
        *_pairwise_decision(known, settings),
    ]


def measure_by_class(
    thumbnails: NDArray[np.uint8], classes: NDArray[np.str_], settings: SubjectConfig
) -> list[Measure]:
    """Shares of links, and of pairs in a group, that join two subjects, from slices' classes.

    A false link joins two classes as often as two random slices are of two classes, unless it
    depends on the class: where a class is a collection of its own, more links are false than this
    tells. Copies and flips count once.

    Args:
        thumbnails: (N, S * S).
        classes: (N,), of which each subject has one.
        settings: thresholds.
    """
    described = Described.of(thumbnails)
    views = np.unique(same_view_groups(described, min_similarity=settings.same_view_similarity))
    distinct = described.only(views)
    names, number = np.unique(classes[views], return_inverse=True)
    by_chance = 1.0 - float(np.square(np.bincount(number) / len(views)).sum())
    links = mutual_links(distinct, settings)
    is_false = number[links.first] != number[links.second]
    _, group = np.unique(merge_links(distinct, links, settings), return_inverse=True)
    counts = np.zeros((group.max() + 1, len(names)))
    np.add.at(counts, (group, number), 1.0)
    sizes = counts.sum(axis=1)
    num_pairs = (sizes * (sizes - 1.0)).sum() / 2.0
    num_false = (np.square(sizes) - np.square(counts).sum(axis=1)).sum() / 2.0
    return [
        Measure("views with a link", len(np.union1d(links.first, links.second)) / len(views)),
        Measure("false links, by class", _mean(is_false) / by_chance),
        Measure("false pairs in a group, by class", float(num_false / num_pairs / by_chance)),
    ]


def _phantoms(num_subjects: int, seed: int) -> KnownSlices:
    thumbnails, subjects = [], []
    for subject in range(num_subjects):
        rng = np.random.default_rng([seed, subject])
        class_name = CLASSES[subject % len(CLASSES)]
        for phantom in make_series(class_name, rng, _PHANTOM_SERIES_LENGTH, _PHANTOM_SIDE):
            thumbnails.append(_compressed_thumbnail(phantom.image))
            subjects.append(f"{subject:05d}")
    names = np.array(subjects)
    return KnownSlices(np.stack(thumbnails), names, names)


def _volumes(paths: list[Path], seed: int) -> KnownSlices:
    thumbnails, subjects, series = [], [], []
    for path in paths:
        for plane in ORIENTATIONS:
            options = DecodeOptions(
                min_side=_MIN_SIDE,
                max_pixels=2**24,
                max_voxels=2**29,
                axis=plane,
                window_percentiles=(1.0, 99.0),
                min_foreground=0.1,
                salt=str(seed).encode(),
            )
            try:
                slices = decode_nifti(path.read_bytes(), options)
            except RejectedImage as error:
                raise DataError(f"{path}: {error}: remove it from the folder") from error
            step = max(1, round(len(slices) / _SLICES_PER_PLANE))
            for shown in slices[::step]:
                thumbnails.append(_compressed_thumbnail(shown.image))
                subjects.append(str(path))
                series.append(f"{path}/{plane}")
    return KnownSlices(np.stack(thumbnails), np.array(subjects), np.array(series))


def _compressed_thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
    return thumbnail(np.asarray(decoded, dtype=np.uint8)).ravel()


def _estimate(known: KnownSlices, settings: SubjectConfig) -> NDArray[np.str_]:
    identities = [f"{number:06d}" for number in range(len(known.subjects))]
    return np.array(estimate_subjects(known.thumbnails, identities, identities, settings))


def _pair_errors(known: KnownSlices, settings: SubjectConfig) -> dict[str, float]:
    """Precision: share of pairs in a group with the same subject; recall: share of pairs found.

    Recall is over pairs of the same series, since image similarity cannot link two planes.
    """
    groups = _estimate(known, settings)
    found, one_subject, one_series = (
        np.triu(names[:, None] == names[None, :], 1)
        for names in (groups, known.subjects, known.series)
    )
    return {"precision": _mean(one_subject[found]), "recall": _mean(found[one_series])}


def _with_neighbour(known: KnownSlices, groups: NDArray[np.str_]) -> float:
    """Share of slices with an adjacent slice of their series in their group."""
    joined = (known.series[:-1] == known.series[1:]) & (groups[:-1] == groups[1:])
    return _mean(np.append(joined, False) | np.append(False, joined))


def _leak(known: KnownSlices, groups: NDArray[np.str_], seed: int) -> float:
    """Share of test slices with a slice of the same series in training."""
    is_test = _drawn_test(groups, seed)
    return _mean(np.isin(known.series[is_test], known.series[~is_test]))


def _leak_to_next(known: KnownSlices, groups: NDArray[np.str_], seed: int) -> float:
    """Share of test slices with an adjacent slice of their series in training."""
    is_test = _drawn_test(groups, seed)
    is_crossed = (known.series[:-1] == known.series[1:]) & (is_test[:-1] != is_test[1:])
    is_exposed = np.append(is_crossed, False) | np.append(False, is_crossed)
    return _mean(is_exposed[is_test])


def _drawn_test(groups: NDArray[np.str_], seed: int) -> NDArray[np.bool_]:
    no_labels = [None] * len(groups)
    return draw_test(no_labels, groups.tolist(), fraction=_TEST_FRACTION, seed=seed)


def _pairwise_decision(known: KnownSlices, settings: SubjectConfig) -> list[Measure]:
    """Errors if every other slice of half of the subjects is known and the rest are strangers."""
    _, number = np.unique(known.subjects, return_inverse=True)
    is_stranger = number % 2 == 1
    is_reference = ~is_stranger & (np.arange(len(number)) % 2 == 0)
    mates = find_same_subject(
        known.thumbnails, known.thumbnails[is_reference], settings.link_similarity
    )
    is_met = mates.reference >= 0
    return [
        Measure("known subjects missed", _mean(~is_met[~is_stranger & ~is_reference])),
        Measure("strangers taken for known", _mean(is_met[is_stranger])),
    ]


def _mean(flags: NDArray[np.bool_] | list[bool]) -> float:
    """Share of True; NaN if empty."""
    return float(np.mean(flags)) if len(flags) else float("nan")


def _figure(sweeps: dict[str, list[dict[str, float]]]) -> Figure:
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    for name, sweep in sweeps.items():
        least = [point["link_similarity"] for point in sweep]
        for error, style in (("precision", "-"), ("recall", "--")):
            axes.plot(least, [point[error] for point in sweep], style, label=f"{name}, {error}")
    axes.set_xlabel("minimum similarity of linked slices")
    axes.set_ylabel("share of slice pairs")
    axes.set_ylim(0.0, 1.02)
    axes.legend()
    return figure
