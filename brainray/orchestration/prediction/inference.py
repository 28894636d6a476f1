"""Prediction on raw files: Ray Data decodes, actors embed. Shared by evaluation and prediction."""

import re
from collections.abc import Sequence
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
from brainray.log import log
from brainray.mri.identity import content_hash
from brainray.orchestration.blocks import blocks_on_actors, map_blocks, read_parts
from brainray.orchestration.manifest import check_versions
from brainray.orchestration.preprocessing.slice_tasks import TO_PREDICT, decode_files, select_slices
from brainray.orchestration.preprocessing.source import SourceFile, files_of_tasks
from brainray.orchestration.preprocessing.subject_salt import subject_salt
from brainray.orchestration.resources import alive_nodes, plan_actors
from brainray.orchestration.run import Run, open_run, unfinished
from brainray.orchestration.seen import seen_by_run
from brainray.orchestration.store import ImageStore
from brainray.storage import Folder

_FILES_PER_TASK = 256  # the embedder waits for a complete task
_VOLUMES_PER_TASK = 4  # a volume has hundreds of slices
_VOLUME_SUFFIXES = (".nii", ".nii.gz")
_MAX_NAME = 100  # characters of a folder in names made from it
_OTHER_EPOCHS = rf"{layout.LAST}|{layout.CHECKPOINT_FOLDER}"  # than the chosen one
_KINDS_OF_CHECKPOINT = rf"{layout.BEST}|{_OTHER_EPOCHS}"
_EMBEDDER_BYTES = 2**29  # memory of an encoder and a batch


@dataclass(frozen=True)
class Predictor:
    """A checkpoint for prediction, and the records of its run."""

    folder: Folder  # of model.pt
    run: Run | None  # None of a checkpoint outside of its run's folder
    checkpoint: Checkpoint
    preprocess: PreprocessConfig

    def fitted(self) -> pa.Table | None:
        """``FITTED`` rows of the slices that the mixture was fitted on; None if not kept, or if
        they are those of another epoch.
        """
        if not self.folder.exists(layout.FITTED):
            return None
        fitted = self.folder.read_table(layout.FITTED)
        epoch = (fitted.schema.metadata or {}).get(layout.EPOCH_OF_FITTED.encode())
        if epoch is not None and int(epoch) != self.checkpoint.epoch:
            log(
                f"note: {self.folder}/{layout.FITTED} is of epoch {int(epoch)}, the model of epoch "
                f"{self.checkpoint.epoch}: its training was interrupted, or has gone on meanwhile"
            )
            return None
        return fitted

    def seen(self) -> pa.Table | None:
        """What the run and its starting weights saw (`seen_by_run`); None without the run."""
        return None if self.run is None else seen_by_run(self.run.folder)

    def temperature(self) -> float | None:
        """Temperature fitted on the validation slices after this epoch; None without the run."""
        if self.run is None:
            return None
        history = self.run.folder.read_json_lines(layout.METRICS)
        by_epoch = {int(row["epoch"]): row for row in history}
        found: float | None = by_epoch.get(self.checkpoint.epoch, {}).get("validation/temperature")
        return found


def find_predictor(config: Config, *, for_new_files: bool = True) -> Predictor:
    """The epoch ``config.epoch`` of ``config.run`` (default: the chosen epoch), or the checkpoint
    ``config.checkpoint``.

    Raises:
        ConfigError: an epoch is given with a checkpoint.
        DataError: no such run, or with ``for_new_files`` one that was trained on slices that this
            version preprocesses differently.
        CheckpointError: the checkpoint is missing or invalid, or there is no such epoch.
    """
    run: Run | None = None
    if config.run is not None:
        storage = Folder(config.storage)
        run = open_run(storage, config.run)
        folder = _checkpoint_folder(storage, run, config.epoch)
    elif config.epoch is not None:
        raise ConfigError(
            "epoch=N selects an epoch of a run: give --set run=NAME, not checkpoint=PATH"
        )
    else:
        folder = folder_of_checkpoint(Folder(str(config.checkpoint)))
        if folder.parent.exists(layout.RUN):
            run = Run.open(folder.parent)
    checkpoint = load_checkpoint(folder)
    if run is None:
        return Predictor(folder, None, checkpoint, checkpoint.config.preprocess)
    # The store's preprocessing may differ from that in the run's config file.
    preprocess = run.record.preprocess
    if for_new_files:
        check_versions(
            f"the run {run.folder} was trained on slices",
            preprocess,
            run.record.versions,
            "preprocess and train again under other names",
        )
    return Predictor(folder, run, checkpoint, preprocess)


def default_name(config: Config, predictor: Predictor) -> str:
    """Default name of results on ``config.source``, in plain characters: RUN-on-FOLDER, for another
    epoch than the chosen one RUN-epochN-on-FOLDER; or with the name of the folder that has the
    checkpoint if it belongs to no run.
    """
    is_named = predictor.run is None and not re.fullmatch(
        _KINDS_OF_CHECKPOINT, predictor.folder.name
    )
    model = predictor.folder if is_named else predictor.folder.parent
    is_chosen = config.epoch is None and not re.fullmatch(_OTHER_EPOCHS, predictor.folder.name)
    epoch = "" if is_chosen else f"-epoch{predictor.checkpoint.epoch}"
    return f"{_plain_name(model)}{epoch}-on-{_plain_name(Folder(config.given('source')))}"


def _plain_name(folder: Folder) -> str:
    name = folder.path.rpartition("/")[2]
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    if plain != name or len(plain) > _MAX_NAME:  # two such folders must not share a name
        plain = f"{plain[:_MAX_NAME]}-{content_hash(name.encode())[:6]}"
    return plain


