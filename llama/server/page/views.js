// The three views: chat, notebook, split.

import { find } from "./dom.js";
import { onSetting, settings } from "./settings.js";

let notebook = null;

function show() {
  for (const tab of document.querySelectorAll("[data-view]")) {
    const isShown = tab.dataset.view === settings.view;
    tab.setAttribute("aria-selected", isShown);
    tab.tabIndex = isShown ? 0 : -1;
  }
  find("#chat").hidden = settings.view !== "chat";
  find("#notebook").hidden = settings.view === "chat";
  if (settings.view !== "chat") notebook ??= import("./notebook.js").then(({ startNotebook }) => startNotebook());
}

export function startViews() {
  const tabs = [...document.querySelectorAll("[data-view]")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => (settings.view = tab.dataset.view));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
      next.click();
      next.focus();
    });
  }
  onSetting((name) => name === "view" && show());
  show();
}
