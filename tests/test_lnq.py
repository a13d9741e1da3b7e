"""LNQ: its error falls, is the one it says, and is lower than that of codebooks that do not know the Hessian."""

import itertools
import math

import pytest
import torch

from trapetum import lnq as module
from trapetum.kmeans import kmeans_1d, nearest
from trapetum.lnq import CYCLES, ITERATIONS, NotMonotone, lnq
from trapetum.quadratic import RIDGE, form, full_precision, row_groups

SHAPES = [(1, 1, 2), (7, 1, 3), (1, 3, 2), (7, 3, 4), (7, 129, 16), (1, 129, 5), (7, 300, 16), (3, 300, 9)]


def correlated(inputs, groups=1, tokens=None):
    """Hessians of inputs that share components, as the inputs of a language model's layers do."""
    tokens = tokens or 4 * inputs + 50
    x = torch.randn(tokens, inputs) @ (torch.randn(inputs, inputs) * torch.logspace(0, -1.5, inputs))
    x += 2 * torch.randn(tokens, 1)
    share = torch.rand(groups, tokens, 1) * 3
    return torch.stack([x.T @ (s * x) / tokens for s in share])


def heavy_tailed(rows, inputs):
    return torch.distributions.StudentT(4.0).sample((rows, inputs)) * 0.02


def output_error(weight, codebook, codes, hessian, ridge=RIDGE):
    """sum over rows of (w' - w)^T (H + ridge * mean(diag H) I) (w' - w), in float64, written out."""
    total = 0.0
    for g, rows in row_groups(len(weight), len(hessian)):
        h = hessian[g].double()
        h = h + ridge * h.diagonal().mean() * torch.eye(len(h))
        residual = codebook[rows].double().gather(1, codes[rows].long()) - weight[rows].double()
        total += float(torch.einsum("ri,ij,rj->", residual, h, residual))
    return total


def check_fitted(weight, n_codes, hessian, fitted, iterations=ITERATIONS):
    """Shapes, order, float16 values, the promised error, and its fall."""
    assert fitted.codebook.shape == (len(weight), n_codes) and fitted.codes.shape == weight.shape
    assert fitted.codes.dtype == torch.uint8 and int(fitted.codes.max()) < n_codes
    assert bool((fitted.codebook.diff(dim=1) >= 0).all())
    assert torch.equal(fitted.codebook, fitted.codebook.half().float())
    log = fitted.objective
    assert len(log) == 1 + 2 * iterations
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(log))
    mine = output_error(weight, fitted.codebook, fitted.codes, hessian)
    assert log[-1] == pytest.approx(mine, rel=1e-4, abs=1e-12)


# --- what it promises ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows,inputs,n_codes", SHAPES)
@pytest.mark.parametrize("restart", [False, True])
def test_odd_shapes(rows, inputs, n_codes, restart):
    weight, hessian = heavy_tailed(rows, inputs), correlated(inputs)
    check_fitted(weight, n_codes, hessian, lnq(weight, n_codes, hessian, restart=restart))


@pytest.mark.parametrize("n_codes", [2, 3, 4, 7, 8, 12, 16, 256])
def test_numbers_of_codes(n_codes):
    weight, hessian = heavy_tailed(4, 200), correlated(200)
    check_fitted(weight, n_codes, hessian, lnq(weight, n_codes, hessian))


def test_it_starts_at_weighted_kmeans():
    weight, hessian = heavy_tailed(5, 150), correlated(150)
    diagonal = hessian[0].diagonal()
    codebook = kmeans_1d(weight, 8, diagonal + RIDGE * diagonal.mean())[0].half().float()
    expected = output_error(weight, codebook, nearest(weight, codebook), hessian)
    assert lnq(weight, 8, hessian, iterations=1).objective[0] == pytest.approx(expected, rel=1e-4)
    none = lnq(weight, 8, hessian, iterations=0)
    assert len(none.objective) == 1 and torch.equal(none.codebook, codebook)


@pytest.mark.parametrize("n_codes", [4, 8, 16])
def test_it_leaves_less_than_half_of_the_error_of_kmeans_on_correlated_inputs(n_codes):
    weight, hessian = heavy_tailed(24, 256), correlated(256)
    fitted = lnq(weight, n_codes, hessian)
    weighted = fitted.objective[0]
    plain = kmeans_1d(weight, n_codes)[0]
    plain = output_error(weight, plain, nearest(weight, plain), hessian)
    assert fitted.objective[-1] < 0.5 * weighted and fitted.objective[-1] < 0.5 * plain
    assert fitted.objective[1] < weighted  # the first codebook step alone
    assert fitted.objective[-1] < 0.97 * lnq(weight, n_codes, hessian, restart=False).objective[-1]


