"""Describe the machine that a measurement ran on: device, software, state of the clone, and what it can do.

Torch is imported only where a GPU is asked about, and never at import. `machine_cpu` and `machine_gpu` hold the facts.
"""

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import trapetum
from trapetum import build, machine_cpu, machine_gpu
from trapetum.paths import ROOT

DEVICES = ("auto", "cpu", "cuda")


class DeviceError(RuntimeError):
    """The device asked for cannot be used; the message says why and what to do."""


class Capability(NamedTuple):
    """One thing that a machine may have, for `trapetum doctor`: its name, whether it is here, and a reason or version."""

    name: str
    available: bool
    why: str


def choose_device(device: str = "auto") -> str:
    """The device to use, `cpu` or `cuda`.

    Args:
        device: `cpu`, `cuda`, or `auto` for a usable NVIDIA GPU if there is one.

    Raises:
        DeviceError: `cuda` was asked for and cannot be used.
        ValueError: another word was given.
    """
    if device not in DEVICES:
        raise ValueError(f"the device must be one of {', '.join(DEVICES)}, not {device!r}.")
    if device == "cpu":
        return "cpu"
    why = machine_gpu.why_no_cuda()
    if why and device == "cuda":
        raise DeviceError(f"the device cuda was asked for, but {why}; use cpu or auto instead.")
    return "cpu" if why else "cuda"


def describe(device: str = "cpu") -> dict[str, Any]:
    """The `device` part of a record, as the machine is now.

    Args:
        device: `cpu` or `cuda` (`auto` chooses).

    Returns:
        name, arch (`sm_90`, `x86_64 avx512vnni`), sms (multiprocessors; threads used on a CPU), l2_bytes (the
        last-level cache on a CPU), memory_bytes, driver, power_limit_w, clocks (dict of `..._mhz`), temperature
        (degrees Celsius). What this machine does not tell is None.

    Raises:
        DeviceError: `cuda` was asked for and cannot be used.
    """
    if choose_device(device) == "cuda":
        return machine_gpu.describe()
    return {
        "name": machine_cpu.name(),
        "arch": machine_cpu.arch(),
        "sms": machine_cpu.threads(),
        "l2_bytes": machine_cpu.last_level_cache_bytes(),
        "memory_bytes": machine_cpu.memory_bytes(),
        "driver": None,
        "power_limit_w": machine_cpu.power_limit_w(),
        "clocks": machine_cpu.clocks(),
        "temperature": machine_cpu.temperature(),
    }


def after(before: dict[str, Any]) -> dict[str, Any]:
    """A description taken before a measurement, with its clocks and temperature as `{"before": ..., "after": ...}`.

    Args:
        before: what `describe` returned before the measurement.
    """
    now = describe("cuda" if str(before["arch"]).startswith("sm_") else "cpu")
    changing = ("clocks", "temperature")
    return before | {name: {"before": before[name], "after": now[name]} for name in changing}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built with, read without importing torch."""
    if "torch" in sys.modules:
        return sys.modules["torch"].version.cuda
    spec = importlib.util.find_spec("torch")
    version_file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return runpy.run_path(str(version_file)).get("cuda") if version_file and version_file.is_file() else None


def _system() -> str:
    """The operating system, e.g. `Debian GNU/Linux 12 (bookworm), Linux 6.1`."""
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def software() -> dict[str, str | None]:
    """The `software` part of a record: versions of python, torch, cuda (torch's), trapetum and the system."""
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "cuda": _torch_cuda(),
        "trapetum": trapetum.__version__,
        "os": _system(),
    }


def _git(*arguments: str) -> str | None:
    """What git answers about this clone, or None where it cannot."""
    trust = ["-c", f"safe.directory={ROOT}", "-c", "core.fsmonitor=false"]
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *trust, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """`commit` of the clone, and `dirty`: whether tracked files differ from it, records and runs not counted.

    Without git or its folder (a copied tree), the commit is `$TRAPETUM_COMMIT` with `dirty` False; without that, both
    are None.
    """
    commit = _git("rev-parse", "--verify", "HEAD") if (ROOT / ".git").exists() else None
    if commit is None:
        given = os.environ.get("TRAPETUM_COMMIT") or None
        return {"commit": given, "dirty": False if given else None}
    outputs = [":(exclude)data/records", ":(exclude)papermill_runs"]
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *outputs)
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def provenance(device: str = "cpu") -> dict[str, Any]:
    """What `trapetum.records.measured` needs to know of this machine: device, software, commit, dirty."""
    return {"device": describe(device), "software": software(), **git_state()}


