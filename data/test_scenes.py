"""Tests of data/scenes.py: one object written in every layout, and read back."""

import io
import json
import math
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image


from data import images, scenes

ANGLE = math.radians(49.1)  # zero123's; all layouts take it here
FLIP = np.diag([1.0, -1, -1, 1])
BLANK = np.zeros((6, 8, 8, 4), np.uint8)
LAYOUTS = ["learnit", "basename", "blender", "nerfstudio", "ngp", "per frame", "backslash", "3 x 4",
           "absolute", "half size", "colmap txt", "colmap bin", "srn", "zero123"]


def cameras(count=6, seed=0):
    """Camera-to-world OpenGL poses (V, 4, 4) in pairs on opposite sides, 4 from the origin."""
    eyes = torch.randn(count // 2, 3, generator=torch.Generator().manual_seed(seed)).double()
    back = torch.nn.functional.normalize(torch.cat((eyes, -eyes)), dim=1).numpy()
    right = np.cross([0, 0, 1], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    poses = np.tile(np.eye(4), (len(back), 1, 1))
    poses[:, :3] = np.stack((right, np.cross(back, right), back, 4 * back), 2)
    return poses


def render(pose, fx, fy, cx, cy, width, height):
    """A smooth ball of radius 1 at the origin, (H, W, 4) uint8, by each pixel's ray."""
    y, x = np.mgrid[:height, :width] + 0.5
    d = np.stack(((x - cx) / fx, -(y - cy) / fy, -np.ones_like(x)), -1) @ pose[:3, :3].T
    near = np.linalg.norm(np.cross(pose[:3, 3], d), axis=-1) / np.linalg.norm(d, axis=-1)
    d = np.concatenate((0.5 + 0.15 * d, np.clip(1.2 - near, 0, 1)[..., None]), -1)
    return (255 * d.clip(0, 1)).round().astype(np.uint8)


def on_white(rgba):
    white = Image.new("RGBA", rgba.shape[1::-1], "white")
    picture = Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB")
    return np.asarray(picture).transpose(2, 0, 1)


def quaternion(r):
    """A rotation matrix -> (w, x, y, z), as the eigenvector of Bar-Itzhack's matrix."""
    (a, b, c), (d, e, f), (g, h, i) = r
    k = np.array([[a - e - i, d + b, g + c, h - f], [d + b, e - a - i, h + f, c - g],
                  [g + c, h + f, i - a - e, d - b], [h - f, c - g, d - b, a + e + i]])
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]
    return w, x, y, z


def write(folder, layout, poses, rgba):
    """The scene in one layout; poses (V, 4, 4), pictures (V, S, S, 4) of the field ANGLE."""
    size = rgba.shape[1]
    focal, mid = size / 2 / math.tan(ANGLE / 2), size / 2
    place = {"blender": "train/r_{}", "colmap txt": "images/im {}", "colmap bin": "images/im {}",
             "srn": "rgb/{:06d}", "zero123": "{:03d}", "basename": "r_{}"}
    files = [place.get(layout, "images/{:04d}").format(i) + ".png" for i in range(len(poses))]
    for file, pixels in zip(files, rgba):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / file)
    if layout.startswith("colmap"):
        write_colmap(folder, poses, [f.split("/")[1] for f in files], focal, size, layout[-3:])
    elif layout == "srn":
        (folder / "pose").mkdir()
        (folder / "intrinsics.txt").write_text(f"{focal} {mid} {mid} 0.\n0 0 0\n1\n{size} {size}")
        for i, pose in enumerate(poses):
            np.savetxt(folder / f"pose/{i:06d}.txt", (pose @ FLIP).reshape(1, 16))
    elif layout == "zero123":
        for i, pose in enumerate(poses):
            np.save(folder / f"{i:03d}.npy", np.linalg.inv(pose)[:3])
    else:
        write_transforms(folder, layout, poses, files, dict(
            fl_x=focal, fl_y=focal, cx=mid, cy=mid, w=size, h=size))
    return folder


