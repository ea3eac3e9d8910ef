"""Wrong use of every script: one line that names the flag, exit code 2, nothing written or lost."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from perf import stress
from tests.conftest import make_small
from tests.scripts import attack_flags, defense_flags, run_script, trained
from tests.utils.test_config import CONFIGS
from utils.config import _hints
from utils.files import ROOT
from utils.records.attack import AttackRecord, load_attack
from utils.values import allowed_values, base_of, bounds_of, is_endless, may_be_a_name

pytestmark = pytest.mark.usefixtures("small", "cache")

SCRIPTS = sorted(set(CONFIGS) - {"defense/base", "analysis/base", "analysis/subject"})


@pytest.fixture(scope="module")
def good(workplace: Path) -> Path:
    """The record of an attack, with the result of a defense."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        record = trained(workplace, "good", patch)
        assert run_script(ROOT / "defense/sau.py", *defense_flags(workplace, "good")) == 0
    return record


def contents(root: Path) -> dict[str, str]:
    """sha256 by path of all but locks, which go with the process, and decoded images."""
    return {
        path: digest
        for path, digest in stress.contents(root).items()
        if not path.endswith(".lock") and not path.startswith("data/cache/")
    }


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def assert_refused(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    message: str,
    script: str,
    *flags: object,
) -> None:
    """The script says one line, which the pattern fits, and leaves everything as it was."""
    before = contents(workplace)
    capsys.readouterr()
    assert run_script(ROOT / script, *flags) == 2
    (error,) = errors(capsys)
    assert re.search(message, error), error
    assert contents(workplace) == before


# --- each flag out of range ---------------------------------------------------------------------


def next_to(bound: float, is_int: bool, step: int) -> float:
    """The nearest number above (1) or below (-1)."""
    return int(bound) + step if is_int else math.nextafter(bound, step * math.inf)


def element(annotation: Any) -> tuple[Any, bool]:
    """What the bounds are of: of a list, its elements; whether there is one."""
    base = base_of(annotation)
    return (get_args(base)[0], True) if get_origin(base) is tuple else (annotation, False)


def limits(annotation: Any) -> list[tuple[float, float]]:
    """For each bound the value just outside and the value just inside."""
    inner, _ = element(annotation)
    base = base_of(inner)
    is_int = int in (base, *get_args(base))
    found = []
    for key, bound in bounds_of(inner).items():
        up = 1 if key in ("ge", "gt") else -1
        beyond = next_to(bound, is_int, -up) if key in ("ge", "le") else bound
        within = bound if key in ("ge", "le") else next_to(bound, is_int, up)
        found.append((int(beyond), int(within)) if is_int else (float(beyond), float(within)))
    return found


def wrong(annotation: Any) -> list[str]:
    """Values of a flag that are out of range or of another type; none for text."""
    base = base_of(annotation)
    options = [option for option in get_args(base) if option is not type(None)]
    kind = options[0] if options and get_origin(base) is not Literal else base
    values = [repr(beyond) for beyond, _ in limits(annotation)]
    if get_origin(base) is Literal or kind is bool:
        values.append("sideways")
    elif kind is int:
        is_name = may_be_a_name(annotation)
        values += [str(2**63)] if is_name else ["1.5", str(2**63), "much"]
    elif kind is float:
        values += ["nan", "inf", "-inf", "1e39", "much"]
    if values and type(None) not in get_args(base) and not may_be_a_name(annotation):
        values.append("null")
    return values


