"""Rewriting graphs for ONNX: angles, names, equal tensors, a check of sizes, half precision.

Nothing here knows of models. The functions change the graph that they are given.
"""

import math

import numpy as np
import onnx
import torch
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array
from torch import Tensor
from torch.overrides import TorchFunctionMode


DOUBLE = onnx.TensorProto.DOUBLE
LINALG = "linalg"  # the domain of nodes that expand_linalg replaces


class Portable(TorchFunctionMode):
    """Reduced angles for all sines and cosines; what ONNX lacks is left to expand_linalg.

    The angles are in [-pi, pi], whole turns taken off: several GPUs know the functions inside of
    this range only and are off by 2e-4 at angles of 100. The first of the two parts of 2 pi has 8
    bits: the product with up to 2^16 turns is exact.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.sin, torch.cos, Tensor.sin, Tensor.cos):
            angle = args[0]
            turns = (angle * (0.5 / math.pi) + 0.5).floor()
            args = (angle - turns * 6.28125 - turns * (2 * math.pi - 6.28125),)
        if function is torch.linalg.cholesky_ex:
            return torch.return_types.linalg_cholesky_ex((symbol("Cholesky", *args), None))
        if function is torch.linalg.solve_triangular:
            return symbol("Solve", *args)
        return function(*args, **(kwargs or {}))


def symbol(name: str, *tensors: Tensor) -> Tensor:
    """The output of a node of no ONNX operator, like the last tensor."""
    last = tensors[-1]
    return torch.onnx.ops.symbolic(f"{LINALG}::{name}", tensors, dtype=last.dtype,
                                   shape=last.shape, version=1)


def expand_linalg(proto: onnx.ModelProto):
    """Write Solve(Cholesky(a), b) = l^-1 b, where l l^T = a, as Gaussian elimination of [a | b].

    It ends with [l^T | l^-1 b]: l itself may be read too, after a Solve. A product in double
    precision is an Einsum: onnxruntime up to 1.17 joins a MatMul and a transposition to what it has
    in single precision only.
    """
    body, nodes, made = proto.graph, [], {}

    def add(kind, *inputs, outputs=1, **attributes):
        inputs = [k if isinstance(k, str) else constant(k) for k in inputs]
        names = [f"linalg.{len(nodes)}.{i}" for i in range(outputs)]
        nodes.append(make_node(kind, inputs, names, **attributes))
        return names if outputs > 1 else names[0]

    def constant(values):
        name = "linalg." + "_".join(map(str, values))
        if name not in made:
            made[name] = from_array(np.array(values, np.int64), name)
        return name

    shapes = {v.name: v.type.tensor_type.shape.dim for v in body.value_info}
    double = {v.name for v in body.value_info if v.type.tensor_type.elem_type == DOUBLE}
    factored = {n.output[0]: n.input[0] for n in body.node if n.op_type == "Cholesky"}
    read = {k for n in body.node if n.op_type != "Solve" for k in n.input}
    for node in body.node:
        if node.op_type == "Solve":
            a, b = factored[node.input[0]], node.input[1]
            n, rows, rest = shapes[node.input[0]][-1].dim_value, [], add("Concat", a, b, axis=-1)
            for k in range(n):
                row = rest
                if k < n - 1:
                    row, rest = add("Split", rest, (1, n - 1 - k), outputs=2, axis=-2)
                    column = add("Slice", rest, (k,), (k + 1,), (-1,))
                pivot = add("Slice", row, (k,), (k + 1,), (-1,))
                rows.append(add("Div", row, add("Sqrt", pivot)))
                if k < n - 1:
                    rest = add("Sub", rest, add("Mul", add("Div", column, pivot), row))
            rows, axes = add("Concat", *rows, axis=-2), len(shapes[node.input[0]])
            nodes.append(make_node("Slice", [rows, *map(constant, ((n,), (2**31,), (-1,)))],
                                   node.output))
            if node.input[0] in read:
                rows = add("Slice", rows, (0,), (n,), (-1,))
                nodes.append(make_node("Transpose", [rows], node.input[:1],
                                       perm=[*range(axes - 2), axes - 1, axes - 2]))
        elif node.op_type == "MatMul" and node.output[0] in double:
            nodes.append(make_node("Einsum", node.input, node.output,
                                   equation="...ij,...jk->...ik"))
        elif node.op_type != "Cholesky":
            nodes.append(node)
    replace(body.node, nodes)
    body.initializer.extend(made.values())
    replace(proto.opset_import, [o for o in proto.opset_import if o.domain != LINALG])


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
    """Name the free dimensions of inputs or outputs. Errors: ValueError where one is static."""
    for value, (name, shape) in zip(values, shapes.items(), strict=True):
        dims = value.type.tensor_type.shape.dim
        for d, n in zip(dims, shape, strict=True):
            if (0 if isinstance(n, str) else n) != d.dim_value:
                raise ValueError(f"{name} came out as "
                                 f"{[d.dim_param or d.dim_value for d in dims]}, not as {shape}")
            if isinstance(n, str):
                d.dim_param = n


def replace(things, new: list):
    """Put other things into a repeated field of a protobuf."""
    new = list(new)
    del things[:]
    things.extend(new)


def share_initializers(body: onnx.GraphProto):
    """Store tensors that are equal byte for byte once."""
    first, name = {}, {}
    for tensor in body.initializer:
        key = tensor.data_type, tuple(tensor.dims), to_array(tensor).tobytes()
        name[tensor.name] = first.setdefault(key, tensor.name)
    outputs = {v.name for v in body.output}
    replace(body.initializer, [t for t in body.initializer
                               if name[t.name] == t.name or t.name in outputs])
    for node in body.node:
        node.input[:] = [name.get(k, k) for k in node.input]


def require_equal_sizes(body: onnx.GraphProto, inputs: dict[str, tuple]):
    """Have a call fail, in a Reshape named after the reason, where inputs differ in a free size."""
    first, nodes, checked = {}, [], {}  # word -> the first input that has it
    for name, shape in inputs.items():
        parts, rules = [], []
        for i, n in enumerate(shape):
            parts.append(f"{n}.size" if n in first else f"{name}.size{i}")
            if n in first:
                rules.append(f"the {n} of {name} must be that of {first[n]}")
                continue
            if isinstance(n, str):
                first[n], parts[-1] = name, f"{n}.size"
            nodes.append(make_node("Shape", [name], parts[-1:], start=i, end=i + 1))
        if rules:
            checked[name] = f"{name}.checked"
            nodes += [make_node("Concat", parts, [f"{name}.shape"], axis=0),
                      make_node("Reshape", [name, f"{name}.shape"], [checked[name]], allowzero=1,
                                name=", ".join(rules))]
    for node in body.node:
        node.input[:] = [checked.get(k, k) for k in node.input]
    replace(body.node, [*nodes, *body.node])


def store_half(proto: onnx.ModelProto):
    """Store every matrix that half precision holds exactly that way.

    A Cast gives it back, so that no number changes and all arithmetic is fp32, on any runtime.
    """
    casts = []
    for tensor in proto.graph.initializer:
        values, name = to_array(tensor), tensor.name
        if values.dtype != np.float32 or values.ndim < 2 or values.size < 1024:
            continue
        half = values.astype(np.float16)
        if (half == values).all():
            tensor.CopyFrom(from_array(half, name + "_half"))
            casts.append(make_node("Cast", [name + "_half"], [name], to=1))  # fp32
    replace(proto.graph.node, [*casts, *proto.graph.node])
