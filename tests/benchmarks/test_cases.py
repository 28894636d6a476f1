"""Every case that the help names can be run, and none is forgotten."""

import inspect
import pkgutil
from importlib import import_module

import pytest

from brainray import benchmarks
from brainray.benchmarks.cases import CASES, OVERRIDDEN, QUICK_SETTINGS, READS_CONFIG, READS_SOURCE
from brainray.benchmarks.runner import load_case
from brainray.config_text import known_keys


def test_every_case_is_a_module_that_can_be_run() -> None:
    assert all(callable(load_case(name)) for name in CASES)


@pytest.mark.parametrize(
    ("option", "readers"), [("config", READS_CONFIG), ("source", READS_SOURCE)]
)
def test_the_cases_that_read_an_option_are_known(option: str, readers: set[str]) -> None:
    source_by_case = {
        name: inspect.getsource(import_module(f"brainray.benchmarks.{name}")) for name in CASES
    }
    assert {name for name, code in source_by_case.items() if f"options.{option}" in code} == readers


def test_only_settings_that_there_are_can_be_overridden() -> None:
    for overridden in (OVERRIDDEN, QUICK_SETTINGS):
        assert set(overridden) <= READS_CONFIG
        assert {key for keys in overridden.values() for key in keys} <= set(known_keys())


def test_a_module_that_is_no_case_is_one_that_cases_share() -> None:
    modules = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    shared = {"cases", "own_nodes", "result", "roofline", "runner", "samples", "timing"}
    assert modules - set(CASES) == shared
