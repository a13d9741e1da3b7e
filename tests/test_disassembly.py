"""Counting machine instructions: the parser on a written listing, and a real kernel where nvdisasm is installed."""

import pytest

from trapetum import build, disassembly
from trapetum.disassembly import DisassemblyError, Instruction, inner_loop, parse

CODES = r"^LDG\.E\.NA\.128\b"

# Two kernels in nvdisasm's form. `walk` has a loop over codes (from .L_x_2 to the branch back to it) with a tail behind a
# forward branch, a stretch with a barrier and a loop of its own that one pass in many goes through, and after it a
# remainder loop that reads codes too. `plain` has no loop.
LISTING = """
	.target	sm_90
//--------------------- .text.walk     --------------------------
	.section	.text.walk,"ax",@progbits
	.align	128
        .global         walk
        .size           walk,(.L_x_9 - walk)
walk:
.text.walk:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.NA.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_6) ;
.L_x_2:
        /*0030*/                   ISETP.GE.AND P0, PT, R0, UR4, PT ;
        /*0040*/              @!P0 BRA P2, `(.L_x_4) ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_3:
        /*0060*/               @P1 LDG.E.128 R8, desc[UR8][R2.64] ;
        /*0070*/                   STS.128 [R3], R8 ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0090*/                   LDS R5, [R4+UR4] ;
        /*00a0*/                   HFMA2.MMA R8, R5, R7, R8 ;
        /*00b0*/              @!P1 LDG.E.NA.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*00c0*/               @P2 BRA `(.L_x_5) ;
        /*00d0*/                   LDS R5, [R4+UR4] ;
        /*00e0*/              @UP1 LDG.E.NA.128.CONSTANT R12, desc[UR8][R2.64] ;
.L_x_5:
        /*00f0*/               @P0 BRA `(.L_x_2) ;
.L_x_6:
        /*0100*/                   LDG.E.NA.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0110*/               @P0 BRA `(.L_x_6) ;
        /*0120*/                   EXIT ;
.L_x_7:
        /*0130*/                   BRA `(.L_x_7);
        /*0140*/                   NOP;
.L_x_9:
//--------------------- .text.plain     --------------------------
	.section	.text.plain,"ax",@progbits
plain:
.text.plain:
        /*0000*/                   LDG.E.NA.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0010*/                   EXIT ;
"""


def test_every_instruction_is_read_once_with_its_modifiers():
    kernels = parse(LISTING)
    assert {name: len(code) for name, code in kernels.items()} == {"walk": 21, "plain": 2}
    assert kernels["walk"][1] == Instruction("LDG.E.NA.128.CONSTANT")
    assert kernels["walk"][14].opcode == "LDG.E.NA.128.CONSTANT" and kernels["walk"][14].name == "LDG"
    assert kernels["walk"][20].name == "NOP"


def test_branches_point_at_instructions():
    walk = parse(LISTING)["walk"]
    targets = {at: i.target for at, i in enumerate(walk) if i.target is not None}
    assert targets == {2: 16, 4: 9, 8: 6, 12: 15, 15: 3, 17: 16, 19: 19}


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.U8.CONSTANT", 1),
        ("LDG.E.U16", 2),
        ("LDG.E", 4),
        ("LDG.E.64", 8),
        ("LDG.E.NA.128.CONSTANT.SYS", 16),
    ],
)
def test_width_of_a_load(opcode, width):
    assert Instruction(opcode).width == width


def test_one_pass_counts_the_loop_and_not_what_a_pass_seldom_meets():
    loop = inner_loop(parse(LISTING)["walk"], CODES)
    # ISETP, BRA | the barrier and the inner loop are skipped | LDS, HFMA2, LDG, BRA, LDS, LDG, BRA
    names = [i.name for i in loop.counted]
    assert names == ["ISETP", "BRA", "LDS", "HFMA2", "LDG", "BRA", "LDS", "LDG", "BRA"]
    assert loop.code_bytes == 32
    assert loop.per_weight(bits=4) == 9 / 64 and loop.per_weight(bits=8) == 9 / 32
    assert loop.mix(bits=4) == pytest.approx({n: names.count(n) / 64 for n in set(names)})


