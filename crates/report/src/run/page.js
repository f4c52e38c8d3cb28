"use strict";

// The page of a run. The parts that the server (or the report's writer) renders are put in place as they are; pictures
// come as data and are put in as elements, so that no prompt is ever read as HTML.

const ASK_EVERY_MS = 2000;
const PLAY_EVERY_MS = 600;
const byId = (id) => document.getElementById(id);

let view = null;
let shown = 0; // index of the drawing under the scrubber
let playing = null;

function show(next) {
  const last = view === null || shown === view.samples.steps.length - 1;
  const before = view;
  view = next;
  replace("state", view.state, before?.state);
  replace("events", view.events, before?.events);
  replace("recipe", view.recipe, before?.recipe);
  showTimes();
  if (same(before?.charts, view.charts) === false) showCharts();
  if (same(before?.samples, view.samples) === false) {
    // Whoever looks at the newest drawing goes on doing so.
    if (last) shown = view.samples.steps.length - 1;
    showSamples();
  }
}

const same = (before, now) => before !== undefined && JSON.stringify(before) === JSON.stringify(now);

function replace(id, html, before) {
  if (html !== before) byId(id).innerHTML = html;
}

function showTimes() {
  for (const time of document.querySelectorAll("time[data-time]")) {
    const when = new Date(1000 * Number(time.dataset.time));
    time.dateTime = when.toISOString();
    time.title = when.toLocaleString();
    time.textContent = when.toLocaleTimeString();
  }
}

// Curves

function showCharts() {
  byId("no-curves").hidden = view.charts.length > 0;
  byId("curves").innerHTML = view.charts.map((chart) => chart.html).join("");
  byId("curves").querySelectorAll("figure").forEach((figure, index) => {
    for (const svg of figure.querySelectorAll("svg")) readable(svg, figure, view.charts[index].curves);
  });
}

// A cursor that reads the curves off: under the pointer, or moved by the arrow keys.
function readable(svg, figure, curves) {
  const [low, high, left, right] = svg.dataset.x.split(" ").map(Number);
  const steps = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  const legend = figure.querySelector(".legend");
  const names = legend.innerHTML;
  const line = document.createElementNS(svg.namespaceURI, "path");
  line.setAttribute("class", "cursor");
  let at = steps.length - 1;
  const read = (index) => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const x = left + ((steps[at] - low) / (high - low)) * (right - left);
    line.setAttribute("d", `M${x} ${svg.viewBox.baseVal.height - 44}V26`);
    svg.append(line);
    legend.replaceChildren(reading(curves, steps[at]));
  };
  const leave = () => {
    line.remove();
    legend.innerHTML = names;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    read(nearest(steps, low + ((x - left) / (right - left)) * (high - low)));
  });
  svg.addEventListener("pointerleave", leave);
  svg.tabIndex = 0;
  svg.addEventListener("focus", () => read(at));
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    read(at + move);
  });
}

function reading(curves, step) {
  const values = curves.map((curve) => {
    const point = curve.points.find((point) => point[0] === step);
    return `${curve.name} ${point?.[1] == null ? "–" : Number(point[1].toPrecision(4))}`;
  });
  return element("span", "reading", `step ${step}: ${values.join(", ")}`);
}

function nearest(steps, wanted) {
  let best = 0;
  steps.forEach((step, index) => {
    if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = index;
  });
  return best;
}

// Samples

function showSamples() {
  const { steps, teacher, left_out } = view.samples;
  byId("samples").hidden = steps.length === 0;
  byId("no-samples").hidden = steps.length > 0;
  if (steps.length === 0) return;
  const reference = byId("reference");
  const chosen = reference.value || (teacher ? teacher.name : steps[0].name);
  reference.replaceChildren(...references().map((set) => new Option(set.name, set.name, false, set.name === chosen)));
  byId("scrubber").max = steps.length - 1;
  byId("left-out").textContent = left_out > 0 ? `${left_out} more drawings are in the run's folder.` : "";
  showDrawing(shown);
}

