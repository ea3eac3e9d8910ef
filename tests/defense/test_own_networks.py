"""Networks of the user's own, whatever their code does: every defense works, or says why not."""

import copy
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import defense
from models import Classifier, build_model
from models.views import has_own_code
from tests.every_defense import module, shortened
from utils.errors import UserError
from utils.training.loop import Loop

every_defense = pytest.mark.parametrize("name", defense.names())


class Own(nn.Module):
    """Two convolutions and a head, written for images in torch's usual order."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 4)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.one(images)).relu()
        return nn.functional.max_pool2d(self.other(self.two(x)).relu(), 2)

    def forward(self, images: torch.Tensor) -> Any:
        x = self.features(images)
        return self.head(x.view(x.size(0), -1))


class Counting(Own):
    """Counts its calls in a buffer, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(images)


class Frozen(Own):
    """Keeps BatchNorm in eval mode."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        self.other.eval()
        return self


class Silent(Frozen):
    """As many such networks are written: without `return self`, also at the end of `eval()`."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        super().requires_grad_(requires_grad)


class InPlace(Own):
    """Normalizes the caller's images."""

    def forward(self, images: torch.Tensor) -> Any:
        return super().forward(images.sub_(0.5).div_(0.25))


class Auxiliary(Own):
    """Gives a second output in train mode."""

    def forward(self, images: torch.Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


def images() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.rand(24, 3, 8, 8, generator=source), torch.arange(24) % 4


def purified(name: str, model: nn.Module, pixels: torch.Tensor | None = None) -> nn.Module:
    given, labels = images()
    config = shortened(name, model, n_rounds=1, batch_size=8)
    return module(name).purify(model, given if pixels is None else pixels, labels, config)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def test_code_of_the_user_s_is_told_from_ours_and_torch_s() -> None:
    changed = nn.Sequential(nn.Flatten())
    changed[0].forward = lambda images: images.flatten(1)  # type: ignore[method-assign]
    assert has_own_code(changed)
    assert has_own_code(nn.Sequential(nn.Sequential(Own())))
    assert has_own_code(torch.fx.symbolic_trace(Own()))
    assert not has_own_code(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten()))
    for name in ("preactresnet18", "resnet18", "vit_b_16", "swin_t"):
        with torch.device("meta"):
            assert not has_own_code(build_model(name, 4))


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_hooks_are_code_of_the_user_s(register: Callable[[nn.Module], RemovableHandle]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten())
    hook = register(network[0])
    assert has_own_code(network)
    hook.remove()
    assert not has_own_code(network)


def test_a_traced_network_takes_images_that_are_channels_last() -> None:
    model = Classifier(torch.fx.symbolic_trace(made(Own)), (0.5,) * 3, (0.25,) * 3)
    pixels = images()[0]
    last = pixels.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), model(pixels))


@every_defense
@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_view_in_the_forward_pass_works(name: str, as_bytes: bool) -> None:
    """Our images are channels-last in memory, where `x.view(len(x), -1)` is not possible."""
    pixels = (images()[0] * 255).to(torch.uint8)
    result = purified(name, made(Own), pixels if as_bytes else pixels / 255)
    assert result(pixels / 255).isfinite().all()


@every_defense
def test_buffers_that_calls_change_stay_as_they_were(name: str) -> None:
    model = made(Counting)
    first, again = purified(name, model), purified(name, model)
    assert model.calls == 0  # type: ignore[comparison-overlap]
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@every_defense
def test_what_a_network_s_train_returns_does_not_matter(name: str) -> None:
    expected, found = (purified(name, made(kind)).state_dict() for kind in (Frozen, Silent))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_network_that_cannot_be_copied_is_told_why() -> None:
    model = made(Own)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"be copied by copy\.deepcopy .*; give one without locks"):
        purified("ft", model)


@every_defense
@pytest.mark.parametrize("is_leaf", [True, False])
def test_the_caller_s_images_get_no_gradient(name: str, is_leaf: bool) -> None:
    leaf = images()[0].requires_grad_()
    purified(name, made(Own), leaf if is_leaf else leaf * 1)
    assert leaf.grad is None


