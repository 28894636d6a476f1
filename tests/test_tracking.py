"""MLflow shows the run's folder: nothing twice, nothing lost, and no server is not the end."""

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
from mlflow import MlflowClient, environment_variables
from mlflow.entities import Metric
from mlflow.models import Model

from brainray.storage import Folder
from brainray.tracking import ServedFiles, Tracker, artifact_location, default_uri

HISTORY = [{"epoch": float(epoch), "train/loss/ce": 1.0 / epoch} for epoch in (1, 2, 3)]
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path) / "runs" / "first"
    folder.write_bytes("figures/a.png", b"png")
    return folder


def database(run: Folder) -> str:
    return f"sqlite:///{run.path}/mlflow.db"


def tracker(run: Folder, uri: str) -> Tracker:
    return Tracker(run, uri, "tests", artifact_location(uri, Folder(run.uri)))


def begun(run: Folder, uri: str, params: dict[str, object] | None = None) -> Tracker:
    made = tracker(run, uri)
    made.begin("first", params or {}, {})
    assert made.problem is None
    return made


def test_a_restarted_driver_goes_on_in_the_same_run_without_repeating(run: Folder) -> None:
    uri = database(run)
    first = tracker(run, uri)
    first.begin("first", {"train.num_epochs": 3}, {"brainray.data_hash": "abc"})
    first.log_epochs(HISTORY[:2])
    second = tracker(run, uri)
    second.begin("first", {"train.num_epochs": 3}, {"brainray.data_hash": "abc"})
    second.log_epochs(HISTORY)
    for _ in range(2):
        second.log_summary({"test/all/head/accuracy": 0.9, "undefined": float("nan")})
    second.log_files(["figures/a.png"])
    second.finish()
    assert first.problem is second.problem is None

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [found.info.run_id for found in runs] == [first.mlflow_run_id] == [second.mlflow_run_id]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"train.num_epochs": "3"}
    assert runs[0].data.tags["brainray.data_hash"] == "abc"
    logged = client.get_metric_history(runs[0].info.run_id, "train/loss/ce")
    assert [(metric.step, metric.value) for metric in logged] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert "epoch" not in runs[0].data.metrics  # it is the step
    assert runs[0].data.metrics["final/test/all/head/accuracy"] == 0.9
    sent = client.get_metric_history(runs[0].info.run_id, "final/test/all/head/accuracy")
    assert len(sent) == 1
    assert "final/undefined" not in runs[0].data.metrics
    artifact = client.list_artifacts(runs[0].info.run_id, "figures")[0]
    assert artifact.path == "figures/a.png"
    assert experiment.artifact_location.startswith((run.local_path or Path()).as_uri())


def test_a_run_that_has_ended_stays_so_until_it_goes_on(run: Folder) -> None:
    client = MlflowClient(database(run))
    first = begun(run, database(run))
    first.finish("FAILED")
    ended = client.get_run(str(first.mlflow_run_id)).info
    again = begun(run, database(run))
    assert client.get_run(str(first.mlflow_run_id)).info.status == "FAILED"
    again.finish("KILLED", unless_ended=True)
    assert again.problem is None
    again.finish("FAILED")
    assert again.problem is None
    after = client.get_run(str(first.mlflow_run_id)).info
    assert (after.status, after.end_time) == (ended.status, ended.end_time)
    again.finish("KILLED")
    assert client.get_run(str(first.mlflow_run_id)).info.status == "KILLED"
    again.running()
    assert client.get_run(str(first.mlflow_run_id)).info.status == "RUNNING"
    again.finish()
    assert client.get_run(str(first.mlflow_run_id)).info.status == "FINISHED"


def test_a_run_that_stopped_some_time_ago_ended_with_its_last_metrics(run: Folder) -> None:
    tracker = begun(run, database(run))
    tracker.log_epochs(HISTORY)
    time.sleep(0.01)
    tracker.finish(with_last_metrics=True)
    client = MlflowClient(database(run))
    last = client.get_metric_history(str(tracker.mlflow_run_id), "train/loss/ce")[-1]
    assert client.get_run(str(tracker.mlflow_run_id)).info.end_time == last.timestamp


