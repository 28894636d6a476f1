"""Gaussian densities, and the sufficient statistics for estimating their parameters.

Parameters and sums over blocks of rows are float64; within a block, sums and products are in the
rows' dtype. Shapes of covariances and of the Cholesky factors of precisions (upper triangular
U with U U^T = precision), as in scikit-learn:

    spherical (K,)   diag (K, D)   tied (D, D)   full (K, D, D)
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from brainray import dist
from brainray.errors import ClusteringError

_LEAST_LOG_SHARE = -80.0
"""A responsibility below exp of this, relative to the row's largest, is 0."""

CovarianceType = Literal["spherical", "diag", "tied", "full"]


class Scratch:
    """Named buffers for intermediate results, reused by one block of rows after another.

    Allocating fresh memory for each block would take longer than the arithmetic.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous buffer of this shape, with ``like``'s dtype and device."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)


@dataclass
class SufficientStatistics:
    """Sums over the rows for the M-step, all relative to one origin; float64 (see above).

    `squares` is sum_i gamma_ik x_i x_i^T, or the part of it that the covariance type needs:
    the diagonal (K, D) for "spherical" and "diag", the sum over k (D, D) for "tied".
    """

    counts: Tensor  # (K,) sum_i gamma_ik
    sums: Tensor  # (K, D) sum_i gamma_ik x_i
    squares: Tensor  # (K, D), (D, D) or (K, D, D)
    log_likelihood: Tensor  # () sum over rows
    covariance_type: CovarianceType

    @classmethod
    def zeros(
        cls,
        num_components: int,
        num_features: int,
        covariance_type: CovarianceType,
        device: torch.device,
    ) -> Self:
        squares: dict[CovarianceType, tuple[int, ...]] = {
            "tied": (num_features, num_features),
            "full": (num_components, num_features, num_features),
        }
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(
            counts=zero.new_zeros(num_components),
            sums=zero.new_zeros(num_components, num_features),
            squares=zero.new_zeros(squares.get(covariance_type, (num_components, num_features))),
            log_likelihood=zero,
            covariance_type=covariance_type,
        )

    def add(
        self, features: Tensor, gamma: Tensor, log_likelihood: Tensor, scratch: Scratch
    ) -> None:
        """Add rows, as `features_of`, with responsibilities (B, K) and summed log-likelihood."""
        self.counts += gamma.sum(dim=0)
        self.log_likelihood += log_likelihood
        num_features = self.sums.shape[1]
        products = gamma.T @ features
        self.sums += products[:, :num_features]
        if self.covariance_type == "full":
            # One product for all components: (K * D, B) @ (B, D).
            weighted = scratch("side by side", *gamma.shape, num_features)
            torch.mul(gamma[:, :, None], features[:, None, :], out=weighted)
            self.squares += (weighted.flatten(1).T @ features).view_as(self.squares)
        elif self.covariance_type == "tied":
            self.squares += features.T @ features
        else:
            self.squares += products[:, num_features:]

    def sum_across_ranks(self) -> "SufficientStatistics":
        """The statistics of all ranks' rows, in a single collective."""
        parts = (self.counts, self.sums, self.squares, self.log_likelihood)
        packed = dist.sum_across_ranks(torch.cat([part.flatten() for part in parts]))
        totals = torch.split(packed, [part.numel() for part in parts])
        counts, sums, squares, log_likelihood = (
            total.view_as(part) for total, part in zip(totals, parts, strict=True)
        )
        return SufficientStatistics(counts, sums, squares, log_likelihood, self.covariance_type)

    def mean_log_likelihood(self) -> float:
        return float(self.log_likelihood / self.counts.sum())


