"""Codes by error feedback: each weight is rounded in turn, and the weights behind it make up for its error.

With the first weights of a row fixed, the best continuous values of the others are known in closed form; a Cholesky factor
of the inverse Hessian holds all these solutions. Here the grid is a codebook a row, from k-means with weights diag(H), and
inputs with the largest mean square come first.

Sources: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
arXiv:2210.17323; Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, arXiv:2208.11580.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trapetum.descent import BLOCK, sweep
from trapetum.kmeans import kmeans_1d
from trapetum.quadratic import RIDGE, fitting_threads, form, full_precision, require_hessian, row_groups


class Feedback(NamedTuple):
    """What rounding one input's weight asks of the weights behind it.

    Attributes:
        order: int64 [in], the inputs in the order of rounding, largest mean square first.
        matrix: float32 [in, in] in that order: a step d of weight j moves weight i > j by d * matrix[j, i].
    """

    order: Tensor
    matrix: Tensor


def feedback(hessian: Tensor) -> Feedback:
    """The feedback of a Hessian.

    The inverse Hessian is U^T U with U upper triangular, and row j of U divided by U_jj is what is wanted. U is the
    inverse of V with H = V V^T: the Cholesky factor of H from its last row and column upwards.

    Args:
        hessian: float32 [in, in], symmetric.

    Raises:
        ValueError: it is not positive definite.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, failed = torch.linalg.cholesky_ex(hessian[order][:, order].double().flip(0, 1))
    if int(failed):
        raise ValueError(
            f"a Hessian of {len(hessian)} inputs is not positive definite with its ridge; check the calibration, or "
            "raise the ridge."
        )
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    inverse = torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
    return Feedback(order, (inverse / inverse.diagonal().unsqueeze(1)).float().contiguous())


def feed_back(weight: Tensor, codebook: Tensor, of: Feedback) -> Tensor:
    """Codes of all weights of some rows by error feedback, for codebooks that are given.

    Args:
        weight: float32 [rows, in].
        codebook: float32 [rows, n_codes], rising.
        of: the feedback of the rows' Hessian.

    Returns:
        uint8 [rows, in].
    """
    target = weight.index_select(1, of.order)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, weight.shape[1], BLOCK):
        columns, behind = slice(first, first + BLOCK), slice(first + BLOCK, None)
        step = sweep(target[:, columns], of.matrix[columns, columns], codebook, codes[:, columns], None)
        target[:, behind].addmm_(step, of.matrix[columns, behind])
    return torch.empty_like(codes).index_copy_(1, of.order, codes)


def weighted_codebook(weight: Tensor, n_codes: int, hessian: Tensor) -> Tensor:
    """Exact k-means of each row with weights diag(H), in float16 values: float32 [rows, n_codes], rising.

    Args:
        weight: float32 [rows, in].
        hessian: float32 [in, in].
    """
    return kmeans_1d(weight, n_codes, hessian.diagonal())[0].half().float()


@torch.no_grad()
def gptq(weight: Tensor, n_codes: int, hessian: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weighted k-means codebooks and codes by error feedback.

    Args:
        weight: floating [rows, in], finite, on CPU or CUDA.
        n_codes: entries of each row's codebook, 2 to 256.
        hessian: floating [groups, in, in], as `trapetum.calibration.Statistics` has it.
        ridge: added to the diagonal, as a share of its mean.

    Returns:
        codebook float32 [rows, n_codes], rising, every value one of float16; codes uint8 [rows, in].

    Raises:
        ValueError: a Hessian of a wrong shape, with NaN or infinity, or not positive definite with its ridge.
    """
    weight = weight.detach().float()
    require_hessian(hessian, weight.shape[1])
    books, codes = [], []
    with full_precision(), fitting_threads(weight):
        for g, rows in row_groups(len(weight), len(hessian)):
            of = form(hessian[g].to(weight.device), ridge).hessian
            books.append(weighted_codebook(weight[rows], n_codes, of))
            codes.append(feed_back(weight[rows], books[-1], feedback(of)))
    return torch.cat(books), torch.cat(codes)
