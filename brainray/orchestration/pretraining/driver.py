"""Self-supervised training on Ray Train: a pretext task, or rounds of refinement after one.

No labels are read. The result, ``encoder.pt``, can also be read by ``encoder.weights=PATH``, so it
also serves as the warm-up of semi-supervised training.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import ray
from torch import Tensor

from brainray import layout
from brainray.config import Config, FeatureConfig
from brainray.engine.state import state_from_bytes
from brainray.log import log
from brainray.mri.identity import content_key
from brainray.orchestration.lock import held
from brainray.orchestration.pretraining.weights import (
    EncoderStart,
    State,
    Weights,
    read_weights,
    weights_from,
)
from brainray.orchestration.pretraining.worker import pretrain_worker
from brainray.orchestration.progress import Follower, RoomFollower, pretraining_line, step_name
from brainray.orchestration.ray_train import train_on_workers
from brainray.orchestration.resources import WorkerResources, alive_nodes, plan_workers
from brainray.orchestration.seen import seen_by_weights, training_slices
from brainray.orchestration.store import ImageStore
from brainray.storage import Folder

_ROUND_SETTINGS = {
    "max_rounds",
    "round_epochs",
    "round_learning_rate",
    "tolerance",
    "patience",
}
_OF_CONTRASTIVE = {"temperature", "positives", "projection_dim"}


def starting_weights(config: Config) -> Weights:
    """``encoder.weights``, read on the driver's node: the workers' nodes may not have the file.

    Raises:
        BrainrayError: no such file, or no weights in it.
    """
    return _start(config).weights


def warm_up(config: Config, store: ImageStore) -> State:
    """Initial weights of the encoder: `starting_weights`, after the warm-up if there is one.

    Raises:
        BrainrayError, ray.train.TrainingFailedError: as in `pretrain`.
    """
    start = _start(config)
    if config.encoder.pretext == "none":
        return start.weights.state
    return weights_from(pretrain(config, store, start), layout.ENCODER).state


def _start(config: Config) -> EncoderStart:
    """A run's encoder before its warm-up."""
    feature = FeatureConfig(
        encoder=config.encoder.name,
        weights=config.encoder.weights,
        image_size=config.encoder.pretext_image_size,
        pretext=config.encoder.pretext,
    )
    return EncoderStart(feature, read_weights(config, feature, "encoder.weights"), config.seed)


def pretrain(config: Config, store: ImageStore, start: EncoderStart) -> Folder:
    """Train an encoder on the store's training slices, resume its training, or reuse it.

    Refinement starts from the encoder trained on the same pretext alone, which is trained first or
    reused: features with the same pretext share its training.

    Args:
        config: ``self_supervision``, ``clustering`` (for refinement) and ``train``.
        store: the slices; its labels are not read.
        start: the encoder, with the weights from which it is trained.

    Returns:
        The folder with ``encoder.pt``, ``metrics.jsonl`` and, after refinement, the assignments of
        each round.

    Raises:
        BrainrayError: the workers do not fit the Ray cluster, or the clusters have collapsed.
        ray.train.TrainingFailedError: workers were lost more often than ``train.max_failures``.
    """
    feature = start.feature
    head: dict[str, Tensor] | None = None
    if feature.lambda_cluster > 0 and feature.pretext != "none":
        alone = feature.model_copy(update={"lambda_cluster": 0.0})
        before = pretrain(config, store, replace(start, feature=alone))
        start = replace(start, weights=weights_from(before, layout.ENCODER))
        head = _read_head(before)
    made_by = _made_by(config, store, start)
    kind = feature.pretext + ("-refined" if feature.lambda_cluster > 0 else "")
    name = f"{feature.encoder}-{kind}-seed{start.seed}-{content_key(made_by)}"
    target = Folder(config.storage) / layout.ENCODERS / name
    if not target.exists(layout.ENCODER):
        # Concurrent jobs share it too: the later ones wait, then reuse it.
        with held(Folder(config.storage), layout.ENCODERS, name, in_turn=True):
            if not target.exists(layout.ENCODER):
                history = target.read_json_lines(layout.METRICS)
                resumed = f", resuming after {step_name(history[-1])}" if history else ""
                log(f"encoder {target}: training{resumed}")
                workers = plan_workers(config.train, alive_nodes())
                about = {"num_workers": workers.num_workers_or_range, "store": str(store.folder)}
                target.write_json(layout.MANIFEST, made_by | about)
                _keep_what_it_sees(config, store, feature, target)
                _train(config, store, start, head, workers, target)
                return target
    log(f"encoder {target}: already trained, reusing it")
    return target


