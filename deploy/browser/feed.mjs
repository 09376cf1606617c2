// The checks of the server's responses that are no pages: a feed and a badge. Chromium's
// own XML parser reads them.

// parse is code that runs in the page. It parses text into the document doc. If the text is
// no XML, it returns the first line of the parser's error as a finding.
const parse = `const doc = new DOMParser().parseFromString(text, 'application/xml');
const wrong = doc.querySelector('parsererror');
if (wrong) return ['it is no XML: ' + wrong.textContent.trim().split('\\n')[0]];`;

// feed checks an Atom feed against RFC 4287: sections 4.1.1 (feed), 4.1.2 (entry), 4.2.6 (ids),
// 4.2.7 (links) and 3.3 (dates).
export async function feed(page, type, text) {
  const found = /^application\/atom\+xml\b/.test(type) ? [] : [`its type is ${type}; want application/atom+xml`];
  return found.concat(await page.evaluate(`((text) => { ${parse}
    const ns = 'http://www.w3.org/2005/Atom', found = [];
    const root = doc.documentElement;
    if (root.localName !== 'feed' || root.namespaceURI !== ns)
      return ['its root is ' + root.nodeName + ' of ' + root.namespaceURI];
    const children = (e, name) => [...e.children].filter((c) => c.namespaceURI === ns && c.localName === name);
    const date = /^\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d(\\.\\d+)?(Z|[+-]\\d\\d:\\d\\d)$/;
    const absolute = (s) => /^[a-z][a-z0-9+.-]*:./i.test(s);
    const ids = new Set();
    const check = (e, where) => {
      for (const name of ['id', 'title', 'updated']) {
        const all = children(e, name);
        if (all.length !== 1 || !all[0].textContent.trim())
          found.push(where + ' has ' + all.length + ' of ' + name + '; want one with text');
      }
      const id = children(e, 'id')[0]?.textContent ?? '';
      if (!absolute(id)) found.push(where + ': id "' + id + '" is no absolute IRI');
      if (ids.has(id)) found.push(where + ': id ' + id + ' is there twice');
      ids.add(id);
      for (const name of ['updated', 'published']) for (const d of children(e, name))
        if (!date.test(d.textContent))
          found.push(where + ': ' + name + ' ' + d.textContent + ' is no date of RFC 3339');
      for (const l of children(e, 'link')) if (!l.getAttribute('href')) found.push(where + ' has a link without href');
    };
    check(root, 'the feed');
    const rel = (e) => children(e, 'link').map((l) => l.getAttribute('rel') ?? 'alternate');
    if (!rel(root).includes('self')) found.push('the feed has no link rel=self');
    const author = children(root, 'author').length > 0;
    for (const [i, e] of children(root, 'entry').entries()) {
      check(e, 'entry ' + i);
      if (!author && !children(e, 'author').length) found.push('entry ' + i + ' has no author, and the feed neither');
      if (!rel(e).includes('alternate') && !children(e, 'content').length)
        found.push('entry ' + i + ' has neither content nor a link rel=alternate');
    }
    for (const a of doc.getElementsByTagNameNS(ns, 'author'))
      if (children(a, 'name').length !== 1) found.push('an author has no name');
    return found.slice(0, 10);
  })(${JSON.stringify(text)})`));
}

// badge checks that a page can show an SVG image: the image has a media type, a title and a
// size, consists of shapes and text only, and Chromium can draw it.
export async function badge(page, type, text) {
  const found = /^image\/svg\+xml\b/.test(type) ? [] : [`its type is ${type}; want image/svg+xml`];
  return found.concat(await page.evaluate(`(async (text) => { ${parse}
    const root = doc.documentElement, found = [];
    if (root.localName !== 'svg' || root.namespaceURI !== 'http://www.w3.org/2000/svg')
      return ['its root is ' + root.nodeName];
    const title = [...root.children].find((c) => c.localName === 'title')?.textContent.trim();
    if (!title && !root.getAttribute('aria-label')) found.push('it has no title for readers who cannot see it');
    if (doc.querySelector('script, foreignObject, image, [href^=http]')) found.push('it has more than shapes and text');
    const image = new Image();
    image.src = URL.createObjectURL(new Blob([text], { type: 'image/svg+xml' }));
    try { await image.decode(); } catch (e) { return [...found, 'it is not drawn: ' + e.message]; }
    if (!(image.naturalWidth > 0 && image.naturalHeight > 0)) found.push('it has no size');
    return found;
  })(${JSON.stringify(text)})`));
}
