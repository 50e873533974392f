"""export: checkpoints of tinyinr as ONNX files that run anywhere, verified before they are written.

    python export.py runs/image-transinr/ckpt.pt             # ckpt.encoder.onnx, ckpt.decoder.onnx
    python export.py runs/image-transinr/ckpt.pt --fused     # ckpt.onnx
    python export.py runs/image-transinr/ckpt.pt --page      # ckpt.html besides: runs in a browser
    python export.py --serve runs/image-transinr             # http://localhost:8000/ckpt.html

    encoder: context -> code    decoder: code + query -> values    fused: context + query -> values

What goes in and comes out is fp32 and has the names of tinyinr.py; only a fused graph of curves
calls the query's x `query_x`. Dimensions are free and named, but where the architecture or
--static fixes them. Nothing is drawn inside: a VNP's noise `eps` is an input. The metadata of a
file says the rest, and STEM.json says the same to programs that cannot read it.
"""

import hashlib
import json
import logging
import tempfile
import warnings
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import click
import numpy as np
import onnx
import onnxscript
import torch
import torch.nn as nn
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import tinyinr
from data import page as pages
from data.commands import Command, trained_views
from data.evaluation import open_data, score, write_json
from data.onnx_graph import (IO, Portable, expand_linalg, name_dimensions, name_values,
                             require_equal_sizes, share_initializers, store_half)
from tinyinr import ModelConfig, RunFailed

TOLERANCE = 1e-4  # largest error against PyTorch, relative where values exceed 1
ONE_FILE = 1.5e9  # bytes of weights; more of them go to a second file, as protobuf ends at 2 GB
IR_VERSION = {18: 8, 20: 9}  # the oldest file format of an opset: onnxruntime from 1.14, from 1.17

# ------------------------------------------------------------------------- what goes in and out

COLORS = "Colors are RGB in [0, 1], pictures have their first row on top. "
CONVENTIONS = {
    "image": COLORS + "A coordinate is (row, column) in (-1, 1): the centre of pixel i of n is at "
             "(i + 0.5) * 2 / n - 1.",
    "nvs": COLORS + "A pose is camera-to-world (3, 4): x right, y up, the camera looks along -z "
           "(OpenGL); focals are in pixels. The ray through pixel (i, j) of H x W: rays_o = "
           "pose[:, 3], rays_d = pose[:, :3] @ ((j + 0.5 - W / 2) / focal_x, "
           "-(i + 0.5 - H / 2) / focal_y, -1), not normalised.",
    "gp": "Values of a point are independent given the code: each has a mean and a std."}

MEANING = {  # of inputs and outputs, by name or what it begins with; the rest are layers of an INR
    "image": "picture to encode",
    "mask": "1: observed, 0: not, and what stands there is not read",
    "images": "context views, on white",
    "poses": "cameras of the views",
    "focals": "focal lengths (x, y) of the views",
    "x": "positions on the curve",
    "y": "values of the curve at x",
    "query": "positions where the curve is wanted",
    "coords": "where the image is wanted",
    "rays": "rays along which the scene is wanted: origins or directions",
    "near": "a ray is drawn from rays_o + near rays_d on",
    "far": "up to rays_o + far rays_d",
    "eps": "unit Gaussian noise of the latents; zeros: the prior's mean",
    "tokens": "what the context has become",
    "grid": "feature grid that the field reads, interpolated: its nodes, the last axis fastest",
    "views": "feature maps of the context views and their cameras, where the field reads them",
    "posterior": "regression of a curve: in row 0 the mean of the weights, then a root of their "
                 "covariance; a draw has row 0 + e @ the others, e unit Gaussian, in row 0, then 0",
    "scale": "regression of a curve: of the noise",
    "pool": "positions, or their weights, over which the prior of the latents is pooled",
    "mean": "values wanted; colors are not clamped",
    "std": "standard deviation of the values; mean +- 1.96 std is their central 95 % interval",
}
LAYER = "a layer of the INR: its weights (in, out) and, in one more row, its bias"


def tensors(shapes: dict[str, tuple]) -> dict[str, dict]:
    """Name of an input or output -> its shape and what it means."""
    meaning = lambda name: MEANING.get(name) or MEANING.get(name.partition("_")[0], LAYER)
    return {k: {"shape": shape, "meaning": meaning(k)} for k, shape in shapes.items()}


