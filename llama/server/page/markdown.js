// Markdown of the model's as elements. Its HTML is shown, not obeyed: what marked makes of the text passes DOMPurify,
// formulas and code are filled in as text, and the policy of the page would refuse whatever got through.

import { highlighted } from "./colours.js";
import { el, iconButton } from "./dom.js";
import { Marked } from "./vendor/marked.js";
import "./vendor/purify.js";
import { t } from "./words.js";

const purifier = globalThis.DOMPurify();
const PURIFY = {
  ALLOWED_TAGS: "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i input kbd li mark ol p pre s small span strong sub sup table tbody td th thead tr u ul".split(" "),
  ALLOWED_ATTR: ["align", "checked", "class", "data-display", "data-language", "disabled", "href", "start", "title", "type"],
  ADD_URI_SAFE_ATTR: ["align", "checked", "data-display", "data-language", "disabled", "start", "type"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const COLOURS = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };
const HARMLESS = /^<\/?(?:b|br|em|i|kbd|mark|s|small|strong|sub|sup|u)\s*\/?>$/i;

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// $$...$$ and \[...\] stand alone or in a line; $...$ has no space inside its ends and no digit behind (pandoc's rule).
const BLOCK_MATH = /^(?: {0,3})(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
const INLINE_MATH = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$(?![\s$])((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d))/;

const mathNode = ({ tex, display }) => `<span class="math" data-display="${display}">${escape(tex)}</span>`;

const marked = new Marked({
  gfm: true,
  extensions: [
    {
      name: "blockMath",
      level: "block",
      start: (source) => source.match(/^ {0,3}(?:\$\$|\\\[)/m)?.index,
      tokenizer(source) {
        const match = BLOCK_MATH.exec(source);
        return match && { type: "blockMath", raw: match[0], tex: match[1] ?? match[2], display: true };
      },
      renderer: (token) => `<p>${mathNode(token)}</p>\n`,
    },
    {
      name: "inlineMath",
      level: "inline",
      start: (source) => source.match(/\$|\\[[(]/)?.index,
      tokenizer(source) {
        const match = INLINE_MATH.exec(source);
        return match && { type: "inlineMath", raw: match[0], tex: match[1] ?? match[2] ?? match[3] ?? match[4], display: match[1] !== undefined || match[2] !== undefined };
      },
      renderer: mathNode,
    },
  ],
  renderer: {
    html: ({ text }) => (HARMLESS.test(text.trim()) ? text : escape(text)),
    image: ({ href, text }) => `${escape(text)} (${escape(href)})`, // nothing is fetched because a model says so
    code: ({ text, lang }) => `<pre data-language="${escape((lang ?? "").split(/\s/)[0])}"><code>${escape(text)}</code></pre>\n`,
  },
});

/** Renders a text into an element again and again as it grows: only blocks that changed are made anew. */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.blocks = []; // {raw, nodes}
    this.settledEnd = 0; // characters of the blocks that further text cannot change
    this.numSettled = 0;
    this.source = "";
  }

  /** `isWhole`: nothing more will come, so references between blocks hold. */
  update(source, isWhole = true) {
    if (source === this.source && isWhole === this.isWhole) return;
    if (!source.startsWith(this.source)) this.clear();
    this.source = source;
    this.isWhole = isWhole;
    if (isWhole) {
      this.write(0, marked.lexer(source));
      return;
    }
    const open = marked.lexer(source.slice(this.settledEnd));
    this.write(this.numSettled, open);
    for (const token of open.slice(0, -2)) {
      this.settledEnd += token.raw.length;
      this.numSettled += 1;
    }
  }

  clear() {
    this.node.replaceChildren();
    this.blocks = [];
    this.settledEnd = this.numSettled = 0;
  }

  write(from, tokens) {
    tokens.forEach((token, i) => {
      const old = this.blocks[from + i];
      if (old?.raw === token.raw) return;
      if (old && grownCode(old, token)) return;
      const block = { raw: token.raw, type: token.type, lang: token.lang, nodes: rendered(token, tokens.links) };
      if (old) {
        const [first, ...others] = old.nodes;
        first.replaceWith(...block.nodes);
        others.forEach((node) => node.remove());
      } else {
        this.node.append(...block.nodes);
      }
      this.blocks[from + i] = block;
    });
    for (const block of this.blocks.splice(from + tokens.length)) block.nodes.forEach((node) => node.remove());
  }
}

/** Code that is still being written grows in place: whoever reads or selects it is not disturbed. */
function grownCode(block, token) {
  if (token.type !== "code" || block.type !== "code" || block.lang !== token.lang || isClosed(token.raw)) return false;
  block.raw = token.raw;
  block.nodes[0].querySelector("code").textContent = token.text;
  return true;
}

const isClosed = (raw) => /\n {0,3}(?:`{3,}|~{3,})\s*$/.test(raw) || !/^ {0,3}(?:`{3}|~{3})/.test(raw);

function rendered(token, links) {
  const html = marked.parser(Object.assign([token], { links }));
  const fragment = purifier.sanitize(html, PURIFY);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const input of fragment.querySelectorAll("input")) input.type === "checkbox" ? (input.disabled = true) : input.remove();
  for (const table of fragment.querySelectorAll("table")) {
    const box = el("div", { class: "table", tabindex: "0" });
    table.replaceWith(box);
    box.append(table);
  }
  for (const math of fragment.querySelectorAll("span.math")) fillMath(math);
  for (const pre of fragment.querySelectorAll("pre")) finishCode(pre, token.type !== "code" || isClosed(token.raw));
  const nodes = [...fragment.childNodes];
  return nodes.length ? nodes : [document.createComment("")];
}

function finishCode(pre, isWhole) {
  const { language } = pre.dataset;
  const code = pre.querySelector("code");
  const button = iconButton("copy", t("codeCopy"), async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.title = t("copied");
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
  });
  const box = el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, language || ""), button));
  pre.replaceWith(box);
  pre.tabIndex = 0;
  box.append(pre);
  if (isWhole && language) highlighted(code.textContent, language).then((html) => html && code.replaceChildren(purifier.sanitize(html, COLOURS)));
}

let katex;
const formulas = new Map(); // as they were made, to be shown again while a paragraph grows
const MOST_FORMULAS = 500;
const MATH = {
  throwOnError: true,
  trust: false,
  maxSize: 20,
  maxExpand: 200,
  strict: "ignore",
  macros: { "\\fcolorbox": "\\colorbox{#2}{#3}", "\\pmb": "\\boldsymbol{#1}" }, // theirs write style attributes
};

function fillMath(node) {
  const tex = node.textContent;
  const display = node.dataset.display === "true";
  const key = `${display} ${tex}`;
  if (formulas.has(key)) {
    node.replaceChildren(formulas.get(key).cloneNode(true));
    return;
  }
  if (!katex) {
    loadKatex().then(() => fillMath(node));
    return;
  }
  try {
    const made = el("span");
    katex.render(tex, made, { ...MATH, displayMode: display });
    if (formulas.size >= MOST_FORMULAS) formulas.clear();
    formulas.set(key, made);
    node.replaceChildren(made.cloneNode(true));
  } catch {
    node.classList.add("bad"); // no formula after all: its text stays
  }
}

let loading;

function loadKatex() {
  loading ??= (async () => {
    document.head.append(el("link", { rel: "stylesheet", href: new URL("./vendor/katex.css", import.meta.url) }));
    await import("./vendor/katex.js");
    katex = globalThis.katex;
  })();
  return loading;
}