def test_a_run_that_goes_on_while_the_server_is_away_is_said_to_run_when_it_is_back(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = begun(run, database(run))
    ended.finish("FAILED")
    assert ended.problem is None
    after = tracker(run, database(run))
    with monkeypatch.context() as away:
        away.setattr(after, "_connect", Mock(side_effect=OSError("away")))
        after.begin("first", {}, {})
        after.running()
    after.log_epochs(HISTORY)
    assert after.problem is None
    client = MlflowClient(database(run))
    assert client.get_run(str(ended.mlflow_run_id)).info.status == "RUNNING"


def test_an_epoch_whose_answer_was_lost_is_kept_once_and_later_ones_follow(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begun(run, database(run))
    send = MlflowClient.log_batch

    def send_and_lose_the_answer(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
        send(client, run_id, metrics)
        if metrics[0].step == 2:
            raise ConnectionError("the server went away")

    with monkeypatch.context() as lossy:
        lossy.setattr(MlflowClient, "log_batch", send_and_lose_the_answer)
        made.log_epochs(HISTORY)
        assert "went away" in str(made.problem)
    time.sleep(0.01)  # the clock goes on
    made.log_epochs(HISTORY)
    assert made.problem is None
    logged = MlflowClient(database(run)).get_metric_history(
        str(made.mlflow_run_id), "train/loss/ce"
    )
    assert [metric.step for metric in logged] == [1, 2, 3]


def test_epochs_that_are_trained_again_are_sent_again(run: Folder) -> None:
    """After a damaged checkpoint, a run resumes from an earlier epoch."""
    sending = begun(run, database(run))
    sending.log_epochs(HISTORY)
    again = [*HISTORY[:2], {"epoch": 3.0, "train/loss/ce": 0.25}]
    sending.log_epochs(again[:2])
    time.sleep(0.01)  # MLflow counts milliseconds
    sending.log_epochs(again)
    client = MlflowClient(database(run))
    logged = client.get_metric_history(str(sending.mlflow_run_id), "train/loss/ce")
    latest = {metric.step: metric.value for metric in sorted(logged, key=lambda m: m.timestamp)}
    assert latest == {1: 1.0, 2: 0.5, 3: 0.25}
    assert client.get_run(str(sending.mlflow_run_id)).data.metrics["train/loss/ce"] == 0.25


def test_epochs_that_another_process_has_sent_are_not_sent_again(run: Folder) -> None:
    first = begun(run, database(run))
    first.log_epochs(HISTORY[:1])
    other = begun(run, database(run))
    other.log_epochs(HISTORY)
    first.log_epochs(HISTORY)
    assert first.problem is other.problem is None
    logged = MlflowClient(database(run)).get_metric_history(
        str(first.mlflow_run_id), "train/loss/ce"
    )
    assert [metric.step for metric in logged] == [1, 2, 3]


def test_an_unreachable_server_is_said_once_and_nothing_is_lost(
    run: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tracker(run, NOWHERE)
    away.begin("first", {}, {})
    for count in (1, 2, 3):
        away.log_epochs(HISTORY[:count])
    away.log_files(["figures/a.png"])
    away.finish()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "127.0.0.1:9 cannot be used" in said[0]
    assert away.problem is not None

    back = begun(run, database(run))
    back.log_epochs(HISTORY)
    assert back.problem is None
    client = MlflowClient(database(run))
    run_id = run.read_json("tracking.json")["run_id"]
    assert len(client.get_metric_history(run_id, "train/loss/ce")) == 3


def test_what_was_not_sent_is_known_until_it_is(
    run: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    barred = run.parent / "barred"
    barred.parent.write_bytes("barred", b"a file where artifacts should go")
    uri = database(run)
    sending = Tracker(run, uri, "barred", f"file://{barred.path}/artifacts")
    sending.begin("first", {}, {})
    sending.log_files(["figures/a.png"])
    sending.log_epochs(HISTORY)
    sending.finish()
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert sending.problem is not None
    barred.parent.delete_file("barred")
    sending.log_files(["figures/a.png"])
    assert sending.problem is None


def test_passwords_stay_out_of_messages(run: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tracker(run, "http://user:hunter2@127.0.0.1:9")
    secret.begin("first", {}, {})
    for said in (str(secret.problem), capsys.readouterr().out):
        assert "127.0.0.1:9 cannot be used" in said
        assert "hunter2" not in said


def test_a_run_that_the_server_has_lost_is_made_anew(run: Folder) -> None:
    lost = {"uri": database(run), "run_id": "0" * 32, "epochs_sent": 3, "params_sent": True}
    run.write_json("tracking.json", lost)
    after = begun(run, database(run), {"a": 1})
    after.log_epochs(HISTORY)
    assert after.mlflow_run_id != lost["run_id"]
    client = MlflowClient(database(run))
    assert len(client.get_metric_history(str(after.mlflow_run_id), "train/loss/ce")) == 3
    assert client.get_run(str(after.mlflow_run_id)).data.params == {"a": "1"}


def test_a_run_is_sent_once_to_each_server(run: Folder) -> None:
    first, second = database(run), f"sqlite:///{run.path}/other.db"
    for uri in (first, second, first, second):
        sending = begun(run, uri, {"a": 1})
        sending.log_epochs(HISTORY)
        assert sending.problem is None
        assert run.read_json("tracking.json")["uri"] == uri
    for uri in (first, second):
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("tests")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        assert len(client.get_metric_history(found.info.run_id, "train/loss/ce")) == 3


def test_a_database_that_moves_with_its_storage_goes_on(run: Folder) -> None:
    before = begun(run, database(run), {"a": 1})
    before.log_epochs(HISTORY)
    assert before.problem is None
    moved = f"{run.path}/moved.db"
    os.rename(database(run).removeprefix("sqlite:///"), moved)

    after = begun(run, f"sqlite:///{moved}", {"a": 1})
    after.log_epochs(HISTORY)
    assert after.problem is None
    assert after.mlflow_run_id == before.mlflow_run_id
    client = MlflowClient(f"sqlite:///{moved}")
    assert len(client.get_metric_history(str(after.mlflow_run_id), "train/loss/ce")) == len(HISTORY)
    assert run.read_json("tracking.json")["uri"] == f"sqlite:///{moved}"

    # Sent to another one, what was sent to a disk that is not mounted now is not forgotten.
    os.rename(moved, f"{moved}.away")
    begun(run, f"sqlite:///{run.path}/other.db")
    os.rename(f"{moved}.away", moved)
    again = begun(run, f"sqlite:///{moved}")
    assert again.mlflow_run_id == before.mlflow_run_id


@pytest.mark.parametrize(("num_epochs", "is_earlier_version"), [(0, False), (3, False), (1, True)])
def test_a_copied_database_gets_what_the_original_has_received_since(
    run: Folder, num_epochs: int, is_earlier_version: bool
) -> None:
    before = begun(run, database(run), {"a": 1})
    before.log_epochs(HISTORY[:num_epochs])
    copy = f"{run.path}/copy.db"
    shutil.copy(database(run).removeprefix("sqlite:///"), copy)
    before.log_epochs(HISTORY)
    before.log_summary({"accuracy": 0.5})
    if is_earlier_version:  # which knew one place only
        saved = run.read_json("tracking.json")
        for sent in saved["sent"].values():
            del sent["uri"]
        run.write_json("tracking.json", saved)

    after = begun(run, f"sqlite:///{copy}", {"a": 1})
    after.log_epochs(HISTORY)
    after.log_summary({"accuracy": 0.5})
    assert after.problem is None
    client = MlflowClient(f"sqlite:///{copy}")
    history = client.get_metric_history(str(after.mlflow_run_id), "train/loss/ce")
    assert [point.step for point in history] == [1, 2, 3]
    assert client.get_run(str(after.mlflow_run_id)).data.metrics["final/accuracy"] == 0.5


def test_a_database_with_a_relative_path_is_the_one_with_its_absolute_path(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = database(run)
    folder, _, name = absolute.removeprefix("sqlite:///").rpartition("/")
    monkeypatch.chdir(folder)
    before = begun(run, f"sqlite:///{name}")
    before.log_epochs(HISTORY)
    after = begun(run, absolute)
    assert after.mlflow_run_id == before.mlflow_run_id
    saved = run.read_json("tracking.json")
    sent = saved["sent"][saved["run_id"]]["epochs_sent"]
    assert (saved["uri"], sent) == (absolute, len(HISTORY))


def test_a_copy_of_the_storage_goes_on_in_its_own_copy_of_the_run(run: Folder) -> None:
    before = begun(run, database(run))
    before.log_epochs(HISTORY[:2])
    shutil.copytree(run.path, f"{run.path}-copy")
    copy = Folder(f"{run.path}-copy")
    after = begun(copy, database(copy))
    after.log_epochs(HISTORY)
    assert after.mlflow_run_id == before.mlflow_run_id
    for uri, count in ((database(run), 2), (database(copy), 3)):
        logged = MlflowClient(uri).get_metric_history(str(after.mlflow_run_id), "train/loss/ce")
        assert [metric.step for metric in logged] == [1, 2, 3][:count]


def test_a_record_of_an_earlier_version_goes_on_on_each_server(run: Folder) -> None:
    """It named servers, not runs."""
    first, second = database(run), f"sqlite:///{run.path}/other.db"
    old = {}
    for uri in (first, second):
        sending = begun(run, uri)
        sending.log_epochs(HISTORY)
        about = {"uri": uri, "run_id": sending.mlflow_run_id}
        old[uri] = about | run.read_json("tracking.json")["sent"][sending.mlflow_run_id]
    run.write_json("tracking.json", old[second] | {"elsewhere": {first: old[first]}})
    for uri in (first, second, first):
        again = begun(run, uri)
        again.log_epochs(HISTORY)
        assert again.mlflow_run_id == old[uri]["run_id"]
        logged = MlflowClient(uri).get_metric_history(old[uri]["run_id"], "train/loss/ce")
        assert [metric.step for metric in logged] == [1, 2, 3]


def test_parameters_of_which_some_have_arrived_are_completed(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may have other values by then, as the number of workers may."""
    params: dict[str, object] = {f"p{number}": number for number in range(150)}
    original, calls = MlflowClient.log_batch, []

    def log_batch(self: MlflowClient, *arguments: Any, **named: Any) -> Any:
        calls.append(named)
        if len(calls) == 2:
            raise ConnectionError("away")
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", log_batch)
        before = tracker(run, database(run))
        before.begin("first", params, {})
        assert "away" in str(before.problem)
    after = begun(run, database(run), params | {"p0": 7})
    found = MlflowClient(database(run)).get_run(str(after.mlflow_run_id)).data.params
    assert found == {name: str(value) for name, value in params.items()}


def test_a_database_that_cannot_be_opened_costs_seconds(run: Folder, tmp_path: Path) -> None:
    began = time.monotonic()
    barred = tracker(run, f"sqlite:///{tmp_path}")  # a folder
    barred.begin("first", {}, {})
    assert "cannot be used" in str(barred.problem)
    assert time.monotonic() - began < 30  # MLflow's own patience is above a minute and a half


def test_artifacts_on_s3_say_what_they_need(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    run.write_bytes("report.html", b"")
    sending = Tracker(run, database(run), "tests", "s3://bucket/artifacts")
    sending.begin("first", {}, {})
    sending.log_files(["report.html"])
    assert str(sending.problem).endswith("boto3: pip install -e '.[s3]'")


@pytest.mark.parametrize("own", [None, "7"])
def test_an_upload_may_take_longer_than_reaching_the_server(
    run: Folder, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    monkeypatch.delenv(variable, raising=False)
    if own is not None:
        monkeypatch.setenv(variable, own)
    allowed = []
    monkeypatch.setattr(
        MlflowClient,
        "log_artifacts",
        lambda *_: allowed.append(environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get()),
    )
    run.write_bytes("report.html", b"")
    sending = begun(run, database(run))
    sending.log_files(["report.html"])
    assert sending.problem is None
    assert allowed == [120 if own is None else 7]
    assert os.environ[variable] == (own or "10")


def test_odd_class_names_do_not_stop_the_others(run: Folder) -> None:
    odd = begun(run, database(run))
    names = ["recall//x", "recall/..", "recall/<2cm", "recall/>2cm", "recall/a b"]
    names += [f"recall/{'a' * 250}{last}" for last in "bc"]  # MLflow's limit is 250
    values = {name: (place + 1) / 8 for place, name in enumerate(names)}
    odd.log_epochs([{"epoch": 1.0} | values])
    assert odd.problem is None
    metrics = MlflowClient(database(run)).get_run(str(odd.mlflow_run_id)).data.metrics
    assert sorted(metrics.values()) == sorted(values.values())  # none hides another
    assert metrics["recall/a b"] == 5 / 8
    assert any(name.startswith("recall/_2cm-") for name in metrics)


def test_the_default_is_a_database_in_storage(tmp_path: Path) -> None:
    storage = Folder(tmp_path / "storage")
    assert default_uri(storage) == f"sqlite:///{tmp_path}/storage/mlflow.db"
    assert artifact_location("http://server", storage) is None
    odd = Folder(tmp_path / "50 %25 é?")
    begun(odd / "run", default_uri(odd))
    assert (tmp_path / "50 %25 é?" / "mlflow.db").exists()


def test_what_has_been_deleted_in_mlflow_is_no_end(run: Folder) -> None:
    uri = database(run)
    first = begun(run, uri)
    first.log_epochs(HISTORY)
    assert first.problem is None
    client = MlflowClient(uri)
    assert first.mlflow_run_id is not None
    client.delete_run(first.mlflow_run_id)
    second = begun(run, uri)
    second.log_epochs(HISTORY)
    assert second.problem is None
    assert second.mlflow_run_id not in {None, first.mlflow_run_id}
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    another = tracker(Folder(run.uri) / "another", uri)
    another.begin("another", {}, {})
    assert re.search("'tests' has been deleted: restore .*experiment=NAME", str(another.problem))


def test_a_logged_model_has_an_example_is_not_loaded_to_try_it_and_leaves_the_ending(
    run: Folder, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    loaded, code, data = (tmp_path / name for name in ("loaded", "code", "data"))
    code.mkdir()
    data.mkdir()
    loader = (
        f"from pathlib import Path\n\ndef _load_pyfunc(_):\n    Path({str(loaded)!r}).touch()\n"
    )
    (code / "brainray_test_loader.py").write_text(loader)
    made = begun(run, database(run))
    made.finish("KILLED")
    client = MlflowClient(database(run))
    ended = client.get_run(str(made.mlflow_run_id)).info
    made.log_model(
        ServedFiles(
            data,
            loader="brainray_test_loader",
            code=code,
            requirements=["numpy"],
            inputs={"path": "string", "image": "binary"},
            outputs=pa.schema([("class", pa.string())]),
            example={"image": b"of a slice"},
            metadata={},
        ),
        None,
    )
    assert made.problem is None
    after = client.get_run(str(made.mlflow_run_id)).info
    assert (after.status, after.end_time) == (ended.status, ended.end_time)
    assert not loaded.exists()
    (folder,) = {path.parent for path in tmp_path.rglob("MLmodel")}
    saved: Any = Model.load(folder)
    assert saved.load_input_example(folder)["image"].tolist() == [b"of a slice"]
    assert "dataframe_split" in str(saved.get_serving_input(folder))
    assert not [str(warned.message) for warned in recwarn if "xample" in str(warned.message)]
