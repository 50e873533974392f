"""export: checkpoints of tinyinr as ONNX files that run anywhere, verified before they are written.

    python export.py runs/image-transinr/ckpt.pt             # ckpt.encoder.onnx, ckpt.decoder.onnx
    python export.py runs/image-transinr/ckpt.pt --fused     # ckpt.onnx

    encoder: context -> code    decoder: code + query -> values    fused: context + query -> values

What goes in and comes out is fp32 and has the names of tinyinr.py; only a fused graph of curves
calls the query's x `query_x`. Dimensions are free and named, but where the architecture fixes
them. Nothing is drawn inside: a VNP's noise `eps` is an input. The file's metadata says the rest.
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
from tinyinr import Commands, ModelConfig, RunFailed

TOLERANCE = 1e-4  # largest error against PyTorch, relative where values exceed 1
ONE_FILE = 1.5e9  # bytes of weights; more of them go to a second file, as protobuf ends at 2 GB

# ------------------------------------------------------------------------- what goes in and out

CONVENTIONS = (
    "Colors are RGB in [0, 1], pictures have their first row on top. A coordinate of an image is "
    "(row, column) in (-1, 1): the centre of pixel i of n is at (i + 0.5) * 2 / n - 1. A pose is "
    "camera-to-world (3, 4): x right, y up, the camera looks along -z (OpenGL); focals are in "
    "pixels. The ray through pixel (i, j) of H x W: rays_o = pose[:, 3], rays_d = pose[:, :3] @ "
    "((j + 0.5 - W / 2) / focal_x, -(i + 0.5 - H / 2) / focal_y, -1), not normalised.")

MEANING = {  # of inputs and outputs, by name or what it begins with; the rest are layers of an INR
    "image": "picture to encode",
    "mask": "1: observed, 0: not",
    "images": "context views, on white",
    "poses": "cameras of the views",
    "focals": "focal lengths (x, y) of the views",
    "x": "positions on the curve",
    "y": "values of the curve at x",
    "query": "positions where the curve is wanted",
    "coords": "where the image is wanted",
    "rays": "rays along which the scene is wanted: origins or directions",
    "near": "depth at which rays begin",
    "far": "depth at which rays end",
    "eps": "unit Gaussian noise of the latents; zeros: the prior's mean",
    "tokens": "what the context has become",
    "pool": "positions, or their weights, over which the prior of the latents is pooled",
    "mean": "values wanted; colors are not clamped",
    "std": "standard deviation of the values",
}
LAYER = "a layer of the INR: its weights (in, out) and, in one more row, its bias"


def meanings(names) -> str:
    """JSON of what these inputs or outputs mean."""
    return json.dumps({k: MEANING.get(k) or MEANING.get(k.partition("_")[0], LAYER) for k in names})


def notes(cfg: ModelConfig) -> list[str]:
    """What the graphs fix, and what a caller could get wrong."""
    side = cfg.image_size
    lines = {
        "image": [f"static: the context has {side} x {side} pixels, each patch a learned position"],
        "nvs": [f"static: {cfg.points_per_ray} points per ray",
                f"static: views have {side} x {side} pixels, each patch a learned position"
                if cfg.grid else
                f"views may have any size; trained with {side} x {side} pixels",
                f"trained with near={cfg.near:g} and far={cfg.far:g}"],
        "gp": ["trained on x in [-2, 2]; mask 0 pads contexts to one length"],
    }[cfg.task]
    if cfg.model == "vnp":
        lines.append("latents are pooled over the rays of a call: render a picture in one call"
                     if cfg.latent_pool == "query" else
                     "with the same eps a picture does not depend on how it is cut into calls")
    return lines


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


def code_shapes(model: nn.Module) -> dict[str, tuple]:
    """Name -> shape of a code; its length is free where it depends on the context's."""
    cfg, shapes = model.cfg, {}
    free = {"image": (), "nvs": ("tokens", "pool"), "gp": ("pool",)}[cfg.task]
    if cfg.grid:  # as many tokens as voxels; curves average the prior over fixed places
        free = ("pool",) if cfg.task == "nvs" else ()
    for name, value in model.encode(draw(cfg, context_shapes(cfg))).items():
        word = name.partition("_")[0]
        shapes[name] = ("batch", word if word in free else value.shape[1], *value.shape[2:])
    return shapes


def query_shapes(cfg: ModelConfig) -> dict[str, tuple]:
    """Name -> shape of what a decoder is asked, and of the noise if there are latents."""
    rays = ("batch", "queries", 3)
    shapes = {"image": {"coords": ("batch", "queries", 2)},
              "nvs": {"rays_o": rays, "rays_d": rays, "near": ("batch",), "far": ("batch",)},
              "gp": {"x": ("batch", "queries", 1)}}[cfg.task]
    return shapes | ({"eps": (cfg.n_blocks, "batch", 1, cfg.latent)} if cfg.model == "vnp" else {})


