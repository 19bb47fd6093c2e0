// Long questions, of which the first lines are enough until somebody wants more.

import { button, make } from "./elements.js";
import { say } from "./translations.js";

const MOST_CHARACTERS = 280;
const MOST_LINES = 4;

const isLong = (text) => text.length > MOST_CHARACTERS || text.split("\n").length > MOST_LINES;

/** A heading, and below a long one what opens and folds it again. */
export function foldable(tag, text) {
  const heading = make(tag, text);
  if (!isLong(text)) return [heading];
  const fold = button("plain.fold", "", () => show(fold.getAttribute("aria-expanded") === "false"));
  const show = (isOpen) => {
    heading.classList.toggle("folded", !isOpen);
    fold.setAttribute("aria-expanded", String(isOpen));
    fold.dataset.t = isOpen ? "fold.close" : "fold.open";
    fold.textContent = say(fold.dataset.t);
  };
  show(false);
  return [heading, fold];
}
