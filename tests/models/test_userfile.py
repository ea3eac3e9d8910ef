"""What the code of a user's network may do to a run: it is told as the user's own, in one line."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models import build_model, check_model, model_identity, userfile
from models.userfile import build_user_model
from tests.conftest import NO_FILES, Picture, put_no_file
from tests.scripts import attack_flags, defense_flags, one_error, run_script
from utils import plot
from utils.errors import UserError
from utils.files import ROOT
from utils.process import script

pytestmark = pytest.mark.usefixtures("cache")

NET = """
import os, signal, sys, threading
import torch
from torch import nn

calls = 0

class Silent(BaseException):
    pass

class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1
    @staticmethod
    def backward(ctx, gradient):
        late("backward")
        return gradient

def late(where):
    global calls
    calls += where == "{where}"
    if where == "{where}" and calls > {after}:
        {what}

class Net(nn.Module):
    def __init__(self, num_classes, image_size):
        super().__init__()
        self.linear = nn.Linear(3 * image_size**2, num_classes)
    def forward(self, images):
        late("forward")
        return self.logits(Square.apply(self.linear(images.flatten(1))))
    def logits(self, x):
        return x
    def state_dict(self, *args, **kwargs):
        late("state_dict")
        return super().state_dict(*args, **kwargs)
    def load_state_dict(self, *args, **kwargs):
        late("load_state_dict")
        return super().load_state_dict(*args, **kwargs)
    def train(self, mode=True):
        late("train")
        return super().train(mode)
    def __deepcopy__(self, memo):
        late("__deepcopy__")
        new = Net.__new__(Net)
        memo[id(self)] = new
        import copy
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

