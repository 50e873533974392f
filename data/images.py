"""Picture files of any kind -> uint8 pixels; sets of pictures, their splits, and a baseline."""

import contextlib
import io
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

DATA = Path(__file__).parent
MOST_BYTES, MOST_PIXELS = 1 << 28, 1 << 27  # of a file, of a picture
IMAGE_SUFFIXES = tuple(".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .avif".split())
SYSTEM_FILE = re.compile(r"(^|/)(\._[^/]*|\.ds_store|thumbs\.db)$|(^|/)(__macosx|\.[^/]+)/", re.I)
SPLIT_FOLDER = re.compile(r"(?<![^/])(train|val|test)(?:ing|id|idation)?(?=/)", re.I)
CELEBA = {"train": (1, 162770), "val": (162771, 182637), "test": (182638, 202599)}  # ids
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long texts are no reason to refuse
warnings.filterwarnings("ignore", module=r"PIL\.")  # nor is damaged metadata one to warn


class Tree:
    """The files of a folder or zip: `.path`, and `.names`, sorted, relative, with slashes.

    Follows links to folders and passes over system files. Can be pickled, and used by threads
    and forks. Errors: ValueError for what is neither a folder nor an intact zip.
    """

    def __init__(self, path):
        self.path, self.zip = Path(path), (0, None)  # (process, the zip it has opened)
        self.is_zip = self.path.is_file()
        try:
            names = self.open_zip().namelist() if self.is_zip else files_below(self.path)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as e:
            cut = self.is_zip and self.path.open("rb").read(2) == b"PK"
            kind = ("a broken or truncated zip; copy it again" if cut else "no such folder or zip"
                    if not self.is_zip else "a file that is no zip; give a folder or zip")
            raise ValueError(printable(f"{path}: {kind} ({e})")) from e
        self.stored = {re.sub(r"^(\.?/)+", "", n.replace("\\", "/")): n for n in names}
        self.names = sorted(n for n in self.stored
                            if not n.endswith("/") and not SYSTEM_FILE.search(n))
        self.folded = {n.lower(): n for n in self.names}

    def open_zip(self) -> zipfile.ZipFile:
        if self.zip[0] != os.getpid():  # a fork would share the position in the file
            self.zip = os.getpid(), zipfile.ZipFile(self.path)
        return self.zip[1]

    def __getstate__(self):
        return self.__dict__ | {"zip": (0, None)}

    def read(self, name: str) -> bytes:
        """A file's bytes. Errors: ValueError for a missing, broken or too large one."""
        try:
            stored = self.stored[name]
            with (self.open_zip().open(stored) if self.is_zip
                  else open(self.path / stored, "rb")) as file:
                data = file.read(MOST_BYTES + 1)
        except Exception as e:  # broken zips raise errors of many kinds
            raise ValueError(printable(f"{name}: not readable in {self.path} ({e!r})")) from e
        if len(data) > MOST_BYTES:
            raise ValueError(printable(f"{name}: more than the {MOST_BYTES:,} bytes that are read"))
        return data


def files_below(folder: Path) -> list[str]:
    """Relative names of all files; a folder that several links lead to is listed once."""
    os.listdir(folder)  # an OSError if there is none
    names, known = [], set()
    for path, folders, files in os.walk(folder, followlinks=True):
        new = os.path.realpath(path) not in known
        known.add(os.path.realpath(path))
        folders[:] = sorted(f for f in folders if new and not f.startswith("."))
        names += [Path(path, f).relative_to(folder).as_posix() for f in files if new]
    return names


