"""The notebook of the tutorial: kept without outputs, and run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_model

import run_notebook

PATH = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'lamina[docs]'")


def test_outputs_are_not_kept() -> None:
    book = nbformat.read(PATH, as_version=4)
    nbformat.validate(book)
    assert run_notebook.outputs(book) == []
    assert all(c.execution_count is None for c in book.cells if c.cell_type == "code")
    assert "/" not in book.metadata.kernelspec.name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """On a tiny model: `make site` runs it on the one that it names, which takes minutes."""
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'lamina[docs]'")
    book = run_notebook.executed(PATH, tmp_path, str(make_model(tmp_path / "model", num_hidden_layers=8)))
    shown = [output.data.get("text/html", "") for output in run_notebook.outputs(book) if "data" in output]
    survey, table, plan, proof = [html for html in shown if html]
    assert "<svg" in survey
    assert "rank_low" in table
    assert "drop" in plan
    assert "Perplexity" in proof
    said = "".join(o.text for o in run_notebook.outputs(book) if o.output_type == "stream" and o.name == "stdout")
    assert "parameters became" in said
    assert "\x1b" not in said
    assert (tmp_path / "notebook-run" / "report.html").is_file()
