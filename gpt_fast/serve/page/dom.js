/** element("button", {type: "button", onclick: f, "aria-label": "Copy"}, "Copy"): a node; text stays text. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** A button that shows and hides what it controls. Returns a function that does so, too. */
export function toggles(button, shown, show) {
  const set = (value) => {
    show(value);
    button.setAttribute("aria-expanded", String(value));
  };
  button.addEventListener("click", () => set(!shown()));
  return set;
}
