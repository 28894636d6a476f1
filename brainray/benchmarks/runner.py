"""Runs a case of ``jobs/benchmark.py`` and saves its result."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from brainray.benchmarks.cases import NAMED
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, measures_table
from brainray.config import Config
from brainray.errors import DataError
from brainray.log import log
from brainray.orchestration.job import JobResult
from brainray.orchestration.provenance import about_software
from brainray.report.style import png_bytes
from brainray.storage import Folder

Case = Callable[[CaseOptions], BenchmarkResult]


def load_case(name: str) -> Case:
    return cast(Case, import_module(f"brainray.benchmarks.{name}").run)


def run_case(arguments: Namespace, config: Config) -> JobResult:
    """Run a case, print its table, and save the result under ``storage/benchmarks/CASE``, or
    ``CASE-quick``; for a case of `NAMED` in the subfolder ``config.name``, if that is set.
    """
    source = None if arguments.source is None else Path(arguments.source).expanduser().absolute()
    if source is not None and not source.is_dir():
        raise DataError(f"no such folder: --source {source}")
    storage = Path(arguments.storage).expanduser().absolute()
    name = f"{arguments.case}-quick" if arguments.quick else arguments.case
    folder = Folder(storage) / "benchmarks" / name
    if arguments.case in NAMED and config.name is not None:
        folder = folder / config.name
    save = partial(_save, folder, {"source": arguments.source, "seed": arguments.seed})
    options = CaseOptions(
        quick=arguments.quick,
        source=source,
        seed=arguments.seed,
        storage=storage,
        config=config,
        save=save,
    )
    result = load_case(arguments.case)(options)
    save(result)
    if result.report is not None:
        log(result.report)
    log(measures_table(result.measures))
    log(f"details and plot: {folder}")
    return JobResult(str(folder), metrics={item.name: item.value for item in result.measures})


def _save(folder: Folder, given: dict[str, Any], result: BenchmarkResult) -> None:
    measures = [
        {
            "name": item.name,
            "value": item.value,
            "unit": item.unit,
            "target": item.target,
            "verdict": item.verdict,
        }
        for item in result.measures
    ]
    made_by = given | {"software": about_software()}
    folder.write_json("result.json", made_by | {"measures": measures, "details": result.details})
    if result.figure is not None:
        folder.write_bytes("figure.png", png_bytes(result.figure))
    if result.report is not None:
        folder.write_bytes("report.md", result.report.encode())
