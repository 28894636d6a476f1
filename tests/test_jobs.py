"""The jobs' contract: complete help, one JSON line at the end, exit codes."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import ray.data
from ray._private.runtime_env.packaging import get_uri_for_directory
from sqlalchemy.engine import make_url

from brainray.config import Config
from brainray.config_text import described_keys, known_keys, load_config
from brainray.errors import ConfigError, DataError, StorageError
from brainray.orchestration import paths
from brainray.orchestration.job import (
    JobResult,
    run_command,
    run_job,
    unread_keys,
)
from brainray.orchestration.paths import check_is_here, check_is_shared, resolve_paths
from brainray.orchestration.ray_connection import _check_address
from brainray.orchestration.training.driver import TrainedRun
from brainray.storage import Folder

PROJECT = Path(__file__).parents[1]
FOLDER = f"source={PROJECT}/configs"
JOBS = [
    "preprocess",
    "train",
    "evaluate",
    "predict",
    "tune",
    "pipeline",
    "study",
    "track",
    "label",
    "export",
    "report",
]


def run(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: object
) -> tuple[int, dict, str]:
    """Exit code, last line's object and standard error of ``python jobs/NAME.py ...``."""
    assert isinstance(monkeypatch, pytest.MonkeyPatch)
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PROJECT / "jobs" / f"{name}.py"), run_name="__main__")
    captured = capsys.readouterr()
    return int(stop.value.code or 0), json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.mark.parametrize("name", JOBS)
