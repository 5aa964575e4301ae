"""Divide the drawings between pre-training and the streams, and write what ships.

A family of drawings (all sets by one hand, one font, one block of handwriting) plays one role: pre-training, a stream's
train side, or a stream's test side. Then near twins (correlation > 0.97 of 16x16 thumbnails) of any drawing that ships
are removed from pre-training, and twins of a test drawing from the train side. The counts that prove it are printed and
written to ``counts.json``.

Writes sheets (PNG, 32 drawings a row) and manifests (JSON) into the package, ``pretrain.npz`` into the work folder.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from drawings import FAMILY_OF, SIZE, accepted_sets

TWIN = 0.97
PER_ROW = 32
CAP = {"train": 36, "test": 16}  # drawings a class
PER_SET = 3  # drawings of one class from one set
LEAST = {"class_incremental": (20, 8)}  # drawings a class, train and test; elsewhere (6, 4)
LETTER_CAP = {"train": 60, "test": 24}
Drawing = dict[str, Any]


@dataclass
class Side:
    """The drawings of one side of one task: class → (source, RGBA, keeps its own colours)."""

    classes: dict[str, list[tuple[str, np.ndarray, bool]]] = field(default_factory=dict)

    def all(self) -> list[np.ndarray]:
        return [rgba for rows in self.classes.values() for _, rgba, _ in rows]

    def drop(self, gone: np.ndarray) -> int:
        """Remove the drawings flagged in ``gone`` (in the order of ``all``)."""
        flags = iter(gone)
        self.classes = {c: [r for r in rows if not next(flags)] for c, rows in self.classes.items()}
        return int(gone.sum())


def generator(text: str) -> np.random.Generator:
    """A generator that depends on the name alone, so that no drawing's look depends on its neighbours."""
    return np.random.default_rng(zlib.crc32(text.encode()))


def composite(source: str, rgba: np.ndarray, palette: bool) -> np.ndarray:
    """(32, 32, 4) → (32, 32, 3) uint8, on colours drawn from the drawing's own name."""
    if source.startswith("digits:"):  # pen strokes: white on black, as such data sets come
        return np.repeat(rgba[..., 3:], 3, axis=-1)
    r = generator(source)
    if r.random() < 0.4:
        ink, paper = np.full(3, r.random() * 0.2), np.full(3, 1 - r.random() * 0.1)
        if not palette and r.random() < 0.3:
            ink, paper = paper, ink
    else:
        ink, paper = r.random(3), r.random(3)
        while abs(ink.mean() - paper.mean()) < 0.3:
            ink, paper = r.random(3), r.random(3)
        if palette:
            paper = 0.5 + 0.5 * paper
    alpha = rgba[..., 3:] / 255.0
    colour = rgba[..., :3] / 255.0 if palette else ink
    return (np.clip(colour * alpha + paper * (1 - alpha), 0, 1) * 255 + 0.5).astype(np.uint8)


