"""Feature encoders of a study: raw pixels, or a torchvision network without its last layer."""

import difflib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, cast

import torch
import torchvision
from torch import Tensor, nn

from brainray.errors import ConfigError
from brainray.models.small_maps import with_fast_small_maps

PIXELS = "pixels"

_NUM_IMAGENET_CLASSES = 1000
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
_OPTIONS = {"inception_v3": _WITHOUT_AUXILIARY, "googlenet": _WITHOUT_AUXILIARY}
_DOT_IN_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


class FeatureEncoder(nn.Module):
    """Maps slices (B, 1, H, W) float in [0, 1] to features (B, E) float32.

    The network gets a slice as three equal channels, standardised as its weights expect.
    """

    mean: Tensor  # (3,)
    std: Tensor  # (3,)

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        """
        Args:
            backbone: maps (B, 3, H, W) to (B, E).
            mean: of the intensities in [0, 1], one per channel or one for all.
            std: standard deviation of the intensities, like ``mean``.
        """
        super().__init__()
        self.backbone = backbone
        for name, values in (("mean", mean), ("std", std)):
            channels = torch.tensor(values, dtype=torch.float32).expand(3).clone()
            self.register_buffer(name, channels, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        coloured = (images - self.mean[:, None, None]) / self.std[:, None, None]
        features: Tensor = self.backbone(coloured.contiguous(memory_format=torch.channels_last))
        return features.float()

    def standardised_by(self, pixel_mean: float, pixel_std: float) -> Self:
        """Standardise with the data set's statistics, as for all encoders trained by brainray, so
        that the weights can be saved with a one-channel stem; returns self.
        """
        self.mean.fill_(pixel_mean)
        self.std.fill_(pixel_std)
        if hasattr(self.backbone, "transform_input"):
            cast(Any, self.backbone).transform_input = False
        return self

    def grey_state(self) -> dict[str, Tensor]:
        """The weights with a one-channel stem, named like the encoder in a brainray checkpoint.

        On equal channels a stem is equivalent to the sum over its channels, so the features stay
        the same if all channels are standardised alike.
        """
        stem = next(
            name
            for name, weight in self.backbone.named_parameters()
            if weight.ndim == 4 and weight.shape[1] == 3
        )
        return {
            f"backbone.{name}": value.sum(dim=1, keepdim=True) if name == stem else value
            for name, value in self.backbone.state_dict().items()
        }


class _Pixels(nn.Module):
    """The flattened slice, from one of the three equal channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0].flatten(start_dim=1)


def build_feature_encoder(
    name: str,
    weights: Mapping[str, Tensor] | Literal["random"],
    *,
    seed: int,
    pixel_mean: float,
    pixel_std: float,
) -> FeatureEncoder:
    """Build ``pixels`` or a torchvision classifier without its last layer, in evaluation mode.

    Auxiliary heads (Inception, GoogLeNet) are left out. With ImageNet weights, and any local
    weights with a stem for colour images, inputs are as in their training: three equal channels
    standardised as torchvision does for its ImageNet weights. With random and one-channel weights
    (from a brainray run) the data set's statistics are used. A one-channel stem is distributed over
    three channels, which gives the same features.

    Args:
        name: as in ``torchvision.models.list_models()``.
        weights: ``random`` or a network's state dict.
        seed: of random weights; the global random state is not changed.
        pixel_mean: mean of the training slices' intensities, in units of [0, 1].
        pixel_std: their standard deviation, in the same units.

    Raises:
        ConfigError: the encoder is unknown, or the weights do not fit it.
    """
    if name == PIXELS:
        return FeatureEncoder(_Pixels()).eval()
    check_encoder_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs as well
        network = torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {}))
    last = _remove_last_layer(network, name)
    with_fast_small_maps(network)
    scale: tuple[Sequence[float], Sequence[float]] = ((pixel_mean,), (pixel_std,))
    if weights != "random":
        expected = network.state_dict()
        state = {
            key: value
            for key, value in _as_named_today(weights).items()
            if not key.startswith((*_AUXILIARY, f"{last}."))
        }
        state, was_grey = _with_colour_stem(state, expected)
        if not was_grey:
            trained = torchvision.models.get_model_weights(name).DEFAULT.transforms()
            scale = (trained.mean, trained.std)
            if hasattr(network, "transform_input"):  # converts ImageNet's scale to its own
                network.transform_input = True
        versioned: Any = OrderedDict(state)
        # MNASNet reads its version from the metadata, which a plain dict does not keep. That of
        # layers is left unknown, so that those that have changed read older files, too.
        versioned._metadata = {"": getattr(expected, "_metadata", {}).get("", {})}
        try:
            network.load_state_dict(versioned)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()[:300]
            raise ConfigError(f"the weights do not fit encoder {name}: {reason}") from None
    return FeatureEncoder(network, *scale).eval()


def check_encoder_name(name: str) -> None:
    """Raise ConfigError, with similar names, unless ``name`` is pixels or in torchvision."""
    known = [PIXELS, *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "such as resnet18 or inception_v3"
        raise ConfigError(
            f"unknown encoder {name!r}: use pixels or a torchvision classifier ({hint})"
        )


@torch.inference_mode()
def num_features(encoder: FeatureEncoder, image_size: int) -> int:
    """Number of features E, determined by encoding a black slice.

    Raises:
        ConfigError: the network does not accept slices of that size.
    """
    try:
        return int(encoder.eval()(torch.zeros(1, 1, image_size, image_size)).shape[1])
    except (RuntimeError, AssertionError) as error:  # shape checks of torch
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the encoder does not accept slices of {image_size} x {image_size} pixels ({reason}): "
            "change the feature's image_size (at least 75 for inception_v3, only 224 for vit_b_16)"
        ) from None


def _remove_last_layer(network: nn.Module, name: str) -> str:
    """Replace the layer with the class logits by the identity; return its dotted name."""
    layers = [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == _NUM_IMAGENET_CLASSES
    ]
    if not layers:
        raise ConfigError(
            f"encoder {name} has no linear last layer that can be removed: choose another one, "
            "such as resnet18 or inception_v3"
        )
    parent, _, leaf = layers[-1].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return layers[-1]


def _as_named_today(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as torchvision would save it today: the DenseNets that it offers have a dot more,
    which it removes when it downloads them.
    """
    return {_DOT_IN_DENSENET.sub(r"\1", key): value for key, value in weights.items()}


def _with_colour_stem(
    state: dict[str, Tensor], wanted: dict[str, Tensor]
) -> tuple[dict[str, Tensor], bool]:
    """The state with a three-channel stem, and whether its stem had one channel."""
    for key, value in state.items():
        target = wanted.get(key)
        if target is None or target.ndim != 4 or target.shape[1] != 3:
            continue
        if value.ndim == 4 and value.shape[1] == 1:
            return state | {key: value.expand(-1, 3, -1, -1) / 3}, True
    return state, False
