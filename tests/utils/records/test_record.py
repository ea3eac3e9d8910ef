"""Records: nothing that is damaged, foreign or executable is read."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from defense import clp
from models import Classifier, build_model, model_identity
from tests.conftest import NO_FILES, put_no_file
from utils.data import archives
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import (
    KINDS,
    PoisonedSet,
    dirty_label,
    replace_images,
    triggered_test_set,
    unpoisoned,
)
from utils.errors import Diverged, UserError
from utils.files import file_sha256
from utils.records.attack import load_attack, save_attack
from utils.records.folders import RunFolder
from utils.records.hashes import file_hashes, unchanged
from utils.records.named import check_dataset, recorded_dataset
from utils.records.network import checked_model, model_state

FACTS = {
    "attack": "white",
    "model_name": "tiny",
    "dataset_path": None,
    "attack_target": 1,
    "attack_label_trans": "all2one",
}


def white(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.full_like(images, 255)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty folder of a run that has begun."""
    folder = RunFolder(tmp_path / "record" / "demo")
    folder.start("dataset: tiny\n")
    return folder


@pytest.fixture
def poisoned(tiny_data: Dataset) -> PoisonedSet:
    choice = dirty_label(tiny_data.train.labels, 0.5, "all2one", 1, 3, torch.Generator())
    return replace_images(tiny_data.train, choice, white)


@pytest.fixture
def saved(
    run: RunFolder, tiny_data: Dataset, tiny_model: Classifier, poisoned: PoisonedSet
) -> RunFolder:
    """A finished record of an attack."""
    triggered = triggered_test_set(tiny_data, white, "all2one", 1)
    save_attack(run, tiny_model, tiny_data, poisoned, triggered, None, FACTS)
    finish(run)
    return run


@pytest.fixture
def saved_clean(run: RunFolder, tiny_data: Dataset, tiny_model: Classifier) -> RunFolder:
    """A finished record of a clean model."""
    facts = {"attack": "prototype", "attack_target": None, "attack_label_trans": None}
    clean = unpoisoned(tiny_data.train)
    save_attack(run, tiny_model, tiny_data, clean, None, None, FACTS | facts)
    finish(run)
    return run


def finish(folder: RunFolder) -> None:
    folder.write_summary({"files": file_hashes(folder, "attack_result.pt", "poison.pt")})


Change = Callable[[dict[str, Any]], object]


def forge(folder: RunFolder, name: str, change: Change) -> None:
    """Changes a file of tensors, and the summary so that it vouches for the change."""
    content = torch.load(folder.path / name, weights_only=True)
    change(content)
    torch.save(content, folder.path / name)
    finish(folder)


def load_problem(folder: RunFolder) -> str:
    with pytest.raises(UserError) as caught:
        load_attack(folder.path)
    return str(caught.value)


# --- reading a record ---------------------------------------------------------------------------


def test_the_dataset_is_known_before_the_record_is_read(run: RunFolder, tmp_path: Path) -> None:
    assert recorded_dataset(run.path) == "tiny"
    assert recorded_dataset(tmp_path) is None


@pytest.mark.parametrize("content", [None, "", "seed: 0\n"])
def test_the_dataset_is_that_of_the_summary_where_the_configuration_names_none(
    run: RunFolder, content: str | None
) -> None:
    (run.path / "config.yaml").unlink()
    if content is not None:
        (run.path / "config.yaml").write_text(content)
    run.write_summary({"dataset": "digits"})
    assert recorded_dataset(run.path) == "digits"


@pytest.mark.parametrize("text", [None, "", "{dataset", "[]", "[" * 100_000])
def test_a_summary_that_cannot_be_read_is_refused_in_a_line(
    run: RunFolder, text: str | None
) -> None:
    """Without a configuration it is what names the dataset; None stands for a folder."""
    (run.path / "config.yaml").unlink()
    path = run.path / "summary.json"
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    message = (
        rf"^{path}: is not the summary of a run [^\n]*; restore the file, or run the attack again$"
    )
    with pytest.raises(UserError, match=message):
        recorded_dataset(run.path)


