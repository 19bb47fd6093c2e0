// One run of a batch, from its first call to its files; what is missing can be run again.

import { call, Failure, readJson } from "../common/api.js";
import { announce, arrange, facts, find, make, passFocus, setBar, setText, showFailure } from "../common/elements.js";
import { compare } from "../engine/live.js";
import { BadInput, cutPieces } from "./questions.js";
import { canScore, scoreRougeL } from "./rouge.js";
import { explain, persist } from "../common/errors.js";
import { foldable } from "../common/folding.js";
import { copyButton, showMarkdown } from "../common/markdown.js";
import { digits, number, rate, running, say, span } from "../common/translations.js";

const ROWS_AT_ONCE = 25;
const SLOWEST_COUNT_MS = 5000;

export class Run {
  isRunning = false;
  onChange = () => {};
  #control = new AbortController();
  #rows;
  #pieces = [];
  #shown = new Map();
  #most = ROWS_AT_ONCE;
  #began = 0;
  #spent = 0;
  #starts = 0;
  #failure = null;
  #isStopped = false;
  #isRetired = false;
  #waiting = "";
  #timing = null;
  #count = null;
  #tokens = null;

  constructor(items, options, live, limits) {
    Object.assign(this, { options, live, limits });
    this.#rows = items.map(({ question, reference }) => ({ question, reference, answer: null, error: null }));
    this.started = new Date();
    this.model = live.status?.engines.find((engine) => engine.model)?.model ?? "";
  }

  stop() {
    this.#control.abort();
  }

  /** Another run has taken its place on the page. */
  retire() {
    this.#isRetired = true;
  }

  translate() {
    this.#shown.clear();
    this.show();
  }

  async start() {
    const missing = this.#missing;
    for (const row of missing) {
      Object.assign(row, { answer: null, error: null });
      this.#shown.delete(row);
    }
    this.isRunning = true;
    this.#starts += 1;
    this.#control = new AbortController();
    this.#failure = null;
    this.#isStopped = false;
    this.#tokens = null;
    this.#began = performance.now();
    find("batch-run").hidden = false;
    const before = this.live.counted;
    const ticking = setInterval(() => this.show(), 250);
    const follow = () => this.#follow();
    this.live.addEventListener("change", follow);
    this.live.isWanted = true;
    try {
      this.#pieces = cutPieces(missing, this.limits.size, this.limits.bytes);
      this.onChange();
      this.show();
      find("batch-run").scrollIntoView({ block: "nearest" });
      for (const piece of this.#pieces) await this.#send(piece);
    } catch (error) {
      if (error.name === "AbortError") this.#isStopped = true;
      else this.#failure = error instanceof BadInput ? new Failure(say(error.key, error.values)) : error;
    } finally {
      clearInterval(ticking);
      this.live.removeEventListener("change", follow);
      this.live.isWanted = false;
      this.isRunning = false;
      this.#spent += this.#elapsed();
    }
    this.onChange();
    this.show();
    announce(find("run-title").textContent);
    this.#tokens = await this.#countTokens(before);
    this.show();
  }

  async #send(piece) {
    const body = { ...this.options, prompt: piece.map((row) => row.question) };
    const signal = this.#control.signal;
    const tell = (text) => {
      this.#waiting = text;
      this.#count = null;
      this.show();
    };
    const ask = async () => {
      const known = this.live.counted;
      // Between two pieces the last reading may be from before the first one's end.
      this.#count = known && this.#pieces.length === 1 ? { last: known, answers: 0 } : null;
      const response = await call("predict", { body, signal });
      this.#timing = add(this.#timing, readTiming(response));
      return readJson(response);
    };
    const told = await persist(ask, { live: this.live, signal, tell });
    if (!Array.isArray(told.response) || told.response.length !== piece.length) {
      throw new Failure("", { code: "garbled" });
    }
    piece.forEach((row, place) => {
      Object.assign(row, { answer: told.response[place], error: told.errors?.[place] ?? null });
    });
    this.show();
  }

