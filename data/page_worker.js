// The page's worker: shrinks photos, runs the encoder, and the decoder in pieces, coarse first.
const {about, urls: [encoder, decoder, runtime, wasm]} = GIVEN, {task, config} = about;
const S = config.image_size, sessions = {};  // S: the side of what the model sees, in pixels
let ort, fresh, code, encode, noise, latest, shape = [256, 1], queue = Promise.resolve();
const loaded = load(), channel = new MessageChannel(), turn = () => new Promise(done => {
  channel.port1.onmessage = done;  // after the messages that already wait
  channel.port2.postMessage(0);
});
async function load() {
  ort = await import(runtime);
  const wasmBinary = await (await fetch(wasm)).arrayBuffer();
  Object.assign(ort.env.wasm, {wasmBinary, numThreads: 1});
  sessions.encoder = await ort.InferenceSession.create(encoder);
  sessions.decoder = await ort.InferenceSession.create(decoder);
}
function run(part, feed) {  // feed: name -> [data, dims], also such as the graph does not read
  const names = Object.keys(about.files[part].inputs).filter(k => feed[k]);
  return sessions[part].run(Object.fromEntries(names.map(k =>
    [k, new ort.Tensor("float32", Float32Array.from(feed[k][0]), feed[k][1])])));
}
function squeeze({data, width, height}) {  // rows to S pixels as Pillow does; the result is turned
  const out = new ImageData(height, S), reach = Math.max(width / S, 1);
  for (let x = 0; x < S; x++) {
    const middle = (x + 0.5) * width / S, from = Math.max(0, Math.floor(middle - reach));
    const f = Array.from({length: Math.min(width, Math.ceil(middle + reach)) - from}, (_, k) =>
      Math.max(0, 1 - Math.abs(from + k + 0.5 - middle) / reach));
    const total = f.reduce((a, b) => a + b);
    for (let y = 0; y < height; y++) for (let c = 0; c < 4; c++)
      out.data[(x * height + y) * 4 + c] =
        f.reduce((sum, v, k) => sum + v * data[(y * width + from + k) * 4 + c], 0) / total;
  }
  return out;
}
function look(photo, index) {  // on white, in a scene padded to a square -> (3, S, S) in [0, 1]
  const shrink = Math.min(1, 2048 / Math.max(photo.width, photo.height));
  const [w, h] = [photo.width, photo.height].map(n => Math.max(1, Math.round(n * shrink)));
  const [W, H] = shape = task == "nvs" ? [Math.max(w, h), Math.max(w, h)] : [w, h];
  const pen = new OffscreenCanvas(W, H).getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, W, H);
  pen.drawImage(photo, (W - w) >> 1, (H - h) >> 1, w, h);
  const seen = squeeze(squeeze(pen.getImageData(0, 0, W, H)));
  if (index == 0) postMessage({seen});
  return [0, 1, 2].flatMap(c => Array.from(seen.data.filter((_, k) => k % 4 == c), v => v / 255));
}
function pose({x, y, r}) {  // camera-to-world: at angles x and y of a sphere, looking at its middle
  const [cx, sx, cy, sy] = [Math.cos(x), Math.sin(x), Math.cos(y), Math.sin(y)];
  return [[-sx, -sy * cx, cy * cx, r * cy * cx], [cx, -sy * sx, cy * sx, r * cy * sx],
          [0, cy, sy, r * sy]];
}
const contextOf = {
  image: ({photos}) => ({
    image: [look(photos[0], 0), [1, 3, S, S]], mask: [Array(S * S).fill(1), [1, 1, S, S]]}),
  nvs: ({photos, view, poses = [pose(view)], focals = [view.focal.map(f => f * S)]}) => ({
    images: [photos.flatMap(look), [1, photos.length, 3, S, S]],
    poses: [poses.flat(2), [1, photos.length, 3, 4]],
    focals: [focals.flat(), [1, photos.length, 2]]}),
  gp: ({view: {points}}, N = points.length, D = config.n_values) => ({  // of D values the first
    x: [points.map(p => 4 * p.x - 2), [1, N, 1]],
    y: [points.flatMap(p => [2 - 4 * p.y, ...Array(D - 1).fill(0)]), [1, N, D]],
    mask: [points.flatMap(() => [1, ...Array(D - 1).fill(0)]), D > 1 ? [1, N, D] : [1, N]]}),
};
const queryOf = {  // the values of pixel (i, j) of h x w
  image: ({x, y, zoom}, w, h) => (i, j) => ({
    coords: [y + ((2 * i + 1) / h - 1) / zoom, x + ((2 * j + 1) / w - 1) / zoom]}),
  nvs: (view, w, h, camera = pose(view), [fx, fy] = view.focal) => (i, j) => {
    const right = (j + 0.5 - w / 2) / (fx * view.zoom * w);
    const up = (h / 2 - i - 0.5) / (fy * view.zoom * h);
    return {rays_o: camera.map(r => r[3]),
            rays_d: camera.map(r => r[0] * right + r[1] * up - r[2])};
  },
  gp: (view, w) => (i, j) => ({x: [4 * j / (w - 1) - 2]}),
};
function sample() {  // the noise of 12 draws of a curve; a picture is drawn without
  const dims = about.files.decoder.inputs.eps?.shape.map(n => +n || 1), curve = task == "gp";
  const normal = () => !curve ? 0 :
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  const eps = () => dims && [Array.from({length: dims.reduce((a, b) => a * b)}, normal), dims];
  return Array.from({length: dims && curve ? 12 : 1}, eps);
}
function cut(size) {  // what is to be drawn into pieces of about 4,096 queries
  const sides = task == "gp" ? noise.map(() => 256) : [task == "nvs" ? 32 : 64, size];
  const whole = about.model == "vnp" && config.latent_pool == "query";  // latents need all queries
  return sides.flatMap((side, pass) => {
    const [w, h] = shape.map(n => Math.max(1, Math.round(n * side / Math.max(...shape))));
    const n = whole ? h : Math.ceil(4096 / w), eps = noise[pass] || noise[0];
    return Array.from({length: Math.ceil(h / n)}, (_, k) =>
      ({w, h, top: k * n, n: Math.min(n, h - k * n), eps}));
  });
}
function decode(view, {w, h, top, n, eps}) {
  const feed = {...code, eps, near: [[about.near], [1]], far: [[about.far], [1]]};
  const pixel = queryOf[task](view, w, h), query = {};
  for (let i = top; i < top + n; i++) for (let j = 0; j < w; j++)
    for (const [k, v] of Object.entries(pixel(i, j))) (query[k] ||= []).push(...v);
  for (const k in query) feed[k] = [query[k], [1, n * w, query[k].length / (n * w)]];
  return run("decoder", feed);
}
async function work({id, view, size, anew}) {
  await loaded;
  if (id < latest) return;
  let start = performance.now();
  if (fresh) {
    const context = contextOf[task](fresh);
    fresh = null;
    const out = await run("encoder", context);
    code = Object.fromEntries(Object.entries(out).map(([k, t]) => [k, [t.data, t.dims]]));
    encode = performance.now() - start;
    postMessage({code});
  }
  if (anew || !noise) noise = sample();
  start = performance.now();
  const pieces = cut(size), {w: W, h: H} = pieces.at(-1), count = pieces.length;
  for (const [k, piece] of pieces.entries()) {
    await turn();
    if (id < latest && task != "gp") return;  // a curve is finished, so that it moves in a drag
    const {mean, std} = await decode(view, piece), ms = performance.now() - start;
    const drawn = v => v?.data.filter((_, i) => i % config.n_values == 0);  // of several the first
    postMessage({...piece, W, H, k, count, id, mean: drawn(mean), std: drawn(std), encode, ms});
  }
}
onmessage = ({data}) => {
  latest = data.id;
  if (data.photos || task == "gp") fresh = data;
  queue = queue.then(() => work(data)).catch(e => postMessage({error: e.message || String(e)}));
};
