"""Tests of the page of an export, in a browser."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tinyinr
from data import evaluation, page, rendering, scenes
from data.testing import close, noisy, rand
from test_tinyinr import picture_rays, poses


class Browser:
    """Headless Chromium, driven by its remote debugging protocol over two pipes."""

    def __init__(self, program, folder):
        (self.answers, out), (into, self.commands) = os.pipe(), os.pipe()
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{into} 4>&{out}', *command], pass_fds=(into, out),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(into), os.close(out)
        self.count, self.received, self.where = 0, self.messages(), {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.where = {"sessionId": attached["sessionId"]}

    def __call__(self, method, **params) -> dict:
        """Send a command and wait for its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.where
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = next(m for m in self.received if m.get("id") == self.count)
        assert "error" not in answer, answer
        return answer["result"]

    def messages(self):
        """What the browser writes, until it ends."""
        rest = b""
        while got := os.read(self.answers, 1 << 20):
            *texts, rest = (rest + got).split(b"\0")
            yield from map(json.loads, texts)

    def js(self, code):
        answer = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def settle(self, change=None, seconds=120) -> str:
        """Make a change to the page and wait for what comes of it: its line of status."""
        if change:
            self.js(f"delete document.body.dataset.state, {change}, 0")
        end = time.monotonic() + seconds
        while not self.js("/done|failed/.test(document.body?.dataset.state)"):
            assert time.monotonic() < end, self.js("document.body.innerText")
            time.sleep(0.05)
        return self.js("document.getElementById('status').textContent")

    def open(self, url, width=1000, height=800):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=width < 500)
        self("Page.navigate", url=url)
        return self.settle()

    def point(self, x, y) -> dict:
        """Where a point is on the screen that divides the sides of the view so."""
        box = self.js("view.scrollIntoView(), view.getBoundingClientRect().toJSON()")
        return {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}

    def canvas(self, name="view") -> np.ndarray:
        """The picture (H, W, 3) uint8 of the canvas of this id."""
        height, width, *values = self.js(
            "(c => (i => [i.height, i.width, ...i.data])(c.getContext('2d').getImageData("
            f"0, 0, c.width, c.height)))(document.getElementById('{name}'))")
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


@pytest.fixture(scope="session")
def ort_web(tmp_path_factory):
    """The dist folder of onnxruntime-web: that of ORT_WEB, or installed by npm."""
    if "ORT_WEB" in os.environ:
        return Path(os.environ["ORT_WEB"])
    folder, package = tmp_path_factory.mktemp("npm"), f"onnxruntime-web@{page.VERSION}"
    try:
        subprocess.run(["npm", "install", "--ignore-scripts", "--prefix", folder, package],
                       capture_output=True, check=True, timeout=180)
    except (OSError, subprocess.SubprocessError) as e:
        pytest.skip(f"npm cannot install {package} ({e}); ORT_WEB may name its dist folder")
    return folder / "node_modules" / "onnxruntime-web" / "dist"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not program:
        pytest.skip("no browser: install Debian's chromium, or name one in CHROMIUM")
    made = Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.process.terminate()
    made.process.wait()


@pytest.fixture(scope="session")
def served(ort_web, exported):
    """Address of a server of pages for the exports of image, nvs and gp models."""
    folder = exported.folder
    for name in ("image-transinr", "image-vnp", "nvs-transinr", "nvs-vnp", "gp-vnp",
                 "gp-transinr-two"):
        cfg = exported.model(name).cfg
        n, size = 4, cfg.image_size  # views
        data = SimpleNamespace(images=(rand(n, 3, size, size) * 255).byte(), poses=poses(n),
                               focals=torch.full((n, 2), 1.2 * size))
        if cfg.task == "image":
            data = {(0, 0): (data.images[0], None)}
        page.write(folder / f"{name}.html", cfg, data, ort_web)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


choose = "Object.assign(size, {{value: {}}}).onchange()".format
press = "{}.map(key => view.dispatchEvent(new KeyboardEvent('keydown', {{key}})))".format


def drop(path) -> str:
    """JavaScript that drops a file on the page."""
    return ("document.dispatchEvent(new DragEvent('drop', {cancelable: true, dataTransfer: (t => "
            f"(t.items.add(new File([new Uint8Array({[*path.read_bytes()]})], '{path.name}')), t))"
            "(new DataTransfer())}))")