@every_defense
def test_the_result_carries_no_gradient(name: str) -> None:
    """Whoever trains it further begins without that of our last step; the given one keeps its."""
    model = made(Own)
    model.head.bias.grad = torch.ones(4)
    result = purified(name, model)
    assert all(weight.grad is None for weight in result.parameters())
    assert torch.equal(model.head.bias.grad, torch.ones(4))


class Scaled(Own):
    """Its first parameter is of another type than its layers."""

    dtype = torch.float64

    def __init__(self) -> None:
        super().__init__()
        layers = dict(self.named_children())
        for name in layers:
            delattr(self, name)
        self.scale = nn.Parameter(torch.ones((), dtype=self.dtype), requires_grad=False)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: torch.Tensor) -> Any:
        return (super().forward(images) * self.scale.real).float()


class Counted(Scaled):
    dtype = torch.int64


class Complex(Scaled):
    dtype = torch.complex64


@every_defense
@pytest.mark.parametrize("kind", [Scaled, Counted, Complex])
def test_a_parameter_of_another_type_may_come_first(name: str, kind: type[Scaled]) -> None:
    model = made(kind)
    assert next(model.parameters()).dtype == kind.dtype
    assert purified(name, model)(images()[0]).isfinite().all()


class Listed(Own):
    """Has its layers under a second name, too; `forward` uses either."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.one, self.norm, nn.ReLU(), self.two, self.other)
        self.again = nn.ModuleList([self.norm, self.other])
        head = self.head
        del self.head
        self.last = self.head = head  # the last part that is registered

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(self.layers(images).relu(), 2)


@every_defense
def test_a_layer_may_have_two_names(name: str) -> None:
    """It is one layer, and the result is that of the network without the second name."""
    expected, found = purified(name, made(Own)), purified(name, made(Listed))
    for key, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


class Twins(Own):
    """Its head shares the weight of another linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(6 * 16, 4)
        self.twin.weight = self.head.weight

    def forward(self, images: torch.Tensor) -> Any:
        x = self.features(images).flatten(1)
        return self.twin(x) + self.head(x)


@pytest.mark.parametrize("name", ["d3", "fp", "fst"])
def test_a_head_that_shares_its_weight_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"share a weight, and this method would change both"):
        purified(name, made(Twins))


class Checkpointed(Own):
    """Computes its second half again for the gradients."""

    reentrant: bool | None = False

    def forward(self, images: torch.Tensor) -> Any:
        x = self.norm(self.one(images)).relu()
        if self.reentrant is None:
            return self.late(x)
        return checkpoint(self.late, x, use_reentrant=self.reentrant)

    def late(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.other(self.two(x)).relu(), 2)
        return self.head(x.flatten(1))


class Reentrant(Checkpointed):
    reentrant = True


class Switched(Checkpointed):
    reentrant = None


GIVE_BACK_EARLY = ("anp", "bti_dbf", "ims", "npd", "pam", "rnp", "sau_far")


@every_defense
@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_gradient_checkpointing_works_or_is_refused(
    name: str, kind: type[Checkpointed], frozen: bool
) -> None:
    """What is computed again is wrong once weights, modes or hooks are as they were."""
    model, other = made(kind), made(Switched)
    for network in (model, other):
        network.two.requires_grad_(not frozen)
        network.other.requires_grad_(not frozen)
    refused = set(defense.names()) - set(LEARN_NOTHING) if kind is Reentrant else GIVE_BACK_EARLY
    if name in refused:
        with pytest.raises(UserError, match=r"switch this off .model.gradient_checkpointing_dis"):
            purified(name, model)
    else:
        expected, found = purified(name, other).state_dict(), purified(name, model).state_dict()
        assert all(
            torch.allclose(value, expected[key], atol=1e-5)
            for key, value in found.items()
            if "running" not in key and "batches" not in key  # they count what is computed again
        )


