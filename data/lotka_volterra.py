"""Predator-prey series for `train --task gp --data`: python data/lotka_volterra.py OUT_FOLDER

Stochastic Lotka-Volterra by tau-leaping, sampled once a year, a file `year,hare,lynx` each, like
the Hudson Bay record: simulated training data of Gordon et al., Convolutional Conditional Neural
Processes, ICLR 2020.
"""

from pathlib import Path

import click
import torch

RATES = (1.0, 0.002, 0.002, 0.5)  # a year: hare born; hare eaten; lynx born; lynx died
YEARS, STEPS = 91, 100  # 1845 to 1935; steps of simulation in a year


def simulate(count: int, gen: torch.Generator) -> torch.Tensor:
    """Populations (count, YEARS, 2) of hare and lynx; each rate is varied by up to 20 %."""
    rates = torch.tensor(RATES) * (0.8 + 0.4 * torch.rand(count, 4, generator=gen))
    hare, lynx = 100 + 400 * torch.rand(2, count, generator=gen)
    years = []
    for step in range(YEARS * STEPS):
        if step % STEPS == 0:
            years.append(torch.stack((hare, lynx), -1))  # (count, 2)
        factors = torch.stack((hare, hare * lynx, hare * lynx, lynx), -1)  # (count, 4)
        born, eaten, fed, died = torch.poisson(rates * factors / STEPS, generator=gen).unbind(-1)
        hare, lynx = (hare + born - eaten).clamp(0, 1e4), (lynx + fed - died).clamp(0, 1e4)
    return torch.stack(years, 1)


@click.command(help=__doc__.split(":")[0])
@click.argument("out_folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(out_folder, count, seed):
    gen, series = torch.Generator().manual_seed(seed), []
    while len(series) < count:
        series += [s for s in simulate(count, gen) if s.amin() > 0]  # none died out
    out_folder.mkdir(parents=True, exist_ok=True)
    for i, populations in enumerate(series[:count]):
        lines = [f"{year},{hare:.0f},{lynx:.0f}" for year, (hare, lynx)
                 in enumerate(populations.tolist(), 1845)]
        (out_folder / f"{i:04}.csv").write_text("\n".join(("year,hare,lynx", *lines, "")))
    click.echo(f"{out_folder}: {count} series of {YEARS} years")


if __name__ == "__main__":
    main()