def test_independent_inputs_leave_nothing_to_gain():
    weight, hessian = heavy_tailed(6, 200), torch.diag(torch.rand(200) + 0.1)[None]
    log = lnq(weight, 8, hessian).objective
    assert log[0] * 0.999 < log[-1] <= log[0]


def test_the_codebook_step_finds_the_least_squares_codebook():
    weight, hessian = heavy_tailed(5, 120) * 50, form(correlated(120)[0]).hessian
    codebook = kmeans_1d(weight, 6)[0]
    codes = nearest(weight, codebook)
    gradient = (codebook.gather(1, codes.long()) - weight) @ hessian
    matrix, side = module._system((hessian,), codes, gradient, 6)
    found = codebook + module._solve(matrix, side)
    root = torch.linalg.cholesky(hessian.double())
    for r in range(5):
        one_hot = torch.nn.functional.one_hot(codes[r].long(), 6).double()
        best = torch.linalg.lstsq(root.T @ one_hot, root.T @ weight[r].double().unsqueeze(1)).solution[:, 0]
        torch.testing.assert_close(found[r], best, rtol=1e-3, atol=1e-3)


def test_the_codebook_step_keeps_codes_that_no_weight_has_and_what_cannot_be_solved():
    weight, hessian = heavy_tailed(2, 40), form(correlated(40)[0]).hessian
    codebook = torch.tensor([-9.0, -0.01, 0.02, 0.5]).repeat(2, 1)
    codes = nearest(weight.clamp(-0.02, 0.02), codebook)
    gradient = (codebook.gather(1, codes.long()) - weight) @ hessian
    found, renamed = module._refit((hessian,), codebook, codes, gradient)
    assert found[:, 0].tolist() == [-9, -9] and found[:, 3].tolist() == [0.5, 0.5]
    assert not torch.equal(found[:, 1], codebook[:, 1]) and torch.equal(renamed, codes)
    kept, _ = module._refit((hessian,), codebook, codes, gradient * torch.nan)
    assert torch.equal(kept, codebook)
    kept, _ = module._refit((-hessian,), codebook, codes, gradient)
    assert torch.equal(kept, codebook)


def test_values_that_change_places_are_renamed():
    codebook, codes = torch.tensor([[3.0, 1.0, 2.0, 2.0]]), torch.tensor([[0, 1, 2, 3, 0]], dtype=torch.uint8)
    rising, renamed = module._sorted(codebook, codes)
    assert rising.tolist() == [[1, 2, 2, 3]] and renamed.tolist() == [[3, 0, 1, 2, 3]]


def test_two_codes_and_four_weights():
    optimal = 0
    for seed in range(20):
        torch.manual_seed(seed)
        weight, hessian = torch.randn(1, 4), correlated(4)
        fitted = lnq(weight, 2, hessian, iterations=6)
        check_fitted(weight, 2, hessian, fitted, iterations=6)
        errors = [least_error(weight, codes, hessian) for codes in itertools.product((0, 1), repeat=4)]
        assert fitted.objective[-1] >= min(errors) * (1 - 1e-4)
        optimal += fitted.objective[-1] <= min(errors) * 1.01 + 1e-9
    assert optimal >= 12, "of 20 problems most end within 1 % of the best of all codebooks and codes"


def least_error(weight, codes, hessian):
    """Of the best codebook for given codes."""
    h = form(hessian[0])
    root = torch.linalg.cholesky(h.hessian.double())
    one_hot = torch.nn.functional.one_hot(torch.tensor(codes), 2).double()
    wanted = root.T @ weight[0].double().unsqueeze(1)
    best = torch.linalg.lstsq(root.T @ one_hot, wanted, driver="gelsd").solution
    return float((root.T @ one_hot @ best - wanted).square().sum()) * h.scale


# --- rows, inputs and Hessians that are hard ------------------------------------------------------------------------


