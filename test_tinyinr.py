"""Tests of tinyinr, in the order of its sections; each compares with an independent oracle.

python -m pytest -q                              # all, in minutes
python test_tinyinr.py --device cuda             # all, the commands on that device
python test_tinyinr.py --thorough -k thoroughly  # kill loop, fuzzing and long runs: an hour
"""

import ast
import bisect
import ctypes
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import export
import tinyinr
from tinyinr import Config, build, make_config

torch.set_num_threads(1)  # what is tested is small; the other core exports meanwhile
ROOT = Path(__file__).parent
PARITY = ROOT / "data" / "parity"
CELLS = [(task, model) for task in tinyinr.COORD_DIM for model in tinyinr.MODELS]
SIZES = dict(
    dim=32,
    depth=2,
    heads=2,
    head_dim=16,
    ff_dim=48,
    groups=8,
    inr_depth=3,
    inr_width=32,
    freqs=6,
    hidden=24,
    blocks=2,
    latent=5,
    cross_depth=2,
    cross_heads=2,
    cross_ff=40,
)


def tiny(task, model, **given) -> torch.nn.Module:
    """A small random model, with latents and styles that matter."""
    torch.manual_seed(0)
    shape = {
        "image": dict(image_size=16, patch=4, padding=0, freq_top=16.0),
        "nvs": dict(image_size=16, patch=4, padding=0, points_per_ray=12, freq_top=16.0,
                    view_positions=True),
        "gp": dict(grid=48, freq_top=16.0),
    }[task]
    shape |= dict(local=True, lattice=3)
    shape |= dict(upsample=2) if (task, model) == ("image", "vnp") else {}
    return build(Config(task=task, model=model, **SIZES | shape | given)).eval()


def poses(*shape, seed=0):
    """Cameras on the sphere of radius 4, looking at the origin: (*shape, 3, 4)."""
    eyes = torch.nn.functional.normalize(rand(*shape, 3, seed=seed) - 0.5, dim=-1) * 4
    return torch.stack([tinyinr.look_at(e) for e in eyes.view(-1, 3)]).view(*shape, 3, 4)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def signals(task, batch=3, targets=7, size=16):
    """Random context and query of a task."""
    if task == "image":
        return {"image": rand(batch, 3, size, size)}, {
            "coords": 2 * rand(batch, targets, 2, seed=1) - 1
        }
    if task == "gp":
        context = {"x": 4 * rand(batch, 9, 1) - 2, "y": rand(batch, 9, 1, seed=1)}
        return context, {"x": 4 * rand(batch, targets, 1, seed=2) - 2}
    focals = torch.full((batch, 2, 2), 20.0)
    context = {"images": rand(batch, 2, 3, size, size), "poses": poses(batch, 2), "focals": focals}
    o, d = tinyinr.camera_rays(poses(batch, seed=1), focals[:, 0], size, size)
    pick = torch.arange(targets) * 31 % size**2
    return context, {"rays_o": o.flatten(1, 2)[:, pick], "rays_d": d.flatten(1, 2)[:, pick]}


def run(*args, code=0):
    """The command line in this process: its output, after a check of the exit code."""
    result = CliRunner().invoke(tinyinr.cli, [str(a) for a in args], default_map=DEFAULTS)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def pytest_addoption(parser):
    """The options of `python test_tinyinr.py`."""
    parser.addoption("--thorough", action="store_true", help="the tests called so, at full length")
    parser.addoption("--device", default="cpu", help="where the commands run: cpu, cuda or mps")


DEFAULTS = {}  # {command: {option: value}} where a test gives none


@pytest.fixture(autouse=True, scope="session")
def device_of_commands(request):
    """--device, for every command that has such an option."""
    name = request.config.getoption("--device", "cpu")
    for command in tinyinr.cli.commands.values():
        if any(p.name == "device" for p in command.params):
            DEFAULTS[command.name] = {"device": name}


@pytest.fixture
def length(request):
    """length(short, long): how far a test goes, in the suite and with --thorough."""
    thorough = request.config.getoption("--thorough", False)
    return lambda short, long: long if thorough else short


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------- the file


