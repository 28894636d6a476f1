"""The cases of ``jobs/benchmark.py`` by name, and what is done with a case's result."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from brainray.benchmarks import (
    duplicates,
    gmm,
    kmeans,
    labels,
    next_labels,
    predict,
    preprocess,
    robustness,
    scaling,
    soak,
    subjects,
    sweep,
    training,
)
from brainray.benchmarks.result import BenchmarkResult, CaseOptions, measures_table
from brainray.config import load_config
from brainray.errors import DataError
from brainray.log import log
from brainray.orchestration.job import JobResult
from brainray.report.style import png_bytes
from brainray.storage import Folder

Case = Callable[[CaseOptions], BenchmarkResult]

CASES: dict[str, Case] = {
    "duplicates": duplicates.run,
    "gmm": gmm.run,
    "kmeans": kmeans.run,
    "labels": labels.run,
    "next_labels": next_labels.run,
    "predict": predict.run,
    "preprocess": preprocess.run,
    "robustness": robustness.run,
    "scaling": scaling.run,
    "soak": soak.run,
    "subjects": subjects.run,
    "sweep": sweep.run,
    "training": training.run,
}
"""The first line of a case's docstring is its help."""


def run_case(arguments: Namespace) -> JobResult:
    """Run one case, print its table, and keep the result under ``storage/benchmarks/CASE``."""
    source = None if arguments.source is None else Path(arguments.source).expanduser().absolute()
    if source is not None and not source.is_dir():
        raise DataError(f"no such folder: --source {source}")
    storage = Path(arguments.storage).expanduser().absolute()
    overrides = [item for group in arguments.set for item in group]
    options = CaseOptions(
        quick=arguments.quick,
        source=source,
        seed=arguments.seed,
        storage=storage,
        config=load_config(arguments.config, overrides),
        log=log,
    )
    result = CASES[arguments.case](options)
    folder = Folder(storage) / "benchmarks" / arguments.case
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
    folder.write_json("result.json", {"measures": measures, "details": result.details})
    if result.figure is not None:
        folder.write_bytes("figure.png", png_bytes(result.figure))
    if result.report is not None:
        folder.write_bytes("report.md", result.report.encode())
        log(result.report)
    log(measures_table(result.measures))
    log(f"details and plot: {folder}")
    return JobResult(str(folder), metrics={item.name: item.value for item in result.measures})
