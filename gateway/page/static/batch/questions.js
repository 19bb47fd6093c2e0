// From a file or pasted text to questions. Pure: text in, questions out.

const QUESTION = ["question", "prompt", "query", "instruction", "input", "text", "q", "问题"];
const ANSWER = ["answer", "reference", "output", "response", "a", "答案"];
const LISTS = ["questions", "prompt", "prompts", "data", "items", "results"];
const COURSE_START = /(?:^|\n)[^\S\n]*[(（]?\s*\d+\s*[.、．)）]?\s*问题\s*[:：]/g;
const TAGGED = /^(?:(?:\[[^[\]{}"'\n]*\]|\{[^[\]{}"'\n]*\})[^\S\n]*)+[^\s,:[\]{}]/;
const JSON_START = /^[[{]\s*["'[{\]}]/;
const MOST_BROKEN = 0.02;
const COURSE_ANSWER = /\s*答案\s*[:：]/;

/** The input is wrong; `key` and `values` say how, in any language. */
export class BadInput extends Error {
  constructor(key, values = {}) {
    super(key);
    Object.assign(this, { key, values });
  }
}

/** { format, items: [{ question, reference? }], skipped } */
export function parseQuestions(text) {
  const clean = text.replace(/^\uFEFF/, "").replace(/\r\n?/g, "\n");
  const trimmed = clean.trim();
  if (!trimmed) return { format: "lines", items: [], skipped: 0 };
  if (trimmed.search(COURSE_START) === 0) return parseCourse(trimmed);
  if (/^[[{"]/.test(trimmed)) return parseStructured(trimmed);
  return parseLines(trimmed);
}

function parseLines(text) {
  const items = text.split("\n").map((line) => line.trim()).filter(Boolean).map((question) => ({ question }));
  return { format: "lines", items, skipped: 0 };
}

function parseStructured(text) {
  const lines = text.split("\n");
  if (isWhole(text)) {
    const value = JSON.parse(text);
    if (lines.length === 1 && !Array.isArray(value) && readItem(value)) return collect("jsonl", [value]);
    return collect("json", findList(value));
  }
  const bad = lines.findIndex((line) => line.trim() && !isWhole(line));
  if (bad === -1) return collect("jsonl", lines.filter((line) => line.trim()).map((line) => JSON.parse(line)));
  if (isProse(text)) return parseLines(text);
  if (bad === 0) throw new BadInput("batch.badJson", { reason: whyBad(text) });
  throw new BadInput("batch.badLine", { line: bad + 1, reason: whyBad(lines[bad]) });
}

/** A question may begin with a quotation or a tag, as in `[单选] …`; broken JSON begins like JSON. */
function isProse(text) {
  if (text.startsWith('"') || TAGGED.test(text)) return true;
  return !JSON_START.test(text) && !/[\]}]$/.test(text) && !isWhole(text.split("\n", 1)[0]);
}

function isWhole(text) {
  return whyBad(text) === "";
}

function whyBad(text) {
  try {
    JSON.parse(text);
    return "";
  } catch (error) {
    return error.message;
  }
}

function findList(value) {
  if (Array.isArray(value)) return value;
  if (typeof value === "string") return [value];
  const name = LISTS.find((list) => Array.isArray(value?.[list]));
  return name ? value[name] : [value];
}

function collect(format, values) {
  const items = values.map(readItem).filter(Boolean);
  return { format, items, skipped: values.length - items.length };
}

function readItem(value) {
  if (typeof value === "string") return value.trim() ? { question: value } : null;
  if (typeof value !== "object" || value === null) return null;
  const pick = (names) => names.map((name) => value[name]).find((one) => typeof one === "string" && one.trim());
  const question = pick(QUESTION) ?? readMessages(value.messages);
  if (!question) return null;
  const reference = pick(ANSWER);
  return reference ? { question, reference } : { question };
}

/** A chat's last question, as training files keep it. */
function readMessages(messages) {
  if (!Array.isArray(messages)) return undefined;
  return messages.findLast((one) => one?.role === "user" && typeof one.content === "string")?.content;
}

function parseCourse(text) {
  const starts = [...text.matchAll(COURSE_START)];
  let skipped = 0;
  const items = [];
  starts.forEach((start, number) => {
    const block = text.slice(start.index + start[0].length, starts[number + 1]?.index);
    const [question, ...answers] = block.split(COURSE_ANSWER);
    const isBracketed = /^\s*[(（]/.test(start[0]);
    const item = { question: question.trim() };
    const reference = dropClosing(answers.join("答案：").trim(), isBracketed);
    if (reference) item.reference = reference;
    else item.question = dropClosing(item.question, isBracketed);
    if (item.question) items.push(item);
    else skipped += 1;
  });
  return { format: "course", items, skipped };
}

/** The bracket that opened before the number may close behind the answer. */
function dropClosing(text, isBracketed) {
  if (!isBracketed || !/[)）]$/.test(text)) return text;
  const count = (pattern) => (text.match(pattern) ?? []).length;
  return count(/[)）]/g) > count(/[(（]/g) ? text.slice(0, -1).trim() : text;
}

/** A file's text. No encoding here refuses a picture or a spreadsheet; what they become does not
    look like text. */
export async function readFile(file) {
  const text = decode(new Uint8Array(await file.arrayBuffer()));
  const broken = text.split("\uFFFD").length - 1;
  if (text.includes("\0") || broken > Math.max(1, text.length * MOST_BROKEN)) throw new BadInput("batch.notText");
  return text;
}

/** In the encodings that question files come in. */
function decode(data) {
  if (data[0] === 0xff && data[1] === 0xfe) return new TextDecoder("utf-16le").decode(data);
  if (data[0] === 0xfe && data[1] === 0xff) return new TextDecoder("utf-16be").decode(data);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(data);
  } catch {
    return new TextDecoder("gb18030").decode(data);
  }
}

/** Pieces of at most `most` of the items, whose questions' JSON stays below `mostBytes`. */
export function cutPieces(items, most, mostBytes) {
  const encoder = new TextEncoder();
  const pieces = [];
  let piece = [];
  let size = 0;
  items.forEach((item, index) => {
    const bytes = encoder.encode(JSON.stringify(item.question)).length + 1;
    if (bytes > mostBytes) throw new BadInput("batch.oneTooLarge", { number: index + 1 });
    if (piece.length === most || size + bytes > mostBytes) {
      pieces.push(piece);
      piece = [];
      size = 0;
    }
    piece.push(item);
    size += bytes;
  });
  return piece.length ? [...pieces, piece] : pieces;
}
