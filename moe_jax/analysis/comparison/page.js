'use strict';
const PALETTE = DATA.palette;
const DASHES = ['solid', 'dash', 'dot', 'dashdot'];
const VERDICTS = {lower: '#2b8a3e', higher: '#d9480f', 'not distinguishable': '#6b7280',
  'not yet decided': '#7048a8', 'not comparable': '#8f2d2d'};
const AXES = {tokens: 'tokens trained on', flops: 'training FLOPs',
  seconds: 'seconds of training steps', steps: 'optimizer step'};
const CURVES = {loss: 'training loss [nats per token]', max_vio: 'MaxVio of the batch, mean of layers',
  drop_rate: 'share of dropped assignments'};
const GROUPS = DATA.groups;
const state = {off: new Set(), baseline: DATA.baseline, x: 'tokens', logx: false, logy: false,
  seeds: false, curve: 'loss', figure: Object.keys(DATA.figures)[0], layer: 'mean', at: 0, timer: 0};

const colourOf = name => PALETTE[indexOf(name) % PALETTE.length];
const dashOf = name => DASHES[Math.floor(indexOf(name) / PALETTE.length) % DASHES.length];
const indexOf = name => GROUPS.findIndex(group => group.name === name);
const shown = () => GROUPS.filter(group => !state.off.has(group.name));
const faint = colour => colour + '2e';
const isNumber = value => typeof value === 'number';

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key === 'style') node.style.cssText = value;
    else if (value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// **bold** and `code` of a sentence, as nodes: names of runs are text, never markup.
function rich(text) {
  return text.split(/(\*\*[^*]+\*\*|`[^`]+`)/).filter(Boolean).map(part => {
    if (part.startsWith('**')) return el('strong', {}, part.slice(2, -2));
    return part.startsWith('`') ? el('code', {}, part.slice(1, -1)) : part;
  });
}

function withInterval(one, digits, sign = '') {
  if (!one || !isNumber(one.mean)) return '-';
  const form = value => (value > 0 ? sign : '') + value.toFixed(digits);
  const ends = isNumber(one.low) ? `[${form(one.low)}, ${form(one.high)}]` : '(one seed)';
  return `${form(one.mean)} ${ends}`;
}

function big(value) {
  for (const [size, unit] of [[1e15, 'P'], [1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (value >= size) return (value / size).toPrecision(3) + unit;
  }
  return String(Math.round(value));
}

// Tables: a cell is text, a node, or {text, value} where another value sorts.
function table(header, rows, sortable = true) {
  const body = el('tbody');
  const heads = header.map((title, column) => el('th', {scope: 'col'},
    sortable ? el('button', {onclick: () => sort(heads, body, column)}, title) : title));
  for (const {cells, arm} of rows) {
    body.append(el('tr', arm ? {'data-arm': arm} : {}, ...cells.map(cell => {
      const full = cell !== null && typeof cell === 'object' && !(cell instanceof Node);
      const value = full ? cell.value : cell instanceof Node ? cell.textContent : cell;
      return el('td', {'data-value': value ?? ''}, full ? cell.text : cell ?? '-');
    })));
  }
  return el('div', {class: 'wide'}, el('table', {}, el('thead', {}, el('tr', {}, ...heads)), body));
}

function sort(heads, body, column) {
  const up = heads[column].getAttribute('aria-sort') !== 'ascending';
  heads.forEach(head => head.removeAttribute('aria-sort'));
  heads[column].setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => row.cells[column].dataset.value;
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === ''); // what is not there comes last
    const difference = Number(x) - Number(y);
    return (up ? 1 : -1) * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
  };
  body.append(...[...body.rows].sort(order));
}

function nameCell(name) {
  return el('span', {}, el('span', {class: 'dot', style: `--colour:${colourOf(name)}`}), name);
}

function tag(verdict) {
  return el('span', {class: 'tag', style: `background:${VERDICTS[verdict] || '#6b7280'}`}, verdict);
}

