"""Builds the parts of training from the configuration."""

import math
import warnings

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from brainray.config import ObjectiveConfig, TrainConfig
from brainray.dist import sum_across_ranks
from brainray.models.consistency import Consistency
from brainray.models.objective import Objective, Term
from brainray.models.prototype import Prototype
from brainray.models.soft_kmeans import SoftKMeans

GROWTH_STEP = 32
"""Pixels by which the slice side grows between the stages of progressive resizing."""

PRECISION_BITS = {"bf16": 16, "fp32": 32}
"""Bits per multiplied number."""


def build_objective(config: ObjectiveConfig) -> Objective:
    """The configured objective."""
    consistency = Consistency(config.lambda_consistency)
    prototype = Prototype(config.lambda_cluster, config.temperature)
    terms: dict[str, tuple[Term, ...]] = {
        "joint": (SoftKMeans(config.lambda_cluster),),
        "supervised": (),
        "consistency": (consistency,),
        "prototype": (prototype,),
        "anchored": (consistency, prototype),
    }
    return Objective(terms[config.name])


def ramp(epoch: int, ramp_epochs: int) -> float:
    """exp(-5 (1 - t)^2) with t rising from 0 to 1 over ``ramp_epochs``; Laine & Aila 2017.

    ``epoch`` is 1-based.
    """
    progress = min((epoch - 1) / ramp_epochs, 1.0) if ramp_epochs else 1.0
    return math.exp(-5 * (1 - progress) ** 2)


def image_side(epoch: int, config: TrainConfig) -> int:
    """Side of the slices in pixels in an epoch (1-based).

    It grows in stages of equal length, as in Tan & Le 2021 (EfficientNetV2, progressive learning),
    but with the same augmentation throughout.
    """
    if epoch > config.growth_epochs:
        return config.image_size
    stages = range(config.start_image_size, config.image_size, GROWTH_STEP)
    return stages[(epoch - 1) * len(stages) // config.growth_epochs]


def build_optimizer(
    model: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[AdamW, OneCycleLR]:
    """AdamW without weight decay on biases and norms, and a one-cycle schedule (Smith 2018).

    AdamW's beta1 moves between 0.95 and 0.85, opposite to the learning rate.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=config.learning_rate, fused=True)
    length = max(total_steps, 1) + 1  # OneCycleLR rejects a step beyond its total
    if config.warmup_fraction * length == 1.0:
        length += 1  # else it would divide by zero, the length of the rise
    scheduler = OneCycleLR(
        optimizer,
        max_lr=config.learning_rate,
        total_steps=length,
        pct_start=config.warmup_fraction,
    )
    return optimizer, scheduler


def resume_schedule(scheduler: LRScheduler, num_steps: int) -> None:
    """Set the schedule to its state after ``num_steps``; the optimiser's state is loaded."""
    scheduler.last_epoch = num_steps - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        scheduler.step()


def agreed_precision(precision: str, device: torch.device) -> str:
    """`resolve_precision` agreed between all ranks: fp32 if any of them needs it."""
    resolved = resolve_precision(precision, device)
    num_fp32 = sum_across_ranks(torch.tensor(int(resolved == "fp32"), device=device))
    return "fp32" if num_fp32 > 0 else resolved


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto`` to bf16 if the hardware supports it natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    native = any(value for name, value in capabilities.items() if "bf16" in name)
    return "bf16" if native else "fp32"
