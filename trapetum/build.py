"""Compile the sources in `kernels/` at run time and keep the results on disk.

CUDA goes through NVRTC (needs neither a GPU nor `nvcc`), C through the system's compiler. A cached file is named by
the hash of everything that went into it, so an edited source never meets a stale binary (`trapetum.kernel_cache`).
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trapetum.kernel_cache import keep, recall, write_atomically  # noqa: F401  (others take the last from here)
from trapetum.paths import KERNELS, cache_dir, require_clone

Loaded = TypeVar("Loaded")
_TOOLKIT = "/usr/local/cuda"  # where one is looked for when CUDA_HOME names none
_CACHE_LAYOUT = "2"  # of trapetum.kernel_cache's files; another number makes every kernel anew
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message carries the compiler's words."""


def source_text(name: str) -> str:
    """The source `kernels/<name>`, followed by every file it includes with quotes, for hashing."""
    require_clone()
    path = KERNELS / name
    if not path.is_file():
        known = ", ".join(source_names())
        raise BuildError(f"no kernel source named {name!r} in {KERNELS}; there are: {known}")
    text = path.read_text()
    return text + "".join(source_text(included) for included in _INCLUDE.findall(text))


def source_names() -> list[str]:
    """Every kernel source, as `source_text` takes it: its path below `kernels/`."""
    paths = KERNELS.rglob("*.c*")
    return sorted(str(p.relative_to(KERNELS)) for p in paths)


def source_sha256(*names: str) -> str:
    """SHA-256 (hex) of the kernel sources `names` with their includes: what a measured record carries."""
    return hashlib.sha256("".join(source_text(name) for name in names).encode()).hexdigest()


def current_sha256s() -> set[str]:
    """What a record may carry today: the hash of each source, and of every two that a product may be made of, in order."""
    names = source_names()
    pairs = ((a, b) for a in names for b in names if a != b and Path(a).suffix == Path(b).suffix)
    return {source_sha256(name) for name in names} | {source_sha256(*pair) for pair in pairs}


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_CACHE_LAYOUT, *parts)).encode()).hexdigest()[:20]


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
    for home in (os.environ.get("CUDA_HOME"), _TOOLKIT):
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


def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC in use.

    Raises:
        BuildError: there is none, with how to install it.
    """
    nvrtc = _nvrtc()
    try:
        major, minor = _nvrtc_check(nvrtc, nvrtc.nvrtcVersion())
    except BuildError:
        raise
    except RuntimeError as error:  # the bindings are there, the library is not
        raise BuildError(
            "NVRTC, which compiles the CUDA sources, was not found; install it with `pip install 'trapetum[gpu]'` "
            "or `pip install nvidia-cuda-nvrtc`."
        ) from error
    return major, minor


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver supports, as (major, minor); None without a driver."""
    try:
        from cuda.bindings import driver

        status, version = driver.cuDriverGetVersion()
    except (ImportError, RuntimeError):
        return None
    known = status == driver.CUresult.CUDA_SUCCESS and version > 0
    return (version // 1000, version % 1000 // 10) if known else None


def _dotted(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version)) if version else "unknown"


def why_not() -> str:
    """Why CUDA sources cannot be compiled here for this machine's driver, as one sentence; empty when they can.

    Within one major version an older driver loads what a newer NVRTC compiled; across two it does not.
    """
    try:
        compiler, driver = nvrtc_version(), driver_version()
        _cuda_include_dirs()
    except BuildError as error:
        return str(error)
    if driver is None or driver[0] >= compiler[0]:
        return ""
    return (
        f"the NVIDIA driver supports CUDA {_dotted(driver)} and cannot load what NVRTC {_dotted(compiler)} compiles; "
        f"{_other_versions(driver)}"
    )


def _other_versions(driver: tuple[int, int] | None) -> str:
    return f"update the driver, or install an NVRTC (the package nvidia-cuda-nvrtc) of version {_dotted(driver)} or older."


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