def build(num_classes, image_size):
    late("build")
    return Net(num_classes, image_size)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures; and what a file does to `os._exit` and `os.chdir` ends with the test."""
    monkeypatch.setattr(os, "_exit", os._exit)
    monkeypatch.setattr(os, "chdir", os.chdir)
    for name in ("curves", "image_grid"):
        monkeypatch.setattr(plot, name, lambda *_: Picture())


def net(folder: Path, where: str = "", what: str = "pass", after: int = 0, more: str = "") -> str:
    """A `--model` whose code does something in a place, once that was called `after` times.

    Args:
        more: code at the end of the file.
    """
    path = folder / "net.py"
    text = NET.replace("{where}", where).replace("{what}", what).replace("{after}", str(after))
    path.write_text(text + more)
    return f"{path}:build"


WAYS = {
    "raise KeyError('x')": "KeyError: 'x'",
    "raise Silent": "Silent: Silent",
    "raise Mute": "Mute: Mute",
    "raise ValueError('a\\nerror: b\\x1b[31m')": r"ValueError: a error: b\\x1b\[31m",
    "raise GeneratorExit": "GeneratorExit: GeneratorExit",
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit()": "SystemExit: ",
    "exit(0)": "SystemExit: 0",
    "os._exit(0)": r"SystemExit: os._exit\(0\)",
}


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("where", ["build", "forward", "backward"])
def test_the_trial_tells_whatever_is_raised(tmp_path: Path, where: str, what: str) -> None:
    with pytest.raises(UserError, match=WAYS[what]) as caught:
        check_model(net(tmp_path, where, what), 3, 8)
    (problem,) = caught.value.problems
    assert problem.isprintable()


MEMORY = {
    "raise MemoryError": MemoryError,
    "torch.empty(1 << 50)": RuntimeError,
    "raise RuntimeError('could not create a primitive')": RuntimeError,
}


@pytest.mark.parametrize("what", MEMORY)
@pytest.mark.parametrize("where", ["build", "forward", "backward"])
def test_a_lack_of_memory_is_not_blamed_on_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, what: str
) -> None:
    """Who would repair a file that is good?"""
    model = net(tmp_path, where, what)
    with pytest.raises(MEMORY[what]):
        check_model(model, 3, 8)
    with pytest.raises(SystemExit) as end:
        script.run_script(lambda: check_model(model, 3, 8))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is not enough memory (")


LOST = {
    "gloo": "[/x/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:45722.",
    "NCCL": "NCCL error: remote process exited or there was a network error",
    "the store": "Failed to recv, got 0 bytes. Connection was likely closed. Did the server crash?",
}


@pytest.mark.parametrize("of", LOST)
def test_the_end_of_another_process_is_not_blamed_on_the_network(tmp_path: Path, of: str) -> None:
    """It is met wherever processes meet, as in BatchNorm's layers in the user's own forward."""
    model = build_user_model(net(tmp_path, "forward", f"raise RuntimeError({LOST[of]!r})"), 3, 8)
    with (
        pytest.raises(RuntimeError, match=re.escape(LOST[of])),
        userfile.blamed(but_for=KeyboardInterrupt),
    ):
        model(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("where", ["state_dict", "load_state_dict", "train", "__deepcopy__"])
def test_the_trial_asks_for_all_that_runs_ask_for(tmp_path: Path, where: str) -> None:
    with pytest.raises(UserError, match=r"net.py:build cannot .* \(Silent: Silent\); repair it"):
        check_model(net(tmp_path, where, "raise Silent"), 3, 8)


BAD = {
    "lambda self, x: x.argmax(1)": r"gives \(2,\) for a batch of two",
    "lambda self, x: x.round().long()": "gives torch.int64 for a batch of two",
    "lambda self, x: x > 0": "gives torch.bool",
    "lambda self, x: x.to(torch.complex64)": "gives torch.complex64",
    "lambda self, x: [x]": "gives list",
    "lambda self, x: None": "gives NoneType",
    "lambda self, x: x[:, :2]": r"gives \(2, 2\)",
    "lambda self, x: x[:2]": r"gives \(2, 3\) for a batch of 3",
    "lambda self, x: x.squeeze()": (
        r"gives \(3,\) for one image of 8 x 8 pixels; logits of \(1, 3\) are needed"
    ),
    "lambda self, x: x.detach()": r"cannot be trained \(RuntimeError",
}


@pytest.mark.parametrize("logits", BAD)
def test_the_trial_refuses_what_are_no_logits(tmp_path: Path, logits: str) -> None:
    with pytest.raises(UserError, match=BAD[logits]) as caught:
        check_model(net(tmp_path, more=f"\nNet.logits = {logits}\n"), 3, 8)
    assert len(caught.value.problems) == 1


STATES = {
    "Net.get_extra_state = lambda self: {'a': 1}; Net.set_extra_state = lambda self, s: None": (
        r"cannot be saved as finite tensors alone \(TypeError: _extra_state is dict\)"
    ),
    "Net.state_dict = lambda self, *a, **k: 3": "cannot be saved as finite tensors alone",
    "Net.state_dict = lambda self, *a, **k: {3: torch.zeros(1)}": "TypeError: 3 is Tensor",
    "Net.state_dict = lambda self, *a, **k: {'a': torch.tensor(float('nan'))}": "a is not finite",
    (
        "def forward(self, images):\n"
        "    self.register_buffer('seen', torch.zeros(1))\n"
        "    return self.linear(images.flatten(1))\n"
        "Net.forward = forward"
    ): "other names or shapes of weights after a call than before",
    (
        "def build(num_classes, image_size):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "    net[1].unused = nn.LazyLinear(4)\n"
        "    return net"
    ): "cannot be saved as finite tensors alone",
    (
        "def build(num_classes, image_size):\n"
        "    sys.calls = getattr(sys, 'calls', 0) + 1\n"
        "    return nn.Sequential(nn.Flatten(), nn.Sequential(*[nn.Identity()] * sys.calls,\n"
        "        nn.Linear(3 * image_size**2, num_classes)))"
    ): "cannot load the weights of another one",
    "Net.__deepcopy__ = lambda self, memo: self": "no copy with weights of its own",
    "Net.__deepcopy__ = lambda self, memo: None": "cannot be saved as finite tensors alone",
    (
        "def build(num_classes, image_size):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))\n"
        "    plain = net.forward\n"
        "    net.forward = lambda images: plain(images * 2 - 1)\n"
        "    return net"
    ): "a copy that computes with the weights of the network itself",
}


def test_lazy_layers_have_their_weights_once_the_network_is_made(tmp_path: Path) -> None:
    """BatchNorm has counted nothing, modes are the constructor's, and the trial accepts it."""
    name = net(
        tmp_path,
        more="\ndef build(num_classes, image_size):\n"
        "    layers = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Dropout().eval()\n"
        "    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(num_classes))\n",
    )
    network = build_user_model(name, 3, 8)
    assert [type(layer).__name__ for layer in network] == [
        *("Conv2d", "BatchNorm2d", "Dropout", "Flatten", "Linear")
    ]
    assert network[-1].weight.shape == (3, 4 * 6 * 6)
    assert int(network[1].num_batches_tracked) == 0
    assert [layer.training for layer in network] == [True, True, False, True, True]
    check_model(name, 3, 8)


