"""Send a run's folder to MLflow: whatever training could not send while the server was down."""

import sys

from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.publish import how_to_open, publish
    from brainray.orchestration.run import open_run
    from brainray.storage import Folder

    run = open_run(Folder(config.storage), config.given("run"))
    tracker = publish(config, run)
    log(f"run {run.folder}: MLflow has everything")
    log(f"compare runs: {how_to_open(tracker.uri)}")
    return JobResult(str(run.folder), tracker.mlflow_run_id)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "track",
            """
            Send a run's epochs, figures and config to MLflow: to the tracking server of its
            training, or to tracking.uri. Settings of tracking that are not given are those of the
            run, whatever default is shown below. No metric is sent twice; files are replaced.

            Example: python jobs/track.py --set run=first
            """,
            work,
            keys=["run", "storage", "tracking"],
            needs=("run",),
            uses_ray=False,
        )
    )