def _cuda() -> Capability:
    why = machine_gpu.why_no_cuda()
    if why:
        return Capability("CUDA", False, why)
    gpu = machine_gpu.describe()
    return Capability(
        "CUDA", True, f"{gpu['name']} ({gpu['arch']}), driver {gpu['driver']}, torch's CUDA {_torch_cuda()}"
    )


def _package(name: str, module: str, *distributions: str) -> Capability:
    """Whether the package that brings `module` is installed, without importing it."""
    try:
        installed = importlib.util.find_spec(module) is not None
    except ImportError:  # its parent package is missing
        installed = False
    version = next(filter(None, map(_version, distributions)), "unknown version")
    return Capability(name, installed, version if installed else "not installed: pip install -e '.[gpu]'")


def _nvrtc() -> Capability:
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader raises its own classes when the library is missing
        return Capability("NVRTC", False, f"cannot be loaded ({' '.join(str(error).split())[:120]})")
    return Capability("NVRTC", int(status) == 0, f"{major}.{minor}")


def _c_compiler() -> Capability:
    compiler = build.c_compiler()
    if compiler is None:
        return Capability("C compiler", False, "none of cc, gcc, clang is on PATH, and CC names none")
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return Capability(
        "C compiler", True, f"{compiler}: {(done.stdout.splitlines() or ['unknown version'])[0]}"
    )


def _openmp() -> Capability:
    compiler = build.c_compiler()
    if compiler is None:
        return Capability("OpenMP", False, "there is no C compiler")
    source = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-fopenmp", "-x", "c", "-", "-o", str(Path(folder) / "probe")]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        return Capability("OpenMP", False, f"{compiler} -fopenmp fails; the CPU kernel will use one thread")
    return Capability("OpenMP", True, f"{machine_cpu.threads()} threads")


def _vectors() -> Capability:
    level = machine_cpu.vector_level()
    return Capability("vector instructions", level != "portable", f"{level} on {machine_cpu.name()}")


def _nvml_energy() -> Capability:
    name = "NVML energy counter"
    if machine_gpu.nvml() is None:
        return Capability(name, False, "NVML is not available (no NVIDIA driver, or no nvidia-ml-py)")
    if machine_gpu.why_no_cuda():
        return Capability(name, False, "there is no usable GPU")
    millijoules = machine_gpu.ask("nvmlDeviceGetTotalEnergyConsumption", machine_gpu.handle())
    if millijoules is None:
        return Capability(name, False, "this GPU has no energy counter; power samples are integrated instead")
    return Capability(name, True, f"{millijoules / 1000:.0f} J since the driver was loaded")


def _rapl() -> Capability:
    package = machine_cpu.rapl_package()
    if package is None:
        return Capability("RAPL energy counter", False, "the kernel exposes no /sys/class/powercap/*rapl:0")
    counter = package / "energy_uj"
    if not os.access(counter, os.R_OK):
        return Capability(
            "RAPL energy counter", False, f"{counter} is not readable: run `sudo chmod a+r {counter}`"
        )
    return Capability("RAPL energy counter", True, str(counter))


_PROBES: tuple[Callable[[], Capability], ...] = (
    lambda: _package("PyTorch", "torch", "torch"),
    _cuda,
    lambda: _package("CuPy", "cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy"),
    lambda: _package("cuda-bindings", "cuda.bindings", "cuda-bindings"),
    _nvrtc,
    _c_compiler,
    _openmp,
    _vectors,
    _nvml_energy,
    _rapl,
)


def capabilities() -> list[Capability]:
    """What can and cannot be done on this machine, each with its reason. Asks nothing of the network."""
    return [probe() for probe in _PROBES]
