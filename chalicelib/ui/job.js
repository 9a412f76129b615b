// One job: its pictures, what happened to it, and what can be done to it.

import * as api from "./api.js";
import { ask, button, complain, copy, fill, h, media, safe, say } from "./dom.js";
import { again, usualSeconds } from "./make.js";
import { go } from "./place.js";
import { advice, badge, bar, begun, dead, files, live, reason, stage, when } from "./show.js";
import { bytes, clock, moment, money, span, t, time } from "./words.js";

const content = h("div", { tabindex: -1 });
let box = null; // the dialog around it
let id = null;
let job = null;
let chosen = 0; // of its files
let refusal = ""; // why the job is not to be had
let behind = null; // the view behind it, whose order the arrows go by
let tell = () => {};
let input = null; // what RunPod is given, once it was asked for

export const isOpen = () => Boolean(box?.open);
export const busy = () => !refusal && (!job || live(job) || Boolean(job.deleted_at));

/** Show the job, or nothing. */
export function show(wanted, view, changed) {
  [behind, tell] = [view, changed];
  if (!wanted) return box?.close();
  if (wanted === id && isOpen()) return;
  [id, job, chosen, input, refusal] = [wanted, null, 0, null, ""];
  box ??= build();
  fill(content, head(), h("p", { class: "small" }, t("Loading…")));
  if (!box.open) box.showModal();
  content.focus(); // or the keys would go nowhere
  box.scrollTo(0, 0);
}

function build() {
  const dialog = h("dialog", { id: "job", "aria-labelledby": "job-title", onkeydown: keys, onclick: (event) => event.target === dialog && leave(), onclose: closed }, content);
  document.body.append(dialog);
  return dialog;
}

function closed() {
  if (box.open) return; // it was opened again at once
  behind.focus?.(id); // the last one, not the one that was opened first
  id = job = null;
  leave();
}

const leave = () => go({ job: "" });

function keys(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const meant = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.matches("input, video, audio, pre, .scroll, .zoomed");
  if (step && !meant) turn(step);
}

async function turn(step) {
  const asked = id;
  const next = await behind.beside?.(asked, step);
  if (next && asked === id && isOpen()) go({ job: next }, { replace: true });
}

/** Ask how it stands. */
export async function refresh(signal) {
  const asked = id;
  try {
    const answer = await api.get(`api/jobs/${encodeURIComponent(asked)}`, signal);
    if (asked !== id || (job && answer.same)) return;
    [job, refusal] = [answer.job, ""];
    draw();
  } catch (error) {
    if (![400, 404, 410].includes(error.status)) throw error;
    if (asked === id) refused(`${error}`);
  }
}

/** Told once, or the keyboard would be called back at each look. */
function refused(why) {
  if (why === refusal) return;
  [job, refusal] = [null, why];
  fill(content, head(), h("p", { class: "wrong" }, why));
  content.focus();
}

/** What passes by itself, and what the gallery behind it has learned meanwhile. */
export function tick() {
  renew(content.firstChild, head());
  const place = box.querySelector(".when");
  if (place && job) place.textContent = when(job);
}

function head() {
  const [newer, older] = behind.around?.(id) ?? [false, false];
  const arrow = (sign, step, word, there) => button(sign, () => turn(step), { "aria-label": word, title: word, "aria-disabled": there ? null : "true", "data-keep": sign });
  return h("header", { class: "row" },
    h("h2", { id: "job-title" }, job ? badge(job) : t("Job"), " ", h("small", {}, id.slice(0, 8))),
    arrow("←", -1, t("The newer job"), newer), arrow("→", 1, t("The older job"), older),
    button("✕", leave, { "aria-label": t("Close"), title: t("Close"), "data-keep": "close" }));
}

function draw() {
  const parts = [state(), words(), actions(), facts(), attempts(), timeline(), ...raw()].map((part) => part ?? h("div", { hidden: true }));
  const area = content.querySelector(".stage-area");
  if (!area) return fill(content, head(), h("div", { class: "sides" }, pictureArea(), h("div", { class: "side" }, parts)));
  renew(content.firstChild, head());
  if (area.dataset.shows !== shows()) swap(area, () => area.replaceWith(pictureArea()));
  [...content.querySelector(".side").children].forEach((part, at) => renew(part, parts[at]));
}

/** A part as it is now. One that is the same stays: words may be marked in it, a button be about to be pressed. */
function renew(part, fresh) {
  if (part.open) fresh.open = true;
  if (part.isEqualNode(fresh)) return;
  const scrolled = part.querySelector("pre")?.scrollTop;
  swap(part, () => part.replaceWith(fresh));
  if (scrolled) fresh.querySelector("pre").scrollTop = scrolled;
}

