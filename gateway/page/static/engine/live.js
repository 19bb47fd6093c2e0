// The one poll of /ui/status: who wants to know subscribes; nobody else asks the gateway.

import { call, readJson } from "../common/api.js";

const EVERY_MS = 1000;
const SLOWEST_MS = 5000;
const KEEP_S = 120;
const GAP_S = 3.5;

/** `status` is the last answer; `state` one word for it; `samples` the figures of two minutes. */
export class Live extends EventTarget {
  status = null;
  state = "unknown";
  samples = [];
  #failures = 0;
  #timer = 0;
  #before = null;

  start() {
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.look();
    });
    this.look();
  }

  /** Now, and then every second; a hidden page rests. */
  look() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#poll().finally(() => {
      const pause = Math.min(EVERY_MS * 2 ** Math.max(0, this.#failures - 3), SLOWEST_MS);
      if (!document.hidden || this.isWanted) this.#timer ||= setTimeout(() => this.look(), pause);
    });
  }

  /** An engine is on its way: what is sent now would only wait at the gateway. */
  get isAway() {
    return ["starting", "restarting", "waiting", "warming", "down"].includes(this.state);
  }

  /** Set while something must be followed even on a hidden page. */
  isWanted = false;

  async #poll() {
    try {
      const status = await readJson(await call("ui/status", { signal: AbortSignal.timeout(10_000) }));
      this.#failures = 0;
      this.status = status;
      this.state = describe(status);
      this.#sample(status);
    } catch (error) {
      this.#failures += 1;
      if (error.needsKey) this.#lock();
      else if (this.#failures > 1) this.state = "unreachable"; // one lost answer is no news
    }
    this.dispatchEvent(new Event("change"));
  }

  /** What was seen with a key is not shown without one. */
  #lock() {
    Object.assign(this, { state: "key", status: null, samples: [] });
    this.#before = null;
  }

  #sample(status) {
    const before = this.#before;
    // Another of several workers may answer with an older reading; a clock set back is none.
    if (before && status.at <= before.at && status.at > before.at - KEEP_S) return;
    this.#before = status;
    this.samples.push(measure(status, before && status.at - before.at < GAP_S ? before : null));
    const oldest = status.at - KEEP_S;
    this.samples = this.samples.filter((sample) => sample.at >= oldest);
  }

  /** Resolves when questions are answered again, rejects when `signal` says to stop waiting. */
  ready(signal) {
    return new Promise((resolve, reject) => {
      const look = () => {
        if (this.state !== "ready") return;
        stop();
        resolve();
      };
      const give = () => {
        stop();
        reject(signal.reason);
      };
      const stop = () => {
        this.removeEventListener("change", look);
        signal.removeEventListener("abort", give);
      };
      if (signal.aborted) return reject(signal.reason);
      this.addEventListener("change", look);
      signal.addEventListener("abort", give);
      look();
    });
  }

  /** The newest reading's counters, an engine's at its place, or nothing where none counts. */
  get counted() {
    const loads = this.#before && loadsOf(this.#before);
    return loads?.some(Boolean) ? loads : null;
  }
}

const COUNTERS = { answers: "finished", tokens: "completion_tokens", firsts: "first_token_count", firstSum: "first_token_sum_s" };

const loadsOf = (status) => status.engines.map((engine) => engine.load);

/**
 * By how much the counters grew, engine by engine: one without figures at either time, or that began
 * anew, has no part in it, and then it `isWhole` no more. Nothing where no engine can be compared.
 */
export function compare(before, after) {
  const isGrown = (old, now) => Object.values(COUNTERS).every((name) => now[name] >= old[name]);
  const pairs = after.map((now, place) => ({ old: before[place], now })).filter(({ old, now }) => old && now && isGrown(old, now));
  if (!pairs.length) return null;
  const grown = ([told, name]) => [told, pairs.reduce((total, { old, now }) => total + now[name] - old[name], 0)];
  const most = Math.max(before.filter(Boolean).length, after.filter(Boolean).length);
  return { ...Object.fromEntries(Object.entries(COUNTERS).map(grown)), isWhole: pairs.length === most };
}

const sum = (list, name) => list.reduce((total, one) => total + one[name], 0);

/** The state that a person would name, from what gateway and launcher say. */
function describe(status) {
  if (status.gateway.state !== "waiting") return status.gateway.state;
  const launcher = status.launchers[0];
  if (!launcher) return status.engines.some((one) => one.state === "warming") ? "warming" : "down";
  if (launcher.state === "waiting") return "waiting";
  if (launcher.state === "starting") return launcher.crash ? "restarting" : "starting";
  if (launcher.state === "ready" || launcher.state === "warming") {
    return status.engines.some((one) => one.state === "warming") || launcher.state === "warming" ? "warming" : "down";
  }
  return launcher.state;
}

function measure(status, before) {
  const loads = loadsOf(status).filter(Boolean);
  const grown = before && compare(loadsOf(before), loadsOf(status));
  return {
    at: status.at,
    rate: grown && grown.tokens / (status.at - before.at),
    running: status.queue.running,
    waiting: status.queue.waiting + sum(loads, "waiting"),
    kv: loads.length ? Math.max(...loads.map((load) => load.kv_usage)) : null,
    first: grown?.firsts ? grown.firstSum / grown.firsts : null,
  };
}
