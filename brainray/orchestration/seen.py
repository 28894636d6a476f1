"""What a run, and whatever its encoder started from, have seen: test slices are held against it."""

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
    """Of all that the run in a folder has seen; None for a checkpoint without its run."""
    rows = seen_rows(folder)
    return None if rows is None else Fingerprints.of(rows)


def seen_by_weights(weights: str, storage: Folder) -> pa.Table | None:
    """``SEEN`` rows of what made an encoder's starting weights; None where nothing tells.

    Args:
        weights: as ``encoder.weights`` or a study's feature names them. A run's checkpoint and a
            self-supervised encoder lie beside what they have seen.
        storage: where ``run:NAME`` is looked for.
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
    """``SEEN`` rows of a store's training slices, as what learns without labels sees them."""
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
    """Raises ConfigError where the starting weights have learned labels of validation slices.

    Or of their copies, upright or turned; ``preprocess`` tells what a copy is.
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
            f"encoder.weights={config.encoder.weights} has learned the labels of {num_learned} of "
            f"this run's {validation.num_rows} validation slices, or of their copies, which would "
            "choose its epoch: give both the same split.seed"
        )


def seen_rows(folder: Folder) -> pa.Table | None:
    tables = [
        folder.read_table(name) for name in (layout.SEEN, layout.SEEN_BEFORE) if folder.exists(name)
    ]
    return pa.concat_tables(tables) if tables else None
