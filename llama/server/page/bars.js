// Probabilities as bars, and a text as its tokens: what the model thought of, and a way to take that instead.

import { el } from "./dom.js";
import { visible } from "./tokens.js";
import { t } from "./words.js";

const percent = (probability) => (probability >= 0.001 ? `${(100 * probability).toFixed(1)} %` : "< 0.1 %");

/** The likeliest tokens in a place as buttons; `onpick` gets the [id, bytes, logprob] that was chosen. */
export function bars(alternatives, chosen, onpick) {
  const ordered = [...alternatives].sort((a, b) => b[2] - a[2]);
  if (chosen && !ordered.some(([id]) => id === chosen[0])) ordered.push(chosen);
  const rows = ordered.map((alternative) => {
    const [id, bytes, logprob] = alternative;
    const probability = Math.exp(logprob);
    const bar = el("span", { class: "bar" });
    bar.style.width = `${100 * probability}%`;
    const isChosen = chosen?.[0] === id;
    const button = el(
      "button",
      { type: "button", class: "choice", "data-token": id, "aria-current": isChosen, title: `${t("pickToken")} (${id})`, onclick: () => onpick(alternative) },
      el("span", { class: "token-text" }, visible(bytes)),
      el("span", { class: "track", "aria-hidden": "true" }, bar),
      el("span", { class: "percent" }, percent(probability)),
      el("span", { class: "id" }, String(id)),
    );
    return el("li", {}, button);
  });
  const rest = 1 - ordered.reduce((sum, [, , logprob]) => sum + Math.exp(logprob), 0);
  if (rest > 0.0005) rows.push(el("li", { class: "rest" }, t("restOf", { share: percent(rest) })));
  return el("ol", { class: "bars" }, rows);
}

const shade = (logprob) => Math.min(5, Math.floor(-logprob / Math.LN2 + 0.3)); // halvings of the probability

/** Tokens as buttons in a row of text; `onopen` gets the place of the one that is looked at. */
export function tokenRow(tokens, onopen) {
  const row = el("div", { class: "tokens", role: "toolbar", "aria-label": t("tokensLabel") });
  tokens.forEach(([id, bytes, logprob], place) => {
    const text = visible(bytes);
    const known = logprob === null || logprob === undefined ? "" : `, ${percent(Math.exp(logprob))}`;
    const button = el("button", { type: "button", class: `token ${known && `p${shade(logprob)}`}`, "data-id": id, "aria-label": `${text}${known}`, tabindex: place ? "-1" : "0" }, text);
    row.append(button);
    if (text.includes("⏎")) row.append(el("br"));
  });
  const buttons = [...row.querySelectorAll("button")];
  const open = (button) => {
    for (const one of buttons) one.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    onopen(buttons.indexOf(button));
  };
  row.addEventListener("click", (event) => event.target.matches("button") && open(event.target));
  row.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = buttons[buttons.indexOf(event.target) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    open(next);
  });
  return row;
}
