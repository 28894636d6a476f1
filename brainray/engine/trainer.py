"""Training on one rank: train, re-cluster, evaluate and save, epoch by epoch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import pyarrow as pa
import torch
from torch import Tensor, nn

from brainray import dist, layout
from brainray.clustering.seeding import seed_of
from brainray.config import Config
from brainray.engine.average import MovingAverage, measure_batch_statistics
from brainray.engine.epoch import (
    EpochData,
    embed,
    plan_epoch,
)
from brainray.engine.evaluate import epoch_metrics
from brainray.engine.finite import name_slices, naming_slices
from brainray.engine.loop import EpochResult, heartbeat, train_epoch
from brainray.engine.predictions import Predictions, gather_predictions, predictions_table
from brainray.engine.pseudo_labels import class_shares, class_shift, pseudo_labels
from brainray.engine.recipe import (
    PRECISION_BITS,
    agreed_precision,
    build_objective,
    build_optimizer,
    image_side,
    ramp,
    resume_schedule,
)
from brainray.engine.recluster import (
    CheckedReclustering,
    ClusterModel,
    Reclustering,
    recluster,
    recluster_with_check,
)
from brainray.engine.selection import chosen_epoch, reported_metrics, validation_metrics
from brainray.engine.shard import Images, PixelScale, RankData, SliceShard, ids_of_keys, seen_ids
from brainray.engine.state import (
    Checkpoint,
    TrainerState,
    checkpoint_bytes,
    delete_other_predictions,
    keep_as_best,
    load_checkpoint,
    load_resumable,
    newest_readable_epoch,
    restore_best,
    rows_of_keys,
    save_resumable,
)
from brainray.errors import DivergenceError
from brainray.log import Stopwatch
from brainray.models.encoder import Encoder, EncoderOutput
from brainray.models.objective import StepSizes, Targets
from brainray.schema import FITTED, History, Metrics
from brainray.storage import Folder

_REMEDY = "lower train.learning_rate or set train.precision=fp32"

Report = Callable[[Metrics, Folder], None]
"""Called on every rank when an epoch is saved, with its metrics and its checkpoint's folder."""


@dataclass(frozen=True)
class _LastEpoch:
    """A mixture, and what it and the encoder say of this rank's fitted slices: labelled, then
    unlabelled.
    """

    clusters: ClusterModel
    responsibilities: Tensor  # (n, K)
    probabilities: Tensor  # (n, C)


