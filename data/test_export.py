"""Tests of export.py and of the programs that run its files without PyTorch."""

import functools
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

import export
import tinyinr
from data import curves, evaluation, images, rendering, scenes
from data.testing import close, rand
from test_tinyinr import PARITY, ROOT, balls, check_picture, full_disk, picture_rays, run, tiny


EXPORTS = {  # name -> (model or official checkpoint, options); every cell, opset and option, and
    # grids that are read by splines and by gathering
    "image-transinr": (PARITY / "transinr_image_1.pth", ["--opset", "18"]),
    "image-vnp": (dict(task="image", model="vnp", masked=True, grid=20), []),
    "nvs-transinr": (PARITY / "transinr_nvs_1.pth", []),
    "nvs-vnp": (dict(task="nvs", model="vnp", conv_nodes=16), ["--opset", "18"]),
    "nvs-vnp-official": (PARITY / "vnp_1.pth", []),
    "gp-transinr": (dict(task="gp", model="transinr", grid=0), []),
    "gp-vnp": (dict(task="gp", model="vnp"), ["--opset", "18"]),
    "gp-transinr-two": (dict(task="gp", model="transinr", n_values=2), []),
    "gp-vnp-fused": (dict(task="gp", model="vnp", grid=0), ["--fused"]),
    "image-transinr-half": (dict(task="image", model="transinr", dim=64), ["--fp16"]),
    "nvs-vnp-half": (dict(task="nvs", model="vnp", dim=64),
                     ["--fp16", "--static", "batch=1,queries=50,views=2"])}
run_export = functools.partial(run, program=export.main)


def export_one(folder, name):
    """One of EXPORTS, in a process of its own: what it printed."""
    source, options = EXPORTS[name]
    if isinstance(source, dict):
        model = tiny(**source)
        if (source["task"], source["model"]) == ("nvs", "vnp"):  # so that it is not all but empty
            model.head[-1].bias.data[3] += 0.3
        tinyinr.save(model, folder / f"{name}.pt")
    else:
        shutil.copy(source, folder / f"{name}.pt")
    return name, run_export(folder / f"{name}.pt", *options)


def run_onnx(path, feed) -> dict:
    """Name -> tensor of what a file, or its bytes, makes of the tensors it asks for."""
    graph = ort.InferenceSession(path)
    values = graph.run(None, {i.name: feed[i.name].numpy() for i in graph.get_inputs()})
    return {o.name: torch.from_numpy(v) for o, v in zip(graph.get_outputs(), values)}


def run_both(stem, context, query) -> tuple[dict, dict]:
    """The code that an export's encoder makes of a context, and what its decoder makes of both."""
    code = run_onnx(f"{stem}.encoder.onnx", context)
    return code, run_onnx(f"{stem}.decoder.onnx", code | query)


def problem(model, batch, targets):
    """Context and query, with the noise of a VNP as "eps", of sizes that no export saw."""
    graph, p = export.Graph(model, "fused", {}), model.cfg.patch
    given = graph.draw(9, batch=batch, queries=targets, points=9, views=2, height=3 * p,
                       width=7 * p + 1)
    query = {name.removeprefix("query_"): given.pop(name) for name in graph.query}
    if "near" in query:  # within what a grid reaches
        query |= {"near": 2.5 + rand(batch, seed=4), "far": 4 + rand(batch, seed=5)}
    return given, query


def decoded(model, context, query) -> dict:
    """What PyTorch makes of a problem, by name."""
    prediction = model.decode(model.encode(context), query, eps=query.get("eps"))
    return {k: v for k, v in prediction._asdict().items() if v is not None}


