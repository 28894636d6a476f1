"""What software made something; for a run, also everything else that is needed to reproduce it."""

import os
import platform
from importlib import metadata
from typing import Any

import ray
import torch

import brainray
from brainray import layout
from brainray.config import Config
from brainray.orchestration.code_version import code_hash, git_revision
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


def about_software() -> dict[str, Any]:
    """Command, without secrets, and versions of this process, and the ids of its Ray job."""
    return {
        "command": command_line(),
        "brainray": brainray.__version__,
        "code_hash": code_hash(),
        "git_revision": git_revision(),
        "ray_job_id": ray.get_runtime_context().get_job_id() if ray.is_initialized() else "",
        "ray_submission_id": os.environ.get("RAY_JOB_SUBMISSION_ID", ""),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES}
        | {"torch": str(torch.__version__)},  # with its build, such as +cu130
    }


def record_submission(config: Config, run: Run, workers: WorkerResources) -> None:
    """Append a line for this submission, without secrets, to the run's ``provenance.jsonl``."""
    record = about_software() | {
        "config": config.without_secrets().model_dump(mode="json"),
        "seeds": {"seed": config.seed, "split.seed": config.split.seed},
        "dataset": run.record.dataset,
        "data_hash": run.record.data_hash,
        "num_workers": workers.num_workers,
        "cpus_per_worker": workers.cpus_per_worker,
        "device": "cuda" if workers.use_gpu else "cpu",
        "first_epoch": len(run.folder.read_json_lines(layout.METRICS)) + 1,
    }
    earlier = run.folder.read_json_lines(layout.PROVENANCE)
    run.folder.write_json_lines(layout.PROVENANCE, [*earlier, record])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # may be installed under another name, such as OpenCV
        return ""
