// What the person has chosen: kept in this browser, but for keys, which are forgotten with the tab.

const PLACE = "llama.settings";
const KEYS = { apiKey: "llama.key", adminKey: "llama.admin-key" };

const DEFAULTS = {
  language: navigator.language.startsWith("zh") ? "zh" : "en",
  theme: "system",
  view: "chat",
  sampling: {}, // by the names of the server's fields; what is not here is the model's own
  system: "", // of new conversations
  mode: "instruct",
  template: "", // of instructions: a format's name or a text in Jinja; empty: the model's own
  character: null,
  userName: "You",
  command: "", // of chat-instruct; empty: text-generation-webui's
  keepTokens: true, // ask for the likeliest alternatives of every token
  schema: "",
  tools: "",
  model: "", // the adapter that answers; empty, or one that is not loaded: the model itself
  presets: {},
  notebook: "",
  output: "",
};

const listeners = new Set();

function read() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    return {}; // what stands there was not written here
  }
}

const values = { ...DEFAULTS, ...read() };

export const settings = new Proxy(values, {
  set(target, name, value) {
    if (!(name in DEFAULTS)) throw new Error(`no setting is called ${name}`);
    target[name] = value;
    const changed = Object.entries(target).filter(([key, one]) => one !== DEFAULTS[key]);
    localStorage.setItem(PLACE, JSON.stringify(Object.fromEntries(changed)));
    for (const listen of listeners) listen(name);
    return true;
  },
  get: (target, name) => (name in KEYS ? (sessionStorage.getItem(KEYS[name]) ?? "") : target[name]),
});

/** name: apiKey or adminKey. */
export function setKey(name, key) {
  if (key) sessionStorage.setItem(KEYS[name], key);
  else sessionStorage.removeItem(KEYS[name]);
  for (const listen of listeners) listen(name);
}

/** `listen` gets the name of each setting that changes. */
export const onSetting = (listen) => listeners.add(listen);
