"""The report: the page shows the numbers of the metrics, escapes what it is given, and asks for nothing outside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from perdure.report import figure, html, palette
from perdure.report.entries import collect
from perdure.report.verdict import verdict

TASKS = ["animals", "digits", "food & drink"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def metrics(method: str = "finetune", seed: Any = 0, **changes: Any) -> dict[str, Any]:
    """A whole metrics dict of three tasks, with changes."""
    accuracy = [[30.25, 21.5, 61.0], [90.125, 20.0, 60.0], [85.0, 95.0, 58.5], [1 / 3 * 240, 91.0, 88.0]]
    run: dict[str, Any] = {
        "format": 1, "perdure": "0.1.0", "method": method, "stream": "mini", "seed": seed, "tasks": TASKS,
        "accuracy": accuracy,
        "accuracy_interval": [[[value - 2, value + 2] for value in row] for row in accuracy],
        "probe": [62.0, 60.0, 58.0, 55.5], "probe_interval": [[60, 64], [58, 62], [56, 60], [53.5, 57.5]],
        "transfer": 46.1, "average": 67.3, "last": 86.333, "forgetting": 7.0, "backward_transfer": -7.0,
        "forward_transfer": -2.0, "intervals": {"transfer": [45.0, 47.0], "last": [84, 88]},
        "incremental_average": None, "incremental_last": None, "seconds": 92.4, "peak_memory_mb": 812.5,
        "seconds_by_task": [{"task": task, "train": 8.0, "evaluate": 2.0} for task in TASKS],
        "losses": {task: {"step": [10, 20, 30], "task": [2.0, 1.5, 1.2]} for task in TASKS},
        "protocol": {"labels": "task", "task_id": "known"}, "config": {"lr": 0.0002, "towers": {"image": True}},
        "environment": {"python": "3.11"}, "data": {"name": "mini", "notes": ["Drawings: MIT, https://example.org/a"]},
    }  # fmt: skip
    return {**run, **changes}


def several() -> list[dict[str, Any]]:
    """A reference below, two methods, a mean over seeds, and a reference above that learns all at once."""
    still = [[30.25, 21.5, 61.0]] * 4
    seeds = [metrics("zscl", seed, last=87.0 + seed) for seed in (0, 1)]
    over_seeds = metrics("zscl", [0, 1], last=87.5, transfer=49.0, std={"last": 0.7}, runs=seeds, losses=None)
    joint = metrics(
        "joint",
        reference="upper",
        scope="stream",
        accuracy=[[30.25, 21.5, 61.0], [95, 97, 92]],
        transfer=None,
        last=99.0,
        losses={},
    )
    return [
        metrics(
            "zero_shot",
            reference="lower",
            scope="task",
            learns=False,
            accuracy=still,
            last=37.58,
            transfer=99.0,
            losses=None,
        ),
        metrics(),
        metrics("wise_ft", config={"lr": 0.0001}, forgetting=3.0, seconds=None),
        over_seeds,
        joint,
    ]


class Page(HTMLParser):
    """What a page shows: its cells by kind, its charts, its tips, and whatever could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.matrix: dict[tuple[str, str, str], dict[str, str | None]] = {}
        self.metrics: dict[tuple[str, str], dict[str, str | None]] = {}
        self.charts, self.tags, self.sources = 0, set[str](), list[str]()
        self.tips, self.in_title = list[str](), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.charts += tag == "svg" and found.get("role") == "img"
        self.in_title = tag == "title"
        self.sources += [str(found[key]) for key in ("src", "href", "srcset", "data", "action") if key in found]
        if "data-row" in found:
            self.matrix[str(found["data-run"]), str(found["data-row"]), str(found["data-column"])] = found
        if "data-metric" in found:
            self.metrics[str(found["data-run"]), str(found["data-metric"])] = found

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.tips.append(data)
            self.in_title = False


