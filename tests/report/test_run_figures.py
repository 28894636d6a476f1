"""A folder's figures must follow from its files, and be left out where there are none."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.linalg import orthogonal_procrustes

from brainray.config import EvaluationConfig
from brainray.mri.skull_strip import StrippedSlice
from brainray.report import evaluation_figures, run_figures
from brainray.report.evaluation_figures import draw_evaluation_figures
from brainray.report.figures import Confusion, SlicePair
from brainray.report.maps import SliceMap, run_maps, shown
from brainray.report.run_figures import draw_run_figures
from brainray.report.store_figures import draw_store_figures
from brainray.report.style import new_figure
from brainray.report.tsne import tsne_sequence
from brainray.schema import PREDICTIONS
from brainray.storage import Folder

CLASSES = ["glioma", "notumor"]
CURVES = {"loss", "accuracy", "clustering_health", "timing"}


def _history(*scores: float) -> list[dict[str, float]]:
    return [
        {
            "epoch": float(epoch),
            "train/image_size": 32.0,
            "train/loss/total": 1.0 / epoch,
            "validation/score": score,
            "validation/head/accuracy": score,
            "cluster/effective_rank": 3.0,
            "time/train_s": 2.0,
        }
        for epoch, score in enumerate(scores, start=1)
    ]


def _predictions(num_slices: int, *, seed: int = 0, clean: bool | None = True) -> pa.Table:
    """Half glioma, half no tumour; the head is always right, the clusters never."""
    generator = np.random.default_rng(seed)
    labels = [CLASSES[i % 2] for i in range(num_slices)]
    columns = {
        "sample_id": [f"{i:032x}" for i in range(num_slices)],
        "path": [f"{i}.jpg" for i in range(num_slices)],
        "label": labels,
        "clean": [clean] * num_slices,
        "strict": [clean and number % 2 == 0 for number in range(num_slices)],
        "head": labels,
        "cluster_class": [CLASSES[1 - i % 2] for i in range(num_slices)],
        "cluster": [i % 2 for i in range(num_slices)],
        "embedding": list(generator.normal(size=(num_slices, 6)).astype(np.float32)),
    }
    return pa.table(
        [pa.array(columns.get(f.name, [None] * num_slices), f.type) for f in PREDICTIONS],
        schema=PREDICTIONS,
    )


def _figures(folder: Folder) -> set[str]:
    return {name.removesuffix(".png") for name in (folder / "figures").names()}


def _assert_pictures(folder: Folder) -> None:
    for name in (folder / "figures").names():
        content = folder.read_bytes(f"figures/{name}")
        assert len(content) < 300_000
        with Image.open(BytesIO(content)) as image:
            image.load()
            assert min(image.size) > 200


def test_a_run_gets_all_its_figures(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5, 0.9, 0.7))
    for epoch in (1, 2, 3):
        run.write_table(f"predictions/epoch-{epoch:04d}.parquet", _predictions(12, seed=epoch))
    others = {"confusion_all", "confusion_clean", "tsne"}  # too few are strict for one of theirs
    assert _draw(run, 2, (1, 3, 20)) == CURVES | others
    _assert_pictures(run)


def test_a_run_without_test_slices_gets_its_curves(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5))
    assert _draw(run, 1) == CURVES
    _assert_pictures(run)


def test_maps_need_no_predictions_of_the_chosen_epoch(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5, 0.9))
    run.write_table("predictions/epoch-0001.parquet", _predictions(6))
    assert _draw(run, 2, (1,)) == CURVES | {"tsne"}


def test_the_chosen_epoch_is_mapped_whichever_else_are(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5, 0.6, 0.7))
    run.write_table("predictions/epoch-0002.parquet", _predictions(24))
    for epochs in ((3,), ()):
        assert "tsne" in _draw(run, 2, epochs)


def test_too_few_slices_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_curves(monkeypatch)
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5))
    run.write_table("predictions/epoch-0001.parquet", _predictions(4))
    assert "tsne" not in _draw(run, 1)


def test_confusions_are_those_of_the_chosen_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _skip_curves(monkeypatch)
    drawn = _record_confusions(monkeypatch)
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5, 0.9, 0.9))
    for epoch, num_slices in ((1, 2), (2, 4), (3, 8)):  # 2 and 3 tie
        run.write_table(f"predictions/epoch-{epoch:04d}.parquet", _predictions(num_slices))
    _draw(run, 2, ())
    assert [panel.counts.sum() for panel in drawn] == [4, 4, 4, 4]


def test_the_title_of_a_confusion_matrix_tells_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = _record_confusions(monkeypatch)
    table = _predictions(8, clean=None)
    heads = table["cluster_class"].to_pylist()[:2] + table["head"].to_pylist()[2:]
    column = table.schema.get_field_index("head")
    table = table.set_column(column, "head", pa.array(heads, pa.string()))
    draw_evaluation_figures(Folder(tmp_path), table, CLASSES)
    titles = [panel.title for panel in drawn]
    assert titles == ["head: accuracy 0.750", "clusters: accuracy 0.000"]


def test_slices_without_a_label_are_not_scored_and_subsets_are_drawn_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = _record_confusions(monkeypatch)
    table = pa.concat_tables([_predictions(4), _predictions(6, clean=False)])
    labels = [None, *table["label"].to_pylist()[1:]]
    table = table.set_column(
        table.schema.get_field_index("label"), "label", pa.array(labels, pa.string())
    )
    draw_evaluation_figures(Folder(tmp_path), table, CLASSES)
    assert _figures(Folder(tmp_path)) == {"confusion_all", "confusion_clean"}
    head_all, cluster_all, head_clean, cluster_clean = drawn
    np.testing.assert_array_equal(head_all.counts, [[4, 0], [0, 5]])
    np.testing.assert_array_equal(cluster_all.counts, [[0, 4], [5, 0]])
    np.testing.assert_array_equal(head_clean.counts, [[1, 0], [0, 2]])
    np.testing.assert_array_equal(cluster_clean.counts, [[0, 1], [2, 0]])
    assert head_all.title == "head: accuracy 1.000"
    assert cluster_all.title == "clusters: accuracy 0.000"
    # Figures by class of strict slices are drawn if there are thirty of each.
    for num_slices, is_drawn in ((58, False), (60, True)):
        draw_evaluation_figures(Folder(tmp_path), _predictions(num_slices), CLASSES)
        assert ("confusion_strict" in _figures(Folder(tmp_path))) == is_drawn
    np.testing.assert_array_equal(drawn[-2].counts, [[30, 0], [0, 0]])


def test_clean_is_left_out_where_it_is_unknown_or_empty(tmp_path: Path) -> None:
    draw_evaluation_figures(Folder(tmp_path), _predictions(0), CLASSES)
    assert not _figures(Folder(tmp_path))
    for clean in (None, False):
        draw_evaluation_figures(Folder(tmp_path), _predictions(4, clean=clean), CLASSES)
        assert _figures(Folder(tmp_path)) == {"confusion_all"}


def test_the_same_slices_are_mapped_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[SliceMap] = []

    def record(maps: list[SliceMap], *_: object) -> object:
        drawn.extend(maps)
        return new_figure(2, 2)

    _skip_curves(monkeypatch)
    monkeypatch.setattr(run_figures, "embedding_maps", record)
    run = Folder(tmp_path)
    run.write_json_lines("metrics.jsonl", _history(0.5, 0.6))
    table = _predictions(20)
    run.write_table("predictions/epoch-0001.parquet", table)
    run.write_table("predictions/epoch-0002.parquet", table.take(list(range(19, -1, -1))))
    evaluation = EvaluationConfig(tsne_epochs=(2, 1), tsne_max_slices=8)
    draw_run_figures(run, CLASSES, 2, run_maps(run, evaluation, 2))
    assert [each.epoch for each in drawn] == [1, 2]
    assert [each.points.shape for each in drawn] == [(8, 2), (8, 2)]
    names, labels = (drawn[0].rows[column].to_pylist() for column in ("sample_id", "label"))
    for each in drawn:
        assert each.rows["sample_id"].to_pylist() == names
        assert [CLASSES[cluster] for cluster in each.rows["cluster"].to_pylist()] == labels


def test_slices_shown_are_from_all_over_the_table_and_copies_are_told_apart(
    tmp_path: Path,
) -> None:
    table = _predictions(10)
    copies = table.set_column(0, "sample_id", pa.array(["a" * 32] * 10, pa.string()))
    assert shown(copies, 4)["path"].to_pylist() == ["0.jpg", "3.jpg", "6.jpg", "9.jpg"]
    assert shown(copies, 99).num_rows == 10
    run = Folder(tmp_path)
    run.write_table("predictions/epoch-0001.parquet", copies)
    run.write_table("predictions/epoch-0002.parquet", copies.take(list(range(9, -1, -1))))
    maps = run_maps(run, EvaluationConfig(tsne_epochs=(1,), tsne_max_slices=5), 2)
    paths = [each.rows["path"].to_pylist() for each in maps]
    assert paths[0] == paths[1]
    assert len(set(paths[0])) == 5


def test_groups_that_persist_keep_their_place_from_map_to_map() -> None:
    generator = np.random.default_rng(0)
    group = np.arange(120) % 4
    z = (10.0 * np.eye(4)[group] + generator.normal(size=(120, 4))).astype(np.float32)
    turned = z @ np.linalg.qr(generator.normal(size=(4, 4)))[0].astype(np.float32)
    first, second = tsne_sequence([z, turned], seed=0)
    old = np.stack([first[group == k].mean(axis=0) for k in range(4)])
    new = np.stack([second[group == k].mean(axis=0) for k in range(4)])
    distances = np.linalg.norm(new[:, None] - old[None], axis=2)  # (new group, old group)
    assert distances.argmin(axis=1).tolist() == [0, 1, 2, 3]
    # No rotation or reflection brings the second map nearer to the first.
    np.testing.assert_allclose(orthogonal_procrustes(second, first)[0], np.eye(2), atol=1e-3)


def test_maps_are_the_same_whenever_they_are_drawn() -> None:
    z = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.testing.assert_array_equal(tsne_sequence([z], seed=3)[0], tsne_sequence([z], seed=3)[0])


def test_one_dimension_can_be_mapped() -> None:
    z = np.random.default_rng(0).normal(size=(12, 1)).astype(np.float32)
    assert tsne_sequence([z], seed=0)[0].shape == (12, 2)


def test_copies_of_one_slice_can_be_mapped() -> None:
    z = np.ones((6, 4), np.float32)
    for points in tsne_sequence([z, z], seed=0):
        assert np.isfinite(points).all()


def test_a_store_gets_its_figures(tmp_path: Path) -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    counts = {"train": {"glioma": 3, "notumor": 2}}
    store = Folder(tmp_path)
    draw_store_figures(store, counts, [], [], [])
    assert _figures(store) == {"class_distribution"}
    stripped = StrippedSlice(image, image > 9, np.where(image > 9, image, np.uint8(0)), "otsu")
    draw_store_figures(
        store,
        counts,
        stripped=[SlicePair("glioma", image, image // 2)],
        sheet=[stripped] * 5,
        leaked=[SlicePair("near: copy, 0.999", image, image[:4])],
    )
    drawn = {"class_distribution", "skull_strip", "contact_sheet", "leakage_pairs"}
    assert _figures(store) == drawn
    _assert_pictures(store)


def _draw(run: Folder, chosen: int, tsne_epochs: tuple[int, ...] = (1, 5, 10)) -> set[str]:
    evaluation = EvaluationConfig(tsne_epochs=tsne_epochs)
    (run / "figures").delete()
    draw_run_figures(run, CLASSES, chosen, run_maps(run, evaluation, chosen))
    return _figures(run)


def _skip_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time: left out where a test looks at something else."""
    monkeypatch.setattr(run_figures, "_draw_curves", lambda run, history, chosen: None)


def _record_confusions(monkeypatch: pytest.MonkeyPatch) -> list[Confusion]:
    drawn: list[Confusion] = []

    def record(panels: list[Confusion], classes: list[str], title: str) -> object:
        drawn.extend(panels)
        return new_figure(2, 2)

    monkeypatch.setattr(evaluation_figures, "confusion_matrices", record)
    return drawn