@pytest.mark.parametrize("name", ["[1]", "../../etc", "no_such"])
def test_a_dataset_that_is_not_known_is_refused(run: RunFolder, name: str) -> None:
    (run.path / "config.yaml").write_text(f"dataset: {name}\n")
    with pytest.raises(UserError, match=r"config\.yaml: the dataset .* is none of .*restore"):
        recorded_dataset(run.path)


@pytest.mark.parametrize("given", [None, "tiny"])
def test_a_configuration_of_another_dataset_is_refused(saved: RunFolder, given: str | None) -> None:
    """A defense would take the recipe of that dataset."""
    attack = load_attack(saved.path)
    flags = dataclasses.replace(clp.Config.load("digits"), dataset=given)
    check_dataset(flags, attack)
    (saved.path / "config.yaml").write_text("dataset: digits\n")
    with pytest.raises(UserError, match=r"is digits, but attack_result\.pt says tiny; restore"):
        check_dataset(flags, attack)
    with pytest.raises(UserError, match=r"^--dataset: digits, but the record says tiny"):
        check_dataset(dataclasses.replace(flags, dataset="digits"), attack)


def test_a_record_of_backdoorbench_is_not_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one file, which may be large, was read before."""
    monkeypatch.delattr("utils.records.backdoorbench.read_dataset_name")
    (tmp_path / "attack_result.pt").touch()
    attack = SimpleNamespace(folder=tmp_path, dataset="cifar10")
    check_dataset(clp.Config.load("cifar10"), attack)


@pytest.mark.parametrize(
    "lost",
    [("summary.json", "config.yaml"), ("summary.json", "config.yaml", "poison.pt", "run.json")],
)
def test_an_incomplete_copy_is_not_taken_for_a_record_of_backdoorbench(
    saved: RunFolder, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    """Its tensors were copied, with or without the poisoned images and the list of files."""
    for name in lost:
        (saved.path / name).unlink()
    message = f"^{saved.path}: has no summary.json, .* if it is a copy of one, copy the whole fo"
    with pytest.raises(UserError, match=message):
        load_attack(saved.path)


def test_a_record_reads_back_as_it_was_saved(
    saved: RunFolder, tiny_data: Dataset, tiny_model: Classifier, poisoned: PoisonedSet
) -> None:
    record = load_attack(saved.path)
    content = (saved.path / "attack_result.pt").read_bytes()
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert (record.attack, record.model_name, record.num_classes) == ("white", "tiny", 3)
    assert (record.dataset, record.dataset_path) == ("tiny", None)
    assert record.image_shape == (3, 8, 8)
    assert (record.mean, record.std) == (tiny_data.mean, tiny_data.std)
    assert (record.attack_target, record.attack_label_trans) == (1, "all2one")
    assert record.poison_index is not None
    assert torch.equal(record.poison_index, poisoned.index)
    assert record.triggered is not None
    assert record.triggered.index.tolist() == [0, 2, 3, 5, 6, 8]
    assert record.triggered.labels.tolist() == [0, 2, 0, 2, 0, 2]
    assert record.triggered.targets.tolist() == [1] * 6
    assert (record.triggered.images == 255).all()
    built = record.build()
    assert not built.training
    images = torch.rand(2, 3, 8, 8)
    tiny_model.eval()
    assert torch.equal(built(images), tiny_model(images))


def test_the_weights_are_those_of_the_bare_network(
    saved: RunFolder, tiny_model: Classifier
) -> None:
    """Same keys in the same order as the network without its normalization, in plain memory."""
    tiny_model.to(memory_format=torch.channels_last)
    state = model_state(tiny_model)
    assert list(state) == list(tiny_model.network.state_dict())
    assert all(value.is_contiguous() for value in state.values())
    assert list(load_attack(saved.path).state) == list(state)


def test_the_saved_weights_do_not_follow_the_model(tiny_model: Classifier) -> None:
    state = model_state(tiny_model)
    before = state["linear.bias"].clone()
    with torch.no_grad():
        tiny_model.network.linear.bias.add_(1)
    assert torch.equal(state["linear.bias"], before)


@pytest.mark.parametrize("name", ["linear.bias", "bn.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_no_record_could_have_are_not_saved(
    tiny_model: Classifier, name: str, value: float
) -> None:
    """A run that diverges may end with finite scores."""
    tiny_model.network.state_dict()[name].fill_(value)
    with pytest.raises(Diverged, match=f"^the weights {name} are not finite, [^\n]*$"):
        model_state(tiny_model)


def test_a_clean_models_record_has_no_triggers(saved_clean: RunFolder) -> None:
    record = load_attack(saved_clean.path)
    assert not (saved_clean.path / "poison.pt").exists()
    assert record.triggered is None
    assert record.poison_index is None
    assert record.attack_target is None


def test_only_poison_counts_as_poisoned(saved: RunFolder) -> None:
    """Cover and cross images are replaced, too, but keep their labels."""

    def change(content: dict[str, Any]) -> None:
        content["train_kinds"] = torch.tensor([0, 1, 2, 0, 1, 0], dtype=torch.uint8)

    index = torch.load(saved.path / "poison.pt", weights_only=True)["train_index"]
    forge(saved, "poison.pt", change)
    assert KINDS == ("poison", "cover", "cross")
    found = load_attack(saved.path).poison_index
    assert found is not None
    assert found.tolist() == index[[0, 3, 5]].tolist()


@pytest.mark.parametrize("name", ["attack_result.pt", "poison.pt"])
def test_a_file_that_was_changed_is_refused(saved: RunFolder, name: str) -> None:
    content = bytearray((saved.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved.path / name).write_bytes(content)
    problem = load_problem(saved)
    assert problem.startswith(f"{saved.path / name}: is not the file that summary.json describes")


@pytest.mark.parametrize("name", ["attack_result.pt", "poison.pt"])
def test_a_file_that_is_gone_is_refused(saved: RunFolder, name: str) -> None:
    (saved.path / name).unlink()
    problem = load_problem(saved)
    assert problem.startswith(f"{saved.path / name}: is missing, though summary.json has it; put")


@pytest.mark.parametrize("name", ["attack_result.pt", "poison.pt"])
def test_a_file_that_the_summary_does_not_vouch_for_is_refused(saved: RunFolder, name: str) -> None:
    """Else whoever swaps a file need only delete its line in the summary."""
    summary = {"files": file_hashes(saved, "attack_result.pt", "poison.pt")}
    del summary["files"][name]
    saved.write_summary(summary)
    assert str(saved.path) in load_problem(saved)


def test_a_run_that_did_not_finish_is_refused(saved: RunFolder) -> None:
    (saved.path / "summary.json").unlink()
    assert "did not finish" in load_problem(saved)


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '{"files": 3}', "\ufeff{}"])
def test_a_summary_that_is_damaged_is_refused(saved: RunFolder, text: str) -> None:
    (saved.path / "summary.json").write_text(text, encoding="utf-8")
    assert str(saved.path) in load_problem(saved)


class Trap:
    """What a hostile file holds: reading it as a pickle makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:

        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["attack_result.pt", "poison.pt"])
