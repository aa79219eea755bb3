// An answer on its way from the server into a message: what comes, how fast, and what ends it.

import { getText, patientStream, ServerError } from "./api.js";
import * as store from "./store.js";
import { joined, kept } from "./tokens.js";

const SAVE_EVERY = 1000; // milliseconds
const ASK_LINE_EVERY = 1000;

const running = new Map(); // by conversation

/** The answer that is under way in a conversation, if there is one. */
export const answerOf = (conversation) => running.get(conversation.info.id);

export class Answer {
  /**
   * message: gets what comes, at the end of what it says. request: {path, body}. tokens: those that the message already
   * has, with `prompt`, the ids before them, where they are known. onchange is called at whatever happens.
   */
  constructor(conversation, message, request, onchange, tokens = { prompt: null, tokens: [] }) {
    this.conversation = conversation;
    this.message = message;
    this.request = request;
    this.onchange = onchange;
    this.record = { id: message.id, conversation: conversation.info.id, prompt: tokens.prompt, tokens: [...tokens.tokens] };
    this.isExact = message.content === "" || tokens.tokens.length > 0; // its tokens are all there
    this.aborter = new AbortController();
    this.waiting = "reading"; // then null, or why nothing comes: ServerError.passing, {line: n}
    const bytes = tokens.tokens.map(([, one]) => one);
    this.isSplit = joined(bytes, true) !== joined(bytes); // it goes on in the midst of a character
  }

  stop() {
    this.aborter.abort();
  }

  /** Returns when the answer has ended, whatever ended it; the message says how. */
  async run() {
    const { message, aborter } = this;
    running.set(this.conversation.info.id, this);
    Object.assign(message, { finish: null, error: null, stats: null });
    this.asked = performance.now();
    this.saved = Date.now();
    const line = setInterval(() => this.askLine(), ASK_LINE_EVERY);
    try {
      for await (const chunk of patientStream(this.request.path, this.request.body, aborter.signal, (error) => this.wait(error))) this.take(chunk);
    } catch (error) {
      if (aborter.signal.aborted) message.finish = "stopped";
      else if (error instanceof ServerError) Object.assign(message, { finish: "error", error: error.message });
      else throw error;
    } finally {
      clearInterval(line);
      running.delete(this.conversation.info.id);
      this.waiting = null;
      await this.save();
      this.onchange();
    }
  }

  take(chunk) {
    const { message } = this;
    const now = performance.now();
    if (this.waiting) {
      this.waiting = null;
      message.model = chunk.model;
      this.first = now;
    }
    const [choice] = chunk.choices;
    if (choice) {
      message.content += choice.delta?.content ?? choice.delta?.refusal ?? choice.text ?? "";
      for (const call of choice.delta?.tool_calls ?? []) this.takeCall(call);
      for (const entry of choice.logprobs?.content ?? []) this.record.tokens.push(kept(entry));
      if (this.isSplit) message.content = joined(this.record.tokens.map(([, bytes]) => bytes), true);
      if (choice.finish_reason) message.finish = choice.finish_reason;
    }
    if (chunk.usage) this.takeUsage(chunk.usage, now);
    if (Date.now() - this.saved > SAVE_EVERY) {
      this.saved = Date.now();
      this.conversation.save(message);
    }
    this.onchange();
  }

  /** Parts of a call of a tool, which come in pieces. */
  takeCall({ index, id, function: called }) {
    this.message.calls ??= [];
    const call = (this.message.calls[index] ??= { id, name: "", arguments: "" });
    call.name += called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }

  takeUsage(usage, now) {
    const seconds = (now - this.first) / 1000;
    const known = this.message.stats;
    this.message.stats = {
      promptTokens: usage.prompt_tokens,
      cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
      tokens: usage.completion_tokens,
      firstAfter: (this.first - this.asked) / 1000,
      seconds: usage.completion_tokens === known?.tokens ? known.seconds : seconds,
    };
  }

  wait(error) {
    this.waiting = error.passing;
    this.asked = performance.now();
    this.onchange();
  }

  /** While nothing has come: how many requests wait on the server, this one among them. */
  async askLine() {
    if (this.waiting !== "reading" && !this.waiting?.line) return;
    const text = await getText("metrics").catch(() => "");
    const waiting = Number(/^vllm:num_requests_waiting(?:\{.*\})? (\S+)$/m.exec(text)?.[1] ?? 0);
    if (this.waiting === null) return;
    const place = Math.min(waiting, this.waiting.line ?? Infinity); // whoever came later does not count
    this.waiting = place > 0 ? { line: place } : "reading";
    this.onchange();
  }

  async save() {
    await this.conversation.save(this.message);
    if (this.isExact && this.record.tokens.length) await store.put("tokens", this.record);
  }
}
