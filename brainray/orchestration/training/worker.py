"""Training worker on each rank of Ray Train: train, re-cluster, evaluate and report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from brainray import dist, layout
from brainray.clustering.seeding import seed_of
from brainray.config import Config
from brainray.config_text import parse_config
from brainray.engine.epoch import (
    EpochData,
    EpochResult,
    EpochTargets,
    embed,
    measure_batch_statistics,
    plan_epoch,
    train_epoch,
)
from brainray.engine.evaluate import (
    MODEL_LOST,
    Predictions,
    chosen_epoch,
    confusion_metrics,
    gather_predictions,
    predictions_table,
    subset_metrics,
    validation_metrics,
)
from brainray.engine.finite import NonFiniteStep
from brainray.engine.pseudo_labels import class_shares, class_shift, pseudo_labels
from brainray.engine.recipe import (
    PRECISION_BITS,
    agreed_precision,
    build_average,
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
    recluster_in_health,
)
from brainray.engine.shard import Images, PixelScale, RankData, SliceShard, sample_keys
from brainray.engine.state import (
    Checkpoint,
    Resumable,
    TrainerState,
    checkpoint_bytes,
    delete_other_predictions,
    has_lost_models,
    keep_as_best,
    load_checkpoint,
    load_resumable,
    newest_readable_epoch,
    rows_of_keys,
    save_resumable,
)
from brainray.errors import DivergenceError
from brainray.log import log
from brainray.models.encoder import Encoder, EncoderOutput, build_encoder
from brainray.models.objective import StepSizes
from brainray.orchestration.pretraining.features import State
from brainray.orchestration.ray_train import (
    configure_rank,
    distributed,
    raise_on_all_ranks,
    return_user_errors,
)
from brainray.orchestration.run import Run
from brainray.orchestration.store import ImageStore
from brainray.orchestration.training.rank_data import load_rank_data
from brainray.schema import FITTED, has_class_support, subset_masks
from brainray.storage import Folder

_HEARTBEAT_S = 30.0
_MAX_NAMED = 8  # slices in an error
_MAX_CONFUSED = 20  # classes: with more, the confusion matrix is not logged every epoch


@return_user_errors
def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point on every rank."""
    config, start = parse_config(settings["config"]), ray.get(settings["start"])
    _train(config, start, Folder(settings["run"]), Folder(settings["store"]))


def _train(config: Config, start: State, run: Folder, store_folder: Folder) -> None:
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    configure_rank()
    torch.manual_seed(config.seed)
    with raise_on_all_ranks(device):
        store = ImageStore.open(store_folder, Run.open(run).record.data_hash)
        rank, num_ranks = context.get_world_rank(), context.get_world_size()
        data = load_rank_data(config, run, store, device, rank, num_ranks)
        encoder = build_encoder(config.encoder.name, start, len(store.manifest.classes))
        # Only the first rank makes predictions of them that need more.
        test_slices = run.read_table(layout.TEST_SLICES, None if rank == 0 else ["sample_id"])
    trainer = _Trainer(config, run, store, data, test_slices, encoder, device)
    with raise_on_all_ranks(device):
        newest = newest_readable_epoch(run) if rank == 0 else 0
        lost = rank == 0 and has_lost_models(run, newest)
    # All ranks resume from one checkpoint, even if storage shows a new file to only some of them.
    found = dist.broadcast_from_first(torch.tensor([newest, int(lost)], device=device))
    epoch, has_lost = found.tolist()
    with raise_on_all_ranks(device):
        if epoch:
            trainer.resume(epoch, has_lost_models=bool(has_lost))
    trainer.start()
    while trainer.epoch < config.train.num_epochs:
        trainer.run_epoch()
    trainer.finish()


@dataclass(frozen=True)
class _LastEpoch:
    """A mixture, and what it and the encoder say of this rank's fitted slices: labelled, then
    unlabelled.
    """

    clusters: ClusterModel
    responsibilities: Tensor  # (n, K)
    probabilities: Tensor  # (n, C)


