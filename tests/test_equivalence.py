"""Changes of a model that leave its function as it is: every architecture, every place, by logits."""

import copy
import warnings

import pytest
import torch
from torch import nn

from trapetum import equivalence, models
from trapetum.checkpoint import ModelError
from trapetum.decode import Engine
from trapetum.equivalence import PLACES

IDS = torch.tensor([[5, 9, 20, 31, 77, 2, 14, 63, 8, 40, 41, 3]])
SIZES = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=96,
    max_position_embeddings=64,
    initializer_range=0.2,
)
_BIASES = dict(attention_bias=True, mlp_bias=True)
#: name -> (model_type, fields of its config).
CASES = {
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, biases everywhere": ("llama", _BIASES),
    "llama, a kv head each": ("llama", dict(num_key_value_heads=6)),
    "mistral": ("mistral", dict(sliding_window=None, hidden_size=64, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False)),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
}


def made(case: str, dtype=torch.float32) -> nn.Module:
    """A model of the case with random weights, biases and norm gains."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[case]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(
                    torch.rand_like(parameter) + 0.5 if "norm" in name else 0.3 * torch.randn_like(parameter)
                )
    return model.to(dtype).eval().requires_grad_(False)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def distance(model: nn.Module, expected: torch.Tensor) -> float:
    """The largest difference of two models' logits, as a share of the range of the expected ones."""
    return float((logits(model) - expected).abs().max() / (expected.max() - expected.min()))


def random_scale(size: int, seed: int = 0) -> torch.Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def scale_everywhere(model: nn.Module) -> None:
    for number, block in enumerate(model.model.layers):
        for place in PLACES:
            equivalence.scale_inputs(block, place, random_scale(equivalence.channels(block, place), number))


