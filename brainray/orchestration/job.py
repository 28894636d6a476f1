"""The frame that all jobs share: arguments, config, Ray, one JSON line, exit code."""

import argparse
import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from brainray.config import Config
from brainray.config_text import described_keys, load_config
from brainray.errors import BrainrayError, ConfigError, gpu_problem
from brainray.log import log
from brainray.orchestration.paths import check_is_shared, check_paths, resolve_paths
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.signals import end_in_order_on_sigterm
from brainray.redaction import redacted

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

STORE_KEYS = ("classes", "preprocess", "split.mode", "split.test_fraction", "split.seed")
"""Settings that determine how an image store is made from a source."""

_RESUMING = ": submit it again under the same name to resume after the last finished epoch or stage"

# Ray Data appends this to the message of any exception in a task.
_RAYS_ADVICE = re.compile(r"\nFailed to .+ after \d+/\d+ attempts")


@dataclass(frozen=True)
class JobResult:
    """Content of a job's last line."""

    out: str
    run_id: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run_job(
    name: str,
    description: str,
    work: Callable[[Config], JobResult],
    keys: Sequence[str],
    argv: Sequence[str] | None = None,
    *,
    needs: Sequence[str] = (),
    check: Callable[[Config], None] | None = None,
    uses_ray: bool = True,
) -> int:
    """Parse, load the config, attach to Ray, do the work, print the result; return the exit code.

    The last line on stdout is one JSON object, whatever happens.

    Args:
        name: name of the job, as in ``jobs/NAME.py``.
        description: first paragraph of ``--help``.
        work: the job itself.
        keys: dotted config keys, or sections, that the job reads and ``--help`` explains. Setting
            others by hand logs a note.
        argv: arguments; by default those of the process.
        needs: keys of ``keys`` that must have a value.
        check: raises errors that can be found before Ray is started, which takes seconds.
        uses_ray: whether the job joins or starts a Ray cluster.
    """
    parser = _parser(name, description, keys, needs)
    arguments, others = parser.parse_known_args(argv)
    if others:
        hint = ": write --set KEY=VALUE" if "=" in "".join(others) or "--source" in others else ""
        parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")

    def checked_work() -> JobResult:
        config = resolve_paths(load_config(arguments.config, arguments.set), keys)
        for key in unread_keys(arguments.set, keys):
            log(f"note: jobs/{name}.py does not read {key}; --help lists what it reads")
        _check_given(config, keys, needs)
        check_paths(config, keys)
        if check is not None:
            check(config)
        if uses_ray:
            attach_to_ray()
            check_is_shared(config.storage)
        return work(config)

    return run_command(name, checked_work)


def _check_given(config: Config, keys: Sequence[str], needs: Sequence[str]) -> None:
    absent = [key for key in needs if getattr(config, key) is None]
    if "run" in absent and "checkpoint" in keys and config.checkpoint is not None:
        absent.remove("run")
    if absent:
        missing = " ".join(f"{key}={'DIR' if key == 'source' else 'NAME'}" for key in absent)
        instead = " (or checkpoint=PATH)" if "run" in absent and "checkpoint" in keys else ""
        raise ConfigError(f"give --set {missing}{instead}")
    if "checkpoint" in keys and None not in (config.run, config.checkpoint):
        raise ConfigError("give either run=NAME or checkpoint=PATH, not both")


def run_command(name: str, work: Callable[[], JobResult], *, is_resumable: bool = True) -> int:
    """Do the work, print its outcome as one JSON line and return the exit code.

    If ``is_resumable``, the message about a signal says how to resume.
    """
    # Only what the user configures is sent.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    end_in_order_on_sigterm()
    _print_any_character()
    try:
        with _own_connection():
            result = work()
    except Exception as error:  # the contract: every outcome ends in one JSON line
        return _fail(name, *_explained(error))
    except (KeyboardInterrupt, SystemExit):  # Ray Train's handler of SIGINT exits
        by_sigterm = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        ended = f"ended by {'SIGTERM' if by_sigterm else 'SIGINT'}"
        return _fail(name, ended + (_RESUMING if is_resumable else ""), EXIT_FAILED)
    _print_json(
        {
            "job": name,
            "status": "ok",
            "run_id": result.run_id,
            "out": result.out,
            "metrics": {
                key: value if math.isfinite(value) else None
                for key, value in result.metrics.items()
            },
        }
    )
    return EXIT_OK


