// What state things are in: the pill above, the notice while something is amiss, the engine's card.

import { announce, arrange, facts, find, make, setBar, setText } from "../common/elements.js";
import { clock, number, percent, running, say, span } from "../common/translations.js";

const STAGES = [
  "process",
  "reading_config",
  "starting_core",
  "loading_weights",
  "compiling",
  "compiled_before",
  "sizing_cache",
  "capturing_graphs",
  "warming_kernels",
  "listening",
];
const NOTICES = {
  unreachable: "unreachable",
  key: "key",
  starting: "loading",
  restarting: "restarting",
  waiting: "restarting",
  warming: "warming",
  down: "down",
  draining: "stopping",
  stopped: "down",
  stopping: "stopping",
};
const BUSY = ["starting", "warming", "restarting", "waiting", "key"];
const TONES = { ready: "good", unknown: "calm", ...Object.fromEntries(BUSY.map((state) => [state, "busy"])) };

export class EnginePanel {
  #body = find("engine-body");
  #facts = make("dl.facts");
  #steps = make("ol.steps");
  #crash = make("details.crash");
  #more = make("div");
  #before = "unknown";
  #crashTime = null;

  constructor(live) {
    this.live = live;
    this.#body.append(this.#steps, this.#facts, this.#more, this.#crash);
    this.#crash.hidden = true;
  }

  show() {
    const { state, status } = this.live;
    this.#showPill(state, status);
    this.#showNotice(state, status);
    this.#body.hidden = !status;
    if (status) {
      this.#showSteps(state, status);
      this.#showFacts(state, status);
      this.#showOthers(status);
      this.#showCrash(status);
    }
    this.#before = state;
  }

