// The dialog of the characters: who talks, in which of the three modes, and under what names.

import { newConversation } from "./chat.js";
import { characterCard, characterYaml, characters, readCharacter, readPicture, removeCharacter, saveCharacter } from "./characters.js";
import { askWhether, openDialog, toast } from "./dialogs.js";
import { download, el, icon } from "./dom.js";
import { COMMAND, MODES } from "./modes.js";
import { settings } from "./settings.js";
import { field } from "./settings_dialog.js";
import { t } from "./words.js";

const MOST_PICTURE_BYTES = 2 << 20;

const action = (name, label, onclick, attributes = {}) => el("button", { type: "button", onclick, ...attributes }, icon(name), t(label));

function picture({ picture: url, name }) {
  return url ? el("img", { src: url, alt: "", class: "picture" }) : el("span", { class: "picture", "aria-hidden": "true" }, name.slice(0, 1));
}

function row(character, again) {
  const isChosen = settings.character === character.id;
  const choose = () => {
    settings.character = isChosen ? null : character.id;
    if (!isChosen && settings.mode === "instruct") settings.mode = "chat";
    again();
  };
  const remove = async () => {
    if (!(await askWhether(t("deleteCharacter", { name: character.name }), t("delete")))) return;
    if (isChosen) settings.character = null;
    await removeCharacter(character);
    again();
  };
  return el(
    "li",
    { class: "character", "data-name": character.name },
    el("button", { type: "button", class: "open", "aria-pressed": isChosen, onclick: choose }, picture(character), el("span", {}, character.name)),
    el(
      "div",
      { class: "row wrap" },
      action("edit", "edit", () => edit(character, again)),
      action("out", "exportYaml", async () => download(`${character.name}.yaml`, await characterYaml(character), "application/yaml")),
      action("out", "exportCard", async () => download(`${character.name}.png`, await characterCard(character), "image/png")),
      action("trash", "delete", remove),
    ),
  );
}

function edit(character, again) {
  const name = el("input", { type: "text", required: true, value: character.name ?? "" });
  const greeting = el("textarea", { rows: 3, value: character.greeting ?? "" });
  const context = el("textarea", { rows: 8, value: character.context ?? "" });
  let chosen = character.picture ?? "";
  const file = el("input", {
    type: "file",
    accept: "image/png,image/jpeg,image/webp",
    onchange: async () => {
      if (file.files[0]?.size > MOST_PICTURE_BYTES) return toast(t("pictureTooLarge", { size: MOST_PICTURE_BYTES >> 20 }));
      chosen = file.files[0] ? await readPicture(file.files[0]) : chosen;
    },
  });
  const form = el("form", {}, field("name", name), field("greeting", greeting, t("hint_greeting")), field("context", context, t("hint_context")), field("picture", file), el("div", { class: "row end" }, el("button", { type: "submit", class: "main" }, t("save"))));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    await saveCharacter({ ...character, name: name.value.trim(), greeting: greeting.value, context: context.value, picture: chosen });
    dialog.close();
    again();
  });
  const dialog = openDialog(t("character"), form);
  name.focus();
}

async function take(files) {
  for (const file of files) {
    try {
      const character = await saveCharacter(await readCharacter(file));
      settings.character = character.id;
      if (settings.mode === "instruct") settings.mode = "chat";
    } catch (error) {
      if (!(error instanceof SyntaxError) && !(error instanceof DOMException)) throw error;
      toast(t("notCharacter", { name: file.name }));
    }
  }
}

function content(again) {
  const modes = MODES.map((mode) => {
    const radio = el("input", { type: "radio", name: "mode", value: mode, checked: settings.mode === mode, id: `mode-${mode}`, onchange: () => ((settings.mode = mode), again()) });
    return el("div", { class: "mode" }, radio, el("label", { for: radio.id }, el("b", {}, t(`mode_${mode}`)), el("small", {}, t(`hint_${mode}`))));
  });
  const user = el("input", { type: "text", value: settings.userName, onchange: () => (settings.userName = user.value.trim() || "You") });
  const command = el("textarea", { rows: 4, value: settings.command || COMMAND, onchange: () => (settings.command = command.value === COMMAND ? "" : command.value) });
  const file = el("input", { type: "file", accept: ".yaml,.yml,.json,.png", multiple: true, hidden: true, id: "character-file", "aria-label": t("import"), onchange: async () => (await take(file.files), again()) });
  const list = characters();
  return [
    el("fieldset", {}, el("legend", {}, t("mode")), modes),
    el("ul", { class: "characters" }, list.map((character) => row(character, again))),
    !list.length && el("p", { class: "note" }, t("noCharacters")),
    el("div", { class: "row wrap" }, action("plus", "newCharacter", () => edit({}, again), { id: "new-character" }), action("in", "import", () => file.click()), file),
    field("userName", user),
    settings.mode === "chat-instruct" && field("command", command, t("hint_command")),
    el("p", { class: "note" }, t("charactersHint")),
  ].filter(Boolean);
}

export function openCharacters() {
  const body = el("div", { class: "settings" });
  const before = settings.mode + settings.character;
  const again = () => body.replaceChildren(...content(again));
  again();
  openDialog(t("characters"), body, { close: () => settings.mode + settings.character !== before && newConversation() });
}
