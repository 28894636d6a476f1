"""Train the encoder and its clusters on an image store."""

import sys

from brainray.config import Config
from brainray.orchestration.driver import train
from brainray.orchestration.job import JobResult, log, run_job
from brainray.report.table import results_table


def work(config: Config) -> JobResult:
    trained = train(config, log)
    log(results_table(trained.metrics, trained.run.classes))
    log(f"figures: {trained.run.folder}/figures")
    log(f"compare runs: mlflow ui --backend-store-uri {trained.tracking_uri}")
    return JobResult(str(trained.run.folder), trained.mlflow_run_id, trained.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "train",
            """
            Train on the image store DATASET with DDP, re-clustering every epoch. The same name
            resumes the run after an interruption; objective.name=supervised is the control.

            Example: python jobs/train.py --config configs/nickparvar.yaml
                     --set name=first dataset=mri
            """,
            work,
            keys=[
                "name",
                "dataset",
                "storage",
                "seed",
                "split",
                "encoder",
                "augment",
                "objective",
                "clustering",
                "train",
                "evaluation",
                "tracking",
            ],
        )
    )
