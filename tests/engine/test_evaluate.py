"""Reported figures, by hand: which slices count, and against what."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import (
    adjusted_rand_score,
    fowlkes_mallows_score,
    normalized_mutual_info_score,
    silhouette_score,
)

from brainray.config import VALIDATION_METRICS, ClusteringConfig
from brainray.engine.calibration import fit_temperature
from brainray.engine.evaluate import (
    _nearest_thumbnail,
    confusion_metrics,
    epoch_metrics,
    subset_metrics,
    summarise,
)
from brainray.engine.predictions import Predictions, gather_predictions, predictions_table
from brainray.engine.recluster import recluster
from brainray.engine.selection import (
    _standard_error,
    chosen_epoch,
    reported_metrics,
    validation_metrics,
)
from brainray.models.encoder import EncoderOutput
from brainray.schema import PREDICTIONS, SEEN, UNLABELLED

CLASSES = ["a", "b"]
LABELS = [0, 0, 1, 1, UNLABELLED]
HEAD = [0, 1, 1, 1, 0]
CLUSTERS = [1, 1, 0, 1, 0]
CLASS_OF_CLUSTER = np.array([1, 0])  # cluster 0 stands for b, cluster 1 for a


def predictions() -> Predictions:
    eye = np.eye(2, dtype=np.float32)
    return Predictions(
        labels=np.array(LABELS),
        probabilities=0.8 * eye[HEAD] + 0.1,
        responsibilities=eye[CLUSTERS],
        class_of_cluster=CLASS_OF_CLUSTER,
        log_likelihood=np.zeros(5, np.float32),
        embeddings=np.eye(5, dtype=np.float32),
    )


def thumbnails() -> list[bytes]:
    """Of the test slices: 1 nearly copies 0, and 3 copies 2."""
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 200, (5, 96 * 96)).astype(np.uint8)
    looks[[1, 3]] = looks[[0, 2]] + rng.integers(0, 40, (2, 96 * 96)).astype(np.uint8)
    return [look.tobytes() for look in looks]


def table(clean: list[bool] | None, strict: list[bool] | None = None) -> pa.Table:
    slices = {
        "sample_id": [f"{number:032x}" for number in range(5)],
        "path": [f"{number}.jpg" for number in range(5)],
        "frame": [""] * 5,
        "thumbnail": thumbnails(),
    }
    if clean is not None:
        slices |= {"clean": clean, "strict": clean if strict is None else strict}
    return predictions_table(predictions(), CLASSES, pa.table(slices))


def seen() -> pa.Table:
    """Two labelled slices that look like test slices 0 and 2; 1 and 3 look like slices whose labels
    the baseline may not know.
    """
    rows = [
        (0, "labelled", "a"),
        (2, "labelled", "b"),
        (1, "validation", "b"),
        (3, "unlabelled", None),
    ]
    return pa.Table.from_pylist(
        [
            {
                "sample_id": f"{number}",
                "path": f"{number}",
                "frame": "",
                "role": role,
                "label": label,
                "duplicate_group_id": f"{number}",
                "thumbnail": thumbnails()[number],
            }
            for number, role, label in rows
        ],
        schema=SEEN,
    )


def test_clusters_speak_through_their_class_and_the_head_for_itself() -> None:
    metrics = subset_metrics(predictions(), CLASSES, "all")
    assert metrics["test/all/num_slices"] == 4  # the unlabelled one is not scored
    assert metrics["test/all/head/accuracy"] == 0.75
    assert metrics["test/all/head/recall/a"] == 0.5
    assert metrics["test/all/head/precision/b"] == 2 / 3
    assert metrics["test/all/cluster/accuracy"] == 0.75
    assert metrics["test/all/cluster/recall/b"] == 0.5


def test_confusion_counts() -> None:
    counts = confusion_metrics(predictions(), CLASSES, "t")
    assert counts["t/head/confusion/a/a"] == 1
    assert counts["t/head/confusion/a/b"] == 1
    assert counts["t/head/confusion/b/b"] == 2
    assert counts["t/cluster/confusion/b/a"] == 1
    assert sum(value for name, value in counts.items() if "head" in name) == 4


def test_confusions_of_few_strict_slices_are_withheld_after_an_epoch() -> None:
    slices = pa.table({"clean": [True] * 5, "strict": [True] * 5})
    found = epoch_metrics(predictions(), slices, CLASSES)
    assert "test/clean/head/confusion/a/b" in found
    assert not [name for name in found if name.startswith("test/strict") and "confusion" in name]


def test_clean_slices_stand_for_the_clusters() -> None:
    slices = pa.table({"clean": [True, True, True, False, True], "strict": [False] * 5})
    metrics = epoch_metrics(predictions(), slices, CLASSES)
    assert metrics["test/all/num_slices"] == 4
    assert metrics["test/clean/num_slices"] == 3
    assert metrics["cluster/ari"] == metrics["test/clean/cluster/ari"] == 1.0
    assert metrics["test/all/cluster/ari"] < 1.0
    assert metrics["test/all/head/confusion/a/b"] == 1
    # After the training as after an epoch.
    rows = table(slices["clean"].to_pylist(), slices["strict"].to_pylist())
    summary = summarise(rows, seen(), CLASSES, num_resamples=10, seed=0)
    for name in ("silhouette", "nmi", "ari", "fmi"):
        clean = f"test/clean/cluster/{name}"
        assert summary[f"cluster/{name}"] == summary[clean] == metrics[clean], name
    many = epoch_metrics(predictions(), slices, [f"class {number}" for number in range(21)])
    assert not [name for name in many if "confusion" in name]


def test_the_score_is_balanced_accuracy_and_ties_go_to_the_lower_loss() -> None:
    labelled = predictions().select(np.arange(5) < 4)
    metrics = validation_metrics(labelled)
    loss = -(3 * math.log(0.9) + math.log(0.1)) / 4
    assert math.isclose(metrics["validation/loss"], loss, rel_tol=1e-5)
    assert metrics["validation/head/balanced_accuracy"] == 0.75
    assert math.isclose(metrics["validation/score"], 0.75 - 1e-6 * loss)
    # A sweep may choose by any of them but a count, an error and a parameter of the calibration.
    assert metrics.keys() == {
        *VALIDATION_METRICS,
        "validation/num_slices",
        "validation/score_error",
        "validation/temperature",
    }


def uneven() -> Predictions:
    """Slices a, a, a, b, of which the head has three right and the clusters one; K = 3."""
    rng = np.random.default_rng(0)
    return Predictions(
        labels=np.array([0, 0, 0, 1]),
        probabilities=np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]], np.float32),
        responsibilities=np.array(
            [[0.1, 0.9, 0], [0.2, 0, 0.8], [0.3, 0, 0.7], [1, 0, 0]], np.float32
        ),
        class_of_cluster=np.array([1, 1, 0])[[2, 1, 0]],
        log_likelihood=np.zeros(4, np.float32),
        embeddings=rng.normal(size=(4, 3)).astype(np.float32),
    )


def test_each_validation_metric_is_what_its_name_says() -> None:
    found, metrics = uneven(), validation_metrics(uneven())
    assert metrics["validation/head/accuracy"] == 3 / 4
    assert metrics["validation/head/balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["validation/cluster/accuracy"] == 0.0
    # Confidences .9, .8, .7 and .6 are in bins of their own: 3 x (1 - p) / 4 and .7 / 4.
    expected = (0.1 + 0.2 + 0.7 + 0.4) / 4
    assert metrics["validation/calibration_error"] == pytest.approx(expected)
    assert metrics["validation/temperature"] == fit_temperature(found.probabilities, found.labels)
    assert metrics["validation/temperature"] != 1.0


def test_clusters_are_judged_by_themselves_not_by_their_classes() -> None:
    found, metrics = uneven(), subset_metrics(uneven(), CLASSES, "all")
    clusters = found.responsibilities.argmax(axis=1)
    for name, score in (
        ("nmi", normalized_mutual_info_score),
        ("ari", adjusted_rand_score),
        ("fmi", fowlkes_mallows_score),
    ):
        expected = score(found.labels, clusters)
        assert metrics[f"test/all/cluster/{name}"] == pytest.approx(expected), name
    expected = silhouette_score(found.embeddings, clusters)
    assert metrics["test/all/cluster/silhouette"] == pytest.approx(expected, abs=1e-5)


def test_slices_without_a_label_have_no_part_in_the_silhouette() -> None:
    embeddings = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    every = dataclasses.replace(predictions(), embeddings=embeddings)
    labelled = every.select(every.labels != UNLABELLED)
    name = "test/all/cluster/silhouette"
    assert (
        subset_metrics(every, CLASSES, "all")[name]
        == subset_metrics(labelled, CLASSES, "all")[name]
    )


def test_calibration_errors_are_told_raw_and_tempered() -> None:
    metrics = summarise(
        table([True] * 5), seen(), CLASSES, num_resamples=10, seed=0, temperature=2.0
    )
    name = "test/all/head/calibration_error"
    # Three of four are right, with a confidence of .9 each; tempered, of 3 : 1.
    assert metrics[name] == pytest.approx(0.15)
    assert metrics[f"{name}_tempered"] == pytest.approx(0.0, abs=1e-6)


def test_a_summary_tells_all_clean_and_the_memory_baseline() -> None:
    metrics = summarise(
        table([True, False, True, True, True]),
        seen(),
        CLASSES,
        num_resamples=100,
        seed=0,
    )
    assert metrics["test/all/num_slices"] == 4
    assert metrics["test/clean/num_slices"] == 3
    assert metrics["test/clean/head/accuracy"] == 1.0
    assert metrics["test/all/thumbnail_1nn/accuracy"] == 1.0
    # Clean holds a : b = 1 : 2; of all, the head gets half of a and all of b.
    expected = (1 / 3) * 0.5 + (2 / 3) * 1.0
    assert math.isclose(metrics["test/all_as_clean/head/accuracy"], expected)


def test_the_memory_baseline_is_scored_on_the_slices_of_each_subset() -> None:
    rows = table([False, True, True, True, True])
    metrics = summarise(rows, seen(), CLASSES, num_resamples=10, seed=0)
    assert metrics["test/clean/thumbnail_1nn/accuracy"] == 1.0


def test_the_memory_baseline_sees_no_details_below_three_pixels() -> None:
    squares = np.indices((96, 96)).sum(axis=0, dtype=np.uint8) % 2 * 200  # of one pixel each
    bright_left = np.where(np.arange(96) < 48, 40, 0).astype(np.uint8) + np.zeros_like(squares)
    asked = pa.table({"thumbnail": [(squares + bright_left).tobytes()]})
    known = pa.table(
        {
            "role": ["labelled"] * 2,
            "label": CLASSES,
            "thumbnail": [squares.tobytes(), bright_left.tobytes()],
        }
    )
    assert _nearest_thumbnail(asked, known, CLASSES).tolist() == [CLASSES.index("b")]


def copies(num_copies: int) -> pa.Table:
    """Of four slices, of which the second is wrong and not clean."""
    many = pa.concat_tables([table([True, False, True, True, True]).slice(0, 4)] * num_copies)
    return many.set_column(0, "sample_id", pa.array([f"slice-{row}" for row in range(len(many))]))


def test_intervals_are_told_where_there_are_groups_enough_and_both_outcomes() -> None:
    def summary(num_copies: int, groups: dict[str, str] | None = None) -> dict[str, float]:
        rows = copies(num_copies)
        return summarise(rows, seen(), CLASSES, num_resamples=100, seed=0, groups=groups)

    many, low, high = summary(5), "test/all/head/accuracy_low", "test/all/head/accuracy_high"
    assert 0.4 < many[low] < 0.75 < many[high] < 1
    assert many["test/clean/head/accuracy"] == 1.0
    assert "test/clean/head/accuracy_low" not in many  # without a wrong one it has no width
    assert low not in summary(2)
    assert low not in summary(3, {f"slice-{row}": f"subject-{row % 4}" for row in range(12)})


def test_intervals_of_a_subset_are_over_its_own_groups() -> None:
    clean = pa.array([False] * 20 + [True] * 20)
    rows = copies(10)
    rows = rows.set_column(rows.column_names.index("clean"), "clean", clean)
    groups = {f"slice-{row}": "one subject" for row in range(20)}  # the clean ones are their own
    found = summarise(rows, seen(), CLASSES, num_resamples=50, seed=0, groups=groups)
    assert "test/clean/head/accuracy_low" in found


def test_strict_figures_of_small_classes_are_withheld() -> None:
    metrics = summarise(
        table([True] * 5, [True, True, True, False, True]),
        seen(),
        CLASSES,
        num_resamples=10,
        seed=0,
    )
    assert metrics["test/strict/num_slices"] == 3
    assert math.isclose(metrics["test/strict/head/accuracy"], 2 / 3)
    assert metrics["test/strict/head/support/a"] == 2
    assert "test/clean/head/recall/a" in metrics
    assert not [name for name in metrics if name.startswith("test/strict/head/recall/")]
    assert "test/clean/head/balanced_accuracy" in metrics
    assert "test/strict/head/balanced_accuracy" not in metrics


def test_without_fingerprints_there_is_no_clean_and_no_baseline() -> None:
    metrics = summarise(table(None), None, CLASSES, num_resamples=10, seed=0)
    assert metrics["test/all/head/accuracy"] == 0.75
    assert not [
        name for name in metrics if "clean" in name or "strict" in name or "thumbnail" in name
    ]


def test_a_table_holds_the_predictions() -> None:
    rows = table([True] * 5)
    assert rows.schema.equals(PREDICTIONS)
    assert rows["label"].to_pylist() == ["a", "a", "b", "b", None]
    assert rows["cluster_class"].to_pylist() == ["a", "a", "b", "a", "b"]
    np.testing.assert_allclose(rows["confidence"].to_numpy(), 0.9, rtol=1e-6)


def test_predictions_come_in_the_order_of_their_keys() -> None:
    z = torch.nn.functional.normalize(torch.randn(30, 8))
    labels = torch.arange(30) % 2
    config = ClusteringConfig(num_clusters=2, pca_dim=4)
    model = recluster(z, torch.arange(30), labels, config=config, num_classes=2, seed=0).model
    logits, keys = torch.randn(30, 2), torch.arange(30).flip(0)
    found = gather_predictions(model, EncoderOutput(z, logits), keys, labels)
    for ordered, given in (
        (found.labels, labels),
        (found.embeddings, z),
        (found.probabilities, logits.softmax(dim=1)),
        (found.responsibilities, model.responsibilities(z)),
        (found.log_likelihood, model.log_likelihood(z)),
    ):
        np.testing.assert_allclose(ordered, given.flip(0).float().numpy(), rtol=1e-6)


def history(*epochs: tuple[float, float], num_slices: int = 100) -> list[dict[str, float]]:
    """Of (side, validation score), of so many slices of one class."""
    return [
        {
            "train/image_size": side,
            "validation/score": score,
            "validation/score_error": _standard_error(
                np.array([score * num_slices]), np.array([num_slices])
            ),
        }
        for side, score in epochs
    ]


def test_the_last_epoch_that_is_about_as_good_as_the_best_is_chosen() -> None:
    # The best one's error is sqrt(0.885 * 0.115 / 104) = 0.031.
    assert chosen_epoch(history((64, 0.5), (64, 0.9), (64, 0.87), (64, 0.7))) == 3
    assert chosen_epoch(history((64, 0.5), (64, 0.9), (64, 0.86), (64, 0.7))) == 2
    # Ten times as many slices tell the second from the third.
    many = history((64, 0.5), (64, 0.9), (64, 0.87), (64, 0.7), num_slices=1000)
    assert chosen_epoch(many) == 2
    # None of 40 slices is wrong: one of them does not make an epoch worse.
    assert chosen_epoch(history((64, 1.0), (64, 0.975), num_slices=40)) == 2
    assert chosen_epoch(history((64, 1.0), (64, 0.95), num_slices=40)) == 1


def test_a_rare_class_makes_the_score_less_certain() -> None:
    labels = np.repeat(np.arange(4), [100, 100, 100, 2])

    def metrics(num_wrong: int) -> dict[str, float]:
        """Where so many of the last slices are wrong."""
        probabilities = np.eye(4, dtype=np.float32)[labels]
        probabilities[len(labels) - num_wrong :] = [1, 0, 0, 0]
        nobody = np.zeros((len(labels), 4), np.float32)
        classes = np.arange(4)
        return validation_metrics(
            Predictions(labels, probabilities, nobody, classes, nobody[:, 0], nobody)
        )

    sure, less = metrics(0), metrics(1)
    assert sure["validation/score"] - less["validation/score"] == pytest.approx(0.125, abs=1e-3)
    assert less["validation/score_error"] > 0.06  # of 302 slices alone it were 0.005
    even = _standard_error(np.array([23, 22, 23, 24]), np.full(4, 25))
    assert even == pytest.approx(np.sqrt(0.9038 * 0.0962 / 104), abs=5e-4)  # as of 92 of 100


def test_reported_are_validation_metrics_of_the_best_under_the_newest_epoch() -> None:
    epochs = [
        metrics | {"epoch": number, "test/all/head/accuracy": 0.3, "train/loss/total": 1.0}
        for number, metrics in enumerate(history((64, 0.5), (64, 0.9), (64, 0.7)), start=1)
    ]
    assert reported_metrics(epochs) == {
        "epoch": 3,
        "validation/score": 0.9,
        "validation/score_error": epochs[1]["validation/score_error"],
    }


def test_an_epoch_with_smaller_slices_is_chosen_only_until_they_grow() -> None:
    growing = history((64, 0.9), (64, 0.95), (96, 0.8), (96, 0.7))
    assert chosen_epoch(growing[:2]) == 2
    assert chosen_epoch(growing) == 3


def test_the_choice_moves_to_the_newest_epoch_or_stays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        epochs = history(*((64, score) for score in rng.uniform(0.7, 1.0, 12)), num_slices=50)
        choices = [chosen_epoch(epochs[:count]) for count in range(1, 13)]
        for count in range(1, 12):
            assert choices[count] in (choices[count - 1], count + 1)


def test_without_a_labelled_slice_there_is_nothing_to_score() -> None:
    metrics = summarise(PREDICTIONS.empty_table(), None, CLASSES, num_resamples=10, seed=0)
    assert metrics == {"test/all/num_slices": 0.0}