def test_sau_refuses_checkpointing_in_train_mode() -> None:
    model = made(Checkpointed)
    config = shortened("sau", model, n_rounds=1, batch_size=8, train_mode=True)
    with pytest.raises(UserError, match=r"it computes parts of itself again for the gradients"):
        module("sau").purify(model, *images(), config)


@every_defense
@pytest.mark.parametrize(
    "made_of", [torch.jit.script, lambda model: torch.jit.trace(model, torch.rand(2, 3, 8, 8))]
)
@pytest.mark.filterwarnings("ignore")
def test_a_scripted_network_is_refused(name: str, made_of: Callable[[nn.Module], Any]) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 4))
    given, labels = images()
    config = shortened(name, plain, n_rounds=1, batch_size=8)
    with pytest.raises(UserError, match=r"torch\.jit\.script or trace"):
        module(name).purify(made_of(plain.eval()), given, labels, config)


def plain() -> nn.Module:
    """A network of torch's own modules."""
    model = Own()
    return nn.Sequential(
        *(model.one, model.norm, nn.ReLU(), nn.Sequential(model.two), model.other, nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), model.head),
    )


@pytest.mark.parametrize("name", ["anp", "bnp", "bti_dbf", "fp", "nad", "npd"])
def test_a_compiled_network_gives_what_it_was_made_of_gives(name: str) -> None:
    """Also if it was called before; compiled code calls no hook that came later."""
    torch._dynamo.reset()
    expected = purified(name, made(plain)).state_dict()
    compiled = torch.compile(made(plain), backend="eager").eval()
    with torch.no_grad():
        for count in (24, 8):
            compiled(images()[0][:count])
    found = purified(name, compiled).state_dict()
    for key, value in found.items():
        assert torch.equal(value, expected[key.replace("_orig_mod.", "")]), key


@pytest.mark.parametrize("name", ["anp", "fp", "rnp"])
def test_where_no_image_can_be_held_out_the_warning_says_so(name: str) -> None:
    model, (pixels, _) = made(Own), images()
    loop = Loop()
    config = shortened(name, model, batch_size=8)
    result = module(name).purify(model, pixels[:4], torch.arange(4), config, loop)
    assert "no image can be held out" in loop.findings.warnings[-1]
    assert "held_out_accs" not in loop.findings.facts
    for key, value in model.state_dict().items():
        assert torch.equal(value, result.state_dict()[key])


@pytest.mark.parametrize("name", ["anp", "fp", "rnp"])
def test_too_large_a_held_out_part_is_told_by_its_flag(name: str) -> None:
    model = made(Own)
    config = shortened(name, model, batch_size=8, val_ratio=0.999999)
    with pytest.raises(UserError, match=r"--val_ratio: 0.999999 of 24 images leaves none"):
        module(name).purify(model, *images(), config)


def test_a_network_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = made(Own)
    with pytest.raises(UserError, match=r"made under torch\.inference_mode"):
        purified("ft", model)


@every_defense
def test_a_network_of_shapes_alone_is_refused(name: str) -> None:
    """Also where one of its buffers is there."""
    config = shortened(name, made(Own))
    with torch.device("meta"):
        model = made(Own)
    model.norm.running_mean = torch.zeros(6)  # type: ignore[union-attr, operator]
    with pytest.raises(
        UserError, match=r"made under torch\.device\('meta'\), where weights have no"
    ):
        module(name).purify(model, *images(), config)


@every_defense
def test_a_network_that_changes_its_images_is_refused(name: str) -> None:
    given = images()[0]
    with pytest.raises(UserError, match="the network changes the images that it is given"):
        purified(name, made(InPlace), given)
    assert torch.equal(given, images()[0])


@every_defense
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    model = made(Own)
    with torch.no_grad():
        model.two.weight[0, 0, 0, 0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match=r"model: two\.weight is not finite"):
        purified(name, model)


