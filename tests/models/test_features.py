"""Feature encoders: torchvision's networks without their last layer, fed as trained."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from brainray.errors import ConfigError
from brainray.models.encoder import build_encoder, encoder_state
from brainray.models.features import FeatureEncoder, build_feature_encoder, num_features

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def build(name: str, weights: object = "random", seed: int = 0) -> FeatureEncoder:
    return build_feature_encoder(
        name,
        weights,  # type: ignore[arg-type]
        seed=seed,
        pixel_mean=0.2,
        pixel_std=0.3,
    )


@torch.no_grad()
def features(encoder: FeatureEncoder) -> Tensor:
    return encoder.eval()(IMAGES)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("pixels", 16, 256),
        ("resnet18", 32, 512),
        ("inception_v3", 75, 2048),
        ("mobilenet_v3_small", 32, 1024),
    ],
)
def test_the_last_layer_is_left_out(name: str, size: int, expected: int) -> None:
    assert num_features(build(name), size) == expected


def test_pixels_are_the_slice_itself() -> None:
    torch.testing.assert_close(features(build("pixels")), IMAGES.flatten(start_dim=1))


def test_random_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (features(build("resnet18", seed=s)) for s in (1, 1, 2))
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_colour_weights_see_what_torchvision_would_show_them() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    state = {key: value for key, value in network.state_dict().items() if "fc." not in key}
    network.fc = torch.nn.Identity()
    standardise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = network(standardise(IMAGES.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(features(build("resnet18", state)), expected, atol=1e-5, rtol=1e-4)


def test_a_grey_stem_gives_the_features_that_it_gives_in_training() -> None:
    encoder = build_encoder("resnet18", "random", num_classes=2).eval()
    with torch.no_grad():
        expected = encoder.backbone((IMAGES - 0.2) / 0.3)
    found = features(build("resnet18", encoder.backbone.state_dict()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_saved_of_a_trained_encoder_loads_into_training(tmp_path: Path) -> None:
    trained = build("resnet18", seed=3).standardised_by(0.2, 0.3)
    path = tmp_path / "encoder.pt"
    torch.save({"encoder": trained.grey_state()}, path)
    state = encoder_state(path.read_bytes(), str(path))
    encoder = build_encoder("resnet18", state, num_classes=2).eval()
    with torch.no_grad():
        found = encoder.backbone((IMAGES - 0.2) / 0.3)
    torch.testing.assert_close(found, features(trained), atol=1e-4, rtol=1e-4)
    again = build("resnet18", state)
    torch.testing.assert_close(features(again), features(trained), atol=1e-4, rtol=1e-4)


def test_weights_that_carry_a_version_beside_them_load_from_a_file() -> None:
    """MNASNet refuses a state dict that does not tell its version."""
    trained = build("mnasnet0_5", seed=3)
    state = {key.removeprefix("backbone."): value for key, value in trained.grey_state().items()}
    torch.testing.assert_close(features(build("mnasnet0_5", state)), features(trained))


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("resnet18", {}),
        ("inception_v3", {}),
        ("densenet121", {r"(denselayer\d+\.(norm|conv))(\d)\.": r"\1.\3."}),
        ("vit_b_32", {r"mlp\.0\.": "mlp.linear_1.", r"mlp\.3\.": "mlp.linear_2."}),
    ],
)
def test_weights_as_torchvisions_older_files_name_them_load(name: str, old: dict[str, str]) -> None:
    trained = build(name, seed=3)
    state = {key.removeprefix("backbone."): value for key, value in trained.grey_state().items()}
    state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    side = 224 if name == "vit_b_32" else 96
    for today, before in old.items():
        renamed = {re.sub(today, before, key): value for key, value in state.items()}
        assert renamed.keys() != state.keys()
        state = renamed
    images = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (
            each.standardised_by(0.2, 0.3)(images) for each in (trained, build(name, state))
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-3)  # the stem was divided by 3


def test_colours_are_standardised_as_torchvision_does_for_the_encoder() -> None:
    state = torchvision.models.efficientnet_v2_l().state_dict()
    assert build("efficientnet_v2_l", state).mean.tolist() == [0.5, 0.5, 0.5]


def test_an_unknown_encoder_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown encoder 'resnet19'.*resnet18"):
        build("resnet19")
    with pytest.raises(ConfigError, match="no linear last layer"):
        build("squeezenet1_0")


def test_weights_of_another_architecture_are_refused() -> None:
    state = torchvision.models.mobilenet_v3_small().state_dict()
    with pytest.raises(ConfigError, match="the weights do not fit encoder resnet18"):
        build("resnet18", state)


def test_slices_too_small_for_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not accept slices of 32 x 32 pixels"):
        num_features(build("inception_v3"), 32)


def test_the_statistics_of_the_data_take_the_place_of_those_of_the_network() -> None:
    class Network(torch.nn.Flatten):
        transform_input = True  # as Inception's, which expects ImageNet's scale

    network = Network()
    images = torch.rand(2, 1, 4, 4)
    found = FeatureEncoder(network, (0.4, 0.5, 0.6)).standardised_by(0.2, 0.5)(images)
    expected = ((images - 0.2) / 0.5).expand(-1, 3, -1, -1).flatten(1)
    torch.testing.assert_close(found, expected)
    assert not network.transform_input
