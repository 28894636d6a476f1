"""What Ray Train needs, and what it leaves behind when it has trained."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray.train
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError
from torch.nn.parallel import DistributedDataParallel

from brainray import dist
from brainray.config import TrainConfig
from brainray.errors import (
    BrainrayError,
    ConfigError,
    DivergenceError,
    StorageError,
    UnreachableError,
)
from brainray.models.encoder import build_encoder
from brainray.orchestration.ray_connection import WITHOUT_PREEMPTION, init_ray
from brainray.orchestration.ray_train import (
    configure_ray_train,
    ddp_options,
    return_user_errors,
    run_trainer,
    train_on_workers,
    use_network_of_ray,
)
from brainray.orchestration.resources import WorkerResources
from brainray.storage import Folder
from tests.ranks import OnRanks


class Trainer:
    """Takes SIGINT for itself and keeps it, as Ray Train does."""

    def __init__(self, returned: dict[str, str]) -> None:
        self.returned = returned

    def fit(self) -> SimpleNamespace:
        def swallow(number: int, frame: FrameType | None) -> None:
            raise AssertionError("Ray Train has it still")

        signal.signal(signal.SIGINT, swallow)
        return SimpleNamespace(return_value=self.returned)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ({}, None),
        ({"error": "DivergenceError", "message": "all in one"}, DivergenceError),
        ({"error": "Unheard", "message": "of"}, BrainrayError),
    ],
)
def test_ctrl_c_interrupts_again_after_a_training(
    returned: dict[str, str], error: type[Exception] | None
) -> None:
    trainer: Any = Trainer(returned)
    if error is None:
        run_trainer(trainer)
    else:
        with pytest.raises(error, match=returned["message"]):
            run_trainer(trainer)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("chosen", "watches"), [(None, "0"), ("1", "1")])
def test_nodes_are_watched_for_where_they_may_be_taken_away(
    chosen: str | None, watches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only processes of a Ray that is started here inherit that there are none."""
    (name,) = WITHOUT_PREEMPTION
    monkeypatch.setenv(name, chosen or "")
    if chosen is None:
        monkeypatch.delenv(name)
    for other in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"):
        monkeypatch.setenv(other, "as the user says")
    inherited: dict[str, str] = {}
    monkeypatch.setattr(ray, "init", lambda **_: inherited.update(os.environ))
    before = dict(os.environ)
    init_ray()
    assert inherited[name] == watches
    configure_ray_train()
    assert dict(os.environ) == before


OTHER_RAY = """
import os
import ray
from ray.util.state import get_actor
from brainray.orchestration.ray_connection import WITHOUT_PREEMPTION, init_ray

@ray.remote(num_cpus=0)
class Actor:
    def state(self):
        return get_actor(ray.get_runtime_context().get_actor_id(), timeout=20).state
    def inherited(self):
        return {name: os.environ.get(name) for name in WITHOUT_PREEMPTION}

init_ray(num_cpus=1, object_store_memory=80_000_000)
actor = Actor.remote()
print(ray.get(actor.state.remote()), ray.get(actor.inherited.remote()) == WITHOUT_PREEMPTION)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_actors_find_their_own_ray_beside_another() -> None:
    """As Ray Train's actor does that frees the CPUs of a training whose controller is gone."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    finished = subprocess.run(
        [sys.executable, "-c", OTHER_RAY], env=environment, capture_output=True, text=True
    )
    assert finished.stdout.split() == ["ALIVE", "True"], finished.stderr


