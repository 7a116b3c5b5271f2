// The conversation: what is asked, the answer as it comes, calls of tools and their results.

import { ServerError, getJson, postStream, setKey } from "/page/server.js";

const by = (id) => document.getElementById(id);
const log = by("log");
const messages = []; // as the API wants them, without the system message
let model = "";
let under_way = null; // AbortController of the answer that is being written

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get weather information. Call this tool when the user needs to get weather information",
      parameters: {
        type: "object",
        required: ["city"],
        properties: { city: { type: "string", description: "City name" } },
      },
    },
  },
];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function show(role, who, text) {
  by("hint").hidden = true;
  const shown = element("div", `message ${role}`);
  shown.append(element("span", "who", who), element("span", "text", text));
  log.append(shown);
  log.scrollTop = log.scrollHeight;
  return shown;
}

function settings() {
  const found = {};
  const temperature = by("temperature").value;
  const atMost = by("max-tokens").value;
  const tools = by("tools").value.trim();
  if (temperature !== "") found.temperature = Number(temperature);
  if (atMost !== "") found.max_tokens = Number(atMost);
  if (tools) found.tools = JSON.parse(tools);
  return found;
}

function conversation() {
  const system = by("system").value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function working(is_working) {
  by("send").hidden = is_working;
  by("stop").hidden = !is_working;
}

async function answer() {
  let asked;
  try {
    asked = settings();
    by("settings-error").hidden = true;
  } catch (error) {
    by("settings-error").textContent = `Tools are no JSON: ${error.message}`;
    by("settings-error").hidden = false;
    by("settings-error").closest("details").open = true;
    return;
  }
  const shown = show("assistant", model, "");
  const text = shown.querySelector(".text");
  shown.setAttribute("aria-busy", "true"); // read out once it is whole
  under_way = new AbortController();
  working(true);
  const calls = [];
  let finish = "";
  try {
    const body = { model, messages: conversation(), ...asked };
    for await (const chunk of postStream("/v1/chat/completions", body, under_way.signal)) {
      const choice = chunk.choices[0];
      if (!choice) continue;
      const delta = choice.delta ?? {};
      if (delta.content) text.textContent += delta.content;
      for (const piece of delta.tool_calls ?? []) takePiece(calls, piece, shown);
      finish = choice.finish_reason ?? finish;
      log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    fail(shown, error);
  } finally {
    shown.setAttribute("aria-busy", "false");
    under_way = null;
    working(false);
  }
  const said = { role: "assistant", content: text.textContent };
  if (calls.length) said.tool_calls = calls.map((call) => call.message);
  if (said.content || calls.length) messages.push(said);
  if (finish === "length") shown.append(element("p", "small", "Cut at the bound on tokens."));
  if (finish === "tool_calls") calls.forEach((call) => askForResult(call, calls));
}

function takePiece(calls, piece, shown) {
  let call = calls[piece.index];
  if (!call) {
    const card = element("div", "call");
    const name = element("code", "", "");
    const title = element("p", "small", "calls ");
    title.append(name);
    card.append(title, element("pre", "", ""));
    shown.append(card);
    call = { card, name, message: { id: "", type: "function", function: { name: "", arguments: "" } } };
    calls[piece.index] = call;
  }
  const made = call.message.function;
  if (piece.id) call.message.id = piece.id;
  if (piece.function?.name) made.name += piece.function.name;
  if (piece.function?.arguments) made.arguments += piece.function.arguments;
  call.name.textContent = made.name;
  call.card.querySelector("pre").textContent = made.arguments;
}

// You are the tool: type what it would answer. The model goes on once every call has its result.
function askForResult(call, calls) {
  const form = element("form");
  const label = element("label", "", "Its result ");
  const input = element("input");
  const button = element("button", "quiet", "Give it");
  label.append(input);
  form.append(label, button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    call.result = input.value;
    form.replaceWith(element("pre", "", `→ ${input.value}`));
    if (calls.some((other) => other.result === undefined)) return;
    for (const other of calls) {
      const { id, function: made } = other.message;
      messages.push({ role: "tool", tool_call_id: id, name: made.name, content: other.result });
    }
    answer();
  });
  call.card.append(form);
  if (call === calls[0]) input.focus();
}

function fail(shown, error) {
  if (error.name === "AbortError") {
    shown.append(element("p", "small", "Stopped."));
    return;
  }
  shown.classList.add("failed");
  shown.append(element("p", "", error.message));
  if (error instanceof ServerError && error.status === 401) by("key-form").hidden = false;
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = by("question").value.trim();
  if (!question || under_way) return;
  by("question").value = "";
  messages.push({ role: "user", content: question });
  show("user", "you", question);
  answer();
});

by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") under_way?.abort();
});
by("stop").addEventListener("click", () => under_way?.abort());

by("clear").addEventListener("click", () => {
  under_way?.abort();
  messages.length = 0;
  log.querySelectorAll(".message").forEach((shown) => shown.remove());
  by("hint").hidden = false;
  by("question").focus();
});

by("example").addEventListener("click", () => {
  by("tools").value = JSON.stringify(EXAMPLE, null, 2);
});

by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(by("key").value);
  by("key").value = "";
  by("key-form").hidden = true;
  begin();
});

async function begin() {
  try {
    model = (await getJson("/v1/models")).data[0].id;
    by("served").textContent = model;
    document.title = `${model} · k2dist`;
  } catch (error) {
    by("served").textContent = error.message;
    if (error instanceof ServerError && error.status === 401) by("key-form").hidden = false;
  }
}

begin();
by("question").focus();