def estimate_covariances(
    statistics: SufficientStatistics,
    means: Tensor,  # (K, D), relative to the origin of the statistics
    vanished: Tensor,  # (K,) bool
    reg_covar: float,
) -> Tensor:
    """Maximum-likelihood covariances plus `reg_covar` on the diagonal.

    Vanished components get the average of the others, weighted by their responsibility.
    """
    counts = torch.where(vanished, 0.0, statistics.counts)
    if statistics.covariance_type == "tied":
        squares = statistics.squares - (counts[:, None] * means).T @ means
        return _symmetric(squares / statistics.counts.sum(), reg_covar)
    per_component = torch.where(vanished, 1.0, statistics.counts)
    if statistics.covariance_type == "full":
        outer = means[:, :, None] * means[:, None, :]
        covariances = statistics.squares / per_component[:, None, None] - outer
        covariances = _symmetric(covariances, reg_covar)
    else:
        # A variance of 0 may be slightly negative due to rounding.
        variances = statistics.squares / per_component[:, None] - means.square()
        covariances = variances.clamp(min=0) + reg_covar
        if statistics.covariance_type == "spherical":
            covariances = covariances.mean(dim=1)
    if bool(vanished.any()):
        covariances[vanished] = torch.tensordot(counts / counts.sum(), covariances, dims=1)
    return covariances


def precisions_cholesky(covariances: Tensor, covariance_type: CovarianceType) -> Tensor:
    """Factors U with U U^T = covariance^-1.

    Raises:
        ClusteringError: a covariance is not positive definite.
    """
    if covariance_type in ("spherical", "diag"):
        _require_positive_definite(bool((covariances > 0).all()), covariance_type)
        return covariances.rsqrt()
    lower, info = torch.linalg.cholesky_ex(covariances)  # covariance = L L^T
    _require_positive_definite(not bool(info.any()), covariance_type)
    identity = torch.eye(covariances.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False).mT


def features_of(
    rows: Tensor, origin: Tensor, covariance_type: CovarianceType, scratch: Scratch | None = None
) -> Tensor:
    """Rows (B, D) relative to an origin (D,).

    For diagonal variances their squares are appended (B, 2 D), so that one product covers both.
    Without scratch memory no operation works in place, as required for exported graphs.
    """
    num_rows, num_features = rows.shape
    has_squares = covariance_type in ("spherical", "diag")
    if scratch is None:
        centred = rows - origin
        return torch.cat([centred, centred.square()], dim=1) if has_squares else centred
    features = scratch("features", num_rows, num_features * (2 if has_squares else 1))
    centred = torch.sub(rows, origin, out=features[:, :num_features])
    if has_squares:
        torch.square(centred, out=features[:, num_features:])
    return features


