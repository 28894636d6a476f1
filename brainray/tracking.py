"""MLflow tracking: the only module that imports MLflow.

The run's folder is the source of truth; MLflow shows a projection of it. Logging is idempotent:
only what MLflow does not have yet is sent, so everything may be logged again after every epoch,
outage or restart.
"""

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypedDict, cast
from urllib.parse import unquote

import mlflow
import mlflow.pyfunc
import pandas as pd
import pyarrow as pa
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.db import utils as db_utils
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

from brainray import layout
from brainray.config import URI_VARIABLE
from brainray.errors import TrackingError
from brainray.log import log
from brainray.redaction import redacted
from brainray.schema import History
from brainray.storage import Folder

_BATCH = 500  # MLflow rejects batches of more than 1,000 metrics
_MAX_PARAMS = 100
_SUMMARY = "final/"  # before the names of a whole run's metrics
_ENDED = {"FINISHED", "FAILED", "KILLED"}
_DATABASE_RETRIES = 3  # take half a second; MLflow's default of ten takes two minutes per call
_MAX_KEY = 240  # MLflow's limit is 250
_FORBIDDEN = re.compile(r"[^\w\-. :/]")


_TIMEOUT, _QUICK_S = "MLFLOW_HTTP_REQUEST_TIMEOUT", "10"


@dataclass(frozen=True)
class ServedFiles:
    """What MLflow needs to load a model: no pickled objects, the code is included as source."""

    data: Path  # local folder with the model's files
    loader: str  # module with _load_pyfunc(folder), imported from the code below
    code: Path  # the package that contains the loader
    requirements: Sequence[str]  # required distributions, pinned to the installed versions
    inputs: Mapping[str, str]  # MLflow's type by column; all optional
    outputs: pa.Schema
    example: Mapping[str, str | bytes]  # a request: some of the inputs
    metadata: Mapping[str, Any]  # kept with the model


class _Sent(TypedDict, total=False):
    """What an MLflow run has received."""

    uri: str  # where it was last found
    params_sent: bool
    epochs_sent: int
    summary_sent: str  # digest
    model_sent: str  # digest
    sending: str  # what is being sent, or was when the connection was lost
    sending_ms: int  # time of the first attempt


class _Saved(TypedDict):
    """What is kept in the run's folder."""

    uri: str
    run_id: str | None
    sent: dict[str, _Sent]  # by MLflow run; there is one on each server


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


_Arguments = ParamSpec("_Arguments")
_Method = Callable[Concatenate["Tracker", _Arguments], None]


