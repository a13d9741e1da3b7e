"""Error feedback: its codes against a solution written out, its error against the nearest codes."""

import math

import pytest
import torch

from trapetum.gptq import feed_back, feedback, gptq, weighted_codebook
from trapetum.kmeans import kmeans_1d, nearest
from trapetum.quadratic import form, row_groups

SHAPES = [(1, 1, 2), (7, 1, 3), (1, 3, 2), (7, 3, 4), (7, 129, 16), (3, 300, 9), (2, 140, 256)]


def correlated(inputs, groups=1):
    tokens = 4 * inputs + 50
    x = torch.randn(tokens, inputs) @ (torch.randn(inputs, inputs) * torch.logspace(0, -1, inputs))
    x += torch.randn(tokens, 1)
    share = torch.rand(groups, tokens, 1) * 3
    return torch.stack([x.T @ (s * x) / tokens for s in share])


def heavy_tailed(rows, inputs):
    return torch.distributions.StudentT(4.0).sample((rows, inputs)) * 0.02


def output_error(weight, codebook, codes, hessian):
    residual = (codebook.gather(1, codes.long()) - weight).double()
    return float(((residual @ hessian.double()) * residual).sum())


def written_out(weight, codebook, hessian):
    """Round in the order of falling H_jj; after each the rest of the row is the exact minimum given the rounded ones."""
    hessian, order = hessian.double(), hessian.diagonal().argsort(descending=True, stable=True)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    residual = torch.zeros_like(
        weight, dtype=torch.float64
    )  # of the rounded weights, and what is wanted of the others
    for n, j in enumerate(order.tolist()):
        wanted = weight[:, j].double() + residual[:, j]
        codes[:, j] = nearest(wanted.unsqueeze(1), codebook)[:, 0]
        residual[:, j] = codebook.double().gather(1, codes[:, j : j + 1].long())[:, 0] - weight[:, j]
        done, rest = order[: n + 1], order[n + 1 :]
        if len(rest):
            pull = hessian[rest][:, done] @ residual[:, done].T
            residual[:, rest] = -torch.linalg.solve(hessian[rest][:, rest], pull).T
    return codes


@pytest.mark.parametrize("rows,inputs,n_codes", [(1, 1, 2), (4, 3, 2), (6, 60, 4), (6, 150, 16), (3, 300, 9)])
def test_codes_are_those_of_the_solution_written_out(rows, inputs, n_codes):
    weight, hessian = heavy_tailed(rows, inputs), form(correlated(inputs)[0]).hessian
    codebook = weighted_codebook(weight, n_codes, hessian)
    found, expected = feed_back(weight, codebook, feedback(hessian)), written_out(weight, codebook, hessian)
    assert bool((found == expected).all(1).sum() >= rows - 1), (
        "all rows but one where a target lies on a middle"
    )


def test_feedback_is_the_best_answer_to_a_step():
    hessian = form(correlated(20)[0]).hessian.double()
    order, matrix = feedback(hessian.float())
    sorted_hessian = hessian[order][:, order]
    for j in (0, 7, 18):
        behind = sorted_hessian[j + 1 :, j + 1 :]
        best = -torch.linalg.solve(behind, sorted_hessian[j + 1 :, j])
        torch.testing.assert_close(matrix[j, j + 1 :].double(), best, rtol=1e-4, atol=1e-5)
    assert bool((sorted_hessian.diagonal().diff() <= 0).all())


def test_independent_inputs_give_the_nearest_codes():
    weight, hessian = heavy_tailed(5, 140), torch.diag(torch.rand(140) + 0.1)
    codebook, codes = gptq(weight, 8, hessian[None])
    assert torch.equal(codes, nearest(weight, codebook))


@pytest.mark.parametrize("rows,inputs,n_codes", SHAPES)
def test_odd_shapes(rows, inputs, n_codes):
    weight, hessian = heavy_tailed(rows, inputs), correlated(inputs)
    codebook, codes = gptq(weight, n_codes, hessian)
    assert codebook.shape == (rows, n_codes) and bool((codebook.diff(dim=1) >= 0).all())
    assert torch.equal(codebook, codebook.half().float())
    assert codes.shape == weight.shape and codes.dtype == torch.uint8 and int(codes.max()) < n_codes


@pytest.mark.parametrize("n_codes", [4, 8, 16])
def test_it_leaves_less_of_the_output_error_than_kmeans(n_codes):
    weight, hessian = heavy_tailed(24, 256), correlated(256)
    codebook, codes = gptq(weight, n_codes, hessian)
    mine = output_error(weight, codebook, codes, hessian[0])
    for weights in (None, hessian[0].diagonal()):
        plain = kmeans_1d(weight, n_codes, weights)[0]
        assert mine < 0.75 * output_error(weight, plain, nearest(weight, plain), hessian[0])


@pytest.mark.parametrize("rows,groups", [(7, 2), (5, 8), (12, 4)])
def test_groups_have_their_own_hessian(rows, groups):
    weight, hessian = heavy_tailed(rows, 80), correlated(80, groups)
    codebook, codes = gptq(weight, 8, hessian)
    for g, part in row_groups(rows, groups):
        alone = gptq(weight[part], 8, hessian[g : g + 1])
        assert torch.equal(alone[0], codebook[part]) and torch.equal(alone[1], codes[part])


def test_rows_of_zeros_and_inputs_never_seen():
    weight, hessian = heavy_tailed(3, 50), correlated(50)
    weight[0] = 0
    hessian[:, 10:15], hessian[:, :, 10:15] = 0, 0
    codebook, codes = gptq(weight, 8, hessian)
    assert torch.equal(codebook[0], torch.zeros(8))
    assert torch.equal(codes[:, 10:15], nearest(weight, codebook)[:, 10:15])


@pytest.mark.parametrize(
    "hessian,words",
    [
        (torch.eye(3)[None], r"is \[1, 3, 3\]; give \[groups, 2, 2\]"),
        (torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), "not positive definite with its ridge"),
        (torch.full((1, 2, 2), math.nan), "holds 4 NaN or infinite values"),
    ],
)
def test_refusals(hessian, words):
    with pytest.raises(ValueError, match=words) as refused:
        gptq(torch.randn(2, 2), 2, hessian)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


@pytest.mark.gpu
@pytest.mark.parametrize("rows,inputs,n_codes", [*SHAPES, (50, 1000, 16)])
def test_gpu_gives_the_codes_of_the_cpu(rows, inputs, n_codes):
    weight, hessian = heavy_tailed(rows, inputs), form(correlated(inputs)[0]).hessian
    codebook = weighted_codebook(weight, n_codes, hessian)
    here = feed_back(weight, codebook, feedback(hessian))
    there = feed_back(weight.cuda(), codebook.cuda(), feedback(hessian.cuda()))
    errors = [output_error(weight, codebook, codes.cpu(), hessian) for codes in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert (here == there.cpu()).all(
        1
    ).float().mean() >= 0.8  # a target on the middle of two codes moves all behind it
