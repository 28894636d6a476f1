"""Training on a real Ray cluster: DDP, resuming after a kill, and labels that must not be read."""

import contextlib
import html
import io
import json
import os
import platform
import re
import shutil
import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient
from ray.util.state import list_actors

import brainray
from brainray import layout
from brainray.config import Config, TrackingConfig
from brainray.config_text import parse_config, parse_yaml, to_yaml
from brainray.engine.state import Checkpoint, load_checkpoint
from brainray.errors import BrainrayError, CheckpointError, ConfigError, DataError
from brainray.models.encoder import build_encoder, encoder_state
from brainray.orchestration import compared_runs
from brainray.orchestration.code_version import code_hash, git_revision
from brainray.orchestration.compared_runs import compare_with_control
from brainray.orchestration.prediction.evaluation import evaluate
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.pretraining.driver import warm_up
from brainray.orchestration.publish import config_to_track, publish
from brainray.orchestration.run import Run, open_run, run_to_resume
from brainray.orchestration.run_report import report, write_run_page
from brainray.orchestration.store import ImageStore, read_images, scan_images
from brainray.orchestration.training import driver as training_driver
from brainray.orchestration.training import rank_data
from brainray.orchestration.training.driver import (
    TrainedRun,
    _log_start,
    _summarise,
    begun_training,
    fit,
    train,
)
from brainray.orchestration.training.rank_data import load_rank_data
from brainray.orchestration.training.start import _check_ranks, begin_run
from brainray.redaction import command_line
from brainray.schema import SEEN, UNLABELLED_ROLE
from brainray.storage import Folder
from tests.conftest import logged, tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_of(storage: Path, name: str, *overrides: str) -> Config:
    return tiny_config(storage, f"name={name}", "dataset=mri", *overrides)


def without_tracking(config: Config) -> Config:
    """As of a command that says nothing of it."""
    return config.model_copy(update={"tracking": TrackingConfig()})


WARMED_UP = (
    "encoder.pretext=contrastive",
    "encoder.pretext_image_size=16",
    "self_supervision.num_epochs=2",
    "self_supervision.positives=subject",
    "self_supervision.batch_size_per_worker=16",
)
ANCHORED = (
    *WARMED_UP,
    "objective.name=anchored",
    "objective.ramp_epochs=1",
    "objective.inherit_labels=subject",
    "clustering.anchors=labelled",
    "augment_unlabelled.policy=strong",
    "train.ema_decay=0.9",
    "train.growth_epochs=1",
    "train.mixup_alpha=0.2",
    "evaluation.test_each_epoch=false",
    "train.start_image_size=16",
)

PASSWORD = "hunter2"
said_by_mislabelled = io.StringIO()


