"""Tests of data/images.py and data/pictures.py."""

import io
import multiprocessing
import os
import pickle
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from data import images, pictures


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def photos(folder, count, size=(24, 24), first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.fromarray(noise(*size, i)).save(folder / f"p{i}.png")
    return folder


# ------------------------------------------------------------------------- images


def test_trees_list_folders_and_zips_alike_without_system_files(tmp_path):
    root = tmp_path / "set"
    names = ["a/b.png", "a/c.png", "z.png"]
    system = [".git/x.png", "__MACOSX/a/._b.png", "a/._b.png", "a/.DS_Store", "Thumbs.db"]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for name in names + system:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
            z.writestr("./" + name.replace("/", "\\"), name)
    for path in (root, tmp_path / "set.zip"):
        tree = pickle.loads(pickle.dumps(images.Tree(path)))
        assert tree.names == names and [tree.read(n) for n in names] == [n.encode() for n in names]


def test_trees_follow_links_without_end_and_take_names_that_are_not_utf8(tmp_path):
    photos(tmp_path / "far", 2)
    root = photos(tmp_path / "set", 1)
    (root / "near").symlink_to(tmp_path / "far")
    (root / "loop").symlink_to(root)
    (tmp_path / "far" / "back").symlink_to(root)
    assert images.Tree(root).names == ["near/p0.png", "near/p1.png", "p0.png"]
    odd = os.path.join(os.fsencode(root), b"caf\xe9.png")
    with open(odd, "wb") as f:
        f.write(encoded(Image.fromarray(noise(16, 16))))
    data = images.ImageSet(root, "train", 8)
    assert len(images.Tree(root).names) == 4 and images.printable("caf\udce9\n") == "caf\\udce9"
    assert len(data) + sum(len(images.ImageSet(root, s, 8)) for s in ("val", "test")) == 4


def test_missing_and_broken_sets_are_told_apart(tmp_path):
    photos(tmp_path / "set", 3)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for p in (tmp_path / "set").iterdir():
            z.write(p, p.name)
    data = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.zip").write_text("no zip")
    for name, reason in (("cut.zip", "truncated"), ("text.zip", "no such folder or zip"),
                         ("none", "no such folder or zip")):
        with pytest.raises(ValueError, match=reason):
            images.Tree(tmp_path / name)
    (tmp_path / "bad.zip").write_bytes(data[:60] + bytes(40) + data[100:])
    with pytest.raises(ValueError, match="p.*png: not readable in .*bad.zip"):
        [tree.read(n) for tree in [images.Tree(tmp_path / "bad.zip")] for n in tree.names]
    with pytest.raises(ValueError, match="not readable"):
        images.Tree(tmp_path / "set").read("other.png")


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (64, 64)])
def test_a_centre_crop_is_the_crop_of_the_resized_picture(shape):
    picture = Image.fromarray(noise(*shape))
    ours = images.decode(encoded(picture), 20)
    short, (width, height) = min(shape), picture.size
    box = (width - short) // 2, (height - short) // 2
    square = picture.crop((*box, box[0] + short, box[1] + short))
    expected = np.asarray(square.resize((20, 20), Image.Resampling.BILINEAR))
    inner = np.s_[3:-3, 3:-3]  # at its edge the crop of a resized picture sees more
    assert np.abs(ours[inner].astype(int) - expected[inner]).max() <= 1


def test_fits_have_the_promised_shapes_and_unknown_ones_are_refused():
    data = encoded(Image.fromarray(noise(30, 50)))
    shapes = [images.decode(data, 12, fit).shape for fit in ("crop", "short", "squeeze")]
    assert shapes == [(12, 12, 3), (12, 20, 3), (12, 12, 3)]
    assert (images.decode(data) == noise(30, 50)).all()
    assert (images.decode(data, 30, "short") == noise(30, 50)).all()
    with pytest.raises(ValueError, match="choose crop, short or squeeze"):
        images.decode(data, 12, "stretch")


@pytest.mark.parametrize("mode, color, expected", [
    ("1", 1, 255), ("L", 90, 90), ("LA", (0, 0), 255), ("RGBA", (0, 0, 0, 0), 255),
    ("RGBA", (0, 0, 0, 128), 127), ("I;16", 50000, 195), ("F", 0.5, 128), ("CMYK", (0,) * 4, 255),
    ("I", 50000, 195), ("LAB", (255, 128, 128), 255)])
def test_every_mode_is_read_as_rgb_on_white(mode, color, expected):
    kind = "TIFF" if mode in ("F", "CMYK", "I", "LAB") else "PNG"
    pixels = images.decode(encoded(Image.new(mode, (8, 8), color), kind))
    assert pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - expected).max() <= 1


