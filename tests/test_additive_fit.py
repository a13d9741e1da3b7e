"""Fitting additive codebooks: each step against an independent formula, the whole against what it must not do."""

import pytest
import torch

from trapetum import additive_fit
from trapetum.additive_fit import AdditiveFitError, _Problem, fit
from trapetum.quantizers import quantize, weight_error

gpu = pytest.mark.gpu


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(inputs, groups=1, seed=1, tokens=96):
    """What `tokens` correlated inputs give, one for each group of rows."""
    x = normal(groups, tokens, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1) / inputs**0.5
    return x.mT @ x / tokens


def objective(weight, restored, hessian):
    """f with the ridge that `fit` adds, over f of zeros, in float64."""
    weight, restored, hessian = weight.double(), restored.double(), hessian.double()
    f, zero = 0.0, 0.0
    for row in range(len(weight)):
        h = hessian[row * len(hessian) // len(weight)]
        mean = h.diagonal().mean()
        h = h / mean + additive_fit.RIDGE * torch.eye(len(h), dtype=torch.float64)
        error = restored[row] - weight[row]
        f, zero = f + error @ h @ error, zero + weight[row] @ h @ weight[row]
    return float(f / zero)


def random_problem(out=24, inputs=32, n_codebooks=2, groups=2, seed=0):
    codes = torch.randint(256, (out, inputs // 8, n_codebooks), generator=torch.Generator().manual_seed(seed))
    hessian = additive_fit._prepared(hessian_of(inputs, groups), "cpu") if groups else None
    books, scales = normal(n_codebooks, 256, 8, seed=seed), normal(out, seed=seed).abs() + 0.5
    return _Problem(normal(out, inputs, seed=seed + 1), hessian, codes.to(torch.uint8), books, scales)


# --- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_codebooks", [2, 4])
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_no_step_raises_the_objective(n_codebooks, groups):
    weight = normal(190, 64)
    hessian = hessian_of(64, groups) if groups else None
    found = fit(weight, n_codebooks, hessian, iterations=3)
    assert len(found.objective) == 1 + 3 * 3
    for before, after in zip(found.objective, found.objective[1:], strict=False):
        assert after <= before * (1 + 1e-5) + 1e-9
    assert found.objective[-1] < 0.8 * found.objective[0]
    hessian = torch.eye(64).unsqueeze(0) * 1.0 if hessian is None else hessian
    assert found.stored == pytest.approx(
        objective(weight, found.weight.dequantize(torch.float64), hessian), rel=1e-3
    )
    assert found.stored < found.objective[-1] * 1.01


@pytest.mark.parametrize("bits", [2, 4])
def test_statistics_buy_output_error(bits):
    weight, hessian = normal(256, 64), hessian_of(64)
    plain, guided = fit(weight, bits).weight, fit(weight, bits, hessian).weight
    f = [objective(weight, w.dequantize(), hessian) for w in (plain, guided)]
    assert f[1] < 0.7 * f[0]


def test_two_bits_lose_less_than_exact_kmeans_of_two_bits():
    weight = normal(256, 256)
    found = fit(weight, 2, iterations=2).weight
    lost = float((found.dequantize() - weight).square().sum() / weight.square().sum())
    assert lost < 0.9 * weight_error(weight, quantize(weight, 2, "kmeans"))


def test_few_distinct_groups_are_stored_as_they_are():
    few = normal(200, 8)
    weight = few[torch.randint(200, (64 * 10,), generator=torch.Generator().manual_seed(3))].view(64, 80)
    weight /= (
        weight.square().mean(1, keepdim=True).sqrt()
    )  # scales of 1, so that no row divides another's groups
    found = fit(weight, 4, iterations=3)
    lost = float((found.weight.dequantize() - weight).square().sum() / weight.square().sum())
    assert lost < 1e-3  # four codebooks of Gaussian weights lose about 5e-3


def test_the_same_seed_gives_the_same_codes():
    weight, hessian = normal(160, 32), hessian_of(32)
    one, two, other = (fit(weight, 2, hessian, iterations=1, seed=s).weight for s in (5, 5, 6))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.codebooks, two.codebooks)
    assert not torch.equal(one.codes, other.codes)


def test_parts_of_few_rows_give_the_same_objective(monkeypatch):
    weight, hessian = normal(170, 32), hessian_of(32, 2)
    whole = fit(weight, 2, hessian, iterations=1)
    monkeypatch.setattr(additive_fit, "_CHUNK_WEIGHTS", 37 * 32)
    monkeypatch.setitem(additive_fit._CHUNK_SCORES, "cpu", 10 * 8 * 256)
    monkeypatch.setattr(additive_fit, "_CHUNK_GROUPS", 101)
    split = fit(weight, 2, hessian, iterations=1)
    assert split.objective == pytest.approx(whole.objective, rel=1e-2)
    assert split.objective[0] == pytest.approx(whole.objective[0], rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (2, 24)])
def test_tiny_weights(shape):
    weight = normal(*shape)
    found = fit(weight, 2, hessian_of(shape[1]), iterations=2)
    assert found.weight.dequantize().shape == shape
    assert found.stored < 1e-4  # more entries than groups


def test_rows_of_zeros_stay_zero():
    weight = normal(16, 32)
    weight[[0, 9]] = 0
    found = fit(weight, 2, hessian_of(32), iterations=2).weight
    assert bool((found.dequantize()[[0, 9]] == 0).all())
    assert bool((fit(torch.zeros(4, 16), 2).weight.dequantize() == 0).all())


def test_an_input_that_is_never_on_does_no_harm():
    hessian = hessian_of(32)
    hessian[:, 5] = hessian[:, :, 5] = 0
    found = fit(normal(160, 32), 2, hessian, iterations=2)
    assert found.weight.dequantize().isfinite().all() and found.objective[-1] < found.objective[0]
    assert fit(normal(160, 32), 2, torch.zeros(2, 32, 32), iterations=1).stored < 0.1


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_small_and_large_weights_keep_their_precision(factor):
    weight = normal(160, 32)
    as_is, scaled = fit(weight, 2, iterations=2), fit(weight * factor, 2, iterations=2)
    assert scaled.stored == pytest.approx(as_is.stored, rel=0.05)


# --- the steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "groups"), [(24, 1), (5, 2), (7, 3), (3, 3)])
def test_parts_give_each_row_the_hessian_of_its_group(out, groups):
    problem = random_problem(out, 16, groups=groups)
    owner = {}
    for part in problem.parts():
        for row in range(out)[part.rows]:
            owner[row] = next(g for g in range(groups) if part.h is problem.hessian[g] or
                              torch.equal(part.h, problem.hessian[g]))  # fmt: skip
    assert owner == {row: row * groups // out for row in range(out)}


def test_codebooks_end_where_the_gradient_is_nothing(monkeypatch):
    monkeypatch.setattr(additive_fit, "_CG_STEPS", 200)
    problem = random_problem()

    def gradient():
        books = problem.books.double().requires_grad_()
        dense = sum(books[c][problem.codes[..., c].long()] for c in range(2)).flatten(1)
        error = dense * problem.scales.double().unsqueeze(1) - problem.weight.double()
        f = sum(
            e @ problem.hessian[r * len(problem.hessian) // len(error)].double() @ e
            for r, e in enumerate(error)
        )
        f.backward()
        return float(f.detach()) / problem._zero, float(books.grad.norm())

    f_before, before = gradient()
    assert problem.objective() == pytest.approx(f_before, rel=1e-5)
    additive_fit._fit_codebooks(problem)
    f_after, after = gradient()
    assert f_after < 0.1 * f_before and after < 1e-3 * before


def test_scales_are_least_squares():
    problem = random_problem(groups=1)
    problem.weight = problem.sums(slice(None)) * 3 + problem.weight
    additive_fit._fit_scales(problem)
    best = problem.objective()
    for factor in (0.99, 1.01):
        for row in (0, 11):
            kept = problem.scales[row].clone()
            problem.scales[row] = kept * factor
            assert problem.objective() > best
            problem.scales[row] = kept


def test_a_full_beam_over_two_codebooks_is_exhaustive():
    books, pull = normal(2, 256, 8), normal(5, 8, seed=2)
    metric = hessian_of(8)[0] + torch.eye(8)
    old = torch.zeros(5, 2, dtype=torch.long)
    found = additive_fit._beam_search(pull, metric, books, old, 256)
    sums = (books[0][:, None] + books[1][None]).view(-1, 8).double()
    values = ((sums @ metric.double()) * sums).sum(1) + 2 * pull.double() @ sums.T
    assert torch.equal(found[:, 0] * 256 + found[:, 1], values.argmin(1))


@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_a_wider_beam_is_never_worse_than_the_old_codes(n_codebooks):
    books, pull = normal(n_codebooks, 256, 8), 3 * normal(64, 8, seed=2)
    metric = torch.eye(8)
    old = torch.randint(256, (64, n_codebooks), generator=torch.Generator().manual_seed(4))

    def value(codes):
        v = sum(books[c][codes[:, c]] for c in range(n_codebooks)).double()
        return (v * v + 2 * v * pull).sum(1)

    last = value(old)
    narrow, wide = (value(additive_fit._beam_search(pull, metric, books, old, beam)) for beam in (1, 16))
    assert bool((narrow <= last + 1e-4).all()) and bool((wide <= last + 1e-4).all())
    assert wide.mean() < narrow.mean() < last.mean()
    again = additive_fit._searched(pull, metric, books, old, 16)
    assert torch.allclose(value(again), wide, atol=1e-4)


@pytest.mark.parametrize(("width", "count"), [(256, 1), (256, 8), (2048, 8), (256, 40), (512, 32)])
def test_the_least_scores_are_found_among_runs(width, count):
    scores = normal(9, width)
    found = additive_fit._least(scores, count)
    assert torch.equal(scores.gather(1, found), scores.sort(1).values[:, :count])


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 12), r"up_proj has 12 inputs; additive codebooks store groups of 8"),
        (torch.zeros(4), r"up_proj is torch.float32 \[4\]"),
        (torch.zeros(0, 8), r"up_proj is torch.float32 \[0, 8\]"),
        (torch.zeros(4, 8, dtype=torch.int32), "up_proj is torch.int32"),
        (torch.full((2, 8), torch.nan), "16 NaN or infinite values among 16"),
        (torch.full((2, 8), 1e6), r"up_proj reaches 1e\+06, beyond the 65504"),
    ],
)
def test_weights_that_cannot_be_fitted(weight, message):
    with pytest.raises(AdditiveFitError, match=message):
        fit(weight, 2, name="up_proj")


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(8), r"is \[8, 8\]; 4 x 8 weights need \[1 to 4, 8, 8\]"),
        (torch.eye(16)[None], r"is \[1, 16, 16\]"),
        (torch.eye(8).expand(5, 8, 8), r"is \[5, 8, 8\]"),
        (torch.full((1, 8, 8), torch.inf), "NaN or infinite"),
        (-torch.eye(8)[None], "negative one on its diagonal"),
    ],
)
def test_hessians_that_cannot_be(hessian, message):
    with pytest.raises(AdditiveFitError, match=message):
        fit(normal(4, 8), 2, hessian)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_codebooks": 3}, "not of 3"),
        ({"iterations": -1}, "iterations is -1"),
        ({"beam": 0}, "beam 0"),
        ({"beam": 257}, "beam 257"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(AdditiveFitError, match=message):
        fit(normal(4, 8), **arguments)


def test_an_indefinite_metric_is_noticed():
    crooked = torch.ones(1, 16, 16)
    crooked[0, :8, 8:] = crooked[0, 8:, :8] = -40
    with pytest.raises(ArithmeticError, match="raised the objective"):
        fit(normal(400, 16), 2, crooked, iterations=6)


# --- on a GPU ------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_cuda_fits_as_well_as_the_cpu_and_repeats_itself(n_codebooks):
    weight, hessian = normal(256, 320), hessian_of(320, 2, tokens=640)
    here = fit(weight, n_codebooks, hessian, iterations=2)
    there = [fit(weight.cuda(), n_codebooks, hessian.cuda(), iterations=2) for _ in range(2)]
    assert torch.equal(there[0].weight.codes, there[1].weight.codes)
    assert torch.equal(there[0].weight.codebooks, there[1].weight.codebooks)
    assert there[0].stored == pytest.approx(here.stored, rel=0.03)
    restored = there[0].weight.dequantize(torch.float64).cpu()
    assert there[0].stored == pytest.approx(objective(weight, restored, hessian), rel=1e-3)


@gpu
def test_cuda_fits_a_layer_of_a_large_model():
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator, device="cuda").half()
    x = torch.randn(8192, 4096, generator=generator, device="cuda")
    found = fit(weight, 2, (x.T @ x / len(x)).unsqueeze(0), iterations=1)
    assert found.stored < 0.1  # exact k-means of 2 bits loses 0.117 of Gaussian weights
    assert torch.cuda.max_memory_allocated() < 8e9