def notes(cfg: ModelConfig, most_views: int) -> list[str]:
    """What the graphs fix, and what a caller could get wrong."""
    image, scene, curve = (cfg.task == task for task in ("image", "nvs", "gp"))
    side, vnp, sphere = cfg.image_size, cfg.model == "vnp", scene and cfg.grid
    return [note for note, holds in {
        f"static: the context has {side} x {side} pixels, each patch a learned position": image,
        "the context is the whole photo, squeezed to a square by Pillow's BILINEAR": image,
        "a pixel is the mean of the function over its area: draw pictures of less than "
        f"{4 * side} pixels a side larger and reduce them": image and cfg.grid,
        f"static: {cfg.points_per_ray} points per ray": scene,
        f"static: views have {side} x {side} pixels, each patch a learned position": sphere,
        f"views may have any size; trained with {side} x {side} pixels": scene and not cfg.grid,
        f"trained with near={cfg.near:g}, far={cfg.far:g} and up to {most_views} views": scene,
        "the object lies in the unit sphere, beyond it is nothing: near=0 and far=1000 draw all "
        "of it; trained with cameras about 4 from its middle, the world's z up, and objects most "
        "of which are symmetric about x = 0": sphere,
        "a photo without a camera is as if taken from -y, 20 degrees above, at a distance of 4 "
        f"and with a focal length of {1.88 * side:.1f} pixels": scene,
        "trained on x in [-2, 2] and y of mean 0 and std about 0.5: standardise your data": curve,
        "mask 0 pads contexts to one length": curve,
        "a std is given eps; over draws of eps: root of mean(std^2) + var(mean)": vnp and not scene,
        "latents are pooled over the rays of a call: render a picture in one call":
            vnp and cfg.latent_pool == "query",
        "with the same eps a value does not depend on how queries are cut into calls":
            vnp and cfg.latent_pool == "context",
        "inputs of a call agree in batch, views, points and queries": True,
        "values are not checked: a NaN gives NaN or an error, colors beyond [0, 1] nonsense": True,
        "decode in calls of about 4,096 queries: the fastest, with 100 MB; 262,144 need 1 to 2 GB":
            not sphere,
        "decode in calls of about 512 rays: as fast as more, with 200 MB for 4 views; the memory "
        "grows with rays x views": sphere,
        "opset 18 runs from onnxruntime 1.14 on, opset 20 from 1.17 on": True}.items() if holds]


def context_shapes(cfg: ModelConfig) -> dict[str, tuple]:
    """Name -> shape of what an encoder reads; a free dimension is a word."""
    if cfg.task == "image":
        image, mask = (("batch", n, cfg.image_size, cfg.image_size) for n in (3, 1))
        return {"image": image, "mask": mask} if cfg.masked else {"image": image}
    if cfg.task == "nvs":
        size = (cfg.image_size, cfg.image_size) if cfg.grid else ("height", "width")
        return {"images": ("batch", "views", 3, *size), "poses": ("batch", "views", 3, 4),
                "focals": ("batch", "views", 2)}
    values = ("batch", "points", cfg.n_values)
    mask = values[: 2 if cfg.n_values == 1 else 3]  # of points, or of every value
    return {"x": ("batch", "points", 1), "y": values, "mask": mask}


def code_shapes(model: nn.Module, context: dict[str, tuple]) -> dict[str, tuple]:
    """Name -> shape of the code of such a context; its length is free where it depends on it."""
    side = model.cfg.image_size
    other = {"views": 5, "points": 7, "height": side, "width": 2 * side}
    code, other = (model.encode(draw(model.cfg, context, **sizes)) for sizes in ({}, other))
    return {k: ("batch", v.shape[1] if v.shape == other[k].shape else k.partition("_")[0],
                *v.shape[2:]) for k, v in code.items()}


