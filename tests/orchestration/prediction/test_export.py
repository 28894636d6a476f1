"""Exported models say what prediction says: as ONNX, as safetensors, in MLflow and when served."""

import ast
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

from brainray.config import URI_VARIABLE, Config, RegistryConfig
from brainray.config_text import parse_config, parse_yaml
from brainray.engine.export import SliceNet, load_safetensors, run_onnx, safetensors_bytes
from brainray.engine.slice_model import SliceModel, stored_pixels
from brainray.engine.state import load_checkpoint
from brainray.errors import BusyError, CheckpointError, ConfigError, DataError, TrackingError
from brainray.mri.phantom import CLASSES, write_phantoms
from brainray.orchestration.job import JobResult
from brainray.orchestration.lock import held
from brainray.orchestration.prediction import serving
from brainray.orchestration.prediction.evaluation import evaluate
from brainray.orchestration.prediction.export import _register, export, served_files
from brainray.orchestration.prediction.inference import default_name, find_predictor
from brainray.orchestration.prediction.predict import predict
from brainray.orchestration.preprocessing.slice_rows import preprocess_file
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.orchestration.training.driver import TrainedRun
from brainray.schema import PREDICTED_SLICES
from brainray.storage import Folder
from tests.conftest import logged, tiny_config
from tests.mri.test_nifti import ball, make_nifti

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUMBERS = ("probabilities", "responsibilities", "confidence", "outlier_score")


def config_of(trained: TrainedRun, *overrides: str) -> Config:
    storage = Path(str(trained.run.folder)).parents[1]
    return tiny_config(storage, "run=two-ranks", *overrides)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """200 slices that the run has not seen, and a file that is none."""
    folder = tmp_path_factory.mktemp("new") / "slices"
    write_phantoms(folder, num_training_per_class=50, num_testing_per_class=0, seed=11, size=64)
    (folder / "broken.jpg").write_text("no image")
    return sorted(folder.rglob("*.jpg"))


@pytest.fixture(scope="module")
def exported(trained: TrainedRun) -> JobResult:
    return export(config_of(trained, "registry.name=brainray-test"))


@pytest.fixture(scope="module")
def predicted(trained: TrainedRun, slices: list[Path]) -> dict[str, dict[str, Any]]:
    """What ``jobs/predict.py`` says, by file."""
    source = slices[0].parents[2]
    prediction = predict(config_of(trained, f"source={source}", "name=exported"))
    parts = [pq.read_table(path) for path in Path(prediction.out).glob("part-*.parquet")]
    return {str(source / row["path"]): row for row in pa.concat_tables(parts).to_pylist()}


def local(exported: JobResult) -> Path:
    return Path(exported.out)


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("class", "cluster", "cluster_class", "sample_id", "reason"):
            assert row[name] == wanted[name], name
        for name in NUMBERS:
            if wanted[name] is None:
                assert row[name] is None
            else:
                np.testing.assert_allclose(row[name], wanted[name], atol=1e-4)


@pytest.mark.slow
def test_onnx_safetensors_and_mlflow_agree_with_prediction_on_200_slices(
    trained: TrainedRun,
    exported: JobResult,
    slices: list[Path],
    predicted: dict[str, dict[str, Any]],
) -> None:
    readable = [path for path in slices if path.name != "broken.jpg"]
    assert len(readable) == 200
    model = mlflow.pyfunc.load_model(str(local(exported) / "mlflow"))
    assert model.metadata.metadata == {"classes": trained.run.record.classes}
    from_paths = model.predict(pd.DataFrame({"path": [str(path) for path in slices]}))
    assert list(from_paths.columns) == PREDICTED_SLICES.names
    assert_same(from_paths.to_dict("records"), [predicted[str(path)] for path in slices])
    from_bytes = model.predict(pd.DataFrame({"image": [path.read_bytes() for path in slices]}))
    assert_same(from_bytes.to_dict("records"), [predicted[str(path)] for path in slices])

    checkpoint, preprocess = load_safetensors(local(exported) / "model.safetensors")
    rows = [
        dict(row)
        for path in readable
        for row in preprocess_file(path.read_bytes(), FoundFile("", 0, 0), preprocess, b"salt")
    ]
    stored = pa.table({name: [row[name] for row in rows] for name in ("image", "height", "width")})
    images = stored_pixels(stored, checkpoint.config.train.image_size).astype(np.float32)
    outputs = run_onnx((local(exported) / "model.onnx").read_bytes(), images)
    for name in ("probabilities", "responsibilities"):
        expected = np.stack([predicted[str(path)][name] for path in readable])
        np.testing.assert_allclose(outputs[name], expected, atol=1e-4)
    likelihood = np.array([predicted[str(path)]["log_likelihood"] for path in readable])
    np.testing.assert_allclose(outputs["log_likelihood"], likelihood, rtol=1e-3, atol=1e-2)
    one = run_onnx((local(exported) / "model.onnx").read_bytes(), images[:1])
    metadata = onnx.load(local(exported) / "model.onnx").metadata_props
    assert {entry.key: json.loads(entry.value) for entry in metadata}[
        "classes"
    ] == trained.run.record.classes
    np.testing.assert_allclose(one["probabilities"], outputs["probabilities"][:1], atol=1e-5)


