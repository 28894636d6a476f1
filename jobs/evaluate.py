"""Evaluate a run on raw class folders that it has not seen."""

import sys

from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.prediction.evaluation import evaluate
    from brainray.report.results import results_markdown

    evaluation = evaluate(config)
    log(results_markdown(evaluation.metrics, evaluation.classes))
    log(f"predictions, figures and report.html: {evaluation.folder}")
    return JobResult(str(evaluation.folder), metrics=evaluation.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "evaluate",
            """
            Predict labelled slices (class folders or a labels table; only the test part, if there
            is one) with a run's chosen epoch, preprocessed with the run's own settings, and score
            them: all, those without a duplicate among the slices that the run saw (clean), and
            those that are likely of no subject that it saw (strict). report.html shows all results.

            Example: python jobs/evaluate.py --set run=first source=/data/other-hospital
            """,
            work,
            keys=[
                "run",
                "epoch",
                "checkpoint",
                "source",
                "labels",
                "classes",
                "name",
                "storage",
                "seed",
                "train.device",
                "train.precision",
                "train.wait_for_nodes",
                "evaluation.bootstrap_resamples",
                "evaluation.tsne_max_slices",
            ],
            needs=("run", "source"),
        )
    )
