"""The floors of the house: who may import whom, what each process loads, and how large a file may grow.

Read from the sources with `ast`, so that a forbidden import is found even where no test executes it, and then seen once
more from outside: every module is imported in an interpreter that has imported nothing else.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sglfast"
LINES_MAX = 450

# A room imports rooms of lower floors only; rooms of the planes' floor never each other.
PLANES_FLOOR = 3
FLOORS: dict[str, int] = {
    "__main__": 6, "cli": 5, "cli_sim": 4, "cli_weights": 4,
    "edge": 3, "index": 3, "control": 3, "sim": 3, "load": 3, "modelexpress": 3,
    "prompt": 2,
    "tls": 1, "wire": 1, "config": 1, "errors": 1, "shm": 1, "logs": 1, "log_file": 1, "log_sink": 1, "boot": 1, "open_files": 1,
}  # fmt: skip
COMPILED_FLOOR = 0

# What the process that runs this module must not have loaded.
FOREIGN: dict[str, tuple[str, ...]] = {
    "sglfast.edge.main": (
        "zmq", "aiohttp", "rich", "matplotlib", "yaml", "grpc", "sglfast.modelexpress", "sglfast.config.sources",
        "sglfast.index", "sglfast.control", "sglfast.sim", "sglfast.load",
    ),
    "sglfast.index.main": (
        "httptools", "tokenizers", "aiohttp", "rich", "matplotlib", "yaml", "grpc", "sglfast.modelexpress", "sglfast.config.sources",
        "sglfast.edge", "sglfast.control", "sglfast.sim", "sglfast.load",
    ),
    "sglfast.control.main": (
        "zmq", "matplotlib", "yaml", "grpc", "sglfast.modelexpress", "huggingface_hub", "tokenizers",
        "sglfast.edge", "sglfast.index", "sglfast.sim", "sglfast.load",
    ),
    "sglfast.modelexpress.server": (
        "zmq", "tokenizers", "httptools", "matplotlib",
        "sglfast.edge", "sglfast.index", "sglfast.control", "sglfast.sim", "sglfast.load",
    ),
    "sglfast.cli": (
        "sglfast.edge", "sglfast.index", "sglfast.sim", "sglfast.load", "sglfast.modelexpress", "zmq", "matplotlib", "grpc",
    ),
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PYTHON = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
COMPILED = {f"sglfast._{path.stem}": path for path in sorted((ROOT / "cext").glob("*.pyx"))}
STUBS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.pyi"))}


def room(module: str) -> str:
    """Second part of the dotted name; the empty string for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def floor(module: str) -> int:
    name = room(module)
    if f"sglfast.{name}" in COMPILED:
        return COMPILED_FLOOR
    assert name in FLOORS, f"{module}: give the new room `{name}` a floor in tests/test_floors.py and ARCHITECTURE.md"
    return FLOORS[name]


def imports(path: Path, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module of ours, is it imported at run time at module level) for each import statement of a file."""
    tree = ast.parse(path.read_text(), str(path))
    late = {id(inner) for node in ast.walk(tree) if is_late(node) for inner in ast.walk(node) if inner is not node}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; imports are absolute here"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == package:
                yield node.lineno, name, id(node) not in late


def is_late(node: ast.AST) -> bool:
    """A function's body runs after the import is done, a block under TYPE_CHECKING never."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_module(name: str) -> bool:
    return name in PYTHON or name in COMPILED


