// The server's state in words, asked for again and again, and what it tells of its model.

import { getJSON, ServerError, wait } from "./api.js";
import { find } from "./dom.js";
import { serverModel } from "./prompts.js";
import { onSetting } from "./settings.js";
import { t } from "./words.js";

const CALM = 5; // seconds between two looks while all is well
const WORRIED = 1;

let state = "ok";

function show(next) {
  state = next;
  const line = find("#state");
  line.hidden = next === "ok";
  line.textContent = next === "ok" ? "" : t(`state_${next}`);
}

async function look() {
  try {
    await readModel();
    return "ok";
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status === 401) return "locked";
    return error.passing ?? "gone";
  }
}

/** Learns which model and adapters are loaded: somebody else may have changed that. */
export async function readModel() {
  const { data } = await getJSON("v1/models");
  const model = data.find(({ status, parent }) => status.value === "loaded" && !parent);
  const adapters = data.filter(({ parent }) => parent === model.id).map(({ id }) => id);
  if (serverModel.created === model.created && serverModel.adapters.join() === adapters.join()) return;
  const { chat_formats: formats = [], stop, stop_token_ids: stopIds } = await getJSON("props");
  Object.assign(serverModel, { id: model.id, created: model.created, context: model.max_model_len, adapters, formats, stop, stopIds });
  document.dispatchEvent(new Event("server-model"));
}

/** Looks for as long as the page is open. */
export async function watchServer() {
  onSetting(async (name) => {
    if (name === "language") show(state);
    if (name === "apiKey") show(await look());
  });
  for (;;) {
    if (!document.hidden) show(await look());
    await wait(state === "ok" ? CALM : WORRIED);
  }
}
