"""Tests of the readers in this folder: pictures, scenes, curves and tables; no models."""

import gc
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from datetime import datetime
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from data import curves, images, scenes, tables
from data.testing import (ANGLE, BLANK, FLIP, SPLITS, TURNED, ball_views, camera, check_damaged,
                          close, draw_ball, noisy, opposite_cameras, photos, rand, refused,
                          write_layout)

HERE = Path(__file__).parent


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------- pictures


def decode(data, *args):
    """A picture's pixels, (H, W, 3) uint8, as they are or resized."""
    image = images.load_picture(data)
    return images.resized(image, *args) if args else np.array(image)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_folders_and_zips_list_the_same_files_and_none_of_the_systems(tmp_path):
    root, names = tmp_path / "set", ["a/b.png", "a/c.png", "z.png"]
    system = [".git/x.png", "__MACOSX/a/._b.png", "a/.DS_Store", "Thumbs.db"]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for name in names + system:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
            z.writestr("./" + name.replace("/", "\\"), name)
    for path in (root, tmp_path / "set.zip"):
        tree = pickle.loads(pickle.dumps(images.Tree(path)))
        assert [(n, tree.read(n).decode()) for n in tree.names] == [(n, n) for n in names]
    (root / "near").symlink_to(photos(tmp_path / "far", 1))
    (root / "loop").symlink_to(root)  # followed, but not without end
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png")).touch()
    assert images.Tree(root).names == [*names[:2], "caf\udce9.png", "near/p0.png", "z.png"]
    path.write_bytes(path.read_bytes()[:-40])
    refused("truncated", images.Tree, path)


@pytest.mark.parametrize("width, height", [(60, 40), (40, 61)])
def test_a_centre_crop_is_the_crop_of_the_resized_picture(width, height):
    photo, x, y = noisy(height, width), (width - 40) // 2, (height - 40) // 2
    square = photo.crop((x, y, x + 40, y + 40)).resize((20, 20), Image.Resampling.BILINEAR)
    off = np.int64(decode(encoded(photo), 20)) - np.int64(square)
    assert np.abs(off[3:-3, 3:-3]).max() <= 1  # at its edge the crop of a resized one sees more
    assert (decode(encoded(photo), 40, "short") == photo).all()


def test_every_mode_and_orientation_is_read_as_upright_rgb_on_white():
    for mode, color, expected, kind in (
            ("1", 1, 255, "PNG"), ("L", 90, 90, "PNG"), ("LA", (0, 0), 255, "PNG"),
            ("RGBA", (0, 0, 0, 128), 127, "PNG"), ("I;16", 50000, 195, "PNG"),
            ("F", 0.5, 128, "TIFF"), ("CMYK", (0,) * 4, 255, "TIFF"), ("I", 50000, 195, "TIFF"),
            ("I", -1, 0, "TIFF"), ("LAB", (255, 128, 128), 255, "TIFF")):
        pixels = decode(encoded(Image.new(mode, (8, 8), color), kind))
        assert pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - expected).max() <= 1, mode
    for depth, kind, row, key, expected in (  # PNGs of one row of two pixels, and a color as none
            (16, 0, "9C409C41", "9C40", [255, 156]), (4, 0, "70", "0007", [255, 0]),
            (2, 0, "90", "0002", [255, 85]), (16, 2, "010002000300" + 6 * "00",
                                              "010002000300", [255, 0])):
        chunks = (b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)), (
            b"tRNS", bytes.fromhex(key)), (b"IDAT", zlib.compress(bytes.fromhex("00" + row)))
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(v)) + name + v + struct.pack(">I", zlib.crc32(name + v))
            for name, v in (*chunks, (b"IEND", b"")))
        assert decode(data)[0].tolist() == [[v] * 3 for v in expected], (depth, kind)
    turned = decode(encoded(noisy(10, 20), exif=TURNED))
    assert (turned == np.rot90(noisy(10, 20), -1)).all()


def test_odd_pictures_are_read_or_refused_in_words(tmp_path, capsys):
    """A long text and a missing end do not hinder; too few and too many pixels do."""
    info, whole = PngImagePlugin.PngInfo(), encoded(noisy(64, 64), "JPEG")
    info.add_text("note", "x" * 3_000_000, zip=True)
    assert (decode(encoded(noisy(8, 8), pnginfo=info)) == noisy(8, 8)).all()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    cut, shape = images.read_photo(tmp_path / "cut.jpg", 64)
    assert "cut.jpg ends early" in capsys.readouterr().err and shape == (64, 64)
    assert (cut.movedim(0, 2)[:24].numpy() == decode(whole)[:24]).all()
    for size, read, words in (
            ((7, 5), lambda data: images.load_picture(data, 8), "7 x 5 pixels are fewer than"),
            ((4, 700_000), lambda data: decode(data, 64), "too long a strip: 64 x 11200000"),
            ((20000, 20000), decode, "20000 x 20000 pixels|exceeds limit")):
        refused(words, read, encoded(Image.new("1", size), "TIFF", compression="group4"))


def test_pictures_are_split_by_folder_by_celebas_ids_or_by_hash():
    split = lambda names: [images.split_names(names, s)[0] for s in SPLITS]
    for folders, sources, n_val in (
            ("Training validation testing", "Training validation testing", 20),
            ("train test", "train train test", 2),  # a missing one is a tenth of train
            ("a/b/train a/b/val", "a/b/train a/b/train a/b/val", 2)):
        names = [f"{folder}/cat/{i}.png" for folder in folders.split() for i in range(20)]
        chosen = split(names)
        assert sorted(sum(chosen, [])) == sorted(names) and len(chosen[1]) == n_val
        for part, source in zip(chosen, sources.split()):
            assert all(name.startswith(f"{source}/cat/") for name in part)
    names = [f"celeba/img_align_celeba/{i:06}.jpg" for i in (
        1, 162770, 162771, 182637, 182638, 202599)]
    assert split([*names, "img_align_celeba/note.png"]) == [names[:2], names[2:4], names[4:]]
    chosen = split([f"{kind}/{i}\udce9.png" for kind in ("train", "car") for i in range(50)])
    assert [len(set(c)) for c in chosen] == [80, 10, 10]  # here a train is a vehicle
    assert len(set(sum(chosen, []))) == 100


def test_celebas_folder_is_known_from_within_and_by_a_link(tmp_path, monkeypatch):
    (folder := tmp_path / "img_align_celeba").mkdir()
    for number in (1, 162771, 182638):
        noisy(8, 8).save(folder / f"{number:06}.jpg")
    (tmp_path / "faces").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (".", tmp_path / "faces"):
        chosen = [images.ImageSet(path, split, 8).names for split in SPLITS]
        assert chosen == [["000001.jpg"], ["162771.jpg"], ["182638.jpg"]]


