"""Which runs training resumes."""

from pathlib import Path

import pytest
import yaml

from brainray import layout
from brainray.config import PreprocessConfig
from brainray.errors import ConfigError
from brainray.orchestration.run import RunRecord, run_to_resume
from brainray.storage import Folder
from tests.conftest import tiny_config


def test_a_run_of_an_earlier_version_is_resumed_if_todays_settings_are_the_same(
    tmp_path: Path,
) -> None:
    given = ["name=earlier", "train.weight_decay=0.5"]
    config = tiny_config(tmp_path, *given)
    settings = config.model_dump(mode="json")
    settings["train"]["labelled_sampling"] = "subject"  # which no longer exists
    del settings["train"]["accumulation_steps"]  # which did not exist yet
    settings["train"]["cache_gib"] = 4.0  # which may change
    record = RunRecord(
        format=layout.RUN_FORMAT,
        name="earlier",
        dataset="mri",
        data_hash="abc",
        classes=["glioma", "notumor"],
        preprocess=PreprocessConfig(),
        versions={"decode_version": 1},
        subject_salt="0123",
        num_slices={"labelled": 3},
    )
    folder = Folder(tmp_path) / layout.RUNS / "earlier"
    record.write(folder)
    folder.write_bytes(layout.CONFIG, yaml.safe_dump(settings).encode())
    run = run_to_resume(config)
    assert run is not None
    assert run.record == record
    for other in ("train.weight_decay=0.4", "train.accumulation_steps=2"):
        with pytest.raises(ConfigError, match=rf"settings \({other.partition('=')[0]}: "):
            run_to_resume(tiny_config(tmp_path, *given, other))
