import subprocess
from pathlib import Path

import pytest

import brainray
from brainray.orchestration.code_version import git_revision


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("place", "is_own"), [("", True), (".venv/lib/site-packages", False)])
def test_the_commit_is_that_of_the_checkout_not_of_whatever_brainray_is_installed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, is_own: bool
) -> None:
    monkeypatch.delenv("BRAINRAY_GIT_REVISION", raising=False)
    package = tmp_path / place / "brainray"
    package.mkdir(parents=True)
    monkeypatch.setattr(brainray, "__file__", str(package / "__init__.py"))
    assert git_revision() == ""
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    assert git_revision() == (_git(tmp_path, "rev-parse", "HEAD") if is_own else "")