def write_transforms(folder, layout, poses, files, own):
    views = [dict(file_path=f, transform_matrix=p.tolist()) for f, p in zip(files, poses)]
    change = {"backslash": lambda v: v | dict(file_path=v["file_path"].replace("/", "\\")),
              "3 x 4": lambda v: v | dict(transform_matrix=v["transform_matrix"][:3]),
              "absolute": lambda v: v | dict(file_path="/home/a/b/" + v["file_path"]),
              "basename": lambda v: v | dict(file_path="chairs/x/" + v["file_path"]),
              "blender": lambda v: v | dict(file_path="./" + v["file_path"][:-4]),
              "per frame": lambda v: v | own}.get(layout, lambda v: v)
    meta = {"nerfstudio": own | dict(k1=0, p1=0.0, camera_model="OPENCV"),
            "per frame": dict(fl_x=1, w=9, camera_angle_x=1),
            "half size": {k: 2 * v for k, v in own.items()},
            "ngp": own | dict(camera_angle_x=1, aabb_scale=4, scale=0.3, offset=[1, 2, 3]),
            }.get(layout, dict(camera_angle_x=ANGLE))
    parts = {"_train": slice(4), "_val": slice(0), "_test": slice(4, None)}
    for end, part in parts.items() if layout == "blender" else [("", slice(None))]:
        text = json.dumps(meta | dict(frames=[change(v) for v in views[part]]))
        (folder / f"transforms{end}.json").write_text(text)


