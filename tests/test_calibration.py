"""Calibration: which tokens, and the statistics of every layer against float64 and against autograd on the whole model."""

import pytest
import torch
from torch import nn

from trapetum import calibration, hessians, models, quantizers
from trapetum import text as texts
from trapetum.blocks import Blocks
from trapetum.calibration import CalibrationError, take
from trapetum.shapes import MODELS

KINDS = {
    "llama": dict(),
    "tied": dict(tie_word_embeddings=True),
    "llama with biases": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2"),
    "mistral": dict(model_type="mistral", sliding_window=7),
}
LENGTHS = (19, 12, 19)


def make(kind="llama", dtype=torch.float32, device="cpu"):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = models.config_of(MODELS["llama-tiny"], max_position_embeddings=64).to_dict()
    if (
        KINDS[kind].get("model_type") == "qwen2"
    ):  # every second layer slides, so that layers get masks of their own
        fields |= dict(use_sliding_window=True, sliding_window=7, max_window_layers=1, layer_types=None)
    fields |= KINDS[kind]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for (
        name,
        parameter,
    ) in model.named_parameters():  # norms and biases that matter, activations that differ by channel
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.3 if "norm" in name else 0, 0.2)
    return model.to(device, dtype)


def rows(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for length in lengths]


def linears(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def inputs_and_gradients(model, tokens):
    """Of the whole model at once: each linear's inputs, and the loss's gradients with respect to its outputs."""
    seen, outputs = {}, {}

    def hook(name):
        def keep(_, inputs, output):
            seen[name] = inputs[0].detach()[0]
            output.retain_grad()
            outputs[name] = output

        return keep

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in linears(model).items()]
    embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
    nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="sum").backward()
    for one in hooks:
        one.remove()
    model.zero_grad()
    return seen, {name: output.grad[0] for name, output in outputs.items()}


def by_group(gradient, groups):
    """Straight from the definition: row r belongs to group r * groups // out_features."""
    out = gradient.shape[1]
    of_row = torch.arange(out) * groups // out
    return torch.stack([gradient[:, of_row == g].double().square().mean(1) for g in range(groups)], 1)


def statistics(model, tokens, weights=None, lm_head=True):
    blocks, found = Blocks(model), {}
    hidden = [blocks.embed(row) for row in tokens]
    for index in range(len(blocks)):
        names = [name for name in blocks.linears(index) if lm_head or name != "lm_head"]
        of = {name: weights[name] for name in names} if weights else None
        found |= hessians.collect(blocks, index, hidden, names, of)
    return found


# Tokens


def test_windows_are_of_the_text_and_of_the_seed(tokenizer):
    first, again, other = (take(tokenizer, "builtin", 5, 64, seed) for seed in (0, 0, 1))
    assert [len(row) for row in first.rows] == [64] * 5 and first.tokens == 320
    assert first.sha256 == again.sha256 == calibration.rows_sha256(first.rows) != other.sha256
    assert (first.text, first.seed, other.seed) == ("builtin:train", 0, 1)
    content, _ = calibration.read("builtin", 32 * 5 * 64)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False).input_ids)
    windows = ids.unfold(0, 64, 1)
    for row in first.rows:
        assert bool((windows == row).all(1).any())


def test_the_built_in_text_is_the_training_side():
    content, name = calibration.read("builtin", 60_000)
    heldout = texts.heldout_text()
    lines = {line for line in content.split("\n") if len(line) >= 50}
    assert name == "builtin:train" and len(lines) > 300
    assert not lines & set(heldout.split("\n"))


def test_datasets_give_their_training_part(monkeypatch):
    asked = []
    monkeypatch.setattr(texts, "load_text", lambda spec, most: asked.append(spec) or "words")
    assert calibration.read("wikitext-2", 10) == ("words", "wikitext-2:train")
    assert calibration.read("owner/name", 10) == ("words", "owner/name::train")
    assert calibration.read("owner/name:small", 10)[1] == "owner/name:small:train"
    for as_it_is in ("owner/name:small:test", "owner/name::validation:body", "folder/text.txt", __file__):
        assert calibration.read(as_it_is, 10) == ("words", as_it_is)
    datasets = [
        "Salesforce/wikitext:wikitext-2-raw-v1:train:text",
        "owner/name::train",
        "owner/name:small:train",
    ]
    assert asked[:3] == datasets and len(asked) == 7


