// The form that makes a job: a prompt, a model with its values, and the pictures that it wants.

import * as api from "./api.js";
import { ask, button, complain, fill, h, say } from "./dom.js";
import { bytes, draft, now, t } from "./words.js";

let models = null; // as the API has them
let learning = null; // the one request for them
let fallback = ""; // the model where none is said
let strict = false; // whether the API refuses a model that it does not list
let pictures = []; // those chosen: { file, element, uploaded, key, failed }
const typed = new Map(); // what was written for each value of each model
let busy = false;
let made;
let element = null; // the form, though another view has taken its place on the page
const part = (id) => element.querySelector(`#${id}`);
const DRAFT = "ob.prompt";
const UNANSWERED = "ob.unanswered"; // what was sent without an answer, each with its key: a repeat is the same request

export const names = () => (models ?? []).map(({ model }) => model);

export const usualSeconds = (name) => models?.find(({ model }) => model === name)?.usual_seconds;

/** Learn what models there are, once. */
export function begin() {
  learning ??= learn().catch((error) => {
    learning = null;
    throw error;
  });
  return learning;
}

async function learn() {
  const answer = await api.get("api/models");
  [models, fallback, strict] = [answer.models, answer.default_model, answer.unknown_models === "refuse"];
  if (strict && models.length && !names().includes(fallback)) fallback = names()[0];
  admit(fallback);
  if (element) offer();
}

/** A model that the API takes though it does not list it. */
function admit(name) {
  if (!names().includes(name)) models = [{ model: name, slots: { properties: {}, required: [] } }, ...models];
}

/** The form, the same each time, so that nothing written is lost; `tell` has each job that it makes, and whether it is in view. */
export function form(tell) {
  made = tell;
  if (!element) build();
  return element;
}