def forbidden(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    if not room(imported):
        return None  # the package itself: its version
    if room(module) == room(imported):
        return None
    here, there = floor(module), floor(imported)
    if there > here:
        return f"{room(imported)} is above {room(module)}"
    if here == there == PLANES_FLOOR:
        return f"{room(module)} and {room(imported)} never import each other"
    return None


@pytest.mark.parametrize("module", sorted(PYTHON | STUBS))
def test_imports_go_downward(module: str) -> None:
    for path in filter(None, (PYTHON.get(module), STUBS.get(module))):
        found = list(imports(path, "sglfast"))
        if module == "sglfast":
            assert not found, f"{path}: the package itself imports nothing, each process loads only its part"
            continue
        floor(module)
        wrong = [f"{path}:{line}: {why}" for line, name, _ in found if (why := forbidden(module, name))]
        assert not wrong, "\n".join(wrong)


def test_a_planted_upward_import_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def late():\n    from sglfast.edge import main\n    import sglfast.errors\n")
    assert [forbidden("sglfast.wire.planted", name) for _, name, _ in imports(planted, "sglfast")] == [
        "edge is above wire",
        None,
    ]
    assert forbidden("sglfast.index.main", "sglfast.control.workers") == "index and control never import each other"
    assert forbidden("sglfast.load.demo", "sglfast.sim.main")
    assert forbidden("sglfast.prompt.keys", "sglfast.cli")


@pytest.mark.parametrize("module", sorted(COMPILED))
def test_compiled_modules_import_nothing_of_ours(module: str) -> None:
    """They share C headers; only the relay stands on the C side of two others, and stubs name each other's types."""
    found = re.findall(r"^\s*(?:from|import|cimport)\s+(sglfast\b.*)$", COMPILED[module].read_text(), re.MULTILINE)
    below = [line for line in found if module == "sglfast._relay" and re.match(r"sglfast\._(counters|httphead) cimport ", line)]
    assert found == below, f"{COMPILED[module]}: {found}"
    assert module in STUBS, f"{COMPILED[module]} has no typed stub sglfast/{room(module)}.pyi"


def test_module_level_imports_have_no_cycle() -> None:
    graph = {
        module: {name for _, name, is_eager in imports(path, "sglfast") if is_eager and name in PYTHON} - {"sglfast"}
        for module, path in PYTHON.items()
    }
    free: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in free and needs - {module} <= free}:
        free |= ready
    assert free == set(graph), f"these modules import each other in a circle: {sorted(set(graph) - free)}"


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an interpreter that has imported nothing, every warning an error."""
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


# One interpreter that has imported nothing but os and sys, forked for each module: starting one for each takes minutes.
_FORKED_IMPORTS = """
import os, sys
found = {}
for module in sys.stdin.read().split():
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        code = 1
        try:
            __import__(module)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as output:
        said = output.read()
    found[module] = (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said)
print(found)
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, tuple[int, str]]:
    """(exit code, output) of importing each module in a process that has imported nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FORKED_IMPORTS],
        input=" ".join(sorted(PYTHON | COMPILED)), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = ast.literal_eval(done.stdout)
    return found


@pytest.mark.parametrize("module", sorted(PYTHON | COMPILED))
def test_module_imports_alone(module: str, imported: dict[str, tuple[int, str]]) -> None:
    assert imported[module] == (0, "")


@pytest.mark.parametrize("module", sorted(FOREIGN))
def test_process_loads_only_its_part(module: str) -> None:
    done = run_alone(f"import sys, {module}\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not loaded.intersection(FOREIGN[module])


def sources() -> list[Path]:
    """Our own sources: not what was built, not the environment."""
    folders = [PACKAGE, ROOT / "cext", ROOT / "tests", ROOT / "bench"]
    kinds = {".py", ".pyi", ".pyx", ".pxd", ".c", ".h"}
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in kinds and not path.stem.endswith("_pb2"))


def test_files_stay_readable_in_one_sitting() -> None:
    sizes = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in sources()}
    large = {path: lines for path, lines in sizes.items() if lines > LINES_MAX}
    assert not large, f"400 lines are wanted, more than {LINES_MAX} refused; cut by subject: {large}"


def test_no_name_that_says_nothing() -> None:
    empty = re.compile(r"(^|_)(utils?|common|helpers?|misc|stuff|v\d|new|old)(_|$)")
    named = [path.relative_to(ROOT) for path in [*sources(), *(path.parent for path in sources())]]
    wrong = {str(path) for path in named if any(empty.search(Path(part).stem) for part in path.parts)}
    assert not wrong
