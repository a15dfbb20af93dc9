// Page of a FinLoRA server: enter a key, choose a model and a task, ask a question.

import { openStream, showEmpty, showExtract, showFailure, showLabels, showStopped, showWaiting } from "./answer.js";
import { $, count, make } from "./element.js";
import { Failure, asFailure, get, readEvents, requestIdOf, send, session } from "./server.js";
import { say, unwatch, watch } from "./stages.js";

const FREE_TEXT = { name: "", about: "none", labels: [], questions: [] };

// Invented example texts, by the input of a task.
const EXAMPLES = {
  none: ["Nordhaven Shipping lifted its full-year outlook after third-quarter profit rose 12 % on higher freight rates."],
  entity: ["Nordhaven Shipping opened an office in Rotterdam, led by Ines Falk.", "Rotterdam"],
  question: ["Gold slips to a three-week low as the dollar firms ahead of the rate decision.", "price down"],
  extract: [
    '<us-gaap:Revenues contextRef="FY2024" unitRef="USD" decimals="-3">48210000</us-gaap:Revenues>\n' +
      '<us-gaap:NetIncomeLoss contextRef="FY2024" unitRef="USD" decimals="-3">6120000</us-gaap:NetIncomeLoss>\n' +
      '<us-gaap:EarningsPerShareBasic contextRef="FY2024" unitRef="USDPerShare">1.53</us-gaap:EarningsPerShareBasic>',
    "What is the value of NetIncomeLoss?",
  ],
  chat: ["Explain in two sentences what a basis point is."],
};

const TEXT_LABELS = { chat: "Prompt", classify: "Headline, sentence or post", extract: "Document or XBRL fragment" };

let known = []; // the server's tasks
let tasks = new Map(); // those of the chosen model, by name
let current = null; // the request in flight

/* Key */

/** Check the key with the server, and show the question form with its models. */
async function enter() {
  say("Connecting…");
  $("enter").disabled = true;
  try {
    const [models, found] = await Promise.all([get("/v1/models"), get("/v1/tasks")]);
    fillDesk(models.data, found.data);
  } catch (error) {
    return askForKey(asFailure(error));
  } finally {
    $("enter").disabled = false;
  }
  session.keep();
  $("key").value = "";
  $("key-fault").textContent = "";
  setDesk(true);
  $("text").focus();
  watch(askForKey);
}

/** Hide the question form and ask for a key; `failure` is the reason, if there is one. */
function askForKey(failure = null) {
  stop();
  unwatch();
  $("key").value = failure && failure.status !== 401 ? session.key ?? "" : "";
  if (!failure || failure.status === 401) session.forget();
  setDesk(false);
  $("key-fault").textContent = failure ? describe(failure) : "";
  say("");
  $("key").focus();
}

function describe(failure) {
  const wait = failure.waitSeconds && `Wait ${failure.waitSeconds} s.`;
  const said = failure.message && failure.status !== 401 && `The server says: ${failure.message}`;
  return [failure.title, failure.advice, wait, said].filter(Boolean).join(" ");
}

function setDesk(isOpen) {
  for (const id of ["desk", "engine", "forget"]) $(id).hidden = !isOpen;
  $("sign-in").hidden = isOpen;
  showEmpty();
}

/* Question */

/** Return the form of a task: a free prompt, a choice of labels, or an answer from a document. */
function formOf(task) {
  if (!task.name) return "chat";
  return task.labels.length ? "classify" : "extract";
}

const chosenTask = () => tasks.get($("task").value) ?? FREE_TEXT;

function fillDesk(models, found) {
  if (!models.length) {
    throw new Failure(403, { words: ["This key has access to no model.", "Ask the server's administrator for access."] });
  }
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  known = found;
  fillTasks();
}

/** List the tasks of the chosen model: those that it brings, then those that any model takes. */
function fillTasks() {
  const model = $("model").value;
  const before = $("task").value;
  const own = known.filter((task) => task.models?.includes(model));
  const any = known.filter((task) => !task.models?.length);
  tasks = new Map([...own, ...any].map((task) => [task.name, task]));
  $("task").replaceChildren(...[...tasks.keys()].map((name) => new Option(name, name)), new Option("free text", ""));
  if (tasks.has(before)) $("task").value = before;
  showTask();
}

/** Fit the fields to the chosen task. */
function showTask() {
  const task = chosenTask();
  const form = formOf(task);
  const hints = {
    chat: "Your text is the whole prompt. The answer appears word by word.",
    classify: `Answers with one of: ${task.labels.join(", ")}.`,
    extract: task.quoted === false ? "Answers with a text." : "Answers with a tag or a number, and shows its position in the document.",
  };
  $("task-hint").textContent = [task.title && `${task.title}.`, hints[form]].filter(Boolean).join(" ");
  $("text-label").textContent = TEXT_LABELS[form];
  $("about-field").hidden = task.about === "none";
  $("about-label").textContent = task.about === "entity" ? "Entity, as the text writes it" : "Question";
  $("about").replaceWith(makeAbout(task));
  $("threshold-field").hidden = form !== "classify";
  $("tokens-field").hidden = form !== "chat";
}

