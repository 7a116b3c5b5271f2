// The cluster, once a second while the page is seen: figures, lanes and ranks, where the experts are busy.

import { drawHeat, drawPace, shares } from "/page/drawing.js";
import { getJson } from "/page/server.js";

const by = (id) => document.getElementById(id);
const EVERY_MS = 1000;
const RECENT_S = 10;
const seen = []; // states of the last minute, oldest first
let rates = [];
let marked = null; // [row, layer] of the heat map under the pointer or the keyboard
let share = [];
let rows = [];
let heatRanks = [];

function put(id, text) {
  if (by(id).textContent !== text) by(id).textContent = text;
}

function percent(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)}%` : "–";
}

const sum = (items, read) => items.reduce((total, item) => total + read(item), 0);

function take(state) {
  const last = seen.at(-1);
  if (last && (last.generation !== state.generation || last.generated_tokens > state.generated_tokens)) {
    seen.length = 0; // it was begun anew
    rates = [];
  }
  seen.push(state);
  while (seen.length > 61) seen.shift();
  const before = seen.at(-3) ?? seen[0];
  const past_s = state.at_s - before.at_s;
  const rate = past_s > 0 ? (state.generated_tokens - before.generated_tokens) / past_s : 0;
  rates = [...rates, rate].slice(-60);
  showFigures(state, rate);
  showLanes(state);
  showHeat(state);
}

function showFigures(state, rate) {
  const trouble = state.unwell || state.not_ready;
  put("status", state.unwell ? "unwell" : state.not_ready ? "not ready" : "ready");
  by("status").classList.toggle("bad", Boolean(trouble));
  put("trouble", trouble);
  by("trouble").hidden = !trouble;
  const generation = state.generation === null ? "" : `generation ${state.generation}`;
  const recoveries = state.recoveries ? `${state.recoveries} recoveries` : "";
  put("phase", [state.cluster, state.phase, generation, recoveries].filter(Boolean).join(" · "));
  put("tokens-per-s", rate >= 100 ? String(Math.round(rate)) : rate.toFixed(1));
  put("running", String(sum(state.lanes, (lane) => lane.running)));
  put("waiting", String(state.queued + sum(state.lanes, (lane) => lane.waiting)));
  put("cache", percent(sum(state.lanes, (lane) => lane.pages_used), sum(state.lanes, (lane) => lane.pages)));
  put("hits", percent(sum(state.lanes, (lane) => lane.cached_tokens), sum(state.lanes, (lane) => lane.prompt_tokens)));
  drawPace(by("pace"), rates);
}

function showLanes(state) {
  const known = new Map(state.ranks.map((rank) => [rank.rank, rank]));
  const groups = state.lanes.map((lane) => laneCard(lane, known));
  const others = state.ranks.filter((rank) => rank.lane === null);
  if (others.length) groups.push(card("Experts only", "", others.map(rankItem)));
  by("lanes").replaceChildren(...groups);
}

function laneCard(lane, known) {
  const ranks = lane.ranks.map((rank) => rankItem(known.get(rank)));
  const busy = lane.is_silent ? "does not answer" : `${lane.running} running, ${lane.waiting} waiting`;
  const shown = card(`Lane ${lane.lane}`, busy, ranks);
  const pages = document.createElement("progress");
  pages.max = lane.pages || 1;
  pages.value = lane.pages_used;
  pages.setAttribute("aria-label", `Pages of lane ${lane.lane} in use`);
  pages.title = `${lane.pages_used} of ${lane.pages} pages in use`;
  shown.insertBefore(pages, shown.lastChild);
  return shown;
}

function card(title, text, items) {
  const shown = document.createElement("div");
  shown.className = "lane";
  const bar = document.createElement("div");
  bar.className = "bar";
  const name = document.createElement("strong");
  name.textContent = title;
  const said = document.createElement("span");
  said.className = "small";
  said.textContent = text;
  bar.append(name, said);
  const list = document.createElement("ul");
  list.className = "ranks";
  list.append(...items);
  shown.append(bar, list);
  return shown;
}

function rankItem(rank) {
  const item = document.createElement("li");
  const word = rank.is_late ? "late" : rank.silent_s > 2 ? "silent" : rank.state === "joined" ? "" : rank.state;
  item.textContent = word ? `rank ${rank.rank}, ${word}` : `rank ${rank.rank}`;
  item.title = `${rank.node} · ${rank.steps} steps · ${rank.wait_s.toFixed(1)} s in collectives`;
  if (rank.is_late || rank.state === "dead") item.className = "bad";
  else if (word) item.className = "off";
  return item;
}

function showHeat(state) {
  const recent = by("span").value === "recent";
  const first = seen.find((old) => state.at_s - old.at_s <= RECENT_S) ?? state;
  heatRanks = state.ranks.filter((rank) => rank.expert_rows.length);
  const before = new Map((recent ? first.ranks : []).map((rank) => [rank.rank, rank.expert_rows]));
  rows = heatRanks.map((rank) => {
    const old = before.get(rank.rank) ?? [];
    return rank.expert_rows.map((value, layer) => value - (old[layer] ?? 0));
  });
  share = shares(rows);
  paintHeat();
}

function paintHeat() {
  drawHeat(by("heat"), share, marked);
  by("heat-text").textContent = heatText();
}

function heatText() {
  if (!rows.some((rank) => rank.some(Boolean))) return "No tokens were routed in this time.";
  const [row, layer] = marked ?? busiest();
  if (rows[row]?.[layer] === undefined) return "";
  const what = marked ? "" : "Busiest: ";
  const times = share[row][layer].toFixed(2);
  return `${what}MoE layer ${layer}, rank ${heatRanks[row].rank}: ${rows[row][layer]} rows, ${times} times the average.`;
}

function busiest() {
  let found = [0, 0];
  share.forEach((rank, row) =>
    rank.forEach((value, layer) => {
      if (value > share[found[0]][found[1]]) found = [row, layer];
    }),
  );
  return found;
}

const heat = by("heat");
heat.addEventListener("pointermove", (event) => {
  if (!share.length) return;
  const box = heat.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * share.length);
  const layer = Math.floor(((event.clientX - box.left) / box.width) * share[0].length);
  marked = [Math.min(Math.max(row, 0), share.length - 1), Math.min(Math.max(layer, 0), share[0].length - 1)];
  paintHeat();
});
heat.addEventListener("pointerleave", () => {
  marked = null;
  paintHeat();
});
heat.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (!move || !share.length) return;
  event.preventDefault();
  const [row, layer] = marked ?? busiest();
  marked = [
    Math.min(Math.max(row + move[0], 0), share.length - 1),
    Math.min(Math.max(layer + move[1], 0), share[0].length - 1),
  ];
  paintHeat();
});
heat.addEventListener("blur", () => {
  marked = null;
  paintHeat();
});
by("span").addEventListener("change", () => seen.length && showHeat(seen.at(-1)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintHeat);
addEventListener("resize", paintHeat);

async function look() {
  if (document.visibilityState === "visible") {
    try {
      take(await getJson("/v1/cluster"));
    } catch (error) {
      put("status", "no answer");
      by("status").classList.add("bad");
      put("trouble", error.message);
      by("trouble").hidden = false;
    }
  }
  setTimeout(look, EVERY_MS);
}

look();
