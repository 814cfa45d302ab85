// What moves in a report: class bars, confusions, the gallery. Text goes into the page as text only, never as HTML.
"use strict";
{
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const {classes, colours, rows, layers, images, per} = data;
const last = rows.length - 1;
const number = value => value === null || value === undefined ? "–" : value.toFixed(3);
const share = value => (100 * value).toFixed(value < 0.0995 ? 1 : 0) + " %";

function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings))
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function swatch(k) {
  const element = make("span", {className: "swatch", title: classes[k]});
  element.style.background = k ? colours[k] : "transparent";
  return element;
}
const rgb = text => [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16));
const palette = Object.fromEntries(Object.entries(colours).map(([k, text]) => [k, rgb(text)]));
const heat = data.heat.map(rgb);
const option = (value, text) => make("option", {value, textContent: text});
const occurring = Object.keys(colours).map(Number).sort((a, b) => classes[a].localeCompare(classes[b]));

// --- classes and confusions ------------------------------------------------------------------------------------------

const sortBars = {byName: false};
function drawBars() {
  const iou = rows[byId("class-stage").value].iou;
  const shown = classes.map((_, k) => k).filter(k => iou[k] !== null);
  shown.sort((a, b) => sortBars.byName ? (a && b ? classes[a].localeCompare(classes[b]) : a - b) : iou[a] - iou[b]);
  byId("bars").replaceChildren(...shown.map(k => {
    const fill = make("span"), name = make("span", {className: "name", textContent: classes[k], title: classes[k]});
    fill.style.width = 100 * iou[k] + "%";
    fill.style.background = k ? colours[k] : "#8a929c";
    const choose = make("button", {disabled: k === 0}, swatch(k), name);
    choose.onclick = () => { byId("class").value = k; filter(); byId("gallery").scrollIntoView(); };
    return make("li", {}, choose, make("span", {className: "bar"}, fill),
                make("span", {className: "value", textContent: number(iou[k])}));
  }));
  byId("by-iou").setAttribute("aria-pressed", !sortBars.byName);
  byId("by-name").setAttribute("aria-pressed", sortBars.byName);
}

