// How a job looks in words and shapes: its status, what it is at, why it waits, what to do about its error.

import { h } from "./dom.js";
import { ago, now, span, t, time, told } from "./words.js";

export const STATUSES = { queued: "Queued", running: "Running", done: "Done", error: "Failed", cancelled: "Cancelled" };
const SHAPES = { queued: "○", running: "◐", done: "✓", error: "✕", cancelled: "⊘", dead: "▲" };
const STAGES = { submit: "waits to be sent", submitting: "is being sent", poll: "is being drawn", store: "is being stored" };

export const live = (job) => job.status in STATUSES && !["done", "error", "cancelled"].includes(job.status);
export const dead = (job) => Boolean(job.dead_at) && job.status === "error";

export function badge(job) {
  const kind = dead(job) ? "dead" : job.status;
  const word = dead(job) ? "Dead letter" : (STATUSES[job.status] ?? job.status);
  return h("span", { class: `badge ${kind}` }, h("span", { class: "shape", "aria-hidden": "true" }, SHAPES[kind] ?? "?"), t(word));
}

/** What it is at just now, in two or three words. */
export function stage(job) {
  if (job.deleted_at) return t("is being deleted");
  if (job.cancel_at) return t("is being cancelled");
  if (job.step === "poll" && job.waiting) return t("waits for a GPU");
  return t(STAGES[job.step] ?? "");
}

/** Why it waits; where nothing is known of that, nothing. */
export function reason(job) {
  const { code, sentence, place, until } = job.waiting ?? {};
  if (!code) return job.progress?.text ?? "";
  const left = time(until) - now();
  const again = left > 0 ? ` ${t("Again in {span}.", { span: span(left) })}` : "";
  return told("waiting", code, sentence, { place: place ?? "–" }) + again;
}

/** A bar: as far as the worker says, or else only that something goes on. */
export function bar(job) {
  const fraction = job.progress?.fraction;
  return h("progress", { max: 1, value: fraction ?? null, "aria-label": t("Progress") });
}

/** Since when it is wanted: since the last retry, as far as that is known; a list does not tell of it. */
export const begun = (job) => job.timeline?.findLast(({ event }) => event === "retried")?.at ?? job.created_at;

/** How long it has taken so far, or after the first run the present one; or how long ago it was made. */
export function when(job) {
  const since = (job.attempt > 1 && job.submitted_at) || begun(job);
  return live(job) ? span(Math.floor((now() - time(since)) / 1000) * 1000) : ago(job.created_at);
}

/** What came of it; a job of the earlier version has an address, and nothing else is known of its picture. */
export function files(job) {
  if (job.outputs.length || !job.result_url) return job.outputs;
  return [{ key: job.result_r2_key ?? job.result_url, url: job.result_url }];
}

/** What its picture is in width by height: known once it is there, square until then. A far longer one has bars beside it. */
export function ratio(job) {
  const { width, height } = job.outputs[0] ?? {};
  return width && height ? Math.min(3, Math.max(0.5, width / height)) : 1;
}

// What to do, by the beginning of the error's code; the first that fits.
const ADVICE = [
  ["result_lost", "Nothing is left of the picture. Retry draws it again: a new paid run."],
  ["dead", "The picture is paid for. Redrive stores it once its cause is mended: no new run."],
  ["worker_failed", "The same input mostly fails again, and costs again. Change the prompt or its values, and make it anew; the worker's log says more."],
  ["runpod_refused", "Change the input, and make it anew."],
  ["runpod_timed_out", "Retry. If that happens often, look at the endpoint's workers at RunPod."],
  ["runpod_lost", "Retry. If that happens often, look at the endpoint's workers at RunPod."],
  ["cancelled_outside", "Somebody cancelled it at RunPod. Retry draws it again."],
  ["start_deadline", "No GPU was free in time. Retry later, or give the endpoint more workers or other GPUs."],
  ["run_deadline", "It took too long. Ask for less, a smaller picture or fewer steps, or allow more time."],
  ["total_deadline", "Retry, with more time if need be; the timeline says what it waited for."],
  ["submit_unknown", "It may have been drawn several times without our hearing of it. Look at RunPod before you retry."],
  ["no_output", "The worker ended without a file. Look at its workflow: the timeline has what it returned."],
  ["base64_invalid", "The worker returned what is no picture. Look at its workflow: the timeline has what it returned."],
  ["unknown_type", "The worker returned what is no picture. Look at its workflow: the timeline has what it returned."],
  ["local_path", "The worker returned a path on its own disk. Give it a bucket, or have it return the file."],
  ["link_", "The worker's link cannot be used. Have it return the file, or a public link that lasts."],
  ["redirect_", "The worker's link cannot be used. Have it return the file, or a public link that lasts."],
  ["result_", "The worker's file cannot be taken as it is. The timeline says why."],
  ["unsavable", "Look at the timeline and the service's log, then retry."],
];

export function advice(job) {
  const code = job.error_code ?? "";
  const kind = dead(job) && code !== "result_lost" ? "dead" : code;
  const [, text] = ADVICE.find(([begin]) => kind.startsWith(begin)) ?? [null, "Look at the timeline, then retry."];
  return t(text);
}
