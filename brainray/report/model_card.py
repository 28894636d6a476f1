"""The model card of an exported run: what it is, how to use it, how good it was, what it is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainray.report.cells import Metrics
from brainray.report.results import results_markdown


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of a model beside its figures."""

    name: str
    classes: Sequence[str]
    encoder: str
    num_clusters: int
    image_size: int  # side of the slices that the encoder sees, in pixels
    epoch: int
    preprocessing: str  # in words
    has_fitted: bool  # whether the training slices that others are compared with are there
    num_slices: Mapping[str, int]  # of training, by role
    objective: str
    code: str  # version and hash
    opset: int | None  # None where there is no ONNX file
    difference: float | None  # of the ONNX model from ours


_FRONT_MATTER = """---
library_name: brainray
pipeline_tag: image-classification
tags: [brain-mri, deep-clustering, semi-supervised, research-only]
---
"""


def model_card(facts: CardFacts, metrics: Metrics) -> str:
    """Markdown; ``metrics`` are the run's reported figures, or none for a lone checkpoint."""
    sections = [
        f"# {facts.name}",
        "**For research only. This is not a medical device, and nothing it says is clinical "
        "advice.**",
        f"A {facts.encoder} that was trained on brain MRI slices, some or all of them labelled "
        f"(objective `{facts.objective}`), after epoch {facts.epoch}, with a Gaussian mixture of "
        f"{facts.num_clusters} components over its embeddings. It tells a slice's class "
        f"({', '.join(facts.classes)}), how sure it is, the cluster that the slice belongs to, how "
        "unusual it is, and which training slices are most like it.",
        "## Files",
        _files(facts),
        "## Use",
        _use(facts),
        "## Training data",
        ", ".join(f"{count:,} {role}" for role, count in facts.num_slices.items())
        or "not recorded: exported from a checkpoint without its run",
        "## Figures",
        results_markdown(metrics, facts.classes)
        if metrics
        else "not recorded: the run reports those of another epoch, or the checkpoint has no run",
        "`clean` are the test slices without a near-duplicate among anything that the run saw; "
        "`all` overstates what a slice of a new patient would give.",
        "## Limits",
        "Slices of one plane, scanner or contrast that training did not hold are outside of what "
        "the model knows; `outlier_score` near 1 says so for many of them, not for all. "
        "`confidence` is not calibrated. Slices carry a label each; patients do not.",
        f"Made by brainray {facts.code}.",
    ]
    return _FRONT_MATTER + "\n\n".join(sections) + "\n"


def _files(facts: CardFacts) -> str:
    lines = [
        "- `model.safetensors`: all weights, PCA and mixture; the header holds settings as JSON",
        "- `mlflow/`: an MLflow pyfunc model that takes file paths or image bytes and does all of "
        "the preprocessing",
    ]
    if facts.has_fitted:
        lines.append(
            "- `fitted.parquet`: the training slices that new ones are compared with (no pixels)"
        )
    if facts.opset is not None:
        lines.append(
            f"- `model.onnx`: opset {facts.opset}; input `images` (batch, 1, {facts.image_size}, "
            f"{facts.image_size}) float32 of grey values 0 to 255, preprocessed; outputs "
            "`probabilities`, `responsibilities`, `log_likelihood`. Its probabilities and "
            f"responsibilities differ from ours by at most {facts.difference:.1e} on slices tried "
            "at export"
        )
    return "\n".join(lines)


def _use(facts: CardFacts) -> str:
    return "\n".join(
        [
            "```console",
            "$ mlflow models serve -m mlflow --env-manager local --port 5001",
            "$ curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' \\",
            """    -d @<(echo '{"dataframe_records": [{"image": "'$(base64 < scan.jpg | """
            """tr -d '\\n')'"}]}')""",
            "```",
            "",
            f"Preprocessing, which `mlflow/` does by itself and `model.onnx` expects: "
            f"{facts.preprocessing}. The encoder computes in float32, PCA and mixture in "
            "float64; on hardware with bfloat16 `jobs/predict.py` rounds as training did, unless "
            "`train.precision=fp32`.",
        ]
    )