def advice(annotation: Any, value: str) -> str:
    """What to give instead of a value of `wrong`."""
    if is_endless(annotation):
        return allowed_values(annotation)
    beyond = ("nan", "inf", "-inf")
    allowed = allowed_values(annotation, largest=value in (str(2**63), "1e39", *beyond))
    if value not in beyond:
        return allowed
    is_list = element(annotation)[1]
    return f"{'finite numbers' if is_list else 'a finite number'}: {allowed}"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_out_of_range_is_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    """All wrong values of a script, as many flags at a time as there are: a line for each."""
    hints = _hints(CONFIGS[script])
    values = {name: wrong(annotation) for name, annotation in hints.items()}
    for name in (name for name, annotation in hints.items() if is_endless(annotation)):
        values[name] = [value for value in values[name] if value not in ("inf", "1e39")]
    assert sum(map(len, values.values())) > 10
    before = contents(workplace)
    for number in range(max(map(len, values.values()))):
        given = {name: each[number] for name, each in values.items() if number < len(each)}
        flags = [part for name, value in given.items() for part in (f"--{name}", value)]
        capsys.readouterr()
        assert run_script(ROOT / f"{script}.py", *flags) == 2
        assert sorted(errors(capsys)) == sorted(
            f"error: --{name}: {value} is not allowed; give {advice(hints[name], value)}"
            for name, value in given.items()
        )
    assert contents(workplace) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_may_have_its_bound(script: str) -> None:
    """Just inside of the range is taken, so what is refused above is refused for its range."""
    inside = {
        name: [(value,) * 3 if element(annotation)[1] else value for _, value in limits(annotation)]
        for name, annotation in _hints(CONFIGS[script]).items()
    }
    assert sum(map(len, inside.values())) > 1
    for number in range(2):  # lower bounds, then upper ones
        values = {name: each[number] for name, each in inside.items() if number < len(each)}
        config = CONFIGS[script].load(**values)
        assert {name: getattr(config, name) for name in values} == values


def test_the_bounds_are_those_of_the_dataclasses() -> None:
    """A ratio is in (0, 1]: 0 is outside, and the next number above 1. A seed is >= 0."""
    hints = _hints(CONFIGS["attack/badnet"])
    above = 1 + 2**-52
    assert limits(hints["pratio"]) == [(0.0, 5e-324), (above, 1.0)]
    assert limits(hints["epochs"]) == [(0, 1)]
    assert limits(hints["random_seed"]) == [(-1, 0), (2**32, 2**32 - 1)]
    assert wrong(hints["epochs"]) == ["0", "1.5", str(2**63), "much", "null"]
    assert wrong(hints["flip"]) == ["sideways", "null"]
    assert wrong(hints["dataset_path"]) == []
    assert limits(_hints(CONFIGS["interop/state_dict"])["mean"]) == [
        (-5e-324, 0.0),
        (1 + 2**-52, 1.0),
    ]