def printable(text) -> str:
    """Text as one line that any terminal can show; bytes that are not UTF-8 become escapes."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


@contextlib.contextmanager
def naming(file, needs: str = ""):
    """Within, a ValueError becomes one whose line begins with the file's name.

    needs: what the file has to hold. With it an error of any other kind counts as malformed.
    """
    try:
        yield
    except Exception as e:  # damaged files provoke errors of many kinds
        if not (needs or isinstance(e, ValueError)):
            raise
        words = str(e)[:500]
        if needs and type(e) is not ValueError:
            words = f"malformed ({type(e).__name__}: {words}); needed: {needs}"
        raise ValueError(printable(f"{file}: {words}")) from e


def read_all(names: list, read, what: str) -> list:
    """read(name) for all names, in threads; those that raise ValueError or OSError are left out.

    Says which and why. Errors: ValueError where nothing is left.
    """
    def attempt(name):
        try:
            return read(name)
        except (ValueError, OSError) as e:
            return e

    with ThreadPoolExecutor() as pool, click.progressbar(
            pool.map(attempt, names), len(names), f"reading {len(names)} {what}") as results:
        items = list(results)
    broken = [printable(item) for item in items if isinstance(item, Exception)]
    for reason in broken[:10]:
        click.echo(f"left out: {reason}")
    if len(broken) == len(items):
        raise ValueError(f"none of {len(names)} {what} could be read; the first: {broken[0]}")
    if broken:
        click.echo(f"{len(broken)} of {len(names)} {what} are unreadable and left out")
    return [item for item in items if not isinstance(item, Exception)]


def load_picture(data: bytes, least: int = 1, upright: bool = True) -> Image.Image:
    """An encoded picture of any kind as RGB on white, upright or as its pixels lie.

    Errors: ValueError for what cannot be read, a side under `least` pixels, or too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data + b"\xff\xd9" * ends_early(data)))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the "
                             f"{MOST_PIXELS:,} that are read; give a smaller picture")
        if min(image.size) < least:
            raise ValueError(f"{image.width} x {image.height} pixels are fewer than the {least} x "
                             f"{least} patches that the model reads; give a larger picture")
        if image.format == "PNG" and image.mode in ("L", "RGB") and "transparency" in image.info:
            bits, key = data[24], image.info["transparency"]  # of so many bits: make it 8
            image.info["transparency"] = (key * 255 // (2**bits - 1) if image.mode == "L" else
                                          tuple(v >> bits - 8 for v in key))
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF: as the pixels lie
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except Exception as e:  # pillow's plugins raise whatever the bytes provoke
        raise ValueError(printable(e).partition(" <_io")[0] or type(e).__name__) from e


def ends_early(data: bytes) -> bool:
    """Whether a JPEG lacks its end: there is none behind the last start of a scan."""
    return data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB, transparency on white, 16 bits as 8, floats from [0, 1]."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if "transparency" in image.info:
            values = np.where(values == image.info["transparency"], 65535, values)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.fmin(np.fmax(image, 0), 1) * 255  # NaN becomes 0
        image = Image.fromarray(values.round().astype(np.uint8))
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def resized(image: Image.Image, size: int, fit: str = "crop") -> np.ndarray:
    """An RGB picture -> (H, W, 3) uint8 of another size.

    fit: "crop" (the short side becomes `size`, of it the centre square), "short" (the same without
    the crop) or "squeeze" (both sides become `size`). Antialiased bilinear as in torchvision;
    where it is not squeezed a smaller picture is enlarged bicubically. Errors: ValueError for too
    long a strip.
    """
    short, box = min(image.size), None
    width, height = (size if fit == "squeeze" else size * n // short for n in image.size)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long a strip: "
                         f"{width} x {height} at the size of the model; crop it")
    if fit == "crop":  # a box in the file's pixels, so that it is the same at every size
        x, y = ((n - short) // 2 for n in image.size)
        width, height, box = size, size, (x, y, x + short, y + short)
    enlarged = size > short and fit != "squeeze"
    kernel = Image.Resampling.BICUBIC if enlarged else Image.Resampling.BILINEAR
    return np.array(image.resize((width, height), kernel, box))


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, H, W)


def read_photo(path, size: int, least: int = 1) -> tuple[Tensor, tuple[int, int]]:
    """A photo -> the whole of it squeezed to (3, size, size) uint8, and its (height, width)."""
    try:
        data = Path(path).read_bytes()
        image = load_picture(data, least)
    except (OSError, ValueError) as e:
        raise ValueError(printable(f"{path}: not a picture that can be read ({e})")) from e
    if ends_early(data):
        click.echo(printable(f"{path} ends early: what is missing of it is grey"), err=True)
    return to_tensor(resized(image, size, "squeeze")), (image.height, image.width)


