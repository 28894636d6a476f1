"""Slices seen by a run and by the training of its starting weights, to compare test slices with."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.config import WEIGHTS_OF_NO_SLICE, Config, PreprocessConfig
from brainray.errors import ConfigError
from brainray.mri.duplicates import find_twins, thumbnail_matrix
from brainray.mri.leakage import Fingerprints
from brainray.orchestration.store import ImageStore
from brainray.schema import LABELLED, SEEN, TRAIN, UNLABELLED_ROLE, VALIDATION
from brainray.storage import Folder

_RUN_PREFIX = "run:"


def fingerprints_of_seen(folder: Folder) -> Fingerprints | None:
    """Fingerprints of all slices that a folder's run has seen; None for a checkpoint alone."""
    rows = seen_rows(folder)
    return None if rows is None else Fingerprints.of(rows)


def seen_by_weights(weights: str, storage: Folder) -> pa.Table | None:
    """``SEEN`` rows of the training of an encoder's starting weights; None if there is no record.

    Args:
        weights: as in ``encoder.weights`` or a study's feature. A run's checkpoint and a
            self-supervised encoder are stored next to the record of what they have seen.
        storage: where ``run:NAME`` is searched for.
    """
    if weights in WEIGHTS_OF_NO_SLICE:
        return None
    if weights.startswith(_RUN_PREFIX):
        return seen_rows(storage / layout.RUNS / weights.removeprefix(_RUN_PREFIX))
    for place in list(Path(weights).absolute().parents)[:2]:
        rows = seen_rows(Folder(place))
        if rows is not None:
            return rows
    return None


def training_slices(store: ImageStore) -> pa.Table:
    """``SEEN`` rows of a store's training slices, as seen by training without labels."""
    index = store.index(thumbnails=True)
    train = index.filter(pc.equal(index["split"], TRAIN))
    told = {
        "role": pa.array([UNLABELLED_ROLE] * train.num_rows, pa.string()),
        "label": pa.nulls(train.num_rows, pa.string()),
    }
    columns = [told[name] if name in told else train[name] for name in SEEN.names]
    return pa.table(columns, schema=SEEN)


def check_validation_is_new(
    config: Config, seen: pa.Table, before: pa.Table | None, preprocess: PreprocessConfig
) -> None:
    """Raises ConfigError if the starting weights were trained on labels of validation slices.

    Copies of validation slices in any orientation count too; ``preprocess`` defines copies.
    """
    if before is None:
        return
    own = seen.filter(pc.equal(seen["role"], LABELLED))["sample_id"].combine_chunks()
    learned = before.filter(pc.equal(before["role"], LABELLED))
    learned = learned.filter(pc.invert(pc.is_in(learned["sample_id"], own)))
    validation = seen.filter(pc.equal(seen["role"], VALIDATION))
    ids, learned_ids = validation["sample_id"], learned["sample_id"].combine_chunks()
    is_same = np.asarray(pc.is_in(ids, learned_ids).to_numpy(), dtype=np.bool_)
    looks, learned_looks = (
        thumbnail_matrix(table["thumbnail"].to_pylist()) for table in (validation, learned)
    )
    twins = find_twins(looks, learned_looks, preprocess.near_duplicate)
    num_learned = int((is_same | (twins.reference >= 0)).sum())
    if num_learned:
        raise ConfigError(
            f"encoder.weights={config.encoder.weights} was trained on the labels of {num_learned} "
            f"of this run's {validation.num_rows} validation slices, or of their copies, which "
            "would bias the choice of the epoch: use the same split.seed for both"
        )


def seen_rows(folder: Folder) -> pa.Table | None:
    tables = [
        folder.read_table(name) for name in (layout.SEEN, layout.SEEN_BEFORE) if folder.exists(name)
    ]
    return pa.concat_tables(tables) if tables else None