const matrix = {at: [0, 0]};
function drawConfusions() {
  const cells = rows[byId("class-stage").value].confusion;
  const sums = new Map(), wrong = cells.filter(([i, j]) => i !== j);
  for (const [i, , n] of cells) sums.set(i, (sums.get(i) || 0) + n);
  const shown = [...new Set(cells.flatMap(([i, j]) => [i, j]))].sort((a, b) => a - b);
  Object.assign(matrix, {shown, sums, counts: new Map(cells.map(([i, j, n]) => [i + "," + j, n])), at: [0, 0]});
  const errors = wrong.reduce((sum, cell) => sum + cell[2], 0);
  const cell = text => make("td", {textContent: text});
  byId("confusions").replaceChildren(...wrong.sort((a, b) => b[2] - a[2]).slice(0, 10).map(([i, j, n]) =>
    make("tr", {}, ...[classes[i], classes[j], share(n / sums.get(i)), share(n / errors)].map(cell))));
  paintMatrix();
}
function paintMatrix() {
  const canvas = byId("matrix"), {shown, sums, counts, at} = matrix, style = getComputedStyle(document.body);
  const pen = canvas.getContext("2d");
  const room = canvas.parentElement.clientWidth - 2 * parseFloat(getComputedStyle(canvas.parentElement).paddingLeft);
  pen.font = "12px system-ui, sans-serif";
  const longest = Math.max(...shown.map(k => pen.measureText(classes[k]).width));
  const names = room > 480 || shown.length < 12 ? Math.min(longest + 12, 130, room / 3.2) : 0;
  const cell = Math.min(44, Math.max(2, (Math.min(room, 760) - names) / shown.length));
  const size = names + cell * shown.length, scale = devicePixelRatio || 1;
  Object.assign(matrix, {names, cell});
  canvas.width = canvas.height = Math.ceil(size * scale);
  canvas.style.width = canvas.style.height = size + "px";
  pen.scale(scale, scale);
  const [ink, accent, wash] = ["--ink", "--accent", "--wash"].map(name => style.getPropertyValue(name));
  pen.fillStyle = wash;
  pen.fillRect(names, names, size - names, size - names);
  shown.forEach((i, row) => shown.forEach((j, column) => {
    const part = (counts.get(i + "," + j) || 0) / (sums.get(i) || 1);
    pen.globalAlpha = Math.sqrt(part) * (i === j ? 0.35 : 1);
    pen.fillStyle = i === j ? ink : accent;
    pen.fillRect(names + column * cell, names + row * cell, cell - (cell > 6), cell - (cell > 6));
  }));
  pen.globalAlpha = 1;
  pen.fillStyle = pen.strokeStyle = ink;
  pen.font = `${Math.min(12, cell + 1)}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  if (names && cell >= 6) shown.forEach((k, place) => {
    const text = fit(pen, classes[k], names - 8), middle = names + (place + 0.5) * cell;
    pen.textAlign = "right";
    pen.fillText(text, names - 5, middle);
    pen.save();
    pen.translate(middle, names - 5);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "left";
    pen.fillText(text, 0, 0);
    pen.restore();
  });
  pen.lineWidth = 2;
  pen.strokeRect(names + at[1] * cell - 0.5, names + at[0] * cell - 0.5, cell, cell);
}
function fit(pen, text, width) {
  while (pen.measureText(text).width > width && text.length > 1) text = text.slice(0, -2) + "…";
  return text;
}
function tellCell(row, column) {
  const {shown, sums, counts} = matrix, top = shown.length - 1;
  matrix.at = [Math.min(top, Math.max(0, row)), Math.min(top, Math.max(0, column))];
  const [i, j] = matrix.at.map(place => shown[place]), n = counts.get(i + "," + j) || 0;
  byId("cell").textContent = `${classes[i]} ${i === j ? "found as" : "taken for"} ${classes[j]}: ` +
    `${share(n / (sums.get(i) || 1))} of its pixels (${n.toLocaleString()})`;
  paintMatrix();
}

// --- what a picture shows --------------------------------------------------------------------------------------------

const ERRORS = {correct: "#56b4e9", missed: "#e69f00", "false": "#cc79a7", "wrong class": "#f0e442"};
const MEANING = {correct: "object, found", missed: "object, missed (solid)",
                 "false": "background, taken for an object (stripes)",
                 "wrong class": "object, taken for another class (dots)"};
const errorColours = Object.fromEntries(Object.entries(ERRORS).map(([kind, text]) => [kind, rgb(text)]));
const kinds = ["photo", ...layers.map(layer => layer.kind)];
const shownLayers = ["photo", ...layers.map(layer => layer.name)];
const maskAt = kinds.indexOf("mask"), truthAt = kinds.indexOf("truth");
if (maskAt > 0 && truthAt > 0) { kinds.push("errors"); shownLayers.push("errors"); }
let position = maskAt > 0 ? maskAt : 0;

const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
async function inflate([width, height, text]) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return {width, height, values: new Uint8Array(await new Response(stream).arrayBuffer())};
}
function errorAt(found, truth) {
  if (truth === 255 || (!found && !truth)) return "";
  return found === truth ? "correct" : !found ? "missed" : !truth ? "false" : "wrong class";
}

function paint(canvas, kind, layer, other) {
  const {width, height, values} = layer, picture = new ImageData(width, height);
  const put = (at, colour, alpha) => { picture.data.set(colour, 4 * at); picture.data[4 * at + 3] = alpha; };
  for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at++) {
    const value = values[at];
    if (kind === "heat") put(at, heat[value], 175);
    else if (kind === "errors") {
      const error = errorAt(value, other.values[at]);
      if (!error) put(at, [0, 0, 0], 120);
      else put(at, errorColours[error], error === "correct" ? 130 : error === "false" && (x + y) % 6 < 2 ? 90
               : error === "wrong class" && x % 4 < 2 && y % 4 < 2 ? 90 : 235);
    } else if (value === 255) put(at, [128, 128, 128], (x + y) % 4 < 2 ? 220 : 120);
    else if (value) {
      const edge = x === 0 || y === 0 || x === width - 1 || y === height - 1
        || [at - 1, at + 1, at - width, at + width].some(next => values[next] !== value);
      put(at, edge ? [255, 255, 255] : palette[value] || [255, 255, 255], edge ? 235 : 165);
    }
  }
  Object.assign(canvas, {width, height});
  canvas.getContext("2d").putImageData(picture, 0, 0);
}
function tell(kind, layer, x, y, other) {
  const at = Math.floor(y * layer.height) * layer.width + Math.floor(x * layer.width);
  const value = layer.values[at];
  if (kind === "heat") return `foreground ${(value / (heat.length - 1)).toFixed(2)}`;
  if (kind !== "errors") return value === 255 ? "ignored" : classes[value];
  const truth = other.values[at], error = errorAt(value, truth);
  if (!error) return truth === 255 ? "ignored" : "background";
  return error === "wrong class" ? `${classes[truth]} as ${classes[value]}`
    : `${error}: ${classes[error === "false" ? value : truth]}`;
}

// --- cards -----------------------------------------------------------------------------------------------------------

const blocks = new Map();
async function content(i) {
  const block = Math.floor(i / per), name = "cards" + block;
  if (!blocks.has(block)) {
    // While the file is still being read, a block is whole once the next element has begun.
    const whole = () => byId(name) && (byId(name).nextElementSibling || document.readyState !== "loading");
    while (!whole()) await new Promise(done => setTimeout(done, 20));
    if (!blocks.has(block)) blocks.set(block, JSON.parse(byId(name).textContent));
  }
  const found = blocks.get(block);
  blocks.delete(block);
  blocks.set(block, found);  // the newest, for the next line
  if (blocks.size > 80) blocks.delete(blocks.keys().next().value);
  return found[i % per];
}
const shows = i => [...new Set([...(images.truth[i] || []), ...images.found[i]])].filter(k => k > 0);
const iouOf = (i, row = last) => row < 0 ? null : rows[row].images[i];

function card(i, large = false) {
  const id = images.id[i], named = shows(i).map(k => classes[k]).join(", ") || "no object";
  const picture = make(large ? "div" : "button", {className: "picture", title: large ? "" : `enlarge ${id}`});
  const slider = make("input", {type: "range", min: 0, max: kinds.length - 1, step: 0.1, value: position,
                                "aria-label": `layer of ${id}`});
  const said = make("output"), canvases = {}, decoded = {};
  const at = () => Math.round(slider.value);
  const layer = j => decoded[j] = decoded[j] || item.then(found => inflate(found.layers[j - 1]));
  const item = content(i);
  item.then(found => {
    if (!picture.isConnected && !large) return;
    // Not loading="lazy": only cards in view are here, and a lazy one would wait until the whole file has been read.
    const image = make("img", {alt: `photo ${id}; ${named}`, decoding: "async"});
    image.onload = () => {
      URL.revokeObjectURL(image.src);
      if (!performance.getEntriesByName("first picture").length) performance.mark("first picture");
    };
    // Browsers keep pictures of data: addresses in memory, those of a revoked blob: they do not.
    if (found.photo) {
      image.src = URL.createObjectURL(new Blob([bytes(found.photo)], {type: "image/jpeg"}));
      picture.prepend(image);
    } else picture.prepend(make("span", {className: "lost", textContent: "the photo cannot be decoded"}));
    show();
  });
  async function show() {
    said.textContent = shownLayers[at()];
    slider.setAttribute("aria-valuetext", shownLayers[at()]);
    for (let j = 1; j < kinds.length; j++) {
      const weight = Math.max(0, 1 - Math.abs(slider.value - j));
      if (weight && !canvases[j]) {
        canvases[j] = make("canvas", {"aria-hidden": "true", "data-layer": kinds[j]});
        picture.append(canvases[j]);
        const errors = kinds[j] === "errors";
        paint(canvases[j], kinds[j], await layer(errors ? maskAt : j), errors && await layer(truthAt));
        canvases[j].style.opacity = Math.max(0, 1 - Math.abs(slider.value - j));
      } else if (canvases[j]) canvases[j].style.opacity = weight;
    }
  }
  async function point(event) {
    const j = at(), box = picture.getBoundingClientRect(), size = (await item).size;
    const scale = Math.min(box.width / size[1], box.height / size[0]);
    const x = (event.clientX - box.left - (box.width - size[1] * scale) / 2) / (size[1] * scale);
    const y = (event.clientY - box.top - (box.height - size[0] * scale) / 2) / (size[0] * scale);
    if (j === 0 || x < 0 || x >= 1 || y < 0 || y >= 1) return;
    const errors = kinds[j] === "errors";
    const shown = await layer(errors ? maskAt : j), truth = errors && await layer(truthAt);
    said.textContent = `${shownLayers[j]}: ${tell(kinds[j], shown, x, y, truth)}`;
  }
  slider.oninput = show;
  slider.onkeydown = event => {  // a key moves by a whole layer, the pointer also between two
    const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
    if (step) { slider.value = at() + step; show(); event.preventDefault(); }
  };
  picture.onpointermove = picture.onpointerdown = point;
  picture.onpointerleave = show;
  if (!large) picture.onclick = () => openDetail(i);
  const dots = make("span", {className: "swatches", title: named}, ...shows(i).slice(0, 8).map(swatch));
  const first = make("div", {className: "line1"}, make("span", {textContent: large ? named : id, title: id}),
                     make("span", {className: "scored", hidden: last < 0, textContent: number(iouOf(i, stage()))}));
  const element = make("div", {className: "card", role: large ? "group" : "listitem"}, picture, first, slider,
                       make("div", {className: "line3"}, said, dots));
  element.show = to => { slider.value = to; show(); };
  element.drop = () => {  // hand memory back at once, not at some garbage collection
    element.remove();
    for (const canvas of Object.values(canvases)) canvas.width = 0;
  };
  return element;
}

function table(title, entries) {
  const line = ([name, value, k]) => make("tr", {},
    make("th", {scope: "row"}, ...(k === undefined ? [] : [swatch(k)]), name), make("td", {textContent: value}));
  return make("table", {}, make("caption", {textContent: title}), make("tbody", {}, ...entries.map(line)));
}
function openDetail(i) {
  const figures = make("div");
  if (last >= 0) figures.append(table("foreground IoU", rows.map(row => [row.name, number(row.images[i])])));
  detail.at = i;
  byId("detail-title").textContent = images.id[i];
  byId("large").replaceChildren(card(i, true), figures);
  content(i).then(found => {
    const classIou = Object.entries(found.iou).map(([k, iou]) => [classes[k], number(iou), Number(k)]);
    if (last >= 0) figures.append(table(`IoU by class, ${rows[last].name}`, classIou));
    figures.append(make("p", {className: "note", textContent: `${found.size[1]} × ${found.size[0]} pixels`}));
  });
  if (!byId("detail").open) byId("detail").showModal();
}
const detail = {at: 0};
function turn(step) {
  const next = chosen[chosen.indexOf(detail.at) + step];
  if (next !== undefined) openDetail(next);
}

// --- the grid: only the cards in view are in the page ----------------------------------------------------------------

let chosen = [], live = new Map(), form = {};
const stage = () => Number(byId("stage").value || last);
function filter() {
  const part = byId("find").value.toLowerCase(), k = Number(byId("class").value), order = byId("order").value;
  const low = Number(byId("low").value), high = Number(byId("high").value), every = low <= 0 && high >= 1;
  const iou = last < 0 ? [] : rows[stage()].images;
  const inside = i => last < 0 || every || (iou[i] !== null && iou[i] >= low && iou[i] <= high);
  chosen = images.id.map((_, i) => i).filter(i => (!part || images.id[i].toLowerCase().includes(part))
                                             && (!k || shows(i).includes(k)) && inside(i));
  const rank = i => iou[i] === null ? 2 : iou[i];
  if (order === "worst") chosen.sort((a, b) => rank(a) - rank(b));
  if (order === "best") chosen.sort((a, b) => (iou[b] ?? -1) - (iou[a] ?? -1));
  if (order === "name") chosen.sort((a, b) => images.id[a] < images.id[b] ? -1 : 1);
  byId("count").textContent = `${chosen.length.toLocaleString()} of ${images.id.length.toLocaleString()} images` +
    (data.split > images.id.length ? `, a sample of the split's ${data.split.toLocaleString()}` : "");
  measure();
}
function measure() {
  const grid = byId("grid"), gap = 14, width = grid.clientWidth, least = width < 480 ? 150 : 200;
  const columns = Math.max(1, Math.floor((width + gap) / (least + gap)));
  const side = (width - gap * (columns - 1)) / columns;
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  form = {columns, side, gap, height: Math.round(side * 0.75 + 4.6 * rem)};
  grid.style.height = Math.ceil(chosen.length / columns) * (form.height + gap) + "px";
  for (const element of live.values()) element.drop();
  live.clear();
  draw();
}
function draw() {
  const grid = byId("grid"), {columns, side, gap, height} = form, above = -grid.getBoundingClientRect().top;
  const from = Math.max(0, Math.floor(above / (height + gap)) - 1) * columns;
  const below = Math.max(1, Math.ceil((above + innerHeight) / (height + gap) + 1));  // one even where none is in view
  const to = Math.min(chosen.length, below * columns);
  const wanted = new Set(chosen.slice(from, to));
  for (const [i, element] of live) if (!wanted.has(i)) { element.drop(); live.delete(i); }
  let next = grid.firstChild;
  for (let place = from; place < to; place++) {
    const i = chosen[place];
    if (live.has(i)) { next = live.get(i).nextSibling; continue; }
    const element = card(i);
    element.setAttribute("aria-setsize", chosen.length);
    element.setAttribute("aria-posinset", place + 1);
    const x = (place % columns) * (side + gap), y = Math.floor(place / columns) * (height + gap);
    Object.assign(element.style, {width: side + "px", height: height + "px", transform: `translate(${x}px, ${y}px)`});
    live.set(i, element);
    grid.insertBefore(element, next);
  }
}
function showLayer(j) {
  position = j;
  for (const [at, button] of [...byId("layers").children].entries()) button.setAttribute("aria-pressed", at === j);
  for (const element of live.values()) element.show(j);
}

