"""Posed pictures of objects in every common layout -> square images, poses and focal lengths.

A reader per layout lists a scene's views. The rest is the same for all: each picture is cropped to
the largest square around its principal point and resized; cameras that do not already stand about
4 from the origin and look at it are recentred and rescaled. Poses are camera-to-world with OpenGL
axes (x right, y up, looking along -z), the world's z is up, and focal lengths are in pixels.
"""

import io
import json
import math
import posixpath
import re
import struct
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.images import (IMAGE_SUFFIXES, Tree, load_picture, naming, read_all, split_names,
                         to_tensor)

SPLITS = ("train", "val", "test")
SPLIT_FOLDER = re.compile(r"(^|[/_])(train|val|test)/")  # train/..., cars_train/...
MOST_VIEWS = 4096  # of a scene
NPY_LOCK = Lock()  # np.load reads headers by `ast`, which may fail in threads (CPython 3.11)
RADIUS = 4.0  # mean distance of a scene's cameras from the origin
REACH = 1.064  # half of what a camera sees at that distance, where scenes have the field 0.52
OPENCV_AXES = np.array([1.0, -1.0, -1.0, 1.0])  # times a pose (3, 4): y down, z forward -> OpenGL
LENS_KEYS = "k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2"  # of a transforms.json
POINTS = re.compile(r"[-+.\deE]*")  # of a line of COLMAP's images.txt that lists x, y and a number
# COLMAP's camera models that may be pinholes: number, focal lengths, parameters
PINHOLES = {"SIMPLE_PINHOLE": (0, 1, 3), "PINHOLE": (1, 2, 4), "SIMPLE_RADIAL": (2, 1, 4),
            "RADIAL": (3, 1, 5), "OPENCV": (4, 2, 8), "FULL_OPENCV": (6, 2, 12)}


class View(NamedTuple):
    """A picture's name and pose (3, 4), and its camera in pixels of a w x h picture.

    None: fy as fx, (cx, cy) the middle, (w, h) the picture's own.
    """

    file: str
    pose: np.ndarray
    fx: float
    fy: float | None = None
    cx: float | None = None
    cy: float | None = None
    w: float | None = None
    h: float | None = None


class Scene(NamedTuple):
    """An object seen from V views, and what was done to it, "" for nothing.

    images (V, 3, S, S) uint8; poses (V, 3, 4) float32; focals (V, 2) float32, (x, y), in pixels.
    A point x in the files' coordinates is at (x - origin) * scale in those of `poses`.
    """

    images: Tensor
    poses: Tensor
    focals: Tensor
    note: str = ""
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0


# ------------------------------------------------------------------------- layouts


def names_in(tree: Tree, folder: str) -> list[str]:
    """The tree's names below a folder, "" for all."""
    first, last = (bisect_left(tree.names, folder + end) for end in "/0")  # "0" follows "/"
    return tree.names[first:last] if folder else tree.names


def find_picture(tree: Tree, folder: str, file: str) -> str:
    """The tree's name of a picture: `file` or its last parts below `folder`, suffix or not."""
    parts = posixpath.normpath(file[-1000:].replace("\\", "/")).split("/")
    tries = [parts[i:] for i in range(len(parts))] + [["..", *parts], ["../..", *parts]]  # or above
    for name in (posixpath.normpath(posixpath.join(folder, *end)) for end in tries):
        stem, end = posixpath.splitext(name)  # x.png may be stored as x.jpg
        stems = (name, stem) if end.lower() in IMAGE_SUFFIXES else (name,)
        for key in (name, *(stem + suffix for stem in stems for suffix in IMAGE_SUFFIXES)):
            if key in tree.stored or (key := tree.folded.get(key.lower())):
                return key
    same = [n for n in names_in(tree, folder) if f"/{n}".lower().endswith(f"/{parts[-1]}".lower())]
    if len(same) == 1:
        return same[0]
    raise ValueError(f"picture {file[:200]} is named but absent; restore it or remove its view")


def refuse_lens(model: str, distortion, fisheye=False):
    """ValueError for a camera that is no pinhole."""
    if model not in PINHOLES or fisheye or any(float(k) for k in distortion):
        raise ValueError(f"camera model {model[:40]} with distortion {[*distortion]} is no pinhole;"
                         " undistort the pictures first, as with `colmap image_undistorter`")