class JobParser(argparse.ArgumentParser):
    """Arguments of ``jobs/NAME.py``: an error in them, after the usage, ends as others of a job."""

    def __init__(self, name: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"jobs/{name}.py",
            description=textwrap.dedent(description).strip(),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._name = name

    def error(self, message: str) -> NoReturn:
        _print_any_character()
        self.print_usage(sys.stderr)
        sys.exit(_fail(self._name, message, EXIT_BAD_INPUT))


def _print_any_character() -> None:
    """Escape those that the terminal's encoding lacks: names and results may have them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _own_connection() -> Iterator[None]:
    """Leave Ray at the end if the block joined it, so that workers' output is printed first."""
    ray = _ray_if_needed_yet()
    joined_before = ray is not None and ray.is_initialized()
    try:
        yield
    finally:
        ray = _ray_if_needed_yet()
        if ray is not None and not joined_before:
            ray.shutdown()


def _ray_if_needed_yet() -> Any:
    """Ray takes seconds to import: too long for ``--help`` or for reporting a typing error."""
    return sys.modules.get("ray")


def _parser(
    name: str, description: str, keys: Sequence[str], needs: Sequence[str]
) -> argparse.ArgumentParser:
    parser = JobParser(name, description, _describe(keys, needs))
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="settings that override the file, such as train.num_epochs=5; may be repeated",
    )
    return parser


def unread_keys(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Keys of ``key=value`` overrides that are not, contain or belong to any of ``keys``."""
    given = [override.partition("=")[0].strip() for override in overrides]
    return [
        key
        for key in given
        if not any(_is_within(key, wanted) or _is_within(wanted, key) for wanted in keys)
    ]


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _describe(keys: Sequence[str], needs: Sequence[str]) -> str:
    lines = ["settings (in the file, or with --set) [default]:"]
    for key, text in described_keys(lambda key: any(_is_within(key, wanted) for wanted in keys)):
        lines.append(f"  {key}{_required(key, keys, needs)}")
        lines += textwrap.wrap(text, 88, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _required(key: str, keys: Sequence[str], needs: Sequence[str]) -> str:
    if key not in needs:
        return ""
    has_alternative = key == "run" and "checkpoint" in keys
    return " (required, unless checkpoint is given)" if has_alternative else " (required)"


def _explained(error: Exception) -> tuple[str, int]:
    """The message and the exit code for an error; prints the traceback of an unexpected one."""
    cause = _user_error(error) or gpu_problem(str(error))
    if cause is not None:
        return _RAYS_ADVICE.split(str(cause))[0], EXIT_BAD_INPUT
    print(redacted("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    # Ray puts every worker's traceback into the message; the last line is the reason.
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1]}", EXIT_FAILED


def _fail(name: str, message: str, code: int) -> int:
    line = redacted(" ".join(message.split()))
    print(f"jobs/{name}.py: error: {line}", file=sys.stderr, flush=True)
    _print_json({"job": name, "status": "error", "error": line})
    return code


def _user_error(error: BaseException | None) -> BrainrayError | None:
    """The brainray error in an exception chain, which Ray may have wrapped."""
    ray = _ray_if_needed_yet()
    if ray is not None and isinstance(error, ray.exceptions.RayTaskError):
        # It is also an instance of its cause's class, with the worker's traceback as message.
        return _user_error(error.cause)
    if error is None or isinstance(error, BrainrayError):
        return error
    return _user_error(error.__cause__)


def _print_json(value: dict[str, Any]) -> None:
    sys.stderr.flush()
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not is_unicode, allow_nan=False), flush=True)
