"""Measure what encoding, decoding and learning cost, and draw it for the README.

    python data/costs.py inputs     # time and memory as inputs grow: data/readme/costs.json, .png
    python data/costs.py minutes    # PSNR over the minutes of training: minutes.json, minutes.png

Every point of the first is measured in a process of its own, with random weights of the small
presets; a line ends where the next point would take more than 20 GB or 100 seconds. The second
trains on images as the README says, once for every --seed, and scores each checkpoint on all
held-out pictures afterwards.
"""

import itertools
import json
import math
import subprocess
import sys
import time
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
MOST_BYTES, MOST_SECONDS = 20e9, 100.0


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
    rays = math.isqrt(n) if axis == "rays decoded" else 16  # a side; the sphere fills the view
    o, d = (r.flatten(0, 2)[None] for r in
            tinyinr.camera_rays(pose[None], torch.full((1, 2), 2.0 * rays), rays, rays))
    return context, {"rays_o": o, "rays_d": d}


def measure(axis, model, n):
    """Seconds and peak memory in bytes of one point, in a fresh process.

    The median of several calls, or the only one where that takes seconds.
    """
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

    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    if seconds < 3:
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
        if seconds > MOST_SECONDS or size > MOST_BYTES:
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


def scored(length, seed, folder):
    """Rows [minutes, held-out PSNR] of one training run, about one for every 20 seconds of it."""
    ckpt, copies = folder / "ckpt.pt", []
    train = [sys.executable, DATA.parent / "tinyinr.py", "train", "--task", "image", "--minutes",
             length, "--seed", seed, "--set", "save_every=20", "--out", folder]
    training = subprocess.Popen([str(v) for v in train], stdout=subprocess.DEVNULL)
    while training.poll() is None:
        time.sleep(1)
        data = ckpt.read_bytes() if ckpt.exists() else None
        if data and data not in copies[-1:]:
            copies.append(data)
    if training.returncode:
        raise click.ClickException(f"training ended with exit code {training.returncode}")
    rows, device, test = [], tinyinr.choose_device("cpu"), None
    for data in copies:  # the last one stays
        ckpt.write_bytes(data)
        model = tinyinr.load(ckpt)
        test = test or tinyinr.ImageData(model.cfg, None, "test")
        psnr = tinyinr.evaluate(model, test, device)["all"]["psnr"]
        rows.append((tinyinr.read_checkpoint(ckpt)["elapsed"] / 60, psnr))
        click.echo(f"seed {seed}: {rows[-1][0]:5.2f} minutes {psnr:6.2f} dB")
    return rows


def plot(lines, size=(600, 300)):
    """{name: rows [x, y]} as lines over linear axes that are marked at whole numbers."""
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    xs, ys = zip(*(row for rows in lines.values() for row in rows))
    low, high, last = math.floor(min(ys)), math.ceil(max(ys)), math.ceil(max(xs))
    at = lambda x, y: (40 + x / last * (size[0] - 60),
                       size[1] - 30 - (y - low) / (high - low) * (size[1] - 50))
    for x in range(last + 1):
        pen.line((at(x, low), at(x, high)), fill="#e5e7eb")
        pen.text(at(x, low), f"{x}", "#374151", font, "ma")
    for y in range(low, high + 1):
        pen.line((at(0, y), at(last, y)), fill="#e5e7eb")
        pen.text((34, at(0, y)[1]), f"{y}", "#374151", font, "rm")
    pen.text((34, 2), "dB", "#374151", font, "ra")
    pen.text((size[0] - 2, size[1] - 2), "minutes", "#374151", font, "rs")
    for rows, color in zip(lines.values(), itertools.cycle(COLORS.values())):
        pen.line([at(*row) for row in rows], fill=color, width=2)
    return picture


@click.group()
def main():
    """Measure and draw."""


@main.command("inputs")
@click.option("--json", "stored", type=click.Path(exists=True), help="Only draw these figures.")
def inputs_grow(stored):
    """Time and memory as inputs grow."""
    if stored:
        table = json.loads(Path(stored).read_text())
    else:
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            table = {axis: {model: line(axis, model, pool) for model in COLORS} for axis in AXES}
        tinyinr.write_json(DATA / "readme" / "costs.json", table)
    panels = [np.asarray(panel(title, lines)) for title, lines in table.items()]
    picture = tinyinr.sheet([panels[:3], panels[3:]], gap=0)
    tinyinr.save_picture(picture, DATA / "readme" / "costs.png")


@main.command()
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True)
@click.option("--length", default=9.8, show_default=True, help="Minutes of training.")
@click.option("--json", "stored", type=click.Path(exists=True), help="Only draw these figures.")
def minutes(seeds, length, stored):
    """PSNR on held-out pictures over the minutes of training."""
    if stored:
        table = json.loads(Path(stored).read_text())
    else:
        table = {}
        for seed in seeds:
            table[f"seed {seed}"] = scored(length, seed, Path("runs") / f"minutes-{seed}")
        tinyinr.write_json(DATA / "readme" / "minutes.json", table)
    tinyinr.save_picture(plot(table), DATA / "readme" / "minutes.png")


if __name__ == "__main__":
    main()
