"""Compile the CPU kernels when the package is built, if a C++ compiler is available."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("grok1/ops/cpu/native")
LIBRARY = Path("grok1/ops/cpu/_kernels.so")

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w")
_LINK_FLAGS = {"Darwin": ("-undefined", "dynamic_lookup")}
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"),
)
_SOURCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("products.cc", ()),
    ("attention.cc", ()),
    ("pack.cc", ()),
    ("parallel.cc", ()),
    ("read.cc", ()),
    ("dispatch.cc", ()),
    ("kernels_portable.cc", ()),
)
# Each set of kernels is compiled for one kind of processor, and used only if the processor supports it.
_SOURCES_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "kernels_amx.cc": (*_AVX512, "-mamx-tile", "-mamx-int8"),
        "kernels_avx512.cc": _AVX512,
        "kernels_avxvnni.cc": (*_AVX2, "-mavxvnni"),
        "kernels_avx2.cc": _AVX2,
    },
    "aarch64": {"kernels_arm.cc": ("-march=armv8.2-a+dotprod",)},
}
_ARCHITECTURES = {"arm64": "aarch64"}


class KernelsHook(BuildHookInterface):
    """Add the compiled kernels to the package, or omit them and print a warning."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels; hatchling calls this before it collects the files of a wheel."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        reason = compile_kernels(root / SOURCES, root / LIBRARY)
        if reason is not None:
            self.app.display_warning(
                f"the CPU kernels were not built ({reason}): grok1 works without them, but is several times slower on "
                "CPUs; install a C++ compiler such as g++ and install grok1 again"
            )
            return
        if version == "editable":
            return  # used in place
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["force_include"][str(root / LIBRARY)] = str(LIBRARY)


def sources(machine: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the files to compile for a kind of processor, each with its flags in addition to `FLAGS`."""
    return [*_SOURCES, *_SOURCES_OF.get(_ARCHITECTURES.get(machine, machine), {}).items()]


def compile_kernels(folder: Path, library: Path) -> str | None:
    """Compile the kernels; return the reason if that fails, otherwise None."""
    library.unlink(missing_ok=True)
    try:
        from jaxlib import __file__ as jaxlib
    except ImportError:
        return "jaxlib, which contains the headers, is not installed"
    chosen = os.environ.get("CXX")
    compiler = shlex.split(chosen) if chosen else [next(filter(shutil.which, ("c++", "g++", "clang++")), "")]
    if not compiler[0]:
        return "no C++ compiler was found"
    flags = [*FLAGS, "-isystem", str(Path(jaxlib).parent / "include")]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            machine = _run([*compiler, "-dumpmachine"]).split("-")[0]
            wanted = sources(machine)
            objects = [str(Path(scratch, source).with_suffix(".o")) for source, _ in wanted]
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                commands = [
                    [*compiler, *flags, *extra, "-c", str(folder / source), "-o", built]
                    for (source, extra), built in zip(wanted, objects, strict=True)
                ]
                list(threads.map(_run, commands))
            made = library.with_suffix(".tmp")
            _run([*compiler, *_LINK_FLAGS.get(platform.system(), ()), "-shared", *objects, "-o", str(made)])
        except OSError as error:
            return f"{compiler[0]} cannot be run: {error.strerror}"
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            lines = error.stderr.strip().splitlines()
            return f"{compiler[0]} failed: {lines[0] if lines else f'exit code {error.returncode}'}"
    os.replace(made, library)
    return None


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    # Compiles the kernels in place, to run from the repository.
    failure = compile_kernels(Path(__file__).parent / SOURCES, Path(__file__).parent / LIBRARY)
    sys.exit(f"not built: {failure}" if failure else 0)