class Trainer:
    """One rank's state between epochs, and the steps of an epoch."""

    def __init__(
        self,
        config: Config,
        run: Folder,
        data: RankData,
        test_slices: pa.Table,
        encoder: Encoder,
        model: nn.Module,
        *,
        classes: list[str],
        scale: PixelScale,
        report: Report = lambda metrics, folder: None,
    ) -> None:
        """Build what training needs besides the data (collective).

        Args:
            config: of the run.
            run: its folder, with its label draw (`layout.SEEN`).
            data: this rank's slices, on its device.
            test_slices: those of all ranks; only the first rank needs all their columns.
            encoder: to be trained, on this rank's device.
            model: the encoder, wrapped in DDP if there are several ranks.
            classes: C class names in the order of their indices.
            scale: of the pixels.
            report: called when an epoch is saved.
        """
        self.config = config
        self.run = run
        self.classes = classes
        self.scale = scale
        self.data = data
        self.device = data.labelled.images.device
        self.report = report
        self.precision = agreed_precision(config.train.precision, self.device)
        self.objective = build_objective(config.objective)
        self.encoder = encoder
        num_unlabelled = self._count(data.unlabelled)
        batch = StepSizes(
            config.train.labelled_batch_size_per_worker, config.train.batch_size_per_worker
        )
        plan = plan_epoch(
            self.objective,
            self._count(data.labelled),
            num_unlabelled,
            batch,
            dist.world_size(),
        )
        self.num_steps, self.sizes = plan.num_steps, plan.sizes
        leaves_out = self.objective.uses_unlabelled and not self.sizes.unlabelled
        if leaves_out and num_unlabelled:
            dist.log_once(
                f"note: {num_unlabelled} unlabelled slices are fewer than a batch of "
                f"{batch.unlabelled}: they are clustered but not used for training"
            )
        self.typical = data.unlabelled if plan.is_mostly_unlabelled else data.labelled
        self.updates = -(-self.num_steps // config.train.accumulation_steps)  # per epoch
        self.optimizer, self.scheduler = build_optimizer(
            self.encoder, config.train, self.updates * config.train.num_epochs
        )
        self.model = model
        decay = config.train.ema_decay
        self.average = MovingAverage(self.encoder, decay) if decay else None
        if config.train.compile:
            self.model.compile()
        self.test_slices = test_slices
        self._tests_each_epoch = config.evaluation.test_each_epoch
        self.epoch = 0
        self.history: History = []
        self._last: _LastEpoch | None = None

    @property
    def evaluated(self) -> Encoder:
        """The encoder used for embedding, evaluation and checkpoints: the average, if enabled."""
        return self.encoder if self.average is None else self.average.network

    @property
    def _side(self) -> int:
        """Height and width of the slices in this epoch, in pixels."""
        return image_side(max(self.epoch, 1), self.config.train)

    @property
    def last(self) -> _LastEpoch:
        """From the end of the last epoch, used in the next."""
        assert self._last is not None, "no mixture has been fitted yet"
        return self._last

    def fit(self) -> None:
        """Train to the last epoch, from the newest readable checkpoint if there is one."""
        with dist.raise_on_all_ranks(self.device):
            newest = newest_readable_epoch(self.run) if dist.rank() == 0 else 0
        # All ranks resume from one checkpoint, even if storage shows a new file to only some.
        epoch = int(dist.broadcast_from_first(torch.tensor(newest, device=self.device)))
        with dist.raise_on_all_ranks(self.device):
            if epoch:
                self.resume(epoch)
        self.start()
        while self.epoch < self.config.train.num_epochs:
            self.run_epoch()
        self.finish()

    def start(self) -> None:
        """Fit the first mixture with the initial encoder, unless the run resumes with one."""
        ranks = f"{dist.world_size()} rank" + ("s" if dist.world_size() > 1 else "")
        dist.log_once(
            f"training on {ranks} ({self.device.type}, {self.precision}), "
            f"{self.num_steps} steps per epoch"
        )
        if self._last is None:
            dist.log_once("clustering the slices with the initial encoder")
            fitted = self._embed_fitted()
            self._continue_with(self._recluster(fitted), fitted)

    def resume(self, epoch: int) -> None:
        """Resume from an epoch's checkpoint; uses no collectives."""
        saved, state = load_resumable(self.run, epoch)
        self.evaluated.load_state_dict(saved.encoder.state_dict())
        if self.average is not None:
            assert state.trained is not None, "an averaged run saves its trained weights"
            self.encoder.load_state_dict(state.trained)
            self.average.has_begun = True  # else the next update would restart the average
        self.optimizer.load_state_dict(state.optimizer)
        keys = self.data.fitted_keys.cpu()
        responsibilities = rows_of_keys(state.keys, state.responsibilities, keys)
        probabilities = rows_of_keys(state.keys, state.probabilities, keys)
        self._last = _LastEpoch(
            saved.clusters.to(self.device),
            responsibilities.to(self.device),
            probabilities.to(self.device),
        )
        self.epoch = saved.epoch
        # The schedule is a function of the step, even if the number of ranks has changed.
        resume_schedule(self.scheduler, self.epoch * self.updates)
        # The log has report times of an epoch that its checkpoint could not contain yet.
        logged = {row["epoch"]: row for row in self.run.read_json_lines(layout.METRICS)}
        self.history = [logged.get(row["epoch"], row) for row in state.history]
        dist.log_once(f"resuming run after epoch {self.epoch}")
        if dist.rank() == 0:
            restore_best(self.run, chosen_epoch(self.history))
            self.run.write_json_lines(layout.METRICS, self.history)

    def run_epoch(self) -> None:
        """Train, embed, re-cluster, evaluate the matching pair, and save it."""
        stopwatch = Stopwatch()
        self.epoch += 1
        targets, shift = self._targets()
        trained = self._train_epoch(targets)
        stopwatch.lap("train")
        self._settle_batch_statistics()
        fitted = self._embed_fitted()
        stopwatch.lap("embed")
        reclustering, health, collapsed = self._recluster_with_check(fitted)
        self._continue_with(reclustering, fitted)
        stopwatch.lap("recluster")
        validation = self._predict(self.data.validation, self.evaluated, self.last.clusters)
        test = None
        if self._tests_each_epoch:
            test = self._predict(self.data.test, self.evaluated, self.last.clusters)
        metrics = self._training_metrics(trained, shift) | validation_metrics(validation)
        metrics |= {f"cluster/{name}": value for name, value in asdict(health).items()}
        metrics |= {
            "cluster/collapsed": float(collapsed),
            "cluster/kmeans_iterations": float(reclustering.kmeans_iterations),
            "cluster/gmm_iterations": float(reclustering.gmm_iterations),
            "cluster/num_reseeded": float(reclustering.num_reseeded),
        }
        if test is not None and len(test.labels) and dist.rank() == 0:
            # For logging only: training never reads them.
            metrics |= epoch_metrics(test, self.test_slices, self.classes)
        stopwatch.lap("evaluate")
        self._save(metrics, fitted.z, test, stopwatch)

    def _training_metrics(self, trained: EpochResult, class_shift: float) -> dict[str, float]:
        metrics = {"epoch": float(self.epoch)}
        metrics |= {f"train/loss/{name}": value for name, value in trained.losses.items()}
        if self.sizes.unlabelled:
            metrics["train/class_shift"] = class_shift
        metrics["time/data_wait_s"] = trained.data_wait_s
        metrics["train/image_size"] = float(self._side)
        metrics["train/num_workers"] = float(dist.world_size())
        metrics["train/precision_bits"] = float(PRECISION_BITS[self.precision])
        metrics["train/learning_rate"] = float(self.scheduler.get_last_lr()[0])
        return metrics

    def finish(self) -> None:
        """Save the last epoch's checkpoint next to the best one, and predict the test slices with
        both, unless their predictions exist (``test_each_epoch``).
        """
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                last = checkpoint_bytes(self._checkpoint())
                (self.run / layout.LAST).write_bytes(layout.MODEL, last)
        if self._count(self.data.test):
            for epoch in self._untested_epochs():
                self._test(epoch)

    def _untested_epochs(self) -> list[int]:
        """Of the chosen and the last epoch, those whose test slices are to be predicted."""
        untested = [0, 0]
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                # Even with test_each_epoch those of the chosen one may be lost: if an epoch that
                # was chosen later had a checkpoint that was damaged.
                untested = [
                    0
                    if self._tests_each_epoch and self.run.exists(layout.predictions_file(epoch))
                    else epoch
                    for epoch in (load_checkpoint(self.run / layout.BEST).epoch, self.epoch)
                ]
        found = dist.broadcast_from_first(torch.tensor(untested, device=self.device))
        return sorted(set(found.tolist()) - {0})

    def _test(self, epoch: int) -> None:
        """Write the predictions of the test slices by the last or the best epoch's model."""
        encoder, clusters = self.evaluated, self.last.clusters
        if epoch != self.epoch:
            with dist.raise_on_all_ranks(self.device):
                best = load_checkpoint(self.run / layout.BEST)
            encoder = best.encoder.to(self.device).to(memory_format=torch.channels_last)
            clusters = best.clusters.to(self.device)
        test = self._predict(self.data.test, encoder, clusters)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self._write_predictions(epoch, test)

    def _write_predictions(self, epoch: int, test: Predictions) -> None:
        table = predictions_table(test, self.classes, self.test_slices)
        self.run.write_table(layout.predictions_file(epoch), table)

    def _train_epoch(self, targets: Targets) -> EpochResult:
        config = self.config
        with naming_slices(
            partial(seen_ids, self.run),
            where=f"epoch {self.epoch}",
            num_steps=self.num_steps,
            remedy=_REMEDY,
        ):
            return train_epoch(
                self.model,
                self.optimizer,
                self.scheduler,
                EpochData(
                    labelled=self.data.labelled,
                    unlabelled=self.data.unlabelled,
                    objective=self.objective,
                    targets=targets,
                    sizes=self.sizes,
                    num_steps=self.num_steps,
                    scale=self.scale,
                    augmentation=config.augment,
                    augmentation_unlabelled=config.augment_unlabelled,
                    seed=seed_of(config.seed, self.epoch, dist.rank()),
                    side=self._side,
                    mixup_alpha=config.train.mixup_alpha,
                ),
                precision=self.precision,
                accumulation=config.train.accumulation_steps,
                on_update=self._update_average,
                on_step=heartbeat(f"epoch {self.epoch}", self.num_steps),
            )

    def _targets(self) -> tuple[Targets, float]:
        """Targets for the unlabelled slices from the last epoch, and its class shift."""
        first = len(self.data.labelled)
        rows = slice(first, first + len(self.data.unlabelled))
        last = self.last
        probabilities = last.probabilities[rows]
        shares = class_shares(self.data.labelled.labels, len(self.classes))
        believed = pseudo_labels(probabilities, shares).overridden_by(self.data.inherited)
        targets = Targets(
            responsibilities=last.responsibilities[rows],
            pseudo_labels=believed.labels,
            confidences=believed.confidences,
            centers=last.clusters.centers,
            class_of_cluster=last.clusters.class_of_cluster,
            ramp=ramp(self.epoch, self.config.objective.ramp_epochs),
        )
        return targets, class_shift(probabilities, shares)

    def _update_average(self, num_batches: int) -> None:
        if self.average is not None:
            self.average.update(self.encoder, num_batches * dist.world_size())

    def _settle_batch_statistics(self) -> None:
        """Measure the average's batch statistics; then copy rank 0's buffers to every rank.

        Since the last step, each rank's batch normalisation has its own statistics, but all slices
        must be embedded with one encoder, the one that is saved.
        """
        if self.average is not None:
            measure_batch_statistics(
                self.evaluated,
                self.typical.images,
                augmentation=self.config.augment_unlabelled,
                scale=self.scale,
                batch_size=self.config.train.embed_batch_size,
                precision=self.precision,
                side=self._side,
            )
        encoders = [self.encoder] if self.average is None else [self.encoder, self.evaluated]
        for encoder in encoders:
            dist.share_buffers(encoder)

    def _embed(self, images: Images, encoder: Encoder) -> EncoderOutput:
        return embed(
            encoder,
            images,
            scale=self.scale,
            batch_size=self.config.train.embed_batch_size,
            precision=self.precision,
            side=self._side,
        )

    def _embed_fitted(self) -> EncoderOutput:
        """Embed the slices that the mixture is fitted on: labelled, then unlabelled.

        Raises:
            DivergenceError: on every rank, if embeddings or logits are NaN or infinite.
        """
        shards = (self.data.labelled, self.data.unlabelled)
        parts = [self._embed(shard.images, self.evaluated) for shard in shards]
        fitted = EncoderOutput(
            torch.cat([part.z for part in parts]), torch.cat([part.logits for part in parts])
        )
        finite = torch.isfinite(fitted.z).all(dim=1) & torch.isfinite(fitted.logits).all(dim=1)
        bad = dist.gather_rows(self.data.fitted_keys[~finite])
        if len(bad):
            raise DivergenceError(
                f"epoch {self.epoch}: NaN or infinite embeddings or logits after {self.num_steps} "
                f"steps for {name_slices(seen_ids(self.run), bad)}: {_REMEDY}"
            )
        return fitted

    def _recluster_with_check(self, fitted: EncoderOutput) -> CheckedReclustering:
        return recluster_with_check(
            partial(self._recluster, fitted),
            fitted.z,
            self.last.responsibilities,
            self.config.clustering,
            where=f"epoch {self.epoch}",
            remedy="lower objective.lambda_cluster or train.learning_rate, or warm up the encoder "
            "before the cluster loss starts",
        )

    def _recluster(self, fitted: EncoderOutput, reseed: bool = False) -> Reclustering:
        """Start from the previous centres, or from none, with another seed, if ``reseed``."""
        last = self._last
        return recluster(
            fitted.z,
            self.data.fitted_keys,
            torch.cat([self.data.labelled.labels, self.data.unlabelled.labels]),
            config=self.config.clustering,
            num_classes=len(self.classes),
            seed=seed_of(self.config.seed, self.epoch) if reseed else self.config.seed,
            previous=None if reseed or last is None else last.clusters,
            previous_responsibilities=None if last is None else last.responsibilities,
        )

    def _continue_with(self, found: Reclustering, fitted: EncoderOutput) -> None:
        """Use a mixture, and the logits of the slices that it was fitted on, in the next epoch."""
        self._last = _LastEpoch(found.model, found.responsibilities, fitted.logits.softmax(dim=1))

    def _predict(self, shard: SliceShard, encoder: Encoder, clusters: ClusterModel) -> Predictions:
        output = self._embed(shard.images, encoder)
        return gather_predictions(clusters, output, shard.keys, shard.labels)

    def _save(
        self,
        metrics: dict[str, float],
        z: Tensor,
        test: Predictions | None,
        stopwatch: Stopwatch,
    ) -> None:
        """Write the checkpoint, then the logs: a logged epoch can always be resumed from."""
        metrics |= {f"time/{stage}_s": spent for stage, spent in stopwatch.seconds.items()}
        step_size = (self.sizes.labelled + self.sizes.unlabelled) * dist.world_size()
        metrics["time/epoch_s"] = stopwatch.total  # until the checkpoint
        rate = self.num_steps * step_size / stopwatch.seconds["train"]
        metrics["time/images_per_s"] = rate
        metrics["time/images_per_s_per_worker"] = rate / dist.world_size()
        self.history.append(metrics)
        keys = dist.gather_rows(self.data.fitted_keys)
        responsibilities = dist.gather_rows(self.last.responsibilities)
        probabilities = dist.gather_rows(self.last.probabilities)
        coordinates = dist.gather_rows(self.last.clusters.coordinates(z))
        log_likelihood = dist.gather_rows(self.last.clusters.log_likelihood(z))
        state = TrainerState(
            self.optimizer.state_dict(),
            keys,
            responsibilities,
            probabilities,
            None if self.average is None else self.encoder.state_dict(),
            self.history,
        )
        reported = reported_metrics(self.history)
        with dist.raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self._write(state, coordinates, log_likelihood, test, stopwatch)
        self.report(reported, self.run / layout.checkpoint_folder(self.epoch))

    def _write(
        self,
        state: TrainerState,
        coordinates: Tensor,
        log_likelihood: Tensor,
        test: Predictions | None,
        stopwatch: Stopwatch,
    ) -> None:
        """Write the epoch's files (on rank 0), and last the log line that marks it as finished."""
        until_here = stopwatch.total
        checkpoint = self._checkpoint()
        is_chosen = chosen_epoch(self.history) == self.epoch
        kept = {*self.config.evaluation.tsne_epochs, self.config.train.num_epochs}
        if test is not None and len(test.labels) and (is_chosen or self.epoch in kept):
            self._write_predictions(self.epoch, test)
        fitted = None
        if is_chosen:
            fitted = self._fitted_table(state.keys, coordinates, log_likelihood)
        save_resumable(self.run, checkpoint, state, fitted)
        if is_chosen:  # and those chosen before no longer are
            keep_as_best(self.run, self.epoch)
            delete_other_predictions(self.run, {*kept, self.epoch})
        metrics = self.history[-1]
        metrics["time/epoch_s"] = stopwatch.total
        metrics["time/report_s"] = metrics["time/epoch_s"] - until_here
        self.run.write_json_lines(layout.METRICS, self.history)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.config, self.classes, self.scale, self.epoch, self.evaluated, self.last.clusters
        )

    def _fitted_table(self, keys: Tensor, coordinates: Tensor, log_likelihood: Tensor) -> pa.Table:
        return pa.Table.from_pydict(
            {
                "sample_id": ids_of_keys(seen_ids(self.run), keys),
                "coordinates": list(coordinates.cpu().numpy()),
                "log_likelihood": log_likelihood.cpu().numpy(),
            },
            schema=FITTED.with_metadata({layout.EPOCH_OF_FITTED: str(self.epoch)}),
        )

    def _count(self, shard: SliceShard) -> int:
        return dist.count_across_ranks(len(shard), self.device)
