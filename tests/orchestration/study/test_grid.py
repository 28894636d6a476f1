"""Which clusterings a study makes, and where they are kept."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from brainray.config import Config
from brainray.errors import ConfigError
from brainray.orchestration.study import grid
from brainray.orchestration.study.grid import (
    FITTED_SUBSET,
    Cell,
    Grid,
    Outcome,
    Reduced,
    Slices,
    _reduce,
    check_sizes,
    main_cells,
    sensitivity_cells,
)
from brainray.storage import Folder
from tests.conftest import tiny_config

CELL = Cell("mri", "pixels", 0, "kmeans", 2, 4)
FEATURES = "study.features={first: {encoder: pixels}, last: {encoder: pixels}}"


def study_config(folder: Path, *overrides: str) -> Config:
    settings = ["study.pca_dims=[4, 8]", "study.seeds=[0, 1]", "study.min_samples=3"]
    settings += ["study.candidate_num_clusters=[2, 6]", "study.sensitivity.num_clusters=[3]"]
    return tiny_config(folder, FEATURES, *settings, *overrides)


def test_cells_with_other_settings_have_files_of_their_own() -> None:
    others = [
        replace(CELL, dataset="ct"),
        replace(CELL, feature="resnet18"),
        replace(CELL, seed=1),
        replace(CELL, clusterer="gmm"),
        replace(CELL, pca_dim=3),
        replace(CELL, num_clusters=5),
        replace(CELL, eps_factor=1.5),
        replace(CELL, linkage="ward"),
    ]
    assert len({cell.file for cell in [CELL, *others]}) == 1 + len(others)


def test_features_of_one_direction_are_collapsed_whatever_their_lengths() -> None:
    names = [f"{number:032x}" for number in range(6)]
    table = pa.table({"sample_id": names, "split": ["train"] * 6, "frame": [""] * 6})
    slices = Slices(table, np.zeros(6, np.int64), {FITTED_SUBSET: np.ones(6, dtype=bool)})
    lengths, direction = np.linspace(1, 3, 6, dtype=np.float32), np.array([0.6, 0.8], np.float32)

    def reduced(features: NDArray[np.float32], *, is_encoded: bool) -> Reduced:
        store = SimpleNamespace(folder="features", read=lambda: (table, features))
        found: Reduced = cast(Any, _reduce)._function(store, slices, 2, is_encoded)
        return found

    collapsed = lengths[:, None] * direction
    assert "all 6 slices have the same features" in str(reduced(collapsed, is_encoded=True).problem)
    assert reduced(collapsed, is_encoded=False).problem is None  # the brightness of pixels counts
    spread = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    assert reduced(spread, is_encoded=True).problem is None


def test_one_setting_is_varied_at_a_time(tmp_path: Path) -> None:
    settings = ["study.clusterers=[kmeans, dbscan, agglomerative]", "study.seeds=[0]"]
    settings += ["study.sensitivity.eps_factors=[0.5]", "study.sensitivity.linkages=[complete]"]
    base = replace(CELL, feature="last", pca_dim=4)
    expected = [
        replace(base, num_clusters=3),
        replace(base, clusterer="dbscan", eps_factor=0.5),
        replace(base, clusterer="agglomerative", linkage="complete"),
    ]
    config = study_config(tmp_path, *settings)
    assert sensitivity_cells(config, "mri") == expected
    assert main_cells(config, "mri")[0] == replace(base, feature="first")
    assert len(main_cells(config, "mri")) == 2 * 2 * 3
    first = study_config(tmp_path, *settings, "study.sensitivity.feature=first")
    assert {cell.feature for cell in sensitivity_cells(first, "mri")} == {"first"}
    alone = study_config(tmp_path, *settings, "study.clusterers=[kmeans]")
    assert sensitivity_cells(alone, "mri") == expected[:1]


def test_the_time_left_is_that_of_the_cells_that_were_not_finished_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [replace(CELL, seed=seed) for seed in range(9)]
    finished = {cell: Outcome(cell, {}) for cell in cells[:5]}
    fake_ray = SimpleNamespace(
        put=lambda slices: slices,
        cluster_resources=lambda: {"CPU": 2},
        wait=lambda tasks, num_returns: (tasks[:num_returns], tasks[num_returns:]),
        get=lambda cell: Outcome(cell, {}),
    )
    monkeypatch.setattr(grid, "ray", fake_ray)
    monkeypatch.setattr(grid, "_run_cell", SimpleNamespace(remote=lambda cell, *_: cell))
    monkeypatch.setattr(Grid, "_finished", lambda _, cell: finished.get(cell))
    monkeypatch.setattr(Grid, "key", lambda *_: "")
    monkeypatch.setattr(Grid, "reduced", lambda *_: None)
    clock = SimpleNamespace(monotonic=itertools.count(0.0, 6.0).__next__)  # a cell takes 6 s
    monkeypatch.setattr("brainray.log.time", clock)
    slices: Any = SimpleNamespace(key="")
    outcomes = Grid(study_config(tmp_path), Folder(tmp_path), {}, {"mri": slices}).run(cells)
    assert [outcome.cell for outcome in outcomes] == cells
    assert capsys.readouterr().out.splitlines() == [
        "grid: 9 cells, 5 of them already finished",
        "finished 2 of 4 cells, 12 s left",
        "finished 4 of 4 cells, 0 s left",
    ]


@pytest.mark.parametrize(
    ("overrides", "num_fitted", "key"),
    [
        (["study.pca_dims=[2]", "clustering.num_clusters=7"], 7, "clustering.num_clusters"),
        (["study.pca_dims=[2]"], 6, "study.candidate_num_clusters"),
        (["study.pca_dims=[2]", "study.min_samples=10"], 11, "study.min_samples"),
        (["study.pca_dims=[20, 4]"], 20, "study.pca_dims"),
        (
            [
                "study.pca_dims=[2]",
                "study.features.last={encoder: resnet18, pretext: contrastive, lambda_cluster: 1}",
                "clustering.pca_dim=30",
            ],
            30,
            "clustering.pca_dim",
        ),
    ],
)
def test_a_grid_needs_as_many_slices_as_its_largest_setting(
    tmp_path: Path, overrides: list[str], num_fitted: int, key: str
) -> None:
    config = study_config(tmp_path, *overrides)
    check_sizes(config, "mri", num_fitted, {})
    with pytest.raises(ConfigError, match=f"^{key} needs {num_fitted} .* has {num_fitted - 1} "):
        check_sizes(config, "mri", num_fitted - 1, {})


def test_features_are_neither_too_few_nor_too_many(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    check_sizes(config, "mri", 100, {"first": 8, "last": 4096})
    with pytest.raises(ConfigError, match="8 components, but mri has 7 features of 'first'"):
        check_sizes(config, "mri", 100, {"first": 7})
    with pytest.raises(ConfigError, match=r"study\.features\.last has 4,097 features"):
        check_sizes(config, "mri", 100, {"first": 8, "last": 4097})
