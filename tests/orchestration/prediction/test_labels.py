"""What to label next, on a trained run: the pool's slices only, one of each group first."""

import io
from pathlib import Path

import pyarrow.csv as pa_csv
import pytest

from brainray.errors import ConfigError, DataError
from brainray.orchestration.prediction.labels import choose_next_labels
from brainray.orchestration.training.driver import TrainedRun
from brainray.schema import NEXT_LABELS
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


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


def test_labels_that_were_filled_in_are_not_overwritten(trained: TrainedRun) -> None:
    storage = Path(str(trained.run.folder)).parents[1]
    trained.run.folder.write_bytes(
        "labels/next.csv", b"rank;path;label\n1;a.png;glioma\n2;b.png;\n"
    )
    try:
        with pytest.raises(DataError, match=r"next\.csv has 1 labels filled in"):
            choose_next_labels(tiny_config(storage, "run=two-ranks"))
    finally:
        trained.run.folder.delete_file("labels/next.csv")


def test_what_has_nothing_to_label_is_named(trained: TrainedRun) -> None:
    storage = Path(str(trained.run.folder)).parents[1]
    with pytest.raises(ConfigError, match="give --set run=NAME"):
        choose_next_labels(tiny_config(storage))
    with pytest.raises(DataError, match="no run 'absent'"):
        choose_next_labels(tiny_config(storage, "run=absent"))
