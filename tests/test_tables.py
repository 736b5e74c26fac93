"""The tables on a model of a few thousand weights: they run, and nothing is made twice."""

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "compression"))
from tiny_pairs import copy_of, make_pair, rewrite, weights_of

from deltacome import Adaptive, BitDelta, DeltaCome, LowRank, PrinMix

ROOT = Path(__file__).parents[1]
ROWS = [
    ("low rank", LowRank(), 4.0),
    ("BitDelta", BitDelta(distill=2), None),
    ("Delta-CoMe", DeltaCome(), 4.0),
    ("PrinMix", PrinMix(), 4.0),
]
VLM = ("adaptive", Adaptive(distill=2), 4.0)
FOLDERS = [ROOT / "benchmarks" / "tables", ROOT / "examples" / "tenants"]
MODULES = [file.stem for folder in FOLDERS for file in folder.glob("*.py")]


@pytest.fixture(scope="module")
def tables():
    """Modules of the tables under their own names, as their scripts import them."""
    patch = pytest.MonkeyPatch()
    for name in MODULES:
        patch.delitem(sys.modules, name, raising=False)
    for folder in FOLDERS:
        patch.syspath_prepend(str(folder))
    importlib.import_module("lab")
    rows = importlib.import_module("rows")
    patch.setattr(rows, "RATIO", 4.0)
    patch.setattr(rows, "main_rows", lambda size: ROWS)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)
    patch.undo()


