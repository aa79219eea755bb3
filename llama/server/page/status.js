// The server's state in words, asked for again and again, and what it tells of its model.

import { getJSON, ServerError, wait } from "./api.js";
import { find } from "./dom.js";
import { serverModel } from "./prompts.js";
import { onSetting, settings } from "./settings.js";
import { t } from "./words.js";

const CALM = 5; // seconds between two looks while all is well
const WORRIED = 1;

let state = "ok";

function show(next) {
  state = next;
  const line = find("#state");
  line.hidden = next === "ok";
  line.textContent = next === "ok" ? "" : t({ loading: "stateLoading", draining: "stateDraining", gone: "stateGone", locked: "stateLocked" }[next]);
}

async function look() {
  try {
    await getJSON("health");
    if (!serverModel.context || state !== "ok") await readModel();
    return "ok";
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status === 401) return "locked";
    if (error.status === 503) return error.message === "Loading model" ? "loading" : "draining";
    return "gone";
  }
}

async function readModel() {
  const [{ data }, props] = await Promise.all([getJSON("v1/models"), getJSON("props")]);
  const chosen = data.find((model) => model.id === settings.model) ?? data[0];
  Object.assign(serverModel, {
    id: chosen.id,
    context: chosen.max_model_len ?? data[0].max_model_len,
    stop: props.stop ?? [],
    stopIds: props.stop_token_ids ?? [],
    template: props.chat_template,
  });
  const select = find("#model");
  select.hidden = data.length < 2;
  select.replaceChildren(...data.map((model) => new Option(model.id, model.id, false, model.id === chosen.id)));
  const name = find("#model-name");
  name.hidden = !select.hidden;
  name.textContent = name.title = chosen.id;
  document.dispatchEvent(new Event("server-model"));
}

/** Looks for as long as the page is open. */
export async function watchServer() {
  find("#model").addEventListener("change", (event) => {
    settings.model = event.target.value;
    readModel();
  });
  onSetting(async (name) => {
    if (name === "language") show(state);
    if (name === "apiKey") show(await look());
  });
  for (;;) {
    if (!document.hidden) show(await look());
    await wait(state === "ok" ? CALM : WORRIED);
  }
}
