"use strict";
// The choice of a version, where several are published side by side: docs/site/publish.py.

window.addEventListener("DOMContentLoaded", async () => {
  if (!location.protocol.startsWith("http")) return;
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  const versions = await (await fetch(new URL("versions.json", root))).json();
  if (versions.length < 2) return;

  const here = decodeURIComponent(root.pathname.split("/").at(-2));
  const page = location.href.slice(root.href.length);
  const chooser = document.createElement("select");
  chooser.id = "version";
  chooser.setAttribute("aria-label", "Version");
  for (const version of versions) chooser.add(new Option(version, version, false, version === here));
  chooser.addEventListener("change", async () => {
    const other = new URL(`../${encodeURIComponent(chooser.value)}/`, root);
    const same = new URL(page, other);
    const found = await fetch(same, { method: "HEAD" });
    location.href = found.ok ? same : other; // an older version may not have the page
  });
  document.querySelector(".sidebar-primary-items__start").firstElementChild.after(chooser);
});