def test_other_loads_are_no_codes():
    """The plain 16-byte load marks the inner loop alone: then that one is counted."""
    loop = inner_loop(parse(LISTING)["walk"], r"^LDG\.E\.128\b")
    assert [i.name for i in loop.counted] == ["LDG", "STS", "BRA"] and loop.code_bytes == 16


def test_a_kernel_without_such_a_loop_is_refused():
    with pytest.raises(DisassemblyError, match="no loop with a load that matches .* in 2 instructions"):
        inner_loop(parse(LISTING)["plain"], CODES)


def test_where_nvdisasm_is_absent_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(disassembly, "nvdisasm", lambda: None)
    assert "pip install nvidia-cuda-nvdisasm" in disassembly.why_not()
    with pytest.raises(DisassemblyError, match="nvdisasm was not found"):
        disassembly.text_of(tmp_path / "none.cubin")


def test_a_toolkits_own_nvdisasm_is_found(monkeypatch, tmp_path):
    program = tmp_path / "bin" / "nvdisasm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho refused >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(disassembly.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert disassembly.nvdisasm() == str(program) and disassembly.why_not() == ""
    with pytest.raises(DisassemblyError, match="cannot read a.cubin: refused"):
        disassembly.text_of(tmp_path / "a.cubin")


# With the real programs

needs_nvdisasm = pytest.mark.skipif(bool(disassembly.why_not()), reason=disassembly.why_not() or "it is here")


@needs_nvdisasm
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_read_kernel_loads_16_bytes_with_few_instructions(arch):
    """A kernel that only reads: n loads of 16 bytes take 4n exclusive-ors, two to a LOP3, and a few instructions more."""
    pytest.importorskip("cuda.bindings.nvrtc")
    cubin = build.compile_cuda("read_bandwidth.cu", arch)
    code = parse(disassembly.text_of(cubin.path))["read_bytes"]
    assert code[-1].name == "NOP" and any(i.name == "EXIT" for i in code)
    loop = inner_loop(code, r"^LDG\b.*\.128\b")
    loads = loop.code_bytes // 16
    exclusive_ors = sum(i.name == "LOP3" for i in loop.counted)
    assert loads == sum(i.name == "LDG" for i in loop.counted) >= 1
    assert exclusive_ors >= 2 * loads and 3 * loads < len(loop.counted) <= 16 * loads


@needs_nvdisasm
def test_addresses_match_the_machine_code():
    """As many instructions as the text section has room for: 16 bytes each, nothing lost by the parser."""
    pytest.importorskip("cuda.bindings.nvrtc")
    from trapetum.claims.probes import machine_code

    cubin = build.compile_cuda("ladder/d_mixed_sums.cu", "sm_90")
    (code,) = parse(disassembly.text_of(cubin.path)).values()
    assert 16 * len(code) == len(machine_code(cubin.path))


@needs_nvdisasm
def test_a_damaged_cubin_is_refused_in_one_sentence(tmp_path):
    broken = tmp_path / "broken.cubin"
    broken.write_bytes(b"\x7fELF\x02" + bytes(200))
    with pytest.raises(DisassemblyError, match="nvdisasm cannot read broken.cubin: "):
        disassembly.text_of(broken)


def test_a_last_pass_that_loads_nothing_is_an_alternative_and_not_counted():
    def go(target):
        return Instruction("BRA", target)

    lds, load = Instruction("LDS"), Instruction("LDG.E.NA.128")
    # 0 LDS | 1 to the whole pass | 2 to 4 the last pass, which leaves past the other | 5 to 7 the whole pass | 8 back
    code = [lds, go(5), lds, lds, go(8), lds, load, lds, go(0)]
    found = inner_loop(code, CODES)
    assert [i.name for i in found.counted] == ["LDS", "BRA", "LDS", "LDG", "LDS", "BRA"]
    assert found.code_bytes == 16
    reads_both = [lds, go(5), load, lds, go(8), lds, load, lds, go(0)]
    assert len(inner_loop(reads_both, CODES).counted) == len(reads_both)
