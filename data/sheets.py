"""Draw what every stored model makes of held-out signals, to look at: one picture a model.

    python data/sheets.py OUT
    python data/sheets.py --readme  # the figures of the README

Images: the input, then the function at 64, 256 and 1024 pixels (of the last the middle 256) beside
the true picture at 256. Scenes: the input, then eight sides. Curves: plots of each kernel.
"""

import sys
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tinyinr  # noqa: E402
from data import pictures, rendering  # noqa: E402
from data.commands import load_for  # noqa: E402
from data.curves import CurveSet  # noqa: E402
from data.evaluation import curve_cases, open_data, scene_cases  # noqa: E402

COUNT = 8  # signals a sheet


def enlarged(pixels):
    """A square picture (S, S, 3) with its pixels repeated up to about 256."""
    return pictures.enlarge(pixels, max(1, 256 // len(pixels)))


def image_row(model, data, i: int) -> list:
    """Input, the function at three sizes, and the true picture."""
    small, large = (p[0] for p in next(data.batches([([i], 0)])))
    code = model.encode({"image": small[None].float() / 255})
    drawn = [rendering.render_image(model, code, size, size) for size in (64, 256, 1024)]
    drawn[-1] = drawn[-1][384:640, 384:640]
    return [enlarged(p) for p in (small.movedim(0, -1).numpy(), *drawn,
                                  large.movedim(0, -1).numpy())]


def scene_row(model, data, i: int, sides: int = 8, size: int = 128) -> list:
    """The first view of an object, and the model's from all sides."""
    scene = data[i]
    code = model.encode(rendering.scene_context(model, scene))
    views = rendering.render_scene(model, code, *rendering.turntable(scene, size, sides), size)
    return [pictures.enlarge(scene.images[0].movedim(0, -1).numpy()), *views]


@torch.no_grad()
def sheet(model):
    """The picture (H, W, 3) uint8 of a model."""
    task = model.cfg.task
    if task == "gp":
        return rendering.sample_pictures(model, None)
    data = open_data(model.cfg, None, "test", zoom=4 if task == "image" else 1)
    row = image_row if task == "image" else scene_row
    return pictures.image_grid([row(model, data, (2 * k + 1) * len(data) // (2 * COUNT))
                                for k in range(COUNT)])


def columns(model, count: int = 6):
    """Images: the input, the function at 256 pixels, and the true picture; a column each."""
    data = open_data(model.cfg, None, "test", zoom=4)
    emoji = [i for i in range(len(data)) if data.labels[i] == "emoji"]
    photos = [i for i in range(len(data)) if data.labels[i] == "photos"]
    some = [part[(2 * k + 1) * len(part) // count] for part in (emoji, photos)
            for k in range(count // 2)]
    rows = [image_row(model, data, i) for i in some]
    return pictures.image_grid(list(zip(*((row[0], row[2], row[-1]) for row in rows))))


def objects(model, count: int = 12):
    """The first view, another one, it from the first, from all context views, and these refined."""
    data, columns = open_data(model.cfg, None, "test"), []
    for case in scene_cases(model, data, [i * len(data) // count for i in range(count)]):
        alone = case._replace(context={k: v[:, :1] for k, v in case.context.items()})
        view, truth, one, _ = rendering.prediction_panels(model, alone)
        more = (rendering.prediction_panels(model, case, tto)[2] for tto in (0, 100))
        columns.append([view, truth, one, *more])
    return rendering.panel_grid(columns)


def curve_rows(model, series_model):
    """A curve of every kernel; below, two windows of sunspots and one of El Nino, half seen."""
    drawn = [rendering.plot_case(model, case)[0] for case in curve_cases(None, 1)]
    for name, i in (("sunspots", 1), ("sunspots", 4), ("elnino", 7)):
        data = CurveSet(ROOT / "data" / f"{name}.csv", "all")
        drawn += rendering.plot_case(series_model, next(curve_cases(data, 1)), i)
    return pictures.image_grid([drawn[:3], drawn[3:]])


@torch.no_grad()
def readme():
    """Draw the figures of the README from the stored models."""
    masked = lambda model: rendering.sample_pictures(model, open_data(model.cfg, None, "test"))
    for name, draw, *stems in (
            ("image", columns, "image-transinr"), ("completion", masked, "image-vnp"),
            ("nvs", objects, "nvs-transinr"), ("curves", curve_rows, "vnp-gp", "vnp-series")):
        models = [load_for(ROOT / "data" / "pretrained" / f"{stem}.pt",
                           tinyinr.choose_device("cpu"), 4 if name == "nvs" else None)
                  for stem in stems]
        rendering.write_pictures([draw(*models)], ROOT / "data" / "readme" / f"{name}.webp")


@click.command(context_settings={"max_content_width": 100})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--readme", "figures", is_flag=True, help="Draw the figures of the README instead.")
def main(out, figures):
    """Draw a sheet of every stored model into the folder OUT."""
    if figures:
        return readme()
    if out is None:
        raise click.UsageError("give the folder to draw into, or --readme")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "data" / "pretrained").glob("*.pt")):
        rendering.write_pictures([sheet(tinyinr.load(path))], out / f"{path.stem}.png")
        click.echo(f"wrote {out / path.stem}.png")


if __name__ == "__main__":
    main()
