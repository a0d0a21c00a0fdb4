// Pictures of a report: lays label, prediction, errors and confidence over them, and sorts them. Without this
// script, the page shows label and prediction next to each picture. tools/report_page.py writes the page.
"use strict";

(() => {
  const LAYERS = { label: "Label", prediction: "Prediction", errors: "Errors", confidence: "Confidence" };
  const MEANINGS = {
    errors: "Red: the prediction differs from the label.",
    confidence: "Brighter: the predicted class has a higher probability.",
  };
  const score = (article) => Number(article.dataset.score);
  const ORDERS = {
    "Best and worst": null,
    "Score, highest first": (first, second) => score(second) - score(first),
    "Score, lowest first": (first, second) => score(first) - score(second),
    Name: (first, second) => (first.dataset.name < second.dataset.name ? -1 : 1),
  };

  // Lay the layers of a picture over its first figure; return them by name.
  function stacked(article) {
    const [picture, label, prediction] = article.querySelectorAll("figure img");
    const sources = {
      label: label.src,
      prediction: prediction.src,
      ...JSON.parse(article.querySelector("script").textContent),
    };
    const stack = document.createElement("div");
    stack.className = "stack";
    picture.replaceWith(stack);
    stack.append(picture);
    const layers = {};
    for (const name of Object.keys(LAYERS)) {
      if (!(name in sources)) continue;
      const layer = (layers[name] = document.createElement("img"));
      Object.assign(layer, { src: sources[name], alt: LAYERS[name], hidden: true });
      layer.className = name;
      stack.append(layer);
    }
    return layers;
  }

  function labeled(text, control) {
    const label = document.createElement("label");
    label.append(text, control);
    return label;
  }

  function controls(root) {
    const original = [...root.children];
    const articles = original.filter((each) => each.matches("article"));
    const stacks = articles.map(stacked);

    const meaning = document.createElement("p");
    meaning.setAttribute("aria-live", "polite");
    const group = document.createElement("div");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Layers over the pictures");
    for (const [name, text] of Object.entries(LAYERS)) {
      if (!stacks.every((layers) => name in layers)) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        for (const layers of stacks) layers[name].hidden = !on;
        const shown = Object.keys(MEANINGS).filter((each) => stacks[0][each] && !stacks[0][each].hidden);
        meaning.textContent = shown.map((each) => MEANINGS[each]).join(" ");
      });
      group.append(button);
    }

    const opacity = document.createElement("input");
    Object.assign(opacity, { type: "range", min: "0", max: "100", value: "60" });
    const fade = () => {
      for (const layers of stacks) {
        for (const layer of Object.values(layers)) layer.style.opacity = opacity.value / 100;
      }
    };
    opacity.addEventListener("input", fade);
    fade();

    const order = document.createElement("select");
    for (const text of Object.keys(ORDERS)) order.append(new Option(text));
    order.addEventListener("change", () => {
      const compare = ORDERS[order.value];
      for (const each of original) if (each.matches("h3")) each.hidden = compare !== null;
      root.append(...(compare ? [...articles].sort(compare) : original));
    });

    const all = document.createElement("div");
    all.className = "layers";
    const title = document.createElement("div");
    title.append("Over the pictures", group);
    all.append(title, labeled("Opacity", opacity), labeled("Order", order), meaning);
    root.before(all);
  }

  for (const root of document.querySelectorAll(".pictures")) controls(root);
})();
