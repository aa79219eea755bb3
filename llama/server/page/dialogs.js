// Dialogs: a question, a text to give, or a form of one's own. They close by Escape and give the focus back.

import { el, find, iconButton } from "./dom.js";
import { t } from "./words.js";

/** A dialog with a title and content; `close` hears of its end, with "ok" or "". */
export function openDialog(title, content, { close = () => {}, className = "" } = {}) {
  const heading = el("h2", { id: "dialog-title" }, title);
  const dialog = el("dialog", { class: className, "aria-labelledby": "dialog-title" }, el("div", { class: "row" }, heading, el("span", { class: "space" }), iconButton("close", t("close"), () => dialog.close(""))), content);
  dialog.addEventListener("close", () => {
    dialog.remove();
    close(dialog.returnValue);
  });
  find("#dialogs").append(dialog);
  dialog.showModal();
  return dialog;
}

function ask(title, fields, value, okLabel) {
  return new Promise((resolve) => {
    const cancel = el("button", { type: "button", onclick: () => dialog.close("") }, t("cancel"));
    const buttons = el("div", { class: "row end" }, cancel, el("button", { type: "submit", class: "main" }, okLabel));
    const form = el("form", { method: "dialog" }, fields, buttons);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("ok");
    });
    const dialog = openDialog(title, form, { close: (how) => resolve(how === "ok" ? value() : null), className: "small" });
    (fields[0] ?? buttons.lastChild).focus();
  });
}

export const askWhether = async (question, okLabel = t("ok")) => (await ask(question, [], () => true, okLabel)) ?? false;

/** A line of text, or null. */
export function askText(title, text) {
  const input = el("input", { type: "text", value: text, "aria-label": title });
  const asked = ask(title, [input], () => input.value.trim(), t("ok"));
  input.select();
  return asked;
}

/** Some lines of text, or null. */
export function askLines(title, text) {
  const area = el("textarea", { rows: 8, value: text, "aria-label": title });
  return ask(title, [area], () => area.value, t("ok"));
}

/** Says something for a while. */
export function toast(text) {
  const node = el("p", {}, text);
  find("#toasts").append(node);
  setTimeout(() => node.remove(), 6000);
}
