"""The study on phantoms: tables, going on by name, no label needed, and what cannot be studied."""

import base64
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from mlflow import MlflowClient
from sklearn.metrics import normalized_mutual_info_score

from brainray.config import Config
from brainray.engine.shard import sample_keys
from brainray.errors import BrainrayError, ConfigError, DataError
from brainray.models.encoder import build_encoder, encoder_state
from brainray.orchestration.pretraining.features import check_clusterable
from brainray.orchestration.store import ImageStore, read_images
from brainray.orchestration.study.driver import FinishedStudy, run_study
from brainray.orchestration.study.grid import Cell, Grid, Slices, cluster_rows
from brainray.schema import FEATURES
from brainray.storage import Folder
from tests.conftest import logged, tiny_config
from tests.report.test_page import data_of

pytestmark = pytest.mark.usefixtures("ray_cluster")

PIXELS = {"pixels": {"encoder": "pixels", "image_size": 16}}
LEARNED = {
    "refined": {
        "encoder": "resnet18",
        "image_size": 32,
        "pretext": "contrastive",
        "lambda_cluster": 0.5,
    },
}


def study_config(storage: Path, name: str, features: dict, *overrides: str) -> Config:
    return tiny_config(
        storage,
        f"name={name}",
        f"study.features={json.dumps(features)}",
        "study.pca_dims=[4]",
        "study.clusterers=[kmeans, dbscan]",
        "study.seeds=[0]",
        "study.min_samples=3",
        "study.candidate_num_clusters=[2, 3]",
        "study.sensitivity.num_clusters=[2]",
        "study.sensitivity.eps_factors=[1.0]",
        "clustering.pca_dim=4",
        "clustering.covariance_type=diag",
        *overrides,
    )


@pytest.fixture(scope="module")
def studied(storage: Path) -> FinishedStudy:
    return run_study(study_config(storage, "pixels", PIXELS, "dataset=mri"))


def cell_files(folder: Folder) -> dict[str, int]:
    """Time of writing by file."""
    assert folder.local_path is not None
    cells = folder.local_path / "cells"
    return {str(p.relative_to(cells)): p.stat().st_mtime_ns for p in cells.rglob("*.json")}


def features_of(storage: Path, encoder: str) -> list[Folder]:
    return [Folder(path) for path in (storage / "features").glob(f"{encoder}-*")]


def test_a_study_leaves_tables_figures_and_flat_figures(studied: FinishedStudy) -> None:
    places = ("tables", "figures", "figures/mri")
    files = {name for folder in places for name in (studied.folder / folder).names()}
    assert files >= {
        "methods.md",
        "methods.csv",
        "datasets.md",
        "datasets.csv",
        "cells.csv",
        "sensitivity.csv",
        "num_clusters.md",
        "sensitivity.png",
        "explained_variance.png",
        "pixels-tsne.png",
        "pixels-clusters.png",
        "pixels-dendrogram.png",
        "pixels-k_distances.png",
        "pixels-num_clusters.png",
    }
    table = studied.folder.read_bytes("tables/methods.md").decode()
    for subset in ("fitted slices", "held-out slices, all", "held-out slices, clean"):
        assert subset in table
    assert "| pixels   | dbscan" in table
    assert "nearest fitted slices with the same label" in table
    assert 0 <= studied.metrics["mri/fitted/pixels/kmeans/pca4/nmi_mean"] <= 1
    assert studied.metrics["num_failed_cells"] == 0
    assert studied.metrics["mri/pixels/recommended_num_clusters"] in (2, 3)
    assert sorted(studied.headline) == [
        "mri/pixels/recommended_num_clusters",
        "num_cells",
        "num_failed_cells",
    ]
    assert "criteria agree" in studied.text
    titles = [line for line in studied.text.splitlines() if line.startswith("## mri: ")]
    assert [title.split(",")[0] for title in titles] == [
        "## mri: 56 fitted slices",
        "## mri: share of the 10 nearest fitted slices with the same label",
    ]


