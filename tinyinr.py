"""tinyinr: generalizable implicit neural representations, two papers in one file.

A signal is a function from coordinates to values: an image (R^2 -> RGB), a scene (R^3 -> RGB
and density, seen along rays), a curve (R -> R). Both models read a few observations of it, the
context, in one forward pass, and give back the function itself:

    context --encode--> code --decode(query)--> values

[1] Chen & Wang, Transformers as Meta-Learners for Implicit Neural Representations, ECCV 2022
    (arXiv 2208.02801), "TransINR": the code is the weights of an MLP, written by a Transformer.
[2] Guo, Lan, Zhang, Lu & Chen, Versatile Neural Processes for Learning Implicit Neural
    Representations, ICLR 2023 (arXiv 2301.08883), "VNP": the code is a few context tokens; a stack
    of blocks, each modulated by a global latent of its own, gives the values.

Shapes:  B batch   V views    H, W image   N context points   M targets       K points of the field
         T tokens  D width    R rays       P points per ray   L latent blocks Z latent width
Images are in [0, 1]. Pixel coordinates are (row, column) of pixel centres in (-1, 1). Poses are
camera-to-world (3, 4): x right, y up, the camera looks along -z (OpenGL); focals in pixels.
"""

import contextlib
import csv
import ctypes
import functools
import gc
import io
import itertools
import json
import math
import os
import posixpath
import re
import shlex
import signal
import statistics
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DATA = Path(__file__).parent / "data"  # the bundled sets

# ------------------------------------------------------------------------- config and presets

COORD_DIM = {"image": 2, "nvs": 3, "gp": 1}  # what a task's field maps ...
VALUE_DIM = {"image": 3, "nvs": 4, "gp": 1}  # ... to: RGB; RGB and density; y
MODELS = ("transinr", "vnp")
KERNELS = ("rbf", "matern52", "periodic")  # of the Gaussian processes that curves come from


LIMITS = {  # smallest and largest value of Config's whole numbers; the others: 0 and 2^20
    **dict.fromkeys(("dim", "heads", "head_dim", "ff_dim", "image_size", "patch", "merge", "grid",
                     "grid_scales", "stride", "freqs", "inr_width", "groups", "cross_heads",
                     "cross_ff", "hidden", "latent", "pool_every", "views", "batch_size",
                     "accumulate", "target_views"), (1, 2**20)), "upsample": (1, 64),
    **dict.fromkeys(("depth", "cross_depth", "blocks"), (0, 1024)), "inr_depth": (1, 1024),
    "convs": (0, 16), "lattice": (2, 64),
    "points_per_ray": (2, 2**20), "steps": (0, 2**40), "seed": (-(2**63), 2**64 - 1),
}


@dataclass
class Config:
    """Everything that defines a model and its training; the defaults are [1]'s image model."""

    task: str = "image"
    model: str = "transinr"
    preset: str = "small"
    # Transformer encoder, of both models
    dim: int = 768
    depth: int = 6
    heads: int = 12
    head_dim: int = 64
    ff_dim: int = 3072
    # tokenizer: patches (image, nvs) or a set convolution on a grid (gp)
    image_size: int = 178  # side of a training image in pixels
    patch: int = 9
    padding: int = 1
    view_positions: bool = False  # scenes: patches of views get a learned position each, too
    merge: int = 1  # VNP images: merge x merge patches become one token, the bottleneck
    context: tuple = (1.0, 1.0)  # images: range of the part of the pixels that is seen
    grid: int = 192  # gp: points of the grid of the set convolution
    grid_range: float = 2.4  # gp: the grid covers [-grid_range, grid_range]
    grid_scales: int = 4  # gp: length scales of the set convolution, doubling from the spacing
    stride: int = 4  # gp: grid points per token
    convs: int = 0  # gp: residual convolutions on the grid, dilated by 1, 2, 4, 8, 16, 1, 2, ...
    relative: bool = False  # gp, VNP: attention knows the distance of two tokens
    # positional encoding of coordinates
    freqs: int = 64  # frequencies per axis
    freq_top: float = 1024.0  # highest frequency over the lowest
    # TransINR: the generated MLP
    inr_depth: int = 5
    inr_width: int = 256
    groups: int = 64  # weight tokens per layer
    identity_init: bool = False  # blocks start as the identity, generated as the base weights
    # VNP: the decoder
    cross_depth: int = 3
    cross_heads: int = 4
    cross_ff: int = 512
    blocks: int = 4
    hidden: int = 512
    latent: int = 64
    local: bool = False  # tokens know where they lie, and the field reads those around a target
    upsample: int = 1  # images, local: a token is spread over upsample x upsample places
    latent_pool: str = "context"  # the prior is pooled over it, the "query", or "tokens"' places
    pool_every: int = 8  # of so many pixels along a side (or of so many tokens) one is pooled over
    std_power: float = 0.0  # likelihoods: power of a value's std that weighs it
    min_std: float = 0.005  # floor of the predicted standard deviation
    # scenes
    near: float = 2.0
    far: float = 6.0
    points_per_ray: int = 128
    lattice: int = 5  # scenes, local: tokens along every axis of space
    radius: float = 0.0  # the scene is empty beyond this radius; 0: no bound
    density_gain: float = 0.0  # softplus(gain * (raw - 0.1)) as density; 0: the papers' ReLU
    color_gain: float = 1.0  # sigmoid(gain * raw) as color
    views: int = 1  # context views
    target_views: int = 1  # views that a training step's rays of an object come from
    train_views: int = 0  # of every object only the first ones are used in training; 0: all
    # training; the first of steps, minutes and epochs that is not 0 gives its length
    steps: int = 0
    minutes: float = 0.0
    epochs: int = 0
    batch_size: int = 16  # signals a step, of all processes together
    accumulate: int = 1  # a process's part of the batch goes through the model in as many pieces
    queries: int = 0  # targets per signal and step (pixels, rays, points); 0: all there are
    lr: float = 1e-4
    muon_lr: float = 0.0  # of the Transformer's matrices; 0: Adam for all
    beta2: float = 0.999
    warmup: int = 0  # steps
    decay: str = "step"  # x 0.1 at 80 % of the run, or "linear" to 0 after the part `hold`
    hold: float = 0.0
    clip: float = 0.0  # bound on the norm of the gradient; 0: none
    flip: bool = False  # images: mirror half of them
    random_crop: bool = False  # images: along the longer side
    augment: str = ""  # scenes: any of "turn mirror recolor"
    balance: float = 0.0  # scenes: a class of n objects is drawn as one of n^(1 - balance)
    kernel: str = "rbf"  # curves: the training functions, or "all" kernels
    beta: float = 1.0  # weight of the KL divergence ...
    beta_warmup: float = 0.05  # ... reached after this part of the run
    tto_lr: float = 1e-4  # test-time optimisation
    save_every: float = 60.0  # seconds between checkpoints
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in (int, float) and (not isinstance(value, (int, kind)) or value != value):
                raise ValueError(f"{field.name}={value!r} must be a {kind.__name__}")
            least, most = LIMITS.get(field.name, (0, 2**20) if kind is int else (None, None))
            if kind is int and not least <= value <= most:
                raise ValueError(f"{field.name}={value} must be from {least} to {most:,}")
        check_choice("task", self.task, COORD_DIM)
        check_choice("model", self.model, MODELS)
        check_choice("latent_pool", self.latent_pool, ("context", "query", "tokens"))
        check_choice("decay", self.decay, ("step", "linear"))
        check_choice("kernel", self.kernel, (*KERNELS, "all"))
        if self.local and self.task == "nvs" and not self.view_positions:
            raise ValueError("local=True reads views of one size: add view_positions=True")
        if self.relative and (self.task, self.model) != ("gp", "vnp"):
            raise ValueError("relative=True needs tokens in a row: it is for the VNP of curves")
        if self.upsample > 1 and (self.task, self.model, self.local) != ("image", "vnp", True):
            raise ValueError(f"upsample={self.upsample} spreads the tokens of a picture around a "
                             "target: it is for the VNP of images with local=True")
        if self.latent_pool == "tokens" and self.task != "gp":
            raise ValueError('latent_pool="tokens" is for curves; try latent_pool="context"')
        known = self.side if self.latent_pool == "tokens" else self.image_size
        if not 1 <= self.pool_every <= known:
            raise ValueError(f"pool_every={self.pool_every} must be from 1 to the number of tokens "
                             f"of a curve or of pixels along a side, {known}")
        self.context = tuple(float(v) for v in self.context)
        if not 0 <= self.context[0] <= self.context[-1] <= 1 or len(self.context) != 2:
            raise ValueError(f"context={self.context} must be a range within [0, 1]; try 0.05 0.5")
        if self.model == "transinr" and self.inr_width % self.groups:
            raise ValueError(f"groups={self.groups} must divide inr_width={self.inr_width}; try "
                             f"{math.gcd(self.groups, self.inr_width)}")
        if not self.near < self.far:
            raise ValueError(f"near={self.near} must be below far={self.far}")

    @property
    def masked(self) -> bool:
        """Whether a model of images also reads which pixels were seen."""
        return self.task == "image" and self.context != (1.0, 1.0)

    @property
    def side(self) -> int:
        """How many tokens there are along a side of a picture or view, or along a curve."""
        if self.task == "gp":
            return -(-self.grid // self.stride)
        return (self.image_size + 2 * self.padding) // self.patch // self.merge

    @property
    def tokens(self) -> int:
        """How many tokens the Transformer reads: of the context, and the INR's weights."""
        context = self.side if self.task == "gp" else self.side**2
        if self.task == "nvs":
            context = self.lattice**3 if self.local else context * self.views
        layers = [self.inr_width] * (self.inr_depth - 1) + [self.out_dim]
        return context + sum(min(self.groups, n) for n in layers) * (self.model == "transinr")

    @property
    def out_dim(self) -> int:
        """Channels of the field: the values, and their std where the model is Gaussian."""
        gaussian = self.task == "gp" or (self.task == "image" and self.model == "vnp")
        return VALUE_DIM[self.task] * (2 if gaussian else 1)


def check_choice(name, value, known):
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(map(str, known))}")


PRESETS = {  # name -> {(task, model): what differs from the defaults}; its first cell is meant
    "small": {
        ("image", "transinr"): dict(
            image_size=64, patch=8, padding=0, dim=128, depth=3, heads=2, ff_dim=512, freqs=32,
            freq_top=32.0, inr_width=64, groups=4, identity_init=True, local=True, minutes=9.8,
            batch_size=16, queries=1024, lr=1e-3, muon_lr=0.02, beta2=0.95, warmup=100,
            decay="linear", flip=True),
        ("nvs", "transinr"): dict(
            image_size=64, patch=8, padding=0, dim=128, depth=3, heads=2, ff_dim=512, freqs=8,
            freq_top=32.0, inr_width=64, groups=4, identity_init=True, local=True, minutes=14.8,
            batch_size=8, queries=128, view_positions=True, points_per_ray=16, radius=1.0,
            density_gain=20.0, color_gain=4.0, target_views=8, balance=0.75, lr=4e-4, muon_lr=0.006,
            augment="mirror recolor", beta2=0.95, warmup=100, decay="linear"),
        ("gp", "vnp"): dict(
            convs=5, relative=True, dim=128, depth=3, heads=4, head_dim=32, ff_dim=256, freqs=16,
            freq_top=64.0, cross_depth=2, cross_ff=256, blocks=2, hidden=128, latent=16, local=True,
            latent_pool="tokens", pool_every=4, minutes=9.8, batch_size=16, queries=24, lr=1e-3,
            muon_lr=0.01, beta2=0.95, warmup=100, decay="linear", clip=1.0),
        ("gp", "transinr"): dict(
            convs=5, dim=128, depth=3, heads=4, head_dim=32, ff_dim=256, freqs=32, freq_top=64.0,
            inr_width=64, groups=4, identity_init=True, local=True, minutes=9.8, batch_size=16,
            queries=24, lr=1e-3, muon_lr=0.01, beta2=0.95, warmup=100, decay="linear", clip=1.0),
        ("image", "vnp"): dict(
            image_size=64, patch=4, padding=0, merge=2, dim=128, depth=3, heads=4, head_dim=32,
            ff_dim=256, freqs=32, freq_top=32.0, cross_depth=0, blocks=2, hidden=64, latent=32,
            local=True, upsample=4, min_std=0.05, minutes=9.8, batch_size=8, queries=192,
            context=(0.1, 1.0), lr=1e-3, muon_lr=0.01, beta2=0.95, warmup=50, decay="linear",
            flip=True),
        ("nvs", "vnp"): dict(
            image_size=64, patch=8, padding=0, dim=128, depth=3, heads=4, head_dim=32, ff_dim=256,
            freqs=10, freq_top=64.0, cross_depth=0, blocks=2, hidden=64, latent=32, local=True,
            view_positions=True, points_per_ray=16, radius=1.0, density_gain=20.0, color_gain=4.0,
            target_views=8, balance=0.75, augment="mirror recolor", beta=1e-3, pool_every=16,
            minutes=14.8, batch_size=8, queries=64, lr=5e-4, muon_lr=0.01, beta2=0.95, warmup=50,
            decay="linear"),
    },
    "transinr-celeba": {("image", "transinr"): dict(epochs=30)},
    "transinr-imagenette": {("image", "transinr"): dict(epochs=400, random_crop=True, flip=True)},
    "transinr-shapenet": {("nvs", "transinr"): dict(
        image_size=128, patch=8, padding=0, freqs=20, freq_top=256.0, inr_depth=6, epochs=1000,
        batch_size=32, queries=128, train_views=25)},
    "vnp-shapenet": {("nvs", "vnp"): dict(
        image_size=128, patch=8, padding=0, dim=512, heads=8, ff_dim=1024, freq_top=256.0,
        beta=1e-3, latent_pool="query", epochs=1000, batch_size=32, queries=128, train_views=25)},
    "vnp-gp": {("gp", "vnp"): dict(
        convs=10, relative=True, dim=128, depth=4, heads=4, head_dim=32, ff_dim=256, freqs=16,
        freq_top=64.0, cross_depth=2, cross_ff=256, blocks=2, hidden=128, latent=16, local=True,
        latent_pool="tokens", pool_every=4, minutes=45.0, batch_size=16, queries=24, lr=6e-4,
        muon_lr=0.006, beta2=0.95, warmup=200, decay="linear", clip=1.0)},
}


def make_config(preset="small", task=None, model=None, **given) -> Config:
    """Config of a preset for a task and a model; `given` fields replace the preset's."""
    check_choice("preset", preset, PRESETS)
    cells = PRESETS[preset]
    first = next(iter(cells))
    task = task or first[0]
    model = model or next((m for t, m in cells if t == task), first[1])
    if (task, model) not in cells:
        raise ValueError(f"preset={preset!r} is for {' and '.join('/'.join(c) for c in cells)}, "
                         f"not for {task}/{model}; try --preset small")
    return Config(**{"task": task, "model": model, "preset": preset} | cells[task, model] | given)


class Prediction(NamedTuple):
    """Values at the query, (B, M, C), and their standard deviation; None where deterministic."""

    mean: Tensor
    std: Tensor | None


# ------------------------------------------------------------------------- geometry and rays


def pixel_grid(height: int, width: int, device=None) -> Tensor:
    """Coordinates of an image's pixel centres, row by row, (H W, 2) in (-1, 1) ([1] Sec. 4)."""
    rows = (torch.arange(height, device=device) + 0.5) * 2 / height - 1
    cols = (torch.arange(width, device=device) + 0.5) * 2 / width - 1
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)


def rays_through(poses, x, y) -> tuple[Tensor, Tensor]:
    """Rays (..., N, 3) of cameras (..., 3, 4) through x right, y up at depth 1, both (..., N)."""
    x, y = torch.broadcast_tensors(x, y)
    d = torch.stack((x, y, -torch.ones_like(x)), -1) @ poses[..., :3].mT
    return poses[..., None, :, 3].expand_as(d), d


