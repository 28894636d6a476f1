"""Source and storage on an object store, by S3's own protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from brainray import layout
from brainray.config_text import to_yaml
from brainray.errors import BusyError
from brainray.orchestration.lock import Pace, held
from brainray.storage import Folder
from tests.conftest import tiny_config

PROJECT = Path(__file__).parents[1]
_USER_SERVICE_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "MLFLOW_S3_ENDPOINT_URL",
    "RAY_ADDRESS",
)
"""Variables by which a user's own services would be meant."""

QUICK = Pace(beat_s=0.1, patience_s=0.6, settle_s=0.05)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of an empty bucket, which pyarrow and boto3 find, here and in new processes."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in _USER_SERVICE_VARIABLES:
                patch.delenv(name, raising=False)
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "of-this-test")
            filesystem, path = pafs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
            filesystem.create_dir(path)
            yield "s3://bucket"
    finally:
        server.stop()


def test_a_folder_of_an_object_store_is_rebuilt_whole_or_not_at_all(bucket: str) -> None:
    folder = Folder(bucket) / "stores" / "mri"
    for content in (b"first", b"second"):
        with folder.rebuilt("last.json") as building:
            building.write_bytes("images/part", content)
            building.write_json("last.json", {})
    with pytest.raises(KeyError), folder.rebuilt("last.json") as building:  # noqa: PT012
        building.write_bytes("images/part", b"third")
        raise KeyError
    assert folder.read_bytes("images/part") == b"second"
    assert folder.names() == ["images", "last.json"]
    assert folder.parent.names() == ["mri"]


def test_an_interrupted_copy_in_an_object_store_is_completed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(bucket) / "cut" / "mri"
    with folder.rebuilt("last.json") as building:
        building.write_bytes("images/old", b"old")
        building.write_json("last.json", 1)

    def interrupted(*_: Any, **__: Any) -> None:
        raise OSError("SLOW_DOWN")

    with monkeypatch.context() as cut:
        cut.setattr(pafs, "copy_files", interrupted)
        with pytest.raises(OSError, match="SLOW_DOWN"), folder.rebuilt("last.json") as building:  # noqa: PT012
            building.write_bytes("images/new", b"new")
            building.write_json("last.json", 2)
    folder.restore("last.json")  # by the next job
    assert folder.read_json("last.json") == 2
    assert (folder / "images").names() == ["new"]
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.parent.path))
    assert [info.base_name for info in infos] == ["mri"]


def test_a_name_in_an_object_store_is_held_by_one_job(bucket: str) -> None:
    storage = Folder(bucket) / "locked"
    with held(storage, layout.RUNS, "first", QUICK):
        with pytest.raises(BusyError), held(storage, layout.RUNS, "first", QUICK):
            pass
        with held(storage, layout.RUNS, "other", QUICK):
            pass
    with held(storage, layout.RUNS, "first", QUICK):
        pass


@pytest.mark.slow
def test_a_pipeline_from_and_to_an_object_store(
    bucket: str, phantoms: Path, tmp_path: Path
) -> None:
    pafs.copy_files(str(phantoms), f"{bucket}/slices")
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tmp_path, "train.num_epochs=1")))
    storage = Folder(bucket) / "brainray"
    settings = [f"source={bucket}/slices", f"storage={storage}", "name=first"]
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "jobs/pipeline.py", "--config", config, "--set", *settings],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            check=False,
        )
        last = json.loads(done.stdout.splitlines()[-1])
        assert last["status"] == "ok", last
        assert "MLflow did not receive everything" not in done.stdout
        assert ("complete, nothing to train" in done.stdout) == (number == 1)
    run = storage / "runs" / "first"
    assert len(run.read_json_lines(layout.METRICS)) == 1
    assert run.exists(layout.REPORT)
    assert (storage / "evaluations").names() == ["first"]
    assert len((storage / "mlartifacts").names()) == 1
