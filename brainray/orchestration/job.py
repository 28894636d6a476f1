"""The frame that all jobs share: arguments, config, Ray, one JSON line, exit code."""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from brainray.config import WEIGHTS_OF_NO_SLICE, WORKER_SETTINGS, Config
from brainray.config_text import described_keys, load_config
from brainray.errors import BrainrayError, ConfigError, DataError, gpu_problem
from brainray.log import log
from brainray.redaction import redacted

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

TRAINING_SECTIONS = (
    "split",
    "encoder",
    "self_supervision",
    "augment",
    "augment_unlabelled",
    "objective",
    "clustering",
    "train",
    "evaluation",
    "tracking",
)
"""Config sections that training on a store reads, for ``--help`` of the training jobs."""

STORE_KEYS = ("classes", "preprocess", "split.mode", "split.test_fraction", "split.seed")
"""Settings that determine how an image store is made from a source."""

WORKER_KEYS = tuple(f"train.{name}" for name in WORKER_SETTINGS)
"""Settings of where workers run and how many there are."""

_RESUMING = ": submit it again under the same name to resume after the last finished epoch or stage"
_ANSWERS_WITHIN_S = 10.0
_DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"

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

    The last line on stdout is one JSON object, whatever happens after the arguments are parsed.

    Args:
        name: name of the job, as in ``jobs/NAME.py``.
        description: first paragraph of ``--help``.
        work: the job itself.
        keys: dotted config keys, or sections, that the job reads and ``--help`` explains. Setting
            others by hand logs a note.
        argv: arguments; by default those of the process.
        needs: keys of ``keys`` that must have a value.
        check: refuses what the job can refuse before Ray, which takes seconds to start.
        uses_ray: whether the job joins or starts a Ray cluster.
    """
    parser = _parser(name, description, keys, needs)
    arguments, others = parser.parse_known_args(argv)
    if others:
        hint = ": write --set KEY=VALUE" if "=" in "".join(others) or "--source" in others else ""
        parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")
    overrides = [item for group in arguments.set for item in group]

    def checked_work() -> JobResult:
        config = resolve_paths(load_config(arguments.config, overrides))
        for key in unread_keys(overrides, keys):
            log(f"note: jobs/{name}.py does not read {key}; --help lists what it reads")
        _check_given(config, keys, needs)
        _check_places(config, keys)
        if check is not None:
            check(config)
        if uses_ray:
            attach_to_ray()
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


def _check_places(config: Config, keys: Sequence[str]) -> None:
    """Check that given paths and runs exist.

    Raises:
        BrainrayError: one of them does not exist.
    """
    from brainray.orchestration.run import open_run
    from brainray.storage import Folder, check_is_folder

    sources = {"source": config.source} if "source" in keys else {}
    if "sources" in keys:
        sources |= {f"sources.{name}": source for name, source in config.sources.items()}
    for key, source in sources.items():
        if source is None:
            continue
        check_is_folder(Folder(source), key)
        storage = Folder(config.storage)
        if storage.contains(Folder(source)) and Folder(source).contains(storage):
            raise ConfigError(
                f"storage={config.storage} is {key} itself, where its figures would be read as "
                f"slices: give a folder of its own, such as {config.storage}/brainray"
            )
    if "labels" in keys and config.labels is not None:
        labels = Folder(config.labels)
        if not labels.exists():
            raise DataError(f"no such file: labels={labels}")
        if labels.local_path is not None and labels.local_path.is_dir():
            raise DataError(f"labels={labels} is a folder: give the CSV or Parquet file")
    if "run" in keys and config.run is not None and config.checkpoint is None:
        open_run(Folder(config.storage), config.run)


def run_command(name: str, work: Callable[[], JobResult], *, is_resumable: bool = True) -> int:
    """Do the work, print its outcome as one JSON line and return the exit code.

    If ``is_resumable``, the message about a signal says how to resume.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing is sent but what is asked
    _end_in_order_on_sigterm()
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


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end; no ``except Exception`` may catch this.

    ``ray.get`` passes on only a KeyboardInterrupt (as a plain one) from a signal handler; it
    swallows any other exception and keeps waiting.
    """


def _end_in_order_on_sigterm() -> None:
    """End as after an error: release locks, update MLflow, print one JSON line."""

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise Terminated(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def resolve_paths(config: Config) -> Config:
    """Make ``source``, ``labels``, ``checkpoint``, ``storage``, local weights and a tracking
    database absolute.

    Raises:
        ConfigError: a relative path in a submitted job, which runs in a temporary copy.
    """
    resolved: dict[str, Any] = {
        key: _resolve(key, value)
        for key in ("storage", "source", "labels", "checkpoint")
        if (value := getattr(config, key)) is not None
    }
    if config.sources:
        resolved["sources"] = {
            name: _resolve(f"sources.{name}", value) for name, value in config.sources.items()
        }
    if config.study.features:
        features = {
            name: feature.model_copy(update={"weights": _resolve_weights(name, feature.weights)})
            for name, feature in config.study.features.items()
        }
        resolved["study"] = config.study.model_copy(update={"features": features})
    if config.encoder.weights not in WEIGHTS_OF_NO_SLICE:
        weights = _resolve("encoder.weights", config.encoder.weights)
        resolved["encoder"] = config.encoder.model_copy(update={"weights": weights})
    if searched := config.tune.space.get("encoder.weights"):
        space = {
            kind: [
                value if value in WEIGHTS_OF_NO_SLICE else _resolve("tune.space", str(value))
                for value in values
            ]
            for kind, values in searched.items()
        }
        resolved["tune"] = config.tune.model_copy(
            update={"space": config.tune.space | {"encoder.weights": space}}
        )
    database = (config.tracking.uri or "").removeprefix("sqlite:///")
    if database != (config.tracking.uri or ""):
        path = _resolve("tracking.uri", database)
        tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{path}"})
        resolved["tracking"] = tracking
    return config.model_copy(update=resolved)


def _resolve(key: str, value: str) -> str:
    if "://" in value:
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # no such ~user
        raise ConfigError(f"{key}={value}: {error}") from None
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"{key}={value} is relative: a submitted job runs in a temporary copy of the working "
            "directory; give an absolute path or a URI"
        )
    return str(path.absolute())


def _resolve_weights(feature: str, weights: str) -> str:
    if weights in WEIGHTS_OF_NO_SLICE or weights.startswith("run:"):
        return weights
    return _resolve(f"study.features.{feature}.weights", weights)


def _parser(
    name: str, description: str, keys: Sequence[str], needs: Sequence[str]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"jobs/{name}.py",
        description=textwrap.dedent(description).strip(),
        epilog=_describe(keys, needs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="append",
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


def attach_to_ray() -> None:
    """Join the running Ray cluster if there is one (``RAY_ADDRESS``), else start a local one."""
    import ray
    import ray.data

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        _check_address(address)
        if not sys.stdout.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no colour codes in files
        log(f"joining Ray at {address}" if address else "joining or starting Ray on this machine")
        try:
            init_ray()
        except (ConnectionError, ValueError) as error:
            if not address:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"RAY_ADDRESS={address} cannot be joined ({reason}): give HOST:PORT of a running "
                "cluster and, if it asks for one, its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)"
            ) from error
        _end_in_order_on_sigterm()  # Ray has installed its own handler
        log(f"Ray at {ray.get_runtime_context().gcs_address}: {_resources()}")
    # Jobs print their own progress and errors, in a form that suits log files.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # a wrapped exception loses its class
    context.memory_usage_poll_interval_s = None  # unused statistics slow tasks by a tenth


def _resources() -> str:
    """What the Ray cluster offers, such as 8 CPUs, 1 GPU on 1 node."""
    import ray

    offered = ray.cluster_resources()
    counts = [(offered.get("CPU", 0), "CPU"), (offered.get("GPU", 0), "GPU")]
    told = ", ".join(f"{n:g} {kind}{'s' * (n != 1)}" for n, kind in counts if n)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{told or 'no CPUs'} on {num_nodes} node{'s' * (num_nodes != 1)}"


def _check_address(address: str) -> None:
    """Check that Ray is reachable; Ray itself waits for minutes without saying why.

    Raises:
        ConfigError: nothing listens at a HOST:PORT, or it is a dashboard's address.
    """
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a dashboard, which takes jobs: submit with ray job submit "
            f"--address {address}, or set RAY_ADDRESS to the cluster's HOST:6379"
        )
    found = re.fullmatch(r"(?P<host>[^/]+):(?P<port>\d+)", address)
    if found is None:  # another kind of address, such as local or ray://HOST:PORT
        return
    try:
        host, port = found["host"].strip("[]"), int(found["port"])
        socket.create_connection((host, port), _ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster answers ({error}); start that cluster, or "
            "unset the variable to let the job start its own"
        ) from None


def init_ray(**options: Any) -> None:
    """Call ``ray.init`` so that a Ray started here is not confused with others on this machine.

    Ray's processes find each other through its dashboard. Processes of a new Ray inherit the
    dashboard's address; they would otherwise search for it, and stop if the machine runs several
    Rays.
    """
    import ray

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # not the usual port: another Ray may take that meanwhile
    before = os.environ.get(_DASHBOARD_VARIABLE)
    os.environ[_DASHBOARD_VARIABLE] = f"http://127.0.0.1:{port}"
    try:
        ray.init(logging_level=logging.ERROR, dashboard_port=port, **options)
    finally:
        if before is None:
            del os.environ[_DASHBOARD_VARIABLE]
        else:
            os.environ[_DASHBOARD_VARIABLE] = before


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
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)