CHANGES = {
    "scales": scale_everywhere,
    "folded": equivalence.fold_norms,
    "rotated": lambda model: equivalence.rotate(model, 3),
    "stressed": equivalence.stress,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_a_change_leaves_the_logits_and_moves_the_weights(case, change, tmp_path):
    """In the module tree, in the own step, and after writing and reading."""
    model = made(case)
    before, expected = copy.deepcopy(model), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CHANGES[change](model)
    assert distance(model, expected) < 1e-4
    moved = [
        n
        for n, p in before.model.layers.named_parameters()
        if not torch.equal(p, model.model.layers.get_parameter(n))
    ]
    assert len(moved) >= 2 * 7
    again = models.load(str(models.save(model, None, tmp_path / "model"))).model
    assert distance(again, expected) < 1e-4
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    spoken = [Engine(m, "lean", max_context=32).generate(IDS[0].tolist(), 12).tokens for m in (before, again)]
    assert spoken[0] == spoken[1] and len(set(spoken[0])) > 2


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["llama, tied", "qwen2"])
def test_gpu_a_change_is_that_of_the_cpu(case, change):
    model, there = made(case), made(case).cuda()
    CHANGES[change](model)
    CHANGES[change](there)
    for (name, here), other in zip(model.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(
            other.cpu(), here, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("place", PLACES)
def test_a_scale_moves_between_the_readers_and_what_feeds_them(place):
    """With grouped-query attention and biases: inputs become x / scale, columns W * scale."""
    block = made("llama, biases everywhere").model.layers[0]
    names = PLACES[place]
    seen = {}

    def inputs():
        hooks = [
            block.get_submodule(n).register_forward_pre_hook(
                lambda _, args, n=n: seen.__setitem__(n, args[0])
            )
            for n in names
        ]
        positions = torch.arange(9)[None]
        angles = (
            positions[..., None] * torch.rand(1, 1, 8, generator=torch.Generator().manual_seed(1))
        ).float()
        hidden = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(2))
        out = block(hidden, position_embeddings=(angles.cos(), angles.sin()))
        for hook in hooks:
            hook.remove()
        return dict(seen), {n: block.get_submodule(n).weight.clone() for n in names}, out

    scale = random_scale(equivalence.channels(block, place))
    x, weights, out = inputs()
    equivalence.scale_inputs(block, place, scale)
    scaled_x, scaled_weights, scaled_out = inputs()
    spread = equivalence.spread(block, place, scale)
    for name in names:
        torch.testing.assert_close(scaled_x[name] * spread, x[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scaled_weights[name], weights[name] * spread)
    torch.testing.assert_close(scaled_out, out, rtol=1e-4, atol=1e-4)


def test_the_query_heads_of_a_kv_head_share_its_scale():
    block = made("llama").model.layers[0]
    assert equivalence.channels(block, "o") == 2 * 8
    spread = equivalence.spread(block, "o", torch.arange(1.0, 17.0)).unflatten(0, (6, 8))
    assert torch.equal(spread[:3], torch.arange(1.0, 9.0).expand(3, 8))
    assert torch.equal(spread[3:], torch.arange(9.0, 17.0).expand(3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_change_no_bit(dtype):
    model = made("qwen2", dtype)
    expected = logits(model)
    for block in model.model.layers:
        for place in PLACES:
            size = equivalence.channels(block, place)
            powers = torch.randint(-6, 7, (size,), generator=torch.Generator().manual_seed(0))
            equivalence.scale_inputs(block, place, 2.0**powers)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("place", "scale", "words"),
    [
        ("q", torch.ones(48), "no place 'q' .* qkv, gate_up, o, down"),
        ("qkv", torch.ones(47), r"place 'qkv' takes 48 scales, not \[47\]"),
        ("o", torch.ones(48), r"place 'o' takes 16 scales, not \[48\]"),
        ("down", torch.zeros(80), "from 0 to 0; each must be positive"),
        ("down", torch.full((80,), torch.nan), "each must be positive and finite"),
        ("down", -torch.ones(80), "from -1 to -1"),
    ],
)
def test_scales_that_do_not_fit_are_refused(place, scale, words):
    with pytest.raises(ValueError, match=words):
        equivalence.scale_inputs(made("llama").model.layers[0], place, scale)


def test_a_scale_that_the_dtype_cannot_hold_changes_nothing():
    model = made("llama", torch.float16)
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(ValueError, match="q_proj.weight would reach beyond 65504.* float32"):
        equivalence.scale_inputs(model.model.layers[0], "qkv", torch.full((48,), 1e6))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_quantized_model_is_refused():
    model = made("llama")
    models.quantize_model(model, 4, "rtn", progress=False)
    for change in CHANGES.values():
        with pytest.raises(ValueError, match="q_proj is a CodebookLinear; change the dense model"):
            change(model)


def test_a_quantized_head_is_refused_before_anything_is_folded():
    model = made("llama")
    whole = copy.deepcopy(model)
    models.quantize_model(whole, 4, "rtn", lm_head=True, progress=False)
    model.lm_head = whole.lm_head
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="lm_head is a CodebookLinear"):
        equivalence.rotate(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_unknown_architecture_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma", **SIZES))
    for change in (equivalence.fold_norms, equivalence.rotate, equivalence.stress):
        with pytest.raises(ModelError, match="llama, mistral, qwen2"):
            change(gemma)


def test_folded_norms_are_ones_and_a_tied_head_is_paid_for():
    for case in ("llama", "llama, tied"):
        model, tied = made(case), "tied" in case
        size = models.weight_bytes(model)
        note = equivalence.fold_norms(model)
        norms = [p for n, p in model.named_parameters() if "norm" in n]
        assert len(norms) == 5 and all(bool((p == 1).all()) for p in norms)
        assert note.bytes_added == models.weight_bytes(model) - size == tied * 96 * 48 * 4
        assert ("18432 bytes" in note.text) == tied
        assert equivalence.fold_norms(model).bytes_added == 0  # nothing is left to fold


def test_a_tied_head_stays_tied_where_the_last_norm_is_neutral():
    model = made("llama, tied")
    model.model.norm.weight.fill_(1)
    expected = logits(model)
    assert equivalence.rotate(model).bytes_added == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(model, expected) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 7, 8, 48, 80])
def test_turns_are_orthogonal_and_spread_a_spike(size):
    turn = equivalence._Turn(size, torch.Generator().manual_seed(1))
    matrix = turn.apply(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    power = size & -size
    assert float(matrix.abs().max()) <= power**-0.5 + 1e-12


def test_turns_of_many_rows_are_made_in_parts(monkeypatch):
    rows = torch.randn(5, 7, 48, dtype=torch.float64)
    whole = equivalence._Turn(48, torch.Generator().manual_seed(1)).apply(rows)
    monkeypatch.setattr(equivalence, "_CHUNK_WEIGHTS", 100)
    parts = equivalence._Turn(48, torch.Generator().manual_seed(1)).apply(rows)
    torch.testing.assert_close(parts, whole)
    assert equivalence._Turn(48, torch.Generator().manual_seed(1)).apply(rows.half()).dtype == torch.float16


def test_a_rotation_is_fixed_by_its_seed():
    weights = []
    for seed in (1, 1, 2):
        model = made("mistral")
        equivalence.rotate(model, seed)
        weights.append(model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-2)


def peak(weight: torch.Tensor) -> float:
    """The largest column of a matrix against the median one, by root mean square."""
    columns = weight.square().mean(0).sqrt()
    return float(columns.max() / columns.median())


def test_a_rotation_flattens_what_reads_the_stream_and_not_what_reads_the_mlp():
    model = made("llama")
    for block in model.model.layers:
        block.input_layernorm.weight[7] = 60.0
        block.mlp.down_proj.weight[:, 7] *= 60
    equivalence.rotate(model)
    block = model.model.layers[1]
    assert peak(block.self_attn.q_proj.weight) < 4
    assert peak(block.mlp.down_proj.weight) > 30


def test_stress_shrinks_a_share_of_the_columns_and_changes_no_bit():
    model, plain = made("llama"), made("llama")
    expected = logits(model)
    note = equivalence.stress(model, seed=1, share=0.1, factor=16)
    assert torch.equal(logits(model), expected)
    assert (
        "10.0% of all input channels" in note.text
        and "factor of 16, seed 1" in note.text
        and note.bytes_added == 0
    )
    columns = {"self_attn.q_proj": 5, "mlp.up_proj": 5, "self_attn.o_proj": 3 * 2, "mlp.down_proj": 8}
    factors = []
    for block, before in zip(model.model.layers, plain.model.layers, strict=True):
        for name, count in columns.items():
            ratio = block.get_submodule(name).weight / before.get_submodule(name).weight
            ratio = ratio / ratio.amax(1, keepdim=True)  # rows of up_proj are divided too
            assert torch.equal(ratio, ratio[:1].expand_as(ratio))
            assert int((ratio[0] < 1).sum()) == count
            factors += (1 / ratio[0][ratio[0] < 1]).log2().tolist()
    assert all(octave == round(octave) for octave in factors)
    assert 3 <= float(torch.tensor(factors).median()) <= 5 and len(set(factors)) > 2


def test_stress_makes_weights_harder_for_a_codebook_that_knows_no_inputs():
    lost = {}
    for share in (None, 0.1):
        model = made("llama")
        expected = logits(model)
        if share:
            equivalence.stress(model, share=share, factor=64)
        models.quantize_model(model, 4, "kmeans", progress=False)
        lost[share] = float((logits(model) - expected).square().mean())
    assert lost[0.1] > 4 * lost[None]


def test_stress_is_fixed_by_its_seed():
    weights = []
    for seed in (0, 0, 1):
        model = made("llama")
        equivalence.stress(model, seed)
        weights.append(model.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("share", "factor"), [(0, 8), (1, 8), (0.1, 0.5), (0.1, float("inf")), (float("nan"), 2)]
)
def test_stress_out_of_range_is_refused(share, factor):
    with pytest.raises(
        ValueError, match="give a share of channels between 0 and 1 and a factor of at least 1"
    ):
        equivalence.stress(made("llama"), share=share, factor=factor)