def test_help_explains_the_jobs_settings(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PROJECT / "jobs" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python jobs/{name}.py" in text
    assert "storage" in text
    assert "[~/brainray]" in text
    assert re.search(r"  (name|run) \(required", text)


def test_help_and_simple_errors_do_not_wait_for_heavy_imports() -> None:
    script = """
import contextlib, io, runpy, sys

def run(name, arguments, code):
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(f"jobs/{name}.py", run_name="__main__")
        except SystemExit as stop:
            assert stop.code == code, (name, arguments, stop.code)

names = sys.argv.pop(1).split()
for name in names:
    case = ["kmeans"] if name == "benchmark" else []
    for arguments, code in (["--help"], 0), (["--set", "nmae=x"], 2):
        run(name, case + arguments, code)
print(*{"matplotlib", "mlflow", "pyarrow", "ray", "torch"} & set(sys.modules))

absent = ["--set", "name=x", "run=x", "source=/no/such", "dataset=x", "storage=/no/such"]
for name in set(names) - {"benchmark"}:
    run(name, absent, 2)
print(*{"matplotlib", "mlflow", "ray", "torch"} & set(sys.modules))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, " ".join([*JOBS, "benchmark"])],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.split() == [], finished.stderr
    assert finished.returncode == 0, finished.stderr


def test_every_setting_is_explained_by_some_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ""
    for name in JOBS:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(PROJECT / "jobs" / f"{name}.py"), run_name="__main__")
        output += capsys.readouterr().out
    explained = {line.split()[0] for line in output.splitlines() if line.strip()}
    sections = tuple(key.removesuffix("*") for key in explained if key.endswith(".*"))
    assert not [key for key in known_keys() if not (key in explained or key.startswith(sections))]


def test_help_lists_like_sections_once_and_defaults_as_yaml_has_them() -> None:
    rows = dict(described_keys(lambda key: key.startswith(("augment", "encoder.weights"))))
    assert "augment.horizontal_flip" in rows
    assert "augment_unlabelled.horizontal_flip" not in rows
    assert rows["augment_unlabelled.*"].startswith("The same settings as augment.*; different")
    assert not any("``" in text for text in rows.values())
    alone = dict(described_keys(lambda key: key.startswith(("augment_unlabelled", "tune.time"))))
    assert "augment_unlabelled.horizontal_flip" in alone
    assert alone["tune.time_budget_min"].endswith("[unset]")
    descriptions = dict(described_keys(lambda key: key.startswith("study.features")))
    assert descriptions["study.features.NAME.image_size"].endswith("[128]")


def test_help_names_the_values_that_a_description_leaves_out() -> None:
    descriptions = dict(
        described_keys(lambda key: key in {"encoder.name", "split.mode", "study.seeds"})
    )
    assert "One of resnet18, resnet34, resnet50. [resnet18]" in descriptions["encoder.name"]
    assert not any("One of" in descriptions[key] for key in ("split.mode", "study.seeds"))


def test_settings_that_a_job_does_not_read_are_reported() -> None:
    overrides = ["run=x", "train.device=cpu", "classes.map.a=b", "preprocess.crop=none", "train={}"]
    assert unread_keys(overrides, ["run", "classes", "train.device"]) == ["preprocess.crop"]


@pytest.mark.parametrize("name", [*JOBS, "benchmark"])
def test_an_error_in_the_arguments_ends_in_the_json_line_too(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, last, stderr = run(name, ["--set"], capsys, monkeypatch)
    error = "argument --set: expected at least one argument"
    assert code == 2
    assert last == {"job": name, "status": "error", "error": error}
    assert stderr.startswith(f"usage: jobs/{name}.py ")
    assert stderr.endswith(f"jobs/{name}.py: error: {error}\n")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would join or start Ray fails."""
    attach = "brainray.orchestration.job.attach_to_ray"
    monkeypatch.setattr(attach, Mock(side_effect=AssertionError))


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("predict", ["run=x", "source=/no/such"], "no such folder: source=/no/such"),
        ("preprocess", ["name=x", FOLDER, "labels=/no.csv"], "no such file: labels=/no.csv"),
        ("study", ["name=x", "sources.a=/no"], "no such folder: sources.a=/no"),
        ("report", ["run=absent"], "no run 'absent'"),
        ("train", ["name=x", "dataset=absent"], "no image store at"),
        ("preprocess", [FOLDER], "give --set name=NAME"),
        ("pipeline", ["name=x"], "give --set source=DIR"),
        ("train", ["name=x"], "give --set dataset=NAME"),
        ("evaluate", [FOLDER], "give --set run=NAME (or checkpoint=PATH)"),
        ("predict", ["checkpoint=/tmp/x"], "give --set source=DIR"),
        ("predict", ["run=x", "checkpoint=/x", FOLDER], "give either run=NAME or checkp"),
        ("predict", ["checkpoint=/x", f"source={__file__}"], "is a file: give the folder"),
        ("study", ["name=x"], "a study needs slices"),
        ("study", ["name=x", FOLDER], "study.features is empty"),
        ("tune", ["name=x", "dataset=absent"], "no image store at"),
        ("preprocess", ["name=x", FOLDER, FOLDER.replace("source", "storage")], "is source itself"),
        ("report", [], "give --set run=NAME"),
        ("preprocess", ["name=x", FOLDER, "labels=/tmp"], "labels=/tmp is a folder: give"),
        (
            "pipeline",
            ["name=x", FOLDER, "evaluation.num_label_draws=3"],
            "the pipeline trains a single run",
        ),
        (
            "pipeline",
            ["name=x", FOLDER, "train.image_size=512"],
            "train.image_size (512) exceeds preprocess.image_size (256)",
        ),
        (
            "pipeline",
            ["name=x", FOLDER, "split.validation_fraction=0.4"],
            "far from 1/2 and 1/3: use 0.5 or 0.33",
        ),
    ],
)
def test_what_can_be_refused_is_refused_before_ray_starts(
    name: str,
    settings: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--set", f"storage={tmp_path}", *settings]
    code, last, _ = run(name, arguments, capsys, monkeypatch)
    assert code == 2
    assert message in last["error"]


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("kmeans", ["seed=1"], "--set seed=...: benchmarks do not read this setting; use --seed"),
        (
            "labels",
            ["split.seed=7"],
            "split.seed=...: the case labels sets this itself: use --seed",
        ),
        ("labels", ["split.labelled_fraction=.3"], "it trains on several shares of the labels"),
        ("labels", ["evaluation.control=a", "seed=1"], "controls of its own; --set seed=...: "),
        ("next_labels", ["label.num_slices=9"], "it adds 200 labels, or 40 with --quick"),
        ("next_labels", ["split.mode=grouped"], "split.mode=grouped draws test slices"),
    ],
)
def test_settings_that_a_benchmark_overrides_are_refused(
    case: str,
    settings: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, last, _ = run("benchmark", [case, "--set", *settings], capsys, monkeypatch)
    assert code == 2
    assert message in last["error"]


def test_settings_that_a_quick_benchmark_overrides_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "next_labels",
        "--quick",
        "--set",
        "split.validation=subject",
        "train.num_epochs=9",
    ]
    code, last, _ = run("benchmark", arguments, capsys, monkeypatch)
    assert code == 2
    assert last["error"] == (
        "--set train.num_epochs=...: next_labels --quick sets this itself, to 4"
    )


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("name", ["train", "pipeline"])
def test_a_taken_name_is_refused_before_ray_starts(
    name: str,
    trained: TrainedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = f"{trained.run.folder}/config.yaml"
    arguments = ["--config", config, "--set", "train.learning_rate=0.5", f"source={tmp_path}"]
    code, last, _ = run(name, arguments, capsys, monkeypatch)
    assert code == 2
    assert "run 'two-ranks' exists with other settings (train.learning_rate: " in last["error"]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("tune", "train.image_size=32", "tune.space is empty"),
        ("train", "split.validation_fraction=0.4", "far from 1/2 and 1/3: use 0.5 or 0.33"),
    ],
)
def test_what_does_not_fit_training_is_refused_before_ray_starts(
    name: str,
    setting: str,
    message: str,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [f"storage={storage}", "name=x", "dataset=mri", "train.image_size=32", setting]
    code, last, _ = run(name, ["--set", *settings], capsys, monkeypatch)
    assert code == 2
    assert message in last["error"]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("name", ["report", "track"])
def test_what_needs_no_ray_starts_none(
    name: str,
    trained: TrainedRun,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--set", "run=two-ranks", f"storage={storage}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROJECT / "jobs" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (outcome["status"], outcome["out"]) == ("ok", str(trained.run.folder))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("preprocess", ["name=x", "source=/no/such/folder"], "no such folder: source=/no/such"),
        ("train", ["name=x", "train.lr=1"], "unknown key 'train.lr'"),
        ("evaluate", ["run=absent", FOLDER], "no run 'absent'"),
        ("evaluate", ["run=x", "source=~nobody.here/x"], "source=~nobody.here/x: "),
        ("track", ["run=absent"], "no run 'absent'"),
        ("label", ["run=absent"], "no run 'absent'"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    name: str,
    settings: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--set", f"storage={tmp_path}", *settings]
    code, last, stderr = run(name, arguments, capsys, monkeypatch)
    assert code == 2
    assert last["job"] == name
    assert last["status"] == "error"
    assert message in last["error"]
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ray_cluster")
def test_the_pipeline_refuses_what_cannot_train_before_it_preprocesses(
    phantoms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = [f"storage={tmp_path}", f"source={phantoms}", "name=mri", "train.num_workers=64"]
    code, last, _ = run("pipeline", ["--set", *settings], capsys, monkeypatch)
    assert code == 2
    assert "the Ray cluster has room for 2; lower" in last["error"]
    assert not (tmp_path / "datasets").exists()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("in_ray_data", [False, True])
def test_what_a_user_can_mend_is_one_line_also_from_a_worker(
    in_ray_data: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> Any:
        raise DataError("the disk is full: free some")

    def work(config: Config) -> JobResult:
        if in_ray_data:
            ray.data.range(1).map_batches(fail).materialize()
        ray.get(ray.remote(fail).remote(None))
        raise AssertionError("the worker has failed")

    assert run_job("preprocess", "Preprocess.", work, [], argv=[]) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["error"] == "the disk is full: free some"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, 0),
        (DataError("a\nb"), 2),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2),
        (RuntimeError("bug"), 1),
    ],
)
def test_every_outcome_ends_in_one_json_line(
    outcome: Exception | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: Config) -> JobResult:
        if outcome is not None:
            raise outcome
        return JobResult(out="/x", run_id="1", metrics={"test/all/head/accuracy": 0.5})

    assert run_job("train", "Train.", work, [], argv=[]) == code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["status"] == ("ok" if code == 0 else "error")
    if code == 0:
        assert last == {
            "job": "train",
            "status": "ok",
            "run_id": "1",
            "out": "/x",
            "metrics": {"test/all/head/accuracy": 0.5},
        }


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_results_are_printed_whatever_the_terminals_encoding(encoding: str) -> None:
    script = (
        "from brainray.log import log;"
        "from brainray.orchestration.job import JobResult, run_command\n"
        "def work():\n"
        "    log('0.9 \\u00b1 \\u2013')\n"
        "    return JobResult(out='/\\u65e5\\u672c', run_id=None, metrics={})\n"
        "raise SystemExit(run_command('train', work))"
    )
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    last = json.loads(ended.stdout.splitlines()[-1].decode(encoding))
    assert (last["status"], last["out"]) == ("ok", "/\u65e5\u672c")


def test_relative_paths_are_resolved_here_and_refused_in_a_submitted_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["source=data", "storage=s3://bucket/x"])
    resolved = resolve_paths(config)
    assert resolved.source == str(tmp_path / "data")
    assert resolved.storage == "s3://bucket/x"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="source=data is relative: a submitted job"):
        resolve_paths(config)