def test_orientation_animation_text_and_missing_ends_do_not_hinder():
    halves = np.zeros((10, 20, 3), np.uint8)
    halves[:, :10] = 255  # orientation 6 turns left to top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = images.decode(encoded(Image.fromarray(halves), exif=exif))
    assert turned.shape == (20, 10, 3) and turned[2].min() == 255 and turned[17].max() == 0
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert images.decode(data)[4, 4].tolist() == [255, 0, 0]
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 3_000_000, zip=True)
    assert (images.decode(encoded(Image.fromarray(noise(9, 9)), pnginfo=info)) == noise(9, 9)).all()
    whole = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    cut = images.decode(whole[: len(whole) * 2 // 3])
    assert images.ends_early(whole[:-9]) and not images.ends_early(whole + b"trailer")
    assert (cut[:24] == images.decode(whole)[:24]).all() and cut.shape == (64, 64, 3)


def test_pictures_too_small_too_large_or_broken_are_refused_in_words():
    with pytest.raises(ValueError, match="7 x 5 pixels are fewer than the 8 x 8 patches"):
        images.decode(encoded(Image.new("RGB", (7, 5))), 64, least=8)
    strip = encoded(Image.new("1", (8, 3_000_000)), "TIFF", compression="group4")
    for fit in ("crop", "short"):
        with pytest.raises(ValueError, match="too long a strip: 64 x 24000000"):
            images.decode(strip, 64, fit)
    assert images.decode(strip, 64, "squeeze").shape == (64, 64, 3)
    with pytest.raises(ValueError, match="20000 x 20000 pixels|exceeds limit"):
        images.decode(encoded(Image.new("1", (20000, 20000)), "TIFF", compression="group4"))
    for data in (b"", b"text", encoded(Image.fromarray(noise(9, 9)))[:60]):
        with pytest.raises(ValueError):
            images.decode(data)


def test_a_photo_is_squeezed_whole_and_keeps_its_shape(tmp_path, capsys):
    Image.fromarray(noise(30, 50)).save(tmp_path / "p.jpg")
    pixels, shape = images.read_photo(tmp_path / "p.jpg", 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and shape == (30, 50)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "p.jpg").read_bytes()[:-40])
    images.read_photo(tmp_path / "cut.jpg", 16)
    assert "cut.jpg ends early" in capsys.readouterr().err
    for name in ("none.jpg", "."):
        with pytest.raises(ValueError, match="not a picture that can be read"):
            images.read_photo(tmp_path / name, 16)


SPLITS = ("train", "val", "test")


@pytest.mark.parametrize("folders, expected", [
    (("train", "val", "test"), ("train", "val", "test")),
    (("Training", "validation", "testing"), ("Training", "validation", "testing")),
    (("a/b/train", "a/b/val"), ("a/b/train", "a/b/train", "a/b/val")),
    (("train", "test"), ("train", "train", "test"))])
def test_folders_are_splits_and_a_missing_one_is_a_tenth_of_train(folders, expected):
    names = [f"{folder}/cat/{i}.png" for folder in folders for i in range(20)]
    chosen = [images.split_names(names, s)[0] for s in SPLITS]
    assert sorted(sum(chosen, [])) == sorted(names) and all(c == sorted(c) for c in chosen)
    assert [{n[: n.index("/cat/")] for n in c} for c in chosen] == [{e} for e in expected]
    assert len(chosen[1]) == (20 if expected[1] == folders[1] and len(folders) == 3 else 2)


def test_celeba_has_its_ids_and_other_trees_a_hash():
    ids = (1, 162770, 162771, 182637, 182638, 202599)
    names = [f"celeba/img_align_celeba/{i:06}.jpg" for i in ids] + ["img_align_celeba/note.png"]
    chosen = [images.split_names(names, s)[0] for s in SPLITS]
    assert [[int(Path(n).stem) for n in c] for c in chosen] == [[*ids[:2]], [*ids[2:4]], [*ids[4:]]]
    names = [f"train/{i}.png" for i in range(50)] + [f"car/{i}\udce9.png" for i in range(50)]
    chosen = [images.split_names(names, s)[0] for s in SPLITS]  # here a train is a vehicle
    assert [len(c) for c in chosen] == [80, 10, 10] and len(set(sum(chosen, []))) == 100


def test_pixels_and_large_pixels_show_the_same_square(tmp_path):
    photos(tmp_path / "train", 4, (50, 40)), photos(tmp_path / "test", 1, (40, 40))
    photos(tmp_path / "train", 1, (30, 20), first=4)
    data = images.ImageSet(tmp_path, "train", 16, zoom=2)
    part, _ = images.split_names(images.Tree(tmp_path).names, "train")
    assert data.names == part and data.source.startswith("train split of")
    for name, small, large, native in zip(part, data.pixels, data.large, data.native):
        file = (tmp_path / name).read_bytes()
        assert (small.movedim(0, -1).numpy() == images.decode(file, 16)).all()
        assert (large.movedim(0, -1).numpy() == images.decode(file, 32)).all()
        assert native == (min(images.decode(file).shape[:2]) >= 32)
    (small, large), = data.batches([([2, 0, 2], 0)])
    assert torch.equal(small, data.pixels[[2, 0, 2]]) and torch.equal(large, data.large[[2, 0, 2]])


def test_unreadable_pictures_are_named_counted_and_left_out(tmp_path, capsys):
    photos(tmp_path / "train", 12), photos(tmp_path / "val", 1)
    (tmp_path / "train" / "broken.png").write_bytes(b"no picture")
    data = images.ImageSet(tmp_path, "train", 8)
    out = capsys.readouterr().out
    assert "left out: train/broken.png" in out and "1 of 11 pictures are unreadable" in out
    assert len(data) == len(data.pixels) == len(data.labels) == len(data.native) == 10
    with pytest.raises(ValueError, match=r"none of 1 pictures .*24 x 24 pixels are fewer"):
        images.ImageSet(tmp_path, "test", 8, least=99)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no pictures \(.png"):
        images.ImageSet(tmp_path / "none", "train", 8)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_over_a_zip_read_what_memory_holds(tmp_path, monkeypatch, method):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for i in range(40):
            z.writestr(f"{i}.png", encoded(Image.fromarray(noise(30, 20, i))))
    lists = [([3, 1, 4, 1], 5), ([9, 2, 6, 5], 3)] * 4
    memory = {crop: images.ImageSet(tmp_path / "set.zip", "train", 8, random_crop=crop)
              for crop in (False, True)}
    monkeypatch.setattr(images, "free_memory", lambda: 0.0)
    before, default = torch.get_rng_state(), multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        for crop, held in memory.items():
            disk = images.ImageSet(tmp_path / "set.zip", "train", 8, random_crop=crop)
            assert disk.pixels is None and disk.kept is None and disk.names == held.names
            for (a, _), (b, _) in zip(held.batches(lists), disk.batches(lists), strict=True):
                assert torch.equal(a, b)
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_picture_that_vanishes_is_named_by_the_workers(tmp_path, monkeypatch):
    photos(tmp_path, 10)
    monkeypatch.setattr(images, "free_memory", lambda: 0.0)
    data = images.ImageSet(tmp_path, "train", 8)
    (tmp_path / data.names[3]).unlink()
    with pytest.raises(ValueError, match=rf"^{data.names[3]} .*restore it$"):
        list(data.batches([([0, 3], 0)]))


def test_random_crops_are_cut_from_the_native_picture_by_seed_and_index(tmp_path):
    photos(tmp_path, 10, (24, 40))
    Image.fromarray(noise(6, 9)).save(tmp_path / "p0.png")  # smaller: enlarged first
    data = images.ImageSet(tmp_path, "train", 16, random_crop=True)
    crops = torch.stack([data[1, seed][0] for seed in range(40)])
    native = torch.from_numpy(images.decode((tmp_path / data.names[1]).read_bytes()))
    windows = native.unfold(0, 16, 1).unfold(1, 16, 1).flatten(0, 1)  # (places, 3, 16, 16)
    found = {int((windows == crop).flatten(1).all(1).nonzero()) for crop in crops}
    assert len(found) > 25 and torch.equal(data[1, 7][0], crops[7])
    assert next(data.batches([(range(len(data)), 0)]))[0].shape[1:] == (3, 16, 16)
    with pytest.raises(ValueError, match="zoom=2"):
        images.ImageSet(tmp_path, "train", 16, zoom=2, random_crop=True)


def test_nearest_filling_takes_a_nearest_seen_pixel():
    gen = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 9, 13, generator=gen)
    share = torch.tensor([0.3, 0.05, 1, 0]).view(4, 1, 1, 1)
    mask = torch.rand(4, 1, 9, 13, generator=gen) < share
    filled = images.nearest_filling(image, mask.float())
    places = torch.cartesian_prod(torch.arange(9.0), torch.arange(13.0))
    for i in range(3):
        seen, colors = mask[i, 0].flatten(), image[i].flatten(1).mT
        distances = torch.cdist(places, places[seen])
        for p in range(9 * 13):
            source = (colors[seen] == filled[i, p]).all(1).nonzero()[0, 0]
            assert distances[p, source] == distances[p].min()
    assert (filled[3] == 0.5).all()


# ------------------------------------------------------------------------- pictures


def test_grids_and_signed_maps_have_the_promised_pixels():
    red, blue = (np.full((h, w, 3), c, np.uint8) for h, w, c in ((4, 6, 10), (2, 3, 20)))
    sheet = pictures.image_grid([[red, blue], [blue]], gap=1)
    assert sheet.shape == (9, 13, 3)
    assert (sheet[:4, :6] == 10).all() and (sheet[:2, 7:10] == 20).all()
    assert (sheet[4] == 255).all() and (sheet[5:7, :3] == 20).all()
    shown = pictures.signed_map(torch.tensor([[0.0, 2.0, -2.0, 1.0]]), limit=2.0)[0]
    assert shown.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0.5, 0.5]]
    assert pictures.signed_map(torch.zeros(3, 3)).min() == 1
    assert pictures.enlarge(red, 3).shape == (12, 18, 3)
    assert pictures.resize(torch.rand(4, 6, 3), (8, 12)).shape == (8, 12, 3)


