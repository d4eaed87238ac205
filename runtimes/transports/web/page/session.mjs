// An ONNX artifact in onnxruntime-web's WebAssembly build: what runtimes/ort_session.py is to the native one.

import { Refused, oneLine } from "./refused.mjs";

// A model of one Identity node: creating a session of it loads and starts the WebAssembly runtime, before anything is
// timed. ModelProto: ir_version 8; graph "g" with node Identity x -> y of float[1]; opset 13.
const NOTHING = Uint8Array.from(
  atob("CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0="),
  (letter) => letter.charCodeAt(0),
);
const INTEGERS = { int64: BigInt64Array, int32: Int32Array };

export async function startRuntime(ort, threads, root) {
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.proxy = false; // this is a worker already
  ort.env.wasm.wasmPaths = `${root}ort/`;
  ort.env.logLevel = "error";
  await ort.InferenceSession.create(NOTHING, { executionProviders: ["wasm"] });
}

export class WebSession {
  static async open(ort, manifest, model, external, extra) {
    const options = { executionProviders: ["wasm"], externalData: external, ...chosen(extra) };
    try {
      return new WebSession(ort, manifest, await ort.InferenceSession.create(model, options));
    } catch (error) {
      throw refusal(ort, manifest.entry, error);
    }
  }

  constructor(ort, manifest, session) {
    this.ort = ort;
    this.manifest = manifest;
    this.session = session;
    this.inputs = new Map(session.inputMetadata.map((item) => [item.name, item]));
    const named = manifest.outputs[0]?.name ?? "";
    this.output = session.outputNames.includes(named) ? named : session.outputNames[0];
    this.past = session.inputNames.filter((name) => name.startsWith("past_key_values."));
    this.decodes = manifest.task === "text-generation" && this.past.length > 0;
  }

  info() {
    return {
      runtime: "onnxruntime-web", version: this.ort.env.versions.web ?? this.ort.env.versions.common, backend: "wasm",
      task: this.manifest.task, capabilities: ["forward", ...(this.decodes ? ["decode"] : []), "latency"],
      vocab_size: this.manifest.vocab_size, max_length: this.manifest.max_length, placement: {},
    };
  }

  /** `ids`, `mask`: BigInt64Array of `shape [batch, length]`; gives `{data: Float32Array, shape}`. */
  async forward(ids, mask, shape) {
    const feed = this.feed(ids, mask, shape, shape, 0);
    for (const name of this.past) feed[name] = this.empty(name, shape[0]);
    let found;
    try {
      found = (await this.session.run(feed, [this.output]))[this.output];
    } catch (error) {
      throw refusal(this.ort, this.manifest.entry, error);
    }
    const result = { data: floats(found), shape: [...found.dims] };
    if (this.manifest.task === "feature-extraction" && !this.manifest.pooling_in_graph) {
      return this.pool(result, mask, shape);
    }
    return result;
  }

  /** Greedy decoding: yields `{id, logits}`. What the graph gives as `present` goes in as `past` at the next step; the
   * WebAssembly build has no way to keep it inside, so both copies are part of the time, as in any web app. */
  async *decode(prompt, count) {
    let ids = BigInt64Array.from(prompt, BigInt);
    let used = 0;
    let cache = this.past.map((name) => this.empty(name, 1));
    const names = [this.output, ...this.past.map((name) => name.replace("past_key_values", "present"))];
    for (let step = 0; step < count; step++) {
      const total = used + ids.length;
      const feed = this.feed(ids, new BigInt64Array(total).fill(1n), [1, ids.length], [1, total], used);
      this.past.forEach((name, index) => (feed[name] = cache[index]));
      const found = await this.session.run(feed, names);
      used = total;
      const said = floats(found[this.output]);
      const logits = said.subarray(said.length - this.manifest.vocab_size);
      const id = highest(logits);
      yield { id, logits };
      cache = names.slice(1).map((name) => found[name]);
      ids = BigInt64Array.of(BigInt(id));
    }
  }

  feed(ids, mask, shape, maskShape, used) {
    const [batch, length] = shape;
    const values = {
      input_ids: [ids, shape], attention_mask: [mask, maskShape], token_type_ids: [new BigInt64Array(ids.length), shape],
      position_ids: [BigInt64Array.from({ length: batch * length }, (_, i) => BigInt(used + (i % length))), shape],
    };
    const feed = {};
    for (const [name, [data, dims]] of Object.entries(values)) {
      const item = this.inputs.get(name);
      if (!item) continue;
      const converted = item.type === "int64" ? data : convert(data, item.type);
      feed[name] = new this.ort.Tensor(item.type, converted, dims);
    }
    return feed;
  }

