// This program drives Chromium for the test in Go. It reads questions from stdin, one line
// of JSON for each question. To each question it writes an answer to stdout, also one line
// of JSON. An answer has findings; the test decides what they mean.
//
// usage: node drive.mjs NODE_MODULES CHROMIUM
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import * as checks from './checks.mjs';
import { badge, feed } from './feed.mjs';

const [modules, executablePath] = process.argv.slice(2);
const require = createRequire(join(modules, 'drive.js'));
const { chromium } = require('playwright-core');
const axeSource = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

// Chromium's sandbox does not start for root.
const args = process.getuid() === 0 ? ['--no-sandbox'] : [];
const browser = await chromium.launch({ executablePath, args });

const large = { viewport: { width: 1280, height: 800 } };
const views = {
  desktop: large,
  phone: { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true },
  dark: { ...large, colorScheme: 'dark' },
  noscript: { ...large, javaScriptEnabled: false },
};

// tabs has the open pages of the browser, by view and options, for later questions. To open
// a new page takes longer than to check one.
const tabs = new Map();

async function tab(view, options) {
  const key = view + JSON.stringify(options);
  if (tabs.has(key)) return tabs.get(key);
  const context = await browser.newContext({ ...views[view], ...options, reducedMotion: 'reduce' });
  const page = await context.newPage();
  // weigh adds up all resources of a page, so none of them may come from the cache.
  await (await context.newCDPSession(page)).send('Network.setCacheDisabled', { cacheDisabled: true });
  const now = { page };
  page.on('console', (m) => {
    if (m.type() !== 'error') return;
    // If the status of a response is an error, Chromium logs an error. For the page
    // itself, another check tests the status.
    if (m.location().url === now.url && /status of \d+/.test(m.text())) return;
    (/content security policy/i.test(m.text()) ? now.csp : now.console).push(m.text());
  });
  page.on('pageerror', (e) => now.console.push(String(e)));
  page.on('request', (r) => {
    const { protocol, origin } = new URL(r.url());
    if (protocol.startsWith('http') && origin !== new URL(now.url).origin) now.hosts.push(r.url());
  });
  page.on('response', (r) => now.responses.push(r));
  tabs.set(key, now);
  return now;
}

// open goes to a page and calls f(page, said, response). The argument said has the errors
// that the page logged to the console, the page's violations of its content security
// policy, the URLs on other hosts that the page asked for, and all responses that the page
// got.
async function open(view, url, options, f) {
  const now = await tab(view, options);
  await now.page.goto('about:blank');
  Object.assign(now, { url, console: [], csp: [], hosts: [], responses: [] });
  const response = await now.page.goto(url, { waitUntil: 'load' });
  return f(now.page, now, response);
}

// weigh returns the size of a page with all its resources, in bytes, uncompressed. It
// ignores the event stream that a page opens when it is complete, because the stream has no
// end.
async function weigh(responses) {
  let bytes = 0;
  for (const r of responses) {
    if (!r.headers()['content-type']?.startsWith('text/event-stream')) bytes += (await r.body()).length;
  }
  return bytes;
}

async function check({ url, status, sticky, large }) {
  const findings = [];
  const add = (view, check, texts) => texts.forEach((text) => findings.push({ view, check, text }));
  const expect = (view, response) => {
    if (response.status() !== status) add(view, 'status', [`${response.status()}; want ${status}`]);
  };
  const quiet = (view, said) => ['console', 'csp', 'hosts'].forEach((check) => add(view, check, said[check]));
  let title, weight, withScript;
  await open('desktop', url, {}, async (page, said, response) => {
    expect('desktop', response);
    title = await page.title();
    weight = await weigh(said.responses);
    withScript = await checks.readable(page);
    add('desktop', 'width', await checks.width(page));
    add('desktop', 'keyboard', await checks.keyboard(page));
    if (sticky) add('desktop', 'sticky', await checks.sticky(page, sticky, large));
    quiet('desktop', said);
  });
  await open('phone', url, {}, async (page, said, response) => {
    expect('phone', response);
    add('phone', 'width', await checks.width(page));
    add('phone', 'targets', await checks.sizes(page));
    quiet('phone', said);
  });
  await open('noscript', url, {}, async (page, said, response) => {
    expect('noscript', response);
    add('noscript', 'width', await checks.width(page));
    add('noscript', 'noscript', checks.withoutScript(withScript, await checks.readable(page)));
    quiet('noscript', said);
  });
  // The page's content security policy forbids the script of axe-core, so the policy is off
  // for this check only.
  for (const view of ['desktop', 'phone', 'dark']) {
    await open(view, url, { bypassCSP: true }, async (page, said, response) => {
      expect(view, response);
      add(view, 'axe', await checks.axe(page, axeSource));
    });
  }
  await open('dark', url, {}, async (page, said) => quiet('dark', said));
  return { findings, title, weight };
}

// feedOrBadge checks a feed or a badge. Neither is a page, so a blank page parses the text.
async function feedOrBadge({ do: kind, url, status }) {
  const response = await fetch(url);
  const findings = [];
  if (response.status !== status) findings.push({ check: 'status', text: `${response.status}; want ${status}` });
  const text = await response.text();
  const { page } = await tab('desktop', {});
  await page.goto('about:blank');
  const texts = await { feed, badge }[kind](page, response.headers.get('content-type'), text);
  for (const text of texts) findings.push({ check: kind, text });
  return { findings, weight: Buffer.byteLength(text) };
}

async function status({ url }) {
  return { status: (await fetch(url)).status };
}

// draw makes screenshots of the whole page for desktop, phone and dark mode. It cuts a page
// that is higher than five screens, because nobody looks at more.
async function draw({ url, file }) {
  for (const view of ['desktop', 'phone', 'dark']) {
    await open(view, url, {}, async (page) => {
      const height = await page.evaluate('document.documentElement.scrollHeight');
      const { width, height: screen } = page.viewportSize();
      const clip = { x: 0, y: 0, width, height: Math.min(height, 5 * screen) };
      await page.screenshot({ path: `${file}-${view}.png`, fullPage: true, clip });
    });
  }
  return {};
}

const actions = { page: check, feed: feedOrBadge, badge: feedOrBadge, status, draw };
for await (const line of createInterface({ input: process.stdin })) {
  const ask = JSON.parse(line);
  let answer;
  try {
    answer = await actions[ask.do](ask);
  } catch (e) {
    answer = { error: e.stack };
  }
  process.stdout.write(JSON.stringify(answer) + '\n');
}
await browser.close();
