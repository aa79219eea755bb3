// A conversation: a tree of messages, of which one path is shown. A message that is changed or answered anew gets a
// sibling, and nothing is lost.

import { newId } from "./dom.js";
import * as store from "./store.js";

export class Conversation {
  /** info: {id, title, created, updated, pinned, leaf, system, mode, character, model}; leaf: the last message shown. */
  constructor(info, messages = []) {
    this.info = info;
    this.messages = new Map(messages.map((message) => [message.id, message]));
  }

  static fresh(fields = {}) {
    const now = Date.now();
    return new Conversation({ id: newId(), title: "", created: now, updated: now, pinned: false, leaf: null, system: "", ...fields });
  }

  static async load(info) {
    return new Conversation(info, await store.ofConversation("messages", info.id));
  }

  /** The messages that are shown, from the first one on; with `leaf` those that lead to it. */
  path(leaf = this.info.leaf) {
    const found = [];
    for (let at = this.messages.get(leaf); at; at = this.messages.get(at.parent)) found.unshift(at);
    return found;
  }

  children(parent) {
    return [...this.messages.values()].filter((message) => message.parent === parent).sort((a, b) => a.created - b.created);
  }

  siblings(message) {
    return this.children(message.parent);
  }

  /** Puts a message below `parent` and shows it. */
  async add(parent, fields) {
    const latest = Math.max(0, ...this.children(parent).map((message) => message.created));
    const message = { id: newId(), conversation: this.info.id, parent, created: Math.max(Date.now(), latest + 1), content: "", ...fields };
    this.messages.set(message.id, message);
    this.info.leaf = message.id;
    await Promise.all([this.save(message), this.saveInfo(true)]);
    return message;
  }

  /** Shows a message, and below it what was last said there. */
  async show(message) {
    let leaf = message;
    for (let next = this.children(leaf.id); next.length; next = this.children(leaf.id)) leaf = next.at(-1);
    this.info.leaf = leaf.id;
    await this.saveInfo();
  }

  /** Takes a message out, with all that was said below it. */
  async cut(message) {
    const others = this.siblings(message).filter((other) => other !== message);
    const gone = [message];
    for (let i = 0; i < gone.length; i++) gone.push(...this.children(gone[i].id));
    for (const one of gone) this.messages.delete(one.id);
    await Promise.all(gone.flatMap((one) => [store.remove("messages", one.id), store.remove("tokens", one.id)]));
    if (others.length) return this.show(others.at(-1));
    this.info.leaf = message.parent;
    await this.saveInfo();
  }

  save(message) {
    return store.put("messages", message);
  }

  saveInfo(isUpdated = false) {
    if (isUpdated) this.info.updated = Date.now();
    return store.put("conversations", this.info);
  }

  /** The path to a message as a conversation of its own, which is saved. */
  async branch(message) {
    const made = Conversation.fresh({ ...this.info, id: newId(), created: Date.now(), pinned: false });
    let parent = null;
    for (const one of this.path(message.id)) {
      const copy = { ...one, id: newId(), conversation: made.info.id, parent };
      made.messages.set(copy.id, copy);
      parent = copy.id;
    }
    made.info.leaf = parent;
    await store.putAll("messages", [...made.messages.values()]);
    await made.saveInfo(true);
    return made;
  }
}

const VERSION = 1;

/** Conversations as one text, for `imported`. */
export async function exported(infos) {
  const conversations = [];
  for (const info of infos) conversations.push({ ...info, messages: await store.ofConversation("messages", info.id) });
  return JSON.stringify({ format: "llama-conversations", version: VERSION, conversations }, null, 1);
}

const text = (value) => (typeof value === "string" ? value : "");

/** Saves what such a text holds under new ids; returns how many conversations it were. Raises SyntaxError for any other. */
export async function imported(json) {
  const data = JSON.parse(json);
  if (data?.format !== "llama-conversations" || !Array.isArray(data.conversations)) throw new SyntaxError("no conversations");
  for (const { messages, ...given } of data.conversations) {
    const ids = new Map([[null, null]]);
    for (const message of messages) ids.set(message.id, newId());
    const made = Conversation.fresh({ ...given, id: newId(), title: text(given.title), system: text(given.system) });
    made.info.leaf = ids.get(given.leaf) ?? null;
    const kept = messages.map((message) => ({
      ...message,
      id: ids.get(message.id),
      parent: ids.get(message.parent) ?? null,
      conversation: made.info.id,
      content: text(message.content),
      role: ["user", "assistant", "tool"].includes(message.role) ? message.role : "user",
    }));
    await store.putAll("messages", kept);
    await store.put("conversations", made.info);
  }
  return data.conversations.length;
}