def test_a_database_for_tracking_is_not_left_in_the_copy_of_a_submitted_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["tracking.uri=sqlite:///m.db?timeout=3"])
    assert resolve_paths(config).tracking.uri == f"sqlite:///{tmp_path}/m.db?timeout=3"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"tracking\.uri=m\.db.* is relative: a submitted job"):
        resolve_paths(config)
    for absolute in ("sqlite:////m.db", "http://host:5000", "postgresql://u@h/m"):
        config = load_config(None, [f"tracking.uri={absolute}"])
        assert resolve_paths(config).tracking.uri == absolute
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    for key in ("tracking", "tracking.uri"):
        with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI=m\.db is relative: a submit"):
            resolve_paths(config, ["source", key])
    resolve_paths(config, ["source"])


def test_a_storage_that_another_node_does_not_read_is_refused(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_is_shared(str(tmp_path / "of-one"))
    assert not (tmp_path / "of-one").exists()  # nothing is written for the driver's node alone
    # As if the only node with CPUs were not the driver's, as is usual on Kubernetes.
    monkeypatch.setattr(type(ray.get_runtime_context()), "get_node_id", lambda _: "0" * 56)
    check_is_shared(str(tmp_path / "storage"))
    assert not list((tmp_path / "storage").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="give another storage"):
        check_is_shared(str(tmp_path / "file"))

    monkeypatch.setattr(paths, "_ON_OTHER_NODES_S", 0.1)
    monkeypatch.setattr(Folder, "write_bytes", lambda *_: None)  # as if it were elsewhere
    with pytest.raises(ConfigError, match=r"storage is another folder on node .*give a path that"):
        check_is_shared(str(tmp_path / "storage"))


def test_a_node_that_joins_later_is_asked_for_storage_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_is_here(Folder(tmp_path))
    monkeypatch.setattr(paths, "_ON_OTHER_NODES_S", 0.1)
    with pytest.raises(ConfigError, match=r"parts is not on node .* joined .*all nodes mount"):
        check_is_here(Folder(tmp_path / "parts"))


@pytest.mark.parametrize("arguments", [["--config", "/\udcf4.yaml"], ["/\udcf4.yaml"]])
def test_an_error_with_an_undecodable_name_ends_in_its_json_line_too(arguments: list[str]) -> None:
    script = (
        "from brainray.orchestration.job import run_job;"
        f"raise SystemExit(run_job('train', 'Train.', None, [], argv={arguments!a}))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 2
    assert json.loads(ended.stdout.splitlines()[-1])["status"] == "error"


def test_the_address_of_a_dashboard_is_distinguished_from_that_of_a_cluster() -> None:
    with pytest.raises(
        ConfigError, match=r"is a dashboard.*ray job submit --address http://h:8265"
    ):
        _check_address("http://h:8265")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "a..b:6379", "[::1]:9"])
