"""Build of the compiled modules: every `cext/<name>.pyx` becomes `sglfast._<name>`.

Environment flags, and no others:
    SGLFAST_DEBUG=1      bounds checks, -O0, asserts
    SGLFAST_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer
    SGLFAST_CFLAGS=...   appended to the compiler's flags (the Dockerfile names its machine with it)
    SGLFAST_ONLY=a,b     build only these modules (developer's loop)
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup

DEBUG = os.environ.get("SGLFAST_DEBUG") == "1"
SANITIZE = os.environ.get("SGLFAST_SANITIZE") == "1"
ONLY = set(filter(None, os.environ.get("SGLFAST_ONLY", "").split(",")))

# Plain C sources that a module links beside its own .pyx.
C_SOURCES = {"blockhash": ["cext/sf_sha256.c"]}

cflags = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare", "-fno-omit-frame-pointer", "-g1"]
cflags += ["-O0", "-UNDEBUG"] if DEBUG else ["-O3", "-fwrapv", "-DNDEBUG", "-DCYTHON_WITHOUT_ASSERTIONS"]
ldflags = []
if SANITIZE:
    cflags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    ldflags += ["-fsanitize=address,undefined"]
cflags += os.environ.get("SGLFAST_CFLAGS", "").split()

Options.warning_errors = True
headers = sorted(str(path) for path in Path("cext").glob("*.h"))
extensions = [
    Extension(
        f"sglfast._{pyx.stem}",
        [str(pyx), *C_SOURCES.get(pyx.stem, [])],
        include_dirs=["cext"],
        depends=headers,
        extra_compile_args=cflags,
        extra_link_args=ldflags,
    )
    for pyx in sorted(Path("cext").glob("*.pyx"))
    if not ONLY or pyx.stem in ONLY
]
directives = {
    "language_level": 3, "binding": True, "embedsignature": True, "cdivision": True,
    "boundscheck": DEBUG, "wraparound": False, "initializedcheck": False,
    "auto_pickle": False, "autotestdict": False,
}  # fmt: skip
setup(ext_modules=cythonize(extensions, include_path=["cext", "."], build_dir="build/cython", compiler_directives=directives, nthreads=0))
