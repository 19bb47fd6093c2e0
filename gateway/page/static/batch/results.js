// A run's results as files. Pure: rows in, text out.

const TYPES = { json: "application/json", jsonl: "application/x-ndjson", csv: "text/csv;charset=utf-8" };

/** `run` is { model, started, seconds, options, rows: [{ question, answer, reference, error }] }. */
export function write(format, run) {
  const rows = run.rows.map((row, index) => tidy(row, index));
  if (format === "jsonl") return rows.map((row) => JSON.stringify(row)).join("\n") + "\n";
  if (format === "csv") return writeCsv(rows);
  const { model, started, seconds, options } = run;
  return JSON.stringify({ model, started: started.toISOString(), seconds, options, results: rows }, null, 2) + "\n";
}

function tidy({ question, answer, reference, error }, index) {
  const row = { index, question, answer: answer ?? "" };
  if (reference) row.reference = reference;
  if (error) row.error = { code: error.code, message: error.message };
  return row;
}

function writeCsv(rows) {
  const head = ["index", "question", "answer", "reference", "error"];
  const lines = rows.map((row) => [row.index, row.question, row.answer, row.reference ?? "", row.error?.message ?? ""]);
  // Spreadsheets take UTF-8 for what it is only behind this mark.
  return "\uFEFF" + [head, ...lines].map((line) => line.map(writeCell).join(",")).join("\r\n") + "\r\n";
}

function writeCell(value) {
  const text = String(value);
  // A spreadsheet would run what begins like a formula; an answer is no program.
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

export function save(format, run) {
  const stamp = run.started.toISOString().slice(0, 16).replace(/[-:]/g, "").replace("T", "-");
  const url = URL.createObjectURL(new Blob([write(format, run)], { type: TYPES[format] }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `answers-${stamp}.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
