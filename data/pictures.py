"""Pictures for people: grids of images, plots with axes, and files of any format, with pillow.

A picture is an array (H, W, 3) uint8; pixels are a tensor (H, W, C) in [0, 1].
"""

import io
import math
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.curves import CENTRAL_95

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG", "": "folder"}
MONTH_STEPS = 1, 2, 3, 6, 12, 24, 60, 120, 240, 600, 1200, 2400, 6000, 12000, 24000
DAY_STEPS = *(n / 1440 for n in (1, 5, 15, 30, 60, 180, 360, 720)), 1, 2, 5, 10
FINE = 3  # plots are drawn this many times as large, then reduced


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Values in [0, 1], clamped -> uint8 array of the same shape."""
    return (pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()


def image_grid(rows: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Rows of pictures -> one picture, on white; the pictures may differ in size."""
    high, wide = (max(p.shape[axis] for row in rows for p in row) + gap for axis in (0, 1))
    out = np.full((len(rows) * high, max(map(len, rows)) * wide, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, p in enumerate(row):
            out[i * high : i * high + len(p), j * wide : j * wide + p.shape[1]] = p
    return out[: len(out) - gap, : out.shape[1] - gap]


def enlarge(pixels: np.ndarray, factor: int = 2) -> np.ndarray:
    """(H, W, ...) with every pixel as factor x factor."""
    return pixels.repeat(factor, 0).repeat(factor, 1)


def resize(pixels: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """(H, W, C) -> (side, side, C); mode as in F.interpolate."""
    return F.interpolate(pixels.movedim(-1, 0)[None].float(), side, mode=mode)[0].movedim(0, -1)


def signed_map(weights: Tensor, limit: float) -> Tensor:
    """(H, W) -> (H, W, 3) in [0, 1]: 0 is white, `limit` red, -limit blue."""
    w = (weights / (limit or 1)).clamp(-1, 1).unsqueeze(-1)
    return 1 - w.clamp(min=0) * w.new_tensor([0, 1, 1]) + w.clamp(max=0) * w.new_tensor([1, 1, 0])


def picture_format(path, animated: bool = False) -> str:
    """The format of a file name, for pillow; ValueError for one that cannot be written."""
    suffix = "" if Path(path).is_dir() else Path(path).suffix.lower()
    kind = ANIMATIONS.get(suffix) if animated else Image.registered_extensions().get(suffix)
    if kind and not animated:
        try:
            Image.new("RGB", (16, 16)).save(io.BytesIO(), kind)
        except (KeyError, OSError, ValueError):  # read only, or without color
            kind = None
    if not kind:
        names = ".gif, .webp or .png, or name a folder" if animated else ".png, .jpg, .webp or .gif"
        raise ValueError(f"{path}: not a format that can be written; end the name in {names}")
    return kind


def ticks(low: float, high: float) -> dict[float, str]:
    """Up to seven round numbers from low to high, with their labels."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * 6 >= high - low)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    style = f".{digits}f" if digits < 5 and max(abs(low), abs(high)) < 1e6 else ".6g"
    steps = range(math.ceil(low / step), math.floor(high / step) + 1)
    return {i * step: format(i * step, style) for i in steps}


def date_ticks(low: float, high: float, origin: datetime) -> dict[float, str]:
    """As ticks, of days since `origin`: firsts of months, or days, or times of the day."""
    zero, day = datetime(1, 1, 1), timedelta(1)
    shift = (origin - zero) / day
    if high - low > 60:
        step = next(n for n in MONTH_STEPS if n * 183 >= high - low)
        months = range(step, 120000, step)  # since the year 0
        dates = [datetime(m // 12, m % 12 + 1, 1) for m in months if m >= 12]
        style = "%Y-%m" if step % 12 else "%Y"
    else:
        step = next(n for n in DAY_STEPS if n * 6 >= high - low)
        steps = range(math.floor((low + shift) / step), math.ceil((high + shift) / step) + 1)
        dates = [zero + i * step * day for i in steps]
        style = "%Y-%m-%d" if step >= 1 else "%d. %H:%M"
    marks = {(date - origin) / day: f"{date:{style}}" for date in dates}
    return {mark: label for mark, label in marks.items() if low <= mark <= high}


class Plot:
    """Axes around the points (xs, ys), (N,) each; what is drawn is given in their units.

    x_ticks: what labels the x axis from low to high: ticks or date_ticks.
    """

    def __init__(self, size, xs, ys, x_name, y_name, x_ticks=ticks):
        unit = self.unit = round(FINE * max(1, size[0] / 480))  # of letters and lines
        self.font = ImageFont.load_default(11 * unit)
        self.image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.ranges = self.ends(xs, 0), self.ends(ys, 1)
        marks = x_ticks(*self.ranges[0]), ticks(*self.ranges[1])
        left = 9 * unit + max(map(self.font.getlength, marks[1].values()))
        top, right, bottom = 20 * unit, self.image.width - 14 * unit, self.image.height - 34 * unit
        self.frame = (left, right), (bottom, top)
        taken = 0
        for x, label in zip(self.place(list(marks[0]), 0), marks[0].values()):
            self.pen.line((x, top, x, bottom), "#e5e7eb", unit)
            half = self.font.getlength(label) / 2
            x = min(x, self.image.width - half)
            if x - half >= taken:  # labels do not overlap
                self.text((x, bottom + 15 * unit), label, "ms")
                taken = x + half + 6 * unit
        for y, label in zip(self.place(list(marks[1]), 1), marks[1].values()):
            self.pen.line((left, y, right, y), "#e5e7eb", unit)
            self.text((left - 5 * unit, y), label, "rm")
        self.pen.rectangle((left, top, right, bottom), outline="#9ca3af", width=unit)
        self.text((right, self.image.height - 6 * unit), x_name, "rs")
        self.text((left, 14 * unit), y_name, "ls")

    def ends(self, values: np.ndarray, axis: int) -> tuple[float, float]:
        """Ends of an axis, with some room below and above the values of y."""
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        room = 0.04 * axis * (high - low) if high - low > 1e-9 * abs(high) else abs(high) / 10 or 1
        return low - room, high + room

    def place(self, values, axis: int) -> np.ndarray:
        """Values -> where they stand in the image, at its edge if the axis does not hold them."""
        return np.interp(values, self.ranges[axis], self.frame[axis])

    def points(self, x, y) -> list[tuple[float, float]]:
        places = np.stack((self.place(x, 0), self.place(y, 1)), 1)
        return [tuple(p) for p in places[np.isfinite(places).all(1)]]

    def text(self, place, text: str, anchor: str):
        self.pen.text(place, text, "#374151", self.font, anchor)


def curve_plots(grid, band, draws, x, y, mask, size=(480, 320), units=None, x_name: str = "x",
                y_names=None, origin=None) -> list[np.ndarray]:
    """A plot (H, W, 3) uint8 of the prediction of each of D values; size = (W, H).

    grid (K, 1); band: mean and std, both (K, D), drawn as the mean and its 95 % band; draws
    (S, K, D). x (N, 1), y and mask (N, D): pairs of the context's and of held-out points, which
    may be none. units: those of data.curves.standardise, which the axes show instead. origin: a
    datetime if x is days since it.
    """
    n_values = y[0].shape[1]
    units = units or (torch.zeros(1), torch.ones(1), torch.zeros(n_values), torch.ones(n_values))
    (a,), (b,), *columns = (u.flatten().tolist() for u in units)
    in_x, plots = lambda v: v[..., 0].cpu().double().numpy() * b + a, []
    x_ticks = partial(date_ticks, origin=origin) if origin else ticks
    for j, (c, d) in enumerate(zip(*columns)):
        in_y = lambda v: v[..., j].cpu().double().numpy() * d + c
        dots = [(in_x(u[m[:, j] > 0]), in_y(v[m[:, j] > 0]), color)
                for u, v, m, color in zip(x, y, mask, ("black", "#e08a2b"))]
        mean, wide, t = band[0], CENTRAL_95 * band[1], in_x(grid)
        low, high = in_y(mean - wide), in_y(mean + wide)
        xs, ys = (np.concatenate([points[axis] for points in dots]) for axis in (0, 1))
        plot = Plot(size, np.concatenate((t, xs)), np.concatenate((low, high, ys)), x_name,
                    y_names[j] if y_names else "y", x_ticks)
        plot.pen.polygon(plot.points(t, high) + plot.points(t, low)[::-1], "#d6e4f5")
        for sample in draws:
            plot.pen.line(plot.points(t, in_y(sample)), "#8fb3de", plot.unit, "curve")
        plot.pen.line(plot.points(t, in_y(mean)), "#1f4e8c", 2 * plot.unit, "curve")
        for u, v, color in reversed(dots):
            for point in plot.points(u, v):
                plot.pen.circle(point, 3 * plot.unit, color)
        plots.append(np.array(plot.image.reduce(FINE)))
    return plots


def attention_sheet(image: Tensor, heat: dict[str, Tensor], base: dict, generated: dict,
                    height: int = 192) -> np.ndarray:
    """A column a layer: an image's patches by attention, base weights, generated weights (uint8).

    image (H, W, 3), heat {layer: (T,)} of square patches, base and generated {layer: (in, out)}.
    """
    top, blank = [resize(image, height)], torch.ones(height, height, 3)
    middle, bottom = [blank], [blank]
    for name, layer in heat.items():
        side = math.isqrt(len(layer))
        layer = resize((layer / layer.max()).view(side, side, 1), height, "nearest")
        top.append(0.25 * top[0] + 0.75 * layer * torch.tensor([1.0, 0.6, 0.2]))
        limit = 3 * float(generated[name].std())
        for row, w in ((middle, F.normalize(base[name], dim=0)), (bottom, generated[name])):
            row.append(resize(signed_map(w, limit), height, "nearest"))
    return image_grid([[to_uint8(p) for p in row] for row in (top, middle, bottom)])
