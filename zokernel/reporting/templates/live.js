"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg", H = 320, PAD = { left: 62, right: 12, top: 10, bottom: 40 };
  const rows = [];
  let last = 0, steps = 0;
  const make = (name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const ticks = (low, high) => {
    const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw), found = [];
    for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * step; t += step) found.push(t);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let k = Math.floor(low); k <= Math.ceil(high); k += 1) if (k >= low && k <= high) found.push(k);
    return found.length > 1 ? found : [low, high];
  };
  const smooth = (points) => {
    const half = Math.floor(points.length / 40);
    return points.map(([x], i) => {
      const part = points.slice(Math.max(0, i - half), i + half + 1);
      return [x, part.reduce((sum, p) => sum + p[1], 0) / part.length];
    });
  };
  const chart = (holder, lines, { log = false, name, unit }) => {
    const known = lines.map((line) => ({ ...line, points: line.points.filter((p) => p[1] !== null && p[2] !== null && (!log || p[1] > 0)) })).filter((line) => line.points.length);
    holder.replaceChildren();
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
      svg.append(make("line", { x1: PAD.left, x2: W - PAD.right, y1: Y(y), y2: Y(y), class: "axis" }), make("text", { x: PAD.left - 6, y: Y(y) + 4, "text-anchor": "end" }, Number(y.toPrecision(3)).toString()));
    }
    svg.append(make("text", { x: (W + PAD.left) / 2, y: H - 6, "text-anchor": "middle" }, "step"), make("text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` }, unit));
    for (const line of known) {
      if (line.band) svg.append(make("polygon", { points: [...line.points.map(([x, low]) => [x, low]), ...line.points.map(([x, , high]) => [x, high]).reverse()].map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" "), fill: line.color, opacity: line.opacity }));
      else if (line.dots) for (const [x, y] of line.points) svg.append(make("circle", { cx: X(x), cy: Y(y), r: line.dots, fill: line.color, opacity: line.opacity ?? 1 }));
      else svg.append(make("polyline", { points: line.points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" "), stroke: line.color, "stroke-width": line.width ?? 2, "stroke-dasharray": line.dash ?? "none", opacity: line.opacity ?? 1, "stroke-linejoin": "round" }));
    }
    const legend = document.createElement("div");
    legend.className = "legend";
    for (const line of known.filter((one) => one.name)) {
      const item = document.createElement("span"), swatch = document.createElement("i");
      swatch.style.background = line.color;
      if (line.band) { swatch.style.height = "10px"; swatch.style.opacity = line.opacity; }
      item.append(swatch, line.name);
      legend.append(item);
    }
    holder.append(svg, legend);
  };
  const facts = (pairs) => {
    const holder = document.getElementById("facts");
    holder.replaceChildren(...pairs.map(([name, value]) => {
      const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name; dd.textContent = value; box.append(dt, dd);
      return box;
    }));
  };
  const show = (data) => {
    const status = document.getElementById("status");
    status.textContent = data.waiting ? "Waiting for the run to begin." : data.finished ? "The run has finished." : `Running: step ${data.steps.toLocaleString()}.`;
    if (data.waiting || !rows.length) return;
    const losses = rows.filter((r) => r.loss !== null).map((r) => [r.step, r.loss]), scalars = rows.filter((r) => r.projected_gradient).map((r) => [r.step, r.projected_gradient]);
    const lines = [
      { name: "training, smoothed", color: "#3f8fd2", points: smooth(losses) },
      { name: "training batches", color: "#3f8fd2", points: losses, width: 1, opacity: 0.3 },
      { name: "validation", color: "#d55e00", points: data.evaluations.map((e) => [e.step, e.loss ?? null]), dots: 4 },
    ];
    if (data.prediction?.step) {
      const upTo = (key) => data.prediction.step.map((s, i) => [s, data.prediction[key][i]]).filter((p) => p[0] <= data.steps);
      lines.push({ name: "predicted", color: "#b0609a", points: upTo("expected_loss"), dash: "6 4" }, { name: "90% of runs, predicted", color: "#b0609a", points: upTo("band_low"), width: 1, dash: "2 3" }, { name: "", color: "#b0609a", points: upTo("band_high"), width: 1, dash: "2 3" });
    }
    chart(document.getElementById("loss"), lines, { name: "Loss", unit: data.rewarded ? "loss (negative reward)" : "loss (nats)" });
    const judged = rows.filter((r) => r.rewards);
    document.getElementById("rewards-section").hidden = !judged.length;
    chart(document.getElementById("rewards"), judged.length ? [
      { name: "median of the members", color: "#3f8fd2", points: judged.map((r) => [r.step, r.rewards.median]) },
      { name: "all members", color: "#3f8fd2", band: true, opacity: 0.18, points: judged.map((r) => [r.step, r.rewards.least, r.rewards.most]) },
      { name: "half of them", color: "#3f8fd2", band: true, opacity: 0.4, points: judged.map((r) => [r.step, r.rewards.lower, r.rewards.upper]) },
      { name: "validation", color: "#d55e00", points: data.evaluations.map((e) => [e.step, e.reward ?? null]), dots: 4 },
    ] : [], { name: "Rewards of the population", unit: "reward" });
    const squares = smooth(scalars.map(([x, y]) => [x, y * y])).map(([x, y]) => [x, Math.sqrt(y)]);
    const gradient = [{ name: "moving rms", color: "#3f8fd2", points: squares }, { name: "each step", color: "#3f8fd2", points: scalars, dots: 1.6, opacity: 0.4 }];
    if (data.gradient_norm && scalars.length) gradient.push({ name: "gradient norm, predicted by the plan", color: "#d55e00", dash: "6 4", points: [[0, data.gradient_norm[0]], [data.steps, data.gradient_norm[0]]] });
    chart(document.getElementById("gradient"), gradient, { log: true, name: "Projected gradient", unit: "projected gradient" });
    const end = rows.at(-1);
    facts([["method", data.method || "unknown"], ["step", data.steps.toLocaleString()], ["loss", losses.length ? losses.at(-1)[1].toPrecision(4) : ""], ["forward passes", end.forwards ? end.forwards.toLocaleString() : ""]].filter((pair) => pair[1]));
    document.getElementById("score").textContent = data.rewarded ? "reward" : "accuracy";
    document.getElementById("evaluations").replaceChildren(...data.evaluations.map((e) => {
      const row = document.createElement("tr");
      for (const value of [e.step, e.loss, data.rewarded ? e.reward : e.accuracy]) {
        const cell = document.createElement("td");
        cell.className = "number"; cell.textContent = value === undefined || value === null ? "" : Number(value.toPrecision(4)).toLocaleString(undefined, { maximumFractionDigits: 6 });
        row.append(cell);
      }
      return row;
    }));
  };
  const poll = async () => {
    let wait = 2000;
    try {
      const answer = await fetch(`/data.json?since=${last}`);
      const data = await answer.json();
      if (data.steps !== undefined && data.steps < last) rows.length = 0;
      rows.push(...data.rows);
      if (rows.length) last = rows.at(-1).step;
      steps = data.steps ?? 0;
      show(data);
      if (data.finished) wait = 10000;
    } catch {
      document.getElementById("status").textContent = "The server does not answer; trying again.";
      wait = 5000;
    }
    setTimeout(poll, wait);
  };
  poll();
})();
