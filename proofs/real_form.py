"""The way that real data and real checkpoints take, end to end, by the command line: a proof of form, not of accuracy.

    python proofs/real_form.py [--keep FOLDER]

Small trees of MTIL's eleven data sets in the formats that torchvision reads, a random CLIP of two layers for 224 pixels in
CLIP's checkpoint format with its real tokenizer, and a random text-to-image model in Stable Diffusion's format. GIFT, ConDU,
MG-CLIP and ``ridge_patches`` learn all eleven tasks, are reported and exported, and plain transformers must see and read with
each exported model what perdure does. Nothing is known by these models: accuracies are chance.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import trees
from PIL import Image
from typer.testing import CliRunner

from perdure.benchmarks import mtil
from perdure.cli import app
from perdure.core.state import read_json
from perdure.models.clip import CLIP
from perdure.models.loading import quiet

SMALL = ["images=24", "precision=fp32", "threads=1"]  # so small a model is slower on two
STEPS = ["iterations=2", "warmup=1", "batch_size=8"]
PAIRS = ["synthetic=8", "sampling_batch=8", "sampling_steps=2", "vocabulary=imagenet"]
RUNS: dict[str, list[str]] = {
    "gift": ["--preset", "gift-mtil", "synthetic_batch=4", *STEPS],
    "condu": ["--preset", "condu-mtil", *STEPS],
    "mg_clip": ["--method", "mg_clip", "--stream", "mtil", *STEPS],
    "ridge_patches": ["--method", "ridge_patches", "--stream", "mtil", "features=64"],
}
CLOSE = 2e-3  # logits: what resizes small pictures rounds otherwise


@dataclass(frozen=True)
class Proof:
    """Where everything lies."""

    folder: Path

    def call(self, *words: str | Path) -> str:
        """What ``perdure WORDS`` prints; what goes wrong ends the proof."""
        found = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        if found.exit_code:
            raise SystemExit(f"perdure {' '.join(map(str, words))} ended with {found.exit_code}:\n{found.output}")
        return found.output

    def made(self) -> None:
        """Trees, checkpoints, and the pairs that GIFT replays."""
        trees.grow(self.folder / "data")
        with quiet():
            tiny.checkpoint(self.folder / "clip", "clip", side=224, patch=32)
            tiny.text_to_image(self.folder / "generator")

    def run(self, method: str) -> dict[str, Any]:
        """Learn the stream, draw the report, export; the metrics."""
        place, words = self.folder / method, [f"model={self.folder / 'clip'}", *SMALL, *RUNS[method]]
        if method == "gift":
            drawn = [f"generator={self.folder / 'generator'}", *PAIRS]
            self.call("generate", self.folder / "pairs", "--stream", "mtil", *drawn)
            words += [*drawn, f"pairs={self.folder / 'pairs'}"]
        self.call("run", "--out", place, *words)
        self.call("report", place, "--out", place / "page.html")
        one = ["--task", "11"] if method == "condu" else []  # it keeps an expert a task
        self.call("export", place, place / "export", *one)
        return read_json(place / "metrics.json")

    def difference(self, method: str) -> float:
        """The largest difference between logits of plain transformers and of perdure, for pictures of the Pets' test side."""
        exported, task = self.folder / method / "export", mtil.load("OxfordPet", self.folder / "data")
        clip, asked = CLIP.load(str(exported)), task.test.at(224).pixels
        with torch.no_grad(), quiet():
            mine = clip.similarity(clip.encode_image(asked[:]), clip.encode_text(task.prompts()))
            pictures = [Image.open(path).convert("RGB") for path in asked.paths]
            theirs = tiny.plain_logits(exported, pictures, task.prompts())
        return (mine - theirs).abs().max().item()


def line(method: str, metrics: dict[str, Any], files: int, difference: float) -> str:
    figures = " | ".join(f"{metrics[name]:.1f}" for name in ("transfer", "average", "last"))
    return f"| `{method}` | {figures} | {metrics['seconds']:.0f} | {files} | {difference:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="keep everything in this new folder")
    keep = parser.parse_args().keep
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        proof = Proof((keep or Path(temporary)).resolve())
        proof.made()
        os.environ["PERDURE_DATA"] = str(proof.folder / "data")
        with trees.own_checksums(proof.folder / "data"):
            print(proof.call("data", "check", "--read"))
            print("| method | Transfer | Average | Last | seconds | files | largest difference of logits |")
            print("|---|---|---|---|---|---|---|")
            for method in RUNS:
                metrics = proof.run(method)
                assert metrics["finished"] and len(metrics["tasks"]) == 11, f"{method} is not finished"
                files = sum(path.is_file() for path in (proof.folder / method).rglob("*"))
                difference = proof.difference(method)
                print(line(method, metrics, files, difference), flush=True)
                assert difference < CLOSE, f"{method}: plain transformers sees or reads otherwise"


if __name__ == "__main__":
    main()
