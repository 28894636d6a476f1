"""Choose which of a run's unlabelled slices to label next."""

import sys

from brainray import layout
from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.prediction.labels import choose_next_labels

    chosen = choose_next_labels(config)
    log(f"{chosen.table.num_rows} slices to label: {chosen.folder}/{layout.NEXT_LABELS}")
    return JobResult(str(chosen.folder), metrics=chosen.metrics)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "label",
            """
            Rank the unlabelled training slices of a run by how much their labels would help: the
            least certain predictions of the head first, alternating between clusters, with one
            slice of each group of copies and of each subject before any second one. Writes
            labels/next.csv, and the same as next.parquet, to the run's folder; fill in the column
            `label` of one of them.

            Example: python jobs/label.py --set run=nickparvar label.num_slices=200
            """,
            work,
            keys=[
                "run",
                "epoch",
                "storage",
                "label",
                "train.device",
                "train.precision",
                "train.wait_for_nodes",
            ],
            needs=("run",),
        )
    )
