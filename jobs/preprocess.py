"""Preprocess slices to an image store: decode, check, strip, resize, hash, group, split."""

import sys

from brainray.config import Config
from brainray.orchestration.job import STORE_KEYS, JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.preprocessing.driver import preprocess
    from brainray.orchestration.store import store_metrics

    store = preprocess(config)
    return JobResult(out=str(store.folder), metrics=store_metrics(store))


if __name__ == "__main__":
    sys.exit(
        run_job(
            "preprocess",
            """
            Turn a folder of brain MRI slices into an image store under storage/datasets/NAME.
            The source contains Training/ and Testing/ class folders, class folders, or bare files;
            or labels=FILE (CSV or Parquet: path, label, optional frame, split, subject) gives the
            classes.

            Example: python jobs/preprocess.py --set name=mri source=/data/brain-tumor-mri
            """,
            work,
            keys=["name", "source", "labels", "storage", *STORE_KEYS],
            needs=("name", "source"),
        )
    )
