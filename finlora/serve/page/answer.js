// Answer panel: empty, waiting, labels with probabilities, a text with its quote, a streamed text, or an error.

import { $, count, make, makeBar, makeTerms, percent } from "./element.js";

let ticker = 0;

/** Replace the contents of the panel and stop its timer. */
function show(...children) {
  clearInterval(ticker);
  $("answer").replaceChildren(...children);
}

export function showEmpty() {
  show(make("p", "empty", "No question yet. The answer appears here, with the probability of each label or its position in the document."));
}

export function showStopped() {
  const text = $("answer").querySelector(".stream");
  const words = make("p", "hint", "Stopped.");
  if (!text?.textContent) return show(make("p", "empty", "Stopped before the answer."));
  clearInterval(ticker);
  text.classList.remove("is-open");
  return $("answer").append(words);
}

/** Show that the model computes, with as many grey lines as the answer will have. */
export function showWaiting(call, lines) {
  const seconds = make("span", "seconds", "0.0 s");
  const words = make("p", "waiting", "The model is answering… ", seconds);
  seconds.setAttribute("aria-hidden", "true");
  const bones = Array.from({ length: lines }, () => make("li", "bone"));
  const skeleton = make("ul", "bones", ...bones);
  skeleton.setAttribute("aria-hidden", "true");
  show(words, skeleton);
  ticker = setInterval(() => { seconds.textContent = secondsSince(call.began); }, 100);
}

const secondsSince = (began) => `${((performance.now() - began) / 1000).toFixed(1)} s`;

function makeDuration(began) {
  const passed = performance.now() - began;
  return passed < 1000 ? `${Math.round(passed)} ms` : secondsSince(began);
}

function makeFooter(call) {
  return makeTerms("about-answer", [
    ["Model", call.model],
    ["Task", call.task],
    ["Time", makeDuration(call.began)],
    ["Request", call.requestId],
  ]);
}

/** Show the labels of a task, the most probable first, each with a bar and a number. `threshold`: 0 to 1, 0 for none. */
export function showLabels(result, threshold, call) {
  const ranked = Object.entries(result.probabilities).sort((one, other) => other[1] - one[1]);
  const [best, highest] = ranked[0];
  const head = result.abstained
    ? [make("p", "verdict is-abstained", "No answer"), makeAbstention(best, highest, threshold)]
    : [make("p", "verdict", result.label, " ", make("span", "share", percent(highest)))];
  const bars = ranked.map(([label, share], index) => {
    const isChosen = index === 0 && !result.abstained;
    return make("li", isChosen ? "is-chosen" : "", make("span", "name", label), makeBar(share, threshold), make("span", "number", percent(share)));
  });
  show(...head, make("ol", "bars", ...bars), makeFooter(call));
}

function makeAbstention(best, highest, threshold) {
  const limit = threshold ? `reaches ${percent(threshold, 0)}` : "is probable enough";
  return make("p", "note is-warning", `The model abstains: no label ${limit}. The most probable is ${best} with ${percent(highest)}.`);
}

/** Show an answer from a document, and the document with the quote marked. */
export function showExtract(answer, context, call, isQuoted = true) {
  const verdict = make("p", "verdict is-text", answer.answer || "(empty answer)");
  const page = make("pre", "document");
  page.tabIndex = 0;
  page.setAttribute("role", "region");
  page.setAttribute("aria-label", "The document, with the quote marked");
  let note = make("p", "note is-danger", "This answer is not in the document: check it before you use it.");
  if (answer.quote) {
    // The server counts Unicode characters, JavaScript counts UTF-16 units: outside the basic plane they differ.
    const characters = Array.from(context);
    const { start, end } = answer.quote;
    const part = (from, to) => characters.slice(from, to).join("");
    page.append(part(0, start), make("mark", "", part(start, end)), part(end));
    note = make("p", "note is-good", `The answer is in the document, at characters ${count(start)} to ${count(end)}.`);
  } else {
    page.append(context);
  }
  const cut = answer.finish_reason === "length" ? [make("p", "note is-warning", "The answer was cut off at the length limit.")] : [];
  if (!isQuoted) return show(verdict, ...cut, makeFooter(call));
  show(verdict, note, ...cut, page, makeFooter(call));
  const mark = page.querySelector("mark");
  if (mark) page.scrollTop = mark.offsetTop - page.clientHeight / 2;
}

/** Open a streamed text; return the functions that append to it and end it. */
export function openStream() {
  const text = make("p", "stream is-open");
  show(text);
  return {
    push(piece) { text.append(piece); },
    end(finish, call) {
      text.classList.remove("is-open");
      if (!text.textContent) text.append(make("span", "hint", "(The model returned an empty answer.)"));
      if (finish === "length") {
        $("answer").append(make("p", "note is-warning", "The answer was cut off at the length limit. Raise the limit, then ask again."));
      }
      $("answer").append(makeFooter(call));
    },
  };
}

/** Show an error and what to do; streamed text stays. `retry` asks the same question again. */
export function showFailure(failure, retry) {
  const notice = make("div", "failure", make("h3", "", failure.title), make("p", "", failure.advice));
  if (failure.message) notice.append(make("p", "said", "The server says: ", make("q", "", failure.message)));
  if (failure.requestId) notice.append(makeTerms("about-answer", [["Request", failure.requestId]]));
  const text = $("answer").querySelector(".stream");
  if (text?.textContent) {
    text.classList.remove("is-open");
    show(text, notice);
  } else {
    show(notice);
  }
  if (failure.canRetry) notice.append(makeRetry(failure.waitSeconds, retry));
}

/** Make the button that asks again, disabled until the server's Retry-After has passed. */
function makeRetry(waitSeconds, retry) {
  const button = make("button", "", "Try again");
  button.type = "button";
  button.addEventListener("click", retry);
  const row = make("p", "retry", button);
  row.setAttribute("aria-live", "off"); // a screen reader must not read out each second
  const ends = performance.now() + 1000 * waitSeconds;
  const tick = () => {
    const left = Math.ceil((ends - performance.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(ticker);
  };
  if (waitSeconds) ticker = setInterval(tick, 250);
  tick();
  return row;
}
