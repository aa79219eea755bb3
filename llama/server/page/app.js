// The page: what stands in it starts here, and the keys that work everywhere. What is not seen at first, dialogs, the
// notebook, tokens, formulas, colours, comes when it is first wanted.

import { chat, newConversation, refresh, startChat, stop } from "./chat.js";
import { answerOf } from "./answers.js";
import { loadCharacters } from "./characters.js";
import { find } from "./dom.js";
import { loadMarkdown } from "./message.js";
import { onSetting, settings } from "./settings.js";
import { removeOne, rename, showConversations, startSidebar, toggleSidebar } from "./sidebar.js";
import { watchServer } from "./status.js";
import { startViews } from "./views.js";
import { startWords } from "./words.js";

const KEYS = {
  "ctrl+shift+o": () => newConversation(),
  "ctrl+shift+e": () => rename(chat.conversation.info),
  "ctrl+shift+d": () => removeOne(chat.conversation.info),
  "ctrl+k": () => {
    toggleSidebar(!matchMedia("(max-width: 800px)").matches ? false : true);
    find("#search").focus();
  },
  "ctrl+b": () => toggleSidebar(),
  escape: () => answerOf(chat.conversation) && stop(),
};

function onkey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const name = `${event.ctrlKey || event.metaKey ? "ctrl+" : ""}${event.shiftKey ? "shift+" : ""}${event.key.toLowerCase()}`;
  if (!KEYS[name]) return;
  if (name !== "escape") event.preventDefault();
  KEYS[name]();
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

showTheme();
onSetting((name) => name === "theme" && showTheme());
document.addEventListener("keydown", onkey);
find("#open-settings").addEventListener("click", async () => (await import("./settings_dialog.js")).openSettings());
find("#open-characters").addEventListener("click", async () => (await import("./characters_dialog.js")).openCharacters());
find("#open-model").addEventListener("click", async () => (await import("./model_dialog.js")).openModel());
loadMarkdown();
startChat();
startViews();
startWords();
watchServer();
await loadCharacters();
await startSidebar();
onSetting(async (name) => {
  if (name !== "language") return;
  await showConversations();
  refresh();
});
navigator.storage?.persist?.();
