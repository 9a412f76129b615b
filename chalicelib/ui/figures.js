// The figures of the last days, in a page.

import * as api from "./api.js";
import { byId, fill, h } from "./dom.js";
import { go, here } from "./place.js";
import { STATUSES } from "./show.js";
import { moment, money, number, span, t } from "./words.js";

const DAYS = [1, 7, 30, 90];
const PARTS = { queue: "Waiting for a GPU", run: "Drawing", store: "Storing", total: "All in all" };

const days = () => (DAYS.includes(Number(here().days)) ? Number(here().days) : 7);

export function draw(place) {
  fill(place,
    h("div", { class: "row" }, h("h1", { class: "grow" }, t("Figures")),
      h("select", { id: "days", "aria-label": t("Period"), onchange: (event) => go({ days: event.target.value }, { replace: true }) },
        DAYS.map((n) => h("option", { value: n, selected: n === days() }, n === 1 ? t("Last day") : t("Last {n} days", { n }))))),
    h("div", { id: "figures", "aria-busy": "true" }));
}

export async function refresh(signal) {
  const asked = days();
  const stats = await api.get(`api/stats?days=${asked}`, signal);
  const place = byId("figures");
  if (!place || asked !== days() || (stats.same && !place.hasAttribute("aria-busy") && place.dataset.days === String(asked))) return;
  place.removeAttribute("aria-busy");
  place.dataset.days = asked;
  fill(place,
    h("div", { class: "tiles" },
      tile(t("Jobs"), number(Object.values(stats.jobs).reduce((sum, count) => sum + count, 0))),
      tile(t("Success"), stats.success_rate == null ? "–" : number(stats.success_rate, { style: "percent", maximumFractionDigits: 1 })),
      tile(t("Cost"), money(stats.cost.usd)),
      tile(t("For nothing"), money(stats.cost.wasted_usd)),
      tile(t("Half are done within"), time(stats.milliseconds.total.p50))),
    !stats.complete && h("p", {}, t("There are more jobs than are counted; these are the newest, since {time}.", { time: moment(stats.since) })),
    stats.cost.unknown_attempts > 0 && h("p", {}, t("Of {n} runs nobody knows the cost: their model has no price, or RunPod did not say how long they took.", { n: number(stats.cost.unknown_attempts) })),
    table(t("Jobs by status"), ["Status", "Jobs"], Object.entries(stats.jobs).map(([status, count]) => [t(STATUSES[status]), number(count)])),
    table(t("Times of jobs that are done"), ["", "Half within", "95 % within", "99 % within"],
      Object.entries(PARTS).map(([name, word]) => [t(word), ...["p50", "p95", "p99"].map((rank) => time(stats.milliseconds[name][rank]))])),
    costs(stats.costs));
}

const time = (milliseconds) => (milliseconds == null ? "–" : span(milliseconds));
const tile = (word, value) => h("div", { class: "tile" }, h("span", {}, word), h("strong", {}, value));

function table(title, heads, rows) {
  const name = `table-${heads.join("-").replace(/\W/g, "")}`;
  return h("section", {}, h("h2", { id: name }, title), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": name }, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((word) => (word ? h("th", { scope: "col" }, t(word)) : h("td", {}))))),
    h("tbody", {}, rows.map(([first, ...rest]) => h("tr", {}, h("th", { scope: "row" }, first), rest.map((value) => h("td", {}, value))))))));
}

function costs(rows) {
  const most = Math.max(...rows.map((row) => row.usd ?? 0));
  const share = (usd) => most > 0 && h("span", { class: "share", "aria-hidden": "true", style: { "--share": (usd ?? 0) / most } });
  return rows.length > 0 && table(t("Cost by day and model"), ["Day", "Model", "Jobs", "Cost", "For nothing"],
    rows.map((row) => [row.day, row.model, number(row.jobs), [money(row.usd), share(row.usd)], money(row.wasted_usd)]));
}
