"""What only the claims need measured: products of many rows, the article's calls as printed, compiled operations.

`compiled_formats` needs NVRTC but no GPU; the other two need a CUDA device and give no records without one.
"""

import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from trapetum import build
from trapetum.records import Record, derived

SOURCE = "mma_formats.cu"
FORMATS = {"int8": 8, "int4": 4, "b1": 1}
ARCHES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

_INSTRUCTION_BYTES = 16  # of machine code, since sm_70
_OPCODE = 0xFFF  # the low 12 bits name the operation
_NOP = 0x918  # fills the end of a kernel
_MATRIX = (0x237, 0x23D)  # integer and binary matrix multiply-accumulate


def machine_code(cubin: Path) -> bytes:
    """The instructions of a cubin's only kernel.

    Raises:
        ValueError: the file is no 64-bit ELF, or has no kernel.
    """
    data = cubin.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ValueError(f"{cubin.name} is no 64-bit ELF file.")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_at = struct.unpack_from("<HHH", data, 58)
    sections = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in sections:
        start = sections[names_at][4] + name
        if data[start:].startswith(b".text."):
            return data[offset : offset + length]
    raise ValueError(f"{cubin.name} has no kernel.")


def opcodes(code: bytes) -> Counter:
    """How often each operation occurs in machine code, padding left out."""
    words = (struct.unpack_from("<Q", code, at)[0] for at in range(0, len(code), _INSTRUCTION_BYTES))
    found = Counter(word & _OPCODE for word in words)
    del found[_NOP]
    return found


def _operations(name: str, arch: str) -> Counter:
    cubin = build.compile_cuda(SOURCE, arch, (f"FORMAT={FORMATS[name]}",))
    return opcodes(machine_code(cubin.path))


def compiled_formats(arches: tuple[str, ...] = ARCHES) -> list[Record]:
    """How many machine instructions one tensor-core operation becomes, by format and architecture.

    The int8 operation, native everywhere, is one; another format's count is its kernel's instructions less those of
    the int8 kernel, plus one.

    Returns:
        derived `instruction_count` records, method `tensor-core`; none where NVRTC is missing. An architecture that
        this NVRTC does not know is left out.
    """
    rows = []
    for arch in arches:
        try:
            found = {name: _operations(name, arch) for name in FORMATS}
        except build.BuildError:
            continue
        rows += [_counted(name, arch, ops, found["int8"]) for name, ops in found.items()]
    return rows


def _counted(name: str, arch: str, ops: Counter, int8: Counter) -> Record:
    return derived(
        "instruction_count",
        ops.total() - int8.total() + 1,
        "tensor-core",
        {"format": name, "arch": arch, "matrix_instructions": sum(ops[code] for code in _MATRIX)},
        {"name": f"compiled for {arch}", "arch": arch},
        source=f"kernels/{SOURCE}, {name} and int8",
        formula="instructions of the kernel - instructions of the int8 kernel + 1",
        kernel_sha256=build.source_sha256(SOURCE),
    )


# On a GPU

ROWS, FEATURES = 2048, 4096


def _dense(dtype) -> Callable[[], object]:
    import torch

    x = torch.randn(ROWS, FEATURES, device="cuda").to(dtype)
    w = torch.randn(FEATURES, FEATURES, device="cuda").to(dtype)
    return lambda: torch.nn.functional.linear(x, w)


def _int8() -> Callable[[], object]:
    import torch

    x, w = (
        torch.randint(-128, 127, (n, FEATURES), device="cuda", dtype=torch.int8) for n in (ROWS, FEATURES)
    )
    return lambda: torch._int_mm(x, w.t())


def _fp8() -> Callable[[], object]:
    import torch

    x, w = (torch.randn(n, FEATURES, device="cuda").to(torch.float8_e4m3fn) for n in (ROWS, FEATURES))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float16)


def _tinygemm() -> Callable[[], object]:
    import torch

    group = 128
    x = torch.randn(ROWS, FEATURES, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (FEATURES, FEATURES // 2), device="cuda", dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.ones(FEATURES // group, FEATURES, 2, device="cuda", dtype=torch.bfloat16)
    return lambda: torch._weight_int4pack_mm(x, packed, group, scales)


def _makers() -> dict[str, Callable[[], Callable[[], object]]]:
    import torch

    dense = {"fp16": torch.float16, "bf16": torch.bfloat16}
    makers = {f"linear-{name}": lambda d=dtype: _dense(d) for name, dtype in dense.items()}
    return {**makers, "linear-int8": _int8, "linear-fp8": _fp8, "tinygemm-int4": _tinygemm}


def products_of_many_rows(profile: str = "quick") -> list[Record]:
    """Time 2048 x 4096 x 4096 in the formats of the article, each called the way that works.

    Returns:
        `gemm_time` (us) and `gemm_throughput` (TFLOP/s) records; a format that the GPU or torch does not know is left
        out. Empty without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    from trapetum import timing
    from trapetum.bench.recording import Recorder

    recorder = Recorder("cuda", profile)
    for method, make in _makers().items():
        try:
            call = make()
            call()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, TypeError):
            continue
        samples = timing.cuda_graph_us([call], recorder.sizes.repeats)
        config = {
            "rows": ROWS,
            "in_features": FEATURES,
            "out_features": FEATURES,
            "format": method.split("-")[1],
        }
        recorder.add("gemm_time", samples, method, config)
        flops = 2 * ROWS * FEATURES * FEATURES
        recorder.add("gemm_throughput", [flops / us / 1e6 for us in samples], method, config)
    return recorder.close()


def _calls() -> dict[str, tuple[bool, Callable[[], object]]]:
    """The article's calls (as printed: True) and the ways that work (False)."""
    import torch

    def int8(rows: int, columns: int = FEATURES):
        return torch.randint(-128, 127, (rows, columns), device="cuda", dtype=torch.int8)

    x = torch.randn(32, FEATURES, device="cuda").to(torch.float8_e4m3fn)
    w = torch.randn(FEATURES, FEATURES, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    return {
        "torch._int_mm, 1 row": (True, lambda: torch._int_mm(int8(1), int8(FEATURES))),
        "torch._int_mm, 32 rows": (True, lambda: torch._int_mm(int8(32), int8(FEATURES))),
        "torch._int_mm, 2048 rows": (True, lambda: torch._int_mm(int8(2048), int8(FEATURES))),
        "torch._scaled_mm without scales": (
            True,
            lambda: torch._scaled_mm(x, w.t(), out_dtype=torch.float16),
        ),
        "torch._int_mm, 16 rows": (False, lambda: torch._int_mm(int8(16), int8(FEATURES))),
        "torch._int_mm, 17 rows": (False, lambda: torch._int_mm(int8(17), int8(FEATURES))),
        "torch._scaled_mm, scales, row-major": (
            False,
            lambda: torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.float16),
        ),
        "torch._scaled_mm, scales, column-major": (
            False,
            lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float16),
        ),
    }


def _error(call: Callable[[], object]) -> str:
    import torch

    try:
        call()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).strip().split("\n")[0][:160] or type(error).__name__
    return ""


def calls_as_printed(profile: str = "quick") -> list[Record]:
    """Try the article's INT8 and FP8 calls as printed, and the ways that work.

    Returns:
        `call_accepted` records (1: it ran, 0: it raised `config.error`); empty without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    from trapetum.bench.recording import Recorder

    recorder = Recorder("cuda", profile)
    for name, (as_printed, call) in _calls().items():
        error = _error(call)
        config = {"call": name, "as_printed": as_printed, "error": error}
        recorder.add("call_accepted", [0.0 if error else 1.0], "torch", config)
    return recorder.close()
