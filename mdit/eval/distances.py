"""Distances between two sets of pictures, from features of theirs.

    FID    as torch-fidelity computes it, in features of its Inception
    FD     the Frechet distance: FID's formula (Heusel et al. 2017, arXiv 1706.08500), in any features
    CMMD   the maximum mean discrepancy of CLIP's embeddings (Jayasumana et al. 2024, arXiv 2401.09603)

Distances in other features than Inception's are no FID: FD-EffLite0 is in EfficientNet-Lite0's, FD-DINOv2 in DINOv2's.
Nor can two Frechet distances of different numbers of pictures be compared, since few of them make it larger.
"""

from importlib import import_module

import numpy as np
import torch
from torch import Tensor

FRECHET = "FD-EffLite0"
BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # of CMMD's Gaussian kernel, and of what is reported
ROWS = 1024  # of a kernel's matrix at a time


def frechet_distance(one_NF: Tensor, other_MF: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of the means and covariances of two sets of features (Dowson and
    Landau 1982). In float64.

    With S1 = A^T A and S2 = B^T B the last trace is the sum of the singular values of A B^T, which needs no root of a
    matrix and is exact where there are fewer pictures than features. A has as many rows as there are pictures, or is,
    where these are more, the triangle of its QR decomposition.
    """
    means, roots = [], []
    for features in (one_NF.double(), other_MF.double()):
        means.append(features.mean(0))
        root = (features - means[-1]) / (len(features) - 1) ** 0.5
        roots.append(torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = (means[0] - means[1]).square().sum() + sum(root.square().sum() for root in roots) - 2 * shared
    return max(float(distance), 0.0)  # rounding


Statistics = dict[str, np.ndarray]  # "mu" (F,) and "sigma" (F, F) of features, as files of FID statistics have them


def fid(one_NF: Tensor, other: Tensor | Statistics) -> float:
    """torch-fidelity's own, from its Inception's features, or the other set's statistics."""
    theirs = import_module("torch_fidelity.metric_fid")
    one = theirs.fid_features_to_statistics(one_NF)
    if isinstance(other, Tensor):
        other = theirs.fid_features_to_statistics(other)
    else:  # float64, as files have them
        one = {name: value.astype(other[name].dtype) for name, value in one.items()}
    return theirs.fid_statistics_to_metric(one, other, verbose=False)[theirs.KEY_METRIC_FID]


def cmmd(one_NF: Tensor, other_MF: Tensor) -> float:
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k(a, b) = exp(-|a - b|^2 / (2 10^2)), over all pairs of
    embeddings of unit length, each with itself too (the paper's biased estimate). In float64."""
    one, other = one_NF.double(), other_MF.double()
    return CMMD_SCALE * (_mean_kernel(one, one) + _mean_kernel(other, other) - 2 * _mean_kernel(one, other))


def _mean_kernel(one_NF: Tensor, other_MF: Tensor) -> float:
    total = 0.0
    for rows in one_NF.split(ROWS):
        squared_NM = rows.square().sum(1)[:, None] + other_MF.square().sum(1) - 2 * rows @ other_MF.T
        total += float((-squared_NM / (2 * BANDWIDTH**2)).exp().sum())
    return total / (len(one_NF) * len(other_MF))
