"""Sends a run's folder to MLflow: while it trains, at its end, or later."""

import os
import shlex
from collections.abc import Mapping
from typing import Any

from brainray import layout
from brainray.config import URI_VARIABLE, Config
from brainray.config_text import flatten
from brainray.errors import ConfigError, TrackingError
from brainray.orchestration.lock import is_held
from brainray.orchestration.paths import resolve_tracking_uri
from brainray.orchestration.provenance import about_software
from brainray.orchestration.run import Run
from brainray.redaction import HIDDEN
from brainray.storage import Folder
from brainray.tracking import (
    Tracker,
    artifact_location,
    default_uri,
    is_lost_database,
    is_server,
)

_TAGGED = (
    "code_hash",
    "git_revision",
    "ray_job_id",
    "ray_submission_id",
    "python",
    "platform",
)
"""Keys of `about_software` that are tags of the same name."""


def how_to_open(uri: str) -> str:
    """The command that shows the runs in a database, or the address of a server."""
    if is_server(uri):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def begin_tracking(config: Config, run: Run, tags: Mapping[str, str] | None = None) -> Tracker:
    """Open the run's MLflow run; an unreachable server is logged and does not stop the work."""
    params = flatten(config.without_secrets()) | {
        f"num_{k}": v for k, v in run.record.num_slices.items()
    }
    del params["name"]  # MLflow has its own; comparisons of runs would show it as a setting
    about = {
        "brainray.data_hash": run.record.data_hash,
        "brainray.run_folder": str(run.folder),
    }
    made_by = run.last_submission() or {}  # this software is not known to have made it
    return open_tracking(config, run.folder, params, about | dict(tags or {}), made_by=made_by)


def open_tracking(
    config: Config,
    folder: Folder,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    *,
    made_by: Mapping[str, Any] | None = None,
) -> Tracker:
    """Open an MLflow run named like the folder, which records it and keeps what cannot be sent.

    ``made_by`` is the `about_software` of what made the folder; by default, of this process.
    """
    storage = Folder(config.storage)
    uri = _requested_uri(config) or default_uri(storage)
    if HIDDEN in uri:
        raise ConfigError(
            f"the saved tracking.uri has no password ({uri}): set it again with --set "
            f"tracking.uri=... or {URI_VARIABLE}"
        )
    artifacts = artifact_location(uri, storage)
    tracker = Tracker(folder, uri, config.tracking.experiment, artifacts)
    software = _software_tags(about_software() if made_by is None else made_by)
    tracker.begin(folder.name, params, software | dict(tags))
    return tracker


def _requested_uri(config: Config) -> str | None:
    from_environment = os.environ.get(URI_VARIABLE)
    if from_environment:
        return resolve_tracking_uri(URI_VARIABLE, from_environment)
    return config.tracking.uri


def publish(config: Config, run: Run) -> Tracker:
    """Send a run's folder to MLflow: what training could not send, or a run trained elsewhere.

    It is sent to the URI used in training, unless another one is given.

    Raises:
        TrackingError: the server still cannot be used.
        ConfigError: its password must be given again.
    """
    tracker = begin_tracking(config_to_track(config, run), run)
    send_run(run, tracker)
    if not run.is_complete and not is_held(Folder(config.storage), layout.RUNS, run.record.name):
        # It has ended; if its job could not record how, that is unknown.
        tracker.finish("KILLED", unless_ended=True)
    if tracker.problem is not None:
        raise TrackingError(tracker.problem)
    return tracker


def config_to_track(config: Config, run: Run) -> Config:
    """The run's saved config, with the storage and tracking settings given now."""
    saved = run.saved_config()
    requested = config.tracking.model_dump(exclude_unset=True)
    previous_uri = _previous_uri(run)
    tracking = saved.tracking.model_copy(
        update=({} if previous_uri is None else {"uri": previous_uri}) | requested
    )
    return saved.model_copy(update={"tracking": tracking, "storage": config.storage})


def _previous_uri(run: Run) -> str | None:
    """The URI used by training, which may have come from an environment variable; None if it is a
    database that no longer exists, for example because storage has moved.
    """
    if not run.folder.exists(layout.TRACKING):
        return None
    uri = str(run.folder.read_json(layout.TRACKING)["uri"])
    return None if is_lost_database(uri) else uri


def _software_tags(made_by: Mapping[str, Any]) -> dict[str, str]:
    """An `about_software`, as far as it is known, as MLflow tags."""
    known = {"version": made_by.get("brainray")} | {name: made_by.get(name) for name in _TAGGED}
    known |= made_by.get("packages", {})
    return {f"brainray.{name}": value for name, value in known.items() if value}


def send_run(run: Run, tracker: Tracker) -> None:
    """Send epochs, summary, figures and config, as far as the run's folder contains them."""
    tracker.log_epochs(run.folder.read_json_lines(layout.METRICS))
    # Not seen.parquet: its fingerprints are gigabytes for a large store.
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
