"""Options, presets and key=value: everything wrong is said together, and nothing ends in a traceback."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from perdure import cli, launch
from perdure.core.config import options, pairs, resolve
from perdure.core.errors import PerdureError


@dataclass(frozen=True)
class Config:
    lr: Annotated[float, Field(gt=0, description="rate")] = 1e-3
    steps: Annotated[int, Field(ge=1)] = 10
    mode: Annotated[Literal["full", "lora"], Field()] = "full"
    limit: Annotated[float | None, Field(gt=0)] = None
    layers: Annotated[tuple[str, ...], Field()] = ("a",)
    flag: bool = False


KNOWN = options(Config)


def test_text_is_read_as_the_field_type() -> None:
    values, complaints = pairs(
        ["lr=2e-4", "steps=7", "mode=lora", "limit=none", "layers=[k_proj, v_proj]", "flag=true"]
    )
    assert complaints == []
    assert resolve(KNOWN, values) == {
        "lr": 2e-4, "steps": 7, "mode": "lora", "limit": None, "layers": ("k_proj", "v_proj"), "flag": True,
    }  # fmt: skip


def test_later_layers_win() -> None:
    assert resolve(KNOWN, {"lr": 0.1, "steps": 3}, {"lr": "0.2"})["lr"] == 0.2
    assert resolve(KNOWN, {"lr": 0.1, "steps": 3}, {"lr": "0.2"})["steps"] == 3


def test_all_errors_come_together_with_the_nearest_name() -> None:
    values, complaints = pairs(["lrr=1", "lr=-1", "steps=many", "mode=both", "oops", "flag=1=2"])
    with pytest.raises(PerdureError) as error:
        resolve(KNOWN, values, complaints=complaints)
    text = str(error.value)
    for piece in (
        "'lrr'. Did you mean 'lr'?",
        "lr=-1",
        "steps=many",
        "mode=both",
        "'oops' is not key=value",
        "flag=1=2",
    ):
        assert piece in text


def test_published_recipe_is_the_default() -> None:
    recipe = {
        key: option.default for key, (_, option) in launch.method_options(launch.method_entry("finetune")).items()
    }
    expected = {"iterations": 1000, "batch_size": 64, "warmup": 100, "label_smoothing": 0.2, "weight_decay": 0.0}
    assert {k: recipe[k] for k in expected} == expected
    assert (recipe["lr"], recipe["beta1"], recipe["beta2"]) == (1e-5, 0.9, 0.999)


def test_preset_sits_between_stream_and_command_line() -> None:
    preset = launch.read_preset("finetune-mtil")
    layer = {k: v for k, v in preset.items() if k not in ("method", "stream", "about")}
    config, _ = launch.configure("finetune", "mini-mtil", 0, ["lr=3e-5"], layer)
    assert config["options"]["lr"] == 3e-5  # command line
    assert config["options"]["iterations"] == 1000  # preset, over the stream's 80
    config, _ = launch.configure("finetune", "mini-mtil", 0, [], {})
    assert config["options"]["iterations"] == 80


def test_unknown_names_suggest_the_nearest() -> None:
    for call, hint in (
        (lambda: launch.configure("finetun", "mini-mtil", 0, [], {}), "Did you mean 'finetune'?"),
        (lambda: launch.configure("finetune", "mini-mti", 0, [], {}), "Did you mean 'mini-mtil'?"),
        (lambda: launch.read_preset("finetune-mtl"), "Did you mean 'finetune-mtil'?"),
        (
            lambda: launch.configure("finetune", "mini-mtil", 0, ["lr_by_task={digit: 0.1}"], {}),
            "Did you mean 'digits'?",
        ),
        (lambda: launch.configure("merge", "mini-mtil", 0, [], {}), "weight_average, wise_ft"),
    ):
        with pytest.raises(PerdureError) as error:
            call()
        assert hint in str(error.value)


KEYS = [*KNOWN, "iterations", "model", "device", "threads", "lora_rank", "lr_by_task", ""]
VALUES = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "1e999", "nan", "-0", "{", "[1,", "!!python/x y", "&a", "0x", "~"])
)
WORDS = st.one_of(
    st.builds(lambda k, v: f"{k}={v}", st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), VALUES),
    st.text(max_size=10),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=5))
@example(["model=\0"])
def test_no_malformed_configuration_escapes(words: list[str]) -> None:
    """Any words after ``perdure run`` either resolve or end in one message and exit code 2."""
    try:
        config, _ = launch.configure("finetune", "mini-mtil", 0, words, {})
    except PerdureError as error:
        assert str(error)
        return
    assert set(config["options"]) == set(options(launch.method_entry("finetune").value.Config))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=10), max_size=4
    )
)
def test_command_line_never_shows_a_traceback(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out") / "run"
    monkeypatch.setattr(
        "sys.argv",
        ["perdure", "run", "--method", "finetune", "--stream", "mini-mtil", "--out", str(out), "bad", *words],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, 2)  # 0: one of the words was --help
    assert not out.exists()