@pytest.mark.parametrize("name", [k for k in EXPORTS if "half" not in k])
def test_exports_agree_with_torch_on_unseen_shapes(exported, name):
    """With masks, depths and noise of each signal, all of which matter."""
    stem, model = exported.folder / name, exported.model(name)
    context, query = problem(model, 5, 15)
    want = decoded(model, context, query)
    if name.endswith("fused"):
        got = run_onnx(f"{stem}.onnx", query | context | {"query_x": query["x"]})
    else:
        code, got = run_both(stem, context, query)
        close(code, model.encode(context), 1e-4)
    close(got, want, 1e-4)
    for key in {"mask", "near", "far", "eps"} & {*context, *query}:
        other = [{k: v * (k != key) for k, v in given.items()} for given in (context, query)]
        moved = decoded(model, *other)  # the noise of a curve with a regression moves the std
        assert max((moved[k] - v).abs().max() for k, v in want.items()) > 1e-3, key


def test_dimensions_are_free_but_where_the_architecture_or_static_fixes_them(exported):
    graph = lambda name: onnx.load(exported.folder / f"{name}.onnx").graph
    text = lambda shape: " ".join(d.dim_param or str(d.dim_value) for d in shape.dim)
    shapes = lambda values: {v.name: text(v.type.tensor_type.shape) for v in values}
    rays = {"rays_o": "batch queries 3", "rays_d": "batch queries 3", "near": "batch",
            "far": "batch", "eps": "2 batch 1 5", "pool_rays_o": "batch pool 3",
            "pool_rays_d": "batch pool 3", "pool_weight": "batch pool"}
    for name, want in {  # learned positions of patches, tokens of a lattice
            "nvs-transinr.encoder": {"images": "batch views 3 height width",
                                     "poses": "batch views 3 4", "focals": "batch views 2"},
            "image-vnp.encoder": {"image": "batch 3 16 16", "mask": "batch 1 16 16"},
            "nvs-vnp.decoder": {"tokens": "batch 27 32", "grid": "batch 216 32",
                                "views_map": "batch views 2 256 32",
                                "views_poses": "batch views 3 4",
                                "views_focals": "batch views 2"} | rays,
            "gp-vnp-fused": {"x": "batch points 1", "y": "batch points 1", "mask": "batch points",
                             "query_x": "batch queries 1", "eps": "2 batch 1 5"}}.items():
        assert shapes(graph(name).input) == want
    assert shapes(graph("gp-vnp-fused").output) == dict.fromkeys(("mean", "std"), "batch queries 1")
    assert "static: the context has 16 x 16 pixels" in exported.printed["image-vnp"]
    for body in map(graph, ("nvs-vnp-half.encoder", "nvs-vnp-half.decoder")):
        named = shapes([*body.input, *body.value_info, *body.output])
        assert not re.search("[a-z]", " ".join(named.values())), named


@pytest.mark.parametrize("name", EXPORTS)
def test_files_are_single_and_described_and_hold_no_traces(exported, name):
    opset, folder = 18 if "18" in EXPORTS[name][1] else 20, exported.folder
    about = json.loads((folder / f"{name}.json").read_text())
    files = about.pop("files")
    assert {e["file"] for e in files.values()} == {p.name for p in folder.glob(f"{name}.*onnx*")}
    for part, entry in files.items():
        data = (folder / entry["file"]).read_bytes()
        proto = onnx.load_from_string(data)
        onnx.checker.check_model(proto, full_check=True)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
        assert proto.ir_version == {18: 8, 20: 9}[opset]  # or older runtimes refuse the file
        body = proto.graph
        equal = [(t.data_type, *t.dims, onnx.numpy_helper.to_array(t).tobytes())
                 for t in body.initializer]
        assert len(set(equal)) == len(equal)  # each is stored once
        made = {k for node in body.node if node.op_type != "Cast" for k in node.output if k}
        assert made <= {v.name for v in (*body.value_info, *body.output)}  # typed
        assert not re.search(rf"site-packages|\.py|/tmp|{ROOT}|stack_trace".encode(), data)
        assert entry["error"] <= 1e-4 and entry["bytes"] == len(data)
        sides = {"inputs": body.input, "outputs": body.output}
        assert all([*entry[side]] == [v.name for v in sides[side]] for side in sides)
        layers = [k for side in sides for k, v in entry[side].items()
                  if v["meaning"] == export.LAYER]
        assert all(re.fullmatch(r"wb\d|rgb_density_fc", k) for k in layers)
        told = about | {"part": part} | {side: entry[side] for side in sides}
        assert {p.key: p.value for p in proto.metadata_props} == {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()}
    assert tinyinr.ModelConfig(**about["config"]) == exported.model(name).cfg
    digest = hashlib.sha256((folder / f"{name}.pt").read_bytes()).hexdigest()
    assert about["checkpoint_sha256"] == digest