def thumbnails(rgba: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 4) → (N, 256) float32, centred and of unit length: a product of two is their correlation."""
    ink = rgba[..., 3].astype(np.float32) * (1 - 0.5 * rgba[..., :3].mean(-1, dtype=np.float32) / 255)
    t = ink.reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(len(ink), -1)
    t -= t.mean(1, keepdims=True)
    return t / (np.linalg.norm(t, axis=1, keepdims=True) + 1e-6)


def has_twin(drawings: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of ``drawings`` (N, 32, 32, 4) have a near twin among ``others``."""
    reference = thumbnails(others).T.copy()
    blocks = np.array_split(np.arange(len(drawings)), max(1, len(drawings) // 4096))
    return np.concatenate([(thumbnails(drawings[b]) @ reference).max(1) > TWIN for b in blocks])


class Picker:
    """Draws, for a caption, the drawings of one role, spread over as many sets as there are."""

    def __init__(self, rows: list[Drawing], images: np.ndarray):
        self.images = images
        self.by: dict[tuple[str, str], list[Drawing]] = defaultdict(list)
        for row in rows:
            self.by[row["role"], row["caption"]].append(row)

    def pick(self, role: str, captions: list[str], cap: int) -> list[tuple[str, np.ndarray, bool]]:
        r = generator(f"{role} {captions[0]}")
        sets: dict[str, list[Drawing]] = defaultdict(list)
        for caption in captions:
            for row in self.by.get((role, caption), []):
                sets[row["set"]].append(row)
        queues = [[sets[s][i] for i in r.permutation(len(sets[s]))[:PER_SET]] for s in sorted(sets)]
        queues = [queues[i] for i in r.permutation(len(queues))]
        turns = [queue[k] for k in range(PER_SET) for queue in queues if len(queue) > k][:cap]
        return [(f"{row['set']}:{row['name']}", self.images[row["index"]], row["palette"]) for row in turns]


def letters(fonts: Path) -> tuple[Side, Side]:
    """Printed capital letters; every third font family is the test side."""
    sides = {"train": Side(), "test": Side()}
    families = sorted(p.name for p in fonts.iterdir() if p.is_dir())
    for number, family in enumerate(families):
        role = "test" if number % 3 == 0 else "train"
        styles = ["400-normal"] if role == "test" else ["400-normal", "700-normal", "400-italic"]
        for style in styles:
            path = fonts / family / "files" / f"{family}-latin-{style}.woff2"
            if not path.exists():
                continue
            for letter in "abcdefghijklmnopqrstuvwxyz":
                sides[role].classes.setdefault(letter, []).append(printed(path, f"font:{family}/{style}", letter))
    for role, side in sides.items():
        order = generator(f"letters {role}").permutation(len(side.classes["a"]))[: LETTER_CAP[role]]
        side.classes = {c: [rows[i] for i in order] for c, rows in side.classes.items()}
    return sides["train"], sides["test"]


def printed(path: Path, source: str, letter: str) -> tuple[str, np.ndarray, bool]:
    r = generator(source + letter)
    font = ImageFont.truetype(str(path), int(r.integers(22, 29)))
    image = Image.new("L", (SIZE, SIZE))
    left, top, right, bottom = font.getbbox(letter.upper())
    dx, dy = r.integers(-2, 3, 2)
    at = ((SIZE - left - right) / 2 + dx, (SIZE - top - bottom) / 2 + dy)
    ImageDraw.Draw(image).text(at, letter.upper(), fill=255, font=font)
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[..., 3] = np.asarray(image)
    return f"{source}/{letter}", rgba, False


def digits(names: list[str]) -> tuple[Side, Side]:
    """Handwritten digits (8x8, 17 grey levels, drawn out to 26x26); the file runs by writer, its end is the test side."""
    data = load_digits()
    train, test = Side({n: [] for n in names}), Side({n: [] for n in names})
    for index, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        small = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
        rgba[3:29, 3:29, 3] = np.asarray(small.resize((26, 26), Image.Resampling.BICUBIC))
        side = train if index < 1100 else test
        side.classes[names[label]].append((f"digits:{index}", rgba, False))
    return train, test


def sheet(rows: list[tuple[str, np.ndarray, bool]], path: Path) -> str:
    """Write the drawings as one picture, 32 a row; return its sha256."""
    tiles = np.full((-(-len(rows) // PER_ROW) * PER_ROW, SIZE, SIZE, 3), 255, np.uint8)
    for tile, row in zip(tiles, rows, strict=False):
        tile[:] = composite(*row)
    grid = tiles.reshape(-1, PER_ROW, SIZE, SIZE, 3).swapaxes(1, 2).reshape(-1, PER_ROW * SIZE, 3)
    Image.fromarray(grid).save(path, optimize=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe(side: Side, path: Path) -> dict[str, Any]:
    """Write one side's sheet; return its part of the manifest (drawings lie in the order of the classes)."""
    rows = [row for drawings in side.classes.values() for row in drawings]
    digest = sheet(rows, path)
    return {
        "sheet": path.name,
        "sha256": digest,
        "drawings": {c: [s for s, _, _ in d] for c, d in side.classes.items()},
    }


def build_sides(vocabulary: dict[str, Any], picker: Picker, fonts: Path) -> dict[str, tuple[Side, Side]]:
    """Every task's (train, test); the probe has a test side alone, drawn from both held-out roles."""
    out: dict[str, tuple[Side, Side]] = {}
    groups = {**vocabulary["domains"], "class_incremental": vocabulary["class_incremental"]}
    for name, group in groups.items():
        if name == "letters":
            out[name] = letters(fonts)
        elif name == "digits":
            out[name] = digits(list(group["classes"]))
        else:
            out[name] = tuple(  # type: ignore[assignment]
                Side({c: picker.pick(role, [c, *more], CAP[role]) for c, more in group["classes"].items()})
                for role in ("train", "test")
            )
    probe = {c: picker.pick("test", [c], 5) + picker.pick("train", [c], 3) for c in vocabulary["probe"]["classes"]}
    out["probe"] = (Side(), Side({c: rows for c, rows in probe.items() if len(rows) >= 4}))
    return out


def pretraining(
    rows: list[Drawing], images: np.ndarray, held: np.ndarray, brands: set[str], keep: set[str]
) -> dict[str, Any]:
    """The drawings pre-training may see, as arrays for ``pretrain.npz``."""
    groups: dict[tuple[str, str], list[Drawing]] = defaultdict(list)
    for row in rows:
        caption = row["caption"]
        if row["role"] != "pretrain" or not caption or (caption in brands and caption not in keep):
            continue
        if row["set"] in {"flag", "flagpack", "circle-flags", "cif"} or {"brand", "logo"} & set(row["name"].split("-")):
            continue
        groups[row["set"], spoken(caption)].append(row)
    chosen = []
    for (set_name, caption), drawings in sorted(groups.items()):
        order = generator(f"pretrain {set_name} {caption}").permutation(len(drawings))[:PER_SET]
        chosen += [(drawings[i]["index"], caption, drawings[i]["palette"]) for i in order]
    index, captions, palette = (np.array(column) for column in zip(*chosen, strict=True))
    twin = has_twin(images[index], held)
    print(f"pre-training: {len(index):,} drawings, {int(twin.sum()):,} near twins removed", flush=True)
    return {"index": index[~twin], "captions": captions[~twin], "palette": palette[~twin], "twins": int(twin.sum())}


def spoken(caption: str) -> str:
    """How pre-training names single characters: ``letter a``, ``number one``."""
    words = caption.split()
    if len(words) == 1 and len(caption) == 1 and caption.isalpha():
        return f"letter {caption}"
    if words[:1] == ["alphabet"] or words[:1] == ["alpha"]:
        return " ".join(["letter", *words[1:]])
    if words[0] in {"numeric", "digit"}:
        return " ".join(["number", *words[1:]])
    return caption


def credits(
    package: Path, roles: dict[str, str], fonts: Path, used: Counter[str], pretrained: Counter[str]
) -> dict[str, Any]:
    """Source, author, licence and role of everything that ships or that pre-training saw."""
    sets = {
        name: {
            "title": info["name"], "author": info["author"]["name"], "url": info["author"].get("url"),
            "licence": info["license"]["spdx"], "licence_url": info["license"].get("url"), "version": info.get("version"),
            "family": FAMILY_OF.get(name, name), "role": roles[name], "drawings_shipped": used[name],
            "drawings_in_pretraining": pretrained[name],
        }
        for name, info in accepted_sets(package).items()
        if used[name] or pretrained[name]
    }  # fmt: skip
    types = {}
    for number, folder in enumerate(sorted(p for p in fonts.iterdir() if p.is_dir())):
        about = json.loads((folder / "package.json").read_text())
        types[folder.name] = {
            "package": f"{about['name']}@{about['version']}", "licence": about["license"],
            "notice": (folder / "LICENSE").read_text().splitlines()[0], "role": "test" if number % 3 == 0 else "train",
        }  # fmt: skip
    return {
        "drawings": "npm @iconify/json 2.2.535; each set under its own licence, below; rendered to 32x32, recoloured",
        "sets": sets,
        "fonts": types,
        "digits": {
            "title": "Optical Recognition of Handwritten Digits, as scikit-learn's load_digits carries it",
            "author": "E. Alpaydin, C. Kaynak; UCI Machine Learning Repository", "licence": "CC-BY-4.0",
            "url": "https://archive.ics.uci.edu/dataset/80", "changes": "drawn out from 8x8 to 26x26 and framed to 32x32",
        },
    }  # fmt: skip


def licences(sources: dict[str, Any]) -> str:
    """The sources as a page for people."""
    sets = sorted(sources["sets"].items(), key=lambda item: (item[1]["licence"], item[0]))
    digits = sources["digits"]
    lines = [
        "# Sources and licences of the small world",
        "",
        "The drawings were rendered to 32x32 pixels; those of one colour were given random colours. The CLIP in `clip/`",
        "and the text-to-image model in `generator/` were trained on drawings of the sets marked *pretrain*. Perdure's",
        "authors claim no right in the drawings: each stays",
        "under its own licence, with thanks to its authors.",
        "",
        "## Icon sets (npm package @iconify/json 2.2.535)",
        "",
        "| set | author | licence | role | drawings shipped | in the pre-training pool |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in sets:
        author = f"[{s['author']}]({s['url']})" if s["url"] else s["author"]
        licence = f"[{s['licence']}]({s['licence_url']})" if s["licence_url"] else s["licence"]
        shipped, seen = s["drawings_shipped"] or "", s["drawings_in_pretraining"] or ""
        lines.append(f"| {s['title']} (`{name}`) | {author} | {licence} | {s['role']} | {shipped} | {seen} |")
    lines += ["", "## Fonts (printed letters)", "", "| package | licence | notice | role |", "|---|---|---|---|"]
    lines += [f"| {f['package']} | {f['licence']} | {f['notice']} | {f['role']} |" for f in sources["fonts"].values()]
    lines += ["", "## Handwritten digits", ""]
    lines += [f"{digits['title']}; {digits['author']}; {digits['licence']}; {digits['url']}; {digits['changes']}.", ""]
    return "\n".join(lines)


def remove_twins(sides: dict[str, tuple[Side, Side]]) -> dict[str, int]:
    """Train drawings that are near twins of any test drawing of any task go."""
    tests = np.stack([d for _, test in sides.values() for d in test.all()])
    return {
        name: train.drop(has_twin(np.stack(train.all()), tests)) for name, (train, _) in sides.items() if train.classes
    }


def prune(side_pair: tuple[Side, Side], least: tuple[int, int]) -> list[str]:
    """Drop the classes left with too few drawings on either side."""
    train, test = side_pair
    few = [c for c in test.classes if len(train.classes[c]) < least[0] or len(test.classes[c]) < least[1]]
    for c in few:
        del train.classes[c], test.classes[c]
    return few


def main(package: Path, fonts: Path, work: Path, assets: Path) -> None:
    vocabulary = json.loads((Path(__file__).parent / "vocabulary.json").read_text())
    images = np.load(work / "drawings.npy", mmap_mode="r")
    rows = cast(work, vocabulary["families"])
    sides = build_sides(vocabulary, Picker(rows, images), fonts)
    twins = remove_twins(sides)
    pruned = {n: prune(pair, LEAST.get(n, (6, 4))) for n, pair in sides.items() if pair[0].classes}
    steps = vocabulary["class_incremental"]["steps"]
    pruned["class_incremental"] += even_steps(sides["class_incremental"], steps)
    held = np.stack([d for pair in sides.values() for side in pair for d in side.all()])
    pre = pretraining(rows, images, held, brand_names(package), asked_for(vocabulary))
    for name, group in vocabulary["domains"].items():
        for known in group.get("left_out", []):  # held out like the others, but too easy to be asked
            for side in sides[name]:
                side.classes.pop(known, None)
    write(vocabulary, sides, assets)
    used = Counter(
        s.split(":")[0] for pair in sides.values() for side in pair for d in side.classes.values() for s, *_ in d
    )
    pretrained = Counter(rows[i]["set"] for i in pre["index"])
    sources = credits(package, {row["set"]: row["role"] for row in rows}, fonts, used, pretrained)
    dump(sources, assets / "SOURCES.json")
    (assets / "LICENCES.md").write_text(licences(sources))
    counts = count(sides, twins, pruned, pre, rows)
    dump(counts, assets / "counts.json")
    print(json.dumps(counts, indent=1))
    beside = work / "pretrain.writing.npz"
    np.savez(beside, images=images[pre["index"]], captions=pre["captions"], palette=pre["palette"])
    beside.rename(work / "pretrain.npz")  # last: its presence says that the world is built


def cast(work: Path, families: dict[str, list[str]]) -> list[Drawing]:
    """The drawings' rows, each with its number and the role of its family."""
    rows = [json.loads(line) for line in (work / "drawings.jsonl").read_text().splitlines()]
    role_of = {family: role for role, names in families.items() for family in names}
    for index, row in enumerate(rows):
        row.update(index=index, role=role_of.get(row["family"], "pretrain"))
    return rows


def even_steps(pair: tuple[Side, Side], steps: int) -> list[str]:
    """Drop the last classes, so that every step has as many; return their names."""
    names = list(pair[1].classes)
    extra = names[len(names) // steps * steps :]
    for name in extra:
        for side in pair:
            del side.classes[name]
    return extra


def asked_for(vocabulary: dict[str, Any]) -> set[str]:
    """Every caption that a stream or the probe uses."""
    captions = {c for g in vocabulary["domains"].values() for k, v in g["classes"].items() for c in [k, *v]}
    return captions | set(vocabulary["class_incremental"]["classes"]) | set(vocabulary["probe"]["classes"])


def brand_names(package: Path) -> set[str]:
    """The names in the logo sets: what is called so elsewhere is taken for a logo too."""
    sets = ("simple-icons", "logos", "fa7-brands", "bxl", "cib", "devicon")
    read = ((package / "json" / f"{s}.json").read_text() for s in sets)
    return {name.replace("-", " ") for text in read for name in json.loads(text)["icons"]}


def write(vocabulary: dict[str, Any], sides: dict[str, tuple[Side, Side]], assets: Path) -> None:
    """The sheets and the three manifests."""
    assets.mkdir(parents=True, exist_ok=True)
    domains = {}
    for name, group in sorted(vocabulary["domains"].items()):
        train, test = sides[name]
        domains[name] = {
            "templates": group["templates"],
            "train": describe(train, assets / f"{name}_train.png"),
            "test": describe(test, assets / f"{name}_test.png"),
        }
    alphabetical = sorted(domains)
    drawn = [alphabetical[i] for i in generator("order II").permutation(len(alphabetical))]
    dump({"orders": {"I": alphabetical, "II": drawn}, "domains": domains}, assets / "multi_domain.json")
    train, test = sides["class_incremental"]
    order = [list(test.classes)[i] for i in generator("class order").permutation(len(test.classes))]
    group = vocabulary["class_incremental"]
    dump(
        {
            "steps": group["steps"], "order": order, "templates": group["templates"],
            "train": describe(train, assets / "class_incremental_train.png"),
            "test": describe(test, assets / "class_incremental_test.png"),
        },
        assets / "class_incremental.json",
    )  # fmt: skip
    probe = describe(sides["probe"][1], assets / "probe.png")
    dump({"templates": vocabulary["probe"]["templates"], "test": probe}, assets / "probe.json")


def count(
    sides: dict[str, tuple[Side, Side]],
    twins: dict[str, int],
    pruned: dict[str, list[str]],
    pre: dict[str, Any],
    rows: list[Drawing],
) -> dict[str, Any]:
    """The numbers that prove what the docstring promises."""
    families = used_families(sides, pre, rows)
    crossing = sorted(f for a in families for b in families if a < b for f in families[a] & families[b])
    tests = np.stack([d for _, test in sides.values() for d in test.all()])
    trains = np.stack([d for train, _ in sides.values() for d in train.all()])
    tasks = {
        name: {
            "classes": len(test.classes), "train": len(train.all()), "test": len(test.all()),
            "train_a_class": round(len(train.all()) / len(test.classes), 1),
            "test_a_class": round(len(test.all()) / len(test.classes), 1),
            "fewest_train": min((len(d) for d in train.classes.values()), default=0),
            "fewest_test": min(len(d) for d in test.classes.values()),
            "train_twins_removed": twins.get(name, 0), "classes_dropped": pruned.get(name, []),
        }
        for name, (train, test) in sides.items()
    }  # fmt: skip
    return {
        "families": {role: len(f) for role, f in sorted(families.items())},
        "families_in_two_roles": crossing,
        "tasks": tasks,
        "pretraining": {"drawings": len(pre["index"]), "captions": len(set(pre["captions"])), "twins_removed": pre["twins"]},
        "twins_left_between_train_and_test": int(has_twin(trains, tests).sum()),
    }  # fmt: skip


def used_families(sides: dict[str, tuple[Side, Side]], pre: dict[str, Any], rows: list[Drawing]) -> dict[str, set[str]]:
    """The families of the drawings that each role really uses; the probe's, which come from both sides, left out."""
    family_of = {row["set"]: row["family"] for row in rows}
    out: dict[str, set[str]] = {"pretrain": {rows[i]["family"] for i in pre["index"]}, "train": set(), "test": set()}
    for name, pair in sides.items():
        if name in ("probe", "digits"):
            continue
        for role, side in zip(("train", "test"), pair, strict=True):
            for source in (s for drawings in side.classes.values() for s, _, _ in drawings):
                maker = source.split("/")[0] if source.startswith("font:") else source.split(":")[0]
                out[role].add(family_of.get(maker, maker))
    return out


def dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")