@pytest.mark.parametrize(
    ("address", "chosen", "expected"),
    [
        ("10.0.0.5", None, "eth0"),
        ("127.0.0.1", None, "lo"),
        ("10.0.0.5", "ib0", "ib0"),
        ("203.0.113.9", None, None),  # the address outside of a translated network
    ],
)
def test_ranks_meet_on_the_network_of_ray_unless_the_user_names_another(
    address: str, chosen: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interfaces = {"lo": ["127.0.0.1", "::1"], "eth0": ["02:42:0a:00:00:05", "10.0.0.5"]}
    found = {
        name: [SimpleNamespace(address=each) for each in addresses]
        for name, addresses in interfaces.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen or "")
    if chosen is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_network_of_ray()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


@pytest.mark.usefixtures("ray_cluster")
def test_workers_know_the_network_of_ray_when_they_train(tmp_path: Path) -> None:
    @return_user_errors
    def work(settings: dict[str, Any]) -> None:
        raise ConfigError(os.environ.get("GLOO_SOCKET_IFNAME", "none"))

    workers = WorkerResources(2, 1, gpus_per_worker=0, room=2)
    with pytest.raises(ConfigError) as told:
        train_on_workers(work, {}, folder=Folder(tmp_path), workers=workers, config=TrainConfig())
    addresses = [each.address for each in psutil.net_if_addrs()[str(told.value)]]
    assert ray.util.get_node_ip_address() in addresses


def weights_of_two_steps(is_wrapped_again: bool) -> torch.Tensor:
    """Of DDP; the model is wrapped again between the steps, as in a process that goes on."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", "random", 3)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    model = DistributedDataParallel(encoder, **ddp_options(torch.device("cpu")))
    images = torch.randn(2, 4, 1, 32, 32, generator=torch.Generator().manual_seed(dist.rank()))
    for step in range(2):
        if step and is_wrapped_again:
            model = DistributedDataParallel(encoder, **ddp_options(torch.device("cpu")))
        optimizer.zero_grad()
        model(images[step]).logits.square().mean().backward()
        optimizer.step()
    return torch.cat([part.detach().flatten() for part in encoder.parameters()])


def ends_alike() -> bool:
    return torch.equal(weights_of_two_steps(False), weights_of_two_steps(True))


def test_gpus_need_not_look_for_unused_parameters() -> None:
    shared = {"forward_sync_buffers": False}
    assert ddp_options(torch.device("cuda")) == shared | {"find_unused_parameters": False}
    assert ddp_options(torch.device("cpu")) == shared | {"find_unused_parameters": True}


@pytest.mark.slow
def test_three_ranks_that_go_on_end_with_the_weights_of_undisturbed_ones() -> None:
    assert dist.run_on_ranks(ends_alike, 3) == [True] * 3


def error_of_this_rank() -> tuple[str, str]:
    try:
        with dist.raise_on_all_ranks(torch.device("cpu")):
            if dist.rank() == 1:
                raise StorageError('no room for "model.pt"\non /mnt')
    except BrainrayError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_one_rank_is_what_it_is_on_every_rank(on_two_ranks: OnRanks) -> None:
    found = on_two_ranks(error_of_this_rank)
    assert found == [("StorageError", 'no room for "model.pt"\non /mnt')] * 2


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("ValueError: ProcessGroupNCCL is only supported with GPUs, no GPUs found!", "the driver"),
        ("The NVIDIA driver on your system is too old (found version 11020)", "update it"),
        ("CUDA error: no kernel image is available for execution on the device", "CUDA 12.6"),
        (
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.0 GiB",
            "batch_size_per_worker",
        ),
    ],
)
def test_gpu_errors_from_settings_and_installation_name_their_remedy(
    words: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        run_trainer(_failing_trainer(words))


def test_a_worker_that_died_for_another_reason_is_no_error_of_the_user() -> None:
    with pytest.raises(ray.train.TrainingFailedError, match="a worker died"):
        run_trainer(_failing_trainer("a worker died"))


def test_storage_that_is_away_is_tried_again_and_then_named() -> None:
    """A worker raises what a restart may mend; other errors it returns."""

    def work(settings: dict[str, Any]) -> None:
        raise settings["error"]

    away, full = UnreachableError("s3://b cannot be reached"), StorageError("no space left")
    assert return_user_errors(work)({"error": full})["message"] == "no space left"
    with pytest.raises(UnreachableError):
        return_user_errors(work)({"error": away})
    failure = WorkerGroupError("a traceback", {1: UserExceptionWithTraceback(away, "a traceback")})
    trainer: Any = SimpleNamespace(fit=Mock(side_effect=failure))
    with pytest.raises(UnreachableError, match="cannot be reached"):
        run_trainer(trainer)


def _failing_trainer(words: str) -> Any:
    return SimpleNamespace(fit=Mock(side_effect=ray.train.TrainingFailedError(words)))
