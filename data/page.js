// The page: asks its worker for a picture or a curve, draws what comes, and follows the hands.
const {stem, ort, example} = SETUP_OF_THE_EXPORT;
const $ = id => document.getElementById(id), canvas = $("view");
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
const starts = {  // a part of an image, a camera on a sphere, or points on the canvas
  image: {x: 0, y: 0, zoom: 1},
  nvs: {x: -Math.PI / 2, y: Math.PI / 9, r: 4, zoom: 1, focal: [1.88, 1.88]},
  gp: {points: [{x: 0.125, y: 0.375}, {x: 0.35, y: 0.6}, {x: 0.675, y: 0.275}]},
};
let task, worker, start, view, asked = 0, dropped = 0;  // start: Reset's
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
  for (const e of document.querySelectorAll("[inert]")) e.inert = false;
  draw(more);
}
function photo([file]) {
  if (!file || !worker || task == "gp") return;
  say(`reading ${file.name} …`, "busy");
  worker.postMessage({photos: [file], drop: ++dropped, view: starts[task]});
}

// ---------------------------------------------------------------- what the worker answers
function answer({data}) {
  const {id, drop = dropped, k, count, w, h, encode, ms} = data;
  if (drop != dropped) return;  // a later photo has been dropped
  if (data.error) return say(data.error);
  if (data.tiles) return show(data);
  if (data.seen) {
    const [{width: S}] = data.seen, n = Math.ceil(Math.sqrt(data.seen.length));
    const pen = Object.assign($("input"), {width: n * S, height: n * S}).getContext("2d");
    data.seen.forEach((view, k) => pen.putImageData(view, S * (k % n), S * Math.floor(k / n)));
    $("seen").textContent = `${task == "nvs" ? `${data.seen.length} × ` : ""}${S} × ${S} pixels`;
    start = data.view;
    return reset(data);
  }
  $("bar").value = (k + 1) / count;
  if (data.picture) paint(data);
  if (data.curve) plot(canvas.values = data.curve);
  const what = task == "gp" ? `${count} × ${w} points` : `${w} × ${h} pixels`;
  if (k == count - 1 && id == asked && document.body.dataset.state == "busy")
    say(`encoded in ${encode.toFixed(1)} ms · ${what} decoded in ${ms.toFixed(0)} ms`, "done");
}
function paint({k, picture, h, top, n, W, H}) {
  if (k == 0)
    Object.assign(canvas, {width: W, height: H}).style.width = `min(100%, ${66 * W / H}vh)`;
  canvas.getContext("2d").drawImage(picture, 0, top * H / h, W, n * H / h);
}
function plot({mean, band, draws}) {
  const places = ys => Array.from(ys, (y, i) => [960 * i / 255, 160 * (2 - y)]);
  const edge = sign => places(mean.map((m, i) => m + sign * band[i]));
  const dot = p => Array(2).fill([960 * p.x, 640 * p.y]);
  const lines = {
    band: [[...edge(1), ...edge(-1).reverse()]], each: draws.map(places), mean: [places(mean)],
    dots: view.points.map(dot), chosen: view.points.filter(p => p == held).map(dot)};
  for (const k in lines) $(k).setAttribute("d", lines[k].map(l => `M${l.join("L")}`).join(""));
}
function show({tiles, count, file}) {  // the code
  $("code").replaceChildren(...tiles.map(({name, title, picture}) => {
    const tile = document.createElement("canvas"), figure = document.createElement("figure");
    Object.assign(tile, {width: picture.width, height: picture.height});
    tile.getContext("2d").drawImage(picture, 0, 0);
    figure.title = title;
    figure.append(tile, `${name} ${tile.height} × ${tile.width}`);
    return figure;
  }));
  $("bytes").textContent = `${count.toLocaleString("en")} numbers of 4 bytes`;
  $("save").onclick = () => Object.assign(document.createElement("a"), {
    download: `${stem}.code.safetensors`, href: URL.createObjectURL(file)}).click();
}

// ---------------------------------------------------------------- hands
const fingers = new Map();  // id of a mouse or finger that is down -> its place on the canvas
let held, pressed;  // the point of a curve that is held; where, until the finger moves from there
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
const pixels = ({x, y}, p) =>  // of the screen between two places
  Math.hypot((x - p.x) * canvas.clientWidth, (y - p.y) * canvas.clientHeight);