# Methods that never call the whole network in train mode; SAU does with `train_mode`.
IN_EVAL_MODE = ("bnp", "clp", "ep", "ibau", "ims", "npd", "sau")


@every_defense
def test_another_output_in_train_mode_is_refused_where_it_is_used(name: str) -> None:
    if name in IN_EVAL_MODE:
        purified(name, made(Auxiliary))
    else:
        with pytest.raises(UserError, match="the network gives tuple for 2 images in train mode"):
            purified(name, made(Auxiliary))


def test_sau_in_train_mode_needs_one_output_there() -> None:
    config = shortened("sau", made(Auxiliary), n_rounds=1, batch_size=8, train_mode=True)
    with pytest.raises(UserError, match="the network gives tuple for 2 images in train mode"):
        module("sau").purify(made(Auxiliary), *images(), config)


class Keyword(Own):
    """Calls its layers with keywords."""

    def forward(self, images: torch.Tensor) -> Any:
        x = self.norm(input=self.one(input=images)).relu()
        x = nn.functional.max_pool2d(self.other(input=self.two(input=x)).relu(), 2)
        return self.head(input=x.flatten(1))


@every_defense
def test_a_layer_called_with_a_keyword_is_the_same_one(name: str) -> None:
    one, other = (purified(name, made(kind)).state_dict() for kind in (Own, Keyword))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_activation_that_the_network_keeps_stays_as_it_was() -> None:
    class Keeping(Own):
        def forward(self, images: torch.Tensor) -> Any:
            self.last = super().forward(images)
            return self.last

    model = made(Keeping)
    logits = model(images()[0])
    purified("clp", model)
    assert model.last is logits
    assert logits.grad_fn is not None


@pytest.mark.parametrize("name", ["nc", "fp"])
def test_a_frozen_network_is_refused_before_the_work(name: str) -> None:
    """Not after the searches, or after the selection of a level."""
    model, calls = made(Own).requires_grad_(False), []
    config = shortened(name, model, n_rounds=1, batch_size=8)
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match="no weight that may be trained"):
        module(name).purify(model, *images(), config)
    assert len(calls) <= 4  # of the checks
    still = shortened(name, model, n_rounds=0, batch_size=8)
    module(name).purify(model, *images(), still)


def test_fst_leaves_a_frozen_bias_as_it_is() -> None:
    model = made(Own)
    model.head.bias.requires_grad_(False)  # type: ignore[union-attr]
    result = purified("fst", model)
    assert torch.equal(result.head.bias, model.head.bias)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(result.head.weight, model.head.weight)  # type: ignore[union-attr, arg-type]


def test_a_network_that_raises_in_train_mode_is_refused() -> None:
    class Breaks(Own):
        def train(self, mode: bool = True) -> "Breaks":
            self.breaks = mode
            return super().train(mode)

        def forward(self, images: torch.Tensor) -> Any:
            if self.breaks:
                raise KeyError("teacher")
            return super().forward(images)

    with pytest.raises(UserError, match=r"cannot be called in train mode .KeyError: 'teacher'"):
        purified("ft", made(Breaks).eval())


