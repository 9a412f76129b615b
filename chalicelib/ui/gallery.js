// The gallery: one list request at a time keeps every card in view true.

import * as api from "./api.js";
import { byId, fill, h, media, say } from "./dom.js";
import { address, FILTERS, go, here, link, stays } from "./place.js";
import { badge, bar, files, live, ratio, reason, stage, STATUSES, when } from "./show.js";
import { number, t, time } from "./words.js";

const PAGE = 48; // jobs
const MOST = 100; // that one request may ask for
const FRESH = 5000; // ms for which a job that was just made here stays though the list does not have it yet
const SEARCHED = 5000; // jobs in which the API looks for a text

let cards = []; // { job, element, fresh, listed }, newest first
let cursor = null; // of the next page; all that is newer is here
let watched = new Set(); // the jobs that the last look told of
let counts = null;
let limit = 0; // of the counts
let begun = false;
let loading = false;
let turn = 0; // counts the lists that were begun; an answer to an earlier one is too late

export const hasBegun = () => begun;
export const busy = () => cards.some(({ job, fresh }) => live(job) && (watched.has(job.id) || fresh > performance.now()));
export const failures = () => counts?.error;

const placeOf = (id) => cards.findIndex((card) => card.job.id === id);

/** Whether there is a newer job than this one, and an older one. */
export function around(id) {
  const at = placeOf(id);
  return at < 0 ? [false, false] : [at > 0, at + 1 < cards.length || Boolean(cursor)];
}

/** The id of the job that is one newer (-1) or older (1), which may have to be asked for first. */
export async function beside(id, step) {
  if (placeOf(id) + step === cards.length) await showOlder(true);
  return around(id)[step < 0 ? 0 : 1] ? cards[placeOf(id) + step]?.job.id : null;
}

/** Let the keyboard go on from this job, or from the top where it is not here. */
export function focus(id) {
  const card = cards[placeOf(id)]?.element;
  if (card?.isConnected) card.firstChild.focus();
  else if (document.activeElement === document.body) byId("main").focus();
}

export function draw(place) {
  const tab = (status, word) => h("a", { "data-status": status, onclick: (event) => stays(event) && go({ status }) }, t(word), h("span", { class: "count" }));
  fill(place,
    h("h1", { class: "hidden" }, t("Gallery")),
    h("nav", { id: "tabs", "aria-label": t("Status") }, tab("", "All"), Object.entries(STATUSES).map(([status, word]) => tab(status, word))),
    h("form", { id: "filter", role: "search", onsubmit: (event) => event.preventDefault() },
      h("input", { id: "q", type: "search", maxlength: 200, placeholder: t("Find in prompts and errors"), "aria-label": t("Find in prompts and errors"), oninput: search }),
      h("select", { id: "model-filter", "aria-label": t("Model"), onchange: (event) => go({ model: event.target.value }) })),
    h("ul", { id: "cards", "aria-label": t("Jobs") }),
    h("div", { id: "end" }, h("button", { id: "more", type: "button", onclick: () => showOlder(true), hidden: true }, t("Show older ones"))));
  nearEnd.disconnect();
  reset();
}

/** Begin anew with the filter that the address has. */
export function reset() {
  [cards, cursor, counts, begun, loading, turn] = [[], null, null, false, false, turn + 1];
  const list = fill(byId("cards"), Array.from({ length: 6 }, () => h("li", { class: "card ghost" }, h("div", { class: "frame" }))));
  list.setAttribute("aria-busy", "true");
  byId("more").hidden = true;
  byId("empty")?.remove();
  if (byId("q").value.trim() !== (here().q ?? "")) byId("q").value = here().q ?? "";
  drawTabs();
}

const nearEnd = new IntersectionObserver(([entry]) => entry.isIntersecting && showOlder(), { rootMargin: "800px" });

let typing;
function search(event) {
  clearTimeout(typing);
  const q = event.target.value.trim();
  typing = setTimeout(() => go({ q }, { replace: true }), 350);
}

