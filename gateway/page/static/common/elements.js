// Making and finding elements; nothing here knows what the page is about.

export const find = (id) => document.getElementById(id);

/** make("p.hint", "text", child, …); text is always text, never markup. */
export function make(tag, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** A button that calls `act`. */
export function button(kind, text, act) {
  const element = make(`button.${kind}`, text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

/** Writes only what is new: a screen reader speaks every change. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Pairs of a term and its value, "wide" ones with a line of their own; those without a value are left out. */
export function facts(list, pairs) {
  list.replaceChildren(
    ...pairs
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([term, value, kind]) => make(kind === "wide" ? "div.wide" : "div", make("dt", term), make("dd", value))),
  );
}

/** A bar's share from 0 to 1; `null` is work whose length is unknown. */
export function setBar(bar, share, { isEstimate = false } = {}) {
  bar.classList.toggle("endless", share === null);
  bar.classList.toggle("estimate", isEstimate && share !== null);
  if (share === null) {
    bar.removeAttribute("aria-valuenow");
    bar.firstElementChild.style.width = "";
  } else {
    const value = Math.round(Math.min(1, Math.max(0, share)) * 100);
    bar.setAttribute("aria-valuenow", value);
    bar.firstElementChild.style.width = `${value}%`;
  }
}

/** A failure's meaning, and below it what helps to look further. */
export function showFailure(element, parts) {
  element.hidden = !parts;
  const text = parts ? [parts.text, parts.detail].join("\n") : "";
  if (element.dataset.shown === text) return; // an alert is spoken at every change
  element.dataset.shown = text;
  element.replaceChildren(...(parts ? [parts.text, parts.detail ? showDetail(parts.detail) : ""] : []));
}

/** The gateway's own words are English whatever the page speaks. */
function showDetail(text) {
  const detail = make("small", text);
  detail.lang = "en";
  return detail;
}

/** The keyboard's place, from a control that `isGoing` to one that stays; before the first is hidden. */
export function passFocus(from, to, isGoing) {
  if (isGoing && from === document.activeElement) to.focus({ preventScroll: true });
}

/** Puts `children` in place of what is there and moves none that stays: it may have the focus. */
export function arrange(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  children.forEach((child, place) => {
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
}

export function announce(text) {
  setText(find("announce"), text);
}

/** A number field's value, or nothing where it is empty; its form has checked it. */
export function readNumber(input) {
  return input.value.trim() === "" ? undefined : Number(input.value);
}

/** What a form refuses is told at its field, which must then be in sight. */
export function openRefused(form) {
  const open = ({ target }) => {
    const options = target.closest("details");
    if (options) options.open = true;
  };
  form.addEventListener("invalid", open, { capture: true }); // it does not bubble
}

export function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // storage can be forbidden; then choices last as long as the page
  }
}

export function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}
