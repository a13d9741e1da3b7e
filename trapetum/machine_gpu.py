"""Facts about the NVIDIA GPU in use: its fixed properties from torch, its state from NVML. None when unknown."""

import ctypes
import functools


@functools.cache
def driver_present() -> bool:
    """Whether an NVIDIA driver can be loaded. Quick, and without it no torch build can use a GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def why_no_cuda() -> str:
    """Why torch cannot compute on an NVIDIA GPU here, as the rest of a sentence; empty if it can. May import torch."""
    if not driver_present():
        return "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)"
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no usable NVIDIA GPU (is the driver too old, or the GPU hidden?)"
        )
    return ""


@functools.cache
def nvml():
    """The initialised `pynvml` module, or None where NVML or its binding is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or one of NVML's own error classes
        return None
    return pynvml


def _handle_names(index: int) -> list[str]:
    """How NVML may know torch's device `index`, which CUDA_VISIBLE_DEVICES can renumber."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return [f"{prefix}-{uuid}" for prefix in ("GPU", "MIG")] if uuid else []


def handle(index: int | None = None):
    """NVML's handle of torch's CUDA device `index` (the current one if None), or None."""
    library = nvml()
    if library is None:
        return None
    import torch

    index = torch.cuda.current_device() if index is None else index
    for name in _handle_names(index):
        try:
            return library.nvmlDeviceGetHandleByUUID(name)
        except library.NVMLError:
            continue
    try:
        return library.nvmlDeviceGetHandleByIndex(index)
    except library.NVMLError:
        return None


def ask(function: str, *arguments):
    """One NVML query, e.g. `ask("nvmlSystemGetDriverVersion")`; None where it fails or is not supported."""
    library = nvml()
    if library is None or any(argument is None for argument in arguments):
        return None
    try:
        answer = getattr(library, function)(*arguments)
    except (library.NVMLError, AttributeError):
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def clocks(gpu) -> dict[str, int]:
    """Clocks in MHz of the NVML handle `gpu`: `sm_mhz`, `memory_mhz` now, and the highest of each."""
    found = {}
    for name, kind in (("sm_mhz", 1), ("memory_mhz", 2)):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
        found[name] = ask("nvmlDeviceGetClockInfo", gpu, kind)
        found[f"max_{name}"] = ask("nvmlDeviceGetMaxClockInfo", gpu, kind)
    return {name: mhz for name, mhz in found.items() if mhz}


def temperature(gpu) -> float | None:
    """Temperature of the NVML handle `gpu` in degrees Celsius, or None."""
    degrees = ask("nvmlDeviceGetTemperature", gpu, 0)  # NVML_TEMPERATURE_GPU
    return None if degrees is None else float(degrees)


def describe(index: int | None = None) -> dict:
    """The `device` part of a record for torch's CUDA device `index` (the current one if None)."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    gpu = handle(index)
    limit_mw = ask("nvmlDeviceGetEnforcedPowerLimit", gpu)
    return {
        "name": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": ask("nvmlSystemGetDriverVersion"),
        "power_limit_w": limit_mw / 1000 if limit_mw else None,
        "clocks": clocks(gpu),
        "temperature": temperature(gpu),
    }
