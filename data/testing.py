"""What the tests of several files share: comparisons, pictures, scenes in all layouts, damage."""

import json
import math
import os
import random
import re
import struct
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

SPLITS = ("train", "val", "test")
DAMAGED = int(os.environ.get("DAMAGED", 40))
NUMBERS = (b"1e400", b"-1", b"0", b"1e308", b"NaN", b"9" * 400, b"[[[[", b"null", b'"a"')
ANGLE = math.radians(49.1)  # zero123's; all layouts take it here
FLIP = np.diag([1.0, -1, -1, 1])  # OpenGL's axes and OpenCV's
BLANK = np.zeros((6, 8, 8, 3), np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # left is turned to the top


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, tol=1e-5):
    torch.testing.assert_close(got, want, atol=tol, rtol=tol)


def refused(words, call, *args, **given):
    """The call ends in a ValueError with these words."""
    with pytest.raises(ValueError, match=words):
        call(*args, **given)


def noisy(height, width, seed=0):
    """A picture of random pixels."""
    return Image.fromarray((rand(height, width, 3, seed=seed) * 256).byte().numpy())


def photos(folder, count=4, size=24):
    """A folder of smooth pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noisy(3, 3, i).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"p{i}.png")
    return folder


def camera(eye):
    """Camera-to-world OpenGL pose (4, 4) at eye (3,) that looks at the origin, z up."""
    back = eye / np.linalg.norm(eye)
    right = np.cross((0, 0, 1), back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack((right, np.cross(back, right), back, eye), 1)
    return pose


def opposite_cameras(count=6, seed=0):
    """Poses (V, 4, 4) in pairs on opposite sides, 4 from the origin."""
    eyes = 4 * F.normalize(rand(count // 2, 3, seed=seed).double() - 0.5, dim=-1).numpy()
    return np.stack([camera(eye) for eye in (*eyes, *-eyes)])


def draw_ball(pose, fx, fy, cx, cy, width, height):
    """A smooth ball of radius 1 at the origin, (H, W, 3) uint8, by each pixel's ray."""
    y, x = np.mgrid[:height, :width] + 0.5
    d = np.stack(((x - cx) / fx, -(y - cy) / fy, -np.ones_like(x)), -1) @ pose[:3, :3].T
    near = np.linalg.norm(np.cross(pose[:3, 3], d), axis=-1) / np.linalg.norm(d, axis=-1)
    alpha = (1.2 - near).clip(0, 1)[..., None]
    return (255 * (alpha * (0.15 * d - 0.5) + 1).clip(0, 1)).round().astype(np.uint8)


def ball_views(cameras, size):
    """What cameras of the field ANGLE see of it, (V, S, S, 3)."""
    focal = size / 2 / math.tan(ANGLE / 2)
    return np.stack([draw_ball(p, focal, focal, size / 2, size / 2, size, size) for p in cameras])


def write_layout(folder, layout, cameras, views):
    """A scene in one layout; cameras (V, 4, 4), views (V, S, S, 3) of the field ANGLE."""
    size = views.shape[1]
    focal, mid = size / 2 / math.tan(ANGLE / 2), size / 2
    place = {"blender": "train/r_{}", "colmap txt": "images/im {}", "colmap bin": "images/im {}",
             "srn": "rgb/{:06d}", "zero123": "{:03d}", "per frame": "r_{}"}
    files = [place.get(layout, "images/{:04d}").format(i) + ".png" for i in range(len(cameras))]
    for file, pixels in zip(files, views):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / file, exif=TURNED)  # cameras are of pixels as stored
    if layout.startswith("colmap"):
        write_colmap(folder, cameras, [f.split("/")[1] for f in files], focal, size, layout[-3:])
    elif layout == "srn":
        (folder / "pose").mkdir()
        (folder / "intrinsics.txt").write_text(f"{focal} {mid} {mid} 0.\n0 0 0\n1\n{size} {size}")
        for i, pose in enumerate(cameras):
            np.savetxt(folder / f"pose/{i:06d}.txt", (pose @ FLIP).reshape(1, 16))
    elif layout == "zero123":
        for i, pose in enumerate(cameras):
            np.save(folder / f"{i:03d}.npy", np.linalg.inv(pose)[:3])
    else:
        write_transforms(folder, layout, cameras.tolist(), files, dict(
            fl_x=focal, fl_y=focal, cx=mid, cy=mid, w=size, h=size))


