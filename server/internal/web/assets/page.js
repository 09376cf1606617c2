// Each page is complete without this script. The script adds buttons that copy a text,
// and keeps a page up to date while the catalogue changes.
"use strict";

// addCopiers adds a button to each text that people copy.
function addCopiers(texts) {
  if (!navigator.clipboard) return; // browsers give pages without TLS no clipboard
  for (const text of texts) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copier";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    text.after(button);
  }
}
addCopiers(document.querySelectorAll(".copy"));

const main = document.getElementById("main");

// renew loads the page's content again, unless an element in it has the focus.
// It returns whether the page may still change.
async function renew() {
  const answer = await fetch(location.href, {headers: {Accept: "text/html"}});
  if (!answer.ok) return true;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("main");
  if (!fresh || main.contains(document.activeElement) && document.activeElement !== main) return true;
  const log = document.getElementById("log");
  const place = fresh.querySelector("#log");
  if (log && place) place.replaceWith(log); // follow already updates this log
  main.replaceChildren(...fresh.childNodes);
  if (!log && place) follow(place);
  addCopiers(main.querySelectorAll(".copy"));
  document.title = page.title;
  return Boolean(fresh.dataset.live || fresh.dataset.refresh);
}

// follow shows a log as it grows, until the page no longer contains the log.
async function follow(log) {
  let at = 0;
  const text = new TextDecoder();
  while (log.isConnected) {
    // The range begins with the last byte that the page has, so it is never empty.
    const range = `bytes=${Math.max(0, at - 1)}-`;
    const answer = await fetch(log.dataset.log, {headers: {Range: range}}).catch(() => null);
    if (answer && answer.status === 206) {
      const bytes = new Uint8Array(await answer.arrayBuffer()).subarray(at > 0 ? 1 : 0);
      const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
      if (at === 0) log.textContent = "";
      log.append(text.decode(bytes, {stream: true}));
      at += bytes.length;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    if (answer && answer.status === 416) at = 0; // a new attempt has begun, with a log of its own
    await new Promise(resolve => setTimeout(resolve, 3000));
  }
}
const log = document.getElementById("log");
if (log) follow(log);

if (main.dataset.live) {
  const events = new EventSource(main.dataset.live);
  let first = true;
  events.addEventListener("build", async () => {
    if (first) { first = false; return; } // the page shows this state already
    if (!await renew()) events.close();
  });
} else if (main.dataset.refresh) {
  setInterval(renew, 1000 * main.dataset.refresh);
}
