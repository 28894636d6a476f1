"""`ray up` would accept cluster.yaml: checked offline with the functions that it calls itself."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT = Path(__file__).resolve().parent.parent

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def requirement(name: str) -> Requirement:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    return next(item for item in found if item.name == name)


def test_ray_accepts_the_file(config: Config) -> None:
    prepared = prepare_config(copy.deepcopy(config))  # fills in the provider's defaults
    validate_config(prepared)  # leaves the node_config to the provider

    assert prepared["max_workers"] == 12
    assert set(prepared["available_node_types"]) == {"head", "cpu_worker", "gpu_worker"}
    assert prepared["available_node_types"]["gpu_worker"]["min_workers"] == 0
    # Nothing of Ray's own example, which fetches a nightly build, has been merged in.
    assert prepared["setup_commands"] == []
    assert prepared["head_setup_commands"] == config["head_setup_commands"]


@pytest.mark.parametrize("role", ["head_image", "worker_image"])
def test_the_image_has_a_ray_and_a_python_that_the_project_takes(config: Config, role: str) -> None:
    match = re.fullmatch(
        r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(cpu|gpu)", config["docker"][role]
    )
    assert match is not None
    ray_version, python_minor, platform = match.groups()

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert requirement("ray").specifier.contains(Version(ray_version))
    assert Requirement(f"python{project['requires-python']}").specifier.contains(
        f"3.{python_minor}"
    )
    assert platform == {"head_image": "cpu", "worker_image": "gpu"}[role]


def test_both_images_hold_the_same_ray_and_python(config: Config) -> None:
    head, worker = config["docker"]["head_image"], config["docker"]["worker_image"]
    assert head.removesuffix("-cpu") == worker.removesuffix("-gpu")


def test_nothing_is_open_to_the_world(config: Config) -> None:
    for node_type in config["available_node_types"].values():
        # Without a group of its own, Ray makes one that lets anybody reach port 22.
        groups = node_type["node_config"]["SecurityGroupIds"]
        assert groups
        assert all(re.fullmatch("sg-[0-9a-f]{17}", group) for group in groups)
        assert node_type["node_config"]["IamInstanceProfile"]
    assert "security_group" not in config["provider"]
    assert any("--dashboard-host=127.0.0.1" in line for line in config["head_start_ray_commands"])
    assert "0.0.0.0" not in (PROJECT / "cluster.yaml").read_text(encoding="utf-8")
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def test_what_is_mounted_is_there(config: Config) -> None:
    mounted = [path for path in config["file_mounts"].values() if not path.startswith("~")]
    assert mounted
    assert [path for path in mounted if not (PROJECT / path).exists()] == []
