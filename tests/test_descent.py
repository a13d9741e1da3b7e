"""Sweeps of codes over columns: C, CUDA and torch against each other, and descents against brute force."""

import ctypes
import itertools
import shutil
import subprocess

import pytest
import torch

from trapetum import build, descent
from trapetum.descent import descend, sweep, sweep_torch

ARCHES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHAPES = [
    (1, 1, 2),
    (7, 3, 3),
    (5, 127, 16),
    (40, 128, 16),
    (3, 128, 32),
    (4, 100, 33),
    (2, 128, 256),
    (9, 64, 1),
]


def exact_case(rows, width, k, scaled=True):
    """Numbers with so few bits that float32 sums are exact, in any order: slope, feedback, codebook, codes, scale."""
    slope = torch.randint(-64, 65, (rows, width)) / 8
    feedback = torch.randint(-4, 5, (width, width)) / 8
    if not scaled:  # what a step moves moves others: one whole number a column keeps the numbers short
        keep = (torch.rand(width) * torch.arange(width)).long()
        feedback = torch.zeros(width, width).index_put_((keep, torch.arange(width)), torch.tensor(-1.0))
    codebook = (torch.randint(-64, 65, (rows, k)) / 16).sort(dim=1).values
    codes = torch.randint(k, (rows, width), dtype=torch.uint8)
    scale = -(2.0 ** -torch.randint(0, 3, (width,)))
    return slope, feedback, codebook, codes, scale


def random_case(rows, width, k, device="cpu"):
    x = torch.randn(3 * width, width) + torch.randn(3 * width, 1)
    hessian = x.T @ x / len(x)
    codebook = torch.randn(rows, k).sort(dim=1).values
    codes = torch.randint(k, (rows, width), dtype=torch.uint8)
    gradient = (codebook.gather(1, codes.long()) - torch.randn(rows, width)) @ hessian
    case = gradient, hessian, codebook, codes, -1 / hessian.diagonal()
    return [t.to(device) for t in case]


def poisoned(case, device="cpu"):
    """The same case with rows far apart: garbage around slope, feedback and codes, which nobody may use or touch."""
    slope, feedback, codebook, codes, scale = (t.to(device) for t in case)
    rows, width = slope.shape
    wide = torch.full((rows, width + 9), torch.nan, device=device)
    wide[:, 4 : 4 + width] = slope
    square = torch.full((width + 2, width + 5), torch.nan, device=device)
    square[1 : 1 + width, 3 : 3 + width] = feedback.masked_fill(
        torch.ones(width, width, device=device).tril().bool(), torch.nan
    )
    room = torch.full((rows, width + 7), 255, dtype=torch.uint8, device=device)
    room[:, 3 : 3 + width] = codes
    views = (
        wide[:, 4 : 4 + width],
        square[1 : 1 + width, 3 : 3 + width],
        codebook,
        room[:, 3 : 3 + width],
        scale,
    )
    return views, room


def same_as_reference(case, scaled, run, device="cpu"):
    slope, feedback, codebook, codes, scale = case
    expected_codes = codes.clone() if scaled else torch.full_like(codes, 255)
    expected = sweep_torch(slope, feedback, codebook, expected_codes, scale if scaled else None)
    views, room = poisoned(
        (slope, feedback, codebook, codes if scaled else torch.full_like(codes, 255), scale), device
    )
    found = run(*views[:4], views[4] if scaled else None)
    assert torch.equal(views[3].cpu(), expected_codes)
    assert torch.equal(found.cpu(), expected)
    assert bool((room[:, :3] == 255).all() and (room[:, 3 + slope.shape[1] :] == 255).all())