def query_shapes(cfg: ModelConfig) -> dict[str, tuple]:
    """Name -> shape of what a decoder is asked, and of the noise if there are latents."""
    rays = ("batch", "queries", 3)
    shapes = {"image": {"coords": ("batch", "queries", 2)},
              "nvs": {"rays_o": rays, "rays_d": rays, "near": ("batch",), "far": ("batch",)},
              "gp": {"x": ("batch", "queries", 1)}}[cfg.task]
    return shapes | ({"eps": (cfg.n_blocks, "batch", 1, cfg.latent)} if cfg.model == "vnp" else {})


def words(shapes: dict[str, tuple]) -> set[str]:
    """The free dimensions of these shapes."""
    return {n for shape in shapes.values() for n in shape if isinstance(n, str)}


def fix(shapes: dict[str, tuple], static: dict[str, int]) -> dict[str, tuple]:
    """The shapes with the dimensions in `static` at their sizes."""
    return {k: tuple(static.get(n, n) for n in shape) for k, shape in shapes.items()}


EXAMPLE = {"batch": 2, "queries": 3, "views": 4, "points": 6}  # distinct, so that none is confused

IN_RANGE = {  # uniform numbers in [0, 1) -> inputs that make sense; rays hit a scene or miss it
    "mask": lambda u, cfg: (u < 0.7).float(),
    "poses": lambda u, cfg: torch.stack([tinyinr.look_at(4 * F.normalize(eye, dim=0))
                                         for eye in u[..., 0].flatten(0, 1)]).view(u.shape),
    "focals": lambda u, cfg: (1 + u) * cfg.image_size,
    "x": lambda u, cfg: 4 * u - 2,
    "query_x": lambda u, cfg: 4 * u - 2,
    "y": lambda u, cfg: 2 * u - 1,
    "coords": lambda u, cfg: 2 * u - 1,
    "rays_o": lambda u, cfg: u - 0.5 + u.new_tensor([0, 0, 4]),
    "rays_d": lambda u, cfg: (u - 0.5) / 2 - u.new_tensor([0, 0, 1]),
    "near": lambda u, cfg: cfg.near + 0.1 * u,
    "far": lambda u, cfg: cfg.far + 0.1 * u,
    "eps": lambda u, cfg: 4 * u - 2,
}


def draw(cfg: ModelConfig, shapes: dict[str, tuple], seed=0, **sizes: int) -> dict[str, Tensor]:
    """Random tensors of these shapes; free dimensions are as long as in `sizes` or in EXAMPLE."""
    gen = torch.Generator().manual_seed(seed)
    sizes = EXAMPLE | {"height": 4 * cfg.patch, "width": 5 * cfg.patch} | sizes
    out = {}
    for name, shape in shapes.items():
        u = torch.rand([sizes.get(n, n) for n in shape], generator=gen)
        out[name] = IN_RANGE[name](u, cfg) if name in IN_RANGE else u
    return out


# ------------------------------------------------------------------------- graphs