def value_shapes(signal) -> dict[str, tuple]:
    """Name -> shape of what comes out of a decoder."""
    names = ("mean", "std") if signal.gaussian else ("mean",)
    return dict.fromkeys(names, ("batch", "queries", signal.value_dim))


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

    inputs, outputs: name -> shape, in order; a free dimension is a word.
    """

    def __init__(self, model: nn.Module, part: str):
        super().__init__()
        self.model, self.part = model, part
        self.context, code = context_shapes(model.cfg), code_shapes(model)
        given = code if part == "decoder" else self.context
        self.query = {} if part == "encoder" else {
            "query_" * (k in given) + k: shape for k, shape in query_shapes(model.cfg).items()}
        self.inputs = given | self.query
        self.outputs = code if part == "encoder" else value_shapes(model.signal)

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
    """The graph in ONNX, free of stack traces and paths. Errors: RunFailed if a wish isn't met."""
    free = tuple({i: n for i, n in enumerate(shape) if isinstance(n, str)}
                 for shape in graph.inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        proto = torch.onnx.export(
            graph, tuple(graph.draw().values()), dynamo=True, dynamic_shapes=(free,),
            input_names=[IO + k for k in graph.inputs],
            output_names=[IO + k for k in graph.outputs],
            opset_version=opset, external_data=False, verbose=False).model_proto
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
    return proto


IO = "io."  # PyTorch calls values inside of a graph `mean` too, but none begins so


def name_values(body: onnx.GraphProto, public: set[str]):
    """Take the prefix off inputs and outputs; values inside that have their names get others."""
    def name(old):
        return old.removeprefix(IO) if old.startswith(IO) else old + ".inside" * (old in public)

    for value in (*body.input, *body.output, *body.initializer):
        value.name = name(value.name)
    for node in body.node:
        node.input[:], node.output[:] = map(name, node.input), map(name, node.output)


def name_dimensions(values, shapes: dict[str, tuple]):
    """Name the free dimensions of inputs or outputs. Errors: RunFailed where one became static."""
    for value, (name, shape) in zip(values, shapes.items(), strict=True):
        dims = value.type.tensor_type.shape.dim
        for d, n in zip(dims, shape, strict=True):
            if (0 if isinstance(n, str) else n) != d.dim_value:
                raise RunFailed(f"{name} came out as {[d.dim_param or d.dim_value for d in dims]}, "
                                f"not as {list(shape)}")
            if isinstance(n, str):
                d.dim_param = n


def annotate(proto: onnx.ModelProto, graph: Graph, opset: int, sha256: str):
    """Write into the file what its reader has to know."""
    cfg = graph.model.cfg
    proto.producer_name, proto.producer_version, proto.graph.name = "tinyinr", "", graph.part
    onnx.helper.set_model_props(proto, {
        "part": graph.part, "task": cfg.task, "model": cfg.model, "config": json.dumps(asdict(cfg)),
        "conventions": CONVENTIONS, "notes": json.dumps(notes(cfg)),
        "inputs": meanings(graph.inputs), "outputs": meanings(graph.outputs), "opset": str(opset),
        "versions": json.dumps({m.__name__: m.__version__ for m in (torch, onnx, onnxscript)}),
        "checkpoint_sha256": sha256})


# ------------------------------------------------------------------------- half precision


def round_weights(model: nn.Module):
    """Round the matrices of the hypernetwork to half precision; the INR's own stay as they are."""
    for name, module in model.named_modules():
        hyper = name.startswith(("tokenizer.", "transformer.", "weight_heads."))
        if hyper and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.copy_(module.weight.half())


def store_half(proto: onnx.ModelProto) -> int:
    """Store every matrix that half precision holds exactly that way; returns the bytes saved.

    A Cast gives it back, so that no number changes and all arithmetic is fp32, on any runtime.
    """
    casts, saved = [], 0
    for tensor in proto.graph.initializer:
        values, name = onnx.numpy_helper.to_array(tensor), tensor.name
        if values.dtype != np.float32 or values.ndim < 2 or values.size < 1024:
            continue
        half = values.astype(np.float16)
        if (half == values).all():
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, name + "_half"))
            casts.append(onnx.helper.make_node("Cast", [name + "_half"], [name], to=1))  # fp32
            saved += half.nbytes
    nodes = [*casts, *proto.graph.node]
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    return saved


