// One question, streamed: the composer, the answers, and how fast they came.

import { call, readEvents } from "../common/api.js";
import { announce, button, find, make, openRefused, readNumber, setText, showFailure } from "../common/elements.js";
import { explain, persist } from "../common/errors.js";
import { examples, number, rate, say, span } from "../common/translations.js";

const SHORTEST_WRITING_S = 0.1;

// A key of an input method's; Safari tells of Enter after the composition, by 229 alone (WebKit bug 165004).
const isComposing = (event) => event.isComposing || event.keyCode === 229;

export class AskPanel {
  #turns = [];
  #current = null;

  constructor(live) {
    this.live = live;
    const form = find("ask-form");
    this.form = form;
    this.field = find("question");
    openRefused(form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    find("panel-ask").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !isComposing(event)) this.#current?.stop();
    });
    find("stop").addEventListener("click", () => {
      this.#current?.stop();
      this.field.focus();
    });
  }

  translate() {
    find("examples").querySelector("ul").replaceChildren(
      ...examples().map((text) => {
        const item = button("example", text, () => this.ask(text));
        item.setAttribute("aria-label", say("ask.example", { text }));
        return make("li", item);
      }),
    );
    find("ask-max-tokens").placeholder = say("options.any");
    find("ask-temperature").placeholder = say("options.default");
    for (const turn of this.#turns) turn.show();
  }

  #submit() {
    const question = this.field.value.trim();
    if (!question || this.#current) return this.field.focus();
    this.field.value = "";
    this.ask(question);
  }

  async ask(question) {
    if (this.#current || !this.form.reportValidity()) return;
    find("examples").hidden = true;
    const earlier = find("follow").checked ? this.#turns.filter((turn) => turn.isComplete) : [];
    const turn = new Turn(question, this.live, () => this.ask(question));
    this.#turns.push(turn);
    this.#current = turn;
    find("answers").prepend(turn.element);
    this.#mark(true);
    try {
      await turn.run(this.#body(question, earlier));
    } finally {
      this.#current = null;
      this.#mark(false);
    }
  }

  /** One answer at a time; the keyboard's place is kept where its button goes. */
  #mark(isRunning) {
    const stop = find("stop");
    const hadFocus = (element) => element === document.activeElement;
    const isAgain = this.#turns.some((turn) => hadFocus(turn.again));
    const isStop = hadFocus(stop);
    stop.hidden = !isRunning;
    find("send").disabled = isRunning;
    for (const turn of this.#turns) turn.again.disabled = isRunning;
    if (isRunning && isAgain) stop.focus();
    else if (!isRunning && isStop) this.field.focus({ preventScroll: true });
  }

  #body(question, earlier) {
    const system = find("ask-system").value.trim();
    const user = (content) => ({ role: "user", content });
    return {
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...earlier.flatMap((turn) => [user(turn.question), { role: "assistant", content: turn.text }]),
        user(question),
      ],
      max_tokens: readNumber(find("ask-max-tokens")),
      temperature: readNumber(find("ask-temperature")),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
  }
}

/** A question and its answer as it comes. */
class Turn {
  text = "";
  tokens = 0;
  ending = "";
  #control = new AbortController();
  #firstAt = 0;
  #lastAt = 0;
  #endAt = 0;
  #failure = null;
  #waiting = "";

  constructor(question, live, again) {
    Object.assign(this, { question, live });
    this.answer = make("div.answer");
    this.thinking = make("div.answer");
    this.thought = make("details.thought", make("summary"), this.thinking);
    this.thought.hidden = true;
    this.note = make("p.hint");
    this.error = make("p.error");
    this.error.setAttribute("role", "alert");
    this.figures = make("p.hint.figures");
    this.copy = button("plain", "", () => this.#copy());
    this.again = button("quiet", "", again);
    this.element = make(
      "article.card.turn",
      make("h3", question),
      this.note,
      this.thought,
      this.answer,
      this.error,
      make("div.row", this.figures, make("div.buttons", this.copy, this.again)),
    );
    this.began = performance.now();
  }

  get isComplete() {
    return this.ending === "stop" || this.ending === "length";
  }

  stop() {
    this.#control.abort();
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
    if (this.isComplete) announce(say("ask.done", { count: number(this.tokens) }));
  }

  async #stream(body) {
    this.began = performance.now();
    const model = this.live.status?.engines.find((engine) => engine.model)?.model;
    const signal = this.#control.signal;
    const response = await call("v1/chat/completions", { body: { ...body, model }, signal });
    for await (const event of readEvents(response)) this.#take(event);
    this.#endAt = performance.now();
    this.ending ||= "stop";
  }

  #take({ choices = [], usage }) {
    const { delta, finish_reason: ending } = choices[0] ?? {};
    const thought = delta?.reasoning_content ?? delta?.reasoning;
    if (delta?.content || thought) {
      this.#lastAt = performance.now();
      this.#firstAt ||= this.#lastAt;
    }
    if (thought) this.thinking.append(thought);
    if (delta?.content) {
      this.text += delta.content;
      this.answer.append(delta.content);
    }
    if (usage?.completion_tokens) this.tokens = usage.completion_tokens;
    if (ending) this.ending = ending;
    this.show();
  }

  show() {
    const isRunning = !this.ending || !this.#endAt;
    this.element.classList.toggle("running", isRunning && !!this.text);
    this.thought.hidden = !this.thinking.firstChild;
    setText(this.thought.querySelector("summary"), say("ask.thinking"));
    setText(this.note, this.#note(isRunning));
    this.note.hidden = !this.note.textContent;
    showFailure(this.error, this.#failure && explain(this.#failure));
    setText(this.figures, this.#describe());
    setText(this.copy, say("ask.copy"));
    setText(this.again, say("ask.again"));
    this.copy.hidden = isRunning || !this.text || !navigator.clipboard;
    this.again.hidden = isRunning || this.isComplete;
  }

  #note(isRunning) {
    if (this.#waiting) return this.#waiting;
    if (isRunning && !this.#firstAt) return say("ask.waiting");
    return this.isComplete && !this.text.trim() && !isRunning ? say("ask.empty") : "";
  }

  #describe() {
    if (!this.#firstAt) return "";
    const end = this.#endAt || this.#lastAt;
    const total = (end - this.began) / 1000;
    const writing = (this.#lastAt - this.#firstAt) / 1000;
    const parts = [say("ask.first", { value: span((this.#firstAt - this.began) / 1000) })];
    if (this.tokens) {
      parts.push(say("ask.tokens", { count: number(this.tokens) }));
      // The first token came with the prompt's work; the rate is of those after it. Where all came
      // at once, there is nothing to measure but the whole.
      const value = writing > SHORTEST_WRITING_S && this.tokens > 1 ? (this.tokens - 1) / writing : this.tokens / total;
      parts.push(say("ask.rate", { value: rate(value) }));
    }
    if (this.#endAt) parts.push(say("ask.total", { value: span(total) }));
    if (this.ending === "length") parts.push(say("ask.cut"));
    if (this.ending === "stopped") parts.push(say("ask.stopped"));
    return parts.join(" · ");
  }

  async #copy() {
    await navigator.clipboard.writeText(this.text);
    setText(this.copy, say("ask.copied"));
    announce(say("ask.copied"));
    setTimeout(() => setText(this.copy, say("ask.copy")), 1500);
  }
}