// Charts.
const FONT = {family: 'system-ui, sans-serif', size: 12, color: '#1f2430'};
function draw(id, traces, layout, height = 400) {
  const node = document.getElementById(id);
  node.style.height = `${height}px`;
  const axis = {gridcolor: '#e9ecf0', zerolinecolor: '#9aa1ac', automargin: true};
  return Plotly.react(node, traces, {
    font: FONT, margin: {l: 62, r: 16, t: 16, b: 48}, height, showlegend: false,
    hovermode: 'x unified', hoverdistance: -1, hoverlabel: {bgcolor: '#fff'},
    modebar: {bgcolor: '#fff', color: '#9aa1ac', activecolor: '#1f5fa8'},
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: '#fff', ...layout,
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, {responsive: true, displaylogo: false,
    modeBarButtons: [['toImage', 'zoom2d', 'pan2d', 'resetScale2d']],
    toImageButtonOptions: {format: 'png', scale: 2, filename: id}});
}

const xAxis = (title, log = state.logx) => ({title: {text: title}, type: log ? 'log' : 'linear',
  exponentformat: 'SI'});

function bandTraces(name, x, band, format = '.4f') {
  const colour = colourOf(name);
  const edge = {x, mode: 'lines', line: {width: 0}, hoverinfo: 'skip', legendgroup: name};
  const traces = [];
  if (band.low && band.low.some(isNumber)) {
    traces.push({...edge, y: band.low},
      {...edge, y: band.high, fill: 'tonexty', fillcolor: faint(colour)});
  }
  traces.push({x, y: band.mean, name, mode: 'lines', legendgroup: name,
    line: {color: colour, width: 2, dash: dashOf(name)},
    hovertemplate: `%{y:${format}}<extra>${escaped(name)}</extra>`});
  return traces;
}

// Plotly reads markup in names.
const escaped = text => text.replace(/[&<>]/g, c => ({'&': '&amp;', '<': '&lt;', '>': '&gt;'})[c]);

function drawCurves() {
  const traces = [];
  for (const group of shown()) {
    const found = group.curves && group.curves[state.curve];
    if (!found) continue;
    const x = group.curves[state.x];
    if (state.seeds) {
      const seeds = group.curves.seeds;
      found.seeds.forEach((y, i) => traces.push({x, y, mode: 'lines', opacity: 0.55,
        line: {color: colourOf(group.name), width: 1}, name: `${group.name}, seed ${seeds[i]}`,
        hovertemplate: `%{y:.4f}<extra>${escaped(group.name)}, seed ${seeds[i]}</extra>`}));
    } else {
      traces.push(...bandTraces(group.name, x, found));
    }
  }
  draw('curves', traces, {xaxis: xAxis(AXES[state.x]),
    yaxis: {title: {text: CURVES[state.curve]}, type: state.logy ? 'log' : 'linear'}});
}

function drawDifference() {
  const against = DATA.against[state.baseline];
  const traces = [], ends = [0], lines = [];
  for (const group of shown()) {
    const found = against && against.differences[group.name];
    if (!found) continue;
    if (found.reasons) {
      lines.push(el('li', {}, tag('not comparable'), ' ', ...rich(
        notComparable(group.name, found).slice('**Not comparable**: '.length))));
      continue;
    }
    traces.push(...bandTraces(group.name, found.tokens, found));
    // The first windows, in which arms begin to learn, would flatten all that follows.
    const rest = Math.floor(found.tokens.length / 4);
    for (const key of ['mean', 'low', 'high']) ends.push(...found[key].slice(rest).filter(isNumber));
    if (found.crossover) traces.push(crossing(group.name, found));
    lines.push(el('li', {}, tag(found.verdict), ' ', ...rich(`\`${group.name}\`: ${found.text}`)));
  }
  const low = Math.min(...ends), high = Math.max(...ends), room = 0.12 * (high - low) || 0.1;
  draw('difference', traces, {xaxis: xAxis(AXES.tokens), yaxis: {
    title: {text: `loss minus that of ${escaped(state.baseline)} [nats per token]`},
    range: [low - room, high + room]}});
  document.getElementById('difference-words').replaceChildren(...lines);
}

const notComparable = (arm, found) =>
  `**Not comparable**: \`${arm}\` against \`${state.baseline}\`: ${found.reasons.join('; ')}`;

function crossing(name, found) {
  const [at, low, high] = found.crossover;
  const last = found.tokens[found.tokens.length - 1];
  const right = (isNumber(high) ? high : last) - at, left = at - Math.max(low, found.tokens[0]);
  const bounds = `[${low ? big(low) : 'the start'}, ${isNumber(high) ? big(high) : 'not bounded'}]`;
  return {x: [at], y: [0], mode: 'markers', name: `${name} crosses`,
    marker: {size: 9, color: colourOf(name), line: {color: '#1f2430', width: 1.5}},
    error_x: {type: 'data', symmetric: false, array: [right], arrayminus: [left],
      color: colourOf(name), thickness: 3, width: 5},
    hovertemplate: `crosses at ${big(at)} tokens ${bounds}<extra>${escaped(name)}</extra>`};
}

function drawHeldOut() {
  const traces = [], names = [];
  for (const group of shown()) {
    const found = group.held_out[state.figure];
    if (!found) continue;
    const name = escaped(group.name), colour = colourOf(group.name);
    names.unshift(name);
    traces.push({x: found.seeds, y: found.seeds.map(() => name), mode: 'markers', name,
      marker: {color: colour, opacity: 0.45, size: 7},
      hovertemplate: `%{x:.4f}<extra>one seed of ${name}</extra>`});
    const half = isNumber(found.low) ? found.mean - found.low : 0;
    traces.push({x: [found.mean], y: [name], mode: 'markers', name,
      marker: {color: colour, symbol: 'diamond', size: 11},
      error_x: {type: 'data', array: [half], color: colour, thickness: 2, width: 6},
      hovertemplate: `mean %{x:.4f}<extra>${name}</extra>`});
  }
  draw('held-out', traces, {hovermode: 'closest', xaxis: xAxis(DATA.figures[state.figure], false),
    yaxis: {type: 'category', categoryarray: names, categoryorder: 'array'}},
  120 + 36 * Math.max(names.length, 1));
}

function drawBalance() {
  const traces = [];
  for (const group of shown()) {
    const found = group.balance;
    if (!found) continue;
    const rows = state.layer === 'mean' ? found.max_vio :
      found.max_vio.filter((_, i) => String(found.layers[i]) === state.layer);
    if (!rows.length) continue;
    const y = found.steps.map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
    traces.push({x: found.steps, y, name: group.name, mode: 'lines+markers', marker: {size: 4},
      line: {color: colourOf(group.name), width: 2, dash: dashOf(group.name)},
      hovertemplate: `%{y:.3f}<extra>${escaped(group.name)}</extra>`});
  }
  draw('balance', traces, {xaxis: xAxis(AXES.steps), yaxis: {title: {text: 'MaxVio, mean of seeds'},
    rangemode: 'tozero'}}, 340);
}

const LOADS = GROUPS.filter(group => group.load);
const STEPS = [...new Set(LOADS.flatMap(group => group.load.steps))].sort((a, b) => a - b);
const TOP = Math.min(4, Math.max(2, ...LOADS.map(group =>
  Math.max(...group.load.relative.flat(2)))));

function drawLoads() {
  const step = STEPS[state.at];
  document.getElementById('step-text').textContent = `step ${step}`;
  for (const group of LOADS) {
    const id = `load-${indexOf(group.name)}`, node = document.getElementById(id);
    node.parentElement.hidden = state.off.has(group.name);
    if (state.off.has(group.name)) continue;
    const before = group.load.steps.filter(one => one <= step).length;
    const at = Math.max(0, before - 1), z = group.load.relative[at];
    const vio = z.map(row => Math.max(...row) - 1);
    const mean = vio.reduce((sum, one) => sum + one, 0) / vio.length;
    node.previousElementSibling.textContent =
      `${group.name}, seed ${group.load.seed}, step ${group.load.steps[at]}: MaxVio ${mean.toFixed(2)}`;
    const y = z.map((_, i) => `layer ${group.load.first_layer + i}`);
    draw(id, [{type: 'heatmap', z, y, zmin: 0, zmax: TOP, xgap: 1, ygap: 1,
      colorscale: [[0, '#2b6cb0'], [1 / TOP, '#ffffff'], [1, '#c53030']],
      colorbar: {title: {text: 'load / mean'}, thickness: 10},
      hovertemplate: '%{y}, expert %{x}: %{z:.2f} x the mean<extra></extra>'}],
    {hovermode: 'closest', xaxis: {title: {text: 'expert'}, showgrid: false},
      yaxis: {autorange: 'reversed', showgrid: false, type: 'category'}}, 120 + 26 * z.length);
  }
}

function drawClaims() {
  const against = DATA.against[state.baseline], claims = against.claims;
  const rows = claims.map(claim => ({arm: claim.arm, cells: [
    nameCell(claim.arm), DATA.figures[claim.figure], tag(claim.verdict),
    {text: withInterval(claim, 4, '+'), value: claim.mean},
    {text: isNumber(claim.mean) ? claim.p.toPrecision(2) : '-', value: claim.p}, tag(claim.holm),
    claim.pairs,
  ]}));
  const claimed = new Set(claims.map(claim => claim.arm));
  const others = Object.entries(against.differences).filter(([arm, found]) =>
    found.reasons && !claimed.has(arm));
  const node = document.getElementById('claims');
  node.replaceChildren(el('ul', {}, ...claims.map(claim => el('li', {'data-arm': claim.arm},
    ...rich(claim.text + '.'))), ...others.map(([arm, found]) => el('li', {'data-arm': arm},
    ...rich(notComparable(arm, found) + '. No difference between them is called real.')))),
  table(['arm', 'figure', 'verdict',
    `difference from ${state.baseline}`, 'p', 'all claims together (Holm)', 'pairs'], rows));
  markRows();
}

function markRows() {
  for (const node of document.querySelectorAll('[data-arm]')) {
    node.classList.toggle('off', state.off.has(node.dataset.arm));
  }
}

function drawAll() {
  drawCurves();
  if (DATA.against[state.baseline]) { drawClaims(); drawDifference(); }
  drawHeldOut();
  if (document.getElementById('balance')) drawBalance();
  if (LOADS.length) drawLoads();
  markRows();
}

// The page itself.
function choice(label, options, key, redraw) {
  const select = el('select', {id: `choose-${key}`, onchange: event => {
    state[key] = event.target.value;
    redraw();
  }}, ...Object.entries(options).map(([value, text]) =>
    el('option', {value, ...(value === state[key] ? {selected: ''} : {})}, text)));
  return el('label', {}, label, select);
}

function check(label, key, redraw) {
  return el('label', {}, el('input', {type: 'checkbox', id: `check-${key}`, onchange: event => {
    state[key] = event.target.checked;
    redraw();
  }}), label);
}

function armButton(group) {
  return el('button', {class: 'arm', 'aria-pressed': 'true', style: `--colour:${colourOf(group.name)}`,
    title: 'switch on or off', onclick: event => {
      const on = state.off.delete(group.name) || (state.off.add(group.name), false);
      event.currentTarget.setAttribute('aria-pressed', String(on));
      drawAll();
    }}, el('i'), `${group.name} (${group.seeds.length})`);
}

function bar() {
  const names = Object.fromEntries(GROUPS.map(group => [group.name, group.name]));
  return el('div', {id: 'bar'}, ...GROUPS.map(armButton),
    ...(GROUPS.length > 1 ? [choice('against', names, 'baseline', drawAll)] : []),
    choice('over', AXES, 'x', drawAll), check('log x', 'logx', drawAll));
}

const section = (title, ...nodes) => el('section', {}, el('h2', {}, title), ...nodes);
const words = text => el('p', {class: 'soft'}, text);
const chart = id => el('div', {class: 'chart', id});

function overview() {
  const rows = GROUPS.map(group => {
    const bits = group.held_out.bits_per_byte, vio = group.held_out.max_vio, curves = group.curves;
    const tokens = curves ? curves.tokens[curves.tokens.length - 1] : null;
    const costs = Object.values(group.parameters).slice(0, 3);
    return {arm: group.name, cells: [nameCell(group.name), group.seeds.join(', '),
      {text: withInterval(bits, 4), value: bits && bits.mean},
      {text: withInterval(vio, 2), value: vio && vio.mean},
      {text: tokens ? big(tokens) : '-', value: tokens},
      ...costs.map(cost => ({text: big(cost), value: cost}))]};
  });
  return table(['arm', 'seeds', 'bits per byte', 'MaxVio', 'tokens',
    ...Object.keys(GROUPS[0].parameters).slice(0, 3)], rows);
}

function loads() {
  const slider = el('input', {type: 'range', id: 'step', min: 0, max: STEPS.length - 1,
    value: STEPS.length - 1, 'aria-label': 'step', oninput: event => {
      state.at = Number(event.target.value);
      drawLoads();
    }});
  state.at = STEPS.length - 1;
  const play = el('button', {class: 'arm', onclick: () => {
    clearInterval(state.timer);
    state.at = 0;
    state.timer = setInterval(() => {
      slider.value = state.at;
      drawLoads();
      if (state.at >= STEPS.length - 1) clearInterval(state.timer);
      else state.at += 1;
    }, 500);
  }}, 'play');
  return section('Load of the experts',
    words('Assignments per expert of one batch, relative to the mean of its layer: white is balanced.'),
    el('div', {class: 'tools'}, play, slider, el('strong', {id: 'step-text'})),
    el('div', {class: 'pair'}, ...LOADS.map(group => el('div', {}, el('div', {class: 'soft'}),
      chart(`load-${indexOf(group.name)}`)))));
}

function build() {
  const several = GROUPS.length > 1, names = GROUPS.map(group => group.name);
  const page = document.getElementById('page');
  page.append(el('h1', {}, DATA.title), words('Mean over seeds and band of its 95 % interval ' +
    "(Student's t). Differences are paired by seed: same start, same batches."), bar());
  if (several) {
    page.append(section('Verdict', el('div', {id: 'claims'}), words(DATA.rule + '.')),
      section('Difference against tokens', chart('difference'),
        el('ul', {id: 'difference-words'})));
  }
  if (DATA.remarks.length) {
    page.append(section('Before you believe it',
      el('ul', {}, ...DATA.remarks.map(line => el('li', {}, line)))));
  }
  page.append(section('Arms', overview()));
  page.append(section('Curves', el('div', {class: 'tools'}, choice('', CURVES, 'curve', drawCurves),
    check('log y', 'logy', drawCurves), check('each seed', 'seeds', drawCurves)), chart('curves'),
  words(DATA.note)));
  page.append(section('Held out', el('div', {class: 'tools'},
    choice('', DATA.figures, 'figure', drawHeldOut)), chart('held-out')));
  const layers = [...new Set(GROUPS.flatMap(g => g.balance ? g.balance.layers : []))];
  if (layers.length) {
    // Keys that are numbers would come first, so that the mean would not.
    const options = {mean: 'mean of layers'};
    for (const layer of layers) options[` ${layer}`] = `layer ${layer}`;
    const select = choice('', options, 'layer', () => {
      state.layer = state.layer.trim();
      drawBalance();
    });
    page.append(section('Balance per layer', el('div', {class: 'tools'}, select), chart('balance'),
      words('MaxVio: load of the fullest expert / mean load - 1, of the batch of a step.')));
  }
  if (LOADS.length) page.append(loads());
  if (several && DATA.settings.length) {
    page.append(section('What differs', table(['setting', ...names],
      DATA.settings.map(cells => ({cells})))));
  }
  page.append(section('What it costs', table(['per run', ...names],
    DATA.budgets.map(cells => ({cells})), false)));
  page.append(section('Runs', table(['arm', 'directory', 'seed', 'steps'], GROUPS.flatMap(group =>
    group.runs.map(run => ({arm: group.name, cells: [nameCell(group.name), ...run]}))))));
  drawAll();
}

build();
