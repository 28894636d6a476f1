"""Export of a run: safetensors, ONNX and an MLflow model, with a model card."""

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

import brainray
from brainray import layout
from brainray.config import Config
from brainray.engine.export import (
    ONNX_OPSET,
    TOLERANCE,
    largest_difference,
    onnx_bytes,
    safetensors_bytes,
)
from brainray.errors import CheckpointError, ConfigError, TrackingError
from brainray.log import log
from brainray.mri.phantom import make_slice
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.orchestration.code_version import code_hash
from brainray.orchestration.job import JobResult
from brainray.orchestration.lock import held
from brainray.orchestration.prediction import serving
from brainray.orchestration.prediction.inference import Predictor, find_predictor
from brainray.orchestration.publish import begin_tracking, config_to_track
from brainray.orchestration.run import Run, open_run, unfinished
from brainray.report.model_card import CardFacts, model_card
from brainray.schema import PREDICTED_SLICES, THUMBNAIL_SIDE, Metrics
from brainray.storage import Folder
from brainray.tracking import ServedFiles, save_served

_EXAMPLE_SIDE = 64  # pixels
_NUM_TRIED = 32  # slices on which the ONNX and PyTorch models are compared
_READ_AT_ONCE = 2**20  # bytes of fingerprints, which are gigabytes for a large store
_ONNX_PACKAGES = {"onnx", "onnxscript", "onnxruntime"}


def export(config: Config) -> JobResult:
    """Write ``storage/exports/NAME``: safetensors, ONNX, an MLflow model and a card.

    With ``registry.name`` the MLflow model is also logged to the run's MLflow run and registered.

    Raises:
        ConfigError: neither or both of run and checkpoint, or no name.
        DataError: no such run.
        CheckpointError: the run is still training or has no such epoch, or its ONNX model differs.
        TrackingError: the model cannot be registered.
    """
    run = None if config.run is None else open_run(Folder(config.storage), config.run)
    if run is not None and not run.is_complete:
        raise CheckpointError(
            f"{unfinished(Folder(config.storage), run)}, or export one of its checkpoints with "
            f"--set name=NAME checkpoint={run.folder}/{layout.BEST}"
        )
    if run is None and config.registry.name is not None:
        raise ConfigError(
            "registry.name: only the model of a run can be registered; give --set run=NAME, not "
            "checkpoint=PATH"
        )
    predictor = find_predictor(config)
    name = config.name or config.run
    if name is None:
        raise ConfigError("exporting a checkpoint needs a name: give --set name=NAME")
    storage = Folder(config.storage)
    target = storage / layout.EXPORTS / name
    with (
        held(storage, layout.EXPORTS, name),
        served_files(predictor) as served,
        tempfile.TemporaryDirectory() as temporary,
    ):
        local = Path(temporary)
        for made in served.data.iterdir():
            (local / made.name).write_bytes(made.read_bytes())
        metrics = _write_onnx(predictor, local)
        save_served(local / layout.SERVED, served)
        card = model_card(_facts(predictor, name, metrics), _reported_metrics(run, predictor))
        (local / layout.CARD).write_text(card, encoding="utf-8")
        _put(local, target)
        run_id = None
        if run is not None and config.registry.name is not None:
            run_id = _register(config, run, served)
    log(f"serve the model: {_how_to_serve(target)}")
    return JobResult(str(target), run_id, metrics)


def _how_to_serve(target: Folder) -> str:
    model = shlex.quote(str(target / layout.SERVED))
    return f"mlflow models serve -m {model} --env-manager local --port 5001"


