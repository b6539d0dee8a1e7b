"""Native kernels in a separate program, with sanitizers, and with an emulator for ARM."""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests/native/check_kernels.cc"
WITHOUT_XLA = {"pack.cc", "dispatch.cc"}  # in addition to the kernels; other sources need XLA's headers


def build(compiler, machine, folder, *flags):
    """Compile the checks for a machine type, with the flags of the package's build."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    native = ROOT / hatch_build.SOURCES
    sources = [(native / name, extra) for name, extra in hatch_build.sources(machine)]
    chosen = [(path, extra) for path, extra in sources if path.name in WITHOUT_XLA or path.name.startswith("kernels_")]

    def compile_one(source):
        path, extra = source
        built = folder / f"{path.stem}.o"
        command = [compiler, *hatch_build.FLAGS, *extra, "-O1", *flags, f"-I{native}", "-c", path, "-o", built]
        subprocess.run(command, check=True)
        return built

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, [*chosen, (PROGRAM, ())]))
    subprocess.run([compiler, *flags, *objects, "-o", folder / "check"], check=True)
    return folder / "check"


def check(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [line.removesuffix(": checked") for line in done.stdout.splitlines()]


def test_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is available")
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() {}\n")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    if subprocess.run([compiler, *flags, probe, "-o", tmp_path / "probe"], check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    checked = check([build(compiler, os.uname().machine, tmp_path, *flags)])
    assert checked[-1] == "portable"


def test_threads_do_not_race(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is available")
    native, program = ROOT / "grok1/ops/cpu/native", tmp_path / "check"
    sources = [native / "parallel.cc", ROOT / "tests/native/check_pool.cc"]
    flags = ("-std=c++17", "-O1", "-g", "-pthread", f"-I{native}")
    sanitized = subprocess.run([compiler, *flags, "-fsanitize=thread", *sources, "-o", program], check=False)
    if sanitized.returncode == 0:
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        if "unexpected memory mapping" not in done.stderr:  # else the sanitizer cannot run on this system
            assert (done.stdout, done.returncode) == ("checked\n", 0), done.stderr[-3000:]
            return
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    assert check([program]) == ["checked"]


def test_arm_kernels_under_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs a compiler for ARM (g++-aarch64-linux-gnu) and an emulator (qemu-user)")
    program = build(compiler, "aarch64", tmp_path, "-O2", "-static")
    assert check([emulator, program]) == ["arm-dotprod", "portable"]
    assert check([emulator, "-cpu", "cortex-a57", program]) == ["portable"]  # has no dot-product instructions
