// Two pictures: a line of the last minute, and a heat map of expert load.

const SVG = "http://www.w3.org/2000/svg";

export function drawPace(svg, values) {
  const top = Math.max(1, ...values);
  const step = 240 / Math.max(values.length - 1, 1);
  const points = values.map((value, index) => `${(index * step).toFixed(1)},${(46 - (44 * value) / top).toFixed(1)}`);
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points.join(" "));
  const area = document.createElementNS(SVG, "path");
  area.setAttribute("d", points.length ? `M0,48 L${points.join(" L")} L240,48 Z` : "");
  svg.replaceChildren(area, line);
  svg.setAttribute("aria-label", `Tokens per second over the last minute; most ${Math.round(top)}`);
}

// rows[rank][layer] -> the share of the layer's average over ranks: 1 is even.
export function shares(rows) {
  const layers = rows[0]?.length ?? 0;
  const average = Array.from({ length: layers }, (_, layer) =>
    rows.reduce((sum, rank) => sum + rank[layer], 0) / rows.length,
  );
  return rows.map((rank) => rank.map((value, layer) => (average[layer] ? value / average[layer] : 0)));
}

// One row of cells for each rank, a column for each layer. `marked`: [rank, layer] or null.
export function drawHeat(canvas, share, marked) {
  const ranks = share.length;
  const layers = share[0]?.length ?? 0;
  const width = canvas.clientWidth || 400;
  const cell = Math.max(4, Math.min(22, Math.floor(320 / Math.max(ranks, 1))));
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = Math.max(ranks, 1) * cell * scale;
  canvas.style.height = `${Math.max(ranks, 1) * cell}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const colours = getComputedStyle(document.documentElement);
  const low = rgb(colours.getPropertyValue("--heat-low"));
  const high = rgb(colours.getPropertyValue("--heat-high"));
  const gap = cell > 8 && width / layers > 5 ? 1 : 0;
  share.forEach((row, rank) =>
    row.forEach((value, layer) => {
      const part = Math.min(value / 2, 1);
      const mixed = low.map((start, index) => Math.round(start + (high[index] - start) * part));
      context.fillStyle = `rgb(${mixed.join(",")})`;
      const x = (layer * width) / layers;
      context.fillRect(x, rank * cell, width / layers - gap, cell - gap);
    }),
  );
  if (marked) {
    context.strokeStyle = colours.getPropertyValue("--ink");
    context.lineWidth = 1.5;
    context.strokeRect((marked[1] * width) / layers, marked[0] * cell, width / layers - gap, cell - gap);
  }
}

function rgb(hex) {
  const digits = hex.trim().slice(1);
  return [0, 2, 4].map((at) => parseInt(digits.slice(at, at + 2), 16));
}
