"""Measure what encoding and decoding cost as their inputs grow, and draw it for the README.

    python data/costs.py    # data/readme/costs.json and costs.png

Every point is measured in a process of its own, with random weights of the small presets; a line
ends where the next point would take more than 20 GB or a minute.
"""

import itertools
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
import tinyinr  # noqa: E402

AXES = {  # what grows: (task, whether it is encoded or decoded, the first point)
    "pixels decoded": ("image", "decode", 4096),
    "rays decoded": ("nvs", "decode", 256),
    "side of the picture encoded": ("image", "encode", 16),
    "pictures encoded at once": ("image", "encode", 1),
    "views encoded": ("nvs", "encode", 1),
    "points encoded": ("gp", "encode", 4),
}
COLORS = {"transinr": (194, 65, 12), "vnp": (29, 78, 216)}
MOST_BYTES, MOST_SECONDS = 20e9, 60.0


def inputs(cfg, axis, n):
    """Random context and query in which n of what the axis names are asked for."""
    batch, side = (n if axis == "pictures encoded at once" else 1), cfg.image_size
    if cfg.task == "image":
        context = {"image": torch.rand(batch, 3, side, side)}
        return context, {"coords": 2 * torch.rand(1, n, 2) - 1}
    if cfg.task == "gp":
        x = 4 * torch.rand(1, n, 1) - 2
        return {"x": x, "y": x.sin()}, {"x": x}
    views = n if axis == "views encoded" else 1
    pose = tinyinr.look_at(torch.tensor([3.0, 2.0, 1.5]))
    context = {"images": torch.rand(1, views, 3, side, side), "poses": pose.expand(1, views, 3, 4),
               "focals": torch.full((1, views, 2), 80.0)}
    rows = max(1, n // 64)
    o, d = (r.flatten(0, 2)[None, :n] for r in
            tinyinr.camera_rays(pose[None], torch.full((1, 2), 200.0), rows, 64))
    return context, {"rays_o": o, "rays_d": d}


def measure(axis, model, n):
    """Seconds (median) and peak memory in bytes of one point, in a fresh process."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    task, what, _ = AXES[axis]
    size = {"image_size": n} if axis == "side of the picture encoded" else {}
    cfg = tinyinr.make_config("small", task, model, **size)
    net = tinyinr.build(cfg).eval()
    context, query = inputs(cfg, axis, n)
    code = net.encode(context) if what == "decode" else None

    def work():
        return tinyinr.predict(net, code, query) if code else net.encode(context)

    seconds = tinyinr.median_seconds(work, "cpu", 1.0)
    return seconds, tinyinr.peak_memory("cpu") * 2**20


def line(axis, model, pool):
    """Points [n, seconds, bytes] of one line, four times as many each time."""
    points = []
    for n in (AXES[axis][2] * 4**i for i in itertools.count()):
        points.append((n, *pool.submit(measure, axis, model, n).result()))
        click.echo(f"{axis:30} {model:9} {n:10}  {points[-1][1]:9.4f} s  "
                   f"{points[-1][2] / 1e9:6.2f} GB")
        growth = [b / a for a, b in zip(points[-2][1:], points[-1][1:])] if points[1:] else [4, 1]
        seconds, size = (v * max(1, g) for v, g in zip(points[-1][1:], growth))
        if 7 * seconds > MOST_SECONDS or size > MOST_BYTES:  # measured seven times
            return points


def panel(title, lines, size=(300, 230)):
    """One plot in powers of ten: seconds as lines, gigabytes as dots."""
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    left, top, right, bottom = 40, 24, size[0] - 10, size[1] - 24
    rows = [row for points in lines.values() for row in points]
    lows = math.floor(math.log10(min(r[0] for r in rows))), math.floor(
        math.log10(min(min(r[1], r[2] / 1e9) for r in rows)))
    highs = math.ceil(math.log10(max(r[0] for r in rows))), math.ceil(
        math.log10(max(max(r[1], r[2] / 1e9) for r in rows)))

    def at(x, y):
        u, v = ((math.log10(value) - low) / max(1, high - low)
                for value, low, high in zip((x, y), lows, highs))
        return left + u * (right - left), bottom - v * (bottom - top)

    for axis in (0, 1):
        for power in range(lows[axis], highs[axis] + 1):
            x, y = at(10.0**power, 10.0 ** lows[1]) if axis == 0 else at(
                10.0 ** lows[0], 10.0**power)
            ends = ((x, top), (x, bottom)) if axis == 0 else ((left, y), (right, y))
            pen.line(ends, fill="#e5e7eb")
            place, anchor = ((x, bottom + 4), "mt") if axis == 0 else ((left - 4, y), "rm")
            pen.text(place, f"{10.0**power:g}" if -3 <= power < 4 else f"1e{power}", "#374151",
                     font, anchor)
    pen.text((left, 6), title, "black", font)
    for model, points in lines.items():
        pen.line([at(n, s) for n, s, _ in points], fill=COLORS[model], width=2)
        for n, _, memory in points:
            x, y = at(n, memory / 1e9)
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), outline=COLORS[model])
    return picture


@click.command()
@click.option("--json", "stored", type=click.Path(exists=True), help="Only draw these figures.")
def main(stored):
    """Measure all lines and draw them."""
    if stored:
        table = json.loads(Path(stored).read_text())
    else:
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            table = {axis: {model: line(axis, model, pool) for model in COLORS} for axis in AXES}
        tinyinr.write_json(DATA / "readme" / "costs.json", table)
    panels = [np.asarray(panel(title, lines)) for title, lines in table.items()]
    picture = tinyinr.sheet([panels[:3], panels[3:]], gap=0)
    tinyinr.save_picture(picture, DATA / "readme" / "costs.png")


if __name__ == "__main__":
    main()
