// The page: reads photos, asks the worker for pieces of pictures, and draws them.
const {stem, ort, example} = SETUP_OF_THE_EXPORT;
const $ = id => document.getElementById(id), canvas = $("view"), pen = canvas.getContext("2d");
const layer = new OffscreenCanvas(1, 1), source = new OffscreenCanvas(1, 1), pointers = new Map();
let about, worker, task, id = 0, asked = 0, loaded = 0, busy, again, fresh, moved, held;
let code = {}, context, passes, pieces, encodeMs, decodeMs, cameras, seed = 1;
let shape = [1, 1], points = [[-1.5, 0.5], [-0.6, -0.4], [0.7, 0.9]], view, orbit;
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const progress = part => { document.querySelector("#bar i").style.width = `${100 * part}%`; };
function say(text, bad) {
  Object.assign($("status"), {textContent: text, className: bad ? "bad" : ""});
  document.body.dataset.state = bad ? "failed" : "busy";
}

// ---------------------------------------------------------------- a photo becomes the context
const weights = (n, size) => Array.from({length: size}, (_, i) => {  // antialiased, as Pillow's
  const reach = Math.max(n / size, 1), middle = (i + 0.5) * n / size;
  const from = Math.max(0, Math.floor(middle - reach + 0.5));
  const to = Math.min(n, Math.floor(middle + reach + 0.5));
  const f = Array.from({length: to - from}, (_, k) =>
    1 - Math.abs(from + k + 0.5 - middle) / reach);
  return {from, f: f.map(v => v / f.reduce((a, b) => a + b))};
});
function resize({data, width, height}, size) {  // RGBA bytes -> (3, size, size) in [0, 1]
  const rows = new Float32Array(height * size * 3), out = new Float32Array(3 * size * size);
  const sum = (f, at) => Math.round(f.reduce((s, v, k) => s + v * at(k), 0));
  for (let y = 0; y < height; y++) weights(width, size).forEach(({from, f}, x) => {
    for (let c = 0; c < 3; c++)
      rows[(y * size + x) * 3 + c] = sum(f, k => data[(y * width + from + k) * 4 + c]);
  });
  weights(height, size).forEach(({from, f}, y) => {
    for (let x = 0; x < size; x++) for (let c = 0; c < 3; c++)
      out[(c * size + y) * size + x] = sum(f, k => rows[((from + k) * size + x) * 3 + c]) / 255;
  });
  return out;
}
async function pixels(blob) {  // a photo on white; that of a scene is padded to a square
  const photo = await createImageBitmap(blob);
  const part = Math.min(1, 1024 / Math.max(photo.width, photo.height));
  shape = [photo.height, photo.width].map(n => Math.max(1, Math.round(n * part)));
  const [h, w] = shape, side = Math.max(h, w);
  if (task == "nvs") shape = [side, side];
  const ink = new OffscreenCanvas(shape[1], shape[0]).getContext("2d");
  ink.fillStyle = "#fff";
  ink.fillRect(0, 0, shape[1], shape[0]);
  ink.drawImage(photo, (shape[1] - w) >> 1, (shape[0] - h) >> 1, w, h);
  return resize(ink.getImageData(0, 0, shape[1], shape[0]), about.config.image_size);
}
async function take(blobs, given) {
  const S = about.config.image_size, V = blobs.length;
  const planes = await Promise.all(blobs.map(pixels));
  const data = planes.flatMap(p => [...p]), f = S / 2 / Math.tan(0.26), e = Math.PI / 9, r = 4;
  cameras = given || {focals: [[f, f]], poses: [[[1, 0, 0, 0],  // in front, 20 degrees above
    [0, Math.sin(e), -Math.cos(e), -r * Math.cos(e)],
    [0, Math.cos(e), Math.sin(e), r * Math.sin(e)]]]};
  context = task == "image"
    ? {image: [data, [1, 3, S, S]], mask: [Array(S * S).fill(1), [1, 1, S, S]]}
    : {images: [data, [1, V, 3, S, S]], focals: [cameras.focals.flat(), [1, V, 2]],
       poses: [cameras.poses.flat(2), [1, V, 3, 4]]};
  const px = new ImageData(S, S);
  for (let k = 0; k < 4 * S * S; k++)
    px.data[k] = k % 4 < 3 ? 255 * planes[0][(k % 4) * S * S + (k >> 2)] : 255;
  Object.assign(source, {width: S, height: S}).getContext("2d").putImageData(px, 0, 0);
  $("seen").textContent = `${S} × ${S} pixels`;
  home(true);
}
const photo = files => task != "gp" && files[0] && take([files[0]]).catch(() =>
  say(`${files[0].name}: the browser cannot read this as a picture; try a JPEG or PNG`, true));

