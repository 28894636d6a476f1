"""Preprocess slices to an image store: decode, check, strip, resize, hash, group, split."""

import sys

from brainray import layout
from brainray.config import Config
from brainray.orchestration.job import STORE_KEYS, JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.preprocessing.driver import preprocess

    store = preprocess(config)
    counts = {
        f"num_slices/{split}/{label or 'unlabelled'}": float(count)
        for split, by_class in store.manifest.num_slices.items()
        for label, count in by_class.items()
    }
    leakage = store.folder.read_json(layout.LEAKAGE)
    counts |= {f"num_test/{subset}": float(n) for subset, n in leakage["num_test"].items()}
    counts["num_files_decoded"] = float(store.manifest.num_files_decoded)
    counts["num_rejected"] = float(store.manifest.num_rejected)
    counts["num_removed_copies"] = float(store.manifest.num_removed_copies)
    return JobResult(out=str(store.folder), metrics=counts)


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
