"""Paths in settings: made absolute, checked to exist, and to be the same folder on all nodes."""

import os
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from brainray.config import RUN_PREFIX, URI_VARIABLE, WEIGHTS_OF_NO_SLICE, Config
from brainray.errors import ConfigError, DataError
from brainray.log import log

if TYPE_CHECKING:
    from brainray.storage import Folder

_SQLITE = "sqlite:///"
_ON_OTHER_NODES_S = 5.0  # a network file system may show new files late
_ANSWERS_WITHIN_S = 60.0


def resolve_paths(config: Config, keys: Sequence[str] = ()) -> Config:
    """Make ``source``, ``labels``, ``checkpoint``, ``storage``, local weights and a tracking
    database absolute.

    Raises:
        ConfigError: a relative path in a submitted job, which runs in a temporary copy; also in
            ``MLFLOW_TRACKING_URI``, if the job reads the key ``tracking``.
    """
    resolved: dict[str, Any] = {
        key: _resolve(key, value)
        for key in ("storage", "source", "labels", "checkpoint")
        if (value := getattr(config, key)) is not None
    }
    if config.sources:
        resolved["sources"] = {
            name: _resolve(f"sources.{name}", value) for name, value in config.sources.items()
        }
    if config.study.features:
        features = {
            name: feature.model_copy(update={"weights": _resolve_weights(name, feature.weights)})
            for name, feature in config.study.features.items()
        }
        resolved["study"] = config.study.model_copy(update={"features": features})
    if config.encoder.weights not in WEIGHTS_OF_NO_SLICE:
        weights = _resolve("encoder.weights", config.encoder.weights)
        resolved["encoder"] = config.encoder.model_copy(update={"weights": weights})
    if searched := config.tune.space.get("encoder.weights"):
        space = {
            kind: [
                value if value in WEIGHTS_OF_NO_SLICE else _resolve("tune.space", str(value))
                for value in values
            ]
            for kind, values in searched.items()
        }
        resolved["tune"] = config.tune.model_copy(
            update={"space": config.tune.space | {"encoder.weights": space}}
        )
    if config.tracking.uri is not None:
        uri = resolve_tracking_uri("tracking.uri", config.tracking.uri)
        resolved["tracking"] = config.tracking.model_copy(update={"uri": uri})
    is_tracked = any(key.partition(".")[0] == "tracking" for key in keys)
    if is_tracked and os.environ.get(URI_VARIABLE):
        resolve_tracking_uri(URI_VARIABLE, os.environ[URI_VARIABLE])
    return config.model_copy(update=resolved)


def resolve_tracking_uri(key: str, uri: str) -> str:
    """An MLflow tracking URI, with an absolute path if it is that of an SQLite database.

    Raises:
        ConfigError: the path is relative inside a submitted job.
    """
    database = uri.removeprefix(_SQLITE)
    if database == uri or database.startswith("/"):
        return uri
    path, question, query = database.partition("?")
    return f"{_SQLITE}{quote(_resolve(key, unquote(path)))}{question}{query}"


def _resolve(key: str, value: str) -> str:
    if "://" in value:
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # no such ~user
        raise ConfigError(f"{key}={value}: {error}") from None
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"{key}={value} is relative: a submitted job runs in a temporary copy of the working "
            "directory; give an absolute path or a URI"
        )
    absolute = str(path.absolute())
    encoding = sys.getfilesystemencoding()
    if not absolute.isascii() and encoding != "utf-8":  # PyArrow would look for another path
        raise ConfigError(
            f"{key}={absolute}: this locale's encoding is {encoding}, in which only ASCII paths "
            "can be read: set PYTHONUTF8=1 in the environment"
        )
    return absolute


def _resolve_weights(feature: str, weights: str) -> str:
    if weights in WEIGHTS_OF_NO_SLICE or weights.startswith(RUN_PREFIX):
        return weights
    return _resolve(f"study.features.{feature}.weights", weights)


def check_paths(config: Config, keys: Sequence[str]) -> None:
    """Check that given paths and runs exist.

    Raises:
        BrainrayError: one of them does not exist.
    """
    from brainray.orchestration.run import open_run
    from brainray.storage import Folder, check_is_folder

    sources = {"source": config.source} if "source" in keys else {}
    if "sources" in keys:
        sources |= {f"sources.{name}": source for name, source in config.sources.items()}
    for key, source in sources.items():
        if source is None:
            continue
        check_is_folder(Folder(source), key)
        storage = Folder(config.storage)
        if storage.contains(Folder(source)) and Folder(source).contains(storage):
            raise ConfigError(
                f"storage={config.storage} is {key} itself, where its figures would be read as "
                f"slices: give a folder of its own, such as {config.storage}/brainray"
            )
    if "labels" in keys and config.labels is not None:
        labels = Folder(config.labels)
        if not labels.exists():
            raise DataError(f"no such file: labels={labels}")
        if labels.local_path is not None and labels.local_path.is_dir():
            raise DataError(f"labels={labels} is a folder: give the CSV or Parquet file")
    if "run" in keys and config.run is not None and config.checkpoint is None:
        open_run(Folder(config.storage), config.run)


def check_is_shared(storage: str) -> None:
    """Check that all nodes with CPUs or GPUs see the driver's local ``storage``, with a probe file.

    Raises:
        ConfigError: it is another folder on another node.
        StorageError: it cannot be written.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from brainray.storage import Folder

    here = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    ]
    folder = Folder(storage)
    path = folder.local_path
    if not others or path is None:
        return
    name = f".visible-to-all-nodes-{uuid.uuid4().hex}"
    # Closed at once: some file systems show a file to other nodes only then.
    folder.write_bytes(name, b"")
    try:
        check = ray.remote(num_cpus=0, max_retries=0)(_appears)
        answers = {}
        for node in others:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = check.options(scheduling_strategy=there).remote(
                str(path / name), _ON_OTHER_NODES_S
            )
            answers[task] = node["NodeManagerAddress"]
        done, silent = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWERS_WITHIN_S)
        unknown = "note: node {} did not answer whether it reads " + str(folder)
        for task in silent:
            log(unknown.format(answers[task]))
        for task in done:
            try:
                is_visible = ray.get(task)
            except ray.exceptions.RayError:  # the node has gone
                log(unknown.format(answers[task]))
                continue
            if not is_visible:
                raise ConfigError(
                    f"storage={folder} is another folder on node {answers[task]} than on the job's "
                    "node: give a path that all nodes mount, or a URI such as s3://BUCKET/brainray"
                )
    finally:
        folder.delete_file(name, missing_ok=True)


def check_is_here(folder: "Folder") -> None:
    """Check, on a node that may have joined since `check_is_shared`, that it reads a folder that
    the job has made in a local ``storage``.

    Raises:
        ConfigError: there is no such folder on this node.
    """
    path = folder.local_path
    if path is not None and not _appears(str(path), _ON_OTHER_NODES_S):
        raise ConfigError(
            f"{folder} is not on node {socket.gethostname()}, which joined the Ray cluster after "
            "the job had started: give a storage that all nodes mount, or a URI such as "
            "s3://BUCKET/brainray"
        )


def _appears(path: str, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not os.path.exists(path):  # also False where it may not be read
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
