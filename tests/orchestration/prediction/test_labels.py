"""What to label next, on a trained run: the pool's slices only, one of each group first."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest

from brainray.config_text import load_config
from brainray.errors import ConfigError, DataError
from brainray.orchestration.prediction import labels as labels_module
from brainray.orchestration.prediction.labels import choose_next_labels
from brainray.orchestration.training.driver import TrainedRun
from brainray.schema import NEXT_LABELS
from brainray.storage import Folder
from tests.conftest import tiny_config


@pytest.mark.slow
def test_unlabelled_slices_are_ranked_and_the_list_stays_with_the_run(trained: TrainedRun) -> None:
    storage = Path(str(trained.run.folder)).parents[1]
    chosen = choose_next_labels(tiny_config(storage, "run=two-ranks", "label.num_slices=12"))
    content = trained.run.folder.read_bytes("labels/next.csv")
    types = {field.name: field.type for field in NEXT_LABELS}
    as_written = pa_csv.ConvertOptions(column_types=types, strings_can_be_null=True)
    table = pa_csv.read_csv(io.BytesIO(content), convert_options=as_written)
    assert table.column_names == NEXT_LABELS.names
    filled_in = ["label", "frame"]
    assert table.drop_columns(filled_in).equals(chosen.table.drop_columns(filled_in))
    assert table["label"].null_count == table.num_rows  # for a person to fill in
    assert table["rank"].to_pylist() == list(range(1, 13))
    seen = trained.run.folder.read_table("seen.parquet").to_pylist()
    roles = {row["sample_id"]: row["role"] for row in seen}
    assert {roles[name] for name in table["sample_id"].to_pylist()} == {"unlabelled"}
    groups = table["duplicate_group_id"].to_pylist()
    assert len(set(groups)) == len(groups)
    uncertainty = table["uncertainty"].to_pylist()
    assert all(0 <= value <= 1 for value in uncertainty)
    # Each cluster's slices are in the order of doubt, but for mates that stand back.
    assert uncertainty[0] > min(uncertainty)
    assert chosen.metrics["num_chosen"] == 12


def test_every_row_of_the_list_is_of_one_slice_and_mates_of_labelled_ones_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = {  # role, subject, and the probability of class x
        "a": ("labelled", "p1", 0.5),
        "b": ("unlabelled", "p1", 0.5),
        "c": ("unlabelled", "p2", 0.9),
        "d": ("unlabelled", "p3", 0.4),
        "e": ("left_out", "p4", 0.5),
    }
    roles, subjects, _ = zip(*slices.values(), strict=True)
    seen = {"sample_id": list(slices), "role": roles, "subject_id": subjects}
    folder = Folder(tmp_path)
    folder.write_table("seen.parquet", pa.table(seen | {"duplicate_group_id": list(slices)}))
    reading = Mock(wraps=folder.read_table)
    monkeypatch.setattr(folder, "read_table", reading)

    def predicted(store: Any, ids: list[str], *_: Any) -> list[pa.Table]:
        rows = []
        for name in reversed(ids):  # in any order
            of_x = slices[name][2]
            best = {"head": "x" if of_x > 0.5 else "y", "confidence": max(of_x, 1 - of_x)}
            place = {"sample_id": name, "path": f"{name}.png", "frame": ""}
            cluster = {"cluster": 0, "cluster_class": "x"}
            rows.append(place | best | cluster | {"probabilities": [of_x, 1 - of_x]})
        return [pa.Table.from_pylist(rows)]

    run = SimpleNamespace(folder=folder, record=SimpleNamespace(dataset="mri", data_hash=""))
    monkeypatch.setattr(labels_module, "open_run", lambda *_: run)
    monkeypatch.setattr(
        labels_module, "find_predictor", lambda *_, **__: SimpleNamespace(folder=folder)
    )
    monkeypatch.setattr(labels_module, "open_store", lambda *_: None)
    monkeypatch.setattr(labels_module, "predicted_slices", predicted)
    monkeypatch.setattr(labels_module, "with_progress", lambda blocks, *_, **__: blocks)
    config = load_config(None, [f"storage={tmp_path}", "run=r", "label.num_slices=3"])
    rows = choose_next_labels(config).table.to_pylist()
    columns = ("rank", "path", "class", "subject_id", "label")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (1, "d.png", "y", "p3", None),
        (2, "c.png", "x", "p2", None),
        (3, "b.png", "y", "p1", None),
    ]
    assert [row["uncertainty"] for row in rows] == pytest.approx([0.8, 0.2, 1.0])
    assert [row["confidence"] for row in rows] == pytest.approx([0.6, 0.9, 0.5])
    read = {"sample_id", "role", "duplicate_group_id", "subject_id"}
    assert set(reading.call_args.args[1]) == read  # without fingerprints
    assert folder.read_table("labels/next.parquet").to_pylist() == rows


@pytest.mark.parametrize("label", ["glioma", 0, 1.0, False])
@pytest.mark.parametrize("name", ["labels/next.csv", "labels/next.parquet"])
def test_labels_that_were_filled_in_are_not_overwritten(
    trained: TrainedRun, name: str, label: object
) -> None:
    storage, folder = Path(str(trained.run.folder)).parents[1], trained.run.folder
    if name.endswith(".csv"):
        folder.write_bytes(name, f"rank;path;label\n1;a.png;{label}\n2;b.png;\n".encode())
    else:
        folder.write_table(name, pa.table({"path": ["a", "b"], "label": [label, None]}))
    try:
        with pytest.raises(DataError, match=f"{name} has 1 labels filled in"):
            choose_next_labels(tiny_config(storage, "run=two-ranks"))
    finally:
        folder.delete_file(name)


def test_what_has_nothing_to_label_is_named(trained: TrainedRun) -> None:
    storage = Path(str(trained.run.folder)).parents[1]
    with pytest.raises(ConfigError, match="give --set run=NAME"):
        choose_next_labels(tiny_config(storage))
    with pytest.raises(DataError, match="no run 'absent'"):
        choose_next_labels(tiny_config(storage, "run=absent"))
