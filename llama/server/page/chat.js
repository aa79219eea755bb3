// The chat: the conversation that is open, its composer, and all that can be done with its messages.

import { Answer, answerOf } from "./answers.js";
import { askLines, askWhether, toast } from "./dialogs.js";
import { el, find, fit, icon, iconButton, perFrame, setText } from "./dom.js";
import { MessageView } from "./message.js";
import { answerRequest, continueRequest, greet, pickRequest, shownName, shownPicture, shownText } from "./modes.js";
import { answering, serverModel } from "./prompts.js";
import { settings } from "./settings.js";
import * as store from "./store.js";
import { Conversation } from "./tree.js";
import { joined } from "./tokens.js";
import { t } from "./words.js";

const MOST_FILE_BYTES = 1 << 20;
const NEAR_END = 60; // pixels: whoever is so near to the end follows what is written
const PAUSE = 40; // milliseconds between two looks at an answer that is being written
const isTouch = matchMedia("(pointer: coarse)");

const scroll = find("#scroll");
const list = find("#messages");
const text = find("#composer-text");

export const chat = {
  conversation: null,
  views: new Map(), // by message id
  files: [],
  onchange: () => {}, // of conversations: the sidebar's
};

let follows = true;

// ---- what is shown

export async function openConversation(conversation) {
  chat.conversation = conversation;
  follows = true;
  near.disconnect();
  chat.views.clear();
  list.replaceChildren();
  find("#system-text").value = conversation.info.system;
  find("#system").open = false;
  refresh();
  toEnd();
}

/** Makes the list of messages what the conversation's path is. */
export function refresh() {
  const { conversation, views } = chat;
  const path = conversation.path();
  const shown = new Set(path.map((message) => message.id));
  for (const [id, view] of views) {
    if (shown.has(id)) continue;
    near.unobserve(view.node);
    view.node.remove();
    views.delete(id);
  }
  let before = null;
  for (const message of path) {
    let view = views.get(message.id);
    if (!view) {
      view = new MessageView(conversation, message, actions);
      views.set(message.id, view);
      near.observe(view.node);
    } else if (view.isRendered) {
      view.render();
    }
    const place = before ? before.nextSibling : list.firstChild;
    if (place !== view.node) list.insertBefore(view.node, place);
    before = view.node;
  }
  find("#title").textContent = conversation.info.title || t("untitled");
  document.title = `${conversation.info.title || t("untitled")} · llama`;
  showModel();
  find("#empty").hidden = path.length > 0;
  find("#system").classList.toggle("given", conversation.info.system !== "");
  for (const message of path.slice(-4)) draw(views.get(message.id));
  showBusy();
}

/** Messages are drawn when they come near to what is seen: until then they are plain text. */
const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      waiting.push(entry.target.dataset.id);
    }
    drawSome();
  },
  { root: scroll, rootMargin: "1500px 0px" },
);
const waiting = [];

function drawSome() {
  const end = performance.now() + 8; // milliseconds of a frame
  while (waiting.length && performance.now() < end) draw(chat.views.get(waiting.shift()));
  if (waiting.length) requestAnimationFrame(drawSome);
}

function draw(view) {
  if (!view || view.isRendered) return;
  near.unobserve(view.node);
  view.render();
}

function showBusy() {
  const isBusy = answerOf(chat.conversation) !== undefined;
  find("#send").hidden = isBusy;
  find("#stop-answer").hidden = !isBusy;
  list.classList.toggle("answering", isBusy); // meanwhile some buttons are hidden
  showContext(chat.conversation.path().findLast((message) => message.stats)?.stats);
}

/** Who answers next, once the server has told what there is. */
export function showModel() {
  if (serverModel.context) setText(find("#model-name"), answering(chat.conversation.info.model));
}

function showContext(stats) {
  setText(find("#context"), stats && serverModel.context ? t("contextUsed", { used: stats.promptTokens + stats.tokens, all: serverModel.context }) : "");
}

