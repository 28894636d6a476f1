from pathlib import Path

import pytest

from brainray.benchmarks import next_labels
from brainray.benchmarks.result import CaseOptions
from brainray.config_text import load_config
from brainray.errors import DataError
from brainray.mri.phantom import write_phantoms


def test_a_source_without_test_slices_is_refused(tmp_path: Path) -> None:
    write_phantoms(tmp_path, num_training_per_class=1, num_testing_per_class=1, seed=0, size=32)
    options = CaseOptions(True, tmp_path, 0, tmp_path, load_config(None, []))

    def simulation(source: Path) -> next_labels._Simulation:
        return next_labels._Simulation(tmp_path, source, next_labels._QUICK, options, 0)

    assert len(simulation(tmp_path).training) == 4
    with pytest.raises(DataError, match="no test slices: give a folder with Training/ and Testing"):
        simulation(tmp_path / "Training")
