"""The floor of a persistent decoder: phases, compilation and refusals anywhere; sums, barriers and times on a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from trapetum import build, disassembly, records, shapes
from trapetum.bench import persistent
from trapetum.bench.persistent import CHAIN_GRIDS, PERSISTENT_GRIDS, FloorError, Grid, Phase, Token, phases_of

gpu = pytest.mark.gpu
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
DEVICE = {"name": "a device", "l2_bytes": 0}


# --- anywhere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-2-70b", "qwen2-0.5b"])
@pytest.mark.parametrize("fmt", ["codebook-4", "codebook-3", "fp16"])
def test_phases_are_the_bytes_of_a_token(name, fmt):
    shape, context = shapes.model(name), 262
    phases = phases_of(shape, fmt, context)
    assert len(phases) == 5 * shape.layers + 1 and phases[-1].name == "head"
    assert [p.name for p in phases[:5]] == ["qkv", "attention", "out", "gate_up", "down"]
    row = 2 * shape.hidden  # of the embedding, which is no phase
    exact = shape.bytes_per_token(fmt, context) - row
    assert exact <= sum(p.nbytes for p in phases) < exact + 16 * len(phases)
    assert all(p.nbytes % 16 == 0 for p in phases)


def test_a_token_without_context_has_empty_attention_phases():
    phases = phases_of(shapes.model("llama-tiny"))
    assert {p.nbytes for p in phases if p.name == "attention"} == {0}


def test_starts_leave_no_gap():
    starts = persistent.starts_of([Phase("qkv", 48), Phase("attention", 0), Phase("out", 16)])
    assert starts == [0, 3, 3, 4]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("grid", PERSISTENT_GRIDS, ids=str)
def test_the_persistent_kernel_compiles_without_spills(arch, grid):
    made = build.compile_cuda(persistent.SOURCE, arch, grid.defines("BARRIER=1", "READ=1", "CHECK=0"))
    resources = made.resources()["persistent_token"]
    threads = grid.readers + 32
    assert resources.spill_bytes == 0 and resources.registers * threads <= 65536 and threads <= 1024


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("grid", CHAIN_GRIDS, ids=str)
def test_two_blocks_of_the_chain_fit_a_multiprocessor(arch, grid):
    resources = build.compile_cuda(persistent.SOURCE, arch, grid.defines()).resources()["read_phase"]
    assert resources.spill_bytes == 0 and 2 * resources.registers * grid.readers <= 65536


@pytest.mark.parametrize("define", ["BARRIER=0", "READ=0", "CHECK=1"])
def test_the_variants_compile(define):
    made = build.compile_cuda(persistent.SOURCE, "sm_90", Grid(1, 480, 4).defines(define))
    assert made.resources()["persistent_token"].spill_bytes == 0


def _opcodes(grid: Grid, kernel: str, defines: tuple[str, ...] = ()) -> list[str]:
    text = disassembly.text_of(build.compile_cuda(persistent.SOURCE, "sm_90", grid.defines(*defines)).path)
    body = re.split(r"\.section\s+\.text\.", text)
    (mine,) = (part for part in body if part.startswith(kernel))
    return [m[1] for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", mine)]


@pytest.mark.skipif(bool(disassembly.why_not()), reason=disassembly.why_not() or "-")
@pytest.mark.parametrize("grid", CHAIN_GRIDS, ids=str)
def test_a_batch_is_asked_for_before_the_wait(grid):
    """The assembler may move loads behind the wait; then a programmatic edge would buy nothing."""
    before = _opcodes(grid, "read_phase")
    before = before[: before.index("ACQBULK")]
    assert sum(op.startswith("LDG") and ".128" in op for op in before) == grid.in_flight


@pytest.mark.skipif(bool(disassembly.why_not()), reason=disassembly.why_not() or "-")
@pytest.mark.parametrize("grid", PERSISTENT_GRIDS, ids=str)
def test_the_next_batch_is_asked_for_before_the_barrier(grid):
    opcodes = [op for op in _opcodes(grid, "persistent_token") if op == "BAR.ARV" or ".128" in op]
    loads = [op for op in opcodes[: opcodes.index("BAR.ARV")] if op.startswith("LDG")]
    assert len(loads) == 2 * grid.in_flight and opcodes.count("BAR.ARV") == 2


class _Fits:
    def __init__(self, blocks):
        self.blocks = blocks

    def blocks_at_once(self, threads, shared_bytes):
        return self.blocks


def test_a_grid_that_is_not_resident_is_refused():
    persistent.require_resident(_Fits(1), Grid(1, 480, 4), 512, 1000)
    with pytest.raises(FloorError, match="2 blocks of 512 threads.*holds 1.*choose fewer threads"):
        persistent.require_resident(_Fits(1), Grid(2, 480, 4), 512, 1000)


def _floor(way, us, **more):
    config = {"way": way, "model": "random:x", "phases": 6, "bytes": 10**9, **more}
    return records.measured("token_floor", [us] * 3, "read", config, DEVICE, {}, utc=records.now_utc())


@pytest.mark.parametrize(("us", "worth"), [(100.0, True), (104.0, False), (120.0, False)])
def test_the_verdict_needs_five_per_cent(us, worth):
    rows = [_floor("persistent", us), _floor("pdl chain", 106.0), _floor("graph chain", 130.0)]
    made = persistent.speedup_of(rows)
    assert made.value == pytest.approx(106.0 / us) and made.kind == "derived"
    assert made.config["worth_it"] is worth and made.config["baseline"] == "pdl chain"
    assert rows[0].id in made.source and rows[1].id in made.source


def test_without_programmatic_edges_the_chain_is_the_plain_one():
    ways = [way.name for way in persistent.ways_on((8, 6))]
    assert ways == ["persistent", "no barriers", "barriers only", "graph chain"]
    assert len(persistent.ways_on((9, 0))) == len(persistent.WAYS) == 6
    made = persistent.speedup_of([_floor("persistent", 100.0), _floor("graph chain", 130.0)])
    assert made.config["baseline"] == "graph chain" and made.value == pytest.approx(1.3)


def test_a_verdict_from_a_suspect_time_is_suspect():
    doubtful = _floor("persistent", 100.0).replace(suspect=True, why_suspect="All weights fit the cache.")
    assert persistent.speedup_of([doubtful, _floor("pdl chain", 106.0)]).suspect


def test_no_gpu_is_one_sentence():
    with pytest.raises(RuntimeError, match="the floor of a persistent kernel cannot be measured: "):
        persistent.persistent_floor("llama-tiny", "cpu", "smoke")


# --- on a GPU ------------------------------------------------------------------------------------------------------

# Batches that do not fill, that fill exactly, and none at all, for 1 to 144 multiprocessors.
UNEVEN = [16 * n for n in (1, 1000, 0, 3, 132 * 480 * 4, 132 * 480 * 4 + 1, 1 << 20, 0, 17, 5 << 18)]


@pytest.fixture
def token():
    return Token([Phase(f"phase {n}", nbytes) for n, nbytes in enumerate(UNEVEN)])


@gpu
@pytest.mark.parametrize("grid", [*PERSISTENT_GRIDS, Grid(1, 32, 1), Grid(1, 96, 3)], ids=str)
@pytest.mark.parametrize("barrier", [True, False])
def test_one_kernel_reads_every_byte_of_every_phase(token, grid, barrier):
    launch = token.persistent(grid, barrier)
    for _ in range(3):  # the counter is set back by the last block
        assert token.left_by(launch, grid) == token.words()
    token.require_open()


@gpu
@pytest.mark.parametrize("grid", [*CHAIN_GRIDS, Grid(1, 32, 1)], ids=str)
@pytest.mark.parametrize("pdl", [True, False])
def test_a_chain_reads_every_byte_of_every_phase(token, grid, pdl):
    assert token.left_by(token.chain(grid, pdl), grid) == token.words()


@gpu
def test_a_changed_byte_changes_its_phase_only(token):
    grid, before = PERSISTENT_GRIDS[0], token.words()
    token.buffer[-1] += 1
    after = token.left_by(token.persistent(grid), grid)
    assert after[:-1] == before[:-1] and after[-1] == (before[-1] + 1) % 2**32


@gpu
@pytest.mark.parametrize("grid", PERSISTENT_GRIDS, ids=str)
def test_no_block_goes_on_before_the_others_have_arrived(grid):
    token = Token([Phase("p", 16 * (n % 7) * 1000) for n in range(300)])
    for _ in range(5):
        assert token.left_by(token.persistent(grid, check=True), grid) == token.words()
        token.require_open()


@gpu
def test_without_barriers_blocks_do_go_on():
    """The check can fail: marks that nobody waits for are not all there."""
    token = Token([Phase("p", 1 << 20) for _ in range(300)])
    grid = PERSISTENT_GRIDS[0]
    token.left_by(token.persistent(grid, check=True, polls=1), grid)
    with pytest.raises(FloorError, match="gave up"):
        token.require_open()


@gpu
def test_a_captured_token_reads_every_byte(token):
    grid = PERSISTENT_GRIDS[0]
    launch = token.persistent(grid)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
        launch()
    assert token.left_by(graph.replay, grid) == token.words()
    token.require_open()


@gpu
def test_the_records_of_a_small_model():
    rows = persistent.persistent_floor("llama-0.9b", "cuda", "smoke")
    floors = {row.config["way"]: row for row in rows if row.quantity == "token_floor"}
    assert set(floors) == {way.name for way in persistent.ways_on(torch.cuda.get_device_capability())}
    assert all(row.value > 0 and row.kernel_sha256 for row in floors.values())
    assert floors["barriers only"].value < floors["persistent"].value
    assert floors["barriers only"].config["bytes"] == 0
    assert floors["no barriers"].value < 1.05 * floors["persistent"].value
    phases = phases_of(shapes.model("llama-0.9b"), context=floors["persistent"].config["context"])
    assert floors["persistent"].config["bytes"] == sum(p.nbytes for p in phases)
    verdict = rows[-1]
    assert verdict.quantity == "speedup" and not verdict.suspect
    assert verdict.value == floors[verdict.config["baseline"]].value / floors["persistent"].value


@gpu
def test_what_fits_the_cache_is_marked():
    rows = persistent.persistent_floor("llama-tiny", "cuda", "smoke")
    assert all(row.suspect for row in rows if row.quantity == "token_floor" and row.config["bytes"])
    assert rows[-1].suspect


@gpu
def test_a_token_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(persistent.timing, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="does not fit the 0.0 GB"):
        Token([Phase("qkv", 2000)])


def test_a_launch_shape_says_how_it_is_compiled():
    assert replace(Grid(1, 480, 4), in_flight=8).defines("READ=0") == ("READERS=480", "IN_FLIGHT=8", "READ=0")
