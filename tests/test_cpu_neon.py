"""The NEON paths: they compile wherever an aarch64 compiler is, and give the right numbers wherever that can run.

On x86 both need packages that most machines lack (gcc-aarch64-linux-gnu or clang, qemu-user): then they are skipped.
On aarch64 itself `test_cpu_kernel` and `test_cpu_dense` run NEON as they run every path.
"""

import platform
import shutil
import struct
import subprocess

import pytest
import torch

from trapetum import cpu, cpu_dense
from trapetum.paths import KERNELS

CROSS = shutil.which("aarch64-linux-gnu-gcc")
CLANG = shutil.which("clang")
EMULATOR = shutil.which("qemu-aarch64")
ON_ARM = platform.machine() in ("aarch64", "arm64")
NEON = cpu.PATHS.index("neon")

# Reads sizes and arrays from stdin, calls one kernel, writes y to stdout.
HARNESS = """
#include <stdio.h>
#include KERNEL
static void *take(int64_t bytes) {
    void *memory = aligned(bytes + 64);
    if (fread(memory, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(3);
    return memory;
}
int main(void) {
    int64_t n[7]; /* in, out, n_codes or kind, bits, path, arithmetic, bytes of the weight */
    if (fread(n, 8, 7, stdin) != 7 || !trapetum_runs((int)n[4])) return 2;
    float *x = take(4 * n[0]), *y = aligned(4 * n[1]);
    for (int64_t i = 0; i < n[1]; i++) y[i] = NAN;
    uint8_t *weight = take(n[6]);
#ifdef DENSE
    float *scale = n[2] == INT8 ? take(4 * n[1]) : NULL;
    int failed = trapetum_dense_gemv(x, weight, scale, NULL, y, n[0], n[1], (int)n[2], (int)n[4], 1);
#else
    uint16_t *codebook = take(2 * n[1] * n[2]);
    int failed = trapetum_gemv_packed(x, weight, codebook, n[2], NULL, y, n[0], n[1], (int)n[3], (int)n[4], (int)n[5], 1);
#endif
    fwrite(y, 4, (size_t)n[1], stdout);
    return failed;
}
"""


def compiler_command(source, target):
    """The command that cross-compiles a kernel to an object; None without a compiler."""
    if CROSS:
        return [CROSS, "-O3", "-Wall", "-Wextra", "-Werror", "-c", source, "-o", target]
    if CLANG:
        flags = ["--target=aarch64-linux-gnu", "-O3", "-ffreestanding", "-c"]
        return [CLANG, *flags, source, "-o", target]
    return None


@pytest.mark.skipif(not (CROSS or CLANG), reason="neither aarch64-linux-gnu-gcc nor clang is installed")
@pytest.mark.parametrize("source", [cpu.SOURCE, cpu_dense.SOURCE])
def test_neon_compiles(source, tmp_path):
    target = tmp_path / "kernel.o"
    done = subprocess.run(
        compiler_command(str(KERNELS / source), str(target)), capture_output=True, text=True
    )
    if not CROSS and "file not found" in done.stderr:
        pytest.skip("clang is installed without the C headers of aarch64")
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 10_000


runs_neon = pytest.mark.skipif(
    ON_ARM or not (CROSS and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64 (qemu-user)"
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """`harness(source)` compiles it once and gives the command that runs it."""
    folder, built = tmp_path_factory.mktemp("neon"), {}

    def build(source):
        if source not in built:
            program, target = folder / "harness.c", folder / f"{source}.bin"
            program.write_text(HARNESS)
            defines = [f'-DKERNEL="{KERNELS / source}"', *(["-DDENSE"] if source == cpu_dense.SOURCE else [])]
            command = [CROSS, "-O3", "-static", *defines, str(program), "-o", str(target), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if "cannot find -lc" in done.stderr:
                pytest.skip("aarch64-linux-gnu-gcc is installed without a static C library")
            assert done.returncode == 0, done.stderr
            built[source] = [EMULATOR, str(target)]
        return built[source]

    return build


def run(command, sizes, *arrays):
    data = struct.pack("<7q", *sizes) + b"".join(a.contiguous().numpy().tobytes() for a in arrays)
    done = subprocess.run(command, input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)


def relative_l2(y, wanted):
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@runs_neon
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("arithmetic", "bound"), [("int16", 1e-4), ("exact", 1e-6), ("int8", 2e-2)])
@pytest.mark.parametrize("shape", [(37, 700), (64, 5000)])
def test_neon_matches_float64(harness, bits, arithmetic, bound, shape):
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(bits)
    indices = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    codebook = (torch.randn(out_features, 2**bits, generator=generator) / 64).half()
    x = torch.randn(in_features, generator=generator)
    x[:: in_features // 3] *= 40
    packed = cpu.pack(indices, bits)
    number = cpu.ARITHMETICS.index(arithmetic)
    sizes = (in_features, out_features, 2**bits, bits, NEON, number, packed.nbytes)
    y = run(harness(cpu.SOURCE), sizes, x, packed, codebook)
    assert relative_l2(y, codebook.double().gather(1, indices.long()) @ x.double()) <= bound


@runs_neon
@pytest.mark.parametrize("kind", cpu_dense.KINDS)
def test_dense_neon_matches_float64(harness, kind):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(37, 4200, generator=generator), torch.randn(4200, generator=generator)
    packed, scale = cpu_dense.pack(weight, kind)
    sizes = (4200, 37, cpu_dense.KINDS.index(kind), 0, NEON, 0, packed.nbytes)
    y = run(harness(cpu_dense.SOURCE), sizes, x, packed, *([] if scale is None else [scale]))
    stored = cpu_dense.unpack(packed, scale, 4200, 37, kind)
    assert relative_l2(y, stored.double() @ x.double()) <= 1e-6
