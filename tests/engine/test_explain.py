"""Activation maps: equal to the head's own weighting, and on the lesion where it is known."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from brainray.clustering.gmm import GaussianMixture
from brainray.config import Config
from brainray.engine.explain import class_activation_maps, on_pixels, rows_to_explain
from brainray.engine.forward import autocast
from brainray.engine.recipe import resolve_precision
from brainray.engine.recluster import ClusterModel
from brainray.engine.shard import PixelScale
from brainray.engine.state import Checkpoint
from brainray.models.encoder import Encoder
from brainray.mri.phantom import CLASSES, make_slice

CPU = torch.device("cpu")
SIZE = 128  # pixels


def checkpoint_of(encoder: Encoder, num_classes: int) -> Checkpoint:
    config = Config()
    clusters = ClusterModel(config.clustering, encoder.embedding_dim)
    assert isinstance(clusters.gmm, GaussianMixture)
    names = [f"class{number}" for number in range(num_classes)]
    return Checkpoint(config, names, PixelScale(0.3, 0.2), 1, encoder, clusters)


def test_a_map_is_activation_times_positive_gradient() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 3).eval()
    checkpoint = checkpoint_of(encoder, 3)
    images = torch.randint(0, 256, (6, 1, 64, 64), dtype=torch.uint8)  # more than go at once
    classes = torch.tensor([0, 1, 2, 1, 0, 2])
    maps = class_activation_maps(checkpoint, images, classes)
    kept: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    encoder.backbone.layer1.register_forward_hook(keep)
    logits = encoder(checkpoint.scale.standardise(checkpoint.scale.to_unit(images))).logits
    logits[torch.arange(6), classes].sum().backward()
    gradient = kept[0].grad
    assert gradient is not None
    grid = (gradient.clamp_min(0) * kept[0].detach()).sum(dim=1, keepdim=True)
    expected = gaussian_blur(on_pixels(grid, 64), [9, 9], [2.0, 2.0])[:, 0]
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("side", "num_cells"), [(64, 16), (128, 4), (100, 25), (30, 8)])
def test_a_cell_is_drawn_where_it_looks(side: int, num_cells: int) -> None:
    grid = torch.zeros(1, 1, num_cells, num_cells)
    grid[0, 0, 2, 1] = 1.0
    stride = -(-side // num_cells)
    peak = int(on_pixels(grid, side).argmax())
    assert divmod(peak, side) == (2 * stride, stride)


def test_samples_of_each_class_and_the_surest_errors_are_explained() -> None:
    labels = ["a"] * 8 + ["b"] * 2 + [None]
    head = ["a"] * 6 + ["b", "b", "b", "a", "a"]
    confidence = [0.5] * 6 + [0.6, 0.9, 0.5, 0.7, 1.0]
    table = pa.table({"label": labels, "head": head, "confidence": pa.array(confidence)})
    # Four of the six right a, from first to last; the right b; errors by confidence.
    assert rows_to_explain(table).tolist() == [0, 2, 3, 5, 8, 7, 9, 6]


def test_without_labels_a_sample_of_each_predicted_class_is_explained() -> None:
    table = pa.table(
        {
            "label": pa.nulls(3, pa.string()),
            "head": ["b", "a", "b"],
            "confidence": np.array([0.5, 0.6, 0.7]),
        }
    )
    assert rows_to_explain(table).tolist() == [1, 0, 2]


def _drawn(split: int, num_per_class: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Phantoms (N, 1, S, S) uint8, their labels (N,) and lesion masks (N, S, S)."""
    drawn = [
        (make_slice(name, np.random.default_rng([11, split, label, number]), SIZE), label)
        for label, name in enumerate(CLASSES)
        for number in range(num_per_class)
    ]
    images = torch.from_numpy(np.stack([phantom.image for phantom, _ in drawn]))[:, None]
    labels = torch.tensor([label for _, label in drawn])
    return images, labels, np.stack([phantom.lesion_mask for phantom, _ in drawn])


def _trained(images: Tensor, labels: Tensor, scale: PixelScale, num_steps: int) -> Encoder:
    """An encoder after so many steps of cross entropy on mirrored and shifted slices."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", len(CLASSES)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=num_steps, pct_start=0.2
    )
    for _ in range(num_steps):
        rows = torch.randint(len(labels), (32,))
        views = scale.standardise(scale.to_unit(images[rows]))
        mirrored = torch.rand(len(rows), 1, 1, 1) < 0.5
        views = torch.where(mirrored, views.flip(3), views)
        shift = torch.randint(-SIZE // 16, SIZE // 16 + 1, (2,)).tolist()
        views = views.roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)
        with autocast(CPU, resolve_precision("auto", CPU)):
            logits = encoder(views).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


@pytest.mark.slow
def test_the_peak_of_a_map_lies_in_the_lesion() -> None:
    scale = PixelScale(0.2, 0.2)
    images, labels, _ = _drawn(0, 240)
    encoder = _trained(images, labels, scale, num_steps=300)
    images, labels, lesions = _drawn(2, 75)
    checkpoint = replace(checkpoint_of(encoder, len(CLASSES)), scale=scale)
    with torch.inference_mode():
        predicted = encoder(scale.standardise(scale.to_unit(images))).logits.argmax(dim=1)
    right = (predicted == labels).numpy() & lesions.any(axis=(1, 2))
    assert right.sum() >= 150  # of 225 with a lesion
    maps = class_activation_maps(checkpoint, images[right], labels[right]).numpy()
    row, column = np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), SIZE)
    assert lesions[right][np.arange(len(maps)), row, column].mean() >= 0.8
