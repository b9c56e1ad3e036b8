"""The site: marks go, links that leave docs/ find a page, a notebook becomes one; and it builds without a warning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import docs_site

ROOT = Path(__file__).parents[2]
TEXT = """Read [the prose](../src/lamina/lab/prose/README.md), [plans](plans.md#budgets), [how](../tools/golden.py).

```sh slow
lamina plan run [x](../y.md)
```

```yaml norun="nothing to run" title="my.yaml"
```
"""


def test_links_find_their_pages_and_marks_go() -> None:
    page = ROOT / "docs" / "data.md"
    prose = ROOT / "src" / "lamina" / "lab" / "prose" / "README.md"
    assert [file for _, file in docs_site.outward(TEXT, page)] == [prose, ROOT / "tools" / "golden.py"]
    made = docs_site.unmarked(docs_site.relinked(TEXT, page, [prose]))
    assert "[the prose](repository/src/lamina/lab/prose/README.md), [plans](plans.md#budgets)" in made
    assert ", how (`tools/golden.py`)." in made
    assert "```sh\nlamina plan run [x](../y.md)\n```" in made
    assert '```yaml title="my.yaml"\n' in made
    back = docs_site.relinked("[all](../../../../docs/index.md) ![a](a.png)", prose, [prose])
    assert back.startswith("[all](../../../../../index.md)")


def cell(kind: str, source: str, outputs: Any = ()) -> dict[str, Any]:
    extra = {"outputs": list(outputs), "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "source": source, "metadata": {}, **extra}


def test_a_notebook_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_site, "EXECUTED", tmp_path / "ran")
    (tmp_path / "ran").mkdir()
    cells = [cell("markdown", "# One"), cell("code", "1 + 1")]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert docs_site.notebook_page(tmp_path / "a.ipynb") == "# One\n\n```python\n1 + 1\n```\n"
    html = {"data": {"text/html": ["<b>\n", "    2</b>"], "text/plain": "2"}}
    said = {"text": "\x1b[2mdone\x1b[0m\n"}
    ran = [cells[0], cell("code", ["1 + 1"], [said, html, {"data": {"text/plain": ""}}])]
    (tmp_path / "ran" / "a.ipynb").write_text(json.dumps({"cells": ran}), encoding="utf-8")
    page = docs_site.notebook_page(tmp_path / "a.ipynb")
    assert page.endswith('```text\ndone\n```\n\n<div class="output" markdown="0"><b> 2</b></div>\n')
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell("code", "2 + 2")]}), encoding="utf-8")
    assert "output" not in docs_site.notebook_page(tmp_path / "a.ipynb"), "outputs of other cells"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'lamina[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for page in ("index", "notebook", "catalogue", "coverage", "api/verbs", "decisions/index", "repository/CHANGELOG"):
        assert (site / f"{page}.html").is_file(), page
    taken = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//|url\(["']?(?:https?:)?//""")
    for file in (*site.rglob("*.html"), *site.rglob("*.css")):
        assert not taken.search(file.read_text(encoding="utf-8")), file
    assert "lamina.thin" in (site / "api" / "verbs.html").read_text(encoding="utf-8")
    assert "norun" not in (site / "howto" / "phone.html").read_text(encoding="utf-8")
