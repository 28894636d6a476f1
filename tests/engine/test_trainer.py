"""A training on one rank, without Ray: epochs are saved, and another process goes on from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from brainray import dist, layout
from brainray.config import Config
from brainray.config_text import load_config
from brainray.engine import trainer as trainer_module
from brainray.engine.epoch import EpochData
from brainray.engine.recipe import ramp
from brainray.engine.recluster import ClusterModel
from brainray.engine.shard import CachedImages, PixelScale, RankData, SliceShard, sample_keys
from brainray.engine.state import (
    TrainerState,
    checkpoint_bytes,
    load_checkpoint,
    newest_readable_epoch,
    save_resumable,
)
from brainray.engine.trainer import Report, Trainer, _LastEpoch
from brainray.errors import DivergenceError
from brainray.log import Stopwatch
from brainray.models.encoder import Encoder, EncoderOutput, build_encoder
from brainray.schema import UNLABELLED, Metrics
from brainray.storage import Folder

CLASSES = ["dark", "bright"]
SIDE = 32


def slices(num: int, first: int, *, labelled: bool = True) -> tuple[SliceShard, list[str]]:
    """Dark and bright slices in turns, and their sample_ids."""
    generator = torch.Generator().manual_seed(first)
    labels = torch.arange(num) % 2
    noise = torch.randint(0, 60, (num, 1, SIDE, SIDE), generator=generator)
    images = (noise + 120 * labels[:, None, None, None]).to(torch.uint8)
    ids = [f"{number:032x}" for number in range(first << 64, (first + num) << 64, 1 << 64)]
    shown = labels if labelled else torch.full_like(labels, UNLABELLED)
    return SliceShard(CachedImages(images), torch.from_numpy(sample_keys(ids)), shown), ids


def config_of(num_epochs: int, *overrides: str) -> Config:
    return load_config(
        None,
        [
            "seed=1",
            "objective.name=anchored",
            "clustering.num_clusters=2",
            "clustering.pca_dim=2",
            f"train.num_epochs={num_epochs}",
            f"train.image_size={SIDE}",
            "train.batch_size_per_worker=8",
            "train.labelled_batch_size_per_worker=8",
            "train.precision=fp32",
            "train.learning_rate=1e-3",
            *overrides,
        ],
    )


def trainer_of(
    folder: Path,
    config: Config,
    report: Report = lambda metrics, saved: None,
    *,
    num_unlabelled: int = 24,
    labels: Tensor | None = None,
    inherited: Tensor | None = None,
) -> Trainer:
    """Of 12 labelled slices, alternately dark and bright unless their ``labels`` are given."""
    run = Folder(folder)
    parts = [
        slices(12, 0),
        slices(num_unlabelled, 100, labelled=False),
        slices(8, 200),
        slices(6, 300),
    ]
    (labelled, labelled_ids), (unlabelled, unlabelled_ids) = parts[:2]
    (validation, validation_ids), (test, _) = parts[2:]
    if labels is not None:
        labelled = replace(labelled, labels=labels)
    ids = labelled_ids + unlabelled_ids + validation_ids
    run.write_table(layout.SEEN, pa.table({"sample_id": ids}))
    unknown = torch.full((len(unlabelled),), UNLABELLED)
    encoder = build_encoder("resnet18", "random", len(CLASSES))
    return Trainer(
        config,
        run,
        RankData(
            labelled=labelled,
            unlabelled=unlabelled,
            validation=validation,
            test=test,
            inherited=unknown if inherited is None else inherited,
        ),
        pa.table({name: ["x"] * 6 for name in ("sample_id", "path", "frame")}),
        encoder,
        encoder,
        classes=CLASSES,
        scale=PixelScale(0.3, 0.2),
        report=report,
    )


def train(folder: Path, config: Config, *, stop_after: int | None = None) -> list[Metrics]:
    """The metrics of each reported epoch; ``stop_after`` some, as when a process is lost."""
    reported = list[Metrics]()

    def report(metrics: Metrics, saved: Folder) -> None:
        assert saved.exists(layout.MODEL)
        reported.append(metrics)
        if len(reported) == stop_after:
            raise InterruptedError

    trainer_of(folder, config, report).fit()
    return reported


def after_an_epoch(trainer: Trainer) -> Trainer:
    """With a mixture and predictions by hand: labelled slices are dark, unlabelled ones bright."""
    num_labelled, num = len(trainer.data.labelled), len(trainer.data.fitted_keys)
    is_bright = (torch.arange(num) >= num_labelled).long()
    probabilities = torch.nn.functional.one_hot(is_bright, 2).float()
    responsibilities = torch.rand(num, 2, generator=torch.Generator().manual_seed(0))
    clusters = ClusterModel(trainer.config.clustering, trainer.encoder.embedding_dim)
    trainer._last = _LastEpoch(clusters, responsibilities, probabilities)
    trainer.epoch = 1
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.ema_decay=0.9", "train.accumulation_steps=2"],
        pytest.param(["objective.name=supervised"], marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_costs_no_epoch_and_changes_no_weight(
    tmp_path: Path, overrides: list[str]
) -> None:
    config = config_of(3, *overrides, "evaluation.test_each_epoch=false")
    torch.manual_seed(0)
    expected = train(tmp_path / "whole", config)
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        train(tmp_path / "lost", config, stop_after=2)
    assert newest_readable_epoch(Folder(tmp_path / "lost")) == 2
    torch.manual_seed(99)  # the initial weights are not those that it goes on with
    found = train(tmp_path / "lost", config)

    assert [metrics["epoch"] for metrics in expected] == [1, 2, 3]
    assert found == expected[2:]
    one, two = (
        load_checkpoint(Folder(tmp_path / name / layout.LAST)) for name in ("whole", "lost")
    )
    assert one.epoch == two.epoch == 3
    for name, value in one.encoder.state_dict().items():
        assert torch.equal(value, two.encoder.state_dict()[name]), name
    assert torch.equal(one.clusters.centers, two.clusters.centers)


def test_what_differs_in_brightness_alone_is_learned(tmp_path: Path) -> None:
    config = config_of(4, "evaluation.test_each_epoch=false", "augment.policy=none")
    reported = train(tmp_path, config)
    assert reported[-1]["validation/cluster/accuracy"] == 1.0
    chosen = load_checkpoint(Folder(tmp_path) / layout.BEST).epoch
    predictions = Folder(tmp_path).read_table(layout.predictions_file(chosen))
    assert predictions["cluster_class"].to_pylist() == CLASSES * 3


def test_targets_are_of_the_unlabelled_slices_and_of_their_epoch(tmp_path: Path) -> None:
    inherited = torch.full((24,), UNLABELLED)
    inherited[3] = 0
    labels = torch.tensor([0] * 9 + [1] * 3)
    config = config_of(9, "objective.ramp_epochs=4")
    trainer = after_an_epoch(trainer_of(tmp_path, config, labels=labels, inherited=inherited))
    trainer.epoch = 3
    targets, shift = trainer._targets()
    assert torch.equal(targets.responsibilities, trainer.last.responsibilities[12:])
    assert targets.pseudo_labels.tolist() == [int(row != 3) for row in range(24)]
    assert targets.confidences[3] == 1.0
    assert targets.ramp == ramp(3, 4)
    # All unlabelled slices are bright, and a quarter of the labelled ones.
    assert shift == pytest.approx(0.75)


def test_an_epoch_is_trained_as_the_run_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[EpochData, dict[str, Any]]] = []

    def record(model: Any, optimizer: Any, scheduler: Any, epoch: EpochData, **named: Any) -> None:
        calls.append((epoch, named))

    monkeypatch.setattr(trainer_module, "train_epoch", record)
    config = config_of(
        9,
        "augment.policy=weak",
        "augment_unlabelled.policy=strong",
        "train.mixup_alpha=0.3",
        "train.accumulation_steps=2",
        "train.image_size=96",
        "train.start_image_size=32",
        "train.growth_epochs=4",
    )
    trainer = after_an_epoch(trainer_of(tmp_path, config))
    for epoch in (2, 3):
        trainer.epoch = epoch
        trainer._train_epoch(trainer._targets()[0])
    data = [epoch for epoch, _ in calls]
    assert data[0].augmentation == config.augment
    assert data[0].augmentation_unlabelled == config.augment_unlabelled
    assert data[0].mixup_alpha == 0.3
    assert [epoch.side for epoch in data] == [32, 64]
    assert data[0].seed != data[1].seed
    assert calls[0][1]["accumulation"] == 2
    # Three steps are two updates, and the schedule is as long as they are.
    assert trainer.updates == 2
    assert trainer.scheduler.total_steps == 9 * 2 + 1


def test_ranks_draw_other_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(
        trainer_module, "train_epoch", lambda *given, **_: seeds.append(given[3].seed)
    )
    trainer = after_an_epoch(trainer_of(tmp_path, config_of(3)))
    targets, _ = trainer._targets()
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda of_this=rank: of_this)
        trainer._train_epoch(targets)
    assert seeds[0] != seeds[1]


def test_the_average_decays_with_the_batches_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, config_of(3, "train.ema_decay=0.9"))
    counts: list[int] = []
    monkeypatch.setattr(
        trainer.average, "update", lambda _, num_batches: counts.append(num_batches)
    )
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    trainer._update_average(2)
    assert counts == [8]


@pytest.mark.parametrize(("num_unlabelled", "role"), [(24, "unlabelled"), (10, "labelled")])
def test_batch_statistics_are_the_averages_of_slices_of_the_larger_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_unlabelled: int, role: str
) -> None:
    calls: list[tuple[Any, Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        trainer_module,
        "measure_batch_statistics",
        lambda model, images, **named: calls.append((model, images, named)),
    )
    config = config_of(
        3, "train.ema_decay=0.9", "augment.policy=weak", "augment_unlabelled.policy=strong"
    )
    trainer = trainer_of(tmp_path, config, num_unlabelled=num_unlabelled)
    trainer._settle_batch_statistics()
    ((model, images, named),) = calls
    assert model is trainer.evaluated
    assert model is not trainer.encoder
    assert images is getattr(trainer.data, role).images
    assert named["augmentation"] == config.augment_unlabelled


def test_reseeding_starts_anew_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(trainer_module, "recluster", lambda *_, **named: calls.append(named))
    trainer = after_an_epoch(trainer_of(tmp_path, config_of(3)))
    nothing = EncoderOutput(torch.zeros(36, 512), torch.zeros(36, 2))
    trainer._recluster(nothing)
    trainer._recluster(nothing, reseed=True)
    usual, anew = calls
    assert usual["previous"] is trainer.last.clusters
    assert usual["seed"] == trainer.config.seed
    assert anew["previous"] is None
    assert anew["seed"] != trainer.config.seed
    assert anew["previous_responsibilities"] is trainer.last.responsibilities


def test_slices_whose_embeddings_or_logits_are_not_finite_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, config_of(3))

    def embed(images: CachedImages, _: Encoder) -> EncoderOutput:
        z, logits = torch.zeros(len(images), 4), torch.zeros(len(images), 2)
        if len(images) == 12:
            z[3, 1], logits[5, 0] = torch.nan, torch.inf
        return EncoderOutput(z, logits)

    monkeypatch.setattr(trainer, "_embed", embed)
    bad = [f"{number:032x}" for number in (3 << 64, 5 << 64)]
    with pytest.raises(DivergenceError, match=rf"for sample_id {bad[0]}, {bad[1]}: lower"):
        trainer._embed_fitted()


@pytest.mark.parametrize(("num_unlabelled", "is_said"), [(0, False), (7, True), (8, False)])
def test_unlabelled_slices_that_do_not_fill_a_batch_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_unlabelled: int, is_said: bool
) -> None:
    trainer_of(tmp_path, config_of(3), num_unlabelled=num_unlabelled)
    said = capsys.readouterr().out
    assert ("note: 7 unlabelled slices are fewer than a batch of 8" in said) == is_said


def test_coordinates_are_kept_with_the_sample_ids_and_the_epoch(tmp_path: Path) -> None:
    trainer = after_an_epoch(trainer_of(tmp_path, config_of(3)))
    trainer.epoch = 2
    keys = trainer.data.fitted_keys
    labelled, unlabelled = trainer.data.labelled.keys, trainer.data.unlabelled.keys
    assert keys.tolist() == [*labelled.tolist(), *unlabelled.tolist()]
    values = torch.arange(36.0)
    table = trainer._fitted_table(keys.flip(0), values[:, None], -values)
    ids = Folder(tmp_path).read_table(layout.SEEN)["sample_id"].to_pylist()
    assert table["sample_id"].to_pylist() == ids[:36][::-1]
    assert table["coordinates"].to_pylist() == [[value] for value in values.tolist()]
    assert table["log_likelihood"].to_pylist() == (-values).tolist()
    assert table.schema.metadata[layout.EPOCH_OF_FITTED.encode()] == b"2"


def test_throughput_is_of_the_slices_of_all_steps_and_ranks_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(3, "train.labelled_batch_size_per_worker=4")
    trainer = after_an_epoch(trainer_of(tmp_path, config))
    monkeypatch.setattr(trainer, "_write", lambda *_: None)
    monkeypatch.setattr(trainer_module, "reported_metrics", lambda _: {})
    monkeypatch.setattr(ClusterModel, "coordinates", lambda _, z: z)
    monkeypatch.setattr(ClusterModel, "log_likelihood", lambda _, z: z)
    monkeypatch.setattr(dist, "gather_rows", lambda rows: rows)
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    stopwatch = Stopwatch()
    stopwatch.seconds = {"train": 2.0, "embed": 1.0}
    trainer._save({}, torch.zeros(36, 2), None, stopwatch)
    # Every rank takes 3 steps of 4 labelled and 8 unlabelled slices.
    assert trainer.history[-1]["time/images_per_s"] == 3 * 12 * 4 / 2.0
    assert trainer.history[-1]["time/images_per_s_per_worker"] == 3 * 12 / 2.0


@pytest.mark.parametrize("kept", [[], [3], [1, 3]])
def test_a_finished_run_predicts_with_the_models_of_the_chosen_and_the_last_epoch(
    tmp_path: Path, kept: list[int]
) -> None:
    """Unless the predictions were kept; those left by a job that was killed here are not."""
    config = config_of(3, f"evaluation.test_each_epoch={bool(kept)}")
    trainer = trainer_of(tmp_path, config)
    z = torch.nn.functional.normalize(torch.randn(36, 512))
    trainer._continue_with(trainer._recluster(EncoderOutput(z, z[:, :2])), EncoderOutput(z, z))
    head, classes = trainer.encoder.head, trainer.last.clusters.class_of_cluster

    def all_are(number: int) -> None:
        """From now on, the model predicts this class only."""
        head.bias.data.copy_(1e3 * torch.eye(2)[number])
        classes.fill_(number)

    trainer.epoch = 1
    all_are(1)
    (trainer.run / layout.BEST).write_bytes(layout.MODEL, checkpoint_bytes(trainer._checkpoint()))
    trainer.epoch = 3
    all_are(0)
    for epoch in kept or [3]:
        trainer.run.write_table(layout.predictions_file(epoch), pa.table({"head": ["old"]}))
    trainer.finish()
    for epoch, name in (1, "bright"), (3, "dark"):
        predictions = trainer.run.read_table(layout.predictions_file(epoch))
        if epoch in kept:
            assert predictions["head"].to_pylist() == ["old"]
        else:
            assert predictions["head"].to_pylist() == [name] * 6
            assert predictions["cluster_class"].to_pylist() == [name] * 6
    assert load_checkpoint(trainer.run / layout.LAST).epoch == 3


def test_a_resumed_run_has_the_log_and_the_best(tmp_path: Path) -> None:
    trainer = after_an_epoch(trainer_of(tmp_path, config_of(3)))
    run, last = trainer.run, trainer.last
    deciding = ("train/image_size", "validation/score", "validation/score_error")
    metrics = {"epoch": 1.0} | dict.fromkeys(deciding, 0.0)
    state = TrainerState(
        trainer.optimizer.state_dict(),
        trainer.data.fitted_keys,
        last.responsibilities,
        last.probabilities,
        None,
        [metrics],
    )
    table = trainer._fitted_table(trainer.data.fitted_keys, torch.zeros(36, 2), torch.zeros(36))
    save_resumable(run, trainer._checkpoint(), state, table)
    # It was lost before it had kept the best, and a later epoch was logged.
    expected = [metrics | {"time/report_s": 9.0}]
    run.write_json_lines(layout.METRICS, [*expected, {"epoch": 2.0}])
    trainer.resume(1)
    assert trainer.history == expected
    assert run.read_json_lines(layout.METRICS) == expected
    assert load_checkpoint(run / layout.BEST).epoch == 1