def test_a_pickled_object_is_refused_and_not_executed(
    saved: RunFolder, tmp_path: Path, name: str
) -> None:
    """The trap works, as plain unpickling shows, but not on a reader of tensors alone."""
    content = torch.load(saved.path / name, weights_only=True)
    mark = tmp_path / "executed"
    torch.save({**content, "extra": Trap(mark)}, saved.path / name)
    finish(saved)
    assert str(saved.path / name) in load_problem(saved)
    assert not mark.exists()
    torch.load(saved.path / name, weights_only=False)
    assert mark.exists()


def drop(key: str) -> Change:
    return lambda content: content.pop(key)


def put(key: str, value: object) -> Change:
    return lambda content: content.update({key: value})


@pytest.mark.parametrize("name", ["attack_result.pt", "poison.pt"])
@pytest.mark.parametrize("content", [[1, 2, 3], torch.zeros(3), "text"])
def test_a_file_that_holds_no_dictionary_is_refused(
    saved: RunFolder, name: str, content: object
) -> None:
    torch.save(content, saved.path / name)
    finish(saved)
    assert str(saved.path / name) in load_problem(saved)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attack_result.pt", drop("model")),
        ("attack_result.pt", drop("dataset_fingerprint")),
        ("attack_result.pt", put("model", [1, 2])),
        ("attack_result.pt", put("model", {"linear.bias": "text"})),
        ("attack_result.pt", put("num_classes", "3")),
        ("attack_result.pt", put("mean", "grey")),
        ("poison.pt", drop("test_images")),
        ("poison.pt", put("train_kinds", None)),
        ("poison.pt", put("test_labels", torch.zeros(5, dtype=torch.int64))),  # 6 images
        ("poison.pt", put("test_images", torch.zeros(6, 3, 4, 4, dtype=torch.uint8))),  # of 8 x 8
        ("poison.pt", put("test_images", torch.zeros(6, 3, 8, 8))),  # floats
        ("poison.pt", put("test_targets", torch.full((6,), 3))),  # of classes 0 to 2
    ],
)
def test_a_record_of_another_shape_is_refused(saved: RunFolder, name: str, change: Change) -> None:
    """Its summary vouches for it, so only the content can tell: when it is read or built."""
    forge(saved, name, change)
    with pytest.raises(UserError, match=re.escape(str(saved.path))):
        load_attack(saved.path).build()


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda content: content.update({name: change(content[name])})


