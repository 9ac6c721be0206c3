"""Builds `torch_dropout_ir._C`: C++ kernels, and CUDA ones where nvcc fits torch.

Metadata is in pyproject.toml. Environment:

* ``TORCH_DROPOUT_IR_NO_EXTENSION=1``: build nothing, use the pure-Python kernels.
* ``TORCH_DROPOUT_IR_CUDA_ARCHS``: for instance ``90`` or ``80;90``; ``none``: no CUDA.
* ``TORCH_DROPOUT_IR_WERROR=1``: warnings are errors, for developers and CI.
* ``CXX``, ``CXXFLAGS``, ``CUDA_HOME``: as usual.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# One place for objects, so that pip, which builds in temporary folders, finds them.
OBJECTS = ROOT / "build" / "csrc"
# Every release architecture of a toolkit that it still supports is built; the
# newest one also as PTX, for GPUs to come.
RELEASE_ARCHS = (70, 75, 80, 86, 89, 90, 100, 120)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and later
BUILDS = {"build_ext", "build", "bdist_wheel", "editable_wheel", "develop", "install"}


def say(message: str) -> None:
    """Print one line about the choice made, when something is being built."""
    if BUILDS & set(sys.argv):
        print(f"torch_dropout_ir: {message}", file=sys.stderr)


def is_set(name: str) -> bool:
    """Return whether a switch in the environment is on."""
    return os.environ.get(name, "0") not in {"", "0"}


def find_compiler() -> list[str] | None:
    """Return the C++ compiler as a command, or None."""
    wanted = os.environ.get("CXX") or sysconfig.get_config_var("CXX")
    for candidate in (wanted, "c++", "g++", "clang++"):
        command = shlex.split(candidate or "")
        if command and shutil.which(command[0]):
            return command
    return None


def why_no_extension() -> str | None:
    """Return why only the pure-Python kernels can be had, or None."""
    if is_set("TORCH_DROPOUT_IR_NO_EXTENSION"):
        return "TORCH_DROPOUT_IR_NO_EXTENSION is set"
    if platform.system() not in {"Linux", "Darwin"}:
        return f"the kernels are not ported to {platform.system()}"
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not importable here; install torch first, then this with "
            "--no-build-isolation"
        )
    if find_compiler() is None:
        return "no C++ compiler found (set CXX)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h not found (install the development files of this Python)"
    return None


def cuda_homes() -> list[Path]:
    """Return the directories that may hold a CUDA toolkit, most explicit first."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes = [Path(name) for name in named if name]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parents[1])
    return [*homes, Path("/usr/local/cuda")]


