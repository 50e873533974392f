"""Measure what training, encoding and decoding cost on this machine.

    python data/bench.py            # every cell's training step, encoding and decoding
    python data/bench.py inputs     # time and memory as inputs grow

Every cell of the first and every point of the second is measured in a process of its own, with
random weights; a line of the second ends where the next point would take more than 20 GB or 100
seconds.
"""

import itertools
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tinyinr  # noqa: E402
from data import commands  # noqa: E402
from data.evaluation import write_json  # noqa: E402

AXES = {  # what grows: (task, image_size or an argument of random_signals, the first point)
    "pixels decoded": ("image", "targets", 4096),
    "rays decoded": ("nvs", "targets", 256),
    "side of the picture encoded": ("image", "image_size", 16),
    "pictures encoded at once": ("image", "batch", 1),
    "views encoded": ("nvs", "views", 1),
    "points encoded": ("gp", "points", 4)}
MOST_BYTES, MOST_SECONDS = 20e9, 100.0


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


def peak_flops(dtype, device: str) -> float:
    """FLOP/s of a product of two 2,048 x 2,048 matrices."""
    a = torch.ones(2048, 2048, dtype=dtype, device=device)
    return 2 * 2048**3 / median_seconds(lambda: a @ a, device)


def random_signals(cfg, batch=1, targets=1, views=1, points=24) -> tuple[dict, dict]:
    """Numbers of the shapes of a model's context and query."""
    rand, n = partial(torch.rand, generator=torch.Generator().manual_seed(0)), cfg.image_size
    if cfg.task == "gp":
        x, asked = 4 * rand(batch, points, 1) - 2, 4 * rand(batch, targets, 1) - 2
        return {"x": x, "y": rand(batch, points, cfg.n_values)}, {"x": asked}
    if cfg.task == "image":
        mask = {"mask": (rand(batch, 1, n, n) < 0.5).float()} if cfg.masked else {}
        return {"image": rand(batch, 3, n, n)} | mask, {"coords": 2 * rand(1, targets, 2) - 1}
    pose = tinyinr.look_at(torch.tensor([0.0, -4.0, 0.0]))
    focals = torch.full((batch, views, 2), 2.0 * n)  # the sphere fills the view
    o, d = tinyinr.camera_rays(pose.expand(batch, 3, 4), focals[:, 0], n, n,
                               pixels=(rand(batch, targets) * n * n).long())
    context = {"images": rand(batch, views, 3, n, n), "poses": pose.expand(batch, views, 3, 4),
               "focals": focals}
    return context, {"rays_o": o, "rays_d": d}


def random_batch(cfg, recipe, device: str):
    """Numbers of the shapes that one training step takes: context, query, target."""
    b, pixels = recipe.batch_size, cfg.image_size**2
    m = recipe.n_queries or {"gp": 13, "image": pixels, "nvs": recipe.target_views * pixels}[
        cfg.task]
    context, query = random_signals(cfg, b, m, cfg.n_views)
    if cfg.task == "nvs":
        query["jitter"] = torch.rand(b, m, cfg.points_per_ray if recipe.shared_rays else 1)
    target = torch.rand(b, m, cfg.n_values if cfg.task == "gp" else 3)
    return tuple(tinyinr.to_device(v, device) for v in (context, query, target))


def peak_memory(device: str) -> float:
    """Most memory that this process has held, in MiB: the GPU's, or the system's (Unix), or 0."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def bench_cell(cfg, recipe, name: str) -> dict:
    """Time of a training step and its share of the machine's peak, memory, encode and decode."""
    device = tinyinr.choose_device(name, recipe.precision)
    run, batch = tinyinr.Run(cfg, recipe, device), random_batch(cfg, recipe, device.name)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run.update(batch, 0.5)  # the counter does not know every fused kernel of attention
    step = median_seconds(lambda: run.update(batch, 0.5), device.name)
    memory = peak_memory(device.name)
    model, (context, query, target) = run.model.eval(), batch
    with torch.no_grad():
        code = model.encode(context)
        encode = median_seconds(lambda: model.encode(context), device.name)
        decode = median_seconds(lambda: model.decode(code, query), device.name)
    flops, peak = counter.get_total_flops(), peak_flops(device.dtype, device.name)
    size = recipe.batch_size
    return {"cell": f"{cfg.task}-{cfg.model}", "precision": "bf16" if device.dtype else "fp32",
            "step_ms": 1000 * step, "signals_per_s": size / step, "gflop": flops / 1e9,
            "share": flops / step / peak, "memory_mb": memory, "encode_ms": 1000 * encode / size,
            "decode_per_s": size * target.shape[1] / decode}