// ---------------------------------------------------------------- what the worker is asked for
function home(anew) {
  view = {top: -1, left: -1, height: 2, width: 2};
  if (task == "nvs") {
    const [x, y, z] = cameras.poses[0].map(row => row[3]), flat = Math.hypot(x, y);
    orbit = {a: Math.atan2(y, x), e: Math.atan2(z, flat), r: Math.hypot(flat, z), zoom: 1};
  }
  draw(anew);
}
function camera({a, e, r, zoom}) {  // on a sphere around the object, looking at it
  const [ca, sa, ce, se] = [Math.cos(a), Math.sin(a), Math.cos(e), Math.sin(e)];
  const focal = cameras.focals[0].map(f => f * zoom / about.config.image_size);
  return {focal, pose: [[-sa, -se * ca, ce * ca, r * ce * ca], [ca, -se * sa, ce * sa, r * ce * sa],
                        [0, ce, se, r * se]]};
}
function noise(n, key) {  // unit Gaussian, the same for the same key
  const random = () => ((key = Math.imul(key, 48271) % 2147483647 + 7) >>> 1) / 2147483648 || 0.5;
  return Array.from({length: n}, () =>
    Math.sqrt(-2 * Math.log(random())) * Math.cos(2 * Math.PI * random()));
}
function draw(anew) {
  fresh ||= anew;
  asked ||= requestAnimationFrame(ask);
}
function ask() {
  asked = 0;
  again = task == "gp" && busy;  // a plot is not broken off, or dragging would show none
  if (again) return;
  const dims = about.files.decoder.inputs.eps?.shape, n = dims && dims[0] * dims[3];
  if (task == "gp") {
    const N = points.length, column = k => [points.map(p => p[k]), [1, N, 1]];
    context = {x: column(0), y: column(1), mask: [Array(N).fill(1), [1, N]]};
    passes = Array.from({length: n ? 12 : 1}, (_, k) =>
      ({w: 256, h: 1, eps: n && noise(n, seed + 97 * k)}));
  } else {
    const size = +$("size").value, eps = n && Array(n).fill(0), [h, w] = shape.map(
      v => v / Math.max(...shape)), side = v => Math.max(1, Math.round(v));
    passes = [task == "nvs" ? 32 : 64, size].filter((v, i) => i || v < size)
      .map(v => ({h: side(v * h), w: side(v * w), eps}));
    Object.assign(canvas, {width: passes.at(-1).w, height: passes.at(-1).h});
    canvas.style.width = `min(100%, ${66 * w / h}vh)`;
  }
  pieces = [];
  decodeMs = 0;
  busy = true;
  worker.postMessage({id: ++id, passes, view: task == "nvs" ? camera(orbit) : view,
                      context: fresh ? context : null});
  fresh = false;
  document.body.dataset.state = "busy";
}

