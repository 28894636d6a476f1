"""Which code runs here, and for which job."""

import hashlib
import os
import subprocess
from pathlib import Path

import ray

import brainray


def about_code() -> dict[str, str]:
    """What runs here: versions, and the job that Ray knows."""
    return {
        "brainray": brainray.__version__,
        "code_hash": code_hash(),
        "git_revision": git_revision(),
        "ray_job_id": ray.get_runtime_context().get_job_id() if ray.is_initialized() else "",
        "ray_submission_id": os.environ.get("RAY_JOB_SUBMISSION_ID", ""),
    }


def code_hash() -> str:
    """Twelve hex digits over the package's sources: known even where no git is shipped."""
    root = Path(brainray.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def git_revision() -> str:
    """The checkout's commit, ``BRAINRAY_GIT_REVISION`` where it is not shipped, or empty."""
    given = os.environ.get("BRAINRAY_GIT_REVISION")
    if given:
        return given
    command = ["git", "-C", str(Path(brainray.__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
