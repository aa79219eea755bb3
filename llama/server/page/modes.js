// The three ways to talk, as text-generation-webui has them. instruct: the model's own chat format. chat: a transcript
// between two names, which the model goes on with. chat-instruct: that transcript inside an instruction.

import { postJSON } from "./api.js";
import { characterOf } from "./characters.js";
import { answerTokens, chatRequest, contentOf, textRequest, tokensRequest, wireMessages } from "./prompts.js";
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
  return begun ? { messages: [...messages, { role: "assistant", content: begun }], ...CONTINUES } : { messages };
}

/** Where a transcript's other side, or the next answer, would begin. */
const stops = (conversation) => Object.values(names(conversation)).map((name) => `\n${name}:`);

function requestFor(conversation, what) {
  if (what.prompt === undefined) return chatRequest(what, isInstruct(conversation) ? {} : { stop: stops(conversation) });
  return textRequest(what.prompt, { stop: stops(conversation), ...answerTokens() });
}

const tokenized = async (what) => (await postJSON("tokenize", what)).tokens;

/** The ids of what the model reads before it answers a path. */
export const promptTokens = (conversation, path) => tokenized(asked(conversation, path));

/** The same with an answer behind it. */
export const withAnswerTokens = (conversation, message) => tokenized(asked(conversation, conversation.path(message.parent), message.content));

/** The same as text, control tokens as they are written. */
export async function promptText(conversation, path) {
  const what = asked(conversation, path);
  return what.prompt ?? (await postJSON("apply-template", what)).prompt;
}

export const answerRequest = (conversation, path) => requestFor(conversation, asked(conversation, path));

/** What goes on from an answer: from its very tokens where they are known, else from its text. */
export async function continueRequest(conversation, message) {
  const path = conversation.path(message.parent);
  const record = await store.get("tokens", message.id);
  if (!record || !message.content || settings.schema) return { request: requestFor(conversation, asked(conversation, path, message.content)) };
  record.prompt ??= await promptTokens(conversation, path);
  return { request: tokensRequest(idsOf(record), isInstruct(conversation) ? [] : stops(conversation)), tokens: record };
}

/** What follows another token in an answer's place. */
export const pickRequest = (conversation, tokens) => tokensRequest(idsOf(tokens), isInstruct(conversation) ? [] : stops(conversation));

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
