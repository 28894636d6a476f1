"""MLflow: the only module that imports it.

A run's folder is the truth; MLflow shows a projection of it. What is logged again is sent only
where MLflow has not got it yet: so it may be after every epoch, after an outage, and after a
restart.
"""

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mlflow
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.db import utils as db_utils
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

from brainray import layout
from brainray.errors import TrackingError
from brainray.log import Log
from brainray.redaction import redacted
from brainray.storage import Folder

URI_VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's own; it wins over ``tracking.uri``."""

_BATCH = 500  # MLflow refuses batches of more than 1,000 metrics
_MAX_PARAMS = 100
_ENDED = {"FINISHED", "FAILED", "KILLED"}
_DATABASE_RETRIES = 3  # in half a second; MLflow's own ten take two minutes, for every call
_FORBIDDEN = re.compile(r"[^\w\-. :/]")


@dataclass(frozen=True)
class ServedFiles:
    """What MLflow needs to load a model: no pickled objects, its code goes along as source."""

    data: Path  # local folder with the model's files
    loader: str  # module with _load_pyfunc(folder), imported from the code below
    code: Path  # the package that the loader is in
    requirements: Sequence[str]  # distributions that it needs, kept at the installed versions
    inputs: Mapping[str, str]  # MLflow's type by column; each may be left out
    outputs: Mapping[str, str]  # Arrow's type by column


