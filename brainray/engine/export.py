"""A checkpoint for those who load it without brainray, or serve it: ONNX and safetensors."""

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
"""By how much an exported model's probabilities and responsibilities may differ from ours."""


class NetOutput(NamedTuple):
    """What is said of B slices."""

    probabilities: Tensor  # (B, C) float32 of the head
    responsibilities: Tensor  # (B, K) float32 of the mixture
    log_likelihood: Tensor  # (B,) float32 under the mixture; low means outlying


class SliceNet(nn.Module):
    """Preprocessed slices (B, 1, S, S) of grey values 0..255, float32, to ``NetOutput``.

    One graph of encoder, head, PCA and mixture; S is the side that the encoder was trained at.
    The mixture is computed in float64, as in training.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.encoder = checkpoint.encoder
        self.clusters = checkpoint.clusters
        self.mean = 255 * checkpoint.scale.mean
        self.std = 255 * checkpoint.scale.std
        self.eval()

    def forward(self, images: Tensor) -> NetOutput:
        features = self.encoder.backbone((images - self.mean) / self.std)
        probabilities = self.encoder.head(features).softmax(dim=1)
        z = nn.functional.normalize(features)
        pca = self.clusters.pca
        coordinates = (z.double() - pca.mean_) @ pca.components_.T
        log_joint = self.clusters.gmm.log_joint(coordinates)
        return NetOutput(
            probabilities, log_joint.softmax(dim=1).float(), log_joint.logsumexp(dim=1).float()
        )


def onnx_bytes(checkpoint: Checkpoint) -> bytes:
    """``SliceNet`` as ONNX of opset ``ONNX_OPSET``: input ``images`` with any number of slices,
    outputs named as the fields of ``NetOutput``; its metadata has the ``classes``, as JSON.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    side = checkpoint.image_size
    # Two slices: a batch of one would be taken for a constant.
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
    """Outputs by name of an ONNX model for images (B, 1, S, S), by ONNX Runtime on the CPU.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime  # of an extra

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    outputs = session.run(list(NetOutput._fields), {"images": images})
    return dict(zip(NetOutput._fields, outputs, strict=True))


@torch.inference_mode()
def largest_difference(
    checkpoint: Checkpoint, content: bytes, images: NDArray[np.float32]
) -> float:
    """Between the ONNX model's probabilities and responsibilities of images and our own."""
    ours = SliceNet(checkpoint).cpu()(torch.from_numpy(images))
    theirs = run_onnx(content, images)
    names = ("probabilities", "responsibilities")
    differences = [np.abs(getattr(ours, name).numpy() - theirs[name]).max() for name in names]
    return float(np.max(differences))  # NaN where one is, which Python's max may pass over


def safetensors_bytes(checkpoint: Checkpoint, preprocess: PreprocessConfig) -> bytes:
    """All of a checkpoint's tensors; in the header, as JSON, what else prediction needs."""
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
    """What ``safetensors_bytes`` was given.

    Raises:
        CheckpointError: the file is none of ours.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {key: json.loads(header[key]) for key in ("checkpoint", "extra", "preprocess")}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no exported model of brainray: {error!r}") from None
    saved = about["checkpoint"]
    for name, value in [*tensors.items(), *about["extra"].items()]:
        module, _, key = name.partition(".")
        saved.setdefault(module, {})[key] = value
    checkpoint = restore_checkpoint(saved, str(path))
    return checkpoint, PreprocessConfig.model_validate(about["preprocess"])