def test_sets_hold_the_decoded_pictures_and_name_what_they_leave_out(tmp_path, capsys):
    photos(tmp_path / "train", 11), photos(tmp_path / "val", 1)
    noisy(40, 50).save(tmp_path / "train/p4.png"), noisy(30, 20).save(tmp_path / "train/p5.png")
    (tmp_path / "train/broken.png").write_bytes(b"no picture")
    data, out = images.ImageSet(tmp_path, "train", 12, zoom=2), capsys.readouterr().out
    assert "left out: train/broken.png" in out and "1 of 10 pictures are unreadable" in out
    assert len(data) == 9 and data.source.startswith("train split of")
    for name, pixels, native in zip(data.names, data.kept, data.native):
        file = (tmp_path / name).read_bytes()
        for got, size in zip(pixels, (12, 24)):
            assert (got.movedim(0, -1).numpy() == decode(file, size)).all()
        assert native == (min(decode(file).shape[:2]) >= 24)
    words = "none of 1 pictures .*24 x 24 pixels are fewer"
    refused(words, images.ImageSet, tmp_path, "test", 8, least=99)


def test_random_crops_are_cut_from_the_native_picture_in_memory_and_by_workers(
        tmp_path, monkeypatch):
    for i, size in enumerate([(24, 40)] * 9 + [(6, 9)]):  # the last is enlarged
        noisy(*size, i).save(tmp_path / f"p{i}.png")
    data = images.ImageSet(tmp_path, "train", 16, random_crop=True)
    native = torch.from_numpy(decode((tmp_path / data.names[1]).read_bytes()))
    windows = native.unfold(0, 16, 1).unfold(1, 16, 1).flatten(0, 1)  # (places, 3, 16, 16)
    found = {int((windows == data[1, seed][0]).flatten(1).all(1).nonzero()) for seed in range(40)}
    assert len(found) > 25
    monkeypatch.setattr(images, "free_memory", lambda: 0.0)
    disk = pickle.loads(pickle.dumps(images.ImageSet(tmp_path, "train", 16, random_crop=True)))
    lists, before = [(range(len(data)), 5), ([2, 6, 5], 3)] * 2, torch.get_rng_state()
    for (a, _), (b, _) in zip(data.batches(lists), disk.batches(lists), strict=True):
        assert torch.equal(a, b) and a.shape[1:] == (3, 16, 16)
    assert disk.kept is None and torch.equal(before, torch.get_rng_state())
    (tmp_path / data.names[3]).unlink()
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds
    refused(rf"^{data.names[3]} .*restore it$", list, disk.batches([([0, 3], 0)]))
    gc.collect()  # the workers


def test_nearest_filling_takes_a_nearest_seen_pixel():
    image, share = rand(4, 3, 9, 13), torch.tensor([0.3, 0.05, 1, 0]).view(4, 1, 1, 1)
    mask = rand(4, 1, 9, 13, seed=1) < share
    filled = images.nearest_filling(image, mask.float())
    places = torch.cartesian_prod(torch.arange(9.0), torch.arange(13.0))
    for i, p in product(range(3), range(9 * 13)):
        seen, colors = mask[i, 0].flatten(), image[i].flatten(1).mT
        distances = torch.cdist(places[p : p + 1], places[seen])[0]
        assert distances[(colors[seen] == filled[i, p]).all(1)][0] == distances.min()
    assert (filled[3] == 0.5).all()


def test_smaller_pictures_are_enlarged_bicubically_unless_they_are_squeezed():
    image, kinds = noisy(8, 12), Image.Resampling
    for fit, size, box, kind in (("crop", (16, 16), (2, 0, 10, 8), kinds.BICUBIC),
                                 ("short", (24, 16), None, kinds.BICUBIC),
                                 ("squeeze", (16, 16), None, kinds.BILINEAR)):
        want = np.array(image.resize(size, kind, box))
        assert (images.resized(image, 16, fit) == want).all()


def test_random_crops_reach_all_edges_and_differ_between_pictures(tmp_path):
    for i in range(3):
        noisy(18, 17).save(tmp_path / f"{i}.png")  # equal ones
    data = images.ImageSet(tmp_path, "all", 16, random_crop=True)
    pixels = images.to_tensor(np.array(noisy(18, 17)))
    places = {(y, x): pixels[:, y : y + 16, x : x + 16] for y in range(3) for x in range(2)}
    at = lambda crop: next(k for k, v in places.items() if torch.equal(v, crop))
    cut = [[at(data[i, seed][0]) for seed in range(60)] for i in range(3)]
    assert set(cut[0]) == set(places) and cut[0] != cut[1] != cut[2]


def test_a_limit_is_of_the_bundled_archives_together():
    data = images.ImageSet(None, "val", 16, limit=5)
    assert [data.labels.count(label) for label in ("emoji", "photos")] == [3, 3]


# ------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("layout", ["learnit", "blender", "nerfstudio", "per frame", "colmap txt",
                                    "colmap bin", "srn", "zero123"])
def test_one_object_is_the_same_in_every_layout(layout, tmp_path):
    """Where it conforms, and where it stands elsewhere and is smaller; folder and zip."""
    cameras, size = opposite_cameras(), 24
    focal, views, moved = size / 2 / math.tan(ANGLE / 2), ball_views(cameras, size), cameras.copy()
    moved[:, :3, 3] = 0.3 * cameras[:, :3, 3] + [5, -2, 1]
    write_layout(tmp_path / "set/still", layout, cameras, views)
    write_layout(tmp_path / "set/moved", layout, moved, views)
    packed = shutil.make_archive(tmp_path / "set", "zip", tmp_path / "set")
    for root, name in ((tmp_path / "set", "still"), (packed, "moved")):
        tree = images.Tree(root)
        assert list(scenes.find_scenes(tree)) == ["moved", "still"]
        scene = scenes.read_scene(tree, name, size)
        assert (scene.images.movedim(1, 3).numpy() == views).all()
        np.testing.assert_allclose(scene.poses, cameras[:, :3], atol=1e-4)
        np.testing.assert_allclose(scene.focals, focal, atol=1e-4)
        assert ("recentred on (5, -2, 1)" in scene.note) == (name == "moved"), scene.note
        if name == "still" and layout in ("learnit", "per frame", "blender"):  # bit for bit
            assert np.array_equal(scene.poses, cameras[:, :3].astype(np.float32))
    assert scenes.read_scene(tree, name, 12, max_views=2).images.shape == (2, 3, 12, 12)