# --- combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("badnet", {"attack_target": 3}, r"--attack_target: 3 is no class of folder; give 0 to 2"),
        ("badnet", {"batch_size": 37}, r"--batch_size: 37 is more than the 36 training images"),
        ("badnet", {"pratio": 0.01}, r"--pratio: 0.01 of 36 training images poisons none"),
        ("badnet", {"patch_size": 17}, r"--patch_size: 17 is more than the image's 16 pixels"),
        ("badnet", {"device": "cuda:99"}, r"--device: cuda:99 is not usable here"),
        ("badnet", {"device": "tpu"}, r"--device: tpu is not usable here .* give auto, cpu or cud"),
        ("badnet", {"dataset_path": "null"}, r"--dataset_path: a value is needed with --dataset f"),
        ("badnet", {"dataset_path": "no/where"}, r"--dataset_path: no/where/train is not a folder"),
        ("badnet", {"save_folder_name": "null"}, r"--save_folder_name: a value is needed"),
        ("badnet", {"save_folder_name": "a/b"}, r"--save_folder_name: a/b is not a name"),
        ("badnet", {"model": "resnet81"}, r"--model: resnet81 is unknown \(did you mean resnet18"),
        ("badnet", {"model": "mine.py:build"}, r"--model: mine.py cannot be read \(No such file"),
        ("badnet", {"pretrained": "true"}, r"--pretrained: torchvision has no trained weights of"),
        ("badnet", {"resume": "true", "overwrite": "true"}, r"--resume: goes on with a run, which"),
        ("badnet", {"yaml_path": "no.yaml"}, r"no.yaml: cannot be read \(No such file"),
        ("badnet", {"epohcs": 3}, r"--epohcs: unknown flag \(did you mean --epochs\?\)"),
        ("badnet", {"save_folder_name": "good"}, r"good exists; give --overwrite to replace it"),
        ("sig", {"attack_label_trans": "all2all"}, r"a clean-label attack has one target; give al"),
        ("lc", {"attack_label_trans": "all2all"}, r"a clean-label attack has one target; give al"),
        ("wanet", {"pratio": 0.01}, r"--pratio: 0.01 of 36 training images poisons none"),
        ("blended", {"trigger_image": "no.png"}, r"--trigger_image: no.png.* \(.*No such file"),
    ],
)
def test_attacks(
    workplace: Path,
    good: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    changes: dict[str, object],
    message: str,
) -> None:
    flags = attack_flags(workplace, "wrong", **changes)
    assert_refused(workplace, capsys, message, f"attack/{script}.py", *flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"result_file": "absent"}, r"--result_file: absent is no record in .*; give one of good"),
        ({"result_file": "../good"}, r"--result_file: ../good is no record"),
        ({"record_path": "no/where"}, r"--result_file: good is no record .*; run an attack first"),
        (
            {"dataset": "cifar10"},
            r"--dataset: cifar10, but the record says folder; leave the flag out",
        ),
        ({"model": "vgg19_bn"}, r"--model: vgg19_bn, but the record says preactresnet18; drop the"),
        ({"dataset_path": "no/where"}, r"--dataset_path: no/where/train is not a folder"),
        ({"ratio": 0.01}, r"--ratio: 0.01 of 36 training images is none; give at least 0.0278"),
        ({"index": "no.txt"}, r"--index: no.txt cannot be read \(No such file"),
        ({"device": "cuda:99"}, r"--device: cuda:99 is not usable here"),
        ({"resume": "true", "overwrite": "true"}, r"--resume: goes on with a run, which --overwr"),
        ({"overwrite": "false"}, r"sau exists; give --overwrite to replace it, or another name"),
        ({"save_folder_name": ".."}, r"--save_folder_name: .. is not a name; give letters"),
        ({"pratio": 0.1}, r"--pratio: unknown flag .*; --help lists them"),
    ],
)
def test_defenses(
    workplace: Path,
    good: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
) -> None:
    flags = defense_flags(workplace, "good", **{"overwrite": "true", **changes})
    assert_refused(workplace, capsys, message, "defense/sau.py", *flags)


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        ("nad", "attention_layers=no", r"--attention_layers: no is no layer of this network"),
        ("nad", "attention_layers=linear", r"--attention_layers: linear gives no map"),
        ("npd", "target_layer_name=no", r"--target_layer_name: no is no layer of this network"),
        ("fst", "select_layer_name=no", r"--select_layer_name: no is no layer of this network"),
        ("d3", "select_layer_name=no", r"--select_layer_name: no is no layer of this network"),
        ("clp", "model={bare}", r"channels of BatchNorm layers .*, and this network has none"),
        ("bnp", "model={bare}", r"channels of BatchNorm layers .*, and this network has none"),
        ("ep", "model={bare}", r"channels of BatchNorm layers .*, and this network has none"),
        ("anp", "model={bare}", r"channels of BatchNorm layers .*, and this network has none"),
        ("rnp", "model={bare}", r"channels of BatchNorm layers .*, and this network has none"),
        ("ims", "model={bare}", r"channels of convolutions .*, and this network has none"),
        ("pam", "model={bare}", r"the map of features .* and this network has none"),
        ("bti_dbf", "model={bare}", r"the map of features .* and this network has none"),
    ],
)
def test_what_a_method_needs_of_a_network_is_told_before_the_work(
    workplace: Path,
    good: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    flag: str,
    message: str,
) -> None:
    """Before there is a folder, and before the model is scored."""
    record, bare = "good", workplace / "bare.py"
    if "{bare}" in flag:
        bare.write_text(
            "from torch import nn\n"
            "def build(num_classes, image_size):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))\n"
        )
        record = "bare"
        flags = attack_flags(workplace, record, model=f"{bare}:build")
        if not (workplace / "record/bare").exists():
            assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    argv = ["--result_file", record, "--record_path", workplace / "record", "--device", "cpu"]
    argv.append(f"--{flag}".replace("{bare}", f"{bare}:build"))
    assert_refused(workplace, capsys, message, f"defense/{script}.py", *argv)


