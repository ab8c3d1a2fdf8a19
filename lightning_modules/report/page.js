"use strict";
const form = document.querySelector("form"), main = document.querySelector("main");
const cards = [...main.querySelectorAll("article")];
const panelsOf = card => [...card.querySelectorAll("section")];
const shown = card => panelsOf(card).filter(panel => !panel.hidden);

function mean(card, judge) {
  const values = shown(card).map(panel => JSON.parse(panel.dataset.scores)[judge]).filter(Number.isFinite);
  return values.length ? values.reduce((a, b) => a + b) / values.length : NaN;
}

function update() {
  const {task, strategy, verdict, sort, boxes} = form.elements;
  document.body.classList.toggle("no-boxes", !boxes.checked);
  for (const card of cards) {
    const verdicts = new Set(panelsOf(card).map(panel => panel.dataset.verdict));
    for (const panel of panelsOf(card)) {
      const right = !verdict.value || (verdict.value === "differ" ? verdicts.size > 1 : panel.dataset.verdict === verdict.value);
      panel.hidden = !right || strategy.value && panel.dataset.strategy !== strategy.value;
    }
    card.hidden = task.value && card.dataset.task !== task.value || !shown(card).length;
  }
  const sign = sort.value.startsWith("-") ? -1 : 1, judge = sort.value.replace(/^-/, "");
  const key = new Map(cards.map(card => [card, judge ? sign * mean(card, judge) : Number(card.dataset.index)]));
  const rank = card => Number.isNaN(key.get(card)) ? Infinity : key.get(card);
  cards.sort((a, b) => rank(a) === rank(b) ? a.dataset.index - b.dataset.index : rank(a) - rank(b));
  main.append(...cards);
  const visible = cards.filter(card => !card.hidden), images = visible.reduce((sum, card) => sum + shown(card).length, 0);
  form.querySelector("output").value = `${visible.length} of ${cards.length} prompts, ${images} images`;
}

function toggle(card, open) {
  for (const details of card.querySelectorAll("details")) details.open = open;
}

form.addEventListener("input", update);
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(update));
form.elements.open.addEventListener("click", ({target}) => {
  const open = target.textContent === "open all";
  for (const card of cards) toggle(card, open);
  target.textContent = open ? "close all" : "open all";
});
main.addEventListener("click", event => { // one image opens those of all strategies, side by side
  const at = event.target.closest(".image, summary");
  if (!at) return;
  event.preventDefault();
  const panel = at.closest("section"), row = panel.parentElement;
  toggle(row, !panel.querySelector("details").open);
  row.scrollLeft = panel.offsetLeft - row.offsetLeft; // the one that was clicked comes first, and nothing jumps
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, input")) return;
  const visible = cards.filter(card => !card.hidden), here = visible.indexOf(document.activeElement?.closest("article"));
  if (event.key === "j" || event.key === "k") {
    const next = visible[Math.min(Math.max(here + (event.key === "j" ? 1 : -1), 0), visible.length - 1)];
    next?.focus();
    next?.scrollIntoView({block: "start"});
  }
  if (event.key === "o" && here >= 0) toggle(visible[here], !visible[here].querySelector("details").open);
});
update();