class Graph(nn.Module):
    """A model's "encoder", its "decoder", or both ("fused"), as a function of named tensors.

    inputs, outputs: name -> shape, in order; a free dimension is a word. static: sizes of some.
    """

    def __init__(self, model: nn.Module, part: str, static: dict[str, int]):
        super().__init__()
        self.model, self.part = model, part
        self.context = fix(context_shapes(model.cfg), static)
        code = fix(code_shapes(model, self.context), static)
        given = code if part == "decoder" else self.context
        self.query = {} if part == "encoder" else fix({
            "query_" * (k in given) + k: v for k, v in query_shapes(model.cfg).items()}, static)
        self.inputs = given | self.query
        values = dict.fromkeys(("mean", "std") if model.signal.has_std else ("mean",),
                               ("batch", "queries", model.signal.value_dim))
        self.outputs = code if part == "encoder" else fix(values, static)

    def forward(self, *tensors):
        given = dict(zip(self.inputs, tensors))
        query = {k.removeprefix("query_"): given.pop(k) for k in self.query}
        code = given if self.part == "decoder" else self.model.encode(given)
        if self.part == "encoder":
            return tuple(code.values())
        prediction = self.model.decode(code, query, eps=query.pop("eps", None))
        return tuple(v for v in prediction if v is not None)

    def draw(self, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Random inputs, in order; a decoder's code is that of a random context."""
        given = draw(self.model.cfg, self.context, seed, **sizes)
        if self.part == "decoder":
            given = self.model.encode(given)
        return given | draw(self.model.cfg, self.query, seed + 1000, **sizes)


def lower(graph: Graph, opset: int) -> onnx.ModelProto:
    """The graph in ONNX, free of stack traces and paths. Errors: RunFailed or ValueError.

    PyTorch traces twice where the model has the len() of a tensor, which makes a batch static.
    """
    free = tuple({i: n for i, n in enumerate(shape) if isinstance(n, str)}
                 for shape in graph.inputs.values())
    logging.disable(logging.WARNING)  # of PyTorch's exporter and what it calls
    with warnings.catch_warnings(action="ignore"), Portable():
        proto = torch.onnx.export(
            graph, tuple(graph.draw().values()), dynamo=True, dynamic_shapes=(free,),
            input_names=[IO + k for k in graph.inputs],
            output_names=[IO + k for k in graph.outputs],
            opset_version=opset, external_data=False, verbose=False).model_proto
    expand_linalg(proto)
    if [(o.domain, o.version) for o in proto.opset_import] != [("", opset)]:
        raise RunFailed(f"{graph.part}: opset {opset} was asked for, {proto.opset_import} came")
    body = proto.graph
    name_values(body, {*graph.inputs, *graph.outputs})
    name_dimensions(body.input, graph.inputs)
    name_dimensions(body.output, graph.outputs)
    for thing in (proto, body, *body.node, *body.input, *body.output, *body.initializer):
        thing.ClearField("doc_string")
        thing.ClearField("metadata_props")
    body.ClearField("value_info")
    share_initializers(body)
    require_equal_sizes(body, graph.inputs)
    proto.ir_version = IR_VERSION[opset]
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def describe(cfg: ModelConfig, most_views: int, opset: int, sha256: str) -> dict:
    """What a reader of the files has to know."""
    return {
        "task": cfg.task, "model": cfg.model, "near": cfg.near, "far": cfg.far, "opset": opset,
        "config": asdict(cfg), "conventions": CONVENTIONS[cfg.task],
        "notes": notes(cfg, most_views),
        "ir_version": IR_VERSION[opset], "checkpoint_sha256": sha256,
        "versions": {m.__name__: m.__version__ for m in (torch, onnx, onnxscript)}}


# ------------------------------------------------------------------------- half precision


def round_weights(model: nn.Module) -> str:
    """Round the matrices, none of a generated INR, to half precision; returns what it costs."""
    several = model.cfg.n_values > 1  # no bundled test signals are like these
    before = 0.0 if several else quality(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.copy_(module.weight.half())
    return "" if several else (
        f": {'LL' if model.cfg.task == 'gp' else 'PSNR'} of a few test signals of all kinds "
        f"{quality(model):.4f}, with the checkpoint's weights {before:.4f}")


def quality(model: nn.Module) -> float:
    """PSNR in dB, or log-likelihood of curves, of the first bundled held-out signals."""
    limit = {"image": 16, "nvs": 2, "gp": 16}[model.cfg.task]
    data = open_data(model.cfg, None, "test", limit=limit)
    scores = score(model, data, count=limit)
    name = "target_ll" if model.cfg.task == "gp" else "psnr"
    return float(np.mean([row[name] for row in scores.values()]))


# ------------------------------------------------------------------------- verification


def engines(path: str) -> dict:
    """What runs the file here: name -> function from a feed to a list of arrays."""
    try:
        import onnxruntime as ort
    except ImportError:
        return {"reference": partial(ReferenceEvaluator(path).run, None)}
    found, levels = {}, ort.GraphOptimizationLevel
    for name, level in (("plain", levels.ORT_DISABLE_ALL), ("optimised", levels.ORT_ENABLE_ALL)):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found[name] = partial(session.run, None)
    return found


def verify(graph: Graph, path: str) -> float:
    """Compare a file with PyTorch on shapes and numbers that the export never saw.

    Prints the largest errors over batches of 1, 2 and 3, and returns the largest of them all.
    Errors: RunFailed above TOLERANCE.
    """
    onnx.checker.check_model(path, full_check=True)
    runs, p, worst = engines(path), graph.model.cfg.patch, 0.0
    free = words(graph.context)
    contexts = [{k: n for k, n in sizes.items() if k in free} for sizes in (
        {"points": 1, "views": 1, "height": 8 * p, "width": 8 * p},
        {"points": 6, "views": 2, "height": p, "width": 2 * p + 1},
        {"points": 60, "views": 3, "height": 4 * p, "width": 5 * p})]
    queries = [{"queries": n} for n in (1, 3, 30)] if "queries" in words(graph.query) else [{}]
    for context, query in product(contexts if any(contexts) else [{}], queries):
        sizes, errors = context | query, []
        for batch in (1, 2, 3):
            inputs = graph.draw(seed=batch, batch=batch, **sizes)
            truth, feed = graph(*inputs.values()), {k: v.numpy() for k, v in inputs.items()}
            errors.append([distance(run(feed), truth) for run in runs.values()])
        errors = np.max(errors, 0)
        click.echo(f"{graph.part:>8}  {' '.join(f'{k}={v}' for k, v in sizes.items()):40}" +
                   "".join(f"  {name} {e:.1e}" for name, e in zip(runs, errors)))
        worst = np.maximum(worst, errors.max())
    if not worst <= TOLERANCE:
        raise RunFailed(f"the {graph.part} is off PyTorch by {worst:.1e}, above {TOLERANCE:g}: "
                        "nothing was written")
    return float(worst)


def distance(outputs: list[np.ndarray], truth: tuple[Tensor, ...]) -> float:
    """Largest difference; relative to the largest value of an output where that exceeds 1."""
    return np.max([np.abs(a - b.numpy()).max() / max(1.0, b.abs().max().item())
                   for a, b in zip(outputs, truth, strict=True)])


# ------------------------------------------------------------------------- command line


@click.command(cls=Command, context_settings={"max_content_width": 100})
@click.argument("ckpt", type=click.Path(), required=False)
@click.option("--all", "folder", metavar="FOLDER", type=click.Path(exists=True, file_okay=False),
              help="Export every checkpoint of a folder; -o is a folder, too.")
@click.option("--serve", metavar="FOLDER", type=click.Path(exists=True, file_okay=False),
              help="Serve a folder with pages at http://localhost:PORT.")
@click.option("--port", type=click.IntRange(0, 65535), help="--serve: [default: 8000]")
@click.option("-o", "--out", metavar="STEM", type=click.Path(), help="[default: that of CKPT]")
@click.option("--fused", is_flag=True, help="One STEM.onnx from context and query to values.")
@click.option("--fp16", is_flag=True, help="Store matrices in half precision; compute in fp32.")
@click.option("--opset", default="20", show_default=True, help="18 or 20.")
@click.option("--static", default="", metavar="NAME=SIZE,...", help="Dimensions to fix.")
@click.option("--page", is_flag=True, help="Also write STEM.html, which runs them in a browser.")
@click.option("--ort", metavar="FOLDER", type=click.Path(exists=True, file_okay=False),
              help="--page: copy onnxruntime-web from its dist folder; default: jsdelivr's.")
@torch.no_grad()
def main(ckpt, folder, serve, port, out, **options):
    """Write STEM.encoder.onnx, STEM.decoder.onnx and STEM.json, once they agree with PyTorch."""
    if sum(v is not None for v in (ckpt, folder, serve)) != 1:
        raise ValueError("give one of CKPT, --all FOLDER and --serve FOLDER")
    if port is not None and not serve:
        raise ValueError(f"--port {port} is for --serve; give both or leave out --port")
    if serve:
        pages.serve(serve, 8000 if port is None else port)
    elif folder:
        export_all(Path(folder), out, options)
    else:
        stem = Path(out.removesuffix(".onnx") if out else Path(ckpt).with_suffix(""))
        export_one(Path(ckpt), stem, **options)


def export_all(folder: Path, out: str | None, options: dict):
    """Export every checkpoint of a folder and print a table of sizes and errors."""
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".pth"))
    if not paths or not out:
        raise ValueError(f"--all {folder} -o {out}: give a folder with .pt or .pth, and -o FOLDER")
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(f"{folder}: a .pt and a .pth of one name would be exported to the same "
                         "files; rename one")
    Path(out).mkdir(exist_ok=True)
    rows = []
    for path in paths:
        files = export_one(path, Path(out, path.stem), **options)["files"]
        rows += [f"{v['file']:34} {v['bytes'] / 1e6:6.2f} {v['error']:8.1e}"
                 for v in files.values()]
    click.echo("\n".join([f"\n{'file':34} {'MB':>6} {'error':>8}", *rows]))


