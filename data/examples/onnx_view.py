"""Draw a new view of an object from exported files of a scene model: NumPy, Pillow, onnxruntime.

    python export.py data/pretrained/nvs-transinr.pt -o scene
    python data/examples/onnx_view.py scene chair 60 view.png

The model reads the first view of the folder's transforms.json, which has a camera_angle_x; its
cameras look at an object within the unit sphere from about 4 away, as in training. The new camera
is that of the first view, turned by DEGREES about the vertical axis through the origin.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image


def read_view(folder: str, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first view of a folder: image (3, side, side) in [0, 1], pose (3, 4), focals (2,) in its
    pixels, along x and y."""
    scene = json.loads(Path(folder, "transforms.json").read_text())
    frame = scene["frames"][0]
    path = Path(folder, frame["file_path"])
    path = path if path.is_file() else next(path.parent.glob(path.name + ".*"))
    view = Image.open(path).convert("RGBA")
    view = Image.alpha_composite(Image.new("RGBA", view.size, "white"), view).convert("RGB")
    focals = 0.5 * side / np.tan(0.5 * scene["camera_angle_x"])
    focals = np.float32([focals, focals * view.width / view.height])  # of the squeezed view
    view = view.resize((side, side), Image.Resampling.BILINEAR)
    pose = np.float32(frame["transform_matrix"])[:3]  # camera-to-world, OpenGL axes
    return np.float32(view).transpose(2, 0, 1) / 255, pose, focals


def encode(encoder: ort.InferenceSession, image, pose, focals) -> dict[str, np.ndarray]:
    """The code of one view: named arrays, which the decoder reads under the same names."""
    code = encoder.run(None, {"images": image[None, None], "poses": pose[None, None],
                              "focals": focals[None, None]})
    return dict(zip((o.name for o in encoder.get_outputs()), code))


def turned(pose: np.ndarray, degrees: float) -> np.ndarray:
    """A pose (3, 4) after a turn about the z axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.float32([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ pose


def decode(decoder: ort.InferenceSession, code: dict, config: dict, pose, focals, side: int):
    """The view (side, side, 3) in [0, 1] of a camera, one row of rays a call."""
    fixed = {k: np.float32([config[k]]) for k in ("near", "far")}
    fixed |= {i.name: np.zeros((i.shape[0], 1, 1, i.shape[3]), np.float32)
              for i in decoder.get_inputs() if i.name == "eps"}  # a VNP: the prior's mean
    fixed["rays_o"] = np.tile(pose[:, 3], (1, side, 1))  # (1, side, 3)
    xs, ys = ((np.arange(side) + 0.5 - side / 2) / focal for focal in focals)
    rows = []
    for y in ys:
        rays_d = np.float32([[(x, -y, -1) for x in xs]]) @ pose[:, :3].T  # (1, side, 3)
        rows.append(decoder.run(["mean"], code | fixed | {"rays_d": rays_d})[0])
    return np.concatenate(rows).clip(0, 1)


def main(stem: str, folder: str, degrees: str, out: str):
    encoder, decoder = (ort.InferenceSession(f"{stem}.{part}.onnx")
                        for part in ("encoder", "decoder"))
    config = json.loads(encoder.get_modelmeta().custom_metadata_map["config"])
    side = config["image_size"]
    image, pose, focals = read_view(folder, side)
    code = encode(encoder, image, pose, focals)
    values = decode(decoder, code, config, turned(pose, float(degrees)), focals, side)
    Image.fromarray((values * 255).round().astype(np.uint8)).save(out)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
