"""The figures, the page and the summary of a run; what evaluations need for their page, too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from brainray import layout
from brainray.config import Config
from brainray.engine.compare import without_comparison
from brainray.engine.explain import class_activation_maps, rows_to_explain
from brainray.engine.state import Checkpoint, load_checkpoint
from brainray.errors import CheckpointError, DataError
from brainray.log import log
from brainray.orchestration.compared_runs import (
    Control,
    check_compared_runs,
    compare_with_control,
    predictions_of_siblings,
    without_lost_runs,
)
from brainray.orchestration.job import JobResult
from brainray.orchestration.run import Run, open_run, unfinished
from brainray.orchestration.store import ImageStore, open_store, read_images
from brainray.report.comparison_table import comparison_table, verdict
from brainray.report.maps import SliceMap, run_maps
from brainray.report.page import Explained, write_page
from brainray.report.run_figures import draw_run_figures
from brainray.schema import TEST, Metrics
from brainray.storage import Folder

LoadImages = Callable[[pa.Table], NDArray[np.uint8]]
"""Loads the preprocessed slices (n, 1, S, S) for rows of predictions."""


def report(config: Config) -> JobResult:
    """Rewrite the results of a complete run, comparing it with a control or runs with other seeds.

    Raises:
        ConfigError: no run named, a control on other labels, or a sibling with the same seed.
        DataError: no such run, or a run to compare with that does not fit.
        CheckpointError: the run, or one to compare with, is still training.
    """
    run = open_run(Folder(config.storage), config.given("run"))
    if not run.is_complete:
        raise CheckpointError(unfinished(Folder(config.storage), run))
    saved = run.saved_config()
    requested = config.evaluation.model_dump(exclude_unset=True)
    evaluation = saved.evaluation.model_copy(update=requested)
    merged = saved.model_copy(update={"storage": config.storage, "evaluation": evaluation})
    try:
        store = _store_with_test_slices(merged, run)
    except DataError as error:
        log(f"no activation maps: {error}")
        store = None
    for name in (config.evaluation.control, *config.evaluation.siblings):
        if name is not None and not (other := open_run(Folder(config.storage), name)).is_complete:
            raise CheckpointError(unfinished(Folder(config.storage), other))
    # Runs that are named now must fit; those named for the training are left out if they do not.
    named_now = merged.model_copy(update={"evaluation": config.evaluation})
    check_compared_runs(named_now, run.record.data_hash)
    summary = without_comparison(run.folder.read_json(layout.SUMMARY))
    if not run.folder.exists(layout.predictions_file(int(summary["chosen_epoch"]))):
        raise DataError(f"the run {run.folder} has no test slices: there is nothing to report")
    metrics = write_results(merged, run, summary, store)
    return JobResult(str(run.folder), metrics=metrics)


def write_results(config: Config, run: Run, metrics: Metrics, store: ImageStore | None) -> Metrics:
    """Write a run's figures, its page and the summary, which comes last and marks it as complete.

    Returns ``metrics`` with the comparison with the control, if there is one, and logs it. Runs to
    compare with that are gone are left out.
    """
    evaluation = without_lost_runs(config, run.record.data_hash)
    config = config.model_copy(update={"evaluation": evaluation})
    chosen = int(metrics["chosen_epoch"])
    control = compare_with_control(config, run, chosen)
    metrics = metrics | (control.comparison if control else {})
    maps = run_maps(run.folder, evaluation, chosen)
    draw_run_figures(run.folder, run.record.classes, chosen, maps)
    write_run_page(config, run, control, metrics, maps, store)
    run.folder.write_json(layout.SUMMARY, metrics)
    compared = comparison_table(metrics, evaluation.control)
    if compared is not None:
        log(f"{compared.title}:\n{compared.markdown()}\n{verdict(metrics, evaluation.control)}")
    return metrics


def _store_with_test_slices(config: Config, run: Run) -> ImageStore:
    """The run's image store, also if it was updated since, which leaves earlier slices unchanged.

    Raises:
        DataError: there is none, or it no longer has the run's test slices as they were.
    """
    store = open_store(Folder(config.storage), config.given("dataset"))
    if store.manifest.data_hash == run.record.data_hash:
        return store
    index = store.index()
    there = index.filter(pc.equal(index["split"], TEST))["sample_id"]
    tested = run.folder.read_table(layout.TEST_SLICES, columns=["sample_id"])["sample_id"]
    settings = store.manifest.preprocess, store.manifest.versions
    if (
        settings != (run.record.preprocess, run.record.versions)
        or not pc.all(pc.is_in(tested, value_set=there)).as_py()
    ):
        raise DataError(f"the image store {store.folder} no longer has the run's test slices")
    return store


def write_run_page(
    config: Config,
    run: Run,
    control: Control | None,
    metrics: Metrics,
    maps: Sequence[SliceMap],
    store: ImageStore | None,
) -> None:
    """Write a run's ``report.html``, if it has predictions to show.

    Without its store there are no activation maps.
    """
    explained = []
    chosen = layout.predictions_file(int(metrics["chosen_epoch"]))
    if store is not None and run.folder.exists(chosen):
        side = config.train.image_size

        def load(rows: pa.Table) -> NDArray[np.uint8]:
            return read_images(store.folder, rows["sample_id"].to_pylist(), TEST, side)

        checkpoint = load_checkpoint(run.folder / layout.BEST)
        explained = explain(run.folder.read_table(chosen), checkpoint, load)
    about = _about(config, run)
    if control is not None:
        others = control.other_settings
        other = f", also trained with other settings: {others}" if others else ""
        about["control"] = f"{config.evaluation.control}{other}"
    write_page(
        run.folder,
        run.record.classes,
        config.evaluation,
        metrics,
        about,
        maps,
        control=None if control is None else control.run.folder.read_json(layout.SUMMARY),
        explained=explained,
        siblings=predictions_of_siblings(config, run),
    )


def _about(config: Config, run: Run) -> dict[str, str]:
    """How a run was made, as far as its folder tells."""
    record, encoder, made_by = run.record, config.encoder, run.last_submission()
    warm_up = "none"
    if encoder.pretext != "none":
        num_epochs = config.self_supervision.num_epochs
        warm_up = f"{encoder.pretext}, {num_epochs} epochs at {encoder.pretext_image_size} px"
    about = {
        "store": f"{record.dataset} (data hash {record.data_hash})",
        "slices": ", ".join(f"{n:,} {role}" for role, n in record.num_slices.items()),
        "warm-up without labels": warm_up,
    }
    if made_by is None:
        return about
    kind = "GPU" if made_by["device"] == "cuda" else "CPU"
    workers = f"{made_by['num_workers']} on {kind}, {made_by['cpus_per_worker']} CPU(s) each"
    return software_rows(made_by) | about | {"workers": workers}


def explain(predictions: pa.Table, checkpoint: Checkpoint, load: LoadImages) -> list[Explained]:
    """Activation maps for samples of each class and of the errors."""
    chosen = predictions.take(rows_to_explain(predictions))
    if chosen.num_rows == 0:
        return []
    images = load(chosen)
    names = chosen["head"].to_pylist()
    classes = torch.tensor([checkpoint.classes.index(name) for name in names])
    maps = class_activation_maps(checkpoint, torch.from_numpy(images), classes).numpy()
    return [
        Explained(
            path=row["path"] + (f" {row['frame']}" if row["frame"] else ""),
            label=row["label"],
            predicted=row["head"],
            confidence=row["confidence"],
            image=image[0],
            activation=activation,
        )
        for row, image, activation in zip(
            chosen.select(["path", "frame", "label", "head", "confidence"]).to_pylist(),
            images,
            maps,
            strict=True,
        )
    ]


def software_rows(made_by: Mapping[str, Any]) -> dict[str, str]:
    """What a page tells of an `about_software`."""
    code = f"brainray {made_by['brainray']}, {made_by['code_hash']} {made_by['git_revision']}"
    return {
        "command": made_by["command"],
        "code": code.strip(),
        "python": f"{made_by['python']} on {made_by['platform']}",
        "torch": made_by["packages"]["torch"],
        "ray": made_by["packages"]["ray"],
    }
