// What is asked of the server for an answer: from a conversation's path and the settings to a path and a body.

import { settings } from "./settings.js";
import { chatLogprobs, textLogprobs } from "./tokens.js";

/** What every request has. */
function common() {
  return {
    model: serverModel.id,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...settings.sampling,
  };
}

/** What the server tells of its model: filled in by status.js. */
export const serverModel = { id: "model", context: 0, stop: [], stopIds: [] };

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

/** The answer that follows a path; with `continues` what follows the path's last message, the model's. */
export function chatRequest(conversation, path, continues = false) {
  const body = { ...common(), messages: wireMessages(path, conversation.info.system) };
  if (continues) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  if (settings.keepTokens) Object.assign(body, chatLogprobs);
  return { path: "v1/chat/completions", body };
}

/** What follows token ids, ended as an answer of a chat is. */
export function tokensRequest(tokens) {
  const { stop = [], stop_token_ids = [], ...sampling } = common();
  const body = {
    max_tokens: -1,
    ...sampling,
    prompt: tokens,
    stop: [...stop, ...serverModel.stop],
    stop_token_ids: [...stop_token_ids, ...serverModel.stopIds],
  };
  if (settings.keepTokens) Object.assign(body, textLogprobs);
  return { path: "v1/completions", body };
}

/** What follows a text. */
export function textRequest(prompt, fields = {}) {
  return { path: "v1/completions", body: { max_tokens: -1, ...common(), prompt, ...fields } };
}
