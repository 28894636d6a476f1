"""Predict class, cluster and outlier score of every slice in a folder."""

import sys

from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.prediction.predict import predict

    prediction = predict(config)
    counts = prediction.metrics
    log(
        f"{counts['num_predicted']:,.0f} slices predicted, {counts['num_rejected']:,.0f} rejected: "
        f"{prediction.out}/part-*.parquet"
    )
    return prediction


if __name__ == "__main__":
    sys.exit(
        run_job(
            "predict",
            """
            Predict every slice below SOURCE (images, DICOM, NIfTI) with the chosen epoch of a run:
            class, confidence, cluster, outlier score and the nearest training slices, one row per
            slice, as Parquet under storage/predictions/NAME, and in short as _predictions.csv.
            The same name resumes an interrupted prediction.

            Example: python jobs/predict.py --set run=nickparvar source=/data/new-scans
            """,
            work,
            keys=[
                "name",
                "run",
                "epoch",
                "checkpoint",
                "source",
                "storage",
                "train.device",
                "train.precision",
                "train.wait_for_nodes",
            ],
            needs=("run", "source"),
        )
    )