@pytest.mark.parametrize("more", STATES)
def test_the_trial_refuses_a_state_that_no_record_keeps(tmp_path: Path, more: str) -> None:
    with pytest.raises(UserError, match=STATES[more]) as caught:
        check_model(net(tmp_path, more=f"\n{more}\n"), 3, 8)
    assert len(caught.value.problems) == 1


def test_a_good_network_passes(tmp_path: Path) -> None:
    told: list[str] = []
    check_model(net(tmp_path), 3, 8, warn=told.append)
    assert told == []


FOLLOWING = """
import torch
from torch import nn

class Following(nn.Module):
    def __init__(self, num_classes, image_size):
        super().__init__()
        self.linear = nn.Linear(3 * image_size**2, num_classes)
        {start}

    def forward(self, images):
        {move}
        return self.linear(images.flatten(1)) + self.state
"""


def following(folder: Path, start: str, move: str) -> str:
    """A `--model` with state, which moves in train mode, and is added to its logits."""
    path = folder / "net.py"
    path.write_text(FOLLOWING.replace("{start}", start).replace("{move}", move))
    return f"{path}:Following"


def test_the_trial_tells_of_state_that_nothing_keeps(tmp_path: Path) -> None:
    name = following(tmp_path, "self.state = 0", "self.state += self.training")
    told: list[str] = []
    check_model(name, 3, 8, warn=told.append)
    assert told == [
        f"--model: {name} computes with state, which its state dict lacks, so a run that is "
        "resumed, or a model that is loaded, may differ; keep it in a buffer (register_buffer)"
    ]
    check_model(name, 3, 8)  # nobody is told


BUFFER = "self.register_buffer('state', torch.zeros(3){})"
MOVE = "if self.training: self.state.add_(1)"


def test_the_trial_refuses_a_buffer_that_a_record_would_lack(tmp_path: Path) -> None:
    name = following(tmp_path, BUFFER.format(", persistent=False"), MOVE)
    with pytest.raises(UserError, match=r"in eval mode without state, which its state dict lacks"):
        check_model(name, 3, 8)
    told: list[str] = []
    check_model(following(tmp_path, BUFFER.format(""), MOVE), 3, 8, warn=told.append)
    assert told == []


