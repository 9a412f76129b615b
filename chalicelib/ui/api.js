// The public API, and nothing else: the key, requests, and what is wrong in a sentence.

import { setClock, store, t, told } from "./words.js";

const KEY = "ob.key";
const ADDRESS = "ob.api";
const MOST_SECONDS = 35;
const NO_ANSWER = "no_answer";
const kept = new Map(); // path → the last answer with its ETag

const asFolder = (url) => url.replace(/\/*$/, "/");
// The service's own word, or that of whoever put the page elsewhere.
export const fixed = document.body.dataset.api && asFolder(document.body.dataset.api);
export const address = () => fixed || store.getItem(ADDRESS) || "";
export const key = () => store.getItem(KEY);

export function remember(newKey, newAddress) {
  kept.clear();
  if (newAddress) store.setItem(ADDRESS, asFolder(newAddress));
  store.setItem(KEY, newKey.trim());
}

export function forget() {
  kept.clear();
  store.removeItem(KEY);
}

/** `code`, `message`, `status` (0: no answer), and `after` seconds where the service says when to try again. */
export class ApiError extends Error {
  constructor(status, code, sentence, after) {
    super(told("error", code, sentence));
    Object.assign(this, { status, code, after });
  }
  toString() {
    return `${this.message} (${this.code})`;
  }
  /** Whether it may help to send the same again: nothing, or not the service itself, has answered, or it cannot just now. */
  get passing() {
    return this.status === 0 || this.code === NO_ANSWER || this.status === 429 || this.status >= 500;
  }
}

/** The answer; with `same` where it is the one that this path gave before. The signal ends the wait for it. */
export async function get(path, signal) {
  const before = kept.get(path);
  const response = await send("GET", path, { headers: before ? { "If-None-Match": before.etag } : {}, signal });
  if (response.status === 304) return { ...before.answer, same: true };
  const answer = await read(response);
  const etag = response.headers.get("ETag");
  if (kept.size > 50) kept.clear();
  if (etag) kept.set(path, { etag, answer });
  return answer;
}

/** The answer to a request that changes something; `replayed` where that was done before, under the same Idempotency-Key. */
export async function act(method, path, body, headers = {}) {
  const content = body === undefined ? {} : { body: JSON.stringify(body) };
  const response = await send(method, path, { headers: { "Content-Type": "application/json", ...headers }, ...content });
  return { ...(await read(response)), replayed: response.headers.has("Idempotent-Replayed") };
}

async function send(method, path, options) {
  const headers = { Authorization: `Bearer ${key() ?? ""}`, ...options.headers };
  try {
    const signal = AbortSignal.any([AbortSignal.timeout(MOST_SECONDS * 1000), ...(options.signal ? [options.signal] : [])]);
    const url = new URL(path, new URL(address(), location.href));
    const response = await fetch(url, { ...options, method, headers, signal, cache: "no-store", credentials: "omit" });
    setClock(response.headers.get("Date"));
    return response;
  } catch {
    throw new ApiError(0, "unreachable", t("The service does not answer."));
  }
}

async function read(response) {
  const answer = await response.json().catch(() => null);
  if (response.ok && answer?.ok) return answer;
  const after = Number(response.headers.get("Retry-After")) || undefined;
  throw new ApiError(
    response.status, answer?.code ?? NO_ANSWER,
    answer?.error ?? t("What answered there is not the service (HTTP {status}).", { status: response.status }), after);
}

/** Put a picture where the service says; `progress` is told fractions. Its key. */
export async function upload(file, progress) {
  const place = await act("POST", "api/uploads", { content_type: file.type, bytes: file.size });
  await new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how far an upload is
    const fail = () => reject(new ApiError(request.status, "upload_failed", t("The picture could not be uploaded.")));
    request.open(place.method, place.url);
    for (const [name, value] of Object.entries(place.headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => progress(event.loaded / event.total);
    request.onload = () => (request.status < 300 ? resolve() : fail());
    request.onerror = request.ontimeout = fail;
    request.timeout = 300_000;
    request.send(file);
  });
  return place.key;
}
