// The page: asks its worker for a picture or a curve, draws what comes, and follows the hands.
const {stem, ort, example} = SETUP_OF_THE_EXPORT;
const $ = id => document.getElementById(id), canvas = $("view"), pen = canvas.getContext("2d");
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
const starts = {  // a part of an image, a camera on a sphere, or points on the canvas
  image: {x: 0, y: 0, zoom: 1},
  nvs: {x: -Math.PI / 2, y: Math.PI / 9, r: 4, zoom: 1, focal: [1.88, 1.88]},
  gp: {points: [{x: 0.125, y: 0.375}, {x: 0.35, y: 0.6}, {x: 0.675, y: 0.275}]},
};
let task, worker, start, view, code, pieces, asked = 0, dropped = 0;  // start: Reset's
function say(text, state = "failed") {
  $("status").textContent = text;
  document.body.dataset.state = state;
}

// ---------------------------------------------------------------- what the worker is asked for
function draw(more) {
  document.body.dataset.state = "busy";
  worker.postMessage({id: ++asked, view, size: +$("size").value, ...more});
  $("zoom").textContent = `× ${view.zoom?.toFixed(1)}`;
  if (task == "image") $("input").style.transform =  // the same part of what the model saw
    `scale(${view.zoom}) translate(${-50 * view.x}%, ${-50 * view.y}%)`;
}
function reset(more) {
  view = structuredClone(start);
  draw(more);
}
async function photo([file]) {
  if (!file || task == "gp") return;
  const id = ++dropped, photo = await createImageBitmap(file).catch(() => null);
  if (id != dropped) return;  // a later one has been dropped
  if (!photo) return say(`${file.name}: the browser cannot read it; try a JPEG or PNG picture`);
  start = starts[task];
  reset({photos: [photo]});
}

// ---------------------------------------------------------------- what the worker answers
function answer({data}) {
  const {id, k, count, w, h, encode, ms} = data;
  if (data.error) return say(data.error);
  if (data.seen) return $("input").getContext("2d").putImageData(data.seen, 0, 0);
  if (data.code) return show(code = data.code);
  pieces = k ? [...pieces, data] : [data];
  $("bar").value = (k + 1) / count;
  if (task != "gp") paint(data);
  else if (k == count - 1) plot();
  const what = task == "gp" ? `${count} × ${w} points` : `${w} × ${h} pixels`;
  if (k == count - 1 && id == asked)
    say(`encoded in ${encode.toFixed(1)} ms · ${what} decoded in ${ms.toFixed(0)} ms`, "done");
}
function picture(w, h, color) {  // a canvas; color(k, c): channel c of pixel k, 0 to 255
  const made = Object.assign(document.createElement("canvas"), {width: w, height: h});
  const pixels = new ImageData(w, h);
  for (let k = 0; k < 4 * w * h; k++) pixels.data[k] = k % 4 < 3 ? color(k >> 2, k % 4) : 255;
  made.getContext("2d").putImageData(pixels, 0, 0);
  return made;
}
function paint({k, w, h, top, n, W, H, mean}) {
  if (k == 0)
    Object.assign(canvas, {width: W, height: H}).style.width = `min(100%, ${66 * W / H}vh)`;
  pen.drawImage(picture(w, n, (k, c) => 255 * mean[3 * k + c]), 0, top * H / h, W, n * H / h);
}
function plot() {  // mean and 95 % band of the mixture of all draws
  const over = f => Array.from(pieces[0].mean, (_, i) =>
    pieces.reduce((sum, {mean, std}) => sum + f(mean[i], std[i]), 0) / pieces.length);
  const mean = over(m => m), square = over((m, s) => m * m + s * s);
  const band = mean.map((m, i) => 1.96 * Math.sqrt(Math.max(0, square[i] - m * m)));
  const places = ys => Array.from(ys, (y, i) => [4 * i / 255 - 2, y]);
  const edge = sign => places(mean.map((m, i) => m + sign * band[i]));
  const lines = {
    band: [[...edge(1), ...edge(-1).reverse()]],
    each: pieces.map(p => places(p.mean)), mean: [places(mean)],
    dots: view.points.map(p => Array(2).fill([4 * p.x - 2, 2 - 4 * p.y]))};
  for (const k in lines) $(k).setAttribute("d", lines[k].map(l => `M${l.join("L")}`).join(""));
  canvas.values = {mean, band, eps: pieces.map(p => p.eps?.[0])};
}
function show() {  // the code; a layer is red where positive, blue where negative
  $("code").replaceChildren();
  let count = 0;
  for (const [name, [data, [, h, w]]] of Object.entries(code)) {
    count += data.length;
    if (name.startsWith("pool")) continue;  // the places that a curve's prior is averaged over
    const most = 3 * Math.sqrt(data.reduce((sum, v) => sum + v * v, 0) / data.length);
    const figure = $("code").appendChild(document.createElement("figure"));
    figure.append(picture(w, h, (k, c) => 255 - 200 * clamp(
      [-data[k], Math.abs(data[k]), data[k]][c] / most, 0, 1)), `${name} ${h} × ${w}`);
  }
  $("bytes").textContent = `${count.toLocaleString("en")} numbers of 4 bytes`;
}
$("save").onclick = () => {  // safetensors: a length, a header in JSON, the numbers
  let end = 0;
  const head = JSON.stringify(Object.fromEntries(Object.entries(code).map(([k, [data, shape]]) =>
    [k, {dtype: "F32", shape, data_offsets: [end, end += data.byteLength]}])));
  const file = new Blob([new BigUint64Array([BigInt(head.length)]), head,
                         ...Object.values(code).map(([data]) => data)]);
  Object.assign(document.createElement("a"), {
    download: `${stem}.code.safetensors`, href: URL.createObjectURL(file)}).click();
};

