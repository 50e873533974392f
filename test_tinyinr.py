"""Tests of tinyinr, in the order of its sections; each compares with an independent oracle.

python -m pytest -q                            # all, in minutes; some lie in data/
DEVICE=cuda python -m pytest -q                # the commands on that device
DAMAGED=15000 python -m pytest -qs -k damaged  # so many damaged files of every kind
"""

import ast
import csv
import ctypes
import functools
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

import export
import tinyinr
from data import (bench, commands, curves, evaluation, images, lotka_volterra, rendering, runs,
                  scenes, tables)
from data.testing import (SPLITS, ball_views, check_damaged, close, noisy, opposite_cameras, photos,
                          rand, refused, write_layout)
from tinyinr import ModelConfig, TrainConfig, build, make_config

torch.set_num_threads(1)
ROOT = Path(__file__).parent
PARITY = ROOT / "data" / "parity"
DEVICE = os.environ.get("DEVICE", "cpu")
TASKS, MODELS = ("image", "nvs", "gp"), ("transinr", "vnp")
CELLS = [*product(TASKS, MODELS)]
GRID = {"image": 8, "nvs": 6, "gp": 48}  # of the tiny models: a factor of 2, 2 and 1
every_task = pytest.mark.parametrize("task", TASKS)
every_model = pytest.mark.parametrize("name", MODELS)
every_cell = pytest.mark.parametrize("task, name", CELLS)
every_kind = pytest.mark.parametrize("grid", (False, True), ids=("paper", "grid"))
SIZES = dict(dim=32, depth=2, n_heads=2, head_dim=16, ff_dim=48, n_freqs=6, freq_top=16.0,
             n_groups=8, inr_depth=3, inr_width=32, hidden=24, n_blocks=2, latent=5, cross_depth=2,
             cross_heads=2, cross_ff=40, image_size=16, patch=4, padding=0, points_per_ray=12,
             voxels=3)


def tiny(task, model, grid=True, fresh=False, **given) -> torch.nn.Module:
    """A small random model; unless fresh, what starts at 0 is random as well."""
    torch.manual_seed(0)
    grid = GRID[task] if grid is True else int(grid)
    extra = {"gp": {"n_features": 12, "n_harmonics": 3}, "nvs": {"conv_nodes": 4},
             "image": {"conv_nodes": 4}}
    given = (extra.get(task, {}) if grid else {}) | given
    model = tinyinr.build(ModelConfig(task, model, grid, **SIZES | given)).eval()
    for p in () if fresh else model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def poses(*shape, seed=0):
    """Cameras on the sphere of radius 4, looking at the origin: (*shape, 3, 4)."""
    eyes = F.normalize(rand(*shape, 3, seed=seed) - 0.5, dim=-1) * 4
    return torch.stack([tinyinr.look_at(e) for e in eyes.view(-1, 3)]).view(*shape, 3, 4)


def signals(task, batch=3, targets=7, size=16):
    """Random context and query of a task."""
    if task == "image":
        return {"image": rand(batch, 3, size, size)}, {
            "coords": 2 * rand(batch, targets, 2, seed=1) - 1}
    if task == "gp":
        context = {"x": 4 * rand(batch, 9, 1) - 2, "y": rand(batch, 9, 1, seed=1)}
        return context, {"x": 4 * rand(batch, targets, 1, seed=2) - 2}
    focals = torch.full((batch, 2, 2), 40.0)
    context = {"images": rand(batch, 2, 3, size, size), "poses": poses(batch, 2), "focals": focals}
    pick = (torch.arange(targets) * 31 % size**2).expand(batch, -1)
    o, d = tinyinr.camera_rays(poses(batch, seed=1), focals[:, 0], size, size, pixels=pick)
    return context, {"rays_o": o, "rays_d": d}


def picture_rays(pose, focal, side):
    """A query of all pixels of a picture (side, side)."""
    o, d = tinyinr.camera_rays(pose, focal, side, side)
    return {"rays_o": o.reshape(1, -1, 3), "rays_d": d.reshape(1, -1, 3)}


def run(*args, code=0, program=tinyinr.cli):
    """A command line in this process: its output, after a check of the exit code."""
    defaults = {command: {"device": DEVICE} for command in tinyinr.cli.commands}
    with torch.enable_grad():
        result = CliRunner().invoke(program, [str(a) for a in args], default_map=defaults)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------- config and presets


@pytest.mark.parametrize("config", (ModelConfig, TrainConfig))
def test_every_field_takes_a_value_or_names_itself_in_one_value_error(config):
    values = (0, 1, -1, 2**62, -(2**70), 10**400, 0.5, math.nan, math.inf, "x", None, True, [], ())
    for f, value in product(fields(config), values):
        try:
            got = getattr(config(**{f.name: value}), f.name)
        except ValueError as error:
            assert f.name in str(error), error
        else:
            assert type(got) is type(f.default) and got == value and abs(hash(got)) >= 0
            assert type(value) is type(got) or type(got) is float and type(value) is int


IMAGE = dict(image_size=64, patch=8, padding=0, grid=32)


@pytest.mark.parametrize("given, remedy", [
    (dict(n_groups=48), "n_groups=48 must divide inr_width=256; try 16"),
    (dict(cross_heads=5), "cross_heads=5 must divide dim=768; try 1"),
    (dict(near=6.0), "near=6.0 must be below far=6.0"),
    (dict(latent_pool="y"), "latent_pool='y' is unknown; choose from context, query"),
    (dict(patch=200), "patch=200 must be at most the padded image_size=180"),
    (dict(conv_nodes=4), "conv_nodes=4 is for images and scenes with a grid; set it to 0"),
    (dict(IMAGE, conv_nodes=5), "conv_nodes=5 has no divisor in common with image_size=64"),
    (dict(IMAGE, conv_nodes=8, padding=4), "patches that cover the image_size=64 without padding"),
    (dict(task="nvs", grid=9), "grid=9 must be a multiple of the 5 tokens along an axis; try 5")])
def test_fields_that_do_not_fit_are_refused_with_a_remedy(given, remedy):
    refused(remedy, ModelConfig, **given)
    words = remedy.split()
    if "try" in words:
        ModelConfig(**given | {words[0].split("=")[0]: int(words[-1])})


@pytest.mark.parametrize("task, sizes, want", [
    ("image", {}, 32), ("image", dict(image_size=16, patch=4, grid=4), 4),
    ("image", dict(image_size=96, grid=48), 16), ("nvs", {}, 32), ("nvs", dict(image_size=40), 8)])
def test_convolved_parts_fit_the_image_and_its_grid(task, sizes, want):
    assert make_config("small", task, **sizes)[0].n_parts == want


def test_presets_are_for_the_cells_that_they_list_only():
    refused("preset='x' is unknown; choose from small", make_config, "x")
    refused("is for gp/vnp, not for image/vnp; try --preset small", make_config, "vnp-gp", "image")
    for preset, task, model in ((p, *cell) for p in tinyinr.PRESETS for cell in tinyinr.PRESETS[p]):
        cfg, recipe = make_config(preset, task, model, dim=64, seed=3)
        assert (cfg.task, cfg.model, cfg.dim) == (task, model, 64)
        assert (recipe.preset, recipe.seed) == (preset, 3)
        assert recipe.steps or recipe.minutes or recipe.epochs


@pytest.mark.parametrize("preset, n_parameters, official", [  # what the number does not tell
    ("transinr-celeba", 44_462_851, dict(
        grid=0, n_heads=12, image_size=178, patch=9, padding=1, freq_top=1024.0, n_groups=64,
        out_bias=0.5, epochs=30, batch_size=16, lr=1e-4, muon_lr=0.0, beta2=0.999, warmup=0,
        lr_schedule="step", n_queries=0, grad_clip=0.0, flip=False, random_crop=False)),
    ("transinr-imagenette", 44_462_851, dict(epochs=400, random_crop=True, flip=True)),
    ("transinr-shapenet", 44_463_484, dict(
        grid=0, image_size=128, padding=0, freq_top=256.0, n_groups=32, out_bias=0.0, near=2.0,
        far=6.0, points_per_ray=128, n_views=1, epochs=1000, repeats=2, drop_last=True,
        batch_size=32, n_queries=128, lr=1e-4, train_views=25, shared_rays=True, augment=False,
        balance=0.0, precision="fp32")),
    ("vnp-shapenet", 34_280_468, dict(
        grid=0, n_heads=8, image_size=128, patch=8, freq_top=256.0, latent_pool="query",
        kl_weight=1e-3, batch_size=32, n_queries=128, lr=1e-4))])
def test_paper_presets_are_the_official_ones(preset, n_parameters, official):
    cfg, recipe = make_config(preset)
    assert {k: getattr(cfg, k, getattr(recipe, k, None)) for k in official} == official
    with torch.device("meta"):
        assert sum(p.numel() for p in build(cfg).parameters()) == n_parameters


def test_every_config_that_is_accepted_gives_a_model_that_runs():
    """Random sizes of patches, tokens and grids: refused at once, or the model gives numbers."""
    rng, n_run = random.Random(0), 0
    choices = dict(
        image_size=(1, 7, 16, 20), patch=(1, 3, 4, 8, 16), padding=(0, 1, 3), voxels=(2, 3),
        conv_nodes=(0, 0, 4),
        masked=(False, True), n_convs=(0, 1), cross_heads=(1, 2, 7, 64),
        n_groups=(1, 8, 64), latent_pool=("context", "query"), inr_depth=(1, 2))
    grids = {"image": (0, 2, 3, 4, 5, 6, 8, 10, 20), "nvs": (0, 2, 3, 4, 6), "gp": (
        0, 48, 96, 144, 192, 240)}
    for _ in range(300):
        task, name = rng.choice(TASKS), rng.choice(MODELS)
        given = {k: rng.choice(v) for k, v in choices.items()} | {"grid": rng.choice(grids[task])}
        try:
            cfg = ModelConfig(task, name, **SIZES | dict(dim=16, depth=1, points_per_ray=3) | given)
        except ValueError:
            continue
        mean = build(cfg).eval()(*signals(task, 2, 3, cfg.image_size)).mean
        assert mean.isfinite().all(), (task, name, given)
        n_run += 1
    assert n_run > 60


# ------------------------------------------------------------------------- geometry, renderer


def test_a_ray_goes_through_the_pixel_that_sees_the_point():
    pose, (fx, fy), (height, width) = poses(1)[0], (40.0, 32.0), (30, 50)
    point = torch.tensor([0.3, -0.2, 0.5])
    x, y, z = (pose[:, :3].T @ (point - pose[:, 3])).tolist()  # camera: x right, y up, looks at -z
    column, row = width / 2 + fx * x / -z, height / 2 - fy * y / -z
    o, d = tinyinr.camera_rays(pose, torch.tensor([fx, fy]), height, width)
    exact = d[0, 0] + (column - 0.5) * (d[0, 1] - d[0, 0]) + (row - 0.5) * (d[1, 0] - d[0, 0])
    close(o[0, 0] - z * exact, point)
    close(-(d @ pose[:, 2]), torch.ones(height, width))  # depth 1 along the camera's axis
    cameras, picked = (poses(2), rand(2, 2) + 10, 5, 7), [[0, 8, 33], [6, 20, 1]]
    some = tinyinr.camera_rays(*cameras, pixels=torch.tensor(picked))
    for (whole, got), i in product(zip(tinyinr.camera_rays(*cameras), some), range(2)):
        close(got[i], whole[i].flatten(0, 1)[picked[i]], 1e-6)


def test_look_at_is_a_rotation_that_sees_the_origin_upright():
    for eye in ([2.0, -1.0, 3.0], [0.0, 0.0, 4.0], [0.0, 0.0, -4.0]):
        r = (pose := tinyinr.look_at(torch.tensor(eye)))[:, :3]
        close(r.T @ r, torch.eye(3))
        close(r[:, 2] * pose[:, 3].norm(), pose[:, 3])
        assert r.det() > 0.99 and r[2, 1] > -1e-6 and abs(r[2, 0]) < 1e-6


def test_depths_are_even_jittered_and_per_signal():
    signal, (_, query) = tiny("nvs", "transinr", grid=0).signal, signals("nvs", 2)
    query |= {"near": torch.tensor([2.0, 3.0]), "far": 5, "points_per_ray": 4}
    points, z = signal.points(query)
    close(z[:, 0], torch.tensor([[2.0, 3, 4, 5], [3, 11 / 3, 13 / 3, 5]]))
    close(points[1, 1], query["rays_o"][1, 0] + 11 / 3 * query["rays_d"][1, 0])
    _, z = signal.points(query | {"jitter": torch.full((2, 1, 1), 0.5)})
    close(z[0, 0], torch.tensor([2.5, 3.5, 4.5, 5.5]))
    shared = query | {k: query[k][:1] for k in ("rays_o", "rays_d")}  # rays of all signals
    close(signal.points(shared)[0][1, 1], query["rays_o"][0, 0] + 11 / 3 * query["rays_d"][0, 0])
    refused("points_per_ray=1 must be at least 2", signal.points, query | {"points_per_ray": 1})


def test_renderer_equals_a_naive_loop_and_has_exact_finite_gradients():
    """Ray by ray and point by point, as the formula in [1] reads."""
    rgb = rand(4, 5, 17, 3)
    sigma = rand(4, 5, 17, seed=1) * torch.tensor([9.0, 0.3, 0, 90]).view(4, 1, 1)
    z = 2 + rand(4, 5, 17, seed=2).cumsum(-1)
    color, depth, opacity = tinyinr.volume_render(rgb, sigma, z, background=0.7)
    for at in product(range(4), range(5)):
        values, density, depths = (v[at].double().numpy() for v in (rgb, sigma, z))
        want, transmittance = np.zeros(5), 1.0  # color, depth, opacity
        for i in range(17):
            delta = depths[i + 1] - depths[i] if i < 16 else 1e-3
            alpha = 1 - math.exp(-density[i] * delta)
            want += transmittance * alpha * np.array((*values[i], depths[i], 1))
            transmittance *= 1 - alpha
        want[:3] += transmittance * 0.7
        np.testing.assert_allclose((*color[at], depth[at], opacity[at]), want, atol=1e-6)
    on_white = tinyinr.volume_render(rgb, sigma, z)[0]
    close(on_white, color + 0.3 * (1 - opacity)[..., None], 1e-6)
    inputs = [v[:1, :2, :5].double().requires_grad_() for v in (rgb, sigma / 9, z)]
    sigma[..., 1] = 1e6  # an opaque point
    with torch.enable_grad():
        assert torch.autograd.gradcheck(lambda *a: tinyinr.volume_render(*a)[0], inputs)
        tinyinr.volume_render(rgb, sigma.requires_grad_(), z)[0].sum().backward()
    assert sigma.grad.isfinite().all()


