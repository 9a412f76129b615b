// Elements made from text: nothing that comes from elsewhere is ever read as markup.

import { t } from "./words.js";

/** An element. Names with "on" are listeners, "style" holds custom properties; children are elements, texts, or nothing. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : value);
  }
  fill(element, ...children);
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(3).filter((child) => child != null && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** The address where it is one that may be opened, else nothing: a javascript: one runs what it likes. */
export function safe(url) {
  return URL.canParse(url) && ["http:", "https:"].includes(new URL(url).protocol) ? url : null;
}

export const button = (text, onclick, attributes = {}) => h("button", { type: "button", onclick, ...attributes }, text);

// Videos have no loading="lazy" of their own.
const nearby = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
  nearby.unobserve(target);
  target.src = target.dataset.src;
}), { rootMargin: "400px" });

const WAITS = [5, 30, 180]; // seconds before a file that did not come is asked for again

/** A picture, video or sound, or a word that it cannot be shown; `fresh` says what the file is by then, for its link may end. */
export function media(file, options = {}, tries = 0) {
  const { alt = "", controls = false, eager = false, fresh = () => file } = options;
  const [kind] = (file.content_type ?? "image/").split("/");
  const src = safe(file.url);
  if (!src) return h("span", { class: "glyph" }, "✕");
  const failed = (event) => {
    const note = unshown(src, controls);
    event.target.replaceWith(note);
    const again = () => note.isConnected && !note.contains(document.activeElement) && note.replaceWith(media(fresh(), options, tries + 1));
    if (tries < WAITS.length) setTimeout(again, WAITS[tries] * 1000);
  };
  if (kind === "video") {
    const video = h("video", { src: controls && src, "data-src": `${src}#t=0.1`, controls, muted: !controls, loop: controls, playsinline: true, preload: "metadata", "aria-label": alt, onerror: failed });
    if (!controls) nearby.observe(video);
    return video;
  }
  if (kind === "audio")
    return controls ? h("audio", { src, controls, "aria-label": alt, onerror: failed }) : h("span", { class: "glyph", "aria-hidden": "true" }, "♪");
  return h("img", { src, alt, width: file.width, height: file.height, loading: eager ? "eager" : "lazy", decoding: "async", onerror: failed });
}

function unshown(src, open) {
  const words = t("This browser cannot show it.");
  return h("span", { class: "unshown" }, words, open && [" ", h("a", { href: src, target: "_blank", rel: "noreferrer" }, t("Open it"))]);
}

// Notes must stand in the open dialog, for all outside of it is covered and dumb.
const notes = byId("notes");
export const raise = () => ([...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body).append(notes);
document.addEventListener("close", raise, true);

let saidAt = 0;
/** Tell in passing, and to a screen reader. */
export function say(text, bad = false) {
  raise();
  const place = byId("said");
  place.className = bad ? "bad" : "";
  place.textContent = text;
  const mine = (saidAt = performance.now());
  setTimeout(() => mine === saidAt && (place.textContent = ""), bad ? 12000 : 5000);
}

export const complain = (error) => say(`${error}`, true);

/** Whether the visitor wants it. The answer is false on Esc. */
export function ask(question, verb, look = "main") {
  return new Promise((resolve) => {
    const box = h("dialog", { class: "ask", "aria-labelledby": "asked", onclose: () => { raise(); box.remove(); resolve(box.returnValue === "yes"); } },
      h("p", { id: "asked" }, question),
      h("form", { method: "dialog", class: "row end" },
        h("button", { value: "" }, t("Back")),
        h("button", { value: "yes", class: look }, verb)));
    document.body.append(box);
    box.showModal();
  });
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not a secure context: an address in the own network, say
    const focused = document.activeElement;
    const field = h("textarea", {}, text);
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    focused.focus();
  }
  say(t("Copied."));
}