// ---------------------------------------------------------------- hands
const fingers = new Map();  // id of a mouse or finger that is down -> its place on the canvas
let held, pressed;  // the point of a curve that is held; where, until it is dragged from there
function move(from, to, factor) {  // what was at one place of the canvas comes to another
  const old = view.zoom;
  if (task == "gp") Object.assign(held, {x: clamp(to.x, 0, 1), y: clamp(to.y, 0, 1)});
  if (task == "nvs") {
    view.zoom = clamp(old * factor, 0.5, 8);
    view.x -= 4 * (to.x - from.x);
    view.y = clamp(view.y + 3 * (to.y - from.y), -1.4, 1.4);
  }
  if (task == "image") {
    const size = 1 / (view.zoom = clamp(old * factor, 1, 64));
    for (const k of "xy") view[k] = clamp(
      view[k] + (2 * from[k] - 1) / old - (2 * to[k] - 1) * size, size - 1, 1 - size);
  }
  draw();
}
function place(e) {  // of a pointer, in [0, 1]
  const box = canvas.getBoundingClientRect();
  return {x: (e.clientX - box.left) / box.width, y: (e.clientY - box.top) / box.height};
}
function hand() {  // the middle of one or two fingers, and how far these are apart
  const [a, b = a] = fingers.values();
  return {x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: distance(a, b) || 1};
}
canvas.onpointerdown = e => {
  canvas.setPointerCapture(e.pointerId);
  fingers.set(e.pointerId, place(e));
  if (task != "gp") return;
  held = view.points.find(p => distance(p, place(e)) < 0.03);
  pressed = held && place(e);
  if (held) return;
  view.points.push(held = place(e));
  draw();
};
canvas.onpointermove = e => {
  if (!fingers.has(e.pointerId) || pressed && distance(pressed, place(e)) < 0.01) return;
  const from = hand();
  pressed = null;
  fingers.set(e.pointerId, place(e));
  move(from, hand(), hand().apart / from.apart);
};
canvas.onpointerup = canvas.onpointercancel = e => {
  fingers.delete(e.pointerId);
  if (pressed && view.points.length > 1) {  // a click on a point takes it away
    view.points = view.points.filter(p => p != held);
    draw();
  }
  pressed = null;
};
canvas.onwheel = e => {
  if (task == "gp") return;
  e.preventDefault();
  zoom(2 ** (-e.deltaY / 200), place(e));
};
const zoom = (factor, at = {x: 0.5, y: 0.5}) => move(at, at, factor);
$("in").onclick = () => zoom(2);
$("out").onclick = () => zoom(0.5);
$("reset").onclick = () => reset();
$("draws").onclick = () => draw({anew: true});
$("size").onchange = () => draw();
$("file").onchange = e => photo(e.target.files);
document.onpaste = e => photo(e.clipboardData.files);
document.ondragover = document.ondragleave = document.ondrop = e => {
  e.preventDefault();
  document.body.classList.toggle("over", e.type == "dragover");
  photo(e.dataTransfer.files);  // none before the drop
};

// ---------------------------------------------------------------- the start
const script = text => URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
async function get(name, integrity = "") {  // a URL of what was loaded
  const reply = await fetch(name, {integrity});
  if (!reply.ok) throw Error(`${name}: ${reply.status} ${reply.statusText}`);
  $("bar").value += 0.2;
  return script(await reply.arrayBuffer());
}
async function begin() {
  if (typeof WebAssembly != "object") throw Error($("status").dataset.wasm);
  if (location.protocol == "file:") throw Error($("status").dataset.file);
  const about = await (await fetch(await get(`${encodeURIComponent(stem)}.json`))).json();
  const S = about.config.image_size;
  ({task} = about);
  start = example?.view || starts[task];
  for (const e of document.querySelectorAll("[data-for]"))
    e.toggleAttribute("hidden", !`${task} ${about.model}`.match(e.dataset.for));
  $("size").value = task == "nvs" ? 128 : 512;
  Object.assign($("input"), {width: S, height: S});
  $("seen").textContent = `${S} × ${S} pixels`;
  const parts = ["encoder", "decoder"].map(k => [encodeURIComponent(about.files[k].file)]);
  const urls = await Promise.all([...parts, ...Object.entries(ort)].map(file => get(...file)));
  const given = `const GIVEN = ${JSON.stringify({about, urls})};`;
  worker = new Worker(script(given + $("worker").textContent), {type: "module"});
  Object.assign(worker, {onmessage: answer, onerror: e => say(e.message)});
  if (task == "gp") return reset();
  const photos = await Promise.all(example.images.map(async url =>
    createImageBitmap(await (await fetch(url)).blob())));
  reset({...example, photos});
}
begin().catch(e => say(e.message || String(e)));
