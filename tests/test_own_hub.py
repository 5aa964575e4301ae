"""Pictures that the package datasets keeps: columns by their types, and the network only where the Hub was asked for."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from albums import drawings, tasks

import perdure
from perdure import launch
from perdure.benchmarks.own import hub
from perdure.benchmarks.own.pictures import Pictures
from perdure.core.errors import PerdureError

pytestmark = pytest.mark.filterwarnings("ignore")
datasets = pytest.importorskip("datasets")


def loaded(path: Path | str, **keys: str) -> Any:
    return Pictures(str(path), **keys).settled().load()


def saved(base: Path, **more: Any) -> Any:
    """A table of drawings of the kind that the package keeps; its columns in an order that says nothing."""
    (digits,) = tasks("digits")
    names = ["zero", "one", "ice_cream"]
    rows = [(drawing, k, f"a drawn {k}") for k in range(3) for drawing in drawings(digits, k, 6)]
    content = {"kind": [k for _, k, _ in rows], "said": [s for *_, s in rows], "seen": [d for d, *_ in rows], **more}
    features = {"kind": datasets.ClassLabel(names=names), "said": datasets.Value("string"), "seen": datasets.Image()}
    made = datasets.Dataset.from_dict({k: content[k] for k in features}, features=datasets.Features(features))
    datasets.disable_progress_bars()
    return made


@pytest.mark.slow
def test_a_dataset_on_disk_is_found_by_its_types_and_run(tmp_path: Path) -> None:
    made = saved(tmp_path)
    made.save_to_disk(str(tmp_path / "one"))
    (task,) = loaded(tmp_path / "one").tasks
    assert {c.name for c in task.classes} == {"zero", "one", "ice cream"} and len(task.train) + len(task.test) == 18
    assert task.train.captions is None
    (digits,) = tasks("digits")
    first = [k for k, path in enumerate(task.train.pixels.paths) if path.number == 0]
    if first:  # else it is held out
        assert (task.train.pixels[:][first[0]] == digits.train.pixels[digits.train.labels == 0][0]).all()
    both = datasets.DatasetDict({"train": made, "validation": made.select(range(0, 18, 2)), "extra": made})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.warns(UserWarning, match=r"its split 'extra' \(18 rows\) is left out"):
        (task,) = loaded(tmp_path / "both", text_key="said").tasks
    assert len(task.train) == 18 and len(task.test) == 9 and set(task.train.captions or ()) == {
        "a drawn 0", "a drawn 1", "a drawn 2"
    }  # fmt: skip
    asked = Pictures(str(tmp_path / "both"), text_key="said")
    assert perdure.run("ridge", asked, tmp_path / "run", features=32, workers=2)["finished"]
    assert launch.reopen(tmp_path / "run")[1].tasks[0].train.captions


def test_a_dataset_that_can_be_meant_in_several_ways_is_refused(tmp_path: Path) -> None:
    made = saved(tmp_path)
    made.add_column("kind2", made["kind"], feature=made.features["kind"]).save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(
        PerdureError, match="several columns of the type ClassLabel: kind, kind2. Say which .* --label-key"
    ):
        loaded(tmp_path / "labels")
    assert len(loaded(tmp_path / "labels", label_key="said").tasks[0].classes) == 3
    made.remove_columns("kind").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(PerdureError, match="no column of the type ClassLabel. Columns: said, seen"):
        loaded(tmp_path / "none")
    for key, column, said in (("image_key", "sen", "Did you mean 'seen'"), ("image_key", "said", "holds no pictures"),
                              ("label_key", "seen", "holds no classes"), ("split_key", "said", "is for tables")):  # fmt: skip
        with pytest.raises(PerdureError, match=said):
            loaded(tmp_path / "labels", **{"label_key": "kind", key: column})
    saved(tmp_path, kind=[-1, *made["kind"][1:]]).save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(PerdureError, match="1 of 18 rows have no class under 'kind', row 0 the first"):
        loaded(tmp_path / "unlabelled")


def test_the_hub_is_asked_for_a_hub_id_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    made = saved(tmp_path)

    def load_dataset(*words: Any) -> Any:
        asked.append(words)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert loaded("hf:someone/pictures:small").name == "someone-pictures-small"
    assert asked == [("someone/pictures", "small")]
    made.save_to_disk(str(tmp_path / "one"))
    loaded(tmp_path / "one")
    assert len(asked) == 1

    def refused(*words: Any) -> Any:
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(PerdureError, match="hf:someone/pictures cannot be loaded: no network here"):
        loaded("hf:someone/pictures")


def test_without_the_package_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "state.json").write_text("{}")
    assert hub.is_saved(tmp_path)
    with pytest.raises(PerdureError, match=r"pip install 'perdure\[datasets\]'"):
        loaded(tmp_path)
