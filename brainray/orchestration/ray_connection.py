"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import re
import socket
import sys
from typing import Any

from brainray.errors import ConfigError
from brainray.log import log
from brainray.orchestration.signals import end_in_order_on_sigterm

WITHOUT_PREEMPTION = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For machines that are never preempted: the watcher costs a process and logs an error."""

_ANSWERS_WITHIN_S = 10.0
_DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"


def attach_to_ray() -> None:
    """Join the running Ray cluster if there is one (``RAY_ADDRESS``), else start a local one."""
    import ray
    import ray.data

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        _check_address(address)
        if not sys.stdout.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no colour codes in files
        is_here = address in ("", "local")
        how = "starting" if address else "joining or starting"
        log(f"{how} Ray on this machine" if is_here else f"joining Ray at {address}")
        try:
            init_ray()
        except (ConnectionError, ValueError) as error:
            if is_here:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"RAY_ADDRESS={address} cannot be joined ({reason}): give HOST:PORT of a running "
                "cluster and, if it asks for one, its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)"
            ) from error
        end_in_order_on_sigterm()  # Ray has installed its own handler
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
    summary = ", ".join(f"{n:g} {kind}{'s' * (n != 1)}" for n, kind in counts if n)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{summary or 'no CPUs'} on {num_nodes} node{'s' * (num_nodes != 1)}"


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
    Rays. They also inherit `WITHOUT_PREEMPTION`. A running Ray that is joined takes over nothing.
    """
    import ray

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # not the usual port: another Ray may take that meanwhile
    before = dict(os.environ)
    inherited = {_DASHBOARD_VARIABLE: f"http://127.0.0.1:{port}"}
    if WITHOUT_PREEMPTION.keys().isdisjoint(before):
        inherited |= WITHOUT_PREEMPTION
    os.environ.update(inherited)
    try:
        ray.init(logging_level=logging.ERROR, dashboard_port=port, **options)
    finally:
        for name in inherited:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
