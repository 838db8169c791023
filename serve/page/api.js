// Requests to the endpoint that served this page. Their URLs are relative, so it may lie behind any prefix.

/** A request without a good answer: a sentence for people, and the id under which the server's log has it. */
export class Failure extends Error {
  constructor(text, status = 0, requestId = "") {
    super(text);
    this.status = status; // 0: there was no answer at all
    this.requestId = requestId;
  }

  /** Whether the same request may succeed a moment later. */
  get passes() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

/** What the served model is: {name, version, digest, classes: [{id, name, color: [r, g, b]}], ...}. */
export async function askModel(key, signal) {
  const answer = await ask("v1/model", { signal }, key);
  return answer.json();
}

/** The mask of `photo` (a Blob) as a PNG file, with what the answer's headers tell. */
export async function askMask(photo, key, signal) {
  const startedAt = performance.now();
  // No type is claimed: the server looks at the bytes, and says better than a browser's guess what is wrong with them.
  const headers = { Accept: "image/png", "Content-Type": "application/octet-stream" };
  const answer = await ask("v1/segment", { method: "POST", body: photo, headers, signal }, key);
  const png = new Uint8Array(await answer.arrayBuffer());
  return {
    png,
    digest: answer.headers.get("x-model-digest"),
    requestId: answer.headers.get("x-request-id"),
    stages: serverTiming(answer.headers.get("server-timing") ?? ""),
    roundTrip: performance.now() - startedAt,
  };
}

/** The picture for those who have none at hand. */
export async function askSample(signal) {
  const answer = await ask("page/sample.jpg", { signal }, "");
  return new File([await answer.blob()], "sample.jpg", { type: "image/jpeg" });
}

/** Milliseconds by stage, in the header's order, from Server-Timing. */
export function serverTiming(header) {
  return new Map([...header.matchAll(/([\w-]+)[^,]*?;\s*dur=([\d.]+)/g)].map(([, stage, ms]) => [stage, Number(ms)]));
}

async function ask(url, options, key) {
  const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
  let answer;
  try {
    answer = await fetch(url, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  throw await failureOf(answer);
}

async function failureOf(answer) {
  const body = await answer.json().catch(() => null);
  const requestId = body?.request_id ?? answer.headers.get("x-request-id") ?? "";
  // Without the endpoint's own words, something between it and this page has answered.
  const text = body?.error ? sentence(body.error) : `The server answered with status ${answer.status}.`;
  return new Failure(text, answer.status, requestId);
}

function sentence(text) {
  const ended = /[.!?]$/.test(text) ? text : `${text}.`;
  return ended[0].toUpperCase() + ended.slice(1);
}
