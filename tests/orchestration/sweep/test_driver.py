"""Sweeps on a real Ray cluster: choosing by validation, going on by name, MLflow's parent."""

import contextlib
import fnmatch
import io
import itertools
import json
import math
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import mlflow
import numpy as np
import pandas as pd
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from ray import tune
from ray._raylet import PlacementGroupID
from ray.tune.execution.tune_controller import TuneController
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.search_generator import SearchGenerator
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from brainray.config import AugmentConfig, Config
from brainray.config_text import load_config, to_yaml
from brainray.engine.selection import reported_metrics
from brainray.errors import (
    BrainrayError,
    BusyError,
    ClusteringError,
    ConfigError,
    RoomError,
    StorageError,
    StoreChangedError,
)
from brainray.orchestration.lock import held
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.paths import resolve_paths
from brainray.orchestration.publish import open_tracking
from brainray.orchestration.resources import WorkerResources
from brainray.orchestration.run import Run
from brainray.orchestration.sweep import driver, trials, tuner
from brainray.orchestration.sweep import follower as follower_module
from brainray.orchestration.sweep.driver import (
    FinishedSweep,
    _check_or_write_settings,
    _conclude,
    _reasons_for_failure,
    sweep,
)
from brainray.orchestration.sweep.follower import SweepFollower, trials_table
from brainray.orchestration.sweep.trials import (
    Trial,
    check_space,
    ranked_trials,
    read_trials,
    run_trial,
    trial_config,
)
from brainray.orchestration.sweep.tuner import (
    _files_of,
    _has_state,
    _param_space,
    _scheduler,
    build_tuner,
    errors_of,
)
from brainray.orchestration.training.driver import TrainedRun
from brainray.redaction import command_line
from brainray.storage import Folder
from tests.browser import CHROMIUM, mlflow_ui
from tests.conftest import logged, tiny_config

STORE: Any = SimpleNamespace(manifest=SimpleNamespace(data_hash="abc"))

SPACE: dict[str, dict[str, list[float]]] = {
    "objective.lambda_cluster": {"choice": [0.1, 0.5]},
    "clustering.num_clusters": {"choice": [3, 4]},  # 3 is below the number of classes
}


def sweep_config(storage: Path, *overrides: str) -> Config:
    return tiny_config(
        storage,
        "name=search",
        "dataset=mri",
        "tune.algorithm=grid",
        f"tune.space={json.dumps(SPACE)}",
        "train.num_epochs=2",
        "evaluation.tsne_epochs=[]",
        "registry.name=mri-classifier",
        *overrides,
    )


output = io.StringIO()


@pytest.fixture(scope="module")
def finished(storage: Path) -> FinishedSweep:
    with contextlib.redirect_stdout(output):
        return sweep(sweep_config(storage))


@pytest.mark.slow
def test_the_best_trial_is_the_best_on_the_validation_slices(finished: FinishedSweep) -> None:
    trials = finished.folder.read_json("trials.json")
    assert len(trials) == 4
    by_outcome = {
        outcome: [trial for trial in trials if trial["outcome"].startswith(outcome)]
        for outcome in ("complete", "failed")
    }
    assert len(by_outcome["complete"]) == len(by_outcome["failed"]) == 2
    for trial in by_outcome["failed"]:
        assert "below the number of classes" in trial["outcome"]
    best = max(trial["best"]["value"] for trial in by_outcome["complete"])
    assert finished.metrics["best/validation/score"] == best
    assert finished.metrics["num_failed"] == 2
    lines = [line for line in output.getvalue().splitlines() if line.startswith("trial ")]
    assert len(lines) == 4  # two trials, two epochs each
    assert all("validation/score" in line and "images/s" in line for line in lines)


@pytest.mark.slow
def test_the_best_settings_can_be_trained_as_they_are(
    finished: FinishedSweep, storage: Path
) -> None:
    config = load_config(f"{finished.folder}/best.yaml")
    trials = finished.folder.read_json("trials.json")
    winner = max(
        (trial for trial in trials if trial["best"]), key=lambda trial: trial["best"]["value"]
    )
    assert config.objective.lambda_cluster == winner["parameters"]["objective.lambda_cluster"]
    assert config.name == "search-best"
    assert config.dataset == "mri"


@pytest.mark.slow
def test_mlflow_shows_the_trials_below_the_sweep(finished: FinishedSweep) -> None:
    client = MlflowClient(finished.tracking_uri)
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    assert finished.mlflow_run_id is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_id for run in parents] == [finished.mlflow_run_id]
    children = [run for run in runs if run not in parents]
    assert len(children) == 2
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == finished.mlflow_run_id
        assert child.data.tags["brainray.outcome"] == "complete"
        assert child.info.status == "FINISHED"
        logged = client.get_metric_history(child.info.run_id, "validation/score")
        assert [metric.step for metric in logged] == [1, 2]
    artifacts = {found.path for found in client.list_artifacts(finished.mlflow_run_id)}
    assert {"best.yaml", "trials.md", "figures"} <= artifacts
    figures = client.list_artifacts(finished.mlflow_run_id, "figures")
    assert {Path(found.path).name for found in figures} >= {
        "learning_curves.png",
        "slices.png",
        "parallel_coordinates.png",
    }


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_pages_that_people_open_afterwards_show_the_sweep(finished: FinishedSweep) -> None:
    client = MlflowClient(finished.tracking_uri)
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    trials = [run for run in runs if run.info.run_id != finished.mlflow_run_id]
    with mlflow_ui(finished.tracking_uri) as ui:
        shown = ui.open_experiment(experiment.experiment_id, "search")
        assert sorted(shown) == sorted(str(run.info.run_name) for run in runs)
        axes = ui.open_comparison(experiment.experiment_id, [run.info.run_id for run in trials])
        assert {"objective.lambda_cluster"} == {axis for axis in axes if "/" not in axis}
        ui.compare_by("validation/score")
        for run_id, figure in (
            (finished.mlflow_run_id, "parallel_coordinates.png"),
            (trials[0].info.run_id, "accuracy.png"),
        ):
            assert ui.open_figure(experiment.experiment_id, str(run_id), f"figures/{figure}") > 300
        assert ui.errors == []


