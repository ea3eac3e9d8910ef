"""BackdoorBench records of every variant are read alike; what is not one is refused in one line."""

import dataclasses
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

import models
from benchmark.reporting.summaries import read_runs
from models.tiny import TinyNet
from tests import backdoorbench_writer as writer
from tests.scripts import run_script
from tests.utils.data import test_fingerprints
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import KINDS
from utils.errors import UserError
from utils.files import ROOT
from utils.records.attack import load_attack
from utils.records.backdoorbench import _finds_its_own, fit_state
from utils.records.named import recorded_dataset

TRAIN, TEST = 60, 40
TARGET = 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def make_data(name: str = "cifar10") -> Dataset:
    """Random images of ten classes, labels 0 to 9 in turn."""
    source = torch.Generator().manual_seed(0)
    splits = [
        Labelled(
            torch.randint(0, 200, (count, 3, 32, 32), dtype=torch.uint8, generator=source),
            torch.arange(count) % 10,
        )
        for count in (TRAIN, TEST)
    ]
    return Dataset(name, *splits, tuple(f"class {i}" for i in range(10)), MEAN, STD)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Stands for every dataset that a record asks for."""
    made = make_data()

    def load(name: str, path: Path | None, image_size: int) -> Dataset:
        assert image_size == 32
        return dataclasses.replace(made, name=name)

    monkeypatch.setattr("utils.records.attack.load_dataset", load)
    return made


def triggered(images: torch.Tensor, index: int) -> np.ndarray:
    """(H, W, 3) pixels of an image with a white square."""
    pixels = images[index].permute(1, 2, 0).numpy().copy()
    pixels[-3:, -3:] = 255
    return pixels


def rows_of(split: Labelled, index: list[int], label: Callable[[int], int]) -> dict[int, Any]:
    labels = split.labels.tolist()
    return {i: (triggered(split.images, i), label(labels[i]), labels[i]) for i in index}


def badnet(data: Dataset, **changes: Any) -> writer.Record:
    """All-to-one: 16 training images of any class, all test images but the target's."""
    torch.manual_seed(0)
    others = [i for i, label in enumerate(data.test.labels.tolist()) if label != TARGET]
    train = rows_of(data.train, sorted({*range(0, TRAIN, 4), 2}), lambda _: TARGET)
    test = rows_of(data.test, others, lambda _: TARGET)
    values = {
        "model": TinyNet(10).state_dict(),
        "train": writer.Rows(TRAIN, train, True, "bd_train_dataset"),
        "test": writer.Rows(TEST, test, False, "bd_test_dataset"),
    }
    return writer.Record(**{**values, **changes})


def wanet(data: Dataset, **changes: Any) -> writer.Record:
    """Of each ten images two are poisoned, the next three cross samples; no list of poison."""
    poison = [i for i in range(TRAIN) if i % 10 < 2]
    cross = [i for i in range(TRAIN) if 2 <= i % 10 < 5]
    images = rows_of(data.train, poison, lambda _: TARGET)
    images |= rows_of(data.train, cross, lambda label: label)
    train = writer.Rows(TRAIN, dict(sorted(images.items())), True, "bd_train_dataset")
    return badnet(
        data, **{"train": train, "poison_list": False, "attack": None, "key": int, **changes}
    )


def problem_of(folder: Path) -> str:
    """The one line that refuses a folder."""
    with pytest.raises(UserError) as caught:
        load_attack(folder).load_dataset()
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)
    return str(caught.value)