@pytest.mark.parametrize("sigma", (0.0, 0.1, 0.7, 30.0))
def test_constant_density_has_the_analytic_opacity(sigma):
    """1 - exp(-sigma L), at any spacing; L ends 1e-3 behind the last point."""
    z = torch.tensor([2.0, 2.1, 2.9, 3.0, 4.2, 5.999]).view(1, 1, 6)
    rgb = torch.tensor([0.2, 0.5, 0.9]).expand(1, 1, 6, 3)
    color, _, opacity = tinyinr.volume_render(rgb, torch.full_like(z, sigma), z)
    want = 1 - math.exp(-4 * sigma)
    assert abs(opacity.item() - want) < 1e-6
    close(color[0, 0], want * rgb[0, 0, 0] + 1 - want, 1e-6)


def test_two_scenes_are_predicted_along_one_set_of_rays():
    model, (context, _) = tiny("nvs", "transinr"), signals("nvs", batch=2)
    query, code = picture_rays(poses(1)[0], torch.full((2,), 10.0), 16), model.encode(context)
    assert not model.signal.hits(query).all()  # some miss the sphere
    close(tinyinr.predict(model, code, query).mean, model.decode(code, query).mean)


def test_a_grid_scene_is_rendered_inside_its_sphere_only():
    signal = tiny("nvs", "transinr").signal
    o = torch.tensor([[[0.0, 0, 4], [0, 0, 4], [0, 0.6, 4], [0, 3, 4], [0, 0, 0]]])
    d = torch.tensor([[[0.0, 0, -1], [0, 0, -0.5], [0, 0, -1], [0, 0, -1], [0, 0, -0.5]]])
    points, z = signal.points({"rays_o": o, "rays_d": d, "near": 0.0, "far": 9.0})
    want = torch.tensor([[3.0, 5], [6, 9], [3.2, 4.8], [4, 4], [0, 2]])
    close(z[0, :, [0, -1]], want)
    far_off = {"rays_o": o + torch.tensor([0, 0, 20.0]), "rays_d": d}  # beyond the config's far
    want = torch.tensor([[23.0, 25], [46, 50], [23.2, 24.8]])
    close(signal.points(far_off)[1][0, :3, [0, -1]], want)
    sigma = math.log1p(math.exp(20 * 0.05))
    raw = torch.tensor([0.1, 0.2, 0.3, 0.15]).expand(1, points.shape[1], 4)
    color, _, opacity = signal.render(raw, points, z, background=0.0)
    for i, length in enumerate((2, 3, 1.6, 0, 2)):
        assert abs(opacity[0, i].item() - (1 - math.exp(-sigma * length))) < 2e-3, i
    close(color[0, 0], opacity[0, 0] * torch.tensor([0.4, 0.8, 1.2]).sigmoid())


# ------------------------------------------------------------------------- Transformer


def test_a_block_with_a_bias_by_distance_equals_pytorchs_own_layer():
    """nn.TransformerEncoderLayer, pre-norm and GELU, with the bias of i - j as its mask."""
    block, mask = tinyinr.RelPosBlock(6, 32, 4, 8, 48), torch.zeros(4, 6, 6)
    bias = torch.nn.init.normal_(block.rel_pos_bias)  # (heads, distances from -5 to 5)
    for i, j in product(range(6), range(6)):
        mask[:, i, j] = bias[:, i - j + 5]
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 48, 0, "gelu", batch_first=True, norm_first=True)
    names = {"qkv.": "self_attn.in_proj_", "out": "self_attn.out_proj", "ff": "linear"}
    state = {re.sub("|".join(names), lambda m: names[m[0]], k): v
             for k, v in block.state_dict().items() if k != "rel_pos_bias"}
    layer.load_state_dict(state | {"self_attn.in_proj_bias": torch.zeros(96)})
    x = rand(2, 6, 32)
    close(block(x), layer.train()(x, mask.repeat(2, 1, 1)))


# ------------------------------------------------------------------------- tokenizers


def test_patches_equal_strided_convolutions():
    tokenizer = tinyinr.PatchTokenizer(3, 32, 4, 1, 16)  # 18 // 4 = 4 patches a side
    image, kernel = rand(2, 3, 16, 16), tokenizer.proj.weight.view(-1, 3, 4, 4)
    want = F.conv2d(image, kernel, tokenizer.proj.bias, stride=4, padding=1)
    close(tokenizer(image), want.flatten(2).mT + tokenizer.pos)
    refused("15 x 16 pixels, but this model reads 16 x 16", tokenizer, image[:, :, 1:])


@pytest.mark.parametrize("n_values", (1, 2))
def test_set_convolution_equals_a_loop_and_convolutions_are_residual_and_ever_wider(n_values):
    tokenizer = tinyinr.SetTokenizer(n_values, 32, n_convs=6)
    x, y = 4 * rand(1, 5, 1) - 2, rand(1, 5, n_values, seed=1)
    mask = (rand(1, 5, n_values, seed=2) < 0.7).float()
    out, scales = tokenizer.set_conv(x, y, mask), tokenizer.scales.tolist()
    for (s, scale), g, c in product(enumerate(scales), (0, 80, 191), range(n_values)):
        offsets = [(float(a) - float(tokenizer.points[g])) / scale for a in x[0]]
        w = [math.exp(-0.5 * o * o) * float(m) for o, m in zip(offsets, mask[0, :, c])]
        values = y[0, :, c].tolist()
        mean = lambda *factors: sum(map(math.prod, zip(w, *factors))) / (sum(w) + 1e-4)
        want = (math.log1p(sum(w)), mean(values), mean(offsets), mean(offsets, values))
        for kind, value in enumerate(want):
            channel = (kind * n_values + c) * len(scales) + s
            assert abs(float(out[0, channel, g]) - value) < 1e-5
    grid = tokenizer.conv1(out)
    for conv, d in zip(tokenizer.convs, (1, 2, 4, 8, 16, 1)):
        grid = grid + F.conv1d(F.gelu(grid), conv.weight, conv.bias, padding=2 * d, dilation=d)
    close(tokenizer(x, y, mask), tokenizer.conv2(F.gelu(grid)).mT + tokenizer.pos)


@every_kind
@every_model
def test_what_is_under_a_mask_of_0_has_no_influence(name, grid):
    """Neither padding of a curve, nor pixels, nor values of a curve, which have a mask each."""
    model, (context, query) = tiny("gp", name, grid), signals("gp")
    padded = {k: F.pad(v, (0, 0, 0, 4), value=math.nan) for k, v in context.items()}
    mask = F.pad(torch.ones(3, 9), (0, 4))
    close(model(padded | {"mask": mask}, query), model(context, query))
    for task, key, mask, given in (
            ("image", "image", (rand(3, 1, 16, 16, seed=3) < 0.5).float(), dict(masked=True)),
            ("gp", "y", (rand(3, 9, 2, seed=2) < 0.6).float(), dict(n_values=2))):
        model, (context, query) = tiny(task, name, grid, **given), signals(task)
        context |= {"mask": mask} | ({"y": rand(3, 9, 2, seed=1)} if task == "gp" else {})
        want = model(context, query)
        for junk in (7.0, math.nan):
            other = context | {key: context[key].masked_fill(mask == 0, junk)}
            close(model(other, query), want)
            close(model(other | {"mask": mask.bool()}, query), want)
        seen = context | {key: context[key] + mask}
        assert (model(seen, query).mean - want.mean).abs().max() > 1e-4
    whole = signals("image")[0] | {"mask": torch.ones(3, 1, 16, 16)}
    refused("masked=True", tiny("image", name, grid).encode, whole)


# ------------------------------------------------------------------------- INR and TransINR


@every_kind
@every_task
def test_batched_inr_equals_linear_layers_signal_by_signal(task, grid):
    model = tiny(task, "transinr", grid, out_bias=0.25, n_features=0, n_harmonics=0)
    context, query = signals(task)
    code, (points, _) = model.encode(context), model.signal.points(query)
    out = model.field(code, points)
    views = model.views.read(code, points) if task == "nvs" and grid else torch.zeros(3, 1, 32)
    nodes, code = code.get("grid"), {k: code[k] for k in model.shapes}
    for b in range(3):
        scale = math.pi if task == "image" else 1.0
        h = tinyinr.positional_encoding(points[b], model.freqs, scale)
        for i, wb in enumerate(code.values()):
            h = F.linear(h.relu() if i else h, wb[b, :-1].T, wb[b, -1])
            if grid and i == 0:
                h = h + tinyinr.interpolation_weights(points[b], model.axis) @ nodes[b] + views[b]
        close(out[b], h + (0.25 if task == "image" else 0.0))


def test_a_grid_model_starts_from_the_base_weights():
    model, (context, _) = tiny("image", "transinr", fresh=True), signals("image")
    wb = model.encode(context)["wb1"][:, :-1]
    base = F.normalize(model.base["wb1"][:-1], dim=0)
    assert 0 < (wb - base).abs().max() < 0.2
    shift = model.transform(context)[0] - model.tokenizer(context["image"])
    close(shift, shift[:1, :1].expand_as(shift))  # blocks: the identity and a constant


# ------------------------------------------------------------------------- VNP


@every_kind
@pytest.mark.parametrize("pool", ("context", "query"))
@every_task
def test_latents_drawn_once_give_the_same_values_as_noise(task, pool, grid):
    """And those of several samples what each gives alone."""
    model, (context, query) = tiny(task, "vnp", grid, latent_pool=pool), signals(task)
    code, eps = model.encode(context), 4 * torch.randn(2, 3, 1, 5)
    z, kl = model.latents(code, query, eps)
    assert z.shape == (2, 3, 1, 5) and (kl == 0).all()
    close(model.decode(code, query, z=z), want := model.decode(code, query, eps))
    moved = [(a - b).abs().max() for a, b in zip(model.decode(code, query), want) if b is not None]
    assert max(moved) > 1e-4  # of curves with a regression the std
    many = model.decode(code, query, torch.stack((torch.zeros_like(eps), eps), 1))
    for one, got in ((model.decode(code, query), 0), (want, 1)):
        close(tinyinr.Prediction(*(v if v is None else v[got] for v in many)), one)
    target = rand(3, 7, model.signal.value_dim, seed=4)
    z, kl = model.latents(code, query, eps, target)
    assert kl.shape == (3,) and (kl > 0).all()
    close(model.posterior_predict(code, query, target, eps), (model.decode(code, query, z=z), kl))


@every_kind
def test_the_prior_is_averaged_over_the_context_or_the_places_of_tokens(grid):
    """Same weights, asked at these points: the official way to pool."""
    model, (context, query) = tiny("gp", "vnp", grid), signals("gp")
    asked = tiny("gp", "vnp", grid, latent_pool="query")
    for block in model.blocks:  # a prior that matters
        block.value[-1].weight.mul_(20)
    asked.load_state_dict(model.state_dict())
    code, eps = model.encode(context), torch.randn(2, 3, 1, 5)
    at = model.axis[2::4].view(1, -1, 1).expand(3, -1, -1) if grid else context["x"]
    z, code = model.latents(code, query, eps)[0], asked.encode(context)
    close(z, asked.latents(code, {"x": at}, eps)[0])
    assert (z - asked.latents(code, query, eps)[0]).abs().max() > 1e-4


@every_kind
@pytest.mark.parametrize("pool", ("context", "query"))
def test_a_curve_has_second_derivatives(pool, grid):
    """Also through the latents; by central differences of the first ones."""
    model, (context, query) = tiny("gp", "vnp", grid, latent_pool=pool).double(), signals("gp", 1)
    code = model.encode({k: v.double() for k, v in context.items()})
    x = query["x"].double().requires_grad_()
    for z in (model.latents(code, {"x": x.detach()})[0], None):
        with torch.enable_grad():
            assert torch.autograd.gradgradcheck(
                lambda x: model.decode(code, {"x": x}, z=z).mean, x, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------- the feature grid


@pytest.mark.parametrize("n, dim", ((6, 1), (6, 2), (5, 3), (200, 1), (14, 2), (6, 3)))
def test_interpolating_equals_hat_functions_and_goes_on_as_at_the_border(n, dim):
    """Few nodes are dense, more are gathered: both agree, inside and beyond."""
    axis, grid = torch.linspace(-0.8, 0.6, n), rand(2, n**dim, 5)
    x = 4 * rand(2, 200, dim, seed=1) - 2.1
    x[:, ::2] /= 2.5  # half of them near the grid
    got, nearest = tinyinr.interpolate(grid, x, axis), x.clamp(-0.8, 0.6)
    close(got, tinyinr.interpolation_weights(x, axis) @ grid, 3e-4)
    inside = ((x - nearest).abs() < 1.4 / (n - 1)).all(-1, keepdim=True)  # up to a spacing beyond
    close(got, tinyinr.interpolate(grid, nearest, axis) * inside, 1e-4)
    assert 0 < inside.sum() < inside.numel()
    nodes = torch.cartesian_prod(*[axis] * dim).view(1, -1, dim)
    close(tinyinr.interpolate(grid, nodes, axis), grid, 1e-4)
    close(tinyinr.interpolate(nodes, nearest[:1], axis), nearest[:1], 2e-5)  # linear: exact
    x, value = nearest[0, 0], lambda x: tinyinr.interpolate(grid, x[None, None], axis)[:, 0]
    close(torch.func.jacfwd(value)(x), torch.func.jacrev(value)(x))


@pytest.mark.parametrize("n, dim", ((300, 1), (17, 2), (7, 3)))
def test_a_large_grid_is_read_by_splines_the_means_of_linear_interpolation(n, dim):
    """Over a spacing around a point, their definition; both ways, points shared or not."""
    axis, grid, x = torch.linspace(-0.8, 0.6, n), rand(2, n**dim, 5), 1.6 * rand(2, 30, dim) - 0.9
    inside = ((x - x.clamp(-0.8, 0.6)).abs() < 1.4 / (n - 1)).all(-1, keepdim=True)
    around = 1.4 / (n - 1) * ((torch.arange(16) + 0.5) / 16 - 0.5)
    window = torch.cartesian_prod(*[around] * dim).view(-1, 1, 1, dim)
    at = (x.clamp(-0.8, 0.6) + window).flatten(0, 1)  # (16^C B, K, C)
    want = tinyinr.interpolation_weights(at, axis).unflatten(0, (-1, 2)).mean(0) @ grid
    close(tinyinr.interpolate(grid, x, axis), want * inside, 2e-3)
    for points in (x, x[:1]):
        fast, smooth = (tinyinr.interpolate(grid, v, axis)
                        for v in (points, points.clone().requires_grad_()))
        close(fast, smooth, 1e-6)
    close(fast, tinyinr.interpolate(grid, x[:1].expand(2, -1, -1), axis), 1e-6)
    ones = tinyinr.interpolate(torch.ones_like(grid), x, axis)
    close(ones, inside.expand(2, 30, 5).float(), 1e-6)


@pytest.mark.parametrize("dim, side, factor", ((1, 5, 3), (2, 4, 1), (2, 3, 2), (3, 2, 3)))
def test_upsampled_tokens_lie_where_the_token_does(dim, side, factor):
    tokens = rand(2, side**dim, factor**dim * 5)
    got = tinyinr.upsample(tokens, side, factor, dim).unflatten(1, [side * factor] * dim)
    for at in product(range(side * factor), repeat=dim):
        token = sum(a // factor * side**i for i, a in enumerate(reversed(at)))
        part = sum(a % factor * factor**i for i, a in enumerate(reversed(at)))
        assert torch.equal(got[(slice(None), *at)], tokens[:, token, 5 * part : 5 * part + 5])


@pytest.mark.parametrize("height, width", ((16, 16), (13, 10), (1, 6)))
def test_unseen_pixels_get_the_colors_around_them(height, width):
    """A plane is met by half of its pixels, seen ones stay, one seen pixel gives all of them."""
    image, mask = rand(2, 3, height, width), (rand(2, 1, height, width, seed=1) < 0.3).float()
    mask[..., 0, 0] = 1
    filled = tinyinr.fill_unseen(image * mask, mask)
    assert torch.equal(filled * mask, image * mask)
    for pixels, seen, got in zip(image, mask[:, 0] > 0, filled):  # within the range of what is seen
        assert (got.flatten(1).amin(1) > pixels[:, seen].amin(1) - 1e-6).all()
        assert (got.flatten(1).amax(1) < pixels[:, seen].amax(1) + 1e-6).all()
    one = torch.zeros_like(mask)
    one[..., height // 3, width // 2] = 1
    close(tinyinr.fill_unseen(image * one, one),
          (image * one).sum((2, 3), keepdim=True).expand_as(image))
    assert not tinyinr.fill_unseen(0 * image, 0 * mask).any()
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * torch.ones(1, 1, 16, 16)
    plane = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 16)] * 2, indexing="ij"))
    plane = torch.cat((plane, plane.mean(0, keepdim=True)))[None]
    inside = (tinyinr.fill_unseen(plane * board, board) - plane)[..., 2:-2, 2:-2]
    assert inside.abs().max() < 0.04  # half of a pixel's slope


