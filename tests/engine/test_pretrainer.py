"""A warm-up on one rank, without Ray: epochs and rounds are saved, and another process goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from brainray import dist, layout
from brainray.config import FeatureConfig
from brainray.config_text import load_config
from brainray.engine import pretrainer as pretrainer_module
from brainray.engine.loop import EpochResult
from brainray.engine.pretrainer import Pretrainer
from brainray.engine.self_supervised import (
    Groups,
    PretextEpoch,
    PretextSlices,
    SoftTargets,
    build_pretext,
)
from brainray.engine.shard import CachedImages, PixelScale, sample_keys
from brainray.engine.state import state_from_bytes
from brainray.errors import BrainrayError, ClusteringError, DataError, DivergenceError
from brainray.models.features import FeatureEncoder
from brainray.models.pretext import PretextModel
from brainray.schema import Metrics
from brainray.storage import Folder
from tests.ranks import OnRanks

SIDE, NUM_SLICES = 16, 24
IDS = [f"{number:032x}" for number in range(0, NUM_SLICES << 64, 1 << 64)]
CONTRASTIVE = FeatureConfig(pretext="contrastive", image_size=SIDE)
REFINED = FeatureConfig(pretext="rotation", lambda_cluster=0.5, image_size=SIDE)
NOTHING = SoftTargets(torch.full((NUM_SLICES, 2), 0.5), torch.zeros(2, 16))


def slices(num_groups: int) -> PretextSlices:
    """Dark and bright ones in turns."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (NUM_SLICES, 1, SIDE, SIDE), generator=generator)
    pixels[1::2] += 120
    keys, numbers = torch.from_numpy(sample_keys(IDS)), torch.arange(NUM_SLICES) % num_groups
    return PretextSlices(CachedImages(pixels.to(torch.uint8)), keys, Groups(numbers))


def pretrainer_of(
    folder: Path,
    feature: FeatureConfig,
    *overrides: str,
    num_groups: int = NUM_SLICES,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> Pretrainer:
    """Of a network with batch normalisation and dropout, whose weights are drawn."""
    config = load_config(
        None,
        [
            "clustering.num_clusters=2",
            "clustering.pca_dim=2",
            "train.precision=fp32",
            "self_supervision.num_epochs=3",
            "self_supervision.max_rounds=3",
            "self_supervision.tolerance=0",
            "self_supervision.patience=3",
            "self_supervision.round_epochs=2",
            "self_supervision.batch_size_per_worker=8",
            *overrides,
        ],
    )
    network = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(128, 16),
    )
    pretext = build_pretext(feature.pretext, config.self_supervision)
    learner = PretextModel(FeatureEncoder(network), pretext.head(16))
    Folder(folder).write_table(layout.SEEN, pa.table({"sample_id": IDS}))
    return Pretrainer(
        config,
        feature,
        Folder(folder),
        slices(num_groups),
        learner,
        learner,
        seed=1,
        scale=PixelScale(0.3, 0.2),
        report=report,
    )


def fit(folder: Path, feature: FeatureConfig, *, stop_after: int | None = None) -> list[Metrics]:
    """What is reported; ``stop_after`` some epochs or rounds, as when a process is lost."""
    reported = list[Metrics]()

    def report(metrics: Metrics) -> None:
        assert Folder(folder).exists(layout.STATE)
        reported.append(metrics)
        if len(reported) == stop_after:
            raise InterruptedError

    pretrainer_of(folder, feature, report=report).fit()
    return reported


def encoder_of(folder: Path) -> dict[str, Any]:
    return state_from_bytes((folder / layout.ENCODER).read_bytes(), "the encoder")


@pytest.mark.parametrize("feature", [CONTRASTIVE, REFINED])
def test_a_lost_process_costs_no_epoch_or_round_and_changes_no_weight(
    tmp_path: Path, feature: FeatureConfig
) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    torch.manual_seed(0)
    assert fit(whole, feature) == [{"epoch": 1.0}, {"epoch": 2.0}, {"epoch": 3.0}]
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        fit(lost, feature, stop_after=2)
    assert not (lost / layout.ENCODER).exists()
    torch.manual_seed(99)  # the initial weights are not those that it goes on with
    (lost / layout.METRICS).unlink()  # it was lost before these were written
    assert fit(lost, feature) == [{"epoch": 3.0}]

    one, two = encoder_of(whole), encoder_of(lost)
    for part in ("encoder", "head"):
        assert all(value.equal(two[part][name]) for name, value in one[part].items())
    assert one["encoder"]["backbone.0.weight"].shape[1] == 1
    assert (two["pixel_mean"], two["pixel_std"]) == (0.3, 0.2)
    histories = [Folder(folder).read_json_lines(layout.METRICS) for folder in (whole, lost)]
    for row in [*histories[0], *histories[1]]:
        del row["seconds"]
    assert histories[0] == histories[1]
    names = (Folder(whole) / layout.ROUNDS).names()
    assert len(names) == (4 if feature.lambda_cluster else 0)
    for name in names:
        table = (Folder(whole) / layout.ROUNDS).read_table(name)
        assert table["key"].to_pylist() == sample_keys(IDS).tolist()
        assert table.equals((Folder(lost) / layout.ROUNDS).read_table(name))


