"""Scores of a model on held-out signals: PSNR of images and views, log-likelihood of curves.

Stands on top of tinyinr.py, as the commands do. Nothing here is used in training.
"""

import itertools
import json
import math
from typing import NamedTuple

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import curves
from data.images import ImageSet, nearest_filling
from data.runs import track
from data.scenes import SceneSet
from tinyinr import (WINDOW, Prediction, atomic, camera_rays, fill_unseen, generator,
                     log_likelihood, mean_latents, optimize, pixel_grid, predict, psnr,
                     random_masks, rank_and_world_size, to_device)


def open_data(cfg, path, split: str, recipe=None, limit: int = 0, zoom: int = 1, targets=True):
    """The signals of one split (or of "all"): of a folder, zip or table, or of the bundled set.

    None: curves that are drawn from Gaussian processes. The layout is printed. targets: scenes
    have a view beside the context's, and images are squares; else the whole is squeezed to one.
    """
    if path == "":
        raise ValueError("--data is empty; give a folder or zip, or leave the option out")
    if cfg.task == "gp":
        if path is None:
            if cfg.n_values > 1:
                raise ValueError(f"n_values={cfg.n_values}, but curves that are drawn have one "
                                 "value; give tables with --data")
            return None
        data = curves.CurveSet(path, split, limit=limit, n_values=cfg.n_values,
                               points=48 if cfg.n_values == 1 else WINDOW)
    elif cfg.task == "image":
        crop = bool(recipe and recipe.random_crop and split == "train")
        data = ImageSet(path, split, cfg.image_size, zoom, crop, limit,
                        cfg.image_size // cfg.patch, "crop" if targets else "squeeze")
    else:
        data = SceneSet(path, split, cfg.image_size, cfg.n_views + targets,
                        recipe.train_views if recipe else 0, limit, cfg.grid > 0)
    click.echo(data.source)
    return data


def shard(items):
    """(i, item) for every item that is this process's turn: number `rank` of every world_size."""
    rank, world_size = rank_and_world_size()
    return itertools.islice(enumerate(items), rank, None, world_size)


def encode_for(model, context: dict, tto: int = 0) -> dict[str, Tensor]:
    """The code of a context, refined on it by `tto` steps."""
    code = model.encode(context)
    return optimize(model, code, context, tto) if tto else code


def standard_error(values: Tensor, units: Tensor) -> float:
    """Of the mean of values (N,), where those of the same unit (N,) depend on each other."""
    unit = units.unique(return_inverse=True)[1]
    sums = values.new_zeros(int(unit.max()) + 1).index_add(0, unit, values - values.mean())
    return float((sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / len(values))


def mean_scores(parts: list, counted: str, unit: str = "") -> dict:
    """{label: {score: mean, score_se: its standard error, counted: how many}}, of all processes.

    parts: (i, labels, {score: values (B, ...)}, units (B,)). Values of one unit, such as the views
    of an object, are not independent; `unit` names the number of units where it differs.
    """
    rows, out = {}, {}
    parts = [(i, labels, {k: v.cpu() for k, v in s.items()}, u) for i, labels, s, u in parts]
    gathered = [parts]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, parts)
    for _, labels, scores, units in sorted(itertools.chain(*gathered), key=lambda part: part[0]):
        for label, (name, value) in itertools.product(labels, scores.items()):
            pair = value.flatten(), units.repeat_interleave(value[0].numel())
            rows.setdefault(label, {}).setdefault(name, []).append(pair)
    for label, row in rows.items():
        row = {k: tuple(map(torch.cat, zip(*pairs))) for k, pairs in row.items()}
        n_units = {k: len(units.unique()) for k, (_, units) in row.items()}
        out[label] = {k: float(values.mean()) for k, (values, _) in row.items()}
        out[label] |= {f"{k}_se": standard_error(*row[k]) for k in row if n_units[k] > 1}
        out[label][counted] = max(len(values) for values, _ in row.values())
        if unit:
            out[label][unit] = max(n_units.values())
    return out


class Case(NamedTuple):
    """Signals to score: target (B, pictures, pixels, 3), and larger true images (B, 3, H, W)."""

    context: dict
    query: dict
    target: Tensor
    label: str
    numbers: Tensor  # (B,), of the signals
    large: Tensor | None = None


def image_cases(model, data, only=None, batch=32):
    """Every image, or `only` some; of a masked model with 10, 30 and 50 % of its pixels, too."""
    device, groups = model.freqs.device, {}
    grid = pixel_grid(*2 * (model.cfg.image_size,), device)[None]
    for i in range(len(data)) if only is None else only:
        groups.setdefault((data.labels[i], bool(data.native[i])), []).append(i)
    for fraction in (1.0, 0.1, 0.3, 0.5) if model.cfg.masked else (1.0,):
        for (label, native), members in groups.items():
            for i in range(0, len(members), batch):
                picked = members[i : i + batch]
                pixels, large = next(data.batches([(picked, 0)]))
                context = {"image": pixels.to(device).float() / 255}
                if fraction < 1:
                    context["mask"] = random_masks(context["image"], fraction, fraction,
                                                   [generator(0, k) for k in picked])
                yield Case(context, {"coords": grid}, context["image"].flatten(2).mT.unsqueeze(1),
                           label if fraction == 1 else f"{label}, {fraction:.0%} seen",
                           torch.tensor(picked), large if native and fraction == 1 else None)


def scene_cases(model, data, only=None, pairs=0, batch=10):
    """Every scene's other views from its first ones; or `pairs` random (context, target) views."""
    n, (height, width) = model.cfg.n_views, data.images.shape[-2:]
    for i in range(len(data.counts)) if only is None else only:
        images, poses, focals = data[i][:3]
        views = torch.arange(len(images))[None]
        if pairs:
            views = torch.stack([torch.randperm(len(images), generator=generator(0, 15, i, j))
                                 for j in range(pairs)])[:, : n + 1]
        for seen, asked in ((v[:, :n], v[:, n:]) for v in views.split(batch)):  # (B, V)
            rays = camera_rays(poses[asked], focals[asked], height, width)
            rays_o, rays_d = (r.flatten(1, 3) for r in rays)  # (B, V H W, 3)
            context = {"images": images[seen].float() / 255, "poses": poses[seen],
                       "focals": focals[seen]}
            target = images[asked].flatten(3).transpose(2, 3).float() / 255  # (B, V, H W, 3)
            yield Case(*(to_device(x, model.freqs.device) for x in (
                context, {"rays_o": rays_o, "rays_d": rays_d}, target)), data.labels[i],
                torch.full((len(seen),), i))


def pixel_values(model, decode, query: dict) -> Tensor:
    """Values (B, M, 3) of the pixels or rays of a query; decode: query -> Prediction.

    Of an image model with a grid means over the pixels: a picture of twice the size, reduced.
    """
    n = model.cfg.image_size
    if model.cfg.task != "image" or not model.cfg.grid:
        return decode(query).mean
    values = decode({"coords": pixel_grid(2 * n, 2 * n)[None].to(query["coords"])}).mean
    return F.interpolate(values.mT.unflatten(2, (2 * n, 2 * n)), n, mode="bilinear",
                         antialias=True).flatten(2).mT


def is_covered(mean, std, truth) -> Tensor:
    """1.0 where the truth lies within the central 95 % of the Gaussian, else 0.0."""
    return ((mean - truth).abs() < curves.CENTRAL_95 * std).float()


@torch.no_grad()
def evaluate(model, cases, tto: int = 0) -> dict:
    """PSNR by label, mean over images or views, and baselines beside it: see LEGEND.

    Returns {label: {"psnr", "psnr_se", ..., "pictures"}}, of whole images and scenes of several
    labels the label "all", too; of scenes also the number of "objects".
    """
    parts, scenes = [], model.cfg.task == "nvs"
    for i, (context, query, target, label, numbers, large) in shard(cases):
        code = encode_for(model, context, tto)
        z = mean_latents(model, code, query)
        decode = lambda query: predict(model, code, query, z)
        mean = pixel_values(model, decode, query).view(target.shape)
        asked = torch.ones_like(target[..., :1])
        if "mask" in context:  # of the unseen pixels alone
            asked = 1 - context["mask"].flatten(2).mT.unsqueeze(1)
        part = asked.mean((-2, -1))
        quality = lambda values, **how: (
            psnr(torch.where(asked > 0, values, target), target, **how) + 10 * part.log10())
        scores = {"psnr": quality(mean), "psnr_unclamped": quality(mean, clamp=False)}
        if not scenes:
            centers = decode(query)
            scores["centers"] = quality(centers.mean.view(target.shape))
            if centers.std is not None:
                inside = is_covered(mean, centers.std.view(target.shape), target)
                scores["coverage"] = (inside * asked).mean((-2, -1)) / part
        if "mask" in context:
            scores["nearest"] = quality(nearest_filling(context["image"], context["mask"])[:, None])
            filled = fill_unseen(context["image"] * context["mask"], context["mask"])
            scores["filled"] = quality(filled.flatten(2).mT.unsqueeze(1))
        if "images" in context:
            view = context["images"][:, :1].flatten(3).transpose(2, 3)
            scores["white"] = psnr(torch.ones_like(target), target)
            scores["context_view"] = psnr(view.expand_as(target), target)
        if large is not None:
            truth = (large.to(target.device).float() / 255).flatten(2).mT  # (B, pixels, 3)
            small, size = context["image"].shape[-2:], large.shape[-2:]
            enlarged = lambda pixels: F.interpolate(
                pixels.mT.unflatten(2, small), size, mode="bicubic").flatten(2).mT
            values = decode({"coords": pixel_grid(*size, target.device)[None]})
            scores["large"] = psnr(values.mean, truth)
            scores["large_bicubic"] = psnr(enlarged(mean[:, 0].clamp(0, 1)), truth)
            scores["truth_bicubic"] = psnr(enlarged(target[:, 0]), truth)
            if values.std is not None:
                scores["large_coverage"] = is_covered(*values, truth).mean((-2, -1))
        parts.append((i, {label} if "mask" in context else {label, "all"}, scores, numbers))
    out = mean_scores(parts, "pictures", "objects" * scenes)
    whole = [label for label in out if not label.endswith("% seen") and label != "all"]
    return {k: out[k] for k in sorted(out) if k != "all" or len(whole) != 1}


def mixture(prediction: Prediction) -> Prediction:
    """Mean and std over latent samples, (S, B, M, C) -> (B, M, C)."""
    mean, std = prediction
    return Prediction(mean.mean(0), (std.square().mean(0) + mean.var(0, correction=0)).sqrt())


def sample_curves(model, context: dict, x: Tensor, samples: int, gen) -> Prediction:
    """Predictions at x (B, M, 1), one a latent sample: (S, B, M, D); S = 1 without latents."""
    code, cfg = model.encode(context), model.cfg
    if cfg.model != "vnp":
        return Prediction(*(v[None] for v in model.decode(code, {"x": x})))
    eps = torch.randn((cfg.n_blocks, samples, len(x), 1, cfg.latent), generator=gen)
    return model.decode(code, {"x": x}, eps.to(x))


def mixture_log_likelihood(prediction: Prediction, y: Tensor) -> Tensor:
    """Log density of every value y (B, M, D) under the mixture of the latent samples."""
    ll = log_likelihood(prediction, y)  # (S, B, M, D)
    return ll.logsumexp(0) - math.log(len(ll))


def curve_cases(data, count: int, seed: int = 0):
    """Sets to score on, of every kernel, or windows of a set of series.

    (x (B, N, 1), y (B, N, D), mask or None, (kernel, hyperparameters) or None, context size, label,
    numbers (B,) of the windows or None)
    """
    if data is not None:
        windows = ((*xym, None, n, "series", rows) for *xym, n, rows in data.windows())
        return itertools.islice(windows, count) if count else windows
    return ((x, y, None, (kernel, hyper), n, kernel, None) for kernel in curves.KERNELS
            for x, y, hyper, n in curves.gp_test_sets(kernel, count, seed))


def masked_mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean (B,) over the values (B, M, D) of every curve that are known."""
    return (values * known).sum((1, 2)) / known.sum((1, 2))


def joint_scores(model, x, y, known, true, n: int, samples: int, gen) -> dict:
    """Log-likelihood of the targets one by one in a random order, each given those before it."""
    order = torch.cat((torch.arange(n), n + torch.randperm(x.shape[1] - n, generator=gen)))
    x, y, known = x[:, order], y[:, order], known[:, order]
    xs, ys, seen = (v.to(model.freqs) for v in (x, y, known))
    ll = []
    for j in range(n, x.shape[1]):
        context = {"x": xs[:, :j], "y": ys[:, :j], "mask": seen[:, :j]}
        at = slice(j, j + 1)
        ll.append(mixture_log_likelihood(
            sample_curves(model, context, xs[:, at], samples, gen), ys[:, at]))
    scores = {"joint_ll": masked_mean(torch.cat(ll, 1), seen[:, n:])}
    if true:
        scores["gp_joint"] = curves.joint_log_likelihood(
            true[0], x[:, :n], y[:, :n], x[:, n:], y[:, n:], true[1])
    return scores


def marginal_scores(model, x, y, known, true, n: int, samples: int, gen) -> dict:
    """Log-likelihood of every target given the context alone, and exact GP posteriors beside it."""
    xs, ys, seen = (v.to(model.freqs) for v in (x, y, known))
    context = {"x": xs[:, :n], "y": ys[:, :n], "mask": seen[:, :n]}
    prediction = sample_curves(model, context, xs, samples, gen)
    ll, marginal = mixture_log_likelihood(prediction, ys), mixture(prediction)
    inside = is_covered(*marginal, ys)
    scores = {"target_ll": masked_mean(ll[:, n:], seen[:, n:]),
              "context_ll": masked_mean(ll[:, :n], seen[:, :n]),
              "coverage": masked_mean(inside[:, n:], seen[:, n:])}
    given, at, truth = (x[:, :n], y[:, :n]), x[:, n:], y[:, n:]
    if true:
        posterior = curves.gp_posterior(true[0], *given, at, true[1])
        scores["gp"] = log_likelihood(Prediction(*posterior), truth).mean((1, 2))
    if y.shape[-1] == 1:
        noises = (curves.NOISE,) if true else (0.02, 0.05, 0.1, 0.2, 0.4)
        posterior = curves.averaged_gp(*given, at, noises)
        scores["averaged_gp"] = log_likelihood(Prediction(*posterior), truth).mean((1, 2))
    return scores


@torch.no_grad()
def evaluate_curves(model, cases, autoregressive: bool = False, samples: int = 50) -> dict:
    """Log-likelihood per value and label, of the model and of exact GP posteriors: see LEGEND.

    autoregressive: the joint one of the targets instead of each one's given the context alone.
    """
    parts, kind, counted = [], joint_scores if autoregressive else marginal_scores, ("sets",)
    for i, (x, y, mask, true, n, label, numbers) in shard(cases):
        known = torch.ones_like(y) if mask is None else mask.to(y)
        scores = kind(model, x, y, known, true, n, samples, generator(i, 7))
        if numbers is None:  # all curves of a set have one context size
            numbers, scores = torch.tensor([i]), {k: v.mean(0, True) for k, v in scores.items()}
        else:
            counted = "splits", "windows"
        parts.append((i, (label,), scores, numbers))
    return mean_scores(parts, *counted)


LEGEND = {
    "psnr": "dB, mean over pictures, of values clamped to [0, 1]; +- is a standard error; where "
            "pictures are seen in part, all figures are of the other pixels alone",
    "psnr_unclamped": "the same of values as they are",
    "centers": "dB of the function's values at pixel centers, as in the papers; of a model with a "
               "grid psnr is of means over the pixels' areas",
    "coverage": "part of the values within 1.96 predicted std of the mean",
    "nearest": "dB of pixels with the color of the nearest seen one",
    "filled": "dB of pixels with the mean color of the seen ones around",
    "white": "dB of a white picture", "context_view": "dB of the first context view",
    "large": "dB at the true larger image's size, of the function there",
    "large_bicubic": "the same of its own small picture enlarged",
    "truth_bicubic": "the same of the true small picture enlarged",
    "large_coverage": "part of the larger image's values within 1.96 predicted std of the mean",
    "target_ll": "marginal log-likelihood per target, given the context alone",
    "context_ll": "the same of the context's own points",
    "gp": "the exact posterior, told the true kernel",
    "averaged_gp": "exact RBF posteriors, averaged over kernels by their evidence in the context",
    "joint_ll": "joint log-likelihood per target, each given the true ones before it",
    "gp_joint": "the exact joint, told the true kernel",
    "sets": "each of 16 curves, with one context size",
    "splits": "of windows into context and targets",
    "windows": "counted once in standard errors",
    "objects": "counted once in standard errors, as views of one depend on each other",
}


def score(model, data, tto=0, count=0, pairs=0, autoregressive=False, split="test"):
    """{label: scores} of a split: PSNR, or log-likelihood on `count` sets of 16 curves, default 50.

    count: of images and scenes only the first so many, 0 all. pairs: random (context, target)
    views of every scene. split: which curves to sample, where `data` is None.
    """
    task = model.cfg.task
    if task == "gp":
        seed = {"test": 0, "val": 1, "train": 2, "all": 3}[split]  # of sampled curves
        cases = curve_cases(data, count if data else count or 50, seed)
        return evaluate_curves(model, track(cases, "scoring"), autoregressive)
    only = range(min(count or len(data), len(data)))
    if task == "image":
        return evaluate(model, track(image_cases(model, data, only), "scoring"), tto)
    cases = scene_cases(model, data, only, pairs)
    return evaluate(model, track(cases, "scoring", None if pairs else len(only)), tto)


def report(scores: dict):
    """Print scores {label: {name: value}} as a table, mean +- standard error, and its legend."""
    for label, row in scores.items():
        words = []
        for name, value in row.items():
            if not name.endswith("_se"):
                error = f" +-{row[f'{name}_se']:.2f}" if f"{name}_se" in row else ""
                words.append(f"{name} {value:.2f}{error}" if isinstance(value, float) else
                             f"{name} {value}")
        click.echo(f"{label:>12}  " + "  ".join(words))
    for name in dict.fromkeys(itertools.chain(*scores.values())):
        if name in LEGEND:
            click.echo(f"  {name}: {LEGEND[name]}")


def write_json(path, value):
    """Write a value to a file beside its place, then rename it; what is not finite is null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    with atomic(path) as part:
        part.write_text(json.dumps(finite, indent=1) + "\n")
