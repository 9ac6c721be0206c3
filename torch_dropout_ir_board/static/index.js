// What comes out of a log becomes text nodes and numbers, never markup or code.
const COLOURS = ["#2b83ba", "#e6550d", "#31a354", "#9467bd", "#d62728", "#17becf", "#a6a61f", "#e377c2", "#8c564b", "#7f7f7f"];
const NUMBERS = {
  "test accuracy": "demo/test_accuracy", R_1: "regularizer/R1", "R_1 at one p": "demo/R1_at_p", R_2: "regularizer/R2",
  "R_2 of the masks": "regularizer/R2_dropout_noise", R_S: "loss/R_S", "modified loss": "loss/modified", "effective ratio": "condensation/effective_ratio/",
  "effective neurons": "condensation/effective_neurons/", "top eigenvalue": "sharpness/top_eigenvalue", trace: "sharpness/trace", "share of the time": "cost/share",
};
const STEM = /^[^/]*\/[^/]*/; // of a tag: what it is; then comes a site's or a layer's name
const S = { off: new Set(), log: new Set(["density", "slice", "curve"]), step: Infinity, curve: "regularizer/R1" };
const held = new Map(), CHARTS = ["places", "density", "slice", "curve"]; let steps = [0], turn = 0, later = 0, sizing = 0, embedded = null;
const at = (id) => document.getElementById(id); const runs = () => S.index.runs.filter((run) => !S.off.has(run));
const colour = (run) => COLOURS[S.index.runs.indexOf(run) % COLOURS.length], last = (points) => (points ?? []).filter(([step]) => step <= S.step).at(-1);
function show(x, digits = 3) {
  return !Number.isFinite(x) ? "–" : x && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3) ? x.toExponential(1).replace(".0", "") : String(+x.toPrecision(digits));
}
export function measured(x, error) { // to the digits that the error leaves: two of an error that begins with 1
  if (!(error > 0) || !Number.isFinite(x)) return show(x);
  const first = Math.floor(Math.log10(error)), digits = error < 1.95 * 10 ** first ? 1 - first : -first, size = Math.floor(Math.log10(Math.max(Math.abs(x), error)));
  if (size + digits > 4) return `${+x.toPrecision(5)} ± ${show(+error.toPrecision(1))}`;
  if (size >= -3 && size < 6) return [x, error].map((y) => (digits < 0 ? Math.round(y) : y.toFixed(digits))).join(" ± ");
  return `(${[x, error].map((y) => (y / 10 ** size).toFixed(Math.max(0, size + digits))).join(" ± ")})e${size}`;
}
function put(parent, tag, text = "", more = {}) {
  const made = document.createElementNS(tag === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI, tag);
  for (const [name, value] of Object.entries(more)) typeof value === "function" ? (made[name] = value) : made.setAttribute(name, value);
  made.textContent = text; return parent.appendChild(made);
}
async function get(route, of = "") {
  const key = JSON.stringify([route, of]); if (embedded) return embedded[key] ?? {};
  if (held.size > 900) held.delete(held.keys().next().value);
  if (!held.has(key)) {
    const asked = fetch(`${route}?of=${encodeURIComponent(of)}`).then((answer) => answer.json());
    held.set(key, asked.catch(() => (held.delete(key), { error: "No answer." })).then((found) => (found.error && route !== "picture" ? {} : found)));
  }
  return held.get(key);
}
const place = () => steps.findLastIndex((step) => step <= S.step), move = (by) => draw({ step: steps[Math.max(0, Math.min(steps.length - 1, place() + by))] }), flip = (set, name) => (set.delete(name) || set.add(name), draw());
function play() {
  clearInterval(S.playing); const start = !S.playing && steps.length > 1;
  S.playing = start && setInterval(() => +document.body.dataset.drawn === turn && (S.step >= steps.at(-1) ? play() : move(1)), 400);
  at("play").textContent = start ? "❚❚ pause" : "▶ play";
  if (start && S.step >= steps.at(-1)) draw({ step: steps[0] });
}
const beside = (by) => draw({ layer: S.layers.at((S.layers.indexOf(S.layer) + by) % S.layers.length) ?? "" });
const KEYS = {
  ArrowLeft: () => move(-1), ArrowRight: () => move(1), Home: () => move(-1e9), End: () => move(1e9), " ": play,
  "[": () => beside(-1), "]": () => beside(1), l: () => draw({ log: new Set(S.log.size ? [] : ["density", "slice", "curve"]) }),
};
function key(event) {
  const { key, target } = event, run = S.index.runs[key - 1], act = KEYS[key] ?? (run !== undefined && (() => flip(S.off, run)));
  if (!act || event.ctrlKey || event.metaKey || event.altKey || target.tagName === "SELECT" || (key === " " && target.tagName === "BUTTON")) return;
  act(), event.preventDefault();
}
async function draw(changes = {}) {
  const own = ++turn, atEnd = S.step >= steps.at(-1); Object.assign(S, changes);
  const tags = Object.values(NUMBERS).map((tag) => (tag.endsWith("/") ? tag + S.layer : tag));
  const error = (tag) => ["_standard_error", "_residual"].map((end) => tag.replace(STEM, `$&${end}`)).find((t) => S.index.scalars[t]);
  const series = (of) => Promise.all(of.map((tag) => (S.index.scalars[tag] ? get("scalars", tag) : {})));
  const [values, errors, [curve, around], maps, places, density, slice] = await Promise.all([
    series(tags), series(tags.map(error)), series([S.curve, error(S.curve)]),
    get("images", "condensation/cosine/" + S.layer), get("images", "condensation/orientation_amplitude/" + S.layer),
    get("histograms", "sharpness/spectral_density"), get("histograms", "sharpness/loss_slice"),
  ]);
  const newest = values.flatMap((of) => runs().flatMap((run) => (of[run] ?? []).slice(-1))).sort((a, b) => a[0] - b[0]).slice(-1);
  const seen = [maps, places, density, slice, curve].flatMap((of) => runs().flatMap((run) => of[run] ?? [])).concat(newest);
  steps = seen.length ? [...new Set(seen.map(([step]) => step))].sort((a, b) => a - b) : [0];
  if (atEnd && !("step" in changes)) S.step = steps.at(-1);
  const picture = async (run, point) => [run, point?.[0], point && (await get("picture", point[1] ?? ""))];
  const pictures = (of) => Promise.all(runs().map((run) => picture(run, last(of[run])))); const [heats, scatters] = await Promise.all([pictures(maps), pictures(places)]);
  if (own !== turn) return; // a later drawing has begun
  const focus = document.activeElement?.closest("section, #runs"), buttons = () => [...(focus?.querySelectorAll("button") ?? [])];
  const pressed = buttons().indexOf(document.activeElement); bar(), table(tags, values, errors), heat(heats.filter(([, step]) => step !== undefined));
  const lines = (of, points) => runs().flatMap((run) => (last(of[run])?.[1] ? [[run, points(last(of[run])[1])]] : []));
  const middle = ([low, high, counts], i) => low + ((i + 0.5) * (high - low)) / counts.length;
  const heights = (of, unit) => lines(of, (b) => b[2].map((y, i) => [middle(b, i), y / unit(b)]));
  const dots = scatters.flatMap(([run, , found]) => (found?.cells ? [[run, cells(found)]] : []));
  chart("places", "Orientation and amplitude", ["angle / π", "amplitude / largest"], dots, { x: [-1, 1], y: [0, 1] });
  chart("density", "Eigenvalues of the Hessian", ["eigenvalue", "density"], heights(density, (b) => (b[1] - b[0]) / b[2].length));
  chart("slice", "Loss along a random direction", ["step / norm of the weights", "R_S"], heights(slice, () => 1));
  const near = (points, by) => points.map(([step, y]) => [step, y, by.get(step)]), banded = (run) => [run, near(curve[run] ?? [], new Map(around[run]))];
  const name = Object.keys(NUMBERS).find((_, i) => tags[i] === S.curve) ?? S.curve, unit = /R1|R2|^loss/.test(S.curve) ? "units of the loss" : "";
  chart("curve", S.curve.endsWith("/" + S.layer) ? `${name}, layer ${S.layer}` : name, ["optimizer step", unit], runs().map(banded), { mark: S.step });
  document.body.dataset.drawn = own, buttons()[pressed]?.focus(); // a key's button is a new one now
}
function bar() {
  at("layer").replaceChildren(...S.layers.map((l) => new Option(l || "(the model itself)", l, false, l === S.layer)));
  Object.assign(at("slider"), { max: steps.length - 1, value: place() });
  at("step").textContent = `step ${steps[Math.max(0, place())]}`; at("runs").replaceChildren();
  for (const run of S.index.runs) {
    const box = put(at("runs"), "button", "", { "aria-pressed": !S.off.has(run), onclick: () => flip(S.off, run) });
    put(box, "span", "■ ").style.color = colour(run); put(box, "span", run);
  }
  if (!S.index.runs.length) put(at("runs"), "p", "No run here yet: attach an analysis, or try torch-dropout-ir demo.");
}
function table(tags, values, errors) {
  at("numbers").replaceChildren(); const newest = (run) => Math.max(...values.map((of) => last(of[run])?.[0] ?? 0)), body = put(at("numbers"), "table"), head = put(body, "tr");
  put(head, "th", "at this step", { title: "each as last measured: the step is under the pointer; italic: from long before the run's newest" }); for (const run of runs()) put(head, "th", "■", { title: run }).style.color = colour(run);
  Object.keys(NUMBERS).forEach((name, i) => {
    if (!runs().some((run) => last(values[i][run]))) return; const row = put(body, "tr");
    put(put(row, "th"), "button", name, { title: `${S.index.said[STEM.exec(tags[i])] ?? ""}\ndraw ${tags[i]}`, onclick: () => draw({ curve: tags[i] }) });
    for (const run of runs()) {
      const [step, value] = last(values[i][run]) ?? [], error = last(errors[i][run])?.[1], kind = /eigenvalue/.test(tags[i]) ? "residual" : "standard error";
      put(row, "td", measured(value, error), step === undefined ? {} : { class: newest(run) > 2 * step + 1 ? "faint" : "", title: `measured at step ${step}${error ? `; ± the ${kind}` : ""}` });
    }
  });
}
const chartHeight = () => Math.max(250, Math.min(360, innerHeight * 0.32)), bytes = (found) => Uint8Array.from(atob(found.cells), (c) => c.charCodeAt(0));
function cells({ rows, columns, levels, ...found }) { // the upper half is now: each cell above the middle colour is a dot
  const half = columns * Math.floor(rows / 2);
  const dot = (level, i) => [(2 * (i % columns) + 1) / columns - 1, 1 - (2 * Math.floor(i / columns) + 1) / rows, (2 * level) / (levels - 1) - 1];
  return [...bytes(found).subarray(0, half)].map(dot).filter(([, , weight]) => weight > 0 && weight <= 1);
}
function rgb(level, levels) {
  const t = (2 * level) / (levels - 1) - 1, end = t < 0 ? [33, 102, 172] : [178, 24, 43];
  return level >= levels ? [150, 150, 150, 255] : [...end.map((x) => 247 + Math.abs(t) * (x - 247)), 255];
}
function heat(pictures) {
  at("hint").hidden = true, at("maps").replaceChildren(); const below = at("maps").offsetTop > at("numbers").offsetTop; // of a wide table
  const left = innerHeight - chartHeight() - 172 - (below ? at("numbers").offsetHeight + 8 : 0); // by the charts and bars
  const side = Math.max(150, Math.min(420, Math.max(268, left - 46), at("maps").clientWidth / pictures.length - 14));
  at("maps").style.maxHeight = innerWidth < 1100 ? "none" : `${Math.max(left, side + 46)}px`;
  for (const [run, step, found] of pictures) {
    const figure = put(at("maps"), "figure"), caption = put(figure, "figcaption"), { rows, columns, levels } = found;
    figure.style.width = `${side}px`; put(caption, "span", "■ ").style.color = colour(run);
    put(caption, "span", `step ${step} · ${run}`, { title: run });
    if (!found.cells) { put(figure, "p", found.error, { class: "note" }); continue; }
    const canvas = put(figure, "canvas", "", { width: columns, height: rows, role: "img", "aria-label": `cosines, ${run}` });
    canvas.style.width = canvas.style.height = `${side}px`;
    const pen = canvas.getContext("2d"), image = pen.createImageData(columns, rows), all = bytes(found);
    all.forEach((level, i) => image.data.set(rgb(level, levels), 4 * i)); pen.putImageData(image, 0, 0);
    const value = (t) => show(+(found.low + t * (found.high - found.low)).toFixed(2));
    canvas.onmousemove = ({ offsetX, offsetY, clientX, clientY }) => {
      const [r, c] = [Math.floor((offsetY / side) * rows), Math.floor((offsetX / side) * columns)];
      const level = all[r * columns + c], names = [r, c].map((i) => found.names[i] ?? i).join(" × ");
      at("hint").hidden = !(level < levels); at("hint").textContent = `neurons ${names}: ${/,/.test(names) ? "mean " : ""}cosine ${value(level / (levels - 1))}`;
      Object.assign(at("hint").style, { left: `${Math.min(clientX + 12, innerWidth - 320)}px`, top: `${clientY + 14}px` });
    };
    canvas.onmouseleave = () => (at("hint").hidden = true); put(figure, "div", "", { class: "scale" });
    const ends = put(figure, "div", "", { class: "ends" }); for (const text of [value(0), "cosine of input weights", value(1)]) put(ends, "span", text);
  }
  if (!pictures.length) put(at("maps"), "p", "No cosines between neurons here.", { class: "note" });
}
function range(values, fixed) {
  const [low, high] = fixed ?? values.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]), by = Math.max(0.5, Math.abs(low) / 2); // about one alone: ticks differ
  return low < high ? [low, high] : [low - by, high + by];
}
function ticks(low, high, log) {
  if (log && high - low < 1) return ticks(10 ** low, 10 ** high).map(Math.log10);
  const raw = (high - low) / 5, ten = 10 ** Math.floor(Math.log10(raw)), nice = [1, 2, 5, 10].find((k) => k * ten >= raw) * ten;
  const by = log ? Math.max(1, nice) : nice, first = Math.ceil(low / by - 1e-9), count = Math.floor(high / by + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => (first + i) * by);
}
function chart(id, title, [xname, yname], series, { x, y, mark } = {}) {
  const host = at(id), W = host.clientWidth, H = chartHeight(), L = 48, R = 14, T = 18, B = 36; host.replaceChildren();
  const head = put(host, "h2", title), dots = id === "places", log = S.log.has(id), f = log ? Math.log10 : (v) => v;
  if (!dots) put(head, "button", log ? "log" : "linear", { title: "scale", onclick: () => flip(S.log, id) });
  const sound = ([u, v]) => v !== null && Number.isFinite(u) && Number.isFinite(f(v));
  const good = series.map(([run, points]) => [run, points.filter(sound)]), all = good.flatMap(([, points]) => points);
  const below = log && id !== "density" ? series.flatMap(([, points]) => points).filter(([, v]) => v !== null && v <= 0).length : 0;
  if (!all.length) return void put(host, "p", below ? "Nothing is above 0: press log for linear." : "Nothing recorded.", { class: "note" });
  const ends = all.flatMap(([, v, w = 0]) => [log ? Math.max(v - w, v / 10) : v - w, v + w]).map(f); // of an error beyond 0, a decade
  const [left, right] = range(all.map((p) => p[0]), x), [low, high] = range(ends, y);
  const bottom = log ? Math.max(low, high - 8) : low, [ux, uy] = [(W - L - R) / 4, (H - T - B) / 4];
  const px = (v) => (L + (4 * ux * (v - left)) / (right - left)).toFixed(1);
  const py = (v) => (H - B - 4 * uy * Math.max(0, (f(v) - bottom) / (high - bottom) || 0)).toFixed(1);
  const svg = put(host, "svg", "", { width: W, height: H, role: "img", "aria-label": title });
  const marks = ticks(bottom, high, log).map((v) => (log ? 10 ** v : v)), apart = Math.min(...marks.slice(1).map((v, i) => v - marks[i]));
  const digits = marks.length > 1 ? Math.min(7, Math.max(3, 1 + Math.ceil(Math.log10(Math.max(...marks.map(Math.abs)) / apart)))) : 3; // neighbours differ
  for (const value of marks) {
    const h = +py(value); put(svg, "line", "", { x1: L, x2: W - R, y1: h, y2: h, class: "grid" });
    put(svg, "text", show(value, digits), { x: L - 5, y: h + 4, "text-anchor": "end" });
  }
  for (const v of ticks(left, right)) put(svg, "text", show(v), { x: px(v), y: H - B + 14, "text-anchor": "middle" });
  put(svg, "text", xname, { x: (W + L) / 2, y: H - 5, "text-anchor": "middle" }); put(svg, "text", below ? `${yname} · ${below} not above 0: not on a log scale` : yname, { x: 2, y: 11 });
  if (mark >= left && mark <= right) put(svg, "line", "", { x1: px(mark), x2: px(mark), y1: T, y2: H - B, stroke: "gray" });
  for (const [run, points] of good) {
    const line = points.map((p) => `${px(p[0])},${py(p[1])}`).join(" "), own = colour(run);
    const side = (by) => points.map(([u, v, w = 0]) => `${px(u)},${py(v + by * w)}`), band = [...side(1), ...side(-1).reverse()].join(" ");
    if (!dots && points.some((p) => p[2])) put(svg, "polygon", "", { points: band, fill: own, opacity: 0.2 });
    if (!dots) put(svg, "polyline", "", { points: line, fill: "none", stroke: own, "stroke-width": 1.8 });
    const few = id === "curve" && points.length < 40; // single measurements are seen, with their errors
    for (const [u, v, w = 0] of dots || few ? points : []) {
      put(svg, "circle", "", { cx: px(u), cy: py(v), r: dots ? 2 + 2 * w : 2.5, fill: own, opacity: dots ? 0.55 : 1 });
      if (few) put(svg, "line", "", { x1: px(u), x2: px(u), y1: py(v + w), y2: py(v - w), stroke: own });
    }
  }
}
async function reload() {
  for (const key of held.keys()) if (!key.startsWith('["picture"')) held.delete(key);
  S.index = { runs: [], said: {}, images: {}, histograms: {}, scalars: {}, ...(await get("index")) };
  const tags = Object.keys({ ...S.index.images, ...S.index.scalars });
  const named = tags.map((tag) => /^condensation\/[^/]+\/(.*)$/s.exec(tag)?.[1]).filter((layer) => layer !== undefined);
  S.layers = [...new Set(named)].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  S.layer = S.layers.includes(S.layer) ? S.layer : S.layers[0] ?? ""; S.curve = S.index.scalars[S.curve] ? S.curve : tags.find((tag) => S.index.scalars[tag]) ?? S.curve;
  return draw();
}
export async function render(records = null) {
  embedded = records; document.body.insertAdjacentHTML("beforeend", `${embedded ? "" : '<link rel="stylesheet" href="style.css">'}
    <header><label>layer <select id="layer"></select></label><button id="play">▶ play</button>
    <input id="slider" type="range" min="0" aria-label="step"><output id="step"></output></header>
    <div id="runs"></div><main><div id="top"><section id="numbers"></section><section id="maps"></section></div>
    <div id="charts">${CHARTS.map((id) => `<section id="${id}"></section>`).join("")}</div></main>
    <footer>← → step · Home End · space plays · [ ] layer · 1–9 shows or hides a run · l log scales</footer><div id="hint" hidden></div>`);
  document.addEventListener("keydown", key), at("play").onclick = play, at("layer").onchange = (e) => draw({ layer: e.target.value });
  at("slider").oninput = (e) => draw({ step: steps[e.target.value] });
  if (parent !== window && !embedded) {
    const around = parent.document.body, theme = () => (document.documentElement.style.colorScheme = around.matches(".dark-mode") ? "dark" : "light");
    new MutationObserver(theme).observe(around, { attributeFilter: ["class"] }), theme();
    const { port1, port2 } = new MessageChannel(); port1.onmessage = () => { clearTimeout(later); later = setTimeout(reload, 100); };
    parent.postMessage("experimental.bootstrap", "*", [port2]);
  }
  addEventListener("resize", () => (clearTimeout(sizing), (sizing = setTimeout(draw, 100))));
  await reload();
}