/** Replace what is in the place; what had the focus there, has it again. */
function swap(place, replace) {
  const held = place.contains(document.activeElement) && document.activeElement;
  replace();
  if (held) hold(held.dataset.keep);
}

const hold = (name) => (content.querySelector(`[data-keep="${name}"]`) ?? content).focus();

const shows = () => [chosen, ...files(job).map((file) => file.key)].join();

function pictureArea() {
  const file = files(job)[chosen];
  const area = h("div", { class: "stage-area", "data-shows": shows() });
  if (!file) return area;
  const alt = t("The result: {prompt}", { prompt: job.prompt });
  const [given] = job.pictures;
  const picture = media(file, { alt, controls: true, eager: true, fresh: () => (job && files(job)[chosen]) ?? file });
  const frame = h("div", { class: "large", style: { "--ratio": file.width && file.height ? file.width / file.height : 1 } }, picture);
  const isImage = picture.tagName === "IMG";
  return fill(area, frame,
    h("div", { class: "row" },
      isImage && zoom(frame),
      isImage && given && compare(frame, given),
      button(t("Download"), () => download(files(job)[chosen]), { class: "main" }),
      button(t("Copy link"), () => copy(files(job)[chosen].url))), // as it is by then: a private bucket's link ends
    job.outputs.length > 1 && h("ul", { class: "strip" }, job.outputs.map((other, at) =>
      h("li", {}, h("button", { type: "button", "data-keep": `file${at}`, "aria-pressed": String(at === chosen), "aria-label": t("File {n} of {all}", { n: at + 1, all: job.outputs.length }), onclick: () => { chosen = at; draw(); } }, media(other))))));
}

function zoom(frame) {
  const turn = () => {
    const large = frame.classList.toggle("zoomed");
    toggle.setAttribute("aria-pressed", String(large));
  };
  const toggle = button(t("Full size"), turn, { "aria-pressed": "false" });
  frame.addEventListener("click", (event) => event.target.tagName === "IMG" && turn());
  return toggle;
}

/** The picture before, laid over the one after as far as the slider says. */
function compare(frame, given) {
  const before = media({ url: given.url }, { alt: t("The picture before") });
  const layer = h("div", { class: "before" }, before);
  const slider = h("input", { type: "range", min: 0, max: 100, value: 50, class: "slider", "aria-label": t("How much of the picture before is shown"), oninput: () => frame.style.setProperty("--cut", `${slider.value}%`) });
  const toggle = button(t("Before and after"), () => {
    const on = frame.classList.toggle("comparing");
    toggle.setAttribute("aria-pressed", String(on));
    if (on) frame.append(layer, slider);
    else [layer, slider].forEach((part) => part.remove());
  }, { "aria-pressed": "false" });
  return toggle;
}

