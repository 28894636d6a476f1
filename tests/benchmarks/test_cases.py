"""Every case that the help names can be run, and none is forgotten."""

import pkgutil

from brainray import benchmarks
from brainray.benchmarks.cases import CASES
from brainray.benchmarks.runner import load_case


def test_every_case_is_a_module_that_can_be_run() -> None:
    assert all(callable(load_case(name)) for name in CASES)


def test_a_module_that_is_no_case_is_one_that_cases_share() -> None:
    modules = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    shared = {"cases", "result", "roofline", "runner", "samples", "timing"}
    assert modules - set(CASES) == shared
