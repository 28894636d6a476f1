"""Export a run's model as safetensors, ONNX and a servable MLflow model."""

import sys

from brainray.config import Config
from brainray.log import log
from brainray.orchestration.job import JobResult, run_job


def work(config: Config) -> JobResult:
    from brainray.orchestration.prediction.export import export

    exported = export(config)
    log(f"files and model card: {exported.out}")
    return exported


if __name__ == "__main__":
    sys.exit(
        run_job(
            "export",
            """
            Write the chosen epoch of a complete run to storage/exports/NAME: all weights as
            safetensors with a model card, the network and its mixture as ONNX, and an MLflow model
            that takes file paths or image bytes and returns the columns of jobs/predict.py, with
            an encoder in float32.
            Settings of tracking that are not given are those of the run, whatever default is shown
            below.

            Example: python jobs/export.py --set run=nickparvar registry.name=mri
            """,
            work,
            keys=["name", "run", "epoch", "checkpoint", "storage", "registry", "tracking"],
            needs=("run",),
            uses_ray=False,
        )
    )
