"""A purified model is written by the pipeline and loaded again by its folder."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models import Classifier, build_model, model_identity
from models.changes import insert
from tests.networks import copied, differing
from utils.errors import UserError
from utils.records.contents import DEFENSE_RESULT
from utils.records.defense import load_defense, save_defense
from utils.records.folders import RunFolder
from utils.records.hashes import checked_hashes, file_hashes
from utils.records.network import model_state


def attack_of(model: Classifier, **facts: Any) -> Any:
    """What a defense's result keeps of the record of a model."""
    return SimpleNamespace(
        **{
            "state": model_state(model),
            "model_name": "tiny",
            "model_sha256": None,
            "network_size": None,
            "num_classes": 3,
            "image_shape": (3, 8, 8),
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.25, 0.3),
            "sha256": "0" * 64,
            **facts,
        }
    )


def purified(model: Classifier) -> Classifier:
    """Other weights and other statistics."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    for value in model.network.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)
    return model.eval()


def saved(folder: Path, model: nn.Module, attack: Any) -> Path:
    """The folder of a finished run."""
    run_folder = RunFolder(folder)
    folder.mkdir()
    save_defense(run_folder, model, attack, "anp")
    describe(folder)
    return folder


def describe(folder: Path) -> None:
    """Writes a summary that fits the result as it is now."""
    run_folder = RunFolder(folder)
    run_folder.write_summary({"files": file_hashes(run_folder, DEFENSE_RESULT)})


def rewritten(folder: Path, **changes: Any) -> None:
    """Other values in the result, with a summary that fits; None leaves a value out."""
    content = torch.load(folder / DEFENSE_RESULT, weights_only=True) | changes
    content = {name: value for name, value in content.items() if value is not None}
    torch.save(content, folder / DEFENSE_RESULT)
    describe(folder)


@pytest.fixture
def folder(tiny_model: Classifier, tmp_path: Path) -> Path:
    return saved(tmp_path / "anp", purified(tiny_model), attack_of(tiny_model))


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def test_a_purified_model_comes_back(folder: Path, tiny_model: Classifier) -> None:
    """The same bits, in eval mode, with the record's normalization."""
    model = purified(tiny_model)
    loaded = load_defense(folder)
    assert isinstance(loaded, Classifier)
    assert not any(module.training for module in loaded.modules())
    assert differing(loaded.network.state_dict(), model.network.state_dict()) == []
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_model.eval()))
    assert torch.equal(logits(load_defense(str(folder))), logits(model))


