// A conversation: the composer, its turns, what of them goes along with the next question, and what is
// kept over a reload.

import { currentKey, setKey } from "../common/api.js";
import { button, find, make, openRefused, passFocus, readNumber, setText } from "../common/elements.js";
import { examples, number, say } from "../common/translations.js";
import { forgetTurns, keepTurns, onKeptElsewhere, recallTurns } from "./history.js";
import { Turn } from "./turn.js";

// A key of an input method's; Safari tells of Enter after the composition, by 229 alone (WebKit bug 165004).
const isComposing = (event) => event.isComposing || event.keyCode === 229;
const NEAR_END_PX = 160;

export class AskPanel {
  #turns = [];
  #current = null;
  #conversation = 0;
  #isChosen = false; // whether somebody has said what goes along
  #chats = true;

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
    find("follow").addEventListener("change", () => {
      this.#isChosen = true;
      this.#mark();
    });
    find("anew").addEventListener("click", () => this.#startAnew());
    find("clear").addEventListener("click", () => this.clear());
    onKeptElsewhere((turns) => this.#takeOver(turns));
    addEventListener("pagehide", () => this.#current && this.#keep());
    this.restore();
  }

  /** What was kept, in place of what is there: at the start, and when another key is used. */
  restore() {
    this.#drop();
    for (const kept of recallTurns()) this.#add(this.#make(kept.question, kept).unpack(kept));
    this.#conversation = this.#turns.at(-1)?.conversation ?? 0;
    this.#mark();
  }

  /** What was asked with a key is gone when the key is; what is here when the first one comes stays. */
  changeKey(key) {
    const isOther = currentKey() && currentKey() !== key;
    if (isOther) forgetTurns();
    setKey(key);
    if (isOther) this.restore();
  }

  /** Cleared in another tab, it is gone here too; what was added there shows when this one is back. */
  #takeOver(turns) {
    if (!turns.length) this.#drop();
    else if (document.hidden && !this.#current) this.restore();
  }

  clear() {
    forgetTurns();
    this.#drop();
    this.field.focus();
  }

  #drop() {
    this.#current?.stop();
    this.#turns = [];
    this.#conversation = 0;
    find("turns").replaceChildren();
    this.#mark();
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
    this.#mark();
  }

  /** The demo model was taught single questions: what goes along would only confuse it. */
  showModel(isDemo) {
    if (this.isDemo === isDemo) return;
    this.isDemo = isDemo;
    if (!this.#isChosen) find("follow").checked = !isDemo;
    this.#mark();
  }

  /** Without a chat template there is no conversation: each question is asked alone. */
  showChats(chats) {
    if (this.#chats === chats) return;
    this.#chats = chats;
    find("follow").closest("label").hidden = !chats;
    this.#mark();
  }

  #submit() {
    const question = this.field.value.trim();
    if (!question || this.#current) return this.field.focus();
    if (!this.form.reportValidity()) return;
    this.field.value = "";
    this.ask(question);
  }

  async ask(question) {
    if (this.#current || !this.form.reportValidity()) return;
    const earlier = this.#earlier;
    const turn = this.#make(question, { along: earlier.length, conversation: this.#conversation });
    this.#add(turn);
    this.#current = turn;
    this.#mark();
    const body = this.#body(question, earlier);
    if (document.activeElement?.matches(".example")) this.field.focus({ preventScroll: true });
    turn.element.scrollIntoView({ block: "nearest" });
    const following = setInterval(() => this.#follow(turn), 100);
    try {
      await turn.run(body);
    } finally {
      clearInterval(following);
      this.#follow(turn);
      this.#current = null;
      this.#mark();
      if (this.#turns.includes(turn)) this.#keep();
    }
  }

  #make(question, { along, conversation }) {
    return new Turn(question, { live: this.live, along, conversation, again: (turn) => this.ask(turn.question) });
  }

  #add(turn) {
    const before = this.#turns.at(-1);
    if (before && before.conversation !== turn.conversation) this.#divide();
    this.#turns.push(turn);
    find("turns").append(turn.element);
  }

  /** The line between two conversations, once. */
  #divide() {
    const turns = find("turns");
    if (!turns.lastElementChild?.matches(".turn")) return;
    const line = make("p.divide", make("span", say("ask.divide")));
    line.firstElementChild.dataset.t = "ask.divide";
    turns.append(line);
  }

  #startAnew() {
    this.#conversation = (this.#turns.at(-1)?.conversation ?? -1) + 1;
    this.#divide();
    this.#mark();
    this.field.focus();
  }

  /** Whole turns of this conversation, if they are to go along. */
  get #earlier() {
    if (!find("follow").checked || !this.#chats) return [];
    return this.#turns.filter((turn) => turn.isComplete && turn.conversation === this.#conversation);
  }

  /** An answer that grows stays in sight of who is looking at its end. */
  #follow(turn) {
    if (!turn.element.isConnected) return;
    const below = turn.element.getBoundingClientRect().bottom - find("ask-form").getBoundingClientRect().top;
    if (below > 0 && below < NEAR_END_PX) scrollBy({ top: below + 16 });
  }

  /** One answer at a time; the keyboard's place is kept where its button goes. */
  #mark() {
    const isRunning = !!this.#current;
    const stop = find("stop");
    const again = this.#turns.find((turn) => turn.again === document.activeElement)?.again;
    const wasStop = stop === document.activeElement;
    stop.hidden = !isRunning;
    find("send").disabled = isRunning;
    for (const turn of this.#turns) turn.again.disabled = isRunning;
    if (isRunning && again) stop.focus();
    else if (!isRunning && wasStop) this.field.focus({ preventScroll: true });
    this.#showContext();
  }

  #showContext() {
    const earlier = new Set(this.#current ? [] : this.#earlier);
    for (const turn of this.#turns) turn.setAlong(earlier.has(turn));
    const count = number(earlier.size);
    const isOff = !find("follow").checked;
    const context = isOff ? "ask.alone" : earlier.size ? "ask.context" : "ask.contextNone";
    setText(find("context"), this.#current ? "" : say(this.#chats ? context : "ask.noTemplate", { count }));
    const hasTurns = this.#turns.some((turn) => turn.conversation === this.#conversation);
    passFocus(find("anew"), this.field, !hasTurns);
    find("anew").hidden = !hasTurns;
    find("kept").hidden = !this.#turns.length;
    setText(find("kept-text"), say("ask.kept"));
    find("panel-ask").classList.toggle("talking", this.#turns.length > 0);
    if (!this.#turns.length) find("examples").open = true;
    else if (this.#current && !this.isDemo) find("examples").open = false;
  }

  #keep() {
    keepTurns(this.#turns.map((turn) => turn.pack()));
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
