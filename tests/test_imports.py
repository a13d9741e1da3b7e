"""Checkpoints of GPTQ and AWQ, written here by the definition of the formats, become codebooks with exactly their values.

The packers put one bit after another; the oracle reads words with shifts, whole numbers and one rounding. Neither shares
anything with `trapetum.imports`.
"""

import json
import math
import random
import shutil
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trapetum import imports, models
from trapetum.checkpoint import ModelError
from trapetum.cli import app
from trapetum.decode import Engine
from trapetum.formats import FormatError
from trapetum.imports import from_awq, from_gptq
from trapetum.linear import CodebookLinear
from trapetum.shapes import MODELS

IN, OUT = 96, 64  # whole words at 2, 3, 4 and 8 bits both ways
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


def to_words(bits_: list[int]) -> list[int]:
    """A stream of single bits as signed 32-bit words, the first bit the lowest."""
    words = []
    for start in range(0, len(bits_), 32):
        word = sum(bit << place for place, bit in enumerate(bits_[start : start + 32]))
        words.append(word - (1 << 32) if word >> 31 else word)
    return words


def packed(numbers: list[int], bits: int) -> list[int]:
    return to_words([number >> place & 1 for number in numbers for place in range(bits)])


def gptq_layer(q, zeros, scales, bits, version=1, groups=None):
    """The tensors of a GPTQ layer of q [in][out], zeros [groups][out], scales [groups, out] and the inputs' groups."""
    columns = [packed([row[o] for row in q], bits) for o in range(len(q[0]))]
    stored = [[z - (version == 1) for z in row] for row in zeros]
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([packed(row, bits) for row in stored], dtype=torch.int32),
        "scales": scales,
        "g_idx": torch.tensor(groups or [0] * len(q), dtype=torch.int32),
    }


