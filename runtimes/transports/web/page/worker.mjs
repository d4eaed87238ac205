// One launch: opens one artifact and serves requests, docs/worker-protocol.md over HTTP. What a page can't do (score
// reads a folder of the other side) is not among its operations.

import { Exchange } from "./exchange.mjs";
import { describe, Refused } from "./refused.mjs";
import { startRuntime, WebSession } from "./session.mjs";
import { time } from "./timing.mjs";

const PROTOCOL_VERSION = 1;
const MACHINE = "wasm32";
const ROOT = new URL("./", self.location.href).href;
const BASE = `${ROOT}w/${new URL(self.location.href).searchParams.get("launch")}`;
const exchange = new Exchange(BASE);

let greeted = false;
let session = null;
let info = null;

// The runtime makes its own memory: the constructor is the one place where it can be seen. It only ever grows.
const heaps = [];
const { Memory } = WebAssembly;
WebAssembly.Memory = class extends Memory {
  constructor(...args) {
    super(...args);
    heaps.push(this);
  }
};

function heapBytes() {
  return heaps.reduce((sum, memory) => sum + memory.buffer.byteLength, 0);
}

const memory = { baseline_wasm_heap: null, loaded_wasm_heap: null };

const operations = {
  async hello(request) {
    if (!Number.isInteger(request.protocol)) throw wrong(request, "protocol", "int");
    if (request.protocol !== PROTOCOL_VERSION) {
      const text = `the client speaks protocol ${request.protocol}, this worker ${PROTOCOL_VERSION}`;
      throw new Refused("WorkerError", text, "use the same edgestill on both sides");
    }
    greeted = true;
    return {
      protocol: PROTOCOL_VERSION, worker: "edgestill-web", version: "1", operations: Object.keys(operations),
      machine: MACHINE, system: navigator.userAgent,
    };
  },

  async open(request) {
    if (!greeted) throw new Refused("WorkerError", "open before hello", "shake hands first");
    if (session) throw new Refused("WorkerError", "a model is open already", "one worker, one model: start another");
    const { threads = 1, backend = null, extra = {} } = request.options ?? {};
    if (!Number.isInteger(threads) || threads < 1) throw new Refused("BadInput", `open: ${threads} threads`, "at least 1");
    if (backend !== null && backend !== "wasm") {
      throw new Refused("Unsupported", `onnxruntime-web has no backend ${backend} here`, "available: wasm");
    }
    if (threads > 1 && !self.crossOriginIsolated) {
      const hint = "measure with --threads 1, or open the page from the machine itself or over https";
      throw new Refused("Unsupported", `${threads} threads: this page is not cross-origin isolated`, hint);
    }
    const started = performance.now();
    const manifest = await exchange.manifest();
    if (manifest.format !== "onnx") {
      throw new Refused("Unsupported", `a browser runs onnx, this artifact is ${manifest.format}`, "export onnx:fp32 or onnx:int8");
    }
    const folder = manifest.entry.includes("/") ? manifest.entry.replace(/[^/]*$/, "") : "";
    let model = null;
    let external = [];
    let total = 0;
    for (const [index, file] of manifest.files.entries()) {
      const isEntry = file.path === manifest.entry;
      if (!isEntry && !file.path.startsWith(`${manifest.entry}.`)) continue; // tokenizer and templates stay there
      const data = await exchange.payload(index, file);
      total += data.length;
      if (isEntry) model = data;
      else external.push({ path: file.path.slice(folder.length), data });
    }
    if (!model) throw new Refused("BadInput", `payload file ${manifest.entry} is missing`, "export it again");
    const ort = await import(`${ROOT}ort/ort.wasm.min.mjs`);
    await startRuntime(ort, threads, ROOT);
    const prepared = performance.now();
    memory.baseline_wasm_heap = heapBytes();
    await told("baseline");
    const loading = performance.now();
    session = await WebSession.open(ort, manifest, model, external, extra);
    const loaded = performance.now();
    memory.loaded_wasm_heap = heapBytes();
    await told("loaded");
    info = session.info();
    const cold = { worked: false, total_bytes: total, resident_bytes: null, reason: "a browser loads from its own memory" };
    return {
      info, load_seconds: (loaded - loading) / 1e3, prepare_seconds: (prepared - started) / 1e3,
      cold: request.cold ? cold : null,
    };
  },

  async info() {
    return { info: model().info };
  },

  async forward(request) {
    const { ids, mask, shape } = await batch(request);
    const output = await session.forward(ids, mask, shape);
    checkOutput(output.shape, shape);
    return { output: await exchange.put(output.data, "float32", output.shape) };
  },

  async decode(request) {
    const { prompt, count } = checkPrompt(request);
    const wanted = Boolean(request.logits);
    const ids = [];
    const seconds = [];
    const rows = wanted ? new Float32Array(count * info.vocab_size) : null;
    let last = performance.now();
    for await (const token of session.decode(prompt, count)) {
      const now = performance.now();
      rows?.set(token.logits, ids.length * info.vocab_size);
      ids.push(token.id);
      seconds.push((now - last) / 1e3);
      last = performance.now();
    }
    return { ids, seconds, logits: wanted ? await exchange.put(rows, "float32", [count, info.vocab_size]) : null };
  },

  async time_forward(request) {
    const { ids, mask, shape } = await batch(request);
    const call = async () => {
      const start = performance.now();
      await session.forward(ids, mask, shape);
      return (performance.now() - start) / 1e3;
    };
    return time(call, (seconds) => seconds, bounds(request));
  },

  async time_decode(request) {
    const { prompt, count } = checkPrompt(request);
    const call = async () => {
      const marks = [performance.now()];
      for await (const _ of session.decode(prompt, count)) marks.push(performance.now());
      const steps = marks.slice(1).map((mark, index) => (mark - marks[index]) / 1e3);
      return { first_s: steps[0], tokens_s: steps.slice(1) };
    };
    return time(call, (run) => run.tokens_s.reduce((sum, step) => sum + step, run.first_s), bounds(request));
  },

  async memory() {
    model();
    const names = ["baseline_anonymous", "baseline_file_backed", "baseline_rss", "load_anonymous", "load_peak_rss",
      "loaded_anonymous", "run_anonymous", "run_peak_rss", "peak_anonymous", "peak_file_backed", "peak_rss"];
    return {
      ...Object.fromEntries(names.map((name) => [name, null])), samples: 0,
      reason: "a page can't see the memory of its process", ...memory, peak_wasm_heap: heapBytes(),
    };
  },

  async facts() {
    const cores = navigator.hardwareConcurrency ?? null;
    return {
      system: navigator.platform ?? null, release: null, machine: MACHINE, cpu: null, cpu_flags: [],
      cores_physical: null, cores_logical: cores, cores_usable: cores,
      memory_bytes: navigator.deviceMemory ? navigator.deviceMemory * 2 ** 30 : null,
      governor: null, governor_reason: "a page can't see it", user_agent: navigator.userAgent,
    };
  },

  async close() {
    await session?.close();
    session = null;
    return {};
  },
};

