// The checks of one page. Each check returns a list of texts, one for each finding. The
// test in Go decides what a finding means. Code inside page.evaluate runs in the page.

// targets is a selector for the elements that a user can press with a finger or a
// key.
const targets = 'a[href], button, input:not([type=hidden]), select, textarea, summary, [role=button], [role=link]';

// place returns a name of an element for people. The function shown returns true if a
// user can see and use an element. The function hits returns true if a finger at the
// point (x, y) hits an element.
const place = `window.place = (e) => {
  const name = e.id ? '#' + e.id : [...e.classList].map((c) => '.' + c).join('');
  const text = (e.innerText || e.value || e.ariaLabel || '').trim().replace(/\\s+/g, ' ');
  return e.localName + name + ' "' + text.slice(0, 40) + '"';
};
window.shown = (e) =>
  e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !e.disabled && !e.closest('[inert]');
window.hits = (e, x, y) => {
  const at = document.elementFromPoint(x, y);
  return at && (e.contains(at) || at.closest('label')?.control === e);
};`;

// maxTexts is the highest number of texts that a check returns. If a check finds
// more, limit() replaces the rest by their number.
const maxTexts = 5;

function limit(all) {
  return all.length > maxTexts ? [...all.slice(0, maxTexts), `and ${all.length - maxTexts} more like these`] : all;
}

// width finds what makes the document wider than the screen.
export async function width(page) {
  const screen = page.viewportSize().width;
  const wide = await page.evaluate(`${place} (() => {
    const most = ${screen};
    if (document.documentElement.scrollWidth <= most) return [];
    // An element in a box that scrolls or clips its content does not widen the document.
    const boxed = (e) => {
      for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
        if (getComputedStyle(p).overflowX !== 'visible') return true;
      return false;
    };
    const guilty = [...document.body.querySelectorAll('*')].filter((e) =>
      e.getBoundingClientRect().right > most + 0.5 && !boxed(e));
    return ['the document is ' + document.documentElement.scrollWidth + ' px wide', ...guilty.map(place)];
  })()`);
  return limit(wide);
}

// sizes finds targets that are too small for a finger: less than 44 × 44 CSS px (WCAG
// 2.5.5). Links in a sentence may be smaller, as in WCAG 2.5.8. If a pseudo-element makes
// a target larger, sizes measures the larger area.
export async function sizes(page) {
  return limit(await page.evaluate(`${place} (() => {
    const least = 44, slack = 0.5;
    const block = (e) => {
      while (e && getComputedStyle(e).display.startsWith('inline')) e = e.parentElement;
      return e;
    };
    const inSentence = (e) => {
      if (e.localName !== 'a' || getComputedStyle(e).display !== 'inline') return false;
      const walk = document.createTreeWalker(block(e), NodeFilter.SHOW_TEXT);
      let text = '';
      while (walk.nextNode()) {
        const in_ = walk.currentNode.parentElement;
        if (!in_.closest(${JSON.stringify(targets)}) && block(in_) === block(e)) text += walk.currentNode.data;
      }
      return (text.match(/[\\p{L}\\p{N}]{2,}/gu) || []).length >= 2; // two words; separators of a list are no words
    };
    const found = [];
    for (const e of document.querySelectorAll(${JSON.stringify(targets)})) {
      if (!shown(e) || inSentence(e)) continue;
      e.scrollIntoView({ block: 'center', inline: 'center', behavior: 'instant' });
      let box = e.getBoundingClientRect();
      if (box.right <= 0 || box.bottom <= 0) continue; // the element is outside of the screen until it has the focus
      const label = e.labels?.[0]?.getBoundingClientRect();
      const ticked = e.matches('[type=checkbox], [type=radio]');
      if (ticked && label && label.width * label.height > box.width * box.height) box = label;
      if (box.width >= least - slack && box.height >= least - slack) continue;
      const x = box.left + box.width / 2, y = box.top + box.height / 2, r = least / 2 - 1;
      if ([[x - r, y], [x + r, y], [x, y - r], [x, y + r]].every(([x, y]) => hits(e, x, y))) continue;
      found.push(place(e) + ' is ' + Math.round(box.width) + ' × ' + Math.round(box.height) + ' px');
    }
    scrollTo(0, 0);
    return found;
  })()`));
}

