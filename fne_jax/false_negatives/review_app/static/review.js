// What a review does in the browser: verdicts by key and by button, moving about, taking back.
// A page of the review is asked of the server as it is; only its <main> is put in place, so that
// the live region stays and a screen reader is told of what changed.

const status = document.getElementById("status");
const NAMES = { match: "match", no_match: "no match", unsure: "unsure" };
const MARKS = { match: "✓", no_match: "✗", unsure: "?" };
const WORDS = { y: "match", n: "no_match", u: "unsure" };
// Where a browser keeps nothing, letters are off or on until the page is left.
const KEYS_OFF = "keys-off";
let keysOff;
try {
  keysOff = localStorage.getItem(KEYS_OFF) === "yes";
} catch {}

// What is asked of the server goes one after the other, in the order in which it was asked for.
let line = Promise.resolve();
// Verdicts that are shown and on their way, in that order: the next pair is there at once, so that a
// quick key is for what it shows.
let unsaved = [];
let loading = false;
// How often saving has failed; what was asked for before that is not done any more.
let failures = 0;
// The pages of the groups that come next, by their addresses; and of so many pairs they are.
const ahead = new Map();
const AHEAD = 20;
let prefetching;
// How far the server says that one has come.
let latest;
let fading;

const main = () => document.getElementById("main");
const pairs = () => [...document.querySelectorAll("article.pair")];
const current = () => document.querySelector("article.pair.current");
const keyOf = (pair) => `${pair.dataset.caption}-${pair.dataset.image}`;

function inLine(task) {
  const before = failures;
  line = line.then(() => before === failures && task()).catch((error) => tell(error.message, true));
}

function tell(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
  // What was said is not to cover the page for long; what failed stays until something succeeds.
  clearTimeout(fading);
  if (!failed) fading = setTimeout(() => (status.textContent = ""), 4000);
}

function select(pair, focus = false) {
  for (const other of pairs()) {
    other.classList.toggle("current", other === pair);
    const button = document.querySelector(`[data-goto="${keyOf(other)}"]`);
    if (other === pair) button?.setAttribute("aria-current", "true");
    else button?.removeAttribute("aria-current");
    if (other === pair) button?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  const place = document.getElementById("place");
  if (place && pairs().length > 1) {
    place.textContent = ` · pair ${pairs().indexOf(pair) + 1} of ${pairs().length}`;
  }
  if (focus) pair.querySelector("h2").focus({ preventScroll: true });
}

function start(last = false, focus = false) {
  const all = pairs();
  const keys = document.getElementById("keys");
  if (keys) keys.checked = !keysOff;
  if (!all.length) return;
  const wanted = all.find((pair) => keyOf(pair) === main().dataset.wanted);
  const open = all.find((pair) => !pair.dataset.verdict);
  select(wanted ?? (last ? all.at(-1) : open) ?? all[0], focus);
  prefetch();
}

// The groups that come next are in the browser before they are asked for, and after them all images.
async function prefetch() {
  const mine = (prefetching = {});
  const images = [];
  let url = followingOf(document);
  try {
    for (let count = 0; url && count < AHEAD; url = followingOf(ahead.get(url).page)) {
      const group = ahead.get(url) ?? {};
      group.reading ??= read(url).then((page) => Object.assign(group, { page, images: imagesOf(page) }));
      ahead.set(url, group);
      if (!group.page) await group.reading;
      if (mine !== prefetching) return;
      count += group.page.querySelectorAll("article").length;
      images.push(group.images);
    }
  } catch {
    // Nothing is lost: what is asked for next tells that the server is gone.
    ahead.delete(url);
  }
  for (const left of images) {
    while (left.length && mine === prefetching) await load(left.shift());
  }
}

const followingOf = (page) => page.getElementById("following")?.href;
const imagesOf = (page) => [...page.querySelectorAll("article img")].map((image) => image.getAttribute("src"));

function load(src) {
  return new Promise((done) => {
    Object.assign(new Image(), { fetchPriority: "low", onload: done, onerror: done, src });
  });
}

async function read(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(await answer.text());
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

function put(next, title, url, { push = true, last = false } = {}) {
  main().replaceWith(next);
  document.title = title;
  if (push) history.pushState(null, "", url);
  window.scrollTo(0, 0);
  start(last, true);
}

async function visit(url, options) {
  loading = true;
  try {
    // What was read before may have changed since.
    ahead.clear();
    prefetching = undefined;
    const page = await read(url);
    latest = undefined;
    put(document.adoptNode(page.getElementById("main")), page.title, url, options);
  } catch (error) {
    throw new Error(gone(error));
  } finally {
    loading = false;
  }
}

// After what is on its way: the page tells of it.
function reload(url, options) {
  loading = true;
  inLine(() => visit(url, options));
}

function follow(link) {
  const page = ahead.get(link.href)?.page;
  if (!page) {
    reload(link.href);
    return;
  }
  ahead.delete(link.href);
  const next = document.adoptNode(page.getElementById("main"));
  if (main().dataset.show === "unjudged" && pairs().every((pair) => pair.dataset.verdict)) {
    // What has just been judged is not among these any more: before them is what was before it.
    const before = main().querySelector(".groups").firstElementChild.cloneNode(true);
    next.querySelector("#previous")?.replaceWith(before);
  }
  put(next, page.title, link.href);
  if (latest) progress(latest);
}

const gone = (error) =>
  error instanceof TypeError ? "The server does not answer. Start it again, then go on here." : error.message;

async function send(path, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ data: main().dataset.data, ...body }),
    });
  } catch (error) {
    throw new Error(`NOT saved. ${gone(error)}`);
  }
  if (!answer.ok) throw new Error(`NOT saved. ${await answer.text()}`);
  return answer.json();
}

