"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const one = (query, within = document) => within.querySelector(query);
const safe = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const many = data.runs.length > 1;
const view = { smooth: 0.7, axis: "step", log: false, hidden: new Set(), at: null, sample: null };

// ---- numbers ----

function short(value, digits = 4) {
  if (value === null || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size < 1e9 && size >= 1e6) return `${+(value / 1e6).toPrecision(digits)}M`;
  if (size < 1e9 && size >= 1e4) return `${+(value / 1e3).toPrecision(digits)}k`;
  if (size < 1e9 && size >= 1e-3 || size === 0) return String(+value.toPrecision(digits));
  return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e").replace("e-", "e−");
}

function labels(values) {  // with as many digits as it takes to tell neighbours apart
  const sizes = values.map(Math.abs), largest = Math.max(...sizes);
  const steps = values.slice(1).map((value, k) => Math.abs(value - values[k]));
  const power = (value) => Math.floor(Math.log10(value * (1 + 1e-6)));
  const digits = steps.length ? power(largest) - power(Math.min(...steps)) + 1 : 4;
  return values.map((value) => short(value, Math.min(Math.max(digits, 1), 12)));
}

const whole = (value) => Math.round(value).toLocaleString("en");

function place(sorted, value) {  // of the last element that is not larger; 0 if all are
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

function between(from, to, value) {  // the piecewise linear function through the knots (from, to)
  if (from.length < 2) return to[0];
  const i = Math.min(place(from, value), from.length - 2), span = from[i + 1] - from[i];
  return span > 0 ? to[i] + (to[i + 1] - to[i]) * (value - from[i]) / span : to[i];
}

const along = (run, step) => (run.axes[view.axis] ? between(...run.axes[view.axis], step) : step);

function smoothed(values) {  // an exponential mean without the pull of its start
  if (!view.smooth) return values;
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = view.smooth * mean + (1 - view.smooth) * value;
    weight = view.smooth * weight + 1 - view.smooth;
    return mean / weight;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const far = (factor) => Math.abs(Math.log(factor * power / rough));
  const step = power * [1, 2, 5, 10].reduce((best, factor) => (far(factor) < far(best) ? factor : best));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {  // in powers of ten, with 2 and 5 where there is room
  const decades = high - low, factors = decades > 3 ? [0] : [0, Math.log10(2), Math.log10(5)];
  const step = Math.max(1, Math.ceil(decades / 5)), found = [];
  for (let ten = Math.floor(low); ten <= high; ten += step) {
    for (const factor of factors) if (ten + factor >= low && ten + factor <= high) found.push(ten + factor);
  }
  return found.length > 1 ? found : ticks(low, high, 4);
}

// ---- charts ----

const charts = [];
const right = 10, top_ = 8, bottom = 22, height = 190;

class Chart {
  constructor(name, group) {
    this.name = name;
    this.smooth = group === "losses" || data.smooth.includes(name);
    this.group = group;
    this.box = document.createElement("figure");
    this.box.className = "chart";
    this.box.innerHTML = `<figcaption>${safe(data.titles[name])} <span></span></figcaption><svg tabindex="0" role="img"></svg>
      <div class="tip" role="status" hidden></div>`;
    this.svg = one("svg", this.box);
    this.tip = one(".tip", this.box);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => hover(null));
    this.svg.addEventListener("blur", () => hover(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  lines() {
    const found = [];
    data.runs.forEach((run, i) => {
      const curve = run.curves[this.name];
      if (!curve || !curve.x.length || view.hidden.has(i)) return;
      const x = curve.x.map((step) => along(run, step));
      found.push({ run, i, curve, x, y: this.smooth ? smoothed(curve.y) : curve.y });
    });
    return found;
  }

  draw() {
    this.width = Math.max(this.svg.clientWidth, 200);
    this.drawn = this.lines();
    const all = this.drawn.flatMap((line) => [...line.curve.y, ...line.y]).filter((value) => value !== null);
    if (this.group === "validation") for (const { run } of this.drawn) if (this.name in run.inputs) all.push(run.inputs[this.name]);
    const alone = this.drawn.length === 1 ? this.drawn[0].curve : null;
    one("span", this.box).textContent = alone ? short(alone.newest) : "";
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    if (!all.length) {
      this.svg.innerHTML = `<text x="50%" y="50%" text-anchor="middle">nothing to show</text>`;
      return;
    }
    let low = Infinity, high = -Infinity, begin = Infinity, end = -Infinity;
    for (const value of all) { low = Math.min(low, value); high = Math.max(high, value); }
    for (const line of this.drawn) { begin = Math.min(begin, line.x[0]); end = Math.max(end, line.x.at(-1)); }
    this.log = view.log && low > 0;
    if (this.log) { low = Math.log10(low); high = Math.log10(high); }
    const flat = high - low < 1e-4 * Math.abs(high);  // differences that the numbers at the axis would not show
    const middle = (low + high) / 2;
    const pad = flat ? Math.abs(high) * 0.05 || 1 : (high - low) * 0.05 || 1;
    low -= low === 0 && !this.log ? 0 : pad;
    high += pad;
    if (end <= begin) { begin -= 1; end += 1; }
    this.range = { begin, end };
    const marks = flat ? [middle] : this.log ? logTicks(low, high) : ticks(low, high, 4);
    const names = labels(this.log ? marks.map((mark) => 10 ** mark) : marks);
    const left = this.left = Math.max(46, 12 + 6.5 * Math.max(...names.map((name) => name.length)));
    const wide = this.width - left - right, tall = height - top_ - bottom;
    this.px = (x) => left + (x - begin) / (end - begin) * wide;
    this.py = (y) => top_ + (1 - ((this.log ? Math.log10(Math.max(y, 1e-300)) : y) - low) / (high - low)) * tall;
    let shapes = `<clipPath id="clip-${charts.indexOf(this)}"><rect x="${left - 4}" y="0" width="${wide + 8}" height="${height - bottom + 4}"/></clipPath>`;
    marks.forEach((mark, k) => {
      const y = top_ + (1 - (mark - low) / (high - low)) * tall;
      shapes += `<path class="grid" d="M${left} ${y.toFixed(1)}H${this.width - right}"/>`;
      shapes += `<text x="${left - 6}" y="${(y + 4).toFixed(1)}" text-anchor="end">${names[k]}</text>`;
    });
    const across = ticks(begin, end, Math.max(2, Math.floor(wide / 90))), steps = labels(across);
    across.forEach((mark, k) => {
      const x = this.px(mark), anchor = x > this.width - 24 ? "end" : "middle";
      shapes += `<text x="${x.toFixed(1)}" y="${height - 5}" text-anchor="${anchor}">${steps[k]}</text>`;
    });
    shapes += `<g clip-path="url(#clip-${charts.indexOf(this)})">${this.drawn.map((line) => this.shape(line)).join("")}</g>`;
    this.svg.innerHTML = `${shapes}<path class="cursor"/>`;
    this.svg.setAttribute("aria-label", this.summary());
  }

  shape({ run, i, curve, x, y }) {
    const px = x.map((value) => this.px(value).toFixed(1));
    const path = (values) => {
      let text = "", open = false;
      values.forEach((value, k) => {
        if (value !== null) text += `${open ? "L" : "M"}${px[k]} ${this.py(value).toFixed(1)}`;
        open = value !== null;
      });
      return text;
    };
    const line = (kind, step) => `<path class="${kind}" d="M${this.px(along(run, step)).toFixed(1)} ${top_}V${height - bottom}"/>`;
    const colour = `c${i % 10}`;
    let text = "";
    for (const step of run.changes) text += line("change", step);
    if (this.group === "validation") {
      if (this.name in run.inputs) text += `<path class="base" d="M${this.left} ${this.py(run.inputs[this.name]).toFixed(1)}H${this.width}"/>`;
      if (run.best !== null && !many) text += line("best", run.best);
    }
    if (view.sample !== null && !many) text += line("sampled", view.sample);
    if (curve.low && x.length > 1 && !many) {
      const back = x.map((_, k) => k).reverse().filter((k) => curve.low[k] !== null);
      text += `<path class="band ${colour}" fill="currentColor" d="${path(curve.high)}${back.map((k) => `L${px[k]} ${this.py(curve.low[k]).toFixed(1)}`).join("")}Z"/>`;
    }
    if (y !== curve.y) text += `<path class="raw ${colour}" stroke="currentColor" d="${path(curve.y)}"/>`;
    const dashes = i < 10 ? "" : ' stroke-dasharray="6 4"';  // the colours repeat
    text += `<path class="curve ${colour}" stroke="currentColor"${dashes} d="${path(y)}"/>`;
    if (x.length <= 30) {
      y.forEach((value, k) => {
        if (value !== null) text += `<circle class="${colour}" fill="currentColor" r="3" cx="${px[k]}" cy="${this.py(value).toFixed(1)}"/>`;
      });
    }
    return text;
  }

  summary() {
    return this.drawn.map(({ run, curve }) => {
      const known = curve.y.filter((value) => value !== null);
      const bad = curve.bad ? `, ${curve.bad} not finite` : "";
      return `${many ? `${run.name}: ` : ""}${data.titles[this.name]} from ${short(known[0])} to ${short(known.at(-1))} at step ${
        curve.x.at(-1)}, lowest ${short(Math.min(...known))}, highest ${short(Math.max(...known))}${bad}`;
    }).join("; ");
  }

  point(event) {
    if (!this.range) return;
    const box = this.svg.getBoundingClientRect(), share = (event.clientX - box.left - this.left) / (box.width - this.left - right);
    hover(this.range.begin + Math.min(Math.max(share, 0), 1) * (this.range.end - this.range.begin), this);
  }

  key(event) {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key], line = this.drawn && this.drawn[0];
    if (!way || !line) return;
    event.preventDefault();
    const now = view.at === null ? (way > 0 ? -1 : line.x.length) : place(line.x, view.at);
    hover(line.x[Math.min(Math.max(now + way, 0), line.x.length - 1)], this);
  }

  show(at, talks) {
    const cursor = one(".cursor", this.svg);
    if (!cursor) return;
    const out = at === null || at < this.range.begin || at > this.range.end;
    cursor.setAttribute("d", out ? "" : `M${this.px(at).toFixed(1)} ${top_}V${height - bottom}`);
    this.tip.hidden = out || !talks;
    if (this.tip.hidden) return;
    const rows = this.drawn.map(({ run, i, curve, x, y }) => {
      let k = place(x, at);
      if (k + 1 < x.length && x[k + 1] - at < at - x[k]) k++;
      const mean = y === curve.y ? "" : ` <span>(smoothed ${short(y[k])})</span>`;
      return `<div>${many ? `<i class="c${i % 10}"></i>${safe(run.name)} ` : ""}<span>step ${whole(curve.x[k])}:</span> <b>${short(curve.y[k])}</b>${mean}</div>`;
    });
    this.tip.innerHTML = rows.join("");
    const x = this.px(at);
    this.tip.style.left = x < this.width / 2 ? `${x + 22}px` : "auto";
    this.tip.style.right = x < this.width / 2 ? "auto" : `${this.width - x + 22}px`;
  }
}

function hover(at, from = null) {
  view.at = at;
  for (const chart of charts) chart.show(at, chart === from);
}

function redraw() {
  for (const chart of charts) chart.draw();
}

for (const place_ of document.querySelectorAll(".charts")) {
  for (const name of data.groups[place_.dataset.group]) {
    const chart = new Chart(name, place_.dataset.group);
    charts.push(chart);
    place_.append(chart.box);
  }
}

function control(id, kind, change) {
  const found = document.getElementById(id);
  if (found) found.addEventListener(kind, () => { change(found); redraw(); });
}
control("smooth", "input", (input) => { view.smooth = +input.value; input.nextElementSibling.value = view.smooth.toFixed(2); });
control("axis", "change", (input) => { view.axis = input.value; });
control("log", "change", (input) => { view.log = input.checked; });
for (const box of document.querySelectorAll("[data-run]")) {
  box.addEventListener("change", () => {
    view.hidden[box.checked ? "delete" : "add"](+box.dataset.run);
    redraw();
    if (samples) samples.fill();
  });
}

// ---- samples ----

class Samples {
  constructor(box) {
    this.box = box;
    this.runs = data.runs.map((run, i) => ({ run, i })).filter(({ run }) => run.samples.length);
    this.steps = [...new Set(this.runs.flatMap(({ run }) => run.samples.map((sample) => sample.step)))].sort((a, b) => a - b);
    box.innerHTML = `<div class="player"><button type="button" aria-label="play">▶</button>
      <input type="range" min="0" max="${this.steps.length - 1}" value="${this.steps.length - 1}" aria-label="step of the samples"><output></output></div>
      ${this.runs.map(({ run, i }) => `<div class="of" data-of="${i}">${many ? `<h3><i class="c${i % 10}"></i> ${safe(run.name)}</h3>` : ""}
        <div class="film"></div><div class="ways"></div></div>`).join("")}`;
    this.slider = one("input", box);
    this.button = one("button", box);
    this.slider.addEventListener("input", () => this.go(+this.slider.value));
    this.button.addEventListener("click", () => (this.timer ? this.stop() : this.play()));
    for (const { run, i } of this.runs) {
      const film = one(`[data-of="${i}"] .film`, box);
      film.hidden = run.samples.length < 2;
      film.innerHTML = run.samples.map((sample) => {
        const names = Object.keys(sample.rows[0]), name = names.includes("fake_B") ? "fake_B" : names.at(-1);
        return `<button type="button" data-step="${sample.step}" aria-label="step ${sample.step}"><img alt="" src="${data.images[sample.rows[0][name]]}">${short(sample.step)}</button>`;
      }).join("");
      const decoded = [...film.querySelectorAll("img")].map((image) => image.decode().catch(() => null));
      Promise.all(decoded).then(() => this.fill());  // the strip scrolls once its pictures have their sizes
      film.addEventListener("click", (event) => {
        const chosen = event.target.closest("button");
        if (chosen) { this.stop(); this.go(this.steps.indexOf(+chosen.dataset.step)); }
      });
    }
    this.go(this.steps.length - 1, false);
  }

  go(index, mark = true) {
    this.index = index;
    this.slider.value = index;
    if (mark) view.sample = this.steps[index];
    this.fill();
    if (mark) redraw();
  }

  fill() {
    const step = this.steps[this.index];
    one("output", this.box).textContent = `step ${whole(step)}`;
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    for (const { run, i } of this.runs) {
      const block = one(`[data-of="${i}"]`, this.box);
      block.hidden = view.hidden.has(i);
      const sample = run.samples[place(run.samples.map((one_) => one_.step), step)];
      one(".ways", block).innerHTML = this.ways(sample);
      for (const button of block.querySelectorAll(".film button")) {
        const current = +button.dataset.step === sample.step;
        button.setAttribute("aria-current", current);
        const film = button.parentElement;
        if (current && film.clientWidth) film.scrollLeft = button.offsetLeft - film.offsetLeft - (film.clientWidth - button.clientWidth) / 2;
      }
    }
  }

  ways(sample) {
    const names = Object.keys(sample.rows[0]);
    const pairs = data.pairs.filter((pair) => pair.every((name) => names.includes(name)));
    const ways = pairs.length ? pairs : [names];
    return ways.map((way) => `<div class="way">${pairs.length ? `<h3>${way[0]} to ${way[0] === "A" ? "B" : "A"}</h3>` : ""}<div class="rows${names[0] === "" ? " whole" : ""}">${
      sample.rows.map((row) => `<div class="row" style="grid-template-columns:repeat(${way.length},1fr)">${
        way.map((name) => this.picture(name, row[name], sample.step)).join("")}</div>`).join("")}</div></div>`).join("");
  }

  picture(name, image, step) {
    if (image === undefined) return "<span></span>";
    const words = name === "" ? "" : data.roles[name] || name;
    return `<figure><img alt="${safe(words || "sample grid")} at step ${step}" src="${data.images[image]}">${words ? `<figcaption>${safe(words)}</figcaption>` : ""}</figure>`;
  }

  play() {
    if (this.steps.length < 2) return;
    if (this.index === this.steps.length - 1) this.go(0);
    this.button.textContent = "❚❚";
    this.button.setAttribute("aria-label", "pause");
    this.timer = setInterval(() => (this.index < this.steps.length - 1 ? this.go(this.index + 1) : this.stop()), 450);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.button.textContent = "▶";
    this.button.setAttribute("aria-label", "play");
  }
}

const holder = one(".samples");
const samples = holder && new Samples(holder);
redraw();
new ResizeObserver(redraw).observe(document.body);
document.documentElement.dataset.drawn = charts.length;
