// A chat, and what the cache holds meanwhile. Text of models and people only ever becomes textContent.

const HISTORY = 240; // looks at the cache that the chart shows
const REST = 6; // looks without a request after which the chart stands still
const FEWEST = 40; // looks that fill the chart's width
const CHART = { left: 70, right: 12, top: 12, bottom: 28, height: 220 };
const LIGHT = [232, 241, 250], DARK = [16, 72, 136]; // of the map's scale, as in page.css
const $ = (id) => document.getElementById(id);

const about = await (await fetch("page.json")).json();
const messages = []; // of the chat so far
const looks = [];
let leave = null; // aborts the request that is running
let atRest = REST;

// What a person reads

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${count.toFixed(unit === 0 || count >= 100 ? 0 : 1)} ${units[unit]}`;
}

function compared(held, plain) {
  if (!held || !plain) return "Nothing is running.";
  const ratio = plain / held;
  if (ratio >= 1) return `${ratio.toFixed(1)} × smaller than a plain model's cache.`;
  return `${(1 / ratio).toFixed(1)} × larger than a plain model's cache: so short a text fills the method's pages badly.`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The chat

function say(role, text) {
  $("empty")?.remove();
  const said = element("div", `said ${role}`);
  const who = { user: "you", assistant: about.model }[role];
  const [words, facts] = [element("p", "text", text), element("p", "facts")];
  said.append(element("p", "who", who), words, facts);
  $("log").append(said);
  $("log").scrollTop = $("log").scrollHeight;
  return { said, words, facts };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function requestOf(text) {
  const settings = {
    model: about.model,
    max_tokens: Number($("tokens").value) || 200,
    temperature: Number($("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
  };
  return about.chat ? ["v1/chat/completions", { ...settings, messages }] : ["v1/completions", { ...settings, prompt: text }];
}

async function answer(text, shown) {
  const [path, body] = requestOf(text);
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal: leave.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let began = null, pieces = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    const piece = choice?.text ?? choice?.delta?.content ?? "";
    if (piece) {
      const atEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 40;
      shown.words.textContent += piece;
      if (atEnd) $("log").scrollTop = $("log").scrollHeight;
      began ??= performance.now();
      showSpeed(pieces++, began);
    }
    if (event.usage) showUsage(event.usage, shown, began);
  }
}

function showSpeed(tokens, began) {
  const seconds = (performance.now() - began) / 1000;
  if (tokens && seconds > 0.05) $("speed").textContent = (tokens / seconds).toFixed(1);
}

function showUsage(usage, shown, began) {
  const { seen_tokens: seen, kept_tokens: kept, held_bytes: held, plain_bytes: plain } = usage.kvtrain;
  if (began !== null) showSpeed(usage.completion_tokens - 1, began);
  const tokens = `${usage.prompt_tokens} + ${usage.completion_tokens} tokens`;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const reused = cached ? `, ${cached} of them known already` : "";
  shown.facts.textContent =
    `${tokens}${reused} · a head keeps ${kept.toFixed(0)} of ${seen} · ${bytes(held)} instead of ${bytes(plain)}`;
}

async function ask(text) {
  say("user", text);
  messages.push({ role: "user", content: text });
  const shown = say("assistant", "");
  leave = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("speed").textContent = "–";
  try {
    await answer(text, shown);
  } catch (error) {
    if (error.name === "AbortError") {
      shown.facts.textContent = "stopped";
    } else {
      shown.said.classList.add("failed");
      shown.facts.textContent = `failed: ${error.message}`;
    }
  }
  if (shown.words.textContent) messages.push({ role: "assistant", content: shown.words.textContent });
  else messages.pop(); // an unanswered message is asked anew
  leave = null;
  $("send").disabled = false;
  $("stop").disabled = true;
}

// The cache

function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function roundUp(number) {
  let step = 1024;
  while (step < number) step *= 2;
  return step;
}

function drawChart() {
  const { left, right, top, bottom, height } = CHART;
  const width = Math.max(240, $("chart").clientWidth); // text keeps its size on a phone
  const wide = Math.max(FEWEST, looks.length);
  $("chart").setAttribute("viewBox", `0 0 ${width} ${height}`);
  const most = roundUp(Math.max(1, ...looks.map((look) => Math.max(look.held, look.plain))));
  const x = (number) => left + ((width - left - right) * number) / (wide - 1);
  const y = (count) => height - bottom - ((height - top - bottom) * count) / most;
  const drawn = [];
  for (const count of [0, most / 2, most]) {
    drawn.push(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(count), y2: y(count) }));
    drawn.push(shape("text", { x: left - 8, y: y(count) + 4, "text-anchor": "end" }, bytes(count)));
  }
  const first = wide - looks.length;
  for (const name of ["plain", "held"]) {
    const points = looks.map((look, number) => `${x(first + number).toFixed(1)},${y(look[name]).toFixed(1)}`);
    drawn.push(shape("polyline", { class: name, points: points.join(" ") }));
  }
  drawn.push(shape("text", { x: left, y: height - 8 }, `${wide / 2} seconds of work ago`));
  drawn.push(shape("text", { x: width - right, y: height - 8, "text-anchor": "end" }, "latest"));
  $("chart").replaceChildren(...drawn);
}