const references = () => [view.samples.teacher, ...view.samples.steps].filter((set) => set !== null);

function showDrawing(index) {
  const steps = view.samples.steps;
  shown = Math.min(Math.max(index, 0), steps.length - 1);
  const set = steps[shown];
  byId("scrubber").value = shown;
  byId("scrubber").setAttribute("aria-valuetext", set.name);
  byId("drawing").value = set.name;
  byId("settings").textContent = `${set.settings}.`;
  byId("against").textContent = `${set.name} (${set.settings})`;
  fillGrid(set);
  fillPairs(set);
}

function fillGrid(set) {
  cells("grid", set.pictures.length, () => {
    const figure = element("figure");
    figure.append(element("img"), element("figcaption"));
    return figure;
  }).forEach((figure, index) => {
    const picture = set.pictures[index];
    setPicture(figure.querySelector("img"), picture, set);
    setCaption(figure.querySelector("figcaption"), picture);
  });
}

function fillPairs(set) {
  const reference = references().find((other) => other.name === byId("reference").value);
  const pairs = set.pictures.flatMap((picture, index) => {
    const other = reference?.pictures[index];
    return other && other.prompt === picture.prompt && other.seed === picture.seed ? [[other, picture]] : [];
  });
  cells("pairs", pairs.length, newPair).forEach((figure, index) => {
    const [left, right] = pairs[index];
    setPicture(figure.querySelector(".under"), left, reference);
    setPicture(figure.querySelector(".over"), right, set);
    figure.querySelector(".left").textContent = reference.name;
    figure.querySelector(".right").textContent = set.name;
    figure.querySelector("input").setAttribute("aria-label", `${reference.name} or ${set.name}: ${right.prompt}`);
    setCaption(figure.querySelector("figcaption"), right);
  });
}

function newPair() {
  const figure = element("figure");
  const pair = element("div", "pair");
  const slider = element("input");
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  slider.addEventListener("input", () => pair.style.setProperty("--cut", `${slider.value}%`));
  pair.append(element("img", "under"), element("img", "over"), element("span", "left"), element("span", "right"), slider);
  figure.append(pair, element("figcaption"));
  return figure;
}

// The cells of a grid, as many as asked for; those that are there stay, with their sliders.
function cells(id, count, make) {
  const grid = byId(id);
  while (grid.children.length > count) grid.lastElementChild.remove();
  while (grid.children.length < count) grid.append(make());
  return [...grid.children];
}

function setPicture(img, picture, set) {
  if (img.getAttribute("src") !== picture.src) img.src = picture.src;
  img.width = set.width;
  img.height = set.height;
  img.alt = `${set.name}: ${picture.prompt}`;
}

function setCaption(caption, picture) {
  caption.replaceChildren(`${picture.prompt || "(empty prompt)"} `, element("span", "", `seed ${picture.seed}`));
}

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function play() {
  const button = byId("play");
  if (playing !== null) {
    clearInterval(playing);
    playing = null;
  } else {
    if (shown === view.samples.steps.length - 1) showDrawing(0);
    playing = setInterval(() => {
      showDrawing(shown + 1);
      if (shown === view.samples.steps.length - 1) play();
    }, PLAY_EVERY_MS);
  }
  button.setAttribute("aria-pressed", String(playing !== null));
  button.textContent = playing === null ? "Play" : "Pause";
}

byId("scrubber").addEventListener("input", (event) => showDrawing(Number(event.target.value)));
byId("reference").addEventListener("change", () => showDrawing(shown));
byId("play").addEventListener("click", play);

// News

async function ask() {
  try {
    const answer = await fetch("view.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    byId("news").textContent = "live";
  } catch {
    byId("news").textContent = "no connection: is fewstep watch still running?";
  }
  setTimeout(ask, ASK_EVERY_MS);
}

show(JSON.parse(byId("view").textContent));
if (view.live) ask();