@pytest.fixture(scope="module")
def mislabelled(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Like `trained`, but the labels that it must not read are wrong, and MLflow's server is away.

    The run ``away``, in a storage of its own.
    """
    storage = tmp_path_factory.mktemp("mislabelled")
    settings = [f"tracking.uri=http://user:{PASSWORD}@127.0.0.1:9", "train.num_workers=2"]
    config = config_of(storage, "away", *settings)
    with contextlib.redirect_stdout(said_by_mislabelled):
        return train_on_wrong_labels(config, phantoms)


def train_on_wrong_labels(config: Config, phantoms: Path) -> TrainedRun:
    """Train on a new store with other labels of the unlabelled and the test slices."""
    storage = Path(config.storage)
    preprocess(tiny_config(storage, "name=mri", f"source={phantoms}"))
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    begun = begin_run(config, store, num_workers=config.train.num_workers)
    seen = begun.folder.read_table("seen.parquet").to_pandas()
    unlabelled = set(seen[seen["role"] == UNLABELLED_ROLE]["sample_id"])
    num_changed = 0
    for path in sorted((storage / "datasets" / "mri" / "images").iterdir()):
        table = pq.read_table(path)
        frame = table.select(["sample_id", "split", "label"]).to_pandas()
        hidden = frame["sample_id"].isin(unlabelled) & (frame["split"] == "train")
        hidden |= frame["split"] == "test"
        rotated = dict(
            zip(
                store.manifest.classes,
                [*store.manifest.classes[1:], store.manifest.classes[0]],
                strict=True,
            )
        )
        frame.loc[hidden, "label"] = frame.loc[hidden, "label"].map(rotated)
        num_changed += int(hidden.sum())
        column = table.schema.get_field_index("label")
        labels = frame["label"].tolist()
        pq.write_table(table.set_column(column, table.schema.field(column), [labels]), path)
    assert num_changed > 30
    slices = begun.folder.read_table("test.parquet").to_pandas()
    slices["label"] = slices["label"].map(rotated)
    column_table = begun.folder.read_table("test.parquet")
    begun.folder.write_table(
        "test.parquet",
        column_table.set_column(
            column_table.schema.get_field_index("label"), "label", [slices["label"].tolist()]
        ),
    )
    return train(config)


def slow_config(storage: Path, name: str, *overrides: str) -> Config:
    """Steps slow enough for a worker to be killed between epochs."""
    return config_of(
        storage,
        name,
        "train.num_epochs=3",
        "evaluation.tsne_epochs=[]",
        "train.batch_size_per_worker=2",
        "train.labelled_batch_size_per_worker=2",
        *overrides,
    )


def checkpoint_of(run: TrainedRun, folder: str) -> Checkpoint:
    return load_checkpoint(run.run.folder / folder)


def assert_same_models(one: Checkpoint, two: Checkpoint) -> None:
    assert one.epoch == two.epoch
    for module in ("encoder", "clusters"):
        expected = getattr(one, module).state_dict()
        found = getattr(two, module).state_dict()
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            same = torch.equal(value, found[name]) if torch.is_tensor(value) else True
            assert same, f"{module}.{name} differs"


def test_a_run_leaves_what_it_promises(trained: TrainedRun) -> None:
    folder = trained.run.folder
    history = folder.read_json_lines("metrics.jsonl")
    assert [metrics["epoch"] for metrics in history] == [1.0, 2.0]
    for name in (
        "train/loss/ce",
        "train/loss/cluster",
        "validation/score",
        "test/all/head/accuracy",
        "test/clean/cluster/f1_macro",
        "test/all/head/recall/glioma",
        "cluster/nmi_previous",
        "cluster/effective_rank",
        "time/epoch_s",
        "time/images_per_s",
    ):
        assert np.isfinite(history[-1][name]), name
    seen = folder.read_table("seen.parquet")
    assert seen.schema.equals(SEEN)
    for row in seen.to_pylist():
        assert (row["label"] is None) == (row["role"] == UNLABELLED_ROLE)
    assert {"confusion_all.png", "loss.png"} <= set((folder / "figures").names())
    metrics = trained.metrics
    assert metrics["test/all/num_slices"] == 17
    assert metrics["test/clean/num_slices"] == 16
    low, high = (metrics[f"test/all/head/accuracy_{side}"] for side in ("low", "high"))
    assert low <= metrics["test/all/head/accuracy"] <= high
    assert "test/all/thumbnail_1nn/accuracy" in metrics
    assert "last/test/all/cluster/accuracy" in metrics


def test_a_run_may_have_no_unlabelled_slice(storage: Path) -> None:
    config = config_of(storage, "all-labelled", "split.labelled_fraction=1.0")
    store = ImageStore.open(Folder(storage / "datasets" / "mri"))
    begun = begin_run(config, store, num_workers=1)
    data = load_rank_data(config, begun.folder, store, torch.device("cpu"), 0, 1)
    assert len(data.unlabelled) == len(data.inherited) == 0
    assert len(data.labelled) == begun.record.num_slices["labelled"] > 0
    assert bool((data.labelled.labels >= 0).all())


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_a_rank_reads_the_store_once(
    storage: Path, monkeypatch: pytest.MonkeyPatch, cache_gib: float
) -> None:
    """In memory or streamed, the ranks' slices of all roles are the store's, each on one rank."""
    config = config_of(storage, "read-once", f"train.cache_gib={cache_gib}")
    store = ImageStore.open(Folder(storage / "datasets" / "mri"))
    begun = begin_run(config, store, num_workers=1)
    sides = []

    def counted(folder: Folder, wanted: Collection[tuple[str, str]], side: int) -> Any:
        sides.append(side)
        return scan_images(folder, wanted, side)

    monkeypatch.setattr(rank_data, "scan_images", counted)
    ranks = [
        load_rank_data(config, begun.folder, store, torch.device("cpu"), rank, 2) for rank in (0, 1)
    ]
    assert len(sides) == 2
    monkeypatch.undo()
    seen = begun.folder.read_table("seen.parquet", ["sample_id", "role"])
    for role, shards in {
        UNLABELLED_ROLE: [data.unlabelled for data in ranks],
        "labelled": [data.labelled for data in ranks],
        "validation": [data.validation for data in ranks],
    }.items():
        rows = seen.filter(pc.equal(seen["role"], role)).sort_by("sample_id")
        expected = read_images(
            store.folder, rows["sample_id"].to_pylist(), "train", config.train.image_size
        )
        for rank, shard in enumerate(shards):
            (found,) = shard.images.batches([torch.arange(len(shard))])
            np.testing.assert_array_equal(found.numpy(), expected[rank::2])


def test_a_summary_tells_the_chosen_and_the_last_epoch_and_the_mean_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = SimpleNamespace(folder=Folder(tmp_path))
    history = [
        {"epoch": 1.0, "validation/loss": 0.5, "time/train_s": 30.0},
        {"epoch": 2.0, "validation/loss": 0.25, "time/train_s": 10.0, "time/report_s": 4.0},
        {"epoch": 3.0, "validation/loss": 0.125, "time/train_s": 20.0, "time/report_s": 2.0},
    ]
    run.folder.write_json_lines(layout.METRICS, history)
    monkeypatch.setattr(training_driver, "load_checkpoint", lambda _: SimpleNamespace(epoch=2))
    assert _summarise(tiny_config(tmp_path), run) == {
        "chosen_epoch": 2,
        "num_epochs": 3,
        "validation/loss": 0.25,
        "last/validation/loss": 0.125,
        "time/train_s": 20,
        "time/report_s": 3,
    }


def test_every_rank_needs_a_labelled_slice() -> None:
    _check_ranks({"labelled": 2, "unlabelled": 9}, 2)
    with pytest.raises(ConfigError, match="3 workers cannot share 2 labelled"):
        _check_ranks({"labelled": 2, "unlabelled": 9}, 3)


def test_the_rate_is_that_of_all_ranks(trained: TrainedRun) -> None:
    *_, last = trained.run.folder.read_json_lines("metrics.jsonl")
    counts = trained.run.record.num_slices
    num_steps = -(-max(counts["labelled"], counts["unlabelled"]) // (2 * 8))
    assert last["time/images_per_s"] * last["time/train_s"] == pytest.approx(num_steps * 2 * 16)
    assert 0 <= last["train/class_shift"] <= 1


def test_a_run_records_what_made_it(trained: TrainedRun) -> None:
    (record,) = trained.run.folder.read_json_lines("provenance.jsonl")
    assert record["packages"]["torch"] == torch.__version__
    assert record["packages"]["ray"] == ray.__version__
    assert all(record["packages"].values())
    assert record["seeds"] == {"seed": 0, "split.seed": 0}
    assert record["data_hash"] == trained.run.record.data_hash
    assert record["config"]["train"]["num_epochs"] == 2
    assert (record["num_workers"], record["device"], record["first_epoch"]) == (2, "cpu", 1)
    assert len(record["code_hash"]) == 12
    assert trained.mlflow_run_id is not None
    tags = MlflowClient(trained.tracking_uri).get_run(trained.mlflow_run_id).data.tags
    assert tags["brainray.numpy"] == np.__version__
    assert tags["brainray.code_hash"] == record["code_hash"]


def about(run: Run) -> dict[str, str]:
    """The table on a run's page that tells how it was made."""
    page = run.folder.read_bytes("report.html").decode()
    rows = page.partition('<table class="about">')[2].partition("</table>")[0]
    found = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", rows, re.DOTALL)
    return {name: html.unescape(value) for name, value in found}


def test_the_page_tells_what_the_runs_folder_tells_of_how_it_was_made(
    trained: TrainedRun, tmp_path: Path
) -> None:
    shutil.copytree(str(trained.run.folder), tmp_path / "runs" / "told")
    config, run = config_of(tmp_path, "told"), open_run(Folder(tmp_path), "told")

    def told() -> dict[str, str]:
        write_run_page(config, run, None, trained.metrics, [], None)
        return about(run)

    made_by = {
        "command": command_line(),
        "code": f"brainray {brainray.__version__}, {code_hash()} {git_revision()}".strip(),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "ray": ray.__version__,
    }
    counts = run.record.num_slices
    kept = {
        "store": f"mri (data hash {run.record.data_hash})",
        "slices": ", ".join(f"{counts[role]} {role}" for role in counts),
        "warm-up without labels": "none",
    }
    expected = made_by | kept | {"workers": "2 on CPU, 1 CPU(s) each"}
    assert list(told().items()) == list(expected.items())

    (first,) = run.folder.read_json_lines("provenance.jsonl")
    resumed = {"command": "again", "num_workers": 4, "cpus_per_worker": 3, "device": "cuda"}
    run.folder.write_json_lines("provenance.jsonl", [first, first | resumed])
    assert told() == expected | {"command": "again", "workers": "4 on GPU, 3 CPU(s) each"}

    # Nothing is known of its software: that of the job which writes the page is another one.
    run.folder.delete_file("provenance.jsonl")
    assert told() == kept


def test_mlflow_holds_the_run_once(trained: TrainedRun) -> None:
    client = MlflowClient(trained.tracking_uri)
    assert trained.mlflow_run_id is not None
    run = client.get_run(trained.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.num_epochs"] == "2"
    assert run.data.tags["brainray.data_hash"] == trained.run.record.data_hash
    assert len(client.get_metric_history(run.info.run_id, "train/loss/ce")) == 2
    figures = {found.path for found in client.list_artifacts(run.info.run_id, "figures")}
    assert "figures/loss.png" in figures


def test_a_finished_run_is_reported_again_not_trained_again(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    again = train(config_of(storage, "two-ranks", "train.num_workers=1"))
    said = logged(capsys)
    assert again.metrics == trained.metrics
    assert again.mlflow_run_id == trained.mlflow_run_id
    assert "complete, nothing to train" in said[0]


@pytest.mark.slow
def test_a_run_is_completed_without_what_was_lost_meanwhile(
    storage: Path,
    trained: TrainedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its control, and the chosen epoch's predictions: a later epoch had been chosen, whose
    checkpoint was damaged.
    """
    folder, _ = copy_of(trained, storage, "completed")
    lost = layout.predictions_file(int(trained.metrics["chosen_epoch"]))
    for name in (lost, "summary.json", "report.html", "tracking.json"):
        (folder / name).unlink()
    monkeypatch.setattr(training_driver, "check_compared_runs", lambda *_: None)
    completed = train(config_of(storage, "completed", "evaluation.control=deleted"))
    assert any(line.startswith("not compared: no run 'deleted'") for line in logged(capsys))
    assert (folder / lost).exists()
    assert (folder / "report.html").exists()
    named = [name for name in trained.metrics if name.startswith("test/")]
    assert len(named) > 20
    for name in named:
        assert completed.metrics[name] == pytest.approx(trained.metrics[name], abs=1e-6), name


def test_a_report_compares_slice_by_slice(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a control whose head is always wrong: all that is right is gained."""
    folder, _ = copy_of(trained, storage, "wrong")
    name = "test/all/head/accuracy"
    summary = json.loads((folder / layout.SUMMARY).read_text())
    (folder / layout.SUMMARY).write_text(json.dumps(summary | {name: 0.0}))
    for path in (folder / "predictions").iterdir():
        rows = pq.read_table(path)
        classes = trained.run.record.classes
        others = dict(zip(classes, [*classes[1:], classes[0]], strict=True))
        wrong = [others[label] for label in rows["label"].to_pylist()]
        column = rows.schema.get_field_index("head")
        pq.write_table(rows.set_column(column, rows.schema.field(column), [wrong]), path)
    metrics = report(tiny_config(storage, "run=two-ranks", "evaluation.control=wrong")).metrics
    said = capsys.readouterr().out
    assert metrics[name] == trained.metrics[name] > 0  # other figures stay
    assert metrics[f"difference/{name}"] == pytest.approx(metrics[name])
    assert metrics[f"only_run/{name}"] == round(17 * metrics[name])
    assert metrics[f"only_control/{name}"] == 0
    assert "comparison with the control (wrong)" in said
    page = trained.run.folder.read_bytes("report.html").decode()
    assert trained.run.folder.read_json(layout.SUMMARY) == metrics  # which MLflow will be sent
    assert "Paired comparison with the control (wrong), slice by slice" in page
    assert '<th scope="row">head, control (wrong)</th><td>0.000' in page
    # Without a control neither the page nor the summary has a comparison.
    again = report(tiny_config(storage, "run=two-ranks")).metrics
    assert again == {key: value for key, value in metrics.items() if key in summary}
    assert trained.run.folder.read_json(layout.SUMMARY) == again
    assert "slice by slice" not in trained.run.folder.read_bytes("report.html").decode()


def test_subjects_are_drawn_as_a_whole_whatever_became_of_the_store(
    storage: Path, trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, str]] = []

    def compare(_: Any, __: Any, groups: Mapping[str, str], **___: Any) -> dict[str, float]:
        asked.append(groups)
        return {}

    monkeypatch.setattr(compared_runs, "compare", compare)
    monkeypatch.setattr(compared_runs, "_control", lambda *_: trained.run)
    config = config_of(storage, "two-ranks", "evaluation.control=itself")
    compare_with_control(config, trained.run, 1)
    rows = ImageStore.open(Folder(storage) / "datasets" / "mri").index().to_pylist()
    expected = {row["sample_id"]: row["split_group_id"] for row in rows if row["split"] == "test"}
    assert asked == [expected]


def test_a_run_on_other_labels_is_no_control(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    begin_run(config_of(storage, "other-labels", "split.seed=5"), store, 1)
    with pytest.raises(ConfigError, match=r"other labels \(split\.seed: 5 here, 0 requested"):
        train(config_of(storage, "compared", "evaluation.control=other-labels"))
    assert not (storage / "runs" / "compared").exists()


def test_a_control_that_was_drawn_otherwise_or_is_gone_is_said_and_left_out(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of another version, whose settings tell nothing of it."""
    shutil.copytree(str(trained.run.folder), storage / "runs" / "redrawn")
    folder = Folder(storage) / "runs" / "redrawn"
    seen = folder.read_table("seen.parquet")
    roles = ["validation" if role == "labelled" else role for role in seen["role"].to_pylist()]
    column = seen.column_names.index("role")
    folder.write_table("seen.parquet", seen.set_column(column, "role", pa.array(roles)))
    asked = config_of(storage, "two-ranks", "evaluation.control=redrawn")
    control = compare_with_control(asked, trained.run, 1)
    said = logged(capsys)
    assert said == ["not compared: the run redrawn was trained on other labels"]
    write_run_page(asked, trained.run, control, trained.metrics, [], None)
    assert "control (redrawn)" not in trained.run.folder.read_bytes("report.html").decode()

    saved = parse_yaml(folder.read_bytes("config.yaml"), "config.yaml")
    saved["evaluation"] |= {"control": "gone", "siblings": ["two-ranks", "lost"]}
    folder.write_bytes("config.yaml", to_yaml(parse_config(saved)).encode())
    written = report(tiny_config(storage, "run=redrawn"))
    said = logged(capsys)
    assert said[0].startswith("not compared: no run 'gone'")
    assert "the run two-ranks has the same seed (0)" in said[1]
    assert said[2].startswith("not compared: no run 'lost'")
    assert "Paired comparison with the control" not in Path(written.out, "report.html").read_text()


def copy_of(trained: TrainedRun, storage: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Folder of a copied run, and its ``run.json``."""
    folder = storage / "runs" / name
    shutil.copytree(str(trained.run.folder), folder)
    return folder, json.loads((folder / "run.json").read_text())


def test_settings_that_an_earlier_version_had_are_no_obstacle(
    trained: TrainedRun, storage: Path
) -> None:
    gone = {"near_duplicate": {"turned_descriptor_similarity": 0.75}}
    folder, record = copy_of(trained, storage, "earlier")
    store = shutil.copytree(storage / "datasets" / "mri", storage / "datasets" / "earlier")
    manifest = json.loads((store / "manifest.json").read_bytes())
    config = parse_yaml((folder / "config.yaml").read_bytes(), "config.yaml")
    for saved in (record, manifest, config):
        saved["preprocess"]["near_duplicate"] |= gone["near_duplicate"]
    (folder / "run.json").write_text(json.dumps(record))
    (store / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    model = torch.load(folder / "best" / "model.pt", weights_only=True)
    model["config"]["preprocess"]["near_duplicate"] |= gone["near_duplicate"]
    torch.save(model, folder / "best" / "model.pt")

    run = open_run(Folder(storage), "earlier")
    assert run.saved_config() == trained.run.saved_config()
    assert run.record.preprocess == trained.run.record.preprocess
    assert load_checkpoint(run.folder / "best").config == checkpoint_of(trained, "best").config
    assert ImageStore.open(Folder(store)).manifest.preprocess == run.record.preprocess


def test_a_report_shows_maps_as_long_as_the_store_has_the_test_slices(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, info = copy_of(trained, storage, "updated")
    changes: list[tuple[dict[str, object], bool]] = [
        ({"data_hash": "of before an update"}, True),
        ({"preprocess": info["preprocess"] | {"skull_strip": "none"}}, False),
    ]
    for change, has_maps in changes:
        info |= change
        (folder / "run.json").write_text(json.dumps(info))
        (folder / layout.FIGURES / "loss.png").unlink()
        report(tiny_config(storage, "run=updated"))
        assert (folder / layout.FIGURES / "loss.png").exists()
        said = "\n".join(logged(capsys))
        assert ("no activation maps: " in said) != has_maps
        assert ("no longer has the run's test slices" in said) != has_maps
        assert ('<section id="explained">' in (folder / "report.html").read_text()) == has_maps
    shutil.rmtree(folder)


def test_a_control_with_other_settings_is_compared_and_they_are_said(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = copy_of(trained, storage, "shorter")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["train"]["num_epochs"] = 1
    saved["objective"]["name"] = "supervised"
    saved["clustering"]["on_collapse"] = "warn"  # says nothing of what is learned
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    epochs = (folder / "metrics.jsonl").read_text()
    assert '"train/num_workers": 2.0' in epochs
    epochs = epochs.replace('"train/num_workers": 2.0', '"train/num_workers": 4.0')
    (folder / "metrics.jsonl").write_text(epochs)
    asked = config_of(storage, "two-ranks", "evaluation.control=shorter")
    control = compare_with_control(asked, trained.run, int(trained.metrics["chosen_epoch"]))
    assert control is not None
    differs = (
        "also trained with other settings: train.num_epochs 1 (here 2), "
        "train.num_workers 4 (here 2)"
    )
    assert logged(capsys) == [f"note: the control was {differs}"]
    name = "test/all/head/accuracy"
    assert control.comparison[f"p/{name}"] == 1
    # Without any difference it has no width.
    assert f"difference/{name}_low" not in control.comparison
    write_run_page(asked, trained.run, control, trained.metrics, [], None)
    page = trained.run.folder.read_bytes("report.html").decode()
    assert f"shorter, {differs}" in page


def test_what_is_still_training_is_not_compared_and_said(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    begin_run(config_of(storage, "unfinished"), store, 1)
    before = trained.run.folder.read_bytes("report.html")
    for asked in ("evaluation.control=unfinished", "evaluation.siblings=[unfinished]"):
        with pytest.raises(CheckpointError, match="unfinished is not complete, and no job is"):
            report(tiny_config(storage, "run=two-ranks", asked))
    assert trained.run.folder.read_bytes("report.html") == before
    config = config_of(storage, "two-ranks", "evaluation.control=unfinished")
    assert compare_with_control(config, trained.run, 1) is None
    said = logged(capsys)
    assert any("not compared: the run unfinished is still training" in line for line in said)


@pytest.mark.faults
@pytest.mark.parametrize("recipe", [(), ANCHORED])
def test_a_killed_worker_costs_nothing_but_time(
    storage: Path, recipe: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(slow_config(storage, f"undisturbed-{len(recipe)}", *recipe))
    killed: list[int] = []

    def kill_after_the_first_epoch(line: str) -> None:
        if line.startswith("epoch ") and not killed:
            actors = list_actors(
                address=ray.get_runtime_context().gcs_address,
                filters=[("class_name", "=", "RayTrainWorker")],
            )
            killed.extend(actor.pid for actor in actors if actor.state == "ALIVE" and actor.pid)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    config = slow_config(storage, f"killed-{len(recipe)}", *recipe)
    monkeypatch.setattr("brainray.orchestration.progress.log", kill_after_the_first_epoch)
    resumed = train(config)
    assert killed
    history = resumed.run.folder.read_json_lines("metrics.jsonl")
    assert [metrics["epoch"] for metrics in history] == [1.0, 2.0, 3.0]
    for folder in ("last", "best"):
        assert_same_models(checkpoint_of(undisturbed, folder), checkpoint_of(resumed, folder))
    client = MlflowClient(resumed.tracking_uri)
    assert resumed.mlflow_run_id is not None
    logged = client.get_metric_history(resumed.mlflow_run_id, "train/loss/ce")
    assert [metric.step for metric in logged] == [1, 2, 3]


def test_a_server_that_is_away_stops_nothing_and_gets_all_later(mislabelled: TrainedRun) -> None:
    assert mislabelled.mlflow_run_id is None
    storage = Path(str(mislabelled.run.folder)).parents[1]
    said = said_by_mislabelled.getvalue()
    assert said.count("127.0.0.1:9 cannot be used") == 1
    kept = [path for path in storage.rglob("*") if path.is_file() and "away" in str(path)]
    assert len(kept) > 10
    assert not [path for path in kept if PASSWORD.encode() in path.read_bytes()]
    assert PASSWORD not in said
    assert "python jobs/track.py --set run=away" in said.splitlines()[-1]
    with pytest.raises(ConfigError, match=r"saved tracking\.uri has no password"):
        publish(without_tracking(config_of(storage, "away")), mislabelled.run)
    sent = publish(config_of(storage, "away"), mislabelled.run)
    assert sent.mlflow_run_id is not None
    client = MlflowClient(sent.uri)
    logged = client.get_metric_history(sent.mlflow_run_id, "train/loss/ce")
    assert [metric.step for metric in logged] == [1, 2]
    final = client.get_run(sent.mlflow_run_id).data.metrics
    assert final["final/chosen_epoch"] == mislabelled.metrics["chosen_epoch"]


def test_what_is_sent_of_an_unfinished_run_is_not_said_to_run(storage: Path) -> None:
    config = config_of(storage, "begun-only")
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    begun = begin_run(config, store, num_workers=1)
    sent = publish(config, begun)
    assert sent.mlflow_run_id is not None
    assert MlflowClient(sent.uri).get_run(sent.mlflow_run_id).info.status == "KILLED"


def test_test_slices_without_any_label_are_not_scored(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    whole = store.index(thumbnails=True)
    labels = pc.if_else(pc.equal(whole["split"], "test"), None, whole["label"])
    hidden = whole.set_column(whole.schema.get_field_index("label"), "label", labels)
    monkeypatch.setattr(ImageStore, "index", lambda *_, **__: hidden)
    begun = begin_run(config_of(storage, "hidden-labels"), store, num_workers=1)
    assert begun.folder.read_table("test.parquet").num_rows == 0
    assert begun.test_paths() == set()


def test_a_run_goes_on_where_what_is_done_with_it_has_changed(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    begin_run(config_of(storage, "registered"), store, 1)
    changed = ["registry.name=mri", "tune.num_trials=3"]
    assert run_to_resume(config_of(storage, "registered", *changed)) is not None


def test_where_a_run_was_to_be_tracked_is_where_it_is_sent(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    meant = ["tracking.uri=http://mlflow:5000", "tracking.experiment=tumours"]
    run = begin_run(config_of(storage, "tracked", *meant), store, 1)
    found = config_to_track(without_tracking(config_of(storage, "tracked")), run).tracking
    assert (found.uri, found.experiment) == ("http://mlflow:5000", "tumours")
    other = config_of(storage, "tracked", "tracking.uri=http://other:5000")
    found = config_to_track(other, run).tracking
    assert (found.uri, found.experiment) == ("http://other:5000", "tumours")


def test_a_run_is_sent_where_training_sent_it_and_says_what_trained_it(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    run = begin_run(config_of(storage, "sent-elsewhere"), store, 1)
    run.folder.write_json("tracking.json", {"uri": "http://server:5000"})
    found = config_to_track(without_tracking(config_of(storage, "sent-elsewhere")), run).tracking
    assert found.uri == "http://server:5000"
    run.folder.write_json("tracking.json", {"uri": "sqlite:////gone/mlflow.db"})
    found = config_to_track(without_tracking(config_of(storage, "sent-elsewhere")), run).tracking
    assert found.uri == f"sqlite:///{storage}/mlflow.db"  # as the run's config says
    run.folder.write_json_lines(
        "provenance.jsonl", [{"git_revision": "a"}, {"git_revision": "b", "code_hash": "c"}]
    )
    assert run.last_submission() == {"git_revision": "b", "code_hash": "c"}


def test_a_beginning_that_was_cut_leaves_no_fingerprints(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    (storage / "runs" / "begun-anew").mkdir()
    (storage / "runs" / "begun-anew" / "seen_before.parquet").touch()
    run = begin_run(config_of(storage, "begun-anew"), store, 1)
    assert not run.folder.exists("seen_before.parquet")


def test_a_store_is_opened_as_what_it_was_or_not_at_all(storage: Path) -> None:
    folder = Folder(storage) / "datasets" / "mri"
    was = ImageStore.open(folder).manifest.data_hash
    assert ImageStore.open(folder, was).manifest.data_hash == was
    with pytest.raises(DataError, match=rf"has changed \(hash 0123 before, {was} now\)"):
        ImageStore.open(folder, "0123")


def test_a_store_of_other_masks_than_todays_is_not_trained_on(
    storage: Path, tmp_path: Path
) -> None:
    shutil.copytree(storage / "datasets" / "mri", tmp_path / "datasets" / "mri")
    path = tmp_path / "datasets" / "mri" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["preprocess"]["skull_strip"] = "intracranial"
    path.write_text(json.dumps(manifest | {"intracranial_version": 1}))
    config = config_of(tmp_path, "old", "preprocess.skull_strip=intracranial")
    with pytest.raises(
        DataError, match=r"intracranial_version: 1 here, \d+ requested.*preprocess again"
    ):
        train(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_store_that_changes_under_a_run_is_not_learned_from(
    phantoms: Path, ray_cluster: None, tmp_path: Path
) -> None:
    store = preprocess(tiny_config(tmp_path, "name=mri", f"source={phantoms}"))
    for name, settings in (("plain", ()), ("warmed-up", WARMED_UP)):
        config = tiny_config(tmp_path, f"name={name}", "dataset=mri", *settings)
        with begun_training(config) as training:
            store.manifest.model_copy(update={"data_hash": "changed"}).write(store.folder)
            with pytest.raises(DataError, match=r"has changed \(hash .* changed now\)"):
                fit(training)
        store.manifest.write(store.folder)


def test_a_run_to_compare_with_is_looked_for_before_training(storage: Path) -> None:
    with pytest.raises(DataError, match="no run 'absent'"):
        train(config_of(storage, "compared", "evaluation.control=absent"))
    assert not (storage / "runs" / "compared").exists()


def test_a_folder_whose_job_ended_before_it_began_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "half").mkdir(parents=True)
    (tmp_path / "runs" / "half" / "seen.parquet").touch()
    (tmp_path / "runs" / "whole").mkdir()
    (tmp_path / "runs" / "whole" / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"no run 'half' in .*; existing runs: whole$"):
        open_run(Folder(tmp_path), "half")


def assert_labels_changed_nothing(expected: TrainedRun, mislabelled: TrainedRun) -> None:
    for folder in ("last", "best"):
        assert_same_models(checkpoint_of(expected, folder), checkpoint_of(mislabelled, folder))
    assert mislabelled.metrics["chosen_epoch"] == expected.metrics["chosen_epoch"]
    assert mislabelled.metrics["test/all/num_slices"] == 17
    labels = [run.run.folder.read_table("test.parquet")["label"] for run in (mislabelled, expected)]
    assert not pc.any(pc.equal(*labels)).as_py()


def test_labels_of_unlabelled_and_test_slices_change_nothing(
    trained: TrainedRun, mislabelled: TrainedRun
) -> None:
    assert_labels_changed_nothing(trained, mislabelled)


@pytest.mark.slow
def test_labels_change_nothing_in_a_recipe_of_all_parts(
    storage: Path, phantoms: Path, tmp_path: Path
) -> None:
    expected = train(slow_config(storage, "anchored", *ANCHORED))
    mislabelled = train_on_wrong_labels(slow_config(tmp_path, "permuted", *ANCHORED), phantoms)
    assert_labels_changed_nothing(expected, mislabelled)
    reported = {int(mislabelled.metrics[name]) for name in ("chosen_epoch", "num_epochs")}
    predicted = (mislabelled.run.folder / "predictions").names()
    assert predicted == [f"epoch-{epoch:04d}.parquet" for epoch in sorted(reported)]
    history = mislabelled.run.folder.read_json_lines("metrics.jsonl")
    assert not [name for metrics in history for name in metrics if name.startswith("test/")]


def test_the_raw_test_files_tell_what_training_told_wherever_they_lie_and_whatever_a_table_says(
    storage: Path, phantoms: Path, trained: TrainedRun, tmp_path: Path
) -> None:
    files = [path.relative_to(phantoms) for path in sorted(phantoms.rglob("*.jpg"))]
    rows = [f"{path},{path.parent.name},fold{number % 3}" for number, path in enumerate(files)]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["path,label,split", *rows]))
    settings = ["run=two-ranks", f"source={phantoms}", f"labels={labels}"]
    before = Folder(storage) / "evaluations" / "by-pipeline"
    test_paths = {str(path) for path in files if path.parts[0] == "Testing"}
    before.write_bytes("config.yaml", b"source: /where/they/were\nrun: another\n")
    with pytest.raises(
        ConfigError, match=r"by-pipeline exists .* \(run: another here, two-ranks r"
    ):
        evaluate(config_of(storage, "by-pipeline", *settings), only_paths=test_paths)
    before.write_bytes("config.yaml", b"source: /where/they/were\nrun: two-ranks\n")
    scored = evaluate(config_of(storage, "by-pipeline", *settings), only_paths=test_paths)
    for name, value in trained.metrics.items():
        if name.startswith("test/"):
            assert scored.metrics[name] == pytest.approx(value, abs=1e-4), name
    assert scored.folder.exists("predictions.parquet")
    with pytest.raises(DataError, match=r"lacks 1 of 18 files to score, such as gone\.jpg"):
        evaluate(config_of(storage, "cut", *settings), only_paths=test_paths | {"gone.jpg"})
    with pytest.raises(DataError, match=r"split 'fold0' of .* is neither train nor test"):
        evaluate(config_of(storage, "by-hand", *settings))


@pytest.mark.slow
def test_a_checkpoint_without_its_run_has_no_clean_figures(
    storage: Path, phantoms: Path, trained: TrainedRun, tmp_path: Path
) -> None:
    alone = Folder(tmp_path) / "alone" / "epoch"
    alone.write_bytes("model.pt", (trained.run.folder / "best").read_bytes("model.pt"))
    scored = evaluate(
        tiny_config(storage, "name=alone", f"checkpoint={alone}", f"source={phantoms}")
    )
    assert scored.metrics["test/all/num_slices"] == 17
    assert not [name for name in scored.metrics if "clean" in name]
    predictions = scored.folder.read_table("predictions.parquet")
    assert predictions["clean"].null_count == predictions.num_rows


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["clustering.num_clusters=3"], BrainrayError, "below the number of classes"),
        (["clustering.num_clusters=500"], BrainrayError, "exceeds the number of training slices"),
        (["train.num_workers=64"], ConfigError, "the Ray cluster has room for 2; lower"),
        (["train.device=cuda"], ConfigError, "has no GPU"),
        (["dataset=absent"], DataError, "no image store at"),
        (["encoder.weights=/absent.pt"], ConfigError, "no such file"),
        (["train.image_size=48"], ConfigError, "exceeds"),
        (["encoder.pretext=rotation"], ConfigError, r"pretext_image_size \(64\) exceeds"),
        (["preprocess.skull_strip=none"], ConfigError, "skull_strip: otsu here, none requested"),
        (["split.mode=grouped"], ConfigError, r"\(split\.mode: official here, grouped requested\)"),
        (
            ["preprocess.subject.estimate=false"],
            ConfigError,
            r"\(preprocess\.subject\.estimate: True here, False requested\)",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_left(
    storage: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(config_of(storage, "refused", *overrides))
    assert not (storage / "runs" / "refused").exists()


def test_a_new_run_tells_how_many_labels_it_reads_and_what_nothing_tells(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "given.pt"
    weights.write_bytes(b"not read here")
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    index = store.index()
    train_labels = index.filter(pc.equal(index["split"], "train"))["label"]
    num_labels = len(train_labels) - train_labels.null_count
    for name, share, others in [("told-half", 0.5, 1), ("told-all", 1.0, 0)]:
        config = config_of(
            storage, name, f"split.labelled_fraction={share}", f"encoder.weights={weights}"
        )
        run = begin_run(config, store, 1)
        logged(capsys)
        _log_start(run, False, config, store)
        lines = logged(capsys)
        slices = run.record.num_slices
        num_read = slices["labelled"] + slices["validation"]
        assert f"{slices['labelled']} labelled" in lines[0]
        told = [line for line in lines if line.startswith("the run reads")]
        assert len(told) == others
        assert any("note: no unlabelled slices" in line for line in lines) == (not others)
        if others:
            assert 0.4 < num_read / num_labels < 0.6
            assert told[0].startswith(f"the run reads {num_read} of {num_labels} labels")
        assert f"no record of what {weights} was trained on" in lines[-1]


def test_a_file_of_weights_is_read_where_the_driver_runs(
    storage: Path, trained: TrainedRun
) -> None:
    path = f"{trained.run.folder}/best/model.pt"
    config = config_of(storage, "from-file", f"encoder.weights={path}")
    start = warm_up(config, ImageStore.open(Folder(storage) / "datasets" / "mri"))
    assert not isinstance(start, str)
    assert "conv1.weight" in start


def test_a_complete_run_says_how_another_is_set_beside_it(
    storage: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(str(trained.run.folder), Path(storage) / "runs" / "its-control")
    for control, says in (("evaluation.control=its-control", True), ("seed=0", False)):
        settings = ["train.num_workers=2", "dataset=mri", control]
        train(tiny_config(storage, "name=two-ranks", *settings))
        lines = logged(capsys)
        assert any("jobs/report.py --set run=two-ranks" in line for line in lines) == says


def test_a_run_is_not_resumed_with_other_settings(storage: Path, trained: TrainedRun) -> None:
    with pytest.raises(ConfigError, match=r"train\.learning_rate: 0\.0015 here, 0\.001 requested"):
        train(config_of(storage, "two-ranks", "train.learning_rate=1e-3"))


def test_full_covariances_of_few_slices_are_told(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    for name in ("full", "tied"):
        begin_run(config_of(storage, name, f"clustering.covariance_type={name}"), store, 1)
        told = any("few for 4 full covariances of 8" in line for line in logged(capsys))
        assert told == (name == "full")


def test_a_resumed_run_keeps_the_settings_with_which_it_ends(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    begin_run(config_of(storage, "otherwise"), store, 1)
    later = config_of(storage, "otherwise", "evaluation.tsne_epochs=[]", "train.max_failures=7")
    with begun_training(later) as training:
        saved = training.run.saved_config()
    assert (saved.evaluation, saved.train) == (later.evaluation, later.train)


def test_a_complete_run_needs_nothing_for_training(
    storage: Path, trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as GPUs, which were needed when it was begun."""
    monkeypatch.setattr(training_driver, "plan_workers", None)
    config = config_of(storage, "two-ranks", "train.num_workers=2", "train.device=cuda")
    with begun_training(config) as training:
        assert training.run.is_complete


def test_a_validation_share_is_one_in_n(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    for share in (0.395, 0.4):
        config = config_of(storage, "share", f"split.validation_fraction={share}")
        with pytest.raises(ConfigError, match=r"far from 1/2 and 1/3: use 0\.5 or 0\.33"):
            begin_run(config, store, 1)
    assert not (storage / "runs" / "share").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["run=absent"], DataError, "no run 'absent'"),
        (["checkpoint=/tmp"], CheckpointError, r"contains no model\.pt"),
    ],
)
def test_evaluation_names_what_is_missing(
    storage: Path, phantoms: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(tiny_config(storage, f"source={phantoms}", *overrides))


@pytest.mark.slow
def test_a_warm_up_is_learned_once_and_starts_every_run_of_its_store(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*WARMED_UP, "train.num_epochs=1", "train.num_workers=2"]
    settings += ["train.learning_rate=1e-9", "train.weight_decay=0"]  # weights stay as they were
    runs, said = {}, {}
    for name, more in {"first": (), "second": ("split.seed=5",)}.items():
        runs[name] = train(config_of(storage, f"warm-{name}", *settings, *more))
        said[name] = capsys.readouterr().out
    assert "pretext epoch 2/2" in said["first"]
    assert "already trained, reusing it" in said["second"]
    folder = Path(re.findall(r"^encoder (.*): training$", said["first"], re.MULTILINE)[0])
    state = encoder_state((folder / "encoder.pt").read_bytes(), "the warm-up")
    learned = build_encoder("resnet18", state, num_classes=4)
    for run in runs.values():
        trained = checkpoint_of(run, "last").encoder
        torch.testing.assert_close(trained.backbone.conv1.weight, learned.backbone.conv1.weight)
        assert about(run.run)["warm-up without labels"] == "contrastive, 2 epochs at 16 px"


@pytest.mark.slow
def test_a_collapse_stops_the_run_and_says_why(storage: Path) -> None:
    with pytest.raises(BrainrayError, match="lambda_cluster"):
        train(config_of(storage, "collapsed", "clustering.min_spread=1.5"))
    state = (Folder(storage) / "runs" / "collapsed").read_json("tracking.json")
    assert MlflowClient(state["uri"]).get_run(state["run_id"]).info.status == "FAILED"
