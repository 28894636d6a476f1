"""Fixtures that are slow to make are made once: a Ray cluster, phantom folders, a trained run."""

import errno
import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from brainray.config import Config
from brainray.config_text import load_config
from brainray.mri.phantom import write_phantoms

if TYPE_CHECKING:
    from brainray.orchestration.training.driver import TrainedRun
    from tests.ranks import OnRanks

# The checkout's sibling, or where the user says the real slices are.
REAL_DATA = Path(
    os.environ.get(
        "BRAINRAY_DATA", Path(__file__).parents[2] / "shared" / "data" / "brain-tumor-mri"
    )
)


def pytest_collection_finish() -> None:
    """Modules are never garbage: the collector need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training/ and Testing/ folders of 4 classes; one test slice is a copy of a training one."""
    folder = tmp_path_factory.mktemp("phantoms") / "source"
    write_phantoms(folder, num_training_per_class=14, num_testing_per_class=4, seed=3, size=64)
    original = sorted((folder / "Training" / "glioma").iterdir())[0]
    (folder / "Testing" / "glioma" / "copied.jpg").write_bytes(original.read_bytes())
    (folder / "Training" / "glioma" / "copied.jpg").write_bytes(original.read_bytes())
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of two CPUs for the whole session."""
    import ray

    from brainray.orchestration.ray_connection import attach_to_ray, init_ray

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    init_ray(num_cpus=2, num_gpus=0, object_store_memory=300_000_000)
    attach_to_ray()  # its settings of Ray Data
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def storage(phantoms: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the image store ``mri`` of the phantoms."""
    from brainray.orchestration.preprocessing.driver import preprocess

    folder = tmp_path_factory.mktemp("storage")
    preprocess(tiny_config(folder, "name=mri", f"source={phantoms}"))
    return folder


@pytest.fixture(scope="session")
def trained(storage: Path) -> "TrainedRun":
    """The run ``two-ranks`` in that storage: two DDP ranks, two epochs."""
    from brainray.orchestration.training.driver import train

    settings = ["name=two-ranks", "dataset=mri", "train.num_workers=2"]
    return train(tiny_config(storage, *settings))


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator["OnRanks"]:
    """Calls a function on two ranks of one group."""
    from tests.ranks import two_ranks

    with two_ranks(tmp_path_factory.mktemp("ranks")) as on_ranks:
        yield on_ranks


@pytest.fixture(scope="session", autouse=True)
def impatient_mlflow() -> None:
    """Servers that are away on purpose are given up at once."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real slices at {REAL_DATA}: set BRAINRAY_DATA to the data set's folder")
    return REAL_DATA


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, as at a terminal: what is started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT and some network mounts."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def logged(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines printed by this process since the last call, without those that Ray passes on."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if not re.match(r"\(.*pid=", line)]


def tiny_config(storage: Path, *overrides: str) -> Config:
    """A configuration with which phantoms are preprocessed and trained on in seconds."""
    settings = [
        f"storage={storage}",
        "preprocess.image_size=32",
        "preprocess.files_per_task=40",
        "split.labelled_fraction=0.5",
        "train.image_size=32",
        "train.num_epochs=2",
        "train.num_workers=1",
        "train.cpus_per_worker=1",
        "train.device=cpu",  # also where there is a GPU: two workers have no room on one
        "train.batch_size_per_worker=8",
        "train.labelled_batch_size_per_worker=8",
        "train.precision=fp32",
        "clustering.pca_dim=8",
        "evaluation.bootstrap_resamples=50",
        "evaluation.tsne_epochs=[1]",
        "tracking.uri=sqlite:///" + str(storage / "mlflow.db"),
    ]
    return load_config(None, [*settings, *overrides])