@pytest.mark.parametrize("factor", (2, 3, 4))
def test_the_grid_of_an_image_is_two_transposed_convolutions_that_are_sampled(factor):
    """Of the tokens, and of features that residual convolutions make of linear patches."""
    model, image = tiny("image", "vnp", 4 * factor), rand(2, 3, 16, 16, seed=2)
    tokens, points = rand(2, 16, 32), 2 * rand(2, 30, 2, seed=1) - 1
    parts, (near, far) = model.pixels.parts, model.pixels.convs
    patches = F.unfold(4 * image - 2, 4, stride=4).mT  # (B, 16, 48)
    x = F.linear(patches, parts.weight.flatten(1), parts.bias).mT.unflatten(2, (4, 4))
    x = x + F.conv2d(F.gelu(x), near.weight, near.bias, padding=1)
    x = x + F.conv2d(F.gelu(x), far.weight, far.bias, padding=2, dilation=2)

    def transposed(features, head):  # (B, D, 4, 4)
        kernel = head.weight.view(factor, factor, 32, -1).permute(3, 2, 0, 1)
        bias = head.bias.view(factor, factor, 32).permute(2, 0, 1).tile(1, 4, 4)
        return torch.conv_transpose2d(features, kernel, stride=factor) + bias

    grid = transposed(tokens.mT.unflatten(2, (4, 4)), model.grid_head)
    grid = grid + transposed(x, model.pixels.head)
    want = F.grid_sample(grid, points.flip(-1).unsqueeze(2), padding_mode="border",
                         align_corners=False)  # takes (column, row)
    code = {"tokens": tokens, "grid": model.generate_nodes(tokens, {"image": image})}
    close(model.initial_features(code, points, None), want.squeeze(3).mT)


def mean_and_maximum(a, b):
    """The mean of the first half of their channels, the maximum of the other."""
    half = a.shape[-1] // 2
    return torch.cat(((a + b)[..., :half] / 2, torch.maximum(a, b)[..., half:]), -1)


def test_a_place_in_space_starts_from_what_the_views_show_there():
    """Where tokens hold their row and column, a place on a pixel's ray reads that pixel's."""
    tokenizer, focals = tiny("nvs", "transinr").tokenizer, torch.tensor([20.0, 26.0])
    views = rand(3, 2, 3, 16, 16), poses(3, 2), focals.expand(3, 2, 2)
    both, mirror = tokenizer(*views), [p.clone() for p in tokenizer.mirror.parameters()]
    for p in tokenizer.mirror.parameters():
        p.zero_()
    alone, *each = (tokenizer(*(x[:, v] for x in views)) - tokenizer.voxel_pos
                    for v in ([0, 1], [0], [1]))
    close(alone, mean_and_maximum(*each))
    place = tokenizer.voxels * torch.tensor([-1.0, 1, 1])  # of a voxel's mirror image
    other = torch.cdist(place, tokenizer.voxels).argmin(1)
    close(both, tokenizer.voxel_pos + alone + F.linear(alone[:, other], *mirror), 1e-4)
    for p in (*tokenizer.proj.parameters(), *tokenizer.camera.parameters()):
        p.zero_()
    tokenizer.pos[:, :2] = tinyinr.pixel_grid(4, 4)
    features = F.pad(tinyinr.pixel_grid(4, 4), (0, 62)).view(1, 1, 16, 64)
    tokenizer.features.weight.copy_(torch.eye(32, 64))
    tokenizer.features.bias.zero_()
    o, d = tinyinr.camera_rays(*views[1:], 16, 16)
    for b, v, row, column, depth in ((0, 0, 3, 9, 3.0), (1, 1, 12, 5, 4.5), (2, 0, 8, 2, 4.0)):
        tokenizer.voxels[5] = o[b, v, row, column] + depth * d[b, v, row, column]
        for more, times in (((), 1), ((features,), 2)):
            tokens = tokenizer(*(x[[b]][:, [v]] for x in views), *more) - tokenizer.voxel_pos
            close(tokens[0, 5, :2] / times, tinyinr.pixel_grid(16, 16).view(16, 16, 2)[row, column])


@every_model
def test_a_point_reads_the_maps_of_the_views_that_show_it_and_its_mirror_image(name):
    """As grid_sample does, at the pixels whose rays meet in the point."""
    model, (context, _) = tiny("nvs", name), signals("nvs")
    code, corner = model.encode(context), slice(3, 13)  # between the 4 x 4 nodes
    at = tinyinr.pixel_grid(16, 16).view(16, 16, 2)[corner, corner].flip(-1).expand(3, -1, -1, -1)
    o, d = tinyinr.camera_rays(context["poses"], context["focals"], 16, 16)
    points = (o + 3.7 * d)[:, :, corner, corner].flatten(2, 3)  # (B, V, K, 3)
    for v, mirrored in product((0, 1), (0, 1)):
        one = {k: w[:, [v]].clone() for k, w in code.items() if k.startswith("views")}
        one["views_map"][:, :, 1 - mirrored] = 0
        nodes = one["views_map"][:, 0, mirrored].mT.unflatten(2, (4, 4))
        want = F.grid_sample(nodes, at, align_corners=False).flatten(2).mT
        x = points[:, v] * torch.tensor([1.0 - 2 * mirrored, 1, 1])
        close(model.views.read(one, x), want)
        assert want.std() > 1e-3
    each = [model.views.read({k: w[:, [v]] for k, w in code.items()}, points[:, 0]) for v in (0, 1)]
    close(model.views.read(code, points[:, 0]), mean_and_maximum(*each))


