"""Which slices to label next: a ranking of a run's unlabelled slices."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.clustering.next_labels import choose_to_label, margin_uncertainty
from brainray.config import Config
from brainray.errors import DataError
from brainray.log import log
from brainray.orchestration.blocks import with_progress
from brainray.orchestration.prediction.inference import find_predictor, predicted_slices
from brainray.orchestration.preprocessing.labels_table import read_rows, text_of
from brainray.orchestration.run import open_run
from brainray.orchestration.store import open_store
from brainray.schema import NEXT_LABELS, UNLABELLED_ROLE, Metrics, matrix_of
from brainray.storage import Folder

_GROUPS = ("duplicate_group_id", "subject_id")
_DECIMALS = 4  # of uncertainty and confidence, in a table for people
_NEEDED = [
    "sample_id",
    "path",
    "frame",
    "head",
    "confidence",
    "probabilities",
    "cluster",
    "cluster_class",
]
"""Columns of predictions."""


@dataclass(frozen=True)
class NextLabels:
    """The list of slices to label, as written."""

    folder: Folder  # of the run
    table: pa.Table  # NEXT_LABELS
    metrics: Metrics


def choose_next_labels(config: Config) -> NextLabels:
    """Rank the run's unlabelled training slices into ``labels/next.csv`` and ``next.parquet`` of
    its folder.

    The labels of these slices are not read, even if the store has them.

    Raises:
        ConfigError: no run given.
        DataError: no such run or store, a modified store, nothing unlabelled, or labels filled in
            in an earlier list.
        CheckpointError: the run has not finished an epoch, or has no such epoch.
    """
    run = open_run(Folder(config.storage), config.given("run"))
    _check_nothing_is_filled_in(run.folder)
    predictor = find_predictor(config, for_new_files=False)
    store = open_store(Folder(config.storage), run.record.dataset, run.record.data_hash)
    seen = run.folder.read_table(layout.SEEN, ["sample_id", "role", *_GROUPS])
    is_pool = pc.equal(seen["role"], UNLABELLED_ROLE)
    pool, others = seen.filter(is_pool), seen.filter(pc.invert(is_pool))
    if pool.num_rows == 0:
        raise DataError(
            f"{run.folder}: the run has no unlabelled slices, so there is nothing to label"
        )
    log(f"predicting {pool.num_rows} unlabelled slices with {predictor.folder}")
    blocks = predicted_slices(store, pool["sample_id"].to_pylist(), config, predictor)
    batches = [
        # take() copies, so that unused columns such as thumbnails are freed.
        batch.select(_NEEDED).take(pa.array(range(batch.num_rows), pa.int64()))
        for batch in with_progress(blocks, pool.num_rows, "predicted", counts_slices=True)
    ]
    rows = pa.concat_tables(batches).sort_by("sample_id")
    pool = pool.sort_by("sample_id")
    assert rows["sample_id"].equals(pool["sample_id"]), "every slice has a prediction"
    for name in _GROUPS:
        rows = rows.append_column(name, pool[name])
    uncertainty = margin_uncertainty(matrix_of(rows["probabilities"]))
    chosen = choose_to_label(
        uncertainty,
        np.asarray(rows["cluster"].to_numpy()),
        [rows[name].to_pylist() for name in _GROUPS],
        [set(others[name].drop_null().to_pylist()) for name in _GROUPS],
        config.label.num_slices,
    )
    picked = rows.take(chosen)
    columns = {name: picked[name] for name in NEXT_LABELS.names if name in picked.column_names}
    columns["rank"] = pa.array(range(1, len(chosen) + 1), pa.int32())
    columns["class"] = picked["head"]
    columns["label"] = pa.nulls(len(chosen), pa.string())
    columns["uncertainty"] = pa.array(uncertainty[chosen].round(_DECIMALS))
    columns["confidence"] = pc.round(picked["confidence"], _DECIMALS)
    ordered = [columns[name] for name in NEXT_LABELS.names]
    table = pa.table(ordered, names=NEXT_LABELS.names).cast(NEXT_LABELS)
    _check_nothing_is_filled_in(run.folder)  # meanwhile
    run.folder.write_table(layout.NEXT_LABELS_PARQUET, table)
    run.folder.write_csv(layout.NEXT_LABELS, table)
    counts = Counter(table["cluster"].to_pylist())
    metrics = {"num_unlabelled": float(pool.num_rows), "num_chosen": float(table.num_rows)}
    metrics |= {f"num_chosen/cluster {k}": float(count) for k, count in sorted(counts.items())}
    return NextLabels(run.folder, table, metrics)


def _check_nothing_is_filled_in(run: Folder) -> None:
    """Raises DataError if the list of an earlier call has labels, which would be lost."""
    for name in filter(run.exists, (layout.NEXT_LABELS, layout.NEXT_LABELS_PARQUET)):
        filled = [row for row in read_rows(run / name) if text_of(row["label"]) is not None]
        if filled:
            raise DataError(
                f"{run}/{name} has {len(filled)} labels filled in: add these rows to your labels "
                "table, then move or delete the file"
            )
