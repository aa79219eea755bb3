// A conversation that is longer than the model's context: its oldest messages are left out, as text-generation-webui does.

import { postJSON, ServerError } from "./api.js";
import { serverModel } from "./prompts.js";
import { settings } from "./settings.js";

const ROOM = 512; // tokens for an answer whose length nobody has set
const AROUND = 32; // tokens around a message: no template takes more

/** Whether something fits by its number of bytes: a token has at least one. */
const surelyFits = (asked, numMessages, most) => new TextEncoder().encode(JSON.stringify(asked)).length + AROUND * numMessages < most;

/**
 * How many messages at the beginning of a path are to be left out for the rest to fit; the last turn always stays.
 * askedFor: what the server is asked for some messages. Where it cannot tell how long that is, all are kept.
 */
export async function numTooMany(path, askedFor) {
  const most = serverModel.context - Math.min(settings.sampling.max_tokens ?? ROOM, serverModel.context >> 1);
  if (!serverModel.context || surelyFits(askedFor(path), path.length, most)) return 0;
  const fits = async (start) => (await postJSON("tokenize", askedFor(path.slice(start)))).count <= most;
  const turns = path.flatMap((message, i) => (message.role === "user" ? [i] : [])); // a dialog may begin with each
  try {
    if (!turns.length || (await fits(0))) return 0;
    let [least, last] = [0, turns.length - 1];
    while (least < last) {
      const middle = (least + last) >> 1;
      if (await fits(turns[middle])) last = middle;
      else least = middle + 1;
    }
    return turns[last];
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    return 0; // it will say itself what is wrong
  }
}
