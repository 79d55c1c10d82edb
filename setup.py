"""Build of the compiled modules: every `cext/<name>.pyx` becomes `sglfast._<name>`.

And of the ModelExpress schema: `setup.py build_proto` makes a module and its stub from every `sglfast/modelexpress/*.proto`,
into the source tree; whatever packs or installs the Python files does it first.

Environment flags, and no others:
    SGLFAST_DEBUG=1      bounds checks, -O0, asserts
    SGLFAST_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer
    SGLFAST_CFLAGS=...   appended to the compiler's flags (the Dockerfile names its machine with it)
    SGLFAST_ONLY=a,b     build only these modules (developer's loop)
"""

import os
import tempfile
from pathlib import Path
from typing import ClassVar

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py

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


class BuildProto(Command):
    """`<name>.proto` -> `<name>_pb2.py`, which holds the compiled schema and loads it into our own pool, and its stub `<name>_pb2.pyi`."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        from google.protobuf.descriptor_pb2 import FileDescriptorSet
        from grpc_tools import protoc

        for proto in sorted(Path("sglfast/modelexpress").glob("*.proto")):
            with tempfile.TemporaryDirectory() as folder:
                compiled = Path(folder, "set.binpb")
                arguments = ["protoc", f"-I{proto.parent}", f"--descriptor_set_out={compiled}", f"--pyi_out={folder}", proto.name]
                if protoc.main(arguments):
                    raise SystemExit(f"{proto}: protoc refuses it, see above")
                (file,) = FileDescriptorSet.FromString(compiled.read_bytes()).file
                module = proto.with_name(f"{proto.stem}_pb2.py")
                module.write_text(
                    f'"""Made from {proto.name} by `setup.py build_proto`; not to be edited."""\n\n'
                    "from sglfast.modelexpress.pool import define\n\n"
                    f"define({file.SerializeToString()!r}, globals())\n"
                )
                module.with_suffix(".pyi").write_text(Path(folder, f"{module.stem}.pyi").read_text())


class BuildPy(build_py):
    def run(self) -> None:
        self.run_command("build_proto")
        super().run()


setup(
    ext_modules=cythonize(extensions, include_path=["cext", "."], build_dir="build/cython", compiler_directives=directives, nthreads=0),
    cmdclass={"build_proto": BuildProto, "build_py": BuildPy},
)