@contextmanager
def served_files(predictor: Predictor) -> Iterator[ServedFiles]:
    """The files of a served model, in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")  # MLflow keeps the folder name
        folder.mkdir()
        content = safetensors_bytes(predictor.checkpoint, predictor.preprocess)
        (folder / layout.SAFETENSORS).write_bytes(content)
        fitted = predictor.fitted()
        if fitted is not None:
            pq.write_table(fitted, folder / layout.FITTED, compression="zstd")
        yield ServedFiles(
            folder,
            loader=serving.__name__,
            code=Path(brainray.__file__).parent,
            requirements=serving.REQUIREMENTS,
            inputs={"path": "string", "image": "binary"},
            outputs=PREDICTED_SLICES,
            example={"image": _drawn_slice(max(_EXAMPLE_SIDE, predictor.preprocess.min_side))},
            metadata={"classes": predictor.checkpoint.classes},
        )


def _drawn_slice(side: int) -> bytes:
    """A PNG of no patient."""
    image = make_slice("notumor", np.random.default_rng(0), size=side).image
    return cv2.imencode(".png", image)[1].tobytes()


def _write_onnx(predictor: Predictor, folder: Path) -> Metrics:
    """Write the ONNX file and compare it with the checkpoint; skipped without the onnx extra."""
    images = _slices_to_try(predictor)
    try:
        content = onnx_bytes(predictor.checkpoint)
        difference = largest_difference(predictor.checkpoint, content, images)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _ONNX_PACKAGES:
            raise
        log(f"no ONNX file: {error.name} is missing; pip install -e '.[onnx]'")
        return {}
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the ONNX model of {predictor.folder} differs from the PyTorch model by "
            f"{difference:.2g}, more than {TOLERANCE:g}: report this with the versions of torch, "
            "onnx and onnxruntime"
        )
    (folder / layout.ONNX).write_bytes(content)
    return {"onnx/opset": float(ONNX_OPSET), "onnx/largest_difference": difference}


def _slices_to_try(predictor: Predictor) -> NDArray[np.float32]:
    """(n, 1, S, S) grey values: thumbnails of slices that the run saw, or noise without a run."""
    side = predictor.checkpoint.image_size
    if predictor.run is None:
        noise = np.random.default_rng(0).uniform(0, 255, (_NUM_TRIED, 1, side, side))
        return noise.astype(np.float32)
    with predictor.run.folder.open_table(layout.SEEN, buffer_size=_READ_AT_ONCE) as seen:
        first = next(seen.iter_batches(_NUM_TRIED, columns=["thumbnail"]))
    rows = thumbnail_matrix(first["thumbnail"].to_pylist())
    pictures = rows.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    enlarged = [cv2.resize(picture, (side, side)) for picture in pictures]
    return np.stack(enlarged)[:, None].astype(np.float32)


def _facts(predictor: Predictor, name: str, metrics: Metrics) -> CardFacts:
    checkpoint, preprocess = predictor.checkpoint, predictor.preprocess
    config = checkpoint.config
    return CardFacts(
        name=name,
        classes=checkpoint.classes,
        encoder=config.encoder.name,
        num_clusters=config.clustering.num_clusters,
        image_size=checkpoint.image_size,
        epoch=checkpoint.epoch,
        preprocessing=(
            f"grayscale, white frame `{preprocess.frame}`, skull strip "
            f"`{preprocess.skull_strip}`, crop `{preprocess.crop}`, "
            f"intensities `{preprocess.intensity}`, `{preprocess.resize}` to "
            f"{preprocess.image_size} pixels, then area-averaged to {checkpoint.image_size}"
        ),
        has_fitted=predictor.fitted() is not None,
        num_slices={} if predictor.run is None else predictor.run.record.num_slices,
        objective=config.objective.name,
        code=f"{brainray.__version__} ({code_hash()})",
        opset=ONNX_OPSET if metrics else None,
        difference=metrics.get("onnx/largest_difference"),
    )


def _reported_metrics(run: Run | None, predictor: Predictor) -> Metrics:
    """The run's reported metrics, if the exported epoch is the chosen one, else none."""
    if run is None:
        return {}
    metrics: Metrics = run.folder.read_json(layout.SUMMARY)
    return metrics if metrics["chosen_epoch"] == predictor.checkpoint.epoch else {}


def _put(local: Path, target: Folder) -> None:
    """Replace an earlier export with all files at once; the card, which completes it, is last."""
    with target.rebuilt(layout.CARD) as building:
        for path in sorted(local.rglob("*"), key=lambda path: path.name == layout.CARD):
            if path.is_file():
                building.write_bytes(path.relative_to(local).as_posix(), path.read_bytes())


def _register(config: Config, run: Run, served: ServedFiles) -> str | None:
    """Log the model to the run's MLflow run and register it."""
    tracker = begin_tracking(config_to_track(config, run), run)
    tracker.log_model(served, config.registry.name)
    tracker.finish()  # otherwise MLflow marks the run as FAILED after an error
    if tracker.problem is not None:
        raise TrackingError(f"not registered: {tracker.problem}")
    log(f"registered as {config.registry.name}")
    return tracker.mlflow_run_id