def write_colmap(folder, poses, names, focal, size, kind):
    (folder / "sparse/0").mkdir(parents=True)
    rows, middle = [], (size / 2, size / 2)
    for i, pose in reversed([*enumerate(poses)]):  # the files are in no order
        world = np.linalg.inv(pose @ FLIP)
        rows.append((i + 1, *quaternion(world[:3, :3]), *world[:3, 3], 7, names[i]))
    if kind == "txt":
        cameras = " ".join(map(str, (7, "SIMPLE_RADIAL", size, size, focal, *middle, 0)))
        images = "\n".join(" ".join(map(str, row)) + ("\n1.0 2.0 -1" if row[0] % 2 else "\n")
                           for row in rows)
        cameras, images = (f"# list\n{text}\n".encode() for text in (cameras, images))
    else:
        cameras = struct.pack("<QIiQQ4d", 1, 7, 1, size, size, focal, focal, *middle)
        images = struct.pack("<Q", len(rows)) + b"".join(
            struct.pack("<I7dI", *row[:-1]) + row[-1].encode() + b"\0"
            + struct.pack("<QddqddQ", 2, 1, 2, -1, 3, 4, 5) for row in rows)
    (folder / f"sparse/0/cameras.{kind}").write_bytes(cameras)
    (folder / f"sparse/0/images.{kind}").write_bytes(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_object_is_the_same_in_every_layout(layout, tmp_path):
    """Where it conforms, and where it stands elsewhere and is smaller; folder and zip."""
    poses, size = cameras(), 24
    focal = size / 2 / math.tan(ANGLE / 2)
    rgba = np.stack([render(p, focal, focal, size / 2, size / 2, size, size) for p in poses])
    moved = poses.copy()
    moved[:, :3, 3] = 0.3 * poses[:, :3, 3] + [5, -2, 1]
    write(tmp_path / "set/still", layout, poses, rgba)
    write(tmp_path / "set/moved", layout, moved, rgba)
    packed = shutil.make_archive(tmp_path / "set", "zip", tmp_path / "set")
    for root, name in ((tmp_path / "set", "still"), (packed, "moved")):
        tree = images.Tree(root)
        assert list(scenes.find_scenes(tree)) == ["moved", "still"]
        scene = scenes.read_scene(tree, name, size)
        np.testing.assert_array_equal(scene.images, np.stack([on_white(p) for p in rgba]))
        np.testing.assert_allclose(scene.poses, poses[:, :3], atol=1e-4)
        np.testing.assert_allclose(scene.focals, focal, atol=1e-4)
        assert ("recentred on (5, -2, 1)" in scene.note) == (name == "moved"), scene.note
        assert scenes.read_scene(tree, name, 12, max_views=2).images.shape == (2, 3, 12, 12)


def test_conforming_cameras_are_left_bit_for_bit(tmp_path):
    poses = cameras() + np.pad(np.full((3, 1), 0.01), ((0, 1), (3, 0)))
    write(tmp_path / "a", "learnit", poses, BLANK)
    scene = scenes.read_scene(images.Tree(tmp_path), "a", 8)
    assert np.array_equal(scene.poses, poses[:, :3].astype(np.float32)) and not scene.note


@pytest.mark.parametrize("cx, cy, fx, fy", [(41, 26, 90, 110), (30, 60.5, 70, 70)])
def test_a_principal_point_off_the_middle_is_cropped_to(cx, cy, fx, fy, tmp_path):
    """The picture of 80 x 100 becomes what a camera with a centred one would see."""
    poses, size = cameras(2), 32
    write(tmp_path / "a", "nerfstudio", poses, np.zeros((2, 8, 8, 4), np.uint8))
    for i, pose in enumerate(poses):
        Image.fromarray(render(pose, fx, fy, cx, cy, 80, 100)).save(
            tmp_path / f"a/images/{i:04d}.png")
    file = tmp_path / "a/transforms.json"
    meta = json.loads(file.read_text()) | dict(cx=cx, cy=cy, fl_x=fx, fl_y=fy, w=80, h=100)
    file.write_text(json.dumps(meta))
    scene = scenes.read_scene(images.Tree(tmp_path), "a", size)
    for pose, pixels, (f, g) in zip(poses, scene.images, scene.focals.numpy()):
        want = on_white(render(pose, f, g, size / 2, size / 2, size, size))
        assert np.abs(pixels.numpy().astype(float) - want).mean() < 1.5
    assert "cropped" in scene.note
    torch.testing.assert_close(scenes.read_cameras(file, size), (scene.poses, scene.focals))


def change(folder, **given):
    """The scene in a folder with other keys in its transforms.json; frame: in the first frame."""
    file = folder / "transforms.json"
    meta = json.loads(file.read_text())
    meta["frames"][0] |= given.pop("frame", {})
    file.write_text(json.dumps(meta | given))


@pytest.mark.parametrize("given, words", [
    (dict(camera_angle_x="wide"), "wide"),
    (dict(camera_angle_x=4), "must be in"),
    (dict(frames=[]), "no views"),
    (dict(frames=3), "malformed.*frames of file_path"),
    (dict(k1=0.1), "no pinhole.*undistort"),
    (dict(frame=dict(p2=-0.1)), "undistort"),
    (dict(camera_model="OPENCV_FISHEYE"), "OPENCV_FISHEYE.*undistort"),
    (dict(is_fisheye=True), "undistort"),
    (dict(rolling_shutter=[0, 0, 1, 0]), "global shutter"),
    (dict(frame=dict(file_path="gone.png")), "gone.png.*absent.*remove"),
    (dict(frame=dict(transform_matrix=(2 * np.eye(4)).tolist())), "not a rotation"),
    (dict(frame=dict(transform_matrix=[[1, 2], [3, 4]])), "shape"),
    (dict(frame=dict(transform_matrix=[[math.nan] * 4] * 4)), "nowhere"),
    (dict(fl_x=-3.0, w=8, h=8), "above 0"),
    (dict(fl_x=9.0, h=8, cx=9.0), "principal point"),
    (dict(fl_x=9.0, w=8, h=16), "8 x 8 pixels, but its camera has 8 x 16"),
    (dict(fl_x=9.0, w=8, h=8, cx=9.0), "principal point"),
])
def test_what_cannot_be_used_is_refused_in_words(given, words, tmp_path):
    write(tmp_path / "s", "learnit", cameras(), BLANK)
    change(tmp_path / "s", **given)
    with pytest.raises(ValueError, match=f"s/.*{words}"):
        scenes.read_scene(images.Tree(tmp_path), "s", 8)


def test_cameras_that_look_away_are_refused(tmp_path):
    write(tmp_path / "s", "learnit", cameras() @ FLIP, BLANK)
    with pytest.raises(ValueError, match="do not face a common point"):
        scenes.read_scene(images.Tree(tmp_path), "s", 8)


def many(root, names, layout="learnit"):
    for i, name in enumerate(names):
        rgba = np.full((4, 8, 8, 4), i, np.uint8)
        write(root / name, layout, cameras(4, i), rgba)


def splits(root, **given):
    sets = {s: scenes.SceneSet(root, s, 8, **given) for s in ("train", "val", "test")}
    return {s: set(x.names) for s, x in sets.items()}, sets


def test_each_class_has_its_own_split_file(tmp_path):
    """Ids that two classes share are not mixed; a class alone finds the file beside it."""
    many(tmp_path, [f"{c}/{i}" for c in ("cars", "boxes") for i in "abcdefghijkl"])
    (tmp_path / "cars/empty").mkdir()
    for name, train, test in (("car", "abcdefghijkx", "l"), ("box", "bcdefghijkl", "a")):
        split = dict(train=list(train), val=[], test=list(test))
        (tmp_path / f"{name}_splits.json").write_text(json.dumps(split))
        (tmp_path / f"._{name}_splits.json").write_bytes(b"\0\5\x16\7")
    names, sets = splits(tmp_path)
    assert names["test"] == {"cars/l", "boxes/a"} and len(names["val"]) == 4
    assert len(names["train"] | names["val"] | names["test"]) == 24 == sum(map(len, sets.values()))
    assert sorted(set(sets["train"].labels)) == ["boxes", "cars"]
    for split, alone in splits(tmp_path / "cars")[0].items():
        assert {f"cars/{name}" for name in alone} == {n for n in names[split] if n[0] == "c"}
    data = sets["train"]
    assert data.first.tolist() == [4 * i for i in range(18)] and data.counts.tolist() == [4] * 18
    assert "car_splits.json" in data.source and "\n" not in data.source


def test_folders_and_hashes_split_too(tmp_path):
    many(tmp_path / "srn", [f"cars_{s}/{i}" for s in ("train", "val", "test") for i in "ab"], "srn")
    names, sets = splits(tmp_path / "srn")
    assert names == {s: {f"cars_{s}/{i}" for i in "ab"} for s in names}
    assert sets["val"].labels == ["cars", "cars"]
    many(tmp_path / "hash", [f"{i:02d}" for i in range(30)])
    names, sets = splits(tmp_path / "hash")
    assert [len(names[s]) for s in ("train", "val", "test")] == [24, 3, 3]
    assert len(set.union(*names.values())) == 30 and set(sets["test"].labels) == {"all"}
    many(tmp_path / "two", "ab")
    assert all(names := splits(tmp_path / "two")[0].values()) and len(set.union(*names)) == 2
    many(tmp_path / "one", ["lego"], "blender")
    assert splits(tmp_path / "one")[0] == dict.fromkeys(("train", "val", "test"), {"lego"})
    assert splits(tmp_path / "one/lego")[0]["val"] == {""}


def test_unreadable_scenes_are_named_and_left_out(tmp_path, capsys):
    many(tmp_path / "set/train", "abcdef"), many(tmp_path / "set/test", "e")
    for name in "ab":  # one of them may be in val
        change(tmp_path / "set/train" / name, frames=[])
    data = scenes.SceneSet(tmp_path / "set", "train", 8, max_views=3)
    assert not {"train/a", "train/b"} & set(data.names) and set(data.counts.tolist()) == {3}
    assert len(data.images) == 3 * len(data) and "left out: train/" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least 5 are needed"):
        scenes.SceneSet(tmp_path / "set", "test", 8, min_views=5)
    with pytest.raises(ValueError, match="no scene"):
        scenes.SceneSet(tmp_path / "set/test/e/images")


def test_nerfstudios_colmap_folder_is_no_scene_of_its_own(tmp_path):
    write(tmp_path / "a", "nerfstudio", cameras(), BLANK)
    write_colmap(tmp_path / "a/colmap", cameras(), "abcdef", 9, 8, "bin")
    assert list(scenes.find_scenes(images.Tree(tmp_path))) == ["a"]
    assert list(scenes.find_scenes(images.Tree(tmp_path / "a"))) == [""]


def test_a_scene_is_found_by_folder_file_and_within_a_zip(tmp_path):
    many(tmp_path / "set/cars", "ab")
    shutil.make_archive(tmp_path / "set", "zip", tmp_path / "set")
    for source, name in (("set/cars/a", ""), ("set/cars/a/transforms.json", ""),
                         ("set.zip/cars/b", "cars/b")):
        tree, found = scenes.find_scene(tmp_path / source)
        assert found == name and len(scenes.read_scene(tree, found, 8).images) == 4
    with pytest.raises(ValueError, match="no such folder"):
        scenes.find_scene("/absent/scene")
    with pytest.raises(ValueError, match="no scene in cars.*as cars/a"):
        scenes.read_scene(*scenes.find_scene(tmp_path / "set.zip/cars"), 8)


def test_a_bare_photo_has_the_default_camera(tmp_path):
    rgba = np.zeros((20, 10, 4), np.uint8)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "x.png")
    scene = scenes.photo_scene(tmp_path / "x.png", 40, 0.6)
    eye = 4 * np.array([0, -math.cos(math.pi / 9), math.sin(math.pi / 9)])
    np.testing.assert_allclose(scene.poses[0, :, 3], eye, atol=1e-6)
    np.testing.assert_allclose(scene.poses[0, :, 2], eye / 4, atol=1e-6)
    np.testing.assert_allclose(scene.poses[0, :, 0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(scene.poses[0, :, :3]), 1, atol=1e-6)
    np.testing.assert_allclose(scene.focals, 20 / math.tan(0.3), rtol=1e-6)
    assert scene.images[0, 0, 20].tolist()[::13] == [255, 0, 0, 255]  # padded, not cropped


def test_cameras_follow_the_scene_that_was_moved(tmp_path):
    poses = cameras()
    poses[:, :3, 3] = 0.5 * poses[:, :3, 3] + [1, 2, 3]
    write(tmp_path, "learnit", poses, BLANK)
    scene = scenes.read_scene(images.Tree(tmp_path), "", 8)
    got, focals = scenes.read_cameras(tmp_path / "transforms.json", 8, scene)
    torch.testing.assert_close((got, focals), (scene.poses, scene.focals))
    got, _ = scenes.read_cameras(tmp_path / "transforms.json", 8)
    np.testing.assert_allclose(got, poses[:, :3], atol=1e-6)


HOSTILE = {"learnit": "transforms.json", "nerfstudio": "transforms.json", "zero123": "002.npy",
           "srn": "pose/000001.txt", "srn ": "intrinsics.txt", "colmap txt": "sparse/0/images.txt",
           "colmap txt ": "sparse/0/cameras.txt", "colmap bin": "sparse/0/images.bin",
           "colmap bin ": "sparse/0/cameras.bin"}


@pytest.mark.parametrize("layout", HOSTILE)
def test_damaged_scenes_are_read_or_refused(layout, tmp_path, examples=80):
    file = tmp_path / HOSTILE[layout]
    write(tmp_path, layout.strip(), cameras(), BLANK)
    good, tree, refused = file.read_bytes(), images.Tree(tmp_path), 0
    bits = st.lists(st.tuples(st.integers(0, len(good) - 1), st.binary(max_size=9),
                              st.sampled_from((0, 1, 8, 10**6))), min_size=1, max_size=4)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(bits)
    def check(edits):
        nonlocal refused
        data, start = good, time.monotonic()
        for at, new, removed in edits:
            data = data[:at] + new + data[at + removed:]
        file.write_bytes(data)
        try:
            scenes.read_scene(tree, "", 8)
        except (ValueError, OSError) as e:
            assert str(e)
            refused += 1
        assert time.monotonic() - start < 5

    check()
    assert refused


def test_files_that_claim_more_than_they_hold_are_refused(tmp_path):
    write(tmp_path / "c", "colmap bin", cameras(), BLANK)
    (tmp_path / "c/sparse/0/images.bin").write_bytes(b"\xff" * 300)
    write(tmp_path / "z", "zero123", cameras(), BLANK)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, dict(descr="<f8", fortran_order=False, shape=(10**6, 10**6)))
    (tmp_path / "z/003.npy").write_bytes(file.getvalue())
    write(tmp_path / "j", "learnit", cameras(), BLANK)
    frame = json.loads((tmp_path / "j/transforms.json").read_text())["frames"][0]
    change(tmp_path / "j", frames=[frame] * 5000)
    write(tmp_path / "n", "learnit", cameras(), BLANK)
    (tmp_path / "n/transforms.json").write_text("[" * 10**6)
    for name in "czjn":
        with pytest.raises(ValueError, match=f"{name}/"):
            scenes.read_scene(images.Tree(tmp_path), name, 8)
