"""The encoder of METHOD A: a torchvision ResNet without its last layer, and a linear head."""

import io
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from brainray.errors import ConfigError
from brainray.models.small_maps import with_fast_small_maps

_ZIP = b"PK"  # beginning of what torch.save writes


class EncoderOutput(NamedTuple):
    """Output of a forward pass for B slices."""

    z: Tensor  # (B, E) float32, L2-normalised
    logits: Tensor  # (B, C) float32


class Encoder(nn.Module):
    """Maps slices (B, 1, H, W) to normalised embeddings z (B, E) and class logits (B, C).

    The head takes the pooled features, the clustering the L2-normalised ones. Normalising bounds
    the scale of z, which removes a trivial minimum of the clustering loss.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        network: Any = torchvision.models.get_model(name, weights=None)
        self.embedding_dim: int = network.fc.in_features
        stem = network.conv1
        network.conv1 = nn.Conv2d(
            1, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False
        )
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.fc = nn.Identity()
        self.backbone = with_fast_small_maps(network)
        self.head = nn.Linear(self.embedding_dim, num_classes)

    def forward(self, images: Tensor) -> EncoderOutput:
        features = self.backbone(images).float()
        # Autocast would compute the head in low precision without saving time.
        with torch.autocast(images.device.type, enabled=False):
            return EncoderOutput(z=F.normalize(features), logits=self.head(features))


def build_encoder(
    name: str,
    weights: Mapping[str, Tensor] | Literal["random"],
    num_classes: int,
    where: str = "the starting weights",
) -> Encoder:
    """Build an encoder with random weights or with those of a state dict.

    Weights for colour images become one-channel by summing the stem over its three channels, which
    is equivalent to feeding the grey slice to each. The head is always new.

    Args:
        name: a ResNet of torchvision.
        weights: ``random``, or a network's state dict.
        num_classes: outputs of the head.
        where: where the weights are from, for errors.

    Raises:
        ConfigError: the weights are for another architecture.
    """
    encoder = Encoder(name, num_classes)
    if weights == "random":
        return encoder
    state = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    stem = state.get("conv1.weight")
    if stem is not None and stem.shape[1] == 3:
        state["conv1.weight"] = stem.sum(dim=1, keepdim=True)
    try:
        encoder.backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:100]
        raise ConfigError(
            f"{where} does not fit encoder.name={name}: is it of another encoder? ({reason})"
        ) from None
    return encoder


def imagenet_state(name: str, setting: str) -> dict[str, Tensor]:
    """ImageNet weights of torchvision, downloaded if they are not in its cache.

    Raises:
        ConfigError: they cannot be downloaded or read; the message names the ``setting``.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (RuntimeError, UnpicklingError, EOFError) as error:
        # The hash is checked after a download, not when a file is read from the cache.
        reason = str(error).splitlines()[0][:100]
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        remedy = (
            f"delete {file}" if file.exists() else "try again, or give the path of a local file"
        )
        raise ConfigError(
            f"{setting}=imagenet: torchvision's weights of {name} are incomplete or altered "
            f"({reason}): {remedy}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{setting}=imagenet: torchvision cannot download the weights of {name} "
            f"({error}): connect to the internet or give the path of a local file"
        ) from None


def encoder_state(content: bytes, where: str) -> dict[str, Tensor]:
    """A torchvision state dict, or the encoder of a brainray checkpoint, from the bytes of a file;
    ``where`` names it in errors.

    Raises:
        ConfigError: the file is neither, or is damaged, or a weight is not finite.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on invalid files
        if content.startswith(_ZIP) and isinstance(error, RuntimeError):
            reason = str(error).splitlines()[0][:100]
            raise ConfigError(f"{where} is damaged ({reason}): copy it again") from None
        state = None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if isinstance(state, dict) and isinstance(state.get("encoder"), dict):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state["encoder"].items()
            if key.startswith("backbone.")
        }
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(
            f"{where} is neither a state dict of a torchvision encoder nor a brainray checkpoint: "
            "save one with torch.save(encoder.state_dict(), PATH)"
        )
    if not all(value.isfinite().all() for value in state.values()):
        raise ConfigError(f"{where} has NaN or infinite weights: start from others")
    return {key.removeprefix("module."): value for key, value in state.items()}  # of DDP