def collapsed_rounds(encoder: Folder) -> list[int]:
    """The rounds of refinement after which the clusters had collapsed; empty without refinement."""
    history = encoder.read_json_lines(layout.METRICS)
    return [int(row["round"]) for row in history if row.get("collapsed")]


def _keep_what_it_sees(
    config: Config, store: ImageStore, feature: FeatureConfig, target: Folder
) -> None:
    """Record the seen slices, with which training from this encoder compares its test slices."""
    before = seen_by_weights(feature.weights, Folder(config.storage))
    if before is not None:
        target.write_table(layout.SEEN_BEFORE, before)
    target.write_table(layout.SEEN, training_slices(store))


def _train(
    config: Config,
    store: ImageStore,
    start: EncoderStart,
    head: dict[str, Tensor] | None,
    workers: WorkerResources,
    target: Folder,
) -> None:
    settings = {
        "config": config.without_secrets().model_dump(mode="json"),
        "feature": start.feature.model_dump(mode="json"),
        "state": ray.put(start.weights.state),
        "head": ray.put(head),
        "seed": start.seed,
        "folder": str(target),
        "store": str(store.folder),
        "data_hash": store.manifest.data_hash,
    }
    line = partial(pretraining_line, config.self_supervision)
    with Follower(target, line), RoomFollower(workers):
        train_on_workers(
            pretrain_worker, settings, folder=target, workers=workers, config=config.train
        )
    target.delete_file(layout.STATE, missing_ok=True)


def _made_by(config: Config, store: ImageStore, start: EncoderStart) -> dict[str, Any]:
    """Everything that determines the trained weights, except the number of workers.

    Settings at their defaults are omitted, so that adding a setting that is off by default changes
    nothing. Whoever changes a default must raise the format version.
    """
    feature = start.feature
    train = config.train.model_dump(mode="json", include={"weight_decay", "warmup_fraction"})
    is_refined = feature.lambda_cluster > 0
    unused = {"num_epochs"} if is_refined else _ROUND_SETTINGS
    if feature.pretext != "contrastive":
        unused = unused | _OF_CONTRASTIVE
    if feature.pretext == "none":
        unused = unused | {"learning_rate"}
    made_by = {
        "format": layout.ENCODER_FORMAT,
        "data_hash": store.manifest.slices_hash,
        "feature": feature.model_dump(mode="json", exclude={"weights"}, exclude_defaults=True),
        "weights": start.weights.identity,
        "self_supervision": config.self_supervision.model_dump(
            mode="json", exclude=unused, exclude_defaults=True
        ),
        "train": train | {"precision": config.train.precision},
        "seed": start.seed,
    }
    if is_refined:
        clustering = config.clustering.model_dump(mode="json", exclude_defaults=True)
        # Always, as encoders of earlier versions have no word of it, even if it was ``warn``.
        made_by["clustering"] = clustering | {"on_collapse": config.clustering.on_collapse}
    return made_by


def _read_head(folder: Folder) -> dict[str, Tensor]:
    """The pretext head that was trained with an encoder."""
    where = f"{folder}/{layout.ENCODER}"
    head: dict[str, Tensor] = state_from_bytes(folder.read_bytes(layout.ENCODER), where)["head"]
    return head
