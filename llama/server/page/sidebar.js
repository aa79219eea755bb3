// The conversations of this browser: found, opened, named, pinned, deleted, taken out and brought in.

import { answerOf } from "./answers.js";
import { chat, newConversation, openConversation, refresh } from "./chat.js";
import { askText, askWhether, toast } from "./dialogs.js";
import { download, el, find, icon, iconButton } from "./dom.js";
import { settings } from "./settings.js";
import * as store from "./store.js";
import { Conversation, exported, imported } from "./tree.js";
import { t } from "./words.js";

const list = find("#conversations");
const search = find("#search");
let infos = [];
let openMenu = null;

/** Reads them anew and shows them: pinned ones first, then the latest. */
export async function showConversations() {
  infos = (await store.all("conversations")).sort((a, b) => b.pinned - a.pinned || b.updated - a.updated);
  const found = await matching(search.value.trim().toLowerCase());
  list.replaceChildren(...found.map(row));
  if (!found.length && search.value) list.append(el("li", { class: "note" }, t("noneFound")));
}

/** Those whose title or messages hold a text. */
async function matching(wanted) {
  if (!wanted) return infos;
  const holds = new Set((await store.all("messages")).filter((message) => message.content.toLowerCase().includes(wanted)).map((message) => message.conversation));
  return infos.filter((info) => holds.has(info.id) || info.title.toLowerCase().includes(wanted));
}

function row(info) {
  const isCurrent = info.id === chat.conversation?.info.id;
  const title = info.title || t("untitled");
  const open = el("button", { type: "button", class: "open", "aria-current": isCurrent ? "page" : null, onclick: () => openById(info.id) }, info.pinned ? icon("pin") : null, el("span", {}, title));
  const more = iconButton("more", `${t("more")}: ${title}`, () => {
    openMenu = openMenu === info.id ? null : info.id;
    showConversations().then(() => list.querySelector(`[data-id="${info.id}"] .menu button, [data-id="${info.id}"] .more`)?.focus());
  }, { class: "icon more", "aria-expanded": openMenu === info.id });
  const item = el("li", { "data-id": info.id }, el("div", { class: "row" }, open, more));
  if (openMenu === info.id) item.append(menu(info));
  return item;
}

function menu(info) {
  const entry = (name, label, act) => el("button", { type: "button", onclick: () => ((openMenu = null), act(info)) }, icon(name), t(label));
  return el("div", { class: "menu" }, entry("edit", "rename", rename), entry("pin", info.pinned ? "unpin" : "pin", pin), entry("out", "exportOne", exportOne), entry("trash", "delete", removeOne));
}

export async function openById(id) {
  const info = infos.find((one) => one.id === id);
  if (!info) return newConversation();
  const isCurrent = chat.conversation?.info.id === id;
  const running = runningOf(id);
  if (!isCurrent) await openConversation(running ?? (await Conversation.load(info)));
  document.body.classList.remove("with-sidebar");
  await showConversations();
  if (!matchMedia("(pointer: coarse)").matches) find("#composer-text").focus();
}

const opened = new Map(); // conversations whose answers may still be under way

function runningOf(id) {
  const conversation = opened.get(id);
  return conversation && answerOf(conversation) ? conversation : null;
}

/** The conversation itself where it is open: what it holds is newer than what was read. */
const current = (info) => (chat.conversation?.info.id === info.id ? chat.conversation.info : info);

async function changed(info) {
  await store.put("conversations", info);
  await showConversations();
  if (info === chat.conversation?.info) refresh();
}

export async function rename(given) {
  const info = current(given);
  const title = await askText(t("renameTo"), info.title);
  if (title !== null) await changed(Object.assign(info, { title }));
  else await showConversations();
}

async function pin(given) {
  const info = current(given);
  await changed(Object.assign(info, { pinned: !info.pinned }));
}

async function exportOne(info) {
  download(`${info.title || "chat"}.json`, await exported([info]));
  await showConversations();
}

export async function removeOne(info) {
  if (!(await askWhether(t("deleteConversation", { title: info.title || t("untitled") }), t("delete")))) return showConversations();
  if (chat.conversation.info.id === info.id) answerOf(chat.conversation)?.stop();
  await store.removeConversation(info.id);
  if (chat.conversation.info.id === info.id) await newConversation();
  await showConversations();
}

async function importFiles(files) {
  for (const file of files) {
    try {
      toast(t("importedN", { n: await imported(await file.text()) }));
    } catch (error) {
      if (!(error instanceof SyntaxError) && !(error instanceof TypeError)) throw error;
      toast(t("notOurs", { name: file.name }));
    }
  }
  await showConversations();
}

export function toggleSidebar(isShown) {
  const isNarrow = matchMedia("(max-width: 800px)").matches;
  document.body.classList.toggle(isNarrow ? "with-sidebar" : "without-sidebar", isShown);
}

/** Shows what was open when the page was left. */
export async function startSidebar() {
  chat.onchange = () => {
    const { info } = chat.conversation;
    opened.set(info.id, chat.conversation);
    history.replaceState(null, "", `#${info.id}`);
    return showConversations();
  };
  find("#new-chat").addEventListener("click", () => {
    document.body.classList.remove("with-sidebar");
    newConversation();
  });
  search.addEventListener("input", showConversations);
  find("#export").addEventListener("click", async () => download("llama-conversations.json", await exported(infos)));
  find("#import").addEventListener("click", () => find("#import-file").click());
  find("#import-file").addEventListener("change", async (event) => {
    await importFiles([...event.target.files]);
    event.target.value = "";
  });
  for (const id of ["#toggle-sidebar", "#close-sidebar", "#shade"]) find(id).addEventListener("click", () => toggleSidebar());
  await showConversations();
  const wanted = infos.find((info) => info.id === location.hash.slice(1)) ?? infos[0];
  if (wanted && (location.hash || Date.now() - wanted.updated < 3600_000)) await openById(wanted.id);
  else await newConversation();
}