def test_angles_of_sines_and_cosines_are_reduced(exported):
    """To [-pi, pi], where every GPU knows them: seen at extra outputs of the decoder."""
    stem = exported.folder / "image-transinr"
    proto = onnx.load(f"{stem}.decoder.onnx")
    angles = {n.input[0] for n in proto.graph.node if n.op_type in ("Sin", "Cos")}
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(k, 1, None) for k in angles)
    context, query = problem(exported.model(stem.name), 2, 50)
    query["coords"][0, 0] = -2.0  # further out than any pixel
    values = run_onnx(proto.SerializeToString(), run_onnx(f"{stem}.encoder.onnx", context) | query)
    assert angles and all(3 < values[k].abs().max() < 3.1417 for k in angles)


@pytest.mark.parametrize("name", ["gp-transinr-two", "gp-vnp"])
def test_products_in_double_precision_are_no_matmul(exported, name):
    """onnxruntime up to 1.17 joins one and a transposition to a kernel of single precision only."""
    graph = onnx.load(exported.folder / f"{name}.encoder.onnx").graph
    double = {v.name for v in graph.value_info
              if v.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE}
    kinds = [n.op_type for n in graph.node if n.output[0] in double]
    assert "Einsum" in kinds and "MatMul" not in kinds


def test_inputs_of_different_sizes_are_refused_by_name(exported):
    stem = exported.folder / "nvs-transinr"
    context, query = problem(exported.model(stem.name), 2, 5)
    code, _ = run_both(stem, context, query)
    first = lambda x: {k: v[:1] for k, v in x.items()}
    for feed in (first(code) | query, code | first(query)):
        with pytest.raises(Exception, match="the batch of rays_[od] must be that of wb0"):
            run_onnx(f"{stem}.decoder.onnx", feed)
    with pytest.raises(Exception, match="the queries of rays_d must be that of rays_o"):
        run_onnx(f"{stem}.decoder.onnx", code | query | {"rays_o": query["rays_o"][:, :1]})
    with pytest.raises(Exception, match="the views of focals must be that of images"):
        run_onnx(f"{stem}.encoder.onnx", context | {"focals": context["focals"][:, :1]})


@pytest.mark.parametrize("name, batch, part", [
    ("image-transinr-half", 2, "encoder"), ("nvs-vnp-half", 1, "decoder")])
def test_half_precision_is_stored_for_the_matrices_of_the_model(exported, name, batch, part):
    """All but the INR of a TransINR; computed in fp32, and hardly another picture."""
    stem, model = exported.folder / name, exported.model(name)
    half = lambda part: [t.name for t in onnx.load(f"{stem}.{part}.onnx").graph.initializer
                         if t.data_type == onnx.TensorProto.FLOAT16]
    assert len(half(part)) >= 4 * model.cfg.depth and (part == "decoder" or not half("decoder"))
    assert not any("base" in k or "pos" in k for k in half(part))
    context, query = problem(model, batch, 50)
    got, want = run_both(stem, context, query)[1]["mean"], decoded(model, context, query)["mean"]
    assert (got != want).any() and tinyinr.psnr(got, want, clamp=False).min() > 60
    note = json.loads(Path(f"{stem}.json").read_text())["notes"][-1]
    rounded, exact = map(float, re.findall(r"\d+\.\d+", note))
    assert note in exported.printed[name] and abs(rounded - exact) < 0.1
    assert export.round_weights(tiny("gp", "vnp", n_values=2)) == ""  # none of these is bundled


