"""Self-supervised training on one rank: epochs of a pretext, or rounds of refinement."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from brainray import dist, layout
from brainray.clustering.seeding import seed_of
from brainray.config import Config, FeatureConfig
from brainray.engine.finite import naming_slices
from brainray.engine.loop import heartbeat, train_epoch
from brainray.engine.recipe import agreed_precision, build_optimizer, resume_schedule
from brainray.engine.recluster import ClusterModel, Reclustering, recluster, recluster_with_check
from brainray.engine.self_supervised import (
    PretextEpoch,
    PretextSlices,
    SoftTargets,
    build_pretext,
    changed_share,
    check_contrast,
    embed_slices,
    is_refined,
    plan_steps,
)
from brainray.engine.shard import PixelScale, seen_ids
from brainray.engine.state import state_from_bytes, state_to_bytes
from brainray.errors import BrainrayError, CheckpointError, DivergenceError
from brainray.log import Stopwatch
from brainray.models.pretext import PretextModel
from brainray.schema import UNLABELLED, History, Metrics
from brainray.storage import Folder

_REMEDY = (
    "lower self_supervision.learning_rate (or round_learning_rate) or set train.precision=fp32"
)


class Pretrainer:
    """One rank's state between epochs and rounds."""

    def __init__(
        self,
        config: Config,
        feature: FeatureConfig,
        folder: Folder,
        slices: PretextSlices,
        learner: PretextModel,
        model: nn.Module,
        *,
        seed: int,
        scale: PixelScale,
        report: Callable[[Metrics], None] = lambda metrics: None,
    ) -> None:
        """Plan the training (collective).

        Args:
            config: ``self_supervision``, ``clustering`` (for refinement) and ``train``.
            feature: encoder, pretext and weight of the clustering loss.
            folder: of the encoder, with the slices of all ranks (`layout.SEEN`).
            slices: this rank's, on its device.
            learner: to be trained, on this rank's device.
            model: the learner, wrapped in DDP if there are several ranks.
            seed: of views and clusters.
            scale: of the pixels, saved with the encoder.
            report: called on every rank when an epoch or a round is saved.

        Raises:
            BrainrayError: the slices cannot be contrasted.
        """
        self.config = config
        self.settings = config.self_supervision
        self.feature = feature
        self.folder = folder
        self.slices = slices
        self.device = slices.images.device
        self.learner = learner
        self.model = model
        self.seed = seed
        self.scale = scale
        self.report = report
        self.precision = agreed_precision(config.train.precision, self.device)
        self.pretext = build_pretext(feature.pretext, self.settings)
        num_slices = dist.count_across_ranks(len(slices.images), self.device)
        self.plan = plan_steps(num_slices, self.settings.batch_size_per_worker, dist.world_size())
        if feature.pretext == "contrastive":
            groups = dist.gather_rows(slices.groups.numbers.to(self.device))
            check_contrast(self.plan, len(groups.unique()), self.settings)
        self.history: History = []
        self.clusters: ClusterModel | None = None

    def fit(self) -> None:
        """Run the pretext's epochs, or rounds of refinement until assignments settle, from where an
        earlier process has stopped.
        """
        state = self._saved_state()
        if state is not None:
            self._resume(state)
        if self.feature.lambda_cluster > 0:
            self._refine()
        else:
            self._learn_pretext(state)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self._write_encoder()

    def _saved_state(self) -> dict[str, Any] | None:
        """The same on all ranks, which is checked: on a mounted file system, a new file may be
        visible to only some nodes for a while.
        """
        with dist.raise_on_all_ranks(self.device):
            state = _read_state(self.folder)
        num_done = 0 if state is None else len(state["history"])
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
        return state

    def _resume(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["model"])
        self.history = state["history"]
        if state["clusters"] is not None:
            embedding_dim = state["clusters"]["centers"].shape[1]
            clusters = ClusterModel(self.config.clustering, embedding_dim)
            clusters.load_state_dict(state["clusters"])
            self.clusters = clusters.to(self.device)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self.folder.write_json_lines(layout.METRICS, self.history)

    def _learn_pretext(self, state: dict[str, Any] | None) -> None:
        num_epochs = self.settings.num_epochs
        optimizer, scheduler = self._optimizer(
            self.settings.learning_rate, num_epochs * self.plan.num_steps
        )
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            resume_schedule(scheduler, len(self.history) * self.plan.num_steps)
        while len(self.history) < num_epochs:
            stopwatch = Stopwatch()
            epoch = len(self.history) + 1
            losses = self._train_epoch(f"epoch {epoch}", optimizer, scheduler, (epoch,))
            self._save(losses, stopwatch, optimizer)

    def _refine(self) -> None:
        """Cluster and train on the clusters in turn until few slices change their cluster."""
        z = self._embed()
        if self.clusters is None:
            found = self._recluster(z, None, 0, reseed=False)
            self.clusters, responsibilities = found.model, found.responsibilities
            self._keep_assignments(responsibilities, 0)
        else:  # saved encoder and clusters match: they give the same responsibilities again
            responsibilities = self.clusters.responsibilities(z)
        changes = [row["changed_share"] for row in self.history]
        while not is_refined(changes, self.settings):
            stopwatch = Stopwatch()
            number = len(changes) + 1
            losses = self._train_round(number, SoftTargets(responsibilities, self.clusters.centers))
            z = self._embed()
            found, health, has_collapsed = recluster_with_check(
                partial(self._recluster, z, responsibilities, number),
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
            self._save(metrics, stopwatch)

    def _train_round(self, number: int, soft: SoftTargets) -> Metrics:
        """Losses in the last of ``round_epochs`` epochs, which have their own schedule."""
        steps = self.settings.round_epochs * self.plan.num_steps
        optimizer, scheduler = self._optimizer(self.settings.round_learning_rate, steps)
        losses: Metrics = {}
        for epoch in range(self.settings.round_epochs):
            name = f"round {number}, epoch {epoch + 1}"
            losses = self._train_epoch(name, optimizer, scheduler, (-number, epoch), soft)
        return losses

    def _train_epoch(
        self,
        name: str,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        number: tuple[int, ...],
        soft: SoftTargets | None = None,
    ) -> Metrics:
        """Mean losses of one epoch, whose order and views depend on its ``number``.

        All ranks embed with the encoder that is saved: rank 0's buffers are copied to the others.
        """
        name = f"{self.folder.name}, {name}"
        with naming_slices(
            partial(seen_ids, self.folder),
            where=f"self-supervised training, {name}",
            num_steps=self.plan.num_steps,
            remedy=_REMEDY,
        ):
            result = train_epoch(
                self.model,
                optimizer,
                scheduler,
                PretextEpoch(
                    self.slices,
                    self.pretext,
                    self.plan,
                    seed_of(self.seed, *number, dist.rank()),
                    self.feature.lambda_cluster,
                    soft,
                ),
                precision=self.precision,
                on_step=heartbeat(name, self.plan.num_steps),
            )
        if not all(bool(part.isfinite().all()) for part in self.learner.parameters()):
            # The last step's effect on the weights; every run would reuse this encoder.
            raise DivergenceError(
                f"self-supervised training, {name}: a weight is NaN or infinite: {_REMEDY}"
            )
        dist.share_buffers(self.learner)
        return result.losses

    def _optimizer(self, learning_rate: float, steps: int) -> tuple[Optimizer, LRScheduler]:
        train = self.config.train.model_copy(update={"learning_rate": learning_rate})
        return build_optimizer(self.learner, train, steps)

    def _embed(self) -> Tensor:
        return embed_slices(
            self.learner.encoder,
            self.slices.images,
            batch_size=self.config.train.embed_batch_size,
            precision=self.precision,
        )

    def _recluster(
        self, z: Tensor, responsibilities: Tensor | None, number: int, reseed: bool
    ) -> Reclustering:
        """Start from the previous centres, or from none, with another seed, if ``reseed``."""
        return recluster(
            z,
            self.slices.keys,
            torch.full_like(self.slices.keys, UNLABELLED),
            config=self.config.clustering,
            num_classes=0,
            seed=seed_of(self.seed, number) if reseed else self.seed,
            previous=None if reseed else self.clusters,
            previous_responsibilities=responsibilities,
        )

    def _keep_assignments(self, responsibilities: Tensor, number: int) -> None:
        """Save every slice's cluster after a round, for later comparison with labels."""
        keys = dist.gather_rows(self.slices.keys).cpu()
        clusters = dist.gather_rows(responsibilities.argmax(dim=1)).cpu()
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                # Slices are distributed over ranks by group; sorting by key makes the order unique.
                order = torch.argsort(keys)
                table = pa.table({"key": keys[order].numpy(), "cluster": clusters[order].numpy()})
                (self.folder / layout.ROUNDS).write_table(f"round-{number:03d}.parquet", table)

    def _save(
        self, metrics: Metrics, stopwatch: Stopwatch, optimizer: Optimizer | None = None
    ) -> None:
        """Checkpoint an epoch or round, then log it."""
        epoch = float(len(self.history) + 1)
        self.history.append({"epoch": epoch, **metrics, "seconds": stopwatch.total})
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                state = {
                    "model": self.learner.state_dict(),
                    "history": self.history,
                    "optimizer": None if optimizer is None else optimizer.state_dict(),
                    "clusters": None if self.clusters is None else self.clusters.state_dict(),
                }
                self.folder.write_bytes(layout.STATE, state_to_bytes(state))
                self.folder.write_json_lines(layout.METRICS, self.history)
        self.report({"epoch": epoch})

    def _write_encoder(self) -> None:
        """Write the final file, which marks the encoder as complete."""
        encoder, head = self.learner.encoder.grey_state(), self.learner.head.state_dict()
        content = {
            "format": layout.ENCODER_FORMAT,
            "name": self.feature.encoder,
            "encoder": {name: value.cpu() for name, value in encoder.items()},
            "head": {name: value.cpu() for name, value in head.items()},
            "pixel_mean": self.scale.mean,
            "pixel_std": self.scale.std,
        }
        self.folder.write_bytes(layout.ENCODER, state_to_bytes(content))


def _read_state(folder: Folder) -> dict[str, Any] | None:
    if not folder.exists(layout.STATE):
        return None
    try:
        return state_from_bytes(folder.read_bytes(layout.STATE), f"{folder}/{layout.STATE}")
    except CheckpointError as damage:
        dist.log_once(f"{damage}; restarting the warm-up from scratch")
        return None
