// The three ways to talk: instruct, the model's own chat format; chat, a plain transcript; chat-instruct, a transcript
// inside an instruction.

import { postJSON } from "./api.js";
import { chatRequest, serverModel, tokensRequest, wireMessages } from "./prompts.js";
import * as store from "./store.js";
import { idsOf } from "./tokens.js";

const tokenize = async (body) => (await postJSON("tokenize", body)).tokens;

/** The ids of what the model reads before it answers a path. */
export const promptTokens = (conversation, path) => tokenize({ messages: wireMessages(path, conversation.info.system) });

/** The same with an answer behind it. */
export const withAnswerTokens = (conversation, message) =>
  tokenize({ messages: wireMessages(conversation.path(message.id), conversation.info.system), continue_final_message: true, add_generation_prompt: false });

/** The same as text, control tokens as they are written. */
export const promptText = async (conversation, path) => (await postJSON("apply-template", { messages: wireMessages(path, conversation.info.system) })).prompt;

export const answerRequest = async (conversation, path) => chatRequest(conversation, path);

/** What goes on from an answer: from its very tokens where they are known, else from its text. */
export async function continueRequest(conversation, message) {
  const record = await store.get("tokens", message.id);
  if (!message.content) return { request: await answerRequest(conversation, conversation.path(message.parent)) };
  if (!record) return { request: chatRequest(conversation, conversation.path(message.id), true) };
  record.prompt ??= await promptTokens(conversation, conversation.path(message.parent));
  return { request: tokensRequest(idsOf(record)), tokens: record };
}

export const shownName = () => null;
export const shownText = (conversation, message) => message.content;
export const greetingOf = async () => {};
