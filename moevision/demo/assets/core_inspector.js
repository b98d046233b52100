// The inspector: everything about one patch. Also the prediction and the load of the experts.

/** A piece of the picture around a patch: `around` patches on every side, 0 for the patch alone. */
function zoomStyle(view, patch, around) {
  const [rows, columns] = view.model.grid;
  const [row, column] = rowColumn(patch, columns).map((place) => place - 1);
  const span = 2 * around + 1;
  // background-position in percent counts in units of (picture - window), hence columns - span.
  const place = (at, size) => (size > span ? clamp((at - around) / (size - span), 0, 1) : 0) * 100;
  const left = clamp(column - around, 0, Math.max(0, columns - span));
  const top = clamp(row - around, 0, Math.max(0, rows - span));
  return {
    window: `background-image:url("${pictureSource(view.picture.src)}");`
      + `background-size:${(columns / span) * 100}% ${(rows / span) * 100}%;`
      + `background-position:${place(column, columns)}% ${place(row, rows)}%`,
    frame: `left:${((column - left) / span) * 100}%;top:${((row - top) / span) * 100}%;`
      + `width:${100 / span}%;height:${100 / span}%`,
  };
}

function drawZooms(view, patch) {
  const [rows, columns] = view.model.grid;
  const whole = (Math.min(rows, columns) - 1) / 2;
  const levels = [[0, "patch"], [1, "neighbours"], [whole, "where it sits"]];
  return html`<div class="mv-zooms">${levels.map(([around, label]) => {
    const style = zoomStyle(view, patch, around);
    return html`<figure><div class="mv-zoom" style="${style.window}">
      ${around > 0 && html`<i style="${style.frame}"></i>`}</div><figcaption>${label}</figcaption></figure>`;
  })}</div>`;
}

/** All experts of the layer, best first; the chosen ones with rank, gate weight and whether capacity kept them. */
function drawChoices(view, layer, patch) {
  const experts = view.model.num_experts;
  const order = [...Array(experts).keys()].sort((a, b) => layer.probs[patch][b] - layer.probs[patch][a]);
  const row = (expert) => {
    const rank = layer.experts[patch].indexOf(expert);
    const chosen = rank >= 0;
    const state = !chosen ? "" : layer.kept[patch][rank] ? `weight ${fixed(layer.weights[patch][rank])}` : "dropped by capacity";
    return html`<li class="${chosen ? "mv-chosen" : ""}">
      ${chip(expert, experts)}
      <span class="mv-bar"><i style="width:${layer.probs[patch][expert] * 100}%;background:${expertColour(expert, experts)}"></i></span>
      <span class="mv-num">${percent(layer.probs[patch][expert])}</span>
      <span class="mv-rank ${chosen && !layer.kept[patch][rank] ? "mv-dropped" : ""}">${chosen && html`<b>${ordinal(rank + 1)}</b> ${state}`}</span>
    </li>`;
  };
  return html`<h3>${term("probability", "Router probability")} and ${term("gate", "gate weight")}</h3>
    <ol class="mv-choices">${order.map(row)}</ol>`;
}

const ordinal = (number) => `${number}${["th", "st", "nd", "rd"][number % 10 < 4 && Math.floor(number / 10) !== 1 ? number % 10 : 0]}`;

