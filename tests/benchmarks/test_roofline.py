"""Work counted against the machine's peaks."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from brainray.benchmarks import roofline
from brainray.benchmarks.roofline import Peaks, Work, measured_peaks, training_work
from brainray.models.encoder import Encoder


class _Linear(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(images))


def test_the_slower_resource_bounds_the_time() -> None:
    peaks = Peaks(flops_per_s=100.0, bytes_per_s=10.0)
    assert peaks.seconds(Work(flops=200.0, num_bytes=10.0)) == 2.0
    assert peaks.limit(Work(flops=200.0, num_bytes=10.0)) == "arithmetic"
    assert peaks.seconds(Work(flops=200.0, num_bytes=50.0)) == 5.0
    assert peaks.limit(Work(flops=200.0, num_bytes=50.0)) == "memory"


def test_peaks_are_this_machines() -> None:
    peaks = measured_peaks(torch.float32, torch.device("cpu"))
    assert 1e9 < peaks.flops_per_s < 1e15
    assert 1e8 < peaks.bytes_per_s < 1e13


def test_a_product_counts_a_multiplication_and_an_addition_for_each_term_and_a_sum_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "_median_seconds", lambda *_: 0.5)
    peaks = measured_peaks(torch.float32, torch.device("cpu"))
    assert peaks == Peaks(flops_per_s=2 * 2048**3 / 0.5, bytes_per_s=256 * 2**20 / 0.5)


def test_a_layer_moves_its_input_and_output_once_forwards_and_twice_backwards() -> None:
    work = training_work(_Linear(), torch.ones(5, 4), bytes_per_number=2)
    assert work.num_bytes == (1 + 2) * 5 * (4 + 3) * 2


def test_a_step_is_counted_as_the_literature_counts_it() -> None:
    encoder = Encoder("resnet18", num_classes=4)
    images = torch.zeros(2, 1, 224, 224)
    work = training_work(encoder, images, bytes_per_number=2)
    # He et al. 2016, table 1: 1.8e9 multiply-adds for one colour image. The gradients cost twice
    # that, but for the images' own; one channel makes the first layer a third of its 118e6.
    multiply_adds = 1.814e9 - 2 / 3 * 118e6
    assert work.flops == pytest.approx(2 * 2 * (3 * multiply_adds - 118e6 / 3), rel=0.01)
    assert work.num_bytes > 3 * 2 * 2 * 112 * 112 * 64  # the first layer's output alone
    assert all(parameter.grad is None for parameter in encoder.parameters())
