"""Rewrite the report of a complete run, compared with a control or runs of other seeds."""

import sys

from brainray import layout
from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.run_report import report

    written = report(config)
    log(
        f"report: {written.out}/{layout.REPORT} (send it to MLflow with jobs/track.py "
        f"--set run={config.run})"
    )
    return written


if __name__ == "__main__":
    sys.exit(
        run_job(
            "report",
            """
            Rewrite report.html and the figures of a complete run: compared with the metrics of a
            control, and with runs of other seeds, which show which sub-types are stable.
            jobs/track.py sends them to MLflow. Settings of evaluation that are not given are those
            of the run, whatever default is shown below.

            Examples: python jobs/report.py --set run=strong evaluation.control=strong-control
                      python jobs/report.py --set run=k8 'evaluation.siblings=[k8-seed1,k8-seed2]'
            """,
            work,
            keys=[
                "run",
                "storage",
                "evaluation.control",
                "evaluation.siblings",
                "evaluation.tsne_epochs",
                "evaluation.tsne_max_slices",
                "evaluation.bootstrap_resamples",
            ],
            needs=("run",),
            uses_ray=False,
        )
    )