def angle_to_focal(angle: float, name: str = "camera_angle_x") -> float:
    """A field of view in rad across a side of the picture -> focal length in such sides."""
    if not 1e-3 < angle < math.pi - 1e-3:
        raise ValueError(f"{name}={angle:g} must be in (0, pi)")
    return 0.5 / math.tan(0.5 * angle)


def parse_transforms(data: bytes) -> Iterator[View]:
    """The frames of a transforms.json, pictures as named there; a frame's keys come first."""
    meta = json.loads(data)
    for frame in meta["frames"]:
        given = meta | frame
        model = str(given.get("camera_model") or "PINHOLE").upper()
        lens = *(given.get(k) or 0 for k in LENS_KEYS), *(given.get("distortion_params") or ())
        refuse_lens(model, lens, given.get("is_fisheye"))
        if any(np.any(v) for key, v in given.items() if key.startswith("rolling_shutter")):
            raise ValueError("rolling_shutter is not 0; give pictures of a global shutter")
        fx, fy, *middle, w, h = (None if given.get(k) is None else float(given[k])
                                 for k in ("fl_x", "fl_y", "cx", "cy", "w", "h"))
        h = h if w else None
        if fx is None:
            if not w and middle != [None, None]:
                raise ValueError("cx, cy without w, h; add them")
            w = w or 1.0
            fx = w * angle_to_focal(float(given["camera_angle_x"]))
            if given.get("camera_angle_y") and h:
                fy = h * angle_to_focal(float(given["camera_angle_y"]), "camera_angle_y")
        pose = np.asarray(frame["transform_matrix"], np.float64)
        yield View(str(frame.get("file_path")), pose, fx, fy, *middle, w, h)


def read_transforms(tree: Tree, folder: str, markers: list[str]) -> Iterator[View]:
    """frames of file_path and transform_matrix (camera-to-world); camera_angle_x (rad) or fl_x"""
    whole = [m for m in markers if m.endswith("transforms.json")]
    for marker in whole or [  # NeRF-synthetic
            m for split in SPLITS for m in markers if m.endswith(f"_{split}.json")]:
        yield from parse_transforms(tree.read(marker))


def parse_colmap(cameras: bytes, images: bytes):
    """COLMAP's text -> rows (id, model, w, h, *params) and (qw..qz, tx..tz, camera id, name)."""
    cameras, images = ([line.split() for line in data.decode("utf-8-sig").splitlines()
                        if line.strip() and line[:1] != "#"] for data in (cameras, images))
    images = [i for i in images if len(i) % 3 or not POINTS.fullmatch("".join(i))]
    return ([(int(c[0]), c[1], *map(float, c[2:])) for c in cameras],
            [(*map(float, i[1:8]), int(i[8]), " ".join(i[9:])) for i in images])


def parse_colmap_binary(cameras: bytes, images: bytes):
    """COLMAP's little-endian files -> the same rows."""
    models = {number: (name, count) for name, (number, _, count) in PINHOLES.items()}
    rows, poses, at = [], [], 8
    for _ in range(*struct.unpack_from("<Q", cameras)):
        camera, model, w, h = struct.unpack_from("<IiQQ", cameras, at)
        name, count = models.get(model, (f"number {model}", 0))
        refuse_lens(name, ())
        rows.append((camera, name, w, h, *struct.unpack_from(f"<{count}d", cameras, at + 24)))
        at += 24 + 8 * count
    at = 8
    for _ in range(*struct.unpack_from("<Q", images)):
        end = images.index(b"\0", at + 64)
        poses.append((*struct.unpack_from("<7dI", images, at + 4), images[at + 64 : end].decode()))
        at = end + 9 + 24 * struct.unpack_from("<Q", images, end + 1)[0]  # 24 bytes a point
    return rows, poses


def read_colmap(tree: Tree, folder: str, markers: list[str]) -> Iterator[View]:
    """cameras.txt: id model w h params; images.txt: id qw qx qy qz tx ty tz camera name, points"""
    marker = min(markers)  # .bin before .txt
    parse = parse_colmap_binary if marker.endswith("bin") else parse_colmap
    rows, poses = parse(tree.read(marker), tree.read(marker[:-11] + "images" + marker[-4:]))
    cameras = {}
    for camera, model, w, h, *params in rows:
        _, n, count = PINHOLES.get(model, (None, 1, 0))
        refuse_lens(model, params[n + 2 : count])
        cameras[camera] = (params[0], params[n - 1], *params[n : n + 2], w, h)
    for qw, x, y, z, *shift, camera, file in sorted(poses, key=lambda row: row[-1]):
        if not abs(math.hypot(qw, x, y, z) - 1) < 1e-3:
            raise ValueError(f"the quaternion of {file[:200]} is not a rotation, of length 1")
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = np.eye(3) + 2 * (qw * cross + cross @ cross) / (qw**2 + x**2 + y**2 + z**2)
        pose = invert(np.column_stack((rotation, shift))) * OPENCV_AXES
        yield View(f"images/{file}", pose, *cameras[camera])


