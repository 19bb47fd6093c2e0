// From a file or pasted text to a run: the form of the batch panel.

import { find, make, openRefused, passFocus, readNumber, setText } from "../common/elements.js";
import { BadInput, parseQuestions, readFile } from "./questions.js";
import { save } from "./results.js";
import { Run } from "./run.js";
import { bytes, number, say } from "../common/translations.js";

const BODY_MARGIN = 64 * 1024;
const SLOW_READING_MS = 150;

export class BatchPanel {
  #items = [];
  #found = null;
  #problem = null;
  #file = null;
  #run = null;
  #typing = 0;
  #isCompact = false;
  #shown = null;

  constructor(live) {
    this.live = live;
    openRefused(find("batch-form"));
    find("pick").addEventListener("click", () => find("file").click());
    find("file").addEventListener("change", (event) => {
      if (event.target.files[0]) this.takeFile(event.target.files[0]);
      event.target.value = "";
    });
    find("file-clear").addEventListener("click", () => this.#clearFile());
    find("paste").addEventListener("input", () => {
      clearTimeout(this.#typing);
      this.#typing = setTimeout(() => this.#take(find("paste").value), SLOW_READING_MS);
    });
    find("batch-form").addEventListener("change", () => this.show());
    for (const event of ["input", "click"]) find("piece").addEventListener(event, () => (this.#how = "pieces"));
    find("batch-form").addEventListener("submit", (event) => {
      event.preventDefault();
      clearTimeout(this.#typing);
      if (!this.#file) this.#take(find("paste").value);
      if (this.#items.length && !this.#run?.isRunning) this.#start(this.#items.map((item) => ({ ...item })));
    });
    find("batch-stop").addEventListener("click", () => this.#run?.stop());
    for (const one of find("downloads").children) {
      one.addEventListener("click", () => save(one.dataset.format, this.#run.export()));
    }
    find("more").addEventListener("click", () => this.#run.showMore());
    find("again").addEventListener("click", () => this.#run.start());
    find("change").addEventListener("click", () => {
      this.#isCompact = false;
      this.show();
      (this.#file ? find("file-clear") : find("paste")).focus();
    });
  }

  get #how() {
    return find("batch-form").elements.how.value;
  }

  set #how(value) {
    find("batch-form").elements.how.value = value;
  }

  get #limits() {
    return this.live.status?.limits;
  }

  async takeFile(file) {
    clearTimeout(this.#typing);
    this.#file = file;
    this.#isCompact = false;
    this.#take(""); // what was there is not this file's
    try {
      const text = await this.#read(file);
      if (this.#file === file) this.#take(text);
    } catch (error) {
      const problem = error instanceof BadInput ? error : new BadInput("batch.unreadable", { reason: error.message });
      if (this.#file === file) this.#fail(problem);
    }
  }

  #read(file) {
    const most = this.#limits?.body_bytes;
    if (most && file.size > 4 * most) throw new BadInput("batch.tooLarge", { size: bytes(file.size), limit: bytes(most) });
    return readFile(file);
  }

  #clearFile() {
    this.#file = null;
    this.#take(find("paste").value);
    find("paste").focus();
  }

  #take(text) {
    try {
      this.#found = text.trim() ? parseQuestions(text) : null;
      this.#items = this.#found?.items ?? [];
      this.#problem = null;
      this.show();
    } catch (error) {
      if (!(error instanceof BadInput)) throw error;
      this.#fail(error);
    }
  }

  #fail(problem) {
    this.#found = null;
    this.#items = [];
    this.#problem = problem;
    this.show();
  }

  translate() {
    find("batch-temperature").placeholder = say("options.default");
    for (const one of find("downloads").children) {
      one.setAttribute("aria-label", say("run.download", { format: one.textContent }));
    }
    this.#showFound();
    this.show();
    this.#run?.translate();
  }

  show() {
    const isRunning = this.#run?.isRunning ?? false;
    this.#warnOfLeaving(isRunning);
    const count = this.#items.length;
    find("batch-max-tokens").placeholder = this.#limits ? number(this.#limits.max_tokens) : say("options.default");
    find("file-chip").hidden = !this.#file;
    setText(find("file-chip").firstElementChild, this.#file?.name ?? "");
    find("paste-field").hidden = !!this.#file;
    setText(find("run"), count ? say("batch.run", { count: number(count) }) : say("batch.runNone"));
    this.#showButtons(isRunning);
    find("run").disabled = !count || isRunning;
    find("batch-form").classList.toggle("compact", this.#isCompact);
    find("source").hidden = find("choices").hidden = this.#isCompact;
    setText(find("batch-hint"), count ? this.#warnOfPieces() : "");
    const known = this.#found ?? this.#problem; // made anew by every reading
    if (known !== this.#shown) {
      this.#shown = known;
      this.#showFound();
    }
  }

  /** The keyboard's place goes from what is hidden to what comes in its stead. */
  #showButtons(isRunning) {
    const stop = find("batch-stop");
    const change = find("change");
    const isBegun = isRunning && stop.hidden; // later on, a new file's form may have the keyboard
    if (isRunning) stop.hidden = false;
    change.hidden = !this.#isCompact || isRunning;
    if (isBegun && find("batch-form").contains(document.activeElement)) stop.focus();
    passFocus(stop, change.hidden ? find("paste") : change, !isRunning);
    stop.hidden = !isRunning;
  }

  /** Only while it runs: a page that listens for it cannot be kept by the browser for the way back. */
  #warnOfLeaving(isRunning) {
    if (isRunning) addEventListener("beforeunload", warnOfLeaving);
    else removeEventListener("beforeunload", warnOfLeaving);
  }

  #showFound() {
    const box = find("found");
    if (this.#problem) {
      box.replaceChildren(make("p.error", say(this.#problem.key, this.#problem.values)));
      return;
    }
    if (!this.#found) return box.replaceChildren();
    const { items, format, skipped } = this.#found;
    if (!items.length) return box.replaceChildren(make("p.error", say("batch.none")));
    const references = items.filter((item) => item.reference).length;
    const repeated = items.length - new Set(items.map((item) => item.question)).size;
    const parts = [say("batch.found", { count: number(items.length), format: say(`format.${format}`) })];
    if (references) parts.push(say("batch.references", { count: number(references) }));
    if (repeated) parts.push(say("batch.repeated", { count: number(repeated) }));
    if (skipped) parts.push(say("batch.skipped", { count: number(skipped) }));
    const list = make("ol", ...items.slice(0, 3).map((item) => make("li", item.question)));
    const rest = items.length > 3 ? make("p.hint", say("batch.moreExamples", { count: number(items.length - 3) })) : null;
    box.replaceChildren(make("p", make("strong", parts[0]), ...parts.slice(1).map((part) => ` · ${part}`)), list, rest ?? "");
  }

  #warnOfPieces() {
    const limit = this.#limits?.prompts;
    if (this.#how !== "one" || !limit || this.#items.length <= limit) return "";
    return say("batch.split", { limit: number(limit), pieces: number(Math.ceil(this.#items.length / limit)) });
  }

  async #start(items) {
    const most = this.#limits?.prompts ?? 10_000;
    const size = this.#how === "pieces" ? Math.min(most, readNumber(find("piece")) ?? 16) : most;
    const options = {
      max_tokens: readNumber(find("batch-max-tokens")),
      temperature: readNumber(find("batch-temperature")),
      system: find("batch-system").value.trim() || undefined,
    };
    const bodyBytes = (this.#limits?.body_bytes ?? 2 ** 25) - BODY_MARGIN;
    this.#run?.retire();
    this.#run = new Run(items, options, this.live, { size, bytes: bodyBytes });
    this.#run.onChange = () => this.show();
    this.#isCompact = true;
    await this.#run.start();
  }
}

/** The words are the browser's own. */
function warnOfLeaving(event) {
  event.preventDefault();
  event.returnValue = true; // for older browsers
}
