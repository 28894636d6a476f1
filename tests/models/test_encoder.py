"""Encoders: shapes, normalised z, and weights from files."""

import io
import math
from pathlib import Path

import pytest
import torch
import torchvision

from brainray.errors import ConfigError
from brainray.models.encoder import Encoder, build_encoder, encoder_state, imagenet_state


def read(path: Path) -> dict[str, torch.Tensor]:
    return encoder_state(path.read_bytes(), str(path))


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet50", 2048)])
def test_shapes_and_unit_length(name: str, dim: int) -> None:
    encoder = Encoder(name, num_classes=4).eval()
    output = encoder(torch.randn(2, 1, 64, 64))
    assert encoder.embedding_dim == dim
    assert output.z.shape == (2, dim)
    assert output.logits.shape == (2, 4)
    torch.testing.assert_close(output.z.norm(dim=1), torch.ones(2))


def test_the_head_takes_the_pooled_features_in_full_precision() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=4).eval()
    images = torch.randn(2, 1, 32, 32)
    expected = encoder.head(encoder.backbone(images))
    torch.testing.assert_close(encoder(images).logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = encoder(images)
    assert coarse.z.dtype == coarse.logits.dtype == torch.float32


def test_colour_weights_see_a_grey_slice_as_three_equal_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    colour = torchvision.models.resnet18(weights=None).eval()
    torch.save(colour.state_dict(), tmp_path / "weights.pt")
    encoder = build_encoder("resnet18", read(tmp_path / "weights.pt"), num_classes=4).eval()
    images = torch.randn(2, 1, 64, 64)
    colour.fc = torch.nn.Identity()
    expected = torch.nn.functional.normalize(colour(images.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(encoder(images).z, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_starts_an_encoder_with_a_new_head(tmp_path: Path) -> None:
    trained = Encoder("resnet18", num_classes=4)
    torch.save({"encoder": trained.state_dict()}, tmp_path / "model.pt")
    encoder = build_encoder("resnet18", read(tmp_path / "model.pt"), num_classes=3)
    found, expected = encoder.backbone.state_dict(), trained.backbone.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert encoder.head.weight.shape == (3, 512)


def test_imagenet_weights_are_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its cache, where it has downloaded them before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), cache / name)
    images = torch.randn(2, 1, 64, 64)
    found, expected = (
        build_encoder("resnet18", state, num_classes=4).eval()(images).z
        for state in (imagenet_state("resnet18", "encoder.weights"), read(cache / name))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("content", [b"", b"<html>log in first</html>", None])
def test_imagenet_weights_that_arrive_or_lie_damaged_are_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    if content is None:  # half a file
        buffer = io.BytesIO()
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), buffer)
        content = buffer.getvalue()[: buffer.tell() // 2]
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    file = tmp_path / weights.url.rpartition("/")[2]
    file.write_bytes(content)
    monkeypatch.setattr(weights.value, "url", file.as_uri())
    with pytest.raises(ConfigError, match=r"encoder\.weights=imagenet: .*invalid hash.*try again"):
        imagenet_state("resnet18", "encoder.weights")
    cached = tmp_path / "cache" / "hub" / "checkpoints" / file.name
    assert not cached.exists()
    cached.write_bytes(content)  # as an interrupted copy leaves it
    with pytest.raises(ConfigError, match=rf"incomplete or altered .*: delete {cached}"):
        imagenet_state("resnet18", "encoder.weights")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(ConfigError, match=r"^a\.pt does not fit encoder\.name=resnet18: is it of"):
        build_encoder("resnet18", read(path), num_classes=4, where="a.pt")
    path.write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="is neither a state dict of a torchvision encoder nor"):
        read(path)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.bn1.running_var"][3] = value
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a\.pt has NaN or infinite weights"):
        read(tmp_path / "a.pt")


def test_weights_are_found_as_others_publish_them(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    weights = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    assert read(path).keys() == weights.keys()


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'boom')!r}, 'w')",)

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ConfigError, match="is neither a state dict of a torchvision encoder nor"):
        read(tmp_path / "bomb.pt")
    assert not (tmp_path / "boom").exists()


def test_a_truncated_file_of_weights_is_told_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(build_encoder("resnet18", "random", 2).backbone.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match=r"cut\.pt is damaged \(.*\): copy it"):
        read(path)