canvas.onpointerdown = e => {
  if (e.button) return;
  canvas.setPointerCapture(e.pointerId);
  fingers.set(e.pointerId, place(e));
  if (task != "gp") return;
  pressed = place(e);
  held = view.points.find(p => pixels(p, pressed) < (e.pointerType == "touch" ? 22 : 12));
};
canvas.ontouchstart = e => held && e.preventDefault();  // else a curve's page is scrolled
canvas.onpointermove = e => {
  if (!fingers.has(e.pointerId) || pressed && pixels(pressed, place(e)) < 5) return;
  const from = hand();
  pressed = null;
  fingers.set(e.pointerId, place(e));
  if (task != "gp" || held) move(from, hand(), hand().apart / from.apart);
};
canvas.onpointerup = canvas.onpointercancel = e => {
  fingers.delete(e.pointerId);
  if (pressed && e.type == "pointerup") held ? remove() : add(pressed);
  pressed = null;
};
canvas.onwheel = e => {
  if (task == "gp") return;
  e.preventDefault();
  zoom(2 ** (-e.deltaY / 200), place(e));
};
const middle = {x: 0.5, y: 0.5}, zoom = (factor, at = middle) => move(at, at, factor);
function set(points, point) {  // of a curve, and the one that is held
  [view.points, held] = [points, point];
  draw();
}
const add = point => set([...view.points, point], point);
const remove = () => view.points.length > 1 && set(view.points.filter(p => p != held));
const arrow = (x, y) => () => {  // moves on over an image, turns a scene, moves the held point
  const by = {image: -1 / 8, nvs: 1 / 16, gp: 1 / 40}[task], from = task == "gp" ? held : middle;
  move(from, {x: from.x + by * x, y: from.y + by * y}, 1);
};
const keys = {
  ArrowLeft: arrow(-1, 0), ArrowRight: arrow(1, 0), ArrowUp: arrow(0, -1), ArrowDown: arrow(0, 1),
  "+": () => task == "gp" ? add({...middle}) : zoom(2),
  "-": () => task == "gp" ? remove() : zoom(0.5),
  Enter: ({points} = view) => task == "gp" &&  // holds the next point
    set(points, points[(points.indexOf(held) + 1) % points.length])};
canvas.onkeydown = e => {
  const act = keys[e.key == "=" ? "+" : e.key];
  if (!act || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  if (task == "gp" && !view.points.includes(held)) [held] = view.points;
  act();
};
$("in").onclick = () => zoom(2);
$("out").onclick = () => zoom(0.5);
$("reset").onclick = () => reset();
$("draws").onclick = () => draw({anew: true});
$("size").onchange = () => draw();
$("file").onclick = e => e.target.value = "";  // so that the same file may be chosen again
$("file").onchange = e => photo(e.target.files);
document.onpaste = e => photo(e.clipboardData.files);
document.ondragover = document.ondragleave = document.ondrop = e => {
  e.preventDefault();
  document.body.classList.toggle("over", e.type == "dragover" && worker && task != "gp");
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
  const kind = `${task = about.task} ${about.model} ${about.config.n_features}`;
  start = example?.view || starts[task];
  for (const e of document.querySelectorAll("[data-for]"))
    e.toggleAttribute("hidden", !kind.match(e.dataset.for));
  Object.assign(canvas.style, {gp: {touchAction: "pan-y"}, nvs: {imageRendering: "auto"}}[task]);
  $("size").value = (task == "nvs" ? 128 : 512) / (about.model == "vnp" ? 2 : 1);  // in seconds
  const parts = ["encoder", "decoder"].map(k => [encodeURIComponent(about.files[k].file)]);
  const urls = await Promise.all([...parts, ...Object.entries(ort)].map(file => get(...file)));
  const given = `const GIVEN = ${JSON.stringify({about, urls})};`;
  worker = new Worker(script(given + $("worker").textContent), {type: "module"});
  Object.assign(worker, {onmessage: answer, onerror: e => say(e.message)});
  if (task == "gp") return reset();
  const photos = await Promise.all(example.images.map(async url => (await fetch(url)).blob()));
  worker.postMessage({...example, view: start, photos, drop: dropped});
}
begin().catch(e => say(e.message || String(e)));