@pytest.fixture
def dirty_memory(monkeypatch):
    """New tensors of the module start as NaN, so that an element that is not written is seen."""
    empty = torch.empty

    def full_of_nan(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(descent.torch, "empty", full_of_nan)


# --- one sweep -----------------------------------------------------------------------------------------------------


def test_c_is_there():
    assert descent._library()[0] is not None, descent._library()[1]


@pytest.mark.parametrize("rows,width,k", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_c_equals_the_reference_bit_by_bit(dirty_memory, rows, width, k, scaled):
    same_as_reference(exact_case(rows, width, k, scaled), scaled, descent._sweep_c)


def test_the_reference_follows_its_definition():
    slope, feedback, codebook, codes, scale = exact_case(3, 20, 5)
    for r in range(3):
        target = (codebook[r, codes[r].long()] + slope[r] * scale).tolist()
        old, found = codebook[r, codes[r].long()].tolist(), []
        for j in range(20):
            nearest = min(range(5), key=lambda c: (abs(codebook[r, c].item() - target[j]), c))
            value = codebook[r, nearest].item()
            found.append(value)
            for i in range(j + 1, 20):
                target[i] += (value - old[j]) * feedback[j, i].item() * scale[i].item()
        mine = codes[r : r + 1].clone()
        step = sweep_torch(slope[r : r + 1], feedback, codebook[r : r + 1], mine, scale)
        assert codebook[r, mine[0].long()].tolist() == found
        assert step[0].tolist() == [new - was for new, was in zip(found, old, strict=True)]


@pytest.mark.parametrize("scaled", [False, True])
def test_c_agrees_on_real_numbers(scaled):
    slope, feedback, codebook, codes, scale = random_case(300, 128, 16)
    scale, mine, theirs = scale if scaled else None, codes.clone(), codes.clone()
    feedback = feedback if scaled else feedback / 128
    sweep(slope, feedback, codebook, mine, scale)
    sweep_torch(slope, feedback, codebook, theirs, scale)
    alike = (mine == theirs).all(1).float().mean()
    assert alike > 0.97, "all but rows in which a target lies on the middle of two codes"


def test_a_tie_goes_to_the_lower_code():
    for run in (sweep, sweep_torch):
        codes = torch.full((1, 3), 9, dtype=torch.uint8)
        book = torch.tensor([[0.0, 1.0, 1.0, 3.0]])
        run(torch.tensor([[0.5, 1.0, 2.0]]), torch.zeros(3, 3), book, codes, None)
        assert codes.tolist() == [[0, 1, 2]]


def test_threads_change_nothing():
    case, results, before = random_case(70, 90, 16), [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        codes = case[3].clone()
        results.append((sweep(*case[:3], codes, case[4]), codes))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_a_compiler_torch_does_it(monkeypatch):
    case = exact_case(6, 50, 8)
    first, second = case[3].clone(), case[3].clone()
    with_c = sweep(*case[:3], first, case[4])
    monkeypatch.setattr(descent, "_library", lambda: (None, "no C compiler was found."))
    assert torch.equal(with_c, sweep(*case[:3], second, case[4])) and torch.equal(first, second)


def test_columns_stored_the_other_way_round():
    slope, feedback, codebook, codes, scale = exact_case(6, 50, 8)
    turned, mine = [t.T.contiguous().T for t in (slope, feedback, codebook)], codes.clone()
    assert torch.equal(sweep(*turned, mine, scale), sweep(slope, feedback, codebook, codes, scale))
    assert torch.equal(mine, codes)


# --- the CUDA source on a CPU --------------------------------------------------------------------------------------

# One thread of the block is one C++ thread; what a warp exchanges waits as the hardware would.
ON_CPU = r"""
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>
#define WARPS 2
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
struct Index { unsigned x; };
static thread_local Index threadIdx;
static Index blockIdx;
static std::barrier<> block(32 * WARPS);
static std::barrier<> warps[WARPS] = {std::barrier<>(32), std::barrier<>(32)};
static float lanes[32 * WARPS];
static bool votes[32 * WARPS];
static void __syncthreads() { block.arrive_and_wait(); }
static float __int_as_float(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static unsigned __ballot_sync(unsigned, bool vote) {
    const int me = threadIdx.x;
    votes[me] = vote;
    warps[me / 32].arrive_and_wait();
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) all |= (unsigned)votes[me / 32 * 32 + lane] << lane;
    warps[me / 32].arrive_and_wait();
    return all;
}
static float __shfl_sync(unsigned, float value, int from) {
    const int me = threadIdx.x;
    lanes[me] = value;
    warps[me / 32].arrive_and_wait();
    const float result = lanes[me / 32 * 32 + from];
    warps[me / 32].arrive_and_wait();
    return result;
}
#include SOURCE
extern "C" void run(const float* slope, const float* feedback, const float* book, const float* scale, int rows, int width,
                    int k, int slope_stride, int feedback_stride, int code_stride, unsigned char* code, float* step) {
    for (blockIdx.x = 0; (int)blockIdx.x * WARPS < rows; blockIdx.x++) {
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < 32 * WARPS; t++)
            threads.emplace_back([=] {
                threadIdx.x = t;
                trapetum_descent(slope, feedback, book, scale, rows, width, k, slope_stride, feedback_stride,
                                 code_stride, code, step);
            });
        for (auto& thread : threads) thread.join();
    }
}
"""


@pytest.fixture(scope="module", params=[1, 8], ids=["one_entry_a_lane", "eight_entries_a_lane"])
def block_on_cpu(request, tmp_path_factory):
    """A stand-in for `_sweep_cuda` that runs `kernels/coordinate_descent.cu` with CPU threads, and its largest k."""
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("emulated")
    if compiler is None:
        pytest.skip("needs g++")
    (folder / "block.cpp").write_text(ON_CPU)
    source = f'-DSOURCE="{build.KERNELS / descent.CUDA_SOURCE}"'
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", f"-DENTRIES={request.param}", source]
    done = subprocess.run(
        [compiler, *flags, "block.cpp", "-o", "block.so"], cwd=folder, capture_output=True, text=True
    )
    if "barrier" in done.stderr and "No such file" in done.stderr:
        pytest.skip("needs a compiler with C++20 barriers")
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "block.so"))

    def run(slope, feedback, codebook, codes, scale):
        step = torch.full(slope.shape, torch.nan)
        at = [
            ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (slope, feedback, codebook, scale)
        ]
        sizes = descent._sizes(slope, feedback, codebook, codes)
        library.run(*at, *sizes, ctypes.c_void_p(codes.data_ptr()), ctypes.c_void_p(step.data_ptr()))
        return step

    return run, 32 * request.param


@pytest.mark.parametrize("rows,width,k", [(1, 1, 2), (3, 128, 16), (2, 70, 32), (1, 33, 256)])
@pytest.mark.parametrize("scaled", [False, True])
def test_cuda_source_equals_the_reference(block_on_cpu, rows, width, k, scaled):
    run, most = block_on_cpu
    same_as_reference(exact_case(rows, width, min(k, most), scaled), scaled, run)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("entries", [1, 8])
def test_cuda_source_compiles_without_spills(arch, entries):
    pytest.importorskip("cuda.bindings.nvrtc")
    found = build.compile_cuda(descent.CUDA_SOURCE, arch, (f"ENTRIES={entries}",)).resources()
    assert found["trapetum_descent"].spill_bytes == 0
    assert found["trapetum_descent"].shared_bytes <= 48 * 1024


# --- descents ------------------------------------------------------------------------------------------------------


def problem(rows, inputs, k):
    x = torch.randn(4 * inputs + 8, inputs) + torch.randn(4 * inputs + 8, 1)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(inputs)
    weight = torch.randn(rows, inputs)
    codebook = torch.randn(rows, k).sort(dim=1).values
    codes = torch.randint(k, (rows, inputs), dtype=torch.uint8)
    return weight, hessian, codebook, codes


def error(weight, hessian, codebook, codes):
    residual = (codebook.gather(1, codes.long()) - weight).double()
    return ((residual @ hessian.double()) * residual).sum(1)


def descended(weight, hessian, codebook, codes, cycles):
    codes = codes.clone()
    gradient = (codebook.gather(1, codes.long()) - weight) @ hessian
    descend(hessian, codebook, codes, gradient, cycles)
    torch.testing.assert_close(
        gradient, (codebook.gather(1, codes.long()) - weight) @ hessian, rtol=1e-3, atol=1e-3
    )
    return codes


@pytest.mark.parametrize("rows,inputs,k", [(1, 1, 2), (7, 3, 2), (5, 129, 3), (3, 300, 16), (2, 130, 256)])
def test_a_descent_ends_where_no_single_code_can_change_for_the_better(rows, inputs, k):
    weight, hessian, codebook, codes = problem(rows, inputs, k)
    before = error(weight, hessian, codebook, codes)
    codes = descended(weight, hessian, codebook, codes, 3000)
    after = error(weight, hessian, codebook, codes)
    assert bool((after <= before).all())
    for j, c in itertools.product(range(0, inputs, 7), range(k)):
        other = codes.clone()
        other[:, j] = c
        assert bool((error(weight, hessian, codebook, other) >= after * (1 - 1e-5) - 1e-5).all())


def test_every_cycle_lowers_the_error():
    weight, hessian, codebook, codes = problem(6, 200, 4)
    errors = [
        error(weight, hessian, codebook, descended(weight, hessian, codebook, codes, n)).sum()
        for n in range(5)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)) and errors[1] < 0.5 * errors[0]


