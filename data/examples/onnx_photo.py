"""Draw a photo at any size from exported files of an image model: NumPy, Pillow and onnxruntime.

    python export.py data/pretrained/image-transinr.pt -o image
    python data/examples/onnx_photo.py image photo.jpg 2048 large.png

The result has the photo's shape; SIZE is the length of its longer side in pixels.
"""

import json
import sys

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def read_photo(path: str, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A photo, upright and on white, as (1, 3, side, side) in [0, 1]; and its own (height, width).

    The whole photo is squeezed to a square: the function lives on (-1, 1)^2 whatever the shape.
    """
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")
    pixels = photo.resize((side, side), Image.Resampling.BILINEAR)
    return np.float32(pixels).transpose(2, 0, 1)[None] / 255, (photo.height, photo.width)


def encode(encoder: ort.InferenceSession, image: np.ndarray) -> dict[str, np.ndarray]:
    """The code of an image: named arrays, which the decoder reads under the same names."""
    context = {"image": image, "mask": np.ones_like(image[:, :1])}  # mask: every pixel is seen
    code = encoder.run(None, {i.name: context[i.name] for i in encoder.get_inputs()})
    return dict(zip((o.name for o in encoder.get_outputs()), code))


def pixel_centers(n: int) -> np.ndarray:
    """Coordinates of n pixel centers along a side, in (-1, 1)."""
    return ((np.arange(n) + 0.5) * 2 / n - 1).astype(np.float32)


def decode(decoder: ort.InferenceSession, code: dict, height: int, width: int) -> np.ndarray:
    """The image of a code at any size, (height, width, 3) in [0, 1], one row a call."""
    noise = {i.name: np.zeros((i.shape[0], 1, 1, i.shape[3]), np.float32)
             for i in decoder.get_inputs() if i.name == "eps"}  # a VNP: the prior's mean
    rows, cols = pixel_centers(height), pixel_centers(width)
    coords = np.stack(np.meshgrid(rows, cols, indexing="ij"), -1)  # (height, width, 2)
    values = [decoder.run(["mean"], code | noise | {"coords": row[None]})[0] for row in coords]
    return np.concatenate(values).clip(0, 1)


def main(stem: str, path: str, size: str, out: str):
    encoder, decoder = (ort.InferenceSession(f"{stem}.{part}.onnx")
                        for part in ("encoder", "decoder"))
    config = json.loads(encoder.get_modelmeta().custom_metadata_map["config"])
    image, shape = read_photo(path, config["image_size"])
    height, width = (max(1, round(n * int(size) / max(shape))) for n in shape)
    fine = max(1, -(-4 * config["image_size"] // int(size))) if config["grid"] else 1
    values = decode(decoder, encode(encoder, image), fine * height, fine * width)
    picture = Image.fromarray((values * 255).round().astype(np.uint8))
    picture.resize((width, height), Image.Resampling.BILINEAR).save(out)  # a small one is reduced


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
