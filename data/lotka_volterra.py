"""Hares and lynxes, a curve of two values: simulated for training, and the record of Hudson Bay.

    python data/lotka_volterra.py simulate lv --count 4000
    python tinyinr.py train --task gp --data lv --set n_values=2 --out runs/lv
    python data/lotka_volterra.py score runs/lv/ckpt.pt data/hares.csv

Simulation and tasks are those of the package neuralprocesses 0.2.7 (Bruinsma et al.,
Autoregressive Conditional Neural Processes, ICLR 2023), as in Huang et al., 2023.
"""

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import tinyinr  # noqa: E402
from data.commands import Commands  # noqa: E402
from data.curves import standardise  # noqa: E402
from data.evaluation import mixture, mixture_log_likelihood, sample_curves  # noqa: E402
from data.tables import read_table  # noqa: E402
from tinyinr import Prediction, log_likelihood  # noqa: E402

YEARS, BURN_IN, STEPS = 91, 10, 45  # 1845 to 1935; years before them; steps of a year
TASKS = ("interpolation", "forecasting", "reconstruction")


def simulate(count: int, gen: torch.Generator) -> torch.Tensor:
    """Populations (count, YEARS, 2) of hare and lynx, in thousands, yearly.

    d hare = hare (a - b lynx) dt + s hare^(1/6) dW1 and d lynx = lynx (g hare - c) dt + s
    lynx^(1/6) dW2, by Euler and Maruyama, reflected at 0; then times a scale U[1, 5] for both.
    """
    u = torch.rand(6, count, generator=gen)
    a, b, c, g = 0.2 + 0.6 * u[0], 0.04 + 0.04 * u[1], 0.8 + 0.4 * u[2], 0.04 + 0.04 * u[3]
    noise, scale, dt = 0.5 + 9.5 * u[4, :, None], 1 + 4 * u[5, :, None, None], 1 / STEPS
    now, years = 5 + 95 * torch.rand(count, 2, generator=gen), []
    for step in range((BURN_IN + YEARS) * STEPS):
        if step % STEPS == 0:
            years.append(now)
        hare, lynx = now.unbind(-1)
        drift = torch.stack((hare * (a - b * lynx), lynx * (g * hare - c)), -1)  # (count, 2)
        shock = dt**0.5 * torch.randn(count, 2, generator=gen)
        now = (now + drift * dt + noise * now ** (1 / 6) * shock).abs()
    return scale * torch.stack(years[BURN_IN:], 1)


def hidden(task: str, x: torch.Tensor, count: int, gen: torch.Generator) -> torch.Tensor:
    """Targets (count, N, 2), True where hidden, of `count` draws of a task at x (N, 1), years.

    interpolation: 1 to 20 random points of every column; forecasting: all from year U[25, 75] of
    the table on; reconstruction: one of the columns from there on.
    """
    n = len(x)
    if task == "interpolation":
        rank = torch.rand(count, n, 2, generator=gen).argsort(1).argsort(1)
        return rank < torch.randint(1, 21, (count, 1, 2), generator=gen)
    late = x - x.min() >= 25 + 50 * torch.rand(count, 1, 1, generator=gen)  # (count, N, 1)
    if task == "forecasting":
        return late.expand(-1, -1, 2)
    return late & (torch.arange(2) == torch.randint(2, (count, 1, 1), generator=gen))


@torch.no_grad()
def task_scores(model, table, task: str, count: int, samples: int = 50, seed: int = 0) -> dict:
    """Means over `count` draws of a task: of the model, and of a Gaussian of each column's context.

    ll: log density of a target in the table's units, the mean over a draw's targets; of a VNP the
    log of the mean density over `samples` latents, of every target alone. x is standardised by the
    whole table, y by the context alone. mae: mean absolute error, in units of the table.
    """
    gen, rows = torch.Generator().manual_seed(seed), []
    for part in hidden(task, table.x, count, gen).split(16):
        target = part & table.mask
        x, y = (v.expand(len(part), -1, -1) for v in (table.x, table.y))
        seen = table.mask & ~part
        xs, ys, (*_, mean, scale) = standardise(x, y, seen)
        context = {"x": xs.float(), "y": ys.float(), "mask": seen}
        draws = sample_curves(model, context, xs.float(), samples, gen)
        true = (y - mean) / scale
        ll = mixture_log_likelihood(draws, true) - scale.log()  # (B, N, 2)
        naive = Prediction(torch.zeros_like(true), torch.full_like(true, 0.5))
        error = (mixture(draws).mean - true).abs() * scale
        constant = log_likelihood(naive, true) - scale.log()
        values = torch.stack((ll, constant, error))  # (3, B, N, 2)
        rows.append((values * target).sum((2, 3)) / target.sum((1, 2)))
    return dict(zip(("ll", "constant_ll", "mae"), torch.cat(rows, 1).mean(1).tolist()))


@click.group(cls=Commands, help=__doc__.split("\n")[0])
def main():
    pass


@main.command("simulate")
@click.argument("out_folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def simulate_command(out_folder, count, seed):
    """Write a file year,hare,lynx for every series."""
    out_folder.mkdir(parents=True, exist_ok=True)
    for i, series in enumerate(simulate(count, torch.Generator().manual_seed(seed)).tolist()):
        lines = [f"{year},{hare:.2f},{lynx:.2f}" for year, (hare, lynx) in enumerate(series, 1845)]
        (out_folder / f"{i:04}.csv").write_text("\n".join(("year,hare,lynx", *lines, "")))
    click.echo(f"{out_folder}: {count} series of {YEARS} years")


@main.command("score")
@click.argument("ckpt", type=click.Path())
@click.argument("tables", nargs=-1, required=True, type=click.Path())
@click.option("--count", type=click.IntRange(min=1), default=256, show_default=True)
def score_command(ckpt, tables, count):
    """Score a checkpoint on the three tasks: log-likelihood of a target, mean over the tables."""
    model = tinyinr.load(ckpt)
    if model.cfg.task != "gp" or model.cfg.n_values != 2:
        raise ValueError(f"{ckpt}: not a model of curves of two values; train one with --task gp "
                         "--set n_values=2")
    read = [read_table(table, "all") for table in tables]
    for task in TASKS:
        scores = [task_scores(model, table, task, count) for table in read]
        click.echo(f"{task:>15}  " + "  ".join(
            f"{name} {sum(s[name] for s in scores) / len(scores):.2f}" for name in scores[0]))


if __name__ == "__main__":
    main()
