"""Stable rank, condition number and algebraic connectivity of one matrix, and what a random matrix has of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def connectivity(matrix: Tensor) -> tuple[float, int]:
    """Fiedler value of the correlation graph of the rows, and the number of rows that are constant.

    Nodes are the rows; the edge between rows i and j weighs ``A_ij = |corr(w_i, w_j)|`` (Pearson, over the columns),
    and ``A_ii = 0``. The value is the second smallest eigenvalue of the normalised Laplacian
    ``I - D^(-1/2) A D^(-1/2)``, with ``D`` the diagonal of the row sums of ``A``. Constant rows (dead units) have no
    correlation; they are left out of the graph and counted.

    Parameters
    ----------
    matrix
        Shape ``(rows, columns)``, float64.

    Returns
    -------
    tuple[float, int]
        The value in [0, 2], nan with fewer than two rows that vary; and the number of constant rows.

    Notes
    -----
    What it sees: rows that fall apart into groups that have little to do with one another (0 for two groups without
    any correlation). What it cannot see: any graph with equal weights has the value ``N / (N - 1)`` for N rows, so
    random rows and rows that are all the same one both lie near 1. That collapse is for the stable rank to find.
    Cost: one product and one eigendecomposition, ``O(rows^2 (rows + columns))``.

    References
    ----------
    Chung, "Spectral Graph Theory" (1997), section 1.2, for the normalised Laplacian; Fiedler, "Algebraic connectivity
    of graphs", Czechoslovak Mathematical Journal 23 (1973).

    Examples
    --------
    >>> pair = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    >>> groups = torch.cat([pair, 2 * pair, pair.roll(2, 1), 3 * pair.roll(2, 1)])  # two and two, uncorrelated
    >>> value, constant = connectivity(groups)
    >>> round(abs(value), 6), constant
    (0.0, 0)
    """
    centred = matrix - matrix.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1)
    # Centring leaves rounding noise of the mean's size in a constant row.
    varies = norms > 1e-12 * torch.linalg.vector_norm(matrix, dim=1)
    alive = int(varies.sum())
    if alive < 2:
        return math.nan, len(matrix) - alive
    rows = centred[varies] / norms[varies, None]
    weights = (rows @ rows.T).abs()
    weights.fill_diagonal_(0.0)
    scale = weights.sum(1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    laplacian = torch.diag_embed((weights.sum(1) > 0).to(weights)) - scale[:, None] * weights * scale
    return max(0.0, float(torch.linalg.eigvalsh(laplacian)[1])), len(matrix) - alive


def condition_number(matrix: Tensor) -> float:
    """Largest over smallest singular value, from the smaller Gram matrix; infinite when it exceeds about 1e7.

    Parameters
    ----------
    matrix
        Shape ``(rows, columns)``, float64: squaring loses half of the digits, so singular values below 1e-7 of the
        largest one are rounding noise, and are reported as zero.

    Examples
    --------
    >>> round(condition_number(torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))), 6)
    4.0
    """
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram)
    smallest, largest = float(values[0]), float(values[-1])
    if largest <= 0 or smallest <= 1e-14 * largest:
        return math.inf
    return math.sqrt(largest / smallest)


def top_singular(matrix: Tensor, right: Tensor, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular value and its vectors by power iteration: ``u = W v / ||W v||``, ``v = W^T u / ||W^T u||``.

    Parameters
    ----------
    matrix
        Shape ``(rows, columns)``.
    right
        Vector to start from, shape ``(columns,)``: a random one to begin with, last time's afterwards.
    iterations
        At least 1; each reads the matrix twice.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        The value ``||W^T u||``, which never exceeds the true one; ``u``; and ``v``, to start from the next time.
        All zero for a zero matrix.

    Notes
    -----
    With ratio r of the second to the first singular value the error of the value falls as ``r^(4 iterations)``: a
    matrix with a dominant direction is exact at once; a random one, which has none, stays a few percent low, by at
    most a factor ``1 + O(log(n) / iterations)`` whatever the gap is.

    References
    ----------
    Kuczynski, Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
    start", SIAM Journal on Matrix Analysis and Applications 13 (1992), theorem 3.1.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        left = torch.mv(matrix, right)
        left = left / torch.linalg.vector_norm(left).clamp_min(tiny)
        image = torch.mv(matrix.t(), left)
        value = torch.linalg.vector_norm(image)
        right = image / value.clamp_min(tiny)
    return value, left, right


def random_stable_rank(rows: int, columns: int) -> float:
    """Stable rank of a large matrix of independent entries: ``m n / (sqrt(m) + sqrt(n))^2``.

    The squared Frobenius norm concentrates at ``m n s^2`` and the largest singular value at the edge
    ``s (sqrt(m) + sqrt(n))`` of the Marchenko-Pastur law.

    References
    ----------
    Yin, Bai, Krishnaiah, "On the limit of the largest eigenvalue of the large dimensional sample covariance matrix",
    Probability Theory and Related Fields 78 (1988).

    Examples
    --------
    >>> random_stable_rank(100, 100)
    25.0
    """
    return rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


def random_condition_number(rows: int, columns: int) -> float:
    """Condition number of a large matrix of independent entries, by both edges of the Marchenko-Pastur law.

    ``(sqrt(m) + sqrt(n)) / |sqrt(m) - sqrt(n)|``; infinite for a square one, whose condition number has no mean.

    References
    ----------
    Bai, Yin, "Limit of the smallest eigenvalue of a large dimensional sample covariance matrix", Annals of Probability
    21 (1993).

    Examples
    --------
    >>> random_condition_number(100, 400)
    3.0
    """
    gap = abs(math.sqrt(rows) - math.sqrt(columns))
    return (math.sqrt(rows) + math.sqrt(columns)) / gap if gap > 0 else math.inf
