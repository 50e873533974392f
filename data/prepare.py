"""Rebuild the bundled data sets from the public packages they are made of, and store models.

    python data/prepare.py emoji       # data/emoji64.zip      images, from an npm package
    python data/prepare.py furniture   # data/furniture64.zip  posed views, from a Debian package
    python data/prepare.py series      # data/sunspots.csv, elnino.csv  from a Python package
    python data/prepare.py pretrained runs/image-transinr  # data/pretrained/image-transinr.pt

The files are in the repository; this script documents how they were made. It writes the same
bytes every time (given the same NumPy and Pillow) and the credits to data/LICENSES.md.
"""

import csv
import hashlib
import io
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
SIZE = 64  # pixels per side of every picture of both sets


# ---- Shared: downloads, reproducible zips, splits, credits ----------------------------------


def fetch(command, folder):
    """Run a command that leaves one file in the empty `folder`; returns that file's path."""
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(
            f"'{' '.join(command)}' failed ({error}); get the file elsewhere and give its path "
            "with --package") from error
    return next(Path(folder).iterdir())


def write_zip(path, files):
    """Write {name: bytes} sorted and undated; only JSON needs compression."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            packed = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            archive.writestr(info, files[name], compress_type=packed)
    click.echo(f"{path}: {len(files)} files, {path.stat().st_size / 1e6:.1f} MB")


def webp(image):
    """Encode a PIL image (RGB or RGBA) as lossless WebP; returns bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=80, method=6)  # 100: 100 times slower
    return buffer.getvalue()


def stable_fraction(text):
    """Map a string to [0, 1), evenly and alike on every machine (Python's hash() is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def similar_pairs(features, threshold):
    """Index pairs i < j of rows of `features` (N, D) whose RMS difference is below threshold."""
    features = features.astype(np.float32)
    energy = (features**2).mean(1)
    product = features @ features.T / features.shape[1]
    distance2 = energy[:, None] + energy[None] - 2 * product  # (N, N), squared
    return np.argwhere(np.triu(distance2 < threshold**2, k=1))


def merge(keys, pairs):
    """Group items that share a key or are linked by a pair.

    keys: one string per item; pairs: (P, 2) item indices.
    Returns one group name per item: the smallest key in its group.
    """
    parent = {key: key for key in keys}

    def root(key):
        while parent[key] != key:
            key = parent[key]
        return key

    for i, j in pairs:
        a, b = sorted((root(keys[i]), root(keys[j])))
        parent[b] = a
    return [root(key) for key in keys]


def write_credits(title, text):
    """Replace or append the section `title` of LICENSES.md."""
    path = DATA / "LICENSES.md"
    head = "# Licences of the bundled data\n\nWritten by `prepare.py`, one section per file."
    parts = path.read_text().split("\n## ") if path.exists() else [head]
    sections = dict(part.split("\n", 1) for part in parts[1:])
    sections[title] = f"\n{text.strip()}\n"
    body = "".join(f"\n## {name}\n{sections[name]}" for name in sorted(sections))
    path.write_text(parts[0].rstrip() + "\n" + body)


@click.group()
def main():
    """Rebuild the bundled data sets."""


# ---- Series: real curves ----------------------------------------------------------------------

SERIES_PACKAGE = "statsmodels==0.15.0"
SERIES_CREDITS = {
    "sunspots.csv": """
