// What the page says, in the visitor's language. The English words stand in the code; th.js has the Thai ones for them.

export const LANGUAGES = { en: "English", th: "ไทย" };
const LANGUAGE = "ob.language";

/** What is kept there; where the browser keeps nothing, or no more, until the page is closed. */
function keeper(place) {
  const kept = new Map();
  const attempt = (work) => {
    try {
      return work(place());
    } catch {
      return undefined;
    }
  };
  return {
    getItem: (name) => kept.get(name) ?? attempt((there) => there.getItem(name)) ?? null,
    setItem: (name, value) => (attempt((there) => (there.setItem(name, value), true)) ? kept.delete(name) : kept.set(name, value)),
    removeItem: (name) => (kept.delete(name), attempt((there) => there.removeItem(name))),
  };
}
export const store = keeper(() => localStorage);
export const draft = keeper(() => sessionStorage);

export let language = "en";
let locale = language; // as the visitor's country writes numbers and dates
let words = {};

export async function speak() {
  const wanted = [store.getItem(LANGUAGE), ...navigator.languages].map((name) => name?.slice(0, 2));
  language = wanted.find((name) => name in LANGUAGES) ?? "en";
  if (language === "th") words = await import("./th.js").then((file) => file.words, () => ({})); // English rather than nothing
  locale = navigator.languages.find((name) => name.slice(0, 2) === language) ?? language;
  document.documentElement.lang = language;
}

export function switchTo(wanted) {
  store.setItem(LANGUAGE, wanted);
  location.reload();
}

/** The text in the visitor's language, with the values in the places of {name}. */
export function t(text, values = {}) {
  return (Object.hasOwn(words, text) ? words[text] : text).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** What the API said, or what is known in the visitor's language under its code. */
export function told(kind, code, sentence, values = {}) {
  const key = `${kind}:${code}`;
  return Object.hasOwn(words, key) ? t(key, values) : sentence;
}

// To make a formatter takes longer than to use it a hundred times.
const formatters = new Map();
function formatter(kind, options) {
  const name = kind.name + JSON.stringify(options);
  if (!formatters.has(name)) formatters.set(name, new kind(locale, options));
  return formatters.get(name);
}

export const number = (value, options = {}) => formatter(Intl.NumberFormat, options).format(value);

// A cost is a fraction of a cent, mostly; null is "not known".
export const money = (usd) =>
  usd == null ? t("unknown") : number(usd, { style: "currency", currency: "USD", maximumSignificantDigits: usd < 0.01 ? 2 : undefined });

export const bytes = (size) =>
  number(size < 1e6 ? size / 1e3 : size / 1e6, { maximumFractionDigits: size < 1e6 ? 0 : 1 }) + (size < 1e6 ? " kB" : " MB");

/** A moment in ms; where no zone is said, as in rows of SQLite's own making, it is UTC. NaN where there is none. */
export const time = (iso) => Date.parse(/(Z|[+-]\d\d:\d\d)$/.test(iso) ? iso : `${iso}Z`.replace(" ", "T"));

const dated = (iso, options) => (Number.isNaN(time(iso)) ? "–" : formatter(Intl.DateTimeFormat, options).format(time(iso)));
export const moment = (iso) => dated(iso, { dateStyle: "medium", timeStyle: "medium" });
export const clock = (iso) => dated(iso, { timeStyle: "medium" });

let skew = 0; // ms by which the service's clock is ahead of this one
export const now = () => Date.now() + skew;
export function setClock(date) {
  if (date) skew = Date.parse(date) - Date.now();
}

export function span(milliseconds) {
  if (Number.isNaN(milliseconds)) return "–";
  const seconds = Math.max(0, milliseconds / 1000);
  if (seconds < 60) return t("{n} s", { n: number(seconds, { maximumFractionDigits: seconds < 10 ? 1 : 0 }) });
  if (seconds < 3600) return t("{m} min {s} s", { m: Math.floor(seconds / 60), s: Math.floor(seconds % 60) });
  return t("{h} h {m} min", { h: Math.floor(seconds / 3600), m: Math.floor((seconds % 3600) / 60) });
}

export function ago(iso) {
  const seconds = (time(iso) - now()) / 1000;
  if (Number.isNaN(seconds)) return "–";
  const [unit, size] = [["day", 86400], ["hour", 3600], ["minute", 60]].find(([, size]) => -seconds >= size) ?? ["second", 1];
  return formatter(Intl.RelativeTimeFormat, { numeric: "auto" }).format(Math.min(0, Math.ceil(seconds / size)), unit);
}
