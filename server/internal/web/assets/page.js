// Pages are whole without this script. It adds buttons that copy, and keeps a page that
// changes up to date.
"use strict";

// addCopiers adds a button to each text that people copy.
function addCopiers(texts) {
  if (!navigator.clipboard) return; // without TLS, browsers keep it to themselves
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

// renew takes the page's content anew, unless something in it has the focus.
// It tells whether the page may still change.
async function renew() {
  const answer = await fetch(location.href, {headers: {Accept: "text/html"}});
  if (!answer.ok) return true;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("main");
  if (!fresh || main.contains(document.activeElement) && document.activeElement !== main) return true;
  const log = document.getElementById("log");
  const place = fresh.querySelector("#log");
  if (log && place) place.replaceWith(log); // it goes on by itself
  main.replaceChildren(...fresh.childNodes);
  if (!log && place) follow(place);
  addCopiers(main.querySelectorAll(".copy"));
  document.title = page.title;
  return Boolean(fresh.dataset.live || fresh.dataset.refresh);
}

// follow shows a log as it grows, for as long as the page has it.
async function follow(log) {
  let at = 0;
  const text = new TextDecoder();
  while (log.isConnected) {
    // A range that begins with what is there already is never empty.
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
    if (answer && answer.status === 416) at = 0; // another try began, with a log of its own
    await new Promise(resolve => setTimeout(resolve, 3000));
  }
}
const log = document.getElementById("log");
if (log) follow(log);

if (main.dataset.live) {
  const events = new EventSource(main.dataset.live);
  let first = true;
  events.addEventListener("build", async () => {
    if (first) { first = false; return; } // what the page shows already
    if (!await renew()) events.close();
  });
} else if (main.dataset.refresh) {
  setInterval(renew, 1000 * main.dataset.refresh);
}