@pytest.mark.parametrize("kind", ["txt", "bin"])
@pytest.mark.parametrize("moves, folder", [  # "from to"
    ("sparse/0/* sparse", ""), ("sparse/0/* .", ""), ("images/* .", ""), ("images/* sparse/0", ""),
    ("images photos", ""), ("sparse colmap/sparse", ""), ("sparse/0 sparse/distorted", ""),
    ("sparse/0 colmap_text", ""), ("", "sparse"), ("", "sparse/0")])
def test_colmaps_folders_may_lie_elsewhere(kind, moves, folder, tmp_path):
    cameras, (source, to) = opposite_cameras(), (moves or "images images").split()
    write_layout(tmp_path / "x", f"colmap {kind}", cameras, BLANK + np.arange(6, dtype=np.uint8)[
        :, None, None, None])
    for file in list((tmp_path / "x").glob(source)) if moves else ():
        target = tmp_path / "x" / to / (file.name if "*" in source else "")
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    scene = scenes.read_scene(*scenes.find_scene(tmp_path / "x" / folder), 8)
    assert scene.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(scene.poses, cameras[:, :3], atol=1e-4)


@pytest.mark.parametrize("change", [
    lambda text: re.sub(r"\n(1\.0 2\.0 -1)?(?=\n)", "", text),
    lambda text: text.replace(".png", ""), lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    lambda text: text.replace(".png", ".jpg")],
    ids=["no points", "no suffix", "windows", "another suffix"])
def test_colmaps_text_may_lack_points_and_name_pictures_otherwise(change, tmp_path):
    write_layout(tmp_path, "colmap txt", opposite_cameras(), BLANK)
    want, file = scenes.read_scene(images.Tree(tmp_path), "", 8), tmp_path / "sparse/0/images.txt"
    file.write_bytes(change(file.read_text()).encode())
    close(scenes.read_scene(images.Tree(tmp_path), "", 8).poses, want.poses, 0)


def change_scene(folder, **given):
    """Other keys in the transforms.json of a scene; frame: in its first frame."""
    meta = json.loads((folder / "transforms.json").read_text())
    meta["frames"][0] |= given.pop("frame", {})
    (folder / "transforms.json").write_text(json.dumps(meta | given))


def test_what_wide_angle_cameras_see_is_shrunk_into_the_unit_sphere(tmp_path):
    """The same picture, whatever the field; where the models have no such sphere, nothing is."""
    cameras, focal = opposite_cameras(), 1.88 * 24
    for name, wider in (("usual", 1), ("wide", 1.6)):
        views = np.stack([draw_ball(p, *[focal / wider] * 2, 12, 12, 24, 24) for p in cameras])
        write_layout(tmp_path / name, "nerfstudio", cameras, views)
        change_scene(tmp_path / name, fl_x=focal / wider, fl_y=focal / wider, cx=12, cy=12, w=24,
                     h=24)
    read = lambda name, sphere: scenes.read_scene(images.Tree(tmp_path), name, 24, sphere=sphere)
    usual, wide = read("usual", True), read("wide", True)
    close(usual.poses, read("wide", False).poses)
    close(wide.poses[:, :, 3] * 1.6, usual.poses[:, :, 3], 2e-3)
    assert wide.scale == pytest.approx(1 / 1.6, abs=1e-3) and not usual.note
    assert "scaled by 0.625, so that the unit sphere holds what is seen" in wide.note
    _, focals = scenes.read_cameras(tmp_path / "wide/transforms.json", 24, wide)
    close(focals, wide.focals)


@pytest.mark.parametrize("mistake, words", [
    (lambda poses: np.linalg.inv(poses), "all cameras stand in one place.*invert"),
    (lambda poses: poses[:, [1, 2, 0, 3]], "the world's z is not up"),
    (lambda poses: poses, "the background is not white")])
def test_common_mistakes_of_scenes_are_named(tmp_path, mistake, words):
    eyes = np.array([[4, 0, 1], [0, 4, 1], [-4, 0, 1], [0, -4, 1.0]])
    eyes *= 4 / np.linalg.norm(eyes, axis=1, keepdims=True)
    views = np.full((4, 8, 8, 3), 40 if "white" in words else 255, np.uint8)
    write_layout(tmp_path / "a", "learnit", mistake(np.stack([*map(camera, eyes)])), views)
    if "invert" in words:
        return refused(words, scenes.read_scene, images.Tree(tmp_path), "a", 8)
    assert re.search(words, scenes.read_scene(images.Tree(tmp_path), "a", 8).note)


@pytest.mark.parametrize("cx, cy, fx, fy", [(41, 26, 90, 110), (30, 60.5, 70, 70)])
def test_a_principal_point_off_the_middle_is_cropped_to(cx, cy, fx, fy, tmp_path):
    """The picture of 80 x 100 becomes what a camera with a centred one would see."""
    cameras, size = opposite_cameras(), 32
    moved = cameras + np.pad([[1], [2], [3]], ((0, 1), (3, 0)))  # it is recentred as well
    views = np.stack([draw_ball(pose, fx, fy, cx, cy, 80, 100) for pose in cameras])
    write_layout(tmp_path / "a", "nerfstudio", moved, views)
    change_scene(tmp_path / "a", cx=cx, cy=cy, fl_x=fx, fl_y=fy, w=80, h=100)
    scene = scenes.read_scene(images.Tree(tmp_path), "a", size)
    for pose, pixels, (f, g) in zip(cameras, scene.images, scene.focals.numpy()):
        want = draw_ball(pose, f, g, size / 2, size / 2, size, size)
        assert np.abs(pixels.movedim(0, 2).numpy() - np.float64(want)).mean() < 1.5
    np.testing.assert_allclose(scene.poses, cameras[:, :3], atol=1e-4)
    file = tmp_path / "a/transforms.json"
    torch.testing.assert_close(scenes.read_cameras(file, size, scene), (scene.poses, scene.focals))
    np.testing.assert_allclose(scenes.read_cameras(file, size)[0], moved[:, :3], atol=1e-6)


