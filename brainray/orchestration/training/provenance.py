"""Provenance of a run: everything needed to reproduce it, for each submission that trained it."""

import platform
from importlib import metadata
from typing import Any

import torch

from brainray import layout
from brainray.config import Config
from brainray.orchestration.code_version import about_code
from brainray.orchestration.resources import WorkerResources
from brainray.orchestration.run import Run
from brainray.redaction import command_line

PACKAGES = (
    "captum",
    "faiss-cpu",
    "imagecodecs",
    "mlflow",
    "nibabel",
    "numba",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pyarrow",
    "pydantic",
    "pydicom",
    "ray",
    "scikit-learn",
    "scipy",
    "torch",
    "torchvision",
)
"""Packages whose version may change a result."""


def record_submission(config: Config, run: Run, workers: WorkerResources) -> None:
    """Append a line for this submission to the run's ``provenance.jsonl``."""
    earlier = run.folder.read_json_lines(layout.PROVENANCE)
    record = provenance(config, run, workers)
    record["first_epoch"] = len(run.folder.read_json_lines(layout.METRICS)) + 1
    run.folder.write_json_lines(layout.PROVENANCE, [*earlier, record])


def provenance(config: Config, run: Run, workers: WorkerResources) -> dict[str, Any]:
    """Versions, seeds, data hash, command and workers, without secrets."""
    return {
        "command": command_line(),
        "config": config.without_secrets().model_dump(mode="json"),
        "seeds": {"seed": config.seed, "split.seed": config.split.seed},
        "dataset": run.record.dataset,
        "data_hash": run.record.data_hash,
        **about_code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES}
        | {"torch": str(torch.__version__)},  # with its build, such as +cu130
        "num_workers": workers.num_workers,
        "cpus_per_worker": workers.cpus_per_worker,
        "device": "cuda" if workers.use_gpu else "cpu",
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # may be installed under another name, such as OpenCV
        return ""
