// The page works without this: it adds sorting, choosing arms, highlighting and copying.
"use strict";
(() => {
  const all = (words, within = document) => [...within.querySelectorAll(words)];
  const supported = (node) => !node.hasAttribute("data-copy") || navigator.clipboard;
  all("[data-script]").forEach((node) => { node.hidden = !supported(node); });

  // Sorting: what was not measured comes last either way; equal values keep the order of the arms.
  const body = document.getElementById("ranked");
  const rows = body ? all("tr", body) : [];
  const order = new Map(rows.map((row, at) => [row, at]));
  const value = (row, key) => {
    if (key === "number") return order.get(row);
    if (key === "seeds") return Number(row.dataset.seeds);
    const said = all("td[data-value]", row)[key].dataset.value;
    return said === "" ? null : Number(said);
  };
  const sort = (button) => {
    const head = button.closest("th");
    const way = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    all("#results thead th").forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const keyed = rows.map((row) => [row, value(row, button.dataset.sort)]);
    keyed.sort(([one, a], [two, b]) => (a === null) - (b === null) || sign * (a - b) || order.get(one) - order.get(two));
    body.append(...keyed.map(([row]) => row));
  };
  all("[data-sort]").forEach((button) => button.addEventListener("click", () => sort(button)));

  // Choosing arms: words and kinds decide for the whole page, policies for the table.
  const find = document.getElementById("find");
  const pressed = (name) => new Set(all(`button[data-${name}][aria-pressed="true"]`).map((one) => one.dataset[name]));
  const choose = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kinds = pressed("kind"), policies = pressed("policy"), arms = new Set(), shown = new Set();
    rows.forEach((row) => {
      arms.add(row.dataset.arm);
      const said = row.querySelector("th").textContent.toLowerCase();
      if (kinds.has(row.dataset.kind) && words.every((word) => said.includes(word))) shown.add(row.dataset.arm);
    });
    all("main [data-arm]").forEach((node) => node.toggleAttribute("hidden", !shown.has(node.dataset.arm)));
    rows.forEach((row) => { row.hidden = row.hidden || !(policies.has(row.dataset.policy) || row.dataset.same !== undefined); });
    document.getElementById("shown").textContent = `${shown.size} of ${arms.size} arms`;
  };
  if (find) {
    all(".filter button").forEach((button) => button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      choose();
    }));
    find.addEventListener("input", choose);
    find.form.addEventListener("submit", (event) => event.preventDefault());
    choose();
  }

  // Pointing at an arm anywhere shows it in the scatter plots.
  const point = (number) => all(".scatter").forEach((plot) => {
    plot.classList.toggle("chosen", number !== undefined);
    all(".point", plot).forEach((one) => one.classList.toggle("on", one.dataset.arm === number));
  });
  const arm = (event) => event.target.closest(".scatter [data-arm], .names [data-arm]")?.dataset.arm;
  ["pointerover", "focusin"].forEach((name) => document.addEventListener(name, (event) => point(arm(event))));

  // A link into a closed part opens it.
  const open = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  open();

  all("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "copied";
  }));

  // Paper cannot be opened: print everything, then fold again.
  let folded = [];
  addEventListener("beforeprint", () => { folded = all("details:not([open])"); folded.forEach((one) => { one.open = true; }); });
  addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
})();
