"""Configuration of the documentation, built with Sphinx."""

import importlib.util
from pathlib import Path

import fptt_jax

project = 'fptt_jax'
author = 'fptt_jax maintainers'
copyright = '2026, fptt_jax maintainers'
release = version = fptt_jax.__version__

extensions = [
  'myst_nb',
  'sphinx_design',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
# Autosummary writes its pages with the first suffix.
source_suffix = {'.rst': 'restructuredtext', '.md': 'myst-nb'}
exclude_patterns = ['_build']

# Every notebook runs when the site is built; a cell that fails ends the build.
nb_execution_mode = 'cache'
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True

myst_enable_extensions = ['amsmath', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type']

# Names in single backticks are code.
default_role = 'code'

autosummary_generate = True
templates_path = ['_templates']
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The copy of MathJax in this package typesets formulas without a network. As an
# extension it would end the parallel build.
_mathjax = importlib.util.find_spec('sphinx-mathjax-offline')
mathjax_path = 'mathjax/tex-chtml.js'
html_static_path = ['_static', str(Path(_mathjax.origin).parent / 'static')]
html_css_files = ['custom.css']
html_theme = 'sphinx_book_theme'
html_title = 'fptt_jax'
html_theme_options = {
  'home_page_in_toc': True,
  'show_navbar_depth': 1,
  'use_download_button': False,
  'use_fullscreen_button': False,
}
