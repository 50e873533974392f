"""Curves: samples and posteriors of Gaussian processes, and sets of series.

Shapes: B curves, N context points, M targets, D value columns; all tensors are float64.
"""

import itertools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.images import Tree, read_all
from data.tables import read_table

KERNELS = ("rbf", "matern52", "periodic")
NOISE = 0.02  # standard deviation of the noise on a curve
MAX_CONTEXT = 46  # context points of a curve; with its targets fewer than 50
CENTRAL_95 = 1.96  # standard deviations to either side hold 95 % of a Gaussian

# ------------------------------------------------------------------------- Gaussian processes
def covariance(kernel: str, x1: Tensor, x2: Tensor, length, scale, period) -> Tensor:
    """Kernel matrices (B, N, M) of points (B, N, 1), (B, M, 1); hyperparameters (B, 1, 1)."""
    d = x1 - x2.mT  # (B, N, M)
    if kernel == "rbf":
        k = torch.exp(-0.5 * (d / length).square())
    elif kernel == "matern52":
        d = 5**0.5 * d.abs() / length
        k = (1 + d + d.square() / 3) * torch.exp(-d)
    elif kernel == "periodic":
        k = torch.exp(-2 * (torch.sin(math.pi * d / period) / length).square())
    else:
        raise ValueError(f"kernel={kernel!r} is unknown; use one of {', '.join(KERNELS)}")
    return scale.square() * k


def _cholesky(kernel, x, hyper, noise):
    """Cholesky factor (B, N, N) of the covariance of noisy observations at x (B, N, 1)."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    return torch.linalg.cholesky(covariance(kernel, x, x, *hyper) + noise**2 * eye)


def draw_curves(kernel: str, batch: int, points: int, gen: torch.Generator, rough: float = 0.0):
    """GP samples y = factor @ white: x in [-2, 2], factor, white, (length, scale, period), noise.

    factor (B, N, N) is that of y's covariance, x and white are (B, N, 1); length U[0.1, 0.6], scale
    U[0.1, 1], period U[0.1, 0.5], each (B, 1, 1), and the noise's std 0.02. rough: part of the
    curves, of which half have a log-uniform length in [0.002, 0.1] instead, and half a log-uniform
    noise in [0.02, 1].
    """
    u = torch.rand(3, batch, 1, 1, generator=gen, dtype=torch.float64)
    length, scale, period = 0.1 + 0.5 * u[0], 0.1 + 0.9 * u[1], 0.1 + 0.4 * u[2]
    x = 4 * torch.rand(batch, points, 1, generator=gen, dtype=torch.float64) - 2
    white = torch.randn(batch, points, 1, generator=gen, dtype=torch.float64)
    noise = torch.full_like(length, NOISE)
    if rough:
        u = torch.rand(2, batch, 1, 1, generator=gen, dtype=torch.float64)
        noise = torch.where(u[0] < rough / 2, 50 ** -u[1], noise)
        length = torch.where((u[0] >= rough / 2) & (u[0] < rough), 0.1 * 50 ** -u[1], length)
    hyper = (length, scale, period)
    return x, _cholesky(kernel, x, hyper, noise), white, hyper, noise


def draw_series(batch: int, points: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, factor and white, as of draw_curves, of curves like measured series that are standardised.

    A sum of random parts: a trend (RBF, length in [0.1, 4]), a cycle that drifts (periodic, period
    in [0.1, 4], length in [0.3, 2], times an RBF of a length in [0.5, 16]), and noise, 2 to 70 % of
    the std. All are log-uniform. A curve has mean 0 and a std of about 0.5; half have their points
    at equal distances.
    """
    u = torch.rand(7, batch, 1, 1, generator=gen, dtype=torch.float64)
    x = 4 * torch.rand(batch, points, 1, generator=gen, dtype=torch.float64) - 2
    x = torch.where(u[0] < 0.5, 4 * x.argsort(1).argsort(1) / (points - 1) - 2, x)
    white = torch.randn(batch, points, 1, generator=gen, dtype=torch.float64)
    between = lambda i, low, high: low * (high / low) ** u[i]
    kernel = lambda name, length, period=None: covariance(name, x, x, length, u.new_ones(1), period)
    cycle = kernel("periodic", between(1, 0.3, 2), between(2, 0.1, 4))
    cycle = cycle * kernel("rbf", between(3, 0.5, 16))
    part, noise = (1.5 * u[5] - 0.25).clamp(0, 1), between(6, 0.02, 0.7)
    k = part * cycle + (1 - part) * kernel("rbf", between(4, 0.1, 4))
    eye = torch.eye(points, dtype=torch.float64)
    k = (1 - noise.square()) * k + noise.square() * eye
    row = k.sum(-1, keepdim=True)
    k = k - row @ row.mT / row.sum(1, keepdim=True)  # given that the mean is 0
    k = k / (4 * (k * eye).sum((1, 2), keepdim=True) / points)
    return x, torch.linalg.cholesky(k + 1e-6 * eye), white