@pytest.mark.parametrize("words, given", [
    ("wide", dict(camera_angle_x="wide")), ("must be in", dict(camera_angle_x=4)),
    ("no views", dict(frames=[])), ("malformed.*frames of file_path", dict(frames=3)),
    ("no pinhole.*undistort", dict(frame=dict(p2=-0.1))),
    ("OPENCV_FISHEYE.*undistort", dict(camera_model="OPENCV_FISHEYE")),
    ("global shutter", dict(rolling_shutter=[0, 0, 1, 0])),
    ("global shutter", dict(frame=dict(rolling_shutter_time=0.01))),
    ("gone.png.*absent.*remove", dict(frame=dict(file_path="gone.png"))),
    ("not a rotation", dict(frame=dict(transform_matrix=np.diag([2, 2, 2, 2]).tolist()))),
    ("shape", dict(frame=dict(transform_matrix=[[1, 2], [3, 4]]))),
    ("nowhere", dict(frame=dict(transform_matrix=[4 * [math.nan]] * 4))),
    ("above 0", dict(fl_x=-3.0, w=8, h=8)), ("principal point", dict(fl_x=9.0, h=8, cx=9.0)),
    ("8 x 8 pixels, but its camera has 8 x 16", dict(fl_x=9.0, w=8, h=16)),
    ("do not face a common point", {})])
def test_a_scene_that_cannot_be_used_is_refused_in_words(words, given, tmp_path):
    cameras = opposite_cameras() @ (np.eye(4) if given else FLIP)
    write_layout(tmp_path / "scene", "learnit", cameras, BLANK)
    change_scene(tmp_path / "scene", **given)
    refused(f"scene/.*{words}", scenes.read_scene, images.Tree(tmp_path), "scene", 8)


def many_scenes(root, names, layout="learnit"):
    for i, name in enumerate(names):
        write_layout(root / name, layout, opposite_cameras(4, i), BLANK[:4])
    return root


def split_scenes(root):
    """{split: names of its scenes}."""
    return {s: set(scenes.SceneSet(root, s, 8).names) for s in SPLITS}


def test_scenes_are_split_by_folder_by_hash_or_by_a_file_of_their_class(tmp_path):
    """Ids that two classes share are not mixed; a class alone finds the file beside it."""
    many_scenes(tmp_path, [f"{c}/{i}" for c in ("cars", "boxes") for i in "abcdefghijkl"])
    for name, train, test in (("car", "abcdefghijkx", "l"), ("box", "bcdefghijkl", "a")):
        split = dict(train=list(train), val=[], test=list(test))
        (tmp_path / f"{name}_splits.json").write_text(json.dumps(split))
    names, data = split_scenes(tmp_path), scenes.SceneSet(tmp_path, "train", 8)
    assert names["test"] == {"cars/l", "boxes/a"} and len(names["val"]) == 4
    assert len(set.union(*names.values())) == 24 == sum(map(len, names.values()))
    for split, alone in split_scenes(tmp_path / "cars").items():
        assert {f"cars/{name}" for name in alone} == {n for n in names[split] if n[0] == "c"}
    assert set(data.labels) == {"boxes", "cars"} and "car_splits.json" in data.source
    srn = many_scenes(tmp_path / "srn", [f"cars_{s}/{i}" for s in SPLITS for i in "ab"], "srn")
    assert split_scenes(srn) == {s: {f"cars_{s}/{i}" for i in "ab"} for s in SPLITS}
    assert scenes.SceneSet(srn, "val", 8).labels == ["cars", "cars"]
    names = split_scenes(many_scenes(tmp_path / "hash", [f"{i:02d}" for i in range(30)])).values()
    assert [len(n) for n in names] == [24, 3, 3] and len(set.union(*names)) == 30
    alone = many_scenes(tmp_path / "one", ["lego"], "blender")
    assert split_scenes(alone) == dict.fromkeys(SPLITS, {"lego"})


def test_unreadable_scenes_are_named_and_left_out(tmp_path, capsys):
    many_scenes(tmp_path / "train", "abcdef"), many_scenes(tmp_path / "test", "e")
    for name in "ab":  # one of them may be in val
        change_scene(tmp_path / "train" / name, frames=[])
    data = scenes.SceneSet(tmp_path, "train", 8, max_views=3)
    assert not {"train/a", "train/b"} & set(data.names) and set(data.counts.tolist()) == {3}
    assert len(data.images) == 3 * len(data) and "left out: train/" in capsys.readouterr().out
    refused("at least 5 are needed", scenes.SceneSet, tmp_path, "test", 8, min_views=5)


def test_a_scene_is_found_by_folder_file_and_within_a_zip_or_is_a_bare_photo(tmp_path):
    many_scenes(tmp_path / "set/cars", "ab")
    write_layout(tmp_path / "set/cars/a/colmap", "colmap bin", opposite_cameras(), BLANK)
    shutil.make_archive(tmp_path / "set", "zip", tmp_path / "set")
    assert list(scenes.find_scenes(images.Tree(tmp_path / "set"))) == ["cars/a", "cars/b"]
    for source, name in (("set/cars/a", ""), ("set/cars/a/transforms.json", ""),
                         ("set.zip/cars/b", "cars/b")):
        tree, found = scenes.find_scene(tmp_path / source)
        assert found == name and len(scenes.read_scene(tree, found, 8).images) == 4
    folder = scenes.find_scene(tmp_path / "set.zip/cars")
    refused("no scene in cars.*as cars/a", scenes.read_scene, *folder, 8)
    Image.new("RGB", (10, 20)).save(tmp_path / "x.png")
    scene = scenes.photo_scene(tmp_path / "x.png", 40, 0.6)  # with the default camera, and padded
    eye = np.array([0, -math.cos(math.pi / 9), math.sin(math.pi / 9)])
    np.testing.assert_allclose(scene.poses[0], camera(4 * eye)[:3], atol=1e-5, rtol=1e-5)
    close(scene.focals, torch.full((1, 2), 20 / math.tan(0.3)))
    assert scene.images[0, 0, 20].tolist()[::13] == [255, 0, 0, 255]


def test_the_angles_of_a_camera_are_across_its_width_and_height():
    frame = {"file_path": "a", "transform_matrix": np.eye(4).tolist()}
    meta = dict(frames=[frame], camera_angle_x=0.8, camera_angle_y=0.5, w=40, h=30)
    (view,) = scenes.parse_transforms(json.dumps(meta).encode())
    assert (view.fx, view.fy) == pytest.approx((20 / math.tan(0.4), 15 / math.tan(0.25)))


def test_cameras_that_nearly_conform_stay_and_others_are_moved():
    for shift, distance, want in ((0.1, 4.2, ((0, 0, 0), 1)), (0.5, 4.0, ((0.5, 0, 0), 1)),
                                  (0.0, 5.0, ((0, 0, 0), 0.8))):
        poses = opposite_cameras()[:, :3]
        poses[..., 3] = poses[..., 3] * distance / 4 + np.array([shift, 0, 0])
        origin, scale = scenes.find_centre(poses)
        np.testing.assert_allclose((*origin, scale), (*want[0], want[1]), atol=1e-6)