class Cut(nn.Module):
    """Cuts off gradients in a way that wrappers of networks often have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, Own()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "detach":
            return self.inner(x.detach() * 2 - 1)
        if self.how == "numpy":
            return self.inner(torch.from_numpy(x.detach().numpy() * 2 - 1))
        with torch.no_grad():
            return self.inner(x)


MOVE_IMAGES = ("bti_dbf", "ibau", "ims", "nc", "npd", "pam", "sau", "sau_far")
LEARN_NOTHING = ("bnp", "clp", "ep")


@every_defense
@pytest.mark.parametrize("how", ["detach", "numpy", "no_grad"])
def test_a_network_that_cuts_off_gradients_is_refused_where_they_are_needed(
    name: str, how: str
) -> None:
    """Without its trigger, a method would find something else, or raise torch's own error."""
    what = "weights" if how == "no_grad" else "images"
    if name in (MOVE_IMAGES if what == "images" else set(defense.names()) - set(LEARN_NOTHING)):
        with pytest.raises(UserError, match=f"^model: no gradient reaches the {what}, because"):
            purified(name, made(lambda: Cut(how)))
    else:
        purified(name, made(lambda: Cut(how)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("name", [n for n in defense.names() if n != "ims"])
def test_weights_that_hooks_compute_in_each_pass_are_copied(
    name: str, norm: Callable[[nn.Module], nn.Module]
) -> None:
    """Torch refuses to copy what they are after a pass with gradients."""

    def make() -> nn.Module:
        model = Own()
        norm(model.one)
        return model

    copy.deepcopy(purified(name, made(make)))


@every_defense
def test_features_that_a_network_keeps_are_no_obstacle(name: str) -> None:
    class Keeping(Own):
        def __init__(self) -> None:
            super().__init__()
            self.maps: dict[str, list[torch.Tensor]] = {}

        def forward(self, images: torch.Tensor) -> Any:
            logits = super().forward(images)
            self.maps["logits"] = [logits]
            return logits

    expected, found = purified(name, made(Own)).state_dict(), purified(name, made(Keeping))
    copy.deepcopy(found)
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


@every_defense
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_works_or_is_refused(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the logits are large, so that probabilities are 0 and 1."""
    model = made(Own)
    with torch.no_grad():
        model.head.weight.mul_(30)
    given = images()[0].to(dtype)
    if dtype == torch.float16 and name in (*MOVE_IMAGES[:3], "pam", "sau", "sau_far"):
        with pytest.raises(
            UserError, match=r"its weights are in float16, .* give model\.float\(\)"
        ):
            purified(name, model.to(dtype), given)
    else:
        result = purified(name, model.to(dtype), given)
        assert next(result.parameters()).dtype == dtype
    if dtype == torch.bfloat16:
        learns = module(name).Config.learns
        said = "the model's weights are in bfloat16, where small steps are lost"
        assert sum(said in record.message for record in caplog.records) == learns
        caplog.clear()
        purified(name, made(Own))
        assert not any(said in record.message for record in caplog.records)


@every_defense
def test_images_become_what_the_network_s_weights_are(name: str) -> None:
    """A network in float64 takes no others, and 51 levels are 0.2 of the range for it, too."""
    levels = (images()[0] * 255).to(torch.uint8)
    model = made(Own).double()
    expected = purified(name, model, levels.double() / 255).state_dict()
    found = purified(name, model, levels).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert purified(name, model, levels / 255)(levels.double()).dtype == torch.float64
    rounded = purified(name, made(Own), (levels / 255).double())
    assert next(rounded.parameters()).dtype == torch.float32


def test_a_network_that_changes_the_type_itself_gets_the_images_as_they_are() -> None:
    class Casting(Own):
        def forward(self, images: torch.Tensor) -> Any:
            given.add(images.dtype)
            return super().forward(images.double())

    given: set[torch.dtype] = set()
    purified("ft", made(Casting).double(), images()[0])
    assert given == {torch.float32}


@every_defense
def test_the_configuration_of_another_defense_is_refused(name: str) -> None:
    other = "bnp" if name != "bnp" else "clp"
    config = module(other).Config.load("digits")
    with pytest.raises(UserError, match=rf"config: Config of \S+ is no .*defense.{name}.Config"):
        module(name).purify(made(Own), *images(), config)


def with_forward(model: Own, is_bound: bool) -> nn.Module:
    """Its forward pass is replaced, as in front of a network of torchvision."""
    plain = model.forward
    model.forward = (  # type: ignore[method-assign]
        types.MethodType(lambda self, x: Own.forward(self, x * 2 - 1), model)
        if is_bound
        else lambda x: plain(x * 2 - 1)
    )
    return model


@every_defense
def test_a_network_whose_copy_would_compute_with_its_weights_is_refused(name: str) -> None:
    """Else it would be trained in place of its copy, which would come back as it was."""
    model = with_forward(made(Own), is_bound=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"^model: a copy of the network computes with the weights"):
        purified(name, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@every_defense
def test_a_network_with_a_method_in_place_of_its_forward_pass_works(name: str) -> None:
    class Before(Own):
        def forward(self, images: torch.Tensor) -> Any:
            return super().forward(images * 2 - 1)

    expected = purified(name, made(Before)).state_dict()
    found = purified(name, with_forward(made(Own), is_bound=True)).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


# --- layers whose weights cannot be changed ------------------------------------------------------


def with_parametrized(part: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Own()
        parametrizations.weight_norm(getattr(model, part))
        return model

    return make


def tied() -> nn.Module:
    model = Own()
    model.other.weight = model.norm.weight
    third = nn.Conv2d(6, 6, 3, padding=1)
    third.weight = model.two.weight
    return nn.Sequential(model.one, model.norm, model.two, third, model.other, Tail())


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "part"),
    [("fp", "head"), ("d3", "head"), ("fst", "head"), ("ims", "two")],
)
def test_a_weight_that_is_computed_from_others_is_refused(name: str, part: str) -> None:
    with pytest.raises(UserError, match=r"the weight of the layer .* is computed from others"):
        purified(name, made(with_parametrized(part)))


@pytest.mark.parametrize("name", ["anp", "rnp", "bnp", "clp", "ep", "ims"])
def test_layers_that_share_a_weight_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"the layers \d and \d share a weight"):
        purified(name, made(tied))


@every_defense
def test_batchnorm_without_biases_works(name: str) -> None:
    def make() -> nn.Module:
        model = Own()
        model.norm.bias = None  # as BatchNorm2d(6, bias=False) of torch 2.7
        return model

    assert purified(name, made(make))(images()[0]).isfinite().all()


@pytest.mark.parametrize("name", ["anp", "rnp", "ims"])
def test_a_dataparallel_network_is_refused_where_it_cannot_work(name: str) -> None:
    with pytest.raises(UserError, match="give the network that is in it"):
        purified(name, nn.DataParallel(made(Own)))
    config = shortened(name, made(Own), n_rounds=1, batch_size=8)
    with pytest.raises(UserError, match="give the network that is in it"):  # before any work
        config.check_network(nn.DataParallel(made(Own)), (3, 8, 8))


@pytest.mark.parametrize("name", ["anp", "bnp", "clp", "ep", "rnp"])
def test_synchronised_batchnorm_of_one_process_is_batchnorm(name: str) -> None:
    expected = purified(name, made(Own)).state_dict()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(made(Own))
    found = purified(name, synchronised)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in found.modules())
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_neural_cleanse_takes_the_network_s_type(dtype: torch.dtype) -> None:
    given, labels = images()
    model = made(Own).to(dtype)
    config = shortened("nc", model, n_rounds=1, batch_size=8)
    result = module("nc").purify(model, given.to(dtype), labels, config)
    assert {value.dtype for value in result.parameters()} == {dtype}


def test_a_run_that_diverges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its losses are finite, since BatchNorm keeps them small, and its statistics are not."""
    model = made(Own)

    def diverge(model: nn.Module, *_: Any) -> nn.Module:
        model.norm.running_var[0] = torch.inf  # type: ignore[index, union-attr]
        return model

    monkeypatch.setattr(diverge, "__module__", "defense.ft", raising=False)
    from defense.base import checked

    with pytest.raises(UserError, match=r"norm\.running_var of the purified network is not finite"):
        checked(diverge)(model, *images(), module("ft").Config.load("digits"))


def test_a_mask_of_minus_infinity_is_no_weight() -> None:
    model = made(Own)
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    assert purified("ft", model)(images()[0]).isfinite().all()


def test_what_is_checked_first_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws the same, whether or not the network was called before."""
    dropout = nn.Sequential(made(Own), nn.Dropout())
    found = purified("ft", dropout).state_dict()
    monkeypatch.setattr("defense.base.check_given", lambda _, pixels, *__, **___: pixels)
    expected = purified("ft", dropout).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