Yearly numbers of sunspots, 1700-2008, of the **National Geophysical Data Center**
(http://www.ngdc.noaa.gov/stp/solar/solarda3.html), from version 0.15.0 of the Python package
`statsmodels`, which says: "This data is public domain." Unchanged.""",
    "elnino.csv": """
Monthly sea surface temperatures (degrees Celsius) of the Pacific Ocean, 0-10 degrees South and
90-80 degrees West, 1950-2010, of the **National Oceanic and Atmospheric Administration**
(ERSST.V3B, Nino 1+2, http://www.cpc.ncep.noaa.gov/data/indices/), from version 0.15.0 of the
Python package `statsmodels`, which says: "This data is in the public domain." Changes: one row a
month, dated in years; months without a value left out.""",
}


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .whl (default: pip download).")
def series(package):
    """Make sunspots.csv and elnino.csv: rows of time in years and value."""
    with tempfile.TemporaryDirectory() as folder:
        package = package or fetch(
            [sys.executable, "-m", "pip", "download", "--no-deps", SERIES_PACKAGE], folder)
        with zipfile.ZipFile(package) as wheel:
            tables = {name: list(csv.reader(io.TextIOWrapper(wheel.open(
                f"statsmodels/datasets/{name}/{name}.csv")))) for name in ("sunspots", "elnino")}
    rows = {"sunspots.csv": ["year,sunspots"] + [",".join(r) for r in tables["sunspots"][1:]],
            "elnino.csv": ["year,celsius"]}
    for year, *months in tables["elnino"][1:]:
        rows["elnino.csv"] += [f"{int(year) + (i + 0.5) / 12:.3f},{float(v):g}"
                               for i, v in enumerate(months) if float(v) > 0]
    for name, lines in rows.items():
        (DATA / name).write_text("\n".join(lines) + "\n")
        write_credits(name, SERIES_CREDITS[name])
        click.echo(f"{DATA / name}: {len(lines) - 1} rows")


# ---- Emoji: 64 x 64 images ------------------------------------------------------------------

EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
EMOJI_TEST_FRACTION = 0.1
EMOJI_NEAR = 0.05  # RMS difference (pixels in [0, 1]) below which two emojis are 'the same'
EMOJI_CREDITS = """
3,391 images of **Microsoft Fluent Emoji** (3D style, https://github.com/microsoft/fluentui-emoji),
taken from version 1.1.0 of the npm package `@lobehub/fluent-emoji-3d`
(https://github.com/lobehub/fluent-emoji), whose metadata declares the MIT licence and which ships
no licence file of its own. Changes: put on white and reduced from 256 to 64 pixels.

> MIT License
>
> Copyright (c) Microsoft Corporation (the emojis)
> Copyright (c) 2023 LobeHub (the package)
>
> Permission is hereby granted, free of charge, to any person obtaining a copy
> of this software and associated documentation files (the "Software"), to deal
> in the Software without restriction, including without limitation the rights
> to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
> copies of the Software, and to permit persons to whom the Software is
> furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all
> copies or substantial portions of the Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
> IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
> FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
> AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
> LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
> OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
> SOFTWARE.
"""


def emoji_base(name):
    """The emoji without skin tone, gender and presentation: one key for all its variants.

    Names are code points joined by '-': 1f3fb..1f3ff are skin tones, 200d-2640/2642 the gender
    suffix, fe0f asks for the colour glyph, and 1f468/1f469/1f9d1 are man/woman/person.
    """
    name = re.sub(r"-(1f3f[b-f]|fe0f)", "", name)
    name = re.sub(r"-200d-264[02]", "", name)
    return re.sub(r"\b1f46[89]\b", "1f9d1", name)


def emoji_image(data):
    """Decode a file (256 px RGBA) and return it on a white square, SIZE x SIZE RGB."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)  # four of the images are not square
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .tgz (default: npm pack).")
def emoji(package):
    """Make emoji64.zip: train/NAME.webp and test/NAME.webp, split by base emoji."""
    with tempfile.TemporaryDirectory() as folder:
        package = package or fetch(["npm", "pack", EMOJI_PACKAGE], folder)
        with tarfile.open(package) as archive:
            members = [m for m in archive.getmembers() if m.name.endswith(".webp")]
            images = {Path(m.name).stem: emoji_image(archive.extractfile(m).read())
                      for m in members}
    names = sorted(images)
    pixels = np.stack([np.asarray(images[name]) for name in names]).reshape(len(names), -1)
    near = similar_pairs(pixels / 255, EMOJI_NEAR)
    bases = [emoji_base(name) for name in names]
    groups = merge(bases, near)
    test = [stable_fraction(group) < EMOJI_TEST_FRACTION for group in groups]

    apart = sum(bases[i] != bases[j] for i, j in near)
    click.echo(f"{len(names)} images, {len(set(bases))} base emojis, {len(set(groups))} groups "
               f"({apart} near-identical pairs of different bases kept together); "
               f"{len(names) - sum(test)} for training, {sum(test)} for test "
               f"of {len({g for g, t in zip(groups, test) if t})} groups")
    write_zip(DATA / "emoji64.zip", {
        f"{'test' if held_out else 'train'}/{name}.webp": webp(images[name])
        for name, held_out in zip(names, test)})
    write_credits("emoji64.zip", EMOJI_CREDITS)


# ---- Furniture: posed views in the ShapeNet layout ------------------------------------------

FURNITURE_PACKAGE = "sweethome3d-furniture=1.8-1"
ANGLE = 0.52  # radians; the unit sphere at RADIUS just fits (it needs 2 asin(1/4) = 0.505)
RADIUS = 4.0
SUPERSAMPLE = 3
MIN_COVERAGE = 0.02  # objects that fill less of their pictures on average are left out
FURNITURE_NEAR = 0.165  # RMS difference of canonical views below which two objects are 'the same'
TEST_FRACTION = 0.11
VIEWS = {"chairs": 40, "lamps": 40, "cars": 40, "furniture": 16}
MIN_TEST = {"chairs": 14, "lamps": 6, "cars": 5, "furniture": 50}
SPLIT_NAME = {"chairs": "chair", "lamps": "lamp", "cars": "car", "furniture": "furniture"}
LIBRARIES = {  # file: (licence, its address, who published it)
    "BlendSwap-CC-0": ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/",
                       "Blend Swap contributors, converted by Emmanuel Puybaret / eTeks"),
    "BlendSwap-CC-BY": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/",
                        "Blend Swap contributors, converted by Emmanuel Puybaret / eTeks"),
    "KatorLegaz": ("CC BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/",
                   "Copyright 2003-2008 Andrew Kator & Jennifer Legaz"),
    "Scopia": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/",
               "Copyright 2010-2012 Scopia Visual Interfaces Systems, s.l., and eTeks"),
}  # the fifth, Reallusion, holds people only
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


def classify(entry):
    """The class of a catalogue entry, or None where it is left out."""
    name, category = entry["name"].lower(), entry["category"]
    if category in ("Doors and windows", "Staircases") or re.search(NOT_OBJECT, name):
        return None
    if category == "Characters" and re.search(PEOPLE, name):
        return None
    if category == "Vehicles":
        return "cars" if re.search(CAR, name) else "furniture"
    if category == "Lights" or re.search(LAMP, name):
        return "lamps"
    if re.search(CHAIR, name) and not re.search(NOT_CHAIR, name):
        return "chairs"
    return "furniture"


def catalogue_entry(properties, number, folder, library):
    """Entry `number` of a library's catalogue as a dict; ids are the library and the model."""
    model = folder / library / properties[f"model#{number}"].lstrip("/")
    rotation = properties.get(f"modelRotation#{number}")
    entry = {
        "id": f"{library.lower()}-{re.sub(r'[^a-z0-9]+', '-', model.stem.lower())}",
        "name": properties.get(f"name#{number}", model.stem),
        "category": properties[f"category#{number}"],
        "creator": properties[f"creator#{number}"],
        "library": library,
        "model": model,
        "rotation": rotation and np.array(rotation.split(), np.float32).reshape(3, 3),
    }
    return {**entry, "class": classify(entry)}


def read_catalogue(folder):
    """The entries of all libraries that belong to a class, sorted by id."""
    entries = []
    for library in LIBRARIES:
        properties = read_properties(folder / library / "PluginFurnitureCatalog.properties")
        numbers = [key.partition("#")[2] for key in properties if key.startswith("model#")]
        entries += [catalogue_entry(properties, n, folder, library) for n in numbers]
    used = sorted((e for e in entries if e["class"]), key=lambda e: e["id"])
    assert len({e["id"] for e in used}) == len(used), "two models share an id"
    return used


def plain_words(text):
    """Lower-case words without numbering, punctuation and colours."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())
    dull = {"v", "black", "white", "beige", "red", "green", "blue", "clear", "textured", "swap"}
    return [word for word in words if word not in dull]


def hemisphere(count, rng):
    """`count` camera-to-world matrices spread over the upper hemisphere, in random order.

    A golden-angle spiral, even in area, turned about the axis and jittered for each object.
    """
    index = rng.permutation(count) + rng.uniform(0.1, 0.9, count)
    height = index / count
    azimuth = index * np.pi * (3 - np.sqrt(5)) + rng.uniform(0, 2 * np.pi)
    flat = np.sqrt(1 - height**2)
    positions = RADIUS * np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), height], -1)
    return [meshrender.look_at_origin(position) for position in positions]


def fingerprint(mesh):
    """Four small canonical views as one vector: opacity, modulated by relative brightness."""
    views = []
    for azimuth in np.radians([-70, 20, 110, 200]):
        position = RADIUS * np.array([0.9 * np.cos(azimuth), 0.9 * np.sin(azimuth), 0.19**0.5])
        view = meshrender.render(mesh, meshrender.look_at_origin(position), 32, ANGLE, 1) / 255
        views.append(view)
    alpha = np.stack(views)[..., 3]
    grey = np.stack(views)[..., :3].mean(-1)
    mean = (grey * alpha).sum() / max(alpha.sum(), 1)
    return (alpha * (0.5 + 0.5 * np.clip(grey / max(mean, 1e-3), 0, 2))).ravel()


def render_object(entry):
    """Render one catalogue entry.

    Returns its files {name in the folder: bytes}, its mean coverage and its fingerprint; raises
    ValueError where the model is unreadable.
    """
    mesh = meshrender.normalise(meshrender.load_obj(entry["model"]), entry["rotation"])
    rng = np.random.default_rng(int(stable_fraction(entry["id"]) * 2**53))
    poses = hemisphere(VIEWS[entry["class"]], rng)
    views = [meshrender.render(mesh, pose, SIZE, ANGLE, SUPERSAMPLE) for pose in poses]
    files = {f"r_{i}.webp": webp(Image.fromarray(view)) for i, view in enumerate(views)}
    frames = [{"file_path": f"./r_{i}", "transform_matrix": pose.round(7).tolist()}
              for i, pose in enumerate(poses)]
    scene = {"camera_angle_x": ANGLE, "frames": frames}
    files["transforms.json"] = json.dumps(scene).encode()
    coverage = np.mean([view[..., 3] for view in views]) / 255
    return files, coverage, fingerprint(mesh)


def split_objects(objects, fingerprints):
    """Choose the test objects of one class; near-duplicates stay together.

    Objects belong together if their model files or their names of several words are alike up
    to numbering and colour, or their canonical views are. Groups are taken in the order of a
    stable hash as long as they fit. Returns {id: group} and the test ids.
    """
    stems = ["".join(plain_words(entry["model"].stem)) or entry["id"] for entry in objects]
    names = [plain_words(entry["name"]) for entry in objects]
    same_name = [(i, j) for i in range(len(objects)) for j in range(i)
                 if names[i] == names[j] and len(names[i]) > 1]
    pairs = [*same_name, *similar_pairs(np.stack(fingerprints), FURNITURE_NEAR)]
    groups = merge(stems, pairs)
    kind = objects[0]["class"]
    wanted = max(MIN_TEST[kind], round(TEST_FRACTION * len(objects)))
    test = []
    for group in sorted(set(groups), key=lambda g: stable_fraction(f"held out/{kind}/{g}")):
        members = [entry["id"] for entry, name in zip(objects, groups) if name == group]
        if len(test) + len(members) <= wanted:
            test.extend(members)
    return {entry["id"]: group for entry, group in zip(objects, groups)}, sorted(test)


def furniture_credits(objects):
    """Who made what, by library and creator, as the catalogue and debian/copyright say."""
    text = (f"Pictures of {len(objects)} 3D models from version 1.8-1 of the Debian package\n"
            "`sweethome3d-furniture` (https://www.sweethome3d.com). Changes: the models were "
            "scaled to the\nunit sphere and rendered at 64 x 64 pixels. Object ids are the "
            "library followed by the model file.\n")
    for library, (licence, address, owner) in LIBRARIES.items():
        by_creator = {}
        for entry in objects:
            if entry["library"] == library:
                label = f"{entry['name']} ({entry['id'][len(library) + 1:]})"
                by_creator.setdefault(entry["creator"], []).append(label)
        text += f"\n### {library}: {licence}\n\n{owner}. Licence: {address}\n\n"
        for creator in sorted(by_creator, key=str.lower):
            text += f"- **{creator}**: {', '.join(by_creator[creator])}\n"
    return text


def unpack_furniture(package, folder):
    """Unpack the libraries of the .deb into folder/NAME; None downloads it first."""
    package = package or fetch(["apt-get", "download", FURNITURE_PACKAGE], folder)
    subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
    for library in LIBRARIES:
        path = folder / f"root/usr/share/sweethome3d/furniture/{library}.sh3f"
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / library)


@main.command()
@click.option("--package", type=click.Path(exists=True), help="The .deb (default: apt-get).")
def furniture(package):
    """Make furniture64.zip: CLASS/ID/transforms.json and views, and the split of each class."""
    with tempfile.TemporaryDirectory() as folder:
        unpack_furniture(package, Path(folder))
        files, used, fingerprints = {}, [], {}
        for number, entry in enumerate(read_catalogue(Path(folder)), 1):
            try:
                views, coverage, fingerprints[entry["id"]] = render_object(entry)
            except ValueError as error:
                click.echo(f"left out {entry['id']}: {error}")
                continue
            if coverage < MIN_COVERAGE:
                click.echo(f"left out {entry['id']}: covers {coverage:.1%} of its pictures")
                continue
            used.append(entry)
            place = f"{entry['class']}/{entry['id']}"
            files.update({f"{place}/{name}": data for name, data in views.items()})
            if number % 50 == 0:
                click.echo(f"{number} models ...")
    for kind, name in SPLIT_NAME.items():
        members = [entry for entry in used if entry["class"] == kind]
        groups, test = split_objects(members, [fingerprints[entry["id"]] for entry in members])
        train = sorted(set(groups) - set(test))
        split = {"train": train, "val": [], "test": test}
        files[f"{name}_splits.json"] = json.dumps(split, indent=1).encode()
        click.echo(f"{kind}: {len(train)} for training, {len(test)} for test; "
                   f"{len(set(groups.values()))} groups of near-duplicates")
    write_zip(DATA / "furniture64.zip", files)
    write_credits("furniture64.zip", furniture_credits(used))


# ---- Pretrained models: a trained run in half precision, and what it scores ------------------


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cores", type=int, help="That the run had; default: as many as scoring has.")
def pretrained(run, cores):
    """Store a run's weights in half precision; score the stored file on the bundled test set."""
    sys.path.insert(0, str(DATA.parent))
    import tinyinr
    import torch

    ckpt = tinyinr.read_checkpoint(run / "ckpt.pt")
    cfg, device = tinyinr.Config(**ckpt["config"]), tinyinr.choose_device("cpu")
    name = f"{cfg.task}-{cfg.model}" if cfg.preset == "small" else cfg.preset
    path = DATA / "pretrained" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    half = {name: value.half() for name, value in ckpt["model"].items()}
    with tinyinr.atomic(path) as part:
        torch.save({k: ckpt[k] for k in ("format", "config", "step", "elapsed")}
                   | {"model": half}, part)
    known, test = (tinyinr.DATASETS[cfg.task](cfg, None, split) for split in ("train", "test"))
    usual = tinyinr.make_config(cfg.preset, cfg.task, cfg.model).minutes
    record = {
        "command": f"python tinyinr.py train --task {cfg.task} --model {cfg.model}"
                   + f" --preset {cfg.preset}" * (cfg.preset != "small")
                   + f" --minutes {cfg.minutes:g}" * (cfg.minutes != usual),
        "minutes": round(ckpt["elapsed"] / 60, 1), "steps": ckpt["step"], "seed": cfg.seed,
        "cpu": torch.cpu.get_capabilities().get("cpu_name", ""),
        "cores": cores or torch.get_num_threads(),
        "scores": tinyinr.score(tinyinr.load(path), test, device, known)}
    tinyinr.write_json(path.with_suffix(".json"), record)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    tinyinr.report(record["scores"])


if __name__ == "__main__":
    main()
