// The three ways to talk, as text-generation-webui has them. instruct: the model's own chat format. chat: a transcript
// between two names, which the model goes on with. chat-instruct: that transcript inside an instruction.

import { postJSON } from "./api.js";
import { characterOf } from "./characters.js";
import { numTooMany } from "./fitting.js";
import { answering, answerTokens, chatRequest, contentOf, textRequest, tokensRequest, wireMessages } from "./prompts.js";
import { settings } from "./settings.js";
import * as store from "./store.js";
import { idsOf } from "./tokens.js";

export const MODES = ["instruct", "chat", "chat-instruct"];

export const COMMAND = `Continue the chat dialogue below. Write a single reply for the character "<|character|>". Reply directly, without starting the reply with the character name.

<|prompt|>`;

const CONTINUES = { continue_final_message: true, add_generation_prompt: false };

const isInstruct = ({ info }) => (info.mode ?? "instruct") === "instruct";

/** The names of a conversation's two sides. */
function names(conversation) {
  return { user: settings.userName, character: characterOf(conversation.info)?.name ?? "AI" };
}

/** A character's text with the names in their places. */
function filled(text, { user, character }) {
  return text.replaceAll(/\{\{user\}\}|<USER>/gi, user).replaceAll(/\{\{char\}\}|<BOT>/gi, character);
}

/** A message without what belongs to the transcript: the name it begins with, the space before it. */
function spoken(message, { character }) {
  if (message.role !== "assistant") return contentOf(message);
  const text = message.content.trimStart();
  return text.startsWith(`${character}:`) ? text.slice(character.length + 1).trimStart() : text;
}

function transcript(conversation, path) {
  const both = names(conversation);
  const context = filled(characterOf(conversation.info)?.context ?? conversation.info.system, both).trim();
  const lines = path.map((message) => `${message.role === "assistant" ? both.character : both.user}: ${spoken(message, both)}\n`);
  return (context && `${context}\n\n`) + lines.join("");
}

/** What the model is to read: {prompt} or {messages}, as the server takes them; `begun` is the answer's beginning. */
function asked(conversation, path, begun = "") {
  const { info } = conversation;
  const both = names(conversation);
  if (info.mode === "chat") return { prompt: `${transcript(conversation, path)}${both.character}:${begun}` };
  const isGreeted = path[0]?.role === "assistant"; // which is not for the model's own format
  let messages = wireMessages(isGreeted ? path.slice(1) : path, info.system);
  if (info.mode === "chat-instruct") {
    const command = (settings.command || COMMAND).replaceAll("<|character|>", both.character);
    messages = [{ role: "user", content: command.replaceAll("<|prompt|>", () => transcript(conversation, path)) }];
    if (characterOf(info) && info.system) messages.unshift({ role: "system", content: info.system });
  }
  const template = settings.template && { chat_template: settings.template };
  return begun ? { messages: [...messages, { role: "assistant", content: begun }], ...CONTINUES, ...template } : { messages, ...template };
}

/** Where a transcript's other side, or the next answer, would begin. */
const stops = (conversation) => (isInstruct(conversation) ? [] : Object.values(names(conversation)).map((name) => `\n${name}:`));

function requestFor(conversation, what) {
  const fields = { stop: stops(conversation), model: answering(conversation.info.model) };
  if (what.prompt === undefined) return chatRequest(what, fields);
  return textRequest(what.prompt, { ...fields, ...answerTokens() });
}

const tokenized = async (what) => (await postJSON("tokenize", what)).tokens;

/** The messages that a message answers, but for the oldest that it left out. */
const readFor = (conversation, message) => conversation.path(message.parent).slice(message.leftOut ?? 0);

/** The ids of what the model read before an answer. */
export const promptTokens = (conversation, message) => tokenized(asked(conversation, readFor(conversation, message)));

/** The same with the answer behind it. */
export const withAnswerTokens = (conversation, message) => tokenized(asked(conversation, readFor(conversation, message), message.content));

/** The same as text, control tokens as they are written. */
export async function promptText(conversation, message) {
  const what = asked(conversation, readFor(conversation, message));
  return what.prompt ?? (await postJSON("apply-template", what)).prompt;
}

/** {request, leftOut}: what asks for an answer to a path, without the oldest messages where all are more than fit. */
export async function answerRequest(conversation, path) {
  const leftOut = await numTooMany(path, (kept) => asked(conversation, kept));
  return { request: requestFor(conversation, asked(conversation, path.slice(leftOut))), leftOut };
}

/** What goes on from an answer's text. */
const textGoesOn = (conversation, message) => requestFor(conversation, asked(conversation, readFor(conversation, message), message.content));

/** Whether only a chat's request will do: to keep a shape, or to end an answer as a template of one's own does. */
const needsChat = ({ info }) => info.mode !== "chat" && Boolean(settings.schema || settings.template);

/** What goes on from an answer: from its very tokens where they are known, else from its text. */
export async function continueRequest(conversation, message) {
  const record = await store.get("tokens", message.id);
  if (!record || !message.content || needsChat(conversation)) return { request: textGoesOn(conversation, message) };
  record.prompt ??= await promptTokens(conversation, message);
  return { request: pickRequest(conversation, message, record), tokens: record };
}

/** What follows tokens of an answer, of which the last may be another than the model's; the message has their text. */
export function pickRequest(conversation, message, tokens) {
  if (needsChat(conversation)) return textGoesOn(conversation, message);
  return tokensRequest(idsOf(tokens), { stop: stops(conversation), model: answering(conversation.info.model) });
}

/** What an answer's side is called; null where that is the model. */
export const shownName = (conversation) => (isInstruct(conversation) ? null : names(conversation).character);

export const shownPicture = (conversation) => !isInstruct(conversation) && characterOf(conversation.info)?.picture;

export const shownText = (conversation, message) => (isInstruct(conversation) ? message.content : spoken(message, names(conversation)));

/** The character's first words, as the conversation's first message. */
export async function greet(conversation) {
  const greeting = characterOf(conversation.info)?.greeting;
  if (!greeting || isInstruct(conversation)) return;
  await conversation.add(null, { role: "assistant", content: filled(greeting, names(conversation)), finish: "stop" });
}
