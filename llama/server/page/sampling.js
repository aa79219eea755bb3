// How the server samples: its fields, by their names there; and presets of them, as text-generation-webui has them.

import { settings } from "./settings.js";

/** Each field: [kind, least, most, step]. What it means stands in words.js. */
export const FIELDS = {
  temperature: ["range", 0, 2, 0.05],
  top_p: ["range", 0, 1, 0.01],
  top_k: ["range", 0, 200, 1],
  min_p: ["range", 0, 1, 0.01],
  repetition_penalty: ["range", 0.5, 2, 0.01],
  presence_penalty: ["range", -2, 2, 0.1],
  frequency_penalty: ["range", -2, 2, 0.1],
  max_tokens: ["number", 1, null, 1],
  min_tokens: ["number", 0, null, 1],
  seed: ["number", null, null, 1],
  stop: ["lines"],
  stop_token_ids: ["ids"],
  ignore_eos: ["flag"],
  logit_bias: ["biases"],
};

const WHOLE = /^-?\d+$/;

/** The value of a field as a person wrote it; undefined where it is to be the model's own. Raises SyntaxError. */
export function parsed(name, text) {
  const [kind] = FIELDS[name];
  if (kind === "lines") return text ? text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n")) : undefined;
  if (!text.trim()) return undefined;
  if (kind === "ids") {
    const ids = text.split(/[\s,]+/).filter(Boolean);
    if (!ids.every((id) => WHOLE.test(id))) throw new SyntaxError(text);
    return ids.map(Number);
  }
  if (kind === "biases") {
    const pairs = text.split(/[\n,]+/).map((pair) => pair.split(":").map((part) => part.trim()));
    if (!pairs.every(([id, bias]) => WHOLE.test(id) && bias && Number.isFinite(Number(bias)))) throw new SyntaxError(text);
    return Object.fromEntries(pairs.map(([id, bias]) => [id, Number(bias)]));
  }
  const value = Number(text);
  if (!Number.isFinite(value)) throw new SyntaxError(text);
  return value;
}

/** The reverse of `parsed`. */
export function written(name, value) {
  if (value === undefined) return "";
  const [kind] = FIELDS[name];
  if (kind === "lines") return value.map((line) => line.replaceAll("\n", "\\n")).join("\n");
  if (kind === "ids") return value.join(", ");
  if (kind === "biases") return Object.entries(value).map((pair) => pair.join(": ")).join("\n");
  return String(value);
}

export function setSampling(name, value) {
  const { [name]: _, ...rest } = settings.sampling;
  settings.sampling = value === undefined ? rest : { ...rest, [name]: value };
}

// ---- presets

export const OWN_PRESETS = {
  "Top-P": { temperature: 1, top_p: 0.95, top_k: 0, repetition_penalty: 1 },
  "Min-P": { temperature: 1, top_p: 1, top_k: 0, min_p: 0.05, repetition_penalty: 1 },
  Deterministic: { temperature: 0, top_p: 1, top_k: 0, repetition_penalty: 1 },
};

/** What text-generation-webui's presets hold where they say nothing: ours by the same name, then what we lack. */
const DEFAULTS = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
const LACKING = {
  typical_p: 1, top_n_sigma: 0, repetition_penalty_range: 1024, no_repeat_ngram_size: 0, temperature_last: false, dynatemp_low: 1,
  dynatemp_high: 1, dynatemp_exponent: 1, smoothing_factor: 0, smoothing_curve: 1, xtc_threshold: 0.1, xtc_probability: 0,
  dry_multiplier: 0, dry_allowed_length: 2, dry_base: 1.75, mirostat_mode: 0, mirostat_tau: 5, mirostat_eta: 0.1,
  epsilon_cutoff: 0, eta_cutoff: 0, tfs: 1, top_a: 0, guidance_scale: 1, penalty_alpha: 0, dynamic_temperature: false,
};

/** A preset of that project's: {sampling, lacking: names of what is set there and not had here}. Raises SyntaxError. */
export async function presetFrom(text) {
  await import("./vendor/yaml.js");
  let given;
  try {
    given = globalThis.jsyaml.load(text);
  } catch (error) {
    throw new SyntaxError(error.message);
  }
  if (given === null || typeof given !== "object" || Array.isArray(given)) throw new SyntaxError("no preset");
  const { do_sample = true, ...fields } = given;
  const sampling = { ...DEFAULTS };
  const lacking = [];
  for (const [name, value] of Object.entries(fields)) {
    if (name in DEFAULTS && typeof value === "number") sampling[name] = value;
    else if (LACKING[name] !== value) lacking.push(name);
  }
  if (!do_sample) sampling.temperature = 0;
  return { sampling, lacking };
}

/** As that project writes it: what differs from its defaults. */
export async function presetYaml(sampling) {
  await import("./vendor/yaml.js");
  const fields = Object.entries(sampling).filter(([name, value]) => name in DEFAULTS && value !== DEFAULTS[name]);
  const { temperature, ...rest } = Object.fromEntries(fields);
  const isGreedy = temperature === 0;
  return globalThis.jsyaml.dump({ ...(temperature !== undefined && !isGreedy && { temperature }), ...rest, ...(isGreedy && { do_sample: false, top_k: 1 }) });
}
