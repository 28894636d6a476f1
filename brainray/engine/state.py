"""Saved state: self-contained checkpoints for prediction, and the state to resume a run."""

import io
import re
import zipfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from brainray import layout
from brainray.config import Config
from brainray.config_text import parse_config
from brainray.engine.recipe import image_side
from brainray.engine.recluster import ClusterModel
from brainray.engine.selection import chosen_epoch
from brainray.engine.shard import PixelScale
from brainray.errors import CheckpointError
from brainray.log import log
from brainray.models.encoder import Encoder
from brainray.schema import History
from brainray.storage import Folder

_FORMAT = "brainray-checkpoint/1"
_NUM_KEPT = 2  # resumable checkpoints, since the newest may be corrupt


@dataclass(frozen=True)
class Checkpoint:
    """A matching pair of encoder and mixture, with everything that prediction needs."""

    config: Config
    classes: list[str]
    scale: PixelScale
    epoch: int
    encoder: Encoder
    clusters: ClusterModel

    @property
    def image_size(self) -> int:
        """Side in pixels of the slices that this epoch's mixture was fitted on."""
        return image_side(self.epoch, self.config.train)


@dataclass
class TrainerState:
    """State that the next epoch needs in addition to the checkpoint."""

    optimizer: dict[str, Any]
    keys: Tensor  # (N,) int64, of all fitted slices of all ranks
    responsibilities: Tensor  # (N, K) float32, rows as in keys
    probabilities: Tensor  # (N, C) float32 of the head, rows as in keys
    trained: dict[str, Any] | None  # the encoder's weights if the checkpoint has their average
    history: History = field(default_factory=list)


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """Content of a checkpoint's ``model.pt``: tensors and plain values only."""
    return state_to_bytes(checkpoint_state(checkpoint))


def checkpoint_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as tensors, by module name, and plain values."""
    return {
        "format": _FORMAT,
        "config": checkpoint.config.model_dump(mode="json"),
        "classes": list(checkpoint.classes),
        "pixel_mean": checkpoint.scale.mean,
        "pixel_std": checkpoint.scale.std,
        "epoch": checkpoint.epoch,
        "encoder": _on_cpu(checkpoint.encoder.state_dict()),
        "clusters": _on_cpu(checkpoint.clusters.state_dict()),
    }


def load_checkpoint(folder: Folder) -> Checkpoint:
    """Load a folder's ``model.pt`` to the CPU.

    Raises:
        CheckpointError: the file is missing or is not a brainray checkpoint.
    """
    if not folder.exists(layout.MODEL):
        raise CheckpointError(
            f"{folder} contains no {layout.MODEL}: give the folder of a checkpoint, "
            "such as storage/runs/NAME/best"
        )
    where = f"{folder}/{layout.MODEL}"
    return restore_checkpoint(state_from_bytes(folder.read_bytes(layout.MODEL), where), where)


def restore_checkpoint(saved: dict[str, Any], where: str) -> Checkpoint:
    """Restore the checkpoint from a ``checkpoint_state``; ``where`` names its file in errors.

    Raises:
        CheckpointError: it is not a brainray checkpoint.
    """
    if saved.get("format") != _FORMAT:
        raise CheckpointError(f"{where} is not a {_FORMAT} file")
    config = parse_config(saved["config"], is_saved=True)
    encoder = Encoder(config.encoder.name, len(saved["classes"]))
    clusters = ClusterModel(config.clustering, encoder.embedding_dim)
    try:
        encoder.load_state_dict(saved["encoder"])
        clusters.load_state_dict(saved["clusters"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{where} does not match its config: {reason}") from None
    return Checkpoint(
        config=config,
        classes=saved["classes"],
        scale=PixelScale(saved["pixel_mean"], saved["pixel_std"]),
        epoch=saved["epoch"],
        encoder=encoder,
        clusters=clusters,
    )


def trainer_bytes(state: TrainerState) -> bytes:
    """Content of a checkpoint's ``trainer.pt``."""
    trained = None if state.trained is None else _on_cpu(state.trained)
    return state_to_bytes(_on_cpu(vars(state) | {"trained": trained}))


