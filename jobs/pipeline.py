"""Preprocess, train, evaluate and report in one submission."""

import sys

from brainray.config import TRAINING_SECTIONS, Config
from brainray.errors import ConfigError
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def check(config: Config) -> None:
    from brainray.orchestration.run import check_new_or_same
    from brainray.orchestration.store import check_sides

    if config.evaluation.num_label_draws > 1:
        raise ConfigError(
            "evaluation.num_label_draws: the pipeline trains a single run; leave it out, then use "
            "jobs/train.py on the pipeline's store for several label draws"
        )
    check_sides(config)
    check_new_or_same(_on_own_store(config))


def _on_own_store(config: Config) -> Config:
    """The store is named like the run, unless the run was given another name later."""
    return config.model_copy(update={"dataset": config.dataset or config.name})


def work(config: Config) -> JobResult:
    from brainray.orchestration.prediction.evaluation import check_evaluation_name, evaluate
    from brainray.orchestration.preprocessing.driver import preprocess
    from brainray.orchestration.resources import alive_nodes, plan_workers
    from brainray.orchestration.run import run_to_resume
    from brainray.orchestration.training.driver import log_where, train
    from brainray.report.results import results_markdown

    config = _on_own_store(config)
    check_evaluation_name(config)
    existing = run_to_resume(config)
    if existing is None or not existing.is_complete:
        plan_workers(config.train, alive_nodes())  # refuse before preprocessing if it cannot train
    needed = None if existing is None else existing.record.data_hash
    store = preprocess(config.model_copy(update={"name": config.dataset}), data_hash=needed)
    trained = train(config)
    # Where they are now: files may have been renamed since the run began.
    test_paths = store.test_paths()
    if test_paths:
        # The raw files again, through the prediction code: it must give the same results.
        again = config.model_copy(update={"run": config.name, "epoch": None, "checkpoint": None})
        evaluation = evaluate(again, only_paths=test_paths)
        log(results_markdown(evaluation.metrics, evaluation.classes))
    log_where(trained)
    return JobResult(str(trained.run.folder), trained.mlflow_run_id, trained.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "pipeline",
            """
            Turn a folder of slices into a store, train on it, evaluate the chosen epoch on the
            raw test files, and write figures and MLflow records. Stages that are already done
            under the same name are reused.

            Example: python jobs/pipeline.py --config configs/nickparvar.yaml
                     --set source=/data/brain-tumor-mri
            """,
            work,
            keys=[
                "name",
                "dataset",
                "source",
                "labels",
                "storage",
                "seed",
                "classes",
                "preprocess",
                *TRAINING_SECTIONS,
            ],
            needs=("name", "source"),
            check=check,
        )
    )
