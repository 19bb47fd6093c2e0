// One question and its answer: as it comes, as it was kept, and how fast it came.

import { call, Failure, readEvents, readJson } from "../common/api.js";
import { announce, button, make, setText, showFailure } from "../common/elements.js";
import { explain, persist } from "../common/errors.js";
import { foldable } from "../common/folding.js";
import { copyButton, showMarkdown, showPlain } from "../common/markdown.js";
import { number, rate, say, span } from "../common/translations.js";

const SHORTEST_WRITING_S = 0.1;
const DRAWN_EVERY_MS = 16;
const KEPT = ["question", "text", "tokens", "ending", "along", "conversation"];

export class Turn {
  text = "";
  tokens = 0;
  ending = "";
  isPlain = false;
  #control = new AbortController();
  #firstAt = 0;
  #lastAt = 0;
  #endAt = 0;
  #failure = null;
  #waiting = "";
  #drawing = 0;

  /** `along`: how many earlier turns were sent with it; of one `conversation` at most. */
  constructor(question, { live, again, along = 0, conversation = 0 }) {
    Object.assign(this, { question, live, along, conversation });
    this.answer = make("div.answer");
    this.thinking = make("div.answer");
    this.thought = make("details.thought", make("summary"), this.thinking);
    this.thought.hidden = true;
    this.mark = make("p.hint.mark");
    this.note = make("p.hint.note");
    this.error = make("p.error");
    this.error.setAttribute("role", "alert");
    this.figures = make("p.hint.figures");
    this.plain = button("plain", "", () => this.#togglePlain());
    this.copy = copyButton(() => this.text);
    this.again = button("quiet", "", () => again(this));
    this.element = make(
      "article.card.turn",
      ...foldable("h3", question),
      this.mark,
      this.note,
      this.thought,
      this.answer,
      this.error,
      make("div.row", this.figures, make("div.buttons", this.plain, this.copy, this.again)),
    );
    this.began = performance.now();
  }

  get isComplete() {
    return this.ending === "stop" || this.ending === "length";
  }

  get isRunning() {
    return !this.ending || !this.#endAt;
  }

  stop() {
    this.#control.abort();
  }

  /** What is kept of it; an answer that still runs has been stopped for who comes back to it. */
  pack() {
    const kept = Object.fromEntries(KEPT.map((name) => [name, this[name]]));
    const failure = this.#failure;
    const { code, message, status, source, requestId, param } = failure ?? {};
    return {
      ...kept,
      ending: this.isRunning ? "stopped" : this.ending,
      thought: this.thinking.textContent,
      times: [this.#firstAt, this.#lastAt, this.#endAt].map((at) => (at ? at - this.began : 0)),
      failure: failure && { code, message, status, source, requestId, param },
    };
  }

  unpack(kept) {
    for (const name of KEPT) this[name] = kept[name] ?? this[name];
    this.thinking.append(kept.thought ?? "");
    const [first = 0, last = 0, end = 0] = kept.times ?? [];
    this.began = 1; // any time but 0, which stands for none
    [this.#firstAt, this.#lastAt, this.#endAt] = [first, last, end || last || 1].map((ms) => (ms ? 1 + ms : 0));
    this.#failure = kept.failure;
    this.show();
    return this;
  }

  async run(body) {
    this.element.setAttribute("aria-busy", "true");
    const tell = (text) => {
      this.#waiting = text;
      this.show();
    };
    try {
      this.show();
      await persist(() => this.#stream(body), { live: this.live, signal: this.#control.signal, tell });
    } catch (error) {
      if (error.name === "AbortError") this.ending = "stopped";
      else {
        this.ending = "failed";
        this.#failure = error;
      }
    }
    this.#waiting = "";
    this.#endAt ||= performance.now();
    this.element.removeAttribute("aria-busy");
    this.show();
    if (this.isComplete) announce(say(this.tokens ? "ask.done" : "ask.doneWhole", { count: number(this.tokens) }));
  }

  async #stream(body) {
    this.began = performance.now();
    if (this.live.status?.limits.chats === false) return this.#predict(body);
    const model = this.live.status?.engines.find((engine) => engine.model)?.model;
    const signal = this.#control.signal;
    const response = await call("v1/chat/completions", { body: { ...body, model }, signal });
    for await (const event of readEvents(response)) this.#take(event);
    this.#endAt = performance.now();
    this.ending ||= "stop";
  }

  /** A model without a chat template takes no conversation: it is asked as /predict asks. */
  async #predict({ messages, max_tokens, temperature }) {
    const system = messages.find(({ role }) => role === "system")?.content;
    const body = { prompt: this.question, system, max_tokens, temperature };
    const told = await readJson(await call("predict", { body, signal: this.#control.signal }));
    const [text] = [told.response].flat(); // by setting a list of one
    if (typeof text !== "string") throw new Failure("", { code: "garbled" });
    this.text = text;
    this.#endAt = performance.now();
    this.ending = "stop";
  }

  #take({ choices = [], usage }) {
    const { delta, finish_reason: ending } = choices[0] ?? {};
    const thought = delta?.reasoning_content ?? delta?.reasoning;
    if (delta?.content || thought) {
      this.#lastAt = performance.now();
      this.#firstAt ||= this.#lastAt;
    }
    if (thought) this.thinking.append(thought);
    if (delta?.content) this.text += delta.content;
    if (usage?.completion_tokens) this.tokens = usage.completion_tokens;
    if (ending) this.ending = ending;
    this.#drawing ||= setTimeout(() => this.show(), DRAWN_EVERY_MS);
  }

  show() {
    clearTimeout(this.#drawing);
    this.#drawing = 0;
    const { isRunning } = this;
    this.element.classList.toggle("running", isRunning && !!this.text);
    this.#showAnswer();
    this.thought.hidden = !this.thinking.textContent;
    setText(this.thought.querySelector("summary"), say("ask.thinking"));
    setText(this.mark, say("ask.goesAlong"));
    setText(this.note, this.#note());
    this.note.hidden = !this.note.textContent;
    showFailure(this.error, this.#failure && explain(this.#failure, { along: this.along }));
    setText(this.figures, this.#describe());
    setText(this.plain, say(this.isPlain ? "ask.formed" : "ask.plain"));
    setText(this.again, say("ask.again"));
    this.plain.hidden = isRunning || !this.text;
    this.copy.hidden = isRunning || !this.text || !navigator.clipboard;
    this.again.hidden = isRunning || this.isComplete;
  }

  /** Marks the turns that the next question takes along. */
  setAlong(isAlong) {
    this.element.classList.toggle("along", isAlong);
    this.mark.hidden = !isAlong;
  }

  #showAnswer() {
    this.answer.classList.toggle("plain-text", this.isPlain);
    if (this.isPlain) showPlain(this.answer, this.text);
    else showMarkdown(this.answer, this.text);
  }

  #togglePlain() {
    this.isPlain = !this.isPlain;
    this.show();
  }

  #note() {
    if (this.#waiting) return this.#waiting;
    if (this.isRunning && !this.#firstAt) return say("ask.waiting");
    return this.isComplete && !this.text.trim() && !this.isRunning ? say("ask.empty") : "";
  }

  #describe() {
    const parts = this.#firstAt ? this.#measure() : this.isComplete ? [this.#total()] : [];
    if (this.ending === "length") parts.push(say("ask.cut"));
    if (this.ending === "stopped") parts.push(say("ask.stopped"));
    if (this.along) parts.push(say("ask.sentAlong", { count: number(this.along) }));
    return parts.join(" · ");
  }

  #measure() {
    const total = ((this.#endAt || this.#lastAt) - this.began) / 1000;
    const writing = (this.#lastAt - this.#firstAt) / 1000;
    const parts = [say("ask.first", { value: span((this.#firstAt - this.began) / 1000) })];
    if (this.tokens) {
      parts.push(say("ask.tokens", { count: number(this.tokens) }));
      // The first token came with the prompt's work; the rate is of those after it. Where all came
      // at once, there is nothing to measure but the whole.
      const value = writing > SHORTEST_WRITING_S && this.tokens > 1 ? (this.tokens - 1) / writing : this.tokens / total;
      parts.push(say("ask.rate", { value: rate(value) }));
    }
    if (this.#endAt) parts.push(this.#total());
    return parts;
  }

  #total() {
    return say("ask.total", { value: span((this.#endAt - this.began) / 1000) });
  }
}
