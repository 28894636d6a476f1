"""The model card of an exported run: files, usage, training data, results, limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainray.report.results import results_markdown
from brainray.schema import Metrics


@dataclass(frozen=True)
class CardFacts:
    """What a card says about a model besides its metrics."""

    name: str
    classes: Sequence[str]
    encoder: str
    num_clusters: int
    image_size: int  # side of the slices that the encoder sees, in pixels
    epoch: int
    preprocessing: str  # in words
    has_fitted: bool  # whether training slices for comparison are included
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
    """Markdown; ``metrics`` are those that the run reports, empty for a checkpoint alone."""
    returned, warning = "and the cluster", ""
    if facts.has_fitted:
        returned = "the cluster, an outlier score and the most similar training slices"
        warning = "; `outlier_score` is near 1 for many such slices, not for all"
    sections = [
        f"# {facts.name}",
        "**For research only. This is not a medical device, and its output is not clinical "
        "advice.**",
        f"A {facts.encoder} trained on brain MRI slices, some or all of them labelled "
        f"(objective `{facts.objective}`, epoch {facts.epoch}), with a Gaussian mixture of "
        f"{facts.num_clusters} components over its embeddings. For a slice it returns the class "
        f"({', '.join(facts.classes)}; `probabilities` are in this order), {returned}.",
        "## Files",
        _files(facts),
        "## Use",
        _use(facts),
        "## Training data",
        ", ".join(f"{count:,} {role}" for role, count in facts.num_slices.items())
        or "not recorded: exported from a checkpoint without its run",
        "## Results",
        results_markdown(metrics, facts.classes)
        if metrics
        else "not recorded: the run reports another epoch, or the checkpoint has no run",
        "`clean` test slices have no near-duplicate among the slices that the run saw; `strict` "
        "ones have no mirrored or rotated copy there either, and no slice that is likely from the "
        "same subject. *all, at clean's class mix* is the accuracy on `all` if its classes were as "
        "frequent as among the `clean` slices: the rest of the difference between the two is due "
        "to copies, to which slices of a class are left, and to chance. Expect less than `all` on "
        "a new patient.",
        "## Limits",
        "Planes, scanners and contrasts that training did not include are outside of what the "
        f"model knows{warning}. `confidence` is not calibrated. Labels belong to slices, not to "
        "patients.",
        f"Made by brainray {facts.code}.",
    ]
    return _FRONT_MATTER + "\n\n".join(sections) + "\n"


def _files(facts: CardFacts) -> str:
    lines = [
        "- `model.safetensors`: all weights, PCA and mixture; the header holds settings as JSON",
        "- `mlflow/`: an MLflow pyfunc model that takes file paths or image bytes and preprocesses "
        "them",
    ]
    if facts.has_fitted:
        lines.append(
            "- `fitted.parquet`: embeddings of the training slices, for outlier scores and nearest "
            "slices (no pixels)"
        )
    if facts.opset is not None:
        lines.append(
            f"- `model.onnx`: opset {facts.opset}; input `images` (batch, 1, {facts.image_size}, "
            f"{facts.image_size}) float32, preprocessed grey values from 0 to 255; outputs "
            "`probabilities`, `responsibilities`, `log_likelihood`. Probabilities and "
            f"responsibilities differed from PyTorch's by at most {facts.difference:.1e} on the "
            "slices tried at export"
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
            f"Preprocessing, which `mlflow/` includes and `model.onnx` expects: "
            f"{facts.preprocessing}. The encoder computes in float32, PCA and mixture in "
            "float64; on hardware with bfloat16 `jobs/predict.py` uses it as training did, unless "
            "`train.precision=fp32` is set. In fp32 its results agree with those of these files to "
            "1e-4; in one example the rounding of bfloat16 changed probabilities by up to 1.8e-3.",
        ]
    )
