// Timings as docs/worker-protocol.md has them: a warm-up until steady, then raw seconds. No statistics.

import { Refused } from "./refused.mjs";

const WINDOW = 5; // warm-up calls that must agree
const SPREAD = 0.1; // (max - min) / median of that window
const EXTRA = 5; // at most so many times the warm-up asked for, plus a window

/** `call()` gives a sample, `seconds(sample)` its duration. */
export async function time(call, seconds, { repeats, warmup, max_seconds: most }) {
  if (repeats < 1 || warmup < 0 || !(most > 0)) {
    const text = `can't time ${repeats} repeats, ${warmup} warm-up calls in ${most} s`;
    throw new Refused("BadInput", text, "repeats >= 1");
  }
  const before = [];
  let spent = 0;
  let stable = warmup === 0;
  while (!stable && spent < most && before.length < warmup * EXTRA + WINDOW) {
    before.push(seconds(await call()));
    spent += before.at(-1);
    stable = before.length >= Math.max(warmup, WINDOW) && steady(before.slice(-WINDOW));
  }
  const samples = [];
  spent = 0;
  while (samples.length < repeats && (!samples.length || spent < most)) {
    samples.push(await call());
    spent += seconds(samples.at(-1));
  }
  return { samples, warmup: before, stable };
}

function steady(window) {
  const sorted = [...window].sort((a, b) => a - b);
  return sorted.at(-1) - sorted[0] <= SPREAD * sorted[Math.floor(sorted.length / 2)];
}