/** Tell the other side where loading begins and ends: on its own machine it can look at this process. */
function told(phase) {
  return fetch(`${BASE}/phase`, { method: "POST", body: phase });
}

function model() {
  if (!session) throw new Refused("WorkerError", "no model is open", "send open first");
  return { session, info };
}

function wrong(request, name, type) {
  const value = JSON.stringify(request[name]) ?? "None";
  return new Refused("BadInput", `${request.op}: ${name} is ${value}`, `${name} must be of type ${type}`);
}

function field(request, name, type, good) {
  if (!good(request[name])) throw wrong(request, name, type);
  return request[name];
}

async function batch(request) {
  model();
  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  const ids = await exchange.take(field(request, "ids", "dict", isObject));
  const mask = await exchange.take(field(request, "mask", "dict", isObject));
  const hint = "ids and attention_mask are int64 [batch, length], padded on the right";
  const bad = (text, next = hint) => new Refused("BadInput", text, next);
  const shape = ids.shape;
  if (shape.length !== 2 || String(shape) !== String(mask.shape) || shape.includes(0)) {
    throw bad(`ids ${JSON.stringify(shape)} with mask ${JSON.stringify(mask.shape)}`);
  }
  if (ids.dtype !== "int64" || mask.dtype !== "int64") throw bad(`ids of ${ids.dtype} with mask of ${mask.dtype}`);
  const [, length] = shape;
  let [lowest, highest] = [ids.data[0], ids.data[0]];
  for (const id of ids.data) {
    if (id < lowest) lowest = id;
    if (id > highest) highest = id;
  }
  if (lowest < 0n || highest >= BigInt(info.vocab_size)) {
    throw bad(`token ids ${lowest} to ${highest}, the vocabulary has ${info.vocab_size}`);
  }
  mask.data.forEach((value, at) => {
    const first = at % length === 0;
    if ((value !== 0n && value !== 1n) || (first ? value !== 1n : value > mask.data[at - 1])) {
      throw bad("the mask is not ones followed by zeros");
    }
  });
  if (length > info.max_length) throw bad(`${length} tokens, the model takes ${info.max_length}`, "cut the text");
  return { ids: ids.data, mask: mask.data, shape };
}