@pytest.fixture(scope="module")
def lab(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    base, tuned = make_pair("small", folder)
    held = [
        {"prompt": f"one plus {word}", "answer": word} for word in ["two", "three", "four", "five"]
    ]
    (tuned / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    said = {"steps": 2, "seed": 0, "batch": 2}
    (tuned / "training.json").write_text(json.dumps(said))
    module = tables("lab")
    size = module.Size(
        tasks=("tiny",), side=("tiny",), questions=4, kl_questions=3, rows=4, row_tokens=16,
        steps=2, distill=2, fit=2, seeds=(0, 1), ratios=(4, 5),
    )  # fmt: skip
    return module.Lab(base, folder / "work", size, {"tiny": tuned})


NAMES = ("t2", "t3", "t5", "t6", "t8", "t9", "t10", "t11")
NAMES += ("goals", "vlm", "case", "ablation", "unseen", "texts", "longer", "known", "rates")


@pytest.mark.parametrize("name", NAMES)
def test_a_table(tables, lab, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "t2":
        monkeypatch.setattr(tables(name), "STRATEGIES", {"single": "2:*", "double": "8:2,2:*"})
    if name == "t5":
        monkeypatch.setattr(tables(name), "BASE", lab.base.name)
        monkeypatch.setitem(lab.given, f"{lab.base.name}-tiny", lab.given["tiny"])
    if name == "t9":
        monkeypatch.setattr("deltacome.compression.search.WIDTHS", (8,))
        monkeypatch.setattr("deltacome.compression.search.GENERATIONS", 1)
    if name == "unseen":
        monkeypatch.setattr(tables(name), "MARKS", ("four",))
    if name in ("longer", "known"):
        longer = _farther(lab.base, lab.given["tiny"], tmp_path / "longer")
        monkeypatch.setitem(lab.given, "tiny-longer", longer)
    if name in ("ablation", "unseen", "texts", "longer"):
        monkeypatch.setattr(tables(name), "RATIO", 4.0)
    if name == "texts":
        monkeypatch.setattr(tables(name), "ROWS", 3)
        monkeypatch.setattr(tables(name), "ROW_TOKENS", 8)
    if name == "goals":
        ratios = {"THEIRS": 4.0, "HALF": 4.5, "QUARTER": 5.0}
        for which, ratio in ratios.items():
            monkeypatch.setattr(tables(name), which, ratio)
    if name == "vlm":
        small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        monkeypatch.setattr(tables(name), "TOWER", {**small, "num_hidden_layers": 1})
        monkeypatch.setattr(tables(name), "ROWS", [("low rank", LowRank(), 3.0), *ROWS[1:3], VLM])
    text = tables(name).make(lab)
    assert text.startswith("## ")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert name == "case" or len(table) > 3
    assert len({line.count("|") for line in table[:2]}) <= 1
    if name == "t11":
        assert (tmp_path / tables(name).PICTURES / "curve_tiny_4.png").stat().st_size > 10_000
        assert "adaptive less Delta-CoMe at 1/4: " in text
    if name == "goals":
        assert sum(line.startswith("| Delta-CoMe, 1/4, draw 1") for line in table) == 1
        assert "adaptive at 1/4.5 less Delta-CoMe at 1/4, mean of 2 draws: " in text
    if name == "texts":
        kls = [line.split("|")[-3] for line in table[2:]]
        assert len(set(kls)) == 7, kls  # each text gives another delta
    if name == "longer":
        half = len(table) // 2
        short, long = (
            float(row.split("|")[-3].split("±")[0]) for row in (table[2], table[half + 1])
        )
        assert long > short  # the base is farther from a model that was trained longer
        assert sum("the delta of" in line for line in text.splitlines()) == 2
    if name == "known":
        assert "A training of 8 steps. Questions: " in text
        assert len(table) == 7
    # Once more: everything is kept, so nothing is compressed, trained or measured.
    monkeypatch.setattr("deltacome.compress", None)
    monkeypatch.setattr(tables("lab"), "generate", None)
    assert tables(name).make(lab) == text


def _farther(base: Path, tuned: Path, to: Path) -> Path:
    """A fine-tune whose delta is twice that of another."""
    of_base, of_tuned = weights_of(base), weights_of(tuned)
    rewrite(copy_of(tuned, to), {name: 2 * w - of_base[name] for name, w in of_tuned.items()})
    return to


def test_runtime_and_dense_weights_agree(lab):
    for _, method, ratio in ROWS:
        cell = lab.cell("tiny", method, ratio)
        assert 0 <= cell["score_low"] <= cell["score"] <= cell["score_high"] <= 1
        assert cell["kl_task"] > 0
        assert len(cell["answers"]) == 4
    compared = {name.split()[0] for name in lab.agreement}
    assert compared >= {"low-rank", "bitdelta", "delta-come", "prinmix"}
    assert all(value < 1e-4 for value in lab.agreement.values())


def test_other_weights_are_another_cell(tables, lab, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(lab.tenant("tiny"), other)
    again = tables("lab").Lab(lab.base, lab.work, lab.size, {"tiny": other})
    method = DeltaCome()
    assert again.artifact("tiny", method, 4.0).path == lab.artifact("tiny", method, 4.0).path
    assert lab.artifact("tiny", method, 5.0).path != lab.artifact("tiny", method, 4.0).path
    seeds = [lab.artifact("tiny", method, 4.0, seed).path for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_of_a_table_that_was_cut_off_the_cells_that_are_there(tables, lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve = tables("t11")
    monkeypatch.setattr(curve, "curves", lambda size: [("Delta-CoMe", DeltaCome())])
    lab.cell("tiny", DeltaCome(), 4.0)
    size = replace(lab.size, ratios=(4, 7))
    part = tables("lab").Lab(lab.base, lab.work, size, lab.given, only_kept=True)
    rows = [line for line in curve.make(part).splitlines() if line.startswith("| Delta-CoMe")]
    assert len(rows) == 1


def test_sections_stay_in_order(tables, tmp_path):
    run, report = tables("run"), tmp_path / "tables.md"
    for name in ("T11", "T2", "Case study", "T3"):
        run._replace_section(report, f"## {name}: x\n\nfirst\n")
    run._replace_section(report, "## T2: x\n\nsecond\n")
    titles = [line for line in report.read_text().splitlines() if line.startswith("## ")]
    assert titles == ["## T2: x", "## T3: x", "## T11: x", "## Case study: x"]
    assert report.read_text().count("second") == 1