def off(browser, mean) -> float:
    """How far the canvas is off the values of its pixels, in steps of 1 / 255; 0.5 is rounding."""
    drawn = browser.canvas()
    return np.abs(drawn - (mean.view(drawn.shape) * 255).clamp(0, 255).numpy()).max()


@pytest.mark.parametrize("name", ["image-transinr", "image-vnp"])
def test_the_page_draws_a_dropped_photo_as_render_does(tmp_path, exported, served, browser, name):
    """And shrinks it as Pillow does; a later photo wins, an unreadable one changes nothing."""
    model, photo, old = exported.model(name), tmp_path / "photo.png", tmp_path / "old.png"
    noisy(80, 61).save(photo)
    Image.new("RGB", (3000, 3000), "red").save(old)  # takes longer to read
    context, shape = rendering.read_context(model, photo)
    code = model.encode(context)
    assert "decoded in" in browser.open(f"{served}/{name}.html")
    browser.settle(f"{drop(old)}, {drop(photo)}")
    assert (browser.canvas("input") == (255 * context["image"][0]).movedim(0, 2).numpy()).all()
    for size in (256, 512):
        browser.settle(choose(size))
        truth = rendering.render_image(model, code, *(round(n * size / max(shape)) for n in shape))
        drawn = browser.canvas()
        assert drawn.shape == truth.shape and truth.std() > 3
        assert np.abs(np.int64(drawn) - truth).max() <= 1
    (tmp_path / "notes.txt").write_text("no picture")
    assert "notes.txt: the browser cannot read it" in browser.settle(drop(tmp_path / "notes.txt"))
    time.sleep(0.5)
    assert (browser.canvas() == drawn).all()
    browser.js("file.onchange({target: {files: [new File(['a'], 'a')]}})")
    assert browser.js("file.onclick({target: file}), file.value") == ""  # it may be chosen again


def test_an_image_on_the_page_is_zoomed_and_moved_by_buttons_keys_and_fingers(
        exported, served, browser):
    model = exported.model("image-transinr")
    browser.open(f"{served}/image-transinr.html", 390, 844)
    assert browser.js("document.documentElement.scrollWidth") <= 390
    image = torch.tensor(browser.canvas("input").copy()).movedim(2, 0)[None] / 255
    code, grid = model.encode({"image": image}), tinyinr.pixel_grid(64, 64)
    values = lambda coords: tinyinr.predict(model, code, {"coords": coords[None]}).mean
    browser.settle(choose(64))
    for change in ("[1, 2, 3].map(() => document.getElementById('in').click())",
                   f"reset.click(), {press(['+', '=', '+'])}"):
        browser.settle(change)
        assert off(browser, values(grid / 8)) <= 1.5
    browser.settle(press(["ArrowRight", "ArrowUp", "ArrowUp"]))  # by an eighth of the picture each
    assert off(browser, values(grid / 8 + torch.tensor([-2, 1]) / 32)) <= 1.5
    browser.settle("reset.click()")
    for kind, lefts in (("touchStart", (0.4, 0.6)), ("touchMove", (0.2, 0.8)), ("touchEnd", ())):
        browser("Input.dispatchTouchEvent", type=kind, touchPoints=[
            browser.point(left, 0.5) | {"id": i} for i, left in enumerate(lefts)])
    browser.settle("size.onchange()")
    assert off(browser, values(grid / 3)) <= 2.5  # pixels of the screen are whole


