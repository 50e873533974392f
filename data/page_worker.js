// The page's worker: reads photos, runs the encoder, and the decoder in pieces, coarse first.
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
function white(width, height) {  // what draws on a white picture
  const pen = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  return pen;
}
function* strips(photo) {  // [its first row, pixels]: the whole may exceed the largest canvas
  const {width, height} = photo, n = Math.ceil(2 ** 22 / width);
  for (let top = 0; top < height; top += n) {
    const h = Math.min(n, height - top), pen = white(width, h);
    pen.drawImage(photo, 0, -top);
    yield [top, pen.getImageData(0, 0, width, h).data];
  }
}
function squeeze(parts, width, height, size) {  // rows to `size` pixels, turned; equals Pillow's
  const out = new Uint8ClampedArray(4 * size * height), reach = Math.max(width / size, 1);
  for (const [top, data] of parts) for (let x = 0; x < size; x++) {
    const middle = (x + 0.5) * width / size, from = Math.max(0, Math.floor(middle - reach));
    const near = Array.from({length: Math.min(width, Math.ceil(middle + reach)) - from}, (_, k) =>
      Math.max(0, 1 - Math.abs(from + k + 0.5 - middle) * (1 / reach)));
    const total = near.reduce((a, b) => a + b);
    const weights = near.map(v => Math.floor(v / total * 2 ** 22 + 0.5));  // whole numbers
    for (let y = 0; y < data.length / width / 4; y++) for (let c = 0; c < 4; c++) {
      let sum = 2 ** 21;
      for (let k = 0, i = 4 * (y * width + from) + c; k < weights.length; k++, i += 4)
        sum += weights[k] * data[i];
      out[4 * (x * height + top + y) + c] = Math.floor(sum / 2 ** 22);
    }
  }
  return out;
}
const even = n => n % 1 == 0.5 ? 2 * Math.round(n / 2) : Math.round(n);  // as Python rounds
function look(photo) {  // S x S pixels: an image squeezed, a view padded with white
  const {width, height} = photo, [w, h] = [width, height].map(n =>
    task == "image" ? S : Math.max(1, even(n / Math.max(width, height) * S))), pen = white(S, S);
  const small = squeeze([[0, squeeze(strips(photo), width, height, w)]], height, w, h);
  pen.putImageData(new ImageData(small, w, h), even((S - w) / 2), even((S - h) / 2));
  return pen.getImageData(0, 0, S, S);
}
async function read({photos, ...more}) {  // more: what is sent back with the pixels, such as poses
  try {
    const open = file => createImageBitmap(file, {colorSpaceConversion: "none"});
    const bitmaps = await Promise.all(photos.map(open)), [{width, height}] = bitmaps;
    const shape = task == "image" ? [width, height] : [1, 1];  // its proportions are drawn
    postMessage({...more, shape, seen: bitmaps.map(look)});
  } catch {
    postMessage({...more, error:
      `${photos[0].name}: the browser cannot read it; try a JPEG or PNG picture`});
  }
}
const planes = ({data}) =>  // (3, S, S) in [0, 1]
  [0, 1, 2].flatMap(c => Array.from(data.filter((_, k) => k % 4 == c), v => v / 255));
