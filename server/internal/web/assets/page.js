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
  main.replaceChildren(...fresh.childNodes);
  addCopiers(main.querySelectorAll(".copy"));
  document.title = page.title;
  return Boolean(fresh.dataset.live || fresh.dataset.refresh);
}

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