const follow = perFrame(() => {
  const answer = answerOf(chat.conversation);
  if (!answer) return showBusy();
  chat.views.get(answer.message.id)?.update();
  showContext(answer.message.stats);
  if (follows) toEnd(); // last: it asks for what all of the above has come to
}, PAUSE);

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
}

scroll.addEventListener("scroll", () => {
  follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END;
  find("#to-end").hidden = follows;
});

// ---- answers

async function answer(conversation, message, request, tokens) {
  const run = new Answer(conversation, message, request, () => conversation === chat.conversation && follow(), tokens);
  const running = run.run();
  if (conversation === chat.conversation) refresh();
  follow();
  try {
    await running;
  } finally {
    if (conversation === chat.conversation) {
      refresh();
      if (follows) toEnd(); // how it ended stands below it
    }
    chat.onchange();
  }
}

/** Has a new answer written below a message. */
async function answerTo(parent) {
  const { conversation } = chat;
  follows = true;
  const { request, leftOut } = await answerRequest(conversation, conversation.path(parent.id));
  const message = await conversation.add(parent.id, { role: "assistant", model: request.body.model, ...(leftOut && { leftOut }) });
  await answer(conversation, message, request);
}

async function send() {
  const { conversation } = chat;
  const content = text.value.trim();
  if ((!content && !chat.files.length) || answerOf(conversation)) return;
  if (!conversation.info.title) conversation.info.title = titleOf(content || chat.files[0].name);
  const files = chat.files.splice(0);
  text.value = "";
  fit(text);
  showFiles();
  const message = await conversation.add(conversation.info.leaf, { role: "user", content, ...(files.length && { files }) });
  chat.onchange();
  refresh();
  await answerTo(message);
}