def split_names(names: list[str], split: str, root: str = "") -> tuple[list[str], str]:
    """The names of a split (train, val, test or all), sorted, and in words how the set is divided.

    CelebA by its official ids; else by folders train, val, test (training, valid, ...) at any
    depth, of which train and another must be there; else by a hash of the name, 80/10/10. Splits
    never overlap: without a test folder val is test; without another val a tenth of train is.
    """
    names, groups = sorted(names), {"train": [], "val": [], "test": []}
    if split == "all":
        return names, "all of them"
    if split not in groups:
        raise ValueError(f"split={split!r} is unknown; choose train, val, test or all")
    ids = {n: int(Path(n).stem) for n in names
           if "img_align_celeba/" in f"{root}/{n}" and Path(n).stem.isdecimal()}
    if ids:
        first, last = CELEBA[split]
        return [n for n, i in ids.items() if first <= i <= last], "CelebA's official split"
    folders = {n: m[1].lower() for n in names if (m := SPLIT_FOLDER.search(n))}  # the outermost
    divided = "train" in folders.values() and len(set(folders.values())) > 1
    for name, kind in (folders if divided else dict.fromkeys(names, "train")).items():
        groups[kind].append(name)
    layout = ["folders " + ", ".join(s for s in groups if groups[s])] if divided else []
    order = sorted(groups["train"], key=lambda n: zlib.crc32(n.encode("utf-8", "surrogateescape")))
    tenth = -(-len(order) // 10)
    if not divided:
        groups["test"], order = order[:tenth], order[tenth:]
        layout.append("a tenth is test by a hash of the names")
    elif not groups["test"]:
        groups["test"], groups["val"] = groups["val"], []
        layout.append("val is test")
    if not groups["val"]:
        groups["val"], groups["train"] = order[:tenth], order[tenth:]
        layout.append("a tenth of train is val")
    return sorted(groups[split]), ", ".join(layout)


def free_memory() -> float:
    """Bytes of memory that are free; where a system does not say, all there are, or infinity."""
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


class ImageSet(torch.utils.data.Dataset):
    """Pictures of one split of a folder or zip (None: the bundled ones); S = size, z = zoom.

    set[i, seed]: centre square (3, S, S) uint8 and the same as (3, z S, z S), or None (z = 1); the
    whole picture where fit is "squeeze".
    `.kept`: all of them; None if they fill half of the free memory: the files are read anew.
    `.native` (N,) bool: the file's short side has z S pixels; otherwise it is enlarged.
    `.names`, `.labels`: the bundled archive, or "all"; `.source`: the set in one line.
    random_crop: S x S pixels of the picture at its native size, as torchvision's RandomCrop, by
    (seed, i).
    """

    def __init__(self, path=None, split: str = "train", size: int = 64, zoom: int = 1,
                 random_crop: bool = False, limit: int = 0, least: int = 1, fit: str = "crop"):
        if random_crop and zoom > 1:
            raise ValueError(f"random crops have no zoom, and zoom={zoom}; leave one of them out")
        self.size, self.zoom, self.random_crop, self.least = size, zoom, random_crop, least
        self.fit = "short" if random_crop else fit
        paths = [path] if path else [DATA / "emoji.zip", DATA / "photos.zip"]
        files, sources = [], []
        for tree in map(Tree, paths):
            known = [n for n in tree.names if n.lower().endswith(IMAGE_SUFFIXES)]
            names, layout = split_names(known, split, tree.path.resolve().name)
            names = names[: -(-limit // len(paths)) or None]
            files += [(tree, name, "all" if path else tree.path.stem) for name in names]
            sources.append(f"{tree.path} ({layout}; {len(names):,} of {len(known):,} pictures)")
        if not files:
            raise ValueError(f"{paths[0]}: no pictures ({' '.join(IMAGE_SUFFIXES)}) for the "
                             f"{split} split; give a folder or zip with at least three")
        self.source = printable(f"{split} split of {' and '.join(sources)}")
        self.workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.room = 0.5 * free_memory() * self.workers / os.cpu_count()  # bytes
        files, native, kept = zip(*read_all(files, self.first_look, "pictures"))
        self.files, self.native = files, torch.tensor(native)
        _, self.names, self.labels = map(list, zip(*files))
        self.kept = kept if self.room >= 0 else None

    def first_look(self, file):
        """(file, is native, its pixels as long as there is room)."""
        tree, name, _ = file
        data = tree.read(name)
        with naming(name):
            native, *item = self.load(data)
        if ends_early(data):
            click.echo(printable(f"{name} ends early: what is missing of it is grey"))
        self.room -= sum(pixels.nbytes for pixels in item if pixels is not None)
        return file, native, item if self.room >= 0 else None

    def load(self, data: bytes) -> tuple[bool, Tensor, Tensor | None]:
        """An encoded picture -> is native, pixels (not cropped if crops are random), large."""
        image = load_picture(data, self.least)
        short, large = min(image.size), None
        size = max(short, self.size) if self.random_crop else self.size
        if self.zoom > 1:
            large = to_tensor(resized(image, self.zoom * size))
        return short >= self.zoom * self.size, to_tensor(resized(image, size, self.fit)), large

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """(index, seed) -> pixels (3, S, S) and large (3, z S, z S) or None, uint8."""
        (i, seed), size = key, self.size
        tree, name, _ = self.files[i]
        try:
            pixels, large = self.kept[i] if self.kept else self.load(tree.read(name))[1:]
        except ValueError as e:
            raise ValueError(f"{name} ({e}) was readable when the run began; restore it") from e
        if self.random_crop:
            gen = torch.Generator().manual_seed(zlib.crc32(repr((seed, i, 2)).encode()))
            y, x = (int(torch.randint(n - size + 1, (), generator=gen)) for n in pixels.shape[1:])
            pixels = pixels[:, y : y + size, x : x + size]
        return pixels, large

    def batches(self, index_lists: Iterable) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(indices, seed) of every batch -> pixels (B, 3, S, S), large (B, 3, z S, z S) or None.

        Taken from memory, or read by worker processes. The seed is that of random crops.
        """
        keys = ([(i, seed) for i in indices] for indices, seed in index_lists)
        if self.kept:
            yield from (stack([self[key] for key in batch]) for batch in keys)
            return
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=keys, num_workers=self.workers, collate_fn=stack,
            generator=torch.Generator())  # the global one is left alone
        try:
            yield from loader
        except ValueError as e:  # a worker's traceback; its last line is "ValueError: reason"
            raise ValueError(str(e).splitlines()[-1].removeprefix("ValueError: ")) from e


def stack(items) -> tuple[Tensor, Tensor | None]:
    """Pairs (pixels, large or None) -> (B, 3, S, S), (B, 3, z S, z S) or None."""
    pixels, large = zip(*items)
    return torch.stack(pixels), None if large[0] is None else torch.stack(large)


def nearest_filling(image: Tensor, mask: Tensor) -> Tensor:
    """Every pixel with the color of the nearest seen one: a baseline.

    image (B, 3, H, W), mask (B, 1, H, W) with 1 = seen -> (B, H W, 3); 0.5 if nothing is seen.
    The nearest seen pixel of each row first, then the nearest row: exact, in O(B H W) memory.
    """
    seen, (height, width) = mask[:, 0] > 0, image.shape[2:]
    rows, columns = (torch.arange(n, device=image.device) for n in (height, width))
    far = 4 * (height + width)
    left = torch.where(seen, columns, -far).cummax(-1).values  # (B, H, W)
    right = torch.where(seen, columns, far).flip(-1).cummin(-1).values.flip(-1)
    column = torch.where(columns - left <= right - columns, left, right)
    aside, index = (column - columns) ** 2, []
    for row in range(height):
        nearest = (aside + (rows[:, None] - row) ** 2).argmin(1, keepdim=True)  # (B, 1, W)
        index.append(nearest * width + column.gather(1, nearest).clamp(0, width - 1))
    index = torch.cat(index, 1).flatten(1).unsqueeze(-1).expand(-1, -1, 3)  # (B, H W, 3)
    filled = image.flatten(2).mT.gather(1, index)
    return torch.where(seen.flatten(1).any(1)[:, None, None], filled, 0.5)