def test_two_codes_and_four_weights_against_all_sixteen():
    found = 0
    for seed in range(40):
        torch.manual_seed(seed)
        weight, hessian, codebook, codes = problem(1, 4, 2)
        codes = descended(weight, hessian, codebook, codes, 20)
        mine = error(weight, hessian, codebook, codes)
        every = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.uint8)
        errors = error(weight.expand(16, 4), hessian, codebook.expand(16, 2), every)
        neighbours = (every != codes).sum(1) == 1
        assert bool((errors[neighbours] >= mine * (1 - 1e-5)).all())
        found += bool(mine <= errors.min() * (1 + 1e-5))
    assert found >= 25, "most descents over four weights end at the least of all errors"


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows,width,k", [*SHAPES, (1000, 128, 16), (33, 128, 200)])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_equals_the_reference_bit_by_bit(dirty_memory, rows, width, k, scaled):
    assert descent._cuda_ready(), "the CUDA kernel does not run here"
    same_as_reference(exact_case(rows, width, k, scaled), scaled, descent._sweep_cuda, "cuda")


@pytest.mark.gpu
def test_kernel_on_another_stream_and_twice():
    case = random_case(500, 128, 16, "cuda")
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            codes = case[3].clone()
            results.append((sweep(*case[:3], codes, case[4]), codes))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    reference = case[3].clone()
    sweep_torch(*case[:3], reference, case[4])
    assert (results[0][1] == reference).all(1).float().mean() > 0.97


@pytest.mark.gpu
def test_a_descent_on_the_gpu_ends_as_low():
    weight, hessian, codebook, codes = (t.cuda() for t in problem(200, 700, 16))
    here = [t.cpu() for t in (weight, hessian, codebook, codes)]
    there = error(weight, hessian, codebook, descended(weight, hessian, codebook, codes, 4)).sum()
    mine = error(*here[:3], descended(*here, 4)).sum()
    assert float(there) == pytest.approx(float(mine), rel=2e-3)
