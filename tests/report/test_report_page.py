"""What a person sees who opens the HTML report, or the card with its plots, in a browser."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from support.browser import CHROMIUM, Seen, look
from support.factories import HOSTILE, make_report, report_saying

from hfq.common.errors import SourceError
from hfq.common.names import PLOT_FILES
from hfq.report import plots
from hfq.report.card import render_card
from hfq.report.page import render_page
from hfq.report.report import Report
from hfq.tuning.trial import Trial

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed here: apt-get install chromium brings it"
)
PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports as HTML, and a card as the Hub shows it: Markdown with its plots beside it."""
    folder = tmp_path_factory.mktemp("pages")
    pages = {"met": make_report(), "missed": missed(), "bare": bare(), "hostile": report_saying(" ".join(HOSTILE))}
    for name, report in pages.items():
        (folder / f"{name}.html").write_text(render_page(report), encoding="utf-8")
    card = render_card(make_report(), repo_id="me/x", plots=plots.write(make_report(), folder))
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)
    (folder / "card.html").write_text(f"<!doctype html><link rel=icon href=data:,>{html}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def light(folder: Path) -> Seen:
    names = ("met", "missed", "bare", "hostile")
    frames = {f"{name}-{width}": (f"{name}.html", width) for name in names for width in (PHONE, DESK)}
    return look(folder, {**frames, "card": ("card.html", DESK)}, dark=False)


@pytest.fixture(scope="module")
def dark(folder: Path) -> Seen:
    return look(folder, {"met": ("met.html", DESK)}, dark=True)


def missed() -> Report:
    trials = [
        Trial("static-minmax", 0.80, 0.91, False, output_error=0.01, loss=0.026),
        Trial("dynamic, " + "a long name " * 6, 0.81, 1.2, False, output_error=0.02, loss=0.013),
    ]
    return make_report(
        met=False, trials=trials, sensitivity={f"encoder.{i}." + "x" * 90: 1 / (i + 1) for i in range(30)}
    )


def bare() -> Report:
    """As an older hfq wrote it, with next to nothing in it."""
    report = make_report()
    dataset = replace(report.dataset, holdout_split=None)
    return replace(
        report, dataset=dataset, comparisons=[], trials=[], sensitivity={}, baseline_pass_s=None, warnings=[]
    )


@needs_browser
def test_nothing_overflows_on_a_phone_or_on_a_desk(light: Seen) -> None:
    assert {name: seen["width"] for name, seen in light.frames.items() if name.endswith("-390")}.popitem()[1] == PHONE
    assert {name: seen["needed"] - seen["width"] for name, seen in light.frames.items()} == dict.fromkeys(
        light.frames, 0
    )


@needs_browser
def test_nothing_is_asked_for_and_the_console_stays_empty(light: Seen, dark: Seen) -> None:
    pages = {f"/{name}.html" for name in ("look", "met", "missed", "bare", "hostile", "card")}
    assert light.asked - {"/favicon.ico"} == pages | {f"/{path}" for path in PLOT_FILES}
    assert all(seen["requests"] == [] for name, seen in light.frames.items() if name != "card")
    for seen in (light, dark):
        assert [line.split('"')[1] for line in seen.console if "favicon" not in line] == ["looked"]


@needs_browser
def test_the_verdict_and_the_figures_are_there_to_read(light: Seen) -> None:
    met, no, bare = (light.frames[f"{name}-{PHONE}"] for name in ("met", "missed", "bare"))
    assert "Goal met" in met["text"] and "Goal missed" in no["text"]
    assert (met["title"], no["title"]) == (
        "bert-base-uncased-mrpc-int8: goal met",
        "bert-base-uncased-mrpc-int8: goal missed",
    )
    report = make_report()
    for words in (
        *(
            "0.8211",
            "0.8186",
            "0.8012",
            "0.8006",
            "3.57×",
            "within noise",
            "[-0.64 points, +0.52 points]",
            "never seen in tuning",
        ),
        *("static-minmax", "encoder.0.q", "4.6 %", "Calibrated on", "100 samples of train", "Xeon", "2.13.0"),
        *(report.warnings[0], report.command, report.checkpoint.revision),
    ):
        assert words in met["text"], words
    assert "Sensitivity" not in bare["text"] and "not compared" in bare["text"]
    assert "this very split" in bare["text"] and "this very split" not in met["text"]


@needs_browser
def test_drawings_are_drawn_and_say_what_they_show(light: Seen) -> None:
    seen = light.frames[f"met-{DESK}"]
    assert len(seen["drawn"]) == 3  # two intervals, the trials
    assert "FP32 0.8211 at 125.5 examples/s; static-minmax 0.8186 at 448.4 examples/s" in seen["drawn"][2]
    assert "goal is at least 0.8129" in seen["drawn"][2]
    assert seen["marks"] == 4 + 2 + len(make_report().sensitivity)
    assert light.frames[f"missed-{DESK}"]["marks"] == 4 + 3 + plots.MOST_LAYERS
    assert light.frames[f"bare-{DESK}"]["marks"] == 0


@needs_browser
def test_it_is_dark_where_the_reader_wants_dark(light: Seen, dark: Seen) -> None:
    backgrounds = [seen.frames[name]["background"] for seen, name in ((light, f"met-{DESK}"), (dark, "met"))]
    assert backgrounds == ["rgb(246, 247, 249)", "rgb(14, 17, 22)"]
    shown = Image.open(dark.screenshot).convert("L").crop((2, 2, DESK, 900)).getextrema()
    assert shown[0] < 30 and shown[1] > 200  # dark paper, light letters


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_hostile_strings_are_shown_not_obeyed(width: int, light: Seen) -> None:
    harmless, seen = light.frames[f"met-{width}"], light.frames[f"hostile-{width}"]
    for words in ("<script>alert(1)", "{{ 7 * 7 }}", "](https://evil.example)", "&lt;", "<img src=x onerror"):
        assert words in seen["text"]
    assert not set(seen["elements"]) & {"script", "img", "iframe", "form", "object", "embed"}
    assert set(seen["elements"]) - set(harmless["elements"]) == set()
    assert seen["links"] == []


@needs_browser
def test_the_cards_plots_are_seen(light: Seen) -> None:
    (trials, width), (layers, _) = light.frames["card"]["images"]
    assert "static-minmax (chosen) 0.8186 at 448.4 examples/s" in trials and "at least 0.8129" in trials
    assert layers.startswith("Output error of each INT8 layer alone, the largest first: encoder.0.k 4.6 %")
    assert width == 1008


def test_a_report_that_hfq_did_not_write_is_refused_in_one_message() -> None:
    report = make_report()
    for broken in (
        replace(report, baseline=replace(report.baseline, accuracy="high")),
        replace(report, sensitivity={"layer": "large"}),
        replace(report, layers=None),
        replace(report, trials=[Trial("x", [], 1.0, True)]),
    ):
        with pytest.raises(SourceError, match="holds what hfq does not write"):
            render_page(broken)