// --- beginning -------------------------------------------------------------------------------------------------------

function drawKey() {
  const key = byId("key"), flat = value => ({width: 12, height: 12, values: new Uint8Array(144).fill(value)});
  if (kinds.includes("heat")) {
    const bar = make("canvas");
    paint(bar, "heat", {width: heat.length, height: 1, values: Uint8Array.from(heat, (_, level) => level)});
    key.append(make("span", {}, "foreground probability 0", bar, "1"));
  }
  if (kinds.includes("errors")) for (const kind of Object.keys(ERRORS)) {
    const [found, truth] = {correct: [1, 1], missed: [0, 1], "false": [1, 0], "wrong class": [2, 1]}[kind];
    const tile = make("canvas", {className: "tile"});
    paint(tile, "errors", flat(found), flat(truth));
    key.append(make("span", {}, tile, MEANING[kind]));
  }
  key.append(...occurring.map(k => make("span", {}, swatch(k), classes[k])));
}
function start() {
  for (const element of document.querySelectorAll("label.scored")) element.hidden = last < 0;
  for (const [j, name] of shownLayers.entries()) {
    const button = make("button", {textContent: name, title: j && layers[j - 1] ? layers[j - 1].note : name});
    button.onclick = () => showLayer(j);
    byId("layers").append(button);
  }
  byId("class").append(option(0, "all"), ...occurring.map(k => option(k, classes[k])));
  byId("stage").append(...rows.map((row, at) => option(at, row.name)));
  const orders = last < 0 ? [["split", "as in the split"]] : [["worst", "worst first"], ["best", "best first"]];
  byId("order").append(...[...orders, ["name", "by name"]].map(([value, text]) => option(value, text)));
  if (last >= 0) {
    byId("stage").value = last;
    byId("class-stage").append(...rows.map((row, at) => option(at, row.name)));
    byId("class-stage").value = last;
    byId("class-stage").onchange = () => { drawBars(); drawConfusions(); };
    byId("by-iou").onclick = () => { sortBars.byName = false; drawBars(); };
    byId("by-name").onclick = () => { sortBars.byName = true; drawBars(); };
    const canvas = byId("matrix"), place = along => Math.floor((along - matrix.names) / matrix.cell);
    canvas.onpointermove = canvas.onpointerdown = event => {
      const box = canvas.getBoundingClientRect();
      tellCell(place(event.clientY - box.top), place(event.clientX - box.left));
    };
    canvas.onkeydown = event => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (step) { tellCell(matrix.at[0] + step[0], matrix.at[1] + step[1]); event.preventDefault(); }
    };
    drawBars();
    drawConfusions();
  }
  for (const name of ["find", "low", "high"]) byId(name).oninput = filter;
  for (const name of ["class", "stage", "order"]) byId(name).onchange = filter;
  byId("previous").onclick = () => turn(-1);
  byId("next").onclick = () => turn(1);
  byId("close").onclick = () => byId("detail").close();
  byId("detail").onkeydown = event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step && event.target.type !== "range") turn(step);
  };
  let waiting = false, width = innerWidth;
  addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(() => { waiting = false; draw(); });
    waiting = true;
  }, {passive: true});
  addEventListener("resize", () => {
    if (width === innerWidth) return draw();
    width = innerWidth;
    measure();
    if (last >= 0) paintMatrix();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => last >= 0 && paintMatrix());
  drawKey();
  showLayer(position);
  filter();
}
start();
}
