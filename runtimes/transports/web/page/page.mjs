// The page itself: asks what to start, starts a worker for each launch, ends it, tells when the page is closed.
//
// Each launch is a Web Worker of its own: its WebAssembly memory starts empty. The open long poll is also how the other
// side sees that the page is alive.

const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const workers = new Map();
const RETRY_MS = 500;
const GIVE_UP_MS = 15000;

function say(text) {
  document.getElementById("state").textContent = text;
}

function note(text) {
  const item = document.createElement("li");
  item.textContent = text;
  document.getElementById("log").append(item);
}

function start(launch) {
  const worker = new Worker(`worker.mjs?launch=${launch}`, { type: "module" });
  workers.set(launch, worker);
  // What the worker itself could not report: it did not load, or it was ended by the browser.
  worker.onerror = (event) => {
    const text = event.message || "the worker script did not start";
    note(`launch ${launch}: ${text}`);
    fetch(`w/${launch}/failed`, { method: "POST", body: JSON.stringify({ message: text }) });
  };
  note(`launch ${launch}`);
}

function end(launch) {
  workers.get(launch)?.terminate();
  workers.delete(launch);
}

function about() {
  return JSON.stringify({
    page: id,
    agent: navigator.userAgent,
    platform: navigator.userAgentData?.platform ?? navigator.platform,
    cores: navigator.hardwareConcurrency ?? null,
    memory_gib: navigator.deviceMemory ?? null,
    isolated: self.crossOriginIsolated,
    secure: self.isSecureContext,
  });
}

async function follow() {
  let lastHeard = performance.now();
  for (;;) {
    let reply;
    try {
      reply = await fetch("next", { method: "POST", body: about() });
    } catch {
      if (performance.now() - lastHeard > GIVE_UP_MS) return "the other side is gone";
      say("the connection is interrupted");
      await new Promise((resume) => setTimeout(resume, RETRY_MS));
      continue;
    }
    lastHeard = performance.now();
    if (reply.status === 409) return "another page uses this address already";
    if (!reply.ok) return `refused (${reply.status})`;
    const told = await reply.json();
    if (told.end !== undefined) end(told.end);
    if (told.start !== undefined) start(told.start);
    if (told.stop) return "done";
    say(workers.size ? "measuring" : "connected, waiting for work");
  }
}

addEventListener("pagehide", () => navigator.sendBeacon("bye", id));
navigator.wakeLock?.request("screen").catch(() => {}); // only where the browser lets a page ask for it
const why = await follow();
for (const launch of [...workers.keys()]) end(launch);
say(`${why}; this page can be closed`);
window.close(); // works where a program opened the page; then its browser ends with it