function paint(cell, share) {
  const mixed = LIGHT.map((from, number) => Math.round(from + (DARK[number] - from) * Math.min(1, share)));
  cell.style.backgroundColor = `rgb(${mixed.join(" ")})`;
  cell.style.color = share > 0.64 ? "#ffffff" : "#1c2024";
}

function drawMap(shares) {
  if (!shares.length) return;
  const heads = Math.max(...shares.map((layer) => layer.length));
  const top = element("tr");
  top.append(element("th", "", "layer \\\u00a0head"), ...Array.from({ length: heads }, (_, head) => element("th", "", head + 1)));
  const rows = shares.map((layer, number) => {
    const row = element("tr");
    row.append(element("th", "", number + 1));
    for (const share of layer) {
      const cell = element("td", share === null ? "none" : "share", share === null ? "–" : (100 * share).toFixed(0));
      if (share !== null) paint(cell, share);
      row.append(cell);
    }
    return row;
  });
  const absent = shares.some((layer) => layer.includes(null)) ? "; – has no keys of its own" : "";
  $("map").replaceChildren(element("caption", "", `Percent, over all running requests${absent}.`), top, ...rows);
}

function show(facts) {
  $("state").textContent = facts.ok ? "serving" : `closed: ${facts.reason}`;
  $("total-speed").textContent = facts.tokens_per_second.toFixed(1);
  $("running").textContent = facts.running;
  $("queued").textContent = facts.queued;
  $("held").textContent = bytes(facts.running_bytes);
  $("plain").textContent = bytes(facts.plain_bytes);
  $("compared").textContent = compared(facts.running_bytes, facts.plain_bytes);
  $("all").textContent = bytes(facts.held_bytes);
  $("all").dataset.bytes = facts.held_bytes;
  $("budget").textContent = bytes(facts.budget_bytes);
  $("kept").textContent = bytes(facts.kept_bytes);
  atRest = facts.running ? 0 : atRest + 1;
  if (atRest < REST) {
    looks.push({ held: facts.running_bytes, plain: facts.plain_bytes });
    if (looks.length > HISTORY) looks.shift();
    drawChart();
  }
  drawMap(facts.kept_share);
}

// Begin

$("model").textContent = about.model;
document.title = `${about.model} · kvtrain`;
if (!about.chat) {
  $("talk-title").textContent = "Continue a text";
  $("prompt-label").textContent = "Text to go on from (this model has no chat template)";
  $("send").textContent = "Go on";
}
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || leave) return;
  $("prompt").value = "";
  ask(text);
});
$("stop").addEventListener("click", () => leave?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") leave?.abort();
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === $("prompt")) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
new ResizeObserver(drawChart).observe($("chart").parentElement);
const live = new EventSource("live");
live.onmessage = (event) => show(JSON.parse(event.data));
live.onerror = () => { $("state").textContent = "not connected"; };