def load_trainer(folder: Folder) -> TrainerState:
    """Load a folder's ``trainer.pt`` to the CPU.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    if not folder.exists(layout.TRAINER):
        raise CheckpointError(
            f"{folder} contains no {layout.TRAINER}: training cannot resume from it"
        )
    where = f"{folder}/{layout.TRAINER}"
    saved = state_from_bytes(folder.read_bytes(layout.TRAINER), where)
    try:
        return TrainerState(**saved)
    except TypeError:  # other fields
        raise CheckpointError(f"{where} was written by another version of brainray") from None


def save_resumable(
    run: Folder, checkpoint: Checkpoint, state: TrainerState, fitted: pa.Table | None = None
) -> None:
    """Save the state after an epoch in a folder of the run, and keep the one before it and the one
    that was chosen before: the newest may turn out to be damaged.

    ``fitted`` are the slices (``schema.FITTED``) of an epoch that is to be kept as the best. Files
    are written atomically and ``model.pt`` comes last: a folder without it is not a checkpoint.
    """
    folder = run / layout.checkpoint_folder(checkpoint.epoch)
    folder.delete()  # an interrupted job may have left files that do not match
    if fitted is not None:
        folder.write_table(layout.FITTED, fitted)
    folder.write_bytes(layout.TRAINER, trainer_bytes(state))
    folder.write_bytes(layout.MODEL, checkpoint_bytes(checkpoint))
    epochs = [epoch for epoch in _epochs_kept(run) if epoch <= checkpoint.epoch]
    before = state.history[:-1]
    kept = {*epochs[-_NUM_KEPT:], chosen_epoch(before) if before else 0}
    for epoch in set(epochs) - kept:
        (run / layout.checkpoint_folder(epoch)).delete()


def keep_as_best(run: Folder, epoch: int) -> None:
    """Make a saved epoch, which was chosen when it was saved, the run's best."""
    folder, best = run / layout.checkpoint_folder(epoch), run / layout.BEST
    for name in (layout.FITTED, layout.MODEL):
        best.write_bytes(name, folder.read_bytes(name))


def restore_best(run: Folder, epoch: int) -> None:
    """Make a chosen epoch the run's best if it is not: the job that saved it was interrupted, or
    one chosen later has been damaged since.

    Raises:
        CheckpointError: neither it nor the checkpoint of that epoch can be read.
    """
    try:
        if load_checkpoint(run / layout.BEST).epoch == epoch:
            return
        problem = f"{run / layout.BEST} is of another epoch"
    except CheckpointError as error:
        problem = str(error)
    folder = run / layout.checkpoint_folder(epoch)
    with suppress(CheckpointError):
        load_checkpoint(folder)
        if folder.exists(layout.FITTED):  # else of an earlier version
            keep_as_best(run, epoch)
            return
    raise CheckpointError(
        f"the model of the chosen epoch {epoch} is lost ({problem}): "
        f"restore {run / layout.BEST} from a backup or train under another name"
    )


def delete_other_predictions(run: Folder, epochs: Collection[int]) -> None:
    """Keep the predictions of these epochs only."""
    needed = {layout.predictions_file(epoch) for epoch in epochs}
    for name in (run / layout.EPOCH_PREDICTIONS).names():
        if (file := f"{layout.EPOCH_PREDICTIONS}/{name}") not in needed:
            run.delete_file(file)


def newest_readable_epoch(run: Folder) -> int:
    """Epoch of a run's newest readable checkpoint, 0 if it has none; those that cannot be read are
    logged.

    Raises:
        CheckpointError: the run has finished epochs but no readable checkpoint.
    """
    problems = []
    for epoch in reversed(_epochs_kept(run)):
        try:
            load_resumable(run, epoch)
        except CheckpointError as error:
            problems.append(str(error))
            log(f"{error}: trying the previous checkpoint")
        else:
            return epoch
    if run.read_json_lines(layout.METRICS):
        reasons = "; ".join(problems) or "none exists"
        raise CheckpointError(
            f"no checkpoint of {run} can be read ({reasons}): "
            "restore one from a backup or train under another name"
        )
    return 0


def load_resumable(run: Folder, epoch: int) -> tuple[Checkpoint, TrainerState]:
    """Load what was saved after an epoch.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    folder = run / layout.checkpoint_folder(epoch)
    return load_checkpoint(folder), load_trainer(folder)


def _epochs_kept(run: Folder) -> list[int]:
    matches = (re.fullmatch(layout.CHECKPOINT_FOLDER, name) for name in run.names())
    return sorted(int(match.group(1)) for match in matches if match)


def rows_of_keys(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The rows of ``values`` (N, ...) whose ``keys`` (N,) are ``wanted`` (n,), in that order.

    Raises:
        CheckpointError: a wanted key is missing, because the data differ from the checkpoint's.
    """
    order = torch.argsort(keys)
    position = torch.searchsorted(keys[order], wanted).clamp_max(len(keys) - 1)
    rows = order[position]
    if not torch.equal(keys[rows], wanted):
        raise CheckpointError(
            "the image store contains training slices unknown to the checkpoint: it changed after "
            "the run started; start a run with another name"
        )
    return values[rows]


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with its tensors on the CPU; other values (extra state) are unchanged."""
    return {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def state_to_bytes(value: dict[str, Any]) -> bytes:
    """Tensors and plain values as written by ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def state_from_bytes(content: bytes, where: str) -> dict[str, Any]:
    """Read what `state_to_bytes` wrote; ``where`` names the file in errors.

    Raises:
        CheckpointError: the content is incomplete or unreadable.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()  # torch does not check the checksums
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on invalid files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{where} is not a checkpoint: {reason}; use another epoch of the run (epoch=N)"
        ) from None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where} is not a checkpoint: it contains a {type(saved).__name__}")
    return saved