def read_srn(tree: Tree, folder: str, markers: list[str]) -> Iterator[View]:
    """intrinsics.txt: f cx cy 0 ... H W; pose/*.txt: 16 numbers, camera-to-world; rgb/*"""
    f, cx, cy, *_, h, w = map(float, tree.read(markers[0]).split())
    for name in names_in(tree, posixpath.join(folder, "pose")):
        if name.endswith(".txt"):
            pose = np.array(tree.read(name).split(), np.float64).reshape(4, 4)
            yield View(f"rgb/{Path(name).stem}", pose[:3] * OPENCV_AXES, f, f, cx, cy, w, h)


def read_zero123(tree: Tree, folder: str, markers: list[str]) -> Iterator[View]:
    """000.npy: a matrix 3 x 4, world-to-camera, Blender's axes, beside 000.png; and so on"""
    for name in markers:
        data = io.BytesIO(tree.read(name))
        with NPY_LOCK:
            pose = np.load(data, allow_pickle=False).astype(np.float64)
        yield View(Path(name).stem, invert(pose), angle_to_focal(math.radians(49.1)), w=1.0)


def invert(pose: np.ndarray) -> np.ndarray:
    """World-to-camera (3, 4) -> camera-to-world (3, 4)."""
    return np.column_stack((pose[:3, :3].T, -pose[:3, :3].T @ pose[:3, 3]))


LAYOUTS = {  # files that mark a scene's folder, and the reader; the first that matches is taken
    "transforms.json": (r"transforms(_train|_val|_test)?\.json", read_transforms),
    "COLMAP": (r"(sparse/(0/)?)?cameras\.(bin|txt)", read_colmap),
    "SRN": (r"intrinsics\.txt", read_srn),
    "zero123": (r"\d+\.npy", read_zero123)}


def find_scenes(tree: Tree, folder: str = "") -> dict[str, tuple[str, list[str]]]:
    """{folder of a scene: (layout, the files that mark it)} at and below a folder, sorted.

    A folder inside a scene's is no scene of its own, such as COLMAP's beside a transforms.json.
    """
    found, scenes = {}, {}
    for name in names_in(tree, folder):
        if not name.endswith((".json", ".bin", ".txt", ".npy")):
            continue
        for layout, (pattern, _) in LAYOUTS.items():
            if match := re.fullmatch(f"(?:(.*?)/)??{pattern}", name):
                found.setdefault(match[1] or "", {}).setdefault(layout, []).append(name)
    for scene, layouts in sorted(found.items()):
        above = {str(p).removeprefix(".") for p in PurePosixPath(scene).parents}
        if not above & scenes.keys():
            scenes[scene] = next((k, layouts[k]) for k in LAYOUTS if k in layouts)
    return scenes


# ------------------------------------------------------------------------- one scene


def square_around(view: View, width: float, height: float, size: int):
    """The largest square around the principal point of a view's width x height picture.

    Returns its box (left, top, right, bottom), and the focal lengths (x, y) once it has size x
    size pixels. Errors: ValueError for a picture of another shape, and impossible numbers.
    """
    if not all(v is None or 0 < v < 1e9 for v in (view.fx, view.fy, view.w, view.h)):
        raise ValueError("fl_x, fl_y, w and h must be above 0; correct them or leave them out")
    sx = width / (view.w or width)
    sy = height / view.h if view.h else sx
    if not 0.97 < sx / sy < 1.03:
        raise ValueError(f"{width} x {height} pixels, but its camera has {view.w:g} x {view.h:g}; "
                         "turn or crop it to the camera's shape")
    cx = width / 2 if view.cx is None else view.cx * sx
    cy = height / 2 if view.cy is None else view.cy * sy
    half = min(cx, width - cx, cy, height - cy)
    if not half > 0.05 * min(width, height):
        raise ValueError(f"principal point ({cx:g}, {cy:g}) is near or outside the edge of {width} "
                         f"x {height} pixels; correct cx, cy, w, h")
    box = max(cx - half, 0), max(cy - half, 0), min(cx + half, width), min(cy + half, height)
    fx = view.fx * sx
    fy = fx if view.fy is None else view.fy * sy
    return box, (fx * size / (2 * half), fy * size / (2 * half))


