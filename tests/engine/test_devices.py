"""What a GPU would refuse, on an emulated one."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from brainray import dist
from brainray.config import (
    AugmentConfig,
    ClusteringConfig,
    ObjectiveConfig,
    PretextName,
    SelfSupervisionConfig,
    TrainConfig,
)
from brainray.engine.average import MovingAverage, measure_batch_statistics
from brainray.engine.epoch import (
    EpochData,
    embed,
    plan_epoch,
)
from brainray.engine.loop import train_epoch
from brainray.engine.recipe import build_objective, build_optimizer
from brainray.engine.recluster import recluster, recluster_with_check
from brainray.engine.self_supervised import (
    Groups,
    PretextEpoch,
    PretextSlices,
    build_pretext,
    plan_steps,
)
from brainray.engine.shard import CachedImages, Images, PixelScale, SliceShard, StreamedImages
from brainray.models.encoder import Encoder, EncoderOutput
from brainray.models.features import FeatureEncoder
from brainray.models.objective import StepSizes, Targets
from brainray.models.pretext import PretextModel
from tests.emulated_gpu import GPU, GpuTensor, emulated_gpu

SCALE = PixelScale(mean=0.5, std=0.25)
VIEWS = AugmentConfig(policy="strong", intensity_curve=0.2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def slices_on_gpu(num: int, *, streamed: bool = False) -> SliceShard:
    images: Images
    if streamed:
        images = StreamedImages(num, 64, GPU)
    else:
        images = CachedImages(torch.zeros(num, 1, 64, 64, dtype=torch.uint8, device=GPU))
    for row in range(num):
        images.put(row, torch.full((64, 64), 40 + 100 * (row % 2), dtype=torch.uint8).numpy())
    return SliceShard(images, torch.arange(num, device=GPU), (torch.arange(num) % 2).to(GPU))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x: x + torch.ones(2), r"aten::add: tensors \[\(2,\)\] are on the CPU"),
        (lambda x: torch.zeros(()).add_(x[0]), "of a tensor on the CPU"),
        (lambda x: torch.cat([x, torch.ones(2)]), "are on the CPU"),
        (lambda x: torch.ones(2)[x.long()], "a GPU's indices of the CPU's tensor"),
        (lambda x: torch.rand(2, generator=torch.Generator(), device=GPU), "a generator on cpu"),
        (lambda x: torch.ones(2, device="cuda"), "on cuda"),
        (lambda x: dist.sum_across_ranks(torch.ones(2)), "tensors of GPUs only"),
        (lambda x: dist.gather_rows(x > 0), "no bool"),
    ],
)
def test_the_emulated_gpu_refuses_what_a_gpu_does(
    work: Callable[[Tensor], Any], message: str
) -> None:
    with emulated_gpu(), pytest.raises(AssertionError, match=message):
        work(torch.zeros(2, device=GPU))
    assert torch.equal(torch.ones(2) + torch.ones(2), torch.full((2,), 2.0))  # all is as before


def test_values_leave_the_emulated_gpu_as_copies_only() -> None:
    with emulated_gpu():
        on_gpu = torch.ones(2).to(GPU)
        with pytest.raises(TypeError, match="no NumPy array"):
            on_gpu.numpy()
        on_host = on_gpu.cpu()
        on_gpu += 1
    assert on_host.numpy().tolist() == [1.0, 1.0]
    assert on_gpu.tolist() == [2.0, 2.0]


class SmallEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> EncoderOutput:
        z = self.layers(images).mean(dim=(2, 3))
        return EncoderOutput(z, self.head(z))


@pytest.mark.parametrize("name", get_args(ObjectiveConfig.model_fields["name"].annotation))
def test_an_epoch_keeps_to_its_device(name: str) -> None:
    objective = build_objective(ObjectiveConfig.model_validate({"name": name}))
    with emulated_gpu():
        encoder = SmallEncoder().to(GPU).to(memory_format=torch.channels_last)
        optimizer, scheduler = build_optimizer(encoder, TrainConfig(), total_steps=4)
        average = MovingAverage(encoder, 0.9)
        unlabelled = slices_on_gpu(16, streamed=True)
        train_epoch(
            encoder,
            optimizer,
            scheduler,
            EpochData(
                labelled=slices_on_gpu(8),
                unlabelled=unlabelled,
                objective=objective,
                targets=Targets(
                    responsibilities=torch.full((16, 2), 0.5, device=GPU),
                    pseudo_labels=torch.zeros(16, dtype=torch.int64, device=GPU),
                    confidences=torch.ones(16, device=GPU),
                    centers=torch.rand(2, 8, device=GPU),
                    class_of_cluster=torch.arange(2, device=GPU),
                    ramp=1.0,
                ),
                sizes=plan_epoch(objective, 8, 16, StepSizes(4, 4), num_ranks=1).sizes,
                num_steps=4,
                scale=SCALE,
                augmentation=VIEWS,
                augmentation_unlabelled=VIEWS,
                seed=0,
                side=32,  # while slices grow
                mixup_alpha=0.3,
            ),
            precision="fp32",
            on_update=lambda size: average.update(encoder, size),
        )
        measure = partial(measure_batch_statistics, augmentation=VIEWS)
        for work in (measure, embed):
            output = work(
                average.network,
                unlabelled.images,
                scale=SCALE,
                batch_size=8,
                precision="fp32",
                side=32,
            )
    assert output is not None
    assert isinstance(output.z, GpuTensor)
    assert torch.isfinite(output.z.on_host).all()


def test_an_encoder_keeps_to_its_device() -> None:
    encoder = Encoder("resnet18", num_classes=2)
    with emulated_gpu(), torch.no_grad():
        images = torch.rand(2, 1, 32, 32, device=GPU)
        output = encoder.to(GPU).to(memory_format=torch.channels_last)(images)
    assert isinstance(output.logits, GpuTensor)


@pytest.mark.parametrize(
    ("anchors", "covariance_type"),
    [("none", "diag"), ("none", "full"), ("labelled", "spherical"), ("labelled", "tied")],
)
def test_reclustering_keeps_to_its_device(anchors: str, covariance_type: str) -> None:
    config = ClusteringConfig.model_validate(
        {
            "num_clusters": 4,
            "pca_dim": 3,
            "anchors": anchors,
            "covariance_type": covariance_type,
        }
    )
    truth = torch.arange(90) % 3
    z = torch.nn.functional.normalize(torch.eye(8)[truth] + 0.2 * torch.rand(90, 8))
    labels = torch.where(torch.arange(90) < 60, truth, -1)
    with emulated_gpu():
        on_gpu = z.to(GPU), torch.arange(90, device=GPU), labels.to(GPU)
        first = recluster(*on_gpu, config=config, num_classes=3, seed=0)
        again = recluster_with_check(
            lambda reseed: recluster(
                *on_gpu,
                config=config,
                num_classes=3,
                seed=1,
                previous=None if reseed else first.model,
                previous_responsibilities=first.responsibilities,
            ),
            on_gpu[0],
            first.responsibilities,
            config,
            where="here",
            remedy="",
        )
    assert isinstance(again.reclustering.responsibilities, GpuTensor)


@pytest.mark.parametrize("name", get_args(PretextName))
def test_a_warm_up_keeps_to_its_device(name: PretextName) -> None:
    pretext = build_pretext(name, SelfSupervisionConfig(augment=VIEWS))
    network = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(), nn.Linear(8 * 8 * 8, 16))
    with emulated_gpu():
        model = PretextModel(FeatureEncoder(network), pretext.head(16)).to(GPU)
        optimizer, scheduler = build_optimizer(model, TrainConfig(), total_steps=4)
        slices = slices_on_gpu(16)
        result = train_epoch(
            model,
            optimizer,
            scheduler,
            PretextEpoch(
                PretextSlices(slices.images, slices.keys, Groups(torch.arange(16) // 2)),
                pretext,
                plan_steps(16, 4, num_ranks=1),
                seed=0,
            ),
            precision="fp32",
        )
    assert result.losses["total"] >= 0
