"""The command line: train, eval, render, encode, info, inspect.

Stands on top of tinyinr.py, which offers it as `tinyinr.cli`.
"""

import contextlib
import csv
import ctypes
import functools
import itertools
import json
import os
import shlex
import signal
import sys
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from data import curves, pictures, scenes, tables
from data.evaluation import encode_for, open_data, report, score, write_json
from data.rendering import (attention_picture, read_context, render_curve, render_image,
                            render_scene, sample_pictures, scene_context, tabulate_curve, turntable,
                            write_pictures)
from data.runs import catch_signals, handled, locked, processes, track, truncate_log
from tinyinr import (BATCHES, PRESETS, Device, ModelConfig, Run, RunFailed, TrainConfig, atomic,
                     check_choice, choose_device, epoch_length, is_main_process, load, make_config,
                     rank_and_world_size, read_checkpoint, to_device, train)


class Command(click.Command):
    """A command whose errors end in one line: exit code 2 where they are the user's, else 1."""

    def invoke(self, ctx):
        keep_memory()
        try:
            with handled({signal.SIGTERM: signal.default_int_handler}):  # as Ctrl-C
                return super().invoke(ctx)
        except KeyboardInterrupt:
            error, code = "stopped; files are written whole or not at all", 130
        except RunFailed as e:
            error, code = e, 1
        except (ValueError, OSError, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "alloc" not in str(e) and "memory" not in str(e):
                raise
            more = "; out of memory: take a smaller batch, model or size"
            error, code = f"{e}{more * isinstance(e, (MemoryError, RuntimeError))}", 2
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        ctx.exit(code)


class Commands(Command, click.Group):
    """A group of commands, likewise."""


def keep_memory():
    """Have glibc keep what a step frees instead of handing it back page by page to the system.

    For a program's start, not for a library's: it is the whole process's. A step takes 106 instead
    of 125 ms (scenes, Zen 4).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries differ
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks ...
        libc.mallopt(-4, 0)  # ... and (M_MMAP_MAX) holds large blocks, too


@click.group(cls=Commands, context_settings={"max_content_width": 100})
def cli():
    """Generalizable implicit neural representations: TransINR and VNP; images, scenes, curves."""


OPTION_TASKS = {"tto": ("image", "nvs"), "pairs": ("nvs",), "views": ("nvs",), "pose": ("nvs",),
                "zoom": ("image",), "mask": ("image",), "columns": ("gp",),
                "autoregressive": ("gp",)}


def check_options(cfg: ModelConfig, **given):
    """Raise ValueError for a given option that a task or model does not have."""
    for name, value in given.items():
        if value and cfg.task not in OPTION_TASKS[name]:
            raise ValueError(f"--{name} is for {' and '.join(OPTION_TASKS[name])}; leave it out "
                             f"for {cfg.task}")
    if given.get("tto") and cfg.model == "vnp":
        raise ValueError("--tto refines generated weights and a VNP has none; use a TransINR")


def check_output(out, *inputs, folder: bool = False):
    """Raise ValueError, before the work, for a file that cannot be written or is an input."""
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"{out}: there is no folder {Path(out).parent}; create it")
    if Path(out).is_dir() and not folder:
        raise ValueError(f"{out} is a folder; give the name of a file")
    if any(Path(out).resolve() == Path(path).resolve() for path in inputs):
        raise ValueError(f"{out} would replace an input; choose another name")


def banner(run: Run):
    """Print what is about to run: configuration, parameters by part, device."""
    count = lambda part: sum(p.numel() for p in part.parameters()) / 1e6
    model, cfg, recipe = run.model, run.cfg, run.recipe
    parts = {name: count(part) for name, part in model.named_children()}
    parts["tokens"] = count(model) - sum(parts.values())
    given = " ".join(f"{f.name}={getattr(c, f.name)}" for c in (cfg, recipe) for f in fields(c)
                     if getattr(c, f.name) != f.default)
    click.echo(f"{cfg.model} on {cfg.task}, preset {recipe.preset}: {given}")
    click.echo(f"{count(model):.2f} M parameters: "
               + ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v > 1e-9))
    click.echo(f"device {run.device.name}, {torch.get_num_threads()} threads, "
               f"{'bf16 autocast' if run.device.dtype else 'fp32'}")


LENGTHS = ("steps", "minutes", "epochs")  # of a run
FIELDS = {  # that one task or model alone reads
    "image": "masked out_bias flip random_crop zoom min_seen whole",
    "nvs": "voxels near far points_per_ray n_views augment balance shared_rays more_views "
           "target_views train_views",
    "gp": "n_values n_convs n_features n_harmonics kernel rough",
    "transinr": "inr_depth inr_width n_groups",
    "vnp": "cross_depth cross_heads cross_ff n_blocks hidden latent latent_pool kl_weight"}


@cli.command("train")
@click.option("--task", type=click.Choice(["image", "nvs", "gp"]), help="[default: image]")
@click.option("--model", type=click.Choice(["transinr", "vnp"]),
              help="[default: vnp for gp, else transinr]")
@click.option("--preset", help=f"One of {', '.join(PRESETS)}.  [default: small]")
@click.option("--data", type=click.Path(), help="Folder, zip or table; default: the bundled set.")
@click.option("--steps", type=click.IntRange(1), help="Length of the run in steps,")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="or in minutes.")
@click.option("--batch-size", type=click.IntRange(1), help="Signals a step, of all processes.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--seed", type=int)
@click.option("--set", "extra", multiple=True, metavar="NAME=VALUE", help="Any config field.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps or auto.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "auto"]),
              help="[default: the preset's; auto is what is fastest]")
@click.option("--init", type=click.Path(), help="Fine-tune the model of this checkpoint, "
              "by the recipe of --preset.")
@click.option("--out", type=click.Path(), help="Folder of the run.  [default: runs/TASK-MODEL]")
@click.option("--resume", is_flag=True, help="Continue the run in --out as it was.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--smoke", is_flag=True, help="3 steps (or --steps) on a few signals.")
def train_command(extra, device, init, out, resume, overwrite, smoke, **options):
    """Train a model; writes ckpt.pt, log.jsonl and samples.png to --out."""
    given = {k: v for k, v in options.items() if v is not None} | parse_fields(extra)
    lengths = [name for name in LENGTHS if given.get(name)]
    if len(lengths) > 1:
        raise ValueError(f"{' and '.join(lengths)} exclude each other; give one")
    if resume and (overwrite or init):
        raise ValueError(f"--resume and {'--overwrite' if overwrite else '--init'} exclude each "
                         "other; give one")
    if smoke:
        given = {"steps": 3, "batch_size": 2} | given | {"minutes": 0.0, "epochs": 0}
    elif lengths:  # the one that is given counts alone
        given = dict.fromkeys(LENGTHS, 0) | given
    skip = [k for k in given if k not in ("preset", "task", "model")] if resume else ["data"]
    start = load(init) if init else None
    sizes = asdict(start.cfg) if start else {}
    for name in sizes.keys() & given.keys() - {"near", "far", "points_per_ray", "n_views"}:
        if sizes[name] != given[name]:
            raise ValueError(f"{init} is a model with {name}={sizes[name]!r}, not "
                             f"{given[name]!r}; leave this option out")
    cfg, recipe = make_config(**{k: v for k, v in (sizes | given).items() if k not in skip})
    overwrite |= smoke and not out  # in a folder of its own
    out = Path(out or f"runs/{cfg.task}-{cfg.model}" + "-smoke" * smoke)
    path, ckpt = given.get("data"), None
    if resume:
        cfg, recipe, path, ckpt = read_run(out / "ckpt.pt", given)
    elif not overwrite and any((out / name).exists() for name in ("ckpt.pt", "log.jsonl")):
        raise ValueError(f"{out} holds a ckpt.pt or log.jsonl already; choose another --out, go on "
                         "with --resume, or replace them with --overwrite")
    if not any(getattr(recipe, name) for name in LENGTHS):
        raise ValueError("steps, minutes and epochs are all 0; give one of them")
    device = choose_device(device, recipe.precision)
    with processes(device.name), locked(out) if is_main_process() else contextlib.nullcontext():
        note_unused(cfg, given)
        run_training(cfg, recipe, device, path, out, ckpt, start, 4 if smoke else 0)


def note_unused(cfg: ModelConfig, given: dict):
    """Say which of the given fields the run does not read."""
    for used_by, names in FIELDS.items():
        for name in given.keys() & names.split():
            if used_by not in (cfg.task, cfg.model):
                click.echo(f"note: {name} is for {used_by}; a {cfg.model} on {cfg.task} ignores it")
    for name in given.keys() & {"kernel", "rough"} if given.get("data") else ():
        click.echo(f"note: {name} is for curves that are drawn; --data gives others")


def parse_fields(pairs) -> dict:
    """NAME=VALUE pairs -> config fields, of their types."""
    known = {f.name: type(f.default) for c in (ModelConfig, TrainConfig) for f in fields(c)}
    for name in ("task", "model", "preset"):
        known.pop(name)
    out = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        check_choice("--set", name, known)
        if not value:
            raise ValueError(f"--set {pair} gives no value; write {name}=VALUE")
        try:
            out[name] = click.types.convert_type(known[name])(value)
        except click.BadParameter as e:
            raise ValueError(f"--set {pair}: {name} takes a {known[name].__name__}") from e
    return out


def read_run(file: Path, given: dict) -> tuple[ModelConfig, TrainConfig, str | None, dict]:
    """Config, recipe, data and checkpoint of the run to resume; its length may be given anew.

    And where its data are, if they are no longer there. Errors: ValueError where there is no run,
    or a given field differs from the run's.
    """
    if not file.exists():
        raise ValueError(f"{file}: nothing to resume; train without --resume first")
    ckpt, free = read_checkpoint(file), (*LENGTHS, "grad_accum_steps")
    try:
        cfg = ModelConfig(**ckpt["config"])
        recipe = TrainConfig(**ckpt["recipe"] | {k: v for k, v in given.items() if k in free})
        old = asdict(cfg) | asdict(recipe) | {"data": ckpt["data"]}
        ckpt["optimizers"], int(ckpt["step"]), float(ckpt["elapsed"])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file}: not of a run that can be resumed ({e}); choose another "
                         "--out") from e
    lost = bool(old["data"]) and not Path(old["data"]).exists()
    if lost and not given.get("data"):
        raise ValueError(f"{file} is of a run on {old['data']}, which is not here; give --data")
    if lost:
        click.echo(f"{old['data']} is not here: going on with {given['data']}")
    for name, value in given.items():
        if name not in free and old[name] != value and not (lost and name == "data"):
            raise ValueError(f"{file} is of a run with {name}={old[name]!r}, not {value!r}; resume "
                             "it without this option, or choose another --out")
    return cfg, recipe, (given["data"] if lost else old["data"]) or None, ckpt


def prepare_batches(cfg, recipe, train_set, val_set, device):
    """Endless batches of the train set, four fixed ones of the val set, and an epoch's length."""
    if cfg.task == "gp":
        size = 100_000
        train_set, val_set = (data.draw if data else curves.sampler(recipe.kernel, rough) for
                              data, rough in ((train_set, recipe.rough), (val_set, 0.0)))
    else:
        size = len(train_set)
    plain = replace(recipe, flip=False, random_crop=False, augment=False, balance=0.0,
                    more_views=0, train_views=0, seed=1)
    batches = BATCHES[cfg.task]
    held_out = batches(cfg, plain, val_set, device.name, start=10**6)  # no epoch of the foreground
    return (functools.partial(batches, cfg, recipe, train_set),
            list(itertools.islice(held_out, 4)), epoch_length(size, recipe))


def run_training(cfg, recipe, device, path, out: Path, ckpt: dict | None, start, limit: int):
    """Train in the folder `out`, then draw samples.png and print the scores of the val split.

    ckpt: of the run to go on with. start: a model to fine-tune. limit: so many signals, 0: all.
    """
    pieces = rank_and_world_size()[1] * recipe.grad_accum_steps
    if recipe.batch_size % pieces:
        raise ValueError(f"batch_size={recipe.batch_size} must be a multiple of processes x "
                         f"grad_accum_steps = {pieces}; try "
                         f"{-(-recipe.batch_size // pieces) * pieces}")
    train_set, val_set = (open_data(cfg, path, split, recipe, limit, recipe.zoom)
                          for split in ("train", "val"))
    try:
        run = Run(cfg, recipe, device, ckpt)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{out}: the run cannot be {'resumed' if ckpt else 'built'} "
                         f"({reason})") from e
    if start:
        run.model.load_state_dict(start.state_dict())
    run.data = str(path or "")
    with catch_signals() as stop:
        banner(run)
        batches, held_out, length = prepare_batches(cfg, recipe, train_set, val_set, device)
        steps = recipe.steps or (0 if recipe.minutes else
                                 -(-recipe.epochs * length // recipe.batch_size))
        if is_main_process():
            run.elapsed = max(run.elapsed, truncate_log(out / "log.jsonl", run.step))
        ended = train(run, batches, out, steps, recipe.minutes, held_out, stop)
    if ended:
        by = (f"torchrun --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
              if dist.is_initialized() else "python")
        again = f"{by} {shlex.quote(sys.argv[0])} train --resume --out {shlex.quote(str(out))}"
        name = signal.Signals(ended).name
        return click.echo(f"{name}: saved step {run.step}; go on with\n  {again}")
    run.model.eval()
    if is_main_process():
        write_pictures([sample_pictures(run.model, val_set)], out / "samples.png")
    count = min(limit, 1) or 50 * (cfg.task == "gp")  # a smoke test: of one signal, or view
    pairs = min(limit, 1) * (cfg.task == "nvs")
    scores = score(run.model, val_set, count=count, pairs=pairs, split="val")
    click.echo(f"{run.step} steps in {run.elapsed / 60:.1f} minutes; val split:")
    report(scores)
    of = f" --data {shlex.quote(path)}" if path else ""
    click.echo(f"wrote {out}/ckpt.pt, {out}/log.jsonl and {out}/samples.png; for the test split:"
               f"\n  python {shlex.quote(sys.argv[0])} eval {shlex.quote(str(out))}/ckpt.pt{of}")


@cli.command("eval")
@click.argument("ckpt", type=click.Path())
@click.option("--data", type=click.Path(), help="Folder, zip or table; default: the bundled set.")
@click.option("--split", type=click.Choice(["train", "val", "test", "all"]), default="test",
              show_default=True)
@click.option("--tto", type=click.IntRange(0), default=0, help="Steps of test-time optimization.")
@click.option("--size", type=click.IntRange(0), default=0,
              help="Only this many signals, or sets of 16 curves.  [default: all, or 50 sets]")
@click.option("--views", type=click.IntRange(1), help="nvs: context views.  [default: the model's]")
@click.option("--pairs", type=click.IntRange(0), default=0,
              help="nvs: so many random (context, target) views of each object, as published.")
@click.option("--autoregressive", is_flag=True, help="gp: the joint likelihood of the targets.")
@click.option("--zoom", type=click.IntRange(1, 8), default=1, help="image: also score so many "
              "times larger.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the scores here too.")
def eval_command(ckpt, data, split, tto, size, views, pairs, autoregressive, zoom, device,
                 json_file):
    """Score a checkpoint on a split of a set of signals."""
    device = choose_device(device)
    if json_file:
        check_output(json_file, ckpt)
    with processes(device.name):
        model = load_for(ckpt, device, views)
        check_options(model.cfg, tto=tto, pairs=pairs, autoregressive=autoregressive,
                      zoom=zoom > 1)
        signals = open_data(model.cfg, data, split, limit=size, zoom=zoom)
        scores = score(model, signals, tto, size, pairs, autoregressive, split)
        report(scores)
        if json_file and is_main_process():
            write_json(json_file, scores)


def load_for(ckpt, device: Device, views=None) -> nn.Module:
    """A checkpoint's model with another number of context views, if one is given."""
    model = load(ckpt, device.name)
    check_options(model.cfg, views=views)
    if views:
        model.cfg = model.signal.cfg = replace(model.cfg, n_views=views)
    return model


def trained_views(ckpt, cfg) -> int:
    """The most context views of a scene that a checkpoint's model has met in training."""
    recipe = read_checkpoint(ckpt).get("recipe")
    more = recipe.get("more_views") if isinstance(recipe, dict) else 0
    return cfg.n_views + (more if isinstance(more, int) else 0)


@cli.command("render")
@click.argument("ckpt", type=click.Path())
@click.argument("source", metavar="INPUT", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="Picture, .npz or .csv.")
@click.option("--size", type=click.IntRange(2, 16384), help="Pixels of the long side, or rows of "
              "numbers for each part of a series.  [default: 512; nvs: 128]")
@click.option("--tto", type=click.IntRange(0), default=0, help="Steps of test-time optimization.")
@click.option("--views", type=click.IntRange(1), help="nvs: context views, spread around the "
              "object.  [default: up to the number that the model is trained on]")
@click.option("--pose", type=click.Path(), help="nvs: a transforms.json with the cameras to use.")
@click.option("--mask", type=click.Path(), help="image: a picture, white where INPUT is seen.")
@click.option("--columns", help="gp: columns x,y of a table, by name or number from 1.")
@click.option("--device", default="auto", show_default=True)
@torch.no_grad()
def render_command(ckpt, source, out, size, tto, views, pose, mask, columns, device):
    """Encode INPUT, draw the function: photo -> picture, object -> turntable GIF, table -> plot.

    An object is a folder of posed views, such a folder within a zip, as set.zip/class/id, or one
    bare photo; an OUT without a suffix becomes a folder of its PNGs. A long series becomes several
    plots, each of up to 46 neighboring points. An OUT .npz holds the code and the pixels, or a
    series' prediction, which .csv holds, too.
    """
    model, suffix = load(ckpt, choose_device(device).name), Path(out).suffix.lower()
    cfg, code = model.cfg, {}
    size = size or (128 if cfg.task == "nvs" else 512)
    check_options(cfg, tto=tto, views=views, pose=pose, mask=mask, columns=columns)
    check_output(out, ckpt, source, folder=cfg.task == "nvs")
    numbers = suffix == ".npz" or cfg.task == "gp" and suffix == ".csv"
    if not numbers:  # a name that cannot be written is refused before the work
        pictures.picture_format(out, animated=cfg.task == "nvs")
    if cfg.task == "gp":
        if not numbers and size < 96:
            raise ValueError(f"--size {size}: a plot needs at least 96 pixels for its numbers")
        table = tables.read_table(source, columns or ("all" if cfg.n_values > 1 else None))
        click.echo("".join(f"{note}\n" for note in table.notes), nl=False)
        if columns and (rest := table.y_names[cfg.n_values :]):
            click.echo(f"named, but not read by this model of {cfg.n_values}: {', '.join(rest)}")
        drawn = (tabulate_curve(model, table, size) if numbers else
                 [render_curve(model, table, size)])
    elif cfg.task == "image":
        context, shape = read_context(model, source, mask)
        code = encode_for(model, context, tto)
        drawn = [render_image(model, code, *(max(1, round(n * size / max(shape))) for n in shape))]
    else:
        photo = Path(source).is_file() and not str(source).endswith((".zip", ".json"))
        scene = (scenes.photo_scene(source, cfg.image_size) if photo else
                 scenes.read_scene(*scenes.find_scene(source), cfg.image_size,
                                   sphere=cfg.grid > 0))
        click.echo(scene.note, nl=bool(scene.note))
        cameras = scenes.read_cameras(pose, size, scene) if pose else turntable(scene, size)
        n = views or min(trained_views(ckpt, cfg), len(scene.images))
        if not views and n < len(scene.images):
            click.echo(f"reading {n} of {len(scene.images)} views; --views takes more or fewer")
        code = encode_for(model, scene_context(model, scene, n), tto)
        drawn = render_scene(model, code, *cameras, size)
    if numbers:
        write_numbers(drawn if cfg.task == "gp" else {"pixels": drawn} | code, out)
    else:
        write_pictures(drawn, out, animated=cfg.task == "nvs")
    click.echo(f"wrote {out}")


def write_numbers(columns: dict, out: str):
    """Write named arrays or tensors as .npz, or columns of numbers as .csv, as `out` says."""
    columns = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    with atomic(out) as part:
        if out.lower().endswith(".npz"):
            with zipfile.ZipFile(part, "w") as archive:  # np.savez takes no array named "file"
                for name, values in columns.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.asanyarray(values))
        else:
            with open(part, "w", encoding="utf-8", newline="") as f:
                writer, digits = csv.writer(f, lineterminator="\n"), [15] + [8] * len(columns)
                writer.writerow(columns)
                writer.writerows([v if isinstance(v, str) else f"{v:.{n}g}" for v, n in zip(
                    row, digits)] for row in zip(*columns.values()))


@cli.command("encode")
@click.argument("ckpt", type=click.Path())
@click.argument("source", metavar="FOLDER", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .npz to write.")
@click.option("--tto", type=click.IntRange(0), default=0, help="Steps of test-time optimization.")
@click.option("--views", type=click.IntRange(1), help="nvs: context views.  [default: the model's]")
@click.option("--device", default="auto", show_default=True)
@torch.no_grad()
def encode_command(ckpt, source, out, tto, views, device):
    """Store the codes of all signals of a FOLDER or zip in an .npz: `names`, and (N, ...) arrays.

    The code of a TransINR is an MLP's weights, that of a VNP its tokens. A picture is squeezed to
    a square; of a scene the first view is read, or --views around it, of a series its first window.
    """
    if not str(out).lower().endswith(".npz"):
        raise ValueError(f"{out}: codes are written as .npz; choose such a name")
    device = choose_device(device)
    model = load_for(ckpt, device, views)
    check_options(model.cfg, tto=tto)
    check_output(out, ckpt, source)
    data = open_data(model.cfg, source, "all", targets=False)
    batches = torch.arange(len(data)).split(32 if model.cfg.task == "image" else 1)
    codes = [encode_for(model, to_device(context_of(model, data, part.tolist()), device.name), tto)
             for part in track(batches, "encoding")]
    columns = {k: torch.cat([code[k] for code in codes]) for k in codes[0]}
    write_numbers({"names": data.names} | columns, out)
    click.echo(f"wrote {out}: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in columns.items()))


def context_of(model, data, part: list[int]) -> dict:
    """The context of some images of a set, or of its one scene or curve of that number."""
    if model.cfg.task == "image":
        return {"image": next(data.batches([(part, 0)]))[0].float() / 255}
    i, = part
    if model.cfg.task == "nvs":
        return scene_context(model, data[i])
    window = data.window(data.first[i], data.counts[i], data.points)  # its first points
    return {k: v[None].float() for k, v in zip(("x", "y", "mask"), window)}


@cli.command()
@click.argument("ckpt", type=click.Path())
def info(ckpt):
    """Print what a checkpoint is: model, parameters, recipe, steps and data."""
    model, raw = load(ckpt), read_checkpoint(ckpt)
    cfg, recipe = model.cfg, raw.get("recipe", {})
    recipe = recipe if isinstance(recipe, dict) else {}  # whatever a file holds
    click.echo(f"{cfg.model} on {cfg.task}, "
               f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
               f"{f'feature grid of {cfg.grid} nodes an axis' if cfg.grid else 'as in the paper'}")
    for title, part in (("model", asdict(cfg)), ("recipe", recipe)):
        click.echo(f"{title}: " + " ".join(f"{k}={v}" for k, v in part.items()))
    for name in ("step", "elapsed", "data", "epoch"):
        if raw.get(name):
            click.echo(f"{name}: {raw[name]}")
    record = Path(ckpt).with_suffix(".json")  # of a stored model, or an export's
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(record.read_bytes())["scores"]:
            click.echo(f"scores and how it was made: {record}")


@cli.command()
@click.argument("ckpt", type=click.Path())
@click.argument("image", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="Picture to write.")
def inspect(ckpt, image, out):
    """Draw what the weight tokens of each INR layer attend to, and the weights they generate."""
    pictures.picture_format(out)  # refused before the work
    check_output(out, ckpt, image)
    model = load(ckpt)
    if (model.cfg.task, model.cfg.model) != ("image", "transinr"):
        raise ValueError(f"inspect takes a TransINR of images; {ckpt} is a {model.cfg.model} of "
                         f"{model.cfg.task}")
    write_pictures([attention_picture(model, read_context(model, image)[0])], out)
    click.echo(f"wrote {out}")