def test_what_is_drawn_later_does_not_depend_on_what_was_loaded(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_defense(folder)
    assert torch.equal(torch.rand(3), expected)


def test_a_result_is_plain_data(folder: Path) -> None:
    """It says from which record it was made, and by which defense."""
    content = torch.load(folder / DEFENSE_RESULT, weights_only=True)
    assert {name: value for name, value in content.items() if name != "model"} == {
        "model_name": "tiny",
        "model_sha256": None,
        "network_size": None,
        "num_classes": 3,
        "image_shape": [3, 8, 8],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "changes": [],
        "defense": "anp",
        "attack_sha256": "0" * 64,
    }


def test_saving_leaves_the_model_as_it_is(tiny_model: Classifier, tmp_path: Path) -> None:
    model = purified(tiny_model).train()
    before = copied(model.state_dict())
    saved(tmp_path / "x", model, attack_of(tiny_model))
    assert model.training
    assert differing(model.state_dict(), before) == []


@pytest.mark.parametrize("layers", [[("bn", 4)], [("conv", 3), ("bn", 4)]])
def test_a_changed_network_comes_back(
    tiny_model: Classifier, tmp_path: Path, layers: list[tuple[str, int]]
) -> None:
    model = purified(tiny_model)
    for name, channels in layers:
        insert(model.network, "polarizer", name, channels)
    model = purified(model)
    loaded = load_defense(saved(tmp_path / "npd", model, attack_of(tiny_model)))
    assert differing(loaded.network.state_dict(), model.network.state_dict()) == []
    assert torch.equal(logits(loaded), logits(model))


def test_a_network_that_enlarges_its_images_comes_back(
    tiny_model: Classifier, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = purified(build_model("tiny", 3, network_size=16))
    attack = attack_of(model, network_size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    loaded = load_defense(saved(tmp_path / "x", model, attack))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.network[0].size == 16


def test_a_result_without_optional_values_comes_back(folder: Path, tiny_model: Classifier) -> None:
    """As a version that knew no changes and no other sizes wrote it."""
    rewritten(folder, changes=None, network_size=None, model_sha256=None)
    assert torch.equal(logits(load_defense(folder)), logits(purified(tiny_model)))


# a network that nothing could make again


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


def wrapped(model: Classifier) -> nn.Module:
    model.network = nn.Sequential(model.network, nn.Identity())
    return model


def no_classifier(model: Classifier) -> nn.Module:
    return Wrapped(model.network)


def bare(model: Classifier) -> nn.Module:
    return model.network


def with_other_head(model: Classifier) -> nn.Module:
    model.network.linear = nn.Linear(4, 7)
    return model


def with_more_than_a_polarizer(model: Classifier) -> nn.Module:
    insert(model.network, "polarizer", "bn", 4)
    model.network.linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    return model


def with_half_counts(model: Classifier) -> nn.Module:
    model.network.bn.num_batches_tracked = torch.tensor(0.5)
    return model


@pytest.mark.parametrize(
    "change",
    [
        *(wrapped, no_classifier, bare, with_other_head, with_more_than_a_polarizer),
        with_half_counts,
    ],
)
def test_a_network_that_nothing_could_make_again_is_refused(
    tiny_model: Classifier, tmp_path: Path, change: Callable[[Classifier], nn.Module]
) -> None:
    """Before anything is written: else the run would end well and its model be lost."""
    attack = attack_of(tiny_model)
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"^anp: [^\n]*is not the record's[^\n]*$"):
        save_defense(RunFolder(tmp_path / "x"), change(purified(tiny_model)), attack, "anp")
    assert list((tmp_path / "x").iterdir()) == []


# folders that are no finished result


def refusal(folder: Path, model: str | None = None) -> str:
    """The one line of a refusal; it names the folder."""
    with pytest.raises(UserError) as refused:
        load_defense(folder, model)
    text = str(refused.value)
    assert len(text.splitlines()) == 1
    assert str(folder) in text
    return text


def test_a_run_that_is_not_finished_is_refused(folder: Path) -> None:
    (folder / "summary.json").unlink()
    assert "no finished result of a defense; run" in refusal(folder)
    kept = folder.with_name(f".{folder.name}.replaced")
    kept.mkdir()
    assert f"a defense (the run that it replaces is kept in {kept}); run" in refusal(folder)
    kept.rmdir()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "no finished result of a defense" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", '{"a": NaN'])
def test_a_summary_that_cannot_be_read_is_refused(folder: Path, text: str) -> None:
    (folder / "summary.json").write_text(text, encoding="utf-8")
    assert "no readable summary.json" in refusal(folder)


@pytest.mark.parametrize(
    "summary",
    [[], {}, {"files": []}, {"files": {}}, {"files": {DEFENSE_RESULT: "0" * 64}}, {"files": None}],
)
def test_a_summary_of_something_else_is_refused(folder: Path, summary: Any) -> None:
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "is not the file that summary.json describes" in refusal(folder)


KINDS = {  # what a summary says, and what the refusal says
    "record": ({"attack": "badnet"}, "is the record of an attack (badnet)"),
    "record/defense/x": (
        {"defense": "sau", "attack": "badnet"},
        "is the result of a defense (sau)",
    ),
    "record/analysis/x": (
        {"analysis": "path", "attack": "badnet"},
        "is the result of an analysis (path)",
    ),
}


@pytest.mark.parametrize("place", KINDS)
@pytest.mark.parametrize("wanted", ["attack_result.pt", DEFENSE_RESULT])
def test_a_run_of_another_kind_is_said_to_be_one(tmp_path: Path, place: str, wanted: str) -> None:
    """With the folder that could be meant; a file that only the summary lacks is another matter."""
    summary, said = KINDS[place]
    folder = tmp_path / place
    folder.mkdir(parents=True)
    RunFolder(folder).write_summary({**summary, "files": {"log.txt": "0" * 64}})
    record = tmp_path / "record"
    give = record if wanted == "attack_result.pt" else record / "defense/<name>"
    expected = f"{folder}: {said}, which has no {wanted}; give {give}"
    if wanted == f"{next(iter(summary))}_result.pt":  # of that kind, but damaged
        expected = f"{folder / wanted}: is not the file that summary.json describes; run it again"
    with pytest.raises(UserError) as refused:
        checked_hashes(folder, [wanted])
    assert str(refused.value) == expected
    (folder / wanted).write_bytes(b"")
    with pytest.raises(UserError, match="is not the file that"):
        checked_hashes(folder, [wanted])


def test_the_folder_of_an_attack_is_refused(folder: Path) -> None:
    (folder / DEFENSE_RESULT).rename(folder / "attack_result.pt")
    run_folder = RunFolder(folder)
    hashes = file_hashes(run_folder, "attack_result.pt")
    run_folder.write_summary({"attack": "badnet", "files": hashes})
    assert f"is the record of an attack (badnet), which has no {DEFENSE_RESULT}" in refusal(folder)
    (folder / "summary.json").write_text("[]", encoding="utf-8")
    assert "is not the file that summary.json describes" in refusal(folder)


def test_a_file_that_is_gone_is_refused(folder: Path) -> None:
    (folder / DEFENSE_RESULT).unlink()
    assert f"{folder / DEFENSE_RESULT}: is missing, though summary.json has it" in refusal(folder)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    """One bit of its last weights is another one."""
    content = bytearray((folder / DEFENSE_RESULT).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / DEFENSE_RESULT).write_bytes(bytes(content))
    assert "is not the file that summary.json describes" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_format_is_refused_whatever_the_summary_says(
    folder: Path, content: bytes
) -> None:
    (folder / DEFENSE_RESULT).write_bytes(content)
    describe(folder)
    assert "is not a defense's result of this program" in refusal(folder)


def test_a_list_is_no_result(folder: Path) -> None:
    torch.save([1, 2], folder / DEFENSE_RESULT)
    describe(folder)
    assert "is not a defense's result of this program" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {}},
        {"model": [1]},
        {"model": {"conv.weight": 1}},
        {"model": {"conv.weight": torch.tensor(torch.nan)}},
        {"model_name": None},
        {"model_name": 3},
        {"num_classes": 0},
        {"num_classes": "3"},
        {"num_classes": 4},
        {"image_shape": [3, 8]},
        {"mean": "0.5"},
        {"std": None},
        {"network_size": 0},
        {"changes": [{"kind": "batchnorm", "layer": "bn", "channels": 4}]},
        {"changes": [{"kind": "polarizer", "layer": "bn3", "channels": 4}]},
        {"changes": [{"kind": "polarizer", "layer": "", "channels": 4}]},
        {"changes": [{"kind": "polarizer", "layer": "bn", "channels": 4}]},  # not in the weights
        {"changes": [[]]},
        {"changes": "bn"},
    ],
)
def test_other_values_are_refused(folder: Path, changes: Mapping[str, Any]) -> None:
    rewritten(folder, **changes)
    text = refusal(folder)
    assert "is not a defense's result" in text or "its weights do not fit tiny" in text


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    state = torch.load(folder / DEFENSE_RESULT, weights_only=True)["model"]
    state["linear.bias"][1] = torch.inf
    rewritten(folder, model=state)
    assert "the weights linear.bias are not finite" in refusal(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    state = torch.load(folder / DEFENSE_RESULT, weights_only=True)["model"]
    state["linear.bias"] = torch.zeros(4)
    rewritten(folder, model=state)
    assert "its weights do not fit tiny" in refusal(folder)


def test_an_unknown_model_is_refused_in_a_line(folder: Path) -> None:
    rewritten(folder, model_name="resnet19")
    with pytest.raises(UserError, match=r"^[^\n]*resnet19 is unknown[^\n]*$"):
        load_defense(folder)


# a network that is made by a user's file

USER_FILE = """
from torch import nn

def make(num_classes, image_size):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, num_classes))
"""


def test_a_user_s_file_is_run_only_if_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER_FILE, encoding="utf-8")
    name = f"{tmp_path / 'mine.py'}:make"
    torch.manual_seed(0)
    model = build_model(name, 3)
    stored, sha256 = model_identity(name)
    attack = attack_of(
        model, model_name=stored, model_sha256=sha256, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    folder = saved(tmp_path / "x", purified(model), attack)
    assert torch.equal(logits(load_defense(folder, model=name)), logits(purified(model)))
    message = 'give --model and its path, or from Python load_defense(folder, "mine.py:make")'
    with pytest.raises(UserError, match=rf"^--model: [^\n]*{re.escape(message)}$"):
        load_defense(folder)
    (tmp_path / "mine.py").write_text(USER_FILE + "\n# more", encoding="utf-8")
    with pytest.raises(UserError, match=r"^--model: [^\n]*is not the file[^\n]*$"):
        load_defense(folder, model=name)


def test_another_model_than_the_record_s_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^--model: resnet18, but the record says tiny[^\n]*$"):
        load_defense(folder, model="resnet18")
    assert load_defense(folder, model="tiny") is not None