def sampler(kernel: str, rough: float = 0.0) -> Callable:
    """draw(batch, points, gen) -> x, y (B, points, 1), None (no mask), posterior.

    posterior(given (B, points)) -> mean and variance (B, points, 1) of every y given the first so
    many of a curve, for the kernel that drew it. kernel "all": the generator picks one; "series":
    as draw_series. rough: as for draw_curves.
    """
    kernels = KERNELS if kernel == "all" else (kernel,)

    def draw(batch: int, points: int, gen: torch.Generator) -> tuple:
        pick = int(torch.randint(len(kernels), (), generator=gen)) if len(kernels) > 1 else 0
        x, factor, white, *_ = (
            draw_series(batch, points, gen) if kernel == "series" else
            draw_curves(kernels[pick], batch, points, gen, rough))

        def posterior(given: Tensor) -> tuple[Tensor, Tensor]:
            given = given.unsqueeze(-1).to(white)  # y = factor @ white: these fix their white noise
            return factor @ (given * white), factor.square() @ (1 - given)

        return x, factor @ white, None, posterior

    return draw


def gp_test_sets(kernel: str, count: int, seed: int = 0) -> Iterator:
    """Test sets of 16 curves: x, y (16, n + M, 1), hyper and n, the number of context points.

    n U{3..46}, n + M < 50; the context comes first. Another seed gives a validation split.
    """
    for i in range(count):
        key = (seed, i, KERNELS.index(kernel), 4)
        gen = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
        n = int(torch.randint(3, MAX_CONTEXT + 1, (), generator=gen))
        m = int(torch.randint(3, 50 - n, (), generator=gen)) if n < MAX_CONTEXT else 3
        x, factor, white, hyper, _ = draw_curves(kernel, 16, n + m, gen)
        yield x, factor @ white, hyper, n


