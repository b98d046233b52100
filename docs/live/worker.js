// Runs the exported models beside the page, so that it stays responsive: onnxruntime-web, plain wasm, one thread.

import * as ort from "./ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1;

/** A file of this folder that ends in .bin: gzip. @param {string} name */
async function unpacked(name) {
  const answer = await fetch(name);
  if (!answer.ok || !answer.body) throw new Error(`${name} did not arrive`);
  return new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

const runtime = unpacked("ort.bin").then((bytes) => { ort.env.wasm.wasmBinary = bytes; });
/** @type {Map<string, Promise<ort.InferenceSession>>} */
const sessions = new Map();

/** @param {string} model */
async function open(model) {
  const [bytes] = await Promise.all([unpacked(`${model}.onnx.bin`), runtime]);
  return ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"] });
}

/** One at a time: a session can't run twice at once. */
let last = Promise.resolve();

/** @param {MessageEvent} event */
self.onmessage = ({ data: { ticket, model, pixels, side, away, experts } }) => {
  last = last.then(async () => {
    try {
      if (!sessions.has(model)) sessions.set(model, open(model));
      const session = await sessions.get(model);
      if (!pixels) return self.postMessage({ ticket });
      const feeds = { image: new ort.Tensor("float32", pixels, [1, 3, side, side]), away: new ort.Tensor("bool", away, [away.length / experts, experts]) };
      const found = await session.run(feeds);
      return self.postMessage({ ticket, outputs: Object.fromEntries(Object.entries(found).map(([name, { data, dims }]) => [name, { data: Array.from(data, Number), dims }])) });
    } catch (/** @type {any} */ error) {
      sessions.delete(model); // the next question tries again
      return self.postMessage({ ticket, problem: error.message });
    }
  });
};