@pytest.mark.parametrize("name, n", (("nvs-transinr", 1), ("nvs-vnp", 2)))  # n x n views
def test_the_page_draws_the_view_that_a_scene_was_seen_from(
        tmp_path, exported, served, browser, name, n):
    """Turns it by keys; and sees a dropped photo as `render` does."""
    model = exported.model(name)
    browser.open(f"{served}/{name}.html")
    browser.settle(choose(64))
    size = model.cfg.image_size
    images = (rand(4, 3, size, size) * 255).byte()[: n * n]
    square = images.unflatten(0, (n, n)).permute(0, 3, 1, 4, 2).reshape(n * size, n * size, 3)
    assert (browser.canvas("input") == square.numpy()).all()
    focals, cameras = torch.full((n * n, 2), 1.2 * size), poses(4)[: n * n]
    code = model.encode({"images": images[None] / 255, "poses": cameras[None],
                         "focals": focals[None]})
    mean = lambda pose: tinyinr.predict(
        model, code, picture_rays(pose, focals[0] * 64 / size, 64)).mean
    pose, turn = cameras[0], torch.tensor(0.5)
    assert off(browser, mean(pose)) <= 1.5
    browser.settle(press(["ArrowRight", "ArrowRight"]))  # the camera goes to the left
    c, s, o, i = turn.cos(), turn.sin(), turn * 0, turn * 0 + 1
    assert off(browser, mean(torch.stack((c, s, o, -s, c, o, o, o, i)).view(3, 3) @ pose)) <= 1.5
    noisy(50, 31).save(tmp_path / "photo.png")
    browser.settle(drop(tmp_path / "photo.png"))
    seen = scenes.photo_scene(tmp_path / "photo.png", size).images[0]
    assert (browser.canvas("input") == seen.movedim(0, 2).numpy()).all()


@pytest.mark.parametrize("name", ("gp-vnp", "gp-transinr-two"))  # of two values, the first
def test_the_page_draws_a_curve_whose_points_come_and_go_by_clicks_and_keys(
        exported, served, browser, name):
    model = exported.model(name)
    browser.open(f"{served}/{name}.html")
    before = browser.js("view.values.mean")
    at = browser.point(0.75, 0.25)
    browser.js("delete document.body.dataset.state")
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, clickCount=1, button="left", **at)
    browser.settle(press(["+", "-", "+", "ArrowUp", "ArrowUp", "ArrowLeft", "Enter", "-"]))
    browser.settle("draws.click()")
    assert browser.js("mean.getBBox().width") > 900  # of 960
    values = browser.js("view.values")
    x, y = torch.tensor([[-0.6, 0.7, 1.0, -0.1], [-0.4, 0.9, 1.0, 0.2]]).view(2, 1, 4, 1)
    context, plain = {"x": x, "y": y}, [n for n in values["noise"] if "weights" not in n]
    eps = torch.zeros(1)
    if name == "gp-transinr-two":
        context = {"x": x, "y": F.pad(y, (0, 1)), "mask": F.pad(torch.ones_like(y), (0, 1))}
    else:
        eps = torch.tensor([n["eps"][0] for n in plain])
        eps = eps.view(-1, model.cfg.n_blocks, 1, 1, model.cfg.latent)
        assert len(eps) == 12 and eps.std() == pytest.approx(1, abs=0.3)
    code, query = model.encode(context), {"x": torch.linspace(-2, 2, 256)[None, :, None]}
    draws = [model.decode(code, query, eps=e) for e in eps]
    want = evaluation.mixture(tinyinr.Prediction(*map(torch.stack, zip(*draws))))
    close(torch.tensor(values["mean"]), want.mean[0, :, 0], 1e-3)
    close(torch.tensor(values["band"]), 1.96 * want.std[0, :, 0], 1e-3)
    weights = torch.tensor([n["weights"] for n in values["noise"][len(plain) :]])
    weights = weights.view(12, 1, model.cfg.n_values, 1, model.cfg.n_features)
    assert weights.std() == pytest.approx(1, abs=0.3)
    eps = [torch.tensor(n["eps"][0]).view(model.cfg.n_blocks, 1, 1, -1) if "eps" in n else None
           for n in values["noise"][len(plain) :]]  # of the latents, too
    draws = [model.decode(model.draw(code, w), query, e).mean[0, :, 0]
             for w, e in zip(weights, eps)]
    got = torch.tensor([list(curve.values()) for curve in values["draws"]])
    close(got, torch.stack(draws), 1e-3)
    assert np.abs(np.array(before) - values["mean"]).max() > 1e-3


def test_the_page_says_what_is_missing(exported, served, browser):
    file = exported.folder / "image-vnp.html"
    assert "run python export.py --serve" in browser.open(f"file://{file}")
    for name, text, new, words in (
            ("lost", "image-vnp", "lost", "lost.json: 404"),
            ("spoiled", "sha384-....", "sha384-AAAA", "fetch")):  # a hash that is not the runtime's
        (exported.folder / f"{name}.html").write_text(re.sub(text, new, file.read_text()))
        assert words in browser.open(f"{served}/{name}.html")
