"""Every script, run as a user runs it, on a tiny image folder."""

import importlib
import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import attack
import utils.data.datasets
import utils.data.images
from attack.prototype import MakePlan
from attack.recipe import Plan
from attack.setting import Setting
from tests.scripts import attack_flags, defense_flags, one_error, run_script
from utils.data.datasets import load_dataset
from utils.files import ROOT

pytestmark = pytest.mark.usefixtures("small", "cache")

ATTACKS = attack.names()

# What an attack prepares before its trigger, cut short: the tiny set cannot teach it anyway.
SHORT: dict[str, dict[str, object]] = {
    "ssba": {"encoder_steps": 10, "min_bit_accuracy": 0},
    "lc": {"surrogate_epochs": 1, "surrogate_steps": 1, "adv_steps": 2},
    "trojannn": {"clean_epochs": 1, "iterations": 10},
    "inputaware": {"mask_epochs": 1},
}


# Attacks whose trigger must not fire on some images, and what stands in their training sets.
CROSS = {"wanet", "inputaware", "bpp"}
OTHER_KINDS = {**dict.fromkeys(CROSS, ("cross",)), "adaptive_blend": ("cover",)}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_leaves_a_complete_record_that_sau_purifies(
    workplace: Path, attack: str
) -> None:
    name = f"complete_{attack}"
    flags = attack_flags(workplace, name, **SHORT.get(attack, {}))
    assert run_script(ROOT / f"attack/{attack}.py", *flags) == 0
    record = workplace / "record" / name
    expected = "run.json config.yaml attack_result.pt poison.pt metrics.csv summary.json log.txt"
    expected += " curves.png trigger.png"
    assert sorted(path.name for path in record.iterdir()) == sorted(expected.split())

    summary = json.loads((record / "summary.json").read_text())
    for rate in ("acc", "asr", "ra"):
        assert summary[rate] == summary[f"{rate}_hits"] / summary[f"{rate}_total"]
    assert summary["acc_total"] == 18
    assert summary["asr_total"] == 12  # the target's six test images are skipped
    assert summary["attack"] == attack
    metrics = pd.read_csv(record / "metrics.csv")
    assert metrics["epoch"].tolist() == [1, 2]
    assert metrics["acc"].iloc[-1] == summary["acc"]

    result = torch.load(record / "attack_result.pt", weights_only=True)
    assert result["model_name"] == "preactresnet18"
    assert next(iter(result["model"])) == "conv.weight"  # the network's plain key names
    poison = torch.load(record / "poison.pt", weights_only=True)
    assert poison["train_images"].dtype == poison["test_images"].dtype == torch.uint8
    kinds = {poison["kinds"][kind] for kind in poison["train_kinds"].tolist()}
    assert kinds == {"poison", *OTHER_KINDS.get(attack, ())}
    assert ("cross_images" in poison) == ("cross_acc" in summary) == (attack in CROSS)
    if attack in CROSS:
        assert summary["cross_acc_total"] == 18  # all test images, with their true labels
        assert summary["cross_acc"] == summary["cross_acc_hits"] / 18
        assert metrics["cross_acc"].iloc[-1] == summary["cross_acc"]
        assert poison["cross_images"].shape == (18, 3, 16, 16)
        assert poison["cross_images"].dtype == torch.uint8

    assert run_script(ROOT / "defense/sau.py", *defense_flags(workplace, name)) == 0
    after = json.loads((record / "defense/sau/summary.json").read_text())
    assert after["before"]["acc"] == summary["acc"]
    assert after["before"]["asr_hits"] == summary["asr_hits"]
    assert after["attack_sha256"] == summary["files"]["attack_result.pt"]


@pytest.mark.slow
def test_results_of_one_defense_stand_side_by_side_under_names(
    workplace: Path, badnet: Path
) -> None:
    """The recipe's hash tells a seed from a change of the method."""
    hashes = {}
    for name, changes in (
        ("ft-a", {}),
        ("ft-b", {"random_seed": 1}),
        ("ft-c", {"lr": 0.5}),
    ):
        flags = defense_flags(workplace, "shared", save_folder_name=name, **changes)
        assert run_script(ROOT / "defense/ft.py", *flags) == 0
        summary = json.loads((badnet / "defense" / name / "summary.json").read_text())
        assert summary["defense"] == "ft"
        hashes[name] = summary["config_sha256"]
    assert hashes["ft-a"] == hashes["ft-b"] != hashes["ft-c"]


