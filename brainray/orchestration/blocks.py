"""Blocks of Ray Data, one Arrow table each: all slices of a file are in one of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from brainray.log import ProgressLines
from brainray.orchestration.resources import ActorResources
from brainray.storage import Folder


def read_parts(folder: Folder, columns: Sequence[str]) -> ray.data.Dataset:
    """Columns of the Parquet files in a folder."""
    # Ray Data would otherwise take a column from a parent folder named like `split=grouped`.
    rows = ray.data.read_parquet(folder.path, filesystem=folder.filesystem, partitioning=None)
    return rows.select_columns(list(columns))


def map_blocks(
    dataset: ray.data.Dataset, function: Callable[[pa.Table], pa.Table]
) -> ray.data.Dataset:
    """Map a data set's whole blocks through a function, as tasks."""
    return dataset.map_batches(function, batch_size=None, batch_format="pyarrow")


def arrow_blocks(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The dataset's blocks as they come."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        yield batch


def with_progress(
    dataset: ray.data.Dataset, total: int, verb: str, *, counts_slices: bool = False
) -> Iterator[pa.Table]:
    """The dataset's blocks as they come, with a progress line every ten seconds.

    Counts files (all rows of a ``path`` are in one block), or slices with ``counts_slices``.
    """
    progress = ProgressLines(verb, "slices" if counts_slices else "files")
    done = 0
    for batch in arrow_blocks(dataset):
        done += batch.num_rows if counts_slices else pc.count_distinct(batch["path"]).as_py()
        progress.update(done, total)
        yield batch


def blocks_on_actors(
    dataset: ray.data.Dataset,
    actor: type,
    arguments: Mapping[str, Any],
    resources: ActorResources,
    *,
    memory: float | None = None,
) -> ray.data.Dataset:
    """Map a data set's blocks, unchanged, through actors.

    ``map_batches`` rejects whole blocks if GPUs are requested, and with a batch size it would
    separate the slices of a file. Ray's ``map_groups`` uses the same internal method.

    Args:
        dataset: Arrow blocks.
        actor: class whose ``__call__`` takes and returns a table.
        arguments: of its constructor.
        resources: maximum number of actors, and what Ray reserves for each.
        memory: that Ray reserves for each actor, in bytes.
    """
    # With few blocks, the first actor would take all of them before the other GPUs have one.
    at_first = resources.num_actors if resources.num_gpus else 1
    return dataset.map_batches_internal(
        actor,
        fn_constructor_kwargs=dict(arguments),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=at_first, max_size=resources.num_actors),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        memory=memory,
    )