@pytest.mark.slow
def test_the_best_model_is_registered_and_can_be_loaded_alone(
    finished: FinishedSweep, phantoms: Path
) -> None:
    mlflow.set_tracking_uri(finished.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/mri-classifier/1")
    assert set(model.metadata.signature.inputs.input_names()) == {"path", "image"}
    assert model.predict(model.input_example)["reason"].tolist() == [None]
    files = sorted((phantoms / "Testing").rglob("*.jpg"))[:5]
    found = model.predict(pd.DataFrame({"path": [str(file) for file in files]}))
    assert [row["reason"] for row in found.to_dict("records")] == [None] * len(files)
    probabilities = np.stack(found["probabilities"])
    assert probabilities.shape == (5, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.slow
def test_a_finished_sweep_trains_nothing_again(
    finished: FinishedSweep, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = sweep(sweep_config(storage))
    lines = logged(capsys)
    assert again.metrics == finished.metrics
    assert again.mlflow_run_id == finished.mlflow_run_id
    assert not [line for line in lines if line.startswith("trial ")]
    assert any("complete, nothing to search" in line for line in lines)
    client = MlflowClient(finished.tracking_uri)
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 3


@pytest.mark.slow
def test_a_poor_trial_is_stopped_and_its_resources_come_back(storage: Path) -> None:
    # Of the few validation slices that there are, the share of right ones says too little.
    rates = {"train.learning_rate": {"choice": [1e-4, 0.1]}}
    config = sweep_config(
        storage,
        "name=halving",
        f"tune.space={json.dumps(rates)}",
        "tune.metric=validation/loss",
        "tune.mode=min",
        "clustering.on_collapse=warn",
        "tune.max_concurrent_trials=1",
        "tune.min_epochs=2",
        "tune.reduction_factor=2",
        "train.num_epochs=6",
        "registry.name=null",
    )
    stopped = sweep(config)
    outcomes = {
        trial["parameters"]["train.learning_rate"]: trial["outcome"]
        for trial in stopped.folder.read_json("trials.json")
    }
    assert outcomes[1e-4] == "complete"
    # Tune decides after the second epoch; a quick third may be over before it is heard.
    assert outcomes[0.1] in {"stopped after epoch 2", "stopped after epoch 3"}
    client = MlflowClient(stopped.tracking_uri)
    experiment = client.get_experiment_by_name("halving")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", "FINISHED"]
    for run in runs:
        if run.info.run_id != stopped.mlflow_run_id:
            figures = {found.path for found in client.list_artifacts(run.info.run_id, "figures")}
            assert {"figures/loss.png", "figures/accuracy.png"} <= figures
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(1)


@pytest.fixture
def placement_groups_are_released() -> Iterator[None]:
    """Afterwards, as at the end of a job: Ray Train keeps the placement group of a trial that was
    killed while its workers were starting, and the next sweep would wait for its CPUs.
    """
    yield
    for identity, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


@pytest.mark.usefixtures("placement_groups_are_released")
@pytest.mark.slow
def test_a_sweep_whose_time_is_up_is_complete(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sweep_config(
        storage,
        "name=short",
        "tune.algorithm=random",
        "tune.num_trials=40",
        "tune.time_budget_min=1.5",
        "registry.name=null",
        'tune.space={"objective.lambda_cluster": {"uniform": [0.1, 0.5]}}',
    )
    found = sweep(config)
    lines = logged(capsys)
    assert 1 <= found.metrics["num_trials"] < 40
    assert any("tune.time_budget_min was used up" in line for line in lines)
    assert sweep(config).metrics == found.metrics
    lines = logged(capsys)
    assert lines[-1].endswith("complete, nothing to search")


@pytest.mark.slow
def test_trials_of_a_search_algorithm_are_found_too(storage: Path) -> None:
    rates = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    config = sweep_config(
        storage,
        "name=searched",
        f"tune.space={json.dumps(rates)}",
        "tune.algorithm=optuna",
        "tune.num_trials=2",
        "train.num_epochs=1",
        "registry.name=null",
    )
    searched = sweep(config)
    trials = searched.folder.read_json("trials.json")
    assert [trial["outcome"] for trial in trials] == ["complete", "complete"]
    first, second = (trial["parameters"]["train.learning_rate"] for trial in trials)
    assert first != second
    assert searched.folder.exists("summary.json")


@pytest.mark.slow
def test_a_sweep_does_not_go_on_with_other_settings(finished: FinishedSweep, storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.metric: validation/score here"):
        sweep(sweep_config(storage, "tune.metric=validation/cluster/accuracy"))
    with pytest.raises(ConfigError, match=r"tune\.max_concurrent_trials: 0 here, 1 requested"):
        sweep(sweep_config(storage, "tune.max_concurrent_trials=1"))


def test_test_figures_choose_nothing() -> None:
    with pytest.raises(ConfigError, match="would fit the sweep to the test slices"):
        load_config(None, ["tune.metric=test/clean/head/accuracy"])


def test_a_metric_is_not_sought_at_its_worst() -> None:
    with pytest.raises(ConfigError, match="validation/loss is best at its min"):
        load_config(None, ["tune.metric=validation/loss"])
    assert load_config(None, ["tune.metric=validation/loss", "tune.mode=min"]).tune.mode == "min"


def test_a_figure_that_no_epoch_reports_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'validation/f1' is not reported after an epoch: use"):
        load_config(None, ["tune.metric=validation/f1"])


def test_a_trial_that_no_cluster_holds_is_refused_at_once(storage: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"train\.num_workers"):
        sweep(sweep_config(storage, "name=crowded", "train.num_workers=64"))
    assert time.monotonic() - started < 30


def test_a_slice_size_that_the_store_does_not_have_is_refused_at_once(storage: Path) -> None:
    space = json.dumps({"train.image_size": {"choice": [32, 64]}})
    with pytest.raises(ConfigError, match=r"train\.image_size \(64\) exceeds preprocess\.image"):
        sweep(sweep_config(storage, "name=large", f"tune.space={space}"))
    assert not (storage / "sweeps" / "large").exists()


def test_weights_that_a_trial_cannot_start_from_are_refused_at_once(storage: Path) -> None:
    space = json.dumps({"encoder.weights": {"choice": ["random", "/no/such.pt"]}})
    with pytest.raises(ConfigError, match=r"encoder\.weights=/no/such\.pt: no such file"):
        sweep(sweep_config(storage, "name=from-nothing", f"tune.space={space}"))
    assert not (storage / "sweeps" / "from-nothing").exists()


def test_paths_of_weights_in_a_space_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space = json.dumps({"encoder.weights": {"choice": ["random", "mine.pt"]}})
    config = resolve_paths(tiny_config(tmp_path, f"tune.space={space}"))
    expected = {"choice": ["random", str(tmp_path / "mine.pt")]}
    assert config.tune.space["encoder.weights"] == expected


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, r"tune\.space is empty"),
        ({"train.lr": {"choice": [1]}}, r"key 'train\.lr' \(known keys: train\.image_size, "),
        ({"train": {"choice": [1]}}, r"key 'train' \(known keys: train\.image_size, "),
        ({"trian.lr": {"choice": [1]}}, r"key 'trian\.lr' \(did you mean 'train'\?"),
        ({"train.learning_rat": {"choice": [1]}}, r"mean 'train\.learning_rate'\?"),
        ({"learning_rate": {"choice": [1]}}, r"did you mean 'train\.learning_rate' or 'self_"),
        ({"split.seed": {"choice": [1, 2]}}, r"cannot vary split\.seed"),
        ({"preprocess.image_size": {"choice": [64]}}, "cannot vary"),
        ({"train.learning_rate": {"uniform": [1e-3, 1e-4]}}, "two increasing numbers"),
        ({"objective.lambda_cluster": {"integer": [0.5, 3]}}, "integer needs whole numbers"),
        ({"train.learning_rate": {"log_uniform": [0, 1]}}, "must start above 0"),
        ({"train.learning_rate": {"choice": [1], "uniform": [1, 2]}}, "exactly one of"),
        ({"train.learning_rate": {"choice": [-1.0]}}, "greater than 0"),
        ({"objective.name": {"choice": []}}, "is empty"),
        ({"objective.name": {"choice": ["joint", "supervsed"]}}, "not 'supervsed'"),
        ({"augment.horizontal_flip": {"uniform": [0.0, 2.0]}}, "less than or equal to 1"),
        ({"clustering.num_clusters": {"uniform": [4, 8]}}, "valid integer"),
        ({"label.num_slices": {"choice": [10]}}, "trials may differ in encoder"),
        ({"self_supervision.num_epochs": {"choice": [1]}}, "no effect without a warm-up"),
        ({"train.max_failures": {"choice": [1]}}, "share the Ray cluster"),
        ({"train.collective_timeout_s": {"choice": [60]}}, "share the Ray cluster"),
        ({"train.cache_gib": {"choice": [1]}}, "share the Ray cluster"),
        ({"encoder.pretext": {"choice": ["none", "contrastive"]}}, "trials share the warm-up"),
        ({"augment.max_zoom": {"uniform": [0.3, 0.3]}}, "two increasing numbers"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(
    space: dict[str, object], message: str, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "name=search", f"tune.space={json.dumps(space)}")
    with pytest.raises(ConfigError, match=message):
        check_space(config)


def test_a_complete_sweep_needs_nothing_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as weights and room for workers."""
    monkeypatch.setattr(driver, "store_to_train_on", lambda config: (config, STORE))
    monkeypatch.setattr(driver, "check_training", None)
    config = sweep_config(tmp_path, "encoder.weights=/gone.pt", "tracking.experiment=search")
    folder = Folder(tmp_path) / "sweeps" / "search"
    _check_or_write_settings(config, STORE, folder)
    found = {"metrics": {"num_trials": 4.0}, "table": "", "mlflow_run_id": None}
    folder.write_json("summary.json", found | {"tracking_uri": ""})
    assert sweep(config).metrics == found["metrics"]
    assert "jobs/export.py --set run=search-TRIAL registry.name=" in logged(capsys)[-1]


def test_a_name_that_leaves_no_room_for_those_of_trials_is_refused(tmp_path: Path) -> None:
    space = f"tune.space={json.dumps(SPACE | {'clustering.num_clusters': {'choice': [4]}})}"
    check_space(tiny_config(tmp_path, space, f"name={80 * 'a'}"))
    with pytest.raises(ConfigError, match="name: "):
        check_space(tiny_config(tmp_path, space, f"name={92 * 'a'}"))


def test_a_sweep_of_an_earlier_version_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sweep_config(tmp_path)
    folder = Folder(tmp_path) / "sweeps" / "search"
    _check_or_write_settings(config, STORE, folder)
    settings = folder.read_json("sweep.json")
    del settings["split"]["validation"], settings["encoder"]["pretext"]
    settings["train"]["labelled_sampling"] = "slice"  # which no longer exists
    earlier = config.model_dump(mode="json", include={"name", "label", "epoch", "source"})
    folder.write_json("sweep.json", settings | earlier)
    _check_or_write_settings(config, STORE, folder)
    assert logged(capsys)[1:] == [f"sweep {folder}: resumed"]


def test_a_sweep_goes_on_with_what_does_not_affect_its_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path) / "sweeps" / "search"
    _check_or_write_settings(sweep_config(tmp_path), STORE, folder)
    other = ["train.max_failures=5", "train.device=cpu", "label.num_slices=7", "source=/elsewhere"]
    _check_or_write_settings(sweep_config(tmp_path, *other), STORE, folder)
    assert logged(capsys)[1:] == [f"sweep {folder}: resumed"]
    with pytest.raises(ConfigError, match=r"train\.weight_decay: "):
        _check_or_write_settings(sweep_config(tmp_path, "train.weight_decay=0.5"), STORE, folder)


def as_trial(trained: TrainedRun, storage: Path, sweep: str, trial_id: str) -> Path:
    """A copy of a run as a trial of a sweep in ``storage``."""
    folder = storage / "runs" / f"{sweep}-{trial_id}"
    shutil.copytree(str(trained.run.folder), folder)
    config = trained.run.saved_config()
    tracked = config.tracking.model_copy(update={"experiment": sweep})
    config = config.model_copy(update={"tracking": tracked})
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def test_a_run_that_is_named_like_a_trial_is_none(trained: TrainedRun, tmp_path: Path) -> None:
    as_trial(trained, tmp_path, "search", "0a1b2_00000")
    shutil.copytree(str(trained.run.folder), tmp_path / "runs" / "search-20261128")
    found = read_trials(sweep_config(tmp_path))
    assert [trial.trial_id for trial in found] == ["0a1b2_00000"]


def test_a_sweep_without_tunes_state_begins_anew_or_says_why_not(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_config(tmp_path)
    state = Folder(tmp_path) / "sweeps" / "search" / "tune"
    assert not _has_state(config, state)
    write_session(config, state, "a")
    assert _has_state(config, state)
    kept = state.names()
    with monkeypatch.context() as away:
        away.setattr(Folder, "read_bytes", Mock(side_effect=StorageError("storage is away")))
        with pytest.raises(StorageError):
            _has_state(config, state)
    assert state.names() == kept
    state.write_bytes("experiment_state-a.json", b'{"trial_data": [')  # a kill has cut it
    as_trial(trained, tmp_path, "search", "0a1b2_00000")
    with pytest.raises(ConfigError, match=r"lost Tune's state.*1 runs, such as search-0a1b2_"):
        _has_state(config, state)
    shutil.rmtree(tmp_path / "runs")
    assert not _has_state(config, state)
    assert not state.exists()


def write_session(config: Config, state: Folder, session: str) -> None:
    """What Tune saves, with the session's name as its content."""
    state.write_bytes("tuner.pkl", pickle.dumps(None))
    trials, *searcher = _files_of(config, session)
    state.write_json(trials, session)
    for name in searcher:
        state.write_bytes(name, pickle.dumps(session))


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna"])
def test_tune_resumes_from_one_session_whichever_file_is_cut(
    algorithm: str, tmp_path: Path
) -> None:
    space = 'tune.space={"train.learning_rate": {"choice": [0.1]}}'
    config = sweep_config(tmp_path, f"tune.algorithm={algorithm}", space)
    kinds = [TuneController.CKPT_FILE_TMPL, BasicVariantGenerator.CKPT_FILE_TMPL]
    if algorithm == "optuna":
        kinds[1:] = [SearchGenerator.CKPT_FILE_TMPL, Searcher.CKPT_FILE_TMPL]
    for cut, share in itertools.product(kinds, (None, 0.0, 0.5)):  # None: not written at all
        state = Folder(tmp_path / f"{cut}-{share}")
        for session in "ab":
            write_session(config, state, session)
        content = state.read_bytes(cut.format("b"))
        state.delete_file(cut.format("b"))
        if share is not None:
            state.write_bytes(cut.format("b"), content[: int(share * len(content))])
        assert _has_state(config, state)
        newest = [max(fnmatch.filter(state.names(), kind.format("*"))) for kind in kinds]
        trials, *searcher = (state.read_bytes(name) for name in newest)
        assert [json.loads(trials), *map(pickle.loads, searcher)] == ["a"] * len(kinds)


def test_a_resumed_search_waits_for_no_trial_that_is_unknown(tmp_path: Path) -> None:
    """Tune's own copy of a later session, on the driver's machine, is overwritten."""
    config = sweep_config(tmp_path)
    state, own = Folder(tmp_path / "storage"), tmp_path / "own"
    own.mkdir()
    write_session(config, state, "a")
    write_session(config, state, "b")
    search = BasicVariantGenerator(max_concurrent=1)
    for session, running in (("a", "abc12_00001"), ("b", "abc12_00004")):
        search._live_trials = {running}
        for folder in (tmp_path / "storage", own):
            search.save_to_dir(str(folder), session_str=session)
    state.write_bytes("experiment_state-b.json", b'{"trial_data": [')
    assert _has_state(config, state)
    shutil.copytree(tmp_path / "storage", own, dirs_exist_ok=True)  # as Tune does
    resumed = BasicVariantGenerator(max_concurrent=1)
    resumed.restore_from_dir(str(own))
    resumed.on_trial_complete("abc12_00001")
    assert (resumed.next_trial(), resumed.is_finished()) == (None, True)


def test_a_state_of_another_version_is_refused_in_one_line(
    tmp_path: Path, ray_cluster: None
) -> None:
    state = Folder(tmp_path) / "sweeps" / "search" / "tune"
    write_session(sweep_config(tmp_path), state, "a")
    state.write_bytes("tuner.pkl", b"cbrainray.orchestration.sweep\n_Moved\n.")  # pickled by name
    with pytest.raises(ConfigError, match=r"another version of brainray or Ray \(.*_Moved"):
        build_tuner(sweep_config(tmp_path), STORE, state.parent, WorkerResources(1, 1, 0, 1))


def test_trials_run_on_the_machine_of_the_driver_wherever_the_head_is(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here,) = ray.nodes()
    head = here | {"NodeID": "0" * 56, "NodeManagerAddress": "10.0.0.1"}
    monkeypatch.setattr(ray, "nodes", lambda: [head, here])
    with_resources = Mock(wraps=tune.with_resources)
    monkeypatch.setattr(tune, "with_resources", with_resources)
    build_tuner(sweep_config(tmp_path), STORE, Folder(tmp_path), WorkerResources(1, 1, 0, 1))
    (resource,) = with_resources.call_args.args[1]
    assert resource == f"node:{ray.util.get_node_ip_address()}"
    assert resource in here["Resources"]


@pytest.mark.slow
def test_a_resumed_sweep_has_its_trials_on_the_machine_of_its_new_driver(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = "node:__internal_head__"  # stands for the machine of the driver before
    space = "tune.space={objective.lambda_cluster: {choice: [0.1]}}"
    config = sweep_config(tmp_path, "train.max_failures=0", space)

    def trial(parameters: dict[str, Any], **_: object) -> None:
        if gone in tune.get_context().get_trial_resources().required_resources:
            raise RuntimeError("interrupted")
        tune.report({config.tune.metric: 1.0, "epoch": 1})

    monkeypatch.setattr(tuner, "run_trial", trial)
    with monkeypatch.context() as before:
        before.setattr(tuner, "_this_machine", lambda: gone)
        assert (
            build_tuner(config, STORE, Folder(tmp_path), WorkerResources(1, 1, 0, 1))
            .fit()
            .num_errors
        )
    results = build_tuner(config, STORE, Folder(tmp_path), WorkerResources(1, 1, 0, 1)).fit()
    assert (len(results), results.num_errors) == (1, 0)


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_that_has_trained_to_its_end_is_not_stopped(scheduler: str, tmp_path: Path) -> None:
    config = sweep_config(tmp_path, f"tune.scheduler={scheduler}", "train.num_epochs=3")
    made: Any = _scheduler(config)
    made.set_search_properties("score", "max")
    waiting: list[Mock] = []
    controller = Mock(get_live_trials=lambda: waiting)

    def actions_of(name: str, values: Sequence[float], **parameters: int) -> list[str]:
        trial = Mock(trial_id=name, config=parameters)
        made.on_trial_add(controller, trial)
        results = [{"epoch": epoch, "score": value} for epoch, value in enumerate(values, start=1)]
        actions = [made.on_trial_result(controller, trial, result) for result in results]
        made.on_trial_complete(controller, trial, results[-1])
        return actions

    going_on = [TrialScheduler.CONTINUE] * 3
    waiting.append(Mock(status="PENDING"))  # a pause would cost the epoch that has begun
    assert actions_of("first while another waits", [0.5, 0.5, 2.0]) == going_on
    waiting.clear()
    for name in "abc":
        assert actions_of(name, [0.5, 0.5, 2.0]) == going_on
    assert actions_of("could not be trained", [-math.inf] * 3) == going_on
    assert actions_of("no match for the others at its end", [0.6] * 3) == going_on
    assert actions_of("no match for them at once", [0.4] * 2)[1] == TrialScheduler.STOP
    shorter = actions_of("trained for two epochs only", [0.4] * 2, **{"train.num_epochs": 2})
    assert shorter == going_on[:2]
    longer = actions_of("trained for longer", [0.4, 2.0, 2.0, 2.0], **{"train.num_epochs": 4})
    assert longer[2:] == [TrialScheduler.CONTINUE] * 2


def test_runs_that_a_deleted_sweep_has_left_are_not_this_ones(
    trained: TrainedRun, tmp_path: Path
) -> None:
    as_trial(trained, tmp_path, "search", "0a1b2_00000")
    folder = Folder(tmp_path) / "sweeps" / "search"
    with pytest.raises(ConfigError, match=r"deleted sweep 'search'.*runs/search-0a1b2_00000 and"):
        _check_or_write_settings(sweep_config(tmp_path), STORE, folder)
    assert not folder.exists()


def test_trials_share_one_draw_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.num_label_draws: trials share one label"):
        sweep(sweep_config(tmp_path, "evaluation.num_label_draws=3"))


@pytest.mark.parametrize("key", ["self_supervision.temperature", "train.weight_decay"])
def test_trials_share_the_warm_up(tmp_path: Path, key: str) -> None:
    space = {key: {"choice": [0.1, 0.2]}}
    settings = [f"tune.space={json.dumps(space)}", "encoder.pretext=contrastive"]
    settings += ["encoder.pretext_image_size=16"]
    with pytest.raises(ConfigError, match=rf"cannot vary {re.escape(key)}: trials share"):
        check_space(tiny_config(tmp_path, "name=search", *settings))


def test_a_grid_has_no_ranges(tmp_path: Path) -> None:
    space = {"augment.max_zoom": {"uniform": [0.1, 0.3]}}
    with pytest.raises(ConfigError, match=r"accepts choice only: tune\.space\.augment\.max_zoom"):
        check_space(sweep_config(tmp_path, f"tune.space={json.dumps(space)}"))


def test_ranges_are_searched_as_they_are_named(tmp_path: Path) -> None:
    space: dict[str, dict[str, list[float]]] = {
        "augment.max_zoom": {"uniform": [0.1, 0.3]},
        "train.learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "clustering.num_clusters": {"integer": [4, 5]},
    }
    found = _param_space(tiny_config(tmp_path, "name=search", f"tune.space={json.dumps(space)}"))
    assert [type(found[key].get_sampler()).__name__ for key in space] == [
        "_Uniform",
        "_LogUniform",
        "_Uniform",
    ]
    assert set(found["clustering.num_clusters"].sample(size=50)) == {4, 5}
    grid = _param_space(sweep_config(tmp_path))
    assert grid == {key: {"grid_search": entry["choice"]} for key, entry in SPACE.items()}


def test_the_reason_of_a_lost_trial_is_the_last_line_of_its_error() -> None:
    lost = SimpleNamespace(error="Traceback:\n  File ...\nNodeDiedError: gone\n", metrics={})
    lost.metrics = {"trial_id": "abc_00001"}
    sound = SimpleNamespace(error=None, metrics={"trial_id": "abc_00000"})
    assert errors_of(cast(Any, [sound, lost])) == {"abc_00001": "NodeDiedError: gone"}


def test_parameters_reach_their_keys(tmp_path: Path) -> None:
    config = trial_config(
        tiny_config(tmp_path), {"train.learning_rate": 0.01, "objective.name": "supervised"}, "one"
    )
    assert config.train.learning_rate == 0.01
    assert config.objective.name == "supervised"
    assert config.name == "one"


def test_a_policy_brings_its_own_strengths(tmp_path: Path) -> None:
    base = tiny_config(tmp_path, "augment.bias_field=0.05")
    parameters = {"augment.policy": "strong", "augment.max_zoom": 0.3}
    augmented = trial_config(base, parameters, "one").augment
    expected = AugmentConfig(policy="strong", max_zoom=0.3)
    assert augmented == expected
    assert augmented.bias_field > 0.05
    assert trial_config(base, {"seed": 1}, "two").augment.bias_field == 0.05


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    space = "tune.space={train.learning_rate: {log_uniform: [1e-4, 1e-2]}}"
    config = tiny_config(tmp_path, "name=search", space)
    check_space(config)
    assert config.tune.space["train.learning_rate"]["log_uniform"] == [1e-4, 1e-2]


def test_trials_share_the_ray_cluster_in_equal_parts(tmp_path: Path) -> None:
    space = "tune.space={train.num_workers: {choice: [1, 2]}}"
    with pytest.raises(ConfigError, match=r"cannot vary train\.num_workers: trials share"):
        check_space(tiny_config(tmp_path, "name=search", space))


def test_a_trial_that_failed_is_not_the_best(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "name=search", f"tune.space={json.dumps(SPACE)}")
    metric = config.tune.metric
    diverged, sound = (
        Trial(
            name,
            None,
            {},
            [
                {
                    "epoch": 1.0,
                    "train/image_size": 32.0,
                    "validation/score_error": 0.1,
                    metric: value,
                }
            ],
            config.train,
            problem,
        )
        for name, value, problem in (("a", 0.9, "epoch 2: the loss is NaN"), ("b", 0.8, None))
    )
    assert ranked_trials(config, [diverged, sound]) == [sound]


def epochs(*losses: float) -> list[dict[str, float]]:
    """The history of a trial, of which the first epoch with the best score is kept."""
    return [
        {
            "epoch": float(number),
            "train/image_size": 32.0,
            "validation/score": 1 - loss,
            "validation/score_error": 0.0,
            "validation/loss": loss,
            "time/images_per_s": 100.0 * number,
            "time/epoch_s": 10.0 * number,
        }
        for number, loss in enumerate(losses, start=1)
    ]


def test_trials_are_ranked_by_the_mode_of_the_metric(tmp_path: Path) -> None:
    losing = tiny_config(tmp_path, "tune.metric=validation/loss", "tune.mode=min")
    one, two = (
        Trial(name, None, {}, epochs(value), losing.train)
        for name, value in zip("ab", (0.2, 0.1), strict=True)
    )
    assert ranked_trials(losing, [one, two]) == [two, one]


def test_a_trial_that_failed_before_its_run_began_is_known(tmp_path: Path) -> None:
    folder = Folder(tmp_path) / "sweeps" / "search" / trials.FAILED
    failure = {"parameters": {"clustering.num_clusters": 3}, "problem": "K is too small"}
    folder.write_json("0a1b2_00001.json", failure)
    (found,) = read_trials(sweep_config(tmp_path))
    assert (found.trial_id, found.run, found.history) == ("0a1b2_00001", None, [])
    assert {"parameters": found.parameters, "problem": found.problem} == failure


def test_how_a_trial_ended_is_told_in_a_few_words(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    follower = SweepFollower(config, cast(Any, None))
    follower.errors = {"lost": "NodeDiedError: gone"}
    outcomes = {
        name: follower.outcome(Trial(name, None, {}, history, config.train, problem))
        for name, history, problem in (
            ("stopped", epochs(0.5), None),
            ("at its end", epochs(0.5, 0.4), None),
            ("lost", epochs(0.5), None),
            ("failed", [], "K is too small"),
        )
    }
    assert outcomes == {
        "stopped": "stopped after epoch 1",
        "at its end": "complete except for its report",
        "lost": "failed: NodeDiedError: gone",
        "failed": "failed: K is too small",
    }


def test_the_table_tells_the_chosen_epoch_and_ends_with_trials_without_one(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    found = [
        Trial("none", None, {}, [], config.train),
        Trial("three", None, {"clustering.num_clusters": 4}, epochs(0.5, 0.25, 0.4), config.train),
    ]
    table = trials_table(config, found, lambda _: "ended", limit=None).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert rows == [
        ["three", "ended", "null", "4", "0.7500", "2/3", "300"],
        ["none", "ended", "null", "null", "–", "–", "–"],
    ]


def test_every_new_epoch_of_a_trial_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sweep_config(tmp_path, "tune.metric=validation/loss", "tune.mode=min")
    follower = SweepFollower(config, cast(Any, None))
    trial = Trial(
        "abc_00000", None, {"clustering.num_clusters": 4}, epochs(0.5, 0.25), config.train
    )
    assert follower._log_new_epochs(trial)
    assert not follower._log_new_epochs(trial)
    start = "trial abc_00000 (clustering.num_clusters 4): "
    assert logged(capsys) == [
        f"{start}epoch 1/2, validation/loss 0.5000, 100 images/s, 0:00:10 left",
        f"{start}epoch 2/2, validation/loss 0.2500, 200 images/s, 0:00:00 left",
    ]


def test_a_stopped_trial_is_sent_with_its_curves_which_are_drawn_once_for_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sweep_config(tmp_path)
    sent: list[dict[str, bytes]] = []
    record = SimpleNamespace(classes=["glioma", "notumor"])
    run = Run(Folder(tmp_path / "runs" / "search-a"), cast(Any, record))

    def send(run: Run, _: Any) -> None:
        figures = run.folder / "figures"
        sent.append({name: figures.read_bytes(name) for name in figures.names()})

    monkeypatch.setattr(follower_module, "send_run", send)

    def close(history: list[dict[str, float]], num_before: int) -> None:
        follower = SweepFollower(config, cast(Any, None))
        follower._children["a"] = Mock(problem=None)
        follower._num_before = {"a": num_before}
        run.folder.write_json_lines("metrics.jsonl", history)
        follower.close(Trial("a", run, {}, history, config.train))

    drawn = {"train/loss/total": 1.0, "cluster/largest_share": 0.5, "time/train_s": 9.0}
    history = [epoch | drawn for epoch in epochs(0.5, 0.25)]
    close(history[:1], num_before=0)
    names = {"accuracy.png", "clustering_health.png", "loss.png", "timing.png"}
    assert sent[0].keys() == names
    assert all(content.startswith(b"\x89PNG") for content in sent[0].values())
    run.folder.write_bytes("figures/loss.png", b"as drawn")
    close(history[:1], num_before=1)
    assert sent[1]["loss.png"] == b"as drawn"
    assert logged(capsys) == []
    damaged = [*history[:1], {"epoch": 2.0}]
    close(damaged, num_before=1)
    assert sent[2] == sent[1]
    assert logged(capsys)[0].startswith("trial a: no figures: KeyError")
    close(history, num_before=1)
    assert sent[3]["loss.png"] not in {b"as drawn", sent[0]["loss.png"]}


@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), ("gone", "FAILED")])
def test_a_lost_trial_has_failed_in_mlflow_and_a_stopped_one_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str | None, status: str
) -> None:
    monkeypatch.setattr(follower_module, "send_run", Mock())
    config = sweep_config(tmp_path)
    follower = SweepFollower(config, cast(Any, None))
    child = follower._children["a"] = Mock(problem=None)
    follower.errors = {} if error is None else {"a": error}
    run = Run(Folder(tmp_path / "runs" / "search-a"), cast(Any, None))
    follower.close(Trial("a", run, {}, [], config.train))
    child.finish.assert_called_once_with(status, with_last_metrics=True)


def test_why_no_trial_could_be_trained_is_told_once_per_reason(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, "tune.time_budget_min=2")
    failed = [Trial(name, None, {}, [], config.train, "K is too small") for name in "ab"]
    reasons = _reasons_for_failure(config, failed, {"c": "gone", "d": "gone"})
    assert reasons == "K is too small; gone"
    assert "within tune.time_budget_min=2" in _reasons_for_failure(config, [], {})


@pytest.mark.parametrize(
    ("errors", "problem", "is_complete"),
    [({}, None, True), ({"c": "gone"}, None, False), ({}, "MLflow is away", False)],
)
def test_a_sweep_that_lacks_something_is_not_complete(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    errors: dict[str, str],
    problem: str | None,
    is_complete: bool,
) -> None:
    """Its best model is registered if no trial was lost."""
    monkeypatch.setattr(driver, "draw_sweep_figures", Mock())
    log_model = Mock()
    monkeypatch.setattr(driver, "_log_model", log_model)
    config = sweep_config(tmp_path)
    best = Trial("a", None, {"clustering.num_clusters": 4}, epochs(0.5, 0.25), config.train)
    failed = Trial("b", None, {}, [], config.train, "K is too small")
    follower = Mock(errors=errors, problem=problem, outcome=lambda _: "ended")
    tracker = Mock(problem=None, mlflow_run_id="m", uri="u")
    folder = Folder(tmp_path / "sweeps" / "search")
    concluded = _conclude(config, folder, [failed, best], [best], follower, tracker)
    assert folder.exists("summary.json") == is_complete
    assert log_model.call_args.args[3] == (None if errors else "mri-classifier")
    assert concluded.metrics == {
        "best/validation/score": 0.75,
        "best/epoch": 2.0,
        "num_trials": 2.0 + len(errors),
        "num_failed": 1.0 + len(errors),
    }
    assert [row["seconds"] for row in folder.read_json("trials.json")] == [0, 30.0]


@pytest.mark.parametrize(
    ("metric", "mode", "worst"),
    [("validation/score", "max", -math.inf), ("validation/loss", "min", math.inf)],
)
def test_a_trial_that_cannot_be_trained_reports_the_worst_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, mode: str, worst: float
) -> None:
    report = Mock()
    monkeypatch.setattr(tune, "report", report)
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "a"))
    monkeypatch.setattr(sys, "argv", ["default_worker.py"])
    monkeypatch.setattr(trials, "begun_training", Mock(side_effect=ClusteringError("K")))
    config = sweep_config(tmp_path, f"tune.metric={metric}", f"tune.mode={mode}")
    run_trial({}, base=config.model_dump(mode="json"), data_hash="", command=["tune.py"])
    report.assert_called_once_with({"epoch": 2, metric: worst})


def test_a_search_optimises_what_trials_are_ranked_by() -> None:
    def epoch(number: int, score: float) -> dict[str, float]:
        validation = {"validation/score": score, "validation/score_error": 0.01}
        return {"epoch": float(number), "train/image_size": 64.0, "test/all": 0.5} | validation

    found = reported_metrics([epoch(1, 0.9), epoch(2, 0.5)])
    assert found == {"epoch": 2.0, "validation/score": 0.9, "validation/score_error": 0.01}


def test_a_trial_counts_by_the_epoch_whose_model_it_keeps(tmp_path: Path) -> None:
    score = "validation/score"
    sizes_and_scores = ((64, 0.80), (64, 0.93), (128, 0.90), (128, 0.89))
    history = [
        {"epoch": float(n), "train/image_size": float(side), score: value, "validation/loss": 1 / n}
        | {"validation/score_error": 0.03}
        for n, (side, value) in enumerate(sizes_and_scores, start=1)
    ]
    trial = Trial("a", None, {}, history, tiny_config(tmp_path).train)
    assert trial.chosen(score) == (0.89, 4)  # about as good as 0.90; 0.93 is of smaller slices
    assert trial.chosen("validation/loss") == (0.25, 4)
    assert replace(trial, history=[]).chosen(score) is None


def test_a_trial_that_failed_and_is_then_trained_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(get_trial_id=lambda: "abc12_00000")
    monkeypatch.setattr(tune, "get_context", lambda: context)
    monkeypatch.setattr(tune, "report", Mock())
    monkeypatch.setattr(sys, "argv", ["default_worker.py"])
    collapsed, complete = ClusteringError("collapsed"), SimpleNamespace(is_complete=True)
    complete.folder = Mock(read_json_lines=lambda _: epochs(0.5))
    training = contextlib.nullcontext(SimpleNamespace(run=complete))
    monkeypatch.setattr(trials, "begun_training", Mock(side_effect=[collapsed, training]))
    config = sweep_config(tmp_path)
    for problems in (["collapsed"], []):
        run_trial({}, base=config.model_dump(mode="json"), data_hash="", command=["tune.py"])
        assert [trial.problem for trial in read_trials(config)] == problems


def test_a_trial_is_not_to_blame_for_what_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, float]] = []
    monkeypatch.setattr(tune, "report", reported.append)
    context = SimpleNamespace(get_trial_id=lambda: "abc_00000")
    monkeypatch.setattr(tune, "get_context", lambda: context)
    monkeypatch.setattr(sys, "argv", ["default_worker.py"])
    base = tiny_config(tmp_path, "name=search", "dataset=mri").model_dump(mode="json")
    failed = Folder(tmp_path) / "sweeps" / "search" / trials.FAILED

    def raising(error: BrainrayError) -> Callable[..., None]:
        def begin(*_: object) -> None:
            raise error

        return begin

    passing: BrainrayError
    for passing in (
        StorageError("no space left"),
        RoomError("2 workers do not"),
        BusyError("by"),
        StoreChangedError("has changed"),
    ):
        monkeypatch.setattr(trials, "begun_training", raising(passing))
        with pytest.raises(type(passing), match=str(passing)):
            run_trial({}, base=base, data_hash="", command=["tune.py"])
    assert (failed.names(), reported) == ([], [])
    monkeypatch.setattr(trials, "begun_training", raising(ClusteringError("K is too small")))
    run_trial({}, base=base, data_hash="", command=["tune.py"])
    assert (failed.names(), len(reported)) == (["abc_00000.json"], 1)
    assert command_line() == "tune.py"  # as recorded in its provenance