def camera_rays(poses: Tensor, focals: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays through the pixel centres of pinhole cameras.

    poses (..., 3, 4) camera-to-world, OpenGL axes; focals (..., 2) in pixels, (x, y).
    Returns origins and directions, (..., H, W, 3); a direction has depth 1 along the camera's
    axis and is not normalised, so that z_vals are depths.
    """
    x = torch.arange(width, device=poses.device) + 0.5 - width / 2
    y = torch.arange(height, device=poses.device) + 0.5 - height / 2
    fx, fy = focals[..., 0, None, None], focals[..., 1, None, None]
    return rays_through(poses.unsqueeze(-3), x / fx, -y[:, None] / fy)


def pixel_rays(poses, focals, height: int, width: int, pixels) -> tuple[Tensor, Tensor]:
    """As `camera_rays`, (..., N, 3), but only through these pixels (..., N), counted by rows."""
    x = (pixels % width + 0.5 - width / 2) / focals[..., :1]
    y = (pixels // width + 0.5 - height / 2) / focals[..., 1:]
    return rays_through(poses, x, -y)


def look_at(eye: Tensor) -> Tensor:
    """Pose (3, 4) of a camera at eye (3,) that looks at the origin, world up = z."""
    back = F.normalize(eye, dim=0)
    right = F.normalize(torch.linalg.cross(eye.new_tensor([0.0, 0.0, 1.0]), back), dim=0)
    return torch.stack((right, torch.linalg.cross(back, right), back, eye), 1)


def opencv_to_opengl(poses: Tensor) -> Tensor:
    """Camera-to-world poses (..., 3, 4) of OpenCV or COLMAP (y down, z forward) -> ours."""
    return poses * poses.new_tensor([1, -1, -1, 1])


def sample_depths(rays_o, rays_d, near, far, points: int, jitter=None, radius=0.0) -> Tensor:
    """Depths of the points on every ray, (B, R, P), evenly from near to far ([1] Sec. 4.2).

    near, far: numbers or (B,). jitter (B, R, 1) in [0, 1): shifts each ray's points by this part
    of their spacing. radius > 0 spends the points inside that sphere around the origin only
    (deviates: [1] samples all of [near, far]); a ray that misses it gets `points` equal depths.
    """
    near, far = (torch.as_tensor(v, dtype=rays_o.dtype, device=rays_o.device).reshape(-1, 1, 1)
                 for v in (near, far))
    if radius:
        a = rays_d.square().sum(-1, keepdim=True)  # |o + t d|^2 = radius^2
        middle = -(rays_o * rays_d).sum(-1, keepdim=True) / a  # (B, R, 1)
        inside = (radius**2 - (rays_o + middle * rays_d).square().sum(-1, keepdim=True)) / a
        half = inside.clamp(min=0).sqrt()
        near = torch.minimum(torch.maximum(near, middle - half), far)
        far = torch.maximum(torch.minimum(far, middle + half), near)
    steps = torch.arange(points, dtype=rays_o.dtype, device=rays_o.device) / (points - 1)
    z_vals = near + (far - near) * steps
    if jitter is not None:
        z_vals = z_vals + jitter * (far - near) / (points - 1)
    return z_vals.expand(*rays_o.shape[:2], points)


# ------------------------------------------------------------------------- volume renderer


def volume_render(rgb, sigma, z_vals, background=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Emission-absorption rendering ([1] Sec. 4.2): color, depth and opacity of every ray.

    rgb (B, R, P, 3), sigma (B, R, P) >= 0, z_vals (B, R, P); background: number or (3,).
    Returns (B, R, 3), (B, R), (B, R). The transmittance is exp of a shifted cumulative sum: equal
    to the product of (1 - alpha), with finite gradients behind an opaque point. Always fp32.
    """
    rgb, sigma = rgb.to(z_vals.dtype), sigma.to(z_vals.dtype)
    delta = F.pad(z_vals[..., 1:] - z_vals[..., :-1], (0, 1), value=1e-3)
    tau = sigma * delta
    before = F.pad(tau, (1, 0))[..., :-1].cumsum(-1)  # optical depth in front of a point
    weights = torch.exp(-before) * (1 - torch.exp(-tau))  # (B, R, P)
    opacity = weights.sum(-1)
    color = (weights.unsqueeze(-1) * rgb).sum(-2) + (1 - opacity).unsqueeze(-1) * background
    return color, (weights * z_vals).sum(-1), opacity


# ------------------------------------------------------------------------- Transformer


def full(x: Tensor) -> Tensor:
    """x in fp32, where autocast has made it shorter."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [nn.Linear(widths[0], widths[1])]
    for a, b in zip(widths[1:], widths[2:]):
        layers += [nn.ReLU(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention of queries (B, M, E) over keys and values (B, T, E): (B, M, E).

    bias (heads, M, T) is added to the logits.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, h, ., E/h)
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm Transformer block, no bias in Q, K, V ([1] Sec. 3.2, [2] Sec. 3.2).

    cfg.relative: a learned bias on the logits for every distance of two tokens, as curves from a
    stationary process look the same everywhere (deviates: [2] has absolute positions only).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        width = cfg.heads * cfg.head_dim
        self.heads = cfg.heads
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.qkv = nn.Linear(cfg.dim, 3 * width, bias=False)
        self.out = nn.Linear(width, cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim)
        self.ff1 = nn.Linear(cfg.dim, cfg.ff_dim)
        self.ff2 = nn.Linear(cfg.ff_dim, cfg.dim)
        if cfg.identity_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.ff2.weight)
        self.near = None
        if cfg.relative:
            place = torch.arange(cfg.tokens)
            self.near = nn.Parameter(torch.zeros(cfg.heads, 2 * cfg.tokens - 1))
            distance = place[:, None] - place + cfg.tokens - 1  # (T, T), from 0
            self.register_buffer("distance", distance, persistent=False)

    def forward(self, x):  # (B, T, D)
        bias = None if self.near is None else self.near[:, self.distance]  # (h, T, T)
        x = x + self.out(attend(*self.qkv(self.norm1(x)).chunk(3, -1), self.heads, bias))
        return x + self.ff2(F.gelu(self.ff1(self.norm2(x))))


class CrossBlock(nn.Module):
    """Post-norm block in which target features read the context tokens ([2] Sec. 3.3)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads = cfg.cross_heads
        self.q = nn.Linear(cfg.dim, cfg.dim)
        self.kv = nn.Linear(cfg.dim, 2 * cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.ff = mlp(cfg.dim, cfg.cross_ff, cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim)

    def forward(self, f, e, tokens):  # features and embedded coordinates (B, K, D), (B, T, D)
        k, v = self.kv(tokens).chunk(2, -1)
        f = self.norm1(f + self.out(attend(self.q(f + e), k, v, self.heads)))
        return self.norm2(f + self.ff(f))


# ------------------------------------------------------------------------- tokenizers


def token_line(cfg: Config) -> Tensor:
    """Where tokens lie along every axis of the field's coordinates, (n,) (cfg.local).

    Curves and pictures: those of the context, or the places that each is spread to (cfg.upsample).
    Scenes: a lattice whose hat functions end where the sphere does that bounds the scene.
    """
    if cfg.task == "gp":
        return torch.linspace(-cfg.grid_range, cfg.grid_range, cfg.grid)[:: cfg.stride]
    if cfg.task == "nvs":
        return (cfg.radius or 1.0) * torch.linspace(-1, 1, cfg.lattice + 2)[1:-1]
    return pixel_grid(cfg.side * cfg.upsample, 1)[:, 0]


def around(points: Tensor, line: Tensor) -> Tensor:
    """Weights (..., n^C) of the places next to points (..., C): linear interpolation.

    The places are a regular grid, line (n,) along every axis; beyond its cells all weights are 0.
    """
    weight = F.relu(1 - (points.unsqueeze(-1) - line).abs() / (line[1] - line[0]))  # (..., C, n)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    if torch.is_autocast_enabled(points.device.type):  # what they are multiplied in
        weight = weight.to(torch.get_autocast_dtype(points.device.type))
    first, *rest = weight.unbind(-2)
    for axis in rest:
        first = (first.unsqueeze(-1) * axis.unsqueeze(-2)).flatten(-2)
    return first


def interpolate(values: Tensor, points: Tensor, line: Tensor) -> Tensor:
    """Values (B, n^C, D) of a regular grid's places at points (B, K, C), linearly: (B, K, D).

    line (n,): where the places lie along every axis; beyond them it is as at the border. As
    `around(points, line) @ values`, but every point reads its 2^C neighbours only.
    """
    n, dim = len(line), points.shape[-1]
    at = ((points - line[0]) / (line[1] - line[0])).clamp(0, n - 1)
    low = at.floor().clamp(max=n - 2)
    first = torch.arange(len(values), device=values.device)[:, None] * n**dim
    table, out = values.flatten(0, 1), 0
    for corner in itertools.product((0, 1), repeat=dim):
        place, index = low + low.new_tensor(corner), 0
        weight = (1 - (at - place).abs()).prod(-1, keepdim=True)  # (B, K, 1)
        for axis in place.long().unbind(-1):
            index = index * n + axis
        out = out + weight * F.embedding(index + first, table)
    return out


class PatchTokenizer(nn.Module):
    """Image (B, C, H, W) -> tokens (B, T, D): disjoint patches and a linear map ([1] Sec. 4).

    tokens: how many patches there are, where each gets a learned position; 0: positions are in
    the channels (rays). merge > 1: a strided projection joins merge x merge patches, the
    bottleneck of [2] Sec. 3.2.
    """

    def __init__(self, channels: int, cfg: Config, tokens: int = 0):
        super().__init__()
        self.patch, self.padding = cfg.patch, cfg.padding
        self.size = cfg.image_size if tokens else None
        self.proj = nn.Linear(channels * cfg.patch**2, cfg.dim)
        self.merge = nn.Conv2d(cfg.dim, cfg.dim, cfg.merge, cfg.merge) if cfg.merge > 1 else None
        self.pos = nn.Parameter(torch.randn(tokens, cfg.dim)) if tokens else None

    def forward(self, image):
        if self.size and tuple(image.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"a picture of {image.shape[-2]} x {image.shape[-1]} pixels, but this "
                             f"model reads {self.size} x {self.size}: resize it")
        height, width = (n + 2 * self.padding for n in image.shape[-2:])
        patches = F.unfold(image, self.patch, padding=self.padding, stride=self.patch)
        x = self.proj(patches.transpose(1, 2))  # (B, T, D)
        if self.merge is not None:
            side = (height // self.patch, width // self.patch)
            grid = F.gelu(x).transpose(1, 2).unflatten(2, side)
            x = self.merge(grid).flatten(2).transpose(1, 2)
        return x if self.pos is None else x + self.pos


class SetTokenizer(nn.Module):
    """Points {(x, y)} (B, N, 1) -> tokens (B, T, D), T independent of N ([2] Sec. 3.2).

    A set convolution onto a regular grid with a density channel, at several scales, then strided
    convolutions (our reading: the 1D code of [2] is not public). Besides the points' density and
    mean value every grid point gets their mean offset and the values' first moment, so that
    nothing is lost to the spacing of the grid. cfg.convs dilated convolutions spread them over it.
    mask (B, N): 1 = present.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        grid = torch.linspace(-cfg.grid_range, cfg.grid_range, cfg.grid)
        self.register_buffer("points", grid, persistent=False)  # (G,)
        scales = 2 * cfg.grid_range / (cfg.grid - 1) * 2.0 ** torch.arange(cfg.grid_scales)
        self.register_buffer("scales", scales, persistent=False)  # (S,)
        width = cfg.dim // 2
        self.conv1 = nn.Conv1d(4 * cfg.grid_scales, width, 5, padding=2)
        spread = [2 ** (i % 5) for i in range(cfg.convs)]
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2 * n, dilation=n)
                                   for n in spread)
        self.conv2 = nn.Conv1d(width, cfg.dim, cfg.stride | 1, cfg.stride, padding=cfg.stride // 2)
        std = 0.02 if cfg.relative else 1.0  # where attention knows distances, places matter less
        self.pos = nn.Parameter(std * torch.randn(cfg.side, cfg.dim))

    def set_conv(self, x, y, mask=None):
        """Kernel regression of the set on the grid, (B, 4 S, G) at S scales."""
        mask = torch.ones_like(x) if mask is None else mask.to(x.dtype).unsqueeze(-1)
        values = torch.cat((mask, mask * y), -1)  # (B, N, 2)
        offset = (x.mT - self.points[:, None]).unsqueeze(1) / self.scales[:, None, None]
        weights = torch.exp(-0.5 * offset.square())  # (B, S, G, N)
        zeroth, first = (w.flatten(1, 2) @ values for w in (weights, weights * offset))
        density = zeroth[..., :1]  # (B, S G, 1)
        means = torch.cat((zeroth[..., 1:], first), -1) / (density + 1e-4)
        out = torch.cat((density.log1p(), means), -1).unflatten(1, (len(self.scales), -1))
        return out.movedim(-1, 1).flatten(1, 2)  # (B, 4 S, G)

    def forward(self, x, y, mask=None):
        grid = self.conv1(self.set_conv(x, y, mask))  # (B, D / 2, G)
        for conv in self.convs:
            grid = grid + conv(F.gelu(grid))
        return self.conv2(F.gelu(grid)).transpose(1, 2) + self.pos  # (B, T, D)


class Lattice(nn.Module):
    """Tokens of the places of a regular grid in space: what the views show there (cfg.local).

    Each is the sum of its learned position and, mean over views, of the patches around its
    projection and a linear map of where it lies before the camera.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        line, side = token_line(cfg), pixel_grid(cfg.side, 1)[:, 0]
        self.register_buffer("places", torch.cartesian_prod(line, line, line), persistent=False)
        self.register_buffer("side", side, persistent=False)  # where the patches of a view lie
        self.pos = nn.Parameter(torch.randn(len(self.places), cfg.dim))
        self.camera = nn.Linear(3, cfg.dim)

    def forward(self, patches, poses, half):  # (B, V, T, D), (B, V, 3, 4), (B, V, 2)
        x = (self.places - poses[..., None, :, 3]) @ poses[..., :3]  # (B, V, P, 3): camera's axes
        at = x[..., [1, 0]] * x.new_tensor([-1, 1]) / -x[..., 2:].clamp(max=-1e-3)  # row, column
        at = at / half.unsqueeze(2)  # in (-1, 1) where the view shows it
        seen = around(at, self.side) @ patches  # (B, V, P, D)
        return (seen + self.camera(x)).mean(1) + self.pos  # (B, P, D)


class Tokenizer(nn.Module):
    """A task's context -> tokens (B, T, D)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        if cfg.task == "gp":
            self.set = SetTokenizer(cfg)
            return
        if cfg.task == "nvs":
            self.patches = PatchTokenizer(9, cfg, cfg.side**2 if cfg.view_positions else 0)
            self.lattice = Lattice(cfg) if cfg.local else None
        else:
            self.patches = PatchTokenizer(4 if cfg.masked else 3, cfg, cfg.side**2)

    def forward(self, context: dict) -> Tensor:
        if self.cfg.task == "gp":
            return self.set(context["x"], context["y"], context.get("mask"))
        if self.cfg.task == "nvs":
            return self.views(context["images"], context["poses"], context["focals"])
        image, mask = context["image"], context.get("mask")
        if self.cfg.masked:
            mask = torch.ones_like(image[:, :1]) if mask is None else mask.to(image.dtype)
            image = torch.cat((image * mask, mask), 1)
        elif mask is not None:
            raise ValueError("this model reads whole images only: train one with --context")
        return self.patches(image)

    def views(self, images, poses, focals):  # (B, V, 3, H, W), (B, V, 3, 4), (B, V, 2)
        o, d = camera_rays(poses, focals, *images.shape[-2:])  # (B, V, H, W, 3)
        if self.cfg.view_positions:  # deviates from [1]: learned positions, inputs of like size
            images, o = 4 * images - 2, o * 2 / (self.cfg.near + self.cfg.far)
        rays = torch.cat((o, d), -1).movedim(-1, 2).to(images.dtype)
        pixels = torch.cat((images, rays), 2).flatten(0, 1)  # (B V, 9, H, W)
        tokens = self.patches(pixels).unflatten(0, images.shape[:2])  # (B, V, T, D)
        if self.lattice is None:
            return tokens.flatten(1, 2)
        half = 0.5 * o.new_tensor(images.shape[-2:]) / focals.flip(-1)  # tangent: rows, columns
        return self.lattice(tokens, poses, half)


# ------------------------------------------------------------------------- fields and queries


def frequencies(dim: int, n: int, top: float | None = None) -> Tensor:
    """The papers' n frequencies (n,) for coordinates of this dimension, in fp32.

    Images: exp(linspace(0, ln top)), top 1024. Scenes and curves: 2^linspace(0, log2 top),
    top 256 ([1] Sec. 4, [2] Sec. 4; curves: our choice).
    """
    if dim == 2:
        return torch.exp(torch.linspace(0, math.log(top or 1024), n))
    return 2 ** torch.linspace(0, math.log2(top or 256), n)


def positional_encoding(x: Tensor, freqs: Tensor) -> Tensor:
    """(..., C) -> (..., 2 C F): axis-major, then frequency; all cosines before all sines.

    In images (C = 2) the angle is pi w x, else w x; in this order, as fp32 rounding shows at 1024.
    """
    angles = (x.unsqueeze(-1) * freqs).flatten(-2)
    angles = math.pi * angles if x.shape[-1] == 2 else angles
    return torch.cat((angles.cos(), angles.sin()), -1)


def query_points(cfg: Config, query: dict) -> tuple[Tensor, Tensor | None]:
    """Where the field is to be evaluated: (B, K, C), and for rays their z_vals (B, R, P)."""
    if cfg.task != "nvs":
        return query["coords" if cfg.task == "image" else "x"], None
    z_vals = sample_depths(query["rays_o"], query["rays_d"], query.get("near", cfg.near),
                           query.get("far", cfg.far),
                           int(query.get("points_per_ray", cfg.points_per_ray)),
                           query.get("jitter"), cfg.radius)
    points = query["rays_o"].unsqueeze(2) + query["rays_d"].unsqueeze(2) * z_vals.unsqueeze(3)
    return points.flatten(1, 2), z_vals  # K = R P


def observations(cfg: Config, context: dict, every: int = 1):
    """What a context holds, as a supervised query: query, values (B, M, C), weight (B, M).

    every > 1 thins images and views out to one pixel in every x every, the middle one.
    """
    mask = context.get("mask")
    if cfg.task == "gp":
        x = context["x"]
        mask = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        return {"x": x}, context["y"], mask
    middle = slice(every // 2, None, every)
    if cfg.task == "nvs":
        images = context["images"]
        rays = camera_rays(context["poses"], context["focals"], *images.shape[-2:])
        o, d = (r[:, :, middle, middle].flatten(1, 3) for r in rays)  # (B, V H W, 3)
        values = images[..., middle, middle].movedim(2, -1).flatten(1, 3)
        return {"rays_o": o, "rays_d": d}, values, torch.ones_like(o[..., 0])
    image = context["image"]
    size = image.shape[-2:]
    grid = pixel_grid(*size, image.device).to(image.dtype).unflatten(0, size)
    coords = grid[middle, middle].flatten(0, 1).expand(len(image), -1, -1)
    mask = torch.ones_like(image[:, :1]) if mask is None else mask.to(image.dtype)
    values = image[..., middle, middle].flatten(2).transpose(1, 2)
    return {"coords": coords}, values, mask[:, 0, middle, middle].flatten(1)


def radiance(cfg: Config, raw: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The field's raw values (..., 4) at points (..., 3) -> rgb in [0, 1] and density >= 0.

    Columns of unit norm cannot reach the density of an opaque surface, so our presets scale the
    raw density (deviates: the papers take its ReLU).
    """
    rgb = torch.sigmoid(cfg.color_gain * raw[..., :3])
    sigma = raw[..., 3]
    sigma = F.softplus(cfg.density_gain * (sigma - 0.1)) if cfg.density_gain else sigma.relu()
    if cfg.radius:
        sigma = sigma * (points.square().sum(-1) <= cfg.radius**2 * 1.0001)
    return rgb, sigma


def render_field(cfg: Config, raw: Tensor, points: Tensor, z_vals: Tensor, background=1.0):
    """Color, depth and opacity of rays from the field's raw values at their points (B, R P, .)."""
    rgb, sigma = (v.unflatten(1, z_vals.shape[1:]) for v in radiance(cfg, raw, points))
    return volume_render(rgb, sigma, z_vals, background)


def readout(cfg: Config, raw: Tensor, points: Tensor, z_vals: Tensor | None) -> Prediction:
    """The field's raw values at the query's points -> the task's prediction (B, M, C)."""
    if z_vals is not None:
        return Prediction(render_field(cfg, raw, points, z_vals)[0], None)
    n, raw = VALUE_DIM[cfg.task], full(raw)
    if raw.shape[-1] == n:
        return Prediction(raw, None)
    return Prediction(raw[..., :n], cfg.min_std + F.softplus(raw[..., n:]))


# ------------------------------------------------------------------------- TransINR


def inr(code: dict[str, Tensor], x: Tensor, freqs: Tensor | None = None, line=None) -> Tensor:
    """Evaluate the INRs that `code` holds: a ReLU MLP per signal on encoded coordinates.

    code {layer: (B, in + 1, out)}, the bias in the last row, layers in order; x (B, M, C), or
    (1, M, C) shared by the batch; freqs (F,) default to the papers' for C coordinates. line (n,):
    the tokens' places, where the hat functions around them are inputs, too (cfg.local).
    Returns (B, M, out): for C = 2 the RGB value (0.5 is added, [1] Sec. 4.1), else raw values.
    """
    first, *rest = code.values()
    dim, rows = x.shape[-1], first.shape[1] - 1
    if freqs is None:
        freqs = frequencies(dim, rows // (2 * dim)).to(x)
    inputs = [positional_encoding(x, freqs)] + ([] if line is None else [around(x, line)])
    sizes = [v.shape[-1] for v in inputs]
    if sum(sizes) != rows:
        raise ValueError(f"{dim} coordinates x {len(freqs)} frequencies give {sizes[0]} inputs, "
                         f"places {sum(sizes[1:])}, and the first layer has {rows}: pass the "
                         "model's `freqs` and `line`")
    h = first[:, -1:]
    for v, w in zip(inputs, first[:, :-1].split(sizes, 1)):
        h = torch.baddbmm(h, v.expand(len(first), -1, -1), w)  # x W + b
    for wb in rest:
        h = torch.baddbmm(wb[:, -1:], h.relu_(), wb[:, :-1])
    return h + 0.5 if dim == 2 else h


def inr_shapes(cfg: Config) -> dict[str, tuple[int, int]]:
    """The INR's layers: name -> (in, out), without the inputs that cfg.local adds to the first."""
    widths = [2 * COORD_DIM[cfg.task] * cfg.freqs] + [cfg.inr_width] * (cfg.inr_depth - 1)
    names = [f"wb{i}" for i in range(cfg.inr_depth)]
    if cfg.task == "nvs":
        names[-1] = "rgb_density_fc"
    return dict(zip(names, zip(widths, widths[1:] + [cfg.out_dim])))


class TransINR(nn.Module):
    """A Transformer over data tokens and learned weight tokens writes an MLP ([1] Sec. 3).

    cfg.local: the MLP's inputs are hat functions, too, one for every data token, around its place;
    the token writes this row of the first layer (deviates: [1] has Fourier features only).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.shapes = inr_shapes(cfg)
        self.tokenizer = Tokenizer(cfg)
        self.n_tokens = [min(cfg.groups, out) for _, out in self.shapes.values()]
        self.wtokens = nn.Parameter(torch.randn(sum(self.n_tokens), cfg.dim))
        self.transformer = nn.Sequential(*(Block(cfg) for _ in range(cfg.depth)))
        self.heads = nn.ModuleDict({name: self.head(n) for name, (n, _) in self.shapes.items()})
        self.base = nn.ParameterDict({name: torch.empty(n + 1, out)
                                      for name, (n, out) in self.shapes.items()})
        for wb in self.base.values():  # a linear layer's usual start, the bias as one more input
            nn.init.uniform_(wb, -(wb.shape[0] - 1) ** -0.5, (wb.shape[0] - 1) ** -0.5)
        if cfg.identity_init:
            for head in self.heads.values():
                nn.init.normal_(head[1].weight, std=0.06 * cfg.dim**-0.5)
                nn.init.ones_(head[1].bias)
        freqs = frequencies(COORD_DIM[cfg.task], cfg.freqs, cfg.freq_top)
        self.register_buffer("freqs", freqs, persistent=False)
        self.register_buffer("line", token_line(cfg) if cfg.local else None, persistent=False)
        self.rows = self.head(next(iter(self.shapes.values()))[1]) if cfg.local else None

    def head(self, n: int) -> nn.Sequential:
        """What a layer's tokens go through to be n weights."""
        return nn.Sequential(nn.LayerNorm(self.cfg.dim), nn.Linear(self.cfg.dim, n))

    def encode(self, context: dict) -> dict[str, Tensor]:
        """Context -> the INR's weights {layer: (B, in + 1, out)}, the bias in the last row."""
        data = self.tokenizer(context)  # (B, T, D)
        tokens = torch.cat((data, self.wtokens.expand(data.shape[0], -1, -1)), 1)
        data, *layers = self.transformer(tokens).split([data.shape[1], *self.n_tokens], 1)
        code = {name: self.write(name, t) for name, t in zip(self.shapes, layers)}
        if self.rows is not None:  # after the rows of the Fourier features
            name, wb = next(iter(code.items()))
            code[name] = torch.cat((wb[:, :-1], self.rows(data).to(wb.dtype), wb[:, -1:]), 1)
        return code

    def write(self, name: str, tokens: Tensor) -> Tensor:
        """One layer from its tokens (B, g, D): column c is normalize(W[:, c] x_{c mod g})."""
        n, out = self.shapes[name]
        x = self.heads[name](tokens).transpose(1, 2)  # (B, in, g)
        base, bias = self.base[name][:n], self.base[name][n:]
        w = F.normalize(base * x.repeat(1, 1, out // x.shape[2]), dim=1)  # (B, in, out)
        return torch.cat((w, bias.expand(len(w), -1, -1).to(w.dtype)), 1)

    def evaluate(self, code, query, eps=None, z=None):
        """The field at the query's points: raw (B, K, C), points (B, K, .), z_vals or None."""
        points, z_vals = query_points(self.cfg, query)
        return inr(code, points, self.freqs, self.line), points, z_vals

    def decode(self, code: dict, query: dict, eps=None, z=None) -> Prediction:
        """Code and query -> values (B, M, C); a TransINR has no latents: eps and z are ignored."""
        return readout(self.cfg, *self.evaluate(code, query))


# ------------------------------------------------------------------------- VNP


class ModLinear(nn.Module):
    """Linear layer modulated by a style and demodulated: StyleGAN2's 1 x 1 ([2] Sec. 3.3)."""

    def __init__(self, n_in: int, n_out: int, style: int, active: bool, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * scale)
        self.modulation = nn.Linear(style, n_in)
        nn.init.normal_(self.modulation.weight)
        nn.init.ones_(self.modulation.bias)
        self.bias = nn.Parameter(torch.zeros(n_out)) if active else None

    def forward(self, x, style):  # (B, K, in), (B, 1, style)
        m = self.modulation
        s = F.linear(style, m.weight * m.in_features**-0.5, m.bias)  # (B, 1, in)
        w = self.weight * self.weight.shape[1] ** -0.5  # W' = w s, without writing it for each B
        demodulation = torch.rsqrt(F.linear(s.square(), w.square()) + 1e-8)  # (B, 1, out)
        x = F.linear(x * s, w) * demodulation
        return x if self.bias is None else F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Gaussian(NamedTuple):
    """A diagonal normal distribution of a latent, both (B, 1, Z)."""

    mean: Tensor
    std: Tensor


def kl_divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) summed over the latent's dimensions, (B,)."""
    ratio = (q.std / p.std).square()
    shift = ((q.mean - p.mean) / p.std).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum((1, 2))


class LatentBlock(nn.Module):
    """One modulated MLP block with its own global latent ([2] Sec. 3.3)."""

    def __init__(self, cfg: Config):
        super().__init__()
        hid, seen = cfg.hidden, min(VALUE_DIM[cfg.task], 3)  # a density is seen only as color
        self.value = mlp(cfg.dim, hid, hid, VALUE_DIM[cfg.task])
        self.prior_in, self.prior_out = mlp(seen, hid, hid), mlp(hid, hid, 2 * cfg.latent)
        self.post_in, self.post_out = mlp(2 * seen, hid, hid), mlp(hid, hid, 2 * cfg.latent)
        self.style = mlp(cfg.latent, hid, hid)
        self.unmod = mlp(2 * cfg.dim, hid, cfg.dim)
        self.mod1 = ModLinear(cfg.dim, hid, hid, active=True)
        self.mod2 = ModLinear(hid, cfg.dim, hid, active=False, scale=6**-0.5)

    def forward(self, f, e, z):  # (B, K, D), (B, K, D), (B, 1, Z)
        style = self.style(z)
        f = f + self.unmod(torch.cat((e, f), -1))
        return f + self.mod2(self.mod1(f, style), style)

    def distribution(self, value, target=None, weight=None) -> Gaussian:
        """Prior from values (B, M, C), or posterior from them and the true ones, in fp32.

        weight (B, M, 1): which of the set take part in its mean; an empty set has mean 0.
        """
        x = value if target is None else torch.cat((value, target), -1)
        h = self.prior_in(x) if target is None else self.post_in(x)
        if weight is None:
            h = h.mean(1, keepdim=True)
        else:
            h = (h * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        h = (self.prior_out if target is None else self.post_out)(h)
        mean, s = full(h).chunk(2, -1)
        return Gaussian(mean, 0.1 + 0.9 * torch.sigmoid(s))


class VNP(nn.Module):
    """Bottleneck encoder and hierarchical latent modulated decoder ([2] Sec. 3)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = Tokenizer(cfg)
        self.transformer = nn.Sequential(*(Block(cfg) for _ in range(cfg.depth)))
        self.embed = mlp(2 * COORD_DIM[cfg.task] * cfg.freqs, cfg.dim, cfg.dim)
        self.cross = nn.ModuleList(CrossBlock(cfg) for _ in range(cfg.cross_depth))
        self.enhance = mlp(cfg.dim, cfg.dim, cfg.dim)
        self.blocks = nn.ModuleList(LatentBlock(cfg) for _ in range(cfg.blocks))
        self.head = mlp(cfg.dim, cfg.dim, cfg.out_dim)
        freqs = frequencies(COORD_DIM[cfg.task], cfg.freqs, cfg.freq_top)
        self.register_buffer("freqs", freqs, persistent=False)
        self.register_buffer("line", token_line(cfg) if cfg.local else None, persistent=False)
        self.spread = nn.Linear(cfg.dim, cfg.dim * cfg.upsample**2) if cfg.upsample > 1 else None
        pool = None  # places (K, 1) that the prior is pooled over, whatever the context
        if cfg.latent_pool == "tokens":
            pool = token_line(cfg)[cfg.pool_every // 2 :: cfg.pool_every, None]
        self.register_buffer("pool", pool, persistent=False)

    def encode(self, context: dict) -> dict[str, Tensor]:
        """Context -> tokens (B, T, D), and its positions where the prior is pooled over them."""
        code = {"tokens": self.transformer(self.tokenizer(context))}
        if self.cfg.latent_pool == "context":
            query, _, weight = observations(self.cfg, context, every=self.cfg.pool_every)
            code |= {f"pool_{k}": v for k, v in query.items()} | {"pool_weight": weight}
        return code

    def latents(self, code: dict, query: dict, eps=None, target=None, samples: int = 1):
        """Draw the L latents once: z (L, B, 1, Z), and the KL divergence summed over them, (B,).

        From the prior, with KL 0, or from the posterior where `target` values (B, M, C) are given.
        eps (L, B, 1, Z): unit Gaussian noise, None: the mean. samples > 1: that many draws for
        each signal side by side, here and in decode: eps and z (L, B samples, 1, Z).
        """
        return self.walk(code, query, eps, target, samples)[:2]

    def decode(self, code: dict, query: dict, eps=None, z=None, samples: int = 1) -> Prediction:
        """Values (B, M, C) at the query, with latents z, or with those that noise eps gives."""
        return readout(self.cfg, *self.evaluate(code, query, eps, z, samples))

    def evaluate(self, code, query, eps=None, z=None, samples: int = 1):
        """The field at the query's points: raw (B, K, C), points (B, K, .), z_vals or None."""
        if z is None:
            z, _ = self.latents(code, query, eps, samples=samples)
        points, z_vals = query_points(self.cfg, query)
        f, e = self.features(code["tokens"], points, samples)
        for block, zl in zip(self.blocks, z):
            f = block(f, e, zl)
        return self.head(f), repeat(points, samples), repeat(z_vals, samples)

    def elbo(self, code: dict, query: dict, target: Tensor, eps: Tensor):
        """Prediction under the posterior, and its KL divergence (B,): both terms of the ELBO."""
        _, kl, f, place = self.walk(code, query, eps, target)
        return readout(self.cfg, self.head(f), *place), kl

    def features(self, tokens, points, samples: int = 1) -> tuple[Tensor, Tensor]:
        """What the points read from the tokens and their embedding, both (B samples, K, D)."""
        e = self.embed(positional_encoding(points, self.freqs)).expand(len(tokens), -1, -1)
        f = torch.zeros_like(e) if self.line is None else self.surroundings(tokens, points)
        for block in self.cross:
            f = block(f, e, tokens)
        return repeat(self.enhance(f), samples), repeat(e, samples)

    def surroundings(self, tokens, points):
        """What lies around the points, (B, K, D): tokens, linearly interpolated (cfg.local).

        cfg.upsample = u > 1: not the tokens, but the u x u places that each is spread to.
        """
        if self.spread is None:
            return around(points, self.line) @ tokens
        side = (self.cfg.side, self.cfg.side)
        places = self.spread(tokens).mT.unflatten(2, side)  # (B, D u u, n, n)
        places = F.pixel_shuffle(places, self.cfg.upsample).flatten(2).mT  # (B, n u n u, D)
        return interpolate(places, points, self.line)

    def walk(self, code, query, eps=None, target=None, samples: int = 1):
        """Go through the blocks and draw each latent: z, KL, the query's last features and place.

        The prior is pooled over the context (or what cfg.latent_pool says), the posterior over the
        targets. The points of both go through the blocks together, with the latents drawn so far.
        """
        places, weight, tokens = [], None, code["tokens"]  # points (B, K, .) and z_vals of each
        if self.cfg.latent_pool == "context":
            pool = {k[5:]: v for k, v in code.items() if k.startswith("pool_")}
            weight = repeat(pool.pop("weight").unsqueeze(-1), samples)  # (B, N, 1)
            places.append(query_points(self.cfg, pool))
        elif self.pool is not None:
            places.append((self.pool.unsqueeze(0), None))
        if target is not None or not places:
            places.append(query_points(self.cfg, query))
        points = torch.cat([p.expand(len(tokens), -1, -1) for p, _ in places], 1)
        f, e = self.features(tokens, points, samples)
        sizes = [p.shape[1] for p, _ in places]
        places = [tuple(repeat(v, samples) for v in place) for place in places]
        zs, kl = [], tokens.new_zeros(len(f))
        for i, block in enumerate(self.blocks):
            values = [readout(self.cfg, raw, *place).mean
                      for raw, place in zip(block.value(f).split(sizes, 1), places)]
            latent = prior = block.distribution(values[0], weight=weight)
            if target is not None:
                latent = block.distribution(values[-1], target)
                kl = kl + kl_divergence(latent, prior)
            zs.append(latent.mean if eps is None else latent.mean + latent.std * eps[i])
            f = block(f, e, zs[-1])
        return torch.stack(zs), kl, f[:, -sizes[-1]:], places[-1]


def repeat(x: Tensor | None, samples: int) -> Tensor | None:
    """Every signal of a batch `samples` times, side by side."""
    return x if x is None or samples == 1 else x.repeat_interleave(samples, 0)


def build(cfg: Config) -> nn.Module:
    """The model that a config describes, with fresh weights from the global generator."""
    return (TransINR if cfg.model == "transinr" else VNP)(cfg)


# ------------------------------------------------------------------------- processes


@contextlib.contextmanager
def processes(device: str, patience: float = 600.0):
    """Join the processes that torchrun started, if it did; only the first one prints and writes.

    Tensors of a CPU are exchanged by gloo, of a GPU by nccl, each process on a GPU of its own. A
    process that waits `patience` seconds in vain for the others gives up.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                            timeout=timedelta(seconds=patience))
    rank, _ = world()
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                null = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(null))
            yield
        dist.barrier()  # none leaves while another still asks for it
    finally:
        gc.collect()  # what outlives the group, as DistributedDataParallel, aborts at the exit
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """This process's number, and how many take part."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this is the process that writes."""
    return world()[0] == 0


def neighbours() -> int:
    """How many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share(n: int) -> slice:
    """This process's part of n signals: the parts are equal and do not overlap."""
    rank, size = world()
    return slice(n * rank // size, n * (rank + 1) // size)


def dealt(items) -> Iterator:
    """(i, item) for every item that is this process's turn: number `rank` of every `size`."""
    rank, size = world()
    return itertools.islice(enumerate(items), rank, None, size)


def gathered(rows: list) -> list:
    """The (i, ...) rows of all processes in the order of i: what one process alone would have."""
    parts = [rows]
    if dist.is_initialized():
        parts = [None] * world()[1]
        dist.all_gather_object(parts, rows)
    return sorted(itertools.chain(*parts), key=lambda row: row[0])


def agreed(*values: float) -> list[float]:
    """The largest of every process's values, the same in all of them."""
    if not dist.is_initialized():
        return list(values)
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def told(value):
    """The first process's value, in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


# ------------------------------------------------------------------------- data: files and images


class Tree:
    """The files of a folder or of a zip, by sorted relative names; a zip is read in place."""

    def __init__(self, path):
        self.path = Path(path)
        if self.path.is_dir():
            self.zip = None
            files = (p for p in self.path.rglob("*") if p.is_file())
            self.names = sorted(p.relative_to(self.path).as_posix() for p in files)
        elif zipfile.is_zipfile(self.path):
            try:
                self.zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, ValueError, RuntimeError, struct.error) as e:
                raise ValueError(f"{path}: a broken zip ({e}); copy it again") from e
            self.names = sorted(n for n in self.zip.namelist() if not n.endswith("/"))
        else:
            raise ValueError(f"{path}: no such folder or zip; --data takes one of them")
        self.known = set(self.names)
        self.folders = {n.split("/")[0] for n in self.names if "/" in n}

    def read(self, name: str) -> bytes:
        """A file's bytes. Errors: OSError or ValueError with the reason; nothing is unpacked."""
        size = self.zip.getinfo(name).file_size if self.zip else (self.path / name).stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"{name}: {size:,} bytes are more than the {MOST_BYTES:,} that a file"
                             " of a set may have")
        try:
            return self.zip.read(name) if self.zip else (self.path / name).read_bytes()
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error) as e:
            raise ValueError(f"{name}: broken in {self.path} ({e})") from e


MOST_BYTES, MOST_PIXELS = 1 << 28, 1 << 27  # of a file and a picture of a data set
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def free_memory() -> float:
    """Bytes of memory that are free; where a system does not say, all there are, or infinity."""
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def decode_image(data: bytes, size: int, least: int = 1, crop: bool = True) -> np.ndarray:
    """Encoded picture -> (H, W, 3) uint8, upright, transparency on white, 16 bits as 8.

    The shorter side becomes `size`, and the centre is cropped to a square. Errors: ValueError for
    fewer than `least` pixels a side or too many in all, and for what pillow cannot read.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.size[0] * picture.size[1] > MOST_PIXELS:
            raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels are more than the "
                             f"{MOST_PIXELS:,} that are read")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except Exception as e:  # pillow's plugins raise whatever the bytes provoke
        raise ValueError(str(e) or type(e).__name__) from e
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if min(picture.size) < least:
        raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels are fewer than the {least}"
                         f" x {least} patches that the model reads; give a larger picture")
    width, height = (max(size, round(n * size / min(picture.size))) for n in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if crop:
        x, y = (width - size) // 2, (height - size) // 2
        picture = picture.crop((x, y, x + size, y + size))
    return np.array(picture)


def read_all(names: list[str], read, what: str) -> list:
    """read(name) for all names, in threads; a string result is the reason why one is left out."""
    with ThreadPoolExecutor() as pool, click.progressbar(
            pool.map(read, names), len(names), f"reading {len(names)} {what}") as results:
        items = list(results)
    broken = [item for item in items if isinstance(item, str)]
    for reason in broken[:10]:
        click.echo(f"left out: {' '.join(reason.split())}")
    if len(broken) == len(items):
        raise ValueError(f"none of {len(names)} {what} could be read; the first: {broken[0]}")
    if broken:
        click.echo(f"{len(broken)} of {len(names)} {what} are unreadable and left out")
    return [item for item in items if not isinstance(item, str)]


def draws(n: int, batch: int, seed: int, step: int, odds: Tensor | None = None) -> list[int]:
    """Indices of a step's batch: epoch after epoch, each a permutation given by (seed, epoch).

    odds (n,): drawn with these instead, a signal once a step as long as there are enough.
    """
    if odds is not None:
        return odds.multinomial(batch, batch > n, generator=generator(seed, step, 11)).tolist()
    first, out = step * batch, []
    while len(out) < batch:
        epoch, offset = divmod(first + len(out), n)
        order = torch.randperm(n, generator=generator(seed, epoch, 1))
        out += order[offset : offset + batch - len(out)].tolist()
    return out


def generator(*key: int) -> torch.Generator:
    """A generator of its own for every key: a draw depends on (seed, step) and on nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def own_generators(cfg: Config, step: int) -> list[torch.Generator]:
    """One for every signal of this process's part of a step's batch, however many take part."""
    return [generator(cfg.seed, step, 8, j) for j in range(cfg.batch_size)[share(cfg.batch_size)]]


def to_device(x, device):
    """A tensor, or a dict of tensors, on `device`; a copy to a GPU does not wait."""
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    return x.to(device, non_blocking=True)


CELEBA = {"train": (1, 162770), "val": (162771, 182637), "test": (182638, 202599)}  # ids


class ImageData(torch.utils.data.Dataset):
    """Pictures as signals: the context is a picture, or some of its pixels, the target its pixels.

    Recognises CelebA (`img_align_celeba/`, official split by id), trees with `train/` and `test/`
    or `val/`, and any other tree of pictures (a tenth of the names, by their crc32, is for test).
    Pictures are decoded once and kept as uint8, or read by workers where they don't fit in memory.
    """

    def __init__(self, cfg, path=None, split="train", limit=0):
        self.cfg, self.crop = cfg, cfg.random_crop and split == "train"
        self.tree = Tree(path or DATA / "emoji64.zip")
        self.names = self.select(split)[: limit or None]
        if not self.names:
            raise ValueError(f"{self.tree.path}: no pictures ({' '.join(IMAGE_SUFFIXES)}) for the "
                             f"{split} split; give a folder or zip with at least two")
        size = len(self.names) * 3 * cfg.image_size**2 * (1.5 if self.crop else 1)
        self.pixels, self.side = None, (cfg.image_size, cfg.image_size)
        if size * neighbours() < 0.5 * free_memory():
            items = read_all(self.names, self.read, "pictures")
            self.pixels = items if self.crop else torch.stack(items)  # (n, 3, S, S)

    def select(self, split):
        names = [n for n in self.tree.names if n.lower().endswith(IMAGE_SUFFIXES)]
        celeba = [n for n in names if "img_align_celeba/" in n]
        if celeba:
            first, last = CELEBA[split]
            return [n for n in celeba if first <= int(Path(n).stem) <= last]
        if "train" in self.tree.folders:
            held_out = next((f for f in (split, "test", "val") if f in self.tree.folders), split)
            return [n for n in names if n.startswith(held_out + "/")]
        order = sorted(names, key=lambda n: zlib.crc32(n.encode()))
        tenth = -(-len(order) // 10)
        return sorted(order[tenth:] if split == "train" else order[:tenth])

    def read(self, name):  # -> (3, H, W) uint8, or why it can't be read
        size = self.cfg.image_size
        try:
            data = self.tree.read(name)
            pixels = decode_image(data, size, size // self.cfg.patch, crop=not self.crop)
        except (OSError, ValueError) as e:
            return f"{name} ({e})"
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def __len__(self):
        return len(self.names if self.pixels is None else self.pixels)

    def __getitem__(self, key):  # (index, seed of the crop) -> (3, S, S) uint8
        i, seed = key
        image = self.read(self.names[i]) if self.pixels is None else self.pixels[i]
        if self.crop and not isinstance(image, str):
            side, gen = self.cfg.image_size, generator(seed, i, 2)
            y, x = (int(torch.randint(n - side + 1, (), generator=gen)) for n in image.shape[1:])
            image = image[:, y : y + side, x : x + side]
        return image

    def pictures(self, start=0):
        """Endless batches of pictures (B, 3, S, S) uint8, from this step on."""
        cfg, n, mine = self.cfg, len(self), share(self.cfg.batch_size)
        keys = ([(i, step) for i in draws(n, cfg.batch_size, cfg.seed, step)[mine]]
                for step in itertools.count(start))
        if self.pixels is None:
            loader = torch.utils.data.DataLoader
            workers = max(1, os.cpu_count() // neighbours())
            batches = loader(self, batch_sampler=keys, num_workers=workers, collate_fn=list)
        else:
            batches = ([self[k] for k in key] for key in keys)
        for images in batches:
            for reason in (v for v in images if isinstance(v, str)):
                raise ValueError(f"{reason}: it was readable when the run began; restore it and "
                                 "go on with --resume")
            yield torch.stack(images)

    def batches(self, device, start=0):
        """Endless training batches (context, query, target) from this step on."""
        cfg = self.cfg
        grid = pixel_grid(cfg.image_size, cfg.image_size, device)  # (H W, 2)
        for step, image in enumerate(self.pictures(start), start):
            gens = own_generators(cfg, step)
            image = image.to(device, non_blocking=True).float() / 255
            if cfg.flip:
                flip = torch.stack([torch.rand(1, 1, 1, generator=g) for g in gens]) < 0.5
                image = torch.where(flip.to(device), image.flip(-1), image)
            pixels = torch.randperm(len(grid), generator=generator(cfg.seed, step, 3))
            pixels = pixels[: cfg.queries or None].to(device)  # the same of every picture
            target = image.flatten(2)[..., pixels].transpose(1, 2)  # (B, M, 3)
            yield self.context(image, gens), {"coords": grid[pixels][None]}, target

    def context(self, image, gens, fraction=None):
        """The picture, with a mask of the seen pixels where the model reads parts of pictures."""
        if not self.cfg.masked:
            return {"image": image}
        (low, high), masks = (fraction, fraction) if fraction else self.cfg.context, []
        for gen in gens:  # one for every picture
            part = low + (high - low) * torch.rand((), generator=gen)
            masks.append(torch.rand(1, *image.shape[2:], generator=gen) < part)
        return {"image": image, "mask": torch.stack(masks).to(image)}

    def tests(self, device, only=None, batch=32):
        """All pictures or `only` some: (context, query, target (B, 1, H W, 3), label)."""
        only = only or range(len(self))
        grid = pixel_grid(*self.side, device)[None]
        for fraction in ((0.3, 0.1, 0.5, 1.0) if self.cfg.masked else (1.0,)):
            for i in range(0, len(only), batch):
                image = torch.stack([self[k, 0] for k in only[i : i + batch]])
                image = image.to(device).float() / 255
                gens = [generator(0, k) for k in only[i : i + batch]]
                yield (self.context(image, gens, fraction), {"coords": grid},
                       image.flatten(2).transpose(1, 2).unsqueeze(1), f"{fraction:.0%} seen")


# ------------------------------------------------------------------------- data: scenes


def read_scene(tree: Tree, folder: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One `transforms.json` scene: images (V, 3, H, W) uint8, poses (V, 3, 4), focals (V, 2).

    Pictures are put on white and resized so that the shorter side has `size` pixels. Errors:
    ValueError naming file and remedy.
    """
    name = f"{folder}/transforms.json" if folder else "transforms.json"
    try:
        meta = json.loads(tree.read(name))
        angle, frames = float(meta["camera_angle_x"]), meta["frames"]
        poses = torch.tensor([f["transform_matrix"] for f in frames], dtype=torch.float64)
        poses = poses[:, :3, :4]
        files = [str(f["file_path"]) for f in frames]
    except (KeyError, TypeError, ValueError, IndexError, OSError, ArithmeticError, RuntimeError,
            AttributeError) as e:
        raise ValueError(f"{name}: malformed ({e!r}); it needs camera_angle_x (rad) and frames of "
                         "file_path and transform_matrix (4 x 4, camera-to-world)") from e
    if poses.shape != (len(files), 3, 4) or not files or not 1e-3 < angle < math.pi - 1e-3:
        raise ValueError(f"{name}: {len(files)} frames, poses {tuple(poses.shape)}, camera_angle_x"
                         f"={angle:g}; it needs a 4 x 4 matrix a frame and an angle in (0, pi)")
    if not bool((poses[..., 3].abs() < 1e6).all()):
        raise ValueError(f"{name}: a camera is 10^6 or more away, or nowhere; scale the scene so "
                         "that the object has a size of about 1")
    r = poses[..., :3]
    off = (r @ r.mT - torch.eye(3, dtype=r.dtype)).abs().amax((1, 2)) + (r.det() - 1).abs()
    if not bool((off < 1e-3).all()):
        raise ValueError(f"{name}: the pose of frame {int((~(off < 1e-3)).nonzero()[0])} is not a "
                         "rotation; remove scale and reflection from transform_matrix")
    images = []
    for file in files:
        path = posixpath.normpath(posixpath.join(folder, file))
        path = next((path + s for s in ("", *IMAGE_SUFFIXES) if path + s in tree.known), None)
        if path is None:
            raise ValueError(f"{name}: picture {file} is named there but absent; restore it or "
                             "remove its frame")
        images.append(decode_image(tree.read(path), size, crop=False))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path}: {images[-1].shape[:2]} pixels, the scene's first view has "
                             f"{images[0].shape[:2]}; all views of a scene must be of one size")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    focal = 0.5 * images.shape[-1] / math.tan(0.5 * angle)  # in pixels; pixels are square
    return images, poses.float(), torch.full((len(files), 2), focal)


class SceneData:
    """Objects seen from many posed views: context and targets are views of the same object.

    Reads the ShapeNet renders of both papers (`<class>/<id>/transforms.json`, split by
    `<class singular>_splits.json`) and any other tree of `transforms.json` scenes (a tenth of
    the folders, by their crc32, is for test). All views are kept in memory as uint8.
    """

    def __init__(self, cfg, path=None, split="train", limit=0):
        self.cfg = cfg
        self.tree = Tree(path or DATA / "furniture64.zip")
        self.folders = self.select(split)[: limit or None]
        if not self.folders:
            raise ValueError(f"{self.tree.path}: no scene (a folder with transforms.json) for the "
                             f"{split} split")
        read = functools.partial(read_scene, self.tree, size=cfg.image_size)
        scenes = read_all(self.folders, read, "scenes")
        need = cfg.views + 1
        for folder, (images, *_) in zip(self.folders, scenes):
            if len(images) < need:
                raise ValueError(f"{folder}: {len(images)} views, fewer than the {cfg.views} of "
                                 "--views and one target")
            if images.shape[1:] != scenes[0][0].shape[1:]:
                raise ValueError(f"{folder}: views of {tuple(images.shape[2:])} pixels, others of "
                                 f"{tuple(scenes[0][0].shape[2:])}; give scenes of one shape")
        self.counts = [min(len(s[0]), cfg.train_views or len(s[0])) for s in scenes]
        self.sizes = [len(s[0]) for s in scenes]
        self.first = list(itertools.accumulate([0] + self.sizes[:-1]))
        self.images, self.poses, self.focals = (torch.cat(x) for x in zip(*scenes))
        self.side = tuple(self.images.shape[-2:])
        self.pixels = math.prod(self.side)
        self.odds = None
        if cfg.balance:
            classes = [folder.split("/")[0] for folder in self.folders]
            sizes = Counter(classes)
            self.odds = torch.tensor([sizes[c] ** -cfg.balance for c in classes])

    def __len__(self):
        return len(self.first)

    def select(self, split):
        names = self.tree.names
        scenes = [posixpath.dirname(n) for n in names if n.split("/")[-1] == "transforms.json"]
        splits = [read_split(self.tree, n) for n in names if n.endswith("_splits.json")]
        if not splits:
            order = sorted(scenes, key=lambda n: zlib.crc32(n.encode()))
            tenth = -(-len(order) // 10) if len(order) > 1 else 0
            return sorted(order[tenth:] if split == "train" else order[:tenth])
        chosen = {i for s in splits for i in s.get(split, ())}
        return [s for s in scenes if s.split("/")[-1] in chosen]

    def batches(self, device, start=0):
        """Endless training batches (context, query, target) from this step on.

        Every object gives `views` context views, and `queries` random rays of `target_views` other
        ones (or of as many as there are), or all of them; in the first epoch half of the random
        ones hit the object, the foreground ([1]).
        """
        cfg, n, mine = self.cfg, len(self), share(self.cfg.batch_size)
        seen, most = slice(cfg.views), min(cfg.views + cfg.target_views, *self.counts)
        rest = slice(cfg.views, most)
        for step in itertools.count(start):
            gens = own_generators(cfg, step)
            objects = draws(n, cfg.batch_size, cfg.seed, step, self.odds)[mine]
            views = torch.stack([self.first[i] + torch.randperm(self.counts[i], generator=g)[:most]
                                 for i, g in zip(objects, gens)])
            images, poses, focals = self.images[views], self.poses[views], self.focals[views]
            if cfg.augment:
                images, poses = augment_scenes(images, poses, cfg.augment, gens)
            pick = self.pick(images[:, rest], gens, step * cfg.batch_size < n)  # (B, R)
            view, pixel = cfg.views + pick // self.pixels, pick % self.pixels
            which = torch.arange(len(pick))[:, None], view
            o, d = (r.squeeze(2) for r in pixel_rays(
                poses[which], focals[which], *self.side, pixel.unsqueeze(2)))
            target = images.flatten(3)[(*which, slice(None), pixel)].float() / 255  # (B, R, 3)
            jitter = torch.stack([torch.rand(pick.shape[1], 1, generator=g) for g in gens])
            query = {"rays_o": o, "rays_d": d, "jitter": jitter}
            context = {"images": images[:, seen].float() / 255, "poses": poses[:, seen],
                       "focals": focals[:, seen]}
            yield tuple(to_device(x, device) for x in (context, query, target))

    def pick(self, images, gens, foreground: bool) -> Tensor:
        """Random pixels (B, R) of each object's views (B, V, 3, H, W), counted view by view.

        foreground: half of them are not white.
        """
        most, count = images.shape[1] * self.pixels, self.cfg.queries
        if not count:
            return torch.arange(most).expand(len(gens), most)
        if not foreground:
            return torch.stack([torch.randint(most, (count,), generator=g) for g in gens])
        hit = (images.amin(2) < 255).flatten(1).float()  # (B, V H W)
        odds = hit / hit.sum(1, keepdim=True).clamp(min=1) + 1 / most
        return torch.stack([p.multinomial(count, count > most, generator=g)
                            for p, g in zip(odds, gens)])

    def tests(self, device, only=None):
        """Every object's other views from its first ones: (context, query, target, class)."""
        cfg = self.cfg
        for i in only or range(len(self)):
            folder, first, size = self.folders[i], self.first[i], self.sizes[i]
            seen, rest = slice(first, first + cfg.views), slice(first + cfg.views, first + size)
            images = self.images[first : first + size].float() / 255
            o, d = (r.flatten(0, 2)[None] for r in
                    camera_rays(self.poses[rest], self.focals[rest], *self.side))
            context = {"images": images[None, : cfg.views], "poses": self.poses[None, seen],
                       "focals": self.focals[None, seen]}
            target = images[None, cfg.views :].flatten(3).transpose(2, 3)  # (1, V, H W, 3)
            yield (*(to_device(x, device) for x in (context, {"rays_o": o, "rays_d": d}, target)),
                   folder.split("/")[0])


def read_split(tree: Tree, name: str) -> dict:
    """A `<class>_splits.json`: {split: [folder, ...]}. Errors: ValueError naming the file."""
    try:
        split = json.loads(tree.read(name))
        return {k: [str(v) for v in ids] for k, ids in split.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{name}: malformed ({e}); it needs lists of folders by split, as "
                         '{"train": [...], "test": [...]}') from e


def augment_scenes(images, poses, how, gens):
    """Turn each scene about its vertical axis, mirror it, permute its colors, as `how` lists.

    images (B, V, 3, H, W), poses (B, V, 3, 4), world up = z, and a generator for each; returns
    both, still consistent.
    """
    batch = len(images)
    u = torch.stack([torch.rand(5, generator=g) for g in gens], 1)  # (5, B)
    angle = 2 * math.pi * u[0] * ("turn" in how)
    mirror = 1 - 2 * (u[1] < 0.5 * ("mirror" in how)).float()
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros(batch), torch.ones(batch)
    world = torch.stack((mirror * c, -s * mirror, zero, s, c, zero, zero, zero, one), -1)
    camera = torch.stack((mirror, one, one, one), -1)  # so that a mirrored pose stays a rotation
    poses = world.view(batch, 1, 3, 3) @ poses * camera[:, None, None]
    images = torch.where(mirror.view(-1, 1, 1, 1, 1) < 0, images.flip(-1), images)
    if "recolor" in how:
        order = u[2:].T.argsort(-1)
        images = images.gather(2, order.view(batch, 1, 3, 1, 1).expand_as(images))
    return images, poses


# ------------------------------------------------------------------------- data: curves

NOISE = 0.02  # standard deviation of the noise on a curve
MOST_SEEN = 46  # context points of a curve


def covariance(kernel: str, x1, x2, length, scale, period) -> Tensor:
    """Kernel matrices (B, N, M) of points (B, N, 1), (B, M, 1); hyperparameters (B, 1, 1)."""
    d = x1 - x2.transpose(1, 2)
    if kernel == "rbf":
        k = torch.exp(-0.5 * (d / length).square())
    elif kernel == "matern52":
        d = 5**0.5 * d.abs() / length
        k = (1 + d + d.square() / 3) * torch.exp(-d)
    else:
        k = torch.exp(-2 * (torch.sin(math.pi * d / period) / length).square())
    return scale.square() * k


def draw_curves(kernel: str, batch: int, points: int, gen, noise=NOISE):
    """GP samples of the protocol that neural processes share: x, y (B, N, 1) and hyperparameters.

    x U[-2, 2]; length U[0.1, 0.6], scale U[0.1, 1], period U[0.1, 0.5]; Gaussian noise; float64.
    """
    check_choice("kernel", kernel, KERNELS)
    u = torch.rand(3, batch, 1, 1, generator=gen, dtype=torch.float64)
    hyper = (0.1 + 0.5 * u[0], 0.1 + 0.9 * u[1], 0.1 + 0.4 * u[2])
    x = 4 * torch.rand(batch, points, 1, generator=gen, dtype=torch.float64) - 2
    k = covariance(kernel, x, x, *hyper) + noise**2 * torch.eye(points, dtype=torch.float64)
    white = torch.randn(batch, points, 1, generator=gen, dtype=torch.float64)
    y = torch.linalg.cholesky(k) @ white
    return x, y, hyper


def gp_posterior(kernel: str, x, y, xt, hyper, noise=NOISE):
    """Exact posterior of y at xt (B, M, 1) given (x, y) (B, N, 1): mean and std (B, M, 1)."""
    k = covariance(kernel, x, x, *hyper) + noise**2 * torch.eye(x.shape[1], dtype=x.dtype)
    cross = covariance(kernel, x, xt, *hyper)  # (B, N, M)
    factor = torch.linalg.cholesky(k)
    a = torch.linalg.solve_triangular(factor, cross, upper=False)
    b = torch.linalg.solve_triangular(factor, y, upper=False)
    var = hyper[1].square() + noise**2 - a.square().sum(1, keepdim=True).mT
    return a.mT @ b, var.clamp(min=1e-12).sqrt()


def read_csv(path) -> tuple[Tensor, Tensor]:
    """Two columns x, y of a CSV file, with or without a header: (N, 1), (N, 1) in float64."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        rows = [row for row in csv.reader(lines) if any(c.strip() for c in row)]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a CSV file ({e})") from e
    if rows and not re.match(r"\s*[-+.\d]", rows[0][0]):
        rows = rows[1:]
    for i, row in enumerate(rows, 1):
        try:
            if len(row) < 2 or not all(abs(float(c)) < 1e100 for c in row[:2]):
                raise ValueError
        except ValueError:
            raise ValueError(f"{path}: data row {i} is {','.join(row)[:80]!r}; a row is two "
                             "finite numbers x,y") from None
    if not rows:
        raise ValueError(f"{path}: no rows; a row is two finite numbers x,y")
    return tuple(torch.tensor([[float(r[i])] for r in rows], dtype=torch.float64) for i in (0, 1))


def standardise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points (..., N, 1) in the units of the training curves: x over [-2, 2], y with std 0.5."""
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    x = (4 * x - 2 * (low + high)) / (high - low).clamp(min=1e-12)
    std = y.std(-2, correction=0, keepdim=True)
    return x, (y - y.mean(-2, keepdim=True)) * 0.5 / std.clamp(min=1e-12)


class CurveData:
    """Curves drawn from Gaussian processes: endless for training, a fixed seeded set for tests.

    `path`: a CSV file x,y to test on instead: windows of 48 neighbouring points, each
    standardised, of which a random half is the context.
    """

    def __init__(self, cfg, path=None, split="train", limit=0):
        if path and split == "train":
            raise ValueError(f"--data {path}: curves for training are drawn, not read; a CSV of "
                             "x,y is for eval and render")
        self.cfg, self.limit, self.path = cfg, limit or 50, path
        self.kernels = KERNELS if cfg.kernel == "all" else (cfg.kernel,)

    def __len__(self):
        return 100_000  # "an epoch": curves are drawn, not stored

    def draw(self, kernel, batch, gen, targets=0, n=0):
        """One batch, 3 to 46 context points and fewer than 50 in all; or n, or `targets`."""
        n = n or int(torch.randint(3, MOST_SEEN + 1, (), generator=gen))
        m = targets or (int(torch.randint(3, 50 - n, (), generator=gen)) if n < MOST_SEEN else 3)
        x, y, hyper = draw_curves(kernel, batch, n + m, gen)
        return x, y, hyper, n

    def batches(self, device, start=0):
        """Endless training batches (context, query, target) from this step on.

        Where the number of targets is given, every curve has 3 to 46 context points of its own and
        a mask says which: gradients of batches that are all alike would differ more.
        """
        cfg, mine = self.cfg, share(self.cfg.batch_size)
        for step in itertools.count(start):
            gen = generator(cfg.seed, step, 3)
            kernel = self.kernels[step % len(self.kernels)]
            counts = torch.randint(3, MOST_SEEN + 1, (cfg.batch_size, 1), generator=gen)
            most = int(counts.max()) if cfg.queries else 0
            x, y, _, n = self.draw(kernel, cfg.batch_size, gen, cfg.queries, most)
            x, y = (v[mine].float() for v in (x, y))
            context = {"x": x[:, :n], "y": y[:, :n]}
            if cfg.queries:
                context["mask"] = (torch.arange(n) < counts)[mine]
            yield tuple(to_device(v, device) for v in (context, {"x": x[:, n:]}, y[:, n:]))

    def tests(self, device, batch=16):
        """Seeded sets, float64: (x, y, kernel and hyperparameters or None, context size, label).

        Every kernel by the protocol, then 30, 10 and 3 points of the same curves as the context.
        """
        if self.path:
            yield from self.windows()
            return
        for kernel in KERNELS:
            for i in range(self.limit):
                gen = generator(0, i, KERNELS.index(kernel), 4)
                x, y, hyper, n = self.draw(kernel, batch, gen)
                yield x, y, (kernel, hyper), n, kernel
        for n in (30, 10, 3):
            for i in range(-(-self.limit // 2)):
                x, y, hyper, _ = self.draw("rbf", batch, generator(0, i, 9), 19, 30)
                x, y = (torch.cat((v[:, :n], v[:, 30:]), 1) for v in (x, y))
                yield x, y, ("rbf", hyper), n, f"rbf {n} seen"

    def windows(self, points=48, splits=10):
        """The series of the CSV in windows, each split at random: as `tests`."""
        x, y = read_csv(self.path)
        if len(x) < 6:
            raise ValueError(f"{self.path}: {len(x)} rows; eval needs 6 at least")
        order, points = x[:, 0].argsort(stable=True), min(points, len(x))
        x, y = (v[order][: len(x) // points * points].view(-1, points, 1) for v in (x, y))
        x, y = standardise(x, y)
        for i in range(splits):
            pick = torch.randperm(points, generator=generator(0, i, 10))
            yield x[:, pick], y[:, pick], None, points // 2, Path(self.path).stem


DATASETS = {"image": ImageData, "nvs": SceneData, "gp": CurveData}


# ------------------------------------------------------------------------- losses and metrics


def psnr(prediction: Tensor, target: Tensor, clamp: bool = True) -> Tensor:
    """-10 log10(mse) over the last two dimensions, in dB, for values in [0, 1]."""
    prediction = prediction.clamp(0, 1) if clamp else prediction
    return -10 * (prediction.float() - target.float()).square().mean((-2, -1)).log10()


def log_likelihood(prediction: Prediction, target: Tensor) -> Tensor:
    """Gaussian log density of every value, of the targets' shape, in fp32."""
    mean, std = prediction.mean.float(), prediction.std.float()
    return -0.5 * ((target - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def objective(model, batch, eps=None, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss of a batch, and the mean squared error of its prediction (both scalars).

    Deterministic predictions: MSE ([1] Sec. 4). Gaussian: minus log-likelihood per value. VNP adds
    beta KL(q || p), per value too where Gaussian: the ELBO ([2] Eq. 5). cfg.std_power > 0 weighs
    the values by a power of their predicted std, so that certain ones don't outweigh the rest
    (deviates: Seitzer et al., 2022).
    """
    context, query, target = batch
    code, kl = model.encode(context), None
    if model.cfg.model == "vnp":
        prediction, kl = model.elbo(code, query, target, eps)
    else:
        prediction = model.decode(code, query)
    mse = (prediction.mean.float() - target).square().mean()
    if prediction.std is None:
        loss = mse
    else:
        weight = prediction.std.float().detach() ** model.cfg.std_power
        loss = -(log_likelihood(prediction, target) * weight / weight.mean()).mean()
    if kl is not None:
        loss = loss + beta * kl.mean() / (1 if prediction.std is None else target[0].numel())
    return loss, mse


def predict(model, code: dict, query: dict, z=None, chunk: int = 0, decode=None):
    """model.decode of any number of queries, in chunks of about `chunk` points, one z for all.

    chunk 0: what fits a CPU's cache, or what fills a GPU.
    """
    chunk = chunk or 1 << (14 if model.freqs.device.type == "cpu" else 18)
    if model.cfg.model == "vnp" and z is None:
        z = model.latents(code, thin(query, 1024))[0]
    per_query = query.get("points_per_ray", model.cfg.points_per_ray) if "rays_o" in query else 1
    step = chunk // int(per_query) // len(next(iter(code.values())))
    step = max(64, step - step % 64)  # whole vector registers: a cut changes no bit
    query, back = without_misses(model.cfg, query)
    parts = [(decode or model.decode)(code, part, z=z) for part in split_query(query, step)]
    return type(parts[0])(*(None if p[0] is None else torch.cat(p, 1)[:, back]
                            for p in zip(*parts)))


def without_misses(cfg: Config, query: dict):
    """The query with one of the rays that miss the bounded scene, all alike, instead of all.

    Returns it, and the place in it of every ray of the old one; all of it where nothing is empty.
    """
    if "rays_o" not in query or not cfg.radius:
        return query, slice(None)
    o, d = query["rays_o"], query["rays_d"]  # (B, R, 3)
    nearest = torch.linalg.cross(o, d).norm(dim=-1) / d.norm(dim=-1)  # to the origin
    miss = (nearest > 1.001 * cfg.radius).all(0)  # (R,)
    keep = ~miss | (miss.cumsum(0) == 1)
    back = keep.cumsum(0) - 1
    back[miss] = back[miss][:1]
    return {k: v[:, keep] if k in PER_POINT else v for k, v in query.items()}, back


PER_POINT = ("coords", "x", "rays_o", "rays_d", "jitter")  # what a query has one row a target of


def split_query(query: dict, step: int):
    """The query in pieces of `step` targets."""
    for i in range(0, max(query[k].shape[1] for k in PER_POINT if k in query), step):
        yield {k: v[:, i : i + step] if k in PER_POINT else v for k, v in query.items()}


def thin(query: dict, most: int) -> dict:
    """At most `most` evenly spaced targets of a query."""
    n = max(query[k].shape[1] for k in PER_POINT if k in query)
    return {k: v[:, :: -(-n // most)] if k in PER_POINT else v for k, v in query.items()}


# ------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def atomic(path):
    """A path beside `path` to write to; it takes `path`'s place only if all went well."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path) -> dict:
    """The dict in a checkpoint file; only tensors and plain types are ever loaded."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint; `train` writes one to runs/<task>-<model>/")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing
            if sum(i.file_size for i in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("compressed")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises whatever the bytes provoke
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}); it may be "
                         "truncated, of another program, or hold pickled objects") from e
    if not isinstance(ckpt, dict) or "model" not in ckpt:
        raise ValueError(f"{path}: not a checkpoint of tinyinr, TransINR or VNP")
    return ckpt


OFFICIAL_KEYS = (  # names in the official checkpoints, as patterns, and ours
    (r"(?:transformer_encoder|self_attn)\.layers\.(\d+)\.", r"transformer.\1."),
    (r"(transformer\.\d+)\.0\.norm", r"\1.norm1"),
    (r"(transformer\.\d+)\.1\.norm", r"\1.norm2"),
    (r"0\.fn\.to_out\.0", "out"), (r"0\.fn\.to_q", "qkv"),
    (r"1\.fn\.net\.0", "ff1"), (r"1\.fn\.net\.3", "ff2"),
    (r"tokenizer\.posemb", "tokenizer.patches.pos"),
    (r"tokenizer\.prefc", "tokenizer.patches.proj"),
    (r"base_params", "base"), (r"wtoken_postfc", "heads"),
    (r"cross_attn\.layers\.(\d+)\.", r"cross.\1."), (r"(cross\.\d+)\.0\.out_proj", r"\1.out"),
    (r"(cross\.\d+)\.0\.in_proj_", r"\1.qkv."), (r"(cross\.\d+)\.1\.", r"\1.norm1."),
    (r"(cross\.\d+)\.3\.", r"\1.norm2."), (r"2\.net\.0", "ff.0"), (r"2\.net\.3", "ff.2"),
    (r"cross_attn\.mlp_enhance", "enhance"), (r"embed_input", "embed"), (r"embed_last", "head"),
    (r"hier_model\.layers", "blocks"), (r"input_mlp", "value"), (r"unmod_mlp", "unmod"),
    (r"merge_p", "prior_in"), (r"latent_encoder_p", "prior_out"), (r"latent_decoder", "style"),
    (r"merge_q", "post_in"), (r"latent_encoder_q", "post_out"),
    (r"mod_conv1\.activate", "mod1"), (r"mod_conv1\.conv", "mod1"), (r"mod_conv2", "mod2"),
)


def from_official(name: str, args: dict, weights: dict[str, Tensor]) -> tuple[Config, dict]:
    """Config and state dict of the model in an official TransINR or VNP checkpoint."""
    check_choice("model name", name, ("trans_inr", "versatile_np"))
    tok = args["tokenizer"]["args"]
    trunk = args["transformer_encoder" if name == "trans_inr" else "self_attender"]["args"]
    sizes = dict(preset="official", dim=trunk["dim"], depth=trunk["depth"], heads=trunk["n_head"],
                 head_dim=trunk["head_dim"], ff_dim=trunk["ff_dim"], image_size=tok["input_size"],
                 patch=tok["patch_size"], padding=tok.get("padding", 0))
    if name == "trans_inr":
        net, image = args["hyponet"]["args"], args["tokenizer"]["name"] == "imgrec_tokenizer"
        cfg = Config(task="image" if image else "nvs", freqs=net["pe_dim"] // 2,
                     freq_top=1024.0 if image else 256.0, inr_depth=net["depth"],
                     inr_width=net["hidden_dim"], groups=args["n_groups"], **sizes)
    else:
        cross, hier = args["cross_attender"]["args"], args["hierarchical_model"]["args"]
        cfg = Config(task="nvs", model="vnp", freqs=args["pe_dim"] // 2, freq_top=256.0,
                     cross_depth=cross["depth"], cross_heads=cross["n_head"],
                     cross_ff=cross["ff_dim"], blocks=hier["depth"], hidden=hier["dim_hid"],
                     latent=hier["dim_lat"], latent_pool="query", **sizes)
    state = {}
    for key, value in weights.items():
        if key.endswith("noise.weight") or ".to_kv." in key:  # never used; joined to to_q below
            continue
        if ".to_q." in key:
            value = torch.cat((value, weights[key.replace("to_q", "to_kv")]))
        for pattern, ours in OFFICIAL_KEYS:
            key = re.sub(pattern, ours, key)
        if re.fullmatch(r"cross\.\d+\.qkv\.\w+", key):
            state[key.replace("qkv", "q")], value = value[: cfg.dim], value[cfg.dim :]
            key = key.replace("qkv", "kv")
        state[key] = value.squeeze(0).flatten(1) if value.dim() == 5 else value  # 1 x 1 kernels
    return cfg, state


def check_weights(cfg: Config, state: dict):
    """Raise ValueError unless `state` holds just the model's weights; takes no memory for it."""
    with torch.device("meta"):
        want = {k: tuple(v.shape) for k, v in build(cfg).state_dict().items()}
    have = {k: tuple(v.shape) for k, v in state.items()}
    for name in sorted(want.keys() ^ have.keys()):
        raise ValueError(f"weight {name} is {'missing' if name in want else 'unknown'}")
    for name, tensor in state.items():
        if have[name] != want[name]:
            raise ValueError(f"weight {name} is {have[name]}, its config asks for {want[name]}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"weight {name} claims more numbers than the file holds")


def load(path, device="cpu") -> nn.Module:
    """Model of a checkpoint, ours or an official TransINR or VNP one, in eval mode on `device`.

    Errors: ValueError with file and reason where it is no such checkpoint. Nothing that the file
    holds is executed: only tensors and plain types are read.
    """
    ckpt = read_checkpoint(path)
    try:
        if "config" in ckpt:
            cfg, state = Config(**ckpt["config"]), ckpt["model"]
        else:
            cfg, state = from_official(*(ckpt["model"][k] for k in ("name", "args", "sd")))
        check_weights(cfg, state)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            model = build(cfg)
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, AttributeError, ArithmeticError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{path}: not a checkpoint of tinyinr, TransINR or VNP ({reason})") from e
    return model.to(device).eval()


# ------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Device:
    """Every choice that depends on the device; the rest of the file names none."""

    name: str
    dtype: torch.dtype | None  # of autocast; None: everything in fp32
    fused: bool  # fused optimiser kernels
    why: str

    def autocast(self):
        return torch.autocast(self.name, self.dtype, enabled=self.dtype is not None)

    def attention(self, tokens: int):
        """Plain matrix products beat a CPU's fused kernel in bf16 at few tokens (measured)."""
        plain = self.name == "cpu" and self.dtype is not None and tokens < 400
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def keep_memory():
    """Have glibc keep what a step frees instead of handing it back page by page to the system.

    For a program's start, not for a library's: it is the whole process's. A step takes 106 instead
    of 125 ms (scenes, Zen 4).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries differ
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks ...
        libc.mallopt(-4, 0)  # ... and (M_MMAP_MAX) holds large blocks, too


def median_seconds(work, device: str, budget: float = 2.0) -> float:
    """Median time of work(): two calls to warm up, then as many as `budget` seconds allow."""
    wait, seconds = torch.cuda.synchronize if device == "cuda" else lambda: None, []
    for _ in range(2):
        work()
    while len(seconds) < 5 or sum(seconds) < budget:
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_flops(dtype, device: str, n: int = 2048, budget: float = 2.0) -> float:
    """FLOP/s of a product of two n x n matrices."""
    a = torch.ones(n, n, dtype=dtype, device=device)
    return 2 * n**3 / median_seconds(lambda: a @ a, device, budget)


@functools.cache
def bf16_gain() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16 (measured, 0.1 s)."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        return 0.0
    fp32, bf16 = (peak_flops(t, "cpu", 1024, 0.0) for t in (torch.float32, torch.bfloat16))
    return bf16 / fp32


def choose_device(name: str = "auto", precision: str = "auto") -> Device:
    """The device of that name, or the best there is, with the precision that trains fastest on it.

    precision: "fp32" or "bf16" to decide otherwise. Scores and pictures are always made in fp32.
    Errors: ValueError for an unknown name, or a device that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    check_choice("device", name, there)
    if not there[name]:
        raise ValueError(f"device={name!r}, but PyTorch finds none here; use cpu or auto")
    check_choice("precision", precision, ("auto", "fp32", "bf16"))
    if name == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    if precision != "auto":
        bf16, why = precision == "bf16", "as asked for"
    elif name == "mps":
        bf16, why = False, "autocast does not pay on this device"
    elif name == "cuda":
        bf16, why = torch.cuda.is_bf16_supported(), "what this GPU multiplies fastest"
    else:
        gain = bf16_gain()
        bf16, why = gain > 1.5, f"bf16 products are {gain:.1f} x as fast"
    return Device(name, torch.bfloat16 if bf16 else None, name != "mps",
                  f"{'bf16 autocast' if bf16 else 'fp32'}: {why}")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al., 2024).

    As torch.optim.Muon, but all matrices of a shape at once, and multiplied in `dtype`: three times
    as fast on a CPU that has no bf16 matrix units.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95, dtype=torch.float32):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                wide = p.grad.lerp(m, group["momentum"])  # Nesterov's
                wide = wide if p.shape[0] <= p.shape[1] else wide.T
                shapes.setdefault(wide.shape, []).append((p, wide))
            for pairs in shapes.values():
                u = torch.stack([wide for _, wide in pairs])
                u = (u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self.dtype)
                for _ in range(5):
                    a = u @ u.mT
                    b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
                    u = torch.baddbmm(u, b, u, beta=3.4445)
                for (p, _), wide in zip(pairs, u):
                    rows, cols = p.shape
                    p.sub_(wide if rows <= cols else wide.T,
                           alpha=group["lr"] * max(1, rows / cols) ** 0.5)


def optimizers(model: nn.Module, cfg: Config, device: Device) -> list[torch.optim.Optimizer]:
    """Adam ([1] Sec. 4), or Muon for the Transformer's matrices and AdamW for the rest.

    Every group remembers its peak learning rate as `peak`.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        hidden = cfg.muon_lr and name.startswith("transformer.") and p.dim() == 2
        (matrices if hidden else rest).append(p)
    betas = (0.9, cfg.beta2)
    out = [torch.optim.AdamW(rest, cfg.lr, betas, weight_decay=0, fused=device.fused)]
    if matrices:
        out.append(Muon(matrices, cfg.muon_lr, dtype=device.dtype or torch.float32))
    for group in (g for o in out for g in o.param_groups):
        group["peak"] = group["lr"]
    return out


def schedule(cfg: Config, step: int, progress: float) -> float:
    """Factor on the peak learning rates: warm-up, then [1]'s x 0.1 after 80 %, or linear decay."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    if cfg.decay == "step":
        return warm * (0.1 if progress >= 0.8 else 1.0)
    return warm * max(0.0, min(1.0, (1 - progress) / max(1e-9, 1 - cfg.hold)))


class Objective(nn.Module):
    """`objective` as a module: what DistributedDataParallel needs to hook its backward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return objective(self.model, *args)


class Run:
    """One training run: model, optimisers, step and time, all of it in `ckpt.pt`."""

    def __init__(self, cfg: Config, device: Device, ckpt: dict | None = None):
        self.cfg, self.device, self.step, self.elapsed = cfg, device, 0, 0.0
        torch.manual_seed(cfg.seed)
        self.model = build(cfg).to(device.name)
        if ckpt:
            self.model.load_state_dict(ckpt["model"])
            self.step, self.elapsed = int(ckpt["step"]), float(ckpt["elapsed"])
        self.optimizers = optimizers(self.model, cfg, device)
        for optimizer, state in zip(self.optimizers, ckpt["optimizers"] if ckpt else ()):
            optimizer.load_state_dict(state)
        self.objective = Objective(self.model)
        if dist.is_initialized():
            self.objective = DistributedDataParallel(self.objective)
        # The first step whose loss was not finite: looked at only to log or to save.
        self.bad = torch.full((), math.inf, device=device.name)

    def update(self, batch, progress: float) -> Tensor:
        """One optimisation step; loss and mean squared error (2,) stay on the device."""
        cfg = self.cfg
        factor = schedule(cfg, self.step, progress)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * factor
        eps, beta = None, 0.0
        if cfg.model == "vnp":
            shape = (cfg.batch_size, cfg.blocks, 1, cfg.latent)
            eps = torch.randn(shape, generator=generator(cfg.seed, self.step, 5))
            eps = eps[share(cfg.batch_size)].to(self.device.name)  # (B, L, 1, Z)
            beta = cfg.beta * min(1.0, progress / max(1e-9, cfg.beta_warmup))
        sums = self.gradients(batch, eps, beta)
        if cfg.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip)
        self.bad = torch.where(sums[0].isfinite(), self.bad, self.bad.clamp(max=self.step))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return sums

    def gradients(self, batch, eps, beta) -> Tensor:
        """Gradients of the mean loss, piece by piece; returns loss and mean squared error (2,)."""
        pieces, sums = self.cfg.accumulate, 0
        for i in range(pieces):
            piece = [part_of(v, i, pieces) for v in batch]
            noise = None if eps is None else part_of(eps, i, pieces).transpose(0, 1)
            alone = dist.is_initialized() and i < pieces - 1  # the last piece exchanges gradients
            with self.objective.no_sync() if alone else contextlib.nullcontext():
                with self.device.autocast(), self.device.attention(self.cfg.tokens):
                    loss, mse = self.objective(piece, noise, beta)
                (loss / pieces).backward()
            sums = sums + torch.stack((loss, mse)).detach() / pieces
        return sums

    def check(self):
        """Raise RunFailed if a loss was not finite since the run began, in any process."""
        bad = -agreed(-float(self.bad))[0]
        if math.isfinite(bad):
            raise RunFailed(f"the loss of step {bad:.0f} is not finite; the last good "
                            "checkpoint is kept: start again with a lower --lr")

    def save(self, path):
        """Write the checkpoint beside its place, then rename it; the first process only.

        The same run gives the same bytes: the time is kept only where it is the run's length.
        """
        self.check()
        if not leads():
            return
        state = {"format": 1, "config": asdict(self.cfg), "model": self.model.state_dict(),
                 "optimizers": [o.state_dict() for o in self.optimizers],
                 "step": self.step, "elapsed": self.elapsed if self.cfg.minutes else 0.0}
        buffer = io.BytesIO()  # so that a full disk is an OSError of ours and not torch's
        torch.save(state, buffer)
        with atomic(path) as part:
            part.write_bytes(buffer.getbuffer())


def part_of(x, i: int, pieces: int):
    """The i-th of so many pieces of a batch, or of a dict of them; what all share stays whole."""
    if isinstance(x, dict):
        return {k: part_of(v, i, pieces) for k, v in x.items()}
    n = len(x) // pieces
    return x if pieces == 1 or len(x) == 1 else x[i * n : (i + 1) * n]


class RunFailed(Exception):
    """A run that cannot go on."""


@contextlib.contextmanager
def alone_in(out: Path):
    """Keep other runs out of a folder, but on Windows; a killed run's hold on it ends with it."""
    if fcntl is None:
        yield
        return
    fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run writes to this folder; choose another --out, or "
                         "wait for its end") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(fd)


def train_run(run: Run, data, out: Path, steps: int, minutes: float):
    """Train until `steps` or `minutes` are over; log to out/log.jsonl, save to out/ckpt.pt.

    Returns the name of the signal that ended the run early, or None. The processes of a run agree
    before every step on the time, and on what to do next.
    """
    cfg, ended = run.cfg, [0]
    handlers = {s: signal.signal(s, lambda s, _: ended.append(s))
                for s in (signal.SIGINT, signal.SIGTERM)}
    start = time.monotonic() - run.elapsed
    logged, saved, first, sums = start + run.elapsed, time.monotonic(), run.step, None
    try:
        batches = data.batches(run.device.name, run.step)
        while True:
            now = time.monotonic()
            run.elapsed, log, save, stop = agreed(
                now - start, now - logged > 5, now - saved > cfg.save_every, ended[-1])
            progress = run.step / steps if steps else run.elapsed / (60 * minutes)
            over = stop or progress >= 1
            if sums is not None and (log or over):
                run.check()
                log_step(run, out, sums, now - logged, run.step - first, progress)
                logged, first, sums = now, run.step, None
            if save or over:
                run.save(out / "ckpt.pt")
                saved = now
            if over:
                return signal.Signals(int(stop)).name if stop else None
            sums = run.update(next(batches), progress) + (0 if sums is None else sums)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def log_step(run: Run, out: Path, sums: Tensor, seconds: float, steps: int, progress: float):
    """One line on the screen and one in log.jsonl, of the means over steps and processes."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, mse = (sums / steps / world()[1]).tolist()
    eta = run.elapsed * max(0.0, 1 - progress) / max(progress, 1e-9)
    row = {"step": run.step, "loss": loss, "psnr": -10 * math.log10(max(mse, 1e-12)),
           "lr": run.optimizers[0].param_groups[0]["lr"], "ms": 1000 * seconds / steps,
           "signals_per_s": run.cfg.batch_size * steps / seconds, "elapsed": run.elapsed,
           "eta": eta}
    if leads():
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
    bar = "=" * int(20 * min(1.0, progress))
    click.echo(f"[{bar:20}] step {run.step}  loss {loss:.4f}  psnr {row['psnr']:.2f} dB  "
               f"lr {row['lr']:.1e}  {row['ms']:.0f} ms  {row['signals_per_s']:.0f}/s  "
               f"eta {eta // 60:.0f}:{eta % 60:02.0f}")


# ------------------------------------------------------------------------- test-time optimisation


def optimise(model, code: dict, context: dict, steps: int, targets: int = 1024) -> dict:
    """Refine generated weights on the context itself: Adam, 1,024 rays a step ([1] Sec. 4.2).

    All signals of the batch at once; returns a new code. The learning rate is cfg.tto_lr.
    """
    if model.cfg.model != "transinr":
        raise ValueError("--tto refines generated weights and a VNP has none; use a TransINR")
    query, values, weight = observations(model.cfg, context)
    code = {k: v.detach().clone().requires_grad_() for k, v in code.items()}
    optimizer = torch.optim.Adam(code.values(), model.cfg.tto_lr)
    for step in range(steps):
        pick = torch.randperm(values.shape[1], generator=generator(step, 6))[:targets]
        pick = pick.to(values.device)
        part = {k: v[:, pick] for k, v in query.items()}
        with torch.enable_grad():
            error = (model.decode(code, part).mean - values[:, pick]).square().mean(-1)
            error = (error * weight[:, pick]).mean(1)  # (B,): signals don't mix
            grads = torch.autograd.grad(error.sum(), list(code.values()))
        for v, g in zip(code.values(), grads):
            v.grad = g
        optimizer.step()
    return {k: v.detach() for k, v in code.items()}


# ------------------------------------------------------------------------- evaluation


def nearest_filling(context: dict) -> Tensor:
    """Every pixel with the color of the nearest seen one, (B, H W, 3): a baseline."""
    image, seen = context["image"].flatten(2), context["mask"].flatten(1)  # (B, 3, H W), (B, H W)
    places = pixel_grid(*context["image"].shape[-2:], image.device)
    far = torch.cdist(places, places)  # (H W, H W)
    nearest = torch.stack([(far + 9 * (1 - m)).argmin(1) for m in seen])  # (B, H W)
    return image.gather(2, nearest[:, None].expand_as(image)).mT


@torch.no_grad()
def evaluate(model, data, device: Device, tto: int = 0, mean_image=None) -> dict:
    """Held-out PSNR by label, mean over pictures; for scenes with the trivial baselines beside.

    Returns {label: {"psnr", "psnr_unclamped", ..., "pictures"}} with the label "all" last.
    """
    parts = []
    for i, (context, query, target, label) in dealt(data.tests(device.name)):
        code = model.encode(context)
        if tto:
            code = optimise(model, code, context, tto)
        mean = predict(model, code, query).mean
        mean = mean.view(target.shape)  # (B, pictures, pixels, 3)
        scores = {"psnr": psnr(mean, target), "psnr_unclamped": psnr(mean, target, clamp=False)}
        if "mask" in context and not context["mask"].all():
            scores["nearest"] = psnr(nearest_filling(context)[:, None], target)
        if mean_image is not None:
            view = context["images"][:, :1].flatten(3).transpose(2, 3)
            scores["white"] = psnr(torch.ones_like(target), target)
            scores["mean_image"] = psnr(mean_image.to(target), target)
            scores["context_view"] = psnr(view.expand_as(target), target)
        parts.append((i, (label, "all"), scores))
    out = mean_scores(parts, "pictures")
    out["all"].pop("nearest", None)  # not every part seen has it
    return out | {"all": out.pop("all")}


def mean_scores(parts: list, counted: str) -> dict:
    """{label: {score: mean, counted: how many}} of all processes' (i, labels, {score: values})."""
    rows = {}
    parts = [(i, labels, {k: v.flatten().cpu() for k, v in s.items()}) for i, labels, s in parts]
    for _, labels, scores in gathered(parts):
        for label, (name, value) in itertools.product(labels, scores.items()):
            rows.setdefault(label, {}).setdefault(name, []).append(value)
    rows = {label: {k: torch.cat(v) for k, v in row.items()} for label, row in rows.items()}
    return {label: {k: float(v.mean()) for k, v in row.items()}
            | {counted: max(map(len, row.values()))} for label, row in rows.items()}


def mixture(prediction: Prediction, batch: int) -> Prediction:
    """Mean and std over latent samples, (B S, M, C) -> (B, M, C)."""
    mean, std = (v.unflatten(0, (batch, -1)) for v in prediction)
    return Prediction(mean.mean(1), (std.square().mean(1) + mean.var(1, correction=0)).sqrt())


def sample_curves(model, context: dict, x: Tensor, samples: int, gen) -> Prediction:
    """Predictions at x (B, M, 1), one a latent sample: (B S, M, 1); S = 1 without latents."""
    cfg, code = model.cfg, model.encode(context)
    if cfg.model != "vnp":
        return model.decode(code, {"x": x})
    eps = torch.randn(cfg.blocks, len(x) * samples, 1, cfg.latent, generator=gen).to(x)
    return model.decode(code, {"x": x}, eps, samples=samples)


def fit_gp(x, y, noises=(NOISE,)):
    """RBF hyperparameters and noise of the highest marginal likelihood on a grid, in float64.

    x, y (B, N, 1); returns (length, scale, None) and noise, each (B, 1, 1).
    """
    lengths, scales = torch.logspace(-1.2, 0.4, 14), torch.logspace(-1.2, 0.4, 10)
    grid = torch.cartesian_prod(lengths, scales, torch.tensor(noises).reshape(-1)).to(x)
    length, scale, noise = grid.view(-1, 1, 1, 1, 3).unbind(-1)  # (G, 1, 1, 1)
    k = covariance("rbf", x, x, length, scale, None)  # (G, B, N, N)
    factor = torch.linalg.cholesky(k + noise**2 * torch.eye(x.shape[1], dtype=x.dtype))
    white = torch.linalg.solve_triangular(factor, y.expand(len(grid), -1, -1, -1), upper=False)
    evidence = -0.5 * white.square().sum((2, 3)) - factor.diagonal(dim1=2, dim2=3).log().sum(2)
    length, scale, noise = grid[evidence.argmax(0), :, None, None].unbind(1)  # (B, 1, 1)
    return (length, scale, None), noise


def exact_ll(kernel, x, y, xt, yt, hyper, noise=NOISE):
    """Mean log-likelihood per target under the exact posterior of a Gaussian process."""
    return log_likelihood(Prediction(*gp_posterior(kernel, x, y, xt, hyper, noise)), yt).mean()


@torch.no_grad()
def evaluate_curves(model, data, device: Device, samples: int = 50) -> dict:
    """Target and context log-likelihood per kernel: of the model, and of exact GP posteriors.

    The model's is the log-mean-exp over latent samples, per point. gp: the true kernel, the
    ceiling; fitted_gp: an RBF kernel fitted to each context. coverage: part of the targets in the
    central 95 % interval.
    """
    parts = []
    for i, (x, y, true, n, label) in dealt(data.tests(device.name)):
        xf, yf = x.float().to(device.name), y.float().to(device.name)
        context = {"x": xf[:, :n], "y": yf[:, :n]}
        prediction = sample_curves(model, context, xf, samples, generator(i, 7))
        ll = log_likelihood(prediction, yf.repeat_interleave(len(prediction.mean) // len(x), 0))
        ll = ll.unflatten(0, (len(x), -1))
        ll = ll.logsumexp(1) - math.log(ll.shape[1])  # (B, N, 1)
        mean, std = mixture(prediction, len(x))
        scores = {"target_ll": ll[:, n:].mean(), "context_ll": ll[:, :n].mean(),
                  "coverage": ((yf - mean).abs() < 1.96 * std)[:, n:].float().mean()}
        seen = x[:, :n], y[:, :n]
        if true:
            scores["gp"] = exact_ll(true[0], *seen, x[:, n:], y[:, n:], true[1])
        noises = (NOISE,) if true else (0.02, 0.05, 0.1, 0.2, 0.4)
        scores["fitted_gp"] = exact_ll("rbf", *seen, x[:, n:], y[:, n:], *fit_gp(*seen, noises))
        parts.append((i, (label,), scores))
    return mean_scores(parts, "sets")


# ------------------------------------------------------------------------- pictures


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Values in [0, 1], clamped -> uint8 numpy array of the same shape."""
    return (pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()


def save_picture(picture: Image.Image, path, **options):
    """Write a picture beside its place, then rename it; the format is the suffix's."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown kind of picture; end the name in .png, .jpg or .gif")
    with atomic(path) as part:
        picture.save(part, format=kind, **options)


def sheet(rows: list[list[np.ndarray]], gap: int = 4) -> Image.Image:
    """Pictures (H, W, 3) uint8 of one size, in rows, on white."""
    height, width = rows[0][0].shape[:2]
    size = len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap
    out = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            out.paste(Image.fromarray(pixels), (j * (width + gap), i * (height + gap)))
    return out


def enlarge(pixels: np.ndarray, factor: int = 2) -> np.ndarray:
    return pixels.repeat(factor, 0).repeat(factor, 1)


class Rendering(NamedTuple):
    """Color (B, R, 3), depth and opacity (B, R, 1) of rays."""

    mean: Tensor
    depth: Tensor
    opacity: Tensor


def decode_depth(model, code, query, z=None) -> Rendering:
    """As model.decode for scenes, with depth and opacity."""
    color, depth, opacity = render_field(model.cfg, *model.evaluate(code, query, z=z))
    return Rendering(color, depth.unsqueeze(-1), opacity.unsqueeze(-1))


def portrait(model, context, query, target, side) -> list[Tensor]:
    """Pictures (H, W, 3) of one signal: what was seen, the truth, and the model's view of it."""
    cfg, code = model.cfg, model.encode(context)
    fold = lambda pixels: pixels[0].unflatten(0, side).expand(-1, -1, 3)
    truth = fold(target[:, 0])
    if cfg.task == "nvs":
        part = {k: v[:, : truth.shape[0] * truth.shape[1]] for k, v in query.items()}
        view = predict(model, code, part, decode=functools.partial(decode_depth, model))
        depth = (cfg.far - view.depth - (1 - view.opacity) * cfg.far) / (cfg.far - cfg.near)
        return [context["images"][0, 0].movedim(0, -1), truth, fold(view.mean), fold(depth)]
    prediction = predict(model, code, query)
    out = [truth, fold(prediction.mean)]
    if "mask" in context:
        image, mask = context["image"], context["mask"]
        out.insert(0, fold((image * mask + 1 - mask).flatten(2).mT))
    if prediction.std is not None:
        out.append(fold(prediction.std / prediction.std.max()))
    for seed in (1, 2) if cfg.model == "vnp" else ():
        eps = torch.randn(cfg.blocks, 1, 1, cfg.latent, generator=generator(seed)).to(truth)
        out.append(fold(predict(model, code, query, model.latents(code, {}, eps)[0]).mean))
    return out


@torch.no_grad()
def samples_sheet(model, data, device: Device, count: int = 12) -> Image.Image:
    """Held-out signals side by side: truth above prediction, or plots of curves."""
    if model.cfg.task == "gp":
        rows = []
        for x, y, _, n, label in itertools.islice(data.tests(device.name, 1), 6):
            held_out = (x[0, n:], y[0, n:])
            rows.append(curve_picture(model, x[0, :n].float(), y[0, :n].float(), held_out))
        return sheet([rows[:3], rows[3:]])
    only = [i * len(data) // count for i in range(count)]
    columns = []
    for context, query, target, _ in data.tests(device.name, only=only):
        for i in range(len(target)):
            c, q = ({k: v[i : i + 1] if len(v) > 1 else v for k, v in d.items()}
                    for d in (context, query))
            columns.append(portrait(model, c, q, target[i : i + 1], data.side))
    return sheet([[enlarge(to_uint8(p)) for p in row] for row in zip(*columns[:count])])


@torch.no_grad()
def curve_picture(model, x, y, held_out=None, samples: int = 5, size=(480, 320)) -> np.ndarray:
    """Plot of a context (N, 1): mean, 95 % band and latent samples on [-2, 2]."""
    width, height = size
    grid = torch.linspace(-2, 2, 256)[None, :, None].to(model.freqs)
    context = {"x": x[None].to(grid), "y": y[None].to(grid)}
    draws = sample_curves(model, context, grid, 32, generator(8))
    mean, std = (v[0, :, 0] for v in mixture(draws, 1))
    low, high = mean - 1.96 * std, mean + 1.96 * std
    values = torch.cat((low, high, y.flatten().to(low)))
    bottom, top = float(values.min()), float(values.max())
    unit = (height - 20) / max(top - bottom, 1e-6)
    at = lambda xs, ys: [(10 + (float(a) + 2) / 4 * (width - 20),
                          height - 10 - (float(b) - bottom) * unit) for a, b in zip(xs, ys)]
    picture = Image.new("RGB", size, "white")
    pen, xs = ImageDraw.Draw(picture), grid[0, :, 0]
    pen.rectangle((0, 0, width - 1, height - 1), outline="#bbbbbb")
    pen.polygon(at(xs, high) + at(xs.flip(0), low.flip(0)), fill="#d6e4f5")
    for curve in draws.mean[:samples, :, 0] if len(draws.mean) > 1 else ():
        pen.line(at(xs, curve), fill="#8fb3de")
    pen.line(at(xs, mean), fill="#1f4e8c", width=2)
    for points, color in ((held_out, "#e08a2b"), ((x, y), "black")):
        for a, b in at(*(v.flatten() for v in points)) if points else ():
            pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill=color)
    return np.asarray(picture)


def render_curve(model, x, y, width: int) -> Image.Image:
    """Plot of a series (N, 1), scaled to the training curves; of a long one several, row by row.

    Each then shows a stretch of neighbouring points, no more than a context had in training.
    """
    count = -(-len(x) // MOST_SEEN)
    stretches = x[:, 0].argsort(stable=True).tensor_split(count)
    pictures = [curve_picture(model, *standardise(x[i], y[i]), size=(width, width * 2 // 3))
                for i in stretches]
    columns = math.isqrt(count - 1) + 1
    return sheet([pictures[i : i + columns] for i in range(0, count, columns)])


def read_context(model, path) -> dict:
    """A photo as the context of a model of images, cropped to a square of the size it reads."""
    size = model.cfg.image_size
    try:
        pixels = decode_image(Path(path).read_bytes(), size, size // model.cfg.patch)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a picture that can be read ({e})") from e
    return {"image": torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.freqs) / 255}


@torch.no_grad()
def render_image(model, source, size: int, tto: int = 0) -> Image.Image:
    """A photo through the model, size x size pixels; memory grows by the picture alone."""
    cfg = model.cfg
    context = read_context(model, source)
    code = model.encode(context)
    if tto:
        code = optimise(model, code, context, tto)
    z = model.latents(code, {})[0] if cfg.model == "vnp" else None
    out, rows = np.empty((size, size, 3), np.uint8), max(1, (1 << 16) // size)
    line = pixel_grid(size, 1, model.freqs.device)[:, 0]
    for i in range(0, size, rows):
        coords = torch.cartesian_prod(line[i : i + rows], line)[None]
        values = model.decode(code, {"coords": coords}, z=z).mean
        out[i : i + rows] = to_uint8(values).reshape(-1, size, 3)
    return Image.fromarray(out)


def find_scene(source) -> tuple[Tree, str]:
    """The tree and folder of a scene; `set.zip/class/id` is a folder within a zip."""
    path = next((p for p in (Path(source), *Path(source).parents) if p.exists()), Path(source))
    return Tree(path), Path(source).relative_to(path).as_posix().strip(".")


@torch.no_grad()
def render_scene(model, tree: Tree, folder: str, size: int, frames: int = 36, tto: int = 0):
    """A turntable around an object: encode its first views, decode a circle at their elevation."""
    cfg = model.cfg
    images, poses, focals = read_scene(tree, folder, cfg.image_size)
    seen = {"images": images.float() / 255, "poses": poses, "focals": focals}
    context = to_device({k: v[None, : cfg.views] for k, v in seen.items()}, model.freqs.device)
    code = model.encode(context)
    if tto:
        code = optimise(model, code, context, tto)
    eye = poses[0, :, 3]
    radius, height = float(eye.norm()), float(eye[2])  # of the first camera
    flat, start = math.sqrt(max(radius**2 - height**2, 1e-6)), math.atan2(eye[1], eye[0])
    focals, z, pictures = focals[:1] * size / min(images.shape[-2:]), None, []
    for i in range(frames):
        angle = start + 2 * math.pi * i / frames
        pose = look_at(torch.tensor([flat * math.cos(angle), flat * math.sin(angle), height]))
        o, d = (r.flatten(0, 2)[None].to(model.freqs)
                for r in camera_rays(pose[None], focals, size, size))
        query = {"rays_o": o, "rays_d": d}
        if z is None and cfg.model == "vnp":
            z = model.latents(code, thin(query, 1024))[0]
        pixels = to_uint8(predict(model, code, query, z).mean).reshape(size, size, 3)
        pictures.append(Image.fromarray(pixels))
    return pictures


@torch.no_grad()
def attention_sheet(model, context: dict) -> Image.Image:
    """What each INR layer's weight tokens look at, and base beside generated weights ([1] Sec. 5).

    Upper row: the picture, then per layer the attention to its patches (mean over blocks, heads
    and tokens). Below, per layer: base weights, and generated ones (red positive, blue negative).
    """
    cfg, maps = model.cfg, 0
    data = model.tokenizer(context)  # (B, T, D)
    tokens = data.shape[1]
    x = torch.cat((data, model.wtokens.expand(len(data), -1, -1)), 1)
    for block in model.transformer:
        q, k, _ = (t.unflatten(-1, (cfg.heads, -1)).transpose(1, 2)
                   for t in block.qkv(block.norm1(x)).chunk(3, -1))
        weights = (q @ k.mT * cfg.head_dim**-0.5).softmax(-1).mean(1)  # over heads
        maps = maps + weights[:, tokens:, :tokens]
        x = block(x)
    image, side, height = context["image"][0].movedim(0, -1), math.isqrt(tokens), 192
    top, blank = [fit(image, height)], torch.ones(height, height, 3)
    middle, bottom = [blank], [blank]
    for (name, wb), layer in zip(model.encode(context).items(), maps[0].split(model.n_tokens)):
        heat = layer.mean(0).view(side, side, 1)
        heat = fit(heat / heat.max(), height, "nearest")
        top.append(0.25 * top[0] + 0.75 * heat * torch.tensor([1.0, 0.6, 0.2]))
        base = F.normalize(model.base[name][:-1], dim=0)
        base = F.pad(base, (0, 0, 0, wb.shape[1] - 1 - len(base)))  # rows of places have none
        for row, w in ((middle, base), (bottom, wb[0, :-1])):
            w = (w / (3 * wb[0, :-1].std())).clamp(-1, 1).unsqueeze(-1)
            row.append(fit(1 - w.clamp(min=0) * w.new_tensor([0, 1, 1]) +
                           w.clamp(max=0) * w.new_tensor([1, 1, 0]), height, "nearest"))
    return sheet([[to_uint8(p) for p in row] for row in (top, middle, bottom)])


def fit(pixels: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """(H, W, C) resized to (side, side, C)."""
    pixels = pixels.movedim(-1, 0)[None].float()
    return F.interpolate(pixels, (side, side), mode=mode)[0].movedim(0, -1)


# ------------------------------------------------------------------------- speed


def random_batch(cfg: Config, device: str):
    """Numbers of the shapes that one training step takes: context, query, target."""
    gen, b, n = torch.Generator().manual_seed(0), cfg.batch_size, cfg.image_size
    rand = lambda *shape: torch.rand(*shape, generator=gen)
    if cfg.task == "gp":
        context, m = {"x": 4 * rand(b, 24, 1) - 2, "y": rand(b, 24, 1)}, cfg.queries or 13
        query = {"x": 4 * rand(b, m, 1) - 2}
    elif cfg.task == "image":
        m = cfg.queries or n * n
        context, query = {"image": rand(b, 3, n, n)}, {"coords": 2 * rand(b, m, 2) - 1}
        if cfg.masked:
            context["mask"] = (rand(b, 1, n, n) < 0.5).float()
    else:
        m = cfg.queries or cfg.target_views * n * n
        pose, focals = look_at(torch.tensor([0.0, -4.0, 0.0])), torch.full((2,), 2.0 * n)
        context = {"images": rand(b, cfg.views, 3, n, n),
                   "poses": pose.expand(b, cfg.views, 3, 4),
                   "focals": focals.expand(b, cfg.views, 2)}
        o, d = pixel_rays(pose.expand(b, 3, 4), focals, n, n, (rand(b, m) * n * n).long())
        query = {"rays_o": o, "rays_d": d}
    target = rand(b, m, VALUE_DIM[cfg.task] if cfg.task != "nvs" else 3)
    return tuple(to_device(v, device) for v in (context, query, target))


def peak_memory(device: str) -> float:
    """Most memory that this process has held, in MiB: the GPU's, or the system's (Unix), or 0."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def bench_cell(cfg: Config, name: str) -> dict:
    """Time of a training step and its share of the machine's peak, memory, encode and decode."""
    device = choose_device(name)
    run, batch = Run(cfg, device), random_batch(cfg, device.name)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run.update(batch, 0.5)  # the counter does not know every fused kernel of attention
    step = median_seconds(lambda: run.update(batch, 0.5), device.name)
    memory = peak_memory(device.name)
    model, (context, query, _) = run.model.eval(), batch
    with torch.no_grad():
        code = model.encode(context)
        encode = median_seconds(lambda: model.encode(context), device.name)
        decode = median_seconds(lambda: model.decode(code, query), device.name)
    flops, peak = counter.get_total_flops(), peak_flops(device.dtype, device.name)
    return {"cell": f"{cfg.task}-{cfg.model}", "precision": device.why, "step_ms": 1000 * step,
            "signals_per_s": cfg.batch_size / step, "gflop": flops / 1e9,
            "share": flops / step / peak, "memory_mb": memory,
            "encode_ms": 1000 * encode / cfg.batch_size,
            "decode_per_s": cfg.batch_size * len(batch[2][0]) / decode}


# ------------------------------------------------------------------------- command line


class Commands(click.Group):
    """Errors of the user's making end in one line and exit code 2, a failed run's in 1."""

    def invoke(self, ctx):
        keep_memory()
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as e:
            self.fail(ctx, e, 2)
        except RunFailed as e:
            self.fail(ctx, e, 1)

    def fail(self, ctx, error, code):
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        ctx.exit(code)


@click.group(cls=Commands, context_settings={"max_content_width": 100})
def cli():
    """Generalizable implicit neural representations: TransINR and VNP; images, scenes, curves."""


def banner(model, cfg: Config, device: Device):
    """What is about to run: configuration, parameters by part, device and why."""
    count = lambda part: sum(p.numel() for p in part.parameters()) / 1e6
    parts = {name: count(part) for name, part in model.named_children()}
    parts["tokens"] = count(model) - sum(parts.values())
    set_fields = " ".join(f"{k}={v}" for k, v in asdict(cfg).items() if v != getattr(Config, k))
    click.echo(f"{cfg.model} on {cfg.task}, preset {cfg.preset}: {set_fields}")
    click.echo(f"{count(model):.2f} M parameters: "
               + ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v > 1e-9))
    click.echo(f"device {device.name}, {torch.get_num_threads()} threads; {device.why}")


def report(scores: dict):
    """Scores {label: {name: value}} as a table."""
    for label, row in scores.items():
        click.echo(f"{label:>12}  " + "  ".join(
            f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


@cli.command()
@click.option("--task", type=click.Choice(list(COORD_DIM)), help="[default: image]")
@click.option("--model", type=click.Choice(MODELS), help="[default: vnp for gp, else transinr]")
@click.option("--preset", default="small", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@click.option("--data", type=click.Path(), help="Folder or zip; default: the bundled set.")
@click.option("--steps", type=click.IntRange(1), help="Length of the run in steps,")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="or in minutes.")
@click.option("--batch-size", type=click.IntRange(1), help="Signals a step, of all processes.")
@click.option("--accumulate", type=click.IntRange(1), help="Pieces a batch is worked off in.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--seed", type=int)
@click.option("--views", type=click.IntRange(1), help="nvs: context views.")
@click.option("--context", type=float, nargs=2, help="image: range of the part of pixels seen.")
@click.option("--set", "extra", multiple=True, metavar="NAME=VALUE", help="Any field of Config.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps or auto.")
@click.option("--precision", default="auto", show_default=True, help="fp32, bf16 or auto.")
@click.option("--out", type=click.Path(), help="Folder of the run.  [default: runs/TASK-MODEL]")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--smoke", is_flag=True, help="A few steps on a few signals, to see that all works.")
def train(task, model, preset, data, extra, device, precision, out, resume, smoke, **options):
    """Train a model; writes ckpt.pt, log.jsonl and samples.png to --out."""
    if options["steps"] and options["minutes"]:
        raise ValueError("--steps and --minutes exclude each other; give one")
    if options["steps"]:
        options["minutes"] = 0.0
    if options["minutes"]:
        options["steps"] = 0
    given = {k: v for k, v in options.items() if v is not None} | parse_fields(extra)
    if smoke:
        given = {"steps": 3, "minutes": 0.0, "batch_size": 2} | given
    cfg = make_config(preset, task, model, **given)
    out = Path(out or f"runs/{cfg.task}-{cfg.model}" + "-smoke" * smoke)
    device = choose_device(device, precision)
    with processes(device.name):
        start_run(cfg, device, data, out, resume, 2 if smoke else 0)


def start_run(cfg: Config, device: Device, data, out: Path, resume: bool, limit: int):
    """One process's part of a run in the folder `out`; limit: so many signals, 0: all."""
    parts, ckpt = world()[1] * cfg.accumulate, None
    if cfg.batch_size % parts:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of processes x "
                         f"accumulate = {parts}; try {-(-cfg.batch_size // parts) * parts}")
    with contextlib.ExitStack() as stack:
        if leads():
            ckpt = open_run(cfg, out, resume)
            stack.enter_context(alone_in(out))
        ckpt = told(ckpt)
        sets = [DATASETS[cfg.task](cfg, data, split, limit) for split in ("train", "test")]
        try:
            run = Run(cfg, device, ckpt)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"{out}: the run cannot be resumed ({reason}); train anew") from e
        if leads():
            tidy(out, run.step)
        banner(run.model, cfg, device)
        train_and_score(run, *sets, out)


def open_run(cfg: Config, out: Path, resume: bool) -> dict | None:
    """Make the folder of a run; returns the checkpoint to go on from, if it shall be resumed."""
    ckpt, free = None, dict(steps=0, minutes=0.0, accumulate=1)  # what may change on the way
    if (out / "ckpt.pt").exists():
        ckpt = read_checkpoint(out / "ckpt.pt")
        try:
            old = Config(**ckpt["config"])
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{out}/ckpt.pt: not of a run of this program ({e}); choose another "
                             "--out") from e
        if replace(cfg, **free) != replace(old, **free):
            raise ValueError(f"{out} holds a run of another configuration; choose another --out")
    if resume and "optimizers" not in (ckpt or {}):
        raise ValueError(f"{out}/ckpt.pt: nothing to resume; train without --resume first")
    out.mkdir(parents=True, exist_ok=True)
    return ckpt if resume else None


def tidy(out: Path, step: int):
    """Remove what a killed run left half-written, and log lines after the step to go on from."""
    for part in out.glob(".*.part"):
        part.unlink()
    log = out / "log.jsonl"
    if log.exists():
        rows = log.read_text().splitlines(keepends=True)
        keep = [r for r in rows if r.endswith("}\n") and json.loads(r)["step"] <= step]
        with atomic(log) as part:
            part.write_text("".join(keep))


def train_and_score(run: Run, train_set, test_set, out: Path):
    """Train to the end, draw samples.png and print the held-out scores."""
    cfg = run.cfg
    steps = cfg.steps or (0 if cfg.minutes else -(-cfg.epochs * len(train_set) // cfg.batch_size))
    ended = train_run(run, train_set, out, steps, cfg.minutes)
    if ended:
        again = shlex.join([a for a in sys.argv if a != "--resume"] + ["--resume"])
        by = f"torchrun --nproc-per-node={neighbours()}" if dist.is_initialized() else "python"
        return click.echo(f"{ended}: saved step {run.step}; go on with\n  {by} {again}")
    run.model.eval()
    if leads():
        samples = samples_sheet(run.model, test_set, run.device)
        save_picture(samples, out / "samples.png")
    scores = score(run.model, test_set, run.device, train_set)
    click.echo(f"{run.step} steps in {run.elapsed / 60:.1f} minutes; held-out:")
    report(scores)
    click.echo(f"wrote {out}/ckpt.pt, {out}/log.jsonl and {out}/samples.png")


def parse_fields(pairs) -> dict:
    """NAME=VALUE pairs -> fields of Config, of their types."""
    types, out = {f.name: type(f.default) for f in fields(Config)}, {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        check_choice("--set", name, types)
        try:
            out[name] = value == "True" if types[name] is bool else types[name](value)
        except ValueError as e:
            raise ValueError(f"--set {pair}: {name} takes a {types[name].__name__}") from e
    return out


def score(model, data, device, known=None, tto=0) -> dict:
    """The task's held-out scores; for scenes `known` training data give the mean picture."""
    if model.cfg.task == "gp":
        return evaluate_curves(model, data, device)
    mean = known.images.float().mean(0).flatten(1).T / 255 if model.cfg.task == "nvs" else None
    return evaluate(model, data, device, tto, mean)  # mean: (H W, 3)


def write_json(path, value):
    """Write a value to a file beside its place, then rename it; nothing without a path."""
    if path:
        with atomic(path) as part:
            part.write_text(json.dumps(value, indent=1) + "\n")


@cli.command(name="eval")
@click.argument("ckpt", type=click.Path())
@click.option("--data", type=click.Path(), help="Folder or zip; default: the bundled set.")
@click.option("--split", type=click.Choice(list(CELEBA)), default="test", show_default=True)
@click.option("--tto", type=click.IntRange(0), default=0, help="Steps of test-time optimisation.")
@click.option("--size", type=click.IntRange(1), help="Only this many test signals.")
@click.option("--views", type=click.IntRange(1), help="nvs: context views.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the scores here too.")
def evaluate_command(ckpt, data, split, tto, size, views, device, json_file):
    """Score a checkpoint on held-out signals."""
    device = choose_device(device)
    with processes(device.name):
        model = load(ckpt, device.name)
        model.cfg = replace(model.cfg, views=views or model.cfg.views)
        signals = DATASETS[model.cfg.task](model.cfg, data, split, size or 0)
        known = SceneData(model.cfg, data) if model.cfg.task == "nvs" else None
        scores = score(model, signals, device, known, tto)
        report(scores)
        write_json(json_file if leads() else None, scores)


@cli.command()
@click.argument("ckpt", type=click.Path())
@click.argument("source", metavar="INPUT", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="Picture to write.")
@click.option("--size", type=click.IntRange(2, 16384), default=512, show_default=True)
@click.option("--tto", type=click.IntRange(0), default=0, help="Steps of test-time optimisation.")
@click.option("--views", type=click.IntRange(1), help="nvs: context views.")
@click.option("--device", default="auto", show_default=True)
def render(ckpt, source, out, size, tto, views, device):
    """Encode INPUT, draw the function: photo -> picture, object -> turntable GIF, CSV -> plot.

    An object is a folder with transforms.json of one or more posed views, or such a folder within
    a zip, as set.zip/class/id. An OUT without a suffix becomes a folder of PNGs. A series is two
    columns x,y; a long one becomes several plots, each of up to 46 neighbouring points.
    """
    model = load(ckpt, choose_device(device).name)
    model.cfg = replace(model.cfg, views=views or model.cfg.views)
    if model.cfg.task == "image":
        save_picture(render_image(model, source, size, tto), out)
    elif model.cfg.task == "gp":
        save_picture(render_curve(model, *read_csv(source), size), out)
    else:
        first, *rest = frames = render_scene(model, *find_scene(source), size, tto=tto)
        if Path(out).suffix:
            save_picture(first, out, save_all=True, append_images=rest, duration=80, loop=0)
        else:
            Path(out).mkdir(parents=True, exist_ok=True)
            for i, frame in enumerate(frames):
                save_picture(frame, Path(out) / f"{i:02}.png")
    click.echo(f"wrote {out}")


@cli.command()
@click.option("--preset", default="small", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@click.option("--batch-size", type=click.IntRange(1), help="[default: the preset's]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps or auto.")
@click.option("--json", "json_file", type=click.Path(), help="Write the figures here too.")
def bench(preset, batch_size, device, json_file):
    """Time training, encoding and decoding of a preset's cells on this machine."""
    check_choice("preset", preset, PRESETS)
    device = choose_device(device).name
    peaks = {str(dtype)[6:]: peak_flops(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    click.echo(f"{device}, {torch.get_num_threads()} threads; matrix products of 2,048: "
               + ", ".join(f"{v / 1e12:.2f} TFLOP/s in {k}" for k, v in peaks.items()))
    click.echo("          cell  step ms  signals/s  GFLOP  of peak  memory MB  encode ms"
               "  decode k/s")
    given = {"batch_size": batch_size} if batch_size else {}
    configs = [make_config(preset, *cell, **given) for cell in PRESETS[preset]]
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=keep_memory,  # as `train` does
                             max_tasks_per_child=1) as fresh:
        rows = []
        for row in fresh.map(bench_cell, configs, itertools.repeat(device)):
            click.echo("{cell:>14} {step_ms:8.1f} {signals_per_s:10.1f} {gflop:6.1f} {share:8.0%} "
                       "{memory_mb:10.0f} {encode_ms:10.2f} {0:11.1f}".format(
                           row["decode_per_s"] / 1000, **row))
            rows.append(row)
    write_json(json_file, {"peaks": peaks, "cells": rows})


@cli.command()
@click.argument("ckpt", type=click.Path())
@click.argument("image", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="Picture to write.")
def inspect(ckpt, image, out):
    """Draw what the weight tokens of each INR layer look at, and the weights that they write."""
    model = load(ckpt)
    if (model.cfg.task, model.cfg.model) != ("image", "transinr"):
        raise ValueError(f"inspect takes a TransINR of images; {ckpt} is a {model.cfg.model} of "
                         f"{model.cfg.task}")
    save_picture(attention_sheet(model, read_context(model, image)), out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    cli()
