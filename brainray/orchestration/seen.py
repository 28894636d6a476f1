"""Slices seen by a run and by the training of its starting weights, to compare test slices with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.config import RUN_PREFIX, WEIGHTS_OF_NO_SLICE, Config, PreprocessConfig
from brainray.errors import ConfigError
from brainray.mri.duplicates import find_twins
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.orchestration.store import ImageStore
from brainray.schema import LABELLED, SEEN, TRAIN, UNLABELLED_ROLE, VALIDATION
from brainray.storage import Folder


def seen_by_run(folder: Folder) -> pa.Table:
    """`all_seen` of a folder's run."""
    return all_seen(*_records(folder))


def all_seen(own: pa.Table, before: pa.Table) -> pa.Table:
    """``SEEN`` rows with a column ``elsewhere``: those of a run, then all others of the training of
    its starting weights, which may be from another collection.
    """
    others = before.filter(pc.invert(pc.is_in(before["sample_id"], own["sample_id"])))
    elsewhere = np.arange(own.num_rows + others.num_rows) >= own.num_rows
    return pa.concat_tables([own, others]).append_column("elsewhere", pa.array(elsewhere))


def seen_by_weights(weights: str, storage: Folder) -> pa.Table | None:
    """``SEEN`` rows of the training of an encoder's starting weights; None if there is no record.

    Args:
        weights: as in ``encoder.weights`` or a study's feature. A run's checkpoint and a
            self-supervised encoder are stored next to the record of what they have seen.
        storage: where ``run:NAME`` is searched for.
    """
    if weights in WEIGHTS_OF_NO_SLICE:
        return None
    if weights.startswith(RUN_PREFIX):
        folders = [storage / layout.RUNS / weights.removeprefix(RUN_PREFIX)]
    else:
        given = Path(weights).absolute()  # which may be a link, or may link into a cache
        folders = [
            Folder(folder) for path in (given, given.resolve()) for folder in path.parents[:2]
        ]
    for folder in folders:
        if folder.exists(layout.SEEN):
            return pa.concat_tables(_records(folder))
    return None


def _records(folder: Folder) -> tuple[pa.Table, pa.Table]:
    """``SEEN`` rows of a run, or of a self-supervised encoder, and of its starting weights."""
    before = SEEN.empty_table()
    if folder.exists(layout.SEEN_BEFORE):
        before = _read(folder, layout.SEEN_BEFORE)
    return _read(folder, layout.SEEN), before


def _read(folder: Folder, name: str) -> pa.Table:
    """``SEEN`` rows of a file; columns that an earlier version did not write are null."""
    return pa.concat_tables(
        [SEEN.empty_table(), folder.read_table(name)], promote_options="default"
    )


def training_slices(store: ImageStore) -> pa.Table:
    """``SEEN`` rows of a store's training slices, as seen by training without labels."""
    index = store.index(thumbnails=True)
    train = index.filter(pc.equal(index["split"], TRAIN))
    return seen_rows(train, [UNLABELLED_ROLE] * train.num_rows, [None] * train.num_rows)


def seen_rows(slices: pa.Table, roles: Sequence[str], labels: Sequence[str | None]) -> pa.Table:
    """``SEEN`` rows of a store's slices, with their roles and the labels that may be read."""
    filled = {"role": pa.array(roles, pa.string()), "label": pa.array(labels, pa.string())}
    columns = [filled[name] if name in filled else slices[name] for name in SEEN.names]
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
    fingerprints, learned_fingerprints = (
        thumbnail_matrix(table["thumbnail"].to_pylist()) for table in (validation, learned)
    )
    twins = find_twins(fingerprints, learned_fingerprints, preprocess.near_duplicate)
    num_learned = int((is_same | (twins.reference >= 0)).sum())
    if num_learned:
        raise ConfigError(
            f"encoder.weights={config.encoder.weights} was trained on the labels of {num_learned} "
            f"of this run's {validation.num_rows} validation slices, or of their copies, which "
            "would bias the choice of the epoch: use the same split.seed for both"
        )