@pytest.mark.slow
def test_a_clean_model_has_no_asr_and_can_be_defended(workplace: Path) -> None:
    flags = attack_flags(workplace, "clean", pratio=None)
    flags = flags[: flags.index("--pratio")] + flags[flags.index("--pratio") + 2 :]
    assert run_script(ROOT / "attack/prototype.py", *flags) == 0
    summary = json.loads((workplace / "record/clean/summary.json").read_text())
    assert "asr" not in summary
    assert not (workplace / "record/clean/poison.pt").exists()
    assert run_script(ROOT / "defense/ft.py", *defense_flags(workplace, "clean")) == 0
    after = json.loads((workplace / "record/clean/defense/ft/summary.json").read_text())
    assert after["der"] is None


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU with --deterministic only: test_reproducible.py"
)
def test_the_same_seed_gives_the_same_files(workplace: Path, badnet: Path) -> None:
    """Weights and metrics (but for the seconds) are equal bit by bit."""
    assert run_script(ROOT / "attack/badnet.py", *attack_flags(workplace, "again")) == 0
    first, second = (
        torch.load(folder / "attack_result.pt", weights_only=True)["model"]
        for folder in (badnet, workplace / "record/again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [
        pd.read_csv(folder / "metrics.csv").drop(columns="seconds")
        for folder in (badnet, workplace / "record/again")
    ]
    assert rows[0].equals(rows[1])


@pytest.mark.parametrize("attack", ["badnet", "blended", "sig", "lf", "ssba", "adaptive_blend"])
def test_poison_depends_on_the_seed_and_the_data_alone(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """Not on the network, the batch size or the number of epochs; nothing is trained for it."""
    plans: list[MakePlan] = []
    monkeypatch.setattr("attack.poisoning.run_plan", lambda _, plan: plans.append(plan))
    runpy.run_path(str(ROOT / f"attack/{attack}.py"), run_name="__main__")
    module = importlib.import_module(f"attack.{attack}")
    data = load_dataset("random", None, 16)

    def poison(**changes: object) -> Plan:
        flags = {"epochs": 1, "pratio": 0.05, **SHORT.get(attack, {}), **changes}
        config = module.Config.load("digits", **flags)
        return plans[0](config, Setting(data, torch.device("cpu"), "fp32"))

    shared, other = poison(), poison(model="resnet18", batch_size=6, epochs=7)
    seeded = poison(random_seed=1)
    for name in ("index", "images", "labels"):
        assert torch.equal(getattr(shared.training, name), getattr(other.training, name))
    assert torch.equal(shared.triggered().images, other.triggered().images)  # type: ignore[union-attr]
    assert not torch.equal(shared.training.index, seeded.training.index)


@pytest.mark.slow
def test_lf_searches_its_pattern(workplace: Path) -> None:
    """The searched pattern is at hand the second time, smooth, and of 51 levels."""
    changes = {"search": "true", "clean_epochs": 40, "search_passes": 1, "search_images": 12}
    changes |= {"search_steps": 5, "epochs": 1, "attack_target": 2}
    flags = attack_flags(workplace, "searched", **changes)
    assert run_script(ROOT / "attack/lf.py", *flags) == 0
    assert run_script(ROOT / "attack/lf.py", *flags, "--overwrite") == 0
    assert "lf-pattern: read from" in (workplace / "record/searched/log.txt").read_text()
    poison = torch.load(workplace / "record/searched/poison.pt", weights_only=True)
    data = utils.data.datasets.load_dataset("folder", workplace / "images", 16)
    is_dark = poison["test_labels"] == 1
    clean = data.test.images[poison["test_index"]].int()
    pattern = (poison["test_images"].int() - clean)[is_dark][0]
    assert int(pattern.max()) == 51
    assert int(pattern.diff(dim=1).abs().max()) < 20


@pytest.mark.slow
def test_an_existing_record_is_refused_unless_overwritten(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = attack_flags(workplace, "twice", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    before = (workplace / "record/twice/summary.json").read_text()
    capsys.readouterr()
    assert run_script(ROOT / "attack/badnet.py", *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "--overwrite" in error
    assert (workplace / "record/twice/summary.json").read_text() == before
    # Bad flags are found before anything is removed.
    assert run_script(ROOT / "attack/badnet.py", *flags, "--overwrite", "--batch_size", "99") == 2
    assert (workplace / "record/twice/summary.json").read_text() == before
    assert run_script(ROOT / "attack/badnet.py", *flags, "--overwrite") == 0


def test_a_folder_that_is_no_record_is_never_replaced(workplace: Path) -> None:
    precious = workplace / "record/precious/thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    flags = attack_flags(workplace, "precious", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags, "--overwrite") == 2
    assert precious.read_text() == "years of work"


@pytest.mark.slow
def test_a_failed_run_does_not_block_its_retry(workplace: Path) -> None:
    flags = attack_flags(workplace, "failed", lr="1e30", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 2
    assert not (workplace / "record/failed/summary.json").exists()
    assert run_script(ROOT / "defense/sau.py", *defense_flags(workplace, "failed")) == 2
    assert run_script(ROOT / "attack/badnet.py", *attack_flags(workplace, "failed", epochs=1)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack_target": 3}, r"--attack_target: 3 is no class of folder; give 0 to 2"),
        ({"pratio": 0.001}, r"--pratio: 0.001 of 36 training images poisons none"),
        ({"pratio": 1.5}, r"--pratio: 1.5 is not allowed; give float in \(0, 1\]"),
        ({"batch_size": 37}, r"--batch_size: 37 is more than the 36 training images"),
        ({"model": "resnet81"}, r"--model: resnet81 is unknown \(did you mean"),
        ({"save_folder_name": "../out"}, r"--save_folder_name: \.\./out is not a name"),
        ({"dataset_path": "nowhere"}, r"--dataset_path: nowhere/train is not a folder"),
        ({"device": "gpu"}, r"--device: gpu is not usable"),
        ({"lr": "1e30"}, r"the loss 'loss' is not finite in epoch 1 of 2; give a smaller --lr"),
        (
            {"model": "alexnet"},
            r"--model: alexnet cannot take images of 16 x 16 .*give --image_size 64",
        ),
        ({"patch_size": 17}, r"--patch_size: 17 is more than the image's 16 pixels"),
        ({"attack_label_trans": "all2two"}, r"give one of all2one, all2all"),
    ],
)
def test_a_wrong_attack_flag_gets_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert run_script(ROOT / "attack/badnet.py", *attack_flags(workplace, "wrong", **changes)) == 2
    assert re.search(message, one_error(capsys))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"result_file": "nothing"},
            r"--result_file: nothing is no record .* give one of ",
        ),
        ({"dataset": "cifar10"}, r"--dataset: cifar10, but the record says folder"),
        ({"model": "vgg19_bn"}, r"--model: vgg19_bn, but the record says preactresnet18"),
        ({"ratio": 0.001}, r"--ratio: 0.001 of 36 training images is none"),
        ({"ratio": 0}, r"--ratio: 0 is not allowed; give float in \(0, 1\]"),
        ({"index": "nowhere.txt"}, r"--index: nowhere.txt cannot be read"),
        ({"trigger_nrom": 0.1}, r"--trigger_nrom: unknown flag \(did you mean --trigger_norm\?\)"),
        ({"lr": "1e30"}, r"is not finite in round"),
    ],
)
def test_a_wrong_defense_flag_gets_one_line(
    workplace: Path,
    badnet: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
) -> None:
    flags = defense_flags(workplace, "shared", **{"n_rounds": 2, **changes})
    assert run_script(ROOT / "defense/sau.py", *flags, "--overwrite") == 2
    assert re.search(message, one_error(capsys))


def test_the_index_file_chooses_the_clean_subset(workplace: Path, badnet: Path) -> None:
    index = workplace / "index.txt"
    index.write_text("3\n1\n20\n35\n")
    flags = defense_flags(workplace, "shared", index=index)
    assert run_script(ROOT / "defense/ft.py", *flags, "--overwrite") == 0
    assert (badnet / "defense/ft/clean_index.txt").read_text() == "1\n3\n20\n35\n"


def test_other_images_than_the_record_s_are_refused(
    workplace: Path, badnet: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A test image is replaced: the record's triggered images no longer mean the same files."""
    changed = tmp_path / "images"
    for source in (workplace / "images").rglob("*.png"):
        copy = changed / source.relative_to(workplace / "images")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    Image.new("RGB", (16, 16)).save(changed / "test/bright/0.png")
    flags = defense_flags(workplace, "shared", dataset_path=changed)
    assert run_script(ROOT / "defense/sau.py", *flags, "--overwrite") == 2
    assert "are not those that it was made with" in capsys.readouterr().err


@pytest.mark.slow
def test_warnings_are_said_and_kept(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of 1e-9 learns nothing, so ASR stays low; one clean image lacks two classes."""
    flags = attack_flags(workplace, "weak", lr=1e-9, epochs=1, attack_target=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    summary = json.loads((workplace / "record/weak/summary.json").read_text())
    if summary["asr"] < 0.5:
        assert any("the attack failed" in text for text in summary["warnings"])
    assert summary["acc"] < 0.5
    assert any("learned little" in text for text in summary["warnings"])
    assert "warning: the model learned little" in capsys.readouterr().err
    (workplace / "one.txt").write_text("0\n")
    flags = defense_flags(workplace, "weak", index=workplace / "one.txt")
    assert run_script(ROOT / "defense/sau.py", *flags) == 0
    after = json.loads((workplace / "record/weak/defense/sau/summary.json").read_text())
    assert any("lacks 2 of 3 classes" in text for text in after["warnings"])


@pytest.mark.slow
def test_a_new_attack_and_a_new_defense_are_two_files_each(workplace: Path, tmp_path: Path) -> None:
    """The examples of CONTRIBUTING.md, written where it says, run."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"`([\w/.]+)`:\n\n```(?:python|yaml)\n(.*?)```", text, flags=re.S)
    files = dict(blocks)
    assert len(files) == 4
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    attack, defense = (
        next(tmp_path / name for name in files if re.match(rf"{folder}/\w+\.py", name))
        for folder in ("attack", "defense")
    )
    assert run_script(attack, *attack_flags(workplace, "contributed")) == 0
    assert run_script(defense, *defense_flags(workplace, "contributed")) == 0
    result = workplace / "record/contributed/defense" / defense.stem / "summary.json"
    assert json.loads(result.read_text())["attack"] == attack.stem


@pytest.mark.slow
def test_scripts_run_from_any_working_directory(
    workplace: Path, badnet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = defense_flags(workplace, str(badnet))  # a folder instead of a name
    assert run_script(ROOT / "defense/ft.py", *flags, "--overwrite") == 0
    assert list(tmp_path.iterdir()) == []