/** The way of a patch through the MoE layers: first choice as a dot, second choice thin. Drawn by hand in SVG. */
function drawPath(state, patch) {
  const { view } = state;
  const experts = view.model.num_experts;
  const step = Math.min(96, 272 / view.layers.length);
  const width = step * view.layers.length;
  const y = (expert) => 12 + (expert * 108) / Math.max(1, experts - 1);
  const x = (index) => step * (index + 0.5);
  const line = (rank, index) => {
    const [from, to] = [view.layers[index], view.layers[index + 1]];
    if (from.experts[patch][rank] === undefined) return "";
    return html`<line class="${rank ? "mv-thin" : ""}" x1="${x(index)}" y1="${y(from.experts[patch][rank])}"
      x2="${x(index + 1)}" y2="${y(to.experts[patch][rank] ?? to.experts[patch][0])}"/>`;
  };
  const dot = (layer, index, rank) => {
    const expert = layer.experts[patch][rank];
    if (expert === undefined) return "";
    const colour = expertColour(expert, experts);
    return rank
      ? html`<circle class="mv-second" cx="${x(index)}" cy="${y(expert)}" r="5" stroke="${colour}"/>`
      : html`<circle cx="${x(index)}" cy="${y(expert)}" r="10" fill="${colour}"/>
          <text x="${x(index)}" y="${y(expert) + 4}" fill="${inkOn(colour)}">${expert}</text>`;
  };
  const links = [...Array(Math.max(0, view.layers.length - 1)).keys()];
  const spoken = view.layers.map((layer) => `${layer.name} expert ${layer.experts[patch][0]}`).join(", then ");
  return html`<h3>Path through the layers</h3>
    <div class="mv-path" style="width:${width}px">
      <svg viewBox="0 0 ${width} 132" width="${width}" height="132" role="img" aria-label="Path: ${spoken}">
        ${links.map((index) => [1, 0].map((rank) => line(rank, index)))}
        ${view.layers.map((layer, index) => [1, 0].map((rank) => dot(layer, index, rank)))}</svg>
      <div class="mv-path-names">${view.layers.map((layer, index) => html`<button type="button" data-action="layer"
        data-index="${index}" data-key="path-${index}" aria-pressed="${index === state.layer}">${layer.name}</button>`)}</div>
    </div>`;
}

function drawInspector(box, state) {
  const patch = state.shown;
  if (patch === null) {
    fillBox(box, html`<div class="mv-empty"><p><b>Point at a patch.</b> Its experts, their weights and its path appear here.</p>
      <p class="mv-note">Click to pin it. Arrow keys move, <kbd>+</kbd> <kbd>−</kbd> change the layer, <kbd>Esc</kbd> lets go.</p></div>`);
    return;
  }
  const { view, currentLayer: layer } = state;
  const [row, column] = rowColumn(patch, view.model.grid[1]);
  const first = layer.experts[patch][0];
  fillBox(box, html`
    <p class="mv-where">${chip(first, view.model.num_experts, "mv-big")}
      <span><b>${layerExpert(layer, first)}</b><br><span class="mv-soft">row ${row}, column ${column}${view === state.views[1] ? " · second picture" : ""}</span></span>
      ${state.hover === null && html`<button type="button" class="mv-quiet" data-action="unpin" data-key="unpin">unpin</button>`}</p>
    ${drawZooms(view, patch)}
    ${drawChoices(view, layer, patch)}
    <dl class="mv-facts">
      <div><dt>${term("margin", "margin")}</dt><dd>${fixed(layer.margin[patch])}</dd></div>
      <div><dt>${term("entropy", "entropy")}</dt><dd>${fixed(layer.entropy[patch])} <small>of ${fixed(Math.log2(view.model.num_experts), 0)} bits</small></dd></div>
    </dl>
    ${drawPath(state, patch)}
    <p class="mv-note">${contextSentence(state)}</p>`);
}

/** Attention comes before the experts within a block, so block n has had n + 1 rounds of it. */
function contextSentence(state) {
  const { layer, name } = state.currentLayer;
  const rounds = layer === 0 ? "one round of attention" : `${layer + 1} rounds of attention`;
  return `By ${name} this patch has been through ${rounds}: it carries context from the whole picture, so the expert
    doesn't answer to these pixels alone. A convolutional stem adds a little of the neighbours from the start.`;
}

// ---- prediction and load ------------------------------------------------------------------------------------

function predictionColumn(title, top, label) {
  const row = ({ class: name, p }) => html`<li><span class="mv-class">${name}${name === label && html` <small>label</small>`}</span>
    <span class="mv-num">${percent(p)}</span><span class="mv-bar mv-accent"><i style="width:${p * 100}%"></i></span></li>`;
  return html`<div><h3>${title}</h3><ol class="mv-top">${top.map(row)}</ol></div>`;
}

function drawPrediction(box, view) {
  const { moe, dense } = view.prediction;
  fillBox(box, html`<h2>Prediction</h2><div class="mv-two">
    ${predictionColumn("with experts", moe, view.picture.label)}
    ${dense && predictionColumn(term("dense", "dense twin"), dense, view.picture.label)}</div>`);
}