def test_a_background_that_is_not_white_is_noted_and_a_set_may_be_limited(tmp_path):
    for grey, told in ((240, False), (200, True)):
        note = scenes.background(torch.full((2, 3, 8, 8), grey, dtype=torch.uint8))
        assert ("not white" in note) == told
    many_scenes(tmp_path, "abc")
    assert [len(scenes.SceneSet(tmp_path, "all", 8, limit=n)) for n in (0, 2)] == [3, 2]


# ------------------------------------------------------------------------- curves


@pytest.mark.parametrize("kernel, n, m, x0, y1, formula", [  # of distance, length and period
    ("rbf", 27, 5, 1.913002, -0.835873, lambda d, l, p: np.exp(-((d / l) ** 2) / 2)),
    ("matern52", 14, 18, 0.764012, -0.070508, lambda d, l, p: np.exp(-(5**0.5) * d / l) * (
        1 + 5**0.5 * d / l + 5 * (d / l) ** 2 / 3)),
    ("periodic", 4, 17, -0.923828, -0.59552, lambda d, l, p: np.exp(
        -2 * (np.sin(np.pi * d / p) / l) ** 2))])
def test_posterior_and_joint_likelihood_by_numpy(kernel, n, m, x0, y1, formula):
    """The joint normal conditioned, of test sets whose numbers stay the same."""
    x, y, hyper, context = next(curves.gp_test_sets(kernel, 1))
    assert (context, x.shape, y.shape) == (n, *2 * ((16, n + m, 1),))
    assert (x[0, 0].item(), y[-1, -1].item()) == pytest.approx((x0, y1), abs=2e-6)
    seen, asked = (x[:, :n], y[:, :n]), x[:, n:]
    mean, std = curves.gp_posterior(kernel, *seen, asked, hyper, 0.05)
    joint = curves.joint_log_likelihood(kernel, *seen, asked, y[:, n:], hyper, 0.05)
    for b, (length, scale, period) in enumerate(torch.cat(hyper, 2)[:, 0].tolist()):
        distance = (x[b] - x[b].T).abs().numpy()
        k = scale**2 * formula(distance, length, period) + 0.05**2 * np.eye(n + m)
        gain = k[n:, :n] @ np.linalg.inv(k[:n, :n])
        want, cov = gain @ y[b, :n, 0].numpy(), k[n:, n:] - gain @ k[:n, n:]
        np.testing.assert_allclose(mean[b, :, 0], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(std[b, :, 0] ** 2, cov.diagonal(), rtol=1e-5, atol=1e-8)
        off = y[b, n:, 0].numpy() - want
        exact = -(off @ np.linalg.solve(cov, off) + np.linalg.slogdet(2 * np.pi * cov)[1]) / 2
        assert joint[b].item() == pytest.approx(exact / m, rel=1e-5, abs=1e-5)


def test_an_unknown_kernel_is_averaged_over_by_its_evidence():
    """By a loop over the kernels of the grid, of a mixture of their exact posteriors."""
    x, factor, white, *_ = curves.draw_curves("rbf", 2, 15, generator(3))
    y, logs, moments = factor @ white, [], []
    seen = x[:, :9], y[:, :9]
    for length, scale, noise in product(
            torch.logspace(-1.2, 0.4, 14), torch.logspace(-1.2, 0.4, 10), (0.02, 0.1)):
        logs.append(curves.log_density("rbf", *seen, (length, scale, None), noise))  # (B,)
        m, s = curves.gp_posterior("rbf", *seen, x[:, 9:], (length, scale, None), noise)
        moments.append(torch.stack((m, m**2 + s**2)))  # (2, B, 6, 1)
    weight = torch.stack(logs).softmax(0).view(-1, 1, 2, 1, 1)
    first, second = (weight * torch.stack(moments)).sum(0)
    mean, std = curves.averaged_gp(*seen, x[:, 9:], (0.02, 0.1))
    close(mean, first, 1e-4)
    close(std, (second - first**2).sqrt(), 1e-4)


def test_the_generator_picks_one_of_all_kernels():
    for seed in range(6):
        gen = generator(seed)
        kernel = curves.KERNELS[int(torch.randint(3, (), generator=gen))]
        x, factor, white, *_ = curves.draw_curves(kernel, 4000, 5, gen)
        assert (factor @ white).var().item() == pytest.approx(0.37, abs=0.02)  # E scale^2
        got = curves.sampler("all")(4000, 5, generator(seed))
        assert torch.equal(got[0], x) and torch.equal(got[1], factor @ white) and got[2] is None


def test_a_part_of_the_curves_is_short_or_noisy():
    (*_, (plain, *others), _), (*_, (length, *same), noise) = (
        curves.draw_curves("rbf", 8000, 3, generator(0), rough) for rough in (0.0, 0.2))
    assert all(map(torch.equal, others, same)) and plain.min() >= 0.1
    short, noisy = length < 0.1, noise > 0.02
    assert torch.equal(length[~short], plain[~short]) and (noise[~noisy] == 0.02).all()
    assert not (short & noisy).any() and 0.002 <= length.min() and noise.max() <= 1
    for part, values in ((short, length / 0.1), (noisy, noise)):  # from 1/50 to 1
        assert part.double().mean().item() == pytest.approx(0.1, abs=0.01)
        assert values[part].log().quantile(0.5).exp().item() == pytest.approx(50**-0.5, rel=0.15)


@pytest.mark.parametrize("kernel", curves.KERNELS)
def test_the_moments_of_drawn_values_are_those_of_the_exact_posterior(kernel):
    x, y, _, posterior = curves.sampler(kernel, 1.0)(3, 12, generator(6))
    hyper, noise = curves.draw_curves(kernel, 3, 12, generator(6), 1.0)[3:]
    assert 0 < (noise > 0.02).sum() < 3  # some are noisy, the others short
    counts = (2, 5, 9)
    mean, var = posterior(torch.arange(12) < torch.tensor(counts)[:, None])
    for i, n in enumerate(counts):
        (x_seen, x_asked), (y_seen, _) = (v[[i]].split((n, 12 - n), 1) for v in (x, y))
        hypers = [h[[i]] for h in hyper]
        want = curves.gp_posterior(kernel, x_seen, y_seen, x_asked, hypers, noise[[i]])
        close((mean[i, n:], var[i, n:].sqrt()), tuple(v[0] for v in want), 1e-6)
        close(mean[i, :n], y[i, :n], 1e-9)
        assert (var[i, :n].abs() < 1e-12).all()


def test_drawn_windows_are_standardised_neighbouring_points_in_random_order():
    data = curves.CurveSet(HERE / "elnino.csv", "train", points=12)
    x, y, mask = data.draw(5, 12, generator(0))
    windows = data.y.unfold(0, 12, 1)[:, 0]  # (starts, 12)
    scaled = (windows - windows.mean(1, True)) / windows.std(1, correction=0, keepdim=True) / 2
    order = x.argsort(1)
    assert mask is None and not torch.equal(order[0], order[1])
    for curve in y.gather(1, order)[..., 0]:
        assert (scaled - curve).abs().amax(1).min() < 1e-9


def test_a_file_of_two_columns_is_one_curve_with_a_mask_in_its_gaps(tmp_path):
    x = torch.arange(40.0).double()
    y, seen = torch.stack((x.sin(), 5 + x.cos()), -1), (x[:, None] + torch.arange(2)) % 3 != 0
    np.savetxt(tmp_path / "a.csv", torch.cat((x[:, None], y.masked_fill(~seen, math.nan)), 1),
               delimiter=",")
    data = curves.CurveSet(tmp_path, "all", n_values=2)
    xs, ys, mask = data.draw(30, 25, generator(0))
    assert (len(data), xs.shape, ys.shape) == (1, (30, 25, 1), (30, 25, 2))
    t = ((xs[..., 0] + 2) * 39 / 4).round().long()  # the row that was drawn
    assert torch.equal(mask, seen[t])
    for j in range(2):
        known = y[seen[:, j], j]
        want = (y[t, j] - known.mean()) / known.std(correction=0) / 2
        close(ys[..., j][mask[..., j]], want[mask[..., j]])
    assert 5 < (t.diff(dim=1) > 0).all(1).sum() < 25  # about half come in the order of time
    words = "a.csv: 2 columns .* no multiple of n_values=3"
    refused(words, curves.CurveSet, tmp_path, "all", n_values=3)


@pytest.mark.parametrize("n_values", (1, 2))
def test_a_short_curve_leaves_random_places_empty(tmp_path, n_values):
    for n in (9, 60):
        (tmp_path / f"{n}.csv").write_text("".join(f"{i},{i % 7},{i % 5}\n" for i in range(n)))
    data = curves.CurveSet(tmp_path, "all", n_values=n_values)
    x, _, mask = data.draw(200, 30, generator(0))
    counts = mask[..., 0].sum(1)
    assert set(counts.tolist()) == {9, 30}
    for points, there in zip(x[..., 0], mask[..., 0]):
        assert len(points[there].unique()) == there.sum()
    parts = mask[counts == 9][:, :15, 0].sum(1).double()
    assert parts.mean().item() == pytest.approx(4.5, abs=0.5) and parts.std() > 0.5


def test_series_at_equal_distances_go_from_end_to_end():
    x = curves.draw_series(64, 30, generator(0))[0].sort(1)[0][..., 0]
    equal = x[(x.diff(dim=1).std(1) < 1e-6)]
    assert 16 < len(equal) < 48
    close(equal, torch.linspace(-2, 2, 30).double().expand_as(equal))


def test_windows_do_not_overlap_and_each_is_split_anew(tmp_path):
    """Of the longer curves; one of five points is left out."""
    for n in (100, 30, 5, 11):
        (tmp_path / f"{n}.csv").write_text("".join(f"{i},{i * i % 97}\n" for i in range(n)))
    data = curves.CurveSet(tmp_path, "all", points=24)
    assert len(data) == 3 and len(curves.CurveSet(tmp_path, "all", limit=2)) == 2
    parts, first = list(data.windows(2)), dict(zip(data.names, data.first.tolist()))
    want = [first["100.csv"] + i for i in (0, 24, 48, 72)] + [first["30.csv"], first["11.csv"]]
    half = parts[: len(parts) // 2]
    assert sorted(sum((rows.tolist() for *_, rows in half), [])) == sorted(want)
    assert {(x.shape[1], n) for x, _, _, n, _ in parts} == {(24, 12), (11, 5)}
    for a, b in zip(half, parts[len(half) :], strict=True):
        assert torch.equal(a[0].sort(1)[0], b[0].sort(1)[0]) and (a[0] != b[0]).any()


def test_drawn_windows_begin_at_every_row_that_leaves_room(tmp_path):
    (tmp_path / "a.csv").write_text("".join(f"{i},{i**3}\n" for i in range(14)))
    x, y, _ = curves.CurveSet(tmp_path, "all", points=12).draw(60, 12, generator(0))
    ends = y.gather(1, x.argmax(1, keepdim=True)).flatten()
    assert len(ends.mul(1e6).round().unique()) == 3


def test_a_constant_is_standardised_to_0_in_units_of_its_own():
    x, y = torch.full((1, 3, 1), 7.0), torch.full((1, 3, 1), 5.0)
    a, b, (mid, scale, mean, of) = curves.standardise(x, y)
    assert not a.any() and not b.any()
    assert [float(v) for v in (mid, scale, mean, of)] == [7, 1, 5, 1]


# ------------------------------------------------------------------------- tables


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_every_dialect_of_a_table_gives_the_same_series(encoding):
    heads = "", "# run 3\nx{}y\n", "a title\n\n# x{}y\n"
    for mark, decimal, quote, head, minus in product(
            (",", ";", "\t", "  "), ".,", ("", '"'), heads, "-\u2212"):
        if mark == decimal and not quote:
            continue
        rows = ((f"{quote}{value}{quote}".replace(".", decimal) for value in row)
                for row in (("1700.5", "8.3"), ("1701.5", f"{minus}1.0")))
        text = head.format(mark) + "".join(mark.join(row) + "\r\n" for row in rows)
        table = tables.read_table("t", None, text.encode(encoding))
        assert (table.x.tolist(), table.y.tolist()) == ([[1700.5], [1701.5]], [[8.3], [-1.0]]), text
        assert [table.x_name, *table.y_names] == ["x", "y"] and table.mask.all(), text


LYNX = "year hare lynx\n1900  30 4\n1901  47.2 6.1\n1902 70.2 9.8\n"
TABLES = [  # text, columns, names, and the rows of x and y
    (LYNX, "year,lynx", "year lynx", "1900 4, 1901 6.1, 1902 9.8"),
    (LYNX, "3,2", "lynx hare", "4 30, 6.1 47.2, 9.8 70.2"),
    ("x,a,b\n0,1,\n1,NaN,NA\n2,-999,inf\n,3,3\n3,,4\n", "all", "x a b", "0 1 0, 2 -999 0, 3 0 4"),
    ("x,2019,2020\n1,2,3\n2,3,4\n", "x,2020", "x 2020", "1 3, 2 4"),
    (" 1948 1949\n 1948 1 2 3\n 1949 2 3 4\n -99.9\n Nino 3.4 index\n", "1,3",
     "column_1 column_3", "1948 2, 1949 3"),
    ("id,day,v\nA,2020-01-01,3\nA,2020-03-01,4\n", None, "day v", "0 3, 60 4"),
    ("day v\n2020-01-02 12:00  3\n2020-01-01 00:00:00  4\n", None, "day v", "1.5 3, 0 4"),
    ("2020-02,1\n2020-01,2\n2020-01-01T12:00+12:00,3\n", None, "x y", "31 1, 0 2, 0 3"),
    ("Datum;T;N\n1.1.2020;1,5;2\n15.01.2020;2,5;3\n", "all", "Datum T N", "0 1.5 2, 14 2.5 3"),
    (",date,v\n0,2020/1/1,3\n1,2020/01/03 UTC,4\n", None, "date v", "0 3, 2 4"),
    ("date,time,v\n2020-01-01,00:00,3\n2020-01-01,6:00,4\n", None, "date v", "0 3, 0.25 4"),
    ("d|v\n20200101|3\n20200201|4\n", None, "d v", "0 3, 31 4"),
    ('x,y\n2000,"1,234"\n2001,"1,234.5"\n2002,987\n', None, "x y",
     "2000 1234, 2001 1234.5, 2002 987"),
    ("x,y\n1,NA\n2,3\n3,.\n4,#N/A\n5,6\n", None, "x y", "2 3, 5 6"),
    ("lat,lon,z\n52.52,13.41,38\n\ntime,T\n0,1\n1,2\n2,3\n", None, "time T", "0 1, 1 2, 2 3"),
    ("x   y    z\n0.0 1.5  1\n1.0      2\n2.0 3.5  3\n", None, "x y", "0 1.5, 2 3.5"),
    ("time;U\n[s];[V]\n0,0;1,25\n0,5;2,25\n", None, "time U", "0 1.25, 0.5 2.25"),
    ("x\ty\n1\t980\n2\t1,234\n3\t12,345\n", None, "x y", "1 980, 2 1234, 3 12345"),
    ("x;y\n1;1.234,5\n2;1.234.567\n", None, "x y", "1 1234.5, 2 1234567"),
    ("x;y\n1;1 234\n2;12\u202f345,5\n3;1\u2019000\n", None, "x y", "1 1234, 2 12345.5, 3 1000"),
    ("x,y\n1,$3.50\n2,\"($1,004.25)\"\n3,-4 \u20ac\n4,7.5 %\n5,1.5D+1\n6,2.5 p\n", None, "x y",
     "1 3.5, 2 -1004.25, 3 -4, 4 7.5, 5 15, 6 2.5"),
    (",year,v\n0,1950,3\n1,1951,4\n2,1953,5\n", "all", "year v", "1950 3, 1951 4, 1953 5"),
    ('"t" "v"\n"1" 5.5 3\n"2" 6.5 4\n"3" 7 5\n', None, "t v", "5.5 3, 6.5 4, 7 5"),
    ('"Name","Code","2018","2019","2021",\n"Aruba","ABW","1","..","3",\n"Chad","TCD","4","5","",\n',
     "all", "year Aruba_ABW Chad_TCD", "2018 1 4, 2019 0 5, 2021 3 0"),
    ("unit,geo\\TIME\t2018 \t2019 \t2021 \nA,DE\t1.5 \t2.5 b\t: \nA,FR\t: \t: \t5.5 e\n",
     "1,2", "year A,DE", "2018 1.5, 2019 2.5"),
    ("start;v\n23:30;1\n23:45:36;2\n0:15;3\n", None, "start v", "23.5 1, 23.76 2, 24.25 3"),
    ("start,v\n11:30 AM,1\n12:30 pm,2\n", None, "start v", "11.5 1, 12.5 2"),
    ("year month day v\n2020 1 1 3\n2020 1 2 4\n2020 2 1 5\n", None, "year v", "0 3, 1 4, 31 5"),
    ("Year,Quarter,GDP\n2020,1,7\n2020,3,8\n2021,1,9\n", None, "Year GDP", "0 7, 182 8, 366 9"),
    ("year,quarterly v,w\n2020,1,7\n2021,3,8\n", "all", "year quarterly_v w",
     "2020 1 7, 2021 3 8"),
    ("2020 01 2020.04 7\n2020 02 2020.12 8\n2020 3 2020.2 9\n", None, "column_1 column_4",
     "0 7, 31 8, 60 9"),
    ("Year,Jan,Feb,Mar,Apr,May,Jun,Jul,Aug,Sep,Oct,Nov,Dec\n2020,5,6" + 9 * ",***" + ",7\n" +
     "2021,8" + 11 * ",NA" + "\n", None, "date value", "0 5, 31 6, 335 7, 366 8"),
    ("x,y\n0,5\n" + "".join(f"1,{gap}\n" for gap in "-,n/a,:,..,*,N.A.,#DIV/0!,\u2014,(null)".split(
        ",")) + "2,3\n", None, "x y", "0 5, 2 3")]


def test_columns_gaps_and_dates_of_tables():
    for text, columns, names, rows in TABLES:
        table = tables.read_table("t.csv", columns, text.encode())
        assert " ".join(n.replace(" ", "_") for n in (table.x_name, *table.y_names)) == names
        want = [[float(v) for v in row.split()] for row in rows.split(",")]
        assert torch.cat((table.x, table.y), 1).tolist() == want, text
        dated = re.search(r"2020[-/]|20200|\.2020|month|Jan|2020 01|Qu", text)
        assert table.origin == (datetime(2020, 1, 1) if dated else None)
    table = tables.read_table("t", None, "Tag,°C,err\n1,2,3\n2,,3\n3,4,4\n".encode("latin-1"))
    assert table.y_names == ["°C"] and [note.split(" (")[0] for note in table.notes] == [
        "rows without x or y, left out: 1", "columns that are not read: err"]
    for text, columns, error in (
            ("a;b\n", None, "no rows of two numbers"), ("1,5\n", None, "1 row of numbers"),
            ("Date,a,b\n1/2/2020,1,5\n1/3/2020,2,6\n", None, "'1/2/2020' is no date that is read"),
            ("Date,a\n1/2/2020,1\n1/3/2020,2\n", None, "'1/2/2020' is no date .* which is the day"),
            ("a,b\n1999-00,1\n2000-01,2\n2001-02,3\n", None, "'1999-00' is no date that is read"),
            ("a,b\n2000,<1\n2001,2\n2002,3\n", None, "at a = 2000.0 stands '<1'"),
            ("id,t,v\n3,1,5\n3,2,6\n", None, "id is 3 in every row; choose --columns x,y"),
            ("x,y\n1,2\n2,abc\n", None, "x = 2.0 stands 'abc'"),
            (LYNX, "year,fox", "'year,fox' should be x,y .* 1 year, 2 hare, 3 lynx"),
            ("1," * 2**23 + "1", None, "larger than 16 MB")):
        refused(f"^t.csv: .*{error}", tables.read_table, "t.csv", columns, text.encode())


@pytest.mark.parametrize("days, dates", [
    ("0 1 366", form) for form in (
        "31/12/2020 1/1/2021 1/1/2022", "12/31/2020 1/1/2021 1/1/2022", "12/31/20 1/1/21 1/1/22",
        "31.12.20 1.1.21 1.1.22", "2020.12.31 2021.01.01 2022.1.1", "20201231 20210101 20220101",
        "31-Dec-20 1-Jan-21 1-Jan-22", "Dec-31-2020 Jan-1-2021 Jan-1-22",
        "31_December_2020 1_Jan._2021 Sat_1_Jan_2022",
        '"Dec_31,_2020" "January_1,_2021" "Sat,_January_1,_2022"',
        "12/30/2020_12:00_PM 12/31/2020_12:00_pm 12/31/2021_12:00:00_p.m.",
        "2020-12-31T02:30+02:30 2021-01-01T00:00Z 2021-12-31_19:00-05:00",
        '"Thu,_31_Dec_2020_10:00:00_GMT" "Fri,_1_Jan_2021_10:00:00_GMT" "1_Jan_2022_10:00"')] + [
    ("0 31 366", form) for form in (
        "Jan-2020 Feb-2020 Jan-2021", "Jan_2020 February_2020 Jan_2021", "2020M01 2020M2 2021M01",
        "2020_JAN 2020_FEB 2021Jan", "01/2020 02/2020 1/2021", "Jan-20 Feb-20 Jan-21",
        "202001 202002 202101", "2020-1 2020-02 2021/01")] + [
    ("0 91 366", "2020Q1 2020-Q2 2021_Q1"), ("0 91 366", "Q1_2020 Q2-2020 Q1_2021")])
def test_dates_of_every_form_are_days_since_the_first(days, dates):
    rows = "".join(f"{date.replace('_', ' ')},{i}\n" for i, date in enumerate(dates.split()))
    table = tables.read_table("t", None, f"date,v\n{rows}".encode())
    assert torch.cat((table.x, table.y), 1).mT.tolist() == [[*map(float, days.split())], [0, 1, 2]]
    assert table.origin.year == 2020


@pytest.mark.parametrize("rows, x, origin", [
    ("31.12.30 31.12.29", [0, 36160], datetime(1930, 12, 31)),  # of two digits 1930 to 2029
    ("20200101T003000+0200 20200102T003000+0200", [0, 1], datetime(2019, 12, 31, 22, 30)),
    ("10:00 9:30 23:50 0:20 1:00", [10, 9.5, 23 + 5 / 6, 24 + 1 / 3, 25], None)])
def test_years_of_two_digits_offsets_and_clocks_that_pass_midnight(rows, x, origin):
    table = tables.read_table("t", data="".join(
        f"{v};{i}\n" for i, v in enumerate(rows.split())).encode())
    assert table.origin == origin and table.x[:, 0].tolist() == pytest.approx(x)


def test_rows_that_repeat_an_x_are_noted_where_they_are_more_than_a_third():
    for again, told in ((2, False), (5, True)):
        rows = [*range(10 - again), *range(again)]
        table = tables.read_table("t", data="".join(f"{x},{x}\n" for x in rows).encode())
        assert any("rows repeat" in note for note in table.notes) == told


def test_a_mark_that_may_be_of_thousands_or_decimals_is_named():
    for text, y, words in (("x;y\n1;1,234\n2;2,345\n", 1.234, "1,234 is read as the number 1.234"),
                           ("x\ty\n1\t1,234\n2\t2,345\n", 1234, "1,234 is read as the number 1234"),
                           ("x;y\n1;1.234\n2;2.345\n", 1.234, "1.234 is read as the number 1.234"),
                           ("x;y\n0,5;1,234\n1,5;2,345\n", 1.234, "")):
        table = tables.read_table("t", None, text.encode())
        assert table.y[0].item() == y and " ".join(table.notes).startswith(words), text


# ------------------------------------------------------------------------- hostile input


HOSTILE = [  # kinds of files, or layout:file of a scene
    "picture", "zip", "table", "learnit:transforms.json", "zero123:002.npy", "srn:pose/000001.txt",
    "srn:intrinsics.txt", *(f"colmap {kind}:sparse/0/{name}.{kind}" for kind, name in product(
        ("txt", "bin"), ("images", "cameras")))]


def hostile(kind, folder):
    """Good files of a kind, where to put a damaged one, and a function that reads it."""
    path, (layout, _, marker) = folder / "input", kind.partition(":")
    if kind == "picture":
        suffixes = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
        good = [encoded(noisy(12, 20), f) for f in suffixes]
        return good, path, lambda: images.read_photo(path, 16)[:1]
    if kind == "zip":
        photos(folder / "set" / "train", 2), photos(folder / "set" / "test", 1)
        good = Path(shutil.make_archive(folder / "set", "zip", folder / "set")).read_bytes()
        return [good], path, lambda: images.ImageSet(path, "test", 16)[0, 0][:1]
    if kind == "table":
        good = [text.encode(encoding) for text, *_ in TABLES for encoding in ("utf-8", "utf-16")]
        return good, path, lambda: tables.read_table(path, "all")[:2]
    write_layout(folder / "scene", layout, opposite_cameras(), BLANK)
    tree, path = images.Tree(folder / "scene"), folder / "scene" / marker
    return [path.read_bytes()], path, lambda: scenes.read_scene(tree, "", 8)[:3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    check_damaged(kind, tmp_path, *hostile(kind, tmp_path))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are seen on Linux alone")
def test_no_thread_of_a_group_of_processes_outlives_it():
    """One that does can abort a process at its end. In a fresh interpreter of one process."""
    program = """
import os
from data.runs import processes
threads = lambda: print(len(os.listdir("/proc/self/task")))
threads()
with processes("cpu"):
    import torch.distributed.nn.functional
    threads()
threads()
"""
    one = {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "WORLD_SIZE": "1",
           "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    counts = subprocess.check_output([sys.executable, "-c", program], text=True,
                                     cwd=Path(__file__).parent.parent, env=os.environ | one)
    before, during, after = map(int, counts.split())
    assert before == after < during
