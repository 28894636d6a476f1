"""Choose which of a run's unlabelled slices to label next."""

import sys

from brainray import layout
from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.labels import choose_next_labels

    chosen = choose_next_labels(config, log)
    log(f"{chosen.table.num_rows} slices to label: {chosen.folder}/{layout.NEXT_LABELS}")
    return JobResult(str(chosen.folder), metrics=chosen.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "label",
            """
            Rank the unlabelled training slices of a run by what a label would teach: those that
            the head is least sure of, in turns of the clusters, one of each group of copies and
            of each subject first. Writes labels/next.csv into the run's folder,
            whose column `label` is for you to fill in.

            Example: python jobs/label.py --set run=nickparvar label.num_slices=200
            """,
            work,
            keys=["run", "epoch", "storage", "label", "train.device", "train.precision"],
        )
    )