def test_rows_of_zeros_of_one_value_and_of_few_values():
    weight = torch.stack([torch.zeros(70), torch.full((70,), 0.25), torch.randint(-3, 4, (70,)) / 8])
    weight = torch.cat([weight, heavy_tailed(1, 70)])
    fitted = lnq(weight, 8, correlated(70))
    back = fitted.codebook.gather(1, fitted.codes.long())
    assert torch.equal(back[:3], weight[:3])
    assert torch.equal(lnq(torch.zeros(2, 5), 4, correlated(5)).codebook, torch.zeros(2, 4))
    assert lnq(torch.full((2, 9), 0.1), 4, correlated(9)).objective[-1] < 1e-5


def test_inputs_that_were_never_seen_take_the_nearest_code():
    hessian = correlated(60)
    hessian[:, 20:30], hessian[:, :, 20:30] = 0, 0
    weight = heavy_tailed(4, 60)
    fitted = lnq(weight, 16, hessian)
    check_fitted(weight, 16, hessian, fitted)
    distance = (weight[:, 20:30, None] - fitted.codebook[:, None]).abs()
    mine = distance.gather(2, fitted.codes[:, 20:30, None].long())[..., 0]
    torch.testing.assert_close(mine, distance.amin(2), rtol=1e-3, atol=1e-6)


def test_a_hessian_of_zeros_is_plain_kmeans():
    weight = heavy_tailed(3, 50)
    fitted = lnq(weight, 4, torch.zeros(1, 50, 50))
    codebook = kmeans_1d(weight, 4)[0].half().float()
    assert fitted.objective == [0.0] * 7
    torch.testing.assert_close(fitted.codebook, codebook, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**80])
def test_the_size_of_a_hessian_changes_nothing(factor):
    weight, hessian = heavy_tailed(3, 90), correlated(90)
    small, large = lnq(weight, 8, hessian), lnq(weight, 8, hessian * factor)
    assert torch.equal(small.codes, large.codes) and torch.equal(small.codebook, large.codebook)
    assert large.objective == pytest.approx([value * factor for value in small.objective], rel=1e-5)


def test_a_lopsided_hessian_counts_as_its_symmetric_half():
    weight, hessian = heavy_tailed(3, 30), correlated(30)
    lopsided = (
        hessian + torch.triu(torch.full((30, 30), 0.25), 1) - torch.tril(torch.full((30, 30), 0.25), -1)
    )
    assert torch.equal(lnq(weight, 4, hessian).codes, lnq(weight, 4, lopsided).codes)


@pytest.mark.parametrize("rows,groups", [(7, 2), (7, 7), (5, 8), (12, 4)])
def test_groups_are_fitted_with_their_own_hessian(rows, groups):
    weight, hessian = heavy_tailed(rows, 80), correlated(80, groups)
    whole = lnq(weight, 8, hessian)
    check_fitted(weight, 8, hessian, whole)
    for g, part in row_groups(rows, groups):
        alone = lnq(weight[part], 8, hessian[g : g + 1])
        assert torch.equal(alone.codes, whole.codes[part])
        assert torch.equal(alone.codebook, whole.codebook[part])


@pytest.mark.parametrize(
    "hessian,words",
    [
        (torch.eye(3), r"is \[3, 3\]; give \[groups, 4, 4\]"),
        (torch.eye(3)[None], r"is \[1, 3, 3\]"),
        (torch.zeros(0, 4, 4), r"is \[0, 4, 4\]"),
        (torch.full((1, 4, 4), math.inf), "holds 16 NaN or infinite values"),
        (-torch.eye(4)[None], "has -1 on its diagonal"),
        (torch.full((1, 4, 4), 2.0) - torch.eye(4), "not positive definite"),
    ],
)
def test_refusals(hessian, words):
    with pytest.raises(ValueError, match=words) as refused:
        lnq(torch.randn(2, 4), 4, hessian)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


# --- how it is computed --------------------------------------------------------------------------------------------


def test_the_same_twice_and_in_chunks(monkeypatch):
    weight, hessian = heavy_tailed(9, 140), correlated(140)
    first, second = lnq(weight, 16, hessian), lnq(weight, 16, hessian)
    assert torch.equal(first.codes, second.codes) and first.objective == second.objective
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 2 * 16 * 140})
    chunked = lnq(weight, 16, hessian)
    assert chunked.objective == pytest.approx(first.objective, rel=1e-2)
    check_fitted(weight, 16, hessian, chunked)


