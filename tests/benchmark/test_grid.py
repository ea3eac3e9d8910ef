"""A grid's file, its cells, and its runs on this machine; SLURM is in test_slurm.py."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import attack
import defense
from analysis.inspect import Config as Inspection
from attack.badnet import Config
from benchmark import run, workers
from benchmark.cells import Cell, config_class
from benchmark.checks import cells_of
from benchmark.grid import read_grid
from benchmark.narrow import build as narrow_network
from defense.sau import Config as SAU
from models.preactresnet import preactresnet18
from utils.errors import UserError
from utils.files import ROOT
from utils.plain import as_yaml, parse_yaml
from utils.records.places import CLEAN

GRIDS = sorted((ROOT / "benchmark/grids").glob("*.yaml"))
DEFENSES = "defenses:\n  ft:\n  sau_x: {script: sau, adv_steps: 1}"
TEXT = f"""
datasets: [digits]
models: [preactresnet18]
attacks:
  badnet:
  fixed: {{script: badnet, pratio: 0.2}}
  prototype:
pratios: [0.1, 0.05]
{DEFENSES}
seeds: [0, 3]
attack_flags: {{epochs: 2}}
"""


def grid_of(text: str, tmp_path: Path) -> list[Cell]:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return cells_of(read_grid(path), tmp_path / "records")


def test_every_combination_is_a_cell_and_defenses_follow_their_attack(tmp_path: Path) -> None:
    """badnet with two ratios, fixed and prototype without that axis: 4 records per seed, 3 cells
    each, two seeds."""
    cells = grid_of(TEXT, tmp_path)
    assert len(cells) == 24
    assert [cell.name for cell in cells[:3]] == [
        "digits-preactresnet18-badnet-p0.1-s0",
        "digits-preactresnet18-badnet-p0.1-s0/ft",
        "digits-preactresnet18-badnet-p0.1-s0/sau_x",
    ]
    attack, _, sau = cells[:3]
    assert sau.attack is attack
    assert (attack.script, sau.script) == ("attack/badnet.py", "defense/sau.py")
    assert sau.folder == attack.folder / "defense/sau_x"
    by_name = {cell.name: cell.flags for cell in cells}
    assert by_name["digits-preactresnet18-badnet-p0.05-s3"]["pratio"] == 0.05
    assert by_name["digits-preactresnet18-fixed-s3"]["pratio"] == 0.2
    assert "pratio" not in by_name["digits-preactresnet18-prototype-s0"]
    assert all(
        flags["random_seed"] == int(name[-1]) for name, flags in by_name.items() if "/" not in name
    )


def test_arguments_are_what_a_user_would_type(tmp_path: Path) -> None:
    cell = grid_of(TEXT, tmp_path)[2]
    assert cell.arguments() == [
        "--adv_steps=1",
        f"--record_path={tmp_path / 'records'}",
        "--random_seed=0",
        "--result_file=digits-preactresnet18-badnet-p0.1-s0",
        "--save_folder_name=sau_x",
        "--resume=true",
    ]


def test_a_value_that_begins_like_a_flag_stays_a_value(tmp_path: Path) -> None:
    text = TEXT.replace("  badnet:\n", '  badnet: {attack_target: "-dash"}\n')
    (first, *_) = grid_of(text, tmp_path)
    assert "--attack_target=-dash" in first.arguments()
    config = Config.from_command_line(first.arguments(), "")
    assert config.attack_target == "-dash"


def test_an_analysis_without_defenses_takes_its_arguments(tmp_path: Path) -> None:
    """An empty list is an empty value."""
    text = TEXT.replace(DEFENSES, "analyses:\n  inspect:")
    cell = next(c for c in grid_of(text, tmp_path) if c.script == "analysis/inspect.py")
    assert "--defenses=" in cell.arguments()
    assert Inspection.from_command_line(cell.arguments(), "").defenses == ()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  ft:\n", "  before: {script: ft}\n", "s0/before: before is what tables call the model"),
        ("  fixed:", f"  {'f' * 195}:", "has 220 letters; give at most 200"),
        ("  ft:\n", "  ft: {index: nowhere.txt}\n", "--index: nowhere.txt is not there"),
    ],
)
def test_what_scripts_would_refuse_is_refused_first(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        grid_of(TEXT.replace(before, after), tmp_path)


def test_a_target_may_be_given_by_its_name(tmp_path: Path) -> None:
    """config.yaml has its label, and summary.json has its name."""
    text = TEXT.replace("  badnet:\n", "  badnet: {attack_target: apfel}\n")
    (cell, *_) = grid_of(text, tmp_path)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text("attack_target: 3\nepochs: 2\n")
    (cell.folder / "summary.json").write_text('{"attack_target_name": "apfel"}')
    assert grid_of(text, tmp_path)[0].is_done
    with pytest.raises(UserError, match="was made with attack_target 3, not birne"):
        grid_of(text.replace("apfel", "birne"), tmp_path)


def test_analyses_come_last_with_clean_models_as_controls(tmp_path: Path) -> None:
    """Of two attacked and two clean models; path needs no trigger, but a defense."""
    text = TEXT.replace("pratios: [0.1, 0.05]\n", "").replace(
        "seeds", "analyses: {path, retune, mine: {script: inspect}}\nseeds"
    )
    text = text.replace("{path, retune, mine: {", "{path: {t_steps: 5}, retune: , mine: {")
    cells = grid_of(text, tmp_path)
    names = [cell.name for cell in cells]
    first = names.index("digits-preactresnet18-badnet-s0/analysis/path")
    assert all("/analysis/" in name for name in names[first:])
    assert not any("/analysis/" in name for name in names[:first])
    assert sum("/analysis/path" in name for name in names) == 6
    assert sum("/analysis/retune" in name for name in names) == 4  # none of the clean models
    by_name = dict(zip(names, cells, strict=True))
    retune = by_name["digits-preactresnet18-badnet-s3/analysis/retune"]
    assert retune.script == "analysis/retune.py"
    assert retune.flags["clean_record"] == "digits-preactresnet18-prototype-s3"
    record = "digits-preactresnet18-badnet-s3"
    assert {cell.name for cell in retune.needed} == {
        *(record, f"{record}/ft", f"{record}/sau_x"),
        "digits-preactresnet18-prototype-s3",
    }
    mine = by_name["digits-preactresnet18-prototype-s0/analysis/mine"]
    assert mine.flags["clean_records"] == ["digits-preactresnet18-prototype-s3"]
    assert mine.folder == tmp_path / "records/digits-preactresnet18-prototype-s0/analysis/mine"
    arguments = by_name["digits-preactresnet18-fixed-s0/analysis/path"].arguments()
    assert arguments[0] == "--t_steps=5"
    assert "--defenses=ft,sau_x" in arguments
    seeds = [by_name[f"digits-preactresnet18-badnet-s{seed}/analysis/retune"] for seed in (0, 3)]
    assert seeds[0].kind == seeds[1].kind  # so that what one takes foretells the other


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{epochs: 2}", "{pratio: 0.2}", "attack_flags: pratio is an axis of the grid; leave one"),
        ("{epochs: 2}", "{model: tiny}", "attack_flags: model is an axis of the grid; give it in"),
        ("[digits]", "{digits: {pratio: 0.2}}", "datasets.digits: pratio is an axis of the grid"),
        ("pratio: 0.2}", "dataset: random}", "attacks.fixed: dataset is an axis of the grid; giv"),
    ],
)
def test_a_flag_says_nothing_else_than_an_axis(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    """The axis is in the record's name."""
    with pytest.raises(UserError, match=message):
        grid_of(TEXT.replace(old, new), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0.1, 0.05]", "[0.1, 0.10000001]", "badnet-p0.1-s0: 2 cells of the grid have this name"),
        (
            "[preactresnet18]",
            "[tiny, preactresnet18]\nanalyses: {path: {defenses: [ft]}}",
            "analyses.path: defenses is set by the grid itself",
        ),
        ("script: sau,", "script: ../attack/badnet,", "../attack/badnet.py: there is no such scri"),
    ],
)
def test_what_a_grid_cannot_tell_apart_or_take_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        grid_of(TEXT.replace(old, new), tmp_path)