def test_a_defense_of_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = r"--result_file: a value is needed; give the name of an attack's record"
    assert_refused(workplace, capsys, message, "defense/sau.py", "--ratio", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty; name at least one image"),
        ("1\n36\n", r"names image 36; the training set has 0 to 35"),
        ("1\n-1\n", r"names image -1; the training set has 0 to 35"),
        ("1\n1\n", r"names an image twice; name each once"),
        ("one\n", r"holds something else than integers"),
        ("1\n1_0\n", r"holds something else than integers \(1_0\); write one per line, 0 to \d+"),
        ("1\n\u0663\n", r"holds something else than integers"),
        ("9" * 30, r"holds something else than integers"),
    ],
)
def test_indices(
    workplace: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    (tmp_path / "index.txt").write_text(text, encoding="utf-8")
    flags = defense_flags(workplace, "good", index=tmp_path / "index.txt", overwrite="true")
    assert_refused(workplace, capsys, f"--index: .*{message}", "defense/sau.py", *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["attack/badnet.py", "defense/sau.py", "interop/state_dict.py"])
def test_a_gpu_where_there_is_none(
    workplace: Path, good: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    flags = {
        "attack/badnet.py": attack_flags(workplace, "wrong"),
        "defense/sau.py": defense_flags(workplace, "good", overwrite="true"),
        "interop/state_dict.py": ["--save_folder_name", "wrong", "--state_dict", "x.pt"],
    }[script]
    message = r"--device: cuda is not usable here \(.+\); give auto, cpu or cuda"
    assert_refused(workplace, capsys, message, script, *flags, "--device", "cuda")


# --- datasets -----------------------------------------------------------------------------------


def emptied(folder: Path, *parts: str) -> None:
    for part in parts:
        for path in folder.glob(f"{part}/*"):
            path.unlink()


@pytest.mark.parametrize(
    ("remove", "empty", "message"),
    [
        (["train", "test"], [], r"--dataset_path: .*train is not a folder"),
        (
            ["train/*", "test/*"],
            [],
            r"train has no class folders; put one folder per class into it",
        ),
        (["test/dark"], [], r"classes differ: only .*train has dark; give both the same folders"),
        ([], ["train/*"], r"train/bright has no image file; put images into it or remove"),
        ([], ["train/dark"], r"train/dark has no image file; put images into it or remove"),
        ([], ["test/*"], r"--dataset folder: the test set has no image; .* one per class"),
        ([], ["test/dark", "test/striped"], r"--attack_target: every test image has label 0; give"),
        (["*/dark", "*/striped"], [], r"--dataset folder: there is one class, bright; give two or"),
    ],
)
def test_datasets(
    workplace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    remove: list[str],
    empty: list[str],
    message: str,
) -> None:
    """The first class, bright, is the target."""
    folder = shutil.copytree(workplace / "images", tmp_path / "images")
    for pattern in remove:
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    emptied(folder, *empty)
    flags = attack_flags(workplace, "wrong", dataset_path=folder)
    assert_refused(workplace, capsys, message, "attack/badnet.py", *flags)


# --- records ------------------------------------------------------------------------------------


def test_a_defense_before_any_attack(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "record").mkdir()
    flags = defense_flags(tmp_path, "badnet_demo")
    message = r"--result_file: badnet_demo is no record in .*; run an attack first, e.g. attack/ba"
    assert_refused(tmp_path, capsys, message, "defense/sau.py", *flags)


def test_the_record_of_a_failed_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = attack_flags(workplace, "failed", lr=1e30)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 2
    message = r"failed: has no summary.json, so its attack did not finish, or it is no record; run"
    assert_refused(
        workplace, capsys, message, "defense/sau.py", *defense_flags(workplace, "failed")
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attack_result.pt", r"attack_result.pt: is missing, though summary.json has it; put it"),
        ("poison.pt", r"poison.pt: is missing, though summary.json has it; put it back, "),
        (
            "summary.json",
            r"has no summary.json, so its attack did not finish, or it is no record; run",
        ),
    ],
)
def test_a_record_that_lacks_a_file(
    workplace: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    folder = shutil.copytree(good, tmp_path / "record/lacking")
    (folder / name).unlink()
    flags = defense_flags(workplace, str(folder))
    assert_refused(tmp_path, capsys, message, "defense/sau.py", *flags)


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "flags", "message"),
    [
        ("x", [], r"x: is a link; give another name, or remove it"),
        ("good", ["defense"], r"--result_file: .*good is a link; give the folder that it leads to"),
        ("good/defense", ["defense"], r"good/defense: is a link; give another name, or remove it"),
        ("good/defense/sau", ["defense"], r"good/defense/sau: is a link"),
        ("good/defense/sau/log.txt", ["defense", "--overwrite"], r"sau/log.txt: is a link"),
        ("good/defense/.sau.lock", ["defense", "--overwrite"], r"\.sau\.lock: cannot be writ"),
    ],
)
def test_a_link_leads_nowhere(
    workplace: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    link: str,
    flags: list[str],
    message: str,
) -> None:
    """A record that somebody has packed may hold links to anywhere; nothing is written there."""
    shutil.copytree(good, tmp_path / "record/good")
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "record" / link
    if path.exists():
        path.rename(elsewhere)
    elif not path.name.startswith("."):
        elsewhere.mkdir()
    path.symlink_to(elsewhere)
    if flags:
        run = ("defense/sau.py", *defense_flags(tmp_path, "good"), *flags[1:])
    else:
        run = ("attack/badnet.py", *attack_flags(tmp_path, "x", dataset_path=workplace / "images"))
    assert_refused(tmp_path, capsys, message, *run)


