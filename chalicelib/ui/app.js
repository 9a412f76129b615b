// The page: its header and views, the key, and the one loop that asks the API how things stand.

import * as api from "./api.js";
import { button, byId, fill, h, raise, say } from "./dom.js";
import * as gallery from "./gallery.js";
import * as make from "./make.js";
import { address, go, here, onMove, stays } from "./place.js";
import { LANGUAGES, language, span, speak, switchTo, t } from "./words.js";

const BUSY = 3; // seconds from one look to the next while a job is live
const IDLE = 15;
const HIDDEN = 60;
const DEAD = 60; // and at the dead letters, whose number stands in the header
const MOST_BACKOFF = 60;

let view = null; // what is drawn: the gallery, or a module of the other two
let open = null; // the module of the open job
let drawn = ""; // the place that is drawn
let timer;
let looking = false;
let again = false; // as soon as this look is over
let moved = new AbortController(); // ends the look that is under way: the visitor is elsewhere
let failed = 0; // looks in a row
let deadAt = -Infinity;
let deadAmong; // failed jobs, when they were counted last

const TITLES = { "": "Gallery", dead: "Dead letters", figures: "Figures" };
const PLACES = { "": { view: "", job: "" }, dead: { view: "dead", job: "" }, figures: { view: "figures", job: "" } };
const VIEWS = { dead: () => import("./dead.js"), figures: () => import("./figures.js") };

function drawHeader() {
  const tab = (name, word, ...more) => h("a", { "data-view": name, onclick: (event) => stays(event) && go(PLACES[name]) }, t(word), more);
  fill(byId("header"),
    button(t("Skip to the content"), () => byId("main").focus(), { class: "skip" }),
    h("strong", {}, "OB AI Studio"),
    h("nav", { "aria-label": t("Views") },
      tab("", "Gallery"), tab("dead", "Dead letters", h("span", { id: "dead", class: "count", hidden: true })), tab("figures", "Figures")),
    h("select", { id: "language", "aria-label": t("Language"), onchange: (event) => switchTo(event.target.value) },
      Object.entries(LANGUAGES).map(([name, word]) => h("option", { value: name, selected: name === language, lang: name }, word))),
    button(t("Forget the key"), () => { api.forget(); location.reload(); }, { id: "forget" }));
}

async function show() {
  try {
    await showPlace();
  } catch (error) {
    drawn = "";
    say(`${t("The page could not be loaded.")} (${error.message})`, true);
  }
  moved.abort();
  await look();
}

async function showPlace() {
  const { view: wanted, job, ...filter } = here();
  const name = Object.hasOwn(VIEWS, wanted) ? wanted : "";
  const place = JSON.stringify([name, name ? "" : filter]);
  if (place !== drawn) await drawView(name, place);
  if (job) open ??= await import("./job.js");
  if (open) open.show(here().job, view, changed);
}

