// Requests to the server, and its errors as messages for the user.
//
// The key is in sessionStorage, so it is deleted with the tab. It leaves the page only in the Authorization header.

const KEY = "finlora-key";

export const session = {
  key: sessionStorage.getItem(KEY),
  keep() { sessionStorage.setItem(KEY, this.key); },
  forget() { sessionStorage.removeItem(KEY); this.key = null; },
};

// HTTP status -> what happened, what to do. 0: no answer.
const WORDS = {
  0: ["The server does not answer.", "Check that it runs and that this machine can reach it, then try again."],
  400: ["The question is not valid.", "Correct what the server names below, then ask again."],
  401: ["The key was not accepted.", "Enter a key of this server. Its administrator issues keys."],
  403: ["This key may not do that.", "Choose another model, or ask the server's administrator for access."],
  404: ["The server does not have that model or task.", "Reload the page to see the current ones."],
  408: ["The answer took too long.", "Try again, with a shorter text if it happens again."],
  413: ["The text is too long for this server.", "Shorten it to the part that the question is about."],
  422: ["This adapter cannot be used.", "Choose another model, and send the message below to the server's administrator."],
  429: ["Too many requests.", "Wait a moment, then ask the same question again."],
  500: ["The server failed on this question.", "Try again. If it fails again, give the request id to the administrator."],
  503: ["The model cannot answer now.", "A stage is down or starting; the server restarts it. Try again shortly."],
};
const ALIASES = { 502: 503, 504: 408 };

/** Error for the user: `title` says what happened, `advice` what to do, `message` is the server's own text. */
export class Failure extends Error {
  constructor(status, { message = "", requestId = "", waitSeconds = 0, words = null } = {}) {
    super(message);
    [this.title, this.advice] = words ?? WORDS[ALIASES[status] ?? status] ?? WORDS[status >= 500 ? 500 : 400];
    Object.assign(this, { status, requestId, waitSeconds });
  }

  /** Whether the same question may succeed later. */
  get canRetry() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

/** Return an error as a Failure. Any other error means a reply that this version of the page cannot read. */
export function asFailure(error) {
  if (error instanceof Failure) return error;
  const words = ["The answer could not be read.", "Reload the page: it may be older than the server."];
  return new Failure(-1, { message: error.message, words });
}

/** Send a request; a body is sent as JSON. Throws Failure, or AbortError if the signal aborts. */
export async function send(path, body = null, signal = null) {
  const headers = { Authorization: `Bearer ${session.key}` };
  if (body) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0);
  }
  if (!reply.ok) throw await readFailure(reply);
  return reply;
}

async function readFailure(reply) {
  const body = await reply.json().catch(() => null);
  const message = typeof body?.error?.message === "string" ? body.error.message : "";
  const waitSeconds = Number.parseInt(reply.headers.get("Retry-After") ?? "", 10) || 0;
  return new Failure(reply.status, { message, waitSeconds, requestId: requestIdOf(reply) });
}

/** Return the JSON reply to a GET. */
export async function get(path) {
  return (await send(path)).json();
}

/** Return the request id in the server's log; Ray Serve's proxy may append its own. */
export function requestIdOf(reply) {
  return (reply.headers.get("X-Request-Id") ?? "").split(",")[0];
}

/** Yield the data of each server-sent event. Source: HTML Standard, section 9.2.6; only `data` is used. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}
