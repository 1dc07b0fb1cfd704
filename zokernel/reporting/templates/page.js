"use strict";
(() => {
  const root = document.documentElement;
  const store = {
    get() { try { return localStorage.getItem("zokernel-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("zokernel-theme", value); } catch { /* private mode: the choice lasts as long as the page */ } },
  };
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = document.getElementById("theme");
  const show = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours"); };
  if (store.get()) root.dataset.theme = store.get();
  show();
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; store.set(root.dataset.theme); show(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.key === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.key);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return a - b;
    }
    return typeof a === typeof b ? a.localeCompare(b, undefined, { numeric: true }) : typeof a === "number" ? -1 : 1;
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("th button");
    if (!button) return;
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]));
    body.append(...rows.map((pair) => pair[1]));
  });

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentNode.querySelector("pre").textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(button.parentNode.querySelector("pre")); button.textContent = "Selected"; }
    });
  }

  const viewer = document.getElementById("viewer"), stage = viewer.querySelector(".stage");
  let home = null, svg = null, full = null, box = null, drag = null;
  const apply = () => svg.setAttribute("viewBox", box.join(" "));
  const zoom = (factor, fx = 0.5, fy = 0.5) => {
    const width = Math.min(full[2] * 2, Math.max(full[2] / 40, box[2] * factor)), scale = width / box[2];
    box = [box[0] + box[2] * fx * (1 - scale), box[1] + box[3] * fy * (1 - scale), width, box[3] * scale];
    apply();
  };
  const move = (dx, dy) => { box = [box[0] + dx * box[2], box[1] + dy * box[3], box[2], box[3]]; apply(); };
  const fit = () => { box = [...full]; apply(); };
  for (const button of document.querySelectorAll(".drawing")) {
    button.addEventListener("click", () => {
      home = button; svg = button.querySelector("svg");
      full = svg.getAttribute("viewBox").split(/[ ,]+/).map(Number); box = [...full];
      viewer.querySelector("strong").textContent = button.dataset.title;
      stage.append(svg); viewer.showModal();
    });
  }
  viewer.addEventListener("close", () => { if (!home) return; fit(); home.append(svg); home.focus(); home = null; });
  for (const [name, act] of Object.entries({ in: () => zoom(0.7), out: () => zoom(1 / 0.7), fit, close: () => viewer.close() })) {
    viewer.querySelector(`[data-act=${name}]`).addEventListener("click", act);
  }
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    const place = stage.getBoundingClientRect();
    zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, (event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height);
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => { drag = [event.clientX, event.clientY]; stage.setPointerCapture(event.pointerId); });
  stage.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const place = stage.getBoundingClientRect();
    move((drag[0] - event.clientX) / place.width, (drag[1] - event.clientY) / place.height);
    drag = [event.clientX, event.clientY];
  });
  stage.addEventListener("pointerup", () => { drag = null; });
  viewer.addEventListener("keydown", (event) => {
    const act = { "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), "0": fit, ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, -0.1), ArrowDown: () => move(0, 0.1) }[event.key];
    if (act && svg) { event.preventDefault(); act(); }
  });
})();
