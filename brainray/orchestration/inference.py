"""Prediction on raw files: Ray Data decodes, actors embed; what evaluation and prediction share."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import pyarrow as pa
import ray
import ray.data
import torch

from brainray import layout
from brainray.config import Config, PreprocessConfig
from brainray.engine.slice_model import SliceModel, use_all_threads
from brainray.engine.state import Checkpoint, load_checkpoint
from brainray.errors import CheckpointError, ConfigError
from brainray.mri.identity import content_hash
from brainray.orchestration.preparation import subject_salt
from brainray.orchestration.resources import alive_nodes, blocks_on_actors, plan_actors
from brainray.orchestration.run import Run, open_run, read_run_info
from brainray.orchestration.slice_tasks import TO_PREDICT, decode_files, select_slices
from brainray.orchestration.source import SourceFile, files_of_tasks
from brainray.orchestration.store import ImageStore, differing_settings, versions_of
from brainray.storage import Folder

_FILES_PER_TASK = 256  # the embedder waits for the whole of one
_VOLUMES_PER_TASK = 4  # a volume has hundreds of slices
_VOLUME_SUFFIXES = (".nii", ".nii.gz")
_MAX_NAME = 100  # characters of a source folder in what is named after it
_EMBEDDER_BYTES = 2**29  # of memory: an encoder and a batch


@dataclass(frozen=True)
class Predictor:
    """A checkpoint that predicts, and what its run knows."""

    folder: Folder  # of model.pt
    run_folder: Folder  # of the run whose records belong to it; may hold none
    checkpoint: Checkpoint
    preprocess: PreprocessConfig

    def fitted(self) -> pa.Table | None:
        """``FITTED`` rows of the slices that the mixture was fitted on, where they were kept."""
        if not self.folder.exists(layout.FITTED):
            return None
        return self.folder.read_table(layout.FITTED)

    def seen(self) -> pa.Table | None:
        """Fingerprints of what the run saw; None for a checkpoint without its run."""
        if not self.run_folder.exists(layout.SEEN):
            return None
        return self.run_folder.read_table(layout.SEEN)

    def subject_salt(self) -> str | None:
        """Tells which salt the run's subjects are hashed with; None where it does not say."""
        if not self.run_folder.exists(layout.RUN):
            return None
        found: str | None = read_run_info(self.run_folder).get("subject_salt")
        return found

    def temperature(self) -> float | None:
        """What the run fitted on its validation slices after this epoch; None without the run."""
        if not self.run_folder.exists(layout.METRICS):
            return None
        history = self.run_folder.read_json_lines(layout.METRICS)
        by_epoch = {int(row["epoch"]): row for row in history}
        found: float | None = by_epoch.get(self.checkpoint.epoch, {}).get("validation/temperature")
        return found


def find_predictor(config: Config, purpose: str, *, of_new_files: bool = True) -> Predictor:
    """The epoch ``config.epoch`` of ``config.run``, by default the chosen one, or the checkpoint
    ``config.checkpoint``.

    Raises:
        ConfigError: neither of them, or both.
        DataError: no such run.
        CheckpointError: the checkpoint is missing or is not one, of no such epoch, or it is to
            predict new files and was trained on slices that this version would make otherwise.
    """
    if (config.run is None) == (config.checkpoint is None):
        raise ConfigError(f"{purpose} needs one of --set run=NAME and --set checkpoint=PATH")
    if config.run is not None:
        run = open_run(Folder(config.storage), config.run)
        run_folder = run.folder
        folder = _checkpoint_folder(run, config.epoch)
    elif config.epoch is not None:
        raise ConfigError("epoch=N chooses among a run's epochs: it goes with --set run=NAME")
    else:
        folder = Folder(str(config.checkpoint))
        folder = folder.parent if folder.name == layout.MODEL else folder
        run_folder = folder.parent
    checkpoint = load_checkpoint(folder)
    info = read_run_info(run_folder) if run_folder.exists(layout.RUN) else {}
    # A store may have been made with other preprocessing than the run's config file said.
    preprocess = PreprocessConfig.model_validate(
        info.get("preprocess", checkpoint.config.preprocess.model_dump())
    )
    made_with, now = info.get("versions", {}), versions_of(preprocess)
    if of_new_files and info and made_with != now:
        difference = differing_settings(made_with, now)
        raise CheckpointError(
            f"the run {run_folder} was trained on slices of another version of brainray "
            f"({difference}), and new slices would not be preprocessed like them: preprocess and "
            "train anew under other names"
        )
    return Predictor(folder, run_folder, checkpoint, preprocess)


def default_name(config: Config, predictor: Predictor) -> str:
    """Of what is made of ``config.source``: RUN-on-FOLDER, of plain characters."""
    folder = Folder(str(config.source)).path.rpartition("/")[2]
    plain = re.sub(r"[^\w.-]+", "-", folder, flags=re.ASCII)
    if plain != folder or len(plain) > _MAX_NAME:  # two such folders must not have one name
        plain = f"{plain[:_MAX_NAME]}-{content_hash(folder.encode())[:6]}"
    return f"{predictor.run_folder.name}-on-{plain}"


