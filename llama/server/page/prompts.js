// What is asked of the server for an answer: a path and a body, from what the model is to read and the settings.

import { settings } from "./settings.js";
import { chatLogprobs, textLogprobs } from "./tokens.js";

/** What the server tells of its model: filled in by status.js. */
export const serverModel = { id: "model", context: 0, adapters: [], formats: [], stop: [], stopIds: [] };

/** Who answers, where somebody asked for `name`: the adapter, if it is loaded, else the model itself. */
export const answering = (name) => (serverModel.adapters.includes(name) ? name : serverModel.id);

/** What every request has. */
function common() {
  return {
    model: answering(settings.model),
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...settings.sampling,
  };
}

/** A message's text with the files that were attached to it, each in a fence longer than any in it. */
export function contentOf(message) {
  const files = (message.files ?? []).map(({ name, text }) => {
    const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map((run) => run[0].length + 1)));
    return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...files, message.content].filter(Boolean).join("\n\n");
}

/** The messages of a path as OpenAI's API has them. */
export function wireMessages(path, system) {
  const messages = path.map((message) => {
    if (message.role === "tool") return { role: "tool", tool_call_id: message.callId, content: message.content };
    const calls = message.calls?.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    return { role: message.role, content: contentOf(message) || (calls ? null : ""), ...(calls && { tool_calls: calls }) };
  });
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** What follows messages: `what` is {messages} and whether the last of them goes on. */
export function chatRequest(what, { stop = [], ...fields } = {}) {
  const body = { ...common(), ...what, ...fields };
  if (stop.length) body.stop = [...(body.stop ?? []), ...stop];
  if (settings.schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
  if (settings.tools) body.tools = JSON.parse(settings.tools);
  if (settings.keepTokens) Object.assign(body, chatLogprobs);
  return { path: "v1/chat/completions", body };
}

/** What follows a text or token ids; `max_tokens` -1: as much as there is room for. */
export function textRequest(prompt, { stop = [], ...fields } = {}) {
  const body = { max_tokens: -1, ...common(), prompt, ...fields };
  if (stop.length) body.stop = [...(body.stop ?? []), ...stop];
  return { path: "v1/completions", body };
}

/** What of an answer's tokens is asked for in a text's request. */
export const answerTokens = () => (settings.keepTokens ? textLogprobs : {});

/** What follows token ids, ended as an answer of a chat is. */
export function tokensRequest(tokens, { stop = [], ...fields } = {}) {
  const stop_token_ids = [...(settings.sampling.stop_token_ids ?? []), ...serverModel.stopIds];
  return textRequest(tokens, { stop: [...serverModel.stop, ...stop], stop_token_ids, ...answerTokens(), ...fields });
}
