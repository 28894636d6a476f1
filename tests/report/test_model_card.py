"""A model card says what is in the export and how it was made."""

from dataclasses import replace

from brainray.report.model_card import CardFacts, model_card

FACTS = CardFacts(
    name="mine",
    classes=["glioma", "notumor"],
    encoder="resnet18",
    num_clusters=5,
    image_size=128,
    epoch=7,
    preprocessing="grayscale",
    has_fitted=True,
    num_slices={"labelled": 1200, "unlabelled": 4800},
    objective="joint",
    code="1.0 (abc)",
    opset=18,
    difference=1.5e-6,
)


def test_a_card_names_the_model_its_files_and_its_results() -> None:
    card = model_card(FACTS, {"test/all/head/accuracy": 0.875})
    assert "objective `joint`, epoch 7), with a Gaussian mixture of 5 components" in card
    assert "(glioma, notumor; `probabilities` are in this order)" in card
    assert "opset 18; input `images` (batch, 1, 128, 128)" in card
    assert "by at most 1.5e-06" in card
    assert "- `fitted.parquet`" in card
    assert "1,200 labelled, 4,800 unlabelled" in card
    assert "0.875" in card
    assert "not recorded" not in card


def test_a_card_names_no_file_and_no_result_that_there_is_not() -> None:
    alone = replace(FACTS, has_fitted=False, opset=None, difference=None, num_slices={})
    card = model_card(alone, {})
    for absent in ("fitted.parquet", "outlier_score", "outlier score", "most similar"):
        assert absent in model_card(FACTS, {})
        assert absent not in card
    assert "model.onnx`:" not in card
    assert "not recorded: exported from a checkpoint without its run" in card
    assert "not recorded: the run reports another epoch, or the checkpoint has no run" in card
    assert "Accuracy on test slices" not in card