/** One line per picture that answers the first question before anything else is read. */
function drawVerdict(box, state) {
  fillBox(box, html`${state.views.map((view) => html`<div>${verdictLine(view)}${verdictNotes(view)}</div>`)}`);
}

function verdictLine(view) {
  const best = view.prediction.moe[0];
  const twin = view.prediction.dense?.[0];
  const { label } = view.picture;
  const tag = label === best.class ? html`<span class="mv-tag mv-right">✓ matches the label</span>`
    : label && html`<span class="mv-tag mv-wrong">✗ the label is ${label}</span>`;
  return html`<p class="mv-verdict"><span>The model sees</span> <b>${best.class}</b> <span class="mv-num">${percent(best.p)}</span>
    ${tag}${twin && html`<span class="mv-soft">${term("dense", "dense twin")}: ${twin.class} ${percent(twin.p)}</span>`}</p>`;
}

/** What makes this view less than the model on its own kind of picture. */
function verdictNotes(view) {
  const { unlike } = view.picture;
  const { intervention } = view.settings;
  const off = offReason(view);
  return [
    unlike && html`<p class="mv-warn" role="note"><b>Unlike the training data.</b> ${unlike}</p>`,
    off && html`<p class="mv-warn" role="note"><b>Off the training distribution.</b> ${off}</p>`,
    intervention && html`<p class="mv-warn" role="note"><b>Changed model.</b> ${interventionWords(intervention)}
      <button type="button" class="mv-quiet" data-action="undo" data-key="undo">Undo</button></p>`,
  ];
}

/** How top-k and capacity differ from the training; empty where they don't. */
function offReason({ settings: { top_k: k, capacity }, model }) {
  const reasons = [];
  if (k !== model.top_k) reasons.push(`Trained with top-${model.top_k}, shown is top-${k}.`);
  if (capacity !== null) reasons.push(`Trained without a capacity limit, shown is capacity factor ${capacity}.`);
  return reasons.join(" ");
}

function interventionWords({ kind, layer, expert, fill }) {
  const where = layer === null || layer === undefined ? "in every layer" : `in L${layer}`;
  if (kind === "random") return `Patches go to random experts ${where}.`;
  if (kind === "force") return `Every patch ${where} goes to L${layer}·E${expert}.`;
  return `Without L${layer}·E${expert}: its patches ${fill === "zero" ? "get nothing in its place" : "go to their next-best expert"}.`;
}

function drawLoads(box, state) {
  const { view, currentLayer: layer } = state;
  const experts = view.model.num_experts;
  const mean = layer.counts.reduce((sum, count) => sum + count, 0) / experts;
  const top = Math.max(...layer.requested, ...layer.counts, 1);
  const dropped = layer.requested.reduce((sum, count, expert) => sum + count - layer.counts[expert], 0);
  const bar = (count, expert) => html`<button type="button" class="mv-loadbar" data-action="highlight" data-expert="${expert}"
      data-key="load-${expert}" aria-pressed="${state.highlight === expert}"
      aria-label="${layerExpert(layer, expert)} computes ${count} choices. Highlight its patches">
    <span class="mv-loadtrack"><i class="mv-lost" style="height:${(layer.requested[expert] / top) * 100}%"></i>
      <i style="height:${(count / top) * 100}%;background:${expertColour(expert, experts)}"></i></span>
    <span class="mv-loadcount">${count}</span>${chip(expert, experts)}</button>`;
  fillBox(box, html`<div class="mv-strip-head"><h2>${term("load", "Load")} in ${layer.name}</h2>
      <span class="mv-soft">${term("slowest", "slowest ÷ mean")} <b class="mv-num">${fixed(layer.slowest)}</b></span></div>
    <div class="mv-loads ${experts > 12 ? "mv-many" : ""}" style="--ideal:${mean / top}">${layer.counts.map(bar)}
      <div class="mv-ideal" aria-hidden="true"></div></div>
    <p class="mv-note">Choices of this picture's patches. Dashed: equal share, ${fixed(mean, mean % 1 ? 1 : 0)} each.
      ${dropped > 0 && `Hatched: ${dropped} dropped by capacity.`} Click a bar to highlight its patches.</p>`);
}