def test_a_trial_is_not_trained_on_slices_that_the_sweep_did_not_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(get_trial_id=lambda: "abc12_00000")
    monkeypatch.setattr(tune, "get_context", lambda: context)
    monkeypatch.setattr(sys, "argv", ["default_worker.py"])
    updated = Manifest.model_construct(data_hash="def")
    monkeypatch.setattr(Manifest, "read", lambda _: updated)
    config = sweep_config(tmp_path)
    (Folder(tmp_path) / "datasets" / "mri").write_json("manifest.json", {})
    with pytest.raises(StoreChangedError, match=r"\(hash abc before, def now\)"):
        run_trial({}, base=config.model_dump(mode="json"), data_hash="abc", command=["tune.py"])
    assert read_trials(config) == []  # its settings are not the cause


def test_trials_that_were_stopped_are_marked_so_in_mlflow(
    trained: TrainedRun, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "name=cut", f"tune.space={json.dumps(SPACE)}")
    parent = open_tracking(config, Folder(tmp_path) / "sweeps" / "cut", {}, {})
    follower = SweepFollower(config, parent)
    complete, stopped, running = (f"abc12_{number:05d}" for number in range(3))
    for trial_id in (complete, stopped, running):
        folder = as_trial(trained, tmp_path, "cut", trial_id)
        (folder / "tracking.json").unlink()
        if trial_id != complete:
            (folder / "summary.json").unlink()
    client = MlflowClient(parent.uri)
    experiment = client.get_experiment_by_name("brainray")
    assert experiment is not None

    def runs() -> dict[str, MlflowRun]:
        found = client.search_runs([experiment.experiment_id])
        tagged = ((run.data.tags.get("brainray.trial_id"), run) for run in found)
        return {trial_id: run for trial_id, run in tagged if trial_id is not None}

    with held(Folder(tmp_path), "runs", f"cut-{running}"):
        follower.poll()
        status = {name: run.info.status for name, run in runs().items()}
        assert status == {complete: "FINISHED", stopped: "FINISHED", running: "RUNNING"}
    follower.end("KILLED")
    ended = runs()
    assert ended[running].info.status == "KILLED"
    info = ended[stopped].info
    assert info.status == "FINISHED"
    assert info.end_time == client.get_metric_history(info.run_id, "validation/score")[-1].timestamp
    assert all("brainray.torch" in run.data.tags for run in ended.values())


def test_the_table_while_it_runs_shows_every_trial_that_does(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, "name=search", f"tune.space={json.dumps(SPACE)}", "train.num_epochs=4"
    )
    trials = []
    for number in range(5):
        trial_id = f"abc_{number:05d}"
        epoch = {
            "epoch": 1.0,
            "validation/score": 0.9 - 0.1 * number,
            "validation/score_error": 0.05,
            "time/epoch_s": 10.0,
            "time/images_per_s": 123.0,
            "train/image_size": 32.0,
        }
        run = Run(Folder(tmp_path / "runs" / f"search-{trial_id}"), cast(Any, None))
        trials.append(Trial(trial_id, run, {}, [epoch], config.train))
    follower = SweepFollower(config, cast(Any, None))
    with held(Folder(tmp_path), "runs", "search-abc_00004"):  # the worst
        table = trials_table(config, trials, follower.state, limit=2).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "abc_00000",
        "abc_00001",
        "abc_00004",
    ]
    assert "stopped after epoch 1" in table[2]
    assert "running, 0:00:30 left" in table[4]
    assert "123" in table[4]
