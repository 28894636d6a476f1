"""The rules of dependency, read from the source, and "importing does nothing", seen by importing.

Nothing here starts Ray. Each rule has a planted violation that must be found: a checker that
finds nothing anywhere would pass as well.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# From the top downwards: a module may know what stands below it, never what stands above.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"benchmarks"}),
    frozenset({"orchestration"}),
    frozenset({"engine", "report", "tracking"}),
    frozenset({"models", "clustering", "mri"}),
    frozenset(
        {
            "dist",
            "config",
            "config_text",
            "layout",
            "log",
            "redaction",
            "schema",
            "errors",
            "storage",
        }
    ),
)
INDEPENDENT_SIBLINGS = LAYERS[2]
MACHINERY = frozenset({"benchmarks", "orchestration", "tracking"})

# Who may name what; a folder stands for all that is in it.
OWNERS: dict[str, tuple[str, ...]] = {
    "ray": ("jobs", "brainray/orchestration"),
    "mlflow": ("brainray/tracking.py", "brainray/tracking"),
    "torch.distributed": ("brainray/dist.py",),
    "torch.nn.parallel.DistributedDataParallel": ("brainray/orchestration", "brainray/benchmarks"),
    "torch.nn.parallel.distributed": ("brainray/orchestration", "brainray/benchmarks"),
}
IMPORTING_FUNCTIONS = {"importlib.import_module", "import_module", "__import__"}


@dataclass(frozen=True)
class Mention:
    """A dotted name that a file imports or reaches through attributes of an import."""

    name: str
    line: int


# --- The checker --------------------------------------------------------------------------------


def find_violations(project: Path) -> list[str]:
    """One line for each breach of the rules in `brainray/` and `jobs/` of a project."""
    problems: list[str] = []
    for path in sorted([*project.glob("brainray/**/*.py"), *project.glob("jobs/**/*.py")]):
        relative = path.relative_to(project).as_posix()
        package = path.relative_to(project).parent.parts
        for mention in find_mentions(ast.parse(path.read_text(encoding="utf-8")), package):
            reason = _breach(relative, mention.name)
            if reason:
                problems.append(f"{relative}:{mention.line}: {reason}")
    problems += _unplaced_modules(project)
    return problems


def find_mentions(tree: ast.Module, package: tuple[str, ...]) -> Iterator[Mention]:
    """Imports anywhere in the file, also under TYPE_CHECKING, and what is reached from them."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield Mention(item.name, node.lineno)
                bound = item.name if item.asname else item.name.partition(".")[0]
                aliases[item.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for item in node.names:
                name = module if item.name == "*" else f"{module}.{item.name}"
                yield Mention(name, node.lineno)
                aliases[item.asname or item.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            reached = _dotted(node, aliases)
            if reached:
                yield Mention(reached, node.lineno)
        elif isinstance(node, ast.Call) and _is_import_call(node, aliases):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Mention(argument.value, node.lineno)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """`th.distributed` with `import torch as th` is "torch.distributed"."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        parent = _dotted(node.value, aliases)
        return f"{parent}.{node.attr}" if parent else None
    return None


def _is_import_call(node: ast.Call, aliases: dict[str, str]) -> bool:
    name = _dotted(node.func, aliases) or getattr(node.func, "id", None)
    return bool(node.args) and name in IMPORTING_FUNCTIONS


def _breach(path: str, name: str) -> str | None:
    for owned, owners in OWNERS.items():
        if _is_within(name, owned, ".") and not any(_is_within(path, own, "/") for own in owners):
            return f"{name} may be used by {' and '.join(owners)} only"
    if not path.startswith("brainray/"):
        return None
    if name.partition(".")[0] == "jobs":
        return "the package must not know its jobs"
    if _is_within(name, "brainray", "."):
        return _layer_breach(_unit_of(path), name.split(".")[1:2])
    return None


def _layer_breach(importer: str, imported_path: list[str]) -> str | None:
    imported = imported_path[0] if imported_path else ""
    upper, lower = _layer_of(importer), _layer_of(imported)
    if importer == imported or upper is None or lower is None:
        return None  # a module of no layer is a problem of its own
    if lower < upper:
        return f"{importer} must not know {imported}, which stands above it"
    if lower == upper and importer in INDEPENDENT_SIBLINGS:
        return f"{importer} must not know its sibling {imported}"
    return None


def _unplaced_modules(project: Path) -> list[str]:
    units = {_unit_of(p.relative_to(project).as_posix()) for p in project.glob("brainray/**/*.py")}
    return [
        f"brainray/{unit}: in no layer; give it one here and in pyproject.toml"
        for unit in sorted(units - {"__init__"})
        if _layer_of(unit) is None
    ]


def _unit_of(path: str) -> str:
    """`brainray/mri/split.py` belongs to "mri", `brainray/dist.py` to "dist"."""
    return path.split("/")[1].removesuffix(".py")


def _layer_of(unit: str) -> int | None:
    return next((depth for depth, layer in enumerate(LAYERS) if unit in layer), None)


def _is_within(name: str, whole: str, separator: str) -> bool:
    return name == whole or name.startswith(whole + separator)


# --- The rules, and that each can be broken -----------------------------------------------------


def test_the_project_keeps_the_rules_of_dependency() -> None:
    assert find_violations(PROJECT) == []


def test_the_checker_reads_the_whole_package() -> None:
    assert {
        _unit_of(p.relative_to(PROJECT).as_posix()) for p in PROJECT.glob("brainray/**/*.py")
    } >= {
        "__init__",
        "orchestration",
        "mri",
        "dist",
    }


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("brainray/mri/a.py", "from brainray.models import encoder", None),
        ("brainray/mri/a.py", "from brainray.engine import epoch", "stands above"),
        ("brainray/mri/a.py", "from ..engine import epoch", "stands above"),
        ("brainray/mri/a.py", "from .. import engine", "stands above"),
        ("brainray/mri/a.py", "import brainray\nbrainray.engine.epoch.run()", "stands above"),
        ("brainray/dist.py", "import brainray.models", "stands above"),
        ("brainray/report/a.py", "def f():\n    import brainray.engine", "sibling"),
        ("brainray/tracking.py", "from brainray import report", "sibling"),
        ("brainray/engine/a.py", "from brainray.tracking import MLflowTracker", "sibling"),
        ("brainray/engine/a.py", "from . import epoch\nfrom .epoch import run", None),
        ("brainray/orchestration/a.py", "import jobs.train", "must not know its jobs"),
        ("brainray/orchestration/a.py", "import ray.train\nfrom ray import data", None),
        ("jobs/train.py", "import ray\nfrom brainray.orchestration import driver", None),
        ("brainray/engine/a.py", "import ray", "ray may be used"),
        ("brainray/report/a.py", "from ray.train import report", "ray.train.report may be"),
        (
            "brainray/mri/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray",
            "ray may be used",
        ),
        ("brainray/mri/a.py", "import importlib\nimportlib.import_module('ray.data')", "ray.data"),
        ("brainray/mri/a.py", "__import__('mlflow')", "mlflow may be used"),
        ("brainray/mri/a.py", "import raytracer", None),
        ("brainray/tracking.py", "from mlflow import MlflowClient", None),
        ("brainray/report/a.py", "import mlflow.tracking as m", "mlflow.tracking may be used"),
        ("jobs/train.py", "import mlflow", "mlflow may be used"),
        ("brainray/dist.py", "import torch.distributed as d\nd.all_reduce(1)", None),
        ("brainray/engine/a.py", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("brainray/engine/a.py", "import torch as t\nt.distributed.barrier()", "torch.distributed"),
        ("brainray/models/a.py", "from torch import distributed as d", "torch.distributed may"),
        ("brainray/models/a.py", "from torch.distributed import *", "torch.distributed may"),
        ("brainray/orchestration/a.py", "import torch.distributed", "torch.distributed may"),
        (
            "brainray/engine/a.py",
            "from torch.nn.parallel import DistributedDataParallel as DDP",
            "DistributedDataParallel may be used",
        ),
        (
            "brainray/engine/a.py",
            "import torch\nf = torch.nn.parallel.DistributedDataParallel",
            "DistributedDataParallel may be used",
        ),
        (
            "brainray/orchestration/a.py",
            "from torch.nn.parallel import DistributedDataParallel",
            None,
        ),
        ("brainray/surprise.py", "", "in no layer"),
    ],
)
def test_a_planted_violation_is_found_and_nothing_else(
    tmp_path: Path, path: str, source: str, reason: str | None
) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)

    problems = find_violations(tmp_path)

    if reason is None:
        assert problems == []
    else:
        assert problems
        assert all(problem.startswith(path.removesuffix(".py")) for problem in problems)
        assert any(reason in problem for problem in problems)


# --- Importing does nothing ---------------------------------------------------------------------

# Runs in a fresh interpreter. Third parties are imported first, since what they do on import is not
# ours; then all but the machinery, when neither Ray nor MLflow may have come along; then that.
PROBE = """
import importlib, json, logging, os, random, sys, threading

first, third_parties, mathematics, machinery, watched = json.loads(sys.argv[1])
effects = []

def import_all(names):
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if name.partition(".")[0] == "brainray":
                raise  # a third party may be optional, our own module is not

def watch(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if (flags or 0) & writes and str(path) != os.devnull:
            effects.append(f"opens {path} for writing")
    elif event in EVENTS:
        effects.append(f"{event} {arguments!r:.200}")

EVENTS = {
    "os.mkdir", "os.rename", "os.remove", "os.fork", "os.forkpty", "os.posix_spawn", "os.system",
    "os.exec", "os.chdir", "os.putenv", "os.unsetenv", "subprocess.Popen", "socket.connect",
    "socket.bind", "socket.getaddrinfo", "signal.signal",
}

def start(thread, original=threading.Thread.start):
    if watching:
        effects.append(f"starts {thread!r}")
    original(thread)

threading.Thread.start = start

def files():
    return sorted(
        os.path.join(folder, name) for top in watched
        for folder, folders, names in os.walk(top) for name in names + folders
    )

def state():
    root = logging.getLogger()
    result = {
        "files": files(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "root log handlers": [repr(handler) for handler in root.handlers],
        "root log level": root.level,
        "environment": sorted(os.environ.items()),
        "working directory": os.getcwd(),
        "random state": hash(random.getstate()),
    }
    if "numpy" in sys.modules:
        import numpy
        result["numpy random state"] = hash(numpy.random.get_state()[1].tobytes())
    if "torch" in sys.modules:
        import torch
        result["torch random state"] = hash(torch.get_rng_state().numpy().tobytes())
        result["torch threads"] = torch.get_num_threads()
        result["torch default dtype"] = str(torch.get_default_dtype())
    return result

def import_watched(names):
    global watching
    before = state()
    watching = True
    import_all(names)
    watching = False
    after = state()
    for key, value in before.items():
        if after[key] != value:
            effects.append(f"changes {key}: {value!r:.300} -> {after[key]!r:.300}")

watching = False
sys.addaudithook(watch)
import_all(first)
import_watched(mathematics)
for name in ("ray", "mlflow"):
    if name in sys.modules:
        effects.append(f"more than the machinery imports {name}")
import_all(third_parties)
import_watched(machinery)
print(json.dumps(effects))
"""


def import_effects(project: Path, scratch: Path) -> list[str]:
    """What importing every module of `brainray` does besides defining names."""
    modules = sorted(_module_name(p, project) for p in project.glob("brainray/**/*.py"))
    modules = [name for name in modules if not name.endswith("__main__")]
    machinery = [name for name in modules if MACHINERY.intersection(name.split(".")[1:2])]
    third_parties = sorted(_third_parties(project))
    plan = (
        [name for name in third_parties if name.partition(".")[0] not in {"ray", "mlflow"}],
        third_parties,
        [name for name in modules if name not in machinery],
        machinery,
    )
    folders = {name: scratch / name for name in ("home", "tmp", "cwd")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(project),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folders["home"]),
        "TMPDIR": str(folders["tmp"]),
    }
    watched = [str(folder) for folder in folders.values()]
    finished = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([*plan, watched])],
        cwd=folders["cwd"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    effects: list[str] = json.loads(lines[-1])
    return effects + [f"prints {line!r}" for line in lines[:-1]]


def _module_name(path: Path, project: Path) -> str:
    parts = path.relative_to(project).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _third_parties(project: Path) -> set[str]:
    """Modules of others that the package imports at module level, under an `if` or `try` too."""
    names: set[str] = set()
    for path in project.glob("brainray/**/*.py"):
        for node in _module_level(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.Import):
                names.update(item.name for item in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
                names.update(f"{node.module}.{item.name}" for item in node.names)
    return {name for name in names if not _is_within(name, "brainray", ".")}


def _module_level(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement
            for name in ("body", "orelse", "finalbody"):
                yield from _module_level(getattr(statement, name, []))


def test_importing_the_package_does_nothing(tmp_path: Path) -> None:
    assert import_effects(PROJECT, tmp_path) == []


@pytest.mark.parametrize(
    ("source", "effect"),
    [
        ("X = 1", None),
        ("import json, threading", None),
        ("open('made.txt', 'w').close()", "for writing"),
        ("import tempfile\nF = tempfile.mkdtemp()", "os.mkdir"),
        ("import pathlib\n(pathlib.Path.home() / 'brainray').mkdir()", "os.mkdir"),
        ("import threading\nthreading.Thread(target=int).start()", "starts <Thread"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
        ("import logging\nlogging.basicConfig()", "root log handlers"),
        ("import logging\nlogging.getLogger().setLevel('INFO')", "root log level"),
        ("import os\nos.environ['BRAINRAY_PLANTED'] = '1'", "environment"),
        ("import random\nrandom.seed(0)", "random state"),
        ("print('hello')", "prints 'hello'"),
        (
            "import sys, types\nsys.modules['ray'] = types.ModuleType('ray')",
            "more than the machinery imports ray",
        ),
    ],
)
def test_a_planted_effect_of_importing_is_found(
    tmp_path: Path, source: str, effect: str | None
) -> None:
    package = tmp_path / "project" / "brainray"
    (package / "mri").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "mri" / "__init__.py").write_text(source)

    effects = import_effects(tmp_path / "project", tmp_path / "scratch")

    if effect is None:
        assert effects == []
    else:
        assert any(effect in found for found in effects), effects