def test_threads_change_nothing_and_are_given_back():
    weight, hessian, before, found = heavy_tailed(40, 200), correlated(200), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(lnq(weight, 8, hessian))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and found[0].objective == found[1].objective


def test_torch_alone_gives_the_same_quality(monkeypatch):
    weight, hessian = heavy_tailed(6, 150), correlated(150)
    with_c = lnq(weight, 8, hessian)
    monkeypatch.setattr("trapetum.descent._library", lambda: (None, "no C compiler was found."))
    without = lnq(weight, 8, hessian)
    check_fitted(weight, 8, hessian, without)
    assert without.objective == pytest.approx(with_c.objective, rel=1e-2)


def test_a_bad_second_start_is_dropped(monkeypatch):
    weight, hessian = heavy_tailed(4, 60), correlated(60)
    one_start = lnq(weight, 8, hessian, restart=False)
    monkeypatch.setattr(
        module, "feed_back", lambda weight, book, of: torch.zeros_like(weight, dtype=torch.uint8)
    )
    monkeypatch.setattr(module._State, "descend", only_first(module._State.descend, of_each=2))
    assert lnq(weight, 8, hessian).objective == one_start.objective


def only_first(function, of_each):
    """`function` for the first of each so many calls; the others do nothing."""
    calls = itertools.count()
    return lambda *arguments: function(*arguments) if next(calls) % of_each == 0 else None


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch):
    def worse(hessian, codebook, codes, gradient, cycles):
        codes.random_(0, codebook.shape[1])

    def errors(state):
        return (state.residual() @ state.hessian * state.residual()).double().sum(1)

    weight, hessian = heavy_tailed(4, 60), correlated(60)
    monkeypatch.setattr(module, "descend", worse)
    monkeypatch.setattr(module._State, "errors", errors)
    with pytest.raises(NotMonotone, match="the error rose from .* in step 2"):
        lnq(weight, 8, hessian)


def test_precision_is_given_back():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError), full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_three_bfloat16_products_are_as_good_as_one_in_float32():
    hessian = form(correlated(1000)[0].cuda()).hessian
    codes = torch.randint(16, (1000,), device="cuda")
    one_hot = torch.nn.functional.one_hot(codes, 16).T.contiguous()
    exact = one_hot.double() @ hessian.double()
    with full_precision():
        parts = module._split(hessian)
        found = module._times(one_hot.to(parts[0].dtype), parts)
        plain = module._times(one_hot.float(), (hessian,))
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("rows,inputs,n_codes", [*SHAPES, (40, 700, 16), (20, 520, 256)])
def test_gpu_ends_as_low_as_the_cpu(rows, inputs, n_codes):
    weight, hessian = heavy_tailed(rows, inputs), correlated(inputs)
    here, there = lnq(weight, n_codes, hessian), lnq(weight.cuda(), n_codes, hessian.cuda())
    assert there.codes.is_cuda and there.codebook.is_cuda
    on_cpu = module.Fitted(there.codebook.cpu(), there.codes.cpu(), there.objective)
    check_fitted(weight, n_codes, hessian, on_cpu)
    slack = 0.02 if rows * inputs > 2000 else 0.2  # few weights: another start of k-means may end elsewhere
    assert there.objective[-1] <= here.objective[-1] * (1 + slack) + 1e-12
    again = lnq(weight.cuda(), n_codes, hessian.cuda())
    assert torch.equal(again.codes, there.codes) and again.objective == there.objective


@pytest.mark.gpu
@pytest.mark.parametrize("rows,inputs,groups", [(4096, 4096, 1), (11008, 4096, 4), (4096, 11008, 1)])
def test_a_layer_of_a_7b_model(rows, inputs, groups):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2 * inputs, inputs, device="cuda", generator=generator)
    x *= torch.logspace(0, -1, inputs, device="cuda")
    x += torch.randn(2 * inputs, 1, device="cuda", generator=generator)
    hessian = (x.T @ x / len(x)).expand(groups, -1, -1)
    weight = 0.02 * torch.randn(rows, inputs, device="cuda", generator=generator)
    fitted = lnq(weight, 16, hessian)
    assert len(fitted.objective) == 1 + 2 * ITERATIONS and CYCLES == 4
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(fitted.objective))
    assert fitted.objective[-1] < 0.9 * fitted.objective[0]
    assert fitted.codes.shape == weight.shape and int(fitted.codes.max()) < 16