def stack_poses(views: list[View]) -> np.ndarray:
    """Checked poses (V, 3, 4). Errors: ValueError for no rotations, and too few or many views."""
    if not 0 < len(views) <= MOST_VIEWS:
        raise ValueError(f"no views (frames), or more than {MOST_VIEWS:,}; give some of them")
    poses = np.stack([view.pose[:3] for view in views])
    if poses.shape[1:] != (3, 4):
        raise ValueError(f"poses of shape {poses.shape[1:]}; give 3 x 4 or 4 x 4 matrices")
    if not (np.abs(poses) < 1e9).all():
        raise ValueError("a camera is 10^9 or more away, or nowhere; correct its pose")
    r = poses[:, :, :3]
    off = np.abs(r @ r.swapaxes(1, 2) - np.eye(3)).max((1, 2)) + np.abs(np.linalg.det(r) - 1)
    if not (off < 1e-3).all():
        raise ValueError(f"the pose of view {np.argmax(off >= 1e-3)} is not a rotation; remove "
                         "scale and reflection from it")
    return poses


def find_centre(poses: np.ndarray) -> tuple[np.ndarray, float]:
    """The point nearest to all optical axes of poses (V, 3, 4), and the scale to a distance of 4.

    The origin and 1 for cameras that conform. Errors: ValueError if they do not face one point.
    """
    back, eyes = poses[:, :, 2], poses[:, :, 3]
    depth = (eyes * back).sum(1, keepdims=True)  # least squares: sum of (I - back back^T)
    across = len(poses) * np.eye(3) - back.T @ back
    origin = np.linalg.pinv(across, 1e-6) @ (eyes - depth * back).sum(0)
    radius = np.linalg.norm(eyes - origin, axis=1).mean()
    if len(poses) > 1 and np.ptp(eyes, axis=0).max() < 1e-4 * np.abs(eyes).max():
        raise ValueError("all cameras stand in one place; poses must be camera-to-world: invert "
                         "world-to-camera ones")
    if not np.median(depth[:, 0] - back @ origin) > 1e-6 * radius:
        raise ValueError("the cameras do not face a common point; give pictures from around an "
                         "object, with camera-to-world poses of OpenGL axes")
    if np.linalg.norm(origin) < 0.2 and abs(radius - RADIUS) < 0.4:
        return np.zeros(3), 1.0
    return origin, RADIUS / radius


def background(images: Tensor) -> str:
    """A note if most pixels at the border of views (V, 3, S, S) are not white, else ""."""
    border = torch.cat((images[..., [0, -1]].flatten(2), images[..., [0, -1], :].flatten(2)), 2)
    return "" if border.amin(1).median() > 230 else (
        "the background is not white, as it is in training: cut the object out")


def read_scene(tree: Tree, name: str, size: int, max_views: int = 0, sphere=False) -> Scene:
    """The scene in the folder `name` of a tree ("" for its root), in any layout.

    size: pixels a side of its images; transparency becomes white. max_views: only the first so
    many are read, 0 for all. sphere: what wide-angle views show is shrunk into the unit sphere.
    Errors: ValueError that names file, rule and remedy; OSError.
    """
    found = find_scenes(tree, name)
    if name not in found:
        raise ValueError(f"{tree.path}: no scene in {name or 'it'} ({', '.join(LAYOUTS)}); "
                         f"choose a folder with one{''.join(f', as {n}' for n in [*found][:1])}")
    layout, markers = found[name]
    reader = LAYOUTS[layout][1]
    with naming(markers[0], reader.__doc__):
        views = list(islice(reader(tree, name, markers), MOST_VIEWS + 1))
        poses = stack_poses(views)
        origin, scale = find_centre(poses)
        files = [find_picture(tree, name, view.file) for view in views]
    images, focals, cropped = [], [], 0
    for view, file in zip(views[: max_views or None], files):
        with naming(file):
            picture = load_picture(tree.read(file), upright=False)
            box, focal = square_around(view, *picture.size, size)
        cropped += box[2] - box[0] < max(picture.size) - 1
        square = picture.resize((size, size), Image.Resampling.BILINEAR, box)
        images.append(to_tensor(np.array(square)))
        focals.append(focal)
    notes = [f"{cropped} views cropped to squares around the principal point"] * (cropped > 0)
    if scale != 1 or origin.any():
        notes.append("recentred on ({:.3g}, {:.3g}, {:.3g})".format(*origin)
                     + f" and scaled by {scale:.4g} to a mean camera distance of {RADIUS:g}")
    eyes, images, focals = poses[:, :, 3] - origin, torch.stack(images), torch.tensor(focals)
    reach = scale * np.linalg.norm(eyes, axis=1).mean() * size / 2 / float(focals.mean())
    if sphere and reach > 1.1 * REACH:
        scale *= REACH / reach
        notes.append(f"scaled by {REACH / reach:.3g}, so that the unit sphere holds what is seen")
    poses[..., 3] = eyes * scale
    sides = np.abs(poses[:, :, 1].mean(0))  # of the cameras' up
    if len(poses) > 3 and sides[:2].max() > 2 * sides[2]:
        notes.append("the world's z is not up, as it is in training: turn the poses")
    notes += filter(None, [background(images)])
    return Scene(images, torch.from_numpy(poses[: len(images)]).float(), focals, "; ".join(notes),
                 tuple(origin.tolist()), scale)


