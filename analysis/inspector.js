// What the inspector's page does: data in, one state, four drawings of it. Texts are set as text, never as HTML.
"use strict";

const MOST_ROWS = 25;
const FULL = 8; // nats at which a token has the full colour
const FULL_CHANGE = 1; // the same of a difference
const by = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class Inspector {
  constructor(data) {
    this.data = data;
    this.runs = data.runs;
    this.iterations = data.iterations;
    const parts = this.runs.flatMap((run) => (run.samples.length ? run.samples : run.responses));
    this.seeds = sorted(parts.map((part) => part.seed));
    this.iteration = this.iterations.includes(1) ? 1 : (this.iterations[0] ?? 0);
    this.filter = { search: "", task: "", seed: "", ended: "", misaligned: false, equal: false, tokens: false };
    this.order = { column: 0, down: false };
    this.page = 0;
    this.tokens = this.runs.map((run) => grouped(run.tokens, ([seed, t, place]) => `${seed}/${t}/${place}`));
    this.known = new Set(this.runs.flatMap((run) => run.tokens.map(([seed, , place]) => `${seed}/${place}`)));
    this.proto = this.runs.map((run) => new Map(run.proto.flatMap((part) => part.place.map((place, i) => [`${part.seed}/${place}`, part.text[i]]))));
    this.texts = this.runs.map((run) => {
      const texts = new Map();
      for (const part of run.responses) {
        part.place.forEach((place, i) => texts.set(`${part.seed}/${part.iteration}/${place}`, part.text[i]));
      }
      return texts;
    });
  }

  // What is shown: a row a prompt and seed, with each run's sample of it at the iteration.
  rows() {
    const found = new Map();
    this.runs.forEach((run, number) => {
      for (const part of run.samples.filter((part) => part.iteration === this.iteration)) {
        part.place.forEach((place, i) => {
          const key = `${part.seed}/${place}`;
          if (!found.has(key)) found.set(key, { place, seed: part.seed, of: this.runs.map(() => null) });
          found.get(key).of[number] = {
            reward: part.reward[i], likelihood: part.likelihood[i], tokens: part.tokens[i], drawn: part.drawn[i],
            misaligned: part.misaligned[i], finished: part.finished[i], equal: part.equal[i],
          };
        });
      }
    });
    if (!this.runs.some((run) => run.samples.length)) { // no pairs, of sft: its prompts and responses
      this.data.prompts.id.forEach((_, place) => found.set(place, { place, seed: this.seeds[0] ?? 0, of: this.runs.map(() => null) }));
    }
    return [...found.values()].filter((row) => this.wanted(row));
  }

  wanted(row) {
    const { search, task, seed, ended, misaligned, equal, tokens } = this.filter;
    const some = (test) => row.of.some((sample) => sample && test(sample));
    const prompts = this.data.prompts;
    if (task && prompts.task[row.place] !== task) return false;
    if (seed !== "" && row.seed !== Number(seed)) return false;
    if (ended !== "" && !some((sample) => sample.finished === Number(ended))) return false;
    if (misaligned && !some((sample) => sample.misaligned)) return false;
    if (equal && !some((sample) => sample.equal)) return false;
    if (tokens && !this.known.has(`${row.seed}/${row.place}`)) return false;
    if (!search) return true;
    const drawn = this.texts.map((texts) => texts.get(`${row.seed}/${this.iteration}/${row.place}`));
    const texts = [String(prompts.id[row.place]), prompts.prompt[row.place], prompts.labelled[row.place], ...drawn];
    return texts.some((text) => text && text.toLowerCase().includes(search));
  }

  start() {
    const slider = by("iteration");
    slider.max = Math.max(this.iterations.length - 1, 0);
    slider.value = Math.max(this.iterations.indexOf(this.iteration), 0);
    slider.addEventListener("input", () => {
      this.iteration = this.iterations[slider.value];
      this.draw();
    });
    const tasks = [...new Set(this.data.prompts.task.filter((task) => task))].sort();
    options(by("task"), ["", ...tasks], "all");
    options(by("seed"), ["", ...this.seeds.map(String)], "all");
    by("task").parentElement.hidden = tasks.length < 2;
    by("seed").parentElement.hidden = this.seeds.length < 2;
    for (const name of ["search", "seed", "ended"]) {
      by(name).addEventListener("input", () => this.change(name, by(name).value.toLowerCase()));
    }
    by("task").addEventListener("input", () => this.change("task", by("task").value));
    for (const name of ["misaligned", "equal", "tokens"]) {
      by(name).addEventListener("input", () => this.change(name, by(name).checked));
    }
    by("back").addEventListener("click", () => this.turn(-1));
    by("on").addEventListener("click", () => this.turn(1));
    by("close").addEventListener("click", () => by("detail").close());
    by("earlier").addEventListener("click", () => this.step(-1));
    by("later").addEventListener("click", () => this.step(1));
    by("colour").addEventListener("input", () => this.drawDetail());
    this.drawCurves();
    this.draw();
    addEventListener("resize", () => {
      this.drawScatter();
      this.drawCurves();
    });
  }

  change(name, value) {
    this.filter[name] = value;
    this.page = 0;
    this.draw();
  }

  turn(count) {
    this.page += count;
    this.drawTable();
  }

  draw() {
    by("iteration-shown").textContent = this.iteration;
    this.shown = this.rows();
    this.drawScatter();
    this.drawTable();
    if (by("detail").open) this.drawDetail();
  }

  // Reward gap against log-likelihood gap.
  drawScatter() {
    by("scatter-note").textContent = this.note();
    if (!this.runs.some((run) => run.samples.length)) return;
    const layout = this.layout();
    const traces = this.runs.map((run, number) => this.panel(run, number, layout));
    Plotly.react("scatter", traces, layout, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "sendChartToCloud"], plotlyServerURL: "" });
    if (!this.clicks) {
      by("scatter").on("plotly_click", ({ points }) => this.open(...points[0].customdata));
      this.clicks = true;
    }
  }

  note() {
    const { count, prompts, paired } = this.data;
    const part = prompts.id.length < count ? `${prompts.id.length} of ${count} prompts, evenly spread. ` : "";
    const pairs = this.runs.some((run) => run.samples.length) ? "" : "No pairs of y and y′ were scored: there are no gaps to draw. ";
    const kept = new Set([...this.known].map((key) => key.split("/")[1])).size;
    const tokens = kept ? `Single tokens were kept of ${kept} prompts.` : "Single tokens were not kept (token_prompts).";
    return `${paired ? "" : "The runs have other prompts: only benchmarks are paired. "}${pairs}${part}${tokens}`;
  }

  layout() {
    const several = this.runs.length > 1;
    const side = by("scatter").clientWidth > 640 && several;
    const differences = this.runs.flatMap((run) => run.samples.flatMap((part) => part.tokens.map((y, i) => y - part.drawn[i])));
    const most = Math.max(1, quantile(differences.map(Math.abs), 0.98));
    return {
      height: side || !several ? 440 : 780, margin: { l: 55, r: 10, t: 40, b: 45 }, showlegend: false, hovermode: "closest",
      grid: { rows: side ? 1 : this.runs.length, columns: side ? this.runs.length : 1, pattern: "independent" },
      coloraxis: {
        cmin: -most, cmax: most, colorscale: [[0, "#2166ac"], [0.5, "#9a9a9a"], [1, "#b2182b"]],
        colorbar: { title: { text: "tokens<br>y − y′" }, thickness: 12, len: 0.8 },
      },
      shapes: [], annotations: [], dragmode: "zoom", uirevision: "zoomed",
    };
  }

  // The dots of one run; its axes, its shaded corner and its title go into the layout.
  panel(run, number, layout) {
    const { nat, reward } = this.data;
    const suffix = number ? String(number + 1) : "";
    const axes = { xref: `x${suffix}`, yref: `y${suffix}` };
    const x = extent(this.runs.flatMap((other) => other.samples.flatMap((part) => part.likelihood)), nat);
    const y = extent(run.samples.flatMap((part) => part.reward), reward);
    layout[`xaxis${suffix}`] = { title: { text: "log π(y) − log π(y′), nats" }, range: x, zerolinecolor: "#555" };
    layout[`yaxis${suffix}`] = { title: { text: number && layout.grid.rows === 1 ? "" : "reward of y minus that of y′" }, range: y, zerolinecolor: "#555" };
    layout.shapes.push({ type: "rect", ...axes, x0: x[0], x1: 0, y0: 0, y1: y[1], line: { width: 0 }, fillcolor: "rgba(213,94,0,0.12)", layer: "below" });
    const rows = this.shown.filter(({ of }) => of[number] && of[number].reward !== null && of[number].likelihood !== null);
    const of = rows.map((row) => row.of[number]);
    const share = of.filter((sample) => sample.misaligned).length / (of.length || 1);
    const said = of.length ? `${of.length} ${this.seeds.length > 1 ? "samples" : "prompts"}, ${(100 * share).toFixed(1)} % misaligned` : "no such sample";
    layout.annotations.push({ text: plain(`${run.letter}: ${run.method}, ${said}`), xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0, y: 1.08, xanchor: "left", showarrow: false, font: { color: run.colour } });
    return {
      type: "scatter", mode: "markers", xaxis: `x${suffix}`, yaxis: `y${suffix}`,
      x: of.map((sample) => sample.likelihood / nat), y: of.map((sample) => sample.reward / reward),
      customdata: rows.map((row) => [row.place, row.seed]),
      text: rows.map((row) => this.hover(row)),
      hovertemplate: "%{text}<br>log π gap %{x:.2f}, reward gap %{y:.4f}<extra></extra>",
      marker: { color: of.map((sample) => sample.tokens - sample.drawn), coloraxis: "coloraxis", size: 6, opacity: 0.75 },
    };
  }

  hover(row) {
    return plain(`#${this.data.prompts.id[row.place]} ${this.excerpt(row.place).split("\n")[0].slice(0, 60)}`);
  }

  // A prompt without what all of them begin and end with, which is the template's.
  excerpt(place) {
    this.common ??= common(this.data.prompts.prompt.filter((text) => text));
    const text = this.data.prompts.prompt[place] ?? "";
    return text.slice(this.common[0], text.length - this.common[1]).trim();
  }

  // The table.
  columns() {
    const { prompts, nat, reward } = this.data;
    const number = (parts, digits) => (value) => (value === null || value === undefined ? "–" : (value / parts).toFixed(digits));
    const several = this.runs.length > 1;
    const of = (name, get, shown) => this.runs.map((run, i) => ({
      name: several ? `${run.letter}: ${name}` : name, className: several ? run.letter.toLowerCase() : "",
      get: (row) => (row.of[i] ? get(row.of[i]) : null), shown: shown ?? ((value) => value ?? "–"),
    }));
    const flags = (sample) => [sample.misaligned ? "misaligned" : "", sample.equal ? "y′ = y" : "", sample.finished ? "" : "cut"].filter(Boolean).join(", ");
    return [
      { name: "#", get: (row) => prompts.id[row.place], open: true },
      ...(by("task").parentElement.hidden ? [] : [{ name: "task", get: (row) => prompts.task[row.place], text: true }]),
      ...(this.seeds.length > 1 ? [{ name: "seed", get: (row) => row.seed }] : []),
      { name: "prompt", get: (row) => this.excerpt(row.place), text: true },
      ...of("log π gap", (sample) => sample.likelihood, number(nat, 2)),
      ...of("reward gap", (sample) => sample.reward, number(reward, 4)),
      ...of("tokens y′", (sample) => sample.drawn),
      { name: "tokens y", get: (row) => (row.of.find(Boolean) ?? {}).tokens },
      ...of("", flags, (value) => value ?? "–"),
    ];
  }

  drawTable() {
    const columns = this.columns();
    const { column, down } = this.order;
    const key = columns[Math.min(column, columns.length - 1)].get;
    this.shown.sort((first, second) => compared(key(first), key(second), down) || first.place - second.place);
    const pages = Math.max(Math.ceil(this.shown.length / MOST_ROWS), 1);
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const head = columns.map((entry, i) => {
      const mark = i === column ? (down ? " ▾" : " ▴") : "";
      const button = element("button", { type: "button", textContent: (entry.name || "signs") + mark });
      button.addEventListener("click", () => {
        this.order = { column: i, down: i === column ? !down : false };
        this.page = 0;
        this.drawTable();
        by("rows").tHead.querySelectorAll("button")[i].focus();
      });
      const cell = element("th", { className: entry.text ? "text" : (entry.className ?? "") }, button);
      cell.setAttribute("aria-sort", i === column ? (down ? "descending" : "ascending") : "none");
      return cell;
    });
    by("rows").tHead.replaceChildren(element("tr", {}, ...head));
    const part = this.shown.slice(this.page * MOST_ROWS, (this.page + 1) * MOST_ROWS);
    by("rows").tBodies[0].replaceChildren(...part.map((row) => {
      const line = element("tr", {}, ...columns.map((entry) => {
        const value = entry.get(row);
        const text = String(entry.shown ? entry.shown(value) : (value ?? "–"));
        if (entry.open) return element("td", {}, element("button", { type: "button", textContent: text }));
        return element("td", { className: entry.text ? "text" : "", textContent: text });
      }));
      line.addEventListener("click", () => this.open(row.place, row.seed));
      return line;
    }));
    by("found").textContent = `${this.shown.length} of ${this.data.prompts.id.length * Math.max(this.seeds.length, 1)} ${this.seeds.length > 1 ? "samples" : "prompts"} at iteration ${this.iteration}`;
    by("pages").textContent = `page ${this.page + 1} of ${pages}`;
    by("back").disabled = this.page === 0;
    by("on").disabled = this.page >= pages - 1;
  }

  // One prompt, down to the token.
  open(place, seed) {
    this.prompt = { place, seed };
    this.drawDetail();
    if (!by("detail").open) by("detail").showModal();
    by("detail").scrollTop = 0;
  }

  step(count) {
    const at = this.shown.findIndex((row) => row.place === this.prompt.place && row.seed === this.prompt.seed);
    const next = this.shown[at + count];
    if (next) this.open(next.place, next.seed);
  }

  drawDetail() {
    const { place, seed } = this.prompt;
    const { prompts } = this.data;
    const task = prompts.task[place];
    by("detail-title").textContent = `Prompt ${prompts.id[place]}${task ? `, ${task}` : ""}${this.seeds.length > 1 ? `, seed ${seed}` : ""}`;
    by("detail-prompt").textContent = prompts.prompt[place] ?? "The text was not kept.";
    by("token").textContent = this.known.has(`${seed}/${place}`)
      ? "Point at a token, or move over them with the arrow keys."
      : "Single tokens of this prompt were not kept: token_prompts says of how many a run keeps them.";
    this.drawLegend();
    const last = Math.max(...this.iterations, ...this.runs.flatMap((run) => run.responses.map((part) => part.iteration)), 0);
    const lines = [
      [`y, labelled, at ${this.iteration}`, 0, this.iteration], [`y0, at ${this.iteration}`, 2, this.iteration],
      ...Array.from({ length: last + 1 }, (_, t) => [this.iterations.includes(t) ? `y′ of iteration ${t}` : "y′ of the last policy", 1, t]),
    ];
    const head = element("tr", {}, element("th"), ...this.runs.map((run) => element("th", { className: run.letter.toLowerCase(), textContent: `${run.letter}: ${run.method}` })));
    const body = lines.map(([name, role, t]) => element("tr", {}, element("th", { textContent: name }),
      ...this.runs.map((run, number) => element("td", {}, this.response(number, role, t, place, seed)))));
    by("detail-rows").replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
  }

  response(number, role, t, place, seed) {
    const kept = (this.tokens[number].get(`${seed}/${t}/${place}`) ?? []).find((entry) => entry[3] === role);
    if (kept) return this.coloured(kept[4], kept[5], kept[6]);
    const { prompts } = this.data;
    const texts = [prompts.labelled[place], this.texts[number].get(`${seed}/${t}/${place}`), this.proto[number].get(`${seed}/${place}`)];
    return element("span", { textContent: texts[role] ?? "–" });
  }

  coloured(pieces, before, after) {
    const how = by("colour").value;
    const nat = this.data.nat;
    const holder = element("div", { className: "tokens", tabIndex: 0 });
    pieces.forEach((piece, i) => {
      const values = { before: before[i] / nat, after: after[i] / nat, change: (after[i] - before[i]) / nat };
      const known = before[i] !== null && after[i] !== null;
      const span = element("span", { textContent: piece.replaceAll("\n", "⏎\n") || "∅" });
      if (known) span.style.backgroundColor = colour(how, values[how]);
      span.said = !known ? `${JSON.stringify(piece)}: log π is no number` : `${JSON.stringify(piece)}: log π ${values.before.toFixed(2)} before, ${values.after.toFixed(2)} after training, ${signed(values.change)}`;
      span.title = span.said;
      holder.append(span);
    });
    const say = (span) => {
      holder.querySelector(".current")?.classList.remove("current");
      span.classList.add("current");
      by("token").textContent = span.said;
    };
    for (const event of ["mouseover", "click"]) {
      holder.addEventListener(event, ({ target }) => target.said && say(target));
    }
    holder.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const spans = [...holder.children];
      const at = spans.findIndex((span) => span.classList.contains("current"));
      say(spans[Math.min(Math.max(at + step, 0), spans.length - 1)]);
    });
    return holder;
  }

  drawLegend() {
    const how = by("colour").value;
    const values = how === "change" ? [-FULL_CHANGE, -FULL_CHANGE / 2, 0, FULL_CHANGE / 2, FULL_CHANGE] : [0, -FULL / 4, -FULL / 2, -FULL];
    by("legend").replaceChildren(...values.map((value) => {
      const span = element("span", { textContent: how === "change" ? signed(value) : String(value) });
      span.style.backgroundColor = colour(how, value);
      return span;
    }), "nats");
  }

  // Curves over iterations.
  drawCurves() {
    const titles = [...new Set(this.runs.flatMap((run) => Object.keys(run.curves)))];
    const columns = by("curves").clientWidth > 640 ? 2 : 1;
    const rows = Math.ceil(titles.length / columns);
    const layout = { height: 230 * rows, margin: { l: 45, r: 15, t: rows > 1 ? 40 : 75, b: 35 }, grid: { rows, columns, pattern: "independent" }, annotations: [], legend: { orientation: "h", y: rows > 1 ? 1 + 0.25 / rows : 1.55 } };
    const traces = titles.flatMap((title, place) => {
      const suffix = place ? String(place + 1) : "";
      layout[`xaxis${suffix}`] = { dtick: 1, automargin: true };
      layout[`yaxis${suffix}`] = { automargin: true };
      layout.annotations.push({ text: title, xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0, y: 1.15, xanchor: "left", showarrow: false });
      return this.runs.filter((run) => run.curves[title]).map((run) => ({
        type: "scatter", mode: "lines+markers", name: plain(`${run.letter}: ${run.method}`), legendgroup: run.letter, showlegend: place === 0,
        x: run.curves[title].t, y: run.curves[title].value, line: { color: run.colour }, xaxis: `x${suffix}`, yaxis: `y${suffix}`,
        hovertemplate: "iteration %{x}: %{y}<extra></extra>",
      }));
    });
    if (titles.length) Plotly.react("curves", traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

// Small things.
const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);
const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(value).toFixed(2)}`;
const plain = (text) => text.replaceAll("<", "‹").replaceAll(">", "›").replaceAll("&", "＆"); // Plotly reads some HTML

function grouped(entries, key) {
  const groups = new Map();
  for (const entry of entries) groups.set(key(entry), [...(groups.get(key(entry)) ?? []), entry]);
  return groups;
}

// How long the beginning and the end are that all texts share, up to white space: words are not cut.
function common(texts) {
  if (texts.length < 2) return [0, 0];
  const shortest = Math.min(...texts.map((text) => text.length));
  const alike = (at) => texts.every((text) => at(text) === at(texts[0]));
  let start = 0;
  while (start < shortest - 1 && alike((text) => text[start])) start += 1;
  let end = 0;
  while (end < shortest - start - 1 && alike((text) => text[text.length - 1 - end])) end += 1;
  const [text] = texts;
  while (start > 0 && !/\s/.test(text[start - 1])) start -= 1;
  while (end > 0 && !/\s/.test(text[text.length - end])) end -= 1;
  return [start, end];
}

// In order, what is missing last whichever way.
function compared(first, second, down) {
  const missing = [first, second].map((value) => value === null || value === undefined);
  if (missing[0] || missing[1]) return missing[0] - missing[1];
  if (first === second) return 0;
  return (first < second) === down ? 1 : -1;
}

function quantile(values, share) {
  const order = [...values].sort((a, b) => a - b);
  return order[Math.floor(share * (order.length - 1))] ?? 0;
}

function extent(values, nat) {
  const there = values.filter((value) => value !== null).map((value) => value / nat);
  const low = Math.min(quantile(there, 0.002), -0.01);
  const high = Math.max(quantile(there, 0.998), 0.01);
  return [low - 0.06 * (high - low), high + 0.06 * (high - low)];
}

function colour(how, value) {
  if (how === "change") {
    const strength = Math.min(Math.abs(value) / FULL_CHANGE, 1) * 0.75;
    return value < 0 ? `rgba(213, 94, 0, ${strength})` : `rgba(0, 114, 178, ${strength})`;
  }
  return `rgba(213, 94, 0, ${Math.min(-value / FULL, 1) * 0.75})`;
}

function options(select, values, first) {
  select.replaceChildren(...values.map((value) => element("option", { value, textContent: value || first })));
}

unpacked(by("data").textContent).then((data) => {
  window.inspector = new Inspector(data);
  window.inspector.start();
  document.body.dataset.ready = "yes";
});
