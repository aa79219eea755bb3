// Tokens of an answer as they are kept: [id, bytes, logprob, alternatives], each alternative an [id, bytes, logprob].

export const NUM_ALTERNATIVES = 10;

const plain = ({ id, bytes, logprob }) => [id, bytes, logprob];

/** From an entry of the server's. */
export const kept = (entry) => [...plain(entry), entry.top_logprobs.map(plain)];

/** What asks the server for entries that `kept` reads. */
export const chatLogprobs = { logprobs: true, top_logprobs: NUM_ALTERNATIVES };
export const textLogprobs = { logprobs: NUM_ALTERNATIVES, return_token_ids: true };

const strict = new TextDecoder("utf-8", { fatal: true });

/** A token's text for people: white space can be seen, and bytes that are no character are written as such. */
export function visible(bytes) {
  if (!bytes.length) return "∅";
  const hex = (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
  try {
    const text = strict.decode(new Uint8Array(bytes));
    return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(/^ | $/g, "␣").replaceAll(/[\0-\x1f\x7f]/g, (c) => hex(c.charCodeAt(0)));
  } catch {
    return bytes.map(hex).join("");
  }
}

/** The text of several tokens in a row; `isOpen`: half a character at the end is left out. */
export function joined(lists, isOpen = false) {
  return new TextDecoder().decode(new Uint8Array(lists.flat()), { stream: isOpen });
}

/** The ids of a record: of what was before an answer, and of the answer. */
export const idsOf = ({ prompt, tokens }) => [...prompt, ...tokens.map(([id]) => id)];