POISON = {
    "train_index": torch.int64,
    "train_images": torch.uint8,
    "train_labels": torch.int64,
    "train_kinds": torch.uint8,
    "test_index": torch.int64,
    "test_images": torch.uint8,
    "test_targets": torch.int64,
    "test_labels": torch.int64,
}
OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "floats": torch.Tensor.float,
    "doubles": torch.Tensor.double,
    "small integers": lambda tensor: tensor.to(torch.int16),
    "truths": torch.Tensor.bool,
    "one more dimension": lambda tensor: tensor[None],
    "columns": lambda tensor: tensor.unsqueeze(-1),
    "no dimension": lambda tensor: tensor.flatten()[0],
    "a row less": lambda tensor: tensor[1:],
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "nothing": lambda tensor: tensor[:0],
    "a list": torch.Tensor.tolist,
    "a text": str,
    "none": lambda tensor: None,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", POISON)
def test_poison_of_another_type_or_shape_is_refused(
    saved: RunFolder, name: str, other: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        assert content[name].dtype == POISON[name]
        content[name] = OTHERS[other](content[name])

    forge(saved, "poison.pt", change)
    problem = load_problem(saved)
    assert problem.startswith(f"{saved.path / 'poison.pt'}: is not a record of this program (")


def set_row(name: str, row: int, value: int) -> Change:
    return lambda content: content[name].__setitem__(row, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_row("train_labels", 0, 3), "train_labels: has values beyond 0 to 2"),
        (set_row("train_labels", 0, -1), "train_labels: has values beyond 0 to 2"),
        (set_row("train_kinds", 0, 3), "train_kinds: has values beyond 0 to 2"),
        (set_row("test_labels", 5, 3), "test_labels: has values beyond 0 to 2"),
        (set_row("test_targets", 5, -5), "test_targets: has values beyond 0 to 2"),
        (set_row("train_index", 0, -1), "train_index: is not ascending"),
        (set_row("test_index", 0, -9), "test_index: is not ascending"),
        (with_tensor("train_index", lambda index: index.flip(0)), "train_index: is not asc"),
        (with_tensor("test_index", lambda index: index.clamp(max=3)), "test_index: is not asc"),
        (put("kinds", ["cover", "poison", "cross"]), "kinds: are not poison, cover, cross"),
        (put("kinds", 3), "kinds: are not"),
        (put("cross_images", torch.zeros(9, 3, 8, 8)), "cross_images: is torch.float32"),
        (put("cross_images", torch.zeros(9, 8, 8, dtype=torch.uint8)), "cross_images: is"),
        (put("cross_images", [1]), "cross_images: is no tensor"),
    ],
)
def test_poison_out_of_range_is_refused(saved: RunFolder, change: Change, reason: str) -> None:
    forge(saved, "poison.pt", change)
    assert reason in load_problem(saved)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_row("train_index", -1, 12), "train_index: names image 12 of 12"),
        (set_row("test_index", -1, 9), "test_index: names image 9 of 9"),
        (set_row("test_labels", 0, 2), "test_labels: are not the dataset's"),
        (
            put("cross_images", torch.zeros(8, 3, 8, 8, dtype=torch.uint8)),
            "cross_images: 8 of 9 test images",
        ),
    ],
)
def test_poison_of_another_dataset_is_refused(
    saved: RunFolder, tiny_data: Dataset, change: Change, reason: str
) -> None:
    """Before work starts, though no file of the record can tell."""
    assert (len(tiny_data.train), len(tiny_data.test)) == (12, 9)
    forge(saved, "poison.pt", change)
    record = load_attack(saved.path)
    with pytest.raises(UserError, match=re.escape(reason)):
        record.check_dataset(tiny_data)


