// Bytes to and from the other side: tensors by name, payload files of the artifact by number, all with their sha256.

import { Refused } from "./refused.mjs";
import { sha256 } from "./sha256.mjs";

// Name on the wire -> array type. Bytes are little-endian, as in every browser.
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int32: Int32Array, int64: BigInt64Array, uint8: Uint8Array,
  bool: Uint8Array,
};

export class Exchange {
  constructor(base) {
    this.base = base;
    this.count = 0;
  }

  /** Send a typed array and return its reference for a message. */
  async put(values, dtype, shape) {
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    this.count += 1;
    const file = `w${this.count}.bin`;
    const reply = await fetch(`${this.base}/tensor/${file}`, { method: "PUT", body: bytes });
    if (!reply.ok) throw await reported(reply, `tensor ${file}`);
    return { file, dtype, shape, sha256: await sha256(bytes) };
  }

  /** The tensor that a reference names, as `{data, dtype, shape}`. */
  async take(reference) {
    const { file, dtype, shape, sha256: wanted } = reference ?? {};
    if (typeof file !== "string" || typeof wanted !== "string" || !Array.isArray(shape) || !shape.every(isSize)) {
      const text = JSON.stringify(reference ?? null).slice(0, 80);
      throw new Refused("WorkerError", `not a tensor reference: ${text}`, "file, dtype, shape, sha256");
    }
    if (!Object.hasOwn(ARRAYS, dtype)) {
      throw new Refused("WorkerError", `tensor ${file}: unknown dtype ${dtype}`, `known: ${Object.keys(ARRAYS).join(", ")}`);
    }
    if (!/^c\d+\.bin$/.test(file)) {
      throw new Refused("WorkerError", `tensor file ${file} is missing`, "write the file before the message that names it");
    }
    const reply = await fetch(`${this.base}/tensor/${file}`);
    if (!reply.ok) throw await reported(reply, `tensor ${file}`);
    const bytes = new Uint8Array(await reply.arrayBuffer());
    const type = ARRAYS[dtype];
    const count = shape.reduce((product, size) => product * size, 1);
    if (bytes.length !== count * type.BYTES_PER_ELEMENT) {
      const text = `tensor ${file}: ${bytes.length} bytes do not fit ${dtype} ${JSON.stringify(shape)}`;
      throw new Refused("WorkerError", text, "raw row-major values, nothing else");
    }
    if ((await sha256(bytes)) !== wanted) {
      throw new Refused("WorkerError", `tensor ${file} does not match its sha256`, "it was damaged on the way");
    }
    return { data: new type(bytes.buffer), dtype, shape };
  }

  /** `artifact.json` of the folder that is served. */
  async manifest() {
    const reply = await fetch(`${this.base}/artifact/manifest`);
    if (!reply.ok) throw await reported(reply, "artifact.json");
    return reply.json();
  }

  /** A payload file by its place in `artifact.json`, compared with the hash that stands there. */
  async payload(index, file) {
    const reply = await fetch(`${this.base}/artifact/${index}`);
    if (!reply.ok) throw await reported(reply, `payload file ${file.path}`);
    const bytes = new Uint8Array(await reply.arrayBuffer());
    if (bytes.length !== file.size_bytes || (await sha256(bytes)) !== file.sha256) {
      const hint = "export it again; an artifact is never edited in place";
      throw new Refused("BadInput", `payload file ${file.path} does not match its sha256`, hint);
    }
    return bytes;
  }
}

function isSize(value) {
  return Number.isInteger(value) && value >= 0;
}

/** What the other side says about a transfer that it refused: JSON with kind, message and hint, or just a status. */
async function reported(reply, what) {
  const told = await reply.json().catch(() => null);
  if (told?.message) return new Refused(told.kind ?? "WorkerError", told.message, told.hint ?? "");
  return new Refused("WorkerError", `${what}: refused with status ${reply.status}`, "start the command again");
}