def _first_error(log: str) -> str:
    """The line of a compiler's log that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next(
        (line for line in lines if "error:" in line), lines[0] if lines else "the compiler says nothing."
    )


def _require_arch(nvrtc, arch: str) -> None:
    known = _nvrtc_check(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    if int(re.sub(r"\D", "", arch) or 0) not in known:
        raise BuildError(
            f"NVRTC {_dotted(nvrtc_version())} does not compile for {arch}, only for "
            f"{', '.join(f'sm_{number}' for number in known)}; a newer card needs a newer nvidia-cuda-nvrtc."
        )


def _run_nvrtc(nvrtc, source: str, name: str, options: list[str]) -> tuple[bytes, str]:
    program = _nvrtc_check(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = _nvrtc_text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        log = log.rstrip(b"\0").decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"kernels/{name} does not compile ({options[0]}): {_first_error(log)}\n{log}")
        return _nvrtc_text(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compile_cuda(name: str, arch: str, defines: Sequence[str] = (), fresh: bool = False) -> Cubin:
    """Compile `kernels/<name>` with NVRTC, or take the cached result.

    Args:
        name: file name in `kernels/`, e.g. `codebook_gemv.cu`.
        arch: real architecture, `sm_75` or newer, e.g. `sm_90`.
        defines: preprocessor definitions such as `BITS=4`.
        fresh: compile even if the cache has it.

    Returns:
        the cubin's place on disk and the assembler's report.

    Raises:
        BuildError: no NVRTC, no CUDA headers, or the source does not compile.
        OSError: neither the cache nor a temporary folder can be written.
    """
    nvrtc, version = _nvrtc(), _dotted(nvrtc_version())
    key = _key(source_text(name), arch, version, *defines)
    path = cache_dir() / "cuda" / f"{Path(name).stem}-{arch}-{key}.cubin"
    found = None if fresh else recall(path)
    if found is None:
        _require_arch(nvrtc, arch)
        options = [
            f"--gpu-architecture={arch}",
            "--std=c++17",
            "--ptxas-options=-v",
            f"--include-path={KERNELS}",
            *(f"--include-path={path}" for path in _cuda_include_dirs()),
            *(f"--define-macro={definition}" for definition in defines),
        ]
        found = keep(path, *_run_nvrtc(nvrtc, (KERNELS / name).read_text(), name, options))
    return Cubin(found.path, arch, found.report)


# What the driver calls an image that it cannot use; other errors are not the image's.
_IMAGE_ERRORS = (
    "INVALID_IMAGE",
    "NO_BINARY_FOR_GPU",
    "INVALID_PTX",
    "UNSUPPORTED_PTX_VERSION",
    "INVALID_SOURCE",
)


def _blames_image(error: RuntimeError) -> bool:
    return any(f"CUDA_ERROR_{name}" in str(error) for name in _IMAGE_ERRORS)


def load_cuda(name: str, arch: str, defines: Sequence[str], load: Callable[[Path], Loaded]) -> Loaded:
    """What `load` makes of the compiled `kernels/<name>`; a cubin that the driver refuses is compiled again, once.

    Args:
        name, arch, defines: as for `compile_cuda`.
        load: takes the cubin's path and hands it to the driver.

    Raises:
        BuildError: as `compile_cuda`, or the driver refuses the new cubin too; both versions are named.
    """
    try:
        return load(compile_cuda(name, arch, defines).path)
    except RuntimeError as error:
        if not _blames_image(error):
            raise
    try:
        return load(compile_cuda(name, arch, defines, fresh=True).path)
    except RuntimeError as error:
        if not _blames_image(error):
            raise
        driver = driver_version()
        raise BuildError(
            f"the NVIDIA driver (CUDA {_dotted(driver)}) refuses kernels/{name} as NVRTC {_dotted(nvrtc_version())} "
            f"compiled it for {arch} ({error}); {_other_versions(driver)}"
        ) from error


def c_compiler() -> str | None:
    """The system's C or C++ compiler: `$CC` if set, else the first of cc, gcc, clang, c++, g++, or None."""
    candidates = [os.environ.get("CC"), "cc", "gcc", "clang", "c++", "g++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _compile_c_with(compiler: str, source: Path, flags: Sequence[str]) -> tuple[bytes, str]:
    """The shared library and the compiler's words; no bytes where one set of flags did not work."""
    language = ["-x", "c"] if Path(compiler).name.endswith("++") else []
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernel.so"
        flags = ["-O3", "-fPIC", "-shared", *flags]
        command = [compiler, *language, *flags, str(source), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        return built.read_bytes() if done.returncode == 0 else b"", done.stderr.strip()


def compile_c(name: str) -> Path:
    """Compile `kernels/<name>` into a shared library, or take the cached one.

    OpenMP is used where the compiler has it (import torch first, so that both share one runtime).

    Returns:
        the library's path, for `ctypes.CDLL`.

    Raises:
        BuildError: there is no compiler, or the source does not compile.
        OSError: neither the cache nor a temporary folder can be written.
    """
    compiler = c_compiler()
    if compiler is None:
        raise BuildError("no C compiler was found; install gcc or clang, or name one in the CC variable.")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    path = cache_dir() / "cpu" / f"{Path(name).stem}-{_key(source_text(name), compiler, version)}.so"
    found = recall(path)
    if found is None:
        binary, said = _compile_c_with(compiler, KERNELS / name, ["-fopenmp"])
        if not binary:
            binary, said = _compile_c_with(compiler, KERNELS / name, [])
        if not binary:
            raise BuildError(f"kernels/{name} does not compile with {compiler}: {_first_error(said)}\n{said}")
        found = keep(path, binary, said)
    return found.path
