// Characters: whom the model is to be. Kept in this browser; read and written as text-generation-webui's YAML and as
// TavernAI's cards, which are pictures with the text inside.

import { newId } from "./dom.js";
import * as store from "./store.js";

const known = new Map(); // by id

export async function loadCharacters() {
  for (const character of await store.all("characters")) known.set(character.id, character);
}

export const characters = () => [...known.values()].sort((a, b) => a.name.localeCompare(b.name));
export const characterOf = ({ character }) => known.get(character) ?? null;

export async function saveCharacter(fields) {
  const character = { id: newId(), name: "", greeting: "", context: "", picture: "", ...fields };
  known.set(character.id, character);
  await store.put("characters", character);
  return character;
}

export async function removeCharacter({ id }) {
  known.delete(id);
  await store.remove("characters", id);
}

const text = (value) => (typeof value === "string" ? value : "");
const first = (data, keys) => keys.map((key) => text(data[key])).find(Boolean) ?? "";

/** A character of text-generation-webui's file, of Pygmalion's or of a TavernAI card, in any of their spellings. */
function characterFrom(given) {
  const data = given.data && typeof given.data === "object" ? given.data : given; // cards of the second version
  const name = first(data, ["name", "bot", "<|bot|>", "char_name"]);
  if (!name) throw new SyntaxError("no character");
  const greeting = first(data, ["greeting", "char_greeting", "first_mes"]);
  return { name, greeting, context: text(data.context).trim() || persona(name, data) };
}

function persona(name, data) {
  const about = first(data, ["char_persona", "description"]);
  const scenario = first(data, ["world_scenario", "scenario"]);
  const example = first(data, ["example_dialogue", "mes_example"]);
  const parts = [about && `${name}'s Persona: ${about}`, scenario && `Scenario: ${scenario}`, example.trim()];
  return parts.filter(Boolean).join("\n");
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The characters of files of one name: a text, and perhaps a picture beside it. Raises SyntaxError for any other. */
export async function readCharacter(file) {
  if (file.type === "image/png" || file.name.endsWith(".png")) {
    const { cardText } = await import("./png.js");
    const fields = characterFrom(JSON.parse(cardText(new Uint8Array(await file.arrayBuffer()))));
    return { ...fields, picture: await dataUrl(new Blob([file], { type: "image/png" })) };
  }
  const content = await file.text();
  if (file.name.endsWith(".json")) return characterFrom(JSON.parse(content));
  await import("./vendor/yaml.js");
  try {
    return characterFrom(globalThis.jsyaml.load(content) ?? {});
  } catch (error) {
    throw new SyntaxError(error.message);
  }
}

export const readPicture = (file) => dataUrl(file);

/** As text-generation-webui writes it: what is empty is left out. */
export async function characterYaml({ name, greeting, context }) {
  await import("./vendor/yaml.js");
  return globalThis.jsyaml.dump(Object.fromEntries(Object.entries({ name, greeting, context }).filter(([, value]) => value)), { sortKeys: false });
}

const CARD_SIDE = 256;

/** A TavernAI card: the character's picture, or a plain one, with the text inside. */
export async function characterCard({ name, greeting, context, picture }) {
  const image = new Image();
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = CARD_SIDE;
  if (picture) {
    image.src = picture;
    await image.decode();
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  }
  const context2d = canvas.getContext("2d");
  if (picture) context2d.drawImage(image, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const card = { name, description: context, personality: "", scenario: "", first_mes: greeting, mes_example: "", context };
  const { withCardText } = await import("./png.js");
  return withCardText(new Uint8Array(await blob.arrayBuffer()), JSON.stringify(card));
}