def find_scene(source) -> tuple[Tree, str]:
    """The tree and folder of one scene; `set.zip/class/id` is a folder within a zip.

    A transforms.json or COLMAP's sparse/0 stands for the folder that it is in, and a folder for the
    only scene below it.
    """
    whole = Path(source).absolute().as_posix()
    source = Path(re.sub(r"/([^/]*\.json|sparse(/0)?)$", "", whole))
    path = next((p for p in (source, *source.parents) if p.is_file()), source)  # a zip
    tree, name = Tree(path), "/".join(source.relative_to(path).parts)
    found = [*find_scenes(tree, name)]
    return tree, found[0] if len(found) == 1 else name


def spread_views(poses, n: int) -> list[int]:
    """n of the cameras (V, 3, 4): the first one, then always the farthest from those chosen."""
    apart = torch.cdist(poses[..., 3], poses[..., 3])  # (V, V)
    chosen = [0]
    while len(chosen) < n:
        nearest = apart[chosen].amin(0)
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen


def photo_scene(path, size: int, angle: float = 0.52) -> Scene:
    """One photo of an object, on white or transparent, as seen by a default camera.

    It stands in front of it (at -y), 20 degrees above the horizon, 4 from the origin, and looks
    there with a field of view of `angle` rad. A photo is padded with white to a square.
    """
    with naming(path):
        photo = load_picture(Path(path).read_bytes())
        photo = ImageOps.pad(photo, (size, size), Image.Resampling.BILINEAR, "white")
    focal = size * angle_to_focal(angle)
    s, c = math.sin(math.radians(20)), math.cos(math.radians(20))
    pose = torch.tensor([[1, 0, 0, 0], [0, s, -c, -RADIUS * c], [0, c, s, RADIUS * s]])
    view = to_tensor(np.array(photo))[None]
    return Scene(view, pose[None], torch.tensor([[focal, focal]]), background(view))


def read_cameras(path, size: int, scene: Scene | None = None) -> tuple[Tensor, Tensor]:
    """The cameras of a transforms.json, whose pictures need not exist.

    Returns poses (F, 3, 4) and focals (F, 2) in pixels of size x size pictures, both float32.
    scene: they are moved and scaled as this scene was. Errors: ValueError.
    """
    data, focals = Path(path).read_bytes(), []
    with naming(path, f"{read_transforms.__doc__}, w, h"):
        views = list(islice(parse_transforms(data), MOST_VIEWS + 1))
        poses = stack_poses(views)
        for v in views:
            width = v.w or 2 * (v.cx or 0)
            height = v.h or 2 * (v.cy or 0) or width
            if not width:
                raise ValueError("fl_x without w and h; add them")
            focals.append(square_around(v, width, height, size)[1])
    if scene:
        poses[..., 3] = (poses[..., 3] - scene.origin) * scene.scale
    return torch.from_numpy(poses).float(), torch.tensor(focals)


# ------------------------------------------------------------------------- sets of scenes


