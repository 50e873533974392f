"""The page that runs exported files in a browser: page.html, filled in, and a server for it.

It loads onnxruntime-web of one version, checked by its hashes, from jsdelivr or from a local copy.
"""

import base64
import hashlib
import http.server
import io
import json
import math
import shutil
from functools import partial
from pathlib import Path

import click
from PIL import Image

from data.evaluation import open_data
from data.scenes import find_scene, read_scene, spread_views

VERSION = "1.30.0"
HASHES = {  # of the files in the dist folder of the npm package
    "ort.wasm.bundle.min.mjs":
        "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm":
        "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"


def write(path: Path, cfg, data, ort: str | None):
    """Write STEM.html beside STEM.json; with `ort`, a dist folder, copy onnxruntime-web there too.

    data: an ImageSet, the first of which the page shows, a Scene, or None. Errors: OSError.
    """
    hashes = dict(HASHES)
    for name in hashes if ort else ():
        copy = Path(shutil.copyfile(Path(ort, name), path.with_name(name)))
        digest = hashlib.sha384(copy.read_bytes()).digest()
        hashes[name] = "sha384-" + base64.b64encode(digest).decode()  # as browsers check it
    setup = {"stem": path.stem, "ort": {(CDN if not ort else "") + k: v for k, v in hashes.items()},
             "example": example(cfg, data)}
    here = Path(__file__).parent
    page, script, worker = ((here / name).read_text(encoding="utf-8")
                            for name in ("page.html", "page.js", "page_worker.js"))
    page = page.replace("WORKER_SCRIPT", worker).replace("PAGE_SCRIPT", script)
    text = json.dumps(setup).replace("<", "\\u003c")
    path.write_text(page.replace("SETUP_OF_THE_EXPORT", text), encoding="utf-8")


def signals(cfg):
    """Signals of test: images, a Scene, whose licence asks for no credit, or None: curves."""
    if cfg.task == "nvs":
        bear = Path(__file__).parent / "furniture.zip/furniture/blendswap-cc-0-teddybear"
        return read_scene(*find_scene(bear), cfg.image_size)
    return open_data(cfg, None, "test", limit=1) if cfg.task == "image" else None


def example(cfg, data) -> dict | None:
    """The first signal of a set: images as data URIs; cameras of a scene, the first also as a view.

    Of a scene four views, where a model has a grid, spread around it. The page draws a
    scene from a camera on a sphere around it, at angles x (azimuth) and y.
    """
    if cfg.task == "image":
        return {"images": [data_uri(data[0, 0][0])]}
    if cfg.task == "nvs":
        n = max(cfg.n_views, 4 if cfg.grid else 1)
        views = sorted(spread_views(data.poses, n))
        cameras = {k: getattr(data, k)[views].tolist() for k in ("poses", "focals")}
        x, y, z = (row[3] for row in cameras["poses"][0])
        view = {"x": math.atan2(y, x), "y": math.atan2(z, math.hypot(x, y)),
                "r": math.hypot(x, y, z), "zoom": 1,
                "focal": [f / cfg.image_size for f in cameras["focals"][0]]}
        images = [data_uri(v) for v in data.images[views]]
        return {"images": images, "view": view} | cameras
    return None


def data_uri(pixels) -> str:
    """An image (3, H, W) uint8 as a PNG within a URI."""
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(png := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def serve(folder: str, port: int):
    """Serve a folder to this machine alone, until Ctrl-C. Errors: OSError for a taken port."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        for page in sorted(Path(folder).glob("*.html")):
            click.echo(f"http://localhost:{server.server_port}/{page.name}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("stopped")