def test_an_attack_keeps_what_the_trial_told(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = following(tmp_path, "self.state = 0", "self.state += self.training")
    assert attack(workplace, "counts", model) == 0
    told = "net.py:Following computes with state, which its state dict lacks"
    assert capsys.readouterr().err.count(told) == 1
    (warning,) = (
        text
        for text in json.loads((workplace / "record/counts/summary.json").read_text())["warnings"]
        if "state dict" in text
    )
    assert told in warning


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_model_is_a_file(tmp_path: Path, kind: str) -> None:
    put_no_file(tmp_path / "net.py", kind)
    for work in (model_identity, lambda name: check_model(name, 3, 8)):
        with pytest.raises(UserError, match=r"net\.py cannot be read") as caught:
            work(f"{tmp_path}/net.py:build")
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udc80"])
def test_a_path_that_no_system_takes(name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        check_model(f"/tmp/{name}.py:build", 3, 8)


def test_outside_of_a_run_a_file_may_change_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook, relative paths are the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    build_user_model(net(tmp_path, "build", "os.chdir('inside')"), 3, 8)
    assert Path.cwd() == tmp_path / "inside"


def test_what_ran_is_what_the_sha256_is_of(tmp_path: Path) -> None:
    """The file writes itself anew whenever it is run, and would give another network then."""
    name = net(tmp_path, more="\nopen(__file__, 'a').write('\\nraise KeyError\\n')\n")
    before = hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()
    with userfile.blamed(but_for=KeyboardInterrupt):
        check_model(name, 3, 8)
        build_model(name, 3, image_size=8)
        assert model_identity(name)[1] == before
    assert hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest() != before
    with userfile.blamed(but_for=KeyboardInterrupt), pytest.raises(UserError, match="KeyError"):
        check_model(name, 3, 8)  # another run reads it again


def test_another_frame_s_exit_is_the_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(userfile, "_LEAVE", left.append)
    check_model(net(tmp_path), 3, 8)
    os._exit(7)
    assert left == [7]


@pytest.mark.slow
def test_a_child_of_the_user_s_code_ends_as_it_wants(tmp_path: Path) -> None:
    more = (
        "\nchild = os.fork()\nif not child:\n    os._exit(5)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5\n"
    )
    script = f"import models; models.check_model({net(tmp_path, more=more)!r}, 3, 8)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def attack(workplace: Path, name: str, model: str, *more: object) -> int:
    flags = attack_flags(workplace, name, model=model, batch_size=4)
    return run_script(ROOT / "attack/badnet.py", *flags, *more)


LATER = {"forward": 12, "backward": 3}  # calls, more than those of the trial


@pytest.mark.parametrize("what", [*WAYS, "raise KeyboardInterrupt"])
@pytest.mark.parametrize("where", LATER)
def test_what_is_raised_later_is_one_line_and_leaves_no_record(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, what: str
) -> None:
    model = net(tmp_path, where, what, LATER[where])
    assert attack(workplace, "later", model, "--overwrite") == 2
    text = capsys.readouterr().err
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    path = model.removesuffix(":build")
    line = next(n for n, t in enumerate(NET.splitlines(), 1) if "{what}" in t)
    assert error.startswith(f"error: --model: {path}, line {line}: ")
    assert error.endswith("; this is your own file, repair it")
    assert "Traceback" not in text
    assert "\x1b" not in text
    assert not (workplace / "record/later/summary.json").exists()
    assert "of 36 training images are replaced" in text  # that is, after the trial


CHANGES = {
    "return x[:, :2]": r"net\.py:build gives \(.*, 2\) for a batch of .*; logits of .* are needed",
    "return x[:-1]": r"net\.py:build gives \(.*, 3\) for a batch of .*; logits of .* are needed",
    "return x, x": r"net\.py:build gives tuple for a batch of .*; logits of .* are needed",
    "self.more = nn.Parameter(x.new_zeros(2))": "has got the weight more while it was used",
    "del self.linear.bias; self.linear.bias = None": "has lost the weight linear.bias while",
    "self.linear.bias = nn.Parameter(x.new_zeros(1))": (
        r"has changed the weight linear.bias from \(3,\) to \(1,\) while it was used"
    ),
    "self.seen = self.seen + 0.5": (
        "has changed the weight seen from int64 to float while it was used"
    ),
    "self.far = self.far + torch.inf": "the weights far are not finite, so no record of them",
    "os.chdir('/')": "net.py, line .*: OSError: .*os.chdir.*; this is your own file, repair it",
}


def changing(folder: Path, what: str, after: int = LATER["forward"]) -> str:
    """A `--model` that does something in its calls after some; it has two buffers."""
    more = f"def logits(self, x):\n    if calls > {after}:\n        {what}\n    return x\n"
    more += "def build(num_classes, image_size):\n    net = Net(num_classes, image_size)\n"
    more += "    net.register_buffer('seen', torch.zeros((), dtype=torch.int64))\n"
    more += "    net.register_buffer('far', torch.zeros(()))\n    return net\n"
    counting = "raise AssertionError"  # after more calls than any run has
    return net(folder, "forward", counting, 10**6, f"\n{more}Net.logits = logits\n")


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_network_gives_or_has_later_is_one_line(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    assert attack(workplace, "turns", changing(tmp_path, what), "--overwrite") == 2
    error = one_error(capsys)
    assert re.search(CHANGES[what], error)
    assert not (workplace / "record/turns/summary.json").exists()


@pytest.mark.parametrize("more", [(), ("--checkpoint_every", 0)])
def test_a_record_that_nobody_could_read_replaces_no_other_one(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...]
) -> None:
    assert attack(workplace, "good", net(tmp_path), "--overwrite") == 0
    before = (workplace / "record/good/summary.json").read_bytes()
    model = changing(tmp_path, "self.far = self.far + torch.inf")
    assert attack(workplace, "good", model, "--overwrite", *more) == 2
    assert "far" in capsys.readouterr().err
    assert (workplace / "record/good/summary.json").read_bytes() == before
    assert not (workplace / "record/.good.replaced").exists()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("self.more = nn.Parameter(x.new_zeros(2))", "net.py:build has got the weight more"),
        ("self.seen = self.seen + 0.5", "net.py:build has changed the weight seen from int64 to"),
        ("self.far = self.far + torch.inf", "the weights far are not finite, so no record of them"),
    ],
)
def test_a_defense_tells_of_weights_that_the_network_got_by_itself(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, told: str
) -> None:
    """It asks outside whether to get one, since the file is the record's own by its content."""
    mark = tmp_path / "mark"
    model = changing(tmp_path, f"if os.path.exists({str(mark)!r}): {what}")
    assert attack(workplace, "grows", model, "--overwrite") == 0
    mark.touch()
    flags = [*defense_flags(workplace, "grows"), "--model", model]
    assert run_script(ROOT / "defense/sau.py", *flags) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ft", "fst"])