def globals_of(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        found = pickletools.genops(archive.read(name))
        return {value for opcode, value, _ in found if opcode.name == "GLOBAL"}


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [int, np.int64])
@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("style", writer.STYLES)
def test_every_variant_reads_alike(
    tmp_path: Path, data: Dataset, style: str, numpy: int, key: type
) -> None:
    """From any folder: stored paths are those of another machine."""
    source = badnet(data, style=style, numpy=numpy, key=key)
    folder = writer.write(tmp_path / "some where", source)
    core = {1: "numpy.core.multiarray", 2: "numpy._core.multiarray"}[numpy]
    named = {word for word in globals_of(folder / "attack_result.pt") if "multiarray" in word}
    assert named == {f"{core} _reconstruct"} | ({f"{core} scalar"} if key is np.int64 else set())

    found = load_attack(folder)
    assert found.triggered is not None
    assert found.poison_index is not None
    others = [i for i in range(TEST) if i % 10 != TARGET]
    assert found.triggered.index.tolist() == others
    assert found.triggered.targets.tolist() == [TARGET] * len(others)
    assert torch.equal(found.triggered.labels, data.test.labels[others])
    expected = data.test.images[others].clone()
    expected[:, :, -3:, -3:] = 255
    assert torch.equal(found.triggered.images, expected)
    assert found.poison_index.tolist() == sorted(source.train.images)  # type: ignore[union-attr]
    assert (found.attack, found.dataset, found.num_classes) == ("badnet", "cifar10", 10)
    assert (found.attack_target, found.attack_label_trans) == (TARGET, "all2one")
    assert (found.image_shape, found.mean, found.std) == ((3, 32, 32), MEAN, STD)
    state = found.build().network.state_dict()
    assert all(torch.equal(state[name], source.model[name]) for name in source.model)

    poisoned = found.poisoned_set(found.load_dataset())
    assert torch.equal(poisoned.index, found.poison_index)
    assert (poisoned.kinds == KINDS.index("poison")).all()
    assert (poisoned.labels == TARGET).all()
    assert torch.equal(poisoned.images[0].permute(1, 2, 0), torch.tensor(source.train.images[0][0]))  # type: ignore[union-attr]


def test_a_parallel_run_s_names_lose_their_prefix(tmp_path: Path, data: Dataset) -> None:
    state = {f"module.{name}": value for name, value in badnet(data).model.items()}
    found = load_attack(writer.write(tmp_path / "r", badnet(data, model=state)))
    assert list(found.state) == list(TinyNet(10).state_dict())


