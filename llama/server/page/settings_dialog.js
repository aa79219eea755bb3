// The dialog of the settings: a group of fields each for looks, sampling, presets, shapes and tools.

import { postJSON, ServerError } from "./api.js";
import { askText, openDialog, toast } from "./dialogs.js";
import { download, el, find, icon } from "./dom.js";
import { serverModel } from "./prompts.js";
import { FIELDS, OWN_PRESETS, parsed, presetFrom, presetYaml, setSampling, written } from "./sampling.js";
import { setKey, settings } from "./settings.js";
import { t } from "./words.js";

/** A control with its name above and its meaning below. */
export function field(name, control, hint = "") {
  control.id = `setting-${name}`;
  const meaning = hint && el("small", { id: `hint-${name}` }, hint);
  if (hint) control.setAttribute("aria-describedby", `hint-${name}`);
  return el("div", { class: "field" }, el("label", { for: control.id }, t(`set_${name}`)), control, meaning);
}

function choice(name, options) {
  const select = el("select", { onchange: () => (settings[name] = select.value) }, options.map(([value, label]) => new Option(label, value, false, settings[name] === value)));
  return field(name, select);
}

function flag(name, hint) {
  return field(name, el("input", { type: "checkbox", checked: settings[name], onchange: (event) => (settings[name] = event.target.checked) }), hint);
}

const group = (name, isOpen, ...content) => el("details", { class: "group", open: isOpen, id: `group-${name}` }, el("summary", {}, t(`group_${name}`)), ...content);

// ---- sampling

const NEUTRAL = { temperature: 1, top_p: 1, repetition_penalty: 1 }; // where a slider stands that nobody has moved

function samplingField(name) {
  const [kind, least, most, step] = FIELDS[name];
  const value = settings.sampling[name];
  const row = el("div", { class: "row" });
  if (kind === "flag") return field(name, el("input", { type: "checkbox", checked: value ?? false, onchange: (event) => setSampling(name, event.target.checked || undefined) }), t(`field_${name}`));
  const isLong = kind === "lines" || kind === "biases";
  const input = el(isLong ? "textarea" : "input", {
    ...(isLong ? { rows: 2 } : { type: kind === "ids" ? "text" : "number", min: least, max: kind === "range" ? most : null, step: kind === "number" ? step : "any" }),
    value: written(name, value),
    placeholder: t("unset"),
  });
  const slider = kind === "range" && el("input", { type: "range", min: least, max: most, step, value: value ?? NEUTRAL[name] ?? 0, "aria-label": t(`set_${name}`) });
  const take = () => {
    try {
      setSampling(name, parsed(name, input.value));
      input.setCustomValidity("");
    } catch {
      input.setCustomValidity(t("notUnderstood"));
    }
    input.reportValidity();
  };
  input.addEventListener("change", () => {
    if (slider && input.value) slider.value = input.value;
    take();
  });
  if (!slider) return field(name, input, t(`field_${name}`));
  slider.addEventListener("input", () => {
    input.value = slider.value;
    take();
  });
  const made = field(name, input, t(`field_${name}`));
  input.replaceWith(row);
  row.append(slider, input);
  return made;
}

function presets(again) {
  const all = { ...OWN_PRESETS, ...settings.presets };
  const same = (a, b) => JSON.stringify(Object.entries(a).sort()) === JSON.stringify(Object.entries(b).sort());
  const current = Object.keys(all).find((name) => same(all[name], settings.sampling)) ?? "";
  const options = [["", Object.keys(settings.sampling).length ? t("presetNone") : t("modelsOwn")], ...Object.keys(all).map((name) => [name, name])];
  const select = el("select", { onchange: () => ((settings.sampling = { ...(all[select.value] ?? {}) }), again()) }, options.map(([value, label]) => new Option(label, value, false, value === current)));
  const act = (name, label, onclick) => el("button", { type: "button", onclick, id: `preset-${label}` }, icon(name), t(label));
  const file = el("input", { type: "file", accept: ".yaml,.yml", hidden: true, id: "preset-file", "aria-label": t("import"), onchange: async () => {
    for (const one of file.files) await importPreset(one);
    again();
  } });
  const save = async () => {
    const name = await askText(t("presetName"), select.value);
    if (!name) return;
    settings.presets = { ...settings.presets, [name]: { ...settings.sampling } };
    again();
  };
  const remove = () => {
    const { [select.value]: _, ...rest } = settings.presets;
    settings.presets = rest;
    again();
  };
  return el("div", {}, field("preset", select), el("div", { class: "row wrap" }, act("plus", "save", save), select.value in settings.presets && act("trash", "delete", remove), act("in", "import", () => file.click()), act("out", "exportOne", async () => download(`${select.value || "preset"}.yaml`, await presetYaml(settings.sampling), "application/yaml")), file));
}

