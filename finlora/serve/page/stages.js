// Stages panel: load of each stage, queue and KV cache, polled once a second while the page is visible.

import { $, count, make, makeBar, makeTerms, memory, percent } from "./element.js";
import { asFailure, get } from "./server.js";

const POLL_MS = 1000;
const FAILED_POLL_MS = 5000;
const NUM_SHARES = 60; // points of each stage's curve: one minute
const SVG = "http://www.w3.org/2000/svg";

const history = [];
let timer = 0;
let seen = null; // time of the last reply with stages
let onRefused = null;

/** Start polling; `refused` is called if the key is no longer accepted. */
export function watch(refused) {
  onRefused = refused;
  clearTimeout(timer);
  poll();
}

export function unwatch() {
  onRefused = seen = null;
  history.length = 0;
  clearTimeout(timer);
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (onRefused && document.visibilityState === "visible") poll();
});

async function poll() {
  let wait = POLL_MS;
  try {
    const status = await get("/v1/stages");
    if (!onRefused) return;
    show(status);
  } catch (error) {
    if (!onRefused) return;
    const failure = asFailure(error);
    if (failure.status === 401) return void onRefused(failure);
    wait = Math.max(FAILED_POLL_MS, 1000 * failure.waitSeconds);
    showOld(failure.title);
  }
  clearTimeout(timer);
  if (document.visibilityState === "visible") timer = setTimeout(poll, wait);
}

/** Show the state of the connection; a screen reader reads out only changes. */
export function say(words, className = "") {
  if ($("link").textContent === words) return;
  $("link").textContent = words;
  $("link").className = className;
}

function show(status) {
  if (!status.stages.length) return showOld("A stage is restarting.");
  const cards = status.stages.map((stage, index) => {
    const shares = (history[index] ??= []);
    shares.push(stage.busy);
    shares.splice(0, shares.lastIndexOf(null) + 1); // null: not measured, so the curve starts after it
    if (shares.length > NUM_SHARES) shares.shift();
    return makeCard(stage, index, shares);
  });
  $("stages").replaceChildren(...cards);
  $("engine").classList.remove("is-old");
  $("seen").textContent = "";
  seen = new Date();
  const cacheShare = status.kv_total ? status.kv_used / status.kv_total : 0;
  const cache = make("span", "", `${count(status.kv_used)} of ${count(status.kv_total)} rows`, makeBar(cacheShare));
  const recovery = status.recovery_s === null ? "" : `${count(status.losses)}, last recovery in ${status.recovery_s.toFixed(1)} s`;
  const load = makeTerms("", [
    ["In flight", count(status.active)],
    ["In queue", count(status.queue)],
    ["KV cache", cache],
    ["Pipeline bubble", percent(status.bubble, 0)],
    ["Stage crashes", recovery],
  ]);
  $("load").replaceWith(Object.assign(load, { id: "load" }));
  say("Connected", "is-good");
}

/** Keep the last state, greyed out and with its time, and show the reason. */
function showOld(reason) {
  say(reason, "is-bad");
  if (seen) $("seen").textContent = `as of ${seen.toLocaleTimeString()}`;
  $("engine").classList.add("is-old");
}

function makeCard(stage, index, shares) {
  const [first, last] = stage.layers;
  return make(
    "li",
    "",
    make("strong", "", `Stage ${index + 1}`),
    make("span", "hint", first === last ? `layer ${first}` : `layers ${first}–${last}`),
    ...(shares.length ? [make("span", "busy", `${percent(stage.busy, 0)} busy`), makeCurve(shares)] : []),
    make("span", "hint memory", `${memory(stage.weights_gib)} weights, ${memory(stage.cache_gib)} cache`),
  );
}

/** Draw a stage's load over the last minute, the newest point at the right. */
function makeCurve(shares) {
  const known = shares.map((share) => Math.min(Math.max(share, 0), 1));
  const points = known.map((share, index) => `${NUM_SHARES - known.length + index},${(1 - share).toFixed(3)}`);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "curve");
  svg.setAttribute("viewBox", `0 0 ${NUM_SHARES - 1} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const area = document.createElementNS(SVG, "polygon");
  area.setAttribute("points", [`${NUM_SHARES - known.length},1`, ...points, `${NUM_SHARES - 1},1`].join(" "));
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(area, line);
  return svg;
}