def test_a_short_text_gives_fewer_windows(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Return the name of the file. " * 40)
    tokens = len(tokenizer(path.read_text(), add_special_tokens=False).input_ids)
    found = take(tokenizer, str(path), 100, 50)
    assert len(found.rows) == tokens // 50 and found.text == str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SHORT", 4, 4096), "tokens, and a calibration sequence takes 4096; give a longer text"),
        (("SHORT", 0, 8), "0 sequences of 8 tokens"),
        (("SHORT", 4, 1), "4 sequences of 1 tokens"),
        (("SHORT", 2, 8, 0, 3), "and the model knows 0 to 2; use the model's own tokenizer."),
        (("nothing.txt", 2, 8), "there is no text file 'nothing.txt'"),
    ],
)
def test_refusals_of_texts(tokenizer, tmp_path, arguments, message):
    path = tmp_path / "short.txt"
    path.write_text("Return the name of the file. " * 40)
    text = str(path) if arguments[0] == "SHORT" else arguments[0]
    with pytest.raises(ValueError) as raised:
        take(tokenizer, text, *arguments[1:])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_model_without_tokenizer_takes_token_ids():
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        take(None, "builtin")
    made = calibration.made_of([torch.arange(5).reshape(1, 5), [1, 2]], "counting", seed=7)
    assert [row.tolist() for row in made.rows] == [[0, 1, 2, 3, 4], [1, 2]]
    assert (made.text, made.seed, made.tokens) == ("counting", 7, 7)
    for wrong in ([], [torch.tensor([1])]):
        with pytest.raises(CalibrationError, match="at least one, and at least 2 tokens"):
            calibration.made_of(wrong)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("builtin").tokenizer


# Plain statistics


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_the_inputs_second_moments(kind):
    model = make(kind)
    tokens, found = rows(), statistics(model, rows())
    assert found.keys() == linears(model).keys()
    seen = [inputs_and_gradients(model, row)[0] for row in tokens]
    for name, (plain, guided) in found.items():
        x = torch.cat([one[name] for one in seen]).double()
        expected = (x.T @ x / len(x))[None]
        torch.testing.assert_close(
            plain.hessian.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )
        assert torch.equal(plain.mean_square, plain.hessian[0].diagonal())
        assert torch.equal(plain.hessian, plain.hessian.mT)
        assert plain.tokens == sum(LENGTHS) and plain.hessian.dtype == torch.float32 and guided is None


def test_linears_with_one_input_share_one_hessian():
    found = statistics(make(), rows())
    place = {name: pair[0].hessian.data_ptr() for name, pair in found.items()}
    layer = "model.layers.1."
    assert len({place[f"{layer}self_attn.{name}_proj"] for name in "qkv"}) == 1
    assert place[f"{layer}mlp.gate_proj"] == place[f"{layer}mlp.up_proj"]
    assert len(set(place.values())) == 2 * 4 + 1


def test_a_16_bit_model_on_a_cpu_runs_in_float32():
    model = make(dtype=torch.bfloat16)
    assert Blocks(model).dtype == torch.float32
    found, tokens = statistics(model, rows()), rows()
    squares = hessians.row_squares(Blocks(model), tokens[0], 4)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    model = model.float()
    for name, (plain, _) in statistics(model, tokens).items():
        assert torch.equal(plain.hessian, found[name][0].hessian), name
    expected = hessians.row_squares(Blocks(model), tokens[0], 4)
    assert all(torch.equal(squares[name], expected[name]) for name in expected)


