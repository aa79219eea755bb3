// One message on the page: what it says, its versions, what can be done with it, and what is known of it.

import { answerOf } from "./answers.js";
import { el, fit, icon, iconButton, setText } from "./dom.js";
import { serverModel } from "./prompts.js";
import { settings } from "./settings.js";
import { t } from "./words.js";

let markdown = null; // its module, which comes while the page starts

/** Gets what answers are shown with. */
export const loadMarkdown = async () => (markdown ??= await import("./markdown.js"));

/** Renders a message as often as it is told to, but makes anew only what changed: there may be hundreds beside it. */
export class MessageView {
  /** actions: what the buttons do, each with the message. */
  constructor(conversation, message, actions) {
    this.conversation = conversation;
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "body" });
    this.panel = el("div", { class: "panel", hidden: true });
    this.note = el("p", { class: "note", hidden: true });
    this.numbers = el("p", { class: "numbers" });
    this.tools = el("div", { class: "tools", role: "group" });
    this.who = el("h2", { class: "who" });
    this.node = el("article", { class: `message ${message.role}`, "data-id": message.id }, this.who, this.body, this.panel, this.note, el("footer", {}, this.tools, this.numbers));
    this.isRendered = false;
    this.body.textContent = message.content; // until somebody comes near
  }

  get isAnswer() {
    return this.message.role === "assistant";
  }

  get answer() {
    const answer = answerOf(this.conversation);
    return answer?.message === this.message ? answer : null;
  }

  render() {
    this.isRendered = true;
    this.renderWho();
    this.renderBody();
    this.renderTools();
    this.renderNotes();
  }

  renderWho() {
    const picture = this.isAnswer && this.actions.answerPicture();
    const state = `${picture} ${this.name}`;
    if (state === this.whoState) return;
    this.whoState = state;
    this.who.replaceChildren(...(picture ? [el("img", { src: picture, alt: "", class: "picture" })] : []), this.name);
    this.tools.setAttribute("aria-label", this.name);
  }

  get name() {
    if (this.message.role === "tool") return t("tool");
    if (!this.isAnswer) return settings.userName === "You" ? t("user") : settings.userName;
    return this.actions.answerName() ?? this.message.model ?? serverModel.id;
  }

  /** What changes while an answer comes. */
  update() {
    if (!this.isRendered) return;
    this.renderBody();
    this.renderNotes();
    const isBusy = this.answer !== null;
    if (isBusy !== this.wasBusy) this.renderTools();
  }

  renderBody() {
    const { message } = this;
    if (this.editor) return;
    if (!this.isAnswer) {
      if (message.content === this.said) return;
      this.said = message.content;
      const files = (message.files ?? []).map(({ name, text }) => el("details", { class: "file" }, el("summary", {}, icon("clip"), name), el("pre", { tabindex: "0" }, text)));
      this.body.replaceChildren(...files, el("div", { class: "said" }, message.content));
      return;
    }
    if (!markdown) return loadMarkdown().then(() => this.renderBody()); // its text is there already
    this.markdown ??= new markdown.MarkdownView(this.prose());
    this.markdown.update(this.actions.shown(message), this.answer === null);
    if (message.calls) this.renderCalls();
  }

  prose() {
    const prose = el("div", { class: "prose" });
    this.body.replaceChildren(prose);
    return prose;
  }

  renderCalls() {
    this.calls ??= this.body.appendChild(el("div", { class: "calls" }));
    this.calls.replaceChildren(...this.message.calls.map((call) => el("pre", { tabindex: "0" }, `${call.name}(${call.arguments})`)));
    if (this.answer) return;
    const answered = new Set(this.conversation.children(this.message.id).map((child) => child.callId));
    for (const call of this.message.calls.filter((one) => !answered.has(one.id)))
      this.calls.append(el("button", { type: "button", onclick: () => this.actions.giveResult(this.message, call) }, t("giveResult", { name: call.name })));
  }

  renderTools() {
    const { message, actions } = this;
    const isBusy = (this.wasBusy = this.answer !== null);
    const siblings = this.conversation.siblings(message);
    const at = siblings.indexOf(message);
    const state = [isBusy, at, siblings.length, this.panelKind, settings.language].join();
    if (state === this.toolsState) return;
    this.toolsState = state;
    this.node.classList.toggle("writing", isBusy);
    this.node.setAttribute("aria-busy", isBusy);
    const act = (name, label, what, attributes) => iconButton(name, t(label), () => actions[what](message, this), attributes);
    const turn = (name, label, step) => iconButton(name, t(label), () => actions.show(siblings[at + step], this), { disabled: !siblings[at + step], class: "icon when-idle", "data-act": label });
    const place = () => el("span", { class: "place", "aria-label": t("versionOf", { n: at + 1, all: siblings.length }) }, `${at + 1}/${siblings.length}`);
    this.tools.replaceChildren(
      ...(siblings.length > 1 ? [turn("left", "earlier", -1), place(), turn("right", "later", 1)] : []),
      act("copy", "copy", "copy"),
      ...(isBusy
        ? []
        : [
            act("edit", "edit", "edit", { "data-act": "edit" }),
            this.isAnswer && message.parent && act("again", "regenerate", "regenerate", { "data-act": "regenerate", class: "icon when-idle" }),
            this.isAnswer && act("onward", "goOn", "goOn", { "data-act": "continue", class: "icon when-idle" }),
            this.isAnswer && act("bars", "probabilities", "openTokens", { "data-act": "tokens", "aria-expanded": this.panelKind === "tokens" }),
            this.isAnswer && act("raw", "raw", "openRaw", { "data-act": "raw", "aria-expanded": this.panelKind === "raw" }),
            act("branch", "branchOff", "branch", { "data-act": "branch" }),
            act("trash", "delete", "remove", { "data-act": "delete", class: "icon when-idle" }),
          ].filter(Boolean)),
    );
  }

  renderNotes() {
    const { message, answer } = this;
    const note = answer ? waitingNote(answer.waiting) : endNote(message);
    setText(this.note, note);
    this.note.hidden = !note;
    this.note.classList.toggle("bad", message.finish === "error" && !answer);
    setText(this.numbers, message.stats ? numbersOf(message.stats, message.leftOut) : "");
  }

  // ---- editing

  edit() {
    const { message, actions } = this;
    const area = el("textarea", { "aria-label": t("edit"), value: message.content, oninput: () => fit(area), class: "editor" });
    const close = () => {
      this.editor = null;
      this.said = this.markdown = this.calls = null;
      this.render();
      this.tools.querySelector("[data-act=edit]")?.focus();
    };
    const save = (how) => {
      const text = area.value;
      close();
      actions[how](message, text);
    };
    const primary = this.isAnswer ? "saveOn" : "saveSend";
    const buttons = [
      el("button", { type: "button", onclick: close, "data-act": "cancel" }, t("cancel")),
      el("button", { type: "button", onclick: () => save("save"), "data-act": "save" }, t("save")),
      el("button", { type: "button", class: "main", onclick: () => save(primary), "data-act": primary, disabled: answerOf(this.conversation) !== undefined }, t(primary)),
    ];
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) save(primary);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.editor = el("div", { class: "editing" }, area, el("div", { class: "row end" }, buttons));
    this.body.replaceChildren(this.editor);
    fit(area);
    area.focus();
  }

  /** Shows something below the message, or hides it where it is shown already. */
  async togglePanel(kind, fill) {
    const isOpen = this.panelKind === kind;
    this.panelKind = isOpen ? null : kind;
    this.panel.hidden = isOpen;
    this.panel.replaceChildren();
    this.renderTools();
    this.tools.querySelector(`[data-act=${kind}]`)?.focus();
    if (!isOpen) await fill(this.panel);
  }
}

