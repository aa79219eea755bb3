// The server: JSON there and back, and answers as they come. Every failure is a ServerError that says what it is.

import { settings } from "./settings.js";

export class ServerError extends Error {
  /** status: that of HTTP; 0 where no server answered, -1 where an answer broke off. */
  constructor(message, status = 0, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** Why the same request may be answered later: "gone", "busy", "loading", "empty" or "draining"; null: it will not be. */
  get passing() {
    if (this.status !== 503) return { 0: "gone", 429: "busy" }[this.status] ?? null;
    return this.message.startsWith("Loading model") ? "loading" : this.message.startsWith("no model") ? "empty" : "draining";
  }
}

async function open(path, body, signal) {
  const headers = { ...(body && { "content-type": "application/json" }) };
  const key = (path.startsWith("v1/internal/") && settings.adminKey) || settings.apiKey;
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(error.message);
  }
  if (response.ok) return response;
  const text = await response.text();
  let told = {};
  try {
    told = JSON.parse(text).error ?? {};
  } catch {
    told = { message: text.slice(0, 200) };
  }
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  throw new ServerError(told.message || `HTTP ${response.status}`, response.status, { code: told.code, retryAfter });
}

export const getJSON = async (path, signal) => (await open(path, null, signal)).json();
export const postJSON = async (path, body, signal) => (await open(path, body, signal)).json();
export const getText = async (path, signal) => (await open(path, null, signal)).text();

/** The data of each server-sent event of a response, as text. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // of what is read no more, nobody is told
  }
}

/** The chunks of a streamed answer. Raises ServerError where it fails, also in its midst. */
export async function* stream(path, body, signal) {
  const response = await open(path, { ...body, stream: true }, signal);
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, -1, { code: chunk.error.code });
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError(error.message, -1);
  }
  throw new ServerError("the connection was closed", -1);
}

export function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

/** As `stream`, but asks again for as long as the server cannot take the request; `onwait` hears why. */
export async function* patientStream(path, body, signal, onwait) {
  for (let pause = 1; ; pause = Math.min(pause * 1.5, 10)) {
    try {
      yield* stream(path, body, signal);
      return;
    } catch (error) {
      if (!(error instanceof ServerError) || !error.passing) throw error;
      onwait(error);
      await wait(error.retryAfter ?? pause, signal);
    }
  }
}
