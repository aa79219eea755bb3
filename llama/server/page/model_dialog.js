// The dialog of the model: who answers this conversation; and what the server has loaded, which changes for whoever
// has the admin key.

import { getJSON, postJSON, ServerError } from "./api.js";
import { chat, refresh } from "./chat.js";
import { openDialog, toast } from "./dialogs.js";
import { el, setText } from "./dom.js";
import { answering, serverModel } from "./prompts.js";
import { field } from "./settings_dialog.js";
import { readModel } from "./status.js";
import { setKey, settings } from "./settings.js";
import { t } from "./words.js";

/** The model and its adapters, of which this conversation has one; the next conversation begins with it, too. */
function answerers(again) {
  const { info } = chat.conversation;
  const choose = async (name) => {
    info.model = settings.model = name;
    await chat.conversation.saveInfo();
    refresh();
    again();
  };
  const rows = [serverModel.id, ...serverModel.adapters].map((id, i) => {
    const meaning = i ? t("adapterOf", { name: serverModel.id }) : `${t("baseModel")}, ${t("modelFacts", { n: serverModel.context })}`;
    const radio = el("input", { type: "radio", name: "answerer", id: `answerer-${i}`, value: id, checked: answering(info.model) === id, onchange: () => choose(i ? id : "") });
    return el("div", { class: "mode" }, radio, el("label", { for: radio.id }, el("b", {}, id), el("small", {}, meaning)));
  });
  return el("fieldset", { id: "answerers" }, el("legend", {}, t("answeredBy")), rows);
}

// ---- what the server has loaded

/** What the server has to offer: {models, adapters, on: those of them that are loaded}. */
async function offered() {
  try {
    const [{ model_names: models }, { lora_names: adapters }, { lora_names: on }] = await Promise.all(["model/list", "lora/list", "model/info"].map((path) => getJSON(`v1/internal/${path}`)));
    return { models, adapters, on };
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    return { models: [], adapters: [], on: [] }; // the page says already what is wrong
  }
}

/** A button that has the server change something, which may take long; what came of it is told. */
function changer(label, note, path, body, { now = "", done = "" }, again) {
  const button = el("button", {
    type: "button",
    onclick: async () => {
      const form = button.closest(".settings");
      const said = done(); // of what is chosen now
      setText(note, now());
      form.disabled = true; // what is chosen meanwhile would be lost: all of it is about to be made anew
      try {
        await postJSON(`v1/internal/${path}`, body());
        await readModel().catch(() => {}); // without a model there is nothing to read
        await again();
        toast(said);
      } catch (error) {
        if (!(error instanceof ServerError)) throw error;
        setText(note, t("failed", { why: error.message }));
      } finally {
        form.disabled = false;
      }
    },
  }, label);
  return button;
}

function models({ models }, note, again) {
  const select = el("select", {}, models.map((name) => new Option(name, name, false, name === serverModel.id)));
  const name = () => ({ name: select.value });
  const load = changer(t("loadModel"), note, "model/load", () => ({ model_name: select.value, args: {}, settings: {} }), { now: () => t("loading", name()), done: () => t("loaded", name()) }, again);
  const unload = changer(t("unloadModel"), note, "model/unload", () => ({}), { now: () => t("thinking"), done: () => t("unloaded") }, again);
  load.id = "load-model";
  unload.id = "unload-model";
  return el("div", {}, field("otherModel", select, t("hint_otherModel")), el("div", { class: "row end" }, unload, load));
}

function adapters({ adapters, on }, note, again) {
  const boxes = adapters.map((name) => el("input", { type: "checkbox", value: name, id: `adapter-${name}`, checked: on.includes(name) }));
  const chosen = () => boxes.filter((box) => box.checked).map((box) => box.value);
  const rows = boxes.map((box) => el("div", { class: "mode" }, box, el("label", { for: box.id }, box.value)));
  const names = () => ({ name: chosen().join(", ") || "–" });
  const load = changer(t("switchAdapters"), note, "lora/load", () => ({ lora_names: chosen() }), { now: () => t("loading", names()), done: () => t("loaded", names()) }, again);
  load.id = "load-adapters";
  return el("fieldset", {}, el("legend", {}, t("serverAdapters")), rows, el("small", {}, t("hint_serverAdapters")), el("div", { class: "row end" }, load));
}

function adminKey() {
  const key = el("input", { type: "password", autocomplete: "off", value: settings.adminKey, onchange: () => setKey("adminKey", key.value.trim()) });
  return field("adminKey", key, t("hint_adminKey"));
}

async function content(again) {
  const offer = await offered();
  const note = el("p", { class: "note", role: "status" });
  const changes = [offer.models.some((name) => name !== serverModel.id) && models(offer, note, again), offer.adapters.length > 0 && adapters(offer, note, again)].filter(Boolean);
  return [answerers(again), ...(changes.length ? [...changes, note, adminKey()] : [])];
}

export async function openModel() {
  const body = el("fieldset", { class: "settings" });
  const again = async () => body.replaceChildren(...(await content(again)));
  body.append(answerers(again)); // at once; what the server offers follows
  openDialog(t("model"), body);
  await again();
}