def test_the_page_has_the_tables_figures_map_and_clusters(studied: FinishedStudy) -> None:
    page = Path(studied.folder.uri, "report.html")
    text = page.read_text()
    nmi = studied.metrics["mri/fitted/pixels/kmeans/pca4/nmi_mean"]
    assert f"<td>{nmi:.3f}</td>" in text
    for title in ("mri: 56 fitted slices", "mri: sensitivity, fitted slices", "Recommended number"):
        assert f"<h3>{title}" in text
    assert "NMI by data set" not in text  # of a single one
    for name in ("tsne", "clusters", "dendrogram", "k_distances", "num_clusters"):
        image = base64.b64encode(studied.folder.read_bytes(f"figures/mri/pixels-{name}.png"))
        assert image.decode() in text
    data = data_of(page)
    (drawn,) = data["maps"]
    assert drawn["epoch"] == "mri, pixels: kmeans, 4 components, seed 0"
    table = studied.folder.read_table("cells/mri/pixels/pca4-kmeans-k4-seed0.parquet")
    table = table.sort_by([(name, "ascending") for name in ("sample_id", "split", "path")])
    assert drawn["cluster"] == table["cluster"].to_pylist()
    assert [each["path"] for each in data["slices"]] == table["path"].to_pylist()
    fitted = [row["cluster"] for row in table.to_pylist() if row["split"] == "train"]
    assert {card["cluster"]: card["size"] for card in drawn["cards"]} == Counter(fitted)
    assert all(each["label"] is None for each in data["slices"])


def test_the_study_is_in_mlflow_with_its_tables(studied: FinishedStudy) -> None:
    client = MlflowClient(tracking_uri=studied.tracking_uri)
    run = client.get_run(str(studied.mlflow_run_id))
    assert run.info.status == "FINISHED"
    name = "mri/fitted/pixels/kmeans/pca4/nmi_mean"
    assert run.data.metrics[f"final/{name}"] == pytest.approx(studied.metrics[name])
    tables = {file.path for file in client.list_artifacts(run.info.run_id, "tables")}
    assert {"tables/methods.csv", "tables/datasets.csv"} <= tables
    assert "report.html" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_features_are_kept_by_sample_and_read_by_plain_pyarrow(
    studied: FinishedStudy, storage: Path
) -> None:
    (folder,) = (storage / "features").glob("pixels-*")
    assert json.loads((folder / "manifest.json").read_text())["encoder"] == "pixels"
    table = pq.read_table(folder / "parts")
    assert table.schema.equals(FEATURES)
    store = ImageStore.open(Folder(storage / "datasets" / "mri"))
    assert sorted(table["path"].to_pylist()) == sorted(store.index()["path"].to_pylist())
    row = next(row for row in table.to_pylist() if row["split"] == "train")
    image = read_images(store.folder, [row["sample_id"]], "train", 16)[0, 0]
    np.testing.assert_allclose(row["features"], image.ravel() / 255, atol=1e-6)


