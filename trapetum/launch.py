"""Load a CUDA source of `kernels/` and launch it on PyTorch's current stream.

NVRTC compiles (`trapetum.build`), CuPy loads the cubin, and `cuLaunchKernelEx` launches, so that a launch can carry the
programmatic-dependent-launch attribute and can be captured in a CUDA graph. `recorded` collects the launches of a block of
code, so that they can be made elsewhere.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from trapetum import build


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for.

    Attributes:
        source, name, defines: of the kernel, as `Kernel` takes them.
        grid, block: three sizes each.
        shared_bytes: dynamic shared memory.
        arguments: pairs (value, ctypes type); a pointer's value is a device address.
        pdl: whether it may overlap the kernel before it.
        cubin: the compiled source, on disk.
    """

    source: str
    name: str
    defines: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[tuple, ...]
    pdl: bool
    cubin: Path


@dataclass
class _Recording:
    launches: list[Launch]
    dry: bool


_recording: _Recording | None = None  # what `recorded` collects into


@contextmanager
def recorded(dry: bool = False) -> Iterator[list[Launch]]:
    """Within this context every `Kernel.launch` of the process is noted, in order.

    Args:
        dry: note the launches instead of making them.

    Yields:
        the list that grows with each launch.

    Raises:
        RuntimeError: launches are being recorded already.
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("launches are being recorded already; end that recording first.")
    _recording = _Recording([], dry)
    try:
        yield _recording.launches
    finally:
        _recording = None


class Kernel:
    """A loaded CUDA function with prepared launch attributes.

    Args:
        source: file name in `kernels/`.
        name: of the `extern "C"` function.
        defines: preprocessor definitions it is compiled with.
        device: index of the GPU.
    """

    def __init__(self, source: str, name: str, defines: tuple[str, ...], device: int):
        import cupy
        from cuda.bindings import driver

        self.source, self.name, self.defines = source, name, tuple(defines)
        self.cubin: Path | None = None

        def load(path):
            self.cubin = path
            function = cupy.RawModule(path=str(path)).get_function(name)
            return function, driver.CUfunction(int(function.kernel.ptr))  # only now the driver sees the cubin

        major, minor = torch.cuda.get_device_capability(device)
        with cupy.cuda.Device(device):
            self._function, self._handle = build.load_cuda(source, f"sm_{major}{minor}", defines, load)
        self._shared_limit = 48 * 1024
        self._driver, self._device = driver, device
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        self._pdl = [attribute] if (major, minor) >= (9, 0) else []
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        self._cooperative = [together]

    def blocks_at_once(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of `threads` threads and so much dynamic shared memory a multiprocessor holds.

        Raises:
            RuntimeError: CUDA does not say.
        """
        driver = self._driver
        status, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            self._handle, threads, shared_bytes
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"CUDA does not say how many blocks of {self.name} are resident: {status.name}"
            )
        return blocks

    def launch(
        self, grid, block, shared_bytes: int, arguments, pdl: bool = False, cooperative: bool = False
    ) -> None:
        """Launch on the current stream.

        Args:
            grid, block: three sizes each.
            shared_bytes: dynamic shared memory.
            arguments: pairs (value, ctypes type), from `pointer` and `integer`.
            pdl: let this launch overlap the kernel before it (ignored below sm_90).
            cooperative: all blocks are resident at once, or CUDA refuses, so they may wait for each other.

        Raises:
            RuntimeError: CUDA refused the launch, or a cooperative one is to be recorded, which `Launch` cannot say.
        """
        if _recording is not None:
            if cooperative:
                raise RuntimeError(f"the cooperative launch of {self.name} cannot be recorded.")
            _recording.launches.append(self._noted(grid, block, shared_bytes, arguments, pdl))
            if _recording.dry:
                return
        if shared_bytes > self._shared_limit:
            self._function.max_dynamic_shared_size_bytes = shared_bytes
            self._shared_limit = shared_bytes
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        attributes = (self._pdl if pdl else []) + (self._cooperative if cooperative else [])
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        values, types = zip(*arguments, strict=True)
        (status,) = driver.cuLaunchKernelEx(config, self._handle, (values, types), 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"CUDA refused the launch of {self._function.name} with grid {grid}, block {block} and "
                f"{shared_bytes} bytes of shared memory: {status.name}"
            )

    def _noted(self, grid, block, shared_bytes: int, arguments, pdl: bool) -> Launch:
        kernel = self.source, self.name, self.defines
        return Launch(*kernel, tuple(grid), tuple(block), shared_bytes, tuple(arguments), pdl, self.cubin)


@cache
def kernel(source: str, name: str, defines: tuple[str, ...], device: int) -> Kernel:
    """The loaded function `name` of `kernels/<source>`, compiled and loaded once a process and device."""
    return Kernel(source, name, defines, device)


def pointer(tensor: torch.Tensor | None) -> tuple:
    """A device pointer as a launch argument; None is a null pointer."""
    return (tensor.data_ptr() if tensor is not None else 0, ctypes.c_void_p)


def integer(value: int) -> tuple:
    """A C int as a launch argument."""
    return (value, ctypes.c_int)
