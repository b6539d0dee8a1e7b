"""Compiles the kernels for processors while the package is built, if a C++ compiler is there."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("grok1/ops/native/quantized_matmul.cc")
LIBRARY = Path("grok1/ops/_kernels.so")


class KernelsHook(BuildHookInterface):
    """Puts the compiled kernels beside `grok1/ops/cpu.py`, or leaves them out and says so."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles; called by hatchling before it collects the files of a wheel."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        reason = compile_kernels(root / SOURCE, root / LIBRARY)
        if reason is not None:
            self.app.display_warning(
                f"the kernels for processors were not built ({reason}): grok1 works without them, several times slower "
                "on CPUs; install a C++ compiler such as g++ and install grok1 again"
            )
            return
        if version == "editable":
            return  # it is used from where it lies
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["force_include"][str(root / LIBRARY)] = str(LIBRARY)


def compile_kernels(source: Path, library: Path) -> str | None:
    """Compiles the kernels; why not, if that is not possible."""
    library.unlink(missing_ok=True)
    try:
        from jaxlib import __file__ as jaxlib
    except ImportError:
        return "jaxlib, which brings the headers, is not there"
    chosen = os.environ.get("CXX")
    found = shlex.split(chosen) if chosen else [next(filter(shutil.which, ("c++", "g++", "clang++")), "")]
    if not found[0]:
        return "no C++ compiler was found"
    scratch = library.with_suffix(".tmp")
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    command = [
        *found,
        *("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-w", *undefined),
        *("-isystem", str(Path(jaxlib).parent / "include"), str(source), "-o", str(scratch)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{found[0]} cannot be run: {error.strerror}"
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        lines = done.stderr.strip().splitlines()
        return f"{found[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}"
    os.replace(scratch, library)
    return None


if __name__ == "__main__":
    # For those who run from the repository without installing it.
    failure = compile_kernels(Path(__file__).parent / SOURCE, Path(__file__).parent / LIBRARY)
    sys.exit(f"not built: {failure}" if failure else 0)
