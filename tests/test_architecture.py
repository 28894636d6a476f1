"""The import rules, and "importing does nothing", seen by importing. Nothing here starts Ray."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
MACHINERY = frozenset({"benchmarks", "orchestration", "tracking"})

# What import-linter cannot see: parts of other packages, and jobs/. By name, who may use it.
OWNERS: dict[str, tuple[str, ...]] = {
    "torch.distributed": ("brainray/dist.py",),
    "torch.nn.parallel": ("brainray/benchmarks/training.py",),
    "mlflow": ("brainray/tracking.py",),
    "jobs": (),
}


def test_imports_keep_the_contracts_of_pyproject() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run(
        [lint_imports, "--no-cache"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


def names_in(text: str) -> set[str]:
    """Dotted names that a module imports, or reaches through what it has imported."""
    names, known_as = set[str](), dict[str, str]()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names.add(each.name)
                top = each.name.partition(".")[0]
                known_as[each.asname or top] = each.name if each.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                names.add(f"{node.module}.{each.name}")
                known_as[each.asname or each.name] = f"{node.module}.{each.name}"
    for node in ast.walk(tree):
        first, _, rest = ast.unparse(node).partition(".") if is_dotted(node) else ("", "", "")
        if first in known_as:
            names.add(f"{known_as[first]}.{rest}")
    return names


def is_dotted(node: ast.AST) -> bool:
    """Whether it is a name with attributes, such as a.b.c."""
    return isinstance(node, ast.Attribute) and (
        isinstance(node.value, ast.Name) or is_dotted(node.value)
    )


def users_of(owned: str, sources: dict[str, str]) -> set[str]:
    """Files whose code uses a package or a part of it."""
    return {
        path
        for path, text in sources.items()
        if any(f"{name}.".startswith(f"{owned}.") for name in names_in(text))
    }


@pytest.mark.parametrize("owned", OWNERS)
def test_what_has_one_owner_is_used_by_no_other(owned: str) -> None:
    files = [*PROJECT.glob("brainray/**/*.py"), *PROJECT.glob("jobs/*.py")]
    sources = {str(path.relative_to(PROJECT)): path.read_text("utf-8") for path in files}
    assert users_of(owned, sources) == set(OWNERS[owned])


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as d",
        "import torch\ndef run():\n    torch.distributed.barrier()  # `like this`",
        "import torch as t\nt.distributed.barrier()",
        "from torch import (\n    nn,\n    distributed,\n)",
        "from torch import nn\nnn.parallel.DistributedDataParallel(nn.Linear(1, 1))",
        "from torch.nn.parallel import DistributedDataParallel as DDP",
        "def run():\n    from mlflow import MlflowClient",
        "import jobs.train",
    ],
)
def test_a_use_by_another_is_found(code: str) -> None:
    assert any(users_of(owned, {"brainray/mri/a.py": code}) for owned in OWNERS)


def test_words_about_others_are_no_use() -> None:
    text = '"""As torch.distributed does."""\nimport torch\nname = "mlflow"  # mlflow.log\n'
    assert not any(users_of(owned, {"brainray/mri/a.py": text}) for owned in OWNERS)


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
    return {name for name in names if name.partition(".")[0] != "brainray"}


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