function titleOf(content) {
  const line = content.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57)}…` : line;
}

export function stop() {
  answerOf(chat.conversation)?.stop();
  text.focus();
}

// ---- what a message's buttons do

const panels = () => import("./panels.js");

const actions = {
  answerName: () => shownName(chat.conversation),
  answerPicture: () => shownPicture(chat.conversation),
  shown: (message) => shownText(chat.conversation, message),

  async copy(message) {
    await navigator.clipboard.writeText(message.content);
    toast(t("copied"));
  },

  edit: (message, view) => view.edit(),

  async save(message, content) {
    if (content !== message.content) Object.assign(message, { content, ...(message.role === "assistant" && { finish: "edited" }) });
    await forget(message);
    await chat.conversation.save(message);
    refresh();
  },

  /** The text in place of the message, beside it, and an answer to that. */
  async saveSend(message, content) {
    const sibling = await chat.conversation.add(message.parent, { role: message.role, content, ...(message.files && { files: message.files }) });
    refresh();
    await answerTo(sibling);
  },

  async saveOn(message, content) {
    await actions.save(message, content);
    await actions.goOn(message);
  },

  async regenerate(message) {
    const { conversation } = chat;
    const path = conversation.path(message.parent);
    if (path.length) await answerTo(path.at(-1));
  },

  async goOn(message) {
    const { conversation } = chat;
    conversation.info.leaf = message.id;
    const { request, tokens } = await continueRequest(conversation, message);
    await answer(conversation, message, request, tokens);
  },

  async show(sibling, view) {
    await chat.conversation.show(sibling);
    refresh();
    chat.views.get(sibling.id)?.tools.querySelector("button:not(:disabled)")?.focus();
  },

  async branch(message) {
    const made = await chat.conversation.branch(message);
    await openConversation(made);
    chat.onchange();
  },

  async remove(message) {
    if (!(await askWhether(t("deleteMessage"), t("delete")))) return;
    await chat.conversation.cut(message);
    refresh();
    text.focus();
  },

  async giveResult(message, call) {
    const content = await askLines(t("giveResult", { name: call.name }), "");
    if (content === null) return;
    const { conversation } = chat;
    const path = conversation.path();
    const result = await conversation.add(path.at(-1).id, { role: "tool", content, callId: call.id });
    const given = new Set(conversation.path().map((one) => one.callId));
    refresh();
    if (message.calls.every((one) => given.has(one.id))) await answerTo(result);
  },

  openTokens: (message, view) => view.togglePanel("tokens", async (panel) => (await panels()).openTokens(panel, chat.conversation, message, pick)),
  openRaw: (message, view) => view.togglePanel("raw", async (panel) => (await panels()).openRaw(panel, chat.conversation, message)),
};

/** Another token in an answer's place, and what the model makes of it: a new version. */
async function pick(message, tokens) {
  const { conversation } = chat;
  if (answerOf(conversation)) return;
  const isEnd = serverModel.stopIds.includes(tokens.tokens.at(-1)[0]);
  if (isEnd) tokens.tokens.pop();
  const content = joined(tokens.tokens.map(([, bytes]) => bytes), true);
  const { model, leftOut } = message;
  const sibling = await conversation.add(message.parent, { role: "assistant", model, leftOut, content, finish: isEnd ? "stop" : null });
  if (!isEnd) return answer(conversation, sibling, pickRequest(conversation, sibling, tokens), tokens);
  await store.put("tokens", { ...tokens, id: sibling.id, conversation: conversation.info.id });
  refresh();
}

/** What is known of the tokens of a message that a person changed holds no more. */
async function forget(message) {
  await store.remove("tokens", message.id);
  message.stats = null;
}

// ---- the composer

async function take(files) {
  for (const file of files) {
    const content = file.size <= MOST_FILE_BYTES ? await file.text() : "\0";
    if (content.includes("\0") || content.includes("\ufffd")) toast(t("notText", { name: file.name, size: MOST_FILE_BYTES >> 10 }));
    else chat.files.push({ name: file.name, text: content });
  }
  showFiles();
}

function showFiles() {
  const node = find("#files");
  node.hidden = !chat.files.length;
  node.replaceChildren(...chat.files.map((file, i) => el("li", {}, icon("clip"), file.name, iconButton("close", t("removeFile", { name: file.name }), () => {
    chat.files.splice(i, 1);
    showFiles();
    text.focus();
  }))));
}

export function startChat() {
  find("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  text.addEventListener("input", () => fit(text));
  text.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return; // Enter chooses a word of an input method
    if (event.key === "Enter" && !event.shiftKey && !(isTouch.matches && !event.ctrlKey)) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && text.value === "") {
      const last = chat.conversation.path().findLast((message) => message.role === "user");
      if (last) chat.views.get(last.id).edit();
    }
  });
  find("#stop-answer").addEventListener("click", stop);
  find("#to-end").addEventListener("click", () => {
    follows = true;
    toEnd();
  });
  find("#attach").addEventListener("click", () => find("#attach-file").click());
  find("#attach-file").addEventListener("change", async (event) => {
    await take([...event.target.files]);
    event.target.value = "";
    text.focus();
  });
  text.addEventListener("paste", (event) => event.clipboardData.files.length && (event.preventDefault(), take([...event.clipboardData.files])));
  const composer = find("#chat");
  composer.addEventListener("dragover", (event) => event.preventDefault());
  composer.addEventListener("drop", (event) => {
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
  find("#system-text").addEventListener("input", (event) => {
    chat.conversation.info.system = event.target.value;
    chat.conversation.saveInfo();
    find("#system").classList.toggle("given", event.target.value !== "");
  });
  document.addEventListener("server-model", () => chat.conversation && refresh());
}

export async function newConversation() {
  const conversation = Conversation.fresh({ system: settings.system, mode: settings.mode, character: settings.character, model: settings.model });
  const greeted = greet(conversation); // it is there at once, and saved in a moment: what is typed meanwhile belongs here
  await openConversation(conversation);
  text.focus();
  await greeted;
  chat.onchange();
}