def test_the_folder_of_all_records_may_be_a_link(workplace: Path, tmp_path: Path) -> None:
    """The user's own, to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "record").symlink_to(tmp_path / "disk")
    flags = attack_flags(tmp_path, "x", dataset_path=workplace / "images", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    assert run_script(ROOT / "defense/sau.py", *defense_flags(tmp_path, "x")) == 0
    assert (tmp_path / "disk/x/defense/sau/summary.json").exists()


# --- two at a time ------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from utils.records.folders import RunFolder
for name in sys.argv[1:]:
    RunFolder(Path(name)).claim(overwrite=True)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_two_runs_of_one_name(
    workplace: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused while the first lives, whatever it asks for; not after its SIGKILL."""
    runs: dict[str, list[object]] = {
        "attack/badnet.py": attack_flags(workplace, "two", epochs=1),
        "defense/sau.py": defense_flags(workplace, "good", save_folder_name="two"),
    }
    message = r"two: another process is writing it; wait for it, or give another name"
    call = [sys.executable, "-c", HOLD, workplace / "record/two", good / "defense/two"]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            for script, flags in runs.items():
                for extra in ((), ("--overwrite",), ("--resume",)):
                    assert_refused(workplace, capsys, message, script, *flags, *extra)
        finally:
            first.kill()
    for script, flags in runs.items():
        assert run_script(ROOT / script, *flags) == 0


FINISH = """
import sys
from pathlib import Path
from utils.files import file_sha256
from utils.records.folders import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.claim(overwrite=True)
run.start("dataset_path: null\\n")
print("held", flush=True)
sys.stdin.readline()
names = sys.argv[3].split(",")
for name in names:
    run.write_text(name, "weights")
files = {name: file_sha256(run.path / name) for name in names}
facts = {"attack": "badnet", "defense": "sau", "attack_sha256": sys.argv[2]}
run.write_summary({**facts, "files": files})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, r"error: \S+ exists; give --overwrite to replace it"),
        (("--resume",), 0, r"is finished; nothing is left to do"),
    ],
)
@pytest.mark.parametrize("script", ["attack/badnet.py", "defense/sau.py"])
def test_a_second_run_that_waits_for_the_first(
    workplace: Path,
    good: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    """It finds the lock taken, and as soon as it is free a finished run, which it leaves alone."""
    name = f"waited{len(flags)}"
    if script.startswith("attack"):
        folder, run = workplace / "record" / name, attack_flags(workplace, name)
        results = ["attack_result.pt", "poison.pt"]
    else:
        folder, results = good / "defense" / name, ["defense_result.pt"]
        run = defense_flags(workplace, "good", save_folder_name=name)
    call = [sys.executable, "-c", FINISH, folder, load_attack(good).sha256, ",".join(results)]
    with subprocess.Popen(
        call, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        waits = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 1:
                first.communicate("finish\n")

        monkeypatch.setattr("utils.records.lock.time.sleep", wait)
        assert run_script(ROOT / script, *run, *flags) == code
    assert len(waits) == 1
    assert re.search(message, capsys.readouterr().err)
    assert {path.name for path in folder.iterdir()} == {
        *results,
        *("config.yaml", "run.json", "summary.json"),
    }
    assert not folder.with_name(f".{name}.lock").exists()


@pytest.mark.slow
def test_an_attack_does_not_replace_a_record_in_which_a_defense_runs(
    workplace: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [sys.executable, "-c", HOLD, good / "defense/running"]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as defense:
        try:
            assert defense.stdout is not None
            assert defense.stdout.readline() == "held\n"
            flags = attack_flags(workplace, "good", overwrite="true")
            message = r"good: another process is writing defense/running in it; wait for it, or giv"
            assert_refused(workplace, capsys, message, "attack/badnet.py", *flags)
            assert not (workplace / "record/.good.lock").exists()
        finally:
            defense.kill()


@pytest.mark.slow
def test_a_defense_does_not_begin_in_a_record_that_is_replaced(
    workplace: Path, good: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It has its own lock by then; either of the two sees the other one."""
    shutil.copytree(good, tmp_path / "record/x", ignore=shutil.ignore_patterns("defense"))
    call = [sys.executable, "-c", HOLD, tmp_path / "record/x"]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as attack:
        try:
            assert attack.stdout is not None
            assert attack.stdout.readline() == "held\n"
            message = r"record/x: another process is writing it; wait for it, or give another rec"
            flags = defense_flags(tmp_path, "x")
            assert_refused(tmp_path, capsys, message, "defense/sau.py", *flags)
            assert not (tmp_path / "record/x/defense").exists()
        finally:
            attack.kill()


