// Markdown as models write it, as elements: headings, lists, bold, code. Text is always text, never
// markup: what is not understood stays as it was written.

import { announce, button, make, setText } from "./elements.js";
import { say } from "./translations.js";

// No two parts of these can share out a run of characters in more than one way: so they, too, take no
// longer than their line.
const FENCE = /^(\s*)(`{3,}(?!`)|~{3,}(?!~))([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const ITEM = /^(\s*)([-*+•]|\d{1,9}[.)])\s+(\S.*)$/;
// Bounded, so that no text takes longer than its length; `**` beside a letter is C's or a power's.
const INLINE =
  /(?<!`)(`{1,3})(?!`)(?<code>[^\n]{1,2000}?)(?<!`)\1(?!`)|(?<![A-Za-z0-9*])\*\*(?=[^\s*])(?<bold>[^\n]{1,2000}?)(?<=[^\s*])\*\*(?![A-Za-z0-9*])/g;
const COPIED_MS = 1500;

/** Shows `text` in `element`; of a text that grows, only what is new is made anew. */
export function showMarkdown(element, text) {
  const blocks = cutBlocks(text);
  const before = element.shownBlocks ?? [];
  const isSame = (block, place) => block.source === before[place]?.source && block.kind === before[place].kind;
  const changed = blocks.findIndex((block, place) => !isSame(block, place));
  const kept = changed === -1 ? blocks.length : changed;
  while (element.childNodes.length > kept) element.lastChild.remove();
  element.append(...blocks.slice(kept).map(build));
  element.shownBlocks = blocks;
}

/** As it was written, without any form. */
export function showPlain(element, text) {
  element.shownBlocks = [];
  element.replaceChildren(text);
}

/** [{ kind, source, … }]: each has the lines that it was made of. */
export function cutBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = takeCode(lines, at) ?? takeHeading(lines, at) ?? takeList(lines, at) ?? takeParagraph(lines, at);
    blocks.push({ ...block, source: lines.slice(at, next).join("\n") });
    at = next;
  }
  return blocks;
}

/** A fence that is not closed yet goes to the end. */
function takeCode(lines, at) {
  const [, indent, fence, info] = lines[at].match(FENCE) ?? [];
  if (!fence) return null;
  const [language] = info.trim().match(/^[\w+#.-]*/);
  const isEnd = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const strip = (line) => (line.startsWith(indent) ? line.slice(indent.length) : line.trimStart());
  return [{ kind: "code", language, text: lines.slice(at + 1, end).map(strip).join("\n") }, Math.min(end + 1, lines.length)];
}

function takeHeading(lines, at) {
  const [, marks, text] = lines[at].match(HEADING) ?? [];
  return marks ? [{ kind: "heading", level: marks.length, text: dropClosing(text.trimEnd()) }, at + 1] : null;
}

/** `## So ##` is headed by "So", and `# C#` by "C#". */
function dropClosing(text) {
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return /\s/.test(text[end - 1] ?? "") ? text.slice(0, end).trimEnd() : text;
}

function takeList(lines, at) {
  if (!ITEM.test(lines[at])) return null;
  const items = [];
  let place = at;
  let end = at;
  for (; place < lines.length; place += 1) {
    const [, indent, mark, text] = lines[place].match(ITEM) ?? [];
    if (mark) items.push({ depth: indent.replaceAll("\t", "    ").length, mark, text });
    else if (!lines[place].trim()) continue; // a list goes on behind an empty line if an item follows
    else if (end === place && /^\s/.test(lines[place]) && !FENCE.test(lines[place])) items.at(-1).text += `\n${lines[place].trim()}`;
    else break;
    end = place + 1;
  }
  return [{ kind: "list", items }, end];
}

function takeParagraph(lines, at) {
  const isOther = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || ITEM.test(line);
  let end = at + 1;
  while (end < lines.length && !isOther(lines[end])) end += 1;
  return [{ kind: "text", text: lines.slice(at, end).join("\n") }, end];
}

function build(block) {
  if (block.kind === "code") return buildCode(block);
  if (block.kind === "list") return buildList(block.items);
  if (block.kind === "text") return make("p", ...cutInline(block.text));
  const heading = make("h4", ...cutInline(block.text)); // below the question's, whatever its level
  heading.dataset.level = Math.min(block.level, 3);
  return heading;
}

function buildList(items) {
  const [first] = items;
  const list = make(/\d/.test(first.mark) ? "ol" : "ul");
  if (list.localName === "ol") list.start = Number.parseInt(first.mark, 10);
  let place = 0;
  while (place < items.length) {
    const { text } = items[place];
    let next = place + 1;
    while (next < items.length && items[next].depth > first.depth) next += 1;
    const inner = items.slice(place + 1, next);
    list.append(make("li", ...cutInline(text), ...(inner.length ? [buildList(inner)] : [])));
    place = next;
  }
  return list;
}

function buildCode({ language, text }) {
  const body = make("pre", make("code", text));
  body.tabIndex = 0; // what is wider than its place is reached by the keyboard
  body.setAttribute("role", "group");
  body.setAttribute("aria-label", say("code.label"));
  const copy = copyButton(() => text);
  return make("div.code", make("div.code-head", make("span", language), copy), body);
}

/** Text and the elements in it. */
function cutInline(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    const { code, bold } = found.groups;
    parts.push(text.slice(at, found.index));
    parts.push(code === undefined ? make("strong", ...cutInline(bold)) : make("code", trimCode(code)));
    at = found.index + found[0].length;
  }
  return [...parts, text.slice(at)];
}

/** A space inside of the marks keeps a backtick away from them. */
const trimCode = (code) => (/^ .*\S.* $/.test(code) ? code.slice(1, -1) : code);

/**
 * Not there where the browser lets no page copy; what is shown can still be marked. `place` is the
 * answer's number where there are many: by the button's name, and by what a screen reader says when
 * it is done.
 */
export function copyButton(read, place = "") {
  const name = () => (place ? say("copy.answer", { place }) : say("copy"));
  const copy = button("plain", say("copy"), async () => {
    const [told, toldOfOne] = await write(read());
    tell(say(told), place ? say(toldOfOne, { place }) : say(told));
    announce(copy.ariaLabel);
    setTimeout(() => tell(say("copy"), name()), COPIED_MS);
  });
  const tell = (text, label) => {
    setText(copy, text);
    copy.ariaLabel = label;
  };
  copy.ariaLabel = name();
  copy.dataset.t = "copy";
  copy.hidden = !navigator.clipboard;
  return copy;
}

/** The words for what came of it: alone, and with the answer's number. */
async function write(text) {
  try {
    await navigator.clipboard.writeText(text);
    return ["copied", "copied.answer"];
  } catch {
    return ["notCopied", "notCopied.answer"]; // the browser asks its user, who may say no
  }
}