// ---------------------------------------------------------------- what the worker answers
function answer({data}) {
  if (data.error) return say(data.error, true);
  if (data.code) { encodeMs = data.encode; showCode(code = data.code); }
  if (data.id != id || !data.mean) return;
  decodeMs += data.ms;
  pieces.push(data);
  task == "gp" || paint(data);
  const {pass, top, n, w, h} = data, last = pass == passes.length - 1;
  progress((pass + (top + n) / h) / passes.length);
  if (!last || top + n < h) return;
  task == "gp" ? plot() : inset();
  busy = false;
  const what = task == "gp" ? `${passes.length} × ${w} points` : `${w} × ${h} pixels`;
  say(`encoded in ${encodeMs.toFixed(1)} ms · ${what} decoded in ${decodeMs.toFixed(0)} ms`);
  Object.assign(document.body.dataset, {state: "done", encode: encodeMs, decode: decodeMs});
  if (again) draw();
}
function paint({pass, w, h, top, n, mean}) {
  const px = new ImageData(w, n), scale = canvas.height / h;
  for (let k = 0; k < 4 * w * n; k++)
    px.data[k] = k % 4 < 3 ? 255 * mean[(k >> 2) * 3 + k % 4] : 255;
  Object.assign(layer, {width: w, height: n}).getContext("2d").putImageData(px, 0, 0);
  pen.imageSmoothingEnabled = pass < passes.length - 1;
  pen.drawImage(layer, 0, Math.round(top * scale), canvas.width, Math.round(n * scale));
}
function inset() {  // the same part of what the model saw
  const ink = $("input").getContext("2d"), S = source.width, part = v => (v + 1) / 2 * S;
  ink.imageSmoothingEnabled = false;
  ink.drawImage(source, part(view.left), part(view.top), S * view.width / 2, S * view.height / 2,
                0, 0, 112, 112);
  $("zoom").textContent = `× ${((task == "nvs" ? orbit.zoom : 2 / view.height)).toFixed(1)}`;
}
const at = (x, y) => [(x + 2) / 4 * canvas.width, (2 - y) / 4 * canvas.height];
function line(ys, color, width) {
  pen.beginPath();
  ys.forEach((y, i) => pen.lineTo(...at(-2 + 4 * i / (ys.length - 1), y)));
  Object.assign(pen, {strokeStyle: color, lineWidth: width}).stroke();
}
function plot() {  // mean and 95 % band of the mixture of all draws
  const D = about.config.n_values, over = f => Array.from({length: 256}, (_, i) =>
    pieces.reduce((s, p) => s + f(p.mean[i * D], p.std[i * D]), 0) / pieces.length);
  const mean = over(m => m), square = over((m, s) => m * m + s * s);
  const band = mean.map((m, i) => 1.96 * Math.sqrt(Math.max(0, square[i] - m * m)));
  const side = sign => mean.map((m, i) => [i, m + sign * band[i]]);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "#dde3fb";
  pen.beginPath();
  [...side(1), ...side(-1).reverse()].forEach(([i, y]) => pen.lineTo(...at(-2 + 4 * i / 255, y)));
  pen.fill();
  for (const p of pieces) line(mean.map((_, i) => p.mean[i * D]), "#3f51d866", 1);
  line(mean, "#3f51d8", 3);
  pen.fillStyle = "#1c2333";
  for (const p of points) {
    pen.beginPath();
    pen.arc(...at(...p), 6, 0, 7);
    pen.fill();
  }
  canvas.values = {mean, band, eps: passes.map(p => p.eps)};
}
function tile([name, [data, dims]]) {  // a layer as a picture: red positive, blue negative
  const [h, w] = dims.slice(1), figure = document.createElement("figure");
  const most = 3 * Math.sqrt(data.reduce((s, v) => s + v * v, 0) / data.length);
  const picture = Object.assign(document.createElement("canvas"), {width: w, height: h});
  const px = new ImageData(w, h);
  data.forEach((v, k) => px.data.set([-v, Math.abs(v), v, -1].map(
    t => 255 - 200 * clamp(t / most, 0, 1)), 4 * k));
  picture.getContext("2d").putImageData(px, 0, 0);
  figure.innerHTML = `<figcaption>${name} ${h} × ${w}</figcaption>`;
  figure.prepend(picture);
  return figure;
}
function showCode() {
  const layers = Object.entries(code).filter(([name]) => !name.startsWith("pool"));
  $("code").replaceChildren(...layers.map(tile));
  const count = Object.values(code).reduce((s, [data]) => s + data.length, 0);
  $("bytes").textContent =
    `${count.toLocaleString("en")} numbers, ${(count / 250).toFixed(0)} kB in fp32`;
}
$("save").onclick = () => {  // safetensors: a length, a header in JSON, the numbers
  let end = 0;
  const head = JSON.stringify(Object.fromEntries(Object.entries(code).map(([k, [data, shape]]) =>
    [k, {dtype: "F32", shape: [...shape], data_offsets: [end, end += data.byteLength]}])));
  const length = new BigUint64Array([BigInt(head.length)]);
  const file = new Blob([length, head, ...Object.values(code).map(([data]) => data)]);
  Object.assign(document.createElement("a"), {download: `${stem}.code.safetensors`,
    href: URL.createObjectURL(file)}).click();
};

