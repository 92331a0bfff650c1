"""The joint space: teacher features to 384 whitened dimensions in which texts are directions.

A text q has the direction T_q = sum over anchors of kernel(q, a) R_a in feature space. With features whitened to Z and
T expressed in whitened units, the rank-384 space that keeps the maps T_q . Z best, summed over a bank of texts of equal
weight, is spanned by the top right singular vectors of the rows T_q / ||T_q||. Tokens are Z in that basis, so a text of
unit norm gives maps of unit variance over all tokens.

Axes: D feature width, K whitened width, J joint width, Q texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

WHITENED = 1024
JOINT = 384


@dataclass(frozen=True)
class Whitening:
    """Features to their leading principal components in unit variance: z = (f - mean) @ basis / deviation."""

    mean: Tensor
    basis: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, tokens: Tensor, width: int = WHITENED) -> Whitening:
        """From tokens [n, D]."""
        mean = tokens.mean(0)
        centred = tokens - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(tokens))
        keep = values.argsort(descending=True)[:width]
        return cls(mean, vectors[:, keep], values[keep].sqrt())

    def tokens(self, features: Tensor) -> Tensor:
        """Whitened features [..., K]."""
        return (features - self.mean) @ self.basis / self.deviation

    def directions(self, rows: Tensor) -> Tensor:
        """Directions [..., K]: their dot product with whitened features is that of rows [..., D] with centred ones."""
        return rows @ self.basis * self.deviation

    def rows(self, directions: Tensor) -> Tensor:
        """The smallest rows [..., D] that directions [..., K] come from."""
        return directions / self.deviation @ self.basis.T


def joint_basis(directions: Tensor, width: int = JOINT) -> Tensor:
    """Orthonormal basis [K, J] of the space that keeps text directions [Q, K] best."""
    unit = F.normalize(directions, dim=-1)
    values, vectors = torch.linalg.eigh(unit.T @ unit)
    basis: Tensor = vectors[:, values.argsort(descending=True)[:width]]
    return basis
