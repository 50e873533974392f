"""Which runtimes load exported files, and how far off they are: a table in Markdown.

    python export.py --all data/pretrained -o onnx                # opset 20
    python export.py --all data/pretrained -o onnx18 --opset 18
    python data/runtimes.py onnx18 onnx

Every runtime is installed by pip or npm into a folder of its own that is removed at the end; of
onnxruntime 1.14 npm has a build where pip has none for the Python of today. All run the same random
inputs; the truth is the onnxruntime that runs this script, which export.py compared with PyTorch. A
runtime that cannot be installed is a row that says so.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

FREE = {"batch": 2, "queries": 50, "points": 9, "views": 2, "tokens": 30, "pool": 20}
SHIFT = {"near": 2, "far": 6, "coords": -0.5, "x": -0.5,  # from [0, 1): rays that hit an object
         "rays_o": (-0.5, -0.5, 3.5), "rays_d": (-0.5, -0.5, -4)}
PREAMBLE = """import json, sys, numpy as np
def report(load):
    for path in sys.argv[2:]:
        with open(path + ".json") as f:
            feed, truth = ({k: np.reshape(data, dims).astype("f4") for k, (data, dims) in x.items()}
                           for x in json.load(f).values())
        try:
            out = load(path, feed)
            out = dict(zip(truth, map(np.asarray, out)))
            error = max(float(np.abs(out[k] - v).max() / max(1, np.abs(v).max()))
                        for k, v in truth.items())
        except Exception as e:
            error = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        print("RESULT", json.dumps([path, error]))
"""
ONNXRUNTIME = PREAMBLE + """import onnxruntime as ort
report(lambda path, feed: ort.InferenceSession(
    path, providers=["CPUExecutionProvider"]).run(None, feed))
"""
OPENVINO = PREAMBLE + """import openvino as ov
core = ov.Core()
def load(path, feed):
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    out = model(feed)
    return [out[o] for o in model.outputs]
report(load)
"""
TRACT = PREAMBLE + """import tract
def load(path, feed):
    model = tract.onnx().load(path)  # sizes stay free: the shapes inside of the file have names
    names = [model.input_name(i) for i in range(model.input_count())]
    out = model.into_model().into_runnable().run([feed[k] for k in names])
    return [o.to_numpy() for o in out]
report(load)
"""
NODE = """const ort = require(process.argv[1]), fs = require("fs");  // a package of npm
(async () => { for (const path of process.argv.slice(2)) {
  let error = 0;
  try {
    const {feed, truth} = JSON.parse(fs.readFileSync(path + ".json"));
    const tensors = o => Object.fromEntries(Object.entries(o).map(
      ([k, [data, dims]]) => [k, new ort.Tensor("float32", Float32Array.from(data), dims)]));
    const session = await ort.InferenceSession.create(fs.readFileSync(path));
    const out = await session.run(tensors(feed));
    for (const [k, [data]] of Object.entries(truth)) {
      const most = data.reduce((most, v) => Math.max(most, Math.abs(v)), 1);
      data.forEach((v, i) => { error = Math.max(error, Math.abs(out[k].data[i] - v) / most); });
    }
  } catch (e) { error = String(e.message || e).slice(0, 200); }
  console.log("RESULT " + JSON.stringify([path, error]));
} })();
"""
RUNTIMES = {  # name -> (packages of pip, or of npm), program
    "onnxruntime for Node": (["onnxruntime-node@1.14.0"], NODE),
    "onnxruntime 1.15": (["onnxruntime==1.15.1", "numpy<2"], ONNXRUNTIME),
    "onnxruntime 1.17": (["onnxruntime==1.17.3", "numpy<2"], ONNXRUNTIME),
    "onnxruntime": (["onnxruntime"], ONNXRUNTIME),
    "onnxruntime-web in Node": (["onnxruntime-web"], NODE),
    "OpenVINO": (["openvino"], OPENVINO),
    "tract": (["tract"], TRACT),
}


def prepare(path: Path, folder: Path) -> str:
    """A copy of a file in `folder` with random inputs and their outputs; returns its path."""
    copy = folder / f"{path.parent.name}-{path.name}"
    copy.write_bytes(path.read_bytes())
    session, gen = ort.InferenceSession(copy), np.random.default_rng(0)
    feed = {i.name: gen.random([FREE.get(n, n) for n in i.shape], np.float32)
            for i in session.get_inputs()}
    for name, value in SHIFT.items():
        if name in feed:
            feed[name] += np.float32(value)
    truth = dict(zip((o.name for o in session.get_outputs()), session.run(None, feed)))
    plain = lambda d: {k: (v.ravel().tolist(), v.shape) for k, v in d.items()}
    Path(f"{copy}.json").write_text(json.dumps({"feed": plain(feed), "truth": plain(truth)}))
    return str(copy)


def call(*command, cwd) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    if done.returncode and "RESULT" not in done.stdout:
        raise OSError((done.stderr or done.stdout).strip().splitlines()[-1][:200])
    return done.stdout


def try_runtime(packages: list[str], program: str, files: list[str]) -> tuple[str, dict]:
    """Install a runtime, run every file: its version and {file: error or the reason it failed}."""
    with tempfile.TemporaryDirectory() as folder:
        if program is NODE:
            call("npm", "install", "--ignore-scripts", "--prefix", folder, *packages, cwd=folder)
            name = packages[0].partition("@")[0]
            package = Path(folder, "node_modules", name, "package.json").read_text()
            version, start = json.loads(package)["version"], ["node", "-e", program, "--", name]
        else:
            call(sys.executable, "-m", "venv", folder, cwd=folder)
            python = f"{folder}/bin/python"
            call(python, "-m", "pip", "install", "-q", "numpy", *packages, cwd=folder)
            name = packages[0].partition("==")[0]
            version = call(python, "-c", f"from importlib.metadata import version as v; "
                           f"print(v({name!r}))", cwd=folder).strip()
            start = [python, "-c", program, "x"]
        lines = call(*start, *files, cwd=folder).splitlines()
    return version, dict(json.loads(x[7:]) for x in lines if x.startswith("RESULT "))


def main(folders: list[str]):
    print("| runtime | version | files | ran | largest error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sets = {f: [prepare(p, Path(folder)) for p in sorted(Path(f).glob("*.onnx"))]
                for f in folders}
        for name, (packages, program) in RUNTIMES.items():
            try:
                version, found = try_runtime(packages, program, sum(sets.values(), []))
            except (OSError, subprocess.TimeoutExpired) as e:
                print(f"| {name} | not installed: {e} | | | |", flush=True)
                continue
            for label, files in sets.items():
                errors = [found[f] for f in files if isinstance(found.get(f), (int, float))]
                worst = f"{max(errors):.1e}" if errors else "-"
                print(f"| {name} | {version} | {label} | {len(errors)} of {len(files)} | {worst} |",
                      flush=True)
            for f, e in found.items():
                if isinstance(e, str):
                    print(f"    {Path(f).name}: {e}", file=sys.stderr)


if __name__ == "__main__":
    if not all(Path(folder).is_dir() for folder in sys.argv[1:]):
        raise SystemExit(__doc__)
    main(sys.argv[1:])
