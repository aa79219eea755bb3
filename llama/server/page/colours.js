// Code in colours. The library comes when the first code does, and each language's grammar with its first code: making
// all of them at once takes a browser as long as some frames.

const LANGUAGES = { // each file of vendor/languages, with the other names of its language
  bash: "sh zsh", c: "h", cpp: "c++ cc cxx hpp", csharp: "cs c#", css: "less sass scss", diff: "patch", dockerfile: "docker", go: "golang",
  haskell: "hs", ini: "toml", java: "", javascript: "cjs js jsx mjs", json: "json5 jsonc", kotlin: "kt kts", latex: "tex", lua: "",
  makefile: "make mk", markdown: "md", php: "", powershell: "ps1 pwsh", python: "py", r: "", ruby: "rb", rust: "rs", shell: "console",
  sql: "", swift: "", typescript: "ts tsx", xml: "html svg vue", yaml: "yml",
};
const INSIDE = { xml: ["css", "javascript"], markdown: ["xml"] }; // languages that stand in others
const names = new Map(Object.entries(LANGUAGES).flatMap(([name, others]) => [name, ...others.split(" ")].map((one) => [one, name])));

let library;
const grammars = new Map();

function grammar(name) {
  if (!grammars.has(name)) grammars.set(name, import(`./vendor/languages/${name}.js`));
  return grammars.get(name);
}

/** Code as HTML of spans, or null where the language is not known. */
export async function highlighted(code, language) {
  const name = names.get(language.toLowerCase());
  if (!name) return null;
  library ??= import("./vendor/highlight.js");
  const hljs = (await library).default;
  for (const one of [...(INSIDE[name] ?? []), name]) {
    const made = (await grammar(one)).default;
    if (!hljs.getLanguage(one)) hljs.registerLanguage(one, made);
  }
  return hljs.highlight(code, { language: name, ignoreIllegals: true }).value;
}