// keyboard presses Tab until it has gone through the whole page. It finds usable elements
// that Tab does not reach, that are hidden while they have the focus, or that look the
// same with the focus as without it.
export async function keyboard(page) {
  const want = await page.evaluate(`${place} (() => {
    scrollTo(0, 0);
    const radios = [...document.querySelectorAll('input[type=radio]')];
    const usable = [...document.querySelectorAll(${JSON.stringify(targets)} + ', [tabindex]')].filter((e) => {
      if (!shown(e) || e.tabIndex < 0) return false;
      if (e.type !== 'radio' || !e.name) return true;
      const group = radios.filter((r) => r.name === e.name && r.form === e.form);
      return e === (group.find((r) => r.checked) || group[0]); // Tab stops once for all radio buttons of a group
    });
    const looks = (e) => {
      const s = getComputedStyle(e), ring = s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1;
      return [ring && s.outlineWidth + s.outlineColor, s.boxShadow, s.borderColor, s.backgroundColor].join('|');
    };
    window.keyboard = { looks, left: new Map(usable.map((e) => [e, looks(e)])), first: null, found: [] };
    return usable.length;
  })()`);
  for (let i = 0; i < want + 50; i++) {
    await page.keyboard.press('Tab');
    const over = await page.evaluate(`(() => {
      const k = window.keyboard, e = document.activeElement;
      if (!e || e === document.body || e === k.first) return true;
      k.first ??= e;
      const before = k.left.get(e);
      if (before === undefined) return false; // not in the list: a box that takes the focus only to be scrolled
      k.left.delete(e);
      if (before === k.looks(e)) k.found.push(place(e) + ' looks the same with the focus');
      const b = e.getBoundingClientRect();
      const left = Math.max(b.left, 0), right = Math.min(b.right, innerWidth);
      const top = Math.max(b.top, 0), bottom = Math.min(b.bottom, innerHeight);
      const seen = right > left && bottom > top && [[.5, .5], [.1, .2], [.9, .2], [.1, .8], [.9, .8]].some(([x, y]) =>
        hits(e, left + (right - left) * x, top + (bottom - top) * y));
      if (!seen) k.found.push(place(e) + ' has the focus and cannot be seen');
      return false;
    })()`);
    if (over) break;
  }
  return limit(await page.evaluate(`(() => [...window.keyboard.found,
    ...[...window.keyboard.left.keys()].map((e) => place(e) + ' is not reached by Tab')])()`));
}

// sticky scrolls a table by half of its height, and checks that the table's head is still
// on the screen. If there is no such table, or if the table is too short to scroll, sticky
// can check nothing. If must is true, sticky then returns a finding that says so.
export async function sticky(page, head, must) {
  const { width, height } = page.viewportSize();
  await page.setViewportSize({ width, height: 500 });
  const found = await page.evaluate(`${place} (() => {
    const head = document.querySelector(${JSON.stringify(head)});
    if (!head) return ${must} ? ['there is no ' + ${JSON.stringify(head)}] : [];
    const table = head.closest('table');
    if (table.offsetHeight < innerHeight * 1.2)
      return ${must} ? ['the table is too short to scroll: nothing was checked'] : [];
    for (let p = table.parentElement; p && p !== document.body; p = p.parentElement)
      if (p.scrollHeight > p.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(p).overflowY))
        p.scrollTop = (p.scrollHeight - p.clientHeight) / 2;
    const t = table.getBoundingClientRect();
    scrollBy({ top: t.top + t.height / 2, behavior: 'instant' });
    const b = head.getBoundingClientRect();
    const at = document.elementFromPoint(Math.max(b.left, 0) + 8, b.top + b.height / 2);
    const ok = b.top >= -1 && b.bottom <= innerHeight && head.closest('thead').contains(at);
    return ok ? [] : ['scrolled by half a table, ' + place(head) + ' is at ' + Math.round(b.top) + ' px'];
  })()`);
  await page.setViewportSize({ width, height });
  return found;
}

// axe runs axe-core, and returns the violations that axe-core calls serious or critical.
// Minor and moderate ones are left to the judgement of people.
export async function axe(page, source) {
  await page.addScriptTag({ content: source });
  const bad = await page.evaluate(async () => {
    const result = await window.axe.run(document, { resultTypes: ['violations'] });
    return result.violations.filter((v) => v.impact === 'serious' || v.impact === 'critical').map((v) =>
      `${v.id} (${v.impact}): ${v.help}: ${v.nodes.length} times, such as ${v.nodes[0].target.join(' ')}: ` +
      v.nodes[0].failureSummary.replace(/\s+/g, ' '));
  });
  return limit(bad);
}

// readable returns the numbers of the headings, rows and links that a reader sees.
// withoutScript compares these numbers with and without JavaScript. The field dead has the
// buttons that the reader sees and that are in no form: these do nothing without
// JavaScript.
export async function readable(page) {
  return page.evaluate(`${place} (() => {
    const all = (s) => [...document.querySelectorAll(s)].filter(shown).length;
    return { heading: all('main h1'), rows: all('main tr'), links: all('main a[href]'),
      dead: [...document.querySelectorAll('button')].filter((b) => shown(b) && !b.form).map(place) };
  })()`);
}

// withoutScript compares two results of readable for one page. The argument withIt is the
// result with JavaScript, and the argument without is the result without JavaScript. Without
// JavaScript, the page must show no fewer rows and links.
export function withoutScript(withIt, without) {
  const found = without.dead.map((b) => `${b} does nothing without JavaScript; hide it`);
  if (without.heading !== 1) found.push(`${without.heading} headings h1 are shown; want one`);
  for (const what of ['rows', 'links']) {
    if (without[what] < withIt[what])
      found.push(`${without[what]} ${what} are shown; with JavaScript it is ${withIt[what]}`);
  }
  return limit(found);
}
