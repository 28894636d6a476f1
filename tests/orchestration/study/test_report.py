"""What a study's report makes of its outcomes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brainray.clustering.stability import Recommendation
from brainray.engine.shard import sample_keys
from brainray.orchestration.study.figures import DrawnSet, _is_drawn, _shown_cells
from brainray.orchestration.study.grid import FITTED_SUBSET, Cell, Outcome, Slices
from brainray.orchestration.study.report import _advice, _agreement, _panel
from brainray.schema import UNLABELLED
from brainray.storage import Folder


def test_a_panel_is_in_the_order_of_its_numbers() -> None:
    rows = [
        {"eps_factor": value, "nmi": nmi, "noise_share": 0.25}
        for value, nmi in ((10.0, 0.5), (2.0, 0.2), (2.0, 0.4), (3.0, None))
    ]
    panel = _panel("eps", rows, "eps_factor")
    assert panel.values == ["2.0", "3.0", "10.0"]
    assert panel.figures["nmi"] == [pytest.approx((0.3, 0.02**0.5)), None, (0.5, 0.0)]
    assert panel.figures["noise share"] == [(0.25, 0.0)] * 3
    assert panel.figures["ari"] == [None] * 3
    names = _panel("features", [{"features": name, "nmi": 0.5} for name in "ba"], "features")
    assert (names.values, list(names.figures)) == (["b", "a"], ["nmi", "ari", "silhouette"])


def test_rounds_are_scored_on_the_fitted_slices_with_a_label() -> None:
    names = [32 * str(digit) for digit in (5, 3, 4, 7, 1, 6)]
    labels = np.array([0, 1, UNLABELLED, 0, 1, 1])
    fitted = np.array([True, True, True, True, True, False])
    slices = Slices(pa.table({"sample_id": names}), labels, {FITTED_SUBSET: fitted})
    keys = sample_keys(names[:5])
    order = np.argsort(keys)
    clusters = pa.table({"key": keys[order], "cluster": np.array([2, 3, 3, 2, 3])[order]})
    assert _agreement(slices, clusters) == {"nmi": pytest.approx(1.0)}
    unlabelled = Slices(slices.table, np.full(6, UNLABELLED), slices.subsets)
    assert _agreement(unlabelled, clusters) == {}


def test_figures_that_someone_has_deleted_are_drawn_again(tmp_path: Path) -> None:
    folder, figure = Folder(tmp_path), "figures/mri/a-tsne.png"
    assert not _is_drawn(folder, "drawn/mri/a.json", "key")
    folder.write_bytes(figure, b"")
    folder.write_json("drawn/mri/a.json", {"key": "key", "figures": ["mri/a-tsne.png"]})
    assert _is_drawn(folder, "drawn/mri/a.json", "key")
    assert not _is_drawn(folder, "drawn/mri/a.json", "of other clusters")
    folder.delete_file(figure)
    assert not _is_drawn(folder, "drawn/mri/a.json", "key")


def test_every_feature_set_has_its_advice() -> None:
    drawn = {
        ("mri", name): DrawnSet([], [], Recommendation(number, [f"because of {name}"]), None)
        for name, number in (("a", 4), ("b", None))
    }
    assert _advice(drawn).splitlines()[2:] == [
        "- mri, a: K = 4",
        "  - because of a",
        "- mri, b: no recommendation",
        "  - because of b",
    ]


def test_the_mixture_of_the_first_seed_is_drawn_or_what_else_there_is() -> None:
    def outcome(feature: str, clusterer: Any, seed: int, problem: str | None = None) -> Outcome:
        return Outcome(Cell("mri", feature, seed, clusterer, 4, 4), {}, problem=problem)

    main = [
        outcome("a", "kmeans", 0),
        outcome("a", "gmm", 0),
        outcome("a", "gmm", 1),
        outcome("b", "dbscan", 0, "too few"),
        outcome("b", "kmeans", 0),
        outcome("b", "gmm", 0, "collapsed"),
        outcome("c", "gmm", 0, "no features"),
    ]
    results: Any = SimpleNamespace(main=main)
    assert _shown_cells(results) == [main[1].cell, main[4].cell]