  /** How many answers the engines have finished since this call began, as far as they count. */
  #follow() {
    const counted = this.live.counted;
    if (counted && this.#count) {
      const { last, answers } = this.#count;
      // An engine that gives no figures this time is compared with its last ones when it does.
      const newest = counted.map((load, place) => load ?? last[place]);
      this.#count = { last: newest, answers: answers + (compare(last, newest)?.answers ?? 0) };
    } else if (counted) this.#count = { last: counted, answers: 0 };
    this.show();
  }

  async #countTokens(before) {
    if (!before || this.#missing.length || this.#starts > 1) return null;
    // A reading may be a second old; the second new one was certainly made after the end.
    const seen = new Set([this.live.status?.at]);
    const deadline = performance.now() + SLOWEST_COUNT_MS;
    let grown = null;
    while ((seen.size < 3 || !grown?.isWhole) && performance.now() < deadline) {
      await new Promise((resolve) => this.live.addEventListener("change", resolve, { once: true }));
      seen.add(this.live.status?.at);
      grown = this.live.counted && compare(before, this.live.counted);
    }
    return grown?.isWhole ? grown.tokens || null : null;
  }

  #elapsed() {
    return (performance.now() - this.#began) / 1000;
  }

  get #answered() {
    return this.#rows.filter((row) => row.answer !== null && !row.error);
  }

  get #missing() {
    return this.#rows.filter((row) => row.answer === null || row.error);
  }

  get #done() {
    return this.#rows.filter((row) => row.answer !== null).length;
  }

  get #failed() {
    return this.#rows.filter((row) => row.error);
  }

  show() {
    if (this.#isRetired) return;
    const total = this.#rows.length;
    setText(find("run-title"), this.#title(total));
    this.#showProgress(total);
    showFailure(find("run-error"), this.#failure && explain(this.#failure));
    find("downloads").hidden = this.isRunning || !this.#done;
    facts(find("run-facts"), this.isRunning ? [] : this.#facts());
    this.#showRows();
  }

  #title(total) {
    const values = { count: number(this.#answered.length), total: number(total), failed: number(this.#failed.length) };
    if (this.isRunning) return say(this.#waiting ? "run.waiting" : "run.running");
    if (this.#isStopped) return say("run.stopped", values);
    if (this.#failure) return say("run.broken", values);
    return say(this.#failed.length ? "run.doneFailed" : "run.done", values);
  }

  #showProgress(total) {
    const bar = find("run-bar");
    bar.hidden = !this.isRunning;
    if (!this.isRunning) return setText(find("run-detail"), "");
    if (this.#waiting) {
      setBar(bar, this.#done ? this.#done / total : null);
      return setText(find("run-detail"), this.#waiting);
    }
    const done = this.#done;
    const told = Math.min(this.#estimate(), total - done - 1);
    const values = { done: number(done + told), total: number(total), count: number(total), time: running(this.#elapsed()) };
    if (told > 0) {
      setBar(bar, (done + told) / total, { isEstimate: true });
      setText(find("run-detail"), say("run.estimate", values));
    } else if (done || this.#pieces.length > 1) {
      setBar(bar, done / total);
      const left = done ? (this.#elapsed() / done) * (total - done) : 0;
      setText(find("run-detail"), say("run.exact", values) + (left > 2 ? ` · ${say("run.left", { time: running(left) })}` : ""));
    } else {
      setBar(bar, null);
      setText(find("run-detail"), say("run.elapsed", values));
    }
  }

  /** Answers of the call that runs now, by the engines' counters; equal questions are answered once. */
  #estimate() {
    const piece = this.#pieces.find((one) => one[0].answer === null);
    if (!piece || !this.#count) return 0;
    const isShared = this.live.status?.limits.shares_answers && !this.options.temperature;
    const asked = isShared ? new Set(piece.map((row) => row.question)).size : piece.length;
    const share = this.#count.answers / asked;
    return Math.min(piece.length - 1, Math.floor(share * piece.length));
  }

  #facts() {
    const answered = this.#answered;
    if (!answered.length) return [];
    const length = answered.reduce((sum, row) => sum + [...row.answer].length, 0);
    const compared = answered.filter((row) => row.reference);
    const same = compared.filter((row) => isSame(row)).length;
    const pair = (count, total) => say("fact.of", { count: number(count), total: number(total) });
    return [
      [say("fact.time"), span(this.#spent)],
      [say("fact.rate"), rate(answered.length / this.#spent)],
      [say("fact.characters"), rate(length / this.#spent)],
      [say("fact.tokens"), this.#tokens && rate(this.#tokens / this.#spent)],
      [say("fact.mean"), say("fact.characterCount", { count: number(length / answered.length) })],
      [say("fact.same"), compared.length ? pair(same, compared.length) : null],
      [say("fact.rouge"), compared.length ? describeRouge(compared) : null, "wide"],
      [say("fact.where"), this.#timing && say("fact.whereValue", mapValues(this.#timing, (ms) => span(ms / 1000))), "wide"],
    ];
  }

  showMore() {
    const first = find("rows").children.length;
    this.#most += ROWS_AT_ONCE;
    this.#showRows();
    find("rows").children[first]?.focus();
  }

  /** Rows are made when their answers are there, a page of them at a time. */
  #showRows() {
    const ready = this.#rows.filter((row) => row.answer !== null);
    const wanted = ready.slice(0, this.#most);
    for (const row of wanted) if (!this.#shown.has(row)) this.#shown.set(row, showRow(row, this.#rows.indexOf(row)));
    arrange(find("rows"), wanted.map((row) => this.#shown.get(row)));
    const rest = ready.length - wanted.length;
    find("more").hidden = rest <= 0;
    setText(find("more"), say("run.more", { count: number(Math.min(rest, ROWS_AT_ONCE)) }));
    this.#showAgain();
  }

  #showAgain() {
    const count = this.isRunning ? 0 : this.#missing.length;
    passFocus(find("again"), find("batch-stop"), !count);
    find("again").hidden = !count;
    setText(find("again"), say("run.again", { count: number(count) }));
  }

  export() {
    const rows = this.#rows.map(({ question, answer, reference, error }) => ({ question, answer, reference, error })).map((row) => ({ ...row, error: row.error ?? (row.answer === null ? { code: "not_run", message: "not run" } : null) }));
    return { model: this.model, started: this.started, seconds: Number(this.#spent.toFixed(3)), options: this.options, rows };
  }
}

function showRow(row, index) {
  const { question, answer, reference, error } = row;
  const body = error ? make("p.error") : make("div.answer");
  if (error) showFailure(body, explain(error));
  else showMarkdown(body, answer);
  const parts = [make("span.count", String(index + 1)), ...foldable("h3", question), body];
  if (reference && !error) {
    if (!isSame(row)) parts.push(make("div.reference", make("span.label", say("row.reference")), reference));
    parts.push(make("p.hint.score", isSame(row) ? make("span.same", say("row.same")) : "", showRouge(row)));
  }
  if (!error && answer.trim()) parts.push(make("div.buttons", copyButton(() => answer, number(index + 1))));
  const element = make("article.result", ...parts);
  element.tabIndex = -1;
  return element;
}

const isSame = ({ answer, reference }) => answer.trim() === reference.trim();

function showRouge(row) {
  if (!canScore(row.reference)) return make("span", say("row.rougeNone"));
  return make("span", say("row.rouge", { value: digits(readRouge(row), 4) }));
}

/** Counted once a row: it may be long. */
function readRouge(row) {
  if (row.scored !== row.answer) Object.assign(row, { scored: row.answer, rouge: scoreRougeL(row.answer, row.reference) });
  return row.rouge;
}

/** The mean; a reference without anything that counts pulls it down, whatever was answered. */
function describeRouge(rows) {
  const mean = rows.reduce((sum, row) => sum + readRouge(row), 0) / rows.length;
  const uncounted = rows.filter((row) => !canScore(row.reference)).length;
  const text = say("fact.rougeValue", { value: digits(mean, 4), count: number(rows.length) });
  return uncounted ? text + say("fact.rougeNone", { count: number(uncounted) }) : text;
}

/** Milliseconds by place, from Server-Timing. */
function readTiming(response) {
  const header = response.headers.get("Server-Timing") ?? "";
  const found = Object.fromEntries([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, value]) => [name, Number(value)]));
  return "engine" in found ? { queue: found.queue ?? 0, engine: found.engine, gateway: found.gateway ?? 0 } : null;
}

function add(known, told) {
  if (!known || !told) return told ?? known;
  return mapValues(known, (value, name) => value + told[name]);
}

const mapValues = (object, change) => Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value, name)]));