function build() {
  element = h("form", { id: "make", onsubmit: send },
    h("label", { for: "prompt" }, t("What would you like to see?")),
    h("textarea", { id: "prompt", name: "prompt", rows: 2, maxlength: 10000, required: true, dir: "auto", oninput: keepDraft, onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && element.requestSubmit() },
      draft.getItem(DRAFT) ?? ""),
    h("div", { class: "row" },
      h("select", { id: "model", name: "model", "aria-label": t("Model"), onchange: drawSlots }),
      h("p", { id: "about", class: "grow" }),
      h("button", { id: "send", class: "main" }, t("Make"))),
    h("div", { id: "pictures", hidden: true }),
    h("details", { id: "values", hidden: true }, h("summary", {}, t("Values")), h("div", { id: "slots" })),
    h("p", { id: "refused", class: "wrong", role: "alert" }));
  if (models) offer();
  // A browser cannot lead to what is wrong in there while it is closed, and would say nothing.
  part("slots").addEventListener("invalid", () => (part("values").open = true), true);
  // Anywhere on the page: a browser would leave it, and open the picture that was dropped beside the form.
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => { if (hasFiles(event)) event.preventDefault(); take(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
}

const hasFiles = (event) => event.dataTransfer.types.includes("Files");

const keepDraft = () => draft.setItem(DRAFT, part("prompt").value);

function offer(wanted = fallback) {
  fill(part("model"), models.map(({ model }) => h("option", { value: model, selected: model === wanted }, model)));
  drawSlots();
}

const chosen = () => models.find(({ model }) => model === part("model").value);
const isPicture = (slot) => slot.contentMediaType === "image/*";

function drawSlots() {
  const { about, slots } = chosen();
  const entries = Object.entries(slots.properties).filter(([name]) => name !== "prompt");
  const wanted = entries.filter(([, slot]) => isPicture(slot));
  const values = entries.filter(([, slot]) => !isPicture(slot));
  part("about").textContent = about ?? "";
  part("prompt").required = slots.required.includes("prompt") || !("prompt" in slots.properties);
  fill(part("slots"), values.map(([name, slot]) => field(name, slot, slots.required.includes(name))));
  part("values").hidden = !values.length;
  part("values").open = values.some(([name]) => slots.required.includes(name) || typed.get(place(name)));
  drawPictures(wanted);
}

const place = (name) => `${chosen().model} ${name}`;

/** An input for one value; what is left empty is the model's own default. */
function field(name, slot, required) {
  const common = { name: `slot.${name}`, required, oninput: (event) => typed.set(place(name), event.target.value) };
  const empty = slot.random ? t("random") : String(slot.default ?? "");
  const type = slot.type === "integer" || slot.type === "number" ? "number" : "text";
  const options = slot.enum ?? (slot.type === "boolean" ? [true, false] : null);
  const input = options
    ? h("select", common, h("option", { value: "" }, empty && t("{value} (default)", { value: empty })), options.map((value) => h("option", { value: JSON.stringify(value) }, String(value))))
    : h("input", { ...common, type, min: slot.minimum, max: slot.maximum, step: slot.type === "number" ? "any" : slot.multipleOf, minlength: slot.minLength, maxlength: slot.maxLength, placeholder: empty, dir: "auto" });
  input.value = typed.get(place(name)) ?? "";
  return h("label", {}, slot.title ?? name, input);
}

function valueOf(input) {
  if (input.tagName === "SELECT") return JSON.parse(input.value);
  return input.type === "number" ? Number(input.value) : input.value;
}

function drawPictures(wanted) {
  const area = part("pictures");
  area.hidden = !wanted.length;
  area.dataset.most = wanted.length;
  const [first] = wanted;
  const choose = h("input", { id: "choose", type: "file", accept: "image/*", multiple: wanted.length > 1, class: "hidden", onchange: (event) => { take(event.target.files); event.target.value = ""; } });
  fill(area, first && [
    h("label", { class: "drop", for: "choose" }, choose, h("strong", {}, first[1].title ?? t("Picture")), " ", t("Drag one here, paste it, or choose one.")),
    h("ul", { id: "chosen" })]);
  drawChosen();
}

const most = () => Number(part("pictures").dataset.most ?? 0);

/** Those that go with the model; another one may want those that stay behind. */
const used = () => (most() ? pictures.slice(-most()) : []);

function drawChosen() {
  const list = part("chosen");
  if (list) fill(list, used().map((picture) => picture.element));
}

function take(files) {
  if (!files.length || !element.isConnected || document.querySelector("dialog[open]")) return;
  if (!most()) return say(t("This model takes no picture; choose another model first."), true);
  for (const file of [...files].slice(0, most())) add(file);
}

function add(file) {
  const picture = { file };
  const url = URL.createObjectURL(file);
  const thumb = h("img", { src: url, alt: "", onload: () => URL.revokeObjectURL(url), onerror: () => thumb.remove() });
  picture.place = h("div", { class: "grow" });
  picture.element = h("li", {}, thumb, picture.place,
    button("✕", () => { pictures = pictures.filter((other) => other !== picture); drawChosen(); }, { "aria-label": t("Take {name} out", { name: file.name }) }));
  pictures = [...used(), picture].slice(-most());
  drawChosen();
  upload(picture);
}

function upload(picture) {
  const { file, place } = picture;
  const bar = h("progress", { max: 1, value: 0, "aria-label": t("Upload of {name}", { name: file.name }) });
  fill(place, h("span", { class: "small" }, `${file.name}, ${bytes(file.size)}`), bar);
  picture.failed = null;
  picture.uploaded = api.upload(file, (fraction) => (bar.value = fraction)).then(
    (key) => { picture.key = key; bar.value = 1; },
    (error) => { picture.failed = error; fill(place, h("span", { class: "wrong" }, `${file.name}: ${error.message}`)); });
}

async function send(event) {
  event.preventDefault();
  if (busy) return;
  busy = true;
  part("send").setAttribute("aria-disabled", "true");
  part("refused").textContent = "";
  const [wanted, shown] = [written(), used()]; // as they are now: the visitor may write on, or go to another view
  try {
    const job = await createWith(shown, wanted);
    const seen = made(job);
    if (job.replayed) return say(t("That was made already, before its answer was lost. Press Make again for another one."));
    if ((written().prompt ?? "") === (wanted.prompt ?? "")) write("");
    say(seen ? t("It is queued.") : t("It is queued. The filter may hide it."));
  } catch (error) {
    refuse(`${error}`);
  } finally {
    busy = false;
    part("send").removeAttribute("aria-disabled");
  }
}

function refuse(text) {
  part("refused").textContent = text;
  if (!element.isConnected) say(text, true);
}

/** The job, with these pictures; where they were there too long and are gone, they are uploaded anew. */
async function createWith(pictures, wanted) {
  try {
    return await create({ ...wanted, image_key: await keys(pictures) });
  } catch (error) {
    if (error.code !== "image_not_found") throw error;
    pictures.forEach((picture) => (picture.failed = error));
    return create({ ...wanted, image_key: await keys(pictures) });
  }
}

/** The keys of the pictures, once all of them are there; an upload that has failed is tried once more. */
async function keys(pictures) {
  pictures.filter((picture) => picture.failed).forEach(upload);
  await Promise.all(pictures.map((picture) => picture.uploaded));
  const unsent = pictures.find((picture) => picture.failed);
  if (unsent) throw unsent.failed;
  return pictures.length ? pictures.map((picture) => picture.key) : undefined;
}

function written() {
  const inputs = [...part("slots").querySelectorAll("[name]")].filter((input) => input.value !== "");
  const slots = Object.fromEntries(inputs.map((input) => [input.name.slice(5), valueOf(input)]));
  return { prompt: part("prompt").value.trim() || undefined, model: part("model").value || undefined, slots: inputs.length ? slots : undefined };
}

function write(prompt) {
  part("prompt").value = prompt;
  keepDraft();
}

/** The job. What got no answer is sent again under the same key: it is made once, however often that is. */
async function create(wanted) {
  const text = JSON.stringify(wanted);
  try {
    const { id, status, replayed } = await api.act("POST", "api/queue/create", wanted, { "Idempotency-Key": keyFor(text) });
    forget(text);
    return { id, status, replayed, step: "submit", prompt: wanted.prompt ?? "", model: wanted.model ?? fallback, outputs: [], created_at: new Date(now()).toISOString() };
  } catch (error) {
    if (!error.passing && ![401, 403].includes(error.status)) forget(text); // these say nothing of what was sent before
    throw error;
  }
}

const unanswered = () => JSON.parse(draft.getItem(UNANSWERED) ?? "{}");

/** The key of what is sent now, the same one as before where that had no answer, be it before the page was loaded anew. */
function keyFor(text) {
  const keys = unanswered();
  keys[text] ??= newKey();
  draft.setItem(UNANSWERED, JSON.stringify(keys));
  return keys[text];
}

function forget(text) {
  const { [text]: _, ...rest } = unanswered();
  draft.setItem(UNANSWERED, JSON.stringify(rest));
}

// crypto.randomUUID is there in a secure context only.
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Begin with what another job was made of. */
export async function again({ prompt, model }) {
  const mine = part("prompt").value.trim();
  if (mine && mine !== prompt && !(await ask(t("Replace what you have written?"), t("Replace")))) return;
  write(prompt);
  try {
    await begin(); // they may not be known yet
  } catch (error) {
    return complain(error);
  }
  if (!strict) admit(model);
  if (names().includes(model)) offer(model);
  else say(t("The model {model} is not offered any more; choose another one.", { model }), true);
  part("prompt").focus();
}
