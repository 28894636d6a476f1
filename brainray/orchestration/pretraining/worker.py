"""Worker of self-supervised training: pretext epochs, or rounds of refinement."""

import hashlib
import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from brainray import dist, layout
from brainray.clustering.seeding import seed_of
from brainray.config import Config, FeatureConfig
from brainray.config_text import parse_config
from brainray.engine.finite import naming_slices
from brainray.engine.loop import heartbeat, train_epoch
from brainray.engine.recipe import agreed_precision, build_optimizer, resume_schedule
from brainray.engine.recluster import ClusterModel, Reclustering, recluster_with_check
from brainray.engine.self_supervised import (
    Groups,
    PretextEpoch,
    SoftTargets,
    build_pretext,
    changed_share,
    check_contrast,
    cluster_without_labels,
    embed_slices,
    is_refined,
    plan_steps,
)
from brainray.engine.shard import CachedImages, Images, sample_keys
from brainray.engine.state import state_from_bytes, state_to_bytes
from brainray.errors import BrainrayError, CheckpointError, DivergenceError
from brainray.models.features import build_feature_encoder, num_features
from brainray.models.pretext import PretextModel
from brainray.orchestration.paths import check_is_here
from brainray.orchestration.pretraining.weights import State
from brainray.orchestration.ray_train import (
    configure_rank,
    distributed,
    return_user_errors,
)
from brainray.orchestration.store import ImageStore, read_images
from brainray.schema import TRAIN, History
from brainray.storage import Folder

_REMEDY = (
    "lower self_supervision.learning_rate (or round_learning_rate) or set train.precision=fp32"
)
_GROUPED_BY = {"subject": "split_group_id", "slice": "sample_id"}  # by kind of positives