def export_one(ckpt: Path, stem: Path, opset, static, fused, fp16, page, ort) -> dict:
    """Export a checkpoint to files that begin with `stem`; returns what STEM.json holds."""
    tinyinr.check_choice("opset", opset, ("18", "20"))
    if page and (fused or static.removeprefix("batch=1")):
        raise ValueError("--page needs free dimensions: leave out --fused and --static")
    if ort and not page:
        raise ValueError("--ort is for --page; give both or none")
    model = tinyinr.load(ckpt).requires_grad_(False)
    cfg, sidecar = model.cfg, stem.with_name(stem.name + ".json")
    static = read_static(static, model)
    if not stem.parent.is_dir():
        raise ValueError(f"{stem.parent}: no such folder; create it or choose another --out")
    if sidecar.exists() and "checkpoint_sha256" not in sidecar.read_text():
        raise ValueError(f"{sidecar}: is there and no export wrote it; choose another --out")
    about = describe(cfg, trained_views(ckpt, cfg), int(opset),
                     hashlib.sha256(ckpt.read_bytes()).hexdigest())
    click.echo(f"{cfg.model} on {cfg.task}, opset {opset}\n  " + "\n  ".join(about["notes"]))
    if fp16:
        lost = "matrices are stored in half precision" + round_weights(model)
        about["notes"].append(lost)
        click.echo(f"  {lost}")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=stem.parent) as folder:
        files = {}
        for part in ("fused",) if fused else ("encoder", "decoder"):
            path = Path(folder, f"{stem.name}.onnx" if fused else f"{stem.name}.{part}.onnx")
            files[part] = write(Graph(model, part, static), path, about, fp16)
        write_json(Path(folder, sidecar.name), about | {"files": files})
        if page:
            pages.write(Path(folder, f"{stem.name}.html"), cfg, pages.signals(cfg), ort)
        for path in sorted(Path(folder).iterdir()):
            size = path.stat().st_size / 1e6
            click.echo(f"wrote {path.replace(stem.parent / path.name)} ({size:.2f} MB)")
    return about | {"files": files}