def test_a_file_in_the_place_of_the_records_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "grid.yaml").write_text(TEXT)
    flags = ["run.py", str(tmp_path / "grid.yaml"), "--record_path", str(tmp_path / "taken")]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(UserError, match=r"--record_path: .*taken cannot be made"):
        run.main()


def test_what_a_defense_sees_also_comes_from_common_flags(tmp_path: Path) -> None:
    """EP with clean images can be run on a clean model."""
    for given in ("{ep: {data: clean}}", "[ep]\ndefense_flags: {data: clean}"):
        cells = grid_of(TEXT.replace(DEFENSES, f"defenses: {given}"), tmp_path)
        assert "digits-preactresnet18-prototype-s0/ep" in [cell.name for cell in cells]


def test_an_analysis_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    text = TEXT.replace("seeds", "analyses: {paths: , retune: {k: 3}}\nseeds")
    with pytest.raises(UserError) as caught:
        grid_of(text, tmp_path)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "analysis/paths.py: there is no such script",
        "analysis/retune.py: k: unknown name",
    ]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_shipped_grids_name_flags_that_exist(path: Path, tmp_path: Path) -> None:
    assert cells_of(read_grid(path), tmp_path, is_run=False)


@pytest.mark.parametrize("size", [16, 33])
def test_the_narrow_network_is_the_wide_one_with_a_quarter_of_its_channels(size: int) -> None:
    narrow, wide = narrow_network(10, size).state_dict(), preactresnet18(10).state_dict()
    assert list(narrow) == list(wide)
    for name, value in narrow.items():
        quarters = [
            n // 4 if n >= 64 else n  # the image's channels, a kernel's sides and the classes stay
            for n in wide[name].shape
        ]
        assert list(value.shape) == quarters, name
    assert narrow_network(10, size)(torch.rand(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", ["digits", "leaderboard"])
def test_a_grid_has_every_attack_and_every_defense(name: str, tmp_path: Path) -> None:
    grid = read_grid(ROOT / f"benchmark/grids/{name}.yaml")
    scripts = {cell.script for cell in cells_of(grid, tmp_path)}
    assert scripts - {f"analysis/{name}.py" for name in grid.analyses} == {
        *(f"attack/{name}.py" for name in [*attack.names(), "prototype"]),
        *(f"defense/{name}.py" for name in defense.names()),
    }


def test_a_clean_model_is_not_given_to_what_looks_at_poison(tmp_path: Path) -> None:
    """EP by its usual flags needs a poisoned set; its control on clean images does not."""
    grid = read_grid(ROOT / "benchmark/grids/digits.yaml")
    names = {cell.name for cell in cells_of(grid, tmp_path)}
    clean = "digits-preactresnet18-prototype-s0"
    assert f"{clean}/ep_clean" in names
    assert f"{clean}/ep" not in names
    assert "digits-preactresnet18-badnet-s0/ep" in names


def test_flags_for_all_defenses_reach_those_that_take_them(tmp_path: Path) -> None:
    """CLP sees no images, so that it has no ratio; a flag that nobody takes is refused."""
    path = tmp_path / "x.yaml"
    text = "datasets: [digits]\nmodels: [preactresnet18]\nattacks: [badnet]\nseeds: [0]\n"
    path.write_text(text + "defenses: [clp, ft]\ndefense_flags: {ratio: 0.2}\n")
    cells = {cell.name.rpartition("/")[2]: cell for cell in cells_of(read_grid(path), tmp_path)}
    assert cells["ft"].flags["ratio"] == 0.2
    assert "ratio" not in cells["clp"].flags
    path.write_text(text + "defenses: [clp, ft]\ndefense_flags: {raito: 0.2}\n")
    with pytest.raises(UserError, match=r"defense_flags: raito: no defense .* mean ratio"):
        cells_of(read_grid(path), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 3]", "", "seeds: is missing; give a list of whole numbers"),
        (
            "seeds: [0, 3]",
            "seeds: [-1]",
            r"seeds\.0: -1 is not allowed; give a whole number from 0",
        ),
        ("[0, 3]", "[010]", r"seeds\.0: '010' is not allowed; .*or a zero in front"),
        ("[0, 3]", "[1:30]", r"seeds\.0: '1:30' is not allowed; give a whole number"),
        (
            "[0.1, 0.05]",
            "[0.1, 0.0_5]",
            r"pratios\.1: '0.0_5' is not allowed; give a finite number",
        ),
        ("epochs: 2", "epochs: 1:30", r"epochs: 1:30 is not allowed; give int >= 1"),
        (
            "attack_flags:",
            "slurm: {mem_gb: .inf}\nattack_flags:",
            r"slurm.mem_gb: inf is not allowed; give a finite number: float in \(0, ",
        ),
        ("models:", "modles:", r"modles: unknown name \(did you mean models\?\); give datasets, "),
        ("models:", "foo: 1\nmodels:", r"foo: unknown name; give datasets, models, attacks, "),
        ("  badnet:", "  ../x:", r"attacks: '\.\./x' is no name; give letters, digits, _ \. \+ -"),
        ("  badnet:", "  1:", r"attacks: 1 is no name; give .* quotes around a number"),
        ("  badnet:", "  badnet: {script: null}", "script: None is not allowed; give the name of"),
        (
            "attack_flags:",
            "slurm: {partitoin: a}\nattack_flags:",
            r"slurm.partitoin: unknown name \(did you mean partition\?\); give partition, ",
        ),
        (
            "attack_flags:",
            "slurm: {directives: {time: '1:00'}}\nattack_flags:",
            "slurm.directives: time is not allowed; give timeout_min in slurm",
        ),
        (
            "attack_flags:",
            "slurm: {directives: {cpus-per-task: 2}}\nattack_flags:",
            "slurm.directives: cpus-per-task is not allowed; give cpus_per_task in slurm",
        ),
        (
            "attack_flags:",
            "slurm: {directives: {requeue: false}}\nattack_flags:",
            "slurm.directives: requeue is set by the grid itself; remove it",
        ),
        (
            "attack_flags:",
            "slurm: {directives: {'bad key!': 3}}\nattack_flags:",
            "slurm.directives: 'bad key!' is no option of sbatch; give one like nice",
        ),
        (
            "attack_flags:",
            'slurm: {directives: {comment: "a\\nb"}}\nattack_flags:',
            "slurm.directives: comment: .* is not allowed; give a text in one line",
        ),
        ("epochs: 2", "epochs: 0", r"attack/badnet.py: epochs: 0 is not allowed"),
        (
            "epochs: 2",
            "epohcs: 2",
            r"attack/badnet.py: epohcs: unknown name \(did you mean epochs",
        ),
        (
            "script: sau",
            "script: soa",
            r"defense/soa.py: there is no such script; defense has anp, bnp, .*, sau",
        ),
        (
            "epochs: 2",
            "random_seed: 2",
            "attack_flags: .*random_seed is set by the grid itself; remove it",
        ),
        ("adv_steps: 1", "adv_steps: [1]", r"defense/sau.py: adv_steps: \[1\] is not allowed"),
        ("adv_steps: 1", "adv_steps: [[1]]", r"defenses\.sau_x\.adv_steps"),
        (
            DEFENSES,
            "defenses: [ft: {lr: 0.1}]",
            "leave out the dashes",
        ),
        (
            DEFENSES,
            "defenses: ft",
            "give names in a list",
        ),
        (
            DEFENSES,
            "defenses: [ft, ft]",
            "ft is there twice; give it once",
        ),
        ("[0, 3]", "[0, 3, 0]", "seeds: .*0 is there twice; give it once"),
        (
            "[0, 3]",
            "[0, 4294967296]",
            r"seeds\.1: 4294967296 is not allowed; .* from 0 to 4294967295",
        ),
        ("[preactresnet18]", "[resnet181]", r"attack/badnet.py: --model: resnet181 is unknown"),
        ("[preactresnet18]", "['no.py:build']", r"attack/badnet.py: --model: no.py cannot be read"),
        ("[0.1, 0.05]", "[0.1, 0.1]", "pratios: .*0.1 is there twice"),
        ("[preactresnet18]", "[vgg19_bn, vgg19_bn]", "models: .*vgg19_bn is there twice"),
        (
            "attack_flags:",
            "slurm: {array: true, cells_per_job: 2}\nattack_flags:",
            r"slurm: .*array: true needs cells_per_job: 1",
        ),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TEXT
    with pytest.raises(UserError, match=message):
        grid_of(TEXT.replace(old, new, 1), tmp_path)


def test_each_mistake_of_a_grid_has_one_line(tmp_path: Path) -> None:
    """Whatever types a value might have had."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        "datasets: ['..', 1]\nmodels: []\nattacks: {badnet: {epochs: {a: 1}, lr: [[1]]}}\n"
        "seeds: ['0']\nattack_flags: {x: 2020-01-01}\ndefenses: 3\nslurm: {array: 'yes'}\n"
    )
    with pytest.raises(UserError) as error:
        read_grid(path)
    name = "give letters, digits, _ . + - with a letter, a digit or _ first, and quotes around a"
    flag = "is not allowed; give true, false, a number, a text, null, or a list of these"
    assert error.value.problems == (
        f"{path}: datasets: '..' is no name; {name} number",
        f"{path}: datasets: 1 is no name; {name} number",
        f"{path}: models: [] is not allowed; give a list of networks, one or more",
        f"{path}: attacks.badnet.epochs: {{'a': 1}} {flag}",
        f"{path}: attacks.badnet.lr: [[1]] {flag}",
        f"{path}: defenses: 3 is not allowed; give names in a list, or names with flags",
        f"{path}: seeds.0: '0' is not allowed; give a whole number from 0 to 4294967295, without "
        "quotes or a zero in front",
        f"{path}: slurm.array: 'yes' is not allowed; give true or false",
    )


def test_of_many_mistakes_the_first_ones_are_said(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("".join(f"k{number}: 1\n" for number in range(100)))
    with pytest.raises(UserError) as error:
        read_grid(path)
    said = error.value.problems
    assert len(said) == 21
    assert str(said[-1]).startswith(f"{path}: and ")
    assert len(str(error.value)) < 10_000


def test_a_record_made_with_other_flags_is_not_passed_off_as_the_grid_s(tmp_path: Path) -> None:
    cells = grid_of(TEXT, tmp_path)
    attack, defense, _ = cells[:3]
    defense.folder.mkdir(parents=True)
    for cell, sha256 in (
        (attack, '"files": {"attack_result.pt": "a"}'),
        (defense, '"attack_sha256": "b"'),
    ):
        (cell.folder / "summary.json").write_text(f"{{{sha256}}}")
        (cell.folder / "config.yaml").write_text("epochs: 2\n")
    with pytest.raises(UserError, match="is of another attack than the record that is there"):
        grid_of(TEXT, tmp_path)
    (attack.folder / "config.yaml").write_text("epochs: 5\n")
    with pytest.raises(UserError, match="was made with epochs 5, not 2; delete it"):
        grid_of(TEXT, tmp_path)
    for spoil in (Path.unlink, lambda path: path.write_text("epochs: [")):
        spoil(attack.folder / "config.yaml")
        with pytest.raises(UserError) as error:
            grid_of(TEXT, tmp_path)
        assert f"{attack.folder}/config.yaml: cannot be read; restore it, or delete the folder" in (
            error.value.problems
        )
        (attack.folder / "config.yaml").write_text("epochs: 2\n")
    (attack.folder / "summary.json").write_text("{")
    with pytest.raises(UserError) as error:
        grid_of(TEXT, tmp_path)
    (problem,) = error.value.problems  # and not that good results are of another attack
    assert (
        problem == f"{attack.folder}/summary.json: cannot be read; restore it, or delete the folder"
    )


def test_a_record_that_has_lost_its_model_is_said_before_what_reads_it(tmp_path: Path) -> None:
    """Once all that reads it is done, it may go."""
    attack, *defenses = grid_of(TEXT, tmp_path)[:3]
    for cell in (attack, *defenses):
        cell.folder.mkdir(parents=True)
        (cell.folder / "config.yaml").write_text("epochs: 2\nadv_steps: 1\n")
    files = '"files": {"attack_result.pt": "a"}'
    (attack.folder / "summary.json").write_text(f"{{{files}}}")
    model = attack.folder / "attack_result.pt"
    for spoil in (lambda path: None, lambda path: path.write_bytes(b"")):
        spoil(model)
        with pytest.raises(UserError) as error:
            grid_of(TEXT, tmp_path)
        (problem,) = error.value.problems
        assert problem == f"{model}: is gone or empty; restore it, or delete the folder"
    model.write_bytes(b"a model")
    grid_of(TEXT, tmp_path)
    model.unlink()
    for cell in defenses:
        (cell.folder / "summary.json").write_text('{"attack_sha256": "a"}')
    grid_of(TEXT, tmp_path)


def test_flags_that_a_grid_no_longer_has_count_like_those_that_it_has(tmp_path: Path) -> None:
    """The whole configuration counts, so that a flag that left the YAML is at its default again.

    A flag that an earlier version did not have was at its default, and `auto` is any choice of the
    machine. The values of a dataset's own YAML are defaults, too.
    """
    text = "datasets: [random]\nmodels: [tiny]\nattacks: {badnet: FLAGS}\nseeds: [0]\n"
    text += "defenses: {sau: OTHERS}\n"

    def grid(flags: str, others: str = "{}") -> list[Cell]:
        return grid_of(text.replace("FLAGS", flags).replace("OTHERS", others), tmp_path)

    attack, defense = grid("{epochs: 2, lr: 0.5}", "{lr: 0.3}")
    defense.folder.mkdir(parents=True)
    made = [(attack, Config), (defense, SAU)]
    for cell, of in made:
        flags = {name: value for name, value in cell.flags.items() if name != "dataset"}
        values = parse_yaml(of.load("random", **flags).dump(), "")
        for name in ("exact_sar", "rim"):  # of a later version
            values.pop(name, None)
        (cell.folder / "config.yaml").write_text(as_yaml({**values, "precision": "fp32"}))
        (cell.folder / "summary.json").write_text('{"attack_sha256": "a"}')
    assert all(cell.is_done for cell in grid("{epochs: 2, lr: 0.5}", "{lr: 0.3}"))
    assert all(cell.is_done for cell in grid("{epochs: 2, lr: 0.5, eval_every: 1}", "{lr: 0.3}"))
    with pytest.raises(UserError) as error:
        grid("{}")
    assert error.value.problems == (
        f"{attack.folder}: was made with epochs 2, not 20, lr 0.5, not 0.1; delete it, or give the "
        "grid another name",
        f"{defense.folder}: was made with lr 0.3, not 0.0001; delete it, or give the grid "
        "another name",
    )
    with pytest.raises(UserError, match="was made with exact_sar False, not True; delete it"):
        grid("{epochs: 2, lr: 0.5}", "{lr: 0.3, exact_sar: true}")
    with pytest.raises(UserError, match="was made with precision fp32, not bf16; delete it"):
        grid("{epochs: 2, lr: 0.5, precision: bf16}", "{lr: 0.3}")


def test_another_order_in_the_grid_is_no_other_analysis(tmp_path: Path) -> None:
    """docs/grids.md: put the most important attacks, defenses and seeds first."""
    text = (
        "datasets: [random]\nmodels: [tiny]\nattacks: {badnet: , prototype: , plain: PLAIN}\n"
        "defenses: {DEFENSES}\nanalyses: {inspect}\nseeds: [SEEDS]\n"
    ).replace("PLAIN", "{script: prototype, lr: 0.2}")

    def grid(defenses: str, seeds: str) -> list[Cell]:
        return grid_of(text.replace("DEFENSES", defenses).replace("SEEDS", seeds), tmp_path)

    cells = grid("ft, fp", "0, 1")
    cell = next(c for c in cells if c.name == "random-tiny-badnet-s0/analysis/inspect")
    assert len(cell.flags["clean_records"]) == 4
    flags = {name: value for name, value in cell.flags.items() if name != "dataset"}
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(Inspection.load("random", **flags).dump())
    assert cell.arguments()[-1] == "--resume=true"
    other = next(c for c in grid("fp, ft", "1, 0") if c.name == cell.name)
    assert other.flags["defenses"] == ["fp", "ft"]
    assert other.arguments()[-1] == "--resume=true"  # goes on with what was begun
    fewer = next(c for c in grid("fp", "0, 1") if c.name == cell.name)
    assert fewer.arguments()[-1] == "--overwrite=true"  # which cannot be gone on with


def test_what_may_be_left_out_may_be_empty(tmp_path: Path) -> None:
    """As when every entry below it is commented out; what is needed may not."""
    text = TEXT.replace(DEFENSES, "defenses:\n  # ft:")
    cells = grid_of(f"{text}\nanalyses:\nslurm:\n", tmp_path)
    assert {cell.attack for cell in cells} == {None}
    with pytest.raises(UserError, match="seeds: None is not allowed"):
        grid_of(text.replace("seeds: [0, 3]", "seeds:"), tmp_path)


def finish(cells: list[Cell], *names: str) -> None:
    """Writes what finished cells leave, as far as a grid reads it; sha256 are the names."""
    for cell in (cell for cell in cells if cell.name in names):
        flags = {name: value for name, value in cell.flags.items() if name != "dataset"}
        config = config_class(*cell.script.removesuffix(".py").split("/"))
        assert config is not None
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "config.yaml").write_text(config.load("random", **flags).dump())
        summary: dict[str, Any] = {"attack_sha256": (cell.attack or cell).name}
        if cell.script.startswith("analysis/"):
            keys = [(CLEAN if c.is_clean else c.folder.name, c.name) for c in cell.others]
            summary["models"] = {"before": (cell.attack or cell).name, **dict(keys)}
        else:
            file = "attack_result.pt" if cell.attack is None else "defense_result.pt"
            (cell.folder / file).write_text("weights")
            summary["files"] = {file: cell.name}
        (cell.folder / "summary.json").write_text(json.dumps(summary))


def test_another_set_of_defenses_makes_an_analysis_anew_and_blocks_nothing(tmp_path: Path) -> None:
    """One that looked at more than the grid asks for has all of it. Stealth looks at none."""
    text = (
        "datasets: [random]\nmodels: [tiny]\nattacks: [badnet, prototype]\ndefenses: [DEFENSES]\n"
        "analyses: {path: {t_steps: 5}, stealth: }\nseeds: [0]\n"
    )

    def grid(defenses: str, text: str = text) -> dict[str, Cell]:
        cells = grid_of(text.replace("DEFENSES", defenses), tmp_path)
        return {cell.name.removeprefix("random-tiny-"): cell for cell in cells}

    first = grid("ft, clp")
    finish([*first.values()], *(cell.name for cell in first.values()))
    assert all(cell.is_done for cell in grid("ft, clp").values())
    assert all(cell.is_done for cell in grid("clp").values())
    assert all(cell.is_done for cell in grid("ft", text.replace(", prototype", "")).values())

    more = grid("ft, clp, fp")
    waiting = [name for name, cell in more.items() if not cell.is_done]
    assert waiting == [
        *("badnet-s0/fp", "prototype-s0/fp"),
        *("badnet-s0/analysis/path", "prototype-s0/analysis/path"),
    ]
    path = more["badnet-s0/analysis/path"]
    assert path.lacks == "random-tiny-badnet-s0/fp"
    finish([*more.values()], "random-tiny-badnet-s0/fp")
    assert (path.lacks, path.is_done, path.is_begun) == (None, False, False)
    assert path.arguments()[-1] == "--overwrite=true"
    finish([*more.values()], path.name)
    assert (path.is_done, path.arguments()[-1]) == (True, "--resume=true")

    (path.folder.parents[1] / "defense/ft/summary.json").write_text(
        json.dumps({"attack_sha256": "random-tiny-badnet-s0", "files": {"defense_result.pt": "x"}})
    )
    assert not grid("ft, clp, fp")["badnet-s0/analysis/path"].is_done  # of another ft
    with pytest.raises(UserError, match="analysis/path: was made with t_steps 5, not 6; delete it"):
        grid("ft, clp, fp", text.replace("t_steps: 5", "t_steps: 6"))


def test_an_analysis_that_looks_at_no_defense_waits_for_none(tmp_path: Path) -> None:
    text = "datasets: [random]\nmodels: [tiny]\nattacks: [badnet]\ndefenses: [ft]\nseeds: [0]\n"
    cells = grid_of(f"{text}analyses: [stealth, confusion]\n", tmp_path)
    attack, defense, *looks = cells
    assert [cell.needed for cell in looks] == [(attack,), (attack, defense)]
    assert "defenses" not in looks[0].flags


STUB = """
import pathlib, signal, sys, time
flags = dict(word.split("=", 1) for word in sys.argv[1:])
root, kind = pathlib.Path(flags["--record_path"]), pathlib.Path(__file__).parent.name
folder = root / (flags.get("--result_file") or flags["--save_folder_name"])
folder = folder if kind == "attack" else folder / "defense" / flags["--save_folder_name"]
assert kind == "attack" or (folder.parents[1] / "summary.json").exists()
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
folder.mkdir(parents=True, exist_ok=True)
with open(root / "order.txt", "a") as order:
    order.write(folder.name + "\\n")
(folder / "config.yaml").write_text("")
if "bad" in folder.name:
    sys.exit("no luck")
if "killed" in folder.name:
    signal.raise_signal(signal.SIGKILL)
time.sleep(float((root / "seconds.txt").read_text()))  # an open file would swallow the signal
(folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts that only leave traces, in the place of the checkout's; the folder of records."""
    for script in ("attack/a.py", "attack/bad.py", "attack/killed.py", "defense/d.py"):
        path = tmp_path / script
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(workers, "PRELOADED", ["benchmark.workers"])
    records = tmp_path / "records"
    records.mkdir()
    (records / "seconds.txt").write_text("0.3")
    return records


def stub_cells(records: Path, *attacks: str) -> list[Cell]:
    cells = []
    for name in attacks:
        flags = {"record_path": str(records), "save_folder_name": name}
        attack = Cell(name, f"attack/{name.strip('0123456789')}.py", flags, records / name)
        flags = {"record_path": str(records), "result_file": name, "save_folder_name": "d"}
        cells += [
            attack,
            Cell(f"{name}/d", "defense/d.py", flags, records / name / "defense/d", attack),
        ]
    return cells


def test_a_failure_costs_its_defenses_alone_and_done_cells_are_skipped(stubs: Path) -> None:
    cells = stub_cells(stubs, "bad1", "a1", "a2")
    with run.Board(cells) as board:
        run.run_local(cells, stubs, 2, board)
    assert board.states == {
        "bad1": "failed",
        "bad1/d": "skipped",
        **dict.fromkeys(("a1", "a1/d", "a2", "a2/d"), "done"),
    }
    assert "no luck" in run.log_of(cells[0], stubs).read_text()
    ran = (stubs / "order.txt").read_text().split()
    assert sorted(ran) == ["a1", "a2", "bad1", "d", "d"]
    with run.Board(cells) as board:
        run.run_local(cells, stubs, 2, board)
    assert (stubs / "order.txt").read_text().split()[len(ran) :] == ["bad1"]  # tried again


def test_a_cell_that_was_killed_says_so_in_its_log_and_in_the_status(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could not say so itself; one that ended by itself has said why in its log."""
    cells = stub_cells(stubs, "bad", "killed")
    grid = stubs.parent / "grid.yaml"
    grid.write_text("datasets: [random]\nmodels: [tiny]\nattacks: [badnet]\nseeds: [0]\n")
    monkeypatch.setattr(run, "cells_of", lambda *_, **__: cells)
    logs = stubs / ".grid/logs"
    why = f"killed by signal 9, perhaps out of memory, see {logs / 'killed.log'}"
    flags = [str(grid), "--record_path", str(stubs)]
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(UserError) as error:
        run.main()
    assert error.value.problems == (
        f"bad: failed, see {logs / 'bad.log'}",
        f"killed: failed, {why}",
    )
    assert (logs / "killed.log").read_text() == "killed by signal 9, perhaps out of memory\n"
    monkeypatch.setattr(sys, "argv", ["run.py", *flags, "--status"])
    run.main()
    assert f"failed       killed  ({why})" in capsys.readouterr().out


def test_an_analysis_waits_for_all_that_it_reads(stubs: Path) -> None:
    """It is skipped if one of these has failed."""
    cells = stub_cells(stubs, "a1", "a2", "bad3")
    first, _, second, _, bad, _ = cells
    for number, others in enumerate([(cells[1], second), (cells[1], bad)]):
        flags = {"record_path": str(stubs), "result_file": "a1", "save_folder_name": f"x{number}"}
        folder = stubs / "a1/defense" / f"x{number}"
        cells.append(Cell(f"a1/x{number}", "defense/d.py", flags, folder, first, others))
    with run.Board(cells) as board:
        run.run_local(list(reversed(cells)), stubs, 2, board)
    assert (board.states["a1/x0"], board.states["a1/x1"]) == ("done", "skipped")
    order = (stubs / "order.txt").read_text().split()
    assert order.index("x0") > order.index("a2")


@pytest.mark.slow
def test_the_status_tells_what_failed_and_what_another_process_runs(stubs: Path) -> None:
    cells = stub_cells(stubs, "bad1", "a1", "a2")
    assert set(run.states_of(cells, stubs, None).values()) == {"waiting"}
    with run.Board(cells) as board:
        run.run_local(cells[:2], stubs, 1, board)
    cells[2].folder.mkdir()  # as a run that still prepares its trigger
    holds = (
        "import sys, time; from utils.records.folders import RunFolder; from pathlib import Path;"
    )
    holds += "RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); time.sleep(60)"
    call = [sys.executable, "-c", holds, str(cells[2].folder)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        other.stdout.readline()
        states = run.states_of(cells, stubs, None)
        assert [states[cell.name] for cell in cells] == [
            *("failed", "skipped", "running", "waiting", "waiting", "waiting")
        ]
        thread = threading.Timer(1.0, other.kill)
        thread.start()
        with run.Board(cells[2:]) as board:
            run.run_local(cells[2:], stubs, 1, board)
    assert set(board.states.values()) == {"done"}
    assert (stubs / "order.txt").read_text().split()[1:3] == ["a2", "d"]  # it was waited for


def test_the_time_left_is_of_each_script(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack took 100 s, its defense 20 s; 30 s into the second attack 70 and 20 are left."""
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    cells = stub_cells(stubs, "a1", "a2")
    board = run.Board(cells)
    board.set(cells[0], "running")
    assert board.eta() == "?"
    for cell, end in zip(cells, (100.0, 120.0), strict=False):
        board.set(cell, "running")
        now[0] = end
        board.set(cell, "done")
    board.set(cells[2], "running")
    now[0] = 150.0
    assert board.eta() == "0:01:30"

    cells = stub_cells(stubs, "a1", "a2", "a3", "a4", "a5")[::2]
    board = run.Board(cells, jobs=2)
    for cell in cells[:2]:
        board.set(cell, "running")
    now[0] += 100
    board.set(cells[0], "done")  # one is about to end, three have not begun
    assert board.eta() == "0:02:30"


def test_one_job_runs_a_record_to_its_end_before_the_next(stubs: Path) -> None:
    cells = stub_cells(stubs, "a1", "a2", "a3")
    with run.Board(cells) as board:
        cells[2].folder.mkdir()
        (cells[2].folder / "summary.json").write_text("{}")  # somebody else was faster
        run.run_local(cells, stubs, 1, board)
    assert (stubs / "order.txt").read_text().split() == ["a1", "d", "d", "a3", "d"]
    assert set(board.states.values()) == {"done"}


def test_an_interruption_ends_what_runs_gently(
    stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stubs / "seconds.txt").write_text("60")
    cells = stub_cells(stubs, "a1", "a2")

    def interrupted(_: float) -> None:
        if all(cell.is_begun for cell in (cells[0], cells[2])):
            raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", interrupted)
    with run.Board(cells) as board, pytest.raises(KeyboardInterrupt):
        run.run_local(cells, stubs, 2, board)
    for cell in (cells[0], cells[2]):
        assert "saved" in run.log_of(cell, stubs).read_text()
        assert cell.is_begun


@pytest.mark.parametrize("state", ["interrupted", "elsewhere"])
def test_an_interruption_tells_of_a_checkpoint_only_of_what_ran(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(cells: list[Cell], root: Path, jobs: int, board: run.Board, _: float) -> None:
        board.set(cells[0], state)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_local", interrupted)
    path = tmp_path / "grid.yaml"
    path.write_text("datasets: [random]\nmodels: [tiny]\nattacks: [badnet]\nseeds: [0]\n")
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--record_path", str(tmp_path / "r")])
    with caplog.at_level(logging.INFO, logger="sau"), pytest.raises(KeyboardInterrupt):
        run.main()
    rest = "what ran has a checkpoint; " if state == "interrupted" else ""
    assert caplog.messages[-1] == f"{rest}the same command goes on"


def test_a_budget_takes_the_first_cells_that_end_in_time(
    stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second is left. Cells of a's kind took 100 s in an earlier run, d's are short, b's are
    unknown; the second b is then known to be short, and there is time for it."""
    (stubs / "seconds.txt").write_text("0")
    (stubs.parent / "attack/b.py").write_text(STUB)
    cells = stub_cells(stubs, "a1", "a2", "b1", "b2")
    for cell, seconds in zip(cells[:2], (100, 0.01), strict=True):
        cell.folder.mkdir(parents=True)
        (cell.folder / "summary.json").write_text(f'{{"seconds": {seconds}}}')
    with run.Board(cells, 1) as board:
        run.run_local(cells, stubs, 1, board, budget=60)
    assert list(board.states.values()) == ["done", "done", "waiting", "waiting"] + 4 * ["done"]
    assert (stubs / "order.txt").read_text().split() == ["b1", "d", "b2", "d"]


def test_at_the_end_of_a_budget_what_runs_is_stopped(stubs: Path) -> None:
    (stubs / "seconds.txt").write_text("60")
    cells = stub_cells(stubs, "a1", "a2")
    with run.Board(cells, 1) as board:
        run.run_local(cells, stubs, 1, board, budget=4)
    assert list(board.states.values()) == ["interrupted", "waiting", "waiting", "waiting"]
    assert "saved" in run.log_of(cells[0], stubs).read_text()


def test_a_budget_that_is_over_before_the_first_cell_starts_none(
    stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading what cells are forked from may take longer than the budget."""
    monkeypatch.setattr(run.Workers, "load", lambda _: run.time.sleep(0.2))
    cells = stub_cells(stubs, "a1")
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "config.yaml").write_text("")  # as begun before
    with run.Board(cells, 1) as board:
        run.run_local(cells, stubs, 1, board, budget=0.1)
    assert list(board.states.values()) == ["waiting", "waiting"]


def test_a_second_signal_ends_cells_at_once() -> None:
    class Deaf:
        stops = 0

        def poll(self) -> int | None:
            return None

        def stop(self) -> None:
            self.stops += 1

        def wait(self) -> int:
            raise KeyboardInterrupt

    deaf = [Deaf(), Deaf()]
    with pytest.raises(KeyboardInterrupt):
        run._end(deaf)
    assert [one.stops for one in deaf] == [2, 2]


def test_a_record_that_is_removed_meanwhile_ends_its_cells(stubs: Path) -> None:
    """Nobody would make it again, and nothing would happen any more."""
    cells = stub_cells(stubs, "a1", "a2")
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "summary.json").write_text("{}")
    with run.Board(cells, 1) as board:
        (cells[0].folder / "summary.json").unlink()
        run.run_local(cells, stubs, 1, board)
    assert list(board.states.values()) == ["done", "skipped", "done", "done"]


def test_a_resumed_cell_took_what_all_its_parts_took(stubs: Path) -> None:
    cells = stub_cells(stubs, "a1")
    with run.Board(cells, 1) as board:
        board.set(cells[0], "running")
        cells[0].folder.mkdir(parents=True)
        (cells[0].folder / "summary.json").write_text('{"seconds": 900}')
        board.set(cells[0], "done")
        assert board.usual(cells[0]) == 900
        board.set(cells[1], "running")
        cells[1].folder.mkdir(parents=True)
        (cells[1].folder / "summary.json").write_text("{}")
        board.set(cells[1], "done")
        assert 0 <= (board.usual(cells[1]) or 0) < 60


def test_each_cell_has_a_log_of_its_own_whatever_its_names(tmp_path: Path) -> None:
    names = ["a-b", "a-b/c", "a/b-c", "a-b-c", "a/analysis-x", "a/analysis/x", "a/b"]
    long = f"{'r' * 200}/{'d' * 200}"
    cells = [Cell(name, "defense/ft.py", {}, tmp_path / name) for name in [*names, long]]
    for of in (run.log_of, run.mark_of):
        assert len({of(cell, tmp_path) for cell in cells}) == len(cells)
    run.log_of(cells[-1], tmp_path).parent.mkdir(parents=True)
    run.mark_of(cells[-1], tmp_path).touch()
    assert run.has_failed(cells[-1], tmp_path)


def test_a_folder_of_images_must_be_there(tmp_path: Path) -> None:
    (datasets,) = (line for line in TEXT.splitlines() if line.startswith("datasets:"))
    text = TEXT.replace(datasets, "datasets: {folder: {dataset_path: nowhere}}")
    with pytest.raises(UserError, match="--dataset_path: nowhere is no folder; give the one that"):
        grid_of(text, tmp_path)
    with pytest.raises(UserError, match="--dataset_path: a value is needed; give the one that"):
        grid_of(text.replace("{dataset_path: nowhere}", "{image_size: 16}"), tmp_path)


def test_a_device_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SLURM runs the cells is another machine; what has been done needs no device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    path = tmp_path / "grid.yaml"
    for device, message in (
        ("foo", "badnet.py: --device: foo is no device; give auto, cpu or cuda, or mps"),
        ("cuda:1", "badnet.py: --device: cuda:1 is not usable here; give auto or cpu"),
    ):
        text = TEXT.replace("epochs: 2", f"epochs: 2, device: '{device}'")
        with pytest.raises(UserError, match=re.escape(message)):
            grid_of(text, tmp_path)
        assert len(cells_of(read_grid(path), tmp_path / "records", is_run=False)) == 24
    assert len(cells_of(read_grid(path), tmp_path / "records", is_here=False)) == 24
    grid_of(text.replace("cuda:1", "cuda:0"), tmp_path)


def test_the_controls_that_a_grid_names_must_be_there(tmp_path: Path) -> None:
    """Among its own records, or as a record from before; an attack's is none."""
    name = "digits-preactresnet18-{}-s0"
    text = TEXT.replace("seeds:", "analyses: {path: {clean_record: NAME}}\nseeds:")
    flag = "analysis/path.py: --clean_record: "
    for clean, message in (
        ("nope", "nope is no record; give the grid the attack prototype and leave the flag out"),
        (name.format("fixed"), f"{name.format('fixed')} is the record of an attack; give one of"),
    ):
        with pytest.raises(UserError, match=re.escape(flag + message)):
            grid_of(text.replace("NAME", clean), tmp_path)
    grid_of(text.replace("NAME", name.format("prototype")), tmp_path)
    (tmp_path / "records/nope").mkdir(parents=True)
    grid_of(text.replace("NAME", "nope"), tmp_path)
    several = text.replace("path: {clean_record:", "inspect: {clean_records:")
    names = f"nope,{name.format('prototype')}"
    for written in (f"'{names}'", f"[{names}]"):
        grid_of(several.replace("NAME", written), tmp_path)


def test_a_cell_that_has_begun_is_not_too_long_for_a_budget(stubs: Path) -> None:
    """What is left of it may be short."""
    (stubs / "seconds.txt").write_text("0")
    cells = stub_cells(stubs, "a1", "a2")
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "summary.json").write_text('{"seconds": 100}')
    cells[2].folder.mkdir(parents=True)
    (cells[2].folder / "config.yaml").write_text("")
    with run.Board(cells, 1) as board:
        run.run_local(cells, stubs, 1, board, budget=60)
    assert board.states[cells[2].name] == "done"


def test_a_cell_of_another_process_is_waited_for_within_a_budget(
    stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after some polls; then its defense runs."""
    (stubs / "seconds.txt").write_text("0")
    cells = stub_cells(stubs, "a1")
    polls: list[int] = []

    def elsewhere(cell: Cell) -> bool:
        if cell is not cells[0] or cell.is_done:
            return False
        polls.append(1)
        if len(polls) > 6:
            cell.folder.mkdir(parents=True, exist_ok=True)
            (cell.folder / "summary.json").write_text("{}")
        return True

    monkeypatch.setattr(run, "is_elsewhere", elsewhere)
    with run.Board(cells, 1) as board:
        run.run_local(cells, stubs, 1, board, budget=60)
    assert set(board.states.values()) == {"done"}
    assert (stubs / "order.txt").read_text().split() == ["d"]


def test_a_budget_that_is_too_short_for_all_that_is_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the same command would do nothing each time. A defense whose attack takes too long
    cannot start, however short it is. Nothing is loaded for what does not start."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        "datasets: [digits]\nmodels: [preactresnet18]\nattacks: [badnet]\ndefenses: [ft]\n"
        "seeds: [0, 1]\n"
    )
    for cell, seconds in zip(
        cells_of(read_grid(path), tmp_path / "records"), (100, 5), strict=False
    ):
        cell.folder.mkdir(parents=True)
        (cell.folder / "summary.json").write_text(json.dumps({"seconds": seconds}))
        (cell.folder / "config.yaml").write_text(json.dumps(cell.flags))
    flags = ["run.py", str(path), "--record_path", str(tmp_path / "records"), "--budget", "9"]
    monkeypatch.setattr(sys, "argv", flags)
    monkeypatch.delattr(run.Workers, "load")
    with caplog.at_level(logging.INFO, logger="sau"):
        run.main()
    assert "longer than the budget: 100 s or more" in caplog.text
    assert "the same command goes on" not in caplog.text


def test_a_name_with_a_zero_in_front_is_a_name(tmp_path: Path) -> None:
    """In YAML 1.1 the class that is called 010 is the number 8."""
    (cell, *_) = grid_of(TEXT.replace("  badnet:\n", "  badnet: {attack_target: 010}\n"), tmp_path)
    assert cell.flags["attack_target"] == "010"
    assert "--attack_target=010" in cell.arguments()


def test_infinity_reaches_the_script(tmp_path: Path) -> None:
    cells = grid_of(TEXT.replace("  ft:\n", "  clp: {u: .inf}\n"), tmp_path)
    cell = next(cell for cell in cells if cell.script == "defense/clp.py")
    assert "--u=inf" in cell.arguments()


def test_a_tilde_is_the_home_of_who_runs_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before files are looked for, and what is there is compared with what the grid asks for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "i.txt").write_text("0\n")
    (tmp_path / "net.py").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "records/b").mkdir(parents=True)
    text = TEXT.replace("  ft:\n", "  ft: {index: ~/i.txt}\n")
    text += "analyses: {inspect: {clean_records: [~/a, b]}}\n"
    cells = grid_of(text.replace("[preactresnet18]", "[~/net.py:build]"), tmp_path)
    attack, ft = cells[:2]
    assert attack.flags["model"] == ft.flags["model"] == str(tmp_path / "net.py:build")
    assert ft.flags["index"] == str(tmp_path / "i.txt")
    assert cells[-1].flags["clean_records"] == [str(tmp_path / "a"), "b"]


def test_a_flag_may_be_a_list(tmp_path: Path) -> None:
    text = TEXT + "analyses:\n  retune: {poisoned_images: [0, 5]}\n"
    cell = next(cell for cell in grid_of(text, tmp_path) if cell.script == "analysis/retune.py")
    assert "--poisoned_images=0,5" in cell.arguments()


def test_kinds_of_cells(tmp_path: Path) -> None:
    """One kind for all seeds of an attack, and for a defense against whatever attack."""
    cells = grid_of(TEXT, tmp_path)
    attacks = [cell for cell in cells if cell.attack is None]
    defenses = [cell for cell in cells if cell.attack is not None]
    assert len({cell.kind for cell in attacks}) == len(attacks) / 2
    assert len({cell.kind for cell in defenses}) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--budget 0", "--budget: 0 is not allowed; give seconds, more than 0"),
        ("--budget nan", "--budget: nan is not allowed"),
        ("--budget 5 --executor slurm", "--budget: is for --executor local"),
        ("--jobs 2 --executor slurm", "--jobs: is for --executor local; give parallelism"),
        ("--jobs 0", "--jobs: 0 is not allowed"),
    ],
)
def test_a_wrong_budget_or_number_of_jobs_is_refused(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", str(GRIDS[0]), *flags.split()])
    with pytest.raises(UserError, match=message):
        run.main()


def test_cells_share_the_cores_unless_their_threads_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "usable_cores", lambda: 5)
    for given, jobs, expected in (
        (None, 2, 2),
        (None, 9, 1),
        ("1", 1, 1),
        ("3", 5, 3),
        ("0", 1, 1),
        ("four", 1, 5),
    ):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert run.threads_of_a_cell(jobs) == expected


@pytest.mark.slow
def test_the_command_tells_the_state_of_a_grid_and_two_cannot_run_it(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT.replace("epochs: 2", "epochs: 2, nonsense: 1"))
    call = [sys.executable, ROOT / "benchmark/run.py", path, "--record_path", tmp_path / "records"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(
        [*call, "--jobs", "2"], capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 2
    assert "nonsense: unknown name" in refused.stderr
    assert not (tmp_path / "records").exists()
    path.write_text(TEXT)
    status = subprocess.run([*call, "--status"], capture_output=True, text=True, env=environment)
    assert status.returncode == 0
    assert status.stdout.splitlines()[-1] == "24 cells: 24 waiting"
    assert not (tmp_path / "records").exists()


def test_a_mark_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a full disk names no file."""

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    cell = Cell("badnet-s0", "attack/badnet.py", {}, tmp_path / "badnet-s0")
    with pytest.raises(UserError, match=r"badnet-s0\.failed: could not be written \(No space"):
        run.mark_failed(cell, tmp_path, -9)
