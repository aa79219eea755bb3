// What opens below an answer: its tokens with what else the model thought of, and its raw text.

import { postJSON, ServerError } from "./api.js";
import { bars, tokenRow } from "./bars.js";
import { el } from "./dom.js";
import { promptText, promptTokens, withAnswerTokens } from "./modes.js";
import { answering } from "./prompts.js";
import * as store from "./store.js";
import { kept, textLogprobs } from "./tokens.js";
import { t } from "./words.js";

/** How likely a model finds each of some tokens: [id, bytes, logprob, alternatives] of those from `start` on. */
export async function scored(tokens, start, model) {
  const body = { model, prompt: tokens, max_tokens: 0, echo: true, ...textLogprobs };
  const { choices } = await postJSON("v1/completions", body);
  return choices[0].logprobs.content.slice(start).map((entry) => (entry ? kept(entry) : [tokens[0], [], null, []]));
}

function commonLength(a, b) {
  let i = 0;
  while (i < a.length && a[i] === b[i]) i++;
  return i;
}

/** What is known of an answer's tokens; where nothing was kept, the server is asked. */
export async function tokensOf(conversation, message) {
  const record = await store.get("tokens", message.id);
  if (record?.prompt) return record;
  const prompt = await promptTokens(conversation, message);
  if (record) return { ...record, prompt };
  const all = await withAnswerTokens(conversation, message);
  const start = commonLength(prompt, all);
  return { prompt: all.slice(0, start), tokens: await scored(all, start, answering(conversation.info.model)) };
}

async function filled(panel, work) {
  panel.replaceChildren(el("p", { class: "note" }, t("thinking")));
  try {
    panel.replaceChildren(...(await work()));
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    panel.replaceChildren(el("p", { class: "note bad" }, t("failed", { why: error.message })));
  }
}

/** `pick` gets the message and its tokens up to the one that was chosen. */
export function openTokens(panel, conversation, message, pick) {
  return filled(panel, async () => {
    const { prompt, tokens } = await tokensOf(conversation, message);
    const place = el("div", { class: "alternatives", "aria-live": "polite" }, el("p", { class: "note" }, t("openToken")));
    const row = tokenRow(tokens, (i) => {
      const chosen = tokens[i];
      const take = ([id, bytes, logprob]) => pick(message, { prompt, tokens: [...tokens.slice(0, i), [id, bytes, logprob, chosen[3]]] });
      place.replaceChildren(bars(chosen[3], chosen, take));
      place.scrollIntoView({ block: "nearest" });
    });
    const ids = el("input", { type: "checkbox", onchange: () => row.classList.toggle("with-ids", ids.checked) });
    return [el("label", { class: "row" }, ids, t("tokenIds")), row, place];
  });
}

export function openRaw(panel, conversation, message) {
  return filled(panel, async () => [
    el("h3", {}, t("promptAsSent")),
    el("pre", { tabindex: "0" }, await promptText(conversation, message)),
    el("h3", {}, t("answerAsCame")),
    el("pre", { tabindex: "0" }, message.content),
  ]);
}