def same_numbers(page: Page, runs: list[dict[str, Any]]) -> None:
    """Every cell of every matrix and every metric holds exactly what the metrics dict holds."""
    assert len(page.matrix) == sum(len(run["accuracy"]) * len(run["tasks"]) for run in runs)
    for (place, row, column), cell in page.matrix.items():
        assert json.loads(str(cell["data-value"])) == runs[int(place)]["accuracy"][int(row)][int(column)]
    names = {name for place, name in page.metrics if place == "0"}
    assert {"transfer", "average", "last", "forgetting", "probe", "seconds", "peak_memory_mb"} <= names
    for index, run in enumerate(runs):
        for name in names - {"probe"}:
            held = page.metrics[str(index), name]["data-value"]
            assert (json.loads(held) if held else None) == run[name]
        probe = page.metrics[str(index), "probe"]
        shown = [json.loads(str(probe[key])) for key in ("data-before", "data-value")]
        assert shown == [run["probe"][0], run["probe"][-1]]


def test_page_holds_the_numbers_of_every_run() -> None:
    runs = several()
    page = Page(text := html.render(runs))
    same_numbers(page, runs)
    assert '<html lang="en">' in text and "viewport" in text and "<title>" in text
    assert "food &amp; drink" in text
    assert "finetune, after 1 animals: 90.1 %" in page.tips
    # The mean over seeds shows its deviation, and each seed by itself.
    assert "0, 1" in text and "± 0.7" in text and "Each seed of zscl" in text
    assert [page.metrics[f"3.{seed}", "last"]["data-value"] for seed in (0, 1)] == ["87.0", "88.0"]


def test_best_is_marked_among_methods_only() -> None:
    page = Page(html.render(several()))
    best = {key for key, cell in page.metrics.items() if "best" in str(cell["class"]) and "." not in key[0]}
    # The references hold the highest transfer and last; they are no contestants.
    assert ("3", "last") in best and ("3", "transfer") in best and ("2", "forgetting") in best
    assert not {run for run, _ in best} & {"0", "4"}
    # Where all are equal nothing is best.
    assert not {name for _, name in best} & {"average", "peak_memory_mb"}


def test_states_of_the_cells() -> None:
    page = Page(html.render(several()))
    states = {key: str(cell["data-state"]) for key, cell in page.matrix.items()}
    assert [[states["1", str(row), str(column)] for column in range(3)] for row in range(4)] == [
        ["unseen"] * 3, ["now", "unseen", "unseen"], ["learned", "now", "unseen"], ["learned", "learned", "now"],
    ]  # fmt: skip
    assert {state for (run, _, _), state in states.items() if run == "0"} == {"unseen"}
    assert [states["4", "1", str(column)] for column in range(3)] == ["learned"] * 3


def test_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    tasks = [evil, '"><img src=x onerror=alert(1)>', "$x$"]
    run = metrics(evil, tasks=tasks, stream=evil, losses={evil: {"step": [1, 2], evil: [1, 2]}})
    run |= {"data": {"notes": [evil]}, "config": {evil: evil}, "protocol": {evil: evil}, "seed": [evil]}
    run["seconds_by_task"] = [{"task": evil, "train": 1, "evaluate": 1}]
    page = Page(html.render([run, metrics()]))
    assert not {"script", "img"} & page.tags
    assert any("$x$" in str(cell["title"]) for cell in page.matrix.values())


def test_page_loads_nothing(tmp_path: Path) -> None:
    text = html.render(several())
    path = html.write(several(), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html" and path.read_text(encoding="utf-8") == text
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "image", "object"} & page.tags
    assert all(source.startswith("#") for source in page.sources)
    assert not re.search(r"url\((?!#)|@import", text)
    # The one address in the page is the text of the licence note.
    assert set(re.findall(r"https?://[^\s<\"']+", text)) == {"https://example.org/a"}
    assert "default-src 'none'" in text
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_missing_fields() -> None:
    least = {"tasks": ["a", "b"], "accuracy": [[10, None], [50.5, float("nan")]]}
    nothing = {key: None for key in metrics() if key not in ("tasks", "accuracy")}
    for run in (least, {**nothing, **least}):
        page = Page(html.render([run]))
        assert page.matrix["0", "0", "1"]["data-value"] == page.matrix["0", "1", "1"]["data-value"] == ""
        assert page.matrix["0", "1", "0"]["data-value"] == "50.5"
        assert "unfinished: 1 of 2 tasks" in html.render([run])
    page = Page(
        html.render([least, metrics(), metrics("zscl", accuracy_interval=[], probe_interval=[None], losses=[])])
    )
    assert not [cell for cell in page.metrics.values() if "best" in str(cell["class"])]  # other tasks: not comparable