def read_static(text: str, model: nn.Module) -> dict[str, int]:
    """The text batch=1,queries=4096 as {"batch": 1, "queries": 4096}. Errors: ValueError."""
    known = words(context_shapes(model.cfg) | query_shapes(model.cfg))
    pairs = [item.partition("=") for item in text.split(",") if item]
    for name, _, size in pairs:
        tinyinr.check_choice("dimension of --static", name, sorted(known))
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--static {name}={size} must be a whole number from 1 on")
    return {name: int(size) for name, _, size in pairs}


def write(graph: Graph, path: Path, about: dict, fp16: bool) -> dict:
    """Lower a graph to a file that describes itself, and verify it: its entry in STEM.json."""
    for arrow, shapes in (("  ", graph.inputs), ("->", graph.outputs)):
        click.echo(f"{graph.part:>8}  {arrow} " + ", ".join(
            f"{k} ({', '.join(map(str, shape))})" for k, shape in shapes.items()))
    proto = lower(graph, about["opset"])
    if fp16:
        store_half(proto)
    proto.producer_name, proto.producer_version, proto.graph.name = "tinyinr", "", graph.part
    shapes = {"inputs": tensors(graph.inputs), "outputs": tensors(graph.outputs)}
    told = about | {"part": graph.part} | shapes
    onnx.helper.set_model_props(proto, {
        k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()})
    large = sum(len(t.raw_data) for t in proto.graph.initializer) > ONE_FILE
    onnx.save_model(proto, path, save_as_external_data=large, location=f"{path.name}.data")
    written = [p for p in path.parent.iterdir() if p.name.startswith(path.name)]  # and its .data
    return {"file": path.name, "bytes": sum(p.stat().st_size for p in written),
            "error": verify(graph, str(path))} | shapes


if __name__ == "__main__":
    main()