def test_labels_that_cover_images_keep_are_the_dataset_s(
    saved: RunFolder, tiny_data: Dataset
) -> None:
    def change(content: dict[str, Any]) -> None:
        true = tiny_data.train.labels[content["train_index"][0]]
        content["train_kinds"][0] = KINDS.index("cover")
        content["train_labels"][0] = (true + 1) % 3

    forge(saved, "poison.pt", change)
    with pytest.raises(UserError, match="train_labels: are not the dataset's"):
        load_attack(saved.path).check_dataset(tiny_data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("attack", ""), "attack: "),
        (put("attack", "x" * 201), "attack: "),
        (put("attack", "x" * 200_000), "attack: "),
        (put("attack", "a\0b"), "attack: "),
        (put("attack", 3), "attack: "),
        (put("model_name", "x" * 300), "model_name: "),
        (put("model_sha256", "abc"), "model_sha256: "),
        (put("network_size", 0), "network_size: "),
        (put("network_size", 10**9), "network_size: "),
        (put("network_size", 32.0), "network_size: "),
        (put("num_classes", 0), "num_classes: "),
        (put("num_classes", 10**9), "num_classes: "),
        (put("num_classes", True), "num_classes: "),
        (put("num_classes", 3.0), "num_classes: "),
        (put("image_shape", [3, 8]), "image_shape"),
        (put("image_shape", [1, 8, 8]), "image_shape"),
        (put("image_shape", [3, 8, 9]), "image_shape: 8 x 9"),
        (put("image_shape", [3, -8, -8]), "image_shape"),
        (put("image_shape", [3, 10**6, 10**6]), "image_shape"),
        (put("mean", [0.5, 0.5]), "mean: "),
        (put("mean", [0.5, 0.5, float("nan")]), "mean"),
        (put("std", [0.5, 0.5, 0.0]), "std"),
        (put("std", [0.5, 0.5, -1.0]), "std"),
        (put("std", [0.5, 0.5, float("inf")]), "std"),
        (put("dataset", "x" * 201), "dataset: "),
        (put("dataset_path", "x" * 5000), "dataset_path: "),
        (put("dataset_path", "a\0b"), "dataset_path: "),
        (put("dataset_fingerprint", "abc"), "dataset_fingerprint: "),
        (put("attack_target", 3), "attack_target: 3 is no class of 3"),
        (put("attack_target", -1), "attack_target: "),
        (put("attack_target", 1.0), "attack_target: "),
        (put("attack_label_trans", "one2one"), "attack_label_trans: "),
        (put("classes", "abc"), "classes: "),
        (put("classes", [1, 2, 3]), "classes"),
        (lambda content: content["model"].update({3: torch.zeros(1)}), "a weight has no name"),
        (lambda content: content["model"].update({"x" * 2000: torch.zeros(1)}), "too long a one"),
    ],
)
def test_plain_values_out_of_range_are_refused(
    saved: RunFolder, change: Change, reason: str
) -> None:
    forge(saved, "attack_result.pt", change)
    problem = load_problem(saved)
    assert reason in problem
    assert len(problem) < 500