def class_splits(tree: Tree, folder: str) -> tuple[str, dict[str, str]]:
    """The `_splits.json` of the class in a folder: its name, and {folder of a scene: split}.

    That is any file in the folder, or the one of the class's name beside it (cars and
    car_splits.json), for the root of a tree too. "" and {} without one. Errors: ValueError.
    """
    above, label = posixpath.split(folder) if folder else ("..", tree.path.absolute().stem)
    inside = [n for n in names_in(tree, folder) if n.endswith("_splits.json")
              and posixpath.dirname(n) == folder]
    beside = [posixpath.join(above, f"{label.removesuffix(end)}_splits.json")
              for end in ("", "s", "es")]
    for name in inside + beside:
        outside = tree.path.absolute().parent / name.removeprefix("../")
        if name in tree.stored:
            data = tree.read(name)
        elif not folder and outside.is_file():
            data = outside.read_bytes()
        else:
            continue
        with naming(name, 'lists of folders by split, as {"train": [...], "test": [...]}'):
            splits = json.loads(data)
            return name, {str(i): split for split in SPLITS for i in splits.get(split) or ()}
    return "", {}


def split_scenes(tree: Tree, scenes: list[str], split: str) -> tuple[list[str], str]:
    """The scenes of a split, sorted, and in words how the set is divided.

    By the file of their class; else by folders train, val, test or <class>_train, ...; else by a
    hash of the name, 80/10/10. One scene is in every split.
    """
    if len(scenes) == 1:
        return scenes, "one scene, in every split"
    groups, rules = {}, {}  # {(split file, class): {name with its split's folder: scene}}
    files = {f: class_splits(tree, f) for f in sorted({*map(posixpath.dirname, scenes)})}
    for scene in scenes:
        folder, name = posixpath.split(scene)
        (file, splits), match = files[folder], SPLIT_FOLDER.search(scene)
        if not file:
            name = f"{match[2]}/{scene}" if match else scene
            groups.setdefault(("", match and scene[: match.start()]), {})[name] = scene
        elif name in splits:
            groups.setdefault((file, folder), {})[f"{splits[name]}/{name}"] = scene
    chosen = []
    for (file, _), group in groups.items():
        names, rule = split_names(list(group), split)
        if not names and split == "train":  # too few to spare one for val
            names, _ = split_names(list(group), "val")
        chosen += [group[n] for n in names]
        rules.setdefault(rule, []).append(file)
    return sorted(chosen), "; ".join(f"{', '.join(f)}: {r}".lstrip(": ") for r, f in rules.items())


class SceneSet:
    """Objects of one split seen from posed views, in memory.

    path: a folder or zip of scenes in any layout; None: the bundled furniture. size: pixels a
    side, S. min_views: scenes with fewer are left out. max_views: only the first so many views
    of each are kept, and limit: only the first scenes; 0 for all. sphere: see read_scene.
    Errors: ValueError, OSError.
    Of N scenes: `names`, `labels` (the class, "all" without one), `counts` (N,) of views and
    `first` (N,), where they begin in `images` (sum V, 3, S, S) uint8, `poses` (sum V, 3, 4) and
    `focals` (sum V, 2); `source`, one line on what was read.
    """

    def __init__(self, path=None, split: str = "train", size: int = 64, min_views: int = 2,
                 max_views: int = 0, limit: int = 0, sphere=False):
        tree = Tree(path or Path(__file__).parent / "furniture.zip")
        found = find_scenes(tree)
        chosen, rule = split_scenes(tree, list(found), split) if found else ([], "")
        if not chosen:
            raise ValueError(f"{tree.path}: no scene ({', '.join(LAYOUTS)}) for the {split} split")

        def read(name):
            scene = read_scene(tree, name, size, max_views, sphere)
            if len(scene.images) < min_views:
                raise ValueError(f"{name}: {len(scene.images)} views; at least {min_views} are "
                                 "needed")
            return name, scene

        names, scenes = zip(*read_all(chosen[: limit or None], read, "scenes"))
        self.names = list(names)
        plain = [SPLIT_FOLDER.sub("/", name).strip("/") for name in names]
        self.labels = [name.split("/")[0] if "/" in name else "all" for name in plain]
        self.images, self.poses, self.focals = (torch.cat(x) for x in list(zip(*scenes))[:3])
        self.counts = torch.tensor([len(scene.images) for scene in scenes])
        self.first = self.counts.cumsum(0) - self.counts
        notes = [scene.note for scene in scenes if scene.note]
        layouts = ", ".join(sorted({found[name][0] for name in names}))
        self.source = (f"{tree.path}: {len(names)} scenes ({layouts}) with {len(self.images)} "
                       f"views, {split} split ({rule})")
        if notes:
            self.source += f"; a note on {len(notes)} of them, the first: {notes[0]}"

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i: int) -> Scene:
        own = slice(int(self.first[i]), int(self.first[i] + self.counts[i]))
        return Scene(self.images[own], self.poses[own], self.focals[own])
