"""Benchmark brainray against a named reference, side by side in one run."""

import argparse
import sys

from brainray.benchmarks.cases import CASES, OVERRIDDEN, QUICK_SETTINGS, READS_CONFIG, READS_SOURCE
from brainray.config_text import load_config
from brainray.errors import ConfigError
from brainray.log import log
from brainray.orchestration.job import JobParser, JobResult, run_command

DESCRIPTION = """
Benchmark brainray against a named reference in the same run. Print a table of values, each with
its target and whether it was met, write them as JSON with a plot, and end with one JSON line.

Example: python jobs/benchmark.py duplicates --source /data/brain-tumor-mri --quick
"""


def parser() -> argparse.ArgumentParser:
    cases = "\n".join(f"  {name:<12} {description}" for name, description in CASES.items())
    made = JobParser("benchmark", DESCRIPTION, f"cases:\n{cases}")
    made.add_argument("case", choices=sorted(CASES), metavar="CASE", help="see below")
    made.add_argument(
        "--quick",
        action="store_true",
        help="smaller sizes (labels: fewer training runs)",
    )
    made.add_argument(
        "--source", metavar="DIR", help="real slices [phantoms, if the case can use them]"
    )
    made.add_argument(
        "--seed", type=int, default=0, help="random seed; for labels that of the label draw [0]"
    )
    configured = " and ".join(", ".join(sorted(READS_CONFIG)).rsplit(", ", 1))
    made.add_argument("--config", metavar="FILE", help=f"settings for {configured}")
    made.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override --config",
    )
    made.add_argument(
        "--storage",
        metavar="DIR",
        default="~/brainray",
        help="write results to DIR/benchmarks/CASE (CASE-quick), those of labels with --set "
        "name=NAME to its subfolder NAME, and the stores and runs of labels and next_labels to DIR "
        "[~/brainray]",
    )
    return made


def work(arguments: argparse.Namespace) -> JobResult:
    refused = {
        key: f"benchmarks do not read this setting; use --{key}"
        for key in ("source", "storage", "seed")
    }
    for key, reason in OVERRIDDEN.get(arguments.case, {}).items():
        refused[key] = f"the case {arguments.case} sets this itself: {reason}"
    if arguments.quick:
        for key, value in QUICK_SETTINGS.get(arguments.case, {}).items():
            refused[key] = f"{arguments.case} --quick sets this itself, to {value}"
    given = [item.partition("=")[0].strip() for item in arguments.set]
    if problems := [f"--set {key}=...: {refused[key]}" for key in given if key in refused]:
        raise ConfigError("; ".join(problems))
    for key in ("source", "storage"):
        if "://" in (value := getattr(arguments, key) or ""):
            raise ConfigError(f"--{key} {value}: benchmarks use a local folder, not a URI")
    config = load_config(arguments.config, arguments.set)
    readers = {"config": READS_CONFIG, "set": READS_CONFIG, "source": READS_SOURCE}
    for option, cases in readers.items():
        if getattr(arguments, option) and arguments.case not in cases:
            log(f"note: the case {arguments.case} does not read --{option}")
    from brainray.benchmarks.runner import run_case

    return run_case(arguments, config)


if __name__ == "__main__":
    arguments = parser().parse_args()
    sys.exit(run_command("benchmark", lambda: work(arguments), is_resumable=False))
