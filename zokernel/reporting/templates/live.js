"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg", H = 320, PAD = { left: 62, right: 12, top: 10, bottom: 40 };
  const rows = [];
  let last = 0;
  // How each series is told apart: a colour of its own, and a dash or a marker of its own.
  const LOOKS = {
    training: { color: 1, dash: "none" },
    batches: { color: 6, marker: "dot" },
    validation: { color: 2, dash: "7 4", marker: "circle" },
    predicted: { color: 4, dash: "9 3 2 3" },
    predictedBand: { color: 5, dash: "2 3", band: true },
    median: { color: 0, dash: "none" },
    half: { color: 1, dash: "7 4", band: true },
    all: { color: 6, dash: "2 3", band: true },
  };
  const colorOf = (look) => look.color ? `var(--series-${look.color})` : "var(--ink)";
  const make = (name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const ticks = (low, high) => {
    const raw = (high - low) / 6 || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw), found = [];
    for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * step; t += step) found.push(t);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let k = Math.floor(low); k <= Math.ceil(high); k += 1) if (k >= low && k <= high) found.push(k);
    return found.length > 1 ? found : [low, high];
  };
  // Values of many sizes are drawn on a logarithmic axis.
  const wide = (points) => {
    const values = points.map((p) => p[1]), least = Math.min(...values);
    return least > 0 && Math.max(...values) > 50 * least;
  };
  const smooth = (points) => {
    const half = Math.max(1, Math.floor(points.length / 40));
    return points.map(([x], i) => {
      const part = points.slice(Math.max(0, i - half), i + half + 1);
      return [x, part.reduce((sum, p) => sum + p[1], 0) / part.length];
    });
  };
  const chart = (holder, lines, { log = false, name, unit }) => {
    const known = lines.map((line) => ({ ...line, points: line.points.filter((p) => p[1] !== null && p[2] !== null && (!log || p[1] > 0)) })).filter((line) => line.points.length);
    holder.replaceChildren();
    holder.parentNode.hidden = !known.length;
    if (!known.length) return;
    const W = Math.max(320, Math.min(1040, holder.clientWidth));
    const value = (y) => log ? Math.log10(y) : y;
    const xs = known.flatMap((line) => line.points.map((p) => p[0])), ys = known.flatMap((line) => line.points.flatMap((p) => p.slice(1).map(value)));
    const x0 = Math.min(0, ...xs), x1 = Math.max(1, ...xs);
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    const margin = 0.05 * (y1 - y0) || 0.5;
    y0 -= margin; y1 += margin;
    const X = (x) => PAD.left + (x - x0) / (x1 - x0) * (W - PAD.left - PAD.right);
    const Y = (y) => H - PAD.bottom - (value(y) - y0) / (y1 - y0) * (H - PAD.top - PAD.bottom);
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `${name} against the step; last value ${known[0].points.at(-1)[1].toPrecision(4)}` });
    for (const t of ticks(x0, x1)) svg.append(make("line", { x1: X(t), x2: X(t), y1: PAD.top, y2: H - PAD.bottom, class: "axis" }), make("text", { x: X(t), y: H - PAD.bottom + 16, "text-anchor": "middle" }, t.toLocaleString()));
    for (const t of log ? logTicks(y0, y1) : ticks(y0, y1)) {
      const y = log ? 10 ** t : t;
      svg.append(make("line", { x1: PAD.left, x2: W - PAD.right, y1: Y(y), y2: Y(y), class: "axis" }), make("text", { x: PAD.left - 6, y: Y(y) + 4, "text-anchor": "end" }, log && Math.abs(t) > 4 ? y.toExponential(0).replace("+", "") : Number(y.toPrecision(3)).toString()));
    }
    svg.append(make("text", { x: (W + PAD.left) / 2, y: H - 6, "text-anchor": "middle" }, "step"), make("text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` }, unit));
    for (const line of known) svg.append(...drawn(line, X, Y));
    const legend = document.createElement("div");
    legend.className = "legend";
    for (const line of known) {
      const item = document.createElement("span"), swatch = make("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" });
      const points = LOOKS[line.look].band ? [[1, 12, 2], [33, 12, 2]] : LOOKS[line.look].dash ? [[1, 7], [17, 7], [33, 7]] : [[17, 7]];
      swatch.append(...drawn({ look: line.look, points, swatch: true }, (x) => x, (y) => y));
      item.append(swatch, line.name);
      legend.append(item);
    }
    holder.append(svg, legend);
  };
  // The shapes of one series: a band with dashed edges, or a line, markers, or both.
  const drawn = (line, X, Y) => {
    const look = LOOKS[line.look], color = colorOf(look), found = [];
    const place = ([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`;
    const add = (name, attributes, style) => {
      const node = make(name, { ...attributes, "data-series": line.look });
      Object.assign(node.style, style);
      found.push(node);
    };
    if (look.band) {
      const low = line.points.map(([x, y]) => [x, y]), high = line.points.map(([x, , y]) => [x, y]).reverse();
      add("polygon", { points: [...low, ...high].map(place).join(" "), "stroke-dasharray": look.dash }, { fill: color, fillOpacity: 0.25, stroke: color, strokeWidth: 1 });
      return found;
    }
    if (look.dash) add("polyline", { points: line.points.map(place).join(" "), "stroke-dasharray": look.dash, "stroke-linejoin": "round" }, { stroke: color, strokeWidth: 2 });
    if (look.marker) for (const point of line.swatch && look.dash ? [line.points[1]] : line.points) {
      const [cx, cy] = place(point).split(",");
      add("circle", { cx, cy, r: look.marker === "dot" ? (line.points.length > 300 ? 1.6 : 2.4) : 4.5 }, { fill: color });
    }
    return found;
  };
  const facts = (pairs) => {
    document.getElementById("facts").replaceChildren(...pairs.map(([name, value]) => {
      const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name; dd.textContent = value; box.append(dt, dd);
      return box;
    }));
  };
  const table = (data) => {
    const columns = [["step", "step"], ["loss", "loss"], ...data.scores], body = document.getElementById("evaluations");
    body.closest("section").hidden = !data.evaluations.length;
    document.getElementById("scores").replaceChildren(...columns.map(([, name]) => {
      const head = document.createElement("th");
      head.scope = "col"; head.className = "number"; head.textContent = name;
      return head;
    }));
    body.replaceChildren(...data.evaluations.map((evaluation) => {
      const row = document.createElement("tr");
      for (const [name] of columns) {
        const cell = document.createElement("td"), value = evaluation[name];
        cell.className = "number"; cell.textContent = value === undefined || value === null ? "" : Number(value.toPrecision(4)).toLocaleString(undefined, { maximumFractionDigits: 6 });
        row.append(cell);
      }
      return row;
    }));
  };
  const show = (data) => {
    document.title = data.title;
    document.getElementById("status").textContent = data.status;
    const bar = document.getElementById("progress");
    bar.hidden = data.percent === null;
    bar.value = data.percent ?? 0;
    facts(data.facts);
    if (!rows.length) return;
    const losses = rows.filter((r) => r.loss !== null).map((r) => [r.step, r.loss]), scalars = rows.filter((r) => r.projected_gradient).map((r) => [r.step, r.projected_gradient]);
    const lines = [
      { name: "training batches", look: "batches", points: losses },
      { name: "their moving average", look: "training", points: smooth(losses) },
      { name: "validation", look: "validation", points: data.evaluations.map((e) => [e.step, e.loss ?? null]) },
    ];
    if (data.prediction?.step) {
      const upTo = (...keys) => data.prediction.step.map((s, i) => [s, ...keys.map((key) => data.prediction[key][i])]).filter((p) => p[0] <= data.steps);
      lines.unshift({ name: "90% of runs, predicted", look: "predictedBand", points: upTo("band_low", "band_high") });
      lines.push({ name: "predicted", look: "predicted", points: upTo("expected_loss") });
    }
    chart(document.getElementById("loss"), lines, { name: "Loss", unit: data.rewarded ? "loss (negative reward)" : "loss (nats)", log: wide(losses) });
    const judged = rows.filter((r) => r.rewards);
    chart(document.getElementById("rewards"), judged.length ? [
      { name: "all members", look: "all", points: judged.map((r) => [r.step, r.rewards.least, r.rewards.most]) },
      { name: "half of them", look: "half", points: judged.map((r) => [r.step, r.rewards.lower, r.rewards.upper]) },
      { name: "median member", look: "median", points: judged.map((r) => [r.step, r.rewards.median]) },
      { name: "validation", look: "validation", points: data.evaluations.map((e) => [e.step, e.reward ?? null]) },
    ] : [], { name: "Rewards of the population", unit: "reward" });
    const squares = smooth(scalars.map(([x, y]) => [x, y * y])).map(([x, y]) => [x, Math.sqrt(y)]);
    const gradient = [{ name: "each step", look: "batches", points: scalars }, { name: "moving rms", look: "training", points: squares }];
    if (data.slope && scalars.length) gradient.push({ name: "rms slope, predicted by the plan", look: "predicted", points: [[0, data.slope[0]], [data.steps, data.slope[0]]] });
    chart(document.getElementById("gradient"), gradient, { log: wide(scalars), name: "Projected gradient", unit: "projected gradient" });
    table(data);
  };
  const poll = async () => {
    let wait = 2000;
    try {
      const answer = await fetch(`/data.json?since=${last}`);
      const data = await answer.json();
      if (data.steps !== undefined && data.steps < last) rows.length = 0;
      rows.push(...data.rows);
      if (rows.length) last = rows.at(-1).step;
      show(data);
      if (data.state === "finished") wait = 10000;
    } catch {
      document.getElementById("status").textContent = "The server does not answer; trying again.";
      wait = 5000;
    }
    setTimeout(poll, wait);
  };
  poll();
})();
