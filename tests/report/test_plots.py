"""The pictures of a survey: that they say what the survey says, at any size."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import scipy.stats
import survey_files as files

from lamina.core.errors import InputError
from lamina.report.plots import clip
from lamina.report.scatter import correlation, scale_ticks, styles, tick_label
from lamina.report.survey import Survey
from lamina.report.svg import LIGHT, Scale, mix

SVG = "{http://www.w3.org/2000/svg}"
SIZES = [(4, 1), (8, 12), (8, 30), (40, 30), (40, 80), (8, 160)]


def parsed(svg: str) -> ET.Element:
    """The picture, which must be well-formed and hold no number that is none."""
    assert not re.search(r'"-?(nan|inf|None)', svg)
    return ET.fromstring(svg)


def cells(root: ET.Element) -> dict[tuple[str, str], tuple[str, str]]:
    """(measure, site) → fill, tooltip of the heat map."""
    found = {}
    for group in root.iter(SVG + "g"):
        title, rect = group.find(SVG + "title"), group.find(SVG + "rect")
        if title is not None and rect is not None and title.text:
            measure, rest = title.text.split("\n", 1)
            found[measure, rest.split(":")[0]] = rect.attrib["fill"], title.text
    return found


def extent(root: ET.Element) -> tuple[float, float]:
    """The right-most and lowest edge of anything drawn, texts by a guess of their width."""
    right = bottom = 0.0
    for node in root.iter():
        a = node.attrib
        if node.tag == SVG + "rect" and "x" in a:
            right = max(right, float(a["x"]) + float(a["width"]))
            bottom = max(bottom, float(a["y"]) + float(a["height"]))
        elif node.tag == SVG + "text" and "transform" not in a:
            letters = len("".join(node.itertext())) * float(a["font-size"]) * 0.5
            share = {"middle": 0.5, "end": 0.0}.get(a.get("text-anchor", ""), 1.0)
            right = max(right, float(a["x"]) + share * letters)
            bottom = max(bottom, float(a["y"]))
    return right, bottom


@pytest.mark.parametrize(("measures", "depth"), SIZES)
def test_the_heat_map_has_every_site_of_every_measure_in_its_frame(tmp_path: Path, measures: int, depth: int) -> None:
    survey = Survey.open(files.many(tmp_path / "r", measures=measures, depth=depth))
    root = parsed(survey.heatmap())
    told = cells(root)
    for measure, scores in survey.items():
        for site in scores.values:
            assert (measure, site) in told
    right, bottom = extent(root)
    assert right <= float(root.attrib["width"])
    assert bottom <= float(root.attrib["height"])
    assert float(root.attrib["width"]) <= 1600


def test_colours_are_ranks_within_the_row(tmp_path: Path) -> None:
    survey = Survey.open(files.many(tmp_path / "r"))
    told = cells(parsed(survey.heatmap()))
    for measure in ("leave-one-out", "measure-1"):
        ranked = survey.rank(measure, "mlp")["site"].to_list()
        for place, site in enumerate(ranked):
            fill, note = told[measure, site]
            assert fill == mix(LIGHT, place / 11)
            assert note.endswith(f"rank {place + 1} of 12")
    assert " nats\n" in told["leave-one-out", "block.0"][1]
    assert " ± " in told["leave-one-out", "block.0"][1]
    assert ", mean of 9 units" in told["head-size", "block.0.attention.head"][1]


def test_ties_have_one_colour(tmp_path: Path) -> None:
    rows = [files.row("m", f"block.{b}", "block", v) for b, v in enumerate((1.0, 2.0, 2.0, 3.0))]
    told = cells(parsed(Survey.open(files.write(tmp_path / "r", rows)).heatmap()))
    assert [told["m", f"block.{b}"][0] for b in range(4)] == [mix(LIGHT, x) for x in (0.0, 0.5, 0.5, 1.0)]


def test_sites_without_a_score_are_hatched_with_the_reason(tmp_path: Path) -> None:
    svg = Survey.open(files.many(tmp_path / "r")).heatmap()
    fill, note = cells(parsed(svg))["measure-2", "block.4.mlp"]
    assert fill == "url(#lamina-hatch)"
    assert note == "measure-2\nblock.4.mlp: its inputs are not linear maps"
    assert "of-text: the model has no tokens" in svg
    assert "measure-4 (head): defined on whole sublayers alone" in svg


def test_a_reason_for_a_kind_is_that_of_its_sites(tmp_path: Path) -> None:
    rows = [files.row("a", f"block.{b}", "block", b) for b in range(3)]
    rows += [files.row("b", "block.0", "block", 1.0), files.row("b", "block", None, math.nan, why="no blocks here")]
    told = cells(parsed(Survey.open(files.write(tmp_path / "r", rows)).heatmap()))
    assert told["b", "block.2"] == ("url(#lamina-hatch)", "b\nblock.2: no blocks here")


def test_stacks_stand_apart_and_hybrids_leave_gaps(tmp_path: Path) -> None:
    rows = [files.row("m", f"{s}.block.{b}.mlp", "mlp", b + 1) for s in ("encoder", "decoder") for b in range(3)]
    rows += [files.row("m", "decoder.block.0.mixer", "mixer", 1), files.row("m", "embedding", "channel", 3.0)]
    svg = Survey.open(files.write(tmp_path / "r", rows)).heatmap()
    told = cells(parsed(svg))
    assert len(told) == 7
    for title in ("encoder: MLP", "decoder: MLP", "decoder: Mixer"):
        assert f">{title}<" in svg
    assert told["m", "encoder.block.2.mlp"][1].endswith("rank 3 of 3")


@pytest.mark.parametrize(("measures", "depth"), SIZES[1:])
def test_scatters_stay_in_their_frame(tmp_path: Path, measures: int, depth: int) -> None:
    survey = Survey.open(files.many(tmp_path / "r", measures=measures, depth=depth))
    for svg in (survey.scatter(), survey.scatter(measure="measure-1"), survey.scatter("head-size", "head-size")):
        root = parsed(svg)
        right, bottom = extent(root)
        assert right <= float(root.attrib["width"])
        assert bottom <= float(root.attrib["height"])


def test_the_scatter_tells_spearmans_correlation_with_the_truth(tmp_path: Path) -> None:
    survey = Survey.open(files.many(tmp_path / "r"))
    svg = survey.scatter(measure="measure-1")
    a, b = survey["measure-1"], survey["leave-one-out"]
    for kind in ("attention", "mlp"):
        sites = [f"block.{i}.{kind}" for i in range(12)]
        oracle = scipy.stats.spearmanr([a[s] for s in sites], [b[s] for s in sites]).statistic
        assert f"{kind}: Spearman {oracle:.2f}, 95 % " in svg
        assert all(f"<title>{site}\n" in svg for site in sites)
    assert "<title>block.0\n" not in svg  # measure-1 scores no blocks
    assert "leave-one-out (nats)" in svg
    assert "bars: ± 1 standard error" in svg
    only = survey.scatter(measure="measure-1", kind="mlp")
    assert "<title>block.0.mlp\n" in only
    assert "attention" not in only


def test_all_measures_stand_in_order_of_agreement(tmp_path: Path) -> None:
    survey = Survey.open(files.many(tmp_path / "r", measures=12))
    svg = survey.scatter()
    places = [svg.index(f">{name}<") for name in ("measure-1", "measure-8")]
    assert places == sorted(places)
    assert ">head-size<" not in svg  # shares no site with the truth


def test_pictures_are_written(tmp_path: Path) -> None:
    survey = Survey.open(files.many(tmp_path / "r"))
    svg = survey.heatmap(tmp_path / "pictures" / "heat.svg")
    assert (tmp_path / "pictures" / "heat.svg").read_text(encoding="utf-8") == svg + "\n"
    svg = survey.scatter(path=str(tmp_path / "scatter.svg"))
    assert (tmp_path / "scatter.svg").read_text(encoding="utf-8") == svg + "\n"
    assert survey.heatmap() == Survey.open(tmp_path / "r").heatmap()


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    survey = Survey.open(files.many(tmp_path / "r"))
    with pytest.raises(InputError, match="no measure named 'truth' in this survey as the truth"):
        survey.scatter("truth")
    with pytest.raises(InputError, match="head-size and leave-one-out score no sites in common"):
        survey.scatter(measure="head-size")
    with pytest.raises(
        InputError, match=r"of-text and leave-one-out score no sites in common \(the model has no tokens"
    ):
        survey.scatter(measure="of-text")
    with pytest.raises(InputError, match="no other measure scores a site that neuron-size scores"):
        survey.scatter("neuron-size")


def test_a_survey_of_nothing_is_drawn(tmp_path: Path) -> None:
    rows = [files.row("m", "", None, math.nan, why="no")]
    svg = Survey.open(files.write(tmp_path / "r", rows)).heatmap()
    assert "m: no" in svg
    parsed(svg)


def test_many_points_are_thinned_and_all_counted(tmp_path: Path) -> None:
    rows = [
        files.row(m, f"block.{b}.mlp.neuron", "neuron", (u * 7 + b) % 997 + k * u, unit=u)
        for k, m in enumerate(("a", "b"))
        for b in range(2)
        for u in range(1500)
    ]
    svg = Survey.open(files.write(tmp_path / "r", rows)).scatter("a", "b")
    assert "3000 sites" in svg
    assert svg.count("<title>block.") == 1500


@pytest.mark.parametrize(
    "values", [[0.001, 0.1, 2.0], [-1.0, 0.01, 0.02, 0.03, 5.0], [0.4, 0.5, 0.6], [3.0], [0.0, 0.0], [-2.0, -1.0]]
)
def test_ticks_are_round_apart_and_inside(values: list[float]) -> None:
    scale = Scale.of(values)
    found = scale_ticks(scale, 0.2)
    assert 1 <= len(found) <= 6
    assert all(min(values) <= t <= max(values) for t in found)
    places = sorted(scale(t) for t in found)
    assert all(b - a >= 0.2 - 1e-9 for a, b in itertools.pairwise(places))


def test_small_words() -> None:
    assert [tick_label(v) for v in (0.001, -2.0, 1e-7, 30.000000001, 2.5)] == ["0.001", "−2", "1e−7", "30", "2.5"]
    assert [correlation(v) for v in (0.876, -0.5, -0.001, math.nan)] == ["0.88", "−0.50", "0.00", "\N{EM DASH}"]
    assert clip("measure", 7) == "measure"
    assert clip("measures", 7) == "measur…"
    looks = styles(["mlp", "head", "neuron"])
    assert looks["head"] != looks["neuron"]