def output_of(command: list[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def find_cuda(torch_cuda: str | None) -> tuple[Path | None, str]:
    """Return the toolkit to build with, or None and the reason.

    The nvcc on PATH may be a wrapper script, so a home counts only with its headers.
    """
    if os.environ.get("TORCH_DROPOUT_IR_CUDA_ARCHS") == "none":
        return None, "TORCH_DROPOUT_IR_CUDA_ARCHS=none"
    if torch_cuda is None:
        return None, "this torch is a CPU build"
    found = []
    for home in cuda_homes():
        nvcc = home / "bin" / "nvcc"
        if not (nvcc.exists() and (home / "include" / "cuda_runtime.h").exists()):
            continue
        match = re.search(r"release (\d+)\.(\d+)", output_of([str(nvcc), "--version"]))
        version = ".".join(match.groups()) if match else "unknown"
        if version.split(".")[0] == torch_cuda.split(".")[0]:
            return home, ""
        found.append(version)
    if found:
        return None, f"nvcc is {', '.join(found)} but torch was built for {torch_cuda}"
    return None, "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found"


def gencode_flags(nvcc: str) -> list[str]:
    """Return nvcc's flags for the architectures asked for, or for a release."""
    asked = os.environ.get("TORCH_DROPOUT_IR_CUDA_ARCHS", "")
    archs = [a.replace(".", "") for a in re.split(r"[;, ]+", asked) if a]
    if not archs:
        listed = output_of([nvcc, "--list-gpu-arch"]).split()
        archs = [str(a) for a in RELEASE_ARCHS if f"compute_{a}" in listed]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildKernels(build_ext):
    """Compiles each source when it, a header or its command has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources of ``ext`` and link them."""
        import torch

        torch_home = Path(torch.__file__).parent
        cuda, reason = find_cuda(torch.version.cuda)
        if cuda is None:
            say(f"building for the CPU only: {reason}")
        else:
            say(f"building for the CPU and CUDA {torch.version.cuda}")
        paths = [torch_home / "include", sysconfig.get_paths()["include"]]
        includes = [f"-isystem{path}" for path in paths]
        jobs = self.jobs(includes, cuda)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.run_if_stale(*job), jobs))
        objects = [job[0] for job in jobs]
        target = Path(self.get_ext_fullpath(ext.name))
        self.run_if_stale(target, self.link(objects, target, torch_home, cuda), objects)

    def jobs(
        self, includes: list[str], cuda: Path | None
    ) -> list[tuple[Path, list[str], list[Path]]]:
        """Return (object, command, dependencies) of each source."""
        headers = sorted(CSRC.glob("*.h"))
        flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-fPIC"]
        flags += ["-Werror"] if is_set("TORCH_DROPOUT_IR_WERROR") else []
        flags += ["-fvisibility=hidden", TORCH_TARGET, *includes]
        flags += ["-DDROPOUT_WITH_CUDA"] if cuda else []
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        compiler = [*(find_compiler() or []), *flags]
        names = ("dropout_cpu.cpp", "forms.cpp", "jets.cpp", "ops.cpp", "roots.cpp")
        sources = [(CSRC / name, compiler) for name in names]
        if cuda:
            nvcc = str(cuda / "bin" / "nvcc")
            command = [nvcc, "-std=c++17", "-O3"]
            if is_set("TORCH_DROPOUT_IR_WERROR"):
                command += ["-Werror", "all-warnings"]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
            command += ["-DDROPOUT_WITH_CUDA", *gencode_flags(nvcc)]
            sources.append((CSRC / "dropout_cuda.cu", command))
        jobs = []
        for source, command in sources:
            target = OBJECTS / (source.name + ".o")
            full = [*command, "-c", str(source.relative_to(ROOT)), "-o", str(target)]
            jobs.append((target, full, [source, *headers]))
        return jobs

    def link(
        self, objects: list[Path], target: Path, torch_home: Path, cuda: Path | None
    ) -> list[str]:
        """Return the command that links the shared object."""
        command = [*(find_compiler() or []), *map(str, objects), "-o", str(target)]
        if platform.system() == "Darwin":
            return [*command, "-bundle", "-undefined", "dynamic_lookup"]
        # libtorch_cpu is in memory by the time the module is imported, so there is
        # no rpath; libtorch_cuda is not linked, so a CPU-only torch loads this too.
        command += ["-shared", f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ldl", "-s"]
        if cuda:
            lib = cuda / "lib64"
            command += [f"-L{lib}", "-lcudart_static", "-lrt", "-lpthread"]
            command += ["-Wl,--exclude-libs,ALL"]
        return command

    def run_if_stale(
        self, target: Path, command: list[str], dependencies: list[Path]
    ) -> None:
        """Run ``command`` unless ``target`` is newer than all it depends on."""
        stamp = OBJECTS / (target.name + ".command")
        text = shlex.join(command)
        if target.exists() and stamp.exists() and stamp.read_text() == text:
            newest = max(path.stat().st_mtime for path in dependencies)
            if target.stat().st_mtime >= newest:
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        subprocess.run(command, check=True, cwd=ROOT)
        stamp.write_text(text)


def extension_options() -> dict[str, object]:
    """Return what `setup` needs beyond pyproject.toml: the extension, or nothing."""
    if reason := why_no_extension():
        say(f"building without compiled kernels: {reason}")
        return {}
    # BuildKernels knows what to compile; MANIFEST.in names it for sdist, with and
    # without torch.
    extension = Extension("torch_dropout_ir._C", [], py_limited_api=True)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_options())
