// The overview: a plot, a list, and ways to a latent's page. Its data is the script before this one.
"use strict";
(() => {
  const data = window.tubelet, byId = (id) => document.getElementById(id);
  const ROWS = 25, NEAR = 14, PAD = { left: 62, right: 14, top: 14, bottom: 44 };
  const RAMPS = { light: ["#d0c7ea", "#7a4fc0", "#b3246b", "#d95f02"], dark: ["#46406b", "#8f7ae5", "#ef6aa8", "#ffd166"] };
  const columns = data.columns, dark = matchMedia("(prefers-color-scheme: dark)");
  const canvas = byId("plot"), context = canvas.getContext("2d"), chosen = byId("chosen");
  const has = (name) => columns.some((column) => column.name === name);
  const usable = columns.filter((column) => new Set(column.values.filter((v) => v !== null)).size > 1);
  const pick = (...names) => names.find((name) => usable.some((column) => column.name === name)) || (usable[0] || columns[0]).name;
  const state = {
    x: pick("frequency"), y: pick("mean_activation"), color: pick("monosemanticity", "coherence", "label_focus"),
    label: "", sort: "latent", down: "", page: "0", at: "",
    ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))),
  };
  const column = (name) => columns.find((each) => each.name === name);
  const address = (i) => `latents/${String(data.latents[i]).padStart(6, "0")}.html`;
  const text = (value) => {
    if (value === null || value === undefined) return "—";
    const size = Math.abs(value);
    if (value && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e").replaceAll("-", "−");
    return (size >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)))).replace("-", "−");
  };
  function make(tag, words, attributes = {}) {
    const node = document.createElement(tag);
    if (words !== undefined) node.textContent = words;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }
  function save() {
    const kept = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== "" && value !== null));
    history.replaceState(null, "", `#${kept}`);
  }
  function open(i) { state.at = String(data.latents[i]); save(); location.href = address(i); }
  function thumbnail(i) {
    const screen = make("div", undefined, { class: "screen thumb" });
    if (data.clip[i] !== null) {
      const across = Math.ceil(Math.sqrt(data.frames[i])), frame = data.frame[i];
      const image = make("img", undefined, { class: "sheet", alt: "", loading: "lazy", src: `clips/${String(data.clip[i]).padStart(8, "0")}.webp` });
      const places = { columns: across, rows: Math.ceil(data.frames[i] / across), column: frame % across, row: Math.floor(frame / across) };
      for (const [name, value] of Object.entries(places)) image.style.setProperty(`--${name}`, value);
      screen.append(image);
    }
    return screen;
  }
  const label = (i) => (data.label[i] === null ? null : data.labels[data.label[i]]);

  let visible = [], points = [], current = -1;

  // An axis is logarithmic where all values are above 0 and reach over two decades.
  function axis(name, low, high) {
    const values = visible.map((i) => column(name).values[i]).filter((v) => v !== null);
    let least = Math.min(...values), most = Math.max(...values);
    if (!values.length) [least, most] = [0, 1];
    const log = least > 0 && most / least > 100;
    if (least === most) { const room = Math.abs(least) * 0.1 || 1; least -= room; most += room; }
    const f = log ? Math.log10 : (v) => v, from = f(least), span = f(most) - f(least), room = span * 0.04;
    const place = (v) => low + ((f(v) - from + room) / (span + 2 * room)) * (high - low);
    const ticks = [];
    if (log) {
      const every = Math.ceil(span / 5);
      for (let power = Math.ceil(from); power <= f(most) + 1e-9; power += Math.max(1, every)) ticks.push(10 ** power);
      if (ticks.length < 2) ticks.splice(0, ticks.length, least, most);
    } else {
      const rough = span / 4, unit = 10 ** Math.floor(Math.log10(rough)), nice = [1, 2, 5, 10].find((n) => n * unit >= rough) * unit;
      for (let n = Math.ceil(least / nice - 1e-9); n * nice <= most + 1e-9 * span; n++) ticks.push(n * nice);
    }
    return { place, ticks, title: column(name).title + (log ? " (log)" : "") };
  }
  function mixed(ramp, share) {
    const at = share * (ramp.length - 1), low = Math.min(Math.floor(at), ramp.length - 2), part = at - low;
    const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const [a, b] = [parse(ramp[low]), parse(ramp[low + 1])];
    return `rgb(${a.map((from, i) => Math.round(from + (b[i] - from) * part)).join(" ")})`;
  }
  function draw() {
    const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1, style = getComputedStyle(document.body);
    const css = (name) => style.getPropertyValue(name).trim();
    canvas.width = box.width * ratio; canvas.height = box.height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const x = axis(state.x, PAD.left, box.width - PAD.right), y = axis(state.y, box.height - PAD.bottom, PAD.top);
    context.font = "12px system-ui, sans-serif"; context.fillStyle = css("--ink-soft"); context.strokeStyle = css("--line"); context.lineWidth = 1;
    context.textAlign = "center"; context.textBaseline = "top";
    for (const tick of x.ticks) {
      const at = x.place(tick);
      context.beginPath(); context.moveTo(at, PAD.top); context.lineTo(at, box.height - PAD.bottom); context.stroke();
      context.fillText(text(tick), at, box.height - PAD.bottom + 6);
    }
    context.fillText(x.title, (PAD.left + box.width - PAD.right) / 2, box.height - 19);
    context.textAlign = "right"; context.textBaseline = "middle";
    for (const tick of y.ticks) {
      const at = y.place(tick);
      context.beginPath(); context.moveTo(PAD.left, at); context.lineTo(box.width - PAD.right, at); context.stroke();
      context.fillText(text(tick), PAD.left - 6, at);
    }
    context.save(); context.translate(13, (PAD.top + box.height - PAD.bottom) / 2); context.rotate(-Math.PI / 2); context.textAlign = "center";
    context.fillText(y.title, 0, 0); context.restore();

    const hue = column(state.color), known = visible.map((i) => hue.values[i]).filter((v) => v !== null);
    // By rank: a few extreme values would leave all others one color.
    const order = [...known].sort((a, b) => a - b), rank = (v) => order.findIndex((each) => each >= v) / Math.max(1, order.length - 1);
    const ranks = new Map(order.map((v) => [v, 0])); for (const v of ranks.keys()) ranks.set(v, rank(v));
    const ramp = dark.matches ? RAMPS.dark : RAMPS.light;
    points = [];
    for (const i of visible) {
      const [vx, vy, vc] = [column(state.x).values[i], column(state.y).values[i], hue.values[i]];
      if (vx === null || vy === null) continue;
      points.push({ i, x: x.place(vx), y: y.place(vy), color: vc === null ? css("--bar") : mixed(ramp, ranks.get(vc)) });
    }
    const radius = points.length > 3000 ? 2 : points.length > 300 ? 3.5 : 5;
    context.globalAlpha = 0.85;
    for (const point of points) { context.fillStyle = point.color; context.beginPath(); context.arc(point.x, point.y, radius, 0, 7); context.fill(); }
    context.globalAlpha = 1;
    const now = points.find((point) => point.i === current);
    if (now) { context.strokeStyle = css("--ink"); context.lineWidth = 2.5; context.beginPath(); context.arc(now.x, now.y, radius + 4, 0, 7); context.stroke(); }
    const legend = byId("legend");
    const bar = make("i"); bar.style.background = `linear-gradient(90deg, ${ramp.join(", ")})`;
    legend.replaceChildren(make("span", `${hue.title}: ${text(order[0])}`), bar, make("span", `${text(order[order.length - 1])} (by rank)`));
  }
  function choose(i, announce = true) {
    if (i === current) return;
    current = i; draw();
    if (!announce) return;
    const list = make("dl");
    for (const name of [...new Set([state.x, state.y, state.color])]) list.append(make("dt", column(name).title), make("dd", text(column(name).values[i])));
    const link = make("a", `Open latent ${data.latents[i]}`, { href: address(i) });
    link.addEventListener("click", () => { state.at = String(data.latents[i]); save(); });
    const words = make("div", label(i) === null ? "" : `${label(i)} (${data.agree[i]})`, { dir: "auto" });
    chosen.classList.add("full");
    chosen.replaceChildren(thumbnail(i), link, words, list);
  }
  function nearestTo(px, py, reach) {
    let best = -1, least = reach * reach;
    for (const point of points) {
      const distance = (point.x - px) ** 2 + (point.y - py) ** 2;
      if (distance < least) { least = distance; best = point.i; }
    }
    return best;
  }
  function at(event) { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; }
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse") return;
    const i = nearestTo(...at(event), NEAR);
    canvas.style.cursor = i < 0 ? "crosshair" : "pointer";
    if (i >= 0) choose(i);
  });
  canvas.addEventListener("click", (event) => {
    const touch = event.pointerType === "touch", i = nearestTo(...at(event), touch ? 2 * NEAR : NEAR);
    // A finger covers several points: the first tap selects one, the link next to the plot opens it.
    if (i >= 0) touch ? choose(i) : open(i);
  });
  canvas.addEventListener("keydown", (event) => {
    const toward = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" && current >= 0) { event.preventDefault(); open(current); }
    if (!points.length) return;
    if (event.key === "Home" || event.key === "End") { event.preventDefault(); choose(points[event.key === "Home" ? 0 : points.length - 1].i); }
    if (!toward) return;
    event.preventDefault();
    const from = points.find((point) => point.i === current);
    if (!from) { choose(points[0].i); return; }
    let best = null, least = Infinity;
    for (const point of points) {
      const dx = point.x - from.x, dy = point.y - from.y, along = dx * toward[0] + dy * toward[1], off = Math.abs(dx * toward[1]) + Math.abs(dy * toward[0]);
      if (point.i !== current && along > 0 && along + 2 * off < least) { least = along + 2 * off; best = point.i; }
    }
    if (best !== null) choose(best);
  });

  function sorted() {
    const down = state.down === "1" ? -1 : 1;
    const key = state.sort === "latent" ? (i) => data.latents[i] : state.sort === "label" ? (i) => label(i) : (i) => column(state.sort).values[i];
    return [...visible].sort((a, b) => {
      const [u, v] = [key(a), key(b)];
      if (u === null || v === null) return (u === null) - (v === null);
      return u < v ? -down : u > v ? down : data.latents[a] - data.latents[b];
    });
  }
  function table() {
    const node = document.querySelector(".latents"), rows = sorted(), pages = Math.max(1, Math.ceil(rows.length / ROWS));
    const page = Math.min(pages - 1, Math.max(0, Number(state.page) || 0)); state.page = String(page);
    const head = make("tr");
    head.append(make("td", undefined, { class: "pic" }));
    const titles = [["latent", "Latent", "Number of the latent"]];
    if (data.labels.length) titles.push(["label", "Top label", "Most frequent label of its strongest clips, and how many of them have it"]);
    for (const each of columns) titles.push([each.name, each.title, each.definition]);
    for (const [name, title, definition] of titles) {
      const cell = make("th", undefined, { scope: "col" }), button = make("button", title, { type: "button", title: definition });
      if (state.sort === name) { cell.setAttribute("aria-sort", state.down === "1" ? "descending" : "ascending"); button.textContent += state.down === "1" ? " ↓" : " ↑"; }
      button.addEventListener("click", () => {
        // Figures begin with the highest, names and numbers with the first.
        const first = name === "latent" || name === "label" ? "" : "1";
        state.down = state.sort === name ? (state.down === "1" ? "" : "1") : first;
        state.sort = name; state.page = "0"; save(); table();
        document.querySelector(".latents [aria-sort] button").focus();
      });
      cell.append(button); head.append(cell);
    }
    node.tHead.replaceChildren(head);
    node.tBodies[0].replaceChildren(...rows.slice(page * ROWS, (page + 1) * ROWS).map((i) => {
      const row = make("tr"), pic = make("td", undefined, { class: "pic" }), name = make("th", undefined, { scope: "row" });
      pic.append(thumbnail(i));
      const link = make("a", `${data.latents[i]}`, { href: address(i), "aria-label": `Latent ${data.latents[i]}` });
      link.addEventListener("click", () => { state.at = String(data.latents[i]); save(); });
      name.append(link); row.append(pic, name);
      if (data.labels.length) {
        const words = make("td", undefined, { class: "words" });
        if (label(i) !== null) words.append(make("bdi", label(i)), " ", make("small", data.agree[i]));
        row.append(words);
      }
      for (const each of columns) row.append(make("td", text(each.values[i])));
      return row;
    }));
    byId("counted").textContent = `${rows.length.toLocaleString("en")} latents. A column's title sorts by it.`;
    byId("page").textContent = `Page ${page + 1} of ${pages}`;
    byId("earlier").disabled = page === 0; byId("later").disabled = page === pages - 1;
  }
  function turn(by) { state.page = String(Number(state.page) + by); save(); table(); byId("table").focus({ preventScroll: true }); }
  byId("earlier").addEventListener("click", () => turn(-1));
  byId("later").addEventListener("click", () => turn(1));

  function update() {
    const wanted = state.label === "" ? null : data.labels.indexOf(state.label);
    visible = data.latents.map((_, i) => i).filter((i) => wanted === null || data.label[i] === wanted);
    if (!visible.includes(current)) current = -1;
    draw(); table();
  }
  for (const id of ["x", "y", "color"]) {
    if (!has(state[id])) state[id] = columns[0].name;
    for (const each of columns) byId(id).append(make("option", each.title, { value: each.name }));
    byId(id).value = state[id];
    byId(id).addEventListener("change", () => { state[id] = byId(id).value; save(); update(); });
  }
  if (!data.labels.includes(state.label)) state.label = "";
  if (state.sort !== "latent" && state.sort !== "label" && !has(state.sort)) state.sort = "latent";
  byId("labeled").hidden = !data.labels.length;
  byId("label").append(make("option", "all", { value: "" }), ...data.labels.map((name) => make("option", name, { value: name })));
  byId("label").value = state.label;
  byId("label").addEventListener("change", () => { state.label = byId("label").value; state.page = "0"; save(); update(); });
  byId("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    const i = data.latents.indexOf(Number(byId("number").value)), typed = byId("number").value;
    if (typed !== "" && i >= 0) open(i);
    else byId("told").textContent = typed === "" ? "Type a latent's number." : `Latent ${typed} has no page here: it fires on none of the clips, or was not chosen.`;
  });
  update();
  if (state.at !== "") { const i = data.latents.indexOf(Number(state.at)); if (i >= 0) choose(i); }
  new ResizeObserver(draw).observe(canvas);
  dark.addEventListener("change", draw);
})();
