"""Accuracy of a run and its control on test slices altered as if from other scanners."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import SALT, spread
from brainray.engine.slice_model import SliceModel, use_all_threads
from brainray.errors import ConfigError, DataError
from brainray.log import log
from brainray.mri.decode import decode_file
from brainray.mri.leakage import Fingerprints, exposure
from brainray.mri.slices import RejectedImage
from brainray.orchestration.prediction.inference import Predictor, find_predictor
from brainray.orchestration.preprocessing.slice_rows import (
    DECODED,
    decode_options,
    decode_to_predict,
    read_file,
)
from brainray.orchestration.preprocessing.source import SourceFile, list_source
from brainray.orchestration.run import open_run
from brainray.report.style import BLUE, ORANGE, new_figure, tidy
from brainray.report.table import markdown_table
from brainray.schema import CLASS_COLUMNS, TEST
from brainray.storage import Folder

Image = NDArray[np.uint8]  # (H, W)
Accuracies = dict[str, dict[str, float]]  # by alteration, then by subset and predictor

NUM_QUICK = 100  # slices
NOISE_STD = 15.0  # grey levels
BLUR_STD = 1 / 170  # of the longer side

_RUN, _CONTROL = "run", "control"
_MEAN = "mean of the altered ones"


def run(options: CaseOptions) -> BenchmarkResult:
    """Accuracy of a run, and of its control, on test slices altered as if from other scanners.

    Needs --set run=NAME, and evaluation.control=NAME for a comparison. Every test slice of --source
    is altered in one way at a time and passes through the code of prediction. ``clean`` is relative
    to the slices that the run saw, and refers to the slice before it is altered.

    Raises:
        ConfigError: no run or no slices are given.
        DataError: the run does not exist, or no slice has a class to score.
        CheckpointError: the run has no checkpoint.
    """
    config = options.config.model_copy(update={"storage": str(options.storage)})
    if options.source is None or config.run is None:
        raise ConfigError("robustness needs --source DIR and --set run=NAME")
    names = {_RUN: config.run, _CONTROL: config.evaluation.control}
    predictors = {
        role: find_predictor(config.model_copy(update={"run": name}))
        for role, name in names.items()
        if name is not None
    }
    tested = open_run(Folder(str(options.storage)), config.run).test_paths()
    slices = _test_slices(options, predictors[_RUN], tested)
    log(f"{len(slices)} slices, {len(ALTERATIONS)} alterations")
    use_all_threads()
    models = {role: SliceModel(predictor.checkpoint) for role, predictor in predictors.items()}
    clean = _clean(slices, predictors[_RUN], tested)
    found: dict[str, Accuracies] = {role: {} for role in models}
    for alteration, alter in ALTERATIONS.items():
        rng = np.random.default_rng(options.seed)
        altered = [(file, _png(alter(image, rng))) for file, image in slices]
        for role, model in models.items():
            predictions = model.predict(_decoded(altered, predictors[role]))
            found[role][alteration] = _accuracies(predictions, len(slices), clean)
            log(f"{names[role]}, {alteration}: {found[role][alteration]['all head']:.3f}")
    for table in found.values():
        altered_only = list(table.values())[1:]
        table[_MEAN] = {
            key: float(np.mean([accuracies[key] for accuracies in altered_only]))
            for key in altered_only[0]
        }
    measures = [
        Measure(f"{alteration}: {role}, {key}", value)
        for role, table in found.items()
        for alteration, accuracies in table.items()
        for key, value in accuracies.items()
    ]
    details = {"names": names, "num_slices": len(slices), "num_clean": len(clean)}
    return BenchmarkResult(measures, details, _figure(found), report=_table(found))


def _test_slices(
    options: CaseOptions, predictor: Predictor, tested: Container[str]
) -> list[tuple[SourceFile, Image]]:
    """Test slices, one per file: the run's own (paths ``tested``) if they are in the source, else
    the test split of the source, else all of it.
    """
    source = Folder(str(options.source))
    table = None if options.config.labels is None else Folder(options.config.labels)
    files = list_source(source, table, options.config.classes.map).files
    if any(file.path in tested for file in files):
        files = [file for file in files if file.path in tested]
    elif any(file.split == TEST for file in files):
        files = [file for file in files if file.split == TEST]
    classes = set(predictor.checkpoint.classes)
    files = [file for file in files if file.labels & classes]
    if options.quick:
        files = spread(files, NUM_QUICK)
    slices = []
    for file in files:
        try:
            content = read_file(source, file.file)
            decoded = decode_file(content, decode_options(predictor.preprocess, SALT))
        except RejectedImage:
            continue
        labelled = [part for part in decoded if file.label_of(part.frame) in classes]
        for part in labelled[:1]:
            label = file.label_of(part.frame)
            slices.append((replace(file, label=label, label_of_frame={}), part.image))
    if not slices:
        raise DataError(
            f"{options.source} contains no slice of the run's classes: give a folder that does"
        )
    return slices


def _clean(
    slices: Sequence[tuple[SourceFile, Image]], predictor: Predictor, tested: Container[str]
) -> set[str]:
    """Paths of clean slices; empty if the run has no fingerprints of the slices that it saw.

    Slices other than the run's own (paths ``tested``) are from another collection.
    """
    seen = predictor.seen()
    if seen is None:
        return set()
    rows = _decoded([(file, _png(image)) for file, image in slices], predictor)
    elsewhere = [path not in tested for path in rows["path"].to_pylist()]
    queries = rows.append_column("elsewhere", pa.array(elsewhere, pa.bool_()))
    exposed = exposure(
        Fingerprints.from_table(queries), Fingerprints.from_table(seen), predictor.preprocess
    )
    return set(rows.filter(pa.array(exposed.clean))["path"].to_pylist())


def _png(image: Image) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def _decoded(files: Sequence[tuple[SourceFile, bytes]], predictor: Predictor) -> pa.Table:
    """``DECODED`` rows of the files that are usable."""
    rows = []
    for file, content in files:
        rows += decode_to_predict(file, partial(bytes, content), predictor.preprocess, SALT)
    table = pa.Table.from_pylist(rows, schema=DECODED)
    return table.filter(pc.is_null(table["reason"]))


def _accuracies(predictions: pa.Table, num_slices: int, clean: set[str]) -> dict[str, float]:
    """Accuracies by subset and predictor; a slice that is no longer usable counts as wrong."""
    subsets = {"all": (predictions, num_slices)}
    if clean:
        is_clean = pc.is_in(predictions["path"], pa.array(sorted(clean)))
        subsets["clean"] = (predictions.filter(is_clean), len(clean))
    return {
        f"{subset} {name}": (pc.sum(pc.equal(rows[column], rows["label"])).as_py() or 0) / count
        for subset, (rows, count) in subsets.items()
        for name, column in CLASS_COLUMNS.items()
    }


def _table(found: Mapping[str, Accuracies]) -> str:
    keys = list(next(iter(found[_RUN].values())))
    header = ["test slices", *(f"{role}, {key}" for role in found for key in keys)]
    rows = [
        [alteration, *(f"{found[role][alteration][key]:.3f}" for role in found for key in keys)]
        for alteration in (*ALTERATIONS, _MEAN)
    ]
    return markdown_table(header, rows, num_text_columns=1)


def _figure(found: Mapping[str, Accuracies]) -> Figure:
    figure = new_figure(7.0, 4.5)
    axes = figure.subplots()
    places = np.arange(len(ALTERATIONS))
    styles = {_RUN: (BLUE, -0.15), _CONTROL: (ORANGE, 0.15)}
    for role, table in found.items():
        colour, shift = styles[role]
        for key, marker in (("all head", "o"), ("all cluster", "s")):
            values = [table[alteration][key] for alteration in ALTERATIONS]
            label = f"{role}, {key.removeprefix('all ')}"
            axes.plot(values, places + shift, marker, color=colour, label=label, alpha=0.8)
    axes.set_yticks(places, list(ALTERATIONS))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, all test slices")
    axes.legend(frameon=False)
    tidy(axes, grid="x")
    return figure


def _padded(image: Image, rng: np.random.Generator, *, share: float) -> Image:
    height, width = image.shape
    rows, columns = int(share * height), int(share * width)
    around = int(np.median(np.concatenate([image[0], image[-1]])))
    return np.pad(image, ((rows, rows), (columns, columns)), constant_values=around)


def _framed(image: Image, rng: np.random.Generator, *, share: float) -> Image:
    return np.pad(image, int(share * max(image.shape)), constant_values=255)


def _cropped(image: Image, rng: np.random.Generator, *, share: float) -> Image:
    height, width = image.shape
    rows, columns = int(share * height), int(share * width)
    return image[rows : height - rows, columns : width - columns]


def _turned(image: Image, rng: np.random.Generator, *, degrees: float) -> Image:
    height, width = image.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    return np.asarray(cv2.warpAffine(image, turn, (width, height)), np.uint8)


def _toned(image: Image, rng: np.random.Generator, *, gamma: float, brightness: float) -> Image:
    return (255 * brightness * (image / 255) ** gamma).astype(np.uint8)


def _shaded(image: Image, rng: np.random.Generator) -> Image:
    return (image * np.linspace(0.5, 1.0, image.shape[1])).astype(np.uint8)


def _blurred(image: Image, rng: np.random.Generator) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), BLUR_STD * max(image.shape)), np.uint8)


def _noisy(image: Image, rng: np.random.Generator) -> Image:
    return np.clip(image + rng.normal(0.0, NOISE_STD, image.shape), 0, 255).astype(np.uint8)


def _equalised(image: Image, rng: np.random.Generator) -> Image:
    """CLAHE (Zuiderveld 1994), used by viewers and teaching collections to brighten dark areas."""
    return np.asarray(cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(image), np.uint8)


ALTERATIONS: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "as they are": lambda image, rng: image,
    "field of view 1.3 times as wide": partial(_padded, share=0.15),
    "field of view 1.6 times as wide": partial(_padded, share=0.3),
    "in a white border of 6 %": partial(_framed, share=0.06),
    "6 % cropped at each side": partial(_cropped, share=0.06),
    "turned by 12 degrees": partial(_turned, degrees=12.0),
    "gamma 0.6": partial(_toned, gamma=0.6, brightness=1.0),
    "gamma 1.6": partial(_toned, gamma=1.6, brightness=1.0),
    "contrast equalised (CLAHE)": _equalised,
    "half as bright": partial(_toned, gamma=1.0, brightness=0.5),
    "shaded to half at one side": _shaded,
    "blurred": _blurred,
    "noisy": _noisy,
}
"""Alterations of a slice before preprocessing."""
