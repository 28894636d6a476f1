"""Train the encoder and its clusters on an image store."""

import sys

from brainray.config import TRAINING_SECTIONS, Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def check(config: Config) -> None:
    from brainray.orchestration.run import check_new_or_same
    from brainray.orchestration.store import store_to_train_on

    config, _ = store_to_train_on(config)
    # Several label draws have a run each, which may be complete.
    if config.evaluation.num_label_draws == 1:
        check_new_or_same(config)


def work(config: Config) -> JobResult:
    if config.evaluation.num_label_draws > 1:
        return work_on_draws(config)
    from brainray.orchestration.training.driver import log_where, train
    from brainray.report.results import results_markdown

    trained = train(config)
    log(results_markdown(trained.metrics, trained.run.record.classes))
    log_where(trained)
    return JobResult(str(trained.run.folder), trained.mlflow_run_id, trained.metrics)


def work_on_draws(config: Config) -> JobResult:
    from brainray.orchestration.publish import how_to_open
    from brainray.orchestration.training.draws import train_draws
    from brainray.report.draws_table import draws_table

    drawn = train_draws(config)
    log(draws_table(drawn.metrics))
    log(f"table and metrics: {drawn.folder}")
    log(f"compare runs: {how_to_open(drawn.runs[0].tracking_uri)}")
    return JobResult(str(drawn.folder), metrics=drawn.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "train",
            """
            Train on the image store DATASET with DDP, re-clustering every epoch. The same name
            resumes an interrupted run; objective.name=supervised is the control.

            Example: python jobs/train.py --config configs/nickparvar.yaml
                     --set name=first dataset=mri
            """,
            work,
            keys=[
                "name",
                "dataset",
                "storage",
                "seed",
                "classes",
                "preprocess",
                *TRAINING_SECTIONS,
            ],
            needs=("name", "dataset"),
            check=check,
        )
    )
