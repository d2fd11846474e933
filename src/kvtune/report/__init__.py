"""What a result file says, for people: one self-contained HTML page, or Markdown. Tensor-free, stdlib only.

Owns the wording and the figures. Reads nothing but the mapping that `tune` wrote as result.json: every
number shown stands in that file, a field it lacks reads "not recorded".
"""

from kvtune.report.html import render
from kvtune.report.markdown import render_markdown

__all__ = ["render", "render_markdown"]
