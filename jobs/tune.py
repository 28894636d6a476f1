"""Search for the settings with the best metric on the validation slices."""

import sys

from brainray.config import TRAINING_SECTIONS, Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def check(config: Config) -> None:
    from brainray.orchestration.store import store_to_train_on

    store_to_train_on(config)
    from brainray.orchestration.sweep.trials import check_space  # imports Ray, which takes seconds

    check_space(config)


def work(config: Config) -> JobResult:
    from brainray.orchestration.publish import how_to_open
    from brainray.orchestration.sweep.driver import sweep

    finished = sweep(config)
    log(finished.table)
    log(f"best settings: {finished.folder}/best.yaml")
    log(f"figures: {finished.folder}/figures")
    log(f"compare trials: {how_to_open(finished.tracking_uri)}")
    return JobResult(str(finished.folder), finished.mlflow_run_id, finished.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "tune",
            """
            Train many trials on the image store DATASET, each with settings from tune.space, and
            keep the best by a validation metric. The same name resumes an interrupted sweep
            without repeating finished trials.

            Example: python jobs/tune.py --config configs/sweep.yaml --set dataset=nickparvar
            """,
            work,
            keys=[
                "name",
                "dataset",
                "storage",
                "seed",
                "classes",
                "preprocess",
                "tune",
                "registry",
                *(section for section in TRAINING_SECTIONS if section != "tracking"),
                "tracking.uri",  # the experiment is the sweep's
            ],
            needs=("name", "dataset"),
            check=check,
        )
    )
