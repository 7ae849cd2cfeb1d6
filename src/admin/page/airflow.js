// The page at /airflow: asks the admin port for its JSON and draws it.
//
// Invariant: a value from the answers becomes a text node or the value of a harmless attribute, never markup and never the name
// of anything. Every list has a bound, and what is left out is said.
'use strict';

const POLL_MS = 3000;
const DENIALS_MAX = 200;
const ROWS_MAX = 300;
const NODES_MAX = 40;
const FRESH_MS = 60000;
const SVG = 'http://www.w3.org/2000/svg';
const FIELDS = ['dag', 'task', 'run'];

let seen = null;
let listed = '';

// ---------------------------------------------------------------- elements

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  for (const child of children) node.append(child);
  return node;
}

// Strings among the children become text nodes: `append` parses nothing.
function html(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function table(caption, heads, rows) {
  if (rows.length === 0) return html('p', { class: 'none' }, 'Nothing to show.');
  const left = rows.length > ROWS_MAX ? `; ${rows.length - ROWS_MAX} more are left out: filter by DAG` : '';
  return html('table', {},
    html('caption', {}, caption + left),
    html('thead', {}, html('tr', {}, ...heads.map(head => html('th', { scope: 'col' }, head)))),
    html('tbody', {}, ...rows.slice(0, ROWS_MAX).map(row => html('tr', {}, ...row))));
}

function cell(text, kind) {
  return html('td', kind ? { class: kind } : {}, text === null || text === undefined ? '—' : String(text));
}

function put(id, ...nodes) {
  document.getElementById(id).replaceChildren(...nodes);
}

// ---------------------------------------------------------------- words

function size(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return unit === 0 ? `${bytes} B` : `${bytes.toFixed(1)} ${units[unit]}`;
}

function span(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

function ago(stamp) {
  return `${span(Date.now() - Date.parse(stamp))} ago`;
}

function short(text, length) {
  const letters = Array.from(text);
  return letters.length > length ? `${letters.slice(0, length - 1).join('')}…` : text;
}

function whose(caller) {
  if (!caller) return 'a peer';
  if (caller.dag !== undefined) return `${caller.dag} / ${caller.task}`;
  if (caller.component !== undefined) return `component ${caller.component}`;
  return `unidentified${caller.command ? `: ${caller.command}` : ''}`;
}

// ---------------------------------------------------------------- filter

function wanted() {
  const form = document.getElementById('filter');
  return Object.fromEntries(FIELDS.map(field => [field, form.elements[field].value.trim()]));
}

// `*` stands for anything; without one the whole name counts.
function matches(pattern, text) {
  if (pattern === '') return true;
  if (text === undefined || text === null) return false;
  const parts = pattern.split('*');
  if (parts.length === 1) return pattern === text;
  const last = parts.pop();
  let at = 0;
  for (const [index, part] of parts.entries()) {
    const found = index === 0 ? (text.startsWith(part) ? 0 : -1) : text.indexOf(part, at);
    if (found < 0) return false;
    at = found + part.length;
  }
  return text.length >= at + last.length && text.endsWith(last);
}

function passes(filter, names) {
  return FIELDS.every(field => matches(filter[field], names[field]));
}

function isOpen(filter) {
  return FIELDS.every(field => filter[field] === '');
}

// ---------------------------------------------------------------- graph

function edge(edges, from, to, counts, last) {
  const key = JSON.stringify([from, to]);
  const one = edges.get(key) || { from, to, connections: 0, denied: 0, bytes: 0, last: 0 };
  one.connections += counts.connections;
  one.denied += counts.denied;
  one.bytes += counts.bytes_from_mesh + counts.bytes_to_mesh;
  one.last = Math.max(one.last, last);
  edges.set(key, one);
}

function node(nodes, key, name, counts) {
  const one = nodes.get(key) || { key, name, connections: 0 };
  one.connections += counts.connections;
  nodes.set(key, one);
  return key;
}

// Three columns: who, as which identity, to which service.
function graph(callers, filter) {
  const [who, identities, services] = [new Map(), new Map(), new Map()];
  const [left, right] = [new Map(), new Map()];
  const add = (key, name, identity, upstream, counts, last) => {
    const from = node(who, key, name, counts);
    const as = node(identities, identity === null ? 'none' : `as ${identity}`, identity === null ? 'no identity' : identity, counts);
    edge(left, from, as, counts, last);
    edge(right, as, node(services, upstream, upstream, counts), counts, last);
  };
  for (const row of callers.tries.filter(row => passes(filter, row))) {
    add(`task ${JSON.stringify([row.dag, row.task])}`, `${row.dag} / ${row.task}`, row.identity, row.upstream, row, Date.parse(row.last_seen));
  }
  for (const row of isOpen(filter) ? callers.totals.filter(row => row.who !== 'dag') : []) {
    const name = row.component === undefined ? row.who : row.component;
    add(`${row.who} ${name}`, name, row.component === undefined ? null : row.component, row.upstream, row, Date.now());
  }
  return { columns: [who, identities, services], edges: [left, right] };
}

function drawGraph(callers, filter) {
  const { columns, edges } = graph(callers, filter);
  if (columns[0].size === 0) return html('p', { class: 'none' }, 'No connection of a task has closed yet.');
  const open = new Map();
  for (const row of callers.services) {
    if (row.upstream) open.set(row.upstream, (open.get(row.upstream) || 0) + row.active);
  }
  const [top, step, height] = [8, 46, 34];
  const places = [[0, 400], [480, 250], [810, 190]];
  const shown = columns.map(column => [...column.values()].sort((a, b) => b.connections - a.connections).slice(0, NODES_MAX));
  const at = shown.map(column => new Map(column.map((one, index) => [one.key, top + index * step])));
  const rows = Math.max(...shown.map(column => column.length));
  const picture = svg('svg', { viewBox: `0 0 1000 ${top + rows * step}`, role: 'img', 'aria-label': 'Who talks to whom' });
  edges.forEach((side, index) => {
    const [x1, x2] = [places[index][0] + places[index][1], places[index + 1][0]];
    for (const one of side.values()) {
      const [y1, y2] = [at[index].get(one.from), at[index + 1].get(one.to)];
      if (y1 === undefined || y2 === undefined) continue;
      picture.append(curve(x1, y1 + height / 2, x2, y2 + height / 2, one));
    }
  });
  shown.forEach((column, index) => {
    const [x, width] = places[index];
    for (const one of column) {
      const live = index === 2 && open.has(one.key) ? `, ${open.get(one.key)} open` : '';
      picture.append(plate(x, at[index].get(one.key), width, height, one, index, live));
    }
  });
  const left = columns.reduce((sum, column) => sum + Math.max(0, column.size - NODES_MAX), 0);
  const note = left > 0 ? `${left} more are left out: filter by DAG.` : '';
  return html('div', {}, picture, html('p', { class: 'hint' }, note));
}

function curve(x1, y1, x2, y2, one) {
  const kind = one.denied === 0 ? '' : one.denied === one.connections ? ' denied' : ' partly';
  const middle = (x1 + x2) / 2;
  const words = `${one.connections} connections, ${one.denied} denied, ${size(one.bytes)}`;
  return svg('path', {
    d: `M${x1} ${y1} C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`,
    class: (Date.now() - one.last < FRESH_MS ? 'fresh' : 'old') + kind,
    'stroke-width': Math.min(10, 1.5 + Math.log2(one.connections)),
  }, svg('title', {}, words));
}

function plate(x, y, width, height, one, column, live) {
  const kind = column !== 1 ? 'end' : one.key === 'none' ? 'identity nameless' : 'identity';
  return svg('g', { class: kind },
    svg('title', {}, one.name),
    svg('rect', { x, y, width, height, rx: 5 }),
    svg('text', { x: x + 9, y: y + 15 }, short(one.name, Math.floor((width - 16) / 7))),
    svg('text', { x: x + 9, y: y + 29, class: 'faint' }, `${one.connections} closed${live}`));
}

// ---------------------------------------------------------------- tables

function drawDenials(answer, filter) {
  const all = answer.denials.filter(line => isOpen(filter) || passes(filter, line.caller || {}));
  const rows = all.map(line => {
    const caller = line.caller || {};
    const run = caller.run === undefined ? '' : `run ${caller.run}, try ${caller.try}${caller.map_index >= 0 ? `, map index ${caller.map_index}` : ''}`;
    const speaks = caller.identity || line.source;
    return [
      html('td', { class: 'when' }, line.time, html('br', {}), html('code', {}, String(line.denial))),
      html('td', {}, whose(line.caller), html('br', {}), html('span', { class: 'hint' }, run)),
      cell(speaks), cell(line.upstream || line.service),
      html('td', { class: 'why' }, line.why || line.by || line.reason, html('br', {}), line.remedy ? html('code', {}, line.remedy) : ''),
    ];
  });
  return table(`The newest first; ${answer.kept} of at most ${answer.kept_max} are kept`, ['When, id', 'Who', 'Identity', 'To', 'Why, and what would allow it'], rows);
}

function drawTries(callers, filter) {
  const rows = callers.tries.filter(row => passes(filter, row)).map(row => [
    cell(row.dag), cell(row.task), cell(row.run),
    cell(row.map_index >= 0 ? `${row.try} [${row.map_index}]` : row.try, 'number'),
    cell(row.identity, row.identity === null ? 'denied' : ''), cell(row.upstream),
    cell(row.connections, 'number'), cell(row.denied, row.denied > 0 ? 'number denied' : 'number'),
    cell(size(row.bytes_from_mesh), 'number'), cell(size(row.bytes_to_mesh), 'number'), cell(ago(row.last_seen), 'number'),
  ]);
  const heads = ['DAG', 'Task', 'Run', 'Try', 'Identity', 'To', 'Connections', 'Denied', 'Received', 'Sent', 'Last'];
  return table(`Since ${callers.since}`, heads, rows);
}

function drawServices(callers) {
  const rows = callers.services.map(row => [
    cell(row.upstream ? `${row.service} → ${row.upstream}` : `→ ${row.service}`), cell(row.active, 'number'),
    cell(row.connections, 'number'), cell(row.denied, row.denied > 0 ? 'number denied' : 'number'),
    cell(size(row.bytes_from_mesh), 'number'), cell(size(row.bytes_to_mesh), 'number'),
  ]);
  return table('Open connections included', ['Service', 'Open', 'Connections', 'Denied', 'From the mesh', 'To the mesh'], rows);
}

function drawCertificates(snapshot) {
  const own = snapshot.services.filter(service => service.identity).map(service => ({ name: service.service, ...service.identity }));
  const rows = [...own, ...snapshot.identities].map(leaf => {
    const [start, end] = [Date.parse(leaf.not_before), Date.parse(leaf.not_after)];
    const left = end - Date.now();
    const share = Math.min(1, Math.max(0, left / (end - start)));
    const words = left > 0 ? span(left) : 'expired';
    return [
      cell(leaf.name), cell(leaf.spiffe_id), cell(leaf.serial), cell(leaf.not_after),
      html('td', { class: left > 0 ? '' : 'denied' }, html('meter', { min: 0, max: 1, low: 0.1, optimum: 1, value: share }, words), words),
    ];
  });
  return table('Renewed by themselves, long before they end', ['Identity', 'SPIFFE ID', 'Serial', 'Ends', 'Left'], rows);
}

// ---------------------------------------------------------------- turning

function draw() {
  if (seen === null) return;
  const filter = wanted();
  const names = [...new Set(seen.callers.tries.map(row => row.dag))].sort().slice(0, ROWS_MAX);
  // A list that is open closes when it is put in anew.
  if (names.join('\n') !== listed) put('dags', ...names.map(name => html('option', { value: name })));
  listed = names.join('\n');
  put('graph', drawGraph(seen.callers, filter));
  put('denials', drawDenials(seen.denials, filter));
  put('tries', drawTries(seen.callers, filter));
  put('services', drawServices(seen.callers));
  put('certificates', drawCertificates(seen.snapshot));
}

function say(text, away) {
  const state = document.getElementById('state');
  state.textContent = text;
  state.className = away ? 'away' : '';
}

async function ask(path) {
  const answer = await fetch(path, { cache: 'no-store' });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return answer.json();
}

async function refresh() {
  const { dag } = wanted();
  // Only a whole name can be asked for; a pattern is matched here.
  const query = dag !== '' && !dag.includes('*') ? `&dag=${encodeURIComponent(dag)}` : '';
  try {
    const [callers, denials, snapshot] = await Promise.all([ask('callers'), ask(`denials?limit=${DENIALS_MAX}${query}`), ask('snapshot')]);
    seen = { callers, denials, snapshot };
    draw();
    say(`Counted since ${callers.since}; renewed every ${POLL_MS / 1000} s`, false);
  } catch (error) {
    say(`The proxy does not answer (${error.message}); what is below is the last that was seen`, true);
  }
}

async function turn() {
  if (!document.hidden) await refresh();
  setTimeout(turn, POLL_MS);
}

function filterChanged() {
  const parameters = new URLSearchParams(Object.entries(wanted()).filter(([, value]) => value !== ''));
  const query = parameters.toString();
  history.replaceState(null, '', query === '' ? location.pathname : `?${query}`);
  draw();
}

const form = document.getElementById('filter');
const asked = new URLSearchParams(location.search);
for (const field of FIELDS) form.elements[field].value = asked.get(field) || '';
form.addEventListener('input', filterChanged);
form.addEventListener('reset', () => setTimeout(filterChanged));
form.addEventListener('submit', event => { event.preventDefault(); filterChanged(); });
turn();