@click.group(cls=commands.Commands, invoke_without_command=True)
@click.option("--preset", default="small", help=f"One of {', '.join(tinyinr.PRESETS)}.")
@click.option("--batch-size", type=click.IntRange(1), help="[default: the preset's]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps or auto.")
@click.option("--json", "json_file", type=click.Path(), help="Write the figures here too.")
@click.pass_context
def main(ctx, preset, batch_size, device, json_file):
    """Time training, encoding and decoding of a preset's cells on this machine."""
    if ctx.invoked_subcommand:
        return
    tinyinr.check_choice("preset", preset, tinyinr.PRESETS)
    if json_file:
        commands.check_output(json_file)
    device = tinyinr.choose_device(device).name
    peaks = {str(dtype)[6:]: peak_flops(dtype, device)
             for dtype in (torch.float32, torch.bfloat16)}
    click.echo(f"{device}, {torch.get_num_threads()} threads; matrix products of 2,048: "
               + ", ".join(f"{v / 1e12:.2f} TFLOP/s in {k}" for k, v in peaks.items()))
    click.echo("          cell step ms  signals/s  GFLOP of peak  memory MB  encode ms  decode k/s")
    given, rows = {"batch_size": batch_size} if batch_size else {}, []
    configs = [tinyinr.make_config(preset, *cell, **given) for cell in tinyinr.PRESETS[preset]]
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=commands.keep_memory,
                             max_tasks_per_child=1) as fresh:  # memory is kept as `train` does
        for row in fresh.map(bench_cell, *zip(*configs), itertools.repeat(device)):
            click.echo("{cell:>14} {step_ms:7.1f} {signals_per_s:10.1f} {gflop:6.1f} {share:7.0%} "
                       "{memory_mb:10.0f} {encode_ms:10.2f} {0:11.1f}".format(
                           row["decode_per_s"] / 1000, **row))
            rows.append(row)
    if json_file:
        write_json(json_file, {"peaks": peaks, "cells": rows})


def measure(axis: str, model: str, n: int) -> tuple[float, float]:
    """Seconds (the median of several calls, or a long one's) and peak bytes of one point."""
    torch.manual_seed(0)
    task, what, _ = AXES[axis]
    sizes, numbers = {}, {what: n}
    if what == "image_size":
        grid = min(n, 256)  # a node a pixel, as in the preset, while there may be so many
        sizes, numbers = {"image_size": n, "grid": grid, "conv_nodes": grid // 2}, {}
    cfg, _ = tinyinr.make_config("small", task, model, **sizes)
    net = tinyinr.build(cfg).eval()
    with torch.no_grad():
        context, query = random_signals(cfg, **numbers)
        code = net.encode(context) if what == "targets" else None
        work = lambda: tinyinr.predict(net, code, query) if code else net.encode(context)
        start = time.perf_counter()
        work()
        if (seconds := time.perf_counter() - start) < 3:
            seconds = median_seconds(work, "cpu", 1.0)
    return seconds, peak_memory("cpu") * 2**20


def line(axis: str, model: str, pool) -> list:
    """Points [n, seconds, bytes] of one line, four times as many each time."""
    points = []
    for n in (AXES[axis][2] * 4**i for i in itertools.count()):
        points.append((n, *pool.submit(measure, axis, model, n).result()))
        click.echo(f"{axis:30} {model:9} {n:10}  {points[-1][1]:9.4f} s  "
                   f"{points[-1][2] / 1e9:6.2f} GB")
        growth = [b / a for a, b in zip(points[-2][1:], points[-1][1:])] if points[1:] else [4, 1]
        seconds, size = (v * max(1, g) for v, g in zip(points[-1][1:], growth))
        last = axis == "side of the picture encoded" and n > 512  # a grid has up to 256 nodes
        if last or seconds > MOST_SECONDS or size > MOST_BYTES:
            return points


@main.command("inputs")
@click.option("--json", "json_file", type=click.Path(), help="Write the figures here too.")
def inputs_command(json_file):
    """Time and memory as inputs grow."""
    if json_file:
        commands.check_output(json_file)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        table = {axis: {model: line(axis, model, pool) for model in ("transinr", "vnp")}
                 for axis in AXES}
    if json_file:
        write_json(json_file, table)


if __name__ == "__main__":
    main()
