"""Plot a curve and its 95 % band from exported files of a curve model: NumPy, Pillow, onnxruntime.

    python export.py data/pretrained/gp-vnp.pt -o curve
    python data/examples/onnx_bands.py curve points.csv bands.png

The table has the columns x,y, with or without a header, and up to 46 rows; the model has one value
(n_values=1).
"""

import sys

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageDraw

SIZE, BAND, MEAN = (480, 320), "#d6e4f5", "#1f4e8c"  # of the plot in pixels; colors
SAMPLES = 32  # functions drawn from a VNP


def read_points(path: str) -> tuple[np.ndarray, np.ndarray]:
    """A table x,y as x and y (1, N, 1), standardised as in training."""
    table = np.genfromtxt(path, delimiter=",").reshape(-1, 2)
    x, y = table[np.isfinite(table).all(1)].T[:, None, :, None]  # a header is a row of NaN
    x, y = 4 * (x - x.min()) / (np.ptp(x) or 1) - 2, (y - y.mean()) / (2 * y.std() or 1)
    return np.float32(x), np.float32(y)


def encode(encoder: ort.InferenceSession, x, y) -> dict[str, np.ndarray]:
    """The code of a context: named arrays, which the decoder reads under the same names."""
    code = encoder.run(None, {"x": x, "y": y, "mask": np.ones(x.shape[:2], np.float32)})
    return dict(zip((o.name for o in encoder.get_outputs()), code))


def decode(decoder: ort.InferenceSession, code: dict, x) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (K,) at x (1, K, 1): of a VNP over SAMPLES draws of its latents."""
    noise = [i for i in decoder.get_inputs() if i.name == "eps"]  # none: a TransINR
    draws = []
    for _ in range(SAMPLES if noise else 1):
        eps = {i.name: np.float32(np.random.randn(i.shape[0], 1, 1, i.shape[3])) for i in noise}
        draws.append(decoder.run(["mean", "std"], code | eps | {"x": x}))
    means, stds = (np.stack(values).reshape(len(draws), -1) for values in zip(*draws))
    return means.mean(0), np.sqrt((stds**2).mean(0) + means.var(0))


def plot(x, y, grid, mean, std) -> Image.Image:
    """Context points x, y, and the mean with its 95 % band on a grid over [-2, 2]."""
    low, high = mean - 1.96 * std, mean + 1.96 * std
    corner, span = (-2, high.max()), (4, low.min() - high.max())

    def pixels(a, b):
        points = np.stack((a.ravel(), b.ravel()), 1)
        return ((points - corner) / span * SIZE).ravel().tolist()

    pen = ImageDraw.Draw(image := Image.new("RGB", SIZE, "white"))
    pen.polygon(pixels(grid, high) + pixels(grid[::-1], low[::-1]), fill=BAND)
    pen.line(pixels(grid, mean), fill=MEAN, width=2)
    for a, b in np.reshape(pixels(x, y), (-1, 2)):
        pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill="black")
    return image


def main(stem: str, table: str, out: str):
    encoder, decoder = (ort.InferenceSession(f"{stem}.{part}.onnx")
                        for part in ("encoder", "decoder"))
    x, y = read_points(table)
    grid = np.linspace(-2, 2, 256, dtype=np.float32)
    mean, std = decode(decoder, encode(encoder, x, y), grid[None, :, None])
    plot(x, y, grid, mean, std).save(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