async function drawView(name, place) {
  drawn = place;
  document.title = `${t(TITLES[name])} – OB AI Studio`;
  for (const tab of byId("header").querySelectorAll("[data-view]")) {
    tab.href = address(PLACES[tab.dataset.view]);
    if (tab.dataset.view === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  const next = name ? await VIEWS[name]() : gallery;
  if (drawn !== place) return; // the visitor has gone on meanwhile
  if (next === view) {
    if (next === gallery) gallery.reset();
  } else {
    drawMain(next);
  }
  view = next;
  if (next === gallery) gallery.offerModels(make.names());
}

function drawMain(next) {
  const content = h("section", { id: "content" });
  fill(byId("main"), next === gallery && make.form(made), content);
  next.draw(content, changed);
}

/** A job was made here: whether it is in view, if the gallery is. */
function made(job) {
  const seen = view !== gallery || gallery.add(job);
  look();
  return seen;
}

/** Something was done: the job as it is now, null where it is gone, nothing where that is not known. */
function changed(id, job) {
  if (job) view.renew?.(job);
  if (job === null) view.remove?.(id);
  deadAt = -Infinity;
  look();
}

/** Look at how things stand, now and then by itself; one look at a time, and one after that where more was asked. */
async function look() {
  clearTimeout(timer);
  if (looking) return void (again = true);
  looking = true;
  moved = new AbortController();
  try {
    await lookOnce(moved.signal);
  } finally {
    looking = false;
    clearTimeout(timer);
    if (api.key()) timer = setTimeout(look, 1000 * (again ? 0 : pause()));
    again = false;
  }
}

const pause = () => (failed ? Math.min(MOST_BACKOFF, failed) : document.hidden ? HIDDEN : busy() ? BUSY : IDLE); // seconds

const busy = () => (open?.isOpen() ? open.busy() : view === gallery && gallery.busy());

async function lookOnce(signal) {
  if (!api.key()) return askForKey();
  try {
    await Promise.all([learn(), refresh(signal)]);
    if (open?.isOpen()) open.tick();
    await countDead(signal);
    failed = 0;
    tellUp();
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    if (signal.aborted) return;
    if (error.status === 401) return askForKey(error);
    failed = error.passing ? (error.after ?? Math.max(2, failed * 2)) : MOST_BACKOFF;
    tellDown(error);
  }
}

async function learn() {
  await make.begin();
  if (view === gallery) gallery.offerModels(make.names());
}

/** The open job, or else what is drawn; the list behind a job once, for that is what the arrows go by. */
function refresh(signal) {
  if (!open?.isOpen()) return view.refresh(signal);
  return Promise.all([open.refresh(signal), view.hasBegun?.() === false && view.refresh(signal)]);
}

function tellDown(error) {
  raise();
  const held = byId("down").contains(document.activeElement);
  const wait = span(1000 * Math.min(MOST_BACKOFF, failed));
  const now = button(t("Try now"), look);
  fill(byId("down"), `${error} `, error.passing && t("Trying again in {span}.", { span: wait }), " ", now);
  byId("down").hidden = false;
  if (held) now.focus();
}

function tellUp() {
  if (byId("down").contains(document.activeElement)) byId("main").focus();
  byId("down").hidden = true;
}

async function countDead(signal) {
  if (performance.now() - deadAt < DEAD * 1000 && deadAmong === gallery.failures()) return;
  const found = await api.get("api/dead-letters?limit=100", signal);
  [deadAt, deadAmong] = [performance.now(), gallery.failures()];
  const number = found.dead_letters.length;
  fill(byId("dead"), number + (found.next_cursor ? "+" : ""));
  byId("dead").hidden = !number;
}

/** Ask for the key, once; what was wrong with the last one stands beside. */
function askForKey(error) {
  clearTimeout(timer);
  if (byId("key")) return;
  const field = h("input", { id: "key", name: "key", type: "password", required: true, pattern: "\\s*[!-~]+\\s*", title: t("Letters, digits and signs, without a space"), autocomplete: "current-password", spellcheck: "false", "aria-describedby": "key-wrong" });
  const place = !api.fixed && h("label", {}, t("Address of the API"), h("input", { id: "address", type: "url", required: true, value: api.address(), placeholder: "https://api.example.com/v1/" }));
  // A second Esc closes it whatever is said to the first.
  const box = h("dialog", { class: "ask", "aria-labelledby": "key-title", onclose: () => box.isConnected && box.showModal() },
    h("h2", { id: "key-title" }, t("Your API key")),
    h("p", {}, t("It is kept in this browser only, until you press “Forget the key”. ./run prints one; a running service's operator makes them.")),
    h("form", { onsubmit: (event) => { event.preventDefault(); api.remember(field.value, byId("address")?.value); box.close(); raise(); box.remove(); restart(); } },
      h("input", { type: "text", autocomplete: "username", value: "OB AI Studio", hidden: true }), // what a password manager keeps it under
      place,
      h("label", {}, t("API key"), field),
      h("p", { id: "key-wrong", class: "wrong", role: "alert" }, error && `${error.code === "unauthorized" ? t("The service does not take this key.") : error.message} (${error.code})`),
      h("div", { class: "row end" }, h("button", { class: "main" }, t("Open the gallery")))));
  document.body.append(box);
  box.showModal();
}

function restart() {
  drawn = "";
  failed = 0;
  tellUp();
  show();
}

await speak();
drawHeader();
onMove(show);
document.addEventListener("visibilitychange", () => document.hidden || look());
setInterval(() => view === gallery && gallery.tick(), 1000);
await show();