@return_user_errors
def pretrain_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point on every rank."""
    config = parse_config(settings["config"])
    feature, folder = FeatureConfig.model_validate(settings["feature"]), Folder(settings["folder"])
    configure_rank()
    device = ray.train.torch.get_device()
    with dist.raise_on_all_ranks(device):
        check_is_here(folder)
    torch.manual_seed(settings["seed"])
    precision = agreed_precision(config.train.precision, device)
    with dist.raise_on_all_ranks(device):
        learner = _Learner(
            config,
            feature,
            folder,
            ImageStore.open(Folder(settings["store"]), settings["data_hash"]),
            ray.get(settings["state"]),
            ray.get(settings["head"]),
            settings["seed"],
            device,
            precision,
        )
    learner.learn()


class _Learner:
    """One rank's state between epochs and rounds."""

    def __init__(
        self,
        config: Config,
        feature: FeatureConfig,
        folder: Folder,
        store: ImageStore,
        state: State,
        learned_head: dict[str, Tensor] | None,
        seed: int,
        device: torch.device,
        precision: str,
    ) -> None:
        self.config = config
        self.settings = config.self_supervision
        self.feature = feature
        self.folder = folder
        self.seed = seed
        self.device = device
        self.precision = precision
        self.pixel_mean, self.pixel_std = store.manifest.pixel_mean, store.manifest.pixel_std
        self.pretext = build_pretext(feature.pretext, self.settings)
        self.rows = _rows_of_store(store)
        self.images, self.keys, self.groups = _load_slices(
            store, self.rows, self.settings.positives, feature.image_size, device
        )
        encoder = build_feature_encoder(
            feature.encoder,
            state,
            seed=seed,
            pixel_mean=store.manifest.pixel_mean,
            pixel_std=store.manifest.pixel_std,
        ).standardised_by(store.manifest.pixel_mean, store.manifest.pixel_std)
        head = self.pretext.head(num_features(encoder, feature.image_size))
        if learned_head is not None:
            head.load_state_dict(learned_head)
        learner = PretextModel(encoder, head)
        self.model = learner.to(device).to(memory_format=torch.channels_last)
        self.plan = plan_steps(
            self.rows.num_rows, self.settings.batch_size_per_worker, dist.world_size()
        )
        if feature.pretext == "contrastive":
            num_groups = len(self.rows[_GROUPED_BY[self.settings.positives]].unique())
            check_contrast(self.plan, num_groups, self.settings)
        self.ddp: nn.Module = self.model  # until all ranks have got this far
        self.history: History = []
        self.clusters: ClusterModel | None = None

    def learn(self) -> None:
        """Run the pretext's epochs, or rounds of refinement until assignments settle."""
        self.ddp = distributed(self.model)
        with dist.raise_on_all_ranks(self.device):
            state = _saved_state(self.folder)
        self._check_all_go_on_from_one(0 if state is None else len(state["history"]))
        if state is not None:
            self._restore(state)
        if self.feature.lambda_cluster > 0:
            self._refine()
        else:
            self._learn_pretext(state)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self._write_encoder()

    def _learn_pretext(self, state: dict[str, Any] | None) -> None:
        num_epochs = self.settings.num_epochs
        optimizer, scheduler = self._optimizer(
            self.settings.learning_rate, num_epochs * self.plan.num_steps
        )
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            resume_schedule(scheduler, len(self.history) * self.plan.num_steps)
        while len(self.history) < num_epochs:
            started = time.monotonic()
            epoch = len(self.history) + 1
            losses = self._epoch(f"epoch {epoch}", optimizer, scheduler, (epoch,))
            self._save(losses, started, optimizer)

    def _refine(self) -> None:
        """Cluster and train on the clusters in turn until few slices change their cluster."""
        z = self._embed()
        if self.clusters is None:
            found = cluster_without_labels(
                z, self.keys, config=self.config.clustering, seed=self.seed
            )
            self.clusters, responsibilities = found.model, found.responsibilities
            self._keep_assignments(responsibilities, 0)
        else:  # saved encoder and clusters match: they give the same responsibilities again
            responsibilities = self.clusters.responsibilities(z)
        changes = [row["changed_share"] for row in self.history]
        while not is_refined(changes, self.settings):
            started = time.monotonic()
            number = len(changes) + 1
            losses = self._train_round(number, SoftTargets(responsibilities, self.clusters.centers))
            z = self._embed()
            found, health, has_collapsed = recluster_with_check(
                partial(self._cluster, z, responsibilities, number),
                z,
                responsibilities,
                self.config.clustering,
                where=f"{self.folder.name}, round {number}",
                remedy="lower the feature's lambda_cluster or "
                "self_supervision.round_learning_rate, or set clustering.on_collapse=warn",
            )
            changes.append(changed_share(responsibilities, found.responsibilities))
            self.clusters, responsibilities = found.model, found.responsibilities
            self._keep_assignments(responsibilities, number)
            metrics = losses | {
                "round": float(number),
                "changed_share": changes[-1],
                "smallest_share": health.smallest_share,
                "largest_share": health.largest_share,
                "effective_rank": health.effective_rank,
                "collapsed": float(has_collapsed),
            }
            self._save(metrics, started)

    def _cluster(
        self, z: Tensor, responsibilities: Tensor, number: int, reseed: bool
    ) -> Reclustering:
        return cluster_without_labels(
            z,
            self.keys,
            config=self.config.clustering,
            seed=seed_of(self.seed, number) if reseed else self.seed,
            previous=None if reseed else self.clusters,
            previous_responsibilities=responsibilities,
        )

    def _train_round(self, number: int, soft: SoftTargets) -> dict[str, float]:
        """Losses in the last of ``round_epochs`` epochs, which have their own schedule."""
        steps = self.settings.round_epochs * self.plan.num_steps
        optimizer, scheduler = self._optimizer(self.settings.round_learning_rate, steps)
        losses: dict[str, float] = {}
        for epoch in range(self.settings.round_epochs):
            name = f"round {number}, epoch {epoch + 1}"
            losses = self._epoch(name, optimizer, scheduler, (-number, epoch), soft)
        return losses

    def _epoch(
        self,
        name: str,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        number: tuple[int, ...],
        soft: SoftTargets | None = None,
    ) -> dict[str, float]:
        """Mean losses of one epoch, whose order and views depend on its ``number``.

        All ranks embed with the encoder that is saved: rank 0's buffers are copied to the others.
        """
        name = f"{self.folder.name}, {name}"
        with naming_slices(
            self.rows["sample_id"].to_pylist,
            where=f"self-supervised training, {name}",
            num_steps=self.plan.num_steps,
            remedy=_REMEDY,
        ):
            result = train_epoch(
                self.ddp,
                optimizer,
                scheduler,
                PretextEpoch(
                    self.images,
                    self.keys,
                    self.groups,
                    self.pretext,
                    self.plan,
                    seed_of(self.seed, *number, dist.rank()),
                    self.feature.lambda_cluster,
                    soft,
                ),
                precision=self.precision,
                on_step=heartbeat(name, self.plan.num_steps),
            )
        if not all(bool(part.isfinite().all()) for part in self.model.parameters()):
            # The last step's effect on the weights; every run would reuse this encoder.
            raise DivergenceError(
                f"self-supervised training, {name}: a weight is NaN or infinite: {_REMEDY}"
            )
        dist.share_buffers(self.model)
        return result.losses

    def _check_all_go_on_from_one(self, num_done: int) -> None:
        """Check that all ranks resume from the same state: on a mounted file system, a new file may
        be visible to only some nodes for a while.
        """
        num_done_by_first = int(
            dist.broadcast_from_first(torch.tensor(num_done, device=self.device))
        )
        with dist.raise_on_all_ranks(self.device):
            if num_done != num_done_by_first:
                raise BrainrayError(
                    f"{self.folder}/{layout.STATE} is from epoch {num_done_by_first} on the first "
                    f"worker but {num_done} on another: submit again when all nodes see the same "
                    "storage"
                )

    def _optimizer(self, learning_rate: float, steps: int) -> tuple[Optimizer, LRScheduler]:
        train = self.config.train.model_copy(update={"learning_rate": learning_rate})
        return build_optimizer(self.model, train, steps)

    def _embed(self) -> Tensor:
        return embed_slices(
            self.model.encoder,
            self.images,
            batch_size=self.config.train.embed_batch_size,
            precision=self.precision,
        )

    def _keep_assignments(self, responsibilities: Tensor, number: int) -> None:
        """Save every slice's cluster after a round, for later comparison with labels."""
        keys = dist.gather_rows(self.keys).cpu()
        clusters = dist.gather_rows(responsibilities.argmax(dim=1)).cpu()
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                # Slices are distributed over ranks by group; sorting by key makes the order unique.
                order = torch.argsort(keys)
                table = pa.table({"key": keys[order].numpy(), "cluster": clusters[order].numpy()})
                (self.folder / layout.ROUNDS).write_table(f"round-{number:03d}.parquet", table)

    def _save(
        self,
        metrics: dict[str, float],
        started: float,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Log and checkpoint an epoch or round."""
        seconds = time.monotonic() - started
        row = {"epoch": float(len(self.history) + 1), **metrics, "seconds": seconds}
        self.history.append(row)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                state = {
                    "model": self.model.state_dict(),
                    "history": self.history,
                    "optimizer": None if optimizer is None else optimizer.state_dict(),
                    "clusters": None if self.clusters is None else self.clusters.state_dict(),
                }
                self.folder.write_bytes(layout.STATE, state_to_bytes(state))
                self.folder.write_json_lines(layout.METRICS, self.history)
        ray.train.report({"epoch": row["epoch"]})

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.history = state["history"]
        if state["clusters"] is not None:
            embedding_dim = state["clusters"]["centers"].shape[1]
            clusters = ClusterModel(self.config.clustering, embedding_dim)
            clusters.load_state_dict(state["clusters"])
            self.clusters = clusters.to(self.device)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self.folder.write_json_lines(layout.METRICS, self.history)

    def _write_encoder(self) -> None:
        """Write the final file, which marks the encoder as complete."""
        state = {name: value.cpu() for name, value in self.model.encoder.grey_state().items()}
        encoder = {
            "format": layout.ENCODER_FORMAT,
            "name": self.feature.encoder,
            "encoder": state,
            "head": {name: value.cpu() for name, value in self.model.head.state_dict().items()},
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
        }
        self.folder.write_bytes(layout.ENCODER, state_to_bytes(encoder))


def _saved_state(folder: Folder) -> dict[str, Any] | None:
    if not folder.exists(layout.STATE):
        return None
    try:
        return state_from_bytes(folder.read_bytes(layout.STATE), f"{folder}/{layout.STATE}")
    except CheckpointError as damage:
        dist.log_once(f"{damage}; restarting the warm-up from scratch")
        return None


def _rows_of_store(store: ImageStore) -> pa.Table:
    """The training slices without labels, with slices of one (likely) subject adjacent.

    A group's name depends on its size (it is the smallest sample_id), so groups are ordered by a
    hash of it: every rank gets large and small ones.
    """
    index = store.index()
    rows = index.filter(pc.equal(index["split"], TRAIN)).select(["sample_id", "split_group_id"])
    groups = rows["split_group_id"].to_pylist()
    order = pa.array([hashlib.sha256(group.encode()).hexdigest() for group in groups], pa.string())
    rows = rows.append_column("order", order)
    return rows.sort_by([("order", "ascending"), ("sample_id", "ascending")])


def _load_slices(
    store: ImageStore, rows: pa.Table, positives: str, side: int, device: torch.device
) -> tuple[Images, Tensor, Groups]:
    """Slices, keys and groups of positives of this rank's share of the rows."""
    first, end = (
        place * len(rows) // dist.world_size() for place in (dist.rank(), dist.rank() + 1)
    )
    mine = rows["sample_id"].to_pylist()[first:end]
    keys = torch.from_numpy(sample_keys(mine)).to(device)
    _, groups = np.unique(rows[_GROUPED_BY[positives]].to_numpy(), return_inverse=True)
    images = torch.from_numpy(read_images(store.folder, mine, TRAIN, side)).to(device)
    return CachedImages(images), keys, Groups(torch.from_numpy(groups[first:end]))