def test_the_model_is_left_as_it_was():
    model = make().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = rows()[0]
    with torch.inference_mode():
        logits = model(tokens[None]).logits
    statistics(model, rows())
    hessians.row_squares(Blocks(model), tokens, 4, lm_head=True)
    with torch.inference_mode():
        assert torch.equal(model(tokens[None]).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_that_are_not_finite_are_refused_by_name():
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(CalibrationError, match="the inputs of model.layers.1.mlp.down_proj hold NaN"):
        statistics(model, rows())
    with pytest.raises(CalibrationError, match="gradients in the output head are not finite"):
        hessians.row_squares(Blocks(model), rows()[0], 4)


def test_only_models_of_decoder_layers():
    with pytest.raises(ValueError, match="a Sequential has no decoder layers in model.layers"):
        Blocks(nn.Sequential(nn.Linear(4, 4)))


# Guided statistics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [4, 3])
def test_token_weights_are_autograds(kind, groups):
    model, tokens = make(kind), rows()[0]
    found = hessians.row_squares(Blocks(model), tokens, groups, lm_head=True)
    _, gradients = inputs_and_gradients(model, tokens)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        expected = by_group(gradient, groups)
        assert float(expected.max()) > 0
        torch.testing.assert_close(
            found[name].double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max())
        )


def test_the_head_is_left_out_unless_asked_for():
    assert "lm_head" not in hessians.row_squares(Blocks(make()), rows()[0], 2)