def awq_row(row: list[int]) -> list[int]:
    order = [8 * word + place for word in range(len(row) // 8) for place in INTERLEAVED]
    return packed([row[o] for o in order], 4)


def awq_layer(q, zeros, scales):
    return {
        "qweight": torch.tensor([awq_row(row) for row in q], dtype=torch.int32),
        "qzeros": torch.tensor([awq_row(row) for row in zeros], dtype=torch.int32),
        "scales": scales,
    }


def half(value: Fraction) -> float:
    """The float16 nearest to a fraction, ties to even: the one rounding that these formats do."""
    return struct.unpack("<e", struct.pack("<e", float(value)))[
        0
    ]  # a product of 20 bits is exact as a double


def oracle_gptq(tensors, bits, version) -> list[list[float]]:
    """Dense [out][in] from the words, read with shifts."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, group = tensors["scales"].tolist(), tensors["g_idx"].tolist()

    def number(words, index):
        low, shift = divmod(index * bits, 32)
        both = (words[low] & 0xFFFFFFFF) | (
            (words[low + 1] & 0xFFFFFFFF) << 32 if low + 1 < len(words) else 0
        )
        return both >> shift & (1 << bits) - 1

    columns = [[row[o] for row in qweight] for o in range(len(scales[0]))]
    return [
        [
            half(Fraction(scales[g][o]) * (number(words, i) - number(qzeros[g], o) - (version == 1)))
            for i, g in enumerate(group)
        ]
        for o, words in enumerate(columns)
    ]


def oracle_awq(tensors) -> list[list[float]]:
    def number(row, o):
        return (row[o // 8] & 0xFFFFFFFF) >> 4 * INTERLEAVED.index(o % 8) & 15

    qweight, qzeros, scales = (tensors[name].tolist() for name in ("qweight", "qzeros", "scales"))
    size = len(qweight) // len(scales)
    return [
        [
            half(Fraction(scales[i // size][o]) * (number(row, o) - number(qzeros[i // size], o)))
            for i, row in enumerate(qweight)
        ]
        for o in range(len(scales[0]))
    ]


def numbers(bits, rows, columns, low=0):
    return torch.randint(low, 2**bits, (rows, columns)).tolist()


def some_scales(groups=1, out=OUT):
    """Of many magnitudes, so that products need rounding and some are subnormal."""
    return (torch.rand(groups, out) * 10 ** torch.linspace(-5, 0, out)).half().clamp(min=6e-8)


def bitwise_equal(weight, dense: list[list[float]]) -> bool:
    found = weight.dequantize(torch.float16).view(torch.int16)
    return torch.equal(found, torch.tensor(dense, dtype=torch.float64).half().view(torch.int16))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_exact(bits, version):
    zeros = numbers(bits, 1, OUT, low=1)
    layer = gptq_layer(numbers(bits, IN, OUT), zeros, some_scales(), bits, version)
    assert layer["qweight"].shape == (IN * bits // 32, OUT) and layer["qzeros"].shape == (1, OUT * bits // 32)
    weight = from_gptq(layer, bits, version)
    assert (weight.in_features, weight.out_features, weight.bits, weight.n_codes) == (IN, OUT, bits, 2**bits)
    assert bitwise_equal(weight, oracle_gptq(layer, bits, version))


def test_the_documented_place_of_three_bit_numbers():
    """Of 32 numbers, number 10 has two bits in the first word, number 21 one in the second and two in the third."""
    for index, word, shift in ((9, 0, 27), (10, 0, 30), (11, 1, 1), (21, 1, 31), (22, 2, 2)):
        q = [[7 if i == index else 0] * 32 for i in range(32)]
        layer = gptq_layer(q, [[1] * 32], torch.ones(1, 32).half(), 3)
        column = [value & 0xFFFFFFFF for value in layer["qweight"][:, 0].tolist()]
        assert sum(value << 32 * place for place, value in enumerate(column)) == 7 << (32 * word + shift)
        assert from_gptq(layer, 3).indices()[0].tolist() == [7 * (i == index) for i in range(32)]


def test_awq_is_exact():
    layer = awq_layer(numbers(4, IN, OUT), numbers(4, 1, OUT), some_scales())
    assert bitwise_equal(from_awq(layer), oracle_awq(layer))


def test_awq_order_in_one_word():
    layer = awq_layer([list(range(8))], [[0] * 8], torch.ones(1, 8).half())
    assert layer["qweight"].tolist() == [[0x75316420]]
    assert from_awq(layer).dequantize().T.tolist() == [list(range(8))]


def test_groups_that_share_scale_and_zero_are_one():
    scales, zeros = some_scales().repeat(3, 1), numbers(4, 1, OUT, low=1) * 3
    order = torch.randint(3, (IN,)).tolist()
    layer = gptq_layer(numbers(4, IN, OUT), zeros, scales, 4, groups=order)
    assert bitwise_equal(from_gptq(layer, 4), oracle_gptq(layer, 4, 1))
    layer = awq_layer(numbers(4, IN, OUT), zeros, scales)
    assert bitwise_equal(from_awq(layer), oracle_awq(layer))


def test_a_group_that_no_input_is_in_does_not_count():
    scales = torch.cat([some_scales(), 2 * some_scales()])
    layer = gptq_layer(numbers(4, IN, OUT), numbers(4, 2, OUT, low=1), scales, 4)
    assert bitwise_equal(from_gptq(layer, 4), oracle_gptq(layer, 4, 1))


def refused(action, *words, kind=FormatError):
    with pytest.raises(kind) as raised:
        action()
    said = str(raised.value)
    assert said.endswith(".") and said.isprintable(), said
    assert [word for word in words if word not in said] == [], said
    return said


def distinct(dense: list[list[float]]) -> int:
    return max(len({round(value, 12) for value in row}) for row in dense)


@pytest.mark.parametrize("form", ["gptq", "gptq desc_act", "awq"])
def test_groups_with_scales_of_their_own_are_refused_with_what_they_would_need(form):
    """Values of each channel, counted in fractions: all that the grids can hold, used or not."""
    groups, scales = 3, some_scales(3)
    zeros = numbers(4, groups, OUT, low=1)
    order = [i * groups // IN for i in range(IN)]
    if form == "gptq desc_act":
        order = [order[i] for i in torch.randperm(IN)]
    grids = [
        {Fraction(scales[g, o].item()) * (q - zeros[g][o]) for g in range(groups) for q in range(16)}
        for o in range(OUT)
    ]
    most = max(map(len, grids))
    needed = math.ceil(math.log2(most)) + 16 * most / IN
    if form == "awq":
        action = lambda: from_awq(awq_layer(numbers(4, IN, OUT), zeros, scales))  # noqa: E731
    else:
        layer = gptq_layer(numbers(4, IN, OUT), zeros, scales, 4, groups=order)
        action = lambda: from_gptq(layer, 4)  # noqa: E731
    own = 4 + 20 * groups / IN
    refused(action, "3 groups", f"{most} values", f"{needed:.2f} bits", f"{own:.2f} bits", "group_size -1")


def gptq_case(**changes):
    given = dict(q=numbers(4, IN, OUT), zeros=numbers(4, 1, OUT, low=1), scales=some_scales(), bits=4)
    return gptq_layer(**(given | changes))


REFUSED = {
    "no scales": (lambda t: t.pop("scales"), ["scales is missing"]),
    "words of int16": (lambda t: t.update(qweight=t["qweight"].short()), ["int16", "int32"]),
    "scales of another width": (lambda t: t.update(scales=t["scales"][:, :32]), ["[1, 32]", "[1, 64]"]),
    "scales that are whole": (lambda t: t.update(scales=t["scales"].int()), ["int32", "floating"]),
    "a scale that is NaN": (lambda t: t["scales"][0, 3].fill_(torch.nan), ["finite"]),
    "zeros of another width": (lambda t: t.update(qzeros=t["qzeros"][:, :4]), ["[1, 4]", "[1, 8]"]),
    "groups of too few inputs": (lambda t: t.update(g_idx=t["g_idx"][:90]), ["[90]", "[96]"]),
    "a group that is not there": (lambda t: t["g_idx"][3].fill_(1), ["0 to 1", "there are 1"]),
    "a group below 0": (lambda t: t["g_idx"][3].fill_(-1), ["-1 to 0"]),
    "a zero read two ways": (lambda t: t["qzeros"][0, 0].fill_(-1), ["zero point is 15", "as 0", "as 16"]),
    "rows that do not fill words": (lambda t: t.update(qweight=t["qweight"][:, :60]), ["[12, 60]"]),
    "scales beyond float16": (lambda t: t["scales"].fill_(60000), ["NaN or infinite"]),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_gptq_layers_that_do_not_fit(change, words):
    layer = gptq_case()
    change(layer)
    refused(lambda: from_gptq(layer, 4), *words)


def test_gptq_of_other_bits():
    refused(lambda: from_gptq(gptq_case(), 5), "5 bits", "2, 3, 4, 8")
    refused(lambda: from_gptq(gptq_case(), 8), "qzeros")


def test_symmetric_tells_a_wrong_version():
    layer = gptq_case(zeros=[[8] * OUT])
    from_gptq(layer, 4, version=1, symmetric=True)
    refused(lambda: from_gptq(layer, 4, version=2, symmetric=True), "7 to 7", "'gptq'")
    layer = gptq_case(zeros=[[8] * OUT], version=2)
    refused(lambda: from_gptq(layer, 4, version=1, symmetric=True), "9 to 9", "'gptq_v2'")


def test_scales_of_bfloat16_where_float16_holds_the_products():
    scales = torch.full((1, OUT), 0.0123).bfloat16()
    layer = gptq_case(scales=scales)
    weight = from_gptq(layer, 4)
    q = torch.tensor(packed_back(layer["qweight"]))
    zeros = torch.tensor([[(row >> 4 * p & 15) + 1 for row in layer["qzeros"][0].tolist() for p in range(8)]])
    expected = ((q - zeros).bfloat16() * scales).T
    assert torch.equal(weight.dequantize(torch.bfloat16), expected)
    refused(lambda: from_gptq(gptq_case(scales=scales * 1e-6), 4), "bfloat16", "no float16")
    refused(lambda: from_gptq(gptq_case(scales=torch.full((1, OUT), 0.0123)), 4), "float32", "no float16")


def packed_back(qweight):
    return [[word >> 4 * place & 15 for word in row] for row in qweight.tolist() for place in range(8)]


# --- whole models --------------------------------------------------------------------------------------------------

GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": -1,
    "desc_act": False,
    "sym": False,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm"}


def write_checkpoint(folder, config, oracle, make, shape=MODELS["llama-tiny"], head=False):
    """A tiny Llama whose linears are packed at random, and its dense twin as the oracle reads them."""
    model = models.random_model(shape, dtype=torch.float16)
    tensors, bits = {n: p.clone() for n, p in model.named_parameters()}, config["bits"]
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and (head or name != "lm_head"):
            inputs, outputs = layer.in_features, layer.out_features
            scales = (0.01 + 0.01 * torch.rand(1, outputs)).half()
            parts = make(numbers(bits, inputs, outputs), numbers(bits, 1, outputs, low=1), scales)
            tensors.pop(f"{name}.weight", None)  # a tied head has none of its own
            tensors |= {f"{name}.{part}": value for part, value in parts.items()}
            layer.weight.data = torch.tensor(oracle(parts), dtype=torch.float64).half()
    folder.mkdir()
    fields = model.config.to_dict() | {"dtype": "float16", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("written") / "gptq"
    write_checkpoint(folder, *KINDS["gptq"])
    return folder


@pytest.fixture
def gptq(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "gptq"))


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([[5, 9, 200, 3]])).logits


KINDS = {
    "gptq": (GPTQ, lambda parts: oracle_gptq(parts, 4, 1), lambda *a: gptq_layer(*a, 4)),
    "gptq_v2 8 bits": (
        GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8},
        lambda parts: oracle_gptq(parts, 8, 2),
        lambda *a: gptq_layer(*a, 8, 2),
    ),
    "gptq 3 bits": (GPTQ | {"bits": 3}, lambda p: oracle_gptq(p, 3, 1), lambda *a: gptq_layer(*a, 3)),
    "awq": (AWQ, oracle_awq, awq_layer),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_imports_decodes_saves_and_loads(tmp_path, kind):
    config, oracle, make = KINDS[kind]
    twin = write_checkpoint(tmp_path / "in", config, oracle, make, head=kind == "awq")
    done = imports.import_model(tmp_path / "in", tmp_path / "out")
    assert (done.layers, done.bits, done.method) == (
        14 + (kind == "awq"),
        config["bits"],
        config["quant_method"],
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    loaded = models.load(str(tmp_path / "out")).model
    assert loaded.dtype == torch.float16 and isinstance(loaded.model.layers[0].mlp.up_proj, CodebookLinear)
    assert loaded.trapetum_quantization == {"method": config["quant_method"], "imported": config}
    for name, dense in twin.named_modules():
        if isinstance(layer := loaded.get_submodule(name), CodebookLinear):
            assert torch.equal(layer.dequantize(torch.float16), dense.weight), name
    exact = models.load(str(tmp_path / "out"), dtype="fp32").model
    torch.testing.assert_close(logits(exact), logits(twin.float()), rtol=1e-4, atol=1e-4)
    models.save(loaded, None, tmp_path / "again")
    again = models.load(str(tmp_path / "again"), dtype="fp32").model
    assert (
        Engine(exact, "lean").generate([5, 9], 6).tokens == Engine(again, "lean").generate([5, 9], 6).tokens
    )


AQLM = {
    "quant_method": "aqlm",
    "num_codebooks": 2,
    "nbits_per_codebook": 8,
    "in_group_size": 8,
    "out_group_size": 1,
}


def test_an_aqlm_model_imports_decodes_saves_and_loads(tmp_path):
    """The dense twin is summed up here, codebook by codebook."""
    twin = models.random_model(MODELS["llama-tiny"], dtype=torch.float16)
    tensors = {n: p.clone() for n, p in twin.named_parameters()}
    for name, layer in twin.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            codes = torch.randint(
                -128, 128, (layer.out_features, layer.in_features // 8, 2), dtype=torch.int8
            )
            codebooks, scales = (
                torch.randn(2, 256, 1, 8).half(),
                torch.rand(layer.out_features, 1, 1, 1).half(),
            )
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.codes": codes, f"{name}.codebooks": codebooks, f"{name}.scales": scales}
            vectors = [codebooks[c, :, 0].double()[codes[..., c].long() % 256] for c in (0, 1)]
            dense = (vectors[0] + vectors[1]).flatten(1) * scales.double().view(-1, 1)
            layer.weight.data = dense.half()
    fields = twin.config.to_dict() | {"dtype": "float16"}
    fields["quantization_config"] = AQLM | {"linear_weights_not_to_quantize": ["lm_head.weight"]}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    done = imports.import_model(tmp_path / "in", tmp_path / "out")
    assert (done.layers, done.bits) == (14, 2) and done.nbytes > 0
    loaded = models.load(str(tmp_path / "out"), dtype="fp32").model
    for name, layer in twin.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            found = loaded.get_submodule(name).dequantize(torch.float16)
            torch.testing.assert_close(found, layer.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(loaded), logits(twin.float()), rtol=2e-2, atol=2e-2)
    assert len(Engine(loaded, "lean").generate([5, 9], 6).tokens) == 6


def test_zero_biases_and_rope_tables_that_old_checkpoints_hold_are_left_out(gptq, tmp_path):
    folder = gptq
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(160).half()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    imports.import_model(folder, tmp_path / "out")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, folder / "model.safetensors")
    said = ["model.layers.0.mlp.up_proj.bias", "not zero"]
    refused(lambda: imports.import_model(folder, tmp_path / "other"), *said, kind=ModelError)
    assert not (tmp_path / "other").exists()


CONFIGS = {
    "a planar format": ({"checkpoint_format": "gptq_p"}, ["gptq_p", "gptq_v2"]),
    "a planar format by its newer name": ({"checkpoint_format": None, "format": "gptq_p"}, ["gptq_p"]),
    "words of 16 bits": ({"pack_dtype": "int16"}, ["int16"]),
    "no bits": ({"bits": None}, ["bits are None"]),
    "other bits": ({"bits": 8}, ["qzeros", "model.layers.0"]),
    "another method": ({"quant_method": "exl2"}, ["exl2", "gptq, awq and aqlm"]),
    "symmetric": ({"sym": True}, ["zero points are 8"]),
    "awq gemv": (AWQ | {"version": "GEMV"}, ["version is gemv", "only gemm"]),
    "awq without zeros": (AWQ | {"zero_point": False}, ["zero_point is False"]),
    "awq of 3 bits": (AWQ | {"bits": 3}, ["bits is 3"]),
    "aqlm of another scheme": ({"quant_method": "aqlm"}, ["AQLM", "2x8"]),
}


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(gptq, tmp_path, change, words):
    folder = gptq
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: imports.import_model(folder, tmp_path / "out"), *words, kind=ModelError)


TENSORS = {
    "a weight is gone": (lambda t: t.pop("model.norm.weight"), ["lacks 1", "model.norm.weight"]),
    "a part is gone": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.scales"),
        ["mlp.up_proj", "scales is missing"],
    ),
    "a stranger": (lambda t: t.update({"x.y": torch.ones(1)}), ["x.y", "no place"]),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        ["model.norm.weight", "[3]", "[64]"],
    ),
    "infinite": (lambda t: t["model.norm.weight"].fill_(torch.inf), ["model.norm", "infinite"]),
    "a layer too many": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.scales": torch.ones(1)}),
        ["2 layers", "hold 3"],
    ),
    "nothing packed": (lambda t: [t.pop(n) for n in list(t) if "qweight" in n], ["no qweight"]),
}


@pytest.mark.parametrize(("change", "words"), TENSORS.values(), ids=TENSORS)
def test_files_that_are_refused(gptq, tmp_path, change, words):
    folder = gptq
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(lambda: imports.import_model(folder, tmp_path / "out"), *words, kind=ModelError)


def test_a_head_that_is_tied_must_be_the_embedding(tmp_path):
    shape = replace(MODELS["llama-tiny"], tied_embeddings=True)
    write_checkpoint(tmp_path / "in", *KINDS["gptq"], shape=shape)
    weights = tmp_path / "in" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, weights)
    imports.import_model(tmp_path / "in", tmp_path / "out")
    loaded = models.load(str(tmp_path / "out")).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, weights)
    refused(lambda: imports.import_model(tmp_path / "in", tmp_path / "x"), "lm_head.weight", kind=ModelError)


def test_a_packed_head_of_a_tied_model_is_its_own(tmp_path):
    shape = replace(MODELS["llama-tiny"], tied_embeddings=True)
    twin = write_checkpoint(tmp_path / "in", *KINDS["gptq"], shape=shape, head=True)
    imports.import_model(tmp_path / "in", tmp_path / "out")
    loaded = models.load(str(tmp_path / "out")).model
    assert torch.equal(loaded.lm_head.dequantize(torch.float16), twin.lm_head.weight)
    stored = load_file(tmp_path / "in" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(loaded.model.embed_tokens.weight, stored)


def test_directories_that_are_none(tmp_path, gptq):
    refused(lambda: imports.import_model(tmp_path / "gone", tmp_path / "out"), "gone", kind=ModelError)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("years")
    refused(lambda: imports.import_model(gptq, tmp_path / "kept"), "choose another", kind=ModelError)
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "years"


def test_the_command(gptq, tmp_path):
    run = CliRunner().invoke(app, ["import", str(gptq), str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["layers"] == 14
    again = CliRunner().invoke(app, ["import", str(tmp_path / "out"), str(tmp_path / "twice")])
    assert again.exit_code == 2 and "trapetum imports gptq, awq and aqlm" in again.output


def test_damaged_checkpoints_are_one_sentence_and_leave_nothing(gptq, tmp_path):
    """Foreign files hold no hashes, so a flipped code cannot be seen; all else must be refused or be a whole model."""
    whole, fields = (gptq / "model.safetensors").read_bytes(), json.loads((gptq / "config.json").read_text())
    length, rng = struct.unpack("<Q", whole[:8])[0], random.Random(0)
    refusals = 0
    for seed in range(60):
        changed, config = bytearray(whole), json.loads(json.dumps(fields))
        if seed % 3 == 0:
            changed[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        elif seed % 3 == 1:
            changed = changed[: rng.randrange(len(whole))] + bytes(rng.randrange(9))
        else:
            place = rng.choice([config, config["quantization_config"]])
            values = [None, -1, 0, 3, 10**20, 1.5, "x", [], {}, True, [[[]]]]
            place[rng.choice(list(place))] = rng.choice(values)
        (gptq / "model.safetensors").write_bytes(changed)
        (gptq / "config.json").write_text(json.dumps(config))
        try:
            imports.import_model(gptq, tmp_path / f"out{seed}")
        except (ModelError, FormatError) as error:
            said = str(error)
            assert said.endswith(".") and said.isprintable() and len(said) < 700, said
            assert not (tmp_path / f"out{seed}").exists()
            refusals += 1
    assert refusals > 40


def test_loading_without_importing_says_how(gptq):
    refused(lambda: models.load(str(gptq)), "'gptq'", "trapetum import", kind=ModelError)