def test_formats_are_known_before_the_work_and_written(tmp_path):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (0, 120, 250)]
    for name in ("a.png", "a.JPG", "a.gif", "a.webp", "a.bmp"):
        pictures.write(frames[1:2], tmp_path / "part", pictures.picture_format(name))
        assert Image.open(tmp_path / "part").size == (8, 8)
    for name in ("a.gif", "a.webp", "a.png", "a.apng"):
        pictures.write(frames, tmp_path / "part", pictures.picture_format(name, animated=True))
        assert Image.open(tmp_path / "part").n_frames == 3
    pictures.write(frames, tmp_path / "f", pictures.picture_format(tmp_path / "f", animated=True))
    assert [p.name for p in sorted((tmp_path / "f").iterdir())] == ["000.png", "001.png", "002.png"]
    for name, animated in (("a.mp4", True), ("a.jpg", True), ("a.mp4", False), ("a", False),
                           ("a.xbm", False), ("a.psd", False)):
        with pytest.raises(ValueError, match="end the name in .*png"):
            pictures.picture_format(name, animated)


def test_ticks_are_round_numbers_and_dates():
    assert list(pictures.ticks(0.3, 1.32).values()) == ["0.4", "0.6", "0.8", "1.0", "1.2"]
    assert list(pictures.ticks(1700, 2008).values()) == ["1700", "1800", "1900", "2000"]
    assert pictures.log_ticks(-1, 2) == {0.1: "0.1", 1: "1", 10: "10", 100: "100"}
    for low, high, first in ((0, 180, "2020-01"), (0, 30000, "2020"), (0.5, 20, "2020-01-02"),
                             (0, 1, "01. 00:00")):
        marks = pictures.date_ticks(low, high, datetime(2020, 1, 1))
        assert 2 <= len(marks) <= 8 and all(low <= m <= high for m in marks)
        assert next(iter(marks.values())) == first
    assert pictures.date_ticks(0, 100, datetime(2020, 1, 1))[31.0] == "2020-02"


