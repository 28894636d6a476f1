"""Source and storage on an object store, by S3's own protocol."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from brainray import layout
from brainray.config_text import to_yaml
from brainray.errors import BusyError, StorageError
from brainray.orchestration.lock import Claim, Pace, _Lock, held
from brainray.orchestration.ray_train import ray_storage
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


_REFUSAL = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"


@dataclass
class Server:
    """S3, as a WSGI application that counts, and that may refuse to write."""

    writable: str | None = None
    """What the keys that this user may write begin with; None: all."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""
    _s3: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(f"{method} {path}")
        key = path.removeprefix("/bucket").removeprefix("/")
        # Many files are deleted by one POST to the bucket.
        is_write = method in {"PUT", "POST", "DELETE"} and key
        if self.writable is None or not is_write or key.startswith(self.writable):
            answer: Iterable[bytes] = self._s3(environ, start)
            return answer
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("403 Forbidden", [("Content-Length", str(len(_REFUSAL)))])
        return [_REFUSAL]


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


@pytest.fixture
def own_prefix(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder of the bucket, outside of which this user may write nothing."""
    monkeypatch.setattr(server, "writable", "team/brainray/")
    return Folder(bucket) / "team" / "brainray"


@pytest.fixture(scope="module")
def bucket(server: Server) -> Iterator[str]:
    """URI of an empty bucket, which pyarrow and boto3 find, here and in new processes."""
    listener = make_server("127.0.0.1", 0, server, threaded=True, request_handler=_Quiet)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in _USER_SERVICE_VARIABLES:
                patch.delenv(name, raising=False)
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.port}")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "of-this-test")
            filesystem, path = pafs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
            filesystem.create_dir(path)
            yield "s3://bucket"
    finally:
        listener.shutdown()


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
        cut.setattr(Folder, "_copy_to", interrupted)
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


def test_nothing_is_written_outside_of_the_storage(own_prefix: Folder) -> None:
    table = pa.table({"x": [1]})
    for _ in range(2):
        with held(own_prefix, layout.RUNS, "first", QUICK):
            run = own_prefix / layout.RUNS / "first"
            with run.rebuilt("last.json") as building:
                building.write_bytes("weights/large", bytes(6 << 20))  # more than one request
                building.write_table("deep/er/part.parquet", table)
                building.write_csv("table.csv", table)
                building.write_json("last.json", {})
    assert run.names() == ["deep", "last.json", "table.csv", "weights"]
    assert run.read_table("deep/er") == table
    ray = ray_storage(run.parent)["storage_filesystem"]
    ray.create_dir(f"{run.path}/tune", recursive=True)
    with pytest.raises(StorageError, match=r"ACCESS_DENIED.* check the bucket's name and the cred"):
        own_prefix.parent.write_bytes("a", b"x")


def test_ray_has_an_equal_file_system(bucket: str) -> None:
    """Ray Train refuses checkpoints on another one than its own."""
    folder = Folder(bucket) / "runs"
    given = ray_storage(folder)
    assert given["storage_path"] == folder.path
    assert pickle.loads(pickle.dumps(given["storage_filesystem"])) == folder.filesystem
    unverified = Folder(f"{bucket}/runs?tls_verify_certificates=false")  # would be lost in a pickle
    given = ray_storage(unverified)
    assert pafs.FileSystem.from_uri(given.pop("storage_path"))[0] == unverified.filesystem
    assert not given


def test_a_small_file_costs_one_request(server: Server, bucket: str) -> None:
    folder = Folder(bucket) / "a" / "b"
    server.requests.clear()
    folder.write_bytes("c/d", b"x")
    assert server.requests == ["PUT /bucket/a/b/c/d"]
    lock = _Lock(folder, "runs", "first", QUICK)
    lock._write(Claim.for_this_process())
    server.requests.clear()
    assert lock._read() is not None  # a heartbeat
    lock._write(Claim.for_this_process())
    assert [request.partition(" ")[0] for request in server.requests] == ["HEAD", "GET", "PUT"]


def test_an_interrupted_upload_leaves_a_whole_file(
    bucket: str, ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(bucket)
    folder.write_bytes("summary.json", b"old")
    opened = Folder._opened

    def interrupted(self: Folder, path: str, name: str) -> pa.NativeFile:
        stream = opened(self, path, name)
        signal.raise_signal(signal.SIGINT)
        return stream

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "_opened", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.write_bytes("summary.json", b"new")
    # The thread goes on, even where the signal has come before its caller could wait for it.
    for _ in range(200):
        found = folder.read_bytes("summary.json")
        if found == b"new":
            break
        assert found == b"old"
        time.sleep(0.05)
    assert found == b"new"


def test_folders_of_an_object_store_need_not_be_created(bucket: str) -> None:
    folder = Folder(bucket) / "some"
    assert not folder.exists()
    assert folder.names() == []
    folder.write_bytes("deep/er/file", b"x")
    assert folder.exists()
    assert folder.exists("deep")
    assert (folder.names(), (folder / "deep").names()) == (["deep"], ["er"])
    (folder / "deep").delete()
    assert not folder.exists("deep")
    assert folder.names() == []


def test_empty_objects_that_stand_for_folders_are_not_copied_as_files(bucket: str) -> None:
    """pyarrow leaves one for the folder of a file that it deletes or moves."""
    folder = Folder(bucket) / "marked"
    with folder.rebuilt("last.json") as building:
        building.filesystem.create_dir(f"{building.path}/images/new", recursive=True)
        building.write_bytes("images/part", b"x")
        building.write_json("last.json", {})
    assert folder.names() == ["images", "last.json"]
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    assert [info.base_name for info in infos if info.is_file] == ["part", "last.json"]


def test_a_bucket_that_does_not_exist_is_named(bucket: str) -> None:
    with pytest.raises(StorageError, match=r"NO_SUCH_BUCKET.* check the bucket's name"):
        Folder(f"{bucket}-of-nobody").write_bytes("a", b"x")


@pytest.mark.slow
def test_a_pipeline_from_and_to_an_object_store(
    bucket: str,
    server: Server,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pafs.copy_files(str(phantoms), f"{bucket}/slices")
    monkeypatch.setattr(server, "writable", "team/brainray/")
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tmp_path, "train.num_epochs=1")))
    storage = Folder(bucket) / "team" / "brainray"
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
