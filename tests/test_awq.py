"""The scale search: the function stays, the rounding error falls, and the statistics follow."""

import copy

import pytest
import torch
from torch import nn

from trapetum import awq, equivalence
from trapetum.awq import ALPHAS, awq_block
from trapetum.calibration import Statistics
from trapetum.equivalence import PLACES
from trapetum.quantizers import quantize

SIZES = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
)
LINEARS = [name for names in PLACES.values() for name in names]
LOUD = 3  # the input channel of every place that is 40 times larger than the rest


def made() -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES))
    for block in model.model.layers:
        for place in PLACES:
            scale = torch.ones(equivalence.channels(block, place))
            scale[LOUD] = 1 / 40
            equivalence.scale_inputs(block, place, scale)
    return model.eval().requires_grad_(False)


def observed(
    model: nn.Module, groups: int = 1, prefix: str = ""
) -> tuple[dict[str, Statistics], torch.Tensor]:
    """Statistics of the first block's linears on random tokens, and the logits; group g weighs all tokens by g + 1."""
    block, inputs = model.model.layers[0], {}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, n=name: inputs.__setitem__(n, args[0].flatten(0, -2))
        )
        for name in LINEARS
    ]
    ids = torch.randint(64, (8, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    found = {}
    for name, x in inputs.items():
        hessian = torch.stack([(g + 1) * x.T @ x / len(x) for g in range(groups)])
        found[prefix + name] = Statistics(hessian, x.square().mean(0), len(x))
    return found, logits


def rounding_error(model: nn.Module, statistics: dict[str, Statistics], names=LINEARS) -> float:
    """Relative output error of 3-bit rounding of linears, from the quantizer that others use."""
    total = 0.0
    for name in names:
        weight, hessians = (
            model.model.layers[0].get_submodule(name).weight.double(),
            statistics[name].hessian.double(),
        )
        lost = quantize(weight, 3, "rtn").dequantize(torch.float64) - weight
        of_row = [hessians[row * len(hessians) // len(weight)] for row in range(len(weight))]
        sizes = [sum(row @ h @ row for row, h in zip(rows, of_row, strict=True)) for rows in (lost, weight)]
        total += float(sizes[0] / sizes[1])
    return total


@pytest.mark.parametrize("groups", [1, 3])
def test_scales_lower_the_rounding_error_and_leave_the_function(groups):
    model = made()
    before, logits = observed(model, groups)
    error = rounding_error(model, before)
    found = awq_block(model.model.layers[0], before, 3)
    after, scaled_logits = observed(model, groups)
    assert float((scaled_logits - logits).abs().max() / (logits.max() - logits.min())) < 1e-4
    for name in LINEARS:
        torch.testing.assert_close(found.statistics[name].hessian, after[name].hessian, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            found.statistics[name].mean_square, after[name].mean_square, rtol=1e-3, atol=1e-6
        )
        assert found.statistics[name].tokens == 320
    assert rounding_error(model, found.statistics) < error / 2
    assert all(best < plain for plain, best in found.errors.values())
    for place in ("o", "down"):  # the rows of others are scaled after their own search
        quantized = rounding_error(model, found.statistics, PLACES[place])
        assert found.errors[place][1] == pytest.approx(quantized, rel=0.02)  # the quantizer keeps fp16 values
    assert set(found.alphas) == set(PLACES) and all(
        0 < alpha <= ALPHAS[-1] for alpha in found.alphas.values()
    )
    assert f"qkv {found.alphas['qkv']:.2f}" in found.text


def test_the_exponent_has_the_least_error_of_all():
    """Against a plain search: fold each exponent's scales in, quantize, and compare tr(D H D^T)."""
    model = made()
    statistics, _ = observed(model)
    found = awq_block(copy.deepcopy(model.model.layers[0]), statistics, 4)
    known = statistics["mlp.down_proj"]
    losses = []
    for alpha in ALPHAS:
        block = copy.deepcopy(model.model.layers[0])
        scale = known.mean_square.sqrt() ** alpha
        equivalence.scale_inputs(block, "down", scale)
        weight = block.mlp.down_proj.weight
        h = awq.scaled(known, scale).hessian[0].double()
        lost = quantize(weight, 4, "rtn").dequantize(torch.float64) - weight
        losses.append(float(((lost @ h) * lost).sum()))
    chosen = ALPHAS.index(found.alphas["down"])
    assert losses[chosen] == pytest.approx(min(losses), rel=0.02)  # the quantizer keeps fp16 values
    assert min(losses) < losses[0]


def test_names_of_the_model_serve_as_well_and_come_back():
    first, second = made(), made()
    found = [awq_block(first.model.layers[0], observed(first)[0], 4)]
    prefix = "model.layers.0."
    found.append(awq_block(second.model.layers[0], observed(second, prefix=prefix)[0], 4))
    assert found[0].alphas == found[1].alphas
    assert set(found[1].statistics) == {prefix + name for name in found[0].statistics}
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_without_a_hessian_its_diagonal_decides():
    model = made()
    statistics, _ = observed(model)
    moments = {name: Statistics(None, s.mean_square, s.tokens) for name, s in statistics.items()}
    diagonal = {
        name: Statistics(s.hessian[0].diagonal().diag()[None], s.mean_square, s.tokens)
        for name, s in statistics.items()
    }
    found = [awq_block(copy.deepcopy(model.model.layers[0]), known, 4) for known in (moments, diagonal)]
    assert found[0].alphas == found[1].alphas
    assert found[0].statistics["mlp.up_proj"].hessian is None
    for place in PLACES:
        assert found[0].errors[place] == pytest.approx(found[1].errors[place], rel=1e-4)


def test_fewer_codes_than_the_bits_hold_round_coarser():
    errors = []
    for codes in (None, 16, 12):
        model = made()
        errors.append(awq_block(model.model.layers[0], observed(model)[0], 4, codes).errors["qkv"][0])
    assert errors[0] == errors[1] < errors[2]


def test_inputs_that_are_always_zero_do_no_harm():
    model = made()
    statistics, _ = observed(model)
    for name, s in statistics.items():
        s.hessian[:, 5], s.hessian[:, :, 5], s.mean_square[5] = 0, 0, 0
        if "gate" in name or "up" in name:
            statistics[name] = Statistics(
                torch.zeros_like(s.hessian), torch.zeros_like(s.mean_square), s.tokens
            )
    found = awq_block(model.model.layers[0], statistics, 4)
    assert found.alphas["gate_up"] == 0 and found.errors["gate_up"] == (0, 0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(bool(s.hessian.isfinite().all()) for s in found.statistics.values())


def test_statistics_that_are_missing_or_of_another_model_are_refused():
    block = made().model.layers[0]
    before = copy.deepcopy(block.state_dict())
    statistics, _ = observed(made())
    lacking = {name: s for name, s in statistics.items() if "down" not in name}
    with pytest.raises(
        ValueError, match="0 of the 6 statistics are of a mlp.down_proj; give those of all linears"
    ):
        awq_block(block, lacking, 4)
    other = statistics | {"mlp.up_proj": Statistics(None, torch.ones(47), 1)}
    with pytest.raises(ValueError, match="mlp.up_proj has 48 inputs, and its statistics are of 47"):
        awq_block(block, other, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


@pytest.mark.gpu
def test_gpu_chooses_what_the_cpu_chooses():
    model, there = made(), made().cuda()
    statistics, _ = observed(model)
    moved = {
        name: Statistics(s.hessian.cuda(), s.mean_square.cuda(), s.tokens) for name, s in statistics.items()
    }
    found = [awq_block(m.model.layers[0], known, 4) for m, known in ((model, statistics), (there, moved))]
    assert found[0].alphas == found[1].alphas
    for here, other in zip(model.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), here, rtol=1e-5, atol=1e-6)
    assert found[1].statistics["mlp.up_proj"].hessian.is_cuda
