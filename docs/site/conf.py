"""Settings of the site. `docs/site/build.py` lays out the sources and runs Sphinx with them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import links
import rgd

project = "rgd"
author = "The developers of rgd"
version = release = rgd.__version__
html_title = f"rgd {version}"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "links",
]
exclude_patterns = ["jupyter_execute"]

# The pages, as they are written for the repository.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["misc.highlighting_failure"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The reference.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_mock_imports = links.MISSING
autodoc_class_signature = "separated"
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries = False
# A name in backticks is a link where the reference has it, and code elsewhere.
default_role = "py:obj"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navigation_with_keys": False,
    "back_to_top_button": False,
}
html_context = {"default_mode": "auto"}
html_static_path = [os.environ["RGD_SITE_STATIC"]]
html_css_files = ["site.css"]
html_js_files = ["versions.js"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_last_updated_fmt = None
# MathJax comes with the site: no page asks another server for anything.
mathjax_path = "mathjax/tex-svg-full.js"
mathjax3_config = {
    "options": {"enableMenu": False},
    "svg": {"fontCache": "global"},
}
