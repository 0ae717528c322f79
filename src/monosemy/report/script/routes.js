// Which page an address shows.

async function route() {
  hush();
  const hash = location.hash.slice(1) || "/",
    [, path, number] = hash.match(/^\/sae\/(.+?)(?:\/latent\/(\d+))?$/) ?? [],
    pages = { overview: byId("overview"), view: byId("view"), about: byId("about") };
  const show = (name) =>
    Object.entries(pages).forEach(([key, page]) => {
      page.hidden = key !== name;
    });
  const trail = [link(home(), "Overview")];
  latentPage.beside = null;
  if (hash === "/about") show("about");
  else if (path) {
    const name = path.split("/").map(decodeURIComponent).join("/"),
      sae = DATA.saes.find((s) => s.path === name);
    show("view");
    if (!sae)
      pages.view.replaceChildren(
        make("h1", {}, "No such SAE"),
        make("p", { class: "banner" }, `This report has no SAE ${name}.`),
      );
    else {
      trail.push(" › ", link(address(sae), `${sae.architecture}, ${sae.site}`));
      if (number != null) trail.push(" › ", make("span", {}, `latent ${number}`));
      try {
        await (number == null ? saePage(pages.view, sae) : latentPage(pages.view, sae, Number(number)));
      } catch (error) {
        pages.view.append(
          make(
            "p",
            { class: "banner" },
            `The data of this SAE cannot be read (${error.message}). The file may be cut.`,
          ),
        );
      }
    }
    scrollTo(0, 0);
  } else show("overview");
  byId("trail").replaceChildren(...trail);
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") hush();
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey)
    return;
  if (event.key === "/" && byId("search")) {
    byId("search").focus();
    event.preventDefault();
  }
  const to = latentPage.beside?.["[]".indexOf(event.key)];
  if (to) location.hash = to;
});

async function start() {
  const packed = await block("overview");
  DATA = JSON.parse(new TextDecoder().decode(packed.json));
  DATA.architectures = Object.keys(DATA.looks);
  document.querySelectorAll(".script").forEach((element) => {
    element.hidden = false;
  });
  paint();
  const again = () => {
    paint();
    if (byId("overview").hidden) route();
    overview.again?.();
  };
  byId("theme").addEventListener("change", (event) => {
    document.documentElement.dataset.theme = event.target.value;
    again();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("hashchange", route);
  if (atHome()) recall();
  overview();
  await route();
  document.documentElement.dataset.ready = "";
}
start();