  empty(name, batch) {
    const { type, shape } = this.inputs.get(name);
    return new this.ort.Tensor(type, type === "float16" ? new Uint16Array(0) : new Float32Array(0), [
      batch, shape[1], 0, shape[3],
    ]);
  }

  /** Token states [B, T, D] to embeddings [B, D], for a graph that leaves that to the caller. */
  pool({ data, shape }, mask, [batch, length]) {
    if (shape.length !== 3 || shape[0] !== batch || shape[1] !== length) {
      throw new Refused("BadInput", `${this.output} has shape ${JSON.stringify(shape)}`, "expected [batch, length, width]");
    }
    const width = shape[2];
    const result = new Float32Array(batch * width);
    for (let row = 0; row < batch; row++) {
      let real = 0;
      for (let at = 0; at < length; at++) real += Number(mask[row * length + at]);
      const [first, last] = { cls: [0, 1], last: [real - 1, real] }[this.manifest.pooling] ?? [0, real];
      let squares = 0;
      for (let column = 0; column < width; column++) {
        let sum = 0;
        for (let at = first; at < last; at++) sum += data[(row * length + at) * width + column];
        const value = Math.fround(sum / (last - first));
        result[row * width + column] = value;
        squares += value * value;
      }
      if (this.manifest.normalize) {
        const norm = Math.max(Math.sqrt(squares), 1e-12);
        for (let column = 0; column < width; column++) result[row * width + column] /= norm;
      }
    }
    return { data: result, shape: [batch, width] };
  }

  async close() {
    await this.session.release();
  }
}

/** Session config entries of ONNX Runtime by their names, and `graph_optimization`, as on every other target. */
function chosen(extra) {
  const options = {};
  const entries = {};
  for (const [key, value] of Object.entries(extra)) {
    if (key === "graph_optimization") {
      const levels = { all: "all", extended: "extended", basic: "basic", none: "disabled" };
      if (!Object.hasOwn(levels, value)) {
        throw new Refused("BadInput", `graph_optimization "${value}"`, `known: ${Object.keys(levels).join(", ")}`);
      }
      options.graphOptimizationLevel = levels[value];
    } else {
      entries[key] = String(value);
    }
  }
  // The binding wants {session: {x64quantprecision: "1"}} for "session.x64quantprecision".
  for (const [key, value] of Object.entries(entries)) {
    const parts = key.split(".");
    let place = (options.extra ??= {});
    for (const part of parts.slice(0, -1)) place = place[part] ??= {};
    place[parts.at(-1)] = value;
  }
  return options;
}

function refusal(ort, entry, error) {
  const text = oneLine(error);
  const version = ort.env.versions.web ?? "";
  if (error instanceof RangeError || /out of memory|bad_alloc|allocation failed/i.test(text)) return error;
  const lacks =
    text.match(/(?:find an implementation for|No Op registered for) ([\w.]+)/) ??
    text.match(/(\S+?)(?:\(-?\d+\))? is not a registered function\/op/);
  if (lacks) {
    const name = lacks[1].replace(/\(\d+\)$/, "");
    const hint = "export onnx:fp32-portable (standard operators only), or another quantisation";
    return new Refused("Unsupported", `onnxruntime-web ${version} has no operator ${name}`, hint);
  }
  const hint = "export it again; the artifact's minimum_runtime says what it needs";
  return new Refused("BadInput", `${entry}: onnxruntime-web ${version} can't run it: ${text}`, hint);
}

function convert(data, type) {
  if (type === "float32") return Float32Array.from(data, Number);
  const array = INTEGERS[type];
  if (!array) throw new Refused("Unsupported", `an input of type ${type}`, "token inputs are int64, int32 or float32");
  return array.from(data, Number);
}

/** Values as float32, whatever float type the graph gives. */
function floats(tensor) {
  if (tensor.type === "float32") return tensor.data;
  if (tensor.type === "float64") return Float32Array.from(tensor.data);
  if (tensor.type !== "float16") throw new Refused("Unsupported", `an output of type ${tensor.type}`, "float is expected");
  const raw = tensor.data;
  return raw instanceof Uint16Array ? Float32Array.from(raw, half) : Float32Array.from(raw);
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

/** The lowest index of the highest value; a NaN wins, as in numpy. */
function highest(values) {
  let best = 0;
  for (let index = 0; index < values.length; index++) {
    if (Number.isNaN(values[index])) return index;
    if (values[index] > values[best]) best = index;
  }
  return best;
}