@pytest.mark.slow
def test_an_export_says_what_it_is(exported: JobResult, trained: TrainedRun) -> None:
    names = {path.name for path in local(exported).iterdir()}
    assert names == {"README.md", "fitted.parquet", "mlflow", "model.onnx", "model.safetensors"}
    card = (local(exported) / "README.md").read_text()
    assert "For research only" in card
    assert "opset 18" in card
    assert f"{trained.metrics['test/clean/head/accuracy']:.3f}" in card
    assert exported.metrics["onnx/largest_difference"] <= 1e-4
    pickles = [path for path in local(exported).rglob("*") if path.suffix in {".pkl", ".pt"}]
    assert not pickles
    in_mlflow = {path.name for path in (local(exported) / "mlflow").iterdir()}
    assert {"input_example.json", "serving_input_example.json"} <= in_mlflow
    client = MlflowClient(trained.tracking_uri)
    (registered,) = client.search_model_versions("name='brainray-test'")
    assert registered.run_id == trained.mlflow_run_id == exported.run_id


@pytest.mark.slow
def test_a_served_model_answers_a_request(
    exported: JobResult, slices: list[Path], predicted: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    model = ["-m", str(local(exported) / "mlflow"), "--env-manager", "local"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    # Without the checkout on its path: the model brings its code along.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *model, *where],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_up(server, address, tmp_path / "log")
        encoded = [base64.b64encode(path.read_bytes()).decode() for path in slices[:2]]
        from_bytes = _ask(address, [{"image": text} for text in encoded])
        paths = [*map(str, slices[:2]), str(tmp_path / "absent.jpg")]
        from_paths = _ask(address, [{"path": path} for path in paths])
        example = (local(exported) / "mlflow" / "serving_input_example.json").read_bytes()
        (from_example,) = _post(address, example)
        with pytest.raises(urllib.error.HTTPError) as refused:
            _ask(address, [{"img": "a.png"}])
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
    expected = [predicted[str(path)] for path in slices[:2]]
    assert_same(from_bytes, expected)
    assert_same(from_paths[:2], expected)
    assert from_paths[2]["reason"] == "unreadable file"
    assert from_paths[2]["class"] is None
    assert from_example["reason"] is None
    assert from_example["class"] in CLASSES
    assert refused.value.code == 400
    assert "send records with" in refused.value.read().decode()


def _ask(address: str, records: list[dict[str, str]]) -> list[dict[str, Any]]:
    return _post(address, json.dumps({"dataframe_records": records}).encode())


def _post(address: str, content: bytes) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/invocations", content, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        rows: list[dict[str, Any]] = json.loads(response.read())["predictions"]
    return rows


def _wait_until_up(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/ping", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_safetensors_keep_a_checkpoint_whole(trained: TrainedRun, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained.run.folder / "best")
    preprocess = checkpoint.config.preprocess
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(checkpoint, preprocess))
    restored, settings = load_safetensors(path)
    assert settings == preprocess
    assert restored.config == checkpoint.config
    assert (restored.classes, restored.scale, restored.epoch) == (
        checkpoint.classes,
        checkpoint.scale,
        checkpoint.epoch,
    )
    images = np.random.default_rng(0).uniform(0, 255, (3, 1, 32, 32)).astype(np.float32)
    _assert_same_output(SliceNet(checkpoint), SliceNet(restored), images)
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    of_earlier = preprocess.model_dump(mode="json")
    of_earlier["subject"]["removed_since"] = 1
    header["preprocess"] = json.dumps(of_earlier)
    safetensors.torch.save_file(tensors, path, header)
    assert load_safetensors(path)[1] == preprocess
    path.write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="not an exported brainray model"):
        load_safetensors(path)


def _assert_same_output(one: SliceNet, two: SliceNet, images: np.ndarray) -> None:
    with torch.inference_mode():
        for ours, theirs in zip(
            one(torch.from_numpy(images)), two(torch.from_numpy(images)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_exported_graph_computes_what_prediction_computes(trained: TrainedRun) -> None:
    checkpoint = load_checkpoint(trained.run.folder / "best")
    pixels = np.random.default_rng(1).integers(0, 256, (5, 1, 32, 32), dtype=np.uint8)
    columns: dict[str, Any] = {name: [f"{row}" for row in range(5)] for name in ("path", "frame")}
    columns |= {"sample_id": columns["path"], "label": pa.nulls(5, pa.string())}
    columns |= {"reason": pa.nulls(5, pa.string()), "height": [32] * 5, "width": [32] * 5}
    columns["image"] = [image.tobytes() for image in pixels]
    columns["thumbnail"] = pa.array([bytes(96 * 96)] * 5, pa.binary(96 * 96))
    rows = SliceModel(checkpoint, torch.device("cpu"), "fp32").predict(pa.table(columns))
    with torch.inference_mode():
        output = SliceNet(checkpoint)(torch.from_numpy(pixels.astype(np.float32)))
    for name in ("probabilities", "responsibilities", "log_likelihood"):
        expected = np.stack(rows[name].to_numpy(zero_copy_only=False))
        np.testing.assert_allclose(getattr(output, name).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_run_that_is_still_training_is_not_exported(trained: TrainedRun) -> None:
    runs = Path(str(trained.run.folder)).parent
    shutil.copytree(runs / "two-ranks", runs / "not-exported")
    (runs / "not-exported" / "summary.json").unlink()
    with (
        held(Folder(runs.parent), "runs", "two-ranks"),  # of which it is a copy
        pytest.raises(CheckpointError, match=r"still training: wait until .*, or export one"),
    ):
        export(config_of(trained, "run=not-exported"))
    with pytest.raises(CheckpointError, match="no job is training it: submit its training again"):
        export(config_of(trained, "run=not-exported"))
    assert not (Folder(runs.parent) / "exports" / "not-exported").exists()


def test_two_exports_of_one_name_do_not_mix(trained: TrainedRun) -> None:
    config = config_of(trained, "name=twice")
    with (
        held(Folder(config.storage), "exports", "twice"),
        pytest.raises(BusyError, match="twice"),
    ):
        export(config)


def test_an_epoch_is_looked_for_in_what_best_really_holds(trained: TrainedRun) -> None:
    """Runs of an earlier version chose their epoch by another rule than today's."""
    runs = Path(str(trained.run.folder)).parent
    shutil.copytree(runs / "two-ranks", runs / "other-rule")
    run = runs / "other-rule"
    shutil.rmtree(run / "best")
    (run / "epoch-0001").rename(run / "best")
    (run / "epoch-0002").rename(run / "elsewhere")
    for epoch, folder in ((1, "best"), (2, "last")):
        found = find_predictor(config_of(trained, "run=other-rule", f"epoch={epoch}"))
        assert (found.folder.name, found.checkpoint.epoch) == (folder, epoch)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["run=absent"], DataError, "no run 'absent'"),
        (
            ["epoch=7"],
            CheckpointError,
            r"no checkpoint of epoch 7: choose one that it keeps \(1, 2\)",
        ),
        (["run=null", "checkpoint=/tmp"], CheckpointError, r"contains no model\.pt"),
        (["run=null", "checkpoint=/tmp", "epoch=1"], ConfigError, "give --set run=NAME"),
        (["run=null", "checkpoint=/tmp", "registry.name=m", "name=x"], ConfigError, "of a run"),
    ],
)
def test_what_cannot_be_exported_is_named(
    trained: TrainedRun, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export(config_of(trained, *overrides))


def test_a_registration_that_fails_leaves_the_run_finished_and_the_server_as_it_was(
    trained: TrainedRun,
) -> None:
    registry = RegistryConfig().model_copy(update={"name": "a/b"})  # which is refused at the door
    config = config_of(trained).model_copy(update={"registry": registry})
    with (
        served_files(find_predictor(config)) as served,
        pytest.raises(TrackingError, match="cannot be used"),
    ):
        _register(config, trained.run, served)
    assert trained.mlflow_run_id is not None
    run = MlflowClient(trained.tracking_uri).get_run(trained.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert URI_VARIABLE not in os.environ


def test_a_path_that_cannot_be_is_a_row_with_its_reason(
    trained: TrainedRun, tmp_path: Path
) -> None:
    predictor = find_predictor(config_of(trained))
    with served_files(predictor) as served:
        model = serving.ServedModel(served.data)
    os.mkfifo(tmp_path / "pipe.png")
    paths = ["~nobody.here/a.png", "/a\0b.png", "/none.png", f"/{300 * 'a'}/x.png"]
    paths += [str(tmp_path / "pipe.png"), "/\udcff.png"]
    answers = model.predict(pd.DataFrame({"path": paths}, dtype=object))
    assert answers["reason"].tolist() == ["unreadable file"] * 6
    with pytest.raises(ValueError, match=r'records with "path" .* or "image"'):
        model.predict(pd.DataFrame(index=range(2)))  # as MLflow passes on records of other columns


def test_a_class_map_that_misses_a_class_is_named(trained: TrainedRun, tmp_path: Path) -> None:
    write_phantoms(
        tmp_path / "hospital", num_training_per_class=1, num_testing_per_class=0, seed=1, size=64
    )
    source = tmp_path / "hospital" / "Training"
    (source / "glioma").rename(source / "glioma_tumor")
    (source / "pituitary").rename(source / "pituitary_tumor")
    config = config_of(trained, f"source={source}", "classes.map={glioma_tumor: glioma}")
    with pytest.raises(DataError, match=r"'pituitary_tumor' \(1 files\); .*_tumor=NAME, or leave"):
        evaluate(config)


@pytest.mark.slow
def test_an_evaluation_scores_the_slices_of_a_volume_that_have_a_class(
    trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, labels = tmp_path / "heads", tmp_path / "labels.csv"
    source.mkdir()
    for name in ("1.nii", "2.nii"):
        (source / name).write_bytes(make_nifti(ball((48, 52, 40))))
    frame = "volume=0/axial={}".format
    rows = [f"1.nii,{frame(20)},glioma", f"1.nii,{frame(22)},notumor", f"1.nii,{frame(0)},notumor"]
    labels.write_text("\n".join(["path,frame,label", *rows]))
    config = config_of(trained, f"source={source}", f"labels={labels}", "name=heads")
    scored = evaluate(config)
    predictions = scored.folder.read_table("predictions.parquet").to_pylist()
    labelled = [(row["path"], row["frame"], row["label"]) for row in predictions]
    assert labelled == [("1.nii", frame(20), "glioma"), ("1.nii", frame(22), "notumor")]
    output = "\n".join(logged(capsys))
    assert "left out: 1 without a class" in output
    assert "or that are empty: 1, such as frame 'volume=0/axial=0' of '1.nii'" in output
    found = re.search(r"left out: (\d+) slices without a class in files with labelled", output)
    assert found is not None
    assert scored.metrics["num_without_class"] == 1
    assert scored.metrics["num_slices_without_class"] == int(found[1])
    assert scored.metrics["num_rejected"] == 0
    labels.write_text("path,frame,label\n1.nii,axial=20,glioma\n")
    with pytest.raises(DataError, match="its frames are such as 'volume=0/axial="):
        evaluate(config)


@pytest.mark.slow
def test_an_evaluation_tells_what_the_run_has_seen_and_what_it_leaves_out(
    trained: TrainedRun, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_phantoms(
        tmp_path / "hospital", num_training_per_class=3, num_testing_per_class=0, seed=1, size=64
    )
    source = tmp_path / "hospital" / "Training"
    seen = trained.run.folder.read_table("seen.parquet").filter(pc.field("role") == "labelled")
    known = phantoms / seen["path"][0].as_py()
    for place in ("notumor", "pituitary"):
        shutil.copy(known, source / place / "known.jpg")
    (source / "meningioma" / "empty.png").write_bytes(b"")
    (source / "glioma").rename(source / "metastasis")
    (source / "pituitary" / "read me.txt").touch()
    config = config_of(trained, f"source={source}", "name=told", "classes.map.metastasis=null")
    last = Folder(config.storage) / "evaluations" / "told"
    last.write_bytes("of the last one", b"")

    scored = evaluate(config)
    lines = logged(capsys)

    assert "; left out: 3 without a class; ignored files of other types: 1 (.txt 1)" in lines[0]
    assert "1 files or slices could not be used: empty file (1)" in lines
    assert "note: slices with a copy of another label in this source: 2" in lines
    assert f"{last}: replacing the earlier evaluation of this name" in lines
    assert not last.exists("of the last one")
    assert last.read_json("metrics.json") == scored.metrics
    assert scored.metrics["num_ignored_files"] == 1
    assert scored.metrics["num_without_class"] == 3
    predictions = scored.folder.read_table("predictions.parquet").to_pylist()
    assert {row["label"] for row in predictions} == {"meningioma", "notumor", "pituitary"}
    twins = scored.folder.read_json("leakage.json")["seen_by_run"]
    assert [(row["path"], row["twin"]) for row in twins["exact"]] == [
        (f"{place}/known.jpg", seen["path"][0].as_py()) for place in ("notumor", "pituitary")
    ]
    learned_as = seen["label"][0].as_py()
    assert {(row["twin_label"], row["twin_role"]) for row in twins["exact"]} == {
        (learned_as, "labelled")
    }
    num_others = sum(row["label"] != learned_as for row in twins["exact"])
    assert f"differently from the copy in the run's data: {num_others} (" in "\n".join(lines)
    assert b"Slices with a match in the data that the run saw" in scored.folder.read_bytes(
        "report.html"
    )
    not_clean = {row["path"] for level in ("exact", "near") for row in twins[level]}
    assert {row["path"] for row in predictions if not row["clean"]} == not_clean
    stored = parse_config(parse_yaml(scored.folder.read_bytes("config.yaml"), "config.yaml"))
    assert stored.train.num_epochs == trained.run.saved_config().train.num_epochs
    assert (stored.run, stored.source) == (trained.run.folder.name, str(source))

    test_paths = {"notumor/known.jpg", "pituitary/known.jpg"}
    evaluate(config.model_copy(update={"name": "seen"}), only_paths=test_paths)
    assert any("seen every slice, or a copy of it" in line for line in logged(capsys))

    (tmp_path / "hospital").rename(tmp_path / "another")
    moved = config.model_copy(update={"source": str(tmp_path / "another" / "Training")})
    with pytest.raises(ConfigError, match=r"told exists .* \(source: .*hospital/Training here, "):
        evaluate(moved)
    loose = tmp_path / "loose"
    shutil.copytree(str(trained.run.folder / "best"), loose)
    other = config.model_copy(update={"run": None, "checkpoint": str(loose), "source": str(source)})
    with pytest.raises(ConfigError, match=r"told exists .* \(checkpoint: unset here, .*loose req"):
        evaluate(other)
    assert last.read_json("metrics.json") == scored.metrics


def test_results_of_checkpoints_without_a_run_are_named_by_their_folders(
    trained: TrainedRun, tmp_path: Path
) -> None:
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        model = (trained.run.folder / "best").read_bytes("model.pt")
        (tmp_path / folder / "model.pt").write_bytes(model)
        config = config_of(trained, f"source={tmp_path}").model_copy(
            update={"run": None, "checkpoint": str(tmp_path / folder / "model.pt")}
        )
        names.append(default_name(config, find_predictor(config)))
    assert names == [f"one-on-{tmp_path.name}", f"two-on-{tmp_path.name}"]


def test_another_epoch_than_the_chosen_one_is_in_the_name_of_its_results(
    trained: TrainedRun, tmp_path: Path
) -> None:
    names = []
    last = f"{trained.run.folder}/last"
    for model in ({}, {"epoch": 2}, {"run": None, "checkpoint": last}):
        config = config_of(trained, f"source={tmp_path}").model_copy(update=model)
        names.append(default_name(config, find_predictor(config)))
    assert names == [f"two-ranks{epoch}-on-{tmp_path.name}" for epoch in ("", "-epoch2", "-epoch2")]


@pytest.mark.slow
def test_a_served_model_is_given_all_that_its_code_imports() -> None:
    script = """
import json, sys
import brainray.orchestration.prediction.serving
print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.startswith("brainray.")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    imported: set[str] = set()
    for file in json.loads(done.stdout):
        for node in ast.parse(Path(file).read_text()).body:  # what importing imports
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    needed = imported - {"brainray"} - sys.stdlib_module_names
    assert {"torch", "numba"} <= needed
    given = {name.lower() for name in serving.REQUIREMENTS}
    for module in needed:
        names = {name.lower() for name in distributions[module]}
        assert names & given, f"{module}, of {names}, is not among REQUIREMENTS"