function show(pair, verdict) {
  pair.dataset.verdict = verdict;
  for (const button of pair.querySelectorAll(".verdicts button")) {
    button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
  }
  const mark = pair.closest("main").querySelector(`[data-goto="${keyOf(pair)}"] .mark`);
  if (!mark) return;
  mark.dataset.verdict = verdict;
  mark.replaceChildren();
  if (!verdict) return;
  const seen = document.createElement("span");
  seen.setAttribute("aria-hidden", "true");
  seen.textContent = MARKS[verdict];
  const said = document.createElement("span");
  said.className = "unseen";
  said.textContent = NAMES[verdict];
  mark.append(seen, said);
}

function progress(answer) {
  const { counts, judged, total } = answer;
  latest = answer;
  document.getElementById("progress").value = judged;
  document.getElementById("judged").textContent = judged.toLocaleString("en");
  for (const [name, count] of Object.entries(counts)) {
    const place = document.querySelector(`[data-count="${name}"]`);
    if (place) place.textContent = count.toLocaleString("en");
  }
  return `${judged} of ${total} judged`;
}

function judge(pair, verdict) {
  const one = { pair, before: pair.dataset.verdict, page: main(), title: document.title, url: location.href };
  unsaved.push(one);
  show(pair, verdict);
  const body = { caption: Number(pair.dataset.caption), image: Number(pair.dataset.image), verdict };
  inLine(async () => {
    const answer = await send("/verdict", body).catch((error) => {
      giveUp();
      throw error;
    });
    unsaved.shift();
    tell(`Saved: ${NAMES[verdict]}. ${progress(answer)}.`);
  });
  if (pair === current()) move(1);
}

// Shows again what the server has, and the first pair whose verdict it has not.
function giveUp() {
  const [first] = unsaved;
  for (const { pair, before } of unsaved.reverse()) show(pair, before);
  unsaved = [];
  failures += 1;
  loading = false;
  if (main() !== first.page) put(first.page, first.title, first.url);
  select(first.pair, true);
}

// A verdict after it is for the pair that is taken back, once that is shown.
function takeBack() {
  loading = true;
  inLine(() => undo().finally(() => (loading = false)));
}

async function undo() {
  loading = true; // again, where another one has just ended
  const { dataset } = main();
  const answer = await send("/undo", { by: dataset.by, show: dataset.show });
  const said = progress(answer);
  const { undone } = answer;
  if (!undone) {
    tell("There is nothing to take back.");
    return;
  }
  const pair = document.getElementById(`pair-${undone.caption}-${undone.image}`);
  if (pair) {
    show(pair, undone.now);
    select(pair, true);
  } else if (undone.link) {
    await visit(undone.link);
  }
  tell(`Taken back: ${NAMES[undone.verdict]}, “${undone.text}”. ${said}.`);
}

function move(step, groups = false) {
  const all = pairs();
  const next = groups ? undefined : all[all.indexOf(current()) + step];
  if (next) {
    select(next, true);
    return;
  }
  const link = document.getElementById(step > 0 ? "following" : "previous");
  if (link && step > 0) follow(link);
  else if (link) reload(link.href, { last: !groups });
  else if (step > 0 && main().dataset.show === "unjudged" && all.every((pair) => pair.dataset.verdict)) {
    reload(location.pathname + location.search);
  } else tell(step > 0 ? "This is the last one." : "This is the first one.");
}

function enlarge(button) {
  const dialog = document.getElementById("enlarged");
  const large = dialog.querySelector("img");
  large.src = button.dataset.large;
  large.alt = button.querySelector("img").alt;
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  const link = event.target.closest("#main .tools a, #main .groups a, #main .nothing a");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    reload(link.href);
  } else if (button?.classList.contains("zoom")) {
    enlarge(button);
  } else if (button?.dataset.goto) {
    select(document.getElementById(`pair-${button.dataset.goto}`));
  } else if (button?.closest(".verdicts")) {
    judge(button.closest("article"), button.dataset.verdict);
  } else if (button?.id === "undo") {
    takeBack();
  }
});

document.addEventListener("change", (event) => {
  if (event.target.id !== "keys") return;
  keysOff = !event.target.checked;
  try {
    localStorage.setItem(KEYS_OFF, keysOff ? "yes" : "");
  } catch {}
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input:not([type=checkbox]), textarea, select, [contenteditable]");
  const other = event.ctrlKey || event.metaKey || event.altKey || event.isComposing;
  const open = document.getElementById("enlarged").open;
  if (typing || other || open || keysOff || !document.getElementById("progress")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const pair = current();
  if (WORDS[key] && pair && !event.shiftKey) {
    // A key that is held down, or that comes while another pair is on its way, judges nothing.
    if (loading) tell("Nothing judged: another pair is on its way.");
    else if (!event.repeat) judge(pair, WORDS[key]);
  } else if (key === "z" && !event.shiftKey) {
    if (!event.repeat) takeBack();
  } else if ((key === "ArrowRight" || key === "ArrowLeft") && pair) {
    event.preventDefault();
    const step = key === "ArrowRight" ? 1 : -1;
    if (!loading) move(step, event.shiftKey);
  }
});

window.addEventListener("popstate", () => {
  if (location.pathname === "/review" && document.getElementById("progress")) {
    reload(location.href, { push: false });
  }
});

// Nobody leaves before what they see is saved.
window.addEventListener("beforeunload", (event) => {
  if (unsaved.length) event.preventDefault();
});

start();