def quality(model: nn.Module) -> float:
    """PSNR in dB, or log-likelihood of curves, of the first bundled held-out signals."""
    limit = {"image": 16, "nvs": 2, "gp": 16}[model.cfg.task]
    data = tinyinr.open_data(model.cfg, None, "test", limit=limit)
    scores = tinyinr.score(model, data, tinyinr.choose_device("cpu"), count=limit)
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


def verify(graph: Graph, path: str):
    """Compare a file with PyTorch on shapes and numbers that the export never saw.

    Prints the largest errors over batches of 1, 2 and 3. Errors: RunFailed above TOLERANCE.
    """
    onnx.checker.check_model(path, full_check=True)
    runs, p, worst = engines(path), graph.model.cfg.patch, 0.0
    free = {n for shape in graph.context.values() for n in shape}
    contexts = [{k: n for k, n in sizes.items() if k in free} for sizes in (
        {"points": 1, "views": 1, "height": 8 * p, "width": 8 * p},
        {"points": 6, "views": 2, "height": p, "width": 2 * p + 1},
        {"points": 60, "views": 3, "height": 4 * p, "width": 5 * p})]
    queries = [{"queries": n} for n in (1, 3, 30)] if graph.query else [{}]
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


def distance(outputs: list[np.ndarray], truth: tuple[Tensor, ...]) -> float:
    """Largest difference; relative to the largest value of an output where that exceeds 1."""
    return np.max([np.abs(a - b.numpy()).max() / max(1.0, b.abs().max().item())
                   for a, b in zip(outputs, truth, strict=True)])


# ------------------------------------------------------------------------- command line


class Command(click.Command):
    """A command that ends as tinyinr's do: errors in one line and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as e:
            Commands.fail(self, ctx, e, 2)
        except RunFailed as e:
            Commands.fail(self, ctx, e, 1)


@click.command(cls=Command, context_settings={"max_content_width": 100})
@click.argument("ckpt", type=click.Path())
@click.option("-o", "--out", metavar="STEM", type=click.Path(), help="[default: that of CKPT]")
@click.option("--fused", is_flag=True, help="One STEM.onnx from context and query to values.")
@click.option("--fp16", is_flag=True, help="Store the hypernetwork's weights in half precision.")
@click.option("--opset", default="20", show_default=True, help="18 or 20.")
@torch.no_grad()
def main(ckpt, out, fused, fp16, opset):
    """Write STEM.encoder.onnx and STEM.decoder.onnx, once they are found to agree with PyTorch."""
    tinyinr.check_choice("opset", opset, ("18", "20"))
    stem = Path(out.removesuffix(".onnx") if out else Path(ckpt).with_suffix(""))
    model = tinyinr.load(ckpt).requires_grad_(False)
    sha256, cfg = hashlib.sha256(Path(ckpt).read_bytes()).hexdigest(), model.cfg
    if not stem.parent.is_dir():
        raise ValueError(f"{stem.parent}: no such folder; create it or choose another --out")
    click.echo(f"{cfg.model} on {cfg.task}, opset {opset}")
    for line in notes(cfg):
        click.echo(f"  {line}")
    if fp16:
        before, _, after = quality(model), round_weights(model), quality(model)
        click.echo(f"  fp16: {'log-likelihood' if cfg.task == 'gp' else 'PSNR'} on bundled signals "
                   f"{after:.4f}, in fp32 {before:.4f}: lost {before - after:.4f}")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=stem.parent) as folder:
        for part in ("fused",) if fused else ("encoder", "decoder"):
            path = Path(folder, f"{stem.name}.onnx" if fused else f"{stem.name}.{part}.onnx")
            write(Graph(model, part), path, int(opset), fp16, sha256)
        for path in sorted(Path(folder).iterdir()):
            size = path.stat().st_size / 1e6
            click.echo(f"wrote {path.replace(stem.parent / path.name)} ({size:.2f} MB)")


def write(graph: Graph, path: Path, opset: int, fp16: bool, sha256: str):
    """Lower a graph to a file and verify it."""
    for shapes in (graph.inputs, graph.outputs):
        click.echo(f"{graph.part:>8}  {'->' if shapes is graph.outputs else '  '} " +
                   ", ".join(f"{k} ({', '.join(map(str, shape))})" for k, shape in shapes.items()))
    proto = lower(graph, opset)
    saved = store_half(proto) if fp16 and graph.part != "decoder" else 0
    annotate(proto, graph, opset, sha256)
    large = sum(len(t.raw_data) for t in proto.graph.initializer) > ONE_FILE
    onnx.save_model(proto, path, save_as_external_data=large, location=f"{path.name}.data")
    if saved:
        size = path.stat().st_size
        click.echo(f"{graph.part:>8}  {size / 1e6:.2f} MB, in fp32 {(size + saved) / 1e6:.2f} MB")
    verify(graph, str(path))


if __name__ == "__main__":
    main()