class _Timer:
    """Seconds since the beginning of an epoch, and those spent in its parts."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        elapsed = time.monotonic() - started
        self.seconds[part] = self.seconds.get(part, 0.0) + elapsed

    @property
    def total(self) -> float:
        return time.monotonic() - self._started


class _Trainer:
    """One rank's state between epochs, and the steps of an epoch."""

    def __init__(
        self,
        config: Config,
        run: Folder,
        store: ImageStore,
        data: RankData,
        test_slices: pa.Table,
        encoder: Encoder,
        device: torch.device,
    ) -> None:
        self.config = config
        self.run = run
        self.classes = store.manifest.classes
        self.scale = PixelScale(store.manifest.pixel_mean, store.manifest.pixel_std)
        self.data = data
        self.device = device
        self.precision = agreed_precision(config.train.precision, device)
        self.objective = build_objective(config.objective)
        self.encoder: Encoder = encoder.to(device).to(memory_format=torch.channels_last)
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
        if leaves_out and num_unlabelled and dist.rank() == 0:
            log(
                f"note: {num_unlabelled} unlabelled slices are fewer than a batch of "
                f"{batch.unlabelled}: they are clustered but not used for training"
            )
        self.typical = data.unlabelled if plan.is_mostly_unlabelled else data.labelled
        self.updates = -(-self.num_steps // config.train.accumulation_steps)  # per epoch
        self.optimizer, self.scheduler = build_optimizer(
            self.encoder, config.train, self.updates * config.train.num_epochs
        )
        self.model = distributed(self.encoder)
        self.average = build_average(self.encoder, config.train.ema_decay)
        if config.train.compile:
            self.model.compile()
        self.test_slices = test_slices
        self._tests_each_epoch = config.evaluation.test_each_epoch
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self._last: _LastEpoch | None = None

    @property
    def evaluated(self) -> Encoder:
        """The encoder used for embedding, evaluation and checkpoints: the average, if enabled."""
        return self.encoder if self.average is None else cast(Encoder, self.average.module)

    @property
    def _side(self) -> int:
        """Height and width of the slices in this epoch, in pixels."""
        return image_side(max(self.epoch, 1), self.config.train)

    @property
    def last(self) -> _LastEpoch:
        """From the end of the last epoch, used in the next."""
        assert self._last is not None, "no mixture has been fitted yet"
        return self._last

    def start(self) -> None:
        """Fit the first mixture with the initial encoder, unless the run resumes with one."""
        if dist.rank() == 0:
            ranks = f"{dist.world_size()} rank" + ("s" if dist.world_size() > 1 else "")
            log(
                f"training on {ranks} ({self.device.type}, {self.precision}), "
                f"{self.num_steps} steps per epoch"
            )
        if self._last is None:
            if dist.rank() == 0:
                log("clustering the slices with the initial encoder")
            fitted = self._embed_fitted()
            self._continue_with(self._recluster(fitted), fitted)

    def resume(self, epoch: int, *, has_lost_models: bool) -> None:
        """Resume from an epoch's checkpoint; uses no collectives."""
        newest = load_resumable(self.run, epoch)
        saved, state = newest.checkpoint, newest.trainer
        self.evaluated.load_state_dict(saved.encoder.state_dict())
        if self.average is not None:
            assert state.trained is not None, "an averaged run saves its trained weights"
            self.encoder.load_state_dict(state.trained)
            self.average.n_averaged.fill_(1)  # with 0, the next update would restart the average
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
        if has_lost_models:
            self.history = [row | {MODEL_LOST: 1.0} for row in self.history]
        if dist.rank() == 0:
            log(f"resuming run after epoch {self.epoch}")
            keep_as_best(self.run, self.epoch)  # an interrupted job may not have done so
            self.run.write_json_lines(layout.METRICS, self.history)

    def run_epoch(self) -> None:
        """Train, embed, re-cluster, evaluate the matching pair, and save it."""
        timer = _Timer()
        self.epoch += 1
        with timer.measure("train"):
            targets, shift = self._targets()
            trained = self._train_epoch(targets)
        with timer.measure("embed"):
            self._settle_batch_statistics()
            fitted = self._embed_fitted()
        with timer.measure("recluster"):
            reclustering, health, collapsed = self._recluster_in_health(fitted)
            self._continue_with(reclustering, fitted)
        with timer.measure("evaluate"):
            validation = self._predict(self.data.validation)
            test = self._predict(self.data.test) if self._tests_each_epoch else None
        metrics = self._training_metrics(trained, shift) | validation_metrics(validation)
        metrics |= {f"cluster/{name}": value for name, value in asdict(health).items()}
        metrics |= {
            "cluster/collapsed": float(collapsed),
            "cluster/kmeans_iterations": float(reclustering.kmeans_iterations),
            "cluster/gmm_iterations": float(reclustering.gmm_iterations),
            "cluster/num_reseeded": float(reclustering.num_reseeded),
        }
        if test is not None:
            with timer.measure("evaluate"):
                metrics |= self._test_metrics(test)
        self._save(metrics, fitted.z, test, timer)

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
        """Save the last epoch's checkpoint next to the best one, and predict the test slices.

        Prediction uses the chosen epoch, unless its predictions exist (``test_each_epoch``).
        """
        with raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                last = checkpoint_bytes(self._checkpoint())
                (self.run / layout.LAST).write_bytes(layout.MODEL, last)
        if self._count(self.data.test) == 0:
            return
        with raise_on_all_ranks(self.device):
            found = False
            if dist.rank() == 0 and self._tests_each_epoch:
                # They are lost if an epoch that was chosen later had a checkpoint that was damaged.
                epoch = load_checkpoint(self.run / layout.BEST).epoch
                found = self.run.exists(layout.predictions_file(epoch))
        if dist.broadcast_from_first(torch.tensor(int(found), device=self.device)):
            return
        with raise_on_all_ranks(self.device):
            chosen = load_checkpoint(self.run / layout.BEST)
        clusters = chosen.clusters.to(self.device)
        encoder = chosen.encoder.to(self.device).to(memory_format=torch.channels_last)
        output = self._embed(self.data.test.images, encoder)
        test = self._gathered(self.data.test, output, clusters)
        with raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                table = predictions_table(test, self.classes, self.test_slices)
                self.run.write_table(layout.predictions_file(chosen.epoch), table)

    def _train_epoch(self, targets: EpochTargets) -> EpochResult:
        config = self.config
        try:
            return train_epoch(
                self.model,
                self.optimizer,
                self.scheduler,
                self.objective,
                EpochData(
                    labelled=self.data.labelled,
                    unlabelled=self.data.unlabelled,
                    targets=targets,
                    sizes=self.sizes,
                    num_steps=self.num_steps,
                    scale=self.scale,
                    augmentation=config.augment,
                    augmentation_unlabelled=config.augment_unlabelled,
                    seed=seed_of(config.seed, self.epoch, dist.rank()),
                    side=self._side,
                    mixup_alpha=config.train.mixup_alpha,
                    labelled_weights=self.data.labelled_weights,
                ),
                precision=self.precision,
                accumulation=config.train.accumulation_steps,
                on_update=self._update_average,
                on_step=self._heartbeat(),
            )
        except NonFiniteStep as stop:
            culprits = dist.gather_rows(stop.culprits)
            named = culprits if len(culprits) else dist.gather_rows(stop.batch)
            raise DivergenceError(
                f"epoch {self.epoch}, step {stop.step + 1} of {self.num_steps}: the loss or its "
                f"gradient is NaN or infinite for {self._samples(named)}: lower "
                "train.learning_rate or set train.precision=fp32"
            ) from None

    def _targets(self) -> tuple[EpochTargets, float]:
        """Targets for the unlabelled slices from the last epoch, and its class shift."""
        first = len(self.data.labelled)
        rows = slice(first, first + len(self.data.unlabelled))
        last = self.last
        probabilities = last.probabilities[rows]
        shares = class_shares(self.data.labelled.labels, len(self.classes))
        believed = pseudo_labels(probabilities, shares).overridden_by(self.data.inherited)
        targets = EpochTargets(
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
            self.average.update_parameters(self.encoder, num_batches * dist.world_size())

    def _settle_batch_statistics(self) -> None:
        """Measure the average's batch statistics; then copy those of rank 0 to every rank.

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

    def _heartbeat(self) -> Callable[[int], None]:
        last = time.monotonic()

        def on_step(step: int) -> None:
            nonlocal last
            if dist.rank() == 0 and time.monotonic() - last > _HEARTBEAT_S:
                last = time.monotonic()
                log(f"epoch {self.epoch}: step {step + 1} of {self.num_steps}")

        return on_step

    def _embed(self, images: Images, encoder: Encoder | None = None) -> EncoderOutput:
        return embed(
            self.evaluated if encoder is None else encoder,
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
        parts = [self._embed(self.data.labelled.images), self._embed(self.data.unlabelled.images)]
        fitted = EncoderOutput(
            torch.cat([part.z for part in parts]), torch.cat([part.logits for part in parts])
        )
        finite = torch.isfinite(fitted.z).all(dim=1) & torch.isfinite(fitted.logits).all(dim=1)
        bad = dist.gather_rows(self.data.fitted_keys[~finite])
        if len(bad):
            raise DivergenceError(
                f"epoch {self.epoch}: NaN or infinite embeddings or logits after {self.num_steps} "
                f"steps for {self._samples(bad)}: lower train.learning_rate or set "
                "train.precision=fp32"
            )
        return fitted

    def _samples(self, keys: Tensor) -> str:
        """The slices with these keys (n,), for error messages."""
        found = sorted(set(self._ids_of(keys)))
        shown = ", ".join(found[:_MAX_NAMED])
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        return f"sample_id {shown}{more}"

    def _recluster_in_health(self, fitted: EncoderOutput) -> CheckedReclustering:
        return recluster_in_health(
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

    def _predict(self, shard: SliceShard) -> Predictions:
        return self._gathered(shard, self._embed(shard.images), self.last.clusters)

    def _gathered(
        self, shard: SliceShard, output: EncoderOutput, clusters: ClusterModel
    ) -> Predictions:
        return gather_predictions(clusters, output.z, output.logits, shard.keys, shard.labels)

    def _test_metrics(self, test: Predictions) -> dict[str, float]:
        """Test metrics of this epoch, for logging only: training never reads them."""
        if dist.rank() != 0 or len(test.labels) == 0:
            return {}
        metrics: dict[str, float] = {}
        for subset, mask in subset_masks(self.test_slices).items():
            chosen = test.select(mask)
            metrics |= subset_metrics(chosen, self.classes, subset)
            if len(self.classes) <= _MAX_CONFUSED and has_class_support(
                chosen.labels.tolist(), subset
            ):
                metrics |= confusion_metrics(chosen, self.classes, f"test/{subset}")
        for name in ("silhouette", "nmi", "ari", "fmi"):
            if f"test/clean/cluster/{name}" in metrics:
                metrics[f"cluster/{name}"] = metrics[f"test/clean/cluster/{name}"]
        return metrics

    def _save(
        self,
        metrics: dict[str, float],
        z: Tensor,
        test: Predictions | None,
        timer: _Timer,
    ) -> None:
        """Write the checkpoint, then the logs: a logged epoch can always be resumed from."""
        metrics |= {f"time/{part}_s": seconds for part, seconds in timer.seconds.items()}
        of_step = (self.sizes.labelled + self.sizes.unlabelled) * dist.world_size()
        metrics["time/epoch_s"] = timer.total  # until the checkpoint
        metrics["time/images_per_s"] = self.num_steps * of_step / timer.seconds["train"]
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
        with raise_on_all_ranks(self.device):
            if dist.rank() == 0:
                self._write(state, coordinates, log_likelihood, test, timer)
        # The files are already in storage: Ray is only given their location and the metrics.
        folder = self.run / layout.checkpoint_folder(self.epoch)
        checkpoint = ray.train.Checkpoint(folder.path, folder.filesystem)
        ray.train.report(
            reported,
            checkpoint=checkpoint if dist.rank() == 0 else None,
            checkpoint_dir_name=layout.checkpoint_folder(self.epoch),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _write(
        self,
        state: TrainerState,
        coordinates: Tensor,
        log_likelihood: Tensor,
        test: Predictions | None,
        timer: _Timer,
    ) -> None:
        """Write the epoch's files (on rank 0), and last the log line that marks it as finished."""
        until_here = timer.total
        checkpoint = self._checkpoint()
        is_chosen = chosen_epoch(self.history) == self.epoch
        kept = {*self.config.evaluation.tsne_epochs, self.config.train.num_epochs}
        if test is not None and len(test.labels) and (is_chosen or self.epoch in kept):
            table = predictions_table(test, self.classes, self.test_slices)
            self.run.write_table(layout.predictions_file(self.epoch), table)
        fitted = None
        if is_chosen:
            fitted = self._fitted_table(state.keys, coordinates, log_likelihood)
        save_resumable(self.run, Resumable(checkpoint, state), fitted)
        keep_as_best(self.run, self.epoch)
        if is_chosen:  # and those chosen before no longer are
            delete_other_predictions(self.run, {*kept, self.epoch})
        metrics = self.history[-1]
        metrics["time/epoch_s"] = timer.total
        metrics["time/report_s"] = metrics["time/epoch_s"] - until_here
        self.run.write_json_lines(layout.METRICS, self.history)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.config, self.classes, self.scale, self.epoch, self.evaluated, self.last.clusters
        )

    def _fitted_table(self, keys: Tensor, coordinates: Tensor, log_likelihood: Tensor) -> pa.Table:
        columns = [
            self._ids_of(keys),
            list(coordinates.cpu().numpy()),
            log_likelihood.cpu().numpy(),
        ]
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, FITTED, strict=True)
        ]
        told = {layout.EPOCH_OF_FITTED: str(self.epoch)}
        return pa.table(arrays, schema=FITTED.with_metadata(told))

    def _ids_of(self, keys: Tensor) -> list[str]:
        """``sample_id``s of the slices with these keys (n,)."""
        ids = self.run.read_table(layout.SEEN, columns=["sample_id"])["sample_id"].to_pylist()
        by_key = dict(zip(sample_keys(ids).tolist(), ids, strict=True))
        return [by_key[key] for key in keys.tolist()]

    def _count(self, shard: SliceShard) -> int:
        return dist.count_across_ranks(len(shard), self.device)


def reported_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """Metrics reported to Ray after an epoch: those of the epoch whose model is currently the best.

    Validation metrics only, so that nothing else can be used for selection.
    """
    kept = history[chosen_epoch(history) - 1]
    validation = {name: value for name, value in kept.items() if name.startswith("validation/")}
    return {"epoch": history[-1]["epoch"]} | validation
