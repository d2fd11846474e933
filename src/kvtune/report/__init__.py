"""What result files say, for people: self-contained HTML pages, Markdown, pictures in a terminal.

Tensor-free, stdlib only.

Owns the wording and the figures. Reads nothing but the mappings that `tune`, `plan` and `simulate` write as
JSON: every number shown stands there, a field they lack reads "not recorded".
"""

from kvtune.report.html import render
from kvtune.report.markdown import render_markdown
from kvtune.report.pages import render_plan, render_simulation

__all__ = ["render", "render_markdown", "render_plan", "render_simulation"]