// ---------------------------------------------------------------- hands, and the start
function zoom(factor, x, y) {  // about a place of the canvas in [0, 1]
  if (task == "nvs") orbit.zoom = clamp(orbit.zoom * factor, 0.5, 8);
  const size = clamp(view.height / factor, 2 / 64, 2);
  if (task == "image") pan(y * (view.height - size), x * (view.width - size), size);
}
function pan(down, right, size = view.height) {
  view = {height: size, width: size, top: clamp(view.top + down, -1, 1 - size),
          left: clamp(view.left + right, -1, 1 - size)};
  draw();
}
function place(e) {  // of a pointer on the canvas, in [0, 1]
  const box = canvas.getBoundingClientRect();
  return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height];
}
canvas.onpointerdown = e => {
  canvas.setPointerCapture(e.pointerId);
  pointers.set(e.pointerId, place(e));
  const [x, y] = place(e), point = [4 * x - 2, 2 - 4 * y];
  if (task != "gp") return;
  held = points.find(p => Math.hypot(p[0] - point[0], p[1] - point[1]) < 0.12);
  moved = !held;  // a click on a point takes it away
  if (!held) { points.push(held = point); draw(true); }
};
canvas.onpointermove = e => {
  if (!pointers.has(e.pointerId)) return;
  const [x, y] = place(e), [px, py] = pointers.get(e.pointerId);
  const fingers = () => {  // how far two of them are apart, and their middle
    const [[ax, ay], [bx, by]] = pointers.values();
    return [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2];
  };
  const before = pointers.size > 1 && fingers();
  pointers.set(e.pointerId, [x, y]);
  if (task == "gp") {
    moved ||= Math.hypot(x - px, y - py) > 0.002;
    if (moved) { held[0] = 4 * x - 2; held[1] = 2 - 4 * y; draw(true); }
  } else if (before) zoom(fingers()[0] / before[0], ...fingers().slice(1));
  else if (task == "image") pan(view.height * (py - y), view.width * (px - x));
  else { orbit.a -= 4 * (x - px); orbit.e = clamp(orbit.e + 3 * (y - py), -1.4, 1.4); }
  if (task == "nvs") draw();
};
canvas.onpointerup = canvas.onpointercancel = e => {
  pointers.delete(e.pointerId);
  if (task != "gp" || moved || points.length < 2) return;
  points = points.filter(p => p != held);
  draw(true);
};
canvas.addEventListener("wheel", e => {
  if (task == "gp") return;
  e.preventDefault();
  zoom(2 ** (-e.deltaY / 200), ...place(e));
  draw();
});
$("in").onclick = () => zoom(2, 0.5, 0.5);
$("out").onclick = () => zoom(0.5, 0.5, 0.5);
$("reset").onclick = () => { points = points.slice(0, 3); home(task == "gp"); };
$("draws").onclick = () => { seed += 1000; draw(); };
$("size").onchange = () => draw();
$("file").onchange = e => photo(e.target.files);
document.onpaste = e => photo(e.clipboardData.files);
document.ondragover = e => { e.preventDefault(); document.body.classList.add("over"); };
document.ondragleave = () => document.body.classList.remove("over");
document.ondrop = e => {
  e.preventDefault();
  document.body.classList.remove("over");
  photo(e.dataTransfer.files);
};

async function get(url, integrity = "") {
  const reply = await fetch(url, {integrity});
  if (!reply.ok) throw Error(`${url}: ${reply.status} ${reply.statusText}`);
  progress(++loaded / 5);
  return reply.arrayBuffer();
}
async function start() {
  const name = encodeURIComponent(stem);
  if (typeof WebAssembly != "object")
    return say("This browser has no WebAssembly; use a current Chrome, Firefox or Safari", true);
  if (location.protocol == "file:")
    return say("A page that was opened as a file may not load its model: run python export.py " +
               `--serve FOLDER and open http://localhost:8000/${name}.html`, true);
  about = JSON.parse(new TextDecoder().decode(await get(`${name}.json`)));
  task = about.task;
  const kind = {image: "An image", nvs: "A scene", gp: "A curve"}[task];
  const sizes = [64, 128, 256, 512];
  document.title = $("title").textContent = `${kind} as a function`;
  for (const e of document.querySelectorAll("[data-for]"))
    e.hidden = !e.dataset.for.includes(task) || e.id == "draws" && about.model != "vnp";
  $("coded").textContent = about.model == "vnp" ? "Its code: tokens" : "Its code: an MLP's weights";
  $("size").replaceChildren(...sizes.map(n => new Option(`${n} pixels`, n)));
  $("size").value = task == "nvs" ? 128 : 512;
  if (task == "gp") Object.assign(canvas, {width: 960, height: 640});
  const [models, runtime] = await Promise.all([
    Promise.all(["encoder", "decoder"].map(k => get(encodeURIComponent(about.files[k].file)))),
    Promise.all(Object.entries(ort).map(([url, hash]) => get(url, hash)))]);
  const blob = (data) => URL.createObjectURL(new Blob([data], {type: "text/javascript"}));
  worker = new Worker(blob($("worker").textContent), {type: "module"});
  worker.onerror = e => say(e.message, true);
  worker.onmessage = e => e.data.ready ? ready() : answer(e);
  worker.postMessage({id: 0, load: {about, script: blob(runtime[0]), wasm: runtime[1],
    models: {encoder: models[0], decoder: models[1]}}});
}
async function ready() {
  if (task == "gp") return draw(true);
  const blobs = await Promise.all(example.images.map(async u => (await fetch(u)).blob()));
  take(blobs, task == "nvs" && {poses: example.poses, focals: example.focals});
}
start().catch(e => say(String(e.message || e), true));