/** Make the field for the entity or question: a choice if the task has a fixed list. */
function makeAbout(task) {
  const field = make(task.questions.length ? "select" : "input");
  if (task.questions.length) field.append(...task.questions.map((question) => new Option(question, question)));
  else Object.assign(field, { autocomplete: "off", spellcheck: false });
  return Object.assign(field, { id: "about", required: task.about !== "none" });
}

function showThreshold() {
  const value = Number($("threshold").value);
  $("threshold-value").textContent = value ? `${value} %` : "never";
}

function fillText(text) {
  $("text").value = text;
  showLength();
  $("text").focus();
}

function showLength() {
  const length = $("text").value.length;
  $("length").textContent = length ? `${count(length)} characters` : "";
}

function fillExample() {
  const task = chosenTask();
  const form = formOf(task);
  const [text, about = ""] = EXAMPLES[form === "classify" ? task.about : form];
  $("about").value = about;
  fillText(text);
}

async function openFile() {
  const [file] = $("file").files;
  if (!file) return;
  try {
    fillText(new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()));
  } catch {
    const words = [`${file.name} is not a text in UTF-8.`, "Save it as plain text or XML, or paste the part that you need."];
    showFailure(new Failure(-1, { words }));
  } finally {
    $("file").value = "";
  }
}

/* Asking */

const ASK = { chat: askText, classify: askLabel, extract: askQuote };

/** Send the question in the form, and show the answer or the error. */
async function ask() {
  if (current) return;
  const task = chosenTask();
  const call = { abort: new AbortController(), began: performance.now(), model: $("model").value, task: task.name || "free text" };
  current = call;
  setBusy(true);
  showWaiting(call, task.labels.length || 2);
  $("answer").parentElement.scrollIntoView({ block: "nearest" }); // on a phone the panel is below the fold
  try {
    await ASK[formOf(task)](task, call);
  } catch (error) {
    if (error.name === "AbortError") showStopped();
    else if (error.status === 401) askForKey(error);
    else showFailure(asFailure(error), () => $("ask").requestSubmit());
  } finally {
    current = null;
    setBusy(false);
  }
}

function stop() {
  current?.abort.abort();
}

function setBusy(isBusy) {
  $("send").setAttribute("aria-disabled", String(isBusy)); // `disabled` would lose the keyboard focus
  if (!isBusy && document.activeElement === $("stop")) $("send").focus();
  $("stop").hidden = !isBusy;
  $("answer").setAttribute("aria-busy", String(isBusy));
}

async function askJson(path, body, call) {
  const reply = await send(path, { model: call.model, ...body }, call.abort.signal);
  call.requestId = requestIdOf(reply);
  return reply.json();
}

async function askLabel(task, call) {
  const threshold = Number($("threshold").value) / 100;
  const body = { task: task.name, texts: [$("text").value] };
  if (task.about !== "none") body.about = $("about").value;
  if (threshold) body.threshold = threshold;
  const { results } = await askJson("/v1/classify", body, call);
  showLabels(results[0], threshold, call);
}

async function askQuote(task, call) {
  const context = $("text").value;
  const answer = await askJson("/v1/extract", { task: task.name, context, question: $("about").value }, call);
  showExtract(answer, context, call, task.quoted !== false);
}

async function askText(_task, call) {
  const body = {
    model: call.model,
    messages: [{ role: "user", content: $("text").value }],
    stream: true,
  };
  if ($("tokens").value) body.max_tokens = Number($("tokens").value);
  const reply = await send("/v1/chat/completions", body, call.abort.signal);
  call.requestId = requestIdOf(reply);
  let stream = null;
  let finish = null;
  try {
    for await (const data of readEvents(reply.body)) {
      if (data === "[DONE]") return (stream ?? openStream()).end(finish, call);
      const event = JSON.parse(data);
      if (event.error) throw incomplete(event.error.message, call);
      const [choice] = event.choices; // empty in the event that holds only the usage
      finish = choice?.finish_reason ?? finish;
      if (choice?.delta?.content) (stream ??= openStream()).push(choice.delta.content);
    }
  } catch (error) {
    // fetch throws TypeError if the connection is cut; its message does not help the user.
    if (error instanceof TypeError) throw incomplete("", call);
    throw error;
  }
  throw incomplete("", call);
}

function incomplete(message, call) {
  const words = ["The answer is incomplete.", "The connection or the model failed before its end. Ask again."];
  return new Failure(503, { message, words, requestId: call.requestId });
}

/* Wiring */

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    $("key-fault").textContent = "A key has only ASCII letters, digits and signs, without spaces. Copy it again.";
    return;
  }
  session.key = key;
  enter();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("forget").addEventListener("click", () => askForKey());
$("task").addEventListener("change", showTask);
$("model").addEventListener("change", fillTasks);
$("threshold").addEventListener("input", showThreshold);
$("text").addEventListener("input", showLength);
$("example").addEventListener("click", fillExample);
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", openFile);
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("desk").hidden) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

showThreshold();
if (session.key) enter();
else askForKey();