def test_a_folder_becomes_the_same_bytes_again_and_a_table(tmp_path, exported):
    (source := tmp_path / "models").mkdir()
    shutil.copy(exported.folder / "gp-transinr.pt", source / "a.pt")
    output = run_export("--all", source, "-o", tmp_path / "out")
    table = re.findall(r"^a\.(\w+)\.onnx +([\d.]+) +([\d.e-]+)$", output, re.M)
    assert [row[0] for row in table] == ["encoder", "decoder"]
    for part, size, error in table:
        data = (tmp_path / f"out/a.{part}.onnx").read_bytes()
        assert data == (exported.folder / f"gp-transinr.{part}.onnx").read_bytes()
        assert float(size) == pytest.approx(len(data) / 1e6, abs=0.01) and 0 < float(error) < 1e-5
    shutil.copy(source / "a.pt", source / "a.pth")
    assert "exported to the same files" in run_export("--all", source, "-o", tmp_path, code=2)


@pytest.fixture
def lowered(monkeypatch, exported):
    """Lowering takes seconds: an export of image-transinr from a graph that was lowered before."""
    load = lambda graph, opset: onnx.load(exported.folder / f"image-transinr.{graph.part}.onnx")
    monkeypatch.setattr(export, "lower", load)
    return lambda out, code=0: run_export(
        EXPORTS["image-transinr"][0], "-o", out, "--opset", "18", code=code)


def test_neither_a_file_that_is_off_nor_one_on_a_full_disk_is_kept(tmp_path, monkeypatch, lowered):
    """One weight of a lowered graph is changed by 1 %."""
    lower = export.lower

    def spoiled(graph, opset):
        proto = lower(graph, opset)
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("transformer.0.ff2.bias"):
                tensor.raw_data = (np.frombuffer(tensor.raw_data, "f4") * 1.01).tobytes()
        return proto

    with monkeypatch.context() as patch:
        patch.setattr(export, "lower", spoiled)
        output = lowered(tmp_path / "a", 1)
    assert re.search(r"Error: the encoder is off PyTorch by .*: nothing was written\n$", output)
    monkeypatch.setattr(onnx, "save_model", lambda proto, path, **_: full_disk(
        path, proto.SerializeToString()))
    assert lowered(tmp_path / "a", 2).endswith("Error: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_and_with_large_weights_in_a_second_file(
        tmp_path, monkeypatch, lowered, exported):
    """The reference evaluator verifies; the file gives the same numbers."""
    monkeypatch.setattr(export, "ONE_FILE", 10_000)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        output = lowered(tmp_path / "a.onnx")
    assert "reference" in output and "optimised" not in output
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.encoder.onnx", "a.encoder.onnx.data", "a.decoder.onnx", "a.json"}
    entry = json.loads((tmp_path / "a.json").read_text())["files"]["encoder"]
    assert entry["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("a.encoder.onnx*"))
    context = {"image": rand(2, 3, 22, 22)}
    close(*(run_onnx(f"{stem}.encoder.onnx", context) for stem in (
        tmp_path / "a", exported.folder / "image-transinr")), 0)


@pytest.mark.parametrize("options, reason", [
    ("--opset 17", "opset='17' is unknown; choose from 18, 20"),
    ("-o absent/a", "absent: no such folder"),
    ("--static rays=8", "dimension of --static='rays' is unknown; choose from batch"),
    ("--static batch=0", "--static batch=0 must be a whole number from 1 on"),
    ("--all .", "give one of CKPT, --all FOLDER and --serve FOLDER"),
    ("--port 9000", "--port 9000 is for --serve; give both or leave out --port"),
    ("--page --fused", "--page needs free dimensions: leave out --fused and --static"),
    ("--page --static views=2", "--page needs free dimensions"), ("--ort .", "--ort is for --page"),
    ("-o scores", "scores.json: is there and no export wrote it")])
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    shutil.copy(PARITY / "vnp_1.pth", "a.pt")
    Path("scores.json").write_text('{"psnr": 20}')
    output = run_export("a.pt", *options.split(), code=2)
    assert output.startswith(f"Error: {reason}") and output.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "scores.json"}
    assert Path("scores.json").read_text() == '{"psnr": 20}'


