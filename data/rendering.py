"""Pictures of what a model gives: images, views of scenes, plots of curves, attention maps.

Stands on top of tinyinr.py; data/pictures.py, which draws, knows nothing of models.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import curves, images, pictures, scenes
from data.evaluation import (Case, curve_cases, encode_for, image_cases, mixture, pixel_values,
                             sample_curves, scene_cases)
from data.runs import track
from tinyinr import (WINDOW, Prediction, atomic, camera_rays, generator, look_at, mean_latents,
                     pixel_grid, predict, select_queries, to_device)


def write_pictures(drawn: list, out, animated: bool = False):
    """Write a picture, or several into a folder or as an animation of 12 frames a second."""
    form, (first, *rest) = pictures.picture_format(out, animated), map(Image.fromarray, drawn)
    if form == "folder":
        Path(out).mkdir(parents=True, exist_ok=True)
        for i, frame in enumerate((first, *rest)):
            frame.save(Path(out, f"{i:03}.png"))
        return
    several = {"save_all": True, "append_images": rest, "duration": 80, "loop": 0} if rest else {}
    with atomic(out) as part:
        first.save(part, form, **several, quality=95)


def view_and_depth(model, code: dict, query: dict, side: int) -> tuple[Tensor, Tensor]:
    """Color (1, R, 3) and depth (1, R, 1) of side x side rays, decoded row by row.

    A depth is in units of the scene's range, 1 at near, and 0 at far and where a ray meets nothing.
    """
    cfg, z, rows = model.cfg, mean_latents(model, code, query), []
    for i in range(0, side**2, side):
        row = select_queries(query, slice(i, i + side))
        rows.append(model.signal.render(*model.raw_field(code, row, z=z)))
    color, depth, opacity = (torch.cat(v, 1) for v in zip(*rows))
    return color, ((opacity * cfg.far - depth) / (cfg.far - cfg.near)).unsqueeze(-1)


def prediction_panels(model, case: Case, tto: int = 0) -> list[Tensor]:
    """Pictures (H, W, 3) of one signal: what was seen, the truth, and the model's prediction."""
    cfg, code, context = model.cfg, encode_for(model, case.context, tto), case.context
    fold = lambda pixels: pixels[0].unflatten(0, (cfg.image_size,) * 2).expand(-1, -1, 3)
    truth = fold(case.target[:, 0])
    if "images" in context:
        part = select_queries(case.query, slice(0, cfg.image_size**2))
        view = view_and_depth(model, code, part, cfg.image_size)
        return [context["images"][0, 0].movedim(0, -1), truth, *map(fold, view)]
    z = mean_latents(model, code, case.query)
    decode = lambda query: predict(model, code, query, z)
    std, out = decode(case.query).std, [truth, fold(pixel_values(model, decode, case.query))]
    if "mask" in context:
        image, mask = context["image"], context["mask"]
        out.insert(0, fold((image * mask + 1 - mask).flatten(2).mT))
    if std is not None:
        out.append(fold(std / std.max()))
    return out