function pose({x, y, r}) {  // camera-to-world: at angles x and y of a sphere, looking at its middle
  const [cx, sx, cy, sy] = [Math.cos(x), Math.sin(x), Math.cos(y), Math.sin(y)];
  return [[-sx, -sy * cx, cy * cx, r * cy * cx], [cx, -sy * sx, cy * sx, r * cy * sx],
          [0, cy, sy, r * sy]];
}
const contextOf = {
  image: ({seen}) => ({
    image: [planes(seen[0]), [1, 3, S, S]], mask: [Array(S * S).fill(1), [1, 1, S, S]]}),
  nvs: ({seen, view, poses = [pose(view)], focals = [view.focal.map(f => f * S)]}) => ({
    images: [seen.flatMap(planes), [1, seen.length, 3, S, S]],
    poses: [poses.flat(2), [1, seen.length, 3, 4]],
    focals: [focals.flat(), [1, seen.length, 2]]}),
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
  const dims = about.files.decoder.inputs.eps?.shape.map(n => +n || 1);
  const numbers = dims => Array.from({length: dims.reduce((a, b) => a * b)}, () =>
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
  const latents = () => ({eps: dims && [numbers(dims), dims]});
  if (task != "gp") return [{eps: dims && [numbers(dims).fill(0), dims]}];
  const plain = Array.from({length: dims ? 12 : 1}, latents);
  if (!code.posterior) return plain;
  const [, values, rows] = code.posterior[1];  // (1, D, 1 + F, F)
  return [...plain, ...Array.from({length: 12}, () =>
    ({...latents(), weights: numbers([values, rows - 1])}))];
}
function drawn([data, dims], weights) {  // the posterior at one draw: its mean, moved by the root
  const size = dims[3], n = dims[2] * size, of = k => weights.slice(size * Math.floor(k / n));
  return [data.map((mean, k) => k % n < size && of(k).slice(0, size).reduce(
    (sum, w, i) => sum + w * data[k + (i + 1) * size], mean)), dims];
}
function cut(size) {  // what is to be drawn into pieces of about 4,096 queries, or 512 rays
  const sides = task == "gp" ? noise.map(() => 256) : [task == "nvs" ? 32 : 64, size];
  const whole = about.model == "vnp" && config.latent_pool == "query";  // latents need all queries
  return sides.flatMap((side, pass) => {
    const [w, h] = shape.map(n => Math.max(1, Math.round(n * side / Math.max(...shape))));
    const n = whole ? h : Math.ceil((task == "nvs" ? 512 : 4096) / w);
    const moved = noise[pass] || noise[0];
    return Array.from({length: Math.ceil(h / n)}, (_, k) =>
      ({w, h, top: k * n, n: Math.min(n, h - k * n), moved}));
  });
}
function decode(view, {w, h, top, n, moved: {eps, weights}}) {
  const feed = {...code, eps, near: [[about.near], [1]], far: [[about.far], [1]]};
  if (weights) feed.posterior = drawn(code.posterior, weights);
  const pixel = queryOf[task](view, w, h), query = {};
  for (let i = top; i < top + n; i++) for (let j = 0; j < w; j++)
    for (const [k, v] of Object.entries(pixel(i, j))) (query[k] ||= []).push(...v);
  for (const k in query) feed[k] = [query[k], [1, n * w, query[k].length / (n * w)]];
  return run("decoder", feed);
}
function picture(w, h, color) {  // color(k, c): channel c of pixel k, 0 to 255
  const pen = white(w, h), pixels = pen.getImageData(0, 0, w, h);
  for (let k = 0; k < w * h; k++)
    for (let c = 0; c < 3; c++) pixels.data[4 * k + c] = color(k, c);
  pen.putImageData(pixels, 0, 0);
  return pen.canvas.transferToImageBitmap();
}
function tile([name, {data, dims}]) {  // red where positive, blue where negative
  const [h, w] = dims.slice(-2);
  const most = 3 * Math.sqrt(data.reduce((sum, v) => sum + v * v, 0) / data.length);
  return {name, title: about.files.encoder.outputs[name].meaning, picture: picture(w, h, (k, c) =>
    255 - 200 * Math.min(1, Math.max(0, [-data[k], Math.abs(data[k]), data[k]][c] / most)))};
}
function safetensors(out) {  // a length, a header in JSON, the numbers
  let end = 0;
  const head = JSON.stringify(Object.fromEntries(Object.entries(out).map(([k, {data, dims}]) =>
    [k, {dtype: "F32", shape: dims, data_offsets: [end, end += data.byteLength]}])));
  return new Blob([new BigUint64Array([BigInt(head.length)]), head,
                   ...Object.values(out).map(({data}) => data)]);
}
function mixture(all) {  // mean, half the width of the 95 % interval, and draws
  const plain = all.filter((_, i) => !noise[i].weights), draws = all.slice(plain.length);
  const over = f => Array.from(plain[0].mean, (_, i) =>
    plain.reduce((sum, {mean, std}) => sum + f(mean[i], std[i]), 0) / plain.length);
  const mean = over(m => m), square = over((m, s) => m * m + s * s);
  return {mean, noise, draws: (draws.length ? draws : plain).map(d => d.mean),
    band: mean.map((m, i) => 1.96 * Math.sqrt(Math.max(0, square[i] - m * m)))};
}
async function work({id, view, size, anew}) {
  await loaded;
  if (id < latest) return;
  let start = performance.now();
  if (fresh) {
    const context = contextOf[task](fresh);
    shape = fresh.shape || shape;
    fresh = null;
    const out = await run("encoder", context);
    code = Object.fromEntries(Object.entries(out).map(([k, t]) => [k, [t.data, t.dims]]));
    encode = performance.now() - start;
    const shown = Object.entries(out).filter(([name]) => !/^pool|scale|poses|focals/.test(name));
    postMessage({tiles: shown.map(tile), file: safetensors(out),
                 count: Object.values(out).reduce((sum, {data}) => sum + data.length, 0)});
  }
  if (anew || !noise) noise = sample();
  start = performance.now();
  const pieces = cut(size), {w: W, h: H} = pieces.at(-1), count = pieces.length, draws = [];
  for (const [k, piece] of pieces.entries()) {
    await turn();
    if (id < latest && task != "gp") return;  // a curve is finished, so that it moves in a drag
    const {mean, std} = await decode(view, piece), ms = performance.now() - start;
    const told = {...piece, W, H, k, count, id, encode, ms}, {w, n} = piece;
    const first = v => v.data.filter((_, i) => i % config.n_values == 0);  // of several values
    if (task != "gp") told.picture = picture(w, n, (k, c) => 255 * mean.data[3 * k + c]);
    else if (draws.push({mean: first(mean), std: first(std)}) == count) told.curve = mixture(draws);
    postMessage(told);
  }
}
onmessage = ({data}) => {
  if (data.photos) return read(data);
  latest = data.id;
  if (data.seen || task == "gp") fresh = data;
  queue = queue.then(() => work(data)).catch(e => postMessage({error: e.message || String(e)}));
};