def test_a_damaged_warm_up_is_said_and_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b"", b"cut"):
        Folder(tmp_path).write_bytes(layout.STATE, content)
        assert len(fit(tmp_path, CONTRASTIVE)) == 3
        said = capsys.readouterr().out
        assert f"{tmp_path}/{layout.STATE} is not a checkpoint" in said
        assert "restarting the warm-up from scratch" in said


def fit_on_a_rank_of_two(folder: Path) -> str:
    """The error where only the first rank sees what an earlier process has saved."""
    torch.manual_seed(0)
    own = folder / str(dist.rank())
    if dist.rank() == 0:
        state = (folder / layout.STATE).read_bytes()
        Folder(own).write_bytes(layout.STATE, state)
    try:
        pretrainer_of(own, REFINED).fit()
    except BrainrayError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_files_do_not_go_on(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    with pytest.raises(InterruptedError):
        fit(tmp_path, REFINED, stop_after=2)
    for said in on_two_ranks(fit_on_a_rank_of_two, tmp_path):
        assert "is from epoch 2 on the first worker but 0 on another: submit again" in said


def test_every_epoch_and_rank_has_views_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[PretextEpoch] = []
    schedules: list[Any] = []

    def record(model: Any, optimizer: Any, scheduler: Any, epoch: Any, **_: Any) -> EpochResult:
        epochs.append(epoch)
        schedules.append(scheduler)
        return EpochResult({}, 0.0)

    monkeypatch.setattr(pretrainer_module, "train_epoch", record)
    pretrainer = pretrainer_of(tmp_path, REFINED, "self_supervision.round_learning_rate=0.5")
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda of_this=rank: of_this)
        for number in (1, 2):
            pretrainer._train_round(number, NOTHING)
            pretrainer._train_epoch("", *pretrainer._optimizer(0.1, 3), (number,))
    assert len({epoch.seed for epoch in epochs}) == len(epochs) == 2 * 2 * 3
    in_rounds = [epoch.soft is not None for epoch in epochs]
    assert in_rounds == [True, True, False] * 4
    assert all(epoch.lambda_cluster == 0.5 for epoch in epochs)
    # Two epochs of three steps share the schedule of a round.
    assert schedules[0] is schedules[1]
    assert schedules[0].total_steps == 2 * 3 + 1
    assert schedules[0].optimizer.defaults["lr"] == 0.5


def test_reseeding_starts_anew_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrainer_module, "recluster", lambda *_, **named: calls.append(named))
    pretrainer = pretrainer_of(tmp_path, REFINED)
    clusters: Any = object()
    pretrainer.clusters = clusters
    for reseed in (False, True):
        pretrainer._recluster(torch.zeros(NUM_SLICES, 16), NOTHING.responsibilities, 3, reseed)
    usual, anew = calls
    assert (usual["previous"], usual["seed"]) == (clusters, 1)
    assert anew["previous"] is None
    assert anew["seed"] != 1
    assert anew["previous_responsibilities"] is NOTHING.responsibilities


def test_a_collapse_names_the_encoder_and_the_round(tmp_path: Path) -> None:
    pretrainer = pretrainer_of(tmp_path / "encoder", REFINED, "clustering.min_spread=1.5")
    with pytest.raises(ClusteringError, match=r"^encoder, round 1: .*round_learning_rate"):
        pretrainer.fit()


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (8, r"encoder, epoch 1, step 2 of 3: .* sample_id 0\S+, .*: lower self_supervision"),
        (24, r"encoder, epoch 1: a weight is NaN or infinite: lower self_supervision"),
    ],
)
def test_a_warm_up_that_diverges_leaves_no_encoder(
    tmp_path: Path, batch_size: int, message: str
) -> None:
    settings = [f"self_supervision.batch_size_per_worker={batch_size}"]
    settings += ["self_supervision.learning_rate=1e300"]
    folder = tmp_path / "encoder"
    with pytest.raises(DivergenceError, match=f"self-supervised training, {message}"):
        pretrainer_of(folder, CONTRASTIVE, *settings).fit()
    assert not {layout.ENCODER, layout.STATE} & set(Folder(folder).names())


def test_slices_of_one_group_are_no_contrast(tmp_path: Path) -> None:
    pretrainer_of(tmp_path, REFINED, num_groups=1)
    with pytest.raises(DataError, match="compares slices of different subjects"):
        pretrainer_of(tmp_path, CONTRASTIVE, num_groups=1)