def folder_of_checkpoint(given: Folder) -> Folder:
    """The folder of a checkpoint, from its path or that of its model; inside its run, if a symbolic
    link leads there.
    """
    places = [given]
    if given.local_path is not None:
        places.append(Folder(given.local_path.resolve()))
    folders = [place.parent if place.name == layout.MODEL else place for place in places]
    inside_runs = (folder for folder in folders if folder.parent.exists(layout.RUN))
    return next(inside_runs, folders[0])


def _checkpoint_folder(storage: Folder, run: Run, epoch: int | None) -> Folder:
    """Checkpoint folder of the chosen epoch, or of ``epoch`` if the run has kept it."""
    history = run.folder.read_json_lines(layout.METRICS)
    if not history:
        raise CheckpointError(f"no epoch is finished: {unfinished(storage, run)}")
    if not run.folder.exists(f"{layout.BEST}/{layout.MODEL}"):
        raise CheckpointError(f"the run {run.folder} has lost {layout.BEST}/{layout.MODEL}")
    if epoch is None:
        return run.folder / layout.BEST
    places = {number: layout.checkpoint_folder(number) for number in range(1, len(history) + 1)}
    if run.is_complete:
        places[len(history)] = layout.LAST
    # Runs trained with another rule of choice may keep a different epoch there.
    places[load_checkpoint(run.folder / layout.BEST).epoch] = layout.BEST
    kept = {
        number: place
        for number, place in places.items()
        if run.folder.exists(f"{place}/{layout.MODEL}")
    }
    if epoch not in kept:
        raise CheckpointError(
            f"the run {run.folder} has {len(history)} epochs but no checkpoint of epoch {epoch}: "
            f"choose one that it keeps ({', '.join(str(number) for number in sorted(kept))})"
        )
    return run.folder / kept[epoch]


def predicted_blocks(
    files: Sequence[SourceFile], config: Config, predictor: Predictor
) -> ray.data.Dataset:
    """Blocks as they come, with the columns of ``PREDICTIONS`` and those that `REJECTED` needs.

    Each slice has a row; a file that cannot be read has one row with the reason. All rows of a file
    are in one block.
    """
    decode = partial(
        decode_files,
        source=Folder(config.given("source")),
        preprocess=predictor.preprocess,
        salt=subject_salt(Folder(config.storage)),
    )
    volumes = [file for file in files if file.path.lower().endswith(_VOLUME_SUFFIXES)]
    images = [file for file in files if not file.path.lower().endswith(_VOLUME_SUFFIXES)]
    tables = [
        pa.Table.from_pylist(
            [
                asdict(file.file)
                | {name: getattr(file, name) for name in ("label", "subject", "label_of_frame")}
                for file in task
            ],
            schema=TO_PREDICT,
        )
        for task in (
            *files_of_tasks(images, _FILES_PER_TASK),
            *files_of_tasks(volumes, _VOLUMES_PER_TASK),
        )
    ]
    tasks = ray.data.from_arrow(tables)
    # Of this data set and those derived from it: splitting a block that a function returns could
    # separate the slices of a volume.
    tasks.context.target_max_block_size = None
    decoded = map_blocks(tasks, decode)
    return _embedded(decoded, config, predictor)


def predicted_slices(
    store: ImageStore, sample_ids: Sequence[str], config: Config, predictor: Predictor
) -> ray.data.Dataset:
    """The same for training slices of a store; their labels are not read."""
    select = partial(select_slices, sample_ids=ray.put(pa.array(sample_ids, pa.string())))
    slices = read_parts(store.folder / layout.IMAGES, _STORED_COLUMNS)
    selected = map_blocks(slices, select)
    return _embedded(selected, config, predictor)


def _embedded(slices: ray.data.Dataset, config: Config, predictor: Predictor) -> ray.data.Dataset:
    """Embed with an actor per GPU, or per node without one, which leaves a CPU for decoding."""
    actors = plan_actors(config.train, alive_nodes(), one_per_node=True)
    arguments = {
        "folder": predictor.folder,
        "epoch": predictor.checkpoint.epoch,
        "precision": config.train.precision,
        "device": torch.device(actors.device),
    }
    # Ray Data fuses tasks with an actor of equal resources, as on two CPUs: files would then be
    # decoded between two batches instead of during them.
    return blocks_on_actors(slices, _Embedder, arguments, actors, memory=_EMBEDDER_BYTES)


_STORED_COLUMNS = ["split", "sample_id", "path", "frame", "height", "width", "thumbnail", "image"]

_CARRIED = ["subject_id", "subject_source", "sha256", "num_bytes", "mtime_ns", "reason", "detail"]
"""Input columns that a prediction's row keeps."""


@dataclass
class _Embedder:
    """Keeps the checkpoint on one actor's device.

    The checkpoint is loaded with the first batch: Ray Data reports an exception in an actor's
    ``__init__`` as a lost actor, which would hide the error.
    """

    folder: Folder
    epoch: int
    precision: str
    device: torch.device

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raises CheckpointError if another epoch has replaced the requested one."""
        return self.model.predict(batch, _CARRIED)

    @cached_property
    def model(self) -> SliceModel:
        checkpoint = load_checkpoint(self.folder)
        if checkpoint.epoch != self.epoch:
            raise CheckpointError(
                f"{self.folder} now contains epoch {checkpoint.epoch}, not {self.epoch} as when "
                "prediction started: wait until the run is complete, or choose an epoch that it "
                "keeps (epoch=N)"
            )
        if self.device.type == "cpu":
            use_all_threads()
        return SliceModel(checkpoint, self.device, self.precision)
