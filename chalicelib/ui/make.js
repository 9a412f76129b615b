// The form that makes a job: a prompt, a model with its values, and the pictures that it wants.

import * as api from "./api.js";
import { button, byId, fill, h, say } from "./dom.js";
import { bytes, now, t } from "./words.js";

let models = null; // as the API has them
let fallback = ""; // the model where none is said
let pictures = []; // those chosen: { file, url, key, fraction, failed }
let sent = null; // what was sent last without an answer, with its key: a repeat is the same request
let busy = false;
let made;
let element = null;

export const names = () => (models ?? []).map(({ model }) => model);

export const usualSeconds = (name) => models?.find(({ model }) => model === name)?.usual_seconds;

/** Learn what models there are, once; whether that was now. */
export async function begin() {
  if (models) return false;
  const answer = await api.get("api/models");
  [models, fallback] = [answer.models, answer.default_model];
  if (!names().includes(fallback)) models = [{ model: fallback, slots: { properties: {}, required: [] } }, ...models];
  if (byId("model")) offer();
  return true;
}

/** The form, the same each time, so that nothing written is lost; `tell` is called with each job that it makes. */
export function form(tell) {
  made = tell;
  return (element ??= build());
}

function build() {
  const drop = (event) => { event.preventDefault(); take(event.dataTransfer.files); };
  const form = h("form", { id: "make", onsubmit: send, onpaste: (event) => event.clipboardData.files.length && take(event.clipboardData.files), ondragover: (event) => event.preventDefault(), ondrop: drop },
    h("label", { for: "prompt" }, t("What would you like to see?")),
    h("textarea", { id: "prompt", name: "prompt", rows: 2, maxlength: 10000, required: true, dir: "auto", onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.requestSubmit() }),
    h("div", { class: "row" },
      h("select", { id: "model", name: "model", "aria-label": t("Model"), onchange: drawSlots }),
      h("p", { id: "about", class: "grow" }),
      h("button", { id: "send", class: "main" }, t("Make"))),
    h("div", { id: "pictures", hidden: true }),
    h("details", { id: "values", hidden: true }, h("summary", {}, t("Values")), h("div", { id: "slots" })),
    h("p", { id: "refused", class: "wrong", role: "alert" }));
  if (models) queueMicrotask(offer); // once it is on the page
  return form;
}

function offer() {
  fill(byId("model"), models.map(({ model }) => h("option", { value: model, selected: model === fallback }, model)));
  drawSlots();
}

const chosen = () => models.find(({ model }) => model === byId("model").value);
const isPicture = (slot) => slot.contentMediaType === "image/*";

function drawSlots() {
  const { about, slots } = chosen();
  const entries = Object.entries(slots.properties).filter(([name]) => name !== "prompt");
  const wanted = entries.filter(([, slot]) => isPicture(slot));
  const values = entries.filter(([, slot]) => !isPicture(slot));
  byId("about").textContent = about ?? "";
  byId("prompt").required = slots.required.includes("prompt") || !("prompt" in slots.properties);
  fill(byId("slots"), values.map(([name, slot]) => field(name, slot, slots.required.includes(name))));
  byId("values").hidden = !values.length;
  byId("values").open = values.some(([name]) => slots.required.includes(name));
  drawPictures(wanted);
}

/** An input for one value; what is left empty is the model's own default. */
function field(name, slot, required) {
  const common = { name: `slot.${name}`, "data-type": slot.type, required };
  const empty = slot.random ? t("random") : String(slot.default ?? "");
  const type = slot.type === "integer" || slot.type === "number" ? "number" : "text";
  const options = slot.enum ?? (slot.type === "boolean" ? [true, false] : null);
  const input = options
    ? h("select", common, h("option", { value: "" }, empty && t("{value} (default)", { value: empty })), options.map((value) => h("option", { value: JSON.stringify(value) }, String(value))))
    : h("input", { ...common, type, min: slot.minimum, max: slot.maximum, step: slot.type === "number" ? "any" : slot.multipleOf, minlength: slot.minLength, maxlength: slot.maxLength, placeholder: empty, dir: "auto" });
  return h("label", {}, slot.title ?? name, input);
}

