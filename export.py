"""export: a checkpoint of tinyinr as ONNX files that run anywhere, verified before they are written.

    python export.py runs/image-transinr/ckpt.pt            # ckpt.encoder.onnx, ckpt.decoder.onnx
    python export.py runs/image-transinr/ckpt.pt --fused    # ckpt.onnx

    encoder: context -> code        decoder: code + query -> values        fused: both in one graph

All inputs and outputs are fp32 and bear the names that they have in tinyinr.py. Free dimensions
are named; only what the architecture fixes is static. Nothing is drawn inside: a VNP's noise `eps`
is an input. What a caller has to know besides is in the file's metadata.
"""

import hashlib
import json
import logging
import os
import tempfile
import warnings
from dataclasses import asdict
from itertools import product
from pathlib import Path

import click
import numpy as np
import onnx
import onnxscript
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tinyinr
from tinyinr import Config, RunFailed

TOLERANCE = 1e-4  # largest error against PyTorch, relative to values above 1
ONE_FILE = 1.5e9  # bytes; larger weights go to a second file, as protobuf ends at 2 GB
OPSETS = ("18", "20")

# ------------------------------------------------------------------------- inputs and outputs


def context_shapes(cfg: Config) -> dict[str, tuple]:
    """Name -> shape of what a model reads; a free dimension is a word."""
    if cfg.task == "image":  # every patch has a learned position, so the size is fixed
        image, mask = (("batch", n, cfg.image_size, cfg.image_size) for n in (3, 1))
        return {"image": image} | ({"mask": mask} if cfg.masked else {})
    if cfg.task == "nvs":
        return {"images": ("batch", "views", 3, "height", "width"),
                "poses": ("batch", "views", 3, 4), "focals": ("batch", "views", 2)}
    return {"x": ("batch", "points", 1), "y": ("batch", "points", 1), "mask": ("batch", "points")}


def query_shapes(cfg: Config) -> dict[str, tuple]:
    """Name -> shape of what is asked of a code, and of the noise if the model has latents."""
    shapes = {
        "image": {"coords": ("batch", "queries", 2)},
        "nvs": {"rays_o": ("batch", "rays", 3), "rays_d": ("batch", "rays", 3),
                "near": ("batch",), "far": ("batch",)},
        "gp": {"x": ("batch", "queries", 1)},
    }[cfg.task]
    return shapes | ({"eps": (cfg.blocks, "batch", 1, cfg.latent)} if cfg.model == "vnp" else {})


FREE = {"image": (), "nvs": ("tokens", "pool"), "gp": ("pool",)}  # second dimensions of codes

MEANING = {  # of inputs and outputs; what is not listed is a layer of an INR
    "image": "picture, RGB in [0, 1], first row on top",
    "images": "context views, RGB in [0, 1] on white, first row on top",
    "mask": "1 = observed, 0 = to be ignored",
    "poses": "camera-to-world (3, 4); x right, y up, the camera looks along -z (OpenGL)",
    "focals": "focal lengths (x, y) in pixels of the view; the axis hits the view's centre",
    "x": "positions x of the curve",
    "y": "values y of the curve at x",
    "query_x": "positions x at which the curve is asked for",
    "coords": "(row, column) in (-1, 1); the centre of pixel i of n is (i + 0.5) * 2 / n - 1",
    "rays_o": "origins of the rays",
    "rays_d": "directions of the rays, of depth 1 along the camera's axis, not normalised",
    "near": "depth at which a signal's rays begin", "far": "depth at which they end",
    "eps": "unit Gaussian noise of the latents; zeros give the prior's mean",
    "tokens": "context tokens", "pool_weight": "1 = takes part in the prior",
    **{f"pool_{k}": "positions over which the prior is pooled"
       for k in ("coords", "x", "rays_o", "rays_d")},
    "mean": "values at the query: RGB in [0, 1] (not clamped), or y",
    "std": "standard deviation of the values",
}
LAYER = "weights (in + 1, out) of a layer of the INR, the bias in the last row"


def notes(cfg: Config) -> list[str]:
    """What is fixed in the graphs, and what a caller could get wrong."""
    out = []
    if cfg.task == "image":
        out.append(f"image is {cfg.image_size} x {cfg.image_size} pixels: patches have learned "
                   "positions; any size comes out")
    elif cfg.task == "nvs":
        out.append(f"views may have any size from {cfg.patch} x {cfg.patch} pixels on; trained "
                   f"with {cfg.views} of {cfg.image_size} x {cfg.image_size}")
        out.append(f"{cfg.points_per_ray} points per ray; trained with near={cfg.near:g} and "
                   f"far={cfg.far:g}")
    else:
        out.append("trained for x in [-2, 2]; pad contexts to one length with mask 0")
    if cfg.model == "vnp" and cfg.latent_pool == "query":
        out.append("the prior is pooled over the query: latents depend on the rays of a call, so "
                   "render a picture in one call")
    elif cfg.model == "vnp":
        out.append("with the same eps, a picture does not depend on how it is cut into calls")
    return out


def draw(cfg: Config, shapes: dict[str, tuple], sizes: dict[str, int], gen) -> dict[str, Tensor]:
    """Random tensors of these shapes that make sense: cameras look at the scene, near < far."""
    out = {}
    for name, shape in shapes.items():
        u = torch.rand([sizes.get(n, n) for n in shape], generator=gen)
        if name in ("coords", "x", "y", "eps", "rays_o", "rays_d", "query_x"):
            u = 4 * u - 2 if cfg.task == "gp" or name == "eps" else 2 * u - 1
        elif name == "mask":
            u = (u < 0.7).float()
        elif name == "poses":  # eyes around the object
            eyes = 4 * F.normalize(u[..., 3] - 0.5, dim=-1).flatten(0, 1)
            u = torch.stack([tinyinr.look_at(eye) for eye in eyes]).view(u.shape)
        elif name == "focals":
            u = (1 + u) * cfg.image_size
        elif name in ("near", "far"):
            u = getattr(cfg, name) + 0.1 * u
        out[name] = u
    if "rays_o" in out:
        out["rays_o"] = 4 * F.normalize(out["rays_o"], dim=-1)
        out["rays_d"] = 0.2 * out["rays_d"] - out["rays_o"] / 4
    return out


# ------------------------------------------------------------------------- graphs


class Graph(nn.Module):
    """A model's encoder, its decoder or both ("fused") as a function of named tensors.

    inputs, outputs: name -> shape, in order; a free dimension is a word.
    """

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        self.model, self.kind, self.cfg = model, kind, model.cfg
        self.context, self.query = context_shapes(self.cfg), query_shapes(self.cfg)
        example = model.encode(self.draw_context(SIZES, torch.Generator()))
        self.code = {}
        for name, value in example.items():
            word = name.partition("_")[0]  # pool_x, pool_weight: pool
            length = word if word in FREE[self.cfg.task] else value.shape[1]
            self.code[name] = ("batch", length, *value.shape[2:])
        ...