function waitingNote(waiting) {
  if (waiting === null) return "";
  if (waiting.line) return t("waitLine", { n: waiting.line });
  return t(waiting === "reading" ? "thinking" : `state_${waiting}`);
}

function endNote({ role, finish, error }) {
  if (role !== "assistant" || finish === "stop" || finish === "tool_calls" || finish === "edited") return "";
  if (finish === "error") return t("failed", { why: error });
  return t({ length: "cutByLength", content_filter: "cutByFilter", stopped: "stopped" }[finish] ?? "interrupted");
}

const rounded = (number) => (number >= 100 ? Math.round(number) : Number(number.toPrecision(3)));

export function numbersOf({ promptTokens, cachedTokens, tokens, firstAfter, seconds }, leftOut) {
  const parts = [];
  if (tokens > 1 && seconds > 0) parts.push(t("speed", { n: rounded((tokens - 1) / seconds) }));
  parts.push(t("numTokens", { n: tokens }));
  const read = promptTokens - cachedTokens;
  parts.push(cachedTokens ? t("promptCached", { n: promptTokens, cached: cachedTokens }) : t("promptSpeed", { n: promptTokens, speed: rounded(read / firstAfter) }));
  if (serverModel.context) parts.push(t("contextUsed", { used: promptTokens + tokens, all: serverModel.context }));
  if (leftOut) parts.push(t("leftOut", { n: leftOut }));
  return parts.join(" · ");
}