async function download(file) {
  const [kind = ""] = /\.\w{2,5}$/.exec(file.key) ?? [];
  const words = job.prompt.normalize().replace(/[^\p{L}\p{M}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  const number = job.outputs.length > 1 ? `-${chosen + 1}` : "";
  try {
    // A link to another host is not downloaded under a name; what the browser kept of the picture may not be read.
    const response = await fetch(file.url, { credentials: "omit", cache: "no-store" });
    if (!response.ok) throw new Error(String(response.status));
    const url = URL.createObjectURL(await response.blob());
    h("a", { href: url, download: `${[...words].slice(0, 60).join("") || "picture"}-${job.id.slice(0, 8)}${number}${kind}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch {
    window.open(safe(file.url), "_blank", "noopener,noreferrer");
  }
}

function state() {
  if (live(job)) {
    const usual = usualSeconds(job.model);
    return h("div", { class: "state" }, h("p", {}, h("strong", {}, stage(job)), " · ", h("span", { class: "when" }, when(job)), usual && ` · ${t("usually {span}", { span: span(usual * 1000) })}`), bar(job), h("p", {}, reason(job)));
  }
  if (!job.error) return null;
  return h("div", { class: "state bad" },
    h("p", { dir: "auto" }, job.error), job.error_code && h("p", { class: "small" }, h("code", {}, job.error_code)),
    h("p", {}, h("strong", {}, t("What to do:")), " ", advice(job)));
}

function words() {
  return h("section", {},
    h("h3", {}, t("Prompt")), h("p", { class: "words", dir: "auto" }, job.prompt || "–"),
    h("div", { class: "row" },
      button(t("Copy prompt"), () => copy(job.prompt), { "data-keep": "copy" }),
      button(t("Use it again"), () => { const was = job; go({ view: "", job: "" }); setTimeout(() => again(was)); }, { "data-keep": "again" })));
}

function actions() {
  const verb = (word, options) => button(word, () => act(options), { class: options.look, "data-keep": options.name });
  const ended = !live(job);
  return h("div", { class: "row actions" },
    !ended && job.step !== "store" && !job.cancel_at && verb(t("Cancel"), { name: "cancel", question: t("Cancel this job? What a worker has done so far is paid all the same."), word: t("Cancel the job"), done: t("It is cancelled, or will be in a moment.") }),
    dead(job) && verb(t("Redrive"), { name: "redrive", look: "main", question: t("Store the result again? That costs no new run."), word: t("Redrive"), done: t("It is being stored.") }),
    ["error", "cancelled"].includes(job.status) && !job.deleted_at && verb(t("Retry"), { name: "retry", question: dead(job) ? t("Draw it again? That is a new paid run, and this picture is paid for: redrive it first.") : t("Draw it again? That is a new paid run."), word: t("Retry"), done: t("It is queued.") }),
    ended && verb(t("Delete"), { name: "delete", look: "bad", question: t("Delete this job and its pictures for good?"), word: t("Delete for good"), done: t("It is deleted.") }));
}

async function act({ name, question, word, done, look }) {
  const target = id;
  const wanted = await ask(question, word, look);
  if (isOpen()) hold(name); // it may have been drawn anew meanwhile
  if (!wanted) return;
  try {
    const answer = name === "delete" ? await api.act("DELETE", `api/jobs/${target}`) : await api.act("POST", `api/jobs/${target}/${name}`, {});
    say(done);
    if (name === "delete" && target === id) leave();
    tell(target, answer.job ?? null);
  } catch (error) {
    complain(error);
    tell(target);
  }
}

const row = (name, ...value) => value.some((part) => part != null && part !== "") && [h("dt", {}, name), h("dd", { dir: "auto" }, value)];

function facts() {
  const file = files(job)[chosen];
  const wasted = job.cost.wasted_usd ? t(", of it {usd} for nothing", { usd: money(job.cost.wasted_usd) }) : "";
  return h("section", {}, h("h3", {}, t("Facts")), h("dl", {},
    row(t("Made"), moment(job.created_at)),
    job.finished_at && row(t("Took"), span(time(job.finished_at) - time(begun(job)))),
    row(t("Model"), job.model),
    job.urls_expire_at && row(t("Links"), t("They hold until {time}.", { time: clock(job.urls_expire_at) })),
    file && row(t("File"), [file.content_type, file.width && `${file.width} × ${file.height}`, file.bytes && bytes(file.bytes)].filter(Boolean).join(", ")),
    row(t("Cost"), money(job.cost.usd) + wasted),
    job.result_until && dead(job) && row(t("Kept at RunPod until"), moment(job.result_until)),
    Object.entries(job.metadata).map(([name, value]) => row(name, value)),
    row("ID", h("code", {}, job.id))));
}

function attempts() {
  if (!job.attempts.length) return null;
  const cell = (value) => h("td", {}, value ?? "–");
  const time = (milliseconds) => (milliseconds == null ? null : span(milliseconds));
  return h("section", {}, h("h3", { id: "runs" }, t("GPU runs")), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "runs", "data-keep": "runs" }, h("table", {},
    h("thead", {}, h("tr", {}, ["#", t("Outcome"), t("Sent"), t("Waited"), t("Ran"), t("Cost")].map((word) => h("th", {}, word)))),
    h("tbody", {}, job.attempts.map((run) => h("tr", {},
      cell(run.attempt), cell(t(run.outcome)), cell(run.submitted_at && clock(run.submitted_at)), cell(time(run.queue_ms)), cell(time(run.execution_ms)), cell(run.cost == null ? null : money(run.cost))))))));
}

function timeline() {
  const line = ({ at, event, attempt, ...rest }) => {
    const detail = Object.entries(rest).filter(([, value]) => value != null && value !== "").map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`);
    return h("li", {}, h("time", { datetime: at }, clock(at)), " ", h("strong", {}, event.replaceAll("_", " ")), detail.length > 0 && h("span", { class: "small", dir: "auto" }, ` ${detail.join(" · ")}`));
  };
  return h("details", {}, h("summary", { "data-keep": "timeline" }, t("Timeline")), h("ol", { class: "timeline" }, job.timeline.map(line)));
}

function raw() {
  const json = (name, value) => h("pre", { tabindex: 0, "data-keep": `${name} text` }, JSON.stringify(value, null, 2));
  const place = h("div", {}, input && json("input", input));
  return [
    h("details", { ontoggle: (event) => event.target.open && !input && loadInput(place, json) }, h("summary", { "data-keep": "input" }, t("Raw input")), place),
    h("details", {}, h("summary", { "data-keep": "output" }, t("Raw output")), json("output", job)),
  ];
}

async function loadInput(place, json) {
  try {
    const answer = await api.get(`api/jobs/${id}?include=input`);
    if (answer.job.id === id) fill(place, json("input", (input = answer.job.input)));
  } catch (error) {
    fill(place, h("p", { class: "wrong" }, error.message));
  }
}
