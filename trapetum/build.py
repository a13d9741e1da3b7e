"""Compile the sources in `kernels/` at run time and keep the results on disk.

CUDA goes through NVRTC (needs neither a GPU nor `nvcc`), C through the system's compiler. A cached file is named by
the hash of everything that went into it, so an edited source never meets a stale binary, and it appears by rename,
so a killed build leaves nothing behind.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trapetum.paths import KERNELS, cache_dir, require_clone

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message carries the compiler's words."""


def source_text(name: str) -> str:
    """The source `kernels/<name>`, followed by every file it includes with quotes, for hashing."""
    require_clone()
    path = KERNELS / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in KERNELS.glob("*.c*")))
        raise BuildError(f"no kernel source named {name!r} in {KERNELS}; there are: {known}")
    text = path.read_text()
    return text + "".join(source_text(included) for included in _INCLUDE.findall(text))


def source_sha256(*names: str) -> str:
    """SHA-256 (hex) of the kernel sources `names` with their includes: what a measured record carries."""
    return hashlib.sha256("".join(source_text(name) for name in names).encode()).hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` by way of a temporary name in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(handle, 0o644)  # mkstemp makes private files
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class KernelResources:
    """What the assembler said of one kernel: registers a thread, bytes spilled, static shared memory in bytes."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """A compiled CUDA source.

    Attributes:
        path: the cached `.cubin`.
        arch: e.g. `sm_90`.
        log: the assembler's report.
    """

    path: Path
    arch: str
    log: str

    def resources(self) -> dict[str, KernelResources]:
        """Registers, spills and static shared memory by kernel name, read from the assembler's report."""
        found = {}
        for block in re.split(r"Compiling entry function '", self.log)[1:]:
            name = block.split("'", 1)[0]
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
            registers = re.search(r"Used (\d+) registers", block)
            shared = re.search(r"(\d+) bytes smem", block)
            found[name] = KernelResources(
                registers=int(registers[1]) if registers else 0,
                spill_bytes=sum(map(int, spills.groups())) if spills else 0,
                shared_bytes=int(shared[1]) if shared else 0,
            )
        return found


def _cuda_include_dirs() -> list[str]:
    """Folders with `cuda_fp16.h`: the pip packages' first, then `$CUDA_HOME`."""
    import importlib.util

    found = []
    nvidia = importlib.util.find_spec("nvidia")
    for base in nvidia.submodule_search_locations if nvidia else []:
        found += [p.parent for p in Path(base).glob("*/include/cuda_fp16.h")]
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "include" / "cuda_fp16.h").is_file():
            found.append(Path(home) / "include")
    if not found:
        raise BuildError(
            "cuda_fp16.h was not found; install the CUDA headers with `pip install 'trapetum[gpu]'` "
            "or set CUDA_HOME to a CUDA toolkit."
        )
    return [str(p) for p in found[:1]]


def _nvrtc():
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BuildError(
            "compiling CUDA sources needs the cuda-bindings package; install it with `pip install 'trapetum[gpu]'`."
        ) from error
    return nvrtc


def _nvrtc_check(nvrtc, result):
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else values


def _nvrtc_text(nvrtc, program, size_of, fetch) -> bytes:
    size = _nvrtc_check(nvrtc, size_of(program))
    buffer = bytearray(size)
    _nvrtc_check(nvrtc, fetch(program, buffer))
    return bytes(buffer)


def _run_nvrtc(nvrtc, source: str, name: str, options: list[str]) -> tuple[bytes, str]:
    program = _nvrtc_check(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = _nvrtc_text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        log = log.rstrip(b"\0").decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"kernels/{name} does not compile ({' '.join(options[:1])}):\n{log}")
        return _nvrtc_text(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compile_cuda(name: str, arch: str, defines: Sequence[str] = ()) -> Cubin:
    """Compile `kernels/<name>` with NVRTC, or take the cached result.

    Args:
        name: file name in `kernels/`, e.g. `codebook_gemv.cu`.
        arch: real architecture, `sm_75` or newer, e.g. `sm_90`.
        defines: preprocessor definitions such as `BITS=4`.

    Returns:
        the cubin's place on disk and the assembler's report.

    Raises:
        BuildError: no NVRTC, no CUDA headers, or the source does not compile.
    """
    nvrtc = _nvrtc()
    version = ".".join(map(str, _nvrtc_check(nvrtc, nvrtc.nvrtcVersion())))
    text = source_text(name)
    key = _key(text, arch, version, *defines)
    cubin = cache_dir() / "cuda" / f"{Path(name).stem}-{arch}-{key}.cubin"
    log = cubin.with_suffix(".log")
    if not (cubin.is_file() and log.is_file()):
        options = [
            f"--gpu-architecture={arch}",
            "--std=c++17",
            "--ptxas-options=-v",
            f"--include-path={KERNELS}",
            *(f"--include-path={path}" for path in _cuda_include_dirs()),
            *(f"--define-macro={definition}" for definition in defines),
        ]
        binary, report = _run_nvrtc(nvrtc, (KERNELS / name).read_text(), name, options)
        write_atomically(log, report.encode())
        write_atomically(cubin, binary)
    return Cubin(cubin, arch, log.read_text())


def c_compiler() -> str | None:
    """The system's C or C++ compiler: `$CC` if set, else the first of cc, gcc, clang, c++, g++, or None."""
    candidates = [os.environ.get("CC"), "cc", "gcc", "clang", "c++", "g++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _compile_c_with(compiler: str, source: Path, flags: Sequence[str], target: Path) -> str | None:
    """Try one set of flags; return the compiler's error text, or None on success."""
    language = ["-x", "c"] if Path(compiler).name.endswith("++") else []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [
            compiler,
            *language,
            "-O3",
            "-fPIC",
            "-shared",
            *flags,
            str(source),
            "-o",
            str(built),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return done.stderr.strip()
        os.replace(built, target)
    return None


def compile_c(name: str) -> Path:
    """Compile `kernels/<name>` into a shared library, or take the cached one.

    OpenMP is used where the compiler has it (import torch first, so that both share one runtime).

    Returns:
        the library's path, for `ctypes.CDLL`.

    Raises:
        BuildError: there is no compiler, or the source does not compile.
    """
    compiler = c_compiler()
    if compiler is None:
        raise BuildError("no C compiler was found; install gcc or clang, or name one in the CC variable.")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    target = cache_dir() / "cpu" / f"{Path(name).stem}-{_key(source_text(name), compiler, version)}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    error = _compile_c_with(compiler, KERNELS / name, ["-fopenmp"], target)
    if error is not None:
        error = _compile_c_with(compiler, KERNELS / name, [], target)
    if error is not None:
        raise BuildError(f"kernels/{name} does not compile with {compiler}:\n{error}")
    return target