def test_a_defense_does_not_work_on_a_record_that_was_replaced_while_it_was_read(
    workplace: Path,
    good: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    summary = shutil.copytree(good, tmp_path / "record/x") / "summary.json"
    load = load_attack

    def replaced(folder: Path) -> AttackRecord:
        found = load(folder)
        summary.write_text(summary.read_text().replace("seconds", "later"))
        return found

    monkeypatch.setattr("defense.base.load_attack", replaced)
    flags = defense_flags(tmp_path, "x", overwrite="true")
    assert run_script(ROOT / "defense/sau.py", *flags) == 2
    (error,) = errors(capsys)
    assert error.endswith("record/x: was replaced while it was read; run the defense again")


# --- what is the user's -------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize(
    "files",
    [("notes.json",), ("config.yaml", "chapter1.tex"), ("config.yaml",), ("summary.json", "x")],
)
def test_a_folder_of_the_user_s_own(
    workplace: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, ...],
    extra: tuple[str, ...],
) -> None:
    """It is no record, and is not replaced even with --overwrite, whatever its files are called."""
    folder = tmp_path / "record/own"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(json.dumps({"mine": True}))
    message = r"own exists and is no record \(it holds \S+.*\); give another name, or move it away"
    runs: dict[str, list[object]] = {
        "attack/badnet.py": attack_flags(tmp_path, "own", dataset_path=workplace / "images"),
        "interop/state_dict.py": [
            *("--save_folder_name", "own", "--record_path", tmp_path / "record"),
            *("--state_dict", "x.pt"),
        ],
        "interop/backdoorbench.py": [
            *("import", good, "--save_folder_name", "own", "--record_path", tmp_path / "record"),
        ],
    }
    for script, flags in runs.items():
        if script.startswith("attack/badnet") or "--resume" not in extra:
            assert_refused(tmp_path, capsys, message, script, *flags, *extra)


@pytest.mark.parametrize("extra", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("place", ["chapter1.tex", "defense/chapter1.tex", "defense/sau/ch1.tex"])
def test_a_file_of_the_user_s_in_a_record(
    workplace: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    is_finished: bool,
    extra: tuple[str, ...],
) -> None:
    """Also in what a failed run has left."""
    copy = shutil.copytree(good, tmp_path / "record/good")
    (copy / place).write_text("years of work")
    flags = attack_flags(tmp_path, "good", dataset_path=workplace / "images")
    if not is_finished:
        (copy / "summary.json").unlink()
    message = rf"good exists and is no record \(it holds {place}\); give another name, or move it"
    assert_refused(tmp_path, capsys, message, "attack/badnet.py", *flags, *extra)
    if is_finished and place == "defense/sau/ch1.tex":
        message = r"sau exists and is no record \(it holds ch1.tex\); give another name"
        flags = defense_flags(tmp_path, "good")
        assert_refused(tmp_path, capsys, message, "defense/sau.py", *flags, *extra)


def test_a_name_that_is_too_long(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = attack_flags(workplace, "a" * 201)
    message = r"--save_folder_name: has 201 letters; give at most 200"
    assert_refused(workplace, capsys, message, "attack/badnet.py", *flags)
    for name in ("a" * 300, "x/" * 3000):
        message = r"--result_file: (\S+ is no record in|.* is not allowed; give text)"
        assert_refused(
            workplace, capsys, message, "defense/sau.py", *defense_flags(workplace, name)
        )
