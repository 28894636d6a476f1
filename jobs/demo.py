"""Run the complete pipeline on generated phantoms, on its own Ray head: `make demo`.

The demo generates slices, starts a separate Ray on this machine, submits jobs/pipeline.py as a user
would, prints the results, and stops every process that it started. Results of an earlier demo in
the same folder are replaced.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from brainray import layout
from brainray.errors import BrainrayError, DataError
from brainray.log import log
from brainray.mri.phantom import write_phantoms
from brainray.orchestration.own_head import RayDidNotStart, own_ray_head, submit, wait_until_ready
from brainray.storage import Folder

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = Path("~/brainray-demo")
PHANTOMS = "phantoms"
RUN_NAME = "demo"
NUM_TRAINING_PER_CLASS = 160
NUM_TESTING_PER_CLASS = 40

HEADLINES = ("accuracy", "balanced_accuracy", "f1_macro", "nmi", "silhouette")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    out = options.out.expanduser().resolve()
    for stop_signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop_signal, _exit_on_signal)
    try:
        return run_demo(out)
    except (BrainrayError, RayDidNotStart) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, BrainrayError) else 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted")
        return 128 + signal.SIGINT


def run_demo(out: Path) -> int:
    """Run the pipeline on phantoms under `out` and return its exit code.

    Raises:
        DataError: the folder has other contents, or cannot be written.
        RayDidNotStart: the Ray head did not start.
    """
    from brainray.tracking import default_uri

    _prepare_folder(out)
    tracking_uri = default_uri(Folder(out))
    settings = {
        "source": out / PHANTOMS,
        "storage": out,
        "tracking.uri": tracking_uri,
        "name": RUN_NAME,
    }
    entrypoint = [sys.executable, "jobs/pipeline.py", "--config", "configs/demo.yaml"]
    for key, value in settings.items():
        entrypoint += ["--set", f"{key}={value}"]

    with own_ray_head() as head:
        # Ray takes seconds to start: generate the phantoms meanwhile.
        log(f"demo: generating phantoms in {out / PHANTOMS}")
        write_phantoms(
            out / PHANTOMS,
            num_training_per_class=NUM_TRAINING_PER_CLASS,
            num_testing_per_class=NUM_TESTING_PER_CLASS,
            seed=0,
        )
        wait_until_ready(head)
        exit_code, line = submit(head, entrypoint, name=RUN_NAME, working_dir=PROJECT)
    result = _parse_result(line)
    _print_summary(exit_code, result, tracking_uri)
    return exit_code if result is not None else exit_code or 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: that of the pipeline (0 done, 1 failed, 2 bad input); 130 after Ctrl-C.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder for phantoms, results and tracking database (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _exit_on_signal(signal_number: int, _frame: FrameType | None) -> NoReturn:
    """Unwind as Ctrl-C does, so that started processes are stopped."""
    raise SystemExit(128 + signal_number)


def _prepare_folder(out: Path) -> None:
    """Make the folder, or remove what an earlier demo, perhaps of another version, left there.

    Raises:
        DataError: it cannot be made, or no demo has made it.
    """
    made = [f"{kind}/{RUN_NAME}" for kind in (layout.DATASETS, layout.RUNS, layout.EVALUATIONS)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        visible = [path for path in out.iterdir() if not path.name.startswith(".")]
        if visible and not (out / PHANTOMS).is_dir():
            raise DataError(f"{out} is in use, not by an earlier demo: choose another --out")
        for folder in (PHANTOMS, *made):
            shutil.rmtree(out / folder, ignore_errors=True)
        (out / PHANTOMS).mkdir()
    except OSError as error:
        raise DataError(f"cannot create {out} ({error.strerror}): choose another --out") from None


def _parse_result(line: str | None) -> dict[str, Any] | None:
    try:
        result = json.loads(line or "")
    except json.JSONDecodeError:
        return None
    return result if isinstance(result, dict) else None


def _print_summary(exit_code: int, result: dict[str, Any] | None, tracking_uri: str) -> None:
    print()
    if result is None:
        log(f"demo: the pipeline printed no result (exit code {exit_code}): see its output above")
        return
    if result.get("status") != "ok":
        log(
            f"demo: the pipeline failed (exit code {exit_code}): "
            f"{result.get('error', 'no reason given')}"
        )
        return
    log("demo: done")
    metrics = {
        name: value
        for name, value in (result.get("metrics") or {}).items()
        if name.startswith("test/") and name.rpartition("/")[2] in HEADLINES
    }
    width = max((len(name) for name in metrics), default=0)
    for name, value in sorted(metrics.items()):
        print(
            f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name}: {value}"
        )
    print(f"\n  results   {result.get('out')}")
    for path in _pictures(Path(str(result.get("out")))):
        print(f"            {path}")
    mlflow = [str(Path(sys.executable).with_name("mlflow")), "ui"]
    print(f"  tracking  {shlex.join([*mlflow, '--backend-store-uri', tracking_uri])}")


def _pictures(out: Path) -> list[Path]:
    """Reports, and the folders that contain figures."""
    reports = sorted(out.rglob("*.html"))
    return reports + sorted({path.parent for path in out.rglob("*.png")})


if __name__ == "__main__":
    sys.exit(main())