def test_a_defense_tells_of_a_copy_that_is_none_before_all_else(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """FST would say that no linear layer gives the logits."""
    mark = tmp_path / "mark"
    model = net(
        tmp_path,
        more="\ndef build(num_classes, image_size):\n"
        "    network = Net(num_classes, image_size)\n"
        f"    if os.path.exists({str(mark)!r}):\n"
        "        plain = network.forward\n"
        "        network.forward = lambda images: plain(images * 2 - 1)\n"
        "    return network\n",
    )
    assert attack(workplace, f"closed_{name}", model) == 0
    mark.touch()
    flags = [*defense_flags(workplace, f"closed_{name}"), "--model", model]
    assert run_script(ROOT / f"defense/{name}.py", *flags) == 2
    error = one_error(capsys)
    assert "a copy of the network computes with the weights of the network itself" in error


@pytest.mark.parametrize("where", ["forward", "load_state_dict", "__deepcopy__", "state_dict"])
def test_a_defense_tells_it_too(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """The file is the record's own by its content; it asks outside whether to do harm."""
    mark = tmp_path / "mark"
    what = f"os.path.exists({str(mark)!r}) and sys.exit(0)"
    model = net(tmp_path, where, what)
    assert attack(workplace, f"good_{where}", model) == 0
    mark.touch()
    flags = [*defense_flags(workplace, f"good_{where}"), "--model", model]
    assert run_script(ROOT / "defense/sau.py", *flags) == 2
    text = capsys.readouterr().err
    assert "SystemExit: 0; this is your own file, repair it" in text
    assert "Traceback" not in text
    assert not (workplace / f"record/good_{where}/defense/sau/summary.json").exists()


def test_the_sha256_of_a_record_is_of_what_ran(workplace: Path, tmp_path: Path) -> None:
    model = net(tmp_path, more="\nopen(__file__, 'a').write('# more\\n')\n")
    before = hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()
    assert attack(workplace, "changing", model) == 0
    result = torch.load(workplace / "record/changing/attack_result.pt", weights_only=True)
    assert result["model_sha256"] == before


def test_ctrl_c_in_the_user_s_code_is_an_interrupt(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, because the first one waits for a checkpoint; it comes more than a second later."""
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    wait = f"{kill}; import time; time.sleep(1.1); {kill}; time.sleep(60)"
    model = net(tmp_path, "forward", wait, LATER["forward"])
    assert attack(workplace, "interrupted", model) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (workplace / "record/interrupted/summary.json").exists()


def test_ctrl_c_in_the_trial_is_an_interrupt(workplace: Path, tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)"
    assert attack(workplace, "interrupted2", net(tmp_path, "forward", kill)) == 130


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sys.exit(0)", "os._exit(0)"])
def test_a_process_does_not_end_well(workplace: Path, tmp_path: Path, what: str) -> None:
    model = net(tmp_path, "forward", what, LATER["forward"])
    flags = [*attack_flags(workplace, "process", model=model, batch_size=4), "--overwrite"]
    run = subprocess.run(
        [sys.executable, ROOT / "attack/badnet.py", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"error: --model: {tmp_path}/net.py, line ")


def test_a_repaired_file_is_another_one_for_resume(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the run had done with the broken one was done with another network."""
    model = net(tmp_path, "forward", "raise Silent", LATER["forward"] + 2)
    assert attack(workplace, "repaired", model, "--checkpoint_every", 0) == 2
    net(tmp_path)
    assert attack(workplace, "repaired", model, "--resume") == 2
    assert "was run with another content of" in capsys.readouterr().err
    assert attack(workplace, "repaired", model, "--overwrite") == 0
    summary = json.loads((workplace / "record/repaired/summary.json").read_text())
    assert summary["model"] == "net.py:build"


def test_our_own_errors_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of the program is not blamed on a file that merely is there."""
    check_model(net(tmp_path), 3, 8)
    with pytest.raises(ZeroDivisionError), userfile.blamed(but_for=KeyboardInterrupt):
        1 / 0  # noqa: B018
    assert models.userfile is userfile


@pytest.mark.filterwarnings("ignore")
def test_a_network_with_a_script_inside_is_refused_in_a_line(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An attack trains it; what looks into a network, or changes it, cannot."""
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build(num_classes, image_size):\n"
        "    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(torch.jit.script(part), *end)\n"
    )
    model = f"{tmp_path}/net.py:build"
    assert attack(workplace, "script", model) == 0
    flags = ["--result_file", "script", "--record_path", workplace / "record", "--model", model]
    scripts = "defense/fp.py", "defense/clp.py", "defense/npd.py"
    for name in (*scripts, "analysis/features.py", "analysis/gradcam.py"):
        assert run_script(ROOT / name, *flags) == 2, name
        text = capsys.readouterr().err
        assert "made by torch.jit.script or trace" in text, script
        assert "Traceback" not in text, script
    flags += ["--layer", "0"]
    assert run_script(ROOT / "analysis/gradcam.py", *flags) == 2
    assert "layer 0 was made by torch.jit.script" in capsys.readouterr().err