@torch.no_grad()
def sample_pictures(model, data, count: int = 12):
    """Held-out signals: truth above prediction, or plots of curves, as one picture (uint8)."""
    if model.cfg.task == "gp":
        rows = [plot_case(model, case) for case in itertools.islice(curve_cases(data, 2), 6)]
        return pictures.image_grid([sum(rows[:3], []), sum(rows[3:], [])])
    only = sorted({i * len(data) // count for i in range(count)})
    cases = scene_cases if model.cfg.task == "nvs" else image_cases
    cases = [case for case in cases(model, data, only, batch=1)]
    part = [case for case in cases if "30% seen" in case.label] or cases
    return panel_grid([prediction_panels(model, case) for case in part[:count]])


def panel_grid(columns: list[list[Tensor]]):
    """Columns of pictures (H, W, 3) in [0, 1] -> one picture (uint8), enlarged."""
    return pictures.image_grid([[pictures.enlarge(pictures.to_uint8(p)) for p in row]
                                for row in zip(*columns)])


@torch.no_grad()
def curve_band(model, x, y, mask, points: int = 256) -> tuple[Tensor, Prediction, Tensor]:
    """A context x (N, 1), y and mask (N, D) -> a grid (K, 1) over [-2, 2], Prediction (K, D) on it,
    and up to 6 curves drawn from the regression, or means of latent samples (S, K, D)."""
    grid = torch.linspace(-2, 2, points)[None, :, None].to(model.freqs)
    context = {"x": x[None].to(grid), "y": y[None].to(grid), "mask": mask[None].to(grid)}
    draws = sample_curves(model, context, grid, 32, generator(8))
    band = Prediction(*(v[0] for v in mixture(draws)))
    drawn = draws.mean[:6, 0] if len(draws.mean) > 1 else draws.mean[:0, 0]
    if model.cfg.n_features:
        code, shape = model.encode(context), (1, model.cfg.n_values, 1, model.cfg.n_features)
        noise = torch.randn(3, *shape, generator=generator(9)).to(grid)
        noise = torch.cat((noise, -noise))  # so that few draws lie to both sides of the mean
        drawn = torch.cat([model.decode(model.draw(code, e), {"x": grid}).mean for e in noise])
    return grid[0], band, drawn


def table_parts(model, table) -> list[tuple]:
    """The first values of a series, standardised, in neighboring parts that the model reads.

    (x (N, 1), y, mask (N, D), units) each. Errors: ValueError if the table has fewer values.
    """
    d = model.cfg.n_values
    if table.y.shape[1] < d:
        raise ValueError(f"this model is of {d} values, and the table has {table.y.shape[1]}; give "
                         "--columns x,y1,y2")
    most = curves.MAX_CONTEXT if d == 1 else WINDOW
    y, mask, parts = table.y[:, :d], table.mask[:, :d], []
    if not mask.any():
        raise ValueError(f"{', '.join(table.y_names[:d])}: no value beside an x; choose --columns")
    rows = table.x[:, 0].argsort(stable=True)
    rows = rows[mask[rows].any(1)]
    split = rows.tensor_split(max(1, -(-(len(rows) - 1) // (most - 1))))
    for part, after in zip(split, (*split[1:], rows[:0])):  # each ends where the next one begins
        i = torch.cat((part, after[:1]))
        x, values, units = curves.standardise(table.x[i], y[i], mask[i])
        parts.append((x, values, mask[i], units))
    return parts


def plot_context(model, x, y, mask, *args) -> list:
    """pictures.curve_plots of the model's prediction from the context, the first of each pair."""
    return pictures.curve_plots(*curve_band(model, x[0], y[0], mask[0]), x, y, mask, *args)


def plot_case(model, case, i: int = 0) -> list:
    """Plots of the i-th curve of a set to score on, one a value: context and targets."""
    x, y, mask, _, n, *_ = case
    x, y = x[i].float(), y[i].float()
    mask = torch.ones_like(y) if mask is None else mask[i]
    return plot_context(model, *((v[:n], v[n:]) for v in (x, y, mask)))


def render_curve(model, table, width: int):
    """Plots of a series, one a value; of a long one several, row by row (uint8)."""
    plots = []
    for *xym, units in track(table_parts(model, table), "rendering"):
        plots += plot_context(model, *((v, v[:0]) for v in xym), (width, width * 2 // 3), units,
                              table.x_name, table.y_names, table.origin)
    columns = math.isqrt(len(plots) - 1) + 1
    return pictures.image_grid([plots[i : i + columns] for i in range(0, len(plots), columns)])


def tabulate_curve(model, table, points: int) -> dict:
    """{column: numbers} of a series' prediction in its units, at `points` places of each part.

    x, or ISO dates, and of every value the mean, std, and ends of the central 95 %.
    """
    columns = {}
    for *xym, (a, b, c, d) in table_parts(model, table):
        grid, band, _ = curve_band(model, *xym, points)
        columns.setdefault(table.x_name, []).append((grid.cpu().double() * b + a)[:, 0])
        mean, std = band.mean.cpu() * d + c, band.std.cpu() * d
        wide = curves.CENTRAL_95 * std
        for j, name in enumerate(table.y_names[: model.cfg.n_values]):
            for kind, v in (("mean", mean), ("std", std), ("lower", mean - wide),
                            ("upper", mean + wide)):
                columns.setdefault(f"{name} {kind}", []).append(v[:, j])
    columns = {k: torch.cat(v).double().numpy() for k, v in columns.items()}
    if table.origin:
        seconds = (86400 * columns[table.x_name]).round().astype("timedelta64[s]")
        columns[table.x_name] = (np.datetime64(table.origin, "s") + seconds).astype(str)
    return columns


def read_context(model, path, mask=None) -> tuple[dict, tuple[int, int]]:
    """A photo, squeezed to a square, as the context of a model of images, and its shape (H, W).

    mask: a picture of its shape, white where the photo is seen. A pixel of the context counts as
    seen where all of it is. Errors: ValueError for a mask of another shape.
    """
    size = model.cfg.image_size
    pixels, shape = images.read_photo(path, size, size // model.cfg.patch)
    context = {"image": pixels[None].to(model.freqs) / 255}
    if mask:
        seen, other = images.read_photo(mask, size)
        if other != shape:
            raise ValueError("{}: the mask has {} x {} pixels, the picture {} x {}; give one of "
                             "its shape".format(mask, *other, *shape))
        context["mask"] = (seen.amin(0) > 250)[None, None].to(model.freqs)
    return context, shape


@torch.no_grad()
def render_image(model, code: dict, height: int, width: int):
    """The picture (height, width, 3) uint8 of an image's code, row by row.

    The function lives on (-1, 1)^2, whatever the shape; memory grows by the picture alone. A model
    with a grid has detail down to a quarter of its pixels: smaller pictures are reduced ones.
    """
    fine = -(-4 * model.cfg.image_size // max(height, width)) if model.cfg.grid else 1
    if fine > 1:
        drawn = Image.fromarray(render_image(model, code, fine * height, fine * width))
        return np.asarray(drawn.resize((width, height), Image.Resampling.BILINEAR))
    z = mean_latents(model, code, {"coords": pixel_grid(32, 32)[None].to(model.freqs)})
    rows, cols = (pixel_grid(n, 1, model.freqs.device)[:, 0].to(model.freqs)
                  for n in (height, width))
    parts = []
    for some in track(rows.split(max(1, (1 << 16) // width)), "rendering"):
        values = model.decode(code, {"coords": torch.cartesian_prod(some, cols)[None]}, z=z).mean
        parts.append(pictures.to_uint8(values).reshape(-1, width, 3))
    return np.concatenate(parts)


def scene_context(model, scene, n: int = 0) -> dict:
    """n views of a scene, spread around it; 0: as many as a model reads.

    Errors: ValueError if it has fewer.
    """
    n = n or model.cfg.n_views
    if len(scene.images) < n:
        raise ValueError(f"{len(scene.images)} views, but {n} are to be read; give more, or fewer "
                         "--views")
    views = scenes.spread_views(scene.poses, n)
    context = {"images": scene.images[None, views] / 255, "poses": scene.poses[None, views],
               "focals": scene.focals[None, views]}
    return to_device(context, model.freqs.device)


def turntable(scene, size: int, frames: int = 36) -> tuple[Tensor, Tensor]:
    """Poses and focals of cameras on a circle at the elevation of a scene's first view."""
    eye = scene.poses[0, :, 3]
    flat, start = eye[:2].norm().clamp(min=1e-3), torch.atan2(eye[1], eye[0])
    angles = start + 2 * math.pi * torch.arange(frames) / frames
    poses = [look_at(torch.stack((flat * a.cos(), flat * a.sin(), eye[2]))) for a in angles]
    return torch.stack(poses), scene.focals[:1].expand(frames, 2) * size / scene.images.shape[-1]


@torch.no_grad()
def render_scene(model, code: dict, poses: Tensor, focals: Tensor, size: int) -> list:
    """Views (size, size, 3) uint8 of a scene's code from cameras (F, 3, 4), (F, 2)."""
    z, views = None, []
    for pose, focal in track(list(zip(poses, focals)), "rendering"):
        rays_o, rays_d = (r.flatten(0, 1)[None].to(model.freqs)
                          for r in camera_rays(pose, focal, size, size))
        query = {"rays_o": rays_o, "rays_d": rays_d}
        z = mean_latents(model, code, query) if z is None else z  # once for all views
        pixels = predict(model, code, query, z).mean
        views.append(pictures.to_uint8(pixels).reshape(size, size, 3))
    return views


@torch.no_grad()
def attention_picture(model, context: dict):
    """What each layer's weight tokens attend to, and base beside generated weights ([1] Sec. 5).

    Upper row: the image, then per layer the attention to its patches (mean over blocks, heads
    and tokens). Below, per layer: base weights, and generated ones (red positive, blue negative).
    """
    cfg, maps = model.cfg, 0
    data = model.tokenizer(*model.signal.inputs(context))  # (B, T, D)
    n = data.shape[1]
    x = torch.cat((data, model.weight_tokens.expand(len(data), -1, -1)), 1)
    for block in model.transformer:
        q, k, _ = (t.unflatten(-1, (cfg.n_heads, -1)).transpose(1, 2)
                   for t in block.qkv(block.norm1(x)).chunk(3, -1))
        maps = maps + (q @ k.mT * cfg.head_dim**-0.5).softmax(-1).mean(1)[:, n:, :n]
        x = block(x)
    maps = maps if cfg.depth else torch.ones(1, sum(model.tokens_per_layer), n)
    weights = {k: wb[0, :-1] for k, wb in model.encode(context).items() if k in model.shapes}
    heat = {k: m.mean(0) for k, m in zip(model.shapes, maps[0].split(model.tokens_per_layer))}
    return pictures.attention_sheet(context["image"][0].movedim(0, -1), heat,
                                    {k: model.base[k][:-1] for k in weights}, weights)
