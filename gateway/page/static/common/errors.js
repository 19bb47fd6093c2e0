// What a failure means for the person in front of the page.

import { number, say, span } from "./translations.js";

const BY_CODE = {
  network: "error.network",
  broken: "error.broken",
  garbled: "error.garbled",
  invalid_api_key: "error.badKey",
  key_revoked: "error.badKey",
  missing_key: "error.key",
  forbidden: "error.notAllowed",
  not_admin: "error.notAllowed",
  host_not_allowed: "error.foreign",
  cross_site: "error.foreign",
  route_not_allowed: "error.notAllowed",
  model_not_allowed: "error.notAllowed",
  constraint_not_allowed: "error.notAllowed",
  model_not_found: "error.noModel",
  no_model: "error.noModel",
  rate_limited: "error.allowance",
  requests_per_minute: "error.allowance",
  tokens_per_minute: "error.allowance",
  tokens_per_day: "error.budget",
  tokens_per_month: "error.budget",
  key_concurrency: "error.allowance",
  limits_away: "error.limits",
  overloaded: "error.busy",
  queue_timeout: "error.busy",
  engine_busy: "error.busy",
  out_of_files: "error.busy",
  too_many_bodies: "error.busy",
  too_many_background: "error.busy",
  deadline_passed: "error.late",
  deadline_unreachable: "error.late",
  body_timeout: "error.late",
  body_too_large: "error.tooMuch",
  input_too_large: "error.tooMuch",
  too_many_values: "error.tooMuch",
  too_many_prompts: "error.tooMuch",
  prompt_too_long: "error.tooLong",
  empty_prompt: "error.empty",
  not_text: "error.notText",
  prompt_refused: "error.engineRefused",
  adapters_not_changed: "error.refused",
  engine_refused: "error.engineRefused",
  background_not_served: "error.refused",
  bad_encoding: "error.refused",
  bad_form: "error.refused",
  bad_http: "error.refused",
  bad_request: "error.refused",
  invalid_json: "error.refused",
  invalid_type: "error.refused",
  invalid_value: "error.refused",
  too_costly: "error.refused",
  media_refused: "error.refused",
  method_not_allowed: "error.refused",
  unsupported_media_type: "error.refused",
  missing_field: "error.refused",
  not_found: "error.refused",
  route_not_served: "error.noModel",
  no_route: "error.noModel",
  internal_error: "error.gateway",
  engine_aborted: "error.engine",
  engine_failed: "error.engine",
  engine_garbled: "error.engine",
  engine_timeout: "error.engine",
  not_ready: "error.notReady",
  engine_unreachable: "error.notReady",
  batch_jobs: "error.allowance",
  batch_storage: "error.allowance",
  too_many_lines: "error.tooMuch",
  storage_full: "error.gateway",
  storage_unavailable: "error.gateway",
  batch_ended: "error.refused",
  batches_off: "error.refused",
  usage_off: "error.refused",
  audit_off: "error.refused",
  conflict: "error.refused",
  duplicate_custom_id: "error.refused",
  empty_file: "error.refused",
  file_in_use: "error.refused",
  file_lost: "error.refused",
  file_not_found: "error.refused",
  mismatched_url: "error.refused",
  response_not_streamed: "error.refused",
  conversation_not_served: "error.refused",
  conversation_too_long: "error.refused",
  not_in_background: "error.refused",
  previous_response_not_ended: "error.refused",
  previous_response_not_found: "error.refused",
  response_not_found: "error.refused",
  responses_off: "error.refused",
};

/**
 * What it means; then the gateway's own words and the request's id, for who looks further. `along`:
 * how many earlier turns were sent with the question.
 */
export function explain(failure, { along = 0 } = {}) {
  const { code, message = "", status, requestId } = failure;
  const id = requestId ? say("error.request", { id: requestId }) : "";
  const text = describe(failure, along) || message || say("error.status", { status: status || code });
  return { text, detail: [message === text ? "" : message, id].filter(Boolean).join(" · ") };
}

/** In the page's language, with what can be told of this one. */
function describe({ code, message = "", status, source, param }, along) {
  const word = source === "engine" && !(code in BY_CODE) ? judge(status || code, message) : BY_CODE[code];
  if (word === "error.tooLong") return say(along ? "error.tooLongAlong" : word) + countTokens(message);
  const field = word === "error.refused" && FIELDS[param];
  return field ? say("error.field", { field: say(field) }) : word && say(word);
}

const FIELDS = {
  max_tokens: "options.maxTokens",
  temperature: "options.temperature",
  system: "options.system",
  messages: "ask.label",
  prompt: "ask.label",
};
const TOO_LONG = /context length|max_model_len|longer than the maximum|maximum model length/i;
const SIZES = /\bhas (\d+) tokens; the model takes (\d+)/;

/** An engine's own error, passed on by the gateway, has a status for its code. */
function judge(status, message) {
  if (/^(?:429|503)$/.test(status)) return "error.busy";
  if (!/^4/.test(status)) return "error.engine";
  return TOO_LONG.test(message) ? "error.tooLong" : "error.engineRefused";
}

function countTokens(message) {
  const [, count, most] = message.match(SIZES) ?? [];
  return count ? say("error.sizes", { count: number(count), most: number(most) }) : "";
}

/** Rejects with the signal's reason when the wait is given up. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const give = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", give);
      resolve();
    }, seconds * 1000);
    if (signal.aborted) give();
    else signal.addEventListener("abort", give, { once: true });
  });
}

const MOST_TRIES = 5;
const LONGEST_WAIT_S = 600;

/**
 * Runs `work` until it has run: what an engine that is away, or a full queue, refused is sent again
 * when it is back. `tell` gets a line while waiting and nothing when it goes on.
 */
export async function persist(work, { live, signal, tell }) {
  for (let number = 1; ; number += 1) {
    try {
      if (live.isAway) {
        tell(say("error.notReady"));
        await live.ready(signal);
        tell("");
      }
      return await work();
    } catch (failure) {
      if (!failure.didNotRun || number === MOST_TRIES) throw failure;
      await wait(failure, live, signal, tell);
    }
  }
}

async function wait(failure, live, signal, tell) {
  tell(failure.status === 503 ? say("error.notReady") : say("run.retryIn", { time: span(failure.retryAfter || 1), reason: explain(failure).text }));
  await pause(Math.min(failure.retryAfter || 1, failure.status === 503 ? 1 : LONGEST_WAIT_S), signal);
  if (failure.status === 503) {
    const patience = AbortSignal.timeout(LONGEST_WAIT_S * 1000);
    try {
      await live.ready(AbortSignal.any([signal, patience]));
    } catch (reason) {
      throw signal.aborted ? reason : failure;
    }
  }
  tell("");
}
