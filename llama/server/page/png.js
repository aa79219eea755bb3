// The text that TavernAI keeps in a PNG file: a tEXt chunk "chara" that holds JSON in base64. Source: PNG, third edition.

const SIGNATURE = 8; // bytes
const KEYWORD = "chara";

function* chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = SIGNATURE; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    yield { type, start: at, data: bytes.subarray(at + 8, at + 8 + length), end: at + 12 + length };
    at += 12 + length;
  }
}

const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

/** The JSON of a card. Raises SyntaxError where there is none. */
export function cardText(bytes) {
  for (const { type, data } of chunks(bytes)) {
    if (type !== "tEXt") continue;
    const [keyword, content] = latin1(data).split("\0");
    if (keyword !== KEYWORD) continue;
    return new TextDecoder().decode(Uint8Array.from(atob(content), (c) => c.charCodeAt(0)));
  }
  throw new SyntaxError("the picture holds no character");
}

/** The picture with such a text, in place of any that it had. */
export function withCardText(bytes, json) {
  const content = btoa(latin1(new TextEncoder().encode(json)));
  const all = [...chunks(bytes)];
  const kept = all.filter(({ type, data }) => type !== "tEXt" || !latin1(data).startsWith(`${KEYWORD}\0`));
  const last = kept.pop(); // IEND
  const parts = [bytes.subarray(0, SIGNATURE), ...kept.map(({ start, end }) => bytes.subarray(start, end)), chunk("tEXt", `${KEYWORD}\0${content}`), bytes.subarray(last.start, last.end)];
  return new Blob(parts, { type: "image/png" });
}

function chunk(type, content) {
  const body = Uint8Array.from(type + content, (c) => c.charCodeAt(0));
  const bytes = new Uint8Array(body.length + 8);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(body, 4);
  view.setUint32(body.length + 4, crc(body));
  return bytes;
}

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  }
  return ~value >>> 0;
}