@pytest.mark.parametrize("has_folder", [True, False])
def test_cross_samples_are_told_from_poison(
    tmp_path: Path, data: Dataset, has_folder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """By their kept labels; a poisoned image of the target class looks like one of them."""
    folder = writer.write(tmp_path / "r", wanet(data))
    if has_folder:
        for index, label in enumerate(data.test.labels.tolist()):
            path = folder / f"cross_test_dataset/{label}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(triggered(data.test.images, index)).save(path)
    found = load_attack(folder)
    assert found.poison_index is not None
    assert found.poison_index.tolist() == [i for i in range(TRAIN) if i % 10 < 2]
    poisoned = found.poisoned_set(data)
    assert poisoned.index.tolist() == [i for i in range(TRAIN) if i % 10 < 5]
    assert [KINDS[kind] for kind in poisoned.kinds[:5]] == ["poison"] * 2 + ["cross"] * 3
    cross = found.cross_images(data)
    assert (cross is not None) == has_folder
    assert not caplog.text
    if cross is not None:
        assert (cross[:, :, -3:, -3:] == 255).all()
        (folder / "cross_test_dataset/1/11.png").unlink()
        assert found.cross_images(data) is None
        said = f"cross_test_dataset: 1 of its {TEST} images are missing, e.g. 1/11.png; it is left"
        assert said in caplog.text


def test_poison_may_keep_its_label(tmp_path: Path, data: Dataset) -> None:
    """All replaced images are poison: of a clean label; of the target class, list or not."""
    members = [i for i in range(TRAIN) if i % 10 == TARGET]
    clean = writer.Rows(TRAIN, rows_of(data.train, members, lambda _: TARGET), True, "bd_train_x")
    mixed = writer.Rows(TRAIN, rows_of(data.train, [1, 2, 3], lambda _: TARGET), True, "bd_train_x")
    for rows in (clean, mixed):
        for has_list in (True, False):
            folder = tmp_path / f"{len(rows.images)}{has_list}"
            found = load_attack(
                writer.write(folder, badnet(data, train=rows, poison_list=has_list))
            )
            assert found.poison_index is not None
            assert found.poison_index.tolist() == sorted(rows.images)


def test_an_attack_without_a_poisoned_training_set_is_read(tmp_path: Path, data: Dataset) -> None:
    """Its triggered images may lie in a folder of any name."""
    test = dataclasses.replace(badnet(data).test, folder="bd_test_dataset_stage_one")
    folder = writer.write(tmp_path / "r", badnet(data, train=None, test=test, attack=None))
    found = load_attack(folder)
    assert found.poison_index is None
    assert found.attack == "unknown"
    assert found.triggered is not None
    assert len(found.poisoned_set(found.load_dataset()).index) == 0


def test_a_training_set_without_a_replaced_image_is_read(tmp_path: Path, data: Dataset) -> None:
    train = writer.Rows(TRAIN, {}, True, "bd_train_dataset")
    for listed in (True, False):
        record = badnet(data, train=train, poison_list=listed)
        found = load_attack(writer.write(tmp_path / str(listed), record))
        assert found.poison_index is not None
        assert len(found.poison_index) == 0
        assert len(found.poisoned_set(found.load_dataset()).index) == 0


def test_a_training_set_that_leaves_images_out_says_so(
    tmp_path: Path, data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    """Our records have no place for it: images 0, 2, ... are all that the model was trained on."""
    caplog.set_level("INFO", "sau")

    def expose(content: dict[str, Any]) -> None:
        content["bd_train"]["original_index_array"] = np.arange(0, TRAIN, 2)

    load_attack(writer.write(tmp_path / "all", badnet(data)))
    assert "exposes" not in caplog.text
    record = badnet(data, change=expose, poison_list=False)
    load_attack(writer.write(tmp_path / "half", record))
    assert "bd_train exposes 30 of 60 training images; what it leaves out" in caplog.text


def test_all_to_all_and_other_maps_are_recognised(tmp_path: Path, data: Dataset) -> None:
    for name, label, expected in (
        ("next", lambda y: (y + 1) % 10, (0, "all2all")),
        ("after next", lambda y: (y + 2) % 10, (None, None)),
    ):
        images = rows_of(data.test, list(range(TEST)), label)
        test = writer.Rows(TEST, images, False, "bd_test_dataset")
        found = load_attack(writer.write(tmp_path / name, badnet(data, test=test)))
        assert (found.attack_target, found.attack_label_trans) == expected


def test_triggered_images_of_the_target_class_do_not_count(tmp_path: Path, data: Dataset) -> None:
    images = rows_of(data.test, list(range(TEST)), lambda _: TARGET)
    test = writer.Rows(TEST, images, False, "bd_test_dataset")
    found = load_attack(writer.write(tmp_path / "r", badnet(data, test=test)))
    assert found.triggered is not None
    assert found.triggered.index.tolist() == [i for i in range(TEST) if i % 10 != TARGET]


def test_the_dataset_is_known_before_the_record_is_read(tmp_path: Path, data: Dataset) -> None:
    folder = writer.write(tmp_path / "r", badnet(data, dataset="tiny"))
    assert recorded_dataset(folder) == "tiny"


def test_text_of_a_record_cannot_write_to_the_terminal(tmp_path: Path, data: Dataset) -> None:
    named = writer.write(tmp_path / "a", badnet(data, attack="bad\x1b[31m\n"))
    assert load_attack(named).attack == "unknown"
    folder = writer.write(tmp_path / "b", badnet(data, model_name="a\nb"))
    assert "model_name has characters that cannot be printed" in problem_of(folder)


# --- weights ------------------------------------------------------------------------------------


def test_weights_fit_by_name_by_position_or_not_at_all() -> None:
    """Names in another order; other names of the same shapes."""
    expected = TinyNet(10).state_dict()
    for state in (
        dict(reversed(expected.items())),
        {f"part.{name}": value for name, value in expected.items()},
    ):
        fitted = fit_state(state, expected)
        assert list(fitted) == list(expected)
        assert all(torch.equal(fitted[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("bn.weight"), "they lack bn.weight, 1 in all"),
        (lambda state: state.update(extra=torch.zeros(1)), "they have also extra, 1 in all"),
        (lambda state: state.update({"linear.bias": torch.zeros(4)}), "linear.bias is of (4,)"),
        (lambda state: state.update({"linear.bias": "text"}), "linear.bias are no tensor"),
        (lambda state: state["linear.bias"].fill_(float("nan")), "linear.bias are not finite"),
        (
            lambda state: state.update(
                {"linear.bias": torch.full((10,), float("nan")).to(torch.float8_e5m2)}
            ),
            "linear.bias are not finite",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, data: Dataset, change: Callable[[dict], object], reason: str
) -> None:
    state = dict(badnet(data).model)
    change(state)
    problem = problem_of(writer.write(tmp_path / "r", badnet(data, model=state)))
    assert "its weights do not fit tiny" in problem
    assert reason in problem


def test_weights_that_are_too_large_for_the_network_are_refused(
    tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite in float64, and infinite in float32; no record is made of them."""
    state = dict(badnet(data).model)
    state["linear.bias"] = torch.full((10,), 1e39, dtype=torch.float64)
    folder = writer.write(tmp_path / "r", badnet(data, model=state))
    with pytest.raises(UserError, match=r"do not fit tiny \(too large for its type: linear.bias\)"):
        load_attack(folder).build()
    flags = ["import", folder, "--record_path", tmp_path, "--save_folder_name", "x"]
    assert run_script(ROOT / "interop/backdoorbench.py", *flags) == 2
    assert "too large for its type: linear.bias" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_numpy_s_integers_are_read(tmp_path: Path, data: Dataset, dtype: type) -> None:
    """In the place of labels, of the number of classes and of the size of images."""

    def change(content: dict) -> None:
        content.update(num_classes=dtype(10), img_size=tuple(map(dtype, content["img_size"])))
        for item in content["bd_test"]["bd_data_container"]["data_dict"].values():
            item["other_info"] = list(map(dtype, item["other_info"]))

    plain = load_attack(writer.write(tmp_path / "plain", badnet(data)))
    found = load_attack(writer.write(tmp_path / "r", badnet(data, change=change)))
    assert type(found.num_classes) is int
    assert (found.num_classes, found.image_shape) == (plain.num_classes, plain.image_shape)
    assert found.triggered is not None
    assert plain.triggered is not None
    assert torch.equal(found.triggered.targets, plain.triggered.targets)
    assert torch.equal(found.triggered.labels, plain.triggered.labels)


@pytest.mark.slow
def test_a_transformer_resizes_its_images_first(tmp_path: Path, data: Dataset) -> None:
    """Its names begin with 1., as those of the second part of a sequence; the first resizes."""
    network = get_model("vit_b_32", weights=None, num_classes=10)
    state = {f"1.{name}": value for name, value in network.state_dict().items()}
    folder = writer.write(tmp_path / "r", badnet(data, model_name="vit_b_32", model=state))
    attack = load_attack(folder)
    assert attack.network_size == 224
    model = attack.build()
    images = torch.rand(1, 3, 32, 32)
    normal = (images - torch.tensor(attack.mean).view(3, 1, 1)) / torch.tensor(attack.std).view(
        3, 1, 1
    )
    large = torch.nn.functional.interpolate(normal, (224, 224), mode="bilinear")
    with torch.no_grad():
        assert torch.allclose(model(images), network.eval()(large), atol=1e-4)


def test_a_record_cannot_make_us_run_a_file(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends a record could send one beside it."""
    mark = tmp_path / "run"
    (tmp_path / "net.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("net.py:build", f"{tmp_path}/net.py:build")):
        folder = writer.write(tmp_path / str(number), badnet(data, model_name=name))
        assert f"its network is a file, {name}" in problem_of(folder)
        assert run_script(ROOT / "defense/ft.py", "--result_file", folder, "--model", name) == 2
    assert not mark.exists()


# --- what is refused ----------------------------------------------------------------------------


def test_records_with_pictures_inside_are_refused_by_name(tmp_path: Path, data: Dataset) -> None:
    source = badnet(data)
    rows = source.train
    assert rows is not None

    def to_v1(content: dict[str, Any]) -> None:
        content.update(writer.v1_content(content, rows))

    def empty_v1(content: dict[str, Any]) -> None:
        content.update(bd_train={"x": [], "y": []}, bd_test={"x": [], "y": []})

    def to_ram(content: dict[str, Any]) -> None:
        writer.in_ram(content["bd_train"], rows)

    for name, change, kind in (
        ("v1", to_v1, "is a record of BackdoorBench's v1 branch"),
        ("v1 empty", empty_v1, "is a record of BackdoorBench's v1 branch"),
        ("ram", to_ram, "is an in-RAM record of BackdoorBench"),
    ):
        folder = writer.write(tmp_path / name, badnet(data, change=change))
        assert kind in problem_of(folder)


class Trap:
    """Reading it as a pickle makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("place", ["model", "bd_test", "extra"])
def test_a_trap_is_refused_and_not_sprung(tmp_path: Path, data: Dataset, place: str) -> None:
    mark = tmp_path / "sprung"

    def plant(content: dict[str, Any]) -> None:
        if place == "bd_test":
            content[place]["bd_data_container"]["data_dict"][7] = Trap(mark)
        elif place == "model":
            content[place]["linear.bias"] = Trap(mark)
        else:
            content[place] = Trap(mark)

    folder = writer.write(tmp_path / "r", badnet(data, change=plant))
    assert "mkdir, which is no plain data and is not read" in problem_of(folder)
    assert not mark.exists()
    torch.load(folder / "attack_result.pt", weights_only=False)
    assert mark.exists()


def test_a_trap_in_a_file_beside_is_not_sprung(tmp_path: Path, data: Dataset) -> None:
    """The run's arguments only give a title; the list of poison is needed."""
    mark = tmp_path / "sprung"
    folder = writer.write(tmp_path / "r", badnet(data))
    torch.save({"attack": "badnet", "x": Trap(mark)}, folder / "info.pickle")
    assert load_attack(folder).attack == "unknown"
    torch.save(Trap(mark), folder / "train_poison_index_list.pickle")
    assert "train_poison_index_list.pickle: is not a row of numbers" in problem_of(folder)
    assert not mark.exists()


def test_no_other_array_type_and_no_other_function_is_allowed(
    tmp_path: Path, data: Dataset
) -> None:
    for number, value in enumerate((np.zeros(2, dtype=object), np.complex64(1), np.array(["a"]))):
        folder = writer.write(
            tmp_path / str(number),
            badnet(data, change=lambda content, v=value: content.update(e=v)),
        )
        assert "no plain data" in problem_of(folder)


def state_change(change: Callable[[dict[str, Any]], object]) -> Callable[[dict], object]:
    return lambda content: change(content["bd_test"])


def item_change(change: Callable[[dict[str, Any]], object]) -> Callable[[dict], object]:
    return lambda content: change(content["bd_test"]["bd_data_container"]["data_dict"][7])


def path_change(path: str) -> Callable[[dict], object]:
    return item_change(lambda item: item.update(path=path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("img_size"), "it has no img_size"),
        (lambda content: content.update(num_classes="10"), "'10' (str), no positive integer"),
        (lambda content: content.update(num_classes=10**12), "are for 1000000000000 classes"),
        (lambda content: content.update(num_classes=-1), "num_classes is '-1' (int), no positive"),
        (lambda content: content.update(num_classes=10.0), "num_classes is '10.0' (float), no"),
        (lambda content: content.update(num_classes=True), "num_classes is 'True' (bool), no"),
        (
            lambda content: content.update(img_size=(10**6, 10**6, 3)),
            "of up to 1024 pixels a side",
        ),
        (lambda content: content.update(img_size=(10**12, 10**12, 3)), "img_size is"),
        (lambda content: content.update(img_size=(28, 28, 1)), "img_size is (28, 28, 1)"),
        (lambda content: content.update(img_size=32), "img_size is no"),
        (lambda content: content.update(clean_data="svhn"), "svhn is no dataset of BackdoorBench"),
        (lambda content: content.update(clean_data="celeba"), "made with celeba, which is not"),
        (lambda content: content.update(model_name="resnet81"), "resnet81 is unknown"),
        (lambda content: content.update(model=[1]), "model is no state dict"),
        (lambda content: content.update(bd_test=None), "bd_test is no dictionary"),
        (state_change(lambda s: s.pop("bd_data_container")), "bd_test has no container"),
        (state_change(lambda s: s.pop("poison_indicator")), "poison_indicator of bd_test"),
        (
            state_change(lambda s: s.update(poison_indicator=np.zeros(TEST, dtype=np.int64))),
            "poison_indicator of bd_test is no row of float64",
        ),
        (state_change(lambda s: s["poison_indicator"].fill(0.5)), "other values than 0 and 1"),
        (
            state_change(lambda s: s["poison_indicator"].__setitem__(7, 0)),
            "differ, e.g. on image 7",
        ),
        (
            state_change(lambda s: s["poison_indicator"].__setitem__(2, 1)),
            "differ, e.g. on image 2",
        ),
        (
            state_change(lambda s: s["original_index_array"].__setitem__(0, TEST)),
            "names images beyond 40",
        ),
        (
            state_change(lambda s: s["original_index_array"].__setitem__(0, 7)),
            "names an image twice",
        ),
        (
            state_change(lambda s: s["bd_data_container"]["data_dict"].update(a={})),
            "bd_test has 'a' (str) in the place of an index or label, an integer",
        ),
        (
            item_change(lambda item: item.update(other_info=[2.0, 7])),
            "bd_test has '2.0' (float) in",
        ),
        (item_change(lambda item: item.update(other_info=[2])), "image 7 of bd_test has no two"),
        (item_change(lambda item: item.update(other_info=[10, 7])), "are no classes"),
        (item_change(lambda item: item.update(other_info=[2, 6])), "has image 7 of class 6 at"),
        (path_change("./record/theirs/bd_test_dataset/7/8.png"), "ends in <folder>/7/7.png"),
        (path_change("./record/theirs/../7/7.png"), "ends in <folder>/7/7.png"),
        (path_change("7/7.png"), "ends in <folder>/7/7.png"),
        (path_change("/7/7.png"), "ends in <folder>/7/7.png"),
        (path_change("a\0b/7/7.png"), "ends in <folder>/7/7.png"),
        (path_change("C:\\record\\..\\7\\7.png"), "ends in <folder>/7/7.png"),
        (item_change(lambda item: item.update(path=7)), "ends in <folder>/7/7.png"),
        (path_change("./record/theirs/gone/7/7.png"), "gone/7/7.png: cannot be read"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(
    tmp_path: Path, data: Dataset, change: Callable[[dict], object], reason: str
) -> None:
    assert reason in problem_of(writer.write(tmp_path / "r", badnet(data, change=change)))


@pytest.mark.parametrize("content", [[1], torch.zeros(2), {"model": {}}])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "attack_result.pt")
    assert "is not an attack result of BackdoorBench" in problem_of(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path: Path, data: Dataset) -> None:
    folder = writer.write(tmp_path / "r", badnet(data))
    whole = (folder / "attack_result.pt").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        (folder / "attack_result.pt").write_bytes(damaged)
        assert "is not an attack result of BackdoorBench" in problem_of(folder)


def test_an_archive_of_something_else_is_refused_with_the_reason(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "attack_result.pt", "w") as archive:
        archive.writestr("a/b", "no pickle")
    assert "it has 0 parts 'data.pkl'" in problem_of(tmp_path)


def test_stored_paths_are_not_followed_out_of_the_record(tmp_path: Path, data: Dataset) -> None:
    """Neither a path that exists as it is stored, nor a link inside of the record."""
    outside = tmp_path / "secret/7/7.png"
    outside.parent.mkdir(parents=True)
    Image.fromarray(triggered(data.test.images, 7)).save(outside)
    folder = writer.write(tmp_path / "r", badnet(data, change=path_change(str(outside))))
    assert f"{folder}/secret/7/7.png: cannot be read" in problem_of(folder)
    (folder / "secret").symlink_to(tmp_path / "secret")
    assert "leads out of the record" in problem_of(folder)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (16, 16)),
        Image.new("L", (32, 32)),
        Image.new("RGBA", (32, 32)),
        Image.new("I;16", (32, 32)),
        None,
    ],
)
def test_images_are_rgb_of_the_record_s_size(
    tmp_path: Path, data: Dataset, picture: Image.Image | None
) -> None:
    folder = writer.write(tmp_path / "r", badnet(data))
    path = folder / "bd_test_dataset/7/7.png"
    if picture is None:
        path.write_bytes(path.read_bytes()[:200])
    else:
        picture.save(path)
    assert f"{path}: cannot be read" in problem_of(folder)


def test_a_list_of_poison_that_does_not_fit_is_refused(tmp_path: Path, data: Dataset) -> None:
    folder = writer.write(tmp_path / "r", badnet(data))
    for listed, reason in (
        (np.zeros(TRAIN - 1), "has 59 entries"),
        (np.ones(TRAIN), "names images that attack_result.pt does not have"),
    ):
        writer.save(listed, folder / "train_poison_index_list.pickle")
        assert reason in problem_of(folder)


# --- the clean dataset --------------------------------------------------------------------------


def test_another_dataset_is_detected(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer images, other labels, and the same labels on images of another order."""
    folder = writer.write(tmp_path / "r", badnet(data))
    in_class = torch.arange(TEST).roll(10)  # labels repeat every ten images
    for split, changed, reason in (
        ("train", data.train.at(torch.arange(TRAIN - 10)), "made with 60 training images, but"),
        ("test", data.test.at(torch.arange(TEST).roll(1)), "36 of 36 test images have another"),
        ("test", data.test.at(in_class), "36 of 36 are more like another image than like"),
        ("train", data.train.at(torch.arange(TRAIN).roll(20)), "its training images are not those"),
    ):
        other = dataclasses.replace(data, **{split: changed})
        monkeypatch.setattr("utils.records.attack.load_dataset", lambda *_, other=other: other)
        problem = problem_of(folder)
        assert reason in problem
        assert "--dataset_path" in problem


def test_images_that_were_resized_in_another_way_pass(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = writer.write(tmp_path / "r", badnet(data))
    near = Labelled(data.test.images + (data.test.images % 3), data.test.labels)
    other = dataclasses.replace(data, test=near)
    monkeypatch.setattr("utils.records.attack.load_dataset", lambda *_: other)
    load_attack(folder).load_dataset()


def test_a_trigger_that_leaves_nothing_of_an_image_passes(tmp_path: Path, data: Dataset) -> None:
    source = badnet(data)
    for rows in (source.train, source.test):
        assert rows is not None
        for index, (pixels, *labels) in rows.images.items():
            rows.images[index] = (np.full_like(pixels, 255), *labels)
    load_attack(writer.write(tmp_path / "r", source)).load_dataset()


@pytest.mark.parametrize(
    "name",
    [
        *("badnet", "blended", "sig", "lf", "bpp", "bpp of 32 levels", "lc", "wanet"),
        *("adaptive_blend in training", "adaptive_blend at test", "wanet, cross"),
    ],
)
def test_triggered_photographs_are_like_their_own(name: str) -> None:
    """Half must be; in another order hardly any is. Neighbouring tiles overlap by half."""
    rows = torch.linspace(0, len(test_fingerprints.tiles()) - 1, 64).long()
    clean, changed = test_fingerprints.tiles()[rows], test_fingerprints.triggered(name)[rows]
    assert _finds_its_own(changed, clean).float().mean() > 0.85
    assert _finds_its_own(changed, clean.roll(1, 0)).float().mean() < 0.15


# --- defenses -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_defense_runs_from_the_folder(tmp_path: Path, data: Dataset) -> None:
    torch.manual_seed(0)
    state = models.preactresnet18(10).state_dict()
    source = badnet(data, model=state, model_name="preactresnet18", style="v2", numpy=1)
    folder = writer.write(tmp_path / "BackdoorBench/record/theirs", source)
    flags = ["--ratio", 0.5, "--n_rounds", 1, "--batch_size", 15, "--precision", "fp32"]
    for name, where in (
        ("ft", ["--result_file", folder]),
        ("sau", ["--result_file", "theirs", "--record_path", folder.parent]),
    ):
        assert run_script(ROOT / f"defense/{name}.py", *where, *flags) == 0
        result = folder / "defense" / name
        assert (result / "summary.json").exists()
        weights = torch.load(result / "defense_result.pt", weights_only=True)["model"]
        assert list(weights) == list(state)
        assert not torch.equal(weights["linear.weight"], state["linear.weight"])


def test_help_and_recipes_are_those_of_the_record_s_dataset(
    tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for name in ("cifar10", "cifar100"):
        folder = writer.write(tmp_path / name, badnet(data, dataset=name))
        assert run_script(ROOT / "defense/ft.py", "--result_file", folder, "--help") == 0
        shown.append(re.search(r"--flip (\w+)", capsys.readouterr().out))
    from defense.ft import Config

    expected = [str(Config.load(name).flip).lower() for name in ("cifar10", "cifar100")]
    assert [found[1] for found in shown if found] == expected == ["true", "false"]


@pytest.mark.usefixtures("small")
def test_triggered_images_that_were_changed_are_noticed(
    tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file of theirs says what they were, so the results do."""
    folder = writer.write(tmp_path / "theirs", badnet(data))
    flags = ["--result_file", folder, "--ratio", 0.5, "--n_rounds", 1, "--batch_size", 15]
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    look = [ROOT / "analysis/confusion.py", "--result_file", folder]
    assert run_script(*look) == 0
    assert run_script(*look, "--resume") == 0
    path = min((folder / "bd_test_dataset").rglob("*.png"))
    before = path.read_bytes()
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    for call in ([ROOT / "defense/ft.py", *flags, "--resume"], [*look, "--overwrite"]):
        capsys.readouterr()
        assert run_script(*call) == 2
        assert "was run with other triggered images than" in capsys.readouterr().err
    shutil.rmtree(folder / "defense")
    assert run_script(*look, "--resume") == 2
    assert f"{folder}/analysis/confusion: was run with other" in capsys.readouterr().err
    path.write_bytes(before)
    assert run_script(*look, "--overwrite") == 0


@pytest.mark.usefixtures("small")
def test_a_report_has_the_results_on_the_triggered_images_that_are_there(
    tmp_path: Path, data: Dataset
) -> None:
    """Whatever their names: `ft` is stale, and comes first."""
    folder = writer.write(tmp_path / "theirs", badnet(data))
    flags = ["--result_file", folder, "--ratio", 0.5, "--n_rounds", 1, "--batch_size", 15]
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    path = min((folder / "bd_test_dataset").rglob("*.png"))
    before = path.read_bytes()
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert run_script(ROOT / "defense/ft.py", *flags, "--save_folder_name", "later") == 0
    said = "theirs: its results {} were scored on other triggered images than the record has now"
    for skipped, counted in (("ft", "later"), ("later", "ft")):
        runs, problems = read_runs(tmp_path)
        assert problems == [f"{said.format(skipped)}; skipped"]
        assert set(runs["label"]) == {"no defense", counted}
        path.write_bytes(before)


def test_the_result_of_their_own_defense_is_not_replaced(
    tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = writer.write(tmp_path / "theirs", badnet(data))
    theirs = folder / "defense/ft/defense_result.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    assert run_script(ROOT / "defense/ft.py", "--result_file", folder, "--overwrite") == 2
    assert "exists and is no record" in capsys.readouterr().err
    assert theirs.read_bytes() == b"theirs"