def _checkpoint_folder(run: Run, epoch: int | None) -> Folder:
    """Of the chosen epoch, or of that epoch where the run has kept it."""
    history = run.folder.read_json_lines(layout.METRICS)
    if not history or not run.folder.exists(f"{layout.BEST}/{layout.MODEL}"):
        raise CheckpointError(f"the run {run.folder} has finished no epoch yet: wait for one")
    if epoch is None:
        return run.folder / layout.BEST
    places = {number: layout.checkpoint_folder(number) for number in range(1, len(history) + 1)}
    if run.is_complete:
        places[len(history)] = layout.LAST
    # Runs that were trained by another rule of choice keep another epoch than today's there.
    places[load_checkpoint(run.folder / layout.BEST).epoch] = layout.BEST
    kept = {
        number: place
        for number, place in places.items()
        if run.folder.exists(f"{place}/{layout.MODEL}")
    }
    if epoch not in kept:
        raise CheckpointError(
            f"the run {run.folder} has {len(history)} epochs and keeps the checkpoints of "
            f"{', '.join(str(number) for number in sorted(kept))}, not of {epoch}"
        )
    return run.folder / kept[epoch]


def predicted_blocks(
    files: Sequence[SourceFile], config: Config, predictor: Predictor
) -> ray.data.Dataset:
    """Blocks as they come, with the columns of ``PREDICTIONS`` and what `REJECTED` needs: a row for
    each slice, or one with the reason for a file that cannot be read, all of a file in one block.
    """
    decode = partial(
        decode_files,
        source=Folder(str(config.source)),
        preprocess=predictor.preprocess,
        salt=subject_salt(Folder(config.storage)),
    )
    volumes = [asked for asked in files if asked.path.lower().endswith(_VOLUME_SUFFIXES)]
    images = [asked for asked in files if not asked.path.lower().endswith(_VOLUME_SUFFIXES)]
    tables = [
        pa.Table.from_pylist(
            [
                asdict(asked.file) | {"label": asked.label, "subject": asked.subject}
                for asked in task
            ],
            schema=TO_PREDICT,
        )
        for task in (
            *files_of_tasks(images, _FILES_PER_TASK),
            *files_of_tasks(volumes, _VOLUMES_PER_TASK),
        )
    ]
    with _whole_blocks():
        tasks = ray.data.from_arrow(tables)
    decoded = tasks.map_batches(decode, batch_size=None, batch_format="pyarrow")
    return _embedded(decoded, config, predictor)


def predicted_slices(
    store: ImageStore, sample_ids: Sequence[str], config: Config, predictor: Predictor
) -> ray.data.Dataset:
    """The same for training slices of a store, as they come; their labels are not read."""
    select = partial(select_slices, sample_ids=ray.put(pa.array(sample_ids, pa.string())))
    images = store.folder / layout.IMAGES
    slices = ray.data.read_parquet(images.path, filesystem=images.filesystem)
    slices = slices.select_columns(_STORED_COLUMNS)
    selected = slices.map_batches(select, batch_size=None, batch_format="pyarrow")
    return _embedded(selected, config, predictor)


def _embedded(slices: ray.data.Dataset, config: Config, predictor: Predictor) -> ray.data.Dataset:
    """By an actor on every GPU, or on every node without one, which leaves a CPU for decoding."""
    device, actors = plan_actors(config.train, alive_nodes(), one_per_node=True)
    arguments = {
        "folder": predictor.folder,
        "epoch": predictor.checkpoint.epoch,
        "precision": config.train.precision,
        "device": device,
    }
    # Tasks that ask for the same as the actor would be fused with it by Ray Data, as on two CPUs:
    # files would be decoded between two batches, and nothing meanwhile.
    return blocks_on_actors(slices, _Embedder, arguments, actors, memory=_EMBEDDER_BYTES)


@contextmanager
def _whole_blocks() -> Iterator[None]:
    """Data sets made within keep the blocks that their functions return: a block that is split
    would part the slices of a volume.
    """
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = None
    try:
        yield
    finally:
        context.target_max_block_size = before


_STORED_COLUMNS = ["split", "sample_id", "path", "frame", "height", "width", "thumbnail", "image"]

_CARRIED = ["subject_id", "subject_source", "sha256", "num_bytes", "mtime_ns", "reason", "detail"]
"""Columns that a prediction's row keeps beside its own."""


class _Embedder:
    """Holds the checkpoint on one actor's device.

    It is loaded with the first batch: what an actor's ``__init__`` raises is a lost actor to Ray
    Data, and not the error that it is.
    """

    def __init__(self, folder: Folder, epoch: int, precision: str, device: str) -> None:
        self.folder = folder
        self.epoch = epoch
        self.precision = precision
        self.device = torch.device(device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raises CheckpointError where another epoch has taken the place of the one asked for."""
        return self.model.predict(batch, _CARRIED)

    @cached_property
    def model(self) -> SliceModel:
        checkpoint = load_checkpoint(self.folder)
        if checkpoint.epoch != self.epoch:
            raise CheckpointError(
                f"{self.folder} holds epoch {checkpoint.epoch} now, and held {self.epoch} when "
                "prediction began: wait until the run is complete, or name an epoch that it keeps "
                "(epoch=N)"
            )
        if self.device.type == "cpu":
            use_all_threads()
        return SliceModel(checkpoint, self.device, self.precision)