async function importPreset(file) {
  try {
    const { sampling, lacking } = await presetFrom(await file.text());
    const name = file.name.replace(/\.ya?ml$/, "");
    settings.presets = { ...settings.presets, [name]: sampling };
    settings.sampling = { ...sampling };
    toast(lacking.length ? t("presetLacks", { name, fields: lacking.join(", ") }) : t("presetTaken", { name }));
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    toast(t("notPreset", { name: file.name }));
  }
}

// ---- instruction templates

const PASTED = "pasted";

/** The model's own template, one of the server's formats, or one in Jinja; how it writes a message is shown. */
function templates() {
  const isPasted = () => settings.template !== "" && !serverModel.formats.includes(settings.template);
  const select = el("select", {}, [["", t("modelsOwn")], ...serverModel.formats.map((name) => [name, name]), [PASTED, t("templatePasted")]].map(([value, label]) => new Option(label, value)));
  const area = el("textarea", { rows: 6, spellcheck: "false", class: "mono", placeholder: "{% for message in messages %}…" });
  const pasted = field("templateText", area, t("hint_templateText"));
  const shown = el("pre", { class: "mono", role: "region", tabindex: "0", "aria-label": t("templateSample") });
  const show = async () => {
    select.value = isPasted() ? PASTED : settings.template;
    area.value = isPasted() ? settings.template : "";
    pasted.hidden = select.value !== PASTED;
    const messages = [{ role: "user", content: t("templateQuestion") }];
    try {
      const { prompt } = await postJSON("apply-template", { messages, ...(settings.template && { chat_template: settings.template }) });
      shown.textContent = prompt;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      shown.textContent = error.message;
    }
  };
  select.addEventListener("change", () => {
    if (select.value === PASTED) {
      pasted.hidden = false;
      return area.focus();
    }
    settings.template = select.value;
    show();
  });
  area.addEventListener("change", () => {
    settings.template = area.value.trim() && area.value;
    show();
  });
  const box = group("template", settings.template !== "", field("template", select, t("hint_template")), pasted, el("p", { class: "note" }, t("templateSample")), shown);
  box.addEventListener("toggle", () => box.open && show());
  return box;
}

// ---- shapes and tools

function jsonBox(name, isRight) {
  const area = el("textarea", { rows: 6, spellcheck: "false", class: "mono", value: settings[name], placeholder: t(`example_${name}`) });
  area.addEventListener("change", () => {
    let isGood = area.value.trim() === "";
    try {
      isGood ||= isRight(JSON.parse(area.value));
    } catch {
      isGood = false;
    }
    area.setCustomValidity(isGood ? "" : t(`bad_${name}`));
    area.reportValidity();
    if (isGood) settings[name] = area.value.trim();
  });
  return field(name, area, t(`hint_${name}`));
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function keys() {
  const rows = ["enter", "shiftEnter", "escape", "up", "ctrlK", "ctrlB", "ctrlO", "ctrlE", "ctrlD"];
  const names = { enter: "Enter", shiftEnter: "Shift+Enter", escape: "Esc", up: "↑", ctrlK: "Ctrl+K", ctrlB: "Ctrl+B", ctrlO: "Ctrl+Shift+O", ctrlE: "Ctrl+Shift+E", ctrlD: "Ctrl+Shift+D" };
  return el("dl", { class: "keys" }, rows.flatMap((row) => [el("dt", {}, el("kbd", {}, names[row])), el("dd", {}, t(`key_${row}`))]));
}

function content(again) {
  const key = el("input", { type: "password", autocomplete: "off", value: settings.apiKey, onchange: () => setKey("apiKey", key.value.trim()) });
  const system = el("textarea", { rows: 3, value: settings.system, onchange: () => (settings.system = system.value) });
  return [
    group("looks", true, choice("language", [["en", "English"], ["zh", "中文"]]), choice("theme", [["system", t("themeSystem")], ["light", t("themeLight")], ["dark", t("themeDark")]]), field("apiKey", key, t("hint_apiKey")), field("system", system), flag("keepTokens", t("hint_keepTokens"))),
    group("sampling", true, presets(again), ...Object.keys(FIELDS).map(samplingField)),
    templates(),
    group("shape", settings.schema !== "", jsonBox("schema", isObject)),
    group("tools", settings.tools !== "", jsonBox("tools", (value) => Array.isArray(value) && value.every((tool) => isObject(tool?.function)))),
    group("keys", false, keys()),
    el("p", { class: "note" }, t("modelIs", { name: serverModel.id, n: serverModel.context })),
  ];
}

export function openSettings() {
  const body = el("div", { class: "settings" });
  const again = () => {
    const open = new Set([...body.querySelectorAll("details[open]")].map((one) => one.id));
    const place = dialog.scrollTop;
    body.replaceChildren(...content(again));
    for (const one of body.querySelectorAll("details")) one.open ||= open.has(one.id);
    dialog.scrollTop = place;
  };
  const dialog = openDialog(t("settings"), body);
  body.append(...content(again));
  body.addEventListener("change", (event) => {
    if (event.target.id !== "setting-language") return;
    find("h2", dialog).textContent = t("settings");
    again();
    find("#setting-language").focus();
  });
}