def _condition(kernel: str, x, y, xt, hyper, noise) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior of y at xt given (x, y), and the log density (..., B) of the given y: exact."""
    factor = _cholesky(kernel, x, hyper, noise)
    a, b = (torch.linalg.solve_triangular(factor, v, upper=False)
            for v in (covariance(kernel, x, xt, *hyper), y))
    var = hyper[1].square() + noise**2 - a.square().sum(-2, keepdim=True).mT
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros_like(y[..., 0]), scale_tril=factor).log_prob(y[..., 0])
    return a.mT @ b, var.clamp(min=1e-12).sqrt(), evidence


def gp_posterior(kernel: str, x, y, xt, hyper, noise=NOISE) -> tuple[Tensor, Tensor]:
    """Exact posterior of y at xt (B, M, 1) given (x, y) (B, N, 1): mean and std (..., B, M, 1)."""
    return _condition(kernel, x, y, xt, hyper, noise)[:2]


def log_density(kernel: str, x, y, hyper, noise=NOISE) -> Tensor:
    """Exact log density (..., B) of noisy observations y at x, (B, N, 1) each."""
    return _condition(kernel, x, y, x[:, :0], hyper, noise)[2]


def joint_log_likelihood(kernel: str, x, y, xt, yt, hyper, noise=NOISE) -> Tensor:
    """Exact joint log density of the targets given the context, divided by M: (B,)."""
    both = log_density(kernel, torch.cat((x, xt), 1), torch.cat((y, yt), 1), hyper, noise)
    return (both - log_density(kernel, x, y, hyper, noise)) / xt.shape[1]


def averaged_gp(x, y, xt, noises: tuple = (NOISE,)) -> tuple[Tensor, Tensor]:
    """Mean and std of y at xt (B, M, 1) given (x, y) (B, N, 1), of an RBF kernel that is unknown.

    The exact posteriors of a grid of lengths, scales and noises, each with its evidence as weight.
    """
    lengths, scales = torch.logspace(-1.2, 0.4, 14), torch.logspace(-1.2, 0.4, 10)
    grid = torch.cartesian_prod(lengths, scales, torch.tensor(noises)).to(x)  # (G, 3)
    length, scale, noise = grid.view(-1, 1, 1, 1, 3).unbind(-1)  # (G, 1, 1, 1)
    mean, std, evidence = _condition("rbf", x, y, xt, (length, scale, None), noise)
    weight = evidence.softmax(0)[..., None, None]  # (G, B, 1, 1); mean, std (G, B, M, 1)
    average = (weight * mean).sum(0)
    return average, (weight * (std.square() + (mean - average).square())).sum(0).sqrt()


# ------------------------------------------------------------------------- sets of series
SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
MIN_POINTS = 6


def standardise(x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, tuple]:
    """x (..., N, 1) over [-2, 2], each column of y (..., N, D) with mean 0 and std 0.5 where seen.

    units = (x_mid, x_scale, y_mean, y_scale): x = x' x_scale + x_mid, y = y' y_scale + y_mean.
    """
    seen = torch.ones_like(y) if mask is None else mask.to(y)
    count = seen.sum(-2, keepdim=True).clamp(min=1)
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    mean = (y * seen).sum(-2, keepdim=True) / count
    std = (((y - mean) * seen).square().sum(-2, keepdim=True) / count).sqrt()
    x_mid, x_scale = (low + high) / 2, torch.where(high > low, (high - low) / 4, 1)
    y_scale = torch.where(std > 1e-12 * mean.abs(), 2 * std, 1)  # 1 where y is constant
    return (x - x_mid) / x_scale, (y - mean) * seen / y_scale, (x_mid, x_scale, mean, y_scale)


def _load(path, columns: str | None, n_values: int) -> list[tuple]:
    """Curves as (name of file or first column, x (N, 1), y (N, D), mask (N, D)), sorted by x."""
    if Path(path).is_dir() or zipfile.is_zipfile(path):
        tree = Tree(path)
        names = [name for name in tree.names if name.lower().endswith(SUFFIXES)]
        if not names:
            raise ValueError(f"{path}: no series in it, files {' '.join(SUFFIXES)}")
        read = lambda name: (name, read_table(name, columns or "all", tree.read(name)))
        tables = read_all(names, read, "series files")
    else:
        tables = [("", read_table(path, columns or "all"))]
    curves = []
    for file, table in tables:
        if len(table.y_names) % n_values:
            raise ValueError(f"{file or path}: {len(table.y_names)} columns of values are no "
                             f"multiple of n_values={n_values}")
        order = table.x[:, 0].argsort(stable=True)
        x, y, m = (v[order] for v in table[:3])
        for name, y, m in zip(table.y_names[::n_values], *(v.split(n_values, 1) for v in (y, m))):
            curves.append((file or name, x[seen := m.any(1)], y[seen], m[seen]))
    return curves


class CurveSet:
    """Curves of a folder, a zip or a file x,y1,y2,...: every n_values columns y are one curve.

    split: train, val and test are 80, 10 and 10 % of the files (or of the curves of a lone file)
    by a hash of the name; of fewer than 10 they are the first 80, the next 10 and the last 10 % of
    every curve, 6 points or more where there are 18. "all" is everything. limit > 0: only so many
    curves. Curves in windows of `points` neighbouring points, or fewer where a curve is shorter,
    each standardised.
    Attributes: names, source (one line), points (of the longest window).
    """

    def __init__(self, path, split: str = "train", columns=None, points: int = 48, limit: int = 0,
                 n_values: int = 1):
        def part(items, least=MIN_POINTS):
            tenth = max(-(-len(items) // 10), min(least, len(items) // 3))
            parts = {"train": slice(-2 * tenth), "val": slice(-2 * tenth, -tenth),
                     "test": slice(-tenth, None), "all": slice(None)}
            return items[parts[split]]
        curves = _load(path, columns, n_values)
        units = sorted({unit for unit, *_ in curves},
                       key=lambda unit: (zlib.crc32(unit.encode(errors="replace")), unit))
        if by_name := len(units) >= 10:
            chosen = set(part(units, 1))
            curves = [curve for curve in curves if curve[0] in chosen]
        else:
            curves = [(unit, *map(part, xym)) for unit, *xym in curves]
        curves = [curve for curve in curves if len(curve[1]) >= MIN_POINTS][: limit or None]
        if not curves:
            raise ValueError(f"{path}: no curve of {MIN_POINTS} points in the {split} split; "
                             "give longer series, or more of them")
        self.names, *xym = (list(column) for column in zip(*curves))
        self.x, self.y, self.mask = map(torch.cat, xym)
        self.counts = torch.tensor([len(x) for x in xym[0]])
        self.first = self.counts.cumsum(0) - self.counts
        self.points = min(points, int(self.counts.max()))
        self.source = (f"{path}: {len(curves)} curves in {split}, split by "
                       f"{'name' if by_name else 'time'}, {len(self.x)} points")

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, batch: int, points: int, gen: torch.Generator) -> tuple:
        """Random points of random windows in random order: x (B, points, 1), y (B, points, D).

        And a mask (B, points, D), or None where no value is missing: a shorter curve leaves random
        places empty. Of several values half of the curves come in the order of x, to learn to
        forecast.
        """
        pick = torch.randint(len(self), (batch, 1), generator=gen)
        length = self.counts[pick].clamp(max=max(points, self.points))  # (B, 1)
        start = torch.rand(batch, 1, generator=gen, dtype=torch.float64)
        start = self.first[pick] + (start * (self.counts[pick] - length + 1)).long()
        x, y, mask = self.window(start, length, max(points, int(length.max())))
        place = torch.arange(x.shape[1])
        key = torch.rand(batch, len(place), generator=gen)
        order = (key + (place >= length.clamp(min=points))).argsort(1)[:, :points]
        if y.shape[-1] > 1:
            in_time = torch.rand(batch, 1, generator=gen) < 0.5
            key = torch.where(in_time & (place < length), place / length, key).gather(1, order)
            order = order.gather(1, key.argsort(1))
        x, y, mask = (v.take_along_dim(order.unsqueeze(-1), 1) for v in (x, y, mask))
        return x, y, None if mask.all() else mask

    def window(self, start, length, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """`length` rows from `start` on, standardised: x (..., size, 1), y and mask (..., size, D).

        The mask is 0 beyond the length. start and length: (..., 1), or one number.
        """
        place = torch.arange(size)
        rows = start + place.clamp(max=length - 1)
        mask = self.mask[rows] & (place < length).unsqueeze(-1)
        return *standardise(self.x[rows], self.y[rows], mask)[:2], mask

    def windows(self, repeats: int = 10) -> Iterator:
        """All windows, split `repeats` times: x, y, mask or None (B, P, .), P // 2, numbers (B,).

        The first half of each is the context; numbers: of the windows.
        """
        groups = {}
        for first, count in zip(self.first.tolist(), self.counts.tolist()):
            length = min(self.points, count)
            groups.setdefault(length, []).extend(range(first, first + count - length + 1, length))
        for i, (length, starts) in itertools.product(range(repeats), groups.items()):
            key = repr((0, i, 10)).encode()
            order = torch.randperm(length, generator=torch.Generator().manual_seed(zlib.crc32(key)))
            for start in torch.tensor(starts)[:, None].split(16):
                x, y, mask = (v[:, order] for v in self.window(start, length, length))
                yield x, y, None if mask.all() else mask, length // 2, start[:, 0]