def write_transforms(folder, layout, matrices, files, own):
    meta, parts = dict(camera_angle_x=ANGLE), {"": slice(None)}
    if layout == "blender":
        parts = {"_train": slice(4), "_val": slice(0), "_test": slice(4, None)}
        files = [f"./{f[:-4]}" for f in files]
    elif layout == "nerfstudio":  # of pictures twice as large; as of instant-ngp, elsewhere
        files = [f"/home/a/b/c/{f}".upper() for f in files]
        meta = {k: 2 * v for k, v in own.items()} | dict(
            camera_model="OPENCV", k1=0, p1=0.0, camera_angle_x=1, aabb_scale=4, offset=[1, 2, 3])
    elif layout == "per frame":  # 3 x 4, with backslashes and folders that are none
        files, matrices = [f"chairs\\x\\{f}" for f in files], [m[:3] for m in matrices]
        meta = dict(fl_x=1, w=9, camera_angle_x=1)
    frames = [dict(file_path=f, transform_matrix=m) | (own if layout == "per frame" else {})
              for f, m in zip(files, matrices)]
    for end, part in parts.items():
        (folder / f"transforms{end}.json").write_text(json.dumps(meta | dict(frames=frames[part])))


def write_colmap(folder, cameras, names, focal, size, kind):
    (folder / "sparse/0").mkdir(parents=True)
    rows, middle = [], (size / 2, size / 2)
    for i, pose in reversed([*enumerate(cameras)]):  # the files are in no order
        world = np.linalg.inv(pose @ FLIP)
        (a, b, c), (d, e, f), (g, h, k) = world[:3, :3]
        q = np.array((1 + a + e + k, h - f, c - g, d - b))  # w, x, y, z
        rows.append((i + 1, *q / np.linalg.norm(q), *world[:3, 3], 7, names[i]))
    if kind == "txt":
        camera = " ".join(map(str, (7, "SIMPLE_RADIAL", size, size, focal, *middle, 0)))
        views = "\n".join(" ".join(map(str, row)) + ("\n1.0 2.0 -1" if row[0] % 2 else "\n")
                          for row in rows)
        camera, views = (f"# list\n{text}\n".encode() for text in (camera, views))
    else:
        camera = struct.pack("<QIiQQ4d", 1, 7, 1, size, size, focal, focal, *middle)
        views = struct.pack("<Q", len(rows)) + b"".join(
            struct.pack("<I7dI", *row[:-1]) + row[-1].encode() + b"\0"
            + struct.pack("<QddqddQ", 2, 1, 2, -1, 3, 4, 5) for row in rows)
    (folder / f"sparse/0/cameras.{kind}").write_bytes(camera)
    (folder / f"sparse/0/images.{kind}").write_bytes(views)


def damaged(data: bytes, rng) -> bytes:
    """A file with some of its bytes changed, and its numbers replaced by absurd ones."""
    for _ in range(rng.randint(1, 6)):
        at, n = rng.randint(0, len(data)), rng.randint(1, 8)
        numbers = [m.span() for m in re.finditer(rb"-?\d[\d.e+-]*", data)] or [(at, at)]
        (start, end), new = rng.choice((
            ((at, at + n), rng.randbytes(n)), ((at, at), rng.randbytes(n)),
            ((at, at + 9 * n), b""), ((at, len(data)), b""),
            (rng.choice(numbers), rng.choice(NUMBERS))))
        data = data[:start] + new + data[end:]
    return data


def check_damaged(kind, folder, good, file, read):
    """Whatever the bytes: a result of finite numbers, or a ValueError or OSError with words, soon,
    and no file."""
    rng, refused = random.Random(kind), 0
    for data in good:
        file.write_bytes(data)
        read()
    before = sorted(folder.rglob("*"))
    for _ in range(DAMAGED):
        file.write_bytes(damaged(rng.choice(good), rng))
        start = time.monotonic()
        try:
            for values in read():
                assert len(values) and values.isfinite().all()
        except (ValueError, OSError) as e:
            assert str(e)
            refused += 1
        assert time.monotonic() - start < 20
    assert refused and sorted(folder.rglob("*")) == before
    print(kind, DAMAGED, "inputs,", refused, "refused")