function checkPrompt(request) {
  model();
  const { op } = request;
  const prompt = field(request, "prompt_ids", "list", Array.isArray);
  const count = field(request, "max_new_tokens", "int", Number.isInteger);
  if (!prompt.every(Number.isInteger)) throw new Refused("BadInput", `${op}: prompt_ids are not all integers`, "token ids");
  if (!session.decodes) throw new Refused("Unsupported", `a ${info.task} model does not decode`, "use forward");
  if (!prompt.length || count < 1) {
    throw new Refused("BadInput", `${prompt.length} prompt tokens, ${count} new ones`, "at least one of each");
  }
  if (prompt.some((id) => id < 0 || id >= info.vocab_size)) {
    throw new Refused("BadInput", `a prompt id is outside the vocabulary of ${info.vocab_size}`, "use the model's tokenizer");
  }
  if (prompt.length + count > info.max_length) {
    const text = `${prompt.length} + ${count} tokens, the model takes ${info.max_length}`;
    throw new Refused("BadInput", text, "shorten the prompt");
  }
  return { prompt, count };
}

function bounds(request) {
  return {
    repeats: field(request, "repeats", "int", Number.isInteger),
    warmup: field(request, "warmup", "int", Number.isInteger),
    max_seconds: field(request, "max_seconds", "float", (value) => typeof value === "number"),
  };
}

/** A graph that breaks the session's contract is told from one that computes wrong numbers. */
function checkOutput(shape, [size, length]) {
  const wanted = {
    "text-generation": [size, length, info.vocab_size], "token-classification": [size, length, shape[2]],
  }[info.task] ?? [size, shape[1]];
  if (String(shape) !== String(wanted)) {
    const text = `${info.runtime} gave ${JSON.stringify(shape)} instead of ${JSON.stringify(wanted)}`;
    throw new Refused("WorkerError", text, "the graph's first output is not what the artifact says");
  }
}

async function answer(line) {
  let request = null;
  try {
    request = JSON.parse(line);
  } catch {
    // told below
  }
  if (typeof request !== "object" || request === null || Array.isArray(request)) {
    const text = `not a protocol message: ${line.slice(0, 80)}`;
    return { id: null, ok: false, error: describe(new Refused("WorkerError", text, "one JSON object a line is expected")) };
  }
  const id = request.id ?? null;
  try {
    const known = typeof request.op === "string" && Object.hasOwn(operations, request.op);
    if (!known) {
      const text = `unknown operation ${JSON.stringify(request.op) ?? "None"}`;
      throw new Refused("WorkerError", text, `known: ${Object.keys(operations).join(", ")}`);
    }
    return { id, ok: true, result: await operations[request.op](request) };
  } catch (error) {
    return { id, ok: false, error: describe(error) };
  }
}

for (;;) {
  const reply = await fetch(`${BASE}/request`, { method: "POST" });
  if (reply.status === 204) continue; // nothing yet
  if (!reply.ok) break; // closed
  const line = await reply.text();
  await fetch(`${BASE}/reply`, { method: "POST", body: JSON.stringify(await answer(line)) });
}
self.close();
