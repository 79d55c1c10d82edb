"""The stubs of the compiled modules say what the modules are: names, parameters, defaults, kinds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = sorted(f"sglfast._{path.stem}" for path in (ROOT / "cext").glob("*.pyx"))


def test_every_compiled_module_has_a_stub() -> None:
    assert len(MODULES) >= 6
    assert [name for name in MODULES if not (ROOT / (name.replace(".", "/") + ".pyi")).exists()] == []


def test_stubs_agree_with_the_modules() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *MODULES], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