/** The models to choose from; one that the address names is there though nothing else is known of it. */
export function offerModels(names) {
  const chosen = here().model ?? "";
  const all = ["", ...new Set([...names, chosen].filter(Boolean))];
  const select = byId("model-filter");
  const offered = [...select.options].map((option) => option.value);
  if (all.join() !== offered.join()) fill(select, all.map((name) => h("option", { value: name }, name || t("All models"))));
  select.value = chosen;
}

function drawTabs() {
  const all = counts && Object.values(counts).reduce((sum, count) => sum + count, 0);
  for (const tab of byId("tabs").children) {
    const { status } = tab.dataset;
    const count = status ? counts?.[status] : all;
    tab.href = address({ status });
    tab.lastChild.textContent = counts ? number(Math.min(count, limit)) + (count >= limit ? "+" : "") : "";
    if (status === (here().status ?? "")) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

function path(extra) {
  const wanted = FILTERS.map((name) => [name, here()[name]]).filter(([, value]) => value);
  return `api/jobs?${new URLSearchParams([...wanted, ...Object.entries(extra)])}`;
}

/** Ask once for what is in view, and show what has changed. */
export async function refresh(signal) {
  const mine = turn;
  const from = anchor();
  const answer = await api.get(path(from
    ? { created_before: justAfter(from), limit: MOST }
    : { include: "counts", limit: cards.length > PAGE ? MOST : PAGE }), signal);
  if (!current(mine)) return;
  watched = new Set(answer.jobs.map((job) => job.id));
  if (!begun || !answer.same || cards.some((card) => !card.listed)) take(answer, from);
  tick();
}

const current = (mine) => mine === turn && byId("cards");

/** Since when the jobs in view were made, where they are not among the newest; in steps, so that the question stays the same. */
function anchor() {
  const first = Math.max(0, cards.findIndex(({ element }) => element.getBoundingClientRect().bottom > 0));
  const from = first < PAGE ? null : cards[first - (first % PAGE)].job.created_at;
  return time(from) ? from : null;
}

// The parameter leaves out its own instant.
const justAfter = (iso) => new Date(time(iso) + 1).toISOString();

/**
 * What the answer spans is as it says: what it does not have of that is gone. Where the newest jobs have none in common
 * with those that are here, more came meanwhile than one answer has: the list begins anew, or a part would be missing.
 */
function take(answer, from) {
  const joined = from || cards.some((card) => card.listed && watched.has(card.job.id));
  const last = answer.next_cursor && answer.jobs.at(-1);
  const spanned = ({ job }) => !joined || ((!from || job.created_at <= from) && (!last || isNewer(job, last)));
  const gone = cards.filter((card) => spanned(card) && !watched.has(card.job.id) && !(card.fresh > performance.now()));
  gone.forEach(({ element }) => element.remove());
  cards = cards.filter((card) => !gone.includes(card));
  if (!begun) fill(byId("cards"));
  begun = true;
  if (!joined) [cursor, loading, turn] = [answer.next_cursor, false, turn + 1];
  answer.jobs.forEach((job) => put(job));
  if (answer.counts) {
    [counts, limit] = [answer.counts, answer.counts_limit];
    drawTabs();
  }
  finish();
}

/** The next page; by itself when the end comes near, unless that has failed. */
async function showOlder(wanted = false) {
  if (!cursor || loading === true || (loading === "failed" && !wanted)) return;
  loading = true;
  const mine = turn;
  try {
    const answer = await api.get(path({ limit: PAGE, cursor }));
    if (!current(mine)) return;
    answer.jobs.forEach((job) => put(job));
    cursor = answer.next_cursor;
    loading = false;
  } catch (error) {
    if (!current(mine)) return;
    if (!(error instanceof api.ApiError)) throw error;
    loading = "failed";
  }
  finish();
}

function finish() {
  byId("cards").removeAttribute("aria-busy");
  const more = byId("more");
  more.hidden = !cursor;
  more.textContent = loading === "failed" ? t("That failed. Show older ones") : t("Show older ones");
  nearEnd.unobserve(more); // observed anew, it tells at once whether it is in view still
  nearEnd.observe(more);
  byId("empty")?.remove();
  if (!cards.length) byId("end").prepend(nothing());
}

function nothing() {
  const filtered = FILTERS.some((name) => here()[name]);
  return h("p", { id: "empty" }, filtered
    ? [t("No job fits."), here().q && ` ${t("Text is looked for in the newest {n} jobs.", { n: number(SEARCHED) })}`, " ", h("a", link({ status: "", model: "", q: "" }), t("Show all"))]
    : t("No job yet. Write above what you would like to see, and press Make: the picture appears here by itself."));
}

/** Show a job that was made here, before the list has it; whether that is so: under a filter only the list knows. */
export function add(job) {
  if (FILTERS.some((name) => here()[name])) return false;
  if (begun) {
    if (placeOf(job.id) < 0) put(job, performance.now() + FRESH);
    finish();
  }
  return true;
}

/** Show a job as it is now, if it is here. */
export function renew(job) {
  const card = cards[placeOf(job.id)];
  if (card) put(job, card.fresh);
}

/** A job of a list, or one that is `fresh` until then. */
function put(job, fresh = 0) {
  const card = cards[placeOf(job.id)] ?? { element: h("li", { class: "card" }, h("a", link({ job: job.id }))), fresh };
  const before = card.job;
  card.listed ||= !fresh;
  update(card, job);
  if (before?.created_at !== job.created_at) place(card); // one that was made here had this clock's time
}

function place(card) {
  cards = cards.filter((other) => other !== card);
  const at = cards.findIndex((other) => isNewer(card.job, other.job));
  const next = cards[at]?.element ?? null;
  // One that stands there already stays: it may have the focus.
  if (!card.element.parentNode || card.element.nextSibling !== next) byId("cards").insertBefore(card.element, next);
  cards.splice(at < 0 ? cards.length : at, 0, card);
}

export function remove(id) {
  cards[placeOf(id)]?.element.remove();
  cards = cards.filter((card) => card.job.id !== id);
  finish();
}

const isNewer = (one, other) => one.created_at > other.created_at || (one.created_at === other.created_at && one.id > other.id);

function update(card, job) {
  const before = card.job;
  card.job = job;
  if (JSON.stringify(before) === JSON.stringify(job)) return;
  card.element.style.setProperty("--ratio", ratio(job));
  const frame = frameOf(card, job, before);
  if (before && live(before) && !live(job) && card.fresh) say(`${t(STATUSES[job.status])}: ${job.prompt}`);
  // The link itself stays: it may have the focus, or be about to be clicked.
  fill(card.element.firstChild, frame,
    h("div", { class: "line" }, badge(job), h("span", { class: "when" }, when(job))),
    h("p", { class: "prompt", dir: "auto" }, job.prompt || job.id));
}

/** The picture itself stays where it is the same: it would flicker, or begin anew, though a private bucket's links change. */
function frameOf(card, job, before) {
  const [file] = files(job);
  if (file && before && file.key === files(before)[0]?.key && before.status === job.status) return card.element.querySelector(".frame");
  if (file && job.status === "done") return h("div", { class: "frame" }, media(file, { fresh: () => files(card.job)[0] }), job.outputs.length > 1 && h("span", { class: "many" }, `1/${job.outputs.length}`));
  if (!live(job)) return h("div", { class: `frame ended ${job.status}` }, h("p", { class: "reason", dir: "auto" }, job.error ?? ""));
  return h("div", { class: "frame live" }, h("p", { class: "stage" }, stage(job)), bar(job), h("p", { class: "reason" }, reason(job)));
}

/** What passes by itself: how long each has taken. */
export function tick() {
  for (const { job, element } of cards) {
    const place = element.querySelector(".when");
    const text = when(job);
    if (place.textContent !== text) place.textContent = text;
  }
}