def test_sections_depend_on_those_above_them_only():
    """Read from top to bottom, a function meets no name that a later section defines."""
    source = (ROOT / "tinyinr.py").read_text()
    banners = [i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# -----")]
    section, body = {}, ast.parse(source).body
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names = [n for t in targets for n in ([t] if t is node else ast.walk(t))]
        for name in (getattr(n, "name", getattr(n, "id", None)) for n in names):
            section[name] = bisect.bisect(banners, node.lineno)
    assert {"inr", "TransINR", "VNP", "train", "DATASETS"} <= section.keys() and len(banners) > 15
    later = [(node.name, n.id) for node in body if hasattr(node, "name") for n in ast.walk(node)
             if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
             and section.get(n.id, 0) > section[node.name]]
    assert later == []


# ------------------------------------------------------------------------- config and presets


def test_groups_must_divide_the_width_and_the_remedy_is_valid():
    with pytest.raises(ValueError, match=r"groups=48 must divide inr_width=256; try 16"):
        Config(groups=48)
    Config(groups=16)


@pytest.mark.parametrize(
    "field, value",
    [
        ("task", "video"),
        ("model", "gan"),
        ("decay", "cosine"),
        ("latent_pool", "none"),
        ("kernel", "white"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}' is unknown; choose from"):
        Config(**{field: value})


def test_paper_presets_have_the_papers_parameter_counts():
    for preset, millions in (("transinr-celeba", 44.46), ("vnp-shapenet", 34.28)):
        with torch.device("meta"):
            model = build(make_config(preset))
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert abs(count - millions) < 0.006, count


# ------------------------------------------------------------------------- geometry and rays


def test_pixel_grid_is_row_major_pixel_centres():
    grid = tinyinr.pixel_grid(2, 4)
    assert grid[0].tolist() == [-0.5, -0.75] and grid[1].tolist() == [-0.5, -0.25]
    assert grid[4].tolist() == [0.5, -0.75] and len(grid) == 8


def test_a_ray_goes_through_the_pixel_that_sees_the_point():
    """Project a known point by hand; the ray of that pixel must pass through it."""
    pose, focal, (height, width) = poses(1)[0], 40.0, (30, 50)
    point = torch.tensor([0.3, -0.2, 0.5])
    x, y, z = (pose[:, :3].T @ (point - pose[:, 3])).tolist()  # camera: x right, y up, looks at -z
    column, row = width / 2 + focal * x / -z, height / 2 - focal * y / -z
    o, d = tinyinr.camera_rays(pose, torch.tensor([focal, focal]), height, width)
    assert o.shape == d.shape == (height, width, 3)
    ray = d[int(row), int(column)]
    depth = -z
    offset = (o[0, 0] + depth * ray - point).norm().item()
    assert offset < depth / focal  # within one pixel
    exact = d[0, 0] + (column - 0.5) * (d[0, 1] - d[0, 0]) + (row - 0.5) * (d[1, 0] - d[0, 0])
    torch.testing.assert_close(o[0, 0] + depth * exact, point, atol=1e-5, rtol=0)


def test_rays_through_picked_pixels_are_those_of_the_whole_view():
    cameras, focals = poses(2, 3), rand(2, 3, 2) + 10
    o, d = (r.flatten(2, 3) for r in tinyinr.camera_rays(cameras, focals, 5, 7))
    pick = torch.randint(35, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    for want, got in zip((o, d), tinyinr.pixel_rays(cameras, focals, 5, 7, pick)):
        want = want.gather(2, pick.unsqueeze(-1).expand(-1, -1, -1, 3))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_opencv_poses_see_the_same_point_in_the_same_pixel():
    pose = poses(1)[0]
    opencv = pose.clone()
    opencv[:, 1:3] *= -1  # y down, z forward
    torch.testing.assert_close(tinyinr.opencv_to_opengl(opencv), pose)


def test_look_at_is_a_rotation_that_sees_the_origin_upright():
    pose = tinyinr.look_at(torch.tensor([2.0, -1.0, 3.0]))
    r = pose[:, :3]
    torch.testing.assert_close(r.T @ r, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(-r[:, 2] * pose[:, 3].norm(), -pose[:, 3], atol=1e-5, rtol=0)
    assert r.det() > 0.99 and r[2, 1] > 0 and abs(r[2, 0]) < 1e-6


def test_depths_are_even_jittered_and_per_signal():
    o = torch.zeros(2, 1, 3)
    z = tinyinr.sample_depths(o, o + 1, torch.tensor([2.0, 3.0]), 6.0, 5)
    torch.testing.assert_close(z[:, 0], torch.tensor([[2.0, 3, 4, 5, 6], [3, 3.75, 4.5, 5.25, 6]]))
    jittered = tinyinr.sample_depths(o, o + 1, 2.0, 6.0, 5, jitter=torch.full((2, 1, 1), 0.5))
    torch.testing.assert_close(jittered[0, 0], torch.tensor([2.5, 3.5, 4.5, 5.5, 6.5]))


def test_a_bounded_scene_is_sampled_inside_its_sphere_only():
    o = torch.tensor([[[0.0, 0, 4], [0, 3, 4]]])
    d = torch.tensor([[[0.0, 0, -1], [0, 0, -1]]])  # one ray through the middle, one that misses
    z = tinyinr.sample_depths(o, d, 2.0, 6.0, 3, radius=1.0)
    torch.testing.assert_close(z[0, 0], torch.tensor([3.0, 4.0, 5.0]))
    assert (z[0, 1] == z[0, 1, 0]).all()


# ------------------------------------------------------------------------- volume renderer


def naive_render(rgb, sigma, z, background):
    """One ray, point by point, as the formula in [1] reads, in float64."""
    color, transmittance = np.zeros(3), 1.0
    for i in range(len(z)):
        delta = z[i + 1] - z[i] if i + 1 < len(z) else 1e-3
        alpha = 1 - math.exp(-sigma[i] * delta)
        color += transmittance * alpha * rgb[i]
        transmittance *= 1 - alpha
    return color + transmittance * background


def test_renderer_equals_a_naive_loop():
    rgb, sigma = rand(2, 5, 17, 3), 9 * rand(2, 5, 17, seed=1)
    z = 2 + rand(2, 5, 17, seed=2).cumsum(-1)
    color, depth, opacity = tinyinr.volume_render(rgb, sigma, z, background=0.7)
    for b in range(2):
        for r in range(5):
            want = naive_render(*(v[b, r].double().numpy() for v in (rgb, sigma, z)), 0.7)
            np.testing.assert_allclose(color[b, r].numpy(), want, atol=1e-6)
    assert ((0 <= opacity) & (opacity <= 1 + 1e-6)).all() and (depth <= z[..., -1] + 1e-5).all()


def test_renderer_weights_by_hand():
    sigma, z = torch.tensor([[[8.0, 1, 8, 1]]]), torch.tensor([[[0.0, 0.1, 0.2, 0.3]]])
    rgb = torch.eye(4)[None, None, :, :3]  # the weights of the first three points
    color, _, _ = tinyinr.volume_render(rgb, sigma, z, background=0.0)
    np.testing.assert_allclose(color[0, 0].numpy(), [0.5507, 0.0428, 0.2239], atol=1e-4)


def test_empty_space_is_white_and_the_gradient_behind_an_opaque_point_is_finite():
    z = torch.linspace(2, 6, 8).expand(1, 1, 8)
    assert (tinyinr.volume_render(rand(1, 1, 8, 3), torch.zeros(1, 1, 8), z)[0] == 1).all()
    with torch.enable_grad():
        sigma = torch.tensor([[[0.0, 1e6, 5, 5, 5, 5, 5, 5]]], requires_grad=True)
        tinyinr.volume_render(rand(1, 1, 8, 3), sigma, z)[0].sum().backward()
    assert sigma.grad.isfinite().all()


def test_renderer_gradient_in_float64():
    with torch.enable_grad():
        rgb = rand(1, 2, 5, 3).double().requires_grad_()
        sigma = rand(1, 2, 5, seed=1).double().requires_grad_()
        z = torch.linspace(2, 6, 5, dtype=torch.float64).expand(1, 2, 5)
        assert torch.autograd.gradcheck(lambda *a: tinyinr.volume_render(*a, z)[0], (rgb, sigma))


# ------------------------------------------------------------------------- Transformer


def test_attention_equals_softmax_by_hand():
    q, k, v = rand(2, 3, 8), rand(2, 5, 8, seed=1), rand(2, 5, 8, seed=2)
    out = tinyinr.attend(q, k, v, heads=2)
    for head in range(2):
        s = slice(4 * head, 4 * head + 4)
        weights = (q[..., s] @ k[..., s].transpose(1, 2) / 2).softmax(-1)
        torch.testing.assert_close(out[..., s], weights @ v[..., s])


def test_block_equals_pytorchs_own_layer():
    """nn.TransformerEncoderLayer, pre-norm and GELU, with the same weights."""
    block = tinyinr.Block(Config(dim=32, heads=4, head_dim=8, ff_dim=48))
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 48, 0, "gelu", batch_first=True, norm_first=True
    )
    state = {
        "self_attn.in_proj_weight": block.qkv.weight,
        "self_attn.in_proj_bias": torch.zeros(96),
    }
    for ours, theirs in (
        ("out", "self_attn.out_proj"),
        ("ff1", "linear1"),
        ("ff2", "linear2"),
        ("norm1", "norm1"),
        ("norm2", "norm2"),
    ):
        state |= {f"{theirs}.{k}": v for k, v in getattr(block, ours).named_parameters()}
    layer.load_state_dict(state)
    x = rand(2, 6, 32)
    torch.testing.assert_close(block(x), layer.train()(x), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------- tokenizers


def test_patches_equal_a_strided_convolution():
    tokenizer = tiny("image", "transinr", patch=6, padding=1, image_size=16).tokenizer.patches
    image = rand(2, 3, 16, 16)
    kernel = tokenizer.proj.weight.view(-1, 3, 6, 6)
    want = torch.nn.functional.conv2d(image, kernel, tokenizer.proj.bias, stride=6, padding=1)
    want = want.flatten(2).transpose(1, 2) + tokenizer.pos
    torch.testing.assert_close(tokenizer(image), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", tinyinr.COORD_DIM)
def test_the_tokens_around_a_target_interpolate_linearly(task):
    line, axes = tiny(task, "transinr").line, tinyinr.COORD_DIM[task]
    places = torch.cartesian_prod(*[line] * axes).view(-1, axes)
    reach = places.max()
    points = reach * (2 * rand(2, 50, axes) - 1)
    weights = tinyinr.around(points, line)
    assert weights.shape == (2, 50, len(places)) and (weights >= 0).all()
    torch.testing.assert_close(weights @ places, points, atol=1e-5, rtol=0)
    torch.testing.assert_close(tinyinr.around(places[None], line)[0], torch.eye(len(places)))
    assert tinyinr.around(points + 3 * reach, line).abs().max() == 0
    assert ((weights > 0).sum(-1) <= 2**axes).all()


@pytest.mark.parametrize("axes", (1, 2, 3))
def test_interpolating_equals_hat_functions_and_goes_on_as_at_the_border(axes):
    line = torch.linspace(-0.8, 0.6, 6)
    values, points = rand(2, 6**axes, 5), 1.4 * rand(2, 40, axes, seed=1) - 0.8
    want = tinyinr.around(points, line) @ values
    torch.testing.assert_close(tinyinr.interpolate(values, points, line), want)
    places = torch.cartesian_prod(*[line] * axes).view(1, -1, axes)
    torch.testing.assert_close(tinyinr.interpolate(values, places, line), values)
    beyond = 4 * points
    want = tinyinr.interpolate(values, beyond.clamp(-0.8, 0.6), line)
    torch.testing.assert_close(tinyinr.interpolate(values, beyond, line), want)


@pytest.mark.parametrize("upsample", (2, 3))
def test_spread_tokens_equal_a_transposed_convolution_and_a_sampled_grid(upsample):
    model = tiny("image", "vnp", upsample=upsample)
    tokens, points = rand(2, 16, 32), 2 * rand(2, 30, 2, seed=1) - 1
    kernel = model.spread.weight.view(32, upsample, upsample, 32).permute(3, 0, 1, 2)
    bias = model.spread.bias.view(1, 32, upsample, upsample).tile(1, 1, 4, 4)
    grid = torch.conv_transpose2d(tokens.mT.unflatten(2, (4, 4)), kernel, stride=upsample) + bias
    want = torch.nn.functional.grid_sample(  # takes (column, row)
        grid, points.flip(-1).unsqueeze(2), padding_mode="border", align_corners=False
    )
    got = model.surroundings(tokens, points)
    torch.testing.assert_close(got, want.squeeze(3).mT, atol=1e-5, rtol=1e-5)


def test_a_place_in_space_starts_from_what_the_views_show_there():
    """Where tokens hold their row and column, a place on a pixel's ray reads that pixel's."""
    lattice, cameras = tiny("nvs", "transinr").tokenizer.lattice, poses(3, 2)
    focals = torch.tensor([20.0, 26.0]).expand(3, 2, 2)
    half = torch.tensor([8 / 26, 8 / 20]).expand(3, 2, 2)
    o, d = tinyinr.camera_rays(cameras, focals, 16, 16)
    tokens = torch.zeros(3, 2, 16, 32)
    tokens[..., :2] = tinyinr.pixel_grid(4, 4)
    torch.nn.init.zeros_(lattice.camera.weight), torch.nn.init.zeros_(lattice.camera.bias)
    for b, v, row, column, depth in ((0, 0, 3, 9, 3.0), (1, 1, 12, 5, 4.5), (2, 0, 8, 2, 4.0)):
        lattice.places[5] = o[b, v, row, column] + depth * d[b, v, row, column]
        one = slice(b, b + 1), slice(v, v + 1)
        read = (lattice(tokens[one], cameras[one], half[one]) - lattice.pos)[0, 5, :2]
        want = tinyinr.pixel_grid(16, 16).view(16, 16, 2)[row, column]
        torch.testing.assert_close(read, want, atol=1e-5, rtol=0)
    each = [lattice(tokens[:, v], cameras[:, v], half[:, v]) for v in ([0], [1])]
    both = lattice(tokens, cameras, half)
    torch.testing.assert_close(both, sum(each) / 2, atol=1e-6, rtol=0)  # the mean over views


def test_the_places_of_tokens_are_where_they_look():
    model = tiny("gp", "vnp")
    tokenizer, cfg = model.tokenizer.set, model.cfg
    width = tokenizer.conv2.in_channels
    still = tokenizer.conv2(torch.zeros(1, width, cfg.grid))
    for i in (0, 3, 11):
        impulse = torch.zeros(1, width, cfg.grid)
        impulse[..., (tokenizer.points - model.line[i]).abs().argmin()] = 1.0
        moved = (tokenizer.conv2(impulse) - still).abs().amax(1)[0]
        assert moved.nonzero().flatten().tolist() == [i]
    with pytest.raises(ValueError, match="local=True.*add view_positions=True"):
        Config(task="nvs", local=True)
    for n in (1, 2**20):
        with pytest.raises(ValueError, match=f"lattice={n} must be from 2 to 64"):
            Config(lattice=n)


def test_set_convolution_equals_a_loop():
    tokenizer = tiny("gp", "vnp").tokenizer.set
    x, y = 4 * rand(1, 5, 1) - 2, rand(1, 5, 1, seed=1)
    out = tokenizer.set_conv(x, y)
    scales = tokenizer.scales.tolist()
    for s, scale in enumerate(scales):
        for g in (0, 20, 47):
            offsets = [(float(a) - float(tokenizer.points[g])) / scale for a in x[0]]
            w, values = [math.exp(-0.5 * o * o) for o in offsets], [float(b) for b in y[0]]
            mean = lambda *factors: sum(map(math.prod, zip(w, *factors))) / (sum(w) + 1e-4)
            want = (math.log1p(sum(w)), mean(values), mean(offsets), mean(offsets, values))
            for channel, value in enumerate(want):
                assert abs(float(out[0, channel * len(scales) + s, g]) - value) < 1e-5


def test_convolutions_on_the_grid_are_those_of_a_loop():
    tokenizer = tiny("gp", "vnp", convs=2).tokenizer.set
    x, y = 4 * rand(1, 5, 1) - 2, rand(1, 5, 1, seed=1)
    grid = tokenizer.conv1(tokenizer.set_conv(x, y))
    for i, conv in enumerate(tokenizer.convs):
        h, new = torch.nn.functional.gelu(grid), grid.clone()
        for g in range(48):
            new[0, :, g] += conv.bias
            for k in range(5):
                if 0 <= (at := g + (k - 2) * 2**i) < 48:
                    new[0, :, g] += conv.weight[:, :, k] @ h[0, :, at]
        grid = new
    want = tokenizer.conv2(torch.nn.functional.gelu(grid)).mT + tokenizer.pos
    torch.testing.assert_close(tokenizer(x, y), want, atol=1e-5, rtol=0)


def test_attention_by_distance_alone_is_the_same_everywhere():
    """With no content in the logits a token's weights depend on how far the others are only."""
    block = tiny("gp", "vnp", relative=True).transformer[0]
    block.qkv.weight[:64] = 0  # no queries and keys
    torch.nn.init.normal_(block.near)
    x = rand(1, 12, 32)
    v = block.qkv(block.norm1(x)).chunk(3, -1)[2]
    heads = []
    for h in range(2):
        weights = torch.zeros(12, 12)
        for i, j in product(range(12), range(12)):
            weights[i, j] = block.near[h, i - j + 11].exp()
        heads.append(weights / weights.sum(1, keepdim=True) @ v[0, :, 16 * h : 16 * h + 16])
    want = x + block.out(torch.cat(heads, -1))
    want = want + block.ff2(torch.nn.functional.gelu(block.ff1(block.norm2(want))))
    torch.testing.assert_close(block(x), want, atol=1e-5, rtol=0)


def test_number_of_tokens_does_not_depend_on_the_number_of_context_points():
    tokenizer = tiny("gp", "vnp").tokenizer
    shapes = {tuple(tokenizer({"x": rand(2, n, 1), "y": rand(2, n, 1)}).shape) for n in (0, 1, 40)}
    assert shapes == {(2, 12, 32)}


def test_masked_points_and_pixels_have_no_influence():
    model = tiny("gp", "vnp")
    context, query = signals("gp")
    padded = {k: torch.cat((v, 9 * rand(3, 4, 1, seed=5)), 1) for k, v in context.items()}
    padded["mask"] = torch.cat((torch.ones(3, 9), torch.zeros(3, 4)), 1)
    want, got = (model.decode(model.encode(c), query) for c in (context, padded))
    torch.testing.assert_close(got.mean, want.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.std, want.std, atol=1e-5, rtol=1e-5)
    for name in tinyinr.MODELS:
        model, (context, query) = tiny("image", name, context=(0.1, 0.9)), signals("image")
        context["mask"] = (rand(3, 1, 16, 16, seed=3) < 0.5).float()
        other = context | {"image": context["image"] + 7 * (1 - context["mask"])}
        want, got = (model.decode(model.encode(c), query).mean for c in (context, other))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_mask_needs_a_model_that_reads_masks():
    model, (context, _) = tiny("image", "transinr"), signals("image")
    with pytest.raises(ValueError, match="--context"):
        model.encode(context | {"mask": torch.ones(3, 1, 16, 16)})


# ------------------------------------------------------------------------- INR and TransINR


def test_positional_encoding_order():
    x, w = torch.tensor([[0.3, -0.7]]), torch.tensor([1.0, 5.0])
    angles = [math.pi * a * b for a in (0.3, -0.7) for b in (1.0, 5.0)]
    want = torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(tinyinr.positional_encoding(x, w), want)


@pytest.mark.parametrize("local", [False, True])
def test_batched_inr_equals_linear_layers_signal_by_signal(local):
    model, (context, query) = tiny("image", "transinr", local=local), signals("image")
    code = model.encode(context)
    out = tinyinr.inr(code, query["coords"], model.freqs, model.line)
    for b in range(3):
        h = tinyinr.positional_encoding(query["coords"][b], model.freqs)
        if local:
            h = torch.cat((h, tinyinr.around(query["coords"][[b]], model.line)[0]), -1)
        for i, wb in enumerate(code.values()):
            h = torch.nn.functional.linear(h.relu() if i else h, wb[b, :-1].T, wb[b, -1])
        torch.testing.assert_close(out[b], h + 0.5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", tinyinr.COORD_DIM)
def test_rows_of_places_come_from_the_tokens_there(task):
    """At the start of training, when blocks are the identity, a token changes its own row only."""
    model, (context, _) = tiny(task, "transinr", identity_init=True), signals(task)
    model.transformer = torch.nn.Identity()
    code = model.encode(context)
    tokens = model.tokenizer(context)
    wb = next(iter(code.values()))
    assert wb.shape[1] == 2 * tinyinr.COORD_DIM[task] * 6 + tokens.shape[1] + 1
    rows = wb[:, -1 - tokens.shape[1] : -1]
    torch.testing.assert_close(rows, model.rows(tokens), atol=1e-6, rtol=0)


def test_inr_says_which_frequencies_it_lacks():
    code = tiny("image", "transinr").encode(signals("image")[0])
    with pytest.raises(ValueError, match="freqs"):
        tinyinr.inr(code, torch.zeros(3, 2, 2), torch.ones(5))


def test_generated_columns_share_tokens_by_group_and_have_unit_norm():
    """Column c is normalize(W[:, c] x_{c mod g}): written out by hand."""
    model = tiny("image", "transinr")
    tokens = rand(2, 8, 32)
    x = model.heads["wb1"](tokens)  # (B, g, in)
    wb = model.write("wb1", tokens)
    for c in (0, 7, 8, 31):
        column = model.base["wb1"][:-1, c] * x[1, c % 8]
        torch.testing.assert_close(wb[1, :-1, c], column / column.norm(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wb[0, -1], model.base["wb1"][-1])  # the bias is not generated


def test_identity_init_starts_from_the_base_weights():
    model = tiny("image", "transinr", identity_init=True)
    wb = model.encode(signals("image")[0])["wb1"][:, :-1]
    base = torch.nn.functional.normalize(model.base["wb1"][:-1], dim=0)
    assert (wb - base).abs().max() < 0.2 and (wb - base).abs().max() > 0


# ------------------------------------------------------------------------- VNP


def test_modulated_linear_equals_a_loop_over_samples():
    layer = tinyinr.ModLinear(6, 4, 5, active=True)
    torch.nn.init.normal_(layer.bias)
    x, style = rand(3, 7, 6) - 0.5, rand(3, 1, 5, seed=1)
    out = layer(x, style)
    for b in range(3):
        s = style[b, 0] @ (layer.modulation.weight / math.sqrt(5)).T + layer.modulation.bias
        w = layer.weight * s / math.sqrt(6)
        w = w / torch.sqrt((w**2).sum(1, keepdim=True) + 1e-8)
        want = torch.nn.functional.leaky_relu(x[b] @ w.T + layer.bias, 0.2) * 2**0.5
        torch.testing.assert_close(out[b], want, atol=1e-5, rtol=1e-5)


def test_kl_equals_torch_distributions_and_is_zero_for_equal_ones():
    q, p = (
        tinyinr.Gaussian(rand(4, 1, 6, seed=i) - 0.5, 0.1 + rand(4, 1, 6, seed=i + 9))
        for i in (0, 1)
    )
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(*q), normal(*p)).sum((1, 2))
    torch.testing.assert_close(tinyinr.kl_divergence(q, p), want)
    assert (tinyinr.kl_divergence(q, q) == 0).all()


@pytest.mark.parametrize("task", tinyinr.COORD_DIM)
def test_latents_drawn_once_give_the_same_values_as_noise(task):
    model, (context, query) = tiny(task, "vnp"), signals(task)
    code, eps = model.encode(context), torch.randn(2, 3, 1, 5)
    z, kl = model.latents(code, query, eps)
    assert z.shape == (2, 3, 1, 5) and (kl == 0).all()
    torch.testing.assert_close(
        model.decode(code, query, z=z).mean, model.decode(code, query, eps).mean
    )
    target = rand(3, 7, tinyinr.VALUE_DIM[task] if task != "nvs" else 3, seed=4)
    z, kl = model.latents(code, query, eps, target)
    assert kl.shape == (3,) and (kl > 0).all()
    prediction, again = model.elbo(code, query, target, eps)
    torch.testing.assert_close(prediction.mean, model.decode(code, query, z=z).mean)
    torch.testing.assert_close(again, kl)


def test_a_prior_of_the_tokens_places_is_that_of_a_query_there():
    """Same weights, asked at every third token's place: the official way to pool."""
    model, (context, query) = tiny("gp", "vnp", latent_pool="tokens", pool_every=3), signals("gp")
    asked = tiny("gp", "vnp", latent_pool="query")
    asked.load_state_dict(model.state_dict())
    code, eps = model.encode(context), torch.randn(2, 3, 1, 5)
    assert code.keys() == {"tokens"}
    places = tinyinr.token_line(model.cfg)[1::3].view(1, -1, 1).expand(3, -1, -1)
    z, _ = model.latents(code, query, eps)
    torch.testing.assert_close(z, asked.latents(code, {"x": places}, eps)[0])
    assert (z - asked.latents(code, query, eps)[0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match='"tokens" is for curves; try latent_pool="context"'):
        Config(latent_pool="tokens")


def test_only_the_vnp_of_images_spreads_its_tokens():
    for cell in (dict(task="gp", model="vnp", local=True), dict(local=True), dict(model="vnp")):
        with pytest.raises(ValueError, match="upsample=2 spreads the tokens of a picture"):
            Config(**cell, upsample=2)


def test_samples_side_by_side_equal_draws_one_by_one():
    model, (context, query) = tiny("gp", "vnp"), signals("gp")
    code, eps = model.encode(context), torch.randn(2, 3 * 4, 1, 5)
    many = model.decode(code, query, eps, samples=4)
    for s in range(4):
        one = model.decode(code, query, eps[:, s::4])
        torch.testing.assert_close(many.mean[s::4], one.mean, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------- all six cells


@pytest.mark.parametrize("task, name", CELLS)
def test_a_batch_of_three_equals_three_batches_of_one(task, name):
    model, (context, query) = tiny(task, name), signals(task)
    whole = model.decode(model.encode(context), query)
    for b in range(3):
        one = [{k: v[b : b + 1] for k, v in x.items()} for x in (context, query)]
        part = model.decode(model.encode(one[0]), one[1])
        for a, w in zip(part, whole):
            assert (a is None) == (w is None)
            if a is not None:
                torch.testing.assert_close(a, w[b : b + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task, name", CELLS)
def test_targets_are_independent_of_each_other_and_of_their_order(task, name):
    model, (context, query) = tiny(task, name), signals(task)
    code = model.encode(context)
    whole, order = model.decode(code, query).mean, torch.tensor([4, 0, 6])
    part = model.decode(code, {k: v[:, order] for k, v in query.items()}).mean
    torch.testing.assert_close(part, whole[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tinyinr.MODELS)
def test_curves_do_not_depend_on_the_order_of_the_context(name):
    model, (context, query) = tiny("gp", name), signals("gp")
    order = torch.randperm(9)
    a, b = (
        model.decode(model.encode(c), query).mean
        for c in (context, {k: v[:, order] for k, v in context.items()})
    )
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tinyinr.MODELS)
def test_an_empty_context_gives_finite_predictions(name):
    model, (_, query) = tiny("gp", name), signals("gp")
    empty = {"x": torch.zeros(3, 0, 1), "y": torch.zeros(3, 0, 1)}
    prediction = model.decode(model.encode(empty), query)
    assert prediction.mean.isfinite().all() and (prediction.std > 0).all()
    model = tiny("image", name, context=(0.0, 0.5))
    blind = {"image": rand(2, 3, 16, 16), "mask": torch.zeros(2, 1, 16, 16)}
    values = model.decode(model.encode(blind), {"coords": torch.zeros(2, 4, 2)}).mean
    torch.testing.assert_close(values[0], values[1])  # the prior: the same for all


@pytest.mark.parametrize("name", tinyinr.MODELS)
def test_a_chunked_picture_equals_an_unchunked_one_exactly(name):
    model, (context, _) = tiny("nvs", name), signals("nvs", batch=1)
    o, d = (
        r.flatten(1, 2)
        for r in tinyinr.camera_rays(poses(1), torch.tensor([[20.0, 20.0]]), 24, 24)
    )
    code = model.encode(context)
    whole, *cut = (
        tinyinr.predict(model, code, {"rays_o": o, "rays_d": d}, chunk=c).mean
        for c in (1 << 30, 64 * 12, 200 * 12)
    )
    assert all(torch.equal(c, whole) for c in cut)


def test_gradients_in_float64():
    """Modulated linear layer, weight head and set convolution, against finite differences."""
    check = lambda f, *x: torch.autograd.gradcheck(f, [v.double().requires_grad_() for v in x])
    with torch.enable_grad():
        linear = tinyinr.ModLinear(4, 3, 2, active=True).double()
        assert check(linear, rand(2, 5, 4) - 0.5, rand(2, 1, 2, seed=1))
        model = tiny("gp", "transinr", dim=8, heads=1, groups=4, freqs=3).double()
        assert check(lambda t: model.write("wb0", t), rand(2, model.n_tokens[0], 8) - 0.5)
        convolution = model.tokenizer.set
        x, y = 4 * rand(2, 3, 1) - 2, rand(2, 3, 1, seed=1)
        assert check(lambda x, y: convolution(x, y).square().mean(2), x, y)


@pytest.mark.parametrize("name", tinyinr.MODELS)
def test_rays_that_miss_a_bounded_scene_are_decoded_once(name, monkeypatch):
    """The picture is that of all rays, to 1e-6, though most of them are never decoded."""
    model = tiny("nvs", name, radius=0.3, density_gain=20.0)
    context, _ = signals("nvs", 1)
    o, d = (r.flatten(1, 2) for r in tinyinr.camera_rays(poses(1, seed=1), rand(1, 2) + 30, 16, 16))
    query, code = {"rays_o": o, "rays_d": d}, model.encode(context)
    z = model.latents(code, query)[0] if name == "vnp" else None
    want, rays = model.decode(code, query, z=z).mean, []
    decode = lambda code, part, z: (rays.append(part["rays_o"].shape[1]), model.decode(
        code, part, z=z))[1]
    got = tinyinr.predict(model, code, query, z, decode=decode).mean
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    empty = int((want == 1).all(-1).sum())
    assert sum(rays) <= 256 - empty + 40 and 100 < empty < 250


@pytest.mark.parametrize("task, name", CELLS)
def test_float64_agrees_with_float32(task, name):
    model, (context, query) = tiny(task, name), signals(task)
    single = model.decode(model.encode(context), query).mean
    double = lambda x: {k: v.double() for k, v in x.items()}
    model.double()
    exact = model.decode(model.encode(double(context)), double(query)).mean
    assert exact.dtype == torch.float64
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------- official checkpoints


def fixture(name):
    """Model and stored arrays of an official program's run."""
    arrays = {k: torch.from_numpy(np.array(v)) for k, v in np.load(PARITY / f"{name}.npz").items()}
    return tinyinr.load(PARITY / f"{name}.pth"), arrays


def assert_near(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5, (a - b).abs().max()


def test_official_transinr_image_outputs():
    model, f = fixture("transinr_image_1")
    code = model.encode({"image": f["in.image"]})
    for name, wb in code.items():
        assert_near(wb, f[f"weights.{name}"])
    assert_near(model.decode(code, {"coords": f["in.coords"]}).mean, f["out.rgb"])
    assert_near(tinyinr.inr(code, f["in.coords"]), f["out.rgb"])
    grid = tinyinr.pixel_grid(22, 22).expand(2, -1, -1)
    assert_near(model.decode(code, {"coords": grid}).mean, f["out.grid_rgb"].flatten(1, 2))


def views(f):
    context = {k: f[f"in.{k}"] for k in ("images", "poses", "focals")}
    return context, {
        k: f[f"in.{k}"] for k in ("rays_o", "rays_d", "near", "far", "points_per_ray")
    }


def test_official_transinr_view_synthesis_outputs():
    model, f = fixture("transinr_nvs_1")
    context, query = views(f)
    o, d = tinyinr.camera_rays(f["in.query_pose"], f["in.query_focal"], 24, 24)
    assert_near(o.flatten(1, 3)[:, f["in.ray_index"]], query["rays_o"])
    assert_near(d.flatten(1, 3)[:, f["in.ray_index"]], query["rays_d"])
    code = model.encode(context)
    for name, wb in code.items():
        assert_near(wb, f[f"weights.{name}"])
    assert_near(tinyinr.inr(code, f["in.points"]), f["out.raw"])
    assert_near(model.decode(code, query).mean, f["out.rgb"])


def test_official_vnp_outputs():
    model, f = fixture("vnp_1")
    context, query = views(f)
    code = model.encode(context)
    assert_near(model.decode(code, query, eps=f["in.eps_prior"]).mean, f["out.rgb_prior"])
    z, kl = model.latents(code, query, f["in.eps_posterior"], f["in.target_rgb"])
    assert_near(kl.unsqueeze(1), f["out.kl"])
    assert_near(model.decode(code, query, z=z).mean, f["out.rgb_posterior"])


# ------------------------------------------------------------------------- data


def picture(size=(20, 12), color=(200, 30, 60), mode="RGB"):
    return Image.new(mode, size, color)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photos(folder, count=4, size=24):
    """A folder of smooth pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        small = (rand(3, 3, 3, seed=i) * 255).byte().numpy()
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"p{i}.png"
        )
    return folder


def test_decoding_crops_the_centre_of_the_shorter_side():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    out = tinyinr.decode_image(encoded(Image.fromarray(image)), 10)
    assert out.shape == (10, 10, 3) and (out == 255).all()


def test_decoding_knows_every_kind_of_picture():
    decode = lambda data: tinyinr.decode_image(data, 12)[6, 6].tolist()
    assert decode(encoded(picture(color=90, mode="L"))) == [90, 90, 90]
    assert decode(encoded(picture(color=(0, 0, 0, 0), mode="RGBA"))) == [255, 255, 255]
    assert decode(encoded(picture(color=(0, 0, 0, 128), mode="RGBA")))[0] in (126, 127, 128)
    assert decode(encoded(picture().convert("P"))) == pytest.approx([200, 30, 60], abs=40)
    assert decode(encoded(picture(color=50000, mode="I;16"))) == [50000 >> 8] * 3
    assert decode(encoded(picture(color=(0, 255, 255, 0), mode="CMYK"), "JPEG"))[0] > 200
    assert decode(encoded(picture(), "WEBP", lossless=True)) == [200, 30, 60]


def test_decoding_obeys_exif_orientation():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, :10] = 255  # left half white; orientation 6 turns left to top
    exif = Image.Exif()
    exif[0x0112] = 6
    out = tinyinr.decode_image(encoded(Image.fromarray(image), exif=exif), 10, crop=False)
    assert out.shape == (20, 10, 3) and out[2].min() == 255 and out[17].max() == 0


def test_a_picture_smaller_than_the_patch_grid_is_refused():
    with pytest.raises(ValueError, match="7 x 5 pixels are fewer than the 8 x 8 patches"):
        tinyinr.decode_image(encoded(picture((7, 5))), 64, least=8)


def test_epochs_are_permutations_and_any_step_can_be_drawn_alone():
    run = [tinyinr.draws(7, 3, 0, step) for step in range(7)]
    flat = [i for batch in run for i in batch]
    assert all(sorted(flat[7 * e : 7 * e + 7]) == list(range(7)) for e in range(3))
    assert flat[:7] != flat[7:14] and run[5] == tinyinr.draws(7, 3, 0, 5)


def image_config(**given):
    return Config(
        **SIZES
        | dict(
            image_size=16,
            patch=4,
            padding=0,
            freq_top=16.0,
            batch_size=2,
            identity_init=True,
            minutes=0.0,
            steps=4,
        )
        | given
    )


def test_celeba_has_its_official_split(tmp_path):
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for i in (1, 162770, 162771, 182637, 182638, 202599):
        picture((16, 16)).save(folder / f"{i:06}.jpg")
    names = {
        s: [int(Path(n).stem) for n in tinyinr.ImageData(image_config(), tmp_path, s).names]
        for s in ("train", "val", "test")
    }
    assert names == {"train": [1, 162770], "val": [162771, 182637], "test": [182638, 202599]}


def test_trees_with_folders_and_without_are_split_without_overlap(tmp_path):
    photos(tmp_path / "a" / "train" / "cat"), photos(tmp_path / "a" / "val" / "cat", 2)
    sizes = [len(tinyinr.ImageData(image_config(), tmp_path / "a", s)) for s in ("train", "test")]
    assert sizes == [4, 2]  # Imagenette's val is its test split
    photos(tmp_path / "b", 20)
    train, test = (
        tinyinr.ImageData(image_config(), tmp_path / "b", s).names for s in ("train", "test")
    )
    assert len(train) == 18 and len(test) == 2 and not set(train) & set(test)


def test_random_crops_depend_on_the_step_alone(tmp_path):
    photos(tmp_path, 4)
    Image.open(tmp_path / "p0.png").resize((64, 24)).save(tmp_path / "p0.png")
    data = tinyinr.ImageData(image_config(random_crop=True), tmp_path, "train")
    crops = [data[0, step] for step in (1, 1, 2, 3, 4)]
    assert torch.equal(crops[0], crops[1]) and any(not torch.equal(crops[0], c) for c in crops[2:])


def test_a_training_batch_holds_the_pixels_at_its_coordinates(tmp_path):
    data = tinyinr.ImageData(image_config(queries=30), photos(tmp_path, 5), "train")
    context, query, target = next(data.batches("cpu"))
    sampled = torch.nn.functional.grid_sample(  # an independent reader: (x, y) in [-1, 1]
        context["image"],
        query["coords"].flip(-1)[None].expand(2, 1, -1, -1).reshape(2, 1, -1, 2),
        mode="nearest",
        align_corners=False,
    )
    torch.testing.assert_close(sampled[:, :, 0].transpose(1, 2), target)


def test_free_memory_on_systems_that_do_not_tell(monkeypatch):
    """Linux says what is free, macOS only how much there is, Windows nothing."""
    assert 2**20 < tinyinr.free_memory() < 2**50
    known = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}

    def sysconf(name):
        if name not in known:
            raise ValueError("unrecognized configuration name")
        return known[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert tinyinr.free_memory() == 4_096_000
    monkeypatch.delattr(os, "sysconf")
    assert tinyinr.free_memory() == math.inf


def test_workers_give_the_same_batches_as_memory(tmp_path, monkeypatch):
    data = tinyinr.ImageData(image_config(), photos(tmp_path, 7), "train")
    want = [next(data.batches("cpu", start))[2] for start in (0, 1)]
    data.pixels = None
    stream = data.batches("cpu")
    for w in want:
        torch.testing.assert_close(next(stream)[2], w)


def write_scene(folder, count=4, size=16, angle=0.6, **change):
    """A scene of a colored ball of radius 0.7, rendered exactly by intersecting rays."""
    folder.mkdir(parents=True, exist_ok=True)
    frames, focal = [], 0.5 * size / math.tan(angle / 2)
    for i, pose in enumerate(poses(count, seed=7)):
        o, d = tinyinr.camera_rays(pose, torch.tensor([focal, focal]), size, size)
        middle = -(o * d).sum(-1) / d.square().sum(-1)
        hit = (o + middle[..., None] * d).norm(dim=-1) < 0.7
        rgba = torch.cat((torch.tensor([0.8, 0.3, 0.1]).expand(size, size, 3), hit[..., None]), -1)
        Image.fromarray((rgba * 255).byte().numpy()).save(folder / f"r_{i}.png")
        matrix = [*pose.tolist(), [0, 0, 0, 1]]
        frames.append({"file_path": f"./r_{i}", "transform_matrix": matrix})
    meta = {"camera_angle_x": angle, "frames": frames} | change
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


def balls(folder, train, test="", angles=(0.6,)):
    """A data set of such scenes with one letter each, split by its file."""
    for i, name in enumerate(sorted({*train, *test})):
        write_scene(folder / "balls" / name, angle=angles[i % len(angles)])
    split = {"train": list(train), "test": list(test)}
    (folder / "ball_splits.json").write_text(json.dumps(split))
    return folder


def test_scenes_are_read_with_the_cameras_convention(tmp_path):
    """The ball is at the origin: the pixels that it covers are those whose rays pass near it."""
    write_scene(tmp_path / "balls" / "a")
    images, cameras, focals = tinyinr.read_scene(tinyinr.Tree(tmp_path), "balls/a", 16)
    assert images.shape == (4, 3, 16, 16) and cameras.shape == (4, 3, 4)
    o, d = tinyinr.camera_rays(cameras, focals, 16, 16)
    near = torch.linalg.cross(o, d).norm(dim=-1) / d.norm(dim=-1)  # distance of ray and origin
    assert ((near < 0.7) == (images[:, 2] < 255)).all()


def test_turning_mirroring_and_recoloring_keep_scenes_consistent(tmp_path):
    """After augmentation the picture is what the moved camera sees of the moved world."""
    images, cameras = rand(6, 2, 3, 8, 8), poses(6, 2)
    focals = torch.full((6, 2, 2), 9.0)
    moved_images, moved = tinyinr.augment_scenes(
        images, cameras, "turn mirror recolor", [tinyinr.generator(i) for i in range(6)]
    )
    r = moved[..., :3]
    torch.testing.assert_close(r @ r.mT, torch.eye(3).expand(6, 2, 3, 3), atol=1e-5, rtol=0)
    assert (r.det() > 0.99).all()
    d = tinyinr.camera_rays(cameras, focals, 8, 8)[1]
    e = tinyinr.camera_rays(moved, focals, 8, 8)[1]
    for b in range(6):
        mirrored = not torch.allclose(moved_images[b].sum(1), images[b].sum(1))
        want = d[b].flip(-2) if mirrored else d[b]  # (V, H, W, 3) before the world moved
        a, c = want.reshape(-1, 3), e[b].reshape(-1, 3)
        torch.testing.assert_close(
            a @ a.T, c @ c.T, atol=1e-4, rtol=1e-4
        )  # the same up to a motion
        torch.testing.assert_close(a[:, 2], c[:, 2], atol=1e-5, rtol=1e-4)  # up stays up


def test_classes_are_balanced_by_a_power_of_their_size():
    """4 classes of 1, 4, 16 and 64 objects at balance 0.5: drawn as 1 : 2 : 4 : 8."""
    sizes = np.repeat([1, 4, 16, 64], [1, 4, 16, 64])
    odds = torch.tensor(sizes**-0.5, dtype=torch.float32)
    drawn = [tinyinr.draws(85, 1, 0, step, odds)[0] for step in range(6000)]
    shares = [np.mean(sizes[drawn] == n) for n in (1, 4, 16, 64)]
    np.testing.assert_allclose(shares, np.array([1, 2, 4, 8]) / 15, atol=0.02)
    assert len(set(tinyinr.draws(85, 85, 0, 7, odds))) == 85  # a signal once a step
    assert len(tinyinr.draws(3, 9, 0, 7, odds[:3])) == 9


def test_balanced_scenes_are_drawn_by_class(tmp_path):
    balls(tmp_path, "012345678", "9")
    write_scene(tmp_path / "cubes" / "c", angle=0.3)
    split = {"train": ["c"], "test": []}
    (tmp_path / "cube_splits.json").write_text(json.dumps(split))
    seen = {}
    for balance in (0.0, 1.0):
        data = tinyinr.SceneData(scene_config(balance=balance, batch_size=1), tmp_path)
        focals = [next(data.batches("cpu", step))[0]["focals"] for step in range(200, 300)]
        seen[balance] = sum(float(f.max()) > 1.5 * float(data.focals.min()) for f in focals)
    assert seen[0.0] < 25 and 35 < seen[1.0] < 65, seen


def scene_config(**given):
    fields = dict(task="nvs", image_size=16, patch=4, padding=0, batch_size=2, queries=64)
    return Config(**SIZES | fields | given)


@pytest.mark.parametrize("targets", [1, 3, 9])
def test_training_rays_are_those_of_other_views(tmp_path, targets):
    """Each has the color of its pixel; they start from as many other cameras as asked for."""
    balls(tmp_path, "01", "2")
    cfg = scene_config(queries=80, target_views=targets, augment="mirror")
    data = tinyinr.SceneData(cfg, tmp_path)  # of 4 views each
    for step in range(5):
        context, query, color = next(data.batches("cpu", step))
        o, d = query["rays_o"], query["rays_d"]
        near = torch.linalg.cross(o, d).norm(dim=-1) / d.norm(dim=-1)  # distance of ray and origin
        assert torch.equal(near < 0.7, color[..., 2] < 1)  # the ball of `write_scene`
        assert ("jitter" in query) and context["images"].shape == (2, 1, 3, 16, 16)
        for i in range(2):
            eyes = o[i].unique(dim=0)
            assert len(eyes) == min(targets, 3)
            assert ((eyes - context["poses"][i, :, :, 3]).norm(dim=-1) > 1e-3).all()


def test_scenes_without_a_number_of_rays_give_each_of_them_once(tmp_path):
    balls(tmp_path, "01", "2")
    cfg = scene_config(queries=0, target_views=3)
    query = next(tinyinr.SceneData(cfg, tmp_path).batches("cpu"))[1]
    rays = torch.cat((query["rays_o"], query["rays_d"]), -1)
    assert rays.shape == (2, 3 * 16 * 16, 6) and query["jitter"].shape == (2, 3 * 16 * 16, 1)
    assert all(len(r.unique(dim=0)) == len(r) for r in rays)


@pytest.mark.parametrize("stride", (1, 2, 3, 4))
@pytest.mark.parametrize("grid", (24, 25, 26))
def test_any_stride_gives_the_tokens_that_the_config_counts(stride, grid):
    model = tiny("gp", "vnp", grid=grid, stride=stride)
    tokens = model.encode({"x": rand(1, 5, 1), "y": rand(1, 5, 1)})["tokens"]
    assert tokens.shape[1] == model.cfg.tokens == len(tinyinr.token_line(model.cfg))


def test_a_batch_of_curves_has_contexts_of_every_size():
    """Its mask tells which points are context; none of the targets is among them."""
    data = tinyinr.CurveData(Config(task="gp", batch_size=16, queries=24, **SIZES))
    counts = []
    for step in range(60):
        context, query, target = next(data.batches("cpu", step))
        n = context["mask"].sum(1)
        assert context["x"].shape[1] == n.max() and query["x"].shape == target.shape == (16, 24, 1)
        assert not (query["x"] == context["x"].mT).any()
        counts += n.tolist()
    shares = np.bincount(counts, minlength=47)[3:]
    assert shares.sum() == len(counts) and shares.min() > 0
    assert np.mean(counts) == pytest.approx(24.5, abs=1.5)


def test_curves_have_the_covariance_of_their_kernel():
    gen = torch.Generator().manual_seed(0)
    x = torch.tensor([[[0.0], [0.3]]], dtype=torch.float64)
    hyper = [torch.full((1, 1, 1), v, dtype=torch.float64) for v in (0.4, 0.8, 0.25)]
    by_hand = {
        "rbf": 0.64 * math.exp(-0.5 * (0.3 / 0.4) ** 2),
        "matern52": 0.64 * (1 + 5**0.5 * 0.75 + 5 / 3 * 0.75**2) * math.exp(-(5**0.5) * 0.75),
        "periodic": 0.64 * math.exp(-2 * (math.sin(math.pi * 0.3 / 0.25) / 0.4) ** 2),
    }
    for kernel, want in by_hand.items():
        k = tinyinr.covariance(kernel, x, x, *hyper)[0]
        assert abs(float(k[0, 1]) - want) < 1e-12 and abs(float(k[0, 0]) - 0.64) < 1e-12
    _, y, (_, scale, _) = tinyinr.draw_curves("rbf", 4000, 5, gen)
    assert abs(float((y / (scale**2 + 0.02**2).sqrt()).std()) - 1) < 0.03


def test_gp_posterior_equals_conditioning_by_numpy():
    gen = torch.Generator().manual_seed(1)
    x, y, hyper = tinyinr.draw_curves("matern52", 1, 9, gen)
    mean, std = tinyinr.gp_posterior("matern52", x[:, :6], y[:, :6], x[:, 6:], hyper)
    k = tinyinr.covariance("matern52", x, x, *hyper)[0].numpy() + 0.02**2 * np.eye(9)
    inverse = np.linalg.inv(k[:6, :6])
    np.testing.assert_allclose(mean[0].numpy(), k[6:, :6] @ inverse @ y[0, :6].numpy(), atol=1e-8)
    cov = k[6:, 6:] - k[6:, :6] @ inverse @ k[:6, 6:]
    np.testing.assert_allclose(std[0, :, 0].numpy() ** 2, np.diag(cov), atol=1e-8)


# ------------------------------------------------------------------------- processes


def train_args(task, name, folder, *extra):
    """The command that trains a tiny model of a cell on data of its own."""
    given = SIZES | dict(batch_size=4, queries=16, decay="linear", hold=1.0, save_every=0)
    given |= dict(grid=48) if task == "gp" else dict(image_size=16, patch=4, padding=0)
    data = ()
    if task == "image":
        given |= dict(flip=True)
        data = ("--context", 0.2, 0.9, "--data", photos(folder / "photos", 12))
    elif task == "nvs":
        given |= dict(points_per_ray=8, augment="turn mirror recolor", near=2.0)
        data = ("--data", balls(folder, "0123", "45"))
    fields = [v for k, value in given.items() for v in ("--set", f"{k}={value}")]
    where = ("--device", DEFAULTS["train"]["device"])  # for processes of their own
    return ("train", "--smoke", "--task", task, "--model", name, *where, *data, *fields, *extra)


def start(*args, processes=0, **options):
    """The command line in a process of its own, or in several by torchrun."""
    if DEFAULTS["train"]["device"] == "cuda" and processes > torch.cuda.device_count():
        pytest.skip(f"{processes} processes need a GPU each")
    by = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *by * bool(processes), str(ROOT / "tinyinr.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def saved(path):
    """When a file was last written, or None."""
    return path.stat().st_mtime_ns if path.exists() else None


def wait_for(path, process, since=None, seconds=60):
    """Until a running process writes a file, or writes it again where it was there `since`."""
    end = time.monotonic() + seconds
    while saved(path) == since and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    assert saved(path) != since, process.stdout.read()


def finish(process, code=0, seconds=120):
    """The output of a process that must end by itself."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize("task, name", [("image", "vnp"), ("nvs", "transinr"), ("gp", "vnp")])
def test_two_processes_learn_what_one_does(task, name, tmp_path):
    """20 steps of the whole batch in one process, and by halves in two, some of it resumed."""
    args = train_args(task, name, tmp_path, "--precision", "fp32")
    one, two = tmp_path / "one", tmp_path / "two"
    with torch.enable_grad():
        alone = run(*args, "--steps", 20, "--out", one)
    if task == "image":
        finish(start(*args, "--steps", 12, "--out", two, processes=2))
        with torch.enable_grad():
            together = run(*args, "--steps", 20, "--accumulate", 2, "--out", two, "--resume")
    else:
        pieces = ("--accumulate", 2) if task == "nvs" else ()
        together = finish(start(*args, "--steps", 20, *pieces, "--out", two, processes=2))
    a, b = (torch.load(p / "ckpt.pt", weights_only=True) for p in (one, two))
    assert a["step"] == b["step"] == 20
    for key, value in a["model"].items():
        keep = slice(SIZES["dim"] * key.endswith("kv.bias"), None)  # a bias of all keys cancels
        torch.testing.assert_close(b["model"][key][keep], value[keep], atol=1e-5, rtol=1e-5)
    scores = [[float(v) for v in re.findall(r"-?\d+\.\d\d\b", text.split("held-out:")[1])]
              for text in (alone, together)]
    assert scores[0] and scores[0] == pytest.approx(scores[1], abs=0.011)
    steps = [json.loads(line)["step"] for line in (two / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and together.count("held-out:") == 1  # one writer


def test_a_killed_worker_ends_the_run(tmp_path):
    process = start(*train_args("gp", "vnp", tmp_path, "--steps", 10**6, "--out", tmp_path / "run"),
                    processes=2)
    wait_for(tmp_path / "run" / "ckpt.pt", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    before = time.monotonic()
    os.kill(int(workers[1]), signal.SIGKILL)
    finish(process, 1, 30)
    assert time.monotonic() - before < 30
    tinyinr.load(tmp_path / "run" / "ckpt.pt")


def test_processes_share_a_batch_without_overlap(monkeypatch):
    """Each draws its own signals of the step's batch, and they are those that one process draws."""
    data = tinyinr.CurveData(Config(task="gp", batch_size=6, queries=5, **SIZES))
    whole = next(data.batches("cpu", 3))[2]
    parts = []
    for rank in range(3):
        monkeypatch.setattr(tinyinr, "world", lambda: (rank, 3))
        parts.append(next(data.batches("cpu", 3))[2])
        assert [i for i, _ in tinyinr.dealt("abcdefgh")] == list(range(rank, 8, 3))
    assert torch.equal(torch.cat(parts), whole)


def test_evaluation_by_parts_equals_the_whole_exactly(tmp_path, monkeypatch):
    model = tiny("image", "transinr")
    data = tinyinr.ImageData(model.cfg, photos(tmp_path, 70), "train")
    whole = tinyinr.evaluate(model, data, tinyinr.choose_device("cpu"))
    found = []
    for rank in (1, 0):
        monkeypatch.setattr(tinyinr, "world", lambda: (rank, 2))
        monkeypatch.setattr(
            tinyinr, "gathered",
            lambda rows: (found.extend(rows), sorted(found, key=lambda row: row[0]))[1])
        parts = tinyinr.evaluate(model, data, tinyinr.choose_device("cpu"))
    assert parts == whole and len(found) == 2


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    args = train_args("gp", "vnp", tmp_path, "--out", tmp_path / "run")
    output = run(*args, "--set", "batch_size=7", "--accumulate", 3, code=2)
    assert "batch_size=7 must be a multiple of processes x accumulate = 3; try 9" in output
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------- losses and metrics


def test_psnr_and_likelihood_by_hand():
    a, b = torch.full((1, 4, 3), 0.6), torch.full((1, 4, 3), 0.5)
    assert abs(float(tinyinr.psnr(a, b)) - 20) < 1e-4
    assert (
        float(tinyinr.psnr(a + 1, torch.ones(1, 4, 3)))
        > 100
        > float(tinyinr.psnr(a + 1, b + 0.5, False))
    )
    mean, std, y = rand(2, 5, 1), 0.1 + rand(2, 5, 1, seed=1), rand(2, 5, 1, seed=2)
    want = torch.distributions.Normal(mean, std).log_prob(y)
    torch.testing.assert_close(tinyinr.log_likelihood(tinyinr.Prediction(mean, std), y), want)


def test_nearest_filling_equals_a_loop():
    image, mask = rand(2, 3, 5, 4), (rand(2, 1, 5, 4, seed=1) < 0.4).float()
    out = tinyinr.nearest_filling({"image": image, "mask": mask}).unflatten(1, (5, 4))
    places = tinyinr.pixel_grid(5, 4).unflatten(0, (5, 4))
    for b, row, column in product(range(2), range(5), range(4)):
        seen = mask[b, 0].nonzero().tolist()
        distance = lambda at: float((places[at[0], at[1]] - places[row, column]).norm())
        least = min(map(distance, seen))
        near = [image[b, :, r, c] for r, c in seen if distance((r, c)) < least + 1e-5]
        assert any(torch.equal(out[b, row, column], color) for color in near)


# ------------------------------------------------------------------------- training


def test_the_schedules():
    step = Config(warmup=10)
    assert tinyinr.schedule(step, 0, 0.0) == pytest.approx(0.1)
    assert tinyinr.schedule(step, 50, 0.79) == 1 and tinyinr.schedule(
        step, 50, 0.8
    ) == pytest.approx(0.1)
    linear = Config(decay="linear", hold=0.5)
    values = [tinyinr.schedule(linear, 0, p) for p in (0.0, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([1, 1, 0.5, 0])


def test_every_parameter_has_one_optimizer_and_muon_gets_the_matrices():
    cfg = image_config(muon_lr=0.02)
    model = build(cfg)
    adam, muon = tinyinr.optimizers(model, cfg, tinyinr.choose_device("cpu"))
    ids = [id(p) for o in (adam, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert len(muon.param_groups[0]["params"]) == 4 * cfg.depth


def test_muon_agrees_with_pytorchs_up_to_its_bf16():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 24), (24, 8), (8, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = tinyinr.Muon(ours, 0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0)
    before = ours[0].detach().clone()
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
    assert (ours[0] - before).abs().max() > 0.02


def test_device_choices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"{name}.*cpu or auto"):
            tinyinr.choose_device(name)
    assert tinyinr.choose_device("auto").name == "cpu"
    for gain, dtype in ((2.0, torch.bfloat16), (0.8, None)):
        monkeypatch.setattr(tinyinr, "bf16_gain", lambda: gain)
        assert tinyinr.choose_device("cpu").dtype is dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    before = torch.get_float32_matmul_precision()
    device = tinyinr.choose_device("auto")
    torch.set_float32_matmul_precision(before)
    assert (device.name, device.dtype, device.fused) == ("cuda", torch.bfloat16, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = tinyinr.choose_device("auto")
    assert (device.name, device.dtype, device.fused) == ("mps", None, False)


ACCELERATORS = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"PyTorch finds no {name} here"))
    for name, there in (("cuda", torch.cuda.is_available()),
                        ("mps", torch.backends.mps.is_available()))
]


@pytest.mark.parametrize("device", ACCELERATORS)
@pytest.mark.parametrize("task, name", CELLS)
def test_an_accelerator_predicts_what_the_cpu_does(task, name, device):
    model, (context, query) = tiny(task, name), signals(task)
    want = model.decode(model.encode(context), query)
    chosen = tinyinr.choose_device(device, "fp32")
    model, context, query = model.to(device), *(tinyinr.to_device(v, device)
                                                for v in (context, query))
    for got in (model.decode(model.encode(context), query),
                tinyinr.predict(model, model.encode(context), query)):
        torch.testing.assert_close(got.mean.cpu(), want.mean, atol=1e-4, rtol=1e-4)
    assert chosen.name == device and chosen.dtype is None


@pytest.mark.parametrize("device", ACCELERATORS)
@pytest.mark.parametrize("task, name", CELLS)
def test_every_command_runs_on_an_accelerator(task, name, device, tmp_path):
    """And what it learns there, in the precision that it chooses, is what a CPU learns."""
    args = train_args(task, name, tmp_path, "--steps", 20)
    losses = {}
    for where in ("cpu", device):
        with torch.enable_grad():
            run(*args, "--device", where, "--out", tmp_path / where)
        rows = (tmp_path / where / "log.jsonl").read_text().splitlines()
        losses[where] = json.loads(rows[-1])["loss"]
    assert losses[device] == pytest.approx(losses["cpu"], rel=0.1, abs=0.05)
    ckpt = tmp_path / device / "ckpt.pt"
    data = () if task == "gp" else ("--data", args[args.index("--data") + 1])
    run("eval", ckpt, "--size", 2, "--device", device, *data)
    source = {"image": tmp_path / "photos" / "p0.png", "nvs": tmp_path / "balls" / "4",
              "gp": ROOT / "data" / "elnino.csv"}[task]
    run("render", ckpt, source, "-o", tmp_path / "out.gif", "--size", 24, "--device", device)
    assert (tmp_path / "out.gif").stat().st_size > 0


TRAIN = [
    "train",
    "--task",
    "image",
    "--batch-size",
    "2",
    "--set",
    "image_size=16",
    "--set",
    "patch=4",
    "--set",
    "dim=32",
    "--set",
    "depth=1",
    "--set",
    "heads=2",
    "--set",
    "head_dim=16",
    "--set",
    "ff_dim=32",
    "--set",
    "inr_width=16",
    "--set",
    "groups=4",
    "--set",
    "queries=64",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on a folder of photos: (photos, run folder)."""
    folder = tmp_path_factory.mktemp("trained")
    photos(folder / "photos", 12)
    with torch.enable_grad():
        run(*TRAIN, "--data", folder / "photos", "--steps", 6, "--out", folder / "run")
    return folder / "photos", folder / "run"


def test_training_leaves_checkpoint_log_and_picture(trained):
    data, out = trained
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "samples.png"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and {"loss", "psnr", "lr", "ms", "signals_per_s"} <= set(rows[-1])
    assert Image.open(out / "samples.png").size[0] > 64
    output = run(
        "eval", out / "ckpt.pt", "--data", data, "--json", out.parent / "s.json"
    )
    scores = json.loads((out.parent / "s.json").read_text())
    assert scores["all"]["pictures"] == 2 and "psnr_unclamped" in output


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(trained, tmp_path):
    data, straight = trained
    with torch.enable_grad():
        run(*TRAIN, "--data", data, "--steps", 6, "--out", tmp_path, "--set", "save_every=0")
        ckpt = torch.load(straight / "ckpt.pt", weights_only=True)
        cfg = tinyinr.Config(**ckpt["config"])
        device = tinyinr.choose_device("cpu")
        half = tinyinr.Run(cfg, device)  # stop after three steps, save, begin anew, go on
        stream = tinyinr.ImageData(cfg, data).batches("cpu")
        for _ in range(3):
            half.update(next(stream), half.step / 6)
        half.save(tmp_path / "half.pt")
        rest = tinyinr.Run(cfg, device, tinyinr.read_checkpoint(tmp_path / "half.pt"))
        stream = tinyinr.ImageData(cfg, data).batches("cpu", rest.step)
        for _ in range(3):
            rest.update(next(stream), rest.step / 6)
    again = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    for name, value in ckpt["model"].items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, rest.model.state_dict()[name]), name


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_values_are_weighed_by_a_power_of_their_std(power):
    """The pull on a mean is its error / std^2, times std^power: with 2 that of the mean square."""
    mean, std, target = (0.1 + rand(2, 5, 3, seed=i) for i in range(3))
    mean.requires_grad_()
    model = SimpleNamespace(cfg=Config(model="vnp", std_power=power), encode=lambda context: {},
                            elbo=lambda *_: (tinyinr.Prediction(mean, std), torch.zeros(2)))
    with torch.enable_grad():
        loss, mse = tinyinr.objective(model, ({}, {}, target))
    pull, = torch.autograd.grad(loss, mean)
    want = (mean - target) * std ** (power - 2) / (std**power).mean() / mean.numel()
    torch.testing.assert_close(pull, want.detach(), atol=1e-7, rtol=1e-5)
    assert float(mse) == pytest.approx(float((mean - target).square().mean()))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    photos(tmp_path / "photos", 12)
    args = (*TRAIN, "--data", tmp_path / "photos", "--out", tmp_path / "run", "--set", "clip=1e30")
    with torch.enable_grad():
        run(*args, "--steps", 3)
        good = (tmp_path / "run" / "ckpt.pt").read_bytes()
        ckpt = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
        cfg = tinyinr.Config(**ckpt["config"])
        broken = tinyinr.Run(cfg, tinyinr.choose_device("cpu"), ckpt)
        batch = next(tinyinr.ImageData(cfg, tmp_path / "photos").batches("cpu"))
        broken.update((batch[0], batch[1], batch[2] * math.inf), 0.5)
        with pytest.raises(tinyinr.RunFailed, match="the loss of step 3 is not finite"):
            broken.save(tmp_path / "run" / "ckpt.pt")
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == good


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(trained, tmp_path, monkeypatch):
    model = tinyinr.load(trained[1] / "ckpt.pt")
    state = tinyinr.Run(model.cfg, tinyinr.choose_device("cpu"))
    state.save(tmp_path / "ckpt.pt")
    good = (tmp_path / "ckpt.pt").read_bytes()

    def full(self, data):
        with open(self, "wb") as f:
            f.write(bytes(data)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_sigterm_saves_and_says_how_to_go_on_and_kill_leaves_a_checkpoint_that_loads(tmp_path):
    photos(tmp_path / "photos", 12)
    args = (
        *TRAIN,
        "--data",
        tmp_path / "photos",
        "--steps",
        100000,
        "--out",
        tmp_path / "run",
        "--set",
        "save_every=0.01",
    )
    process = start(*args)
    wait_for(tmp_path / "run" / "ckpt.pt", process)
    process.send_signal(signal.SIGTERM)
    *_, words, command = finish(process).splitlines()
    assert words.startswith("SIGTERM: saved step ") and words.endswith("; go on with")
    step = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert words.split()[3] == f"{step};"
    python, program, *args = shlex.split(command)  # the command that was printed does go on
    assert (python, Path(program)) == ("python", ROOT / "tinyinr.py")
    since = saved(tmp_path / "run" / "ckpt.pt")
    process = start(*args)
    wait_for(tmp_path / "run" / "ckpt.pt", process, since)
    for _ in range(3):
        time.sleep(0.15)
        tinyinr.load(tmp_path / "run" / "ckpt.pt")  # at any moment the file is whole
    process.kill()
    process.communicate()
    tinyinr.load(tmp_path / "run" / "ckpt.pt")
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] > step


def test_killed_at_random_moments_a_run_loses_no_more_than_an_interval_thoroughly(tmp_path, length):
    """Saves at every step, so that many kills fall into one; every start goes on where it was."""
    out, random = tmp_path / "run", np.random.default_rng(0)
    args = train_args("gp", "vnp", tmp_path, "--steps", 10**7, "--out", out)
    step, moments = 0, length(3, 50)
    for i in range(moments):
        since = saved(out / "ckpt.pt")
        process = start(*args, *["--resume"] * bool(since))
        if i % 5:  # every fifth is killed while it starts
            wait_for(out / "ckpt.pt", process, since)
            time.sleep(random.uniform(0, 0.5))
            seen = torch.load(out / "ckpt.pt", weights_only=True)["step"]
        else:
            time.sleep(random.uniform(0, 4))
            seen = step
        process.kill()
        process.communicate()
        if (out / "ckpt.pt").exists():
            tinyinr.load(out / "ckpt.pt")
            now = torch.load(out / "ckpt.pt", weights_only=True)["step"]
            assert now >= seen >= step
            step = now
    since = saved(out / "ckpt.pt")
    process = start(*args, "--resume")
    wait_for(out / "ckpt.pt", process, since)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl"]  # no litter
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    print(f"{moments} kills, {step} steps survived")


def test_two_runs_in_one_folder_are_kept_apart(trained):
    with tinyinr.alone_in(trained[1]), torch.enable_grad():
        output = run(*TRAIN, "--data", trained[0], "--out", trained[1], code=2)
    assert "another run writes to this folder" in output


def test_a_disk_that_is_full_from_the_start_ends_in_one_line(tmp_path):
    """A limit on the size of files stands in for the full disk: writing fails half-way."""
    args = train_args("gp", "vnp", tmp_path, "--steps", 50, "--out", tmp_path / "run")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    output = finish(start(*args, preexec_fn=limit), 2)
    assert output.count("Error: ") == 1 and "File too large" in output
    assert "Traceback" not in output
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) in ([], ["log.jsonl"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    output = run("train", "--task", "gp", "--smoke", "--out", "/proc/run", code=2)
    assert output.count("Error: ") == 1 and "/proc/run" in output


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    with torch.enable_grad():
        run(*train_args("gp", "vnp", tmp_path, "--steps", 4, "--out", tmp_path / "run"))
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4 and 0 < row["elapsed"] < 60 and row["eta"] == 0


def test_a_picture_that_vanishes_during_a_run_is_named(tmp_path):
    data = tinyinr.ImageData(image_config(), photos(tmp_path, 4), "train")
    data.pixels = None  # as where the set does not fit into memory
    stream = data.batches("cpu")
    next(stream)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"p\d.png.*restore it and go on with --resume"):
        for _ in range(200):  # some batches are ready already
            next(stream)


@pytest.mark.parametrize("task, name", CELLS)
def test_the_same_seed_gives_the_same_file(task, name, tmp_path):
    """Two runs of a cell leave the same bytes, however long they took."""
    args = train_args(task, name, tmp_path, "--steps", 3)
    hashes = set()
    for out in ("a", "b"):
        with torch.enable_grad():
            run(*args, "--out", tmp_path / out)
        hashes.add(hashlib.sha256((tmp_path / out / "ckpt.pt").read_bytes()).hexdigest())
    assert len(hashes) == 1


@pytest.mark.parametrize("task, name", CELLS)
def test_three_times_the_learning_rate_stays_finite_thoroughly(task, name, tmp_path, length):
    """Or the run ends with its reason and keeps the last good checkpoint."""
    preset = make_config("small", task, name)
    rates = ("--lr", 3 * preset.lr, "--set", f"muon_lr={3 * preset.muon_lr}", "--set",
             f"clip={preset.clip}", "--set", "identity_init=True", "--set", "warmup=50",
             "--set", "save_every=60", "--set", "hold=0")
    steps = length(60, 20_000)
    args = train_args(task, name, tmp_path, *rates, "--steps", steps, "--out", tmp_path / "run")
    with torch.enable_grad():
        result = CliRunner().invoke(tinyinr.cli, [str(a) for a in args])
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert all(bool(v.isfinite().all()) for v in ckpt["model"].values())
    assert result.exit_code == 0 or (result.exit_code == 1 and "not finite" in result.output)
    print(task, name, ckpt["step"], "steps", "" if result.exit_code == 0 else "ended early")


@pytest.mark.parametrize("task, name", CELLS)
def test_bf16_learns_as_fp32_does(task, name, tmp_path):
    """The training curves of both precisions agree within the noise of the steps."""
    errors = {}
    small = dict(batch_size=8, queries=64, lr=1e-3, muon_lr=0.01, beta2=0.95, clip=1.0, beta=1e-3)
    small |= dict(identity_init=True, freq_top=4.0, points_per_ray=8)
    cfg = Config(task=task, model=name, **SIZES | small | (
        dict(grid=48) if task == "gp" else dict(image_size=16, patch=4, padding=0)))
    if task == "nvs":
        balls(tmp_path, "0123")
    data = {"image": lambda: tinyinr.ImageData(cfg, photos(tmp_path, 9), "train"),
            "nvs": lambda: tinyinr.SceneData(cfg, tmp_path), "gp": lambda: tinyinr.CurveData(cfg)}
    for precision in ("fp32", "bf16"):
        training = tinyinr.Run(cfg, tinyinr.choose_device("cpu", precision))
        with torch.enable_grad():
            curve = [float(training.update(batch, i / 40)[1]) for i, batch in
                     zip(range(40), data[task]().batches("cpu"))]
        errors[precision] = np.log(curve)
    gap = np.abs(errors["fp32"] - errors["bf16"]).reshape(4, 10).mean(1)
    noise = np.std(np.diff(errors["fp32"])) / math.sqrt(2)
    if task != "gp":  # where a curve is hard or easy by chance
        assert errors["fp32"][-10:].mean() < errors["fp32"][:5].mean() - 0.2
    assert gap[-1] < max(0.1, noise), (gap, noise)


@pytest.mark.parametrize("task, name", CELLS)
def test_every_cell_learns(task, name, tmp_path):
    """Fitted within seconds: far better than at the start, and the context matters."""
    torch.manual_seed(0)
    small = dict(
        batch_size=4, queries=64, lr=3e-3, muon_lr=0.02, beta2=0.95, decay="linear", clip=1.0
    )
    small |= dict(identity_init=True, freq_top=4.0, beta=1e-3)
    steps = {"image": 250, "nvs": 120, "gp": 300}[task]
    if task == "image":
        cfg = image_config(model=name, **small)
        data = tinyinr.ImageData(cfg, photos(tmp_path, 5), "train")
    elif task == "nvs":
        balls(tmp_path, "0123", "0", angles=(0.5, 0.6, 0.7, 0.8))
        cfg = image_config(
            task="nvs",
            model=name,
            points_per_ray=12,
            radius=1.0,
            density_gain=20.0,
            **small,
        )
        data = tinyinr.SceneData(cfg, tmp_path, "train")
    else:
        cfg = Config(task="gp", model=name, **SIZES | small | dict(batch_size=16))
        data = tinyinr.CurveData(cfg)
    with torch.enable_grad():
        training, stream = tinyinr.Run(cfg, tinyinr.choose_device("cpu")), data.batches("cpu")
        losses = [float(training.update(next(stream), i / steps)[1]) for i in range(steps)]
    first, last = np.mean(losses[:5]), np.mean(losses[-10:])
    assert last < (0.75 if task == "gp" else 0.4) * first, (first, last)
    context, query, target = next(stream)
    model = training.model.eval()
    error = lambda c: float((model.decode(model.encode(c), query).mean - target).square().mean())
    wrong = {k: v.roll(1, 0) for k, v in context.items()}
    if task != "nvs":  # the balls are all alike
        assert error(wrong) > 1.2 * error(context), (error(wrong), error(context))


# ------------------------------------------------------------------------- test-time optimisation


def test_optimisation_lowers_the_error_on_the_context_of_every_signal():
    model = tiny("nvs", "transinr", tto_lr=1e-2)
    context, _ = signals("nvs")
    code = model.encode(context)
    query, values, _ = tinyinr.observations(model.cfg, context)
    error = lambda c: (model.decode(c, query).mean - values).square().mean((1, 2))
    refined = tinyinr.optimise(model, code, context, 20)
    assert (error(refined) < error(code)).all()
    assert all(not torch.equal(refined[k], code[k]) for k in code)


# ------------------------------------------------------------------------- hostile input

EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(("flip", "cut", "insert", "drop", "number")),
              st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)
NUMBERS = (b"1e400", b"-1", b"0", b"1e308", b"NaN", b"9" * 400, b"[[[[", b"null", b'"a"')


def damaged(data: bytes, edits) -> bytes:
    """A file with some of its bytes changed, and its numbers replaced by absurd ones."""
    for place, how, new in edits:
        at = int(place * len(data))
        if how == "number":
            found = [n.span() for n in re.finditer(rb"-?\d[\d.e+-]*", data)]
            if found:
                a, b = found[min(int(place * len(found)), len(found) - 1)]
                data = data[:a] + NUMBERS[new[0] % len(NUMBERS)] + data[b:]
        elif how == "cut":
            data = data[:at]
        else:
            after = {"flip": at + len(new), "insert": at, "drop": at + 9 * len(new)}[how]
            data = data[:at] + new * (how != "drop") + data[after:]
    return data


def hostile(kind, folder):
    """Good files of a kind, and a function that reads a damaged one."""
    path, cfg = folder / "input", image_config()

    def by(read):
        return lambda data: (path.write_bytes(data), read(path))[1]

    if kind == "checkpoint":
        models = [tiny(task, name) for task, name in CELLS]
        states = [{"config": asdict(m.cfg), "model": m.state_dict()} for m in models]
        files = [io.BytesIO() for _ in states]
        for state, file in zip(states, files):
            torch.save(state, file)
        return [f.getvalue() for f in files], by(tinyinr.load)
    if kind == "official checkpoint":
        return [p.read_bytes() for p in sorted(PARITY.glob("*.pth"))], by(tinyinr.load)
    if kind == "picture":
        suffixes = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
        return [encoded(picture(), f) for f in suffixes], lambda d: tinyinr.decode_image(d, 16)
    if kind == "zip":
        photos(folder / "train", 2), photos(folder / "test", 1)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
            for p in sorted(folder.rglob("*.png")):
                z.write(p, p.relative_to(folder))
        return [file.getvalue()], by(lambda p: tinyinr.ImageData(cfg, p, "test"))
    if kind == "scene":
        scene = write_scene(folder / "balls" / "a")
        good, path = (scene / "transforms.json").read_bytes(), scene / "transforms.json"
        read = lambda p: tinyinr.read_scene(tinyinr.Tree(folder), "balls/a", 16)
        return [good], lambda data: (path.write_bytes(data), read(path))[1]
    if kind == "split":
        good = json.dumps({"train": list("0123"), "test": ["4", "5"]}).encode()
        path = folder / "ball_splits.json"
        return [good], lambda data: (path.write_bytes(data), tinyinr.read_split(
            tinyinr.Tree(folder), "ball_splits.json"))[1]
    rows = b"x,y\n" + b"".join(b"%d,%.3f\n" % (i, i / 7) for i in range(9))
    return [rows, rows.replace(b"\n", b"\r\n"), b'"1","2"\n3,4\n'], by(
        lambda p: tinyinr.standardise(*tinyinr.read_csv(p)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["checkpoint", "official checkpoint", "picture", "zip", "scene",
                                  "split", "csv"])
def test_damaged_files_are_read_or_refused_thoroughly(kind, tmp_path, length):
    """Whatever the bytes: a result or a ValueError or OSError with words, soon, and no file."""
    good, read = hostile(kind, tmp_path)
    refused, before = [], None

    @settings(max_examples=length(40, 15_000), deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(good), EDITS)
    def check(data, edits):
        start = time.monotonic()
        try:
            read(damaged(data, edits))
        except (ValueError, OSError) as e:
            assert str(e)
            refused.append(e)
        assert time.monotonic() - start < 20

    for data in good:
        read(data)
    before = sorted(p for p in tmp_path.rglob("*"))
    check()
    assert refused and sorted(p for p in tmp_path.rglob("*")) == before
    print(kind, length(40, 15_000), "inputs,", len(refused), "refused")


@pytest.mark.parametrize("change, words", [
    (dict(config=dict(dim=10**12)), "dim=1000000000000 must be from 1 to 1,048,576"),
    (dict(config=dict(dim=2**20, ff_dim=2**20)), "weight .* its config asks for"),
    (dict(config=dict(depth=1000)), "weight transformer.10.* is missing"),
    (dict(config=dict(depth=-1)), "depth=-1 must be from 0 to 1,024"),
    (dict(config=dict(dim="32")), "dim='32' must be a int"),
    (dict(config=dict(lr=math.nan)), "lr=nan must be a float"),
    (dict(wtokens=torch.zeros(1).expand(19, 32)), "claims more numbers than the file holds"),
    (dict(wtokens=torch.zeros(1).expand(10**6, 10**6)), "wtokens is .1000000, 1000000."),
])
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(change, words, tmp_path):
    """Before memory is taken: the whole test takes less than 200 MB more than it began with."""
    model = tiny("image", "transinr")
    state = {"config": asdict(model.cfg) | change.get("config", {}), "model": model.state_dict()}
    state["model"] |= {k: v for k, v in change.items() if k != "config"}
    torch.save(state, tmp_path / "bad.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words):
        tinyinr.load(tmp_path / "bad.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("change, words", [
    (dict(optimizers=[{"state": 1, "param_groups": []}]), "cannot be resumed"),
    (dict(optimizers=7), "cannot be resumed"),
    (dict(model={"wtokens": torch.zeros(3)}), "cannot be resumed"),
    (dict(step="x"), "cannot be resumed"),
    (dict(config={"dim": 1, "unknown": 2}), "not of a run of this program"),
    (dict(config=[1]), "not of a run of this program"),
])
def test_a_run_from_a_damaged_checkpoint_is_refused_in_one_line(change, words, trained, tmp_path):
    ckpt = torch.load(trained[1] / "ckpt.pt", weights_only=True) | change
    (tmp_path / "run").mkdir()
    torch.save(ckpt, tmp_path / "run" / "ckpt.pt")
    with torch.enable_grad():
        output = run(*TRAIN, "--data", trained[0], "--steps", 9, "--out", tmp_path / "run",
                     "--resume", code=2)
    assert words in output and output.count("Error: ") == 1


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """torch.save compresses nothing; a bomb is what does."""
    torch.save({"model": {"a": torch.zeros(10**6)}}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        with zipfile.ZipFile(tmp_path / "bad.pt", "w", zipfile.ZIP_DEFLATED) as bad:
            for name in good.namelist():
                bad.writestr(name, good.read(name))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        tinyinr.load(tmp_path / "bad.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_picture_bomb_is_refused_before_it_is_unpacked():
    for side, words in ((12_000, "12000 x 12000 pixels are more"), (20_000, "bomb")):
        bomb = encoded(Image.new("1", (side, side)))
        assert len(bomb) < 100_000
        with pytest.raises(ValueError, match=words):
            tinyinr.decode_image(bomb, 16)


def test_zips_are_read_in_place_and_bombs_and_odd_names_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tinyinr, "MOST_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("train/../../../evil.png", encoded(picture()))
        z.writestr("train/bomb.png", bytes(1_000_000))
        z.writestr("train/two\nlines.png", b"no picture")
        z.writestr("test/a.png", encoded(picture()))
    data = tinyinr.ImageData(image_config(), tmp_path / "set.zip", "train")
    assert len(data) == 1
    lines = [n for n in capsys.readouterr().out.splitlines() if n.startswith("left out")]
    assert len(lines) == 2 and "1,000,000 bytes" in lines[0] and "two lines.png" in lines[1]
    assert [p.name for p in tmp_path.rglob("*")] == ["set.zip"]
    assert not list(tmp_path.parent.glob("evil*"))


# ------------------------------------------------------------------------- command line


def test_render_and_inspect_draw_pictures_of_the_asked_size(trained, tmp_path):
    data, out = trained
    for size in (20, 300):
        run("render", out / "ckpt.pt", data / "p0.png", "-o", tmp_path / "r.png", "--size", size)
        assert Image.open(tmp_path / "r.png").size == (size, size)
    run("inspect", out / "ckpt.pt", data / "p0.png", "-o", tmp_path / "i.png")
    assert Image.open(tmp_path / "i.png").size[0] > 192 * 5


def test_render_agrees_with_decode(trained, tmp_path):
    data, out = trained
    run("render", out / "ckpt.pt", data / "p0.png", "-o", tmp_path / "r.png", "--size", 40)
    model = tinyinr.load(out / "ckpt.pt")
    code = model.encode(tinyinr.read_context(model, data / "p0.png"))
    want = model.decode(code, {"coords": tinyinr.pixel_grid(40, 40)[None]}).mean.view(40, 40, 3)
    got = torch.from_numpy(np.array(Image.open(tmp_path / "r.png"))) / 255
    torch.testing.assert_close(got, want.clamp(0, 1), atol=0.5 / 255 + 1e-5, rtol=0)


def test_official_checkpoints_render(tmp_path):
    picture((40, 40)).save(tmp_path / "p.png")
    run(
        "render",
        PARITY / "transinr_image_1.pth",
        tmp_path / "p.png",
        "-o",
        tmp_path / "o.png",
        "--size",
        30,
    )
    write_scene(tmp_path / "scene", size=24)
    for name in ("transinr_nvs_1", "vnp_1"):
        run(
            "render",
            PARITY / f"{name}.pth",
            tmp_path / "scene",
            "-o",
            tmp_path / "o.gif",
            "--size",
            8,
        )
        assert Image.open(tmp_path / "o.gif").n_frames == 36


def test_a_csv_becomes_a_plot(tmp_path):
    torch.save(
        {
            "config": vars(tiny("gp", "vnp").cfg) | {"context": [1.0, 1.0]},
            "model": tiny("gp", "vnp").state_dict(),
        },
        tmp_path / "c.pt",
    )
    (tmp_path / "p.csv").write_text("x,y\n-1,0.5\n0,0.2\n0,0.3\n1.5,-1\n")
    run("render", tmp_path / "c.pt", tmp_path / "p.csv", "-o", tmp_path / "o.png", "--size", 240)
    assert Image.open(tmp_path / "o.png").size == (240, 160)


@pytest.mark.parametrize("points, columns", ((46, 1), (47, 2), (200, 3)))
def test_a_long_series_is_plotted_stretch_by_stretch(points, columns):
    model, order = tiny("gp", "vnp"), torch.randperm(points)
    x = torch.arange(points, dtype=torch.float64).view(-1, 1)
    y = (x / 9).sin()
    picture = np.asarray(tinyinr.render_curve(model, x[order], y[order], 120))
    count = -(-points // 46)
    for i, part in enumerate(torch.arange(points).tensor_split(count)):
        top, left = i // columns * (80 + 4), i % columns * (120 + 4)
        want = tinyinr.curve_picture(model, *tinyinr.standardise(x[part], y[part]), size=(120, 80))
        np.testing.assert_array_equal(picture[top : top + 80, left : left + 120], want)
    assert picture.shape[1] == columns * 124 - 4


def test_a_series_is_scored_beside_a_fitted_gp(tmp_path):
    model = tiny("gp", "vnp")
    config = vars(model.cfg) | {"context": [1.0, 1.0]}
    torch.save({"config": config, "model": model.state_dict()}, tmp_path / "c.pt")
    run("eval", tmp_path / "c.pt", "--data", tinyinr.DATA / "sunspots.csv", "--json",
        tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())["sunspots"]
    assert scores["sets"] == 10 and scores["fitted_gp"] > scores["target_ll"]
    with pytest.raises(ValueError, match="drawn, not read"):
        tinyinr.CurveData(model.cfg, "points.csv", "train")


def test_a_series_is_scaled_to_the_training_units():
    x, y = tinyinr.standardise(1700 + 9 * rand(3, 8, 1), 5 + 40 * rand(3, 8, 1, seed=1))
    torch.testing.assert_close(x.amin(1), torch.full((3, 1), -2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.amax(1), torch.full((3, 1), 2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.mean(1), torch.zeros(3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1, correction=0), torch.full((3, 1), 0.5))
    x, y = tinyinr.standardise(torch.ones(1, 1), torch.ones(1, 1))  # one point
    assert x.isfinite().all() and float(y) == 0


BAD_CSV = {
    "text": "x,y\n1,2\n3,hello\n",
    "nan": "1,nan\n",
    "one column": "1\n2\n",
    "no rows": "x,y\n",
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_csv_is_named(kind, tmp_path):
    (tmp_path / "bad.csv").write_text(BAD_CSV[kind])
    with pytest.raises(ValueError, match="bad.csv: (data row|no rows).*two finite numbers"):
        tinyinr.read_csv(tmp_path / "bad.csv")


def test_bad_input_ends_in_one_line_and_exit_code_2(trained, tmp_path):
    data, out = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "b.png").write_bytes(encoded(picture())[:60])
    whole = (out / "ckpt.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": Path("pickled")}, tmp_path / "pickled.pt")
    picture((2, 2)).save(tmp_path / "two.png")
    target = tmp_path / "out.png"
    for args, words in [
        ((*TRAIN, "--data", tmp_path / "none", "--out", tmp_path / "o"), "no such folder or zip"),
        ((*TRAIN, "--data", tmp_path / "empty", "--out", tmp_path / "o"), "no pictures"),
        (
            (*TRAIN, "--data", tmp_path / "broken", "--out", tmp_path / "o"),
            "none of 1 pictures could be",
        ),
        (
            (*TRAIN, "--preset", "huge", "--out", tmp_path / "o"),
            "choose from small, transinr-celeba",
        ),
        (
            (*TRAIN, "--set", "groups=5", "--out", tmp_path / "o"),
            "groups=5 must divide inr_width=16",
        ),
        ((*TRAIN, "--set", "colour=1", "--out", tmp_path / "o"), "--set='colour' is unknown"),
        (
            (*TRAIN, "--data", data, "--seed", 5, "--out", out),
            "holds a run of another configuration",
        ),
        (("train", "--resume", "--out", tmp_path / "o"), "nothing to resume"),
        (
            ("render", out / "ckpt.pt", tmp_path / "two.png", "-o", target),
            "fewer than the 4 x 4 patches",
        ),
        (
            ("render", out / "ckpt.pt", tmp_path / "broken" / "a.png", "-o", target),
            "not a picture",
        ),
        (
            ("render", out / "ckpt.pt", data / "p0.png", "-o", tmp_path / "out.xyz"),
            "end the name in .png",
        ),
        (("render", tmp_path / "none.pt", data / "p0.png", "-o", target), "no such checkpoint"),
        (
            ("render", tmp_path / "cut.pt", data / "p0.png", "-o", target),
            "not a readable checkpoint",
        ),
        (
            ("render", tmp_path / "pickled.pt", data / "p0.png", "-o", target),
            "not a readable checkpoint",
        ),
        (
            ("inspect", PARITY / "vnp_1.pth", data / "p0.png", "-o", target),
            "inspect takes a TransINR",
        ),
    ]:
        output = run(*args, code=2)
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and words in errors[0], (words, output)
    assert not target.exists() and not (tmp_path / "out.xyz").exists()
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "o").glob("*"))


def test_broken_pictures_among_good_ones_are_named_counted_and_left_out(tmp_path):
    photos(tmp_path / "p" / "train", 3), photos(tmp_path / "p" / "test", 2)
    (tmp_path / "p" / "train" / "z.png").write_bytes(b"no picture")
    with torch.enable_grad():
        output = run(*TRAIN, "--data", tmp_path / "p", "--steps", 1, "--out", tmp_path / "o")
    assert "z.png" in output and "1 of 4 pictures are unreadable" in output


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(camera_angle_x="wide"), "malformed"),
        (dict(frames=[]), "frames"),
        (dict(frames=[{"file_path": "./r_9", "transform_matrix": np.eye(4).tolist()}]), "absent"),
        (
            dict(frames=[{"file_path": "./r_0", "transform_matrix": (2 * np.eye(4)).tolist()}]),
            "not a rotation",
        ),
    ],
)
def test_a_malformed_scene_is_named(change, words, tmp_path):
    write_scene(tmp_path / "s", **change)
    with pytest.raises(ValueError, match=f"s/transforms.json.*{words}"):
        tinyinr.read_scene(tinyinr.Tree(tmp_path), "s", 16)


def test_scenes_with_too_few_views_or_views_of_two_sizes_are_refused(tmp_path):
    write_scene(tmp_path / "s", count=2)
    cfg = image_config(task="nvs", views=2)
    with pytest.raises(ValueError, match="2 views, fewer than the 2 of --views and one target"):
        tinyinr.SceneData(cfg, tmp_path)
    picture((16, 20)).save(tmp_path / "s" / "r_1.png")
    with pytest.raises(ValueError, match="r_1.png.*must be of one size"):
        tinyinr.read_scene(tinyinr.Tree(tmp_path), "s", 16)


def quick_bench(monkeypatch):
    """Let `bench` measure nothing: every figure of a cell is 0.5, a product takes 1 ms."""
    row = dict.fromkeys(("step_ms", "signals_per_s", "gflop", "share", "memory_mb", "encode_ms",
                         "decode_per_s"), 0.5)
    monkeypatch.setattr(tinyinr, "ProcessPoolExecutor", lambda *_, initializer, **__:
                        ThreadPoolExecutor(1, initializer=initializer))
    monkeypatch.setattr(tinyinr, "median_seconds", lambda *_: 1e-3)
    monkeypatch.setattr(
        tinyinr, "bench_cell", lambda cfg, _: row | {"cell": f"{cfg.model} {cfg.batch_size}"})


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """All of them, on few signals and for a moment, but for the one that needs CelebA and a GPU."""
    monkeypatch.chdir(tmp_path)
    quick_bench(monkeypatch)
    Path("data").symlink_to(ROOT / "data")
    picture((90, 80)).save("photo.jpg")
    Path("points.csv").write_text("x,y\n-1,0.5\n0,0.2\n1.5,-1\n")
    lines = re.findall(
        r"^python (tinyinr|export).py (.*?) *(?:#.*)?$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(lines) >= 16 and {args.split()[0] for program, args in lines
                                 if program == "tinyinr"} == set(tinyinr.cli.commands)
    quick = {"--minutes 15": "--minutes 0.01", "2048": "64", "--size 128": "--size 16",
             "--tto 100": "--tto 1"}
    with torch.enable_grad():
        for program, line in lines:
            for long, short in quick.items():
                line = line.replace(long, short)
            args = shlex.split(line)
            if program == "export":
                trained = ROOT / "data" / "pretrained" / "image-transinr.pt"
                Path("ckpt.pt").write_bytes(trained.read_bytes())
                run_export(*args)
            elif "transinr-celeba" not in args:
                extra = {"train": ["--smoke"], "eval": ["--size", "1"]}.get(args[0], [])
                run(*args, *extra)
    page = (ROOT / "README.md").read_text()
    by_torchrun = re.findall(r"^torchrun .*=(\d+) tinyinr.py (.*)$", page, re.M)
    assert [int(n) for n, _ in by_torchrun] == [2, 8]
    finish(start(*shlex.split(by_torchrun[0][1]), "--smoke", processes=2))
    assert Path("runs/two/ckpt.pt").exists()
    for name in ("scores.json", "large.png", "turn.gif", "plot.png", "attention.png"):
        assert Path(name).stat().st_size > 0


# ------------------------------------------------------------------------- speed


@pytest.mark.parametrize("task, name", CELLS)
def test_a_measured_step_counts_every_product_once_a_signal(task, name, monkeypatch):
    """Twice the signals are twice the FLOPs, and the share is FLOPs by time by peak."""
    monkeypatch.setattr(tinyinr, "median_seconds", lambda work, *_: (work(), 0.5)[1])
    cfg = replace(tiny(task, name).cfg, batch_size=2, queries=5)
    with torch.enable_grad():
        one, two = (tinyinr.bench_cell(replace(cfg, batch_size=b), "cpu") for b in (1, 2))
    assert two["gflop"] == pytest.approx(2 * one["gflop"], rel=0.02)
    peak = 2 * 2048**3 / 0.5
    assert two["share"] == pytest.approx(two["gflop"] * 1e9 / 0.5 / peak)
    assert (two["step_ms"], two["encode_ms"], two["decode_per_s"]) == (500, 250, 20)
    assert two["signals_per_s"] == 4 and two["memory_mb"] > 50


def test_the_products_of_a_linear_layer_are_counted_as_by_hand(monkeypatch):
    """Three products a layer and step: forward, by the weights and by the inputs."""
    monkeypatch.setattr(tinyinr, "median_seconds", lambda *_: 1.0)
    small, wide = (replace(tiny("image", "transinr").cfg, batch_size=2, queries=64, ff_dim=n)
                   for n in (48, 80))
    with torch.enable_grad():
        more = tinyinr.bench_cell(wide, "cpu")["gflop"] - tinyinr.bench_cell(small, "cpu")["gflop"]
    products = 3 * 2 * small.depth  # of both layers of the feed-forward part
    assert more * 1e9 == pytest.approx(2 * small.tokens * products * small.dim * 32 * 2)


def test_median_seconds():
    naps = iter([0.2, 0.2, 0.01, 0.02, 0.03, 0.04, 0.05])  # two to warm up, five that count
    assert 0.03 <= tinyinr.median_seconds(lambda: time.sleep(next(naps)), "cpu", 0.1) < 0.04


def test_bench_prints_and_writes_a_row_for_every_cell(tmp_path, monkeypatch):
    cells = {cell: {"batch_size": 1} for cell in CELLS[:2]}
    monkeypatch.setattr(tinyinr, "PRESETS", {"small": cells})
    quick_bench(monkeypatch)
    kept = set()  # where memory is kept between steps: in the command and in the cells' process
    monkeypatch.setattr(tinyinr, "keep_memory", lambda: kept.add(threading.get_ident()))
    out = run("bench", "--batch-size", 3, "--json", tmp_path / "bench.json")
    assert len(kept) == 2
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [r["cell"] for r in written["cells"]] == ["transinr 3", "vnp 3"]
    assert written["peaks"]["float32"] == 2 * 2048**3 / 1e-3
    assert "17.18 TFLOP/s in float32" in out and "vnp 3" in out and "50%" in out


def test_cost_curves_end_where_memory_does_and_are_drawn_in_place(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    costs = importlib.import_module("costs")
    with ThreadPoolExecutor(1) as pool:
        law = lambda axis, model, n: (1e-4 * n, 1e3 * n**2)  # 16 times the memory a step
        monkeypatch.setattr(costs, "measure", law)
        points = costs.line("views encoded", "vnp", pool)
    assert [n for n, *_ in points] == [4**i for i in range(7)]  # 4,096 takes 16.8 GB
    picture = costs.panel("views", {"vnp": [(1, 1e-3, 1e9), (1000, 1.0, 1e9)]})
    left, bottom = (40, picture.size[1] - 24)
    assert picture.getpixel((left + 1, bottom - 1)) == costs.COLORS["vnp"]
    assert picture.getpixel((picture.size[0] - 11, 25)) == costs.COLORS["vnp"]
    picture = costs.plot({"seed 0": [(0.0, 10.0), (2.0, 20.0)]}, size=(260, 250))  # x 110, y 20
    for x, y in ((0.5, 12.5), (1.0, 15.0), (1.5, 17.5)):
        pixel = (round(40 + 100 * x), round(220 - 20 * (y - 10)))
        assert picture.getpixel(pixel) == costs.COLORS["transinr"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_is_kept_between_steps():
    """64 MB taken and freed again and again: the system has to hand out fresh pages once only."""
    code = ("import resource, torch, tinyinr\n{}\nfor _ in range(12): torch.ones(2**24)\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "before = faults()\nfor _ in range(5): torch.ones(2**24)\nprint(faults() - before)")
    kept, lost = (int(subprocess.run([sys.executable, "-c", code.format(call)], cwd=ROOT,
                                     capture_output=True, check=True).stdout)
                  for call in ("tinyinr.keep_memory()", ""))
    assert 4 * kept < lost


# ------------------------------------------------------------------------- pretrained models


PRETRAINED = sorted((ROOT / "data" / "pretrained").glob("*.pt"))


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda p: p.stem)
def test_a_pretrained_model_is_small_and_says_what_it_is(path):
    record = json.loads(path.with_suffix(".json").read_text())
    cfg = tinyinr.load(path).cfg
    assert path.stat().st_size < 5e6
    assert f"--task {cfg.task} --model {cfg.model}" in record["command"]
    assert record["seed"] == cfg.seed and record["minutes"] == pytest.approx(cfg.minutes, abs=0.2)


def test_the_pretrained_image_model_has_the_score_that_is_written_beside_it():
    path = ROOT / "data" / "pretrained" / "image-transinr.pt"
    model = tinyinr.load(path)
    data = tinyinr.ImageData(model.cfg, None, "test")
    scores = tinyinr.evaluate(model, data, tinyinr.choose_device("cpu"))
    wanted = json.loads(path.with_suffix(".json").read_text())["scores"]["all"]
    assert scores["all"]["psnr"] == pytest.approx(wanted["psnr"], abs=1e-3)
    assert scores["all"]["pictures"] == wanted["pictures"]


# ------------------------------------------------------------------------- export

SURFACE = dict(radius=1.0, density_gain=20.0, color_gain=4.0, view_positions=True)
EXPORTS = {  # name -> (model or official checkpoint, options); every cell, both opsets, each option
    "image-transinr": (PARITY / "transinr_image_1.pth", ["--opset", "18"]),
    "image-vnp": (dict(task="image", model="vnp", context=(0.1, 0.5), merge=2, upsample=3), []),
    "nvs-transinr": (PARITY / "transinr_nvs_1.pth", []),
    "nvs-vnp": (dict(task="nvs", model="vnp", **SURFACE), ["--opset", "18"]),
    "nvs-vnp-official": (PARITY / "vnp_1.pth", []),
    "gp-transinr": (dict(task="gp", model="transinr"), []),
    "gp-vnp": (dict(task="gp", model="vnp"), ["--opset", "18"]),
    "gp-vnp-fused": (dict(task="gp", model="vnp", latent_pool="tokens", pool_every=3),
                     ["--fused"]),
    "image-transinr-again": (PARITY / "transinr_image_1.pth", ["--opset", "18"]),
    "image-transinr-half": (dict(task="image", model="transinr", dim=64), ["--fp16"]),
}
SPLIT = [
    "image-transinr",
    "image-vnp",
    "nvs-transinr",
    "nvs-vnp",
    "nvs-vnp-official",
    "gp-transinr",
    "gp-vnp",
]


def run_export(*args, code=0):
    """export.py in this process: its output, after a check of the exit code."""
    result = CliRunner().invoke(export.main, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def save_model(path, model):
    torch.save({"format": 1, "config": asdict(model.cfg), "model": model.state_dict()}, path)


def export_one(folder, name):
    """One of EXPORTS, in a process of its own: what it printed."""
    source, options = EXPORTS[name]
    torch.set_num_threads(1)
    if isinstance(source, dict):
        save_model(folder / f"{name}.pt", tiny(**source))
        source = folder / f"{name}.pt"
    return name, run_export(source, "-o", folder / name, *options)


@pytest.fixture(scope="session", autouse=True)
def exporting(request, tmp_path_factory):
    """Exports take a minute: a second process does them beside the tests that come before."""
    if not any("exported" in item.fixturenames for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("onnx")
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield folder, pool.map(export_one, [folder] * len(EXPORTS), EXPORTS)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def exported(exporting):
    """A folder with EXPORTS, and what each of them printed."""
    folder, outputs = exporting
    return folder, dict(outputs)


def exported_model(folder, name):
    source = EXPORTS[name][0]
    return tinyinr.load(folder / f"{name}.pt" if isinstance(source, dict) else source)


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options)


def run_onnx(path, feed) -> dict:
    """Name -> tensor of what a file makes of the tensors it asks for."""
    graph = session(path)
    values = graph.run(None, {i.name: feed[i.name].numpy() for i in graph.get_inputs()})
    return {o.name: torch.from_numpy(v) for o, v in zip(graph.get_outputs(), values)}


def problem(cfg, batch, targets):
    """A context and a query of sizes that the export never saw."""
    if cfg.task == "image":
        context = {"image": rand(batch, 3, cfg.image_size, cfg.image_size)}
        if cfg.masked:
            context["mask"] = (
                rand(batch, 1, cfg.image_size, cfg.image_size, seed=1) < 0.3
            ).float()
        return context, {"coords": 2 * rand(batch, targets, 2, seed=2) - 1}
    if cfg.task == "gp":
        mask = (rand(batch, 11, seed=2) < 0.6).float()
        context = {"x": 4 * rand(batch, 11, 1) - 2, "y": rand(batch, 11, 1, seed=1), "mask": mask}
        return context, {"x": 4 * rand(batch, targets, 1, seed=3) - 2}
    height, width = (16, 16) if cfg.view_positions else (3 * cfg.patch, 7 * cfg.patch + 1)
    context = {
        "images": rand(batch, 2, 3, height, width),
        "poses": poses(batch, 2),
        "focals": 20 + 10 * rand(batch, 2, 2, seed=1),
    }
    o, d = tinyinr.camera_rays(poses(batch, seed=1), torch.full((batch, 2), 20.0), 16, 16)
    pick = torch.arange(targets) * 31 % 256
    return context, {
        "rays_o": o.flatten(1, 2)[:, pick],
        "rays_d": d.flatten(1, 2)[:, pick],
        "near": 2.5 + rand(batch, seed=4),
        "far": 5 + rand(batch, seed=5),
    }


def noise(cfg, batch, seed=6):
    if cfg.model != "vnp":
        return None
    return torch.randn(
        cfg.blocks, batch, 1, cfg.latent, generator=torch.Generator().manual_seed(seed)
    )


def close(a, b, atol=1e-4):
    assert a.shape == b.shape and a.isfinite().all()
    assert (a - b).abs().max() <= atol * b.abs().max().clamp(min=1), (a - b).abs().max()


@pytest.mark.parametrize("name", SPLIT)
def test_encoder_and_decoder_agree_with_torch_on_unseen_shapes(exported, name):
    folder, _ = exported
    model = exported_model(folder, name)
    context, query = problem(model.cfg, 5, 15)
    eps = noise(model.cfg, 5)
    truth = model.encode(context)
    code = run_onnx(folder / f"{name}.encoder.onnx", context)
    assert list(code) == list(truth)
    for key in code:
        close(code[key], truth[key])
    values = run_onnx(folder / f"{name}.decoder.onnx", code | query | {"eps": eps})
    prediction = model.decode(truth, query, eps=eps)
    close(values.pop("mean"), prediction.mean)
    assert (prediction.std is not None) == ("std" in values)
    if values:
        close(values["std"], prediction.std)
    assert prediction.mean.std() > 1e-3  # or the comparison would say nothing


def test_a_fused_graph_maps_context_and_query_to_values(exported):
    folder, _ = exported
    model = exported_model(folder, "gp-vnp-fused")
    context, query = problem(model.cfg, 5, 15)
    eps = noise(model.cfg, 5)
    values = run_onnx(folder / "gp-vnp-fused.onnx", context | {"query_x": query["x"], "eps": eps})
    prediction = model.decode(model.encode(context), query, eps=eps)
    close(values["mean"], prediction.mean)
    close(values["std"], prediction.std)


def test_noise_draws_the_latents_and_the_depth_range_is_each_signals_own(exported):
    folder, _ = exported
    cfg = exported_model(folder, "nvs-vnp").cfg
    context, query = problem(cfg, 2, 40)
    code = run_onnx(folder / "nvs-vnp.encoder.onnx", context)
    decoder = folder / "nvs-vnp.decoder.onnx"
    feed = code | query | {"eps": noise(cfg, 2)}
    mean = run_onnx(decoder, feed)["mean"]
    assert not torch.equal(mean, run_onnx(decoder, feed | {"eps": noise(cfg, 2, seed=7)})["mean"])
    nearer = run_onnx(decoder, feed | {"far": query["far"] - torch.tensor([2.0, 0.0])})["mean"]
    assert not torch.allclose(nearer[0], mean[0]) and torch.equal(nearer[1], mean[1])


def test_masked_points_do_not_count(exported):
    folder, _ = exported
    context, query = problem(exported_model(folder, "gp-vnp").cfg, 1, 8)
    seen = context["mask"][0].bool()
    part = {k: v[:, seen] for k, v in context.items()}
    encoder, decoder = (folder / f"gp-vnp.{part}.onnx" for part in ("encoder", "decoder"))
    eps = noise(exported_model(folder, "gp-vnp").cfg, 1)
    padded, cut = (
        run_onnx(decoder, run_onnx(encoder, c) | query | {"eps": eps}) for c in (context, part)
    )
    assert 0 < seen.sum() < len(seen)
    close(padded["mean"], cut["mean"], 1e-5)
    close(padded["std"], cut["std"], 1e-5)


def test_the_code_of_a_transinr_is_a_plain_mlp(exported):
    """The exported weights in ten lines of numpy give the decoder's picture."""
    folder, _ = exported
    context, query = problem(exported_model(folder, "image-transinr").cfg, 1, 9)
    code = run_onnx(folder / "image-transinr.encoder.onnx", context)
    mean = run_onnx(folder / "image-transinr.decoder.onnx", code | query)["mean"]
    freqs = np.exp(np.linspace(0, np.log(1024), len(code["wb0"][0]) // 4))
    angles = (np.pi * query["coords"][0].double().numpy()[..., None] * freqs).reshape(9, -1)
    h = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    for i, wb in enumerate(code.values()):
        h = (
            np.concatenate((h if i == 0 else h.clip(0), np.ones((9, 1))), 1)
            @ wb[0].double().numpy()
        )
    assert np.abs(h + 0.5 - mean[0].numpy()).max() < 1e-3  # angles up to 3,000 in fp32


def shapes(values):
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_dimensions_are_free_but_where_the_architecture_fixes_them(exported):
    folder, printed = exported
    graph = {
        name: onnx.load(folder / f"{name}.onnx").graph
        for name in (
            "nvs-transinr.encoder",
            "nvs-vnp.encoder",
            "nvs-vnp.decoder",
            "image-vnp.encoder",
            "gp-vnp-fused",
        )
    }
    assert shapes(graph["nvs-transinr.encoder"].input) == {
        "images": ["batch", "views", 3, "height", "width"],
        "poses": ["batch", "views", 3, 4],
        "focals": ["batch", "views", 2],
    }
    images = shapes(graph["nvs-vnp.encoder"].input)["images"]  # learned positions of patches
    assert images == ["batch", "views", 3, 16, 16]
    assert shapes(graph["nvs-vnp.decoder"].input) == {
        "tokens": ["batch", 27, 32],  # of a lattice
        "pool_rays_o": ["batch", "pool", 3],
        "pool_rays_d": ["batch", "pool", 3],
        "pool_weight": ["batch", "pool"],
        "rays_o": ["batch", "queries", 3],
        "rays_d": ["batch", "queries", 3],
        "near": ["batch"],
        "far": ["batch"],
        "eps": [2, "batch", 1, 5],
    }
    assert shapes(graph["nvs-vnp.decoder"].output) == {"mean": ["batch", "queries", 3]}
    assert shapes(graph["image-vnp.encoder"].input) == {
        "image": ["batch", 3, 16, 16],
        "mask": ["batch", 1, 16, 16],
    }
    assert "static: the context has 16 x 16 pixels" in printed["image-vnp"]
    assert shapes(graph["gp-vnp-fused"].input) == {
        "x": ["batch", "points", 1],
        "y": ["batch", "points", 1],
        "mask": ["batch", "points"],
        "query_x": ["batch", "queries", 1],
        "eps": [2, "batch", 1, 5],
    }
    assert shapes(graph["gp-vnp-fused"].output) == {
        k: ["batch", "queries", 1] for k in ("mean", "std")
    }


def test_a_dimension_that_became_static_is_refused():
    values = [onnx.helper.make_tensor_value_info("x", 1, ["s0", 7, 1])]
    with pytest.raises(tinyinr.RunFailed, match=r"x came out as \['batch', 7, 1\]"):
        export.name_dimensions(values, {"x": ("batch", "points", 1)})


@pytest.mark.parametrize("name", list(EXPORTS))
def test_files_are_single_of_the_asked_opset_and_hold_no_traces(exported, name):
    folder, _ = exported
    opset = 18 if "18" in EXPORTS[name][1] else 20
    files = list(folder.glob(f"{name}.*onnx*"))
    assert len(files) == (1 if "--fused" in EXPORTS[name][1] else 2)
    for file in files:
        data = file.read_bytes()
        proto = onnx.load_from_string(data)
        onnx.checker.check_model(proto, full_check=True)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
        for trace in (b"site-packages", b".py", b"/tmp", str(ROOT).encode(), b"stack_trace"):
            assert trace not in data, trace


def test_metadata_says_what_a_file_is(exported):
    folder, _ = exported
    meta = session(folder / "gp-vnp.decoder.onnx").get_modelmeta().custom_metadata_map
    assert tinyinr.Config(**json.loads(meta["config"])) == exported_model(folder, "gp-vnp").cfg
    assert (meta["part"], meta["task"], meta["model"]) == ("decoder", "gp", "vnp")
    assert meta["opset"] == "18" and json.loads(meta["versions"])["torch"] == torch.__version__
    digest = hashlib.sha256((folder / "gp-vnp.pt").read_bytes()).hexdigest()
    assert meta["checkpoint_sha256"] == digest
    assert json.loads(meta["inputs"]).keys() == {"tokens", "pool_x", "pool_weight", "x", "eps"}
    assert json.loads(meta["outputs"]).keys() == {"mean", "std"}
    assert "(row, column)" in meta["conventions"] and "OpenGL" in meta["conventions"]
    official = session(folder / "nvs-vnp-official.decoder.onnx").get_modelmeta()
    assert "pooled over the rays of a call" in official.custom_metadata_map["notes"]


def test_the_same_checkpoint_gives_the_same_bytes(exported):
    folder, _ = exported
    for part in ("encoder", "decoder"):
        first, again = (folder / f"image-transinr{n}.{part}.onnx" for n in ("", "-again"))
        assert first.read_bytes() == again.read_bytes()


def test_half_precision_is_for_the_hypernetwork_alone(exported):
    folder, printed = exported
    name = "image-transinr-half"
    model = exported_model(folder, name)
    encoder, decoder = (
        onnx.load(folder / f"{name}.{part}.onnx") for part in ("encoder", "decoder")
    )
    kinds = {i.name: i.data_type for i in encoder.graph.initializer}
    half = [k for k, kind in kinds.items() if kind == onnx.TensorProto.FLOAT16]
    assert len(half) >= 4 * model.cfg.depth  # the matrices of every block
    assert all(kinds[k] == onnx.TensorProto.FLOAT for k in kinds if "base" in k or "pos" in k)
    assert not any(i.data_type == onnx.TensorProto.FLOAT16 for i in decoder.graph.initializer)
    stored = sum(len(i.raw_data) for i in encoder.graph.initializer)
    assert stored < 0.6 * 4 * sum(p.numel() for p in model.parameters())
    context, query = problem(model.cfg, 2, 50)
    code = run_onnx(folder / f"{name}.encoder.onnx", context)
    mean = run_onnx(folder / f"{name}.decoder.onnx", code | query)["mean"]
    error = mean - model.decode(model.encode(context), query).mean
    assert 0 < error.abs().max() and -10 * error.square().mean().log10() > 60  # dB
    lost = re.search(
        r"PSNR on bundled signals ([-\d.]+), in fp32 ([-\d.]+): lost ([-\d.]+)", printed[name]
    )
    assert abs(float(lost[3])) < 0.1 and float(lost[1]) > 3


def test_a_file_that_is_off_is_never_written(tmp_path, monkeypatch, exported):
    """One weight of a lowered graph is changed by 1 %: the table shows it, nothing is left."""
    folder, _ = exported

    def spoiled(graph, opset):
        proto = onnx.load(folder / f"image-transinr.{graph.part}.onnx")
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("transformer.0.ff2.bias"):
                tensor.raw_data = (np.frombuffer(tensor.raw_data, "f4") * 1.01).tobytes()
        return proto

    monkeypatch.setattr(export, "lower", spoiled)
    source = EXPORTS["image-transinr"][0]
    output = run_export(source, "-o", tmp_path / "a", "--opset", "18", code=1)
    assert re.search(r"Error: the encoder is off PyTorch by .*: nothing was written\n$", output)
    assert list(tmp_path.iterdir()) == []


def reuse(monkeypatch, folder, name="image-transinr"):
    """Lowering takes seconds: take a graph that was lowered before."""
    load = lambda graph, opset: onnx.load(folder / f"{name}.{graph.part}.onnx")
    monkeypatch.setattr(export, "lower", load)
    return EXPORTS[name][0]


def test_without_onnxruntime_the_reference_evaluator_verifies(tmp_path, monkeypatch, exported):
    source = reuse(monkeypatch, exported[0])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    output = run_export(source, "-o", tmp_path / "a.onnx", "--opset", "18")
    assert "reference" in output and "optimised" not in output
    assert {p.name for p in tmp_path.iterdir()} == {"a.encoder.onnx", "a.decoder.onnx"}


def test_large_weights_go_to_a_second_file(tmp_path, monkeypatch, exported):
    source = reuse(monkeypatch, exported[0])
    monkeypatch.setattr(export, "ONE_FILE", 10_000)
    run_export(source, "-o", tmp_path / "a", "--opset", "18")
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.encoder.onnx",
        "a.encoder.onnx.data",
        "a.decoder.onnx",
    }
    context, _ = problem(tinyinr.load(source).cfg, 2, 3)
    one = run_onnx(exported[0] / "image-transinr.encoder.onnx", context)
    for k, v in run_onnx(tmp_path / "a.encoder.onnx", context).items():
        assert torch.equal(v, one[k])


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, exported):
    source = reuse(monkeypatch, exported[0])

    def full(proto, path, **_):
        path.write_bytes(proto.SerializeToString()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    output = run_export(source, "-o", tmp_path / "a", code=2)
    assert output.endswith("Error: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "data, reason",
    [
        (None, "no such checkpoint"),
        (b"", "not a readable checkpoint"),
        (pickle.dumps({"model": Trap()}), "pickled objects"),
        ((PARITY / "vnp_1.pth").read_bytes()[:5000], "truncated"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path("bad.pt").write_bytes(data)
    output = run_export("bad.pt", code=2)
    assert output.startswith("Error: bad.pt: ") and reason in output and output.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"] * (data is not None)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--opset", "17"], "opset='17' is unknown; choose from 18, 20"),
        (["-o", "absent/a"], "absent: no such folder"),
        (["-o", "file/a"], "file: no such folder"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    output = run_export(PARITY / "vnp_1.pth", *options, code=2)
    assert output.startswith(f"Error: {reason}") and output.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------- the README's pages

WITHOUT_TORCH = """import runpy, sys
for name in ("torch", "tinyinr", "export"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])"""


def run_page(tmp_path, start, *args):
    """The first page of the README's 'Use it anywhere' whose command begins so, without torch."""
    section = (ROOT / "README.md").read_text().split("## Use it anywhere")[1]
    page = re.search(rf"`python {start}.*?```python\n(.*?)```", section, re.S)[1]
    assert len(page.splitlines()) <= 25
    (tmp_path / start).write_text(page)
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, tmp_path / start, *map(str, args)], check=True
    )


@pytest.mark.parametrize("name", ["image-transinr", "image-vnp"])
def test_page_renders_a_photo_at_any_size(tmp_path, exported, name):
    folder, _ = exported
    model = exported_model(folder, name)
    side = model.cfg.image_size
    photo = Image.fromarray((rand(side, side, 4).numpy() * 255).astype(np.uint8))
    photo.save(tmp_path / "photo.png")
    run_page(tmp_path, "photo.py", folder / name, tmp_path / "photo.png", 40, tmp_path / "out.png")
    truth = tinyinr.render_image(model, tmp_path / "photo.png", 40)
    off = np.int64(truth) - np.int64(Image.open(tmp_path / "out.png"))
    assert np.abs(off).max() <= 1 and np.std(truth) > 3


@pytest.mark.parametrize("name", ["nvs-transinr", "nvs-vnp"])
def test_page_renders_a_new_view(tmp_path, exported, name):
    """The view from 180 degrees further round is that of a camera behind the object."""
    folder, _ = exported
    model = exported_model(folder, name)
    scene = tmp_path / "chair"
    scene.mkdir()
    side = model.cfg.image_size
    pixels = (rand(side, side, 3).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(scene / "r_0.png")
    pose = torch.cat((poses(), torch.tensor([[0.0, 0, 0, 1]])))
    frame = {"file_path": "./r_0", "transform_matrix": pose.tolist()}
    (scene / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.6, "frames": [frame]}))
    run_page(tmp_path, "view.py", folder / name, scene, 180, tmp_path / "out.png")
    focals = torch.full((1, 1, 2), side / 2 / np.tan(0.3))
    context = {
        "images": torch.from_numpy(pixels).movedim(-1, 0)[None, None] / 255,
        "poses": pose[None, None, :3],
        "focals": focals,
    }
    behind = torch.diag(torch.tensor([-1.0, -1, 1])) @ pose[:3]
    o, d = (r.flatten(0, 1)[None] for r in tinyinr.camera_rays(behind, focals[0, 0], side, side))
    truth = model.decode(model.encode(context), {"rays_o": o, "rays_d": d}).mean
    truth = truth.view(side, side, 3)
    off = truth.clamp(0, 1).numpy() * 255 - np.asarray(Image.open(tmp_path / "out.png"))
    assert np.abs(off).max() <= 1 and truth.std() > 0.01


def bands(tmp_path, stem, x, y):
    """The picture that the page draws of these points, and where it has the band's color."""
    rows = "".join(f"{a},{b}\n" for a, b in zip(x.tolist(), y.tolist()))
    (tmp_path / "points.csv").write_text(rows)
    run_page(tmp_path, "bands.py", stem, tmp_path / "points.csv", tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape == (320, 480, 3)
    return picture, (picture == (0xD6, 0xE4, 0xF5)).all(-1)


X, Y = torch.tensor([-1.5, -0.2, 0.4, 1.9]), torch.tensor([0.3, -0.6, 0.1, 0.8])


def test_page_draws_the_band_of_a_curve_where_it_is(tmp_path, exported):
    """In every column the band ends 1.96 std above and below the mean."""
    folder, _ = exported
    _, band = bands(tmp_path, folder / "gp-transinr", X, Y)
    model = exported_model(folder, "gp-transinr")
    grid = torch.linspace(-2, 2, 256)[None, :, None]
    x, y = tinyinr.standardise(X[None, :, None], Y[None, :, None])
    code = model.encode({"x": x, "y": y})
    mean, std = (v.flatten().numpy() for v in model.decode(code, {"x": grid}))
    low, high = mean - 1.96 * std, mean + 1.96 * std
    for i in range(10, 250, 20):
        rows = np.flatnonzero(band[:, round(480 * i / 255)])
        for row, v in zip(rows[[0, -1]], (high, low)):  # a column lies between points of the grid
            ends = (high.max() - v[i - 1 : i + 2]) / (high.max() - low.min()) * 320
            assert ends.min() - 2 <= row <= ends.max() + 2, i


def test_page_draws_the_band_of_a_neural_process(tmp_path, exported):
    picture, band = bands(tmp_path, exported[0] / "gp-vnp", X, Y)
    assert (
        band.any(0).mean() > 0.95 and (picture == (0x1F, 0x4E, 0x8C)).all(-1).any(0).mean() > 0.95
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]], plugins=[sys.modules[__name__]]))
