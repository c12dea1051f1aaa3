// Which view is shown, and in which light.

function lights() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const buttons = [byId("theme"), byId("theme-too")];
  let chosen = null;
  try {
    chosen = localStorage.getItem("entra-theme");
  } catch {
    // A page from a file may have no storage: then the choice lasts as long as the page.
  }
  const dark = () => (chosen ? chosen === "dark" : system.matches);
  const apply = () => {
    root.dataset.theme = dark() ? "dark" : "light";
    for (const button of buttons) button.textContent = dark() ? "Light" : "Dark";
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      chosen = dark() ? "light" : "dark";
      try {
        localStorage.setItem("entra-theme", chosen);
      } catch {
        // See above.
      }
      apply();
    });
    button.setAttribute("aria-label", "Change between light and dark");
  }
  system.addEventListener("change", apply);
  apply();
}

function views() {
  const list = overview((index) => (location.hash = address(index)));
  let scrolled = 0, last = null, shown = null;
  const show = async () => {
    const { first, second, token } = place();
    shown = null;
    if (first === null) {
      viewing++;
      byId("trace").hidden = true;
      byId("overview").hidden = false;
      document.body.classList.remove("inside");
      if (last !== null) {
        scrollTo(0, scrolled);
        list.comeBack(last);
      }
      last = null;
      return;
    }
    if (last === null) scrolled = scrollY;
    last = first;
    const drawn = await view(first, second, list);
    if (!drawn) return;
    shown = drawn;
    byId("overview").hidden = true;
    byId("trace").hidden = false;
    document.body.classList.add("inside");
    scrollTo(0, 0);
    if (token > 0 && drawn.focus) drawn.focus(token - 1);
    else byId("panes").querySelector("h2").focus({ preventScroll: true });
  };
  addEventListener("hashchange", show);
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    const target = place().first === null ? byId("list") : byId("panes").querySelector("h2");
    target.focus();
    target.scrollIntoView();
  });
  byId("versus").addEventListener("change", (event) => {
    location.hash = address(place().first, event.target.value === "" ? null : Number(event.target.value));
  });
  // Arrow keys work as soon as a trace is opened, when its heading has the focus, or nothing has.
  addEventListener("keydown", (event) => {
    if (!shown?.focus || !event.key.startsWith("Arrow") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target !== document.body && event.target.tagName !== "H2") return;
    shown.focus();
    event.preventDefault();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
    const { first, second } = place();
    if (first !== null) location.hash = second === null ? "" : address(first);
  });
  show();
}

lights();
views();