def test_the_same_name_goes_on_and_repeats_nothing_finished(
    studied: FinishedStudy, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = cell_files(studied.folder)
    (first, *_) = before
    assert studied.folder.local_path is not None
    (studied.folder.local_path / "cells" / first).unlink()
    page = studied.folder.read_bytes("report.html")
    studied.folder.delete_file("report.html")
    config = study_config(storage, "pixels", PIXELS, "dataset=mri")
    again = run_study(config)
    lines = logged(capsys)
    after = cell_files(again.folder)
    assert {name: after[name] for name in before if name != first} == {
        name: time for name, time in before.items() if name != first
    }
    assert after[first] > before[first]
    assert f"grid: {len(before)} cells, {len(before) - 1} of them already finished" in lines
    assert any(line.endswith(": up to date, reusing them") for line in lines)
    assert again.metrics == studied.metrics
    assert again.folder.read_bytes("report.html") == page


@pytest.mark.slow
def test_corrected_labels_are_what_an_old_study_is_scored_on(
    phantoms: Path, tmp_path: Path
) -> None:
    table = tmp_path / "labels.csv"
    settings = [f"source={phantoms}", f"labels={table}", "study.clusterers=[kmeans]"]

    def write_labels(shift: int) -> None:
        paths = sorted(path.relative_to(phantoms) for path in phantoms.rglob("*.jpg"))
        classes = sorted({path.parts[1] for path in paths})
        table.write_text("path,label,split\n")
        with table.open("a") as file:
            for number, path in enumerate(paths):
                label = (classes.index(path.parts[1]) + number % 2 * shift) % len(classes)
                split = {"Training": "train", "Testing": "test"}[path.parts[0]]
                file.write(f"{path},{classes[label]},{split}\n")

    write_labels(shift=0)
    config = study_config(tmp_path, "same", PIXELS, *settings)
    before = run_study(config).metrics
    write_labels(shift=1)
    after = run_study(config)
    assignments = after.folder.read_table("cells/same/pixels/pca4-kmeans-k4-seed0.parquet")
    index = ImageStore.open(Folder(tmp_path / "datasets" / "same")).index()
    rows = index.join(assignments, ["sample_id", "split", "path", "frame"])
    is_scored = pc.and_(pc.equal(rows["split"], "train"), pc.is_valid(rows["label"]))
    fitted = rows.filter(is_scored)
    expected = normalized_mutual_info_score(fitted["label"], fitted["cluster"])
    name = "same/fitted/pixels/kmeans/pca4"
    assert after.metrics[f"{name}/nmi_mean"] == pytest.approx(expected)
    assert before[f"{name}/nmi_mean"] != pytest.approx(expected)
    assert after.metrics[f"{name}/silhouette_mean"] == before[f"{name}/silhouette_mean"]


@pytest.mark.parametrize(
    ("features", "overrides", "message"),
    [
        ({}, ["dataset=mri"], "study.features is empty"),
        (PIXELS, [], "a study needs slices"),
        (PIXELS, ["source=/tmp", "sources.a=/tmp"], "give source or sources, not both"),
        (PIXELS, ["dataset=mri", "sources.a=/tmp"], "give dataset=mri or sources, not both"),
        (
            PIXELS,
            ["dataset=mri", "labels=/tmp/l.csv"],
            "labels=/tmp/l.csv applies to a single source: also set source",
        ),
        (PIXELS, ["dataset=absent"], "no image store"),
        (
            PIXELS,
            ["dataset=mri", "preprocess.resize=letterbox"],
            "stretch here, letterbox requested",
        ),
        ({"x": {"encoder": "resnet19"}}, ["dataset=mri"], "unknown encoder 'resnet19'"),
        (
            {"x": {"weights": "/no/such.pt"}},
            ["dataset=mri"],
            "study.features.x.weights=/no/such.pt: no such file",
        ),
        (
            {"raw": {"encoder": "pixels"}},
            ["dataset=mri"],
            "study.features.raw has 16,384 features, but PCA takes at most 4,096",
        ),
        (
            {"tiny": {"encoder": "resnet18", "image_size": 32, "pretext": "rotation"}},
            ["dataset=mri", "train.num_workers=99"],
            "99",
        ),
        ({"x": {"weights": "run:absent"}}, ["dataset=mri"], "no run 'absent'"),
        (
            PIXELS,
            ["dataset=mri", "clustering.num_clusters=99"],
            "clustering.num_clusters needs 99 slices, but mri has 56 to fit",
        ),
        (
            PIXELS,
            ["dataset=mri", "study.min_samples=56"],
            "study.min_samples needs 57 slices, but mri has 56 to fit",
        ),
        (
            PIXELS,
            ["dataset=mri", "study.pca_dims=[57]"],
            "study.pca_dims needs 57 components, but mri has 56 slices to fit",
        ),
        (
            {"tiny": {"encoder": "resnet18", "image_size": 64, "pretext": "rotation"}},
            ["dataset=mri"],
            "image_size (64) exceeds preprocess.image_size (32)",
        ),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(
    features: dict, overrides: list[str], message: str, storage: Path
) -> None:
    with pytest.raises(BrainrayError) as error:
        run_study(study_config(storage, "refused", features, *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (storage / "studies" / "refused").exists()


def test_weights_of_another_architecture_are_refused(storage: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path)
    features = {"other": {"encoder": "resnet18", "weights": str(path), "image_size": 32}}
    with pytest.raises(ConfigError, match=r"study\.features\.other: the weights do not fit"):
        run_study(study_config(storage, "refused", features, "dataset=mri"))


def test_pixels_take_neither_weights_nor_training(storage: Path) -> None:
    features = {"pixels": {"encoder": "pixels", "pretext": "rotation"}}
    with pytest.raises(ConfigError, match="encoder pixels has no weights to load or train"):
        study_config(storage, "refused", features)


def test_broken_and_collapsed_features_are_named() -> None:
    good = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    check_clusterable(good, "here")
    broken = good.copy()
    broken[2, 1] = np.nan
    with pytest.raises(DataError, match="1 of 5 slices have NaN or infinite features"):
        check_clusterable(broken, "here")
    with pytest.raises(DataError, match="all 5 slices have the same features"):
        check_clusterable(np.repeat(good[:1], 5, axis=0), "here")


@pytest.mark.slow
def test_a_broken_feature_set_does_not_end_the_others_study(
    studied: FinishedStudy, storage: Path
) -> None:
    (folder,) = (storage / "features").glob("pixels-*")
    (part, *_) = (folder / "parts").glob("*.parquet")
    whole = part.read_bytes()
    table = pq.read_table(part)
    rows = [np.full(len(row), np.nan) for row in table["features"].to_pylist()]
    position = table.schema.get_field_index("features")
    field = FEATURES.field("features")
    pq.write_table(table.set_column(position, field, pa.array(rows, field.type)), part)
    try:
        both = PIXELS | {"other": {"encoder": "pixels", "image_size": 20}}
        finished = run_study(study_config(storage, "partly", both, "dataset=mri"))
        assert finished.metrics["num_failed_cells"] == 2
        assert "mri/fitted/other/kmeans/pca4/nmi_mean" in finished.metrics
        with pytest.raises(BrainrayError, match=r"no cell .* NaN or infinite features"):
            run_study(study_config(storage, "broken", PIXELS, "dataset=mri"))
    finally:
        part.write_bytes(whole)


@pytest.mark.slow
def test_slices_without_any_label_are_studied_without_label_figures(
    phantoms: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for number, path in enumerate(sorted((phantoms / "Training").rglob("*.jpg"))):
        shutil.copy(path, bare / f"{number:03d}.jpg")
    finished = run_study(study_config(tmp_path, "bare", PIXELS, f"source={bare}"))
    names = set(finished.metrics)
    assert "bare/fitted/pixels/kmeans/pca4/silhouette_mean" in names
    assert not any("nmi" in name or "accuracy" in name for name in names)
    assert "NMI" not in finished.folder.read_bytes("tables/methods.md").decode()
    assert finished.folder.read_bytes("tables/datasets.md") == b""


@pytest.mark.slow
def test_several_data_sets_have_a_table_with_their_mean(phantoms: Path, tmp_path: Path) -> None:
    sources = [f"sources.one={phantoms / 'Training'}", f"sources.two={phantoms / 'Testing'}"]
    settings = ["study.clusterers=[kmeans]", "study.min_samples=2", *sources]
    finished = run_study(study_config(tmp_path, "two", PIXELS, *settings))
    table = finished.folder.read_bytes("tables/datasets.md").decode()
    header = next(line for line in table.splitlines() if line.startswith("| features"))
    assert [cell.strip() for cell in header.split("|")[4:7]] == ["one", "two", "mean NMI"]
    means = [finished.metrics[f"{n}/fitted/pixels/kmeans/pca4/nmi_mean"] for n in ("one", "two")]
    assert f"{np.mean(means):.3f} |" in table
    written = pd.read_csv(io.BytesIO(finished.folder.read_bytes("tables/datasets.csv")))
    (row,) = written[(written.metric == "nmi") & (written.slices == "fitted")].to_dict("records")
    assert [row["one_mean"], row["two_mean"], row["mean"]] == [
        *means,
        pytest.approx(np.mean(means)),
    ]
    page = Path(finished.folder.uri, "report.html")
    first, second = ([x is not None for x in each["x"]] for each in data_of(page)["maps"])
    assert any(first)
    assert any(second)
    assert [not there for there in first] == second
    assert "<h3>NMI by data set, fitted slices" in page.read_text()


@pytest.fixture(scope="module")
def learned(storage: Path) -> FinishedStudy:
    return run_study(learned_config(storage))


def learned_config(storage: Path, name: str = "learned") -> Config:
    return study_config(
        storage,
        name,
        LEARNED,
        "dataset=mri",
        "train.num_workers=2",
        "study.clusterers=[gmm]",
        "self_supervision.num_epochs=2",
        "self_supervision.max_rounds=2",
    )


@pytest.mark.slow
def test_encoders_learn_without_labels_on_two_ranks_and_start_a_training(
    learned: FinishedStudy, storage: Path
) -> None:
    (folder,) = (storage / "encoders").glob("resnet18-contrastive-refined-seed0-*")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in history] == [1.0, 2.0]
    (before,) = (
        found
        for found in (storage / "encoders").glob("resnet18-contrastive-seed0-*")
        # Not a warm-up of other tests on this storage.
        if Folder(found).read_json("manifest.json")["self_supervision"].get("positives", "slice")
        == "slice"
    )
    assert len((before / "metrics.jsonl").read_text().splitlines()) == 2
    state = encoder_state((folder / "encoder.pt").read_bytes(), "the encoder")
    encoder = build_encoder("resnet18", state, num_classes=4)
    drawn = build_encoder("resnet18", "random", num_classes=4)
    assert not torch.equal(encoder.backbone.conv1.weight, drawn.backbone.conv1.weight)
    rounds = [pq.read_table(path) for path in sorted((folder / "rounds").glob("*.parquet"))]
    store = ImageStore.open(Folder(storage / "datasets" / "mri"))
    index = store.index().to_pylist()
    keys = sample_keys([row["sample_id"] for row in index if row["split"] == "train"])
    assert len(rounds) == 3
    assert all(table["key"].to_pylist() == sorted(keys.tolist()) for table in rounds)
    changed = np.mean(rounds[1]["cluster"].to_numpy() != rounds[2]["cluster"].to_numpy())
    assert history[1]["changed_share"] == pytest.approx(changed)
    assert learned.folder.exists("figures/refinement.png")
    assert "mri/fitted/refined/gmm/pca4/nmi_mean" in learned.metrics


@pytest.mark.slow
def test_an_encoder_whose_clusters_collapsed_is_reused_with_a_note(
    learned: FinishedStudy, storage: Path, tmp_path: Path
) -> None:
    other = tmp_path / "storage"
    shutil.copytree(storage, other)
    for path in (other / "encoders").glob("resnet18-contrastive-refined-*/metrics.jsonl"):
        path.write_text(path.read_text().replace('"collapsed": 0.0', '"collapsed": 1.0'))
    config = learned_config(other)
    again = run_study(config)
    methods = again.folder.read_bytes("tables/methods.md").decode()
    assert (
        "- mri, refined, seed 0: the clusters of its refinement collapsed in round 1, 2" in methods
    )
    before = learned.folder.read_bytes("tables/methods.md").decode()
    assert "collapsed" not in before


@pytest.mark.slow
def test_permuted_labels_leave_every_cluster_as_it_is(
    learned: FinishedStudy, storage: Path, tmp_path: Path
) -> None:
    other = tmp_path / "storage"
    shutil.copytree(storage / "datasets", other / "datasets")
    generator = np.random.default_rng(0)
    for part in (other / "datasets" / "mri" / "images").glob("*.parquet"):
        table = pq.read_table(part)
        labels = table["label"].to_numpy(zero_copy_only=False)
        position = table.schema.get_field_index("label")
        permuted = pa.array(generator.permutation(labels), pa.string())
        pq.write_table(table.set_column(position, "label", permuted), part)
    again = run_study(learned_config(other))
    for cell in cell_files(learned.folder):
        name = f"cells/{cell.removesuffix('.json')}.parquet"
        assert learned.folder.read_table(name).equals(again.folder.read_table(name))
    name = "mri/fitted/refined/gmm/pca4"
    assert again.metrics[f"{name}/silhouette_mean"] == learned.metrics[f"{name}/silhouette_mean"]
    assert again.metrics[f"{name}/nmi_mean"] != learned.metrics[f"{name}/nmi_mean"]


@pytest.mark.slow
def test_every_clusterer_runs_on_features_of_an_encoder(storage: Path) -> None:
    everything = "[kmeans, gmm, agglomerative, agglomerative_depth, dbscan, spectral, hdbscan]"
    features = {"random": {"encoder": "resnet18", "image_size": 32}}
    finished = run_study(
        study_config(
            storage,
            "all",
            features,
            "dataset=mri",
            f"study.clusterers={everything}",
            "study.seeds=[0, 1]",
            "study.pca_dims=[2, 4]",
        )
    )
    assert finished.metrics["num_failed_cells"] == 0
    rows = finished.folder.read_bytes("tables/cells.csv").decode().splitlines()
    assert len(rows) == 1 + 7 * 2 * 2 * 4  # clusterers, seeds, dimensions, subsets
    seeds = [each.read_json("manifest.json")["seed"] for each in features_of(storage, "resnet18")]
    assert {0, 1} <= set(seeds)


def test_a_cell_is_known_by_its_limits_labels_and_subsets(tmp_path: Path) -> None:
    kmeans, mixture = (Cell("mri", "pixels", 0, name, 2, 4) for name in ("kmeans", "gmm"))
    stores = {("mri", "pixels", 0): SimpleNamespace(key="features")}

    def key(*settings: str, labels: tuple[int, ...] = (0, 1), num_fitted: int = 2) -> str:
        config = tiny_config(tmp_path, *settings)
        fitted = np.arange(2) < num_fitted
        slices = Slices(pa.table({}), np.array(labels, np.int64), {"fitted": fitted})
        grid = Grid(config, Folder(tmp_path), cast(Any, stores), {"mri": slices})
        return grid.key(mixture)

    assert key("clustering.gmm_max_iter=100") == key()  # the default
    assert len({key(), key(labels=(1, 1)), key(num_fitted=1)}) == 3  # what scores depend on
    few = ["clustering.gmm_max_iter=1", "clustering.gmm_tol=10", "clustering.kmeans_max_iter=2"]
    assert key(*few) != key()
    x = np.random.default_rng(0).standard_normal((200, 4))

    def fit(cell: Cell, *settings: str) -> dict[str, float]:
        config = tiny_config(tmp_path, *settings)
        return dict(cluster_rows(x, cell, config.study, config.clustering).details)

    assert fit(kmeans, *few)["inertia"] > fit(kmeans)["inertia"]
    assert fit(mixture, *few)["log_likelihood"] < fit(mixture)["log_likelihood"]
