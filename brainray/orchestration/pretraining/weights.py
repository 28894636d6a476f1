"""Encoders before they are trained or applied, and their weights, wherever these come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from brainray import layout
from brainray.config import RUN_PREFIX, Config, FeatureConfig
from brainray.errors import ConfigError
from brainray.models.encoder import encoder_state, imagenet_state
from brainray.mri.identity import content_hash
from brainray.orchestration.run import open_run
from brainray.storage import Folder

State = Mapping[str, Tensor] | Literal["random"]


@dataclass(frozen=True)
class Weights:
    """Starting weights of an encoder, and an identity that distinguishes them from others."""

    identity: str
    load: Callable[[], State]

    @cached_property
    def state(self) -> State:
        """Loaded (ImageNet: downloaded) on first use, on the driver's node."""
        return self.load()


@dataclass(frozen=True)
class EncoderStart:
    """An encoder before it is trained on, or applied to, the slices of a store.

    It stays on the driver, whose node can load the weights; workers get ``weights.state``.
    """

    feature: FeatureConfig
    """Encoder and size of the slices; for training also the pretext and the weight of the
    clustering loss."""
    weights: Weights
    """Weights of the encoder: those of ``feature.weights``, or what training has made of them."""
    seed: int
    """Of weights that are drawn; in training also of views and clusters."""


def read_weights(config: Config, feature: FeatureConfig, setting: str) -> Weights:
    """The weights that a feature's config gives, read on the driver's node.

    Raises:
        BrainrayError: no such file or run, or no state dict in it; the message names ``setting``.
    """
    if feature.weights == "random":
        return Weights("random", lambda: "random")
    if feature.weights == "imagenet":
        return Weights("imagenet", lambda: imagenet_state(feature.encoder, setting))
    name = feature.weights.removeprefix(RUN_PREFIX)
    if name != feature.weights:
        folder = open_run(Folder(config.storage), name).folder / layout.BEST
        return weights_from(folder, layout.MODEL)
    path = Path(feature.weights)
    if "://" in feature.weights:
        raise ConfigError(
            f"{setting}={feature.weights}: give a path on the node of the job, where the file must "
            "be copied first"
        )
    if not path.is_file():
        raise ConfigError(f"{setting}={path}: no such file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}={path} cannot be read: {error.strerror}") from None
    return _weights_of(content, f"{setting}={path}")


def weights_from(folder: Folder, name: str) -> Weights:
    """The weights of a checkpoint in a folder, which may be remote."""
    return _weights_of(folder.read_bytes(name), f"{folder}/{name}")


def _weights_of(content: bytes, where: str) -> Weights:
    state = encoder_state(content, where)
    return Weights(content_hash(content), lambda: state)
