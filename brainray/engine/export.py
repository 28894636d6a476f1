"""Export of checkpoints to ONNX and safetensors, for serving and for use without brainray."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainray.config import PreprocessConfig
from brainray.engine.state import Checkpoint, checkpoint_state, restore_checkpoint
from brainray.errors import CheckpointError

ONNX_OPSET = 18
TOLERANCE = 1e-4
"""Largest difference allowed in probabilities and responsibilities of an exported model."""


class NetOutput(NamedTuple):
    """Outputs for B slices."""

    probabilities: Tensor  # (B, C) float32 of the head
    responsibilities: Tensor  # (B, K) float32 of the mixture
    log_likelihood: Tensor  # (B,) float32 under the mixture; low for outliers


class SliceNet(nn.Module):
    """Maps preprocessed slices (B, 1, S, S), float32 grey values 0..255, to ``NetOutput``.

    One graph of encoder, head, PCA and mixture. S is the side used in training. The mixture is
    computed in float64, as in training.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.encoder = checkpoint.encoder
        self.clusters = checkpoint.clusters
        self.mean = 255 * checkpoint.scale.mean
        self.std = 255 * checkpoint.scale.std
        self.eval()

    def forward(self, images: Tensor) -> NetOutput:
        output = self.encoder((images - self.mean) / self.std)
        pca = self.clusters.pca
        coordinates = (output.z.double() - pca.mean_) @ pca.components_.T
        log_joint = self.clusters.gmm.log_joint(coordinates)
        return NetOutput(
            output.logits.softmax(dim=1),
            log_joint.softmax(dim=1).float(),
            log_joint.logsumexp(dim=1).float(),
        )


def onnx_bytes(checkpoint: Checkpoint) -> bytes:
    """``SliceNet`` as ONNX with opset ``ONNX_OPSET``.

    The input ``images`` takes any number of slices; outputs are named like the fields of
    ``NetOutput``; the metadata contain the ``classes`` as JSON.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    side = checkpoint.image_size
    # Two slices, because a batch size of one would be exported as a constant.
    example = torch.zeros(2, 1, side, side)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "model.onnx")
        program = torch.onnx.export(
            SliceNet(checkpoint).cpu(),
            (example,),
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=["images"],
            output_names=list(NetOutput._fields),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None, "without a path to write to, the program is returned"
        program.model.metadata_props["classes"] = json.dumps(checkpoint.classes)
        program.save(path, external_data=False)
        return path.read_bytes()


def run_onnx(content: bytes, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Outputs by name of an ONNX model for images (B, 1, S, S), from ONNX Runtime on the CPU.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime  # from an extra

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    outputs = session.run(list(NetOutput._fields), {"images": images})
    return dict(zip(NetOutput._fields, outputs, strict=True))


@torch.inference_mode()
def largest_difference(
    checkpoint: Checkpoint, content: bytes, images: NDArray[np.float32]
) -> float:
    """Largest difference in probabilities and responsibilities between the ONNX model and ours."""
    ours = SliceNet(checkpoint).cpu()(torch.from_numpy(images))
    theirs = run_onnx(content, images)
    names = ("probabilities", "responsibilities")
    differences = [np.abs(getattr(ours, name).numpy() - theirs[name]).max() for name in names]
    return float(np.max(differences))  # np.max propagates NaN, Python's max may not


def safetensors_bytes(checkpoint: Checkpoint, preprocess: PreprocessConfig) -> bytes:
    """All tensors of a checkpoint; the header contains everything else for prediction as JSON."""
    state = checkpoint_state(checkpoint)
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for module in ("encoder", "clusters"):
        for name, value in state.pop(module).items():
            if isinstance(value, Tensor):
                tensors[f"{module}.{name}"] = value.contiguous()
            else:
                extra[f"{module}.{name}"] = value
    about = {"checkpoint": state, "extra": extra, "preprocess": preprocess.model_dump(mode="json")}
    header = {key: json.dumps(value) for key, value in about.items()}
    return bytes(safetensors.torch.save(tensors, metadata=header))


def load_safetensors(path: Path) -> tuple[Checkpoint, PreprocessConfig]:
    """Load what ``safetensors_bytes`` saved.

    Raises:
        CheckpointError: the file is not an exported brainray model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {key: json.loads(header[key]) for key in ("checkpoint", "extra", "preprocess")}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not an exported brainray model: {error!r}") from None
    saved = about["checkpoint"]
    for name, value in [*tensors.items(), *about["extra"].items()]:
        module, _, key = name.partition(".")
        saved.setdefault(module, {})[key] = value
    checkpoint = restore_checkpoint(saved, str(path))
    return checkpoint, PreprocessConfig.model_validate(about["preprocess"], extra="ignore")