  #showPill(state, status) {
    const pill = find("pill");
    pill.dataset.tone = TONES[state] ?? "bad";
    pill.dataset.state = state;
    const models = new Set(status?.engines.map((engine) => engine.model).filter(Boolean));
    const model = [...models].join(", ") || status?.launchers[0]?.model;
    const total = status?.engines.length ?? 0;
    const ready = status?.engines.filter((engine) => engine.state === "ready").length ?? 0;
    let text = say(`state.${state}`);
    if (state === "ready" && ready < total) text = say("engine.of", { ready, total });
    const isKnown = model && state !== "key" && state !== "unreachable";
    setText(find("pill-text"), isKnown ? `${text} · ${model}` : text);
    document.title = state === "ready" || state === "unknown" ? "vllm-gateway" : `${say(`state.${state}`)} · vllm-gateway`;
  }

  #showNotice(state, status) {
    const notice = find("notice");
    const kind = NOTICES[state];
    if (state === "ready" && NOTICES[this.#before]) announce(say("notice.back"));
    notice.hidden = !kind;
    if (!kind) return;
    notice.dataset.tone = TONES[state] ?? "bad";
    setText(find("notice-title"), say(`notice.${kind}`));
    const isStart = ["starting", "restarting", "waiting", "warming", "down"].includes(state);
    setText(find("notice-detail"), isStart && status ? this.#explain(state, status) : "");
    find("notice-bar").hidden = !isStart;
    if (isStart) setBar(find("notice-bar"), this.#share(state, status));
  }

  #explain(state, status) {
    const launcher = status.launchers[0];
    const parts = [];
    if (launcher) parts.push(this.#stage(state, launcher));
    else parts.push(...new Set(status.engines.filter((one) => one.state !== "ready").map((one) => one.reason)));
    const left = this.#left(state, status);
    if (left > 1) parts.push(say("notice.left", { time: running(left) }));
    else if (launcher?.since_s) parts.push(say("notice.elapsed", { time: running(launcher.since_s) }));
    return [parts.filter(Boolean).join(" · "), say("notice.held")].join(say("stop"));
  }

  #stage(state, launcher) {
    if (state === "waiting" || state === "down") return say(`state.${state}`);
    if (state === "warming") return say(launcher.state === "ready" ? "stage.warmup" : "stage.first_token");
    const { percent: share } = launcher.progress ?? {};
    const text = say(`stage.${STAGES[stageOf(launcher)]}`);
    return share === null || share === undefined ? text : `${text} ${percent(share / 100)}`;
  }

  /** Seconds, by what the last start took; nothing where that is not known. */
  #left(state, status) {
    const launcher = status.launchers[0];
    if (launcher?.start_seconds && ["starting", "restarting"].includes(state)) {
      return launcher.start_seconds - launcher.since_s;
    }
    return null;
  }

  #share(state, status) {
    const launcher = status?.launchers[0];
    if (!launcher || state === "down" || state === "waiting") return null;
    if (state === "warming") return 0.95;
    if (launcher.start_seconds) return Math.min(0.93, launcher.since_s / launcher.start_seconds);
    return (stageOf(launcher) + 1) / (STAGES.length + 2);
  }

  #showSteps(state, status) {
    const launcher = status.launchers[0];
    const isStart = launcher && ["starting", "restarting", "warming"].includes(state);
    this.#steps.hidden = !isStart;
    if (!isStart) return;
    this.#steps.setAttribute("aria-label", say("engine.stages"));
    const now = state === "warming" ? STAGES.length : stageOf(launcher);
    const isSkipped = (stage) => ["compiling", "compiled_before", "capturing_graphs"].includes(stage);
    const steps = STAGES.map((stage, place) => ({ stage, place })).filter(({ stage, place }) => !isSkipped(stage) || place === now);
    this.#steps.replaceChildren(
      ...steps.map(({ stage, place }) => this.#step(say(`stage.${stage}`), place - now, launcher.progress)),
      this.#step(say("stage.warmup"), state === "warming" ? 0 : 1, null),
    );
  }

  #step(text, distance, progress) {
    const step = make("li", text);
    step.className = distance < 0 ? "done" : distance === 0 ? "now" : "";
    if (distance === 0) {
      step.setAttribute("aria-current", "step");
      const share = progress?.percent;
      if (share) step.append(make("span.hint", ` ${percent(share / 100)}`));
      else if (progress?.detail) step.append(make("span.hint", ` ${progress.detail}`));
    }
    return step;
  }

  #showFacts(state, status) {
    const launcher = status.launchers[0] ?? {};
    const engine = status.engines.find((one) => one.model) ?? status.engines[0] ?? {};
    const load = engine.load;
    const restarts = Object.values(launcher.restarts ?? {}).reduce((sum, one) => sum + one, 0);
    const isGone = state === "unreachable";
    const word = isGone || (launcher.state && state !== "ready") ? `state.${state}` : `state.${engine.state ?? "unknown"}`;
    facts(this.#facts, [
      [say("state"), launcher.since_s && !isGone ? say("engine.since", { state: say(word), time: running(launcher.since_s) }) : say(word)],
      [say("engine.model"), engine.model ?? launcher.model],
      [say("engine.device"), launcher.device],
      [say("engine.profile"), launcher.profile],
      [say("engine.vllm"), launcher.versions?.vllm],
      [say("engine.context"), engine.max_model_len && say("engine.contextValue", { count: number(engine.max_model_len) })],
      [say("engine.start"), launcher.start_seconds && span(launcher.start_seconds)],
      [say("engine.restarts"), launcher.restarts && number(restarts)],
      [say("engine.answered"), load && number(load.finished)],
      [say("engine.preempted"), load?.preemptions ? number(load.preemptions) : null],
      [say("engine.cached"), load?.cached_tokens ? percent(load.cached_tokens / load.looked_up_tokens) : null],
      [say("engine.reason"), engine.state === "down" && !launcher.state ? engine.reason : null],
    ]);
  }

  /** Several engines: a line each. */
  #showOthers({ engines }) {
    this.#more.hidden = engines.length < 2;
    if (engines.length < 2) return;
    const areSeveral = new Set(engines.map((engine) => engine.model).filter(Boolean)).size > 1;
    const lines = engines.map((engine, index) => {
      const dot = make("span.dot");
      dot.setAttribute("aria-hidden", "true");
      const model = areSeveral && engine.model ? ` · ${engine.model}` : "";
      const line = make("li", dot, `${say("engine.number", { number: index + 1 })}: ${say(`state.${engine.state}`)}${model}`);
      line.dataset.tone = engine.state === "ready" ? "good" : engine.state === "warming" ? "busy" : "bad";
      return line;
    });
    this.#more.replaceChildren(make("ul.engines", ...lines));
  }

  #showCrash(status) {
    const crash = status.launchers.map((one) => one.crash).filter(Boolean).sort((a, b) => (a.time < b.time ? 1 : -1))[0];
    this.#crash.hidden = !crash;
    if (!crash) return;
    const ago = running(status.at - Date.parse(crash.time) / 1000);
    if (this.#crashTime === crash.time + document.documentElement.lang) {
      setText(this.#crash.querySelector(".ago"), say("crash.ago", { time: ago }));
      return;
    }
    this.#crashTime = crash.time + document.documentElement.lang; // built once: it may be open, and read
    const list = make("dl.facts");
    facts(list, [[say("crash.cause"), crash.signal ? null : crash.cause]]); // else the signal is the cause
    const stamp = make("time.hint", clock(new Date(crash.time)));
    stamp.dateTime = crash.time;
    const summary = this.#crash.querySelector("summary") ?? make("summary");
    summary.replaceChildren(say("crash.title"), make("span.hint.ago", say("crash.ago", { time: ago })));
    arrange(this.#crash, [
      summary, // it stays: it may have the focus
      make("p", explainCrash(crash)),
      list,
      crash.last_lines ? showLines(crash.last_lines) : make("p.hint", say("crash.hidden")),
      make("p", stamp),
    ]);
  }
}

const stageOf = (launcher) => Math.max(0, STAGES.indexOf(launcher.progress?.stage));

function explainCrash(crash) {
  const parts = [];
  if (crash.signal) parts.push(say("crash.signal", { signal: crash.signal }));
  else if (crash.reason === "exit" || crash.reason === "signal") {
    parts.push(crash.exit_code === null ? say("crash.exitUnknown") : say("crash.exit", { code: crash.exit_code }));
  } else parts.push(say(`crash.${crash.reason}`));
  parts.push(crash.was_ready ? say("crash.after", { time: span(crash.uptime_s) }) : say("crash.neverReady"));
  return parts.join(document.documentElement.lang === "en" ? " " : "");
}

function showLines(lines) {
  const block = make("pre", lines.join("\n"));
  block.tabIndex = 0;
  block.setAttribute("role", "region");
  block.setAttribute("aria-label", say("crash.lines"));
  // The end is what matters; it can be scrolled to once the card is open.
  new IntersectionObserver(([entry], observer) => {
    if (!entry.isIntersecting) return;
    block.scrollTop = block.scrollHeight;
    observer.disconnect();
  }).observe(block);
  return make("div", make("h3", say("crash.lines")), block);
}