@pytest.mark.parametrize("name", ["vgg16", "preactresnet18", "convnext_tiny"])
def test_a_network_is_made_only_for_weights_that_fit(
    saved: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A hundred thousand classes would take 1.6 GB of vgg16; a network without values says no."""

    def change(content: dict[str, Any]) -> None:
        content |= {"model_name": name, "num_classes": 100_000}

    forge(saved, "attack_result.pt", change)
    record = load_attack(saved.path)
    made = []
    monkeypatch.setattr(
        "utils.records.network.build_model",
        lambda *args, **kwargs: (
            made.append(torch.empty(0).device.type),
            build_model(*args, **kwargs),
        )[1],
    )
    with pytest.raises(UserError, match=f"its weights do not fit {name} "):
        record.build()
    assert made == ["meta"]


def test_what_is_drawn_later_does_not_depend_on_the_network_that_is_made(saved: RunFolder) -> None:
    """Its new weights are drawn, and replaced by those of the record."""
    before = torch.get_rng_state()
    load_attack(saved.path).build()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), UserError("--model: net.py:build fails")]
)
def test_what_says_nothing_of_the_weights_is_told_as_it_is(
    saved: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> Classifier:
        raise error

    monkeypatch.setattr("utils.records.network.build_model", fail)
    with pytest.raises(type(error)) as caught:
        load_attack(saved.path).build()
    assert caught.value is error


def test_another_function_of_the_user_s_file_is_another_network(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("")
    sha256 = model_identity(f"{path}:build")[1]
    assert checked_model("net.py:build", sha256, f"{path}:build") == f"{path}:build"
    with pytest.raises(UserError, match=r"but the record says net\.py:build; give that file"):
        checked_model("net.py:build", sha256, f"{path}:other")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_of_another_kind_are_refused(saved: RunFolder, dtype: torch.dtype) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["linear.bias"] = content["model"]["linear.bias"].to(dtype)

    forge(saved, "attack_result.pt", change)
    with pytest.raises(UserError, match=r"linear\.bias is .* instead of float of \(3,\)"):
        load_attack(saved.path).build()


def test_poison_that_is_changed_meanwhile_is_refused(saved: RunFolder, tiny_data: Dataset) -> None:
    """Its images are read only where they are needed, which may be much later."""
    record = load_attack(saved.path)
    assert len(record.poisoned_set(tiny_data).images) == 6
    forge(saved, "poison.pt", with_tensor("train_images", torch.zeros_like))
    with pytest.raises(UserError, match="was changed since the run began"):
        record.poisoned_set(tiny_data)
    with pytest.raises(UserError, match="was changed since the run began"):
        record.cross_images(tiny_data)
    (saved.path / "poison.pt").unlink()
    with pytest.raises(UserError, match="was changed since the run began"):
        record.poisoned_set(tiny_data)


@pytest.mark.parametrize("raised", [OSError("no room"), UserError("not this"), KeyError("defect")])
def test_an_error_while_a_file_is_read_again_is_told(tmp_path: Path, raised: Exception) -> None:
    """Of a file that was changed, only this is told, but a defect is not hidden."""
    path = tmp_path / "a.txt"
    path.write_text("abc")
    with pytest.raises(type(raised)) as caught, unchanged(path, file_sha256(path)):
        raise raised
    assert caught.value is raised
    with pytest.raises((UserError, KeyError)) as caught, unchanged(path, "0" * 64):
        raise raised
    assert (caught.value is raised) == isinstance(raised, KeyError)


@pytest.mark.parametrize("name", ["summary.json", "attack_result.pt", "poison.pt"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_at_once(saved: RunFolder, name: str, kind: str) -> None:
    (saved.path / name).unlink()
    put_no_file(saved.path / name, kind)
    assert str(saved.path) in load_problem(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved: RunFolder, value: float) -> None:
    forge(saved, "attack_result.pt", lambda content: content["model"]["linear.bias"].fill_(value))
    assert "linear.bias are not finite" in load_problem(saved)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("num_classes", 4), "do not fit tiny"),
        (put("model_name", "preactresnet18"), "do not fit preactresnet18"),
        (put("model_name", "no_such_net"), "no_such_net is unknown"),
        (lambda content: content["model"].pop("bn.weight"), "do not fit tiny"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(
    saved: RunFolder, change: Change, reason: str
) -> None:
    forge(saved, "attack_result.pt", change)
    with pytest.raises(UserError, match=reason):
        load_attack(saved.path).build()


def test_the_dataset_of_a_record_must_be_the_same(saved: RunFolder, tiny_data: Dataset) -> None:
    record = load_attack(saved.path)
    record.check_dataset(tiny_data)
    train, test = tiny_data.train, tiny_data.test
    relabelled = Labelled(test.images, test.labels.roll(1))
    smaller = Labelled(train.images[:, :, :4, :4], train.labels)
    for changes, reason in (
        ({"test": relabelled}, "not those"),
        ({"train": train.at(torch.arange(11))}, "not those"),
        ({"train": smaller}, "of (3, 4, 4)"),
        ({"classes": ("ant", "bee")}, "has 2"),
    ):
        other = dataclasses.replace(tiny_data, **changes)
        with pytest.raises(UserError, match=re.escape(reason)) as caught:
            record.check_dataset(other)
        assert "--dataset_path" in str(caught.value)
        with pytest.raises(UserError) as caught:
            record.check_shared(other, "--flag: x")
        assert str(caught.value) == (
            "--flag: x was trained on other images or classes than the record; give one of the "
            "same dataset"
        )
    record.check_shared(tiny_data, "--flag: x")


def test_hashes_are_those_of_the_files_that_exist(run: RunFolder) -> None:
    run.write_text("a.txt", "abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert file_hashes(run, "a.txt", "absent.txt") == {"a.txt": expected}


# --- where a record says that its dataset is ----------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny"])
@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_written_where_a_record_says_so(
    saved: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_there: bool
) -> None:
    """No folder made, no stray removed, nothing downloaded or extracted."""
    home = tmp_path / "elsewhere" / "gtsrb"
    archives = ("cifar-10-python.tar.gz", "tiny-imagenet-200.zip")
    if is_there:
        home.mkdir(parents=True)
        for file in (*archives, ".tiny-imagenet-200.0123abcd.tmp.zip"):
            (home / file).write_text("of the user")
            (home.parent / file).write_text("of the user")
        for folder in (home, home.parent):
            (folder / ".cifar-10-python.tar.gz.0123abcd.tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    loads = []

    def load(url: str, **_: float) -> None:
        loads.append(url)
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", load)
    forge(saved, "attack_result.pt", put("dataset_path", str(home.parent)))
    forge(saved, "attack_result.pt", put("dataset", name))
    record = load_attack(saved.path)
    with pytest.raises(UserError) as caught:
        record.load_dataset()
    assert re.fullmatch(
        rf"--dataset {name}: the record names {home.parent}\S*, which has no \S+; nothing is "
        "written there because a record says so; give the folder with --dataset_path",
        str(caught.value),
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert not loads
    with pytest.raises(UserError):  # what is there is no archive, and there is no network
        record.load_dataset(str(home.parent))
    assert loads or sorted(tmp_path.rglob("*")) != before  # the user has named the folder


def test_a_dataset_is_read_where_a_record_says(
    saved: RunFolder, tmp_path: Path, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is read next may be written again."""
    forge(saved, "attack_result.pt", put("dataset_path", str(tmp_path / "there")))
    seen = []

    def load(name: str, path: Path | None, size: int) -> Dataset:
        seen.append((path, archives._may_write))
        return tiny_data

    monkeypatch.setattr("utils.records.attack.load_dataset", load)
    record = load_attack(saved.path)
    record.load_dataset()
    record.load_dataset(str(tmp_path / "here"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    record.load_dataset("~/here")
    here = (tmp_path / "here", True)
    assert seen == [(tmp_path / "there", False), here, here]
    forge(saved, "attack_result.pt", put("dataset_path", None))
    load_attack(saved.path).load_dataset()
    assert seen[3] == (None, True)