def test_token_weights_have_mean_one():
    squares = [{"a": torch.rand(n, 3) * torch.tensor([1e-12, 1.0, 0.0])} for n in (5, 9)]
    weights = hessians.token_weights(squares, "a")
    torch.testing.assert_close(weights.mean(0), torch.ones(3))
    raw = torch.cat([one["a"] for one in squares])
    torch.testing.assert_close(weights[:, 0], raw[:, 0] / raw[:, 0].mean())
    assert torch.equal(weights[:, 2], torch.ones(14))  # no output of this group matters: all tokens alike


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_guided_hessians_weigh_each_token(kind):
    model, tokens, groups = make(kind), rows(), 3
    blocks = Blocks(model)
    squares = [hessians.row_squares(blocks, row, groups, lm_head=True) for row in tokens]
    weights = {name: hessians.token_weights(squares, name) for name in squares[0]}
    found = statistics(model, tokens, weights)
    both = [inputs_and_gradients(model, row) for row in tokens]
    for name, (plain, guided) in found.items():
        x = torch.cat([seen[name] for seen, _ in both]).double()
        s = torch.cat([by_group(gradients[name], groups) for _, gradients in both])
        s = s / s.mean(0)
        expected = torch.einsum("tg,ti,tj->gij", s, x, x) / len(x)
        torch.testing.assert_close(
            guided.hessian.double(), expected, rtol=2e-3, atol=1e-4 * float(expected.max())
        )
        assert guided.mean_square is plain.mean_square or torch.equal(guided.mean_square, plain.mean_square)
        assert not torch.allclose(guided.hessian[0], plain.hessian[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("inputs", [1, 3, 8, 13, 40])
def test_products_are_taken_in_strips(monkeypatch, inputs):
    monkeypatch.setattr(hessians, "_STRIP", 3)
    x = torch.randn(1, 50, inputs)
    sums = hessians.Sums({"a": torch.full((50, 2), 4.0)})
    sums.add({"a": x})
    plain, guided = sums.finish()["a"]
    expected = x[0].double().T @ x[0].double() / 50
    torch.testing.assert_close(plain.hessian[0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(guided.hessian.double(), 4 * expected.expand(2, -1, -1), rtol=1e-5, atol=1e-6)


def test_tokens_are_summed_some_at_a_time(monkeypatch):
    """Sums taken every 16 tokens and at the end, where sequences have 19, 12 and 19."""
    tokens = rows()
    weights = {name: torch.rand(sum(LENGTHS), 2) for name in linears(make())}
    at_once = statistics(make(), tokens, weights)
    monkeypatch.setattr(hessians, "AT_ONCE", 16)
    for name, pair in statistics(make(), tokens, weights).items():
        for found, expected in zip(pair, at_once[name], strict=True):
            torch.testing.assert_close(found.hessian, expected.hessian, rtol=1e-4, atol=1e-6)
            assert found.tokens == sum(LENGTHS)


@pytest.mark.parametrize(("out", "groups"), [(7, 4), (64, 4), (5, 3), (2, 4), (1, 1)])
def test_groups_of_rows_are_the_quantizers(out, groups):
    sizes = hessians.group_sizes(out, groups)
    expected = [part.stop - part.start for _, part in quantizers.row_groups(out, min(out, groups))]
    assert sizes == expected and sum(sizes) == out


def test_gradients_that_would_underflow_keep_their_digits():
    """Scales are powers of two, exact in every dtype, so a gradient of 2**-40 comes through float16."""
    gradient = (torch.rand(6, 8) * 2.0**-40).requires_grad_(False)
    normal, power = hessians._normal(gradient)
    assert torch.equal(normal * 2.0**-power, gradient) and 2**8 <= float(normal.max()) < 2**9
    halves, power = hessians._normal((gradient * 2.0**24).half())
    assert halves.dtype == torch.float16 and 2**8 <= float(halves.max()) < 2**9
    assert hessians._normal(torch.zeros(3))[0].tolist() == [0, 0, 0]


def test_a_gradient_that_overflows_float16_is_taken_at_a_smaller_scale():
    x = torch.ones(4, dtype=torch.float16, requires_grad=True)
    y = x * 30000
    (found,), power = hessians._pulled(y, [x], torch.full((4,), 8.0, dtype=torch.float16), "here")
    assert power == -6 and torch.allclose(found.float() * 2.0**6, torch.full((4,), 240000.0), rtol=1e-3)
    z = y * torch.tensor(float("nan"))
    with pytest.raises(CalibrationError, match="the gradients in here are not finite in torch.float16"):
        hessians._pulled(z, [x], torch.ones(4, dtype=torch.float16), "here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_a_float16_model_do_not_underflow(device):
    """Products of 2**-12 in every layer: without scales nothing would arrive at the first one."""
    model = make(dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 2.0**-12
        layer.self_attn.o_proj.weight.data *= 2.0**-12
    model, tokens = model.half(), rows()[0]
    expected = hessians.row_squares(Blocks(model), tokens, 4)
    blocks = Blocks(model.to(device))
    blocks.dtype = torch.float16  # which a CPU would not choose
    found = hessians.row_squares(blocks, tokens, 4)
    for name, one in expected.items():
        assert float((found[name] - one).norm() / one.norm()) < 0.05, name


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_on_a_gpu(dtype, kind):
    """Against float32 on the CPU with the same weights; 16-bit activations differ by their own rounding."""
    model, tokens = make(kind, dtype), rows()
    reference = Blocks(model)
    squares = [hessians.row_squares(reference, row, 4) for row in tokens]
    weights = {name: hessians.token_weights(squares, name) for name in squares[0]}
    expected = statistics(model, tokens, weights, lm_head=False)
    model = model.to("cuda")
    blocks = Blocks(model)
    assert blocks.dtype == dtype
    there = [hessians.row_squares(blocks, row, 4) for row in tokens]
    found = statistics(
        model, tokens, {name: hessians.token_weights(there, name) for name in there[0]}, lm_head=False
    )
    again = statistics(
        model, tokens, {name: hessians.token_weights(there, name) for name in there[0]}, lm_head=False
    )
    limit = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float32: 1e-3}[dtype]
    for name, pair in expected.items():
        for one, mine, repeated in zip(pair, found[name], again[name], strict=True):
            assert torch.equal(mine.hessian, repeated.hessian), name
            difference = (mine.hessian.cpu() - one.hessian).norm() / one.hessian.norm()
            assert difference < limit, (name, float(difference))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bit_inputs_on_a_gpu_lose_nothing(dtype):
    """TF32 holds every bit of them: the plain Hessian is as good as float32's."""
    x = (torch.randn(1, 4096, 512, device="cuda") * torch.logspace(-3, 2, 512, device="cuda")).to(dtype)
    sums = hessians.Sums({"a": torch.full((4096, 1), 1e6)})
    sums.add({"a": x})
    before = torch.get_float32_matmul_precision()
    plain, guided = sums.finish()["a"]
    wide = x[0].double()
    expected = wide.T @ wide / 4096
    assert float((plain.hessian[0].double() - expected).norm() / expected.norm()) < 1e-4
    assert float((guided.hessian[0].double() - 1e6 * expected).norm() / (1e6 * expected).norm()) < 1e-3
    assert torch.get_float32_matmul_precision() == before == "highest"