@dataclass(frozen=True)
class _Ending:
    status: str
    time_ms: int


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class MLflowTracker:
    """One brainray run in one MLflow run, whose id is kept in the run's folder.

    Only one process may use it at a time: SQLite takes a single writer.
    """

    def __init__(self, run: Folder, uri: str, experiment: str, artifacts: str | None) -> None:
        """
        Args:
            run: the brainray run's folder.
            uri: MLflow tracking URI.
            experiment: its name; made when absent.
            artifacts: where a new experiment keeps artifacts; None leaves it to the server.
        """
        self._run = run
        self._uri = uri
        self._experiment = experiment
        self._artifacts = artifacts
        self._client: MlflowClient | None = None
        self._state: dict[str, object] = {}
        self._ended: _Ending | None = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once it has begun."""
        run_id = self._state.get("run_id")
        return None if run_id is None else str(run_id)

    def begin(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the run, or find it again; one that has ended stays so until it is `running`."""
        with _readable_errors(self._uri):
            client = self._connect()
            uri = redacted(self._uri)  # a file in storage is no place for a password
            self._state = self._read_state(uri)
            known = None if self.run_id is None else self._find(client)
            if known is not None:
                if known.status in _ENDED:
                    self._ended = _Ending(known.status, known.end_time)
                client.log_batch(self._id, tags=_tags(tags))
            else:
                run = client.create_run(self._experiment_id(client), run_name=name, tags=dict(tags))
                self._state = {
                    "uri": uri,
                    "run_id": run.info.run_id,
                    "epochs_sent": 0,
                    "elsewhere": self._state["elsewhere"],
                }
            self._save()
            if not self._state.get("params_sent"):
                flat = [Param(_key(key), str(value)) for key, value in params.items()]
                for start in range(0, len(flat), _MAX_PARAMS):
                    client.log_batch(self._id, params=flat[start : start + _MAX_PARAMS])
                self._state["params_sent"] = True
                self._save()

    def running(self) -> None:
        """Mark the run as one that goes on."""
        with _readable_errors(self._uri):
            if self._ended is not None:
                self._connect().update_run(self._id, status="RUNNING")
                self._ended = None

    def log_epochs(self, history: list[dict[str, float]]) -> None:
        """Send the epochs that were not sent yet, by this process or another."""
        with _readable_errors(self._uri):
            self._read_again()
            sent = int(str(self._state["epochs_sent"]))
            for metrics in history[sent:]:
                epoch = int(metrics["epoch"])
                figures = {name: value for name, value in metrics.items() if name != "epoch"}
                self._log(figures, step=epoch, timestamp=self._stamp(f"epoch {epoch}"))
                self._state["epochs_sent"] = epoch
                self._save()

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Send the figures that stand for the whole run."""
        digest = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()
        with _readable_errors(self._uri):
            self._read_again()
            if self._state.get("summary_sent") == digest:
                return
            figures = {f"final/{name}": value for name, value in metrics.items()}
            self._log(figures, step=0, timestamp=self._stamp(f"summary {digest}"))
            self._state["summary_sent"] = digest
            self._save()

    def log_files(self, names: Iterable[str]) -> None:
        """Send files of the run's folder as artifacts."""
        with _readable_errors(self._uri), tempfile.TemporaryDirectory() as temporary:
            # Through a local copy, since the run's folder may be a bucket.
            for name in names:
                copy = Path(temporary, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(self._run.read_bytes(name))
            self._connect().log_artifacts(self._id, temporary)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        with _readable_errors(self._uri):
            self._connect().log_batch(self._id, tags=_tags(tags))

    def log_model(
        self, served: ServedFiles, registered_name: str | None, *, anew: bool = True
    ) -> None:
        """Keep a model that can be served, and register it where a name is given.

        Where not ``anew``, the one that was kept last is not kept again. MLflow takes the run for
        ended then: `finish` says how it has.
        """
        digest = hashlib.sha256(str(registered_name).encode())
        for path in sorted(path for path in served.data.rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
        if not anew and self._state.get("model_sent") == digest.hexdigest():
            return
        with _readable_errors(self._uri), _globally(self._uri):
            self._connect()
            with mlflow.start_run(run_id=self._id), _without_advice():
                mlflow.pyfunc.log_model(
                    name="model", registered_model_name=registered_name, **_pyfunc(served)
                )
            self._state["model_sent"] = digest.hexdigest()
            self._save()

    def finish(self, status: str = "FINISHED", *, unless_ended: bool = False) -> None:
        """Mark the run as FINISHED, FAILED or KILLED; what had ended so keeps its time.

        ``unless_ended``: what had ended otherwise stays as it was, too.
        """
        with _readable_errors(self._uri):
            ended = self._ended
            if ended is None or (ended.status != status and not unless_ended):
                ended = _Ending(status, _now_ms())
            self._connect().set_terminated(self._id, ended.status, ended.time_ms)
            self._ended = ended

    @property
    def _id(self) -> str:
        if self.run_id is None:
            raise TrackingError("the MLflow run has not begun")
        return self.run_id

    def _read_again(self) -> None:
        """What another process may have sent meanwhile."""
        told = self._read_state(redacted(self._uri))
        if told.get("run_id") == self.run_id:
            self._state = told

    def _stamp(self, what: str) -> int:
        """When it was first tried to send this, in ms: MLflow takes a figure of one step and time
        once, also where its answer was lost and it is sent again.
        """
        if self._state.get("sending") != what:
            self._state |= {"sending": what, "sending_ms": _now_ms()}
            self._save()
        return int(str(self._state["sending_ms"]))

    def _read_state(self, uri: str) -> dict[str, object]:
        """What has been sent to this server; ``elsewhere``, to each other one."""
        if not self._run.exists(layout.TRACKING):
            return {"elsewhere": {}}
        saved = self._run.read_json(layout.TRACKING)
        elsewhere = saved.pop("elsewhere", {})
        servers = elsewhere | {saved["uri"]: saved}
        state = servers.pop(uri, {})
        return state | {"elsewhere": servers}

    def _find(self, client: MlflowClient) -> RunInfo | None:
        """None where the server has the run no more: it, or the database, may have been deleted."""
        try:
            info = client.get_run(self._id).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return info if info.lifecycle_stage == LifecycleStage.ACTIVE else None

    def _connect(self) -> MlflowClient:
        if self._client is None:
            # An unreachable server must cost seconds, not the minutes of MLflow's defaults.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            db_utils.MAX_RETRY_COUNT = _DATABASE_RETRIES  # there is no variable for it
            _quiet()
            database = self._uri.removeprefix("sqlite:///")
            if database != self._uri:
                Path(unquote(database)).parent.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=self._uri)
        return self._client

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
                raise TrackingError(
                    f"the MLflow experiment {self._experiment!r} has been deleted: restore it "
                    f"(mlflow experiments restore -x {experiment.experiment_id}), or name another "
                    "with --set tracking.experiment=NAME"
                )
            return str(experiment.experiment_id)
        return str(client.create_experiment(self._experiment, artifact_location=self._artifacts))

    def _log(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        batch = [
            Metric(_key(name), float(value), timestamp, step)
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(batch), _BATCH):
            self._connect().log_batch(self._id, metrics=batch[start : start + _BATCH])

    def _save(self) -> None:
        self._run.write_json(layout.TRACKING, self._state)


class LenientTracker:
    """Passes everything on, but an unreachable server never stops the work.

    What fails is said once; the run's folder keeps all of it, and a later ``begin`` and ``log_*``
    catch up in order.
    """

    def __init__(self, tracker: MLflowTracker, warn: Log) -> None:
        self._tracker = tracker
        self._warn = warn
        self._begin: Callable[[], None] | None = None
        self._problems: dict[str, str] = {}  # by what failed, until the same succeeds

    @property
    def problem(self) -> str | None:
        """The last failure of what has not been sent since, or None when all was."""
        return next(reversed(self._problems.values()), None)

    def begin(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        self._begin = lambda: self._tracker.begin(name, params, tags)
        self._try("begin", lambda: None)

    def running(self) -> None:
        self._try("running", self._tracker.running)

    def log_epochs(self, history: list[dict[str, float]]) -> None:
        self._try("epochs", lambda: self._tracker.log_epochs(history))

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self._try("summary", lambda: self._tracker.log_summary(metrics))

    def log_files(self, names: Iterable[str]) -> None:
        chosen = list(names)
        self._try("files", lambda: self._tracker.log_files(chosen))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._try("tags", lambda: self._tracker.log_tags(tags))

    def log_model(
        self, served: ServedFiles, registered_name: str | None, *, anew: bool = True
    ) -> None:
        self._try("model", lambda: self._tracker.log_model(served, registered_name, anew=anew))

    def finish(self, status: str = "FINISHED", *, unless_ended: bool = False) -> None:
        self._try("status", lambda: self._tracker.finish(status, unless_ended=unless_ended))

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            if self._begin is not None:
                self._begin()
                self._begin = None
                self._problems.pop("begin", None)
            if "running" in self._problems:  # as a server that was away has not been told
                self._tracker.running()
                del self._problems["running"]
            action()
            self._problems.pop(what, None)
        except TrackingError as error:
            if not self._problems:
                self._warn(str(error))
            self._problems[what] = str(error)


def save_served(path: Path, served: ServedFiles) -> None:
    """Write a folder that ``mlflow models serve`` and ``mlflow.pyfunc.load_model`` take."""
    with _without_advice():
        mlflow.pyfunc.save_model(path, **_pyfunc(served))


def _pyfunc(served: ServedFiles) -> dict[str, Any]:
    """How MLflow's pyfunc flavor is told of a model."""
    inputs, outputs = (
        Schema([ColSpec(kind, name, required=False) for name, kind in columns.items()])
        for columns in (
            served.inputs,
            {name: _mlflow_type(kind) for name, kind in served.outputs.items()},
        )
    )
    return {
        "loader_module": served.loader,
        "data_path": str(served.data),
        "code_paths": [str(served.code)],
        "signature": ModelSignature(inputs, outputs),
        "pip_requirements": [
            f"{name}=={version(name).partition('+')[0]}" for name in served.requirements
        ],
    }


def _mlflow_type(arrow: str) -> DataType | Array:
    """Of a column of results, as lists and numbers of plain JSON."""
    if arrow.startswith("list<"):
        inner = arrow.removeprefix("list<").removesuffix(">").rpartition(": ")[2]
        return Array(_mlflow_type(inner))
    kinds = {"string": DataType.string, "float": DataType.float, "int32": DataType.integer}
    return kinds[arrow]


def default_uri(storage: Folder) -> str:
    """A SQLite file in a local storage, else in ~/brainray."""
    folder = storage.local_path or Path.home() / "brainray"
    path = str(folder).replace("%", "%25").replace("?", "%3F")  # as SQLAlchemy reads it
    return f"sqlite:///{path}/mlflow.db"


def artifact_location(uri: str, storage: Folder) -> str | None:
    """Under ``storage`` for a database, whose default is the working directory."""
    if uri.startswith(("http://", "https://", "databricks")):
        return None
    local = storage.local_path
    return (local / "mlartifacts").as_uri() if local is not None else str(storage / "mlartifacts")


PARENT_TAG = "mlflow.parentRunId"
"""Tag of a run that MLflow shows below another."""


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in tags.items()]


def _key(name: str) -> str:
    """The name in MLflow's alphabet; names that would become one keep a mark of what they were."""
    parts = [part for part in _FORBIDDEN.sub("_", name).split("/") if part not in {"", ".", ".."}]
    plain = "/".join(parts)
    if plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


@contextmanager
def _globally(uri: str) -> Iterator[None]:
    """MLflow logs models through its global state only, which it also puts into the environment:
    there it would win over what later runs of the process are told.
    """
    before = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(URI_VARIABLE, None)
        else:
            os.environ[URI_VARIABLE] = before


@contextmanager
def _without_advice() -> Iterator[None]:
    """MLflow asks for an example of the input, whose only use is to guess the signature."""
    _quiet()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ii]nput example")
        yield


def _quiet() -> None:
    for name in ("mlflow", "alembic"):  # database migrations log every step
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _readable_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # of databases, HTTP, and stores of artifacts: any of a dozen
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        message = f"MLflow at {uri} cannot be used: {reason}"
        # A password in the URI must reach neither logs nor the job's result.
        raise TrackingError(redacted(message)) from None
