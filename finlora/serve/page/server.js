// What the page asks of the server, and what can go wrong with it, in words for a person.
//
// The key lives in sessionStorage, so it goes with the tab, and leaves the page only in the Authorization header.

const KEY = "finlora-key";

export const session = {
  key: sessionStorage.getItem(KEY),
  keep() { sessionStorage.setItem(KEY, this.key); },
  forget() { sessionStorage.removeItem(KEY); this.key = null; },
};

// HTTP status -> what happened, what to do. 0: no answer at all.
const WORDS = {
  0: ["The server does not answer.", "See whether it runs and this machine reaches it, then try again."],
  400: ["The server cannot use this question.", "Change what it names here, then ask again."],
  401: ["The key was not accepted.", "Type a key of this server. Whoever runs it hands them out."],
  403: ["This key may not do that.", "Choose another model, or ask whoever runs the server to widen the key."],
  404: ["The server does not have that model or task.", "Load the page again to see what it has now."],
  408: ["The answer took too long.", "Try again, with a shorter text if it happens again."],
  413: ["The text is too long for this server.", "Cut it down to the part that the question is about."],
  422: ["This adapter cannot be used.", "Choose another model, and show the words below to whoever runs the server."],
  429: ["Too many questions at this moment.", "Nothing is lost: the same question can be asked again shortly."],
  500: ["The server failed on this question.", "Try again. If it fails again, give the request id to whoever runs it."],
  503: ["The model cannot answer now.", "A stage is down or starting; the server brings it back. Try again shortly."],
};
const ALIASES = { 502: 503, 504: 408 };

/** Something that went wrong: `title` says what, `advice` what to do, `message` is the server's own word. */
export class Failure extends Error {
  constructor(status, { message = "", requestId = "", waitSeconds = 0, words = null } = {}) {
    super(message);
    [this.title, this.advice] = words ?? WORDS[ALIASES[status] ?? status] ?? WORDS[status >= 500 ? 500 : 400];
    Object.assign(this, { status, requestId, waitSeconds });
  }

  /** Whether asking the very same again can help. */
  get canRetry() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

/** Return an error as a Failure: one of another kind comes from an answer that is not as the page knows it. */
export function asFailure(error) {
  if (error instanceof Failure) return error;
  const words = ["The answer could not be read.", "Load the page again: it may be older than the server."];
  return new Failure(-1, { message: error.message, words });
}

/** Ask the server; a body goes as JSON. Throws Failure, or AbortError when the signal says so. */
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

/** Return what the server answers to a GET. */
export async function get(path) {
  return (await send(path)).json();
}

/** Return the id that the server's log names; Ray Serve's proxy may add one of its own behind it. */
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
