"""FD-EffLite0: the Frechet distance between two sets of pictures, in EfficientNet-Lite0's features.

The formula is that of FID (Heusel et al. 2017, arXiv 1706.08500), the features are not Inception's: no figure of it can
be compared with a FID. Nor can two figures of different numbers of pictures, since few of them make it larger.
"""

import torch
from torch import Tensor

FRECHET = "FD-EffLite0"


def frechet_distance(one_NF: Tensor, other_MF: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of the means and covariances of two sets of features (Dowson and
    Landau 1982). In float64.

    With S1 = A^T A and S2 = B^T B the last trace is the sum of the singular values of A B^T, a matrix of (N, M), which
    needs no root of a matrix and is exact where there are fewer pictures than features.
    """
    means, roots = [], []
    for features in (one_NF.double(), other_MF.double()):
        means.append(features.mean(0))
        roots.append((features - means[-1]) / (len(features) - 1) ** 0.5)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = (means[0] - means[1]).square().sum() + sum(root.square().sum() for root in roots) - 2 * shared
    return max(float(distance), 0.0)  # rounding