class LogJoint(ABC):
    """log(weight_k N(x_i | mu_k, Sigma_k)) of blocks of rows, in the rows' dtype.

    Squared distances are expanded as x^2 - 2 x mu + mu^2 (except for "full", which forms a
    (B, K, D) tensor): shift rows and means to near 0 first.
    """

    def __init__(
        self, weights: Tensor, log_det: Tensor, means: Tensor, distances: Tensor, dtype: torch.dtype
    ) -> None:
        """
        Args:
            weights: (K,).
            log_det: (K,) or (), of the factors.
            means: (K, D).
            distances: (K,), squared distances of the means from the origin.
            dtype: of the rows.
        """
        self.num_components, self.num_features = means.shape
        constant = 0.5 * self.num_features * math.log(2 * math.pi)
        at_mean = (weights.log() + log_det - constant)[:, None]  # (K, 1)
        self.at_mean = at_mean.to(dtype)
        self.at_origin = (at_mean - 0.5 * distances[:, None]).to(dtype)

    @abstractmethod
    def __call__(self, features: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Log joint (B, K) of rows, as `features_of`.

        It is stored component by component in memory, which speeds up sums and maxima over K.
        """


def log_joint_of(
    weights: Tensor,  # (K,)
    means: Tensor,  # (K, D)
    factors: Tensor,  # precisions_cholesky
    covariance_type: CovarianceType,
    dtype: torch.dtype,  # of the rows
) -> LogJoint:
    """The function from rows (n, D) to log pi_k + log N(x_i; mu_k, Sigma_k), (n, K)."""
    match covariance_type:
        case "full":
            return _Full(weights, means, factors, dtype)
        case "tied":
            return _Tied(weights, means, factors, dtype)
        case "diag":
            return _Diagonal(weights, means, factors, dtype)
        case "spherical":
            return _Diagonal(weights, means, factors[:, None].expand_as(means), dtype)


class _Diagonal(LogJoint):
    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor, dtype: torch.dtype) -> None:
        precisions = factors.square()
        slopes = means * precisions
        distances = (slopes * means).sum(dim=1)
        super().__init__(weights, factors.log().sum(dim=1), means, distances, dtype)
        self.coefficients = torch.cat([slopes, -0.5 * precisions], dim=1).to(dtype)  # (K, 2 D)

    def __call__(self, features: Tensor, scratch: Scratch | None = None) -> Tensor:
        place = _buffer(scratch, "log joint", self.num_components, features.shape[0])
        expanded = torch.addmm(self.at_origin, self.coefficients, features.T, out=place)
        # A squared distance of 0 may be slightly negative due to rounding.
        return torch.minimum(expanded, self.at_mean, out=place).T


class _Tied(LogJoint):
    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor, dtype: torch.dtype) -> None:
        whitened = means @ factors
        distances = whitened.square().sum(dim=1)
        super().__init__(weights, factors.diagonal().log().sum(), means, distances, dtype)
        self.factors, self.means = factors.to(dtype), whitened.to(dtype)

    def __call__(self, features: Tensor, scratch: Scratch | None = None) -> Tensor:
        shape = features.shape
        whitened = torch.mm(features, self.factors, out=_buffer(scratch, "whitened", *shape))
        squares = torch.square(whitened, out=_buffer(scratch, "squares", *shape)).sum(dim=1)
        place = _buffer(scratch, "log joint", self.num_components, features.shape[0])
        expanded = torch.addmm(self.at_origin, self.means, whitened.T, out=place)
        expanded = torch.sub(expanded, squares, alpha=0.5, out=place)
        return torch.minimum(expanded, self.at_mean, out=place).T


class _Full(LogJoint):
    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor, dtype: torch.dtype) -> None:
        whitened = (means[:, None, :] @ factors).squeeze(1)  # (K, D)
        log_det = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        super().__init__(weights, log_det, means, whitened.square().sum(dim=1), dtype)
        self.factors = factors.transpose(0, 1).flatten(1).to(dtype)  # (D, K * D), side by side
        self.shift = -whitened.flatten().to(dtype)

    def __call__(self, features: Tensor, scratch: Scratch | None = None) -> Tensor:
        # One product for all components: (B, D) @ (D, K * D).
        place = _buffer(scratch, "side by side", features.shape[0], self.factors.shape[1])
        whitened = torch.addmm(self.shift, features, self.factors, out=place)
        squares = torch.square(whitened, out=place)
        distances = squares.view(-1, self.num_components, self.num_features).sum(dim=2)
        place = _buffer(scratch, "log joint", self.num_components, features.shape[0])
        return torch.sub(self.at_mean, distances.T, alpha=0.5, out=place).T


def _buffer(scratch: Scratch | None, name: str, *shape: int) -> Tensor | None:
    """A scratch buffer; None without scratch memory, as exported graphs must not use `out`."""
    return None if scratch is None else scratch(name, *shape)


def normalise_(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Responsibilities (B, K), in place of log(weight_k N(x_i | k)), and log-likelihoods (B,).

    At least one component must be possible for each row.
    """
    largest = log_joint.amax(dim=1, keepdim=True)
    relative = log_joint.sub_(largest)
    # Subnormal numbers would make the following operations several times slower.
    gamma = torch.threshold_(relative, _LEAST_LOG_SHARE, -math.inf).exp_()
    total = gamma.sum(dim=1, keepdim=True)
    return gamma.mul_(total.reciprocal()), (total.log_() + largest).squeeze(1)


def _symmetric(covariances: Tensor, reg_covar: float) -> Tensor:
    """Exactly symmetric covariances, with `reg_covar` added to the diagonal."""
    covariances = (covariances + covariances.mT) / 2
    covariances.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
    return covariances


def _require_positive_definite(holds: bool, covariance_type: CovarianceType) -> None:
    if not holds:
        raise ClusteringError(
            f"a {covariance_type} covariance is not positive definite: raise reg_covar, reduce "
            "the embeddings with PCA, use a diag or tied covariance, or use fewer components"
        )