def test_a_ray_cluster_that_is_gone_is_reported_at_once(address: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"RAY_ADDRESS={address}: no Ray cluster answers (")
    ):
        _check_address(address)


@pytest.mark.parametrize("address", ["", "auto", "local", "ray://127.0.0.1:9"])
def test_addresses_of_other_kinds_are_left_to_ray(address: str) -> None:
    _check_address(address)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_job_that_waits_for_ray(
    by: signal.Signals, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    @ray.remote(num_cpus=0)
    def sleep() -> None:
        time.sleep(60)

    def work() -> JobResult:
        waiting = sleep.remote()
        threading.Timer(1.0, os.kill, (os.getpid(), by)).start()
        try:
            ray.get(waiting)
        finally:
            ray.cancel(waiting, force=True)
        raise AssertionError("the wait was not interrupted")

    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    try:
        assert run_command("train", work) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 30
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcome["error"].startswith(f"ended by {by.name}: submit it again under the same name")


def test_only_resumable_jobs_are_reported_as_resumable(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert (
            run_command("benchmark", Mock(side_effect=KeyboardInterrupt), is_resumable=False) == 1
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads(capsys.readouterr().out)["error"] == "ended by SIGINT"


def test_metrics_without_a_finite_value_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"a": math.nan, "b": math.inf, "c": 0.5}
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_command("train", lambda: JobResult(out="/tmp", metrics=metrics)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found == {"a": None, "b": None, "c": 0.5}


def test_an_unexpected_error_is_told_by_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        error = RuntimeError("Traceback of a worker:\n  File ...\nKeyError: 'x'\n")
        assert run_command("train", Mock(side_effect=error)) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads(capsys.readouterr().out)["error"] == "RuntimeError: KeyError: 'x'"


@pytest.mark.parametrize(("by_user", "expected"), [(None, "true"), ("false", "false")])
def test_mlflows_telemetry_is_off_unless_the_user_wants_it(
    by_user: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_user is None:
        monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", by_user)
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_command("train", lambda: JobResult(out="/tmp"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == expected


def test_a_setting_without_set_is_told_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_job("train", "Train.", Mock(), ["name"], ["name=mine", "tracking.uri=http://u:pw1@h"])
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert re.search("unrecognized arguments: name=mine .*: write --set KEY=VALUE", error)
    assert "pw1" not in printed.out + printed.err


def test_the_demo_deletes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    prepare = runpy.run_path(str(PROJECT / "jobs" / "demo.py"))["_prepare_folder"]
    mine = tmp_path / "runs" / "demo" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(DataError, match="in use, not by an earlier demo: choose another --out"):
        prepare(tmp_path)
    assert mine.exists()
    prepare(tmp_path / "new")
    (tmp_path / "new" / "phantoms" / "1.png").touch()
    prepare(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["phantoms"]


def test_the_demos_database_is_in_its_folder_whatever_its_name(tmp_path: Path) -> None:
    run_demo = runpy.run_path(str(PROJECT / "jobs" / "demo.py"))["run_demo"]
    submitted = Mock(return_value=(1, None))
    without_ray = {"own_ray_head": nullcontext, "wait_until_ready": Mock(), "submit": submitted}
    run_demo.__globals__.update(without_ray | {"write_phantoms": Mock()})
    out = tmp_path / "50%25 é?"
    run_demo(out)
    (uri,) = [each for each in submitted.call_args.args[1] if each.startswith("tracking.uri=")]
    assert make_url(uri.removeprefix("tracking.uri=")).database == str(out / "mlflow.db")


def test_a_log_in_the_working_directory_does_not_change_a_submitted_package(
    tmp_path: Path,
) -> None:
    shutil.copy(PROJECT / ".rayignore", tmp_path)
    (tmp_path / "code.py").touch()

    def package() -> str:
        return str(get_uri_for_directory(str(tmp_path), include_gitignore=True))

    before = package()
    (tmp_path / "demo.log").write_text("a line")
    assert package() == before
    (tmp_path / "code.py").write_text("x = 1")
    assert package() != before
