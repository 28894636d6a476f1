"""From a run's folder to MLflow: while it trains, at its end, or later."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from brainray import layout
from brainray.config import Config
from brainray.config_text import flatten
from brainray.errors import ConfigError, TrackingError
from brainray.log import Log, log
from brainray.orchestration.code_version import about_code
from brainray.orchestration.lock import is_held
from brainray.orchestration.run import Run
from brainray.redaction import HIDDEN, redacted
from brainray.storage import Folder
from brainray.tracking import (
    URI_VARIABLE,
    LenientTracker,
    MLflowTracker,
    artifact_location,
    default_uri,
)

_SERVERS = ("http://", "https://", "databricks")  # which have a page of their own
_TAGS_OF_CODE = {
    "brainray.version": "brainray",
    "brainray.code_hash": "code_hash",
    "brainray.ray_job_id": "ray_job_id",
    "brainray.ray_submission_id": "ray_submission_id",
    "brainray.git_revision": "git_revision",
}
"""By tag, what `about_code` calls it."""


@dataclass(frozen=True)
class Tracking:
    """An open connection between one run and MLflow."""

    tracker: LenientTracker
    mlflow: MLflowTracker
    uri: str
    """As it may be shown."""

    @property
    def mlflow_run_id(self) -> str | None:
        return self.mlflow.run_id


def how_to_open(uri: str) -> str:
    """The command that shows a database's runs, or the address of what has a page of its own."""
    if uri.startswith(_SERVERS):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def begin_tracking(
    config: Config, run: Run, log: Log, tags: Mapping[str, str] | None = None
) -> Tracking:
    """Open the run's MLflow run; an unreachable server is said and does not stop the work."""
    params = flatten(config.without_secrets()) | {
        f"num_{k}": v for k, v in run.info["num_slices"].items()
    }
    del params["name"]  # MLflow's own; a comparison of runs would show it as a setting
    about = {
        "brainray.data_hash": str(run.info["data_hash"]),
        "brainray.run_folder": str(run.folder),
    }
    made_by = _last_submission(run)
    tags = about | _version_tags(made_by or {}) | dict(tags or {})
    return open_tracking(config, run.folder, params, tags, log, made_by=made_by)


def open_tracking(
    config: Config,
    folder: Folder,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    log: Log,
    *,
    made_by: Mapping[str, object] | None = None,
) -> Tracking:
    """An MLflow run named as the folder, which remembers it and keeps what cannot be sent.

    ``made_by`` is what `about_code` said when it was made; by default, what it says now.
    """
    storage = Folder(config.storage)
    uri = os.environ.get(URI_VARIABLE) or config.tracking.uri or default_uri(storage)
    if HIDDEN in uri:
        raise ConfigError(
            f"a config keeps tracking.uri without its password ({uri}): give it again with --set "
            f"tracking.uri=... or {URI_VARIABLE}"
        )
    mlflow = MLflowTracker(folder, uri, config.tracking.experiment, artifact_location(uri, storage))
    tracker = LenientTracker(
        mlflow, warn=lambda problem: log(f"{problem}; figures are kept in {folder}")
    )
    made_by = about_code() if made_by is None else made_by
    code = {tag: str(made_by[key]) for tag, key in _TAGS_OF_CODE.items() if made_by.get(key)}
    tracker.begin(folder.name, params, code | dict(tags))
    return Tracking(tracker, mlflow, redacted(uri))


def publish(config: Config, run: Run, log: Log = log) -> Tracking:
    """Send a run's folder to MLflow: what training could not send, or a run trained elsewhere.

    It goes where training meant it to, unless another place is named.

    Raises:
        TrackingError: the server still cannot be used.
        ConfigError: its password is needed again.
    """
    tracking = begin_tracking(config_to_track(config, run), run, log)
    send_run(run, tracking.tracker)
    name = str(run.info["name"])
    if not run.is_complete and not is_held(Folder(config.storage), layout.RUNS, name):
        # It has ended; where its job could not say how, nobody knows more.
        tracking.tracker.finish("KILLED", unless_ended=True)
    if tracking.tracker.problem is not None:
        raise TrackingError(tracking.tracker.problem)
    return tracking


def config_to_track(config: Config, run: Run) -> Config:
    """The run's saved config, with the storage and what is said of tracking now."""
    saved = run.saved_config()
    said = config.tracking.model_dump(exclude_unset=True)
    was = _where_it_was_sent(run)
    tracking = saved.tracking.model_copy(update=({} if was is None else {"uri": was}) | said)
    return saved.model_copy(update={"tracking": tracking, "storage": config.storage})


def _where_it_was_sent(run: Run) -> str | None:
    """By training, which may have been told by a variable that is set no more; None where that
    was a database that is not there, as that of a storage that has moved.
    """
    if not run.folder.exists(layout.TRACKING):
        return None
    uri = str(run.folder.read_json(layout.TRACKING)["uri"])
    database = uri.removeprefix("sqlite:///")
    return None if database != uri and not Path(unquote(database)).exists() else uri


def _last_submission(run: Run) -> dict[str, Any] | None:
    """What trained the run at last, whatever sends it."""
    submissions = run.folder.read_json_lines(layout.PROVENANCE)
    return submissions[-1] if submissions else None


def _version_tags(made_by: Mapping[str, Any]) -> dict[str, str]:
    """The versions behind a run as MLflow shows and compares them."""
    versions = {name: made_by[name] for name in ("python", "platform") if name in made_by}
    versions |= made_by.get("packages", {})
    return {f"brainray.{name}": version for name, version in versions.items()}


def send_run(run: Run, tracker: LenientTracker) -> None:
    """Epochs, summary, figures and config, as far as the run's folder holds them."""
    tracker.log_epochs(run.folder.read_json_lines(layout.METRICS))
    # Not what was seen: its fingerprints are gigabytes of a large store.
    files = [layout.CONFIG, layout.PROVENANCE, layout.METRICS, layout.REPORT]
    for folder in (layout.FIGURES, layout.DATASET, f"{layout.DATASET}/{layout.FIGURES}"):
        names = [f"{folder}/{name}" for name in (run.folder / folder).names()]
        files += [name for name in names if not name.endswith(f"/{layout.FIGURES}")]
    if run.is_complete:
        tracker.log_summary(run.folder.read_json(layout.SUMMARY))
        files.append(layout.SUMMARY)
    tracker.log_files([name for name in files if run.folder.exists(name)])
    if run.is_complete:
        tracker.finish()
