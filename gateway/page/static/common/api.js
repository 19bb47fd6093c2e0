// Calls to the gateway: the key, its errors as one class, and streams event by event.

const KEY = "page.key";
let key = read();

function read() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage can be forbidden; the key then lives as long as the page
  }
}

export const currentKey = () => key;

export function setKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // see above
  }
}

/** What went wrong, in the gateway's words, with what is needed to act on it. */
export class Failure extends Error {
  constructor(message, { status = 0, code = "", source = "", retryAfter = 0, requestId = "", param = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, source, retryAfter, requestId, param });
  }

  /** Nothing has run, so sending it again is safe. */
  get didNotRun() {
    return this.status === 429 || (this.status === 503 && this.code !== "deadline_unreachable");
  }

  get needsKey() {
    return this.status === 401;
  }
}

export async function call(path, { body, signal, keyToTry } = {}) {
  const headers = {};
  const used = keyToTry ?? key;
  if (used) headers.Authorization = `Bearer ${used}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("", { code: "network" });
  }
  if (!response.ok) throw await readFailure(response);
  return response;
}

export async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const isCut = error instanceof TypeError;
    throw new Failure("", { code: isCut ? "broken" : "garbled", requestId: requestId(response) });
  }
}

const requestId = (response) => response.headers.get("X-Request-Id") ?? "";

async function readFailure(response) {
  const told = await response.json().then((data) => data.error ?? {}, () => ({}));
  return new Failure(String(told.message ?? ""), {
    status: response.status,
    code: String(told.code ?? ""),
    source: told.source,
    param: String(told.param ?? ""),
    retryAfter: Number(response.headers.get("Retry-After")) || 0,
    requestId: requestId(response),
  });
}

/** The events of a stream, parsed; ends at [DONE], and throws when it ends without it. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield parseEvent(data, response);
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("", { code: "broken", requestId: requestId(response) });
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Failure("", { code: "broken", requestId: requestId(response) });
}

function parseEvent(data, response) {
  let event;
  try {
    event = JSON.parse(data);
  } catch {
    throw new Failure("", { code: "garbled", requestId: requestId(response) });
  }
  if (event.error) {
    const { message = "", code = "", source } = event.error;
    throw new Failure(String(message), { code: String(code ?? ""), source, requestId: requestId(response) });
  }
  return event;
}
