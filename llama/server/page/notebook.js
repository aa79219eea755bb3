// Notebook and split: a text that the model goes on with, in one box or beside its prompt.

import { patientStream, postJSON, ServerError } from "./api.js";
import { bars, tokenRow } from "./bars.js";
import { el, find, icon, perFrame } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { numbersOf } from "./message.js";
import { scored } from "./panels.js";
import { answering, textRequest } from "./prompts.js";
import { onSetting, settings } from "./settings.js";
import { joined, kept, textLogprobs } from "./tokens.js";
import { t, translate } from "./words.js";

const place = find("#notebook");
const prompt = el("textarea", { id: "notebook-text", spellcheck: "false", "data-t-label": "notebook", "data-t-placeholder": "notebookHint" });
const output = el("textarea", { id: "output-text", spellcheck: "false", "data-t-label": "output", "data-t-placeholder": "outputHint" });
const numbers = el("p", { class: "numbers" });
const note = el("p", { class: "note", role: "status" });
const side = el("div", { class: "panel", id: "next" });
const undone = []; // before each change: the box, what it held, and what the model was given
let aborter = null;
let stats = null; // of the last text

const isSplit = () => settings.view === "split";
/** The box that the model writes into. */
const target = () => (isSplit() ? output : prompt);

function button(name, label, onclick) {
  return el("button", { type: "button", id: `notebook-${label}`, onclick }, icon(name), el("span", { "data-t": label }));
}

const generate = button("send", "generate", () => write(prompt.value));
const goOn = button("onward", "goOn", () => write(target().value, target().value));
const again = button("again", "regenerateText", () => {
  const { from, kept: keptText } = undone.at(-1);
  undo();
  write(from, keptText);
});
const back = button("undo", "undo", undo);
const stopper = button("stop", "stop", () => aborter?.abort());
const looks = ["next", "tokens", "rendered"];
let look = "next";

/** Has the model go on from `from`; what comes stands behind `kept` in its box. */
async function write(from, keptText = isSplit() ? from : prompt.value) {
  if (aborter || !from) return;
  const box = target();
  undone.push({ box, value: box.value, from, kept: keptText });
  aborter = new AbortController();
  note.textContent = t("thinking");
  note.classList.remove("bad");
  let text = keptText;
  let first = 0;
  let usage = null;
  const asked = performance.now();
  const show = perFrame(() => {
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    box.value = text;
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  });
  showBusy();
  try {
    const request = textRequest(from);
    for await (const chunk of patientStream(request.path, request.body, aborter.signal, (error) => (note.textContent = error.message))) {
      first ||= performance.now();
      note.textContent = "";
      text += chunk.choices[0]?.text ?? "";
      usage = chunk.usage ?? usage;
      show();
    }
  } catch (error) {
    if (error instanceof ServerError) {
      note.textContent = t("failed", { why: error.message });
      note.classList.add("bad");
    } else if (error.name === "AbortError") note.textContent = t("stopped");
    else throw error;
  }
  box.value = text;
  aborter = null;
  if (usage) {
    const seconds = (performance.now() - first) / 1000;
    stats = { promptTokens: usage.prompt_tokens, cachedTokens: usage.prompt_tokens_details.cached_tokens, tokens: usage.completion_tokens, firstAfter: (first - asked) / 1000, seconds };
    showNumbers();
  }
  keep();
  showBusy();
  showLook();
}

function showNumbers() {
  numbers.textContent = stats ? numbersOf(stats) : "";
}

function undo() {
  const last = undone.pop();
  if (!last || aborter) return;
  last.box.value = last.value;
  keep();
  showBusy();
  showLook();
}

function keep() {
  settings.notebook = prompt.value;
  settings.output = output.value;
}

function showBusy() {
  const isBusy = aborter !== null;
  for (const one of [generate, goOn, back, again]) one.disabled = isBusy;
  back.disabled = again.disabled = isBusy || !undone.length;
  goOn.hidden = !isSplit();
  stopper.hidden = !isBusy;
  for (const box of [prompt, output]) box.readOnly = isBusy;
}

// ---- what the model thinks of the text

async function showLook() {
  for (const tab of place.querySelectorAll("[data-look]")) tab.setAttribute("aria-pressed", tab.dataset.look === look);
  const text = isSplit() && output.value ? output.value : prompt.value;
  if (!text || aborter) return side.replaceChildren();
  try {
    await { next: showNext, tokens: showTokens, rendered: showRendered }[look](text);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    side.replaceChildren(el("p", { class: "note bad" }, t("failed", { why: error.message })));
  }
}

async function showNext(text) {
  const { path, body } = textRequest(text, { max_tokens: 1, min_tokens: 0, ...textLogprobs, logprobs: 20, ignore_eos: true });
  delete body.stream_options;
  const { choices } = await postJSON(path, body);
  const [, , , alternatives] = kept(choices[0].logprobs.content[0]);
  side.replaceChildren(bars(alternatives, null, ([, bytes]) => insert(text, bytes)));
}

/** A token behind the text; then what may follow that. */
function insert(text, bytes) {
  const box = isSplit() && output.value ? output : prompt;
  undone.push({ box, value: box.value, from: box.value, kept: box.value });
  box.value = text + joined([bytes]);
  keep();
  showBusy();
  showLook();
}

async function showTokens(text) {
  const { tokens } = await postJSON("tokenize", { prompt: text });
  const known = await scored(tokens, 0, answering(settings.model));
  known[0][0] = tokens[0];
  const below = el("div", { class: "alternatives" }, el("p", { class: "note" }, t("openToken")));
  const starts = [0];
  for (const [, bytes] of known) starts.push(starts.at(-1) + bytes.length);
  const bytes = new TextEncoder().encode(text);
  const offset = bytes.length - starts.at(-1); // a tokenizer may begin with a space of its own
  const row = tokenRow(known, (i) => {
    const before = new TextDecoder().decode(bytes.slice(0, Math.max(0, starts[i] + offset)));
    below.replaceChildren(bars(known[i][3], known[i], ([, chosen]) => (insert(before, chosen), write(target().value, target().value))));
  });
  row.classList.add("with-ids");
  side.replaceChildren(el("p", { class: "note" }, t("numTokens", { n: tokens.length })), row, below);
}

async function showRendered(text) {
  const node = el("div", { class: "prose" });
  side.replaceChildren(node);
  new MarkdownView(node).update(text);
}

function arrange() {
  place.classList.toggle("split", isSplit());
  output.hidden = !isSplit();
  showBusy();
  if (settings.view !== "chat") showLook();
}

export function startNotebook() {
  const tab = (name) => el("button", { type: "button", "data-look": name, "data-t": `look_${name}`, onclick: () => ((look = name), showLook()) });
  place.append(
    el("div", { class: "boxes" }, prompt, output),
    el("div", { class: "row bar-of-buttons" }, generate, goOn, stopper, back, again, el("span", { class: "space" }), numbers),
    note,
    el("div", { class: "row looks", role: "group", "data-t-label": "look" }, looks.map(tab)),
    side,
  );
  translate(place);
  prompt.value = settings.notebook;
  output.value = settings.output;
  let later = 0;
  for (const box of [prompt, output])
    box.addEventListener("input", () => {
      clearTimeout(later);
      later = setTimeout(() => (keep(), look === "rendered" && showLook()), 500);
    });
  place.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate.click();
    else if (event.key === "Escape" && aborter) aborter.abort();
    else return;
    event.preventDefault();
  });
  onSetting((name) => ({ view: arrange, language: () => (showNumbers(), showLook()) })[name]?.());
  arrange();
}
