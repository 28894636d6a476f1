"""Version of the running code."""

import hashlib
import os
import subprocess
from pathlib import Path

import brainray


def code_hash() -> str:
    """Hash of the package's sources (12 hex digits); works without a git checkout."""
    root = Path(brainray.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def git_revision() -> str:
    """``BRAINRAY_GIT_REVISION`` if it is set, else the commit of the checkout, else empty."""
    given = os.environ.get("BRAINRAY_GIT_REVISION")
    if given:
        return given
    package = Path(brainray.__file__).parent
    command = ["git", "-C", str(package), "rev-parse", "--show-prefix", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    prefix, _, commit = found.stdout.partition("\n")
    # Else it is the commit of a repository in which brainray is installed.
    return commit.strip() if prefix == f"{package.name}/" else ""