def _lenient(method: _Method[_Arguments]) -> _Method[_Arguments]:
    """Let a failure of the method be the tracker's `problem` rather than its caller's."""

    @wraps(method)
    def attempt(self: "Tracker", /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        self._attempt(method.__name__, partial(method, self, *args, **kwargs))

    return attempt


class Tracker:
    """Logs one brainray run to one MLflow run, whose id is kept in the run's folder.

    An unreachable server never stops the work: the first failure is logged, the folder keeps
    everything, and a later ``begin`` and ``log_*`` catch up in order. Only one process may use it
    at a time, because SQLite allows a single writer.
    """

    def __init__(self, run: Folder, uri: str, experiment: str, artifacts: str | None) -> None:
        """
        Args:
            run: the brainray run's folder.
            uri: MLflow tracking URI.
            experiment: its name; created if it does not exist.
            artifacts: where a new experiment keeps artifacts; None lets the server decide.
        """
        self._run = run
        self._uri = uri
        self._experiment = experiment
        self._artifacts = artifacts
        self._client: MlflowClient | None = None
        self._sent: dict[str, _Sent] = {}
        self.mlflow_run_id: str | None = None
        """The MLflow run's id, once it has started."""
        self._due: dict[str, Callable[[], None]] = {}  # by operation; sent before anything else
        self._problems: dict[str, str] = {}  # by operation, until it succeeds

    @property
    def uri(self) -> str:
        """The tracking URI, without a password."""
        return redacted(self._uri)

    @property
    def problem(self) -> str | None:
        """The last failure that no later attempt has made up for; None if everything was sent."""
        return next(reversed(self._problems.values()), None)

    def begin(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Create or find the run; an ended run stays ended until `running` is called."""
        self._due["begin"] = partial(self._begin, name, params, tags)
        self._attempt("begin")

    def running(self) -> None:
        """Mark the run as running."""
        self._due["running"] = lambda: self._connect().update_run(self._id, status="RUNNING")
        self._attempt("running")

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """If the block raises, the run ends as failed, or as killed if a signal ended it."""
        try:
            yield
        except BaseException as stop:
            self.finish(status_after(stop))
            raise

    @_lenient
    def log_epochs(self, history: History) -> None:
        """Send the epochs that neither this process nor another has sent."""
        self._read_again()
        if len(history) < self._state["epochs_sent"]:  # the others are trained again
            self._state["epochs_sent"] = len(history)
            self._state.pop("sending", None)  # and are later than when they were sent
            self._save()
        for metrics in history[self._state["epochs_sent"] :]:
            epoch = int(metrics["epoch"])
            values = {name: value for name, value in metrics.items() if name != "epoch"}
            self._log(values, step=epoch, timestamp=self._stamp(f"epoch {epoch}"))
            self._state["epochs_sent"] = epoch
            self._save()

    @_lenient
    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Send the metrics of the whole run."""
        digest = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()
        self._read_again()
        if self._state.get("summary_sent") == digest:
            return
        final = {f"{_SUMMARY}{name}": value for name, value in metrics.items()}
        self._log(final, step=0, timestamp=self._stamp(f"summary {digest}"))
        self._state["summary_sent"] = digest
        self._save()

    @_lenient
    def log_files(self, names: Iterable[str]) -> None:
        """Send files of the run's folder as artifacts."""
        with tempfile.TemporaryDirectory() as temporary:
            # Through a local copy, because the run's folder may be a bucket.
            for name in names:
                copy = Path(temporary, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(self._run.read_bytes(name))
            client = self._connect()
            with _time_for_uploads():
                client.log_artifacts(self._id, temporary)

    @_lenient
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        self._connect().log_batch(self._id, tags=_tags(tags))

    @_lenient
    def log_model(
        self, served: ServedFiles, registered_name: str | None, *, force: bool = True
    ) -> None:
        """Log a model that can be served, and register it if a name is given.

        Unless ``force``, a model identical to the last one logged is skipped. MLflow then considers
        a run ended that had not; call `finish` to set its status.
        """
        digest = hashlib.sha256(str(registered_name).encode())
        for path in sorted(path for path in served.data.rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
        if not force and self._state.get("model_sent") == digest.hexdigest():
            return
        with _globally(self._uri):
            client = self._connect()
            before = client.get_run(self._id).info
            try:
                with mlflow.start_run(run_id=self._id), _time_for_uploads():
                    Model.log(
                        artifact_path=None,
                        name="model",
                        flavor=_UntriedPyfunc,
                        registered_model_name=registered_name,
                        validate_serving_input=False,
                        **_pyfunc(served),
                    )
            finally:
                if before.status in _ENDED:
                    client.set_terminated(self._id, before.status, before.end_time)
            self._state["model_sent"] = digest.hexdigest()
            self._save()

    @_lenient
    def finish(
        self,
        status: str = "FINISHED",
        *,
        unless_ended: bool = False,
        with_last_metrics: bool = False,
    ) -> None:
        """Mark the run as FINISHED, FAILED or KILLED; one with that status keeps its end time.

        With ``unless_ended``, a run that ended with another status is not changed either. The end
        time is now, or that of the last metrics sent.
        """
        client = self._connect()
        before = client.get_run(self._id).info.status
        if before not in _ENDED or (before != status and not unless_ended):
            end_ms = self._state.get("sending_ms") if with_last_metrics else None
            client.set_terminated(self._id, status, end_ms)

    def _attempt(self, what: str, action: Callable[[], None] = lambda: None) -> None:
        """Do what is due, then the action; the first failure is logged, each is kept."""
        try:
            for due, catch_up in list(self._due.items()):
                catch_up()
                del self._due[due]
                self._problems.pop(due, None)
            action()
            self._problems.pop(what, None)
        except Exception as error:  # databases, HTTP and artifact stores raise a dozen kinds
            problem = _readable(error, self._uri)
            if not self._problems:
                log(f"{problem}; metrics are kept in {self._run}")
            self._problems[what] = problem

    def _begin(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        client = self._connect()
        saved = self._read()
        self._sent = saved["sent"]
        if saved["uri"] == self.uri:
            self.mlflow_run_id = saved["run_id"]  # known while the server is away
        # By id, as a database may have been moved or copied; the latest first.
        found = (self._find(client, run_id) for run_id in reversed(self._sent))
        known = next(filter(None, found), None)
        if known is not None:
            self.mlflow_run_id = known.run_id
            if self._state.get("uri", saved["uri"]) != self.uri:
                self._forget_what_it_lacks(client)
            client.log_batch(self._id, tags=_tags(tags))
        else:
            run = client.create_run(self._experiment_id(client), run_name=name, tags=dict(tags))
            self.mlflow_run_id = run.info.run_id
            self._sent[self._id] = {"epochs_sent": 0}
        self._state["uri"] = self.uri
        self._save()
        if not self._state.get("params_sent"):
            # MLflow refuses to change one; some may have been sent with other settings.
            present = client.get_run(self._id).data.params
            flat = [
                Param(_key(key), str(value))
                for key, value in params.items()
                if _key(key) not in present
            ]
            for start in range(0, len(flat), _MAX_PARAMS):
                client.log_batch(self._id, params=flat[start : start + _MAX_PARAMS])
            self._state["params_sent"] = True
            self._save()

    def _forget_what_it_lacks(self, client: MlflowClient) -> None:
        """A database copied earlier does not have what the original has received since."""
        names = client.get_run(self._id).data.metrics
        steps = (
            point.step for name in names for point in client.get_metric_history(self._id, name)
        )
        newest = max(steps, default=0)
        has_summary = any(name.startswith(_SUMMARY) for name in names)
        if newest < self._state["epochs_sent"] or not has_summary:
            self._sent[self._id] = {"epochs_sent": min(newest, self._state["epochs_sent"])}

    @property
    def _id(self) -> str:
        if self.mlflow_run_id is None:
            raise TrackingError("the MLflow run has not started")
        return self.mlflow_run_id

    @property
    def _state(self) -> _Sent:
        return self._sent[self._id]

    def _read_again(self) -> None:
        """Pick up what another process may have sent in the meantime."""
        self._sent |= self._read()["sent"]

    def _stamp(self, what: str) -> int:
        """Time of the first attempt to send this, in ms: MLflow stores a metric of one step and
        timestamp only once, even if it is sent again because the response was lost.
        """
        if self._state.get("sending") != what:
            self._state.update({"sending": what, "sending_ms": _now_ms()})
            self._save()
        return self._state["sending_ms"]

    def _read(self) -> _Saved:
        if not self._run.exists(layout.TRACKING):
            return {"uri": self.uri, "run_id": None, "sent": {}}
        saved = self._run.read_json(layout.TRACKING)
        if "sent" not in saved:  # by an earlier version: one server's, with those of the others
            each = [*saved.pop("elsewhere", {}).values(), saved]
            sent = {state["run_id"]: state for state in each}
            return {"uri": saved["uri"], "run_id": saved["run_id"], "sent": sent}
        return cast("_Saved", saved)

    def _find(self, client: MlflowClient, run_id: str) -> RunInfo | None:
        """None if the server does not have the run, or no longer."""
        try:
            info = client.get_run(run_id).info
        except MlflowException as error:
            # Servers may refuse an id of another kind of server.
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise
        return info if info.lifecycle_stage == LifecycleStage.ACTIVE else None

    def _connect(self) -> MlflowClient:
        if self._client is None:
            # Fail within seconds if the server is unreachable: MLflow's defaults take minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault(_TIMEOUT, _QUICK_S)
            db_utils.MAX_RETRY_COUNT = _DATABASE_RETRIES  # no environment variable sets it
            _quiet()
            database = _database(self._uri)
            if database is not None:
                database.parent.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=self._uri)
        return self._client

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
                raise TrackingError(
                    f"the MLflow experiment {self._experiment!r} has been deleted: restore it "
                    f"(mlflow experiments restore -x {experiment.experiment_id}) or set another "
                    "name with --set tracking.experiment=NAME"
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
        # The URI is without its password.
        saved: _Saved = {"uri": self.uri, "run_id": self.mlflow_run_id, "sent": self._sent}
        self._run.write_json(layout.TRACKING, saved)


def status_after(stop: BaseException) -> str:
    """MLflow's status of what an exception has ended."""
    return "FAILED" if isinstance(stop, Exception) else "KILLED"


def save_served(path: Path, served: ServedFiles) -> None:
    """Write a folder for ``mlflow models serve`` and ``mlflow.pyfunc.load_model``."""
    _quiet()
    mlflow.pyfunc.save_model(path, **_pyfunc(served))


class _UntriedPyfunc:
    """MLflow's pyfunc flavor, whose own `log_model` would load the model to try the example: that
    takes seconds, and leaves a deleted folder on the path of this process.
    """

    @staticmethod
    def save_model(path: str, *, validate_serving_input: bool, **settings: Any) -> None:
        mlflow.pyfunc.save_model(path, **settings)


def _pyfunc(served: ServedFiles) -> dict[str, Any]:
    """Arguments that describe a model to MLflow's pyfunc flavor."""
    inputs = _schema({name: DataType[kind] for name, kind in served.inputs.items()})
    outputs = _schema({field.name: _mlflow_type(field.type) for field in served.outputs})
    return {
        "loader_module": served.loader,
        "data_path": str(served.data),
        "code_paths": [str(served.code)],
        "signature": ModelSignature(inputs, outputs),
        "input_example": pd.DataFrame([served.example]),
        "metadata": dict(served.metadata),
        "pip_requirements": [_pinned(name) for name in served.requirements],
    }


def _schema(types: Mapping[str, DataType | Array]) -> Schema:
    return Schema([ColSpec(kind, name, required=False) for name, kind in types.items()])


def _pinned(distribution: str) -> str:
    """The installed version, unless it is installed under another name, as with conda."""
    try:
        return f"{distribution}=={version(distribution).partition('+')[0]}"
    except PackageNotFoundError:
        return distribution


def _mlflow_type(kind: pa.DataType) -> DataType | Array:
    """MLflow's type of a result column, which is plain JSON lists and numbers."""
    if pa.types.is_list(kind):
        return Array(_mlflow_type(kind.value_type))
    kinds = {
        pa.string(): DataType.string,
        pa.float32(): DataType.float,
        pa.int32(): DataType.integer,
    }
    return kinds[kind]


def default_uri(storage: Folder) -> str:
    """A SQLite file in a local storage, otherwise in ~/brainray."""
    folder = storage.local_path or Path.home() / "brainray"
    path = str(folder).replace("%", "%25").replace("?", "%3F")  # as SQLAlchemy reads it
    return f"sqlite:///{path}/mlflow.db"


def _database(uri: str) -> Path | None:
    """The file of a SQLite URI."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(unquote(path.partition("?")[0]))


def is_lost_database(uri: str) -> bool:
    """Whether it is a database that no longer exists, for example because storage has moved."""
    database = _database(uri)
    return database is not None and not database.exists()


def is_server(uri: str) -> bool:
    """Whether a tracking URI is that of a server, which has its own user interface."""
    return uri.startswith(("http://", "https://", "databricks"))


def artifact_location(uri: str, storage: Folder) -> str | None:
    """In ``storage`` for a database, whose default is the working directory."""
    if is_server(uri):
        return None
    local = storage.local_path
    return (local / "mlartifacts").as_uri() if local is not None else str(storage / "mlartifacts")


PARENT_TAG = "mlflow.parentRunId"
"""Tag of a run that MLflow shows as a child of another."""


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in tags.items()]


def _key(name: str) -> str:
    """The name in MLflow's alphabet and length; changed names get a hash suffix, so that none
    coincide.
    """
    parts = [part for part in _FORBIDDEN.sub("_", name).split("/") if part not in {"", ".", ".."}]
    plain = "/".join(parts)[:_MAX_KEY]
    if plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


@contextmanager
def _globally(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI, which logging a model needs. The environment variable that
    MLflow also sets would override the URI of later runs in the process: it lasts for the block.
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
def _time_for_uploads() -> Iterator[None]:
    """MLflow's own time limit, unless the user has set one: a server may answer an upload only when
    its own upload to the artifact store is done.
    """
    if os.environ.get(_TIMEOUT) != _QUICK_S:
        yield
        return
    del os.environ[_TIMEOUT]
    try:
        yield
    finally:
        os.environ[_TIMEOUT] = _QUICK_S


def _quiet() -> None:
    for name in ("mlflow", "alembic"):  # database migrations log every step
        logging.getLogger(name).setLevel(logging.WARNING)


def _readable(error: Exception, uri: str) -> str:
    """The error in one line, without a password: it goes to logs and the job's result."""
    if isinstance(error, TrackingError):
        return str(error)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if isinstance(error, ModuleNotFoundError) and error.name == "boto3":
        reason = "its artifacts are on S3, which needs boto3: pip install -e '.[s3]'"
    return redacted(f"MLflow at {uri} cannot be used: {reason}")
