// The conversation's memory over a reload: bounded, and never a reason to fail.
//
// It lies where the key lies: without one in the browser's storage, with one in the tab's alone, so that
// what was asked with a key is gone when the key is.

import { currentKey } from "../common/api.js";

const NAME = "page.history";
const MOST_TURNS = 50;
const MOST_CHARACTERS = 400_000;

const storage = () => (currentKey() ? sessionStorage : localStorage);

const isTurn = ({ question, text, times = [], failure }) =>
  [question, text].every((one) => typeof one === "string") && Array.isArray(times) && (!failure || typeof failure === "object");

/** The turns that were kept, oldest first; what is no list of turns is none. */
export function recallTurns() {
  try {
    const turns = JSON.parse(storage().getItem(NAME) ?? "[]");
    return turns.filter(isTurn);
  } catch {
    return [];
  }
}

/** Keeps the newest of them, as many as there is room for. */
export function keepTurns(turns) {
  let kept = turns.slice(-MOST_TURNS);
  while (kept.length) {
    const text = JSON.stringify(kept);
    if (text.length <= MOST_CHARACTERS && write(text)) return;
    kept = kept.slice(Math.ceil(kept.length / 4));
  }
  forgetTurns();
}

/** Storage can be forbidden or full. */
function write(text) {
  try {
    storage().setItem(NAME, text);
    return true;
  } catch {
    return false;
  }
}

export function forgetTurns() {
  try {
    storage().removeItem(NAME);
  } catch {
    // then there was nothing to forget
  }
}

/** Another tab has kept more or cleared all of it, which this one would else write back. */
export function onKeptElsewhere(act) {
  addEventListener("storage", (event) => {
    if (event.storageArea === storage() && event.key === NAME) act(recallTurns());
  });
}