function valueOf(input) {
  if (input.tagName === "SELECT") return JSON.parse(input.value);
  return input.type === "number" ? Number(input.value) : input.value;
}

function drawPictures(wanted) {
  const place = byId("pictures");
  place.hidden = !wanted.length;
  place.dataset.most = wanted.length;
  const [first] = wanted;
  const choose = h("input", { id: "choose", type: "file", accept: "image/*", multiple: wanted.length > 1, class: "hidden", onchange: (event) => { take(event.target.files); event.target.value = ""; } });
  fill(place, first && [
    h("label", { class: "drop", for: "choose" }, choose, h("strong", {}, first[1].title ?? t("Picture")), " ", t("Drag one here, paste it, or choose one.")),
    h("ul", { id: "chosen" })]);
  if (!wanted.length) pictures = [];
  drawChosen();
}

function drawChosen() {
  const list = byId("chosen");
  if (list) fill(list, pictures.map((picture) => picture.element));
}

function take(files) {
  const most = Number(byId("pictures").dataset.most ?? 0);
  if (!most) return say(t("This model takes no picture; choose another model first."), true);
  for (const file of [...files].slice(0, most)) add(file, most);
}

function add(file, most) {
  const picture = { file, fraction: 0 };
  const bar = h("progress", { max: 1, value: 0, "aria-label": t("Upload of {name}", { name: file.name }) });
  const word = h("span", { class: "small" }, `${file.name}, ${bytes(file.size)}`);
  const url = URL.createObjectURL(file);
  const thumb = h("img", { src: url, alt: "", onload: () => URL.revokeObjectURL(url), onerror: () => thumb.remove() });
  picture.element = h("li", {}, thumb, h("div", { class: "grow" }, word, bar),
    button("✕", () => { pictures = pictures.filter((other) => other !== picture); drawChosen(); }, { "aria-label": t("Take {name} out", { name: file.name }) }));
  pictures = [...pictures, picture].slice(-most);
  drawChosen();
  picture.uploaded = api.upload(file, (fraction) => (bar.value = fraction)).then(
    (key) => { picture.key = key; bar.value = 1; },
    (error) => { picture.failed = error; word.textContent = error.message; word.className = "wrong"; bar.remove(); });
}

async function send(event) {
  event.preventDefault();
  if (busy) return;
  busy = true;
  byId("send").setAttribute("aria-disabled", "true");
  byId("refused").textContent = "";
  try {
    await Promise.all(pictures.map((picture) => picture.uploaded));
    const job = await create(body());
    byId("prompt").value = "";
    say(t("It is queued."));
    made(job);
  } catch (error) {
    byId("refused").textContent = `${error.message} (${error.code ?? error.name})`;
  } finally {
    busy = false;
    byId("send")?.removeAttribute("aria-disabled");
  }
}

function body() {
  const inputs = [...byId("slots").querySelectorAll("[name]")].filter((input) => input.value !== "");
  const slots = Object.fromEntries(inputs.map((input) => [input.name.slice(5), valueOf(input)]));
  const unsent = pictures.find((picture) => picture.failed);
  if (unsent) throw unsent.failed;
  return {
    prompt: byId("prompt").value.trim() || undefined,
    model: byId("model").value || undefined,
    slots: inputs.length ? slots : undefined,
    image_key: pictures.length ? pictures.map((picture) => picture.key) : undefined,
  };
}

/** The job. What got no answer is sent again under the same key: it is made once, however often that is. */
async function create(wanted) {
  const text = JSON.stringify(wanted);
  if (sent?.text !== text) sent = { text, key: newKey() };
  try {
    const { id, status } = await api.act("POST", "api/queue/create", wanted, { "Idempotency-Key": sent.key });
    sent = null;
    return { id, status, step: "submit", prompt: wanted.prompt ?? "", model: wanted.model ?? fallback, outputs: [], created_at: new Date(now()).toISOString() };
  } catch (error) {
    if (!error.passing) sent = null;
    throw error;
  }
}

// crypto.randomUUID is there in a secure context only.
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Begin with what another job was made of. */
export function again({ prompt, model }) {
  byId("prompt").value = prompt;
  if (names().includes(model)) byId("model").value = model;
  drawSlots();
  byId("prompt").focus();
}
