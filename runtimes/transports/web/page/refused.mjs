// Errors of the protocol: `kind` is a class of edgestill.errors, `message` and `hint` are one line each.

export class Refused extends Error {
  constructor(kind, message, hint) {
    super(message);
    this.kind = kind;
    this.hint = hint;
  }
}

// The words in which browsers and the WebAssembly runtime say that memory ran out.
const MEMORY = /out of memory|bad_alloc|allocation failed|memory access out of bounds|could not allocate|Array buffer/i;

/** The `error` object of a reply for anything that was thrown. */
export function describe(error) {
  const trace = String(error?.stack ?? error);
  if (error instanceof Refused) return { kind: error.kind, message: error.message, hint: error.hint, trace };
  const text = oneLine(error);
  if (error instanceof RangeError || MEMORY.test(text)) {
    const message = `the browser ran out of memory: ${text}`;
    return { kind: "ResourceExhausted", message, hint: "use a smaller batch, length or model", trace };
  }
  return { kind: "WorkerError", message: text, hint: "run again with --debug for the trace", trace };
}

/** The first line of what was thrown. ONNX Runtime's WebAssembly also throws bare numbers (C++ exceptions). */
export function oneLine(error) {
  const text = error?.message ?? (typeof error === "number" ? `C++ exception ${error}` : String(error));
  return text.trim().split("\n")[0].slice(0, 500);
}
