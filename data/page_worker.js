// The page's worker: runs the encoder, and the decoder in pieces, coarse first, then fine.
let ort, about, sessions = {}, code = {}, latest = 0, queue = Promise.resolve();
const channel = new MessageChannel(), turn = () => new Promise(done => {
  channel.port1.onmessage = done; channel.port2.postMessage(0); });  // lets newer messages in
const run = async (part, feed) => {  // feed: name -> [data, dims]; only what the graph reads
  const names = Object.keys(about.files[part].inputs).filter(k => feed[k]);
  return sessions[part].run(Object.fromEntries(names.map(k => {
    const [data, dims] = feed[k];
    return [k, new ort.Tensor("float32", Float32Array.from(data), dims)]; })));
};
const queryAt = {  // values of the queries of pixel (i, j) of a pass of w x h pixels
  image: (v, w, h) => (i, j) => ({
    coords: [v.top + (i + .5) * v.height / h, v.left + (j + .5) * v.width / w]}),
  nvs: ({pose, focal}, w, h) => (i, j) => {
    const d = [(j + .5 - w / 2) / (focal[0] * w), -(i + .5 - h / 2) / (focal[1] * h), -1];
    return {rays_o: pose.map(r => r[3]), rays_d: pose.map(r => r[0]*d[0] + r[1]*d[1] + r[2]*d[2])};
  },
  gp: (v, w) => (i, j) => ({x: [-2 + 4 * j / (w - 1)]}),
};
async function decode(id, view, {w, h, eps}, pass) {
  const at = queryAt[about.task](view, w, h), {latent_pool, model} = about.config;
  const whole = model == "vnp" && latent_pool == "query";  // such latents depend on the call
  const rows = whole ? h : Math.max(1, Math.floor(4096 / w));
  for (let top = 0; top < h; top += rows) {
    await turn();
    if (id < latest) return;
    const start = performance.now(), n = Math.min(rows, h - top), points = {};
    for (let i = top; i < top + n; i++) for (let j = 0; j < w; j++)
      for (const [k, v] of Object.entries(at(i, j))) (points[k] ||= []).push(...v);
    const feed = {...code, near: [[about.near], [1]], far: [[about.far], [1]]};
    for (const k in points) feed[k] = [points[k], [1, n * w, points[k].length / (n * w)]];
    if (eps) feed.eps = [eps, about.files.decoder.inputs.eps.shape.map((d, i) => i == 1 ? 1 : d)];
    const {mean, std} = await run("decoder", feed);
    postMessage({id, pass, w, h, top, n, mean: mean.data, std: std?.data,
                 ms: performance.now() - start});
  }
}
async function work({id, load, context, view, passes}) {
  if (load) {
    about = load.about; ort = await import(load.script);
    Object.assign(ort.env.wasm, {wasmBinary: load.wasm, numThreads: 1});
    for (const k in load.models) sessions[k] = await ort.InferenceSession.create(load.models[k]);
    return postMessage({ready: true});
  }
  if (context) {
    const start = performance.now(), out = await run("encoder", context);
    code = Object.fromEntries(Object.entries(out).map(([k, t]) => [k, [t.data, t.dims]]));
    postMessage({id, code, encode: performance.now() - start});
  }
  for (const [i, pass] of passes.entries()) if (id == latest) await decode(id, view, pass, i);
}
onmessage = ({data}) => {
  latest = data.id;
  queue = queue.then(() => work(data)).catch(e => postMessage({error: String(e.message || e)}));
};
