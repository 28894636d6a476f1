"""Where the salt of subject hashes comes from."""

from pathlib import Path

import pytest

from brainray.errors import ConfigError, DataError
from brainray.orchestration.preprocessing.subject_salt import subject_salt
from brainray.storage import Folder


def test_the_salt_stays_and_a_short_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRAINRAY_SALT", raising=False)
    made = subject_salt(Folder(tmp_path))
    assert len(made) == 64
    assert subject_salt(Folder(tmp_path)) == made
    monkeypatch.setenv("BRAINRAY_SALT", "short")
    with pytest.raises(ConfigError, match="16 characters"):
        subject_salt(Folder(tmp_path))
    monkeypatch.setenv("BRAINRAY_SALT", "sixteen letters!")
    assert subject_salt(Folder(tmp_path)) == b"sixteen letters!"
    monkeypatch.delenv("BRAINRAY_SALT")
    (tmp_path / ".subject-salt").write_bytes(made[:15])
    with pytest.raises(DataError, match="is incomplete: restore it"):
        subject_salt(Folder(tmp_path))