# ------------------------------------------------------------------------- examples without torch


def run_example(name, *args):
    """A script of data/examples in a process where neither torch nor tinyinr can be imported."""
    code = ("import runpy, sys\nsys.modules |= dict.fromkeys(('torch', 'tinyinr', 'export'))\n"
            "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    script = ROOT / "data" / "examples" / name
    subprocess.run([sys.executable, "-c", code, script, *map(str, args)], check=True)


@pytest.mark.parametrize("name", ["image-transinr", "image-vnp"])
def test_example_renders_a_photo_at_any_size(tmp_path, exported, name):
    """As `render` does: the whole photo is encoded, one side enlarged, and keeps its shape."""
    model, photo, out = exported.model(name), tmp_path / "a.png", tmp_path / "out.png"
    side = model.cfg.image_size - 3
    pixels = (rand(2 * side, side, 4) * 255).byte()
    Image.fromarray(pixels.numpy()).save(photo)
    run_example("onnx_photo.py", exported.folder / name, photo, 40, out)
    code = model.encode(rendering.read_context(model, photo)[0])
    truth = rendering.render_image(model, code, 40, 20)
    check_picture(out, torch.tensor(truth) / 255, 1)
    assert truth.std() > 3


@pytest.mark.parametrize("name", ["nvs-transinr", "nvs-vnp"])
def test_example_renders_a_new_view(tmp_path, exported, name):
    """The view from 180 degrees further round is that of a camera behind the object."""
    model = exported.model(name)
    side = model.cfg.image_size
    scene = balls(tmp_path, "a", size=side) / "balls/a"
    run_example("onnx_view.py", exported.folder / name, scene, 180, tmp_path / "out.png")
    views = scenes.read_scene(images.Tree(scene), "", side)
    behind = torch.diag(torch.tensor([-1.0, -1, 1])) @ views.poses[0]
    code = model.encode(rendering.scene_context(model, views))
    query = picture_rays(behind, views.focals[0], side)
    truth = model.decode(code, query).mean.view(side, side, 3)
    check_picture(tmp_path / "out.png", truth, 1)
    assert truth.std() > 0.01


@pytest.mark.parametrize("name, tol", [("gp-transinr", 1e-4), ("gp-vnp", 0.01)])
def test_example_predicts_a_curve_with_its_band_and_plots_it(tmp_path, exported, name, tol):
    """Of a VNP from 32 random draws: they are near what many give."""
    stem, table, out = exported.folder / name, tmp_path / "points.csv", tmp_path / "out.png"
    points = np.array([[-1.5, 0.3], [-0.2, -0.6], [0.4, 0.1], [1.9, 0.8]])
    np.savetxt(table, points, delimiter=",", header="x,y", comments="")
    run_example("onnx_bands.py", stem, table, out)
    assert Image.open(out).size == (480, 320)
    script = runpy.run_path(ROOT / "data/examples/onnx_bands.py")
    np.random.seed(0)
    encoder, decoder = (ort.InferenceSession(f"{stem}.{p}.onnx") for p in ("encoder", "decoder"))
    grid = torch.linspace(-2, 2, 50)[None, :, None]
    code = script["encode"](encoder, *script["read_points"](table))
    x, y, _ = curves.standardise(*torch.tensor(points).float().T[:, None, :, None])
    draws = evaluation.sample_curves(exported.model(name), {"x": x, "y": y}, grid, 500,
                                     tinyinr.generator(0))
    got = script["decode"](decoder, code, grid.numpy())
    for values, want in zip(got, evaluation.mixture(draws), strict=True):
        close(torch.from_numpy(values), want.flatten(), tol)
