// The tiles with live figures and their charts.

import { Chart } from "./chart.js";
import { find, make, setText } from "../common/elements.js";
import { number, percent, rate, say, span } from "../common/translations.js";

const TILES = [
  { name: "live.rate", pick: (sample) => sample.rate, format: rate },
  { name: "live.running", pick: (sample) => sample.running, format: number, note: noteRunning, most: 4 },
  { name: "live.waiting", pick: (sample) => sample.waiting, format: number, note: noteWaiting, most: 4 },
  { name: "live.kv", pick: (sample) => sample.kv, format: percent, most: 0.05 },
  { name: "live.first", pick: (sample) => sample.first, format: span, isSparse: true },
];

function noteRunning(status) {
  const loads = status.engines.map((engine) => engine.load).filter(Boolean);
  if (!loads.length) return "";
  const count = loads.reduce((sum, load) => sum + load.running, 0);
  return count ? say("live.inEngine", { count: number(count) }) : "";
}

function noteWaiting(status) {
  const loads = status.engines.map((engine) => engine.load).filter(Boolean);
  if (!loads.length) return "";
  const engine = loads.reduce((sum, load) => sum + load.waiting, 0);
  const gateway = status.queue.waiting;
  return engine || gateway ? say("live.atGateway", { gateway: number(gateway), engine: number(engine) }) : "";
}

function sumUp({ used }) {
  return say("live.used", { requests: number(used.requests), tokens: number(used.completion_tokens) });
}

export class Figures {
  #tiles;

  constructor(live) {
    this.live = live;
    this.#tiles = TILES.map((tile) => {
      const label = make("span.label");
      const value = make("span.value");
      const note = make("span.hint");
      const chart = new Chart(tile.name, tile.format, tile);
      const element = make("div.tile", make("div", label, note), value, chart.element);
      element.dataset.tile = tile.name.slice(5);
      return { ...tile, label, value, noteElement: note, chart, element };
    });
    find("tiles").append(...this.#tiles.map((tile) => tile.element));
  }

  show() {
    const { samples, state, status } = this.live;
    const newest = samples.at(-1);
    for (const tile of this.#tiles) {
      setText(tile.label, say(tile.name));
      const values = samples.map(tile.pick);
      const value = tile.isSparse ? values.findLast((one) => one !== null) : newest && tile.pick(newest);
      const isUnknown = value === null || value === undefined || state === "unreachable";
      setText(tile.value, isUnknown ? "–" : tile.format(value));
      setText(tile.noteElement, status && tile.note ? tile.note(status) : "");
      tile.chart.show(samples, tile.pick);
    }
    const isSilent = status?.engines.some((engine) => engine.state === "ready" && !engine.load);
    setText(find("live-note"), isSilent ? say("live.noFigures") : status ? sumUp(status) : "");
  }
}
