// The dead letters: results that are paid for and could not be stored.

import * as api from "./api.js";
import { ask, button, byId, complain, fill, h, say } from "./dom.js";
import { link } from "./place.js";
import { dead } from "./show.js";
import { moment, t } from "./words.js";

const PAGE = 100;
let rows = [];
let next = null;
let begun = false;
let tell = () => {};

const LEFT = { spool: "The picture waits in the spool.", links: "The picture waits behind the worker's links.", runpod: "The picture waits at RunPod.", part: "Some of its files are kept, the rest is gone.", nothing: "Nothing is left of it." };

export function draw(place, changed) {
  tell = changed;
  [rows, next, begun] = [[], null, false];
  fill(place,
    h("h1", {}, t("Dead letters")),
    h("p", {}, t("These pictures are drawn and paid for, and could not be stored. Redrive stores them from where they are left, without a new run.")),
    h("div", { class: "row" }, button(t("Redrive all"), redriveAll, { id: "redrive-all", class: "main", hidden: true })),
    h("ul", { id: "letters", "aria-busy": "true" }),
    button(t("Show older ones"), () => load(next).catch(complain), { id: "more-letters", hidden: true }));
}

export const hasBegun = () => begun;

/** Ask how it stands, unless the visitor reads on further down. */
export const refresh = (signal) => (rows.length > PAGE ? null : load(null, signal));

/** The first ones, or those after the cursor; nothing where others are here by then. */
async function load(cursor, signal) {
  const before = rows;
  const answer = await api.get(`api/dead-letters?${new URLSearchParams({ limit: PAGE, ...(cursor && { cursor }) })}`, signal);
  if (rows !== before || !byId("letters")) return;
  next = answer.next_cursor;
  begun = true;
  byId("letters").removeAttribute("aria-busy");
  take(cursor ? [...rows, ...answer.dead_letters] : answer.dead_letters);
}

const placeOf = (id) => rows.findIndex((row) => row.id === id);

/** Whether there is a newer one than this, and an older one. */
export function around(id) {
  const at = placeOf(id);
  return at < 0 ? [false, false] : [at > 0, at + 1 < rows.length || Boolean(next)];
}

/** The id of the one that is one newer (-1) or older (1), which may have to be asked for first. */
export async function beside(id, step) {
  if (next && placeOf(id) + step === rows.length) await load(next).catch(complain);
  return around(id)[step < 0 ? 0 : 1] ? rows[placeOf(id) + step]?.id : null;
}

/** Let the keyboard go on from this one, or from the top where it is not here. */
export function focus(id) {
  const letter = byId("letters").children[placeOf(id)];
  if (letter) letter.querySelector("a").focus();
  else if (document.activeElement === document.body) byId("main").focus();
}

/** What became of a job. */
export const renew = (job) => dead(job) || remove(job.id);

export const remove = (id) => placeOf(id) >= 0 && take(rows.filter((row) => row.id !== id));

function take(found) {
  const same = JSON.stringify(found) === JSON.stringify(rows);
  if (!same) rows = found;
  if (!same || !rows.length) redraw(byId("letters"));
  byId("redrive-all").hidden = !rows.length;
  byId("more-letters").hidden = !next;
}

/** All of it, and the keyboard stays about where it was. */
function redraw(list) {
  const at = [...list.children].findIndex((row) => row.contains(document.activeElement));
  const held = at >= 0 || document.activeElement === byId("redrive-all");
  fill(list, rows.length ? rows.map(letter) : h("li", {}, t("There is none. Every picture is where it belongs.")));
  if (held) (list.children[Math.min(Math.max(at, 0), rows.length - 1)]?.querySelector("a") ?? byId("main")).focus();
}

function letter(row) {
  const until = row.left_until ? ` ${t("Until {time}.", { time: moment(row.left_until) })}` : "";
  return h("li", { class: "letter" },
    h("a", { class: "prompt", dir: "auto", ...link({ job: row.id }) }, row.prompt || row.id),
    h("p", { class: "wrong" }, row.error, " ", h("code", {}, row.error_code)),
    h("p", {}, t(LEFT[row.left] ?? row.left), until),
    h("p", { class: "small" }, moment(row.dead_at), " · ", t("{n} tries", { n: row.tries })),
    button(t("Redrive"), () => redrive(row), { "aria-label": t("Redrive {prompt}", { prompt: row.prompt || row.id }) }));
}

async function redrive(row) {
  try {
    const { job } = await api.act("POST", `api/jobs/${row.id}/redrive`, {});
    say(t("It is being stored."));
    tell(row.id, job);
  } catch (error) {
    complain(error);
    tell(row.id);
  }
}

async function redriveAll() {
  if (!(await ask(t("Store all of them again? That costs no new run."), t("Redrive all")))) return;
  const came = { redriven: 0, lost: 0, unknown: 0 };
  let cursor = null;
  try {
    do {
      const answer = await api.act("POST", "api/dead-letters/redrive", { limit: PAGE, ...(cursor && { cursor }) });
      for (const name in came) came[name] += answer[name].length;
      cursor = answer.next_cursor;
    } while (cursor);
    say(t("{redriven} are being stored, of {lost} nothing is left, of {unknown} RunPod says nothing just now.", came), came.lost + came.unknown > 0);
  } catch (error) {
    complain(error);
  }
  rows = []; // which is asked for anew, from its beginning
  tell(null);
}