def test_classes_seen_stand_in_for_the_mean_over_tasks() -> None:
    text = html.render([metrics(incremental=[90.0, 80.0, 70.0], incremental_average=80.0, incremental_last=70.0)])
    assert "Accuracy over the classes seen" in text and "tasks learned so far</figcaption>" not in text
    assert Page(text).metrics["0", "incremental_last"]["data-value"] == "70.0"


@pytest.mark.parametrize(
    "runs", [[], [metrics(tasks=[], accuracy=[[]])], [metrics(accuracy=[[1, 2]])], [metrics(accuracy=None)]]
)
def test_nothing_to_report(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs|no tasks"):
        html.render(runs)
    with pytest.raises(ValueError, match=r"needs|no tasks"):
        figure.draw(runs, tmp_path / "a.png")


def test_every_number_of_the_heat_map_is_readable() -> None:
    for tenth in range(1001):
        for scale in (palette.LIGHT_SCALE, palette.DARK_SCALE):
            ground = palette.shade(tenth / 10, scale)
            assert palette.contrast(ground, palette.ink(ground)) >= 4.5


def picture(path: Path) -> tuple[int, int, int]:
    """Width, height and number of colours of a PNG."""
    from matplotlib.image import imread
    from numpy import unique

    pixels = (imread(path)[..., :3] * 255).round().astype("int64")
    codes = pixels[..., 0] * 65536 + pixels[..., 1] * 256 + pixels[..., 2]
    return pixels.shape[1], pixels.shape[0], len(unique(codes))


def test_figure(tmp_path: Path) -> None:
    for runs in (several(), several()[1:2], [{"tasks": ["$a"], "accuracy": [[1.0], [None]]}]):
        width, height, colours = picture(figure.draw(runs, tmp_path / "deep" / "figure.png"))
        assert width == 1600 and 700 < height < 2600 and colours > 30


def chromium(page: Path, *options: str) -> str:
    """Run the browser on a page; what it prints."""
    assert CHROMIUM
    own = ["--virtual-time-budget=3000", f"--user-data-dir={page.parent / 'profile'}"]
    command = [CHROMIUM, *QUIET, *own, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")
def test_in_a_browser(tmp_path: Path) -> None:
    runs = several()
    path = html.write(runs, tmp_path / "report.html")
    page = Page(chromium(path, "--dump-dom"))
    same_numbers(page, runs)
    # Three courses, a chart a task, the losses of two runs, and the legend's line of every run.
    assert page.charts == 3 + len(TASKS) + 2 + len(runs)
    assert "finetune, after 1 animals: 90.1 %" in page.tips

    # A window is never narrower than about 500 px, a frame in it can be; the frame tells its own width of content.
    frame = tmp_path / "phone.html"
    script = "document.title = document.body.dataset.width = f.contentDocument.documentElement.scrollWidth"
    frame.write_text(
        '<!doctype html><title>x</title><body style="margin:0">'
        f'<iframe id=f src="report.html" style="width:390px;height:1600px;border:0" onload="{script}"></iframe>'
    )
    for scheme in ("0", "1"):
        for source, size in ((path, "1280,1600"), (frame, "600,1600")):
            shot = tmp_path / f"{source.stem}-{scheme}.png"
            look = f"--blink-settings=preferredColorScheme={scheme}"
            chromium(source, f"--window-size={size}", f"--screenshot={shot}", look)
            width, height, colours = picture(shot)
            assert (width, height) == tuple(map(int, size.split(","))) and colours > 60
    seen = chromium(frame, "--window-size=600,1600", "--allow-file-access-from-files", "--dump-dom")
    assert 'data-width="390"' in seen  # the page itself does not scroll sideways on a phone


def test_phases_stand_beside_their_task_in_the_losses() -> None:
    from perdure.report.entries import collect
    from perdure.report.losses import losses

    phases = {"digits": {"head": {"step": [4, 8], "head": [2.0, 1.0]}}}
    (chart, terms), *more = losses(collect([metrics(phases=phases)]))
    assert not more and [term.name for term in terms] == ["task", "head"] and "head" in chart.svg + str(terms)
    (_, alone), *_ = losses(collect([metrics(losses={}, phases=phases)]))
    assert [term.name for term in alone] == ["head"]


def test_of_many_tasks_the_numbers_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    names = [f"task {k}" for k in range(20)]
    rows = [[50.0 + (i * j) % 40 for j in range(20)] for i in range(21)]
    many = metrics(tasks=names, accuracy=rows, accuracy_interval=None, probe=None, probe_interval=None, losses={})
    page = html.render([many])
    assert "the course of each is left out here" in page and "Accuracy on task 7 in per cent" not in page
    assert "Accuracy on animals in per cent" in html.render([metrics()])
    picture = figure.draw([many], tmp_path / "many.png")
    assert b"tEXtSoftware\0perdure" in picture.read_bytes()


def test_the_sentence_says_what_was_lost_and_what_is_known() -> None:
    def run(method: str, probe: tuple[float, float], last: float, **more: Any) -> dict[str, Any]:
        rows = [[50.0, 50.0], [60.0, 50.0], [last, last]]
        return {
            "method": method,
            "stream": "s",
            "seed": 0,
            "tasks": ["a", "b"],
            "accuracy": rows,
            "probe": [*probe],
            **more,
        }

    runs = [
        run("zero_shot", (69.1, 69.1), 50.0, reference="lower", scope="task"), run("finetune", (69.1, 46.2), 70.4),
        run("ridge", (69.1, 69.1), 80.7), run("lucky", (69.1, 71.0), 66.0),
    ]  # fmt: skip
    said = (
        "finetune lost 23 of 69 points of what it could do before and knows 70 % of the two tasks; ridge lost none of what "
        "it could do before and knows 81 %; lucky gained 2 points on what it could do before and knows 66 %."
    )
    assert verdict(collect(runs)) == said
    assert f'<p class="lead">{said}' in html.render(runs)
    assert verdict(collect(runs[:1])) == "" and verdict(collect([*runs, {**runs[1], "stream": "t"}])) == ""


def test_what_a_method_chose_stands_in_the_page() -> None:
    run = {"method": "ridge", "stream": "s", "seed": 0, "tasks": ["a", "b"], "accuracy": [[1.0, 2.0]] * 3}
    page = html.render([{**run, "remarks": {"a": {"λ": 0.123456}, "b": {"λ": 7.0, "moved": 0.5}}}])
    assert "What was chosen" in page and "<td>0.123</td>" in page and "<td>0.5</td>" in page
    assert "What was chosen" not in html.render([run])


def test_what_is_said_of_layers_is_drawn_and_not_listed() -> None:
    layer = "ranks of vision_model.encoder.layers.{}.self_attn.q_proj"
    said = {"a": {"mean": 4.0, layer.format(0): 8.0, layer.format(1): 2.0}, "b": {"mean": 5.0, layer.format(1): 0.0}}
    run = {
        "method": "codyra",
        "stream": "s",
        "seed": 0,
        "tasks": ["a", "b"],
        "accuracy": [[1.0, 2.0]] * 3,
        "remarks": said,
    }
    page = html.render([run])
    assert "<title>a, image q_proj, block 2: 2</title>" in page and "codyra: ranks, up to 8" in page
    assert page.count("encoder.layers") == 0 and "<td>5</td>" in page