@pytest.mark.parametrize("n", (48, 96, 144, 192, 240))
def test_the_nodes_of_a_curve_are_where_its_tokens_look(n):
    tokenizer, axis = tinyinr.SetTokenizer(1, 32), tiny("gp", "vnp").signal.axis(n)
    assert len(axis) == n
    still = tokenizer.conv2(torch.zeros(1, 16, 192))
    for i in (0, 3, 11, 47):
        impulse = torch.zeros(1, 16, 192)
        impulse[..., (tokenizer.points - axis[i * n // 48]).abs().argmin()] = 1.0
        moved = (tokenizer.conv2(impulse) - still).abs().amax(1)[0]
        assert moved.nonzero().flatten().tolist() == [i]


@pytest.mark.parametrize("name, points", (("transinr", 9), ("vnp", 9), ("vnp", 40)))
def test_the_regression_is_the_posterior_of_a_gaussian_process(name, points):
    """Of kernel phi(x) phi(x'), in function space; its scale is that of a Student t process.

    So is the evidence of every level of the noise.
    """
    model = tiny("gp", name, n_values=2).double()
    regression, shape = model.regression, (3, points, 2)
    context = {"x": 4 * rand(3, points, 1).double() - 2, "y": rand(*shape, seed=1).double(),
               "mask": (rand(*shape, seed=2) < 0.7).double()}
    code, xt = model.encode(context), 4 * rand(3, 5, 1, seed=3).double() - 2
    grid = model.nodes(code), model.axis, model.freqs
    got = regression.add(torch.zeros(3, 5, 2), code["posterior"], code["scale"], xt, *grid)
    (phi, noise), (target, noise_at) = (regression.features(x, *grid) for x in (context["x"], xt))
    nu, levels, found = regression.log_nu.exp(), torch.tensor([1.0, 3, 9, 27]).double(), []
    for b, d in product(range(3), range(2)):
        seen = context["mask"][b, :, d] == 1
        p, y = phi[b, seen], context["y"][b, seen, d]
        kernels = [p @ p.T + (level * noise[b, seen, d]).square().diag() for level in levels]
        evidence = torch.stack([-torch.logdet(k) / 2 - (nu + len(y)) / 2 * (
            nu + y @ k.inverse() @ y).log() for k in kernels])
        found.append(level := (evidence.softmax(0) @ levels.log()).exp())
        k = p @ p.T + (level * noise[b, seen, d]).square().diag()
        across = target[b] @ p.T @ k.inverse()
        scale = (nu + y @ k.inverse() @ y) / (nu + len(y))
        var = scale * ((target[b] @ target[b].T - across @ p @ target[b].T).diag()
                       + (level * noise_at[b, :, d]).square())
        close(got[b, :, d], across @ y, 1e-4)  # the ridge is 1e-6 of the trace
        close(got[b, :, 4 + d], var, 1e-4)
    assert not got[..., 2:4].any() and max(found) > 1.1 * min(found)


@torch.no_grad()
def test_waves_of_an_rbf_spectrum_have_the_posterior_of_an_rbf_process(length=0.3):
    """Cosine series of the kernel over a period of 8; its constant is a feature of the MLP."""
    model = tiny("gp", "transinr", n_features=81, n_harmonics=40)
    regression, omega = model.regression, torch.arange(1, 41) * math.pi / 4
    area = length * math.sqrt(2 * math.pi) / 8
    regression.spectrum.weight.zero_()
    regression.spectrum.bias.copy_((math.log(2 * area) - (omega * length).square() / 2) / 2
                                   + 1 + 0.1 * omega)
    for p in regression.basis[2].parameters():
        p.zero_()
    regression.basis[2].bias.copy_(torch.tensor([area**0.5, 3 + math.log(math.expm1(0.09))]))
    regression.log_nu.fill_(40.0)  # the scale is known, and the noise
    regression.LEVELS = (1.0,)
    x, xt = 4 * rand(2, 9, 1) - 2, 4 * rand(2, 30, 1, seed=1) - 2
    grid = rand(2, 48, 32), model.axis, model.freqs
    code = regression.fit(x, x.sin(), torch.ones_like(x), *grid)
    got = regression.add(torch.zeros(2, 30, 1), *code, xt, *grid)
    mean, std = curves.gp_posterior("rbf", x, x.sin(), xt, (length, torch.tensor(1.0), None), 0.1)
    close(got[..., :1], mean, 2e-3)  # the ridge is 1.0009
    close(got[..., 2:].sqrt(), std, 2e-3)


@every_model
def test_drawn_curves_have_the_posteriors_mean_and_variance(name):
    """A draw is linear in its noise, so unit vectors tell mean and variance exactly."""
    model, (context, query) = tiny("gp", name), signals("gp", batch=1)
    code = model.encode(context)
    want = model.decode(code, query)
    noise = torch.cat((torch.zeros(1, 12), torch.eye(12))).view(13, 1, 1, 1, 12)
    middle, *ends = (model.decode(model.draw(code, eps), query) for eps in noise)
    close(middle.mean, want.mean)
    var = sum((end.mean - middle.mean).square() for end in ends)
    close(middle.std.square() + var, want.std.square())
    refused("n_features=0: no regression to draw curves from",
            tiny("gp", name, n_features=0, n_harmonics=0).draw, code, noise[0])


def test_the_std_grows_by_its_own_where_the_features_explain_a_curve_badly():
    model = tiny("gp", "transinr")
    x = torch.linspace(-2, 2, 40).view(1, 40, 1)
    std = [model(dict(x=x, y=y), dict(x=x)).std.mean().item()
           for y in (0 * x, 0.2 * x, 20 * rand(1, 40, 1))]
    assert std[0] <= std[1] < std[2] / 3
    beyond = model(dict(x=x, y=0.2 * x), dict(x=torch.tensor([[[-2.0], [-3], [9], [1e4]]]))).std
    assert (beyond[0, 1:, 0] >= torch.tensor([1.0, 7, 9998])).all() and beyond[0, 0, 0] < 1


# ------------------------------------------------------------------------- all models


@every_cell
@every_kind
def test_signals_of_a_batch_and_targets_are_independent(task, name, grid):
    """One call of the model, encode and decode, one by one and in another order: all the same."""
    model, (context, query) = tiny(task, name, grid), signals(task)
    whole, code = model(context, query), model.encode(context)
    close(model.decode(code, query), whole, 0.0)
    for b in range(3):
        got = model(*({k: v[[b]] for k, v in x.items()} for x in (context, query)))
        close(got, tinyinr.Prediction(*(w if w is None else w[[b]] for w in whole)))
    order = torch.tensor([4, 0, 6])
    part = model.decode(code, {k: v[:, order] for k, v in query.items()}).mean
    close(part, whole.mean[:, order])
    if task == "gp":
        order = torch.randperm(9)
        close(model({k: v[:, order] for k, v in context.items()}, query), whole)


@every_model
@every_kind
def test_an_empty_context_gives_finite_predictions_but_a_scene_needs_a_view(name, grid):
    model, (_, query) = tiny("gp", name, grid), signals("gp")
    empty = {"x": torch.zeros(3, 0, 1), "y": torch.zeros(3, 0, 1)}
    prediction = model(empty, query)
    assert prediction.mean.isfinite().all() and (prediction.std > 0).all()
    model = tiny("image", name, grid, masked=True)
    blind = {"image": rand(2, 3, 16, 16), "mask": torch.zeros(2, 1, 16, 16)}
    values = model(blind, {"coords": torch.zeros(2, 4, 2)}).mean
    close(values[0], values[1])  # the prior: the same for all
    context, query = signals("nvs")
    no_views = {k: v[:, :0] for k, v in context.items()}
    refused("0 context views; a scene needs at least one", tiny("nvs", name, grid), no_views, query)


@pytest.mark.parametrize("task, name, change, words", [
    ("image", "image", lambda x: (255 * x).byte(), "image is of torch.uint8"),
    ("image", "image", lambda x: x[0], r"image has the shape \(3, 16, 16\); give \(B, 3, H, W\)"),
    ("image", "mask", lambda x: x[:, 0], r"mask has .* \(B, 1, H, W\)"),
    ("image", "coords", lambda x: x[0], r"coords has .* \(B, M, 2\)"),
    ("nvs", "images", lambda x: x[0], r"images has .* \(B, V, 3, H, W\)"),
    ("nvs", "poses", lambda x: F.pad(x, (0, 0, 0, 1)), r"poses has .* \(B, V, 3, 4\)"),
    ("nvs", "focals", lambda x: x[..., 0], r"focals has .* \(B, V, 2\)"),
    ("nvs", "rays_d", lambda x: x[0], r"rays_d has .* \(B, R, 3\)"),
    ("gp", "y", lambda x: x[..., 0], r"y has .* \(B, N, 1\)"),
    ("gp", "x", lambda x: x[..., 0], r"x has .* \(B, N, 1\)")])
def test_tensors_of_another_shape_or_type_are_refused_by_name(task, name, change, words):
    model, (context, query) = tiny(task, "vnp", masked=task == "image"), signals(task)[:2]
    context = context | ({"mask": torch.ones(3, 1, 16, 16)} if task == "image" else {})
    own = query if name in query and name != "x" else context
    own[name] = change(own[name])
    refused(words, model, context, query)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_frequencies_and_axes(dtype):
    for cell in CELLS:
        model = tiny(*cell)
        before = {k: v.clone() for k, v in model.named_buffers() if k in ("freqs", "axis")}
        model.to(dtype)
        assert all(torch.equal(getattr(model, k), v) for k, v in before.items())
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.double().freqs.dtype == torch.float64


@every_cell
@every_kind
def test_other_precisions_and_an_accelerator_agree_with_float32_on_the_cpu(task, name, grid):
    given = context, query = signals(task)
    single = tiny(task, name, grid)(context, query).mean
    to = lambda kind: [{k: v.to(kind) for k, v in x.items()} for x in given]
    exact = tiny(task, name, grid).double()(*to(torch.float64)).mean
    assert exact.dtype == torch.float64
    close(single.double(), exact, 1e-4)
    for dtype, short in product((torch.float16, torch.bfloat16), (False, True)):
        model = tiny(task, name, grid).to(dtype)
        got = model(to(dtype)[0] if short else context, query).mean
        assert (got - single).abs().mean() < 0.1 and got.isfinite().all()
    assert tiny(task, name, grid).to("meta")(*to("meta")).mean.shape == single.shape
    device = tinyinr.choose_device("auto", "fp32").name  # the accelerator, where there is one
    model, (context, query) = tiny(task, name, grid).to(device), to(device)
    code = model.encode(context)
    for got in (model.decode(code, query), tinyinr.predict(model, code, query)):
        close(got.mean.cpu(), single, 1e-4)


@every_model
def test_rays_that_meet_nothing_are_white_without_being_computed(name, monkeypatch):
    """The same to the bit; and nothing else is white, whatever part of the rays is asked for."""
    model, context = tiny("nvs", name), {k: v[:1] for k, v in signals("nvs")[0].items()}
    rays_o, rays_d = (r[0, 0].flatten(0, 1)[None] for r in tinyinr.camera_rays(
        context["poses"], 0.6 * context["focals"], 16, 16))
    query, code, points = {"rays_o": rays_o, "rays_d": rays_d}, model.encode(context), []
    meets = torch.linalg.cross(rays_o, rays_d).norm(dim=-1) < rays_d.norm(dim=-1)  # (1, R)
    field = model.raw_field
    monkeypatch.setattr(model, "raw_field", lambda code, query, *given: (
        points.append(query["rays_o"].shape[1]), field(code, query, *given))[1])
    want = model.decode(code, query).mean
    assert torch.equal(tinyinr.predict(model, code, query).mean, want)
    assert points == [256, int(meets.sum())] and torch.equal((want == 1).all(-1), ~meets)
    assert 50 < meets.sum() < 200
    away = {"rays_o": rays_o, "rays_d": -rays_d}
    assert (tinyinr.predict(model, code, away).mean == 1).all()


# ------------------------------------------------------------------------- official checkpoints


@pytest.fixture(scope="module", params=("whole", "papers"))
def official(request, tmp_path_factory):
    """tinyinr.py, or what it is without its section beyond the papers: name -> model, context,
    query and all stored arrays of an official program's run."""
    program = tinyinr
    if request.param == "papers":
        parts = re.split(r"^(?=# -{20,} )", (ROOT / "tinyinr.py").read_text(), flags=re.M)
        papers = [part for part in parts if not re.match("# -+ beyond the papers", part)]
        (file := tmp_path_factory.mktemp("papers") / "papers.py").write_text("".join(papers))
        spec = importlib.util.spec_from_file_location("papers", file)
        program = sys.modules["papers"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        assert len(papers) == len(parts) - 1 and not hasattr(program, "interpolate")

    def read(name):
        f = {k: torch.from_numpy(np.array(v)) for k, v in np.load(PARITY / f"{name}.npz").items()}
        context, query = ({k: f[f"in.{k}"] for k in names.split() if f"in.{k}" in f} for names in (
            "image images poses focals", "coords rays_o rays_d near far points_per_ray"))
        return program.load(PARITY / f"{name}.pth"), context, query, f
    return read


near = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ("transinr_image_1", "transinr_nvs_1", "transinr_nvs_asis_1"))
def test_official_transinr_outputs(official, name):
    model, context, query, f = official(name)
    code, n_views = model.encode(context), 2 if "asis" in name else 1
    weights = {k.removeprefix("weights."): v for k, v in f.items() if k.startswith("weights.")}
    assert len(weights) == (1 if "asis" in name else len(code)) and model.cfg.n_views == n_views
    near({k: code[k] for k in weights}, weights)
    near(model.decode(code, query).mean, f["out.rgb"])
    if model.cfg.task == "image":
        near(tinyinr.inr(code, f["in.coords"]), f["out.rgb"])
        grid = tinyinr.pixel_grid(22, 22).expand(2, -1, -1)
        near(model.decode(code, {"coords": grid}).mean, f["out.grid_rgb"].flatten(1, 2))
    else:
        near(tinyinr.inr(code, f["in.points"]), f["out.raw"])
        rays = tinyinr.camera_rays(f["in.query_pose"], f["in.query_focal"], 24, 24)
        for got, key in zip(rays, ("rays_o", "rays_d")):
            near(got.flatten(1, 3)[:, f["in.ray_index"]], query[key])


@pytest.mark.parametrize("name", ("vnp_1", "vnp_asis_1"))
def test_official_vnp_outputs(official, name):
    model, context, query, f = official(name)
    code = model.encode(context)
    near(model.decode(code, query, eps=f["in.eps_prior"]).mean, f["out.rgb_prior"])
    z, kl = model.latents(code, query, f["in.eps_posterior"], f["in.target_rgb"])
    near(kl.unsqueeze(1), f["out.kl"])
    near(model.decode(code, query, z=z).mean, f["out.rgb_posterior"])


@pytest.mark.parametrize("change, fields", [
    (dict(pe_sigma=32.0, out_bias=0.25), dict(freq_top=32.0, out_bias=0.25)),
    (dict(), dict(freq_top=1024.0, out_bias=0.0)),  # the official defaults
    (dict(use_pe=False), "use_pe=False cannot be expressed"), (dict(out_dim=1), "out_dim"),
    (dict(pe_dim=20), "weight base.wb0"), (dict(activation="siren"), "activation"),
    ("module.", "no weight begins with base_params")])
def test_official_arguments_are_read_or_refused(change, fields, tmp_path):
    ckpt = torch.load(PARITY / "transinr_image_1.pth", weights_only=True)
    args = ckpt["model"]["args"]["hyponet"]["args"]
    args.pop("out_bias")
    if change == "module.":  # as of a DataParallel
        ckpt["model"]["sd"] = {change + k: v for k, v in ckpt["model"]["sd"].items()}
    else:
        args |= change
    torch.save(ckpt, tmp_path / "c.pth")
    if isinstance(fields, str):
        refused(fields, tinyinr.load, tmp_path / "c.pth")
    else:
        assert asdict(tinyinr.load(tmp_path / "c.pth").cfg).items() >= fields.items()


@pytest.mark.parametrize("part", [None, "tokenizer", "self_attender", "hierarchical_model"])
def test_an_official_argument_that_is_not_known_is_refused(part, tmp_path):
    ckpt = torch.load(PARITY / "vnp_1.pth", weights_only=True)
    args = ckpt["model"]["args"]
    (args[part]["args"] if part else args)["normalize"] = True
    torch.save(ckpt, tmp_path / "c.pth")
    refused("argument='normalize' is unknown", tinyinr.load, tmp_path / "c.pth")


def test_the_file_alone_loads_and_trains(tmp_path):
    """In an empty folder, without data/: import, load, encode, decode and 20 training steps."""
    for file in (ROOT / "tinyinr.py", PARITY / "transinr_image_1.pth"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    code = f"""
import itertools, sys, torch, tinyinr
model = tinyinr.load("transinr_image_1.pth")
code = model.encode({{"image": torch.rand(2, 3, 22, 22)}})
assert model.decode(code, {{"coords": tinyinr.pixel_grid(8, 8)[None]}}).mean.shape == (2, 64, 3)
cfg, recipe = tinyinr.make_config(batch_size=2, n_queries=64, steps=20, grid=4, **{SIZES})
run = tinyinr.Run(cfg, recipe)
pixels = (torch.rand(4, 3, 1, 1, generator=tinyinr.generator(0)) * 255).byte()
batches = tinyinr.image_batches(cfg, recipe, pixels.expand(4, 3, 16, 16))
loss = [float(run.update(b, i / 20)[0]) for i, b in enumerate(itertools.islice(batches, 20))]
assert sum(loss[-4:]) < 0.85 * sum(loss[:4]) and "data" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_dependencies_point_upward():
    """A section of tinyinr.py names nothing of a later one; readers know nothing of models."""
    text = (ROOT / "tinyinr.py").read_text()
    sections = [ast.parse(s) for s in re.split(r"^# -{20,} .*$", text, flags=re.M)]
    names = lambda tree: {n.id for n in ast.walk(tree)
                          if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    defined = [{n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
               for tree in sections]
    assert len(sections) == 16 and all(defined[1:])
    for i, tree in enumerate(sections):
        assert not names(tree) & set().union(*defined[i + 1 :])
    imports = lambda body: {a.name for n in body if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in body if isinstance(n, ast.ImportFrom)}
    assert not {"data", "click", "numpy"} & {n.split(".")[0] for n in imports(sections[0].body)}
    for reader in ("images", "scenes", "curves", "tables", "pictures", "runs", "meshrender",
                   "onnx_graph", "testing", "test_readers"):
        tree = ast.parse((ROOT / "data" / f"{reader}.py").read_text())
        assert not {"tinyinr", "export"} & imports(ast.walk(tree))


def test_an_official_prior_averages_seeded_random_rays():
    query = {"near": 1.0, "rays_o": torch.arange(4096.0).view(1, -1, 1).expand(1, -1, 3)}
    picked = tinyinr.subsample(query, 1024)["rays_o"][0, :, 0]
    assert len(picked.unique()) == 1024 and len((picked % 64).unique()) == 64  # every column
    assert torch.equal(picked, tinyinr.subsample(query, 1024)["rays_o"][0, :, 0])


# ------------------------------------------------------------------------- batches


def configs(task, model, **given):
    """Model and training config of tiny sizes."""
    given, names = SIZES | dict(batch_size=2) | given, {f.name for f in fields(ModelConfig)}
    return (ModelConfig(task, model, **{k: v for k, v in given.items() if k in names}),
            TrainConfig(**{k: v for k, v in given.items() if k not in names}))


def test_epochs_are_permutations_and_any_step_can_be_drawn_alone():
    draw = lambda recipe, steps: sum((tinyinr.batch_indices(7, recipe, s) for s in steps), [])
    recipe = TrainConfig(batch_size=3)
    flat = draw(recipe, range(7))
    assert all(sorted(flat[7 * e : 7 * e + 7]) == list(range(7)) for e in range(3))
    assert flat[:7] != flat[7:14] and flat[15:18] == draw(recipe, [5])
    official = TrainConfig(batch_size=3, repeats=2, drop_last=True)  # 14 visits, 12 in 4 batches
    for epoch in (draw(official, range(4)), draw(official, range(4, 8))):
        assert max(map(epoch.count, range(7))) == 2 and len(set(epoch)) >= 6
    assert tinyinr.epoch_length(2, official) == 3 and tinyinr.epoch_length(1, official) == 2


@pytest.mark.parametrize("zoom", (1, 2))
def test_a_training_batch_holds_the_image_at_its_coordinates(zoom, tmp_path):
    """Mirrored or not; bicubic by Keys' kernel; and the same from the disk by workers."""
    cfg, recipe = configs("image", "transinr", n_queries=30, zoom=zoom, flip=True, batch_size=6)
    data = images.ImageSet(photos(tmp_path, 9, 32), "train", 16, zoom)
    context, query, target = next(tinyinr.image_batches(cfg, recipe, data))
    sources = next(data.batches([(tinyinr.batch_indices(len(data), recipe, 0), 0)]))
    small, large = (sources[i].float() / 255 for i in (0, zoom - 1))
    mirrored = (context["image"] != small).flatten(1).any(1)
    assert torch.equal(context["image"][mirrored], small[mirrored].flip(-1))
    assert 0 < mirrored.sum() < len(mirrored)
    large[mirrored] = large[mirrored].flip(-1)
    at = (query["coords"][0].T.unsqueeze(-1) + 1) * 8 * zoom - 0.5  # (2, 30, 1), in pixels
    t = (at - torch.arange(-2, 16 * zoom + 2)).abs()
    kernel = torch.where(t < 1, 1.25 * t**3 - 2.25 * t**2 + 1, 0.75 * (4 - 8 * t + 5 * t**2 - t**3))
    rows, columns = kernel.masked_fill(t >= 2, 0.0)
    padded = F.pad(large, (2, 2, 2, 2), mode="replicate")
    close(torch.einsum("kr,bcrs,ks->bkc", rows, padded, columns), target, 1e-4)
    assert bool((at == at.round()).all()) is (zoom == 1)
    data.kept = None
    assert torch.equal(next(tinyinr.image_batches(cfg, recipe, data))[2], target)


def test_masked_images_are_seen_in_a_random_part_and_some_of_them_whole():
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for whole in (0.0, 0.5, 1.0):
        cfg, recipe = configs("image", "vnp", masked=True, min_seen=0.2, whole=whole, batch_size=64)
        seen = next(tinyinr.image_batches(cfg, recipe, pixels))[0]["mask"].mean((1, 2, 3))
        assert abs((seen == 1).float().mean() - whole) < 0.15 and seen.min() > 0.1
        assert whole == 1 or 0.5 < seen[seen < 1].mean() < 0.7


def balls(folder, train, test="", size=16):
    """A data set of scenes of a ball with one letter each, split by its file."""
    for i, name in enumerate(sorted({*train, *test})):
        cameras = opposite_cameras(4, i)
        write_layout(folder / "balls" / name, "learnit", cameras, ball_views(cameras, size))
    split = {"train": list(train), "test": list(test)}
    (folder / "ball_splits.json").write_text(json.dumps(split))
    return folder


def test_mirroring_and_recoloring_keep_scenes_consistent():
    """After augmentation the picture is what the moved camera sees of the moved world."""
    before, cameras, focals = rand(6, 2, 3, 8, 8), poses(6, 2), torch.full((6, 2, 2), 9.0)
    after, moved = tinyinr.augment_scenes(before, cameras, [tinyinr.generator(i) for i in range(6)])
    close(moved[..., :3] @ moved[..., :3].mT, torch.eye(3).expand(6, 2, 3, 3))
    assert (moved[..., :3].det() > 0.99).all()
    d, e = (tinyinr.camera_rays(c, focals, 8, 8)[1] for c in (cameras, moved))  # (B, V, H, W, 3)
    for b in range(6):
        mirrored = not torch.allclose(after[b].sum(1), before[b].sum(1))
        a, c = (d[b].flip(-2) if mirrored else d[b]).reshape(-1, 3), e[b].reshape(-1, 3)
        close(a @ a.T, c @ c.T, 1e-4)  # the same up to a motion
        close(a[:, 2], c[:, 2], 1e-4)  # up stays up


def test_classes_are_balanced_by_a_power_of_their_size():
    """4 classes of 1, 4, 16 and 64 objects at balance 0.5: drawn as 1 : 2 : 4 : 8."""
    sizes = np.repeat(numbers := [1, 4, 16, 64], numbers)
    odds, recipe = torch.tensor(sizes**-0.5), TrainConfig(batch_size=1)
    drawn = [tinyinr.batch_indices(85, recipe, step, odds)[0] for step in range(6000)]
    shares = [np.mean(sizes[drawn] == n) for n in numbers]
    np.testing.assert_allclose(shares, np.array([1, 2, 4, 8]) / 15, atol=0.02)
    whole = tinyinr.batch_indices(85, TrainConfig(batch_size=85), 7, odds)
    assert len(set(whole)) == 85  # a signal once a step


@pytest.mark.parametrize("given", [
    dict(target_views=1, n_queries=80), dict(target_views=3), dict(target_views=9, n_queries=80),
    dict(more_views=9, target_views=2, n_queries=80),
    dict(shared_rays=True, n_queries=200, points_per_ray=5)])
def test_training_rays_are_of_other_views_without_replacement_and_shared_as_officially(
        given, tmp_path):
    """Each has the color of its pixel; they start from as many other cameras as asked for.

    Where a context may have more views, its number varies, and another view is left.
    """
    cfg, recipe = configs("nvs", "transinr", augment=True, **given)
    data = scenes.SceneSet(balls(tmp_path, "01", "2"), "train", 16)  # of 4 views each
    count, shared, numbers = recipe.n_queries or 3 * 16**2, recipe.shared_rays, set()
    for step in range(16 if recipe.more_views else 5):
        context, query, color = next(tinyinr.scene_batches(cfg, recipe, data, start=step))
        o, d = query["rays_o"], query["rays_d"]
        near = torch.linalg.cross(o, d).norm(dim=-1) / d.norm(dim=-1)  # distance of ray and origin
        hit = (color < 1).any(-1)
        assert hit[near < 1.15].all() and not hit[near > 1.2].any()  # the ball of `draw_ball`
        numbers.add(n := context["images"].shape[1])
        assert query["jitter"].shape == (2, count, 5 if shared else 1)
        assert torch.equal(*query["jitter"]) == shared
        for i in range(2):
            eyes = o[i].unique(dim=0)
            assert len(eyes) == min(recipe.target_views, 4 - n)
            assert torch.cdist(eyes, context["poses"][i, :, :, 3]).min() > 1e-3
            assert len(torch.cat((o[i], d[i]), 1).unique(dim=0)) == count
    assert numbers == ({1, 2, 3} if recipe.more_views else {1})


def test_a_batch_of_curves_has_contexts_of_every_size():
    """Its mask tells which points are context; targets are the others' mean given these."""
    batches = tinyinr.curve_batches(*configs("gp", "vnp", batch_size=16, n_queries=24),
                                    curves.sampler("rbf"))
    counts = []
    for context, query, target in islice(batches, 60):
        n = context["mask"].sum((1, 2)).int()
        assert context["x"].shape[1] == n.max() and query["x"].shape == target.shape == (16, 24, 1)
        assert not (query["x"] == context["x"].mT).any() and (query["var"] > 0).all()
        counts += n.tolist()
    shares = np.bincount(counts, minlength=47)
    assert len(shares) == 47 and shares.min() > 0 and np.mean(counts) == pytest.approx(23, abs=1.5)


@pytest.mark.parametrize("kernel", ("rbf", "all", "series"))
def test_the_posterior_of_drawn_curves_is_that_of_their_covariance(kernel, monkeypatch):
    """And series are standardised, half of them with their points at equal distances."""
    given, cholesky = [], torch.linalg.cholesky
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky", lambda k: given.append(k) or cholesky(k))
        x, y, _, posterior = curves.sampler(kernel, 0.1)(64, 30, torch.Generator().manual_seed(0))
    (k,), (mean, var) = given, posterior((torch.arange(30) < 12).expand(64, -1))
    gain = torch.linalg.solve(k[:, :12, :12], k[:, :12, 12:]).mT
    close(mean[:, 12:], gain @ y[:, :12], 1e-6)
    close(var[:, 12:, 0], (k[:, 12:, 12:] - gain @ k[:, :12, 12:]).diagonal(dim1=1, dim2=2), 1e-6)
    close(mean[:, :12], y[:, :12], 1e-6)
    gaps = x.sort(1)[0].diff(dim=1).squeeze(-1)
    equal = (gaps.amax(1) - gaps.amin(1) < 1e-6).float().mean()
    if kernel == "series":
        assert y.mean(1).abs().max() < 0.01 and 0.4 < y.std(1).mean() < 0.55 and 0.3 < equal < 0.7
    else:
        assert equal == 0


def test_of_curves_of_two_values_what_is_known_is_context_or_target():
    """Half of the curves show one value at all points; what is missing is neither."""
    there = rand(200, 96, 2) < 0.7
    draw = lambda batch, points, gen: (rand(batch, points, 1), rand(batch, points, 2),
                                       there[:batch, :points])
    cfg, recipe = configs("gp", "vnp", batch_size=200, n_queries=24, n_values=2)
    context, query, _ = next(tinyinr.curve_batches(cfg, recipe, draw))
    known, given = there[:, : context["x"].shape[1]].float(), context["mask"]
    assert torch.equal(query["mask"], (known - given)[:, -24:]) and query["mask"].min() == 0
    whole = (given == known).all(1)
    assert torch.equal(whole.sum(1) == 1, whole.any(1)) and 80 < whole.sum() < 120


# ------------------------------------------------------------------------- processes


def train_args(task, name, folder, *extra):
    """The command that trains a tiny model of a cell on data of its own."""
    pairs = SIZES | dict(batch_size=4, n_queries=16, grid=GRID[task])
    data = {"image": lambda: ("--data", photos(folder / "photos", 12)), "gp": tuple,
            "nvs": lambda: ("--data", balls(folder / "scenes", "0123", "45"))}[task]()
    where = ("--device", DEVICE)  # for processes of their own
    return ("train", "--task", task, "--model", name, *where, *data,
            *(v for k, value in pairs.items() for v in ("--set", f"{k}={value}")), *extra)


def start(*args, processes=0):
    """The command line in a process of its own, or in several by torchrun."""
    if DEVICE == "cuda" and processes > torch.cuda.device_count():
        pytest.skip(f"{processes} processes need a GPU each")
    by = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *by * bool(processes), str(ROOT / "tinyinr.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def logged(out):
    """The rows in the log of a run."""
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def saved(out):
    """The checkpoint of a run."""
    return torch.load(out / "ckpt.pt", weights_only=True)


def wait_for_step(step, out, process):
    """Until a running process has logged a step beyond this one."""
    end = time.monotonic() + 60
    while (ends := not any(row["step"] > step for row in logged(out))) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not ends, process.stdout.read()


def finish(process, code=0, seconds=120):
    """The output of a process that must end by itself."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize("task, name, pieces", [("image", "vnp", 1), ("nvs", "transinr", 2)])
def test_one_process_leaves_the_same_file_again_and_two_learn_it(task, name, pieces, tmp_path):
    """20 steps of the whole batch in one process, and by halves or quarters in two."""
    args = train_args(task, name, tmp_path, "--precision", "fp32", "--smoke", "--steps", 20)
    args += ("--set", "masked=True", "--set", "min_seen=0.2")
    one, two = tmp_path / "one", tmp_path / "two"
    alone, _ = (run(*args, "--out", out) for out in (one, tmp_path / "again"))
    assert (one / "ckpt.pt").read_bytes() == (tmp_path / "again/ckpt.pt").read_bytes()
    args += ("--set", f"grad_accum_steps={pieces}", "--out", two)
    together = finish(start(*args, processes=2))
    a, b = saved(one), saved(two)
    assert a["step"] == b["step"] == 20
    for key, value in a["model"].items():
        keep = slice(SIZES["dim"] * key.endswith("kv.bias"), None)  # a bias of all keys cancels
        close(b["model"][key][keep], value[keep])
    assert together.count("minutes; val split:") == 1  # one writer
    assert together.count("masked is for image") == (task != "image")  # and of no use
    scores = [[float(v) for v in re.findall(r" (-?\d+\.\d\d)\b", text.split("val split:")[1])]
              for text in (alone, together)]
    assert scores[0] and scores[0] == pytest.approx(scores[1], abs=0.011)
    steps = [row["step"] for row in logged(two)]
    assert steps == sorted(set(steps))


def test_a_killed_worker_ends_the_run(tmp_path):
    process = start(*train_args("gp", "vnp", tmp_path, "--steps", 1000, "--out", tmp_path / "run"),
                    processes=2)
    wait_for_step(0, tmp_path / "run", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    finish(process, 1, 30)


def test_processes_share_a_batch_without_overlap(monkeypatch):
    cfg, recipe = configs("gp", "vnp", batch_size=6, n_queries=5)
    draw = lambda: next(tinyinr.curve_batches(cfg, recipe, curves.sampler("rbf"), start=3))[2]
    whole, parts = draw(), []
    for rank in range(3):
        for module in (tinyinr, evaluation):
            monkeypatch.setattr(module, "rank_and_world_size", lambda: (rank, 3))
        parts.append(draw())
        assert [i for i, _ in evaluation.shard("abcdefgh")] == list(range(rank, 8, 3))
    assert torch.equal(torch.cat(parts), whole)


# ------------------------------------------------------------------------- losses and metrics


def test_psnr_by_hand():
    a, b = torch.full((1, 4, 3), 0.6), torch.full((1, 4, 3), 0.5)
    assert float(tinyinr.psnr(a, b)) == pytest.approx(20, abs=1e-4)
    assert float(tinyinr.psnr(a + 1, torch.ones(1, 4, 3))) > 100  # clamped
    assert float(tinyinr.psnr(a + 1, b + 0.5, False)) == pytest.approx(-20 * math.log10(0.6))


def test_the_likelihood_of_images_is_gaussian_in_the_paper():
    signal = tiny("image", "vnp", grid=0).signal
    target, mean, std = rand(2, 5, 3), rand(2, 5, 3, seed=2), 0.1 + rand(2, 5, 3, seed=1)
    want = -torch.distributions.Normal(mean, std).log_prob(target)
    close(signal.error(tinyinr.Prediction(mean, std), target), want)


def test_with_a_grid_the_std_of_images_covers_95_percent_and_the_mean_ignores_it():
    signal, target = tiny("image", "vnp").signal, torch.distributions.Laplace(0.5, 0.1).icdf(
        0.001 + 0.998 * rand(1, 4000, 3))
    mean, std = torch.full_like(target, 0.5).requires_grad_(), torch.linspace(0.05, 0.3, 501)
    losses = [signal.error(tinyinr.Prediction(mean.detach(), s), target).mean() for s in std]
    best = float(std[torch.stack(losses).argmin()])
    assert best == pytest.approx(float((target - 0.5).abs().quantile(0.95)) / 1.96, abs=1e-3)
    with torch.enable_grad():
        loss = signal.error(tinyinr.Prediction(mean, std[:1]), target).sum()
        close(*torch.autograd.grad(loss, mean), 2 * (0.5 - target) / 0.05**2, 1e-4)


def test_a_target_of_a_known_variance_counts_as_values_drawn_from_it():
    model, (context, query) = tiny("gp", "transinr"), signals("gp")
    target, std = rand(3, 7, 1, seed=4), 0.1 + rand(3, 7, 1, seed=5)
    loss, _ = tinyinr.objective(model, (context, query | {"var": std.square()}, target))
    values = torch.stack((target + std, target - std))  # two values of this mean and variance
    want = -tinyinr.log_likelihood(model(context, query), values).mean()
    close(loss, want)


@pytest.mark.parametrize("masked", (False, True))
def test_the_elbo_written_out_by_hand(masked):
    """Minus the mean log-likelihood of known values, plus the KL divergence per known value."""
    model, (context, query) = tiny("gp", "vnp"), signals("gp")
    target, eps = rand(3, 7, 1, seed=4), torch.randn(2, 3, 1, 5)
    mask = rand(3, 7, 1, seed=5) < (0.6 if masked else 1)
    query |= {"mask": mask.float()} if masked else {}
    loss, mse = tinyinr.objective(model, (context, query, target), eps, kl_weight=0.3)
    code = model.encode(context)
    z, kl = model.latents(code, query, eps, target)
    mean, std = model.decode(code, query, z=z)
    ll = torch.distributions.Normal(mean, std).log_prob(target)[mask]
    close(loss, -ll.mean() + 0.3 * kl.sum() / len(ll))
    close(mse, (mean - target)[mask].square().mean())


def test_pieces_of_a_batch_of_which_values_are_missing_add_up_to_its_gradient():
    cfg, recipe = make_config("small", "gp", "vnp", **SIZES | dict(
        grid=48, n_features=12, n_harmonics=3, n_values=2, batch_size=4, n_queries=6,
        precision="fp32"))
    least = torch.tensor([0.8, 0.8, 0, 0]).view(4, 1, 1)  # most of two curves' values are unknown
    table = lambda batch, points, gen: (
        torch.rand(batch, points, 1, generator=gen), torch.rand(batch, points, 2, generator=gen),
        torch.rand(batch, points, 2, generator=gen) > least)
    batch, grads = next(tinyinr.curve_batches(cfg, recipe, table)), []
    for pieces in (1, 2):
        run = tinyinr.Run(cfg, replace(recipe, grad_accum_steps=pieces))
        parts = [[tinyinr.micro_batch(v, i, pieces) for v in batch] for i in range(pieces)]
        with torch.enable_grad():
            loss = sum(run.loss(part, None, 1.0)[0] for part in parts) / pieces
            grads.append(torch.autograd.grad(loss, run.model.head[2].weight)[0])
    close(*grads, 1e-5)


# ------------------------------------------------------------------------- training


def test_the_schedules():
    step, linear = TrainConfig(warmup=10), TrainConfig(lr_schedule="linear")
    factors = [tinyinr.lr_factor(step, *at) for at in ((0, 0.0), (50, 0.79), (50, 0.8))]
    factors += [tinyinr.lr_factor(linear, 0, p) for p in (0.0, 0.25, 1.0)]
    assert factors == pytest.approx([0.1, 1, 0.1, 1, 0.75, 0])


def test_every_parameter_has_one_optimizer_and_muon_gets_the_matrices():
    cfg, recipe = configs("image", "transinr", muon_lr=0.02)
    model = build(cfg)
    adam, muon = tinyinr.make_optimizers(model, recipe, tinyinr.choose_device("cpu"))
    ids = [id(p) for o in (adam, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert len(muon.param_groups[0]["params"]) == 4 * cfg.depth


def test_muon_agrees_with_pytorchs_up_to_its_bf16():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 24), (24, 8), (8, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = tinyinr.Muon(ours, 0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_device_choices(monkeypatch):
    cuda, mps = torch.cuda, torch.backends.mps
    for there, bf16, want in (((), True, ("cpu", torch.bfloat16)), ((), False, ("cpu", None)),
                              ((cuda, mps), True, ("cuda", torch.bfloat16)),
                              ((mps,), True, ("mps", None))):
        for backend in (cuda, mps):
            monkeypatch.setattr(backend, "is_available", lambda there=backend in there: there)
        monkeypatch.setattr(cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
        device = tinyinr.choose_device("auto")
        assert (device.name, device.dtype) == want
        for task, fast in (("image", device.name == "cuda"), ("gp", False)):  # a regression's not
            with device.tf32(make_config("small", task)[0]):
                assert torch.get_float32_matmul_precision() == ("high" if fast else "highest")
        assert torch.get_float32_matmul_precision() == "highest"  # a caller's products stay fp32
    refused("cuda.*cpu or auto", tinyinr.choose_device, "cuda")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on a folder of photos: its command without --out, and what it left."""
    folder = tmp_path_factory.mktemp("trained")
    args, out = train_args("image", "transinr", folder, "--steps", 6), folder / "run"
    run(*args, "--out", out)
    ckpt = tinyinr.read_checkpoint(out / "ckpt.pt")
    return SimpleNamespace(args=args, data=folder / "photos", out=out, ckpt=ckpt, configs=(
        ModelConfig(**ckpt["config"]), TrainConfig(**ckpt["recipe"])))


def test_training_leaves_checkpoint_log_and_picture_and_resumes_by_its_folder(trained, tmp_path):
    assert sorted(p.name for p in trained.out.iterdir()) == ["ckpt.pt", "log.jsonl", "samples.png"]
    rows = logged(trained.out)
    assert [row["step"] for row in rows if "val_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "psnr", "lr", "ms", "signals_per_s", "elapsed"} <= set(rows[-1])
    shutil.copytree(trained.out, tmp_path / "run")
    run("train", "--resume", "--out", tmp_path / "run", "--steps", 8)
    ckpt = saved(tmp_path / "run")
    assert ckpt["step"] == ckpt["recipe"]["steps"] == 8 and ckpt["data"] == str(trained.data)


def test_validation_is_the_loss_and_psnr_of_held_out_batches(trained):
    image = images.stack(images.ImageSet(trained.data, "val", 16).kept)[0].float() / 255
    query, target = {"coords": tinyinr.pixel_grid(16, 16)[None]}, image.flatten(2).mT
    training = tinyinr.Run(*trained.configs, tinyinr.choose_device("cpu", "fp32"), trained.ckpt)
    mse = (training.model({"image": image}, query).mean - target).square().mean()
    got = [*training.validate([({"image": image}, query, target)]).values()]
    assert got == pytest.approx((float(mse), -10 * math.log10(mse)), rel=1e-5)


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(trained, tmp_path):
    """Saved after three of six steps, begun anew and gone on with."""
    data = images.ImageSet(trained.data, "train", 16, trained.configs[1].zoom)
    half, device = None, tinyinr.choose_device(DEVICE)
    with torch.enable_grad():
        for first in (0, 3):
            training = tinyinr.Run(*trained.configs, device, half)
            batches = tinyinr.image_batches(*trained.configs, data, device.name, first)
            for _, batch in zip(range(3), batches):
                training.update(batch, training.step / 6)
            training.save(tmp_path / "half.pt")
            half = tinyinr.read_checkpoint(tmp_path / "half.pt")
    assert half["step"] == 6
    close(half["model"], trained.ckpt["model"], 0.0)


def test_fields_are_read_as_typed():
    assert commands.parse_fields(["flip=true", "masked=no", "lr=3e-4", "dim=64"]) == {
        "flip": True, "masked": False, "lr": 3e-4, "dim": 64}
    for pair, words in (("flip=maybe", "takes a bool"), ("dim=x", "takes a int"),
                        ("task=gp", "is unknown"), ("color=1", "is unknown")):
        refused(words, commands.parse_fields, [pair])


def full_disk(file, data):
    with open(file, "wb") as f:
        f.write(bytes(data)[:100])
    raise OSError(28, "No space left on device")


def test_neither_a_bad_loss_nor_a_full_disk_harms_the_last_checkpoint(tmp_path, monkeypatch):
    training, file = tinyinr.Run(*configs("image", "transinr")), tmp_path / "ckpt.pt"
    training.save(file)
    good = file.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full_disk)
        training.save(file)
    (context, query), target = signals("image"), rand(3, 7, 3, seed=2)
    with torch.enable_grad(), pytest.raises(
            tinyinr.RunFailed, match="the loss of step 1 is not finite"):
        for factor in (1, math.inf, 1):
            training.update((context, query, target * factor), 0.5)
        training.save(file)
    assert file.read_bytes() == good and [*tmp_path.iterdir()] == [file]


def test_sigterm_saves_and_says_how_to_go_on_and_a_kill_leaves_that_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = start(*train_args("image", "transinr", tmp_path, "--steps", 2000, "--out", out))
    wait_for_step(0, out, process)
    process.send_signal(signal.SIGTERM)
    *_, words, command = finish(process).splitlines()
    step = saved(out)["step"]
    assert words == f"SIGTERM: saved step {step}; go on with"
    python, program, *args = shlex.split(command)  # the command that was printed does go on
    assert (python, Path(program)) == ("python", ROOT / "tinyinr.py")
    process = start(*args)
    wait_for_step(step, out, process)
    process.kill()
    process.communicate()
    assert saved(out)["step"] == step
    runs.truncate_log(out / "log.jsonl", step)  # as the next run does
    assert logged(out)[-1]["step"] == step


def test_a_signal_before_the_first_step_saves_as_well(tmp_path, monkeypatch):
    prepare = commands.prepare_batches
    monkeypatch.setattr(commands, "prepare_batches", lambda *args: (
        os.kill(os.getpid(), signal.SIGINT), prepare(*args))[1])
    output = run(*train_args("image", "transinr", tmp_path, "--steps", 5, "--out", tmp_path / "r"))
    assert "SIGINT: saved step 0; go on with" in output
    assert saved(tmp_path / "r")["step"] == 0


@every_cell
def test_every_cell_learns(task, name, tmp_path):
    """Far better than at the start, and the context matters."""
    cfg, recipe = configs(
        task, name, grid={"image": 4, "nvs": 3, "gp": 48}[task], batch_size=4, n_queries=32,
        lr=3e-3, muon_lr=0.02, beta2=0.95, freq_top=4.0, lr_schedule="linear", grad_clip=1.0,
        kl_weight=1e-3, depth=1)
    data = {"image": lambda: images.ImageSet(photos(tmp_path, 7), "train", 16),
            "nvs": lambda: scenes.SceneSet(balls(tmp_path, "0123", "0"), "train", 16),
            "gp": lambda: curves.sampler("rbf")}[task]()
    steps, batches = 120, tinyinr.BATCHES[task](cfg, recipe, data)
    with torch.enable_grad():
        training = tinyinr.Run(cfg, recipe)
        losses = [float(training.update(next(batches), i / steps)[1]) for i in range(steps)]
    first, last = np.mean(losses[:5]), np.mean(losses[-10:])
    model, (context, query, target) = training.model.eval(), next(batches)
    error = lambda c: float((model(c, query).mean - target).square().mean())
    wrong = {k: v.roll(1, 0) for k, v in context.items()}
    assert last < 0.4 * first, (first, last)
    if task != "nvs":  # the balls are all alike
        assert error(wrong) > 1.2 * error(context), (error(wrong), error(context))


# ------------------------------------------------------------------------- test-time optimization


@pytest.mark.parametrize("conv_nodes, n_views, refined_at, rate", [
    (0, 2, "grid|wb.|rgb_density_fc", 1e-4), (4, 1, "grid", 1e-3),
    (4, 2, "grid|wb.|rgb_density_fc", 2e-4)])
def test_optimization_equals_a_plain_adam_loop(conv_nodes, n_views, refined_at, rate):
    """Of a signal alone, on the same random rays: every third is mirrored, doubted if far off."""
    model = tiny("nvs", "transinr", conv_nodes=conv_nodes)
    signs = 1 - 2 * (torch.arange(100) % 3 == 0)[:, None] * torch.tensor([1, 0, 0])
    context = {k: v[:, :n_views] for k, v in signals("nvs", batch=2)[0].items()}
    code = model.encode(context)
    first = tinyinr.optimize(model, code, context, 1)["grid"] - code["grid"]
    assert first.abs().max() == pytest.approx(rate, rel=1e-3)  # Adam's first step
    refined = tinyinr.optimize(model, code, context, 3, lr=1e-2, targets=100)
    query, values, _ = model.signal.context_as_targets(context)
    for b in ([0], [1]):
        one = {k: v[b].requires_grad_(bool(re.fullmatch(refined_at, k))) for k, v in code.items()}
        adam = torch.optim.Adam([v for v in one.values() if v.requires_grad], 1e-2)
        for step in range(3):
            pick = torch.randperm(values.shape[1], generator=tinyinr.generator(step, 6))[:100]
            part = {k: v[b][:, pick] * signs for k, v in query.items()}
            with torch.enable_grad():
                adam.zero_grad()
                error = (model.decode(one, part).mean - values[b][:, pick]).square().mean(-1)
                doubt = torch.where(signs[:, 0] < 0, 0.01 / (0.01 + error.detach()), 1)
                (doubt * error).mean().backward()
            adam.step()
        got = {k: v[b] for k, v in refined.items()}
        torch.testing.assert_close(got, one, atol=1e-4, rtol=1e-3)


def test_an_image_is_refined_as_the_means_over_its_pixels():
    """A pixel is what a picture of twice the size shows, reduced; so refined, it comes closer."""
    model, (context, _) = tiny("image", "transinr"), signals("image")
    reduced = lambda code: F.interpolate(
        model.decode(code, {"coords": tinyinr.pixel_grid(32, 32)[None]}).mean.mT.unflatten(
            2, (32, 32)), 16, mode="bilinear", antialias=True)[..., 1:-1, 1:-1]
    code, query = model.encode(context), {"coords": tinyinr.pixel_grid(16, 16)[None]}
    shown = model.signal.observed(lambda query: model.decode(code, query), query)
    close(shown.mT.unflatten(2, (16, 16))[..., 1:-1, 1:-1], reduced(code), 1e-5)
    error = lambda code: (reduced(code) - context["image"][..., 1:-1, 1:-1]).square().mean()
    assert error(tinyinr.optimize(model, code, context, 10, lr=1e-2)) < 0.7 * error(code)


@pytest.mark.parametrize("task, name", (("gp", "transinr"), ("gp", "vnp"), ("image", "vnp")))
def test_what_optimization_would_harm_is_refused(task, name):
    model, (context, _) = tiny(task, name), signals(task)
    refused("only a TransINR of images or scenes", tinyinr.optimize, model, model.encode(context),
            context, 1)


# ------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize("kind", ("checkpoint", "official checkpoint"))
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    for i, cell in enumerate(CELLS):
        tinyinr.save(tiny(*cell), tmp_path / f"{i}.pt")
    files = [p for p in PARITY.glob("*.pth") if p.stat().st_size < 10**6]
    files = sorted(files if "official" in kind else tmp_path.glob("*.pt"))
    good, file = [p.read_bytes() for p in files], tmp_path / "input"
    check_damaged(kind, tmp_path, good, file, lambda: [tinyinr.load(file).freqs])


@pytest.mark.parametrize("change, words", [
    (dict(weight_tokens=torch.full((19, 32), math.nan)), "not finite"),
    (dict(config=dict(dim=10**12)), "dim=1000000000000 must be from 1 to 1,048,576"),
    (dict(config=dict(dim=2**20, ff_dim=2**20)), "weight .* its config asks for"),
    (dict(config=dict(depth=1000)), "weight transformer.10.* is missing"),
    (dict(config=dict(dim="32")), "dim='32' must be a int"),
    (dict(weight_tokens=torch.zeros(1).expand(19, 32)), "claims more numbers than the file holds"),
    (dict(weight_tokens=torch.zeros(1).expand(10**6, 10**6)), "is .1000000, 1000000., its config"),
    (dict(compressed=torch.zeros(10**6)), "not a readable checkpoint")])
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(change, words, tmp_path):
    """Before memory is taken: the whole test takes less than 200 MB more than it began with."""
    model, file = tiny("image", "transinr"), tmp_path / "bad.pt"
    state = {"config": asdict(model.cfg) | change.get("config", {}), "model": model.state_dict()}
    state["model"] |= {k: v for k, v in change.items() if k != "config"}
    torch.save(state, file)
    if "compressed" in change:  # torch.save compresses nothing
        shutil.unpack_archive(file, tmp_path / "parts", "zip")
        file = shutil.make_archive(tmp_path / "bad", "zip", tmp_path / "parts", "bad")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(words, tinyinr.load, file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# ------------------------------------------------------------------------- command line


def check_picture(file, want, tol=0.5):
    """The pixels of a file are these values in [0, 1], up to so many 255ths."""
    close(torch.from_numpy(np.array(Image.open(file))) / 255, want.clamp(0, 1), tol / 255 + 1e-5)


def test_render_draws_what_the_function_is_and_encode_writes_its_numbers(trained, tmp_path):
    """In the shape of the photo; of a folder every photo's."""
    ckpt, wide, square = trained.out / "ckpt.pt", tmp_path / "wide.png", trained.data / "p3.png"
    noisy(30, 60).save(wide)
    for out in ("r.png", "r.npz"):
        run("render", ckpt, wide, "-o", tmp_path / out, "--size", 64)
    shutil.copytree(trained.data, tmp_path / "set")
    shutil.copy(wide, tmp_path / "set")
    run("encode", ckpt, tmp_path / "set", "-o", tmp_path / "codes.npz")
    model, numbers = tinyinr.load(ckpt), np.load(tmp_path / "r.npz")
    codes = np.load(tmp_path / "codes.npz")
    code, other = (model.encode(rendering.read_context(model, p)[0]) for p in (wide, square))
    want = model.decode(code, {"coords": tinyinr.pixel_grid(32, 64)[None]}).mean
    check_picture(tmp_path / "r.png", want.view(32, 64, 3))
    assert (numbers["pixels"][0] == np.array(Image.open(tmp_path / "r.png"))).all()
    for name in code:
        close(torch.from_numpy(numbers[name]), code[name])
        for path, want in ((square, other), (wide, code)):
            row = codes["names"].tolist().index(path.name)
            close(torch.from_numpy(codes[name][row]), want[name][0], 1e-4)
    shutil.copy(ckpt, tmp_path / "a.pt")
    for record, told in (('{"files": {}}', False), ("damaged", False),
                         ('{"scores": {"a": 1}}', True)):
        (tmp_path / "a.json").write_text(record)
        info = run("info", tmp_path / "a.pt")
        assert re.search("transinr on image, .*dim=32.*step: 6", info, re.S)
        assert ("a.json" in info) == told


def test_what_a_mask_hides_of_a_photo_has_no_influence(tmp_path):
    """A context pixel counts as seen where all of it is, whatever the file's size."""
    ckpt, seen = ROOT / "data/pretrained/image-vnp.pt", np.full((96, 64), 255, np.uint8)
    seen[30:70, :33] = 0  # rows 20 to 46 of 64, columns 0 to 32, of which the last is cut
    Image.fromarray(seen).save(tmp_path / "seen.png")
    photo = np.array(noisy(96, 64))
    for name, hidden in (("a", 0), ("b", 255)):
        Image.fromarray(np.where(seen[..., None], photo, hidden).astype(np.uint8)).save(
            tmp_path / f"{name}.png")
        run("render", ckpt, tmp_path / f"{name}.png", "--mask", tmp_path / "seen.png", "-o",
            tmp_path / f"{name}-whole.png", "--size", 96)
    drawn = [np.array(Image.open(tmp_path / f"{name}-whole.png")) for name in "ab"]
    assert drawn[0].shape == (96, 64, 3) and (drawn[0] == drawn[1]).all()
    context, _ = rendering.read_context(tinyinr.load(ckpt), tmp_path / "a.png",
                                        tmp_path / "seen.png")
    hidden = context["mask"][0, 0] == 0
    assert hidden[20:46, :33].all() and not hidden[:19].any() and not hidden[48:].any()
    assert not hidden[:, 34:].any()


def test_a_scene_is_rendered_from_given_cameras_and_all_around(tmp_path):
    ckpt, model, z = PARITY / "vnp_1.pth", tinyinr.load(PARITY / "vnp_1.pth"), None
    side = model.cfg.image_size
    scene = balls(tmp_path, "a", size=side) / "balls/a"
    cameras = ("--pose", scene / "transforms.json")
    run("render", ckpt, scene, "-o", tmp_path / "views", "--size", 8, *cameras)
    views = scenes.read_scene(*scenes.find_scene(scene), side)
    code = model.encode(rendering.scene_context(model, views))
    for i, (pose, focal) in enumerate(zip(views.poses, views.focals * 8 / side)):
        query = picture_rays(pose, focal, 8)
        z = model.latents(code, query)[0] if z is None else z  # for all views
        want = model.decode(code, query, z=z).mean
        check_picture(tmp_path / f"views/{i:03}.png", want.view(8, 8, 3))
    run("render", ckpt, tmp_path / "views/000.png", "-o", tmp_path / "t.gif", "--size", 4)
    assert Image.open(tmp_path / "t.gif").n_frames == 36


def test_an_object_is_read_from_as_many_views_as_were_trained_on_spread_around_it(tmp_path):
    eyes = torch.tensor([4.0, 0, 0]) + torch.tensor([[0.0], [1], [1], [9], [5]])
    assert scenes.spread_views(torch.stack([eyes] * 4, -1), 5) == [0, 3, 4, 1, 2]
    model = tiny("nvs", "transinr")
    found = scenes.find_scene(balls(tmp_path, "a") / "balls/a")
    views = scenes.read_scene(*found, 16, sphere=True)
    for more, given, n in ((2, (), 3), (9, (), 4), (9, ("--views", 2), 2), ("x", (), 1)):
        tinyinr.save(model, tmp_path / "c.pt", recipe={"more_views": more})
        run("render", tmp_path / "c.pt", tmp_path / "balls/a", "-o", tmp_path / "c.npz",
            "--size", 2, "--pose", tmp_path / "balls/a/transforms.json", *given)
        picked = scenes.spread_views(views.poses, n)
        assert picked[:2] == [0, 2][:n]  # opposite
        want = model.encode({k: getattr(views, k)[None, picked] / (255 if k == "images" else 1)
                             for k in ("images", "poses", "focals")})
        for name, w in np.load(tmp_path / "c.npz").items():
            if name != "pixels":
                close(torch.from_numpy(w), want[name])


def test_a_prediction_of_a_table_is_written_in_its_units(tmp_path):
    tinyinr.save(model := tiny("gp", "vnp"), tmp_path / "c.pt")
    (tmp_path / "t.csv").write_text("day;price, 円\n10;100\n20;300\n30;200\n", "utf-8")
    run("render", tmp_path / "c.pt", tmp_path / "t.csv", "-o", tmp_path / "p.csv", "--size", 256)
    header, *rows = csv.reader((tmp_path / "p.csv").read_text("utf-8").splitlines())
    days, mean, std, lower, upper = np.array(rows, float).T
    assert header == ["day", *(f"price, 円 {k}" for k in ("mean", "std", "lower", "upper"))]
    np.testing.assert_allclose((mean - lower, upper - mean), (1.96 * std,) * 2, rtol=1e-3)
    np.testing.assert_allclose(days, np.linspace(10, 30, 256), rtol=1e-6)
    scale = 100 / math.sqrt(3 / 8)  # y has mean 0 and standard deviation 0.5
    x, y = (torch.tensor(v).view(1, 3, 1) for v in ([-2.0, 0, 2], [-100 / scale, 100 / scale, 0]))
    grid = torch.linspace(-2, 2, 256)[None, :, None]
    draws = evaluation.sample_curves(model, {"x": x, "y": y}, grid, 32, tinyinr.generator(8))
    np.testing.assert_allclose(mean, draws.mean.mean(0)[0, :, 0] * scale + 200, atol=0.05)
    (tmp_path / "gaps.csv").write_text("x,a,b\n1,,2\n2,,3\n,4,5\n")
    assert "Error: a: no value beside an x" in run(
        "render", tmp_path / "c.pt", tmp_path / "gaps.csv", "-o", tmp_path / "q.csv", "--columns",
        "x,a,b", code=2)


def test_an_image_is_rendered_with_one_draw_of_latents_pooled_over_a_fixed_grid():
    """Whatever its size, where the prior is over the query; a smaller picture is a reduced one."""
    model = tiny("image", "vnp", latent_pool="query")
    code, fixed = model.encode(signals("image", 1)[0]), tinyinr.pixel_grid(32, 32)[None]
    z = model.latents(code, {"coords": fixed})[0]
    mean = model.decode(code, {"coords": tinyinr.pixel_grid(64, 48)[None]}, z=z).mean
    want = mean.clamp(0, 1).view(64, 48, 3)
    for size in ((64, 48), (32, 24)):
        drawn = rendering.render_image(model, code, *size) / 255
        close(torch.from_numpy(drawn), F.interpolate(
            want.movedim(2, 0)[None].double(), size, mode="bilinear", antialias=True)[0].movedim(
                0, 2), 1.5 / 255)


def test_scores_have_standard_errors_and_images_a_larger_truth(tmp_path):
    """Of pixels as means over a triangle, at their centers, and at those of the larger images."""
    model = tiny("image", "transinr")
    data = images.ImageSet(photos(tmp_path, 20, 32), "train", 16, 2)
    row = evaluation.evaluate(model, evaluation.image_cases(model, data))["all"]
    pixels, large = images.stack(data.kept)
    code = model.encode({"image": pixels / 255})
    at = lambda size: model.decode(code, {"coords": tinyinr.pixel_grid(size, size)[None]}).mean
    side = torch.tensor((1.0, 3.0, 3.0, 1.0))
    triangle = lambda v: F.conv2d(v.reshape(-1, 1, 32, 32), side.outer(side)[None, None], stride=2,
                                  padding=1).view(-1, 3, 256).mT
    mean = triangle(at(32).mT) / triangle(torch.ones(3, 32, 32))
    quality = lambda mean, true: tinyinr.psnr(mean, (true / 255).flatten(2).mT)
    for name, values in (("psnr", quality(mean, pixels)), ("centers", quality(at(16), pixels)),
                         ("large", quality(at(32), large))):
        assert row[name] == pytest.approx(float(values.mean()), abs=1e-3)
        assert row[f"{name}_se"] == pytest.approx(float(values.std() / len(data) ** 0.5), abs=1e-3)
    assert row["truth_bicubic"] > row["large_bicubic"] and row["pictures"] == len(data)


def test_of_an_image_that_is_seen_in_part_the_other_pixels_are_scored(tmp_path):
    """Error, coverage and baselines, pixel by pixel; what is seen of the filling is exact."""
    model = tiny("image", "vnp", masked=True)
    case = list(evaluation.image_cases(model, images.ImageSet(photos(tmp_path, 3), "all", 16)))[1]
    assert case.label.endswith("10% seen")
    row = evaluation.evaluate(model, [case])[case.label]
    image, mask = case.context["image"], case.context["mask"].bool()
    code = model.encode(case.context)
    mean = evaluation.pixel_values(model, lambda query: model.decode(code, query), case.query)
    std = model.decode(code, case.query).std
    filled = tinyinr.fill_unseen(image * mask, mask.float()).flatten(2).mT
    nearest = images.nearest_filling(image, mask.float())
    want = {k: [] for k in ("psnr", "coverage", "filled", "nearest")}
    for b in range(3):
        unseen, truth = ~mask[b].flatten(), image[b].flatten(1).T
        for k, values in ("psnr", mean), ("filled", filled), ("nearest", nearest):
            off = (values[b].clamp(0, 1) - truth)[unseen]
            want[k].append(-10 * math.log10(off.square().mean()))
        inside = (mean[b] - truth).abs() < 1.96 * std[b]
        want["coverage"].append(float(inside[unseen].float().mean()))
    assert row == pytest.approx(row | {k: np.mean(v) for k, v in want.items()}, abs=1e-3)


def test_standard_errors_count_the_values_of_a_unit_once():
    """Of equally many values they are that of the means of three units; two parts have each."""
    values = rand(2, 3, 2, 4)
    parts = [(i, ("a",), {"v": v}, torch.full((2,), i % 3))
             for i, v in enumerate(values.flatten(0, 1))]
    means = values.mean((0, 2, 3))
    assert evaluation.mean_scores(parts, "n", "units")["a"] == pytest.approx({
        "v": float(means.mean()), "v_se": float(means.std() / 3**0.5), "n": 48, "units": 3})
    assert "v_se" not in evaluation.mean_scores(parts[:1], "n")["a"]


def test_the_joint_likelihood_of_an_exact_posterior_is_the_exact_joint():
    """Targets one by one in any order: the chain rule."""
    x, y, hyper, n = next(curves.gp_test_sets("rbf", 1))
    posterior = lambda code, query: tinyinr.Prediction(*curves.gp_posterior(
        "rbf", *(v.double() for v in (code["x"], code["y"], query["x"])), hyper))
    exact = SimpleNamespace(cfg=SimpleNamespace(model="transinr"), freqs=torch.zeros(1),
                            encode=lambda context: context, decode=posterior)
    case = (x, y, None, ("rbf", hyper), n, "rbf", None)
    joint, marginal = (evaluation.evaluate_curves(exact, [case], by_one)["rbf"]
                       for by_one in (True, False))
    assert joint["joint_ll"] == pytest.approx(joint["gp_joint"], abs=2e-3)
    assert marginal["target_ll"] == pytest.approx(marginal["gp"], abs=2e-3)
    assert joint["joint_ll"] > marginal["target_ll"] + 0.01


def test_pairs_are_random_views_of_each_object(tmp_path):
    model = tiny("nvs", "transinr")
    data = scenes.SceneSet(balls(tmp_path, "012", "34"), "test", 16)
    cases = list(evaluation.scene_cases(model, data, pairs=7, batch=4))
    assert [len(case.target) for case in cases] == [4, 3, 4, 3]
    for i, case in enumerate(cases):
        own = data[i // 2].poses[:, :, 3]
        seen, asked = case.context["poses"][:, 0, :, 3], case.query["rays_o"][:, 0]
        assert all((own == eye).all(1).any() for eye in (*seen, *asked))
        assert not (seen == asked).all(1).any()
    assert evaluation.evaluate(model, cases)["balls"]["pictures"] == 14


def test_bad_input_ends_in_one_line_and_exit_code_2(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, ckpt, photo = trained.out, trained.out / "ckpt.pt", trained.data / "p0.png"
    Path("bad.png").write_bytes(b"no picture")
    noisy(9, 12).save("wide.png")
    Path("noted").mkdir()
    Path("noted/log.jsonl").write_text("mine\n")
    trap = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})
    torch.save({"model": trap()}, "trap.pt")
    for name, change in (("bad", dict(optimizers=7)), ("worse", dict(config=[1])),
                         ("old", dict(format=1))):
        Path(name).mkdir()
        torch.save(saved(out) | change, f"{name}/ckpt.pt")
    before, contents = sorted(tmp_path.rglob("*")), [p.read_bytes() for p in (ckpt, photo)]
    whole, resume = shlex.join(map(str, trained.args)), "train --resume --out"
    train, gp, vnp = f"{whole} --out o", *(ROOT / f"data/pretrained/{task}-vnp.pt"
                                           for task in ("gp", "image"))
    with runs.locked(out):
        assert "another run writes" in run(*trained.args, "--out", out, "--overwrite", code=2)
    for command, words in [
            (f"{train} --data none", "no such folder or zip"),
            (f"{train} --data ''", "--data is empty"), (f"{train} --data old", "no pictures"),
            (f"{train} --steps 1 --minutes 1", "exclude each other"),
            (f"{train} --set random_crop=True --set zoom=2", "crop"),
            (f"{train} --set batch_size=7 --set grad_accum_steps=3",
             "batch_size=7 must be a multiple of processes x grad_accum_steps = 3; try 9"),
            ("train --set minutes=0 --set steps=0", "give one of them"),
            ("train --task gp --smoke --out /proc/run", "/proc/run"),
            (f"{resume} {out} --overwrite", "exclude each other"),
            (f"{resume} {out} --seed 5", "is of a run with seed=0, not 5"),
            (f"{resume} {out} --data .", "is of a run with data="),
            (f"{resume} o", "nothing to resume"), (f"{resume} worse", "not of a run"),
            (f"{resume} bad --steps 9", "cannot be resumed"),
            (f"{resume} old", "an earlier layout"), (f"{whole} --out {out}", "holds a ckpt.pt"),
            (f"{whole} --out {out} --smoke", "holds a ckpt.pt"),
            (f"{whole} --out noted", "holds a ckpt.pt or log.jsonl"),
            (f"render {ckpt} {photo} -o {photo}", "would replace an input"),
            (f"render {ckpt} {photo} -o none/x.png", "no folder none"),
            (f"encode {ckpt} {trained.data} -o none/x.npz", "no folder none"),
            (f"eval {ckpt} --json {ckpt}", "would replace an input"),
            (f"eval {ckpt} --json old", "old is a folder"),
            (f"inspect {ckpt} {photo} -o {photo}", "would replace an input"),
            (f"inspect {PARITY}/vnp_1.pth {photo} -o i.png", "inspect takes"),
            (f"render {ckpt} bad.png -o a.png", "not a picture"),
            (f"render {ckpt} {photo} -o a.xyz", ".png"),
            (f"render {ckpt} {photo} -o a.png --views 2", "--views is for nvs"),
            (f"render {vnp} {photo} -o a.png --tto 1", "refines generated weights"),
            (f"render {ckpt} {photo} -o a.png --mask {photo}", "reads whole images"),
            (f"render {vnp} {photo} -o a.png --mask wide.png", "the mask has 9 x 12 pixels"),
            (f"render {gp} {photo} -o a.png --mask {photo}", "--mask is for image"),
            (f"render none.pt {photo} -o a.png", "no such checkpoint"),
            (f"render trap.pt {photo} -o a.png", "not a readable checkpoint"),
            (f"render {gp} {ROOT}/data/hares.csv -o a.png --size 64", "needs at least 96")]:
        output = run(*shlex.split(command), code=2)
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and words in errors[0], (words, output)
    assert sorted(tmp_path.rglob("*")) == before
    assert [p.read_bytes() for p in (ckpt, photo)] == contents


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """All but one that needs CelebA and a GPU, and a server: on few signals and for a moment."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(ROOT / "data")
    photos(Path("photos"), 3)
    for name in ("photo.jpg", "chair.jpg"):
        noisy(80, 90).save(name)
    shutil.copy(balls(Path("scenes"), "a") / "balls/a/transforms.json", ".")
    shutil.copy("photo.jpg", "seen.png")
    Path("points.csv").write_text("x,y\n-1,0.5\n0,0.2\n1.5,-1\n")
    run("simulate", "lv", "--count", 12, program=lotka_volterra.main)
    tinyinr.save(tiny("image", "transinr", grid=0, depth=0, inr_depth=1), "ckpt.pt")
    text = (ROOT / "README.md").read_text()
    lines = [(program, shlex.split(line, comments=True)) for program, line in re.findall(
        r"^python (tinyinr|export).py (.*)$", text, re.M)]
    quick = {"15": "0.01", "100": "2", "data/pretrained": "."}  # minutes, steps and views
    extra = lambda command, model: {
        "train": ["--smoke"], "eval": ["--size", "1"],
        "render": ["--size", "16" if "nvs" in model else "99"]}.get(command, [])
    for program, args in lines:
        args = [quick.get(word, word) for word in args] + extra(*args[:2])
        if program == "export" and "--serve" not in args:
            run(*args, program=export.main)
        elif program == "tinyinr" and "transinr-celeba" not in args:
            run(*args)
    assert {args[0] for program, args in lines if program == "tinyinr"} == set(tinyinr.cli.commands)
    by_torchrun = re.search(r"^torchrun .*=2 tinyinr.py (.*)$", text, re.M)[1]
    finish(start(*shlex.split(by_torchrun), "--smoke", processes=2))
    for name in ("large.png whole.png turn.gif chair.gif views/003.png plot.png prediction.csv "
                 "codes.npz attention.png scores.json runs/mine/ckpt.pt runs/two/ckpt.pt "
                 "runs/lv/ckpt.pt image.json ckpt.html ckpt.onnx onnx/ckpt.json").split():
        assert Path(name).stat().st_size > 0, name


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_is_kept_between_steps():
    """64 MB taken and freed again and again: the system hands out no fresh pages."""
    commands.keep_memory()
    faults = []
    for _ in range(20):
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[9] < 50


# ------------------------------------------------------------------------- stored models


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data" / "pretrained").glob("*.pt")), ids=lambda p: p.stem)
def test_a_stored_model_has_the_score_that_is_written_beside_it(path):
    """On a part of the test split that takes a second."""
    record, model = json.loads(path.with_suffix(".json").read_text()), tinyinr.load(path)
    assert path.stat().st_size < 5e6
    assert f"--task {model.cfg.task} --model {model.cfg.model}" in record["command"]
    limit, zoom = record["part_size"], 4 if model.cfg.task == "image" else 1
    data = evaluation.open_data(model.cfg, None, "test", limit=limit, zoom=zoom)
    scores = evaluation.score(model, data, count=limit)
    for label, row in record["part"].items():
        assert {k: scores[label][k] for k in row} == pytest.approx(row, abs=0.01), label


@every_model
def test_a_stored_model_draws_no_dots_on_the_pixels_it_was_trained_on(name):
    """A point differs from those 1/16 of a pixel around as little there as it does elsewhere."""
    model = tinyinr.load(ROOT / "data" / "pretrained" / f"image-{name}.pt")
    data = evaluation.open_data(model.cfg, None, "test", limit=4)
    image = torch.stack([next(data.batches([([i], 0)]))[0][0] for i in range(4)]).float() / 255
    code, centers = model.encode({"image": image}), tinyinr.pixel_grid(64, 64)[None]
    z = tinyinr.mean_latents(model, code, {"coords": centers})
    at = lambda row, column: model.decode(  # in pixels, from their centers
        code, {"coords": centers + torch.tensor((row, column)) / 32}, z=z).mean
    bump = lambda r, c: (4 * at(r, c) - sum(at(r + d, c) + at(r, c + d) for d in (
        1 / 16, -1 / 16))).square().mean().sqrt()
    assert bump(0, 0) < 1.5 * bump(0.25, 0.25)


def test_the_tables_of_the_readme_are_whole_and_hold_the_stored_scores():
    """Rows as wide as their head, and the numbers of every label in a row of their model's."""
    rows = []
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.M):
        cells = [[re.sub(r" ± .*", "", cell).strip() for cell in line.split("|")[1:-1]]
                 for line in table.splitlines()]
        assert len({len(row) for row in cells}) == 1
        rows += cells
    records = {path.stem: json.loads(path.read_text())
               for path in (ROOT / "data" / "pretrained").glob("*.json")}
    for (name, model), (more, key) in product(
            (("TransINR", "nvs-transinr"), ("VNP", "nvs-vnp")),
            (("", "scores"), (", from four views", "four_views"))):
        psnr = (f"{records[model][key][label]['psnr']:.2f}"
                for label in ("chairs", "lamps", "cars", "furniture", "all"))
        assert [name + more, *psnr] in rows
    kinds = {"psnr": "64 x 64", "centers": "64 x 64, at pixel centers", "large": "256 x 256"}
    for label, (kind, of) in product(("emoji", "photos"), kinds.items()):
        values = (f"{records[f'image-{name}']['scores'][label][kind]:.2f}" for name in MODELS)
        assert [f"{label}, {of}", *values] in [row[:3] for row in rows]


# ------------------------------------------------------------------------- programs of data/


def test_series_are_split_by_file_or_by_column(tmp_path, monkeypatch):
    monkeypatch.setattr(lotka_volterra, "STEPS", 20)
    folder, wide = tmp_path / "lv", tmp_path / "w.csv"
    run("simulate", folder, "--count", 20, program=lotka_volterra.main)
    table = curves.CurveSet(shutil.make_archive(folder, "zip", folder), "all", "year,lynx", 30)
    assert len(table) == 20 and sum(len(x) for x, *_ in table.windows(repeats=1)) == 60
    rows = [["x", *(f"c{j}" for j in range(30))]] + np.arange(248).reshape(8, 31).tolist()
    wide.write_text("\n".join(",".join(map(str, row)) for row in rows))
    for path, sizes in ((folder, [16, 2, 2]), (wide, [24, 3, 3])):
        names = [set(curves.CurveSet(path, s).names) for s in SPLITS]
        assert [len(part) for part in names] == sizes and len(set.union(*names)) == sum(sizes)


@pytest.mark.parametrize("count", (18, 40, 300))
def test_a_lone_table_is_split_by_time_and_stored_codes_have_one_shape(count, tmp_path):
    rows, least = (f"{i},{i % 7}\n" for i in reversed(range(count))), max(count // 10, 6)
    (tmp_path / "0.csv").write_text("x,y\n" + "".join(rows))
    parts = [curves.CurveSet(tmp_path / "0.csv", split).x for split in SPLITS]
    assert torch.cat(parts)[:, 0].tolist() == list(range(count))
    assert [len(part) for part in parts] == [count - 2 * least, least, least]
    (tmp_path / "1.csv").write_text("x,y\n" + "".join(f"{i},{i % 5}\n" for i in range(9)))
    tinyinr.save(tiny("gp", "vnp", False), tmp_path / "c.pt")
    run("encode", tmp_path / "c.pt", tmp_path, "-o", tmp_path / "codes.npz")
    codes = np.load(tmp_path / "codes.npz")
    assert codes["pool_weight"].sum(1).tolist() == [min(48, count), 9]


def test_tasks_of_hares_and_lynxes_hide_what_they_say():
    years = tables.read_table(ROOT / "data" / "hares.csv", "all").x
    assert years[:, 0].tolist() == list(range(1845, 1936))
    some, late, one = (lotka_volterra.hidden(task, years, 300, tinyinr.generator(0))
                       for task in lotka_volterra.TASKS)  # (300, 91, 2) each
    counts = some.sum(1)
    assert counts.min() == 1 and counts.max() == 20 and (counts[:, 0] != counts[:, 1]).any()
    for mask in (late, one):
        starts = 91 - mask.sum(1).amax(1)
        assert 25 <= starts.min() < 30 and 70 < starts.max() <= 75
        assert (mask[:, :-1] <= mask[:, 1:]).all()  # from a year on
    assert torch.equal(late[..., 0], late[..., 1]) and (one.any(1).sum(1) == 1).all()


def test_their_score_is_a_log_density_in_units_of_the_table():
    """Of a Gaussian of the seen values, by hand."""
    table, want = tables.read_table(ROOT / "data" / "hares.csv", "all"), []
    flat = SimpleNamespace(cfg=SimpleNamespace(model="transinr"), encode=lambda context: {},
                           decode=lambda code, query: tinyinr.Prediction(
                               z := query["x"].expand(-1, -1, 2) * 0, z + 0.5))
    scores = lotka_volterra.task_scores(flat, table, "forecasting", 16)
    gen = torch.Generator().manual_seed(0)
    for hidden in lotka_volterra.hidden("forecasting", table.x, 16, gen):
        old, new = table.y[~hidden[:, 0]], table.y[hidden[:, 0]]
        seen = torch.distributions.Normal(old.mean(0), old.std(0, correction=0))
        want.append(float(seen.log_prob(new).mean()))
    assert scores["ll"] == pytest.approx(np.mean(want), abs=1e-4)
    assert scores["constant_ll"] == pytest.approx(scores["ll"], abs=1e-4)


@pytest.mark.parametrize("task, name", [("image", "transinr"), ("nvs", "vnp")])
def test_a_measured_step_counts_every_product_once_a_signal(task, name, monkeypatch):
    """8 more units of the feed-forward parts: three products by layer and step, as by hand."""
    monkeypatch.setattr(bench, "median_seconds", lambda *_: 0.5)
    rows = []
    for batch, units in ((1, 48), (2, 48), (2, 56)):
        cfg, recipe = make_config("small", task, name, batch_size=batch, n_queries=6, muon_lr=0.0,
                                  grid=GRID[task], conv_nodes=8, **SIZES | {"ff_dim": units})
        with torch.enable_grad():
            rows.append(bench.bench_cell(cfg, recipe, "cpu"))
    one, two, wide = (row["gflop"] * 1e9 for row in rows)
    assert two == pytest.approx(2 * one)
    n_tokens = {"image": 16, "nvs": 27}[task] + sum(getattr(build(cfg), "tokens_per_layer", ()))
    assert wide - two == pytest.approx(3 * 2 * cfg.depth * 2 * n_tokens * 8 * cfg.dim * 2)
    assert rows[1]["share"] == pytest.approx(two / 0.5 / (2 * 2048**3 / 0.5))
    assert (rows[1]["step_ms"], rows[1]["decode_per_s"], rows[1]["signals_per_s"]) == (500, 24, 4)
