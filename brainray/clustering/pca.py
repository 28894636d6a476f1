"""Principal component analysis of rows that are distributed over ranks."""

from typing import Self

import torch
from torch import Tensor

from brainray import dist
from brainray.clustering import shards
from brainray.clustering.fitted import FittedModule
from brainray.errors import ClusteringError

# Entries this close to the largest magnitude count as equally large when fixing signs.
_SIGN_TIE = 1e-6


class PCA(FittedModule):
    """Top eigenvectors of the covariance, computed in float64 and the same on every rank.

    Fitted attributes (float64):
        mean_: (D,).
        components_: (k, D), orthonormal rows; the first of the entries with the largest magnitude
            is positive (scikit-learn uses a different sign convention).
        explained_variance_: (k,), with N - 1 in the denominator.
        explained_variance_ratio_: (k,), shares of the total variance; 0 if all rows coincide.
    """

    mean_: Tensor
    components_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor

    def __init__(self, num_components: int) -> None:
        super().__init__()
        if num_components < 1:
            raise ClusteringError(f"num_components={num_components} must be at least 1")
        self.num_components = num_components
        self._register_fitted(
            "mean_", "components_", "explained_variance_", "explained_variance_ratio_"
        )

    @torch.no_grad()
    def fit(self, x: Tensor) -> Self:
        """Fit to the rows (n_rank, D) of all ranks (collective).

        Raises:
            ClusteringError: on all ranks: rows with NaN or infinity, fewer than two rows, more
                components than rows or features.
        """
        num_rows = shards.check_rows(x)
        num_features = x.shape[1]
        if num_rows < 2 or self.num_components > min(num_rows, num_features):
            raise ClusteringError(
                f"cannot compute {self.num_components} principal components from {num_rows} rows "
                f"of {num_features} features: use at least 2 rows, and at most as many components "
                "as the smaller of the two numbers"
            )
        mean = shards.mean_of_rows(x, num_rows)
        scatter = shards.scatter_of_rows(x, mean)
        eigenvalues, eigenvectors = torch.linalg.eigh(scatter / (num_rows - 1))
        # Ranks on different machines may round differently: all use the result of the first.
        variances = dist.broadcast_from_first(eigenvalues.flip(0).clamp(min=0))
        components = dist.broadcast_from_first(eigenvectors.T.flip(0)[: self.num_components])
        self.mean_ = mean
        self.components_ = _with_fixed_signs(components)
        self.explained_variance_ = variances[: self.num_components].clone()
        total = variances.sum()
        self.explained_variance_ratio_ = self.explained_variance_ / torch.where(total > 0, total, 1)
        return self

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """Coordinates (n, k) of rows (n, D), in their dtype. Not collective."""
        self._check_is_fitted()
        coordinates = x.new_empty(x.shape[0], self.num_components)
        for block in shards.blocks(x.shape[0], shards.ROWS_AT_A_TIME):
            centered = x[block].double() - self.mean_
            coordinates[block] = (centered @ self.components_.T).to(x.dtype)
        return coordinates


def _with_fixed_signs(components: Tensor) -> Tensor:
    magnitudes = components.abs()
    # The first of nearly equal entries decides, so that rounding cannot flip a component.
    largest = magnitudes >= (1 - _SIGN_TIE) * magnitudes.max(dim=1, keepdim=True).values
    first = largest.to(torch.int8).argmax(dim=1, keepdim=True)
    return components * components.gather(1, first).sign()
