"""The documents tell the truth: flags, links, paths and make targets that they name exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "BENCHMARKS.md",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/README.md",
    "docs/flags.md",
    "docs/modelexpress.md",
    "docs/sglang-router.md",
]


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def code_in(text: str) -> list[str]:
    """Everything in backticks: inline pieces and the lines of fenced blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return inline + [line for block in blocks for line in block.splitlines()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):.*## ", text_of("Makefile"), re.MULTILINE))


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def serve_help() -> str:
    command = [sys.executable, "-m", "sglfast", "serve", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_fits_one_screen() -> None:
    assert len(text_of("README.md").splitlines()) <= 60


def test_readme_flags_exist(serve_help: str) -> None:
    rows = re.findall(r"^\|(.*?)\|", text_of("README.md"), re.MULTILINE)
    table = {flag for row in rows for flag in re.findall(r"`(--[a-z-]+)", row)}
    lines = [line for line in code_in(text_of("README.md")) if "sglfast serve" in line]
    assert len(table) >= 7
    assert lines
    named = table | {flag for line in lines for flag in re.findall(r"(?<!\S)--[a-z-]+", line)}
    assert named <= set(re.findall(r"(?<![\w-])--[a-z-]+", serve_help))


def test_readme_names_every_policy(serve_help: str) -> None:
    choices = re.search(r"--policy \{([a-z_,]+)\}", serve_help)
    assert choices, serve_help
    row = next(line for line in text_of("README.md").splitlines() if "`--policy" in line)
    assert set(choices[1].split(",")) == set(re.findall(r"`([a-z_]+)`", row))


def test_modelexpress_flags_exist() -> None:
    text = text_of("docs/modelexpress.md")
    section = text[text.index("## Flags of") : text.index("## A client")]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section)) - {"--help"}
    command = [sys.executable, "-m", "sglfast", "modelexpress", "serve", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert len(named) >= 9
    assert named <= set(re.findall(r"(?<![\w-])--[a-z-]+", done.stdout)), done.stderr


def test_modelexpress_example_is_python() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", text_of("docs/modelexpress.md"), re.MULTILINE | re.DOTALL)
    names = {name.name for node in ast.walk(ast.parse(example)) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert names == {"BlockingSeed", "blocking_candidates", "ServerArguments", "arguments_identity", "p2p"}
    exec("\n".join(line for line in example.splitlines() if line.startswith(("from ", "identity = ", "worker"))), {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text_of(document))
    broken = []
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, fragment = link.partition("#")
        target = ROOT / document if not path else (ROOT / document).parent / path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if target.is_file() else []
        if not target.exists() or (fragment and fragment not in map(anchor, headings)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_make_targets_exist(document: str) -> None:
    named = {target for code in code_in(text_of(document)) for target in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", code)}
    assert named <= make_targets()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document: str) -> None:
    """In backticks, what begins with a folder of ours is a path; `name` in it stands for a name to choose."""
    folders = "sglfast|cext|tests|bench|docs"
    named = {
        path.rstrip("/.,:")
        for code in code_in(text_of(document))
        for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./*-]*)", code)
        if not re.search(r"(^|[/_])name\b", path)
    }
    missing = {path for path in named if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())}
    assert not missing