@pytest.mark.parametrize("origin", [None, datetime(1999, 12, 31)])
def test_plots_draw_band_mean_and_points_where_the_axes_say(origin):
    x = torch.linspace(0, 100, 51)
    context = (torch.tensor([50.0]), torch.tensor([5.0]))
    plot = pictures.curve_plot(x, 0 * x, 0 * x - 1, 0 * x + 1, [0 * x + 0.5], context,
                               (context[0], context[1] - 10), (480, 320), dates_origin=origin)
    assert plot.shape == (320, 480, 3) and plot.dtype == np.uint8
    black, orange = ((np.abs(plot.astype(int) - c).sum(-1) < 30).nonzero()
                     for c in ([0, 0, 0], [0xE0, 0x8A, 0x2B]))
    (y1, x1), (y2, x2) = (np.mean(v, 1) for v in (black, orange))
    band = (plot == [0xD6, 0xE4, 0xF5]).all(-1).nonzero()
    assert abs(x1 - x2) < 1 and y1 < np.min(band[0]) < np.max(band[0]) < y2
    assert abs(np.mean(band[0]) - (y1 + y2) / 2) < 3 and abs(x1 - np.mean(band[1])) < 3
    lines = {"a": [(1, 1e-3), (1000, 10)], "b": [(1, 0), (10, float("nan"))]}
    assert pictures.line_plot(lines, log=(True, True), size=(300, 200)).shape == (200, 300, 3)
    assert pictures.curve_plot(x, x * 0, x * 0, x * 0, [], ([], [])).shape == (320, 480, 3)
