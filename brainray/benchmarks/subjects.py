"""Estimated subject groups: errors of links and groups, and leakage through a split by them.

The ground truth comes from series of phantoms and, if the folder contains some, from NIfTI volumes
in three planes. Phantoms of different subjects differ more than people do, so their results check
the method and are an upper bound, not an estimate for real heads. Pictures in folders of classes do
not tell who they show, but which links join two classes, and therefore two subjects.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics.cluster import pair_confusion_matrix

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import Pictures, pictures_by_class
from brainray.config import SubjectConfig
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.file_order import successive_files
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
_NUM_DRAWS = 20  # of each kind of split, whose leakage differs much between draws
_RANDOM, _UNNUMBERED, _GROUPED = "random split", "grouped split without file order", "grouped split"
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
    details: dict[str, Any] = {"settings": settings.model_dump(), "num_volumes": len(volumes)}
    pictures = pictures_by_class(options.source)
    num_classes = len(set(pictures.classes))
    if num_classes > 1:
        log(f"pictures: {len(pictures.paths)} slices of {num_classes} classes")
        by_order = measure_by_order(pictures, settings, options.seed)
        details["pictures"] = {
            name: {measure.name: measure.value for measure in found}
            for name, found in by_order.items()
        }
        measures += [
            replace(measure, name=f"pictures/{measure.name}")
            for measure in (
                *measure_by_class(pictures.thumbnails, pictures.classes, settings),
                *by_order["all"],
            )
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
    details["sweeps"] = sweeps
    return BenchmarkResult(measures, details, _figure(sweeps))


def measure_errors(known: KnownSlices, settings: SubjectConfig, seed: int) -> list[Measure]:
    """Errors of links, groups and the pairwise decision, and leakage of a split by groups."""
    links = mutual_links(Described.of(known.thumbnails), settings)
    is_right = known.subjects[links.first] == known.subjects[links.second]
    linked = set(zip(links.first.tolist(), links.second.tolist(), strict=True))
    neighbours = np.flatnonzero(known.series[:-1] == known.series[1:]).tolist()
    pairs = _pair_errors(known, settings)
    groups = _estimate(known.thumbnails, settings)
    numbered = successive_files([str(number) for number in range(len(groups))])
    in_series = numbered[known.series[numbered[:, 0]] == known.series[numbered[:, 1]]]
    draws = _draws(groups, numbered, seed)
    leaks = {
        kind: _mean([_leak(known.series, is_test) for is_test in drawn])
        for kind, drawn in draws.items()
    }
    return [
        Measure("link precision", _mean(is_right)),
        Measure("neighbour recall", _mean([(row, row + 1) in linked for row in neighbours])),
        Measure("group precision", pairs["precision"], at_least=0.9),
        Measure("group recall", pairs["recall"]),
        Measure("slices with a neighbour in group", _with_neighbour(known, groups)),
        *(Measure(f"leak, {kind}", leak) for kind, leak in leaks.items()),
        *(
            Measure(
                f"leak, {kind} / random", leaks[kind] / max(leaks[_RANDOM], 1e-9), "x", at_most=0.5
            )
            for kind in (_UNNUMBERED, _GROUPED)
        ),
        *_leaks_to_next(draws, in_series, np.full(len(groups), True)),
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
    _, number = np.unique(classes[views], return_inverse=True)
    by_chance = 1.0 - float(np.square(np.bincount(number) / len(views)).sum())
    links = mutual_links(distinct, settings)
    is_false = number[links.first] != number[links.second]
    groups = merge_links(distinct, links, settings)
    in_a_group = pair_confusion_matrix(number, groups)[:, 1]
    return [
        Measure("views with a link", len(np.union1d(links.first, links.second)) / len(views)),
        Measure("false links, by class", _mean(is_false) / by_chance),
        Measure(
            "false pairs in a group, by class", float(in_a_group[0] / in_a_group.sum() / by_chance)
        ),
    ]


def measure_by_order(
    pictures: Pictures, settings: SubjectConfig, seed: int
) -> dict[str, list[Measure]]:
    """For all classes and each one: are successive files alike, and how many does a split part?

    Where successive files are in one group far more often than any two, they are mostly of one
    subject.
    """
    successive = successive_files(pictures.paths)
    groups = _estimate(pictures.thumbnails, settings)
    draws = _draws(groups, successive, seed, pictures.classes)
    first, second = successive.T
    measures = {}
    for name in (None, *sorted(set(pictures.classes))):
        is_class = np.full(len(groups), True) if name is None else pictures.classes == name
        sizes = np.unique(groups[is_class], return_counts=True)[1]
        num_pairs = is_class.sum() * (is_class.sum() - 1)
        measures[name or "all"] = [
            Measure(
                "successive files in one group",
                _mean((groups[first] == groups[second])[is_class[first]]),
            ),
            Measure(
                "any two files in one group",
                float((sizes * (sizes - 1)).sum() / num_pairs) if num_pairs else float("nan"),
            ),
            *_leaks_to_next(draws, successive, is_class),
        ]
    return measures


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


def _estimate(thumbnails: NDArray[np.uint8], settings: SubjectConfig) -> NDArray[np.str_]:
    identities = [f"{number:06d}" for number in range(len(thumbnails))]
    return np.array(estimate_subjects(thumbnails, identities, identities, settings))


def _pair_errors(known: KnownSlices, settings: SubjectConfig) -> dict[str, float]:
    """Precision: share of pairs in a group with the same subject; recall: share of pairs found.

    Recall is over pairs of the same series, since image similarity cannot link two planes.
    """
    groups = _estimate(known.thumbnails, settings)
    found = pair_confusion_matrix(known.subjects, groups)[:, 1]
    sought = pair_confusion_matrix(known.series, groups)[1]
    return {"precision": float(found[1] / found.sum()), "recall": float(sought[1] / sought.sum())}


def _with_neighbour(known: KnownSlices, groups: NDArray[np.str_]) -> float:
    """Share of slices with an adjacent slice of their series in their group."""
    joined = (known.series[:-1] == known.series[1:]) & (groups[:-1] == groups[1:])
    return _mean(np.append(joined, False) | np.append(False, joined))


def _draws(
    groups: NDArray[np.str_],
    successive: NDArray[np.int64],
    seed: int,
    classes: NDArray[np.str_] | None = None,
) -> dict[str, list[NDArray[np.bool_]]]:
    """Which slices (N,) are held out, in several draws of each kind of split."""
    labels = [None] * len(groups) if classes is None else classes.tolist()
    single = [str(number) for number in range(len(groups))]
    return {
        kind: [
            draw_test(labels, parts, successive=order, fraction=_TEST_FRACTION, seed=seed + number)
            for number in range(_NUM_DRAWS)
        ]
        for kind, parts, order in (
            (_RANDOM, single, successive[:0]),
            (_UNNUMBERED, groups.tolist(), successive[:0]),
            (_GROUPED, groups.tolist(), successive),
        )
    }


def _leak(series: NDArray[np.str_], is_test: NDArray[np.bool_]) -> float:
    """Share of test slices with a slice of the same series in training."""
    return _mean(np.isin(series[is_test], series[~is_test]))


def _leaks_to_next(
    draws: dict[str, list[NDArray[np.bool_]]],
    successive: NDArray[np.int64],
    is_counted: NDArray[np.bool_],
) -> list[Measure]:
    """Shares of the counted numbered test slices with the slice before or after in training."""
    is_numbered = np.zeros(len(is_counted), np.bool_)
    is_numbered[successive] = True

    def leak(is_test: NDArray[np.bool_]) -> float:
        is_exposed = np.zeros(len(is_test), np.bool_)
        is_exposed[successive[is_test[successive[:, 0]] != is_test[successive[:, 1]]]] = True
        return _mean(is_exposed[is_test & is_counted & is_numbered])

    return [
        Measure(f"leak to next slice, {kind}", _mean([leak(is_test) for is_test in drawn]))
        for kind, drawn in draws.items()
    ]


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


def _mean(values: NDArray[np.bool_] | list[bool] | list[float]) -> float:
    """Mean, of flags the share of True; NaN if empty."""
    return float(np.mean(values)) if len(values) else float("nan")


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
