"""What users do to a wrapped model, or did before: taken over or refused, with what to do; never
lost in silence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Experience, Installed
from greenvis.techniques import registry
from greenvis.testing import default_hosts
from greenvis.testing._loop import Labelled, fed


def vit(classes: int = 2) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=classes,
    )


def step(live: Any, y: Tensor, lr: float = 0.1) -> None:
    model, x = live.model, torch.rand(len(y), 3, 16, 16, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(live.param_groups(lr), lr=lr)
    model.train()
    x, y = live.batch(x, y)
    output = model(x)
    (live.criterion(F.cross_entropy)(output, y) + live.loss(x, y, output)).backward()
    optimizer.step()
    live.step_end()


def grow(model: Any) -> None:
    model.reset_classifier(4)


def other_head(model: Any) -> None:
    model.head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))
    model.num_classes = 4


def other_weight(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.cat([model.head.weight.detach(), torch.zeros(2, 32)]))
    model.head.bias = nn.Parameter(torch.cat([model.head.bias.detach(), torch.zeros(2)]))
    model.num_classes = 4


TAKE: dict[str, Callable[[], list[gv.Technique]]] = {
    "no technique": list,
    "prompt_pool": lambda: [gv.PromptPool(pool=3, length=1, top_n=1)],
    "lora": lambda: [gv.Lora(rank=2)],
    "linear_probe": lambda: [gv.LinearProbe()],
    "bitfit": lambda: [gv.Bitfit()],
    "norm_tune": lambda: [gv.NormTune()],
    "partial": lambda: [gv.Partial()],
    "adapter": lambda: [gv.Adapter(width=4)],
    "prompt": lambda: [gv.Prompt(tokens=2)],
    "side": lambda: [gv.Side()],
    "replay": lambda: [gv.Replay(size=8)],
    "lora + replay": lambda: [gv.Lora(rank=2), gv.Replay(size=8)],
    "token_merge": lambda: [gv.TokenMerge(r=2)],
    "lora + token_merge": lambda: [gv.Lora(rank=2), gv.TokenMerge(r=2)],
}
REFUSE: dict[str, Callable[[], list[gv.Technique]]] = {
    "lora, head frozen": lambda: [gv.Lora(rank=2, head="freeze")],
    "adapter, head frozen": lambda: [gv.Adapter(width=4, head="freeze")],
    "regularize": lambda: [gv.Regularize(weight=1.0)],
    "lora + regularize": lambda: [gv.Lora(rank=2), gv.Regularize(weight=1.0)],
    "derpp": lambda: [gv.Replay(size=8, method="derpp")],
    "lwf": lambda: [gv.Lwf()],
    "packnet": lambda: [gv.PackNet()],
    "hat": lambda: [gv.Hat()],
    "lora_stream": lambda: [gv.LoraStream()],
    "ncm": lambda: [gv.Ncm()],
    "early_exit": lambda: [gv.EarlyExit(at=(1,))],
}


def first_task(techniques: list[gv.Technique]) -> Any:
    live = gv.wrap(vit(), techniques)
    live.begin_experience(Experience(0, (0, 1), (0, 1), 2))
    y = torch.tensor([0, 1, 0, 1])
    step(live, y)
    live.end_experience([(torch.rand(4, 3, 16, 16), y)])
    return live


@pytest.mark.one_in(4)
@pytest.mark.parametrize("change", [grow, other_head, other_weight], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", TAKE)
def test_a_new_classifier_is_trained_saved_and_merged(
    name: str, change: Callable[[Any], None], tmp_path: Any
) -> None:
    live = first_task(TAKE[name]())
    model = live.model
    change(model)
    live.begin_experience(Experience(1, (2, 3), (0, 1, 2, 3), 2))
    before = {n: p.detach().clone() for n, p in model.head.named_parameters()}
    step(live, torch.tensor([2, 3, 2, 3]))
    assert not [n for n, p in model.head.named_parameters() if torch.equal(before[n], p)]
    assert {f"model.head.{n}" for n in before} <= set(live.state_dict())
    live.save(tmp_path)
    again = gv.wrap(vit(), TAKE[name]())
    change(again.model)
    again.load(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    answers = model.eval()(x)
    torch.testing.assert_close(again.model.eval()(x), answers)
    if not any(i.unmergeable for i in live.installed):
        merged = live.merge()
        torch.testing.assert_close(merged(x), answers, rtol=1e-4, atol=1e-5)
        assert merged.num_classes == 4
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    assert live.undo().head.weight.shape == (2, 32)
    assert torch.equal(live.model.eval()(x), vit().eval()(x))


@pytest.mark.parametrize("name", REFUSE)
def test_a_new_classifier_is_refused_where_something_hangs_on_the_old(name: str) -> None:
    live = first_task(REFUSE[name]())
    live.model.reset_classifier(4)
    with pytest.raises(gv.GreenvisError, match="replaced after wrap"):
        live.begin_experience(Experience(1, (2, 3), (0, 1, 2, 3), 2))
    for seam in (
        lambda: live.batch(None, None),
        lambda: live.loss(None, None, None),
        lambda: live.param_groups(0.1),
    ):
        with pytest.raises(gv.GreenvisError, match="before wrap"):
            seam()


def test_a_part_that_is_frozen_or_adapted_is_refused() -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    live.model.blocks[0].mlp.fc1 = nn.Linear(32, 128)
    with pytest.raises(gv.BadInput, match=r"'blocks.0.mlp.fc1'.*trains nothing there"):
        live.param_groups(0.1)
    live.undo()
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    live.model.blocks[0].attn = nn.Identity()
    with pytest.raises(gv.BadInput, match=r"'blocks.0.attn'.*trains a part of it"):
        live.loss(None, None, None)
    live = gv.wrap(vit(), [gv.Prompt(tokens=2)])
    live.model.blocks[0] = copy.deepcopy(vit().blocks[0])
    with pytest.raises(gv.BadInput, match=r"trains a part of it|forward of its own"):
        live.param_groups(0.1)


def test_what_is_replaced_for_good_goes_unnoticed_while_nobody_trains() -> None:
    live = gv.wrap(vit(), [gv.LinearProbe()])
    live.model.head = nn.Identity()
    assert live.model.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 32)
    live.model.train()
    with pytest.raises(gv.BadInput, match="has nothing to train"):
        live.model(torch.rand(1, 3, 16, 16))


def test_a_parametrized_module_is_refused() -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    torch.nn.utils.parametrizations.weight_norm(live.model.head)
    with pytest.raises(gv.BadInput, match=r"'head' became a ParametrizedLinear"):
        live.merge()


def test_a_frozen_weight_that_was_replaced_is_refused() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    live = gv.wrap(model, [gv.LinearProbe(input_shape=(3, 32, 32))])
    model.conv1.weight = nn.Parameter(torch.zeros_like(model.conv1.weight))
    with pytest.raises(gv.BadInput, match=r"'conv1.weight'.*replaced after wrap"):
        live.param_groups(0.1)


@pytest.mark.parametrize("technique", [gv.Lora(rank=2), gv.LinearProbe()], ids=lambda t: t.name)
def test_what_is_quantised_after_wrap(technique: gv.Technique) -> None:
    live = gv.wrap(vit(), [technique])
    x = torch.rand(2, 3, 16, 16)
    plain = live.model.eval()(x)
    for block in live.model.blocks:
        part = block.attn.qkv if technique.name == "lora" else block.attn
        name = "base_layer" if technique.name == "lora" else "qkv"
        setattr(
            part,
            name,
            torch.ao.nn.quantized.dynamic.Linear.from_float(_with_qconfig(getattr(part, name))),
        )
    if technique.name == "lora":
        with pytest.raises(gv.GreenvisError, match="merge first, then convert"):
            live.merge()
    else:
        merged = live.merge()
        torch.testing.assert_close(merged(x), plain, rtol=0.2, atol=0.05)
        assert not isinstance(merged.blocks[0].attn.qkv, nn.Linear)
    assert torch.equal(live.undo().eval()(x), vit().eval()(x))


def _with_qconfig(linear: Any) -> Any:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


# -- converted ------------------------------------------------------------------------------------


def _timm_bn(model: nn.Module) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def _torch_bn(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("convert", [_timm_bn, _torch_bn], ids=["timm", "torch"])
@pytest.mark.parametrize(
    "technique",
    [
        gv.LinearProbe(),
        gv.Lora(rank=2, targets="conv"),
        gv.Bitfit(),
        gv.NormTune(statistics="hold"),
        gv.Partial(blocks=1),
    ],
    ids=lambda t: t.name,
)
def test_statistics_of_held_norms_stay_after_a_conversion(
    convert: Any, technique: gv.Technique
) -> None:
    torch.manual_seed(0)
    live = gv.wrap(torchvision.models.resnet18(num_classes=3), [technique])
    held = [n for n, m in live.model.named_modules() if "_greenvis_held_in_eval" in vars(m)]
    model = convert(live.model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert held
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
    for _ in range(2):
        model.train()
        output = model(x)
        (F.cross_entropy(output, y) + live.loss(x, y, output)).backward()
        optimizer.step()
    still = {n.rpartition(".")[0] for n, b in model.named_buffers() if torch.equal(b, before[n])}
    assert set(held) <= still
    answers = model.eval()(x)
    if not live.installed[0].unmergeable:
        merged = live.merge()
        torch.testing.assert_close(merged(x), answers, rtol=1e-3, atol=1e-4)
        assert any(isinstance(m, nn.SyncBatchNorm) for m in merged.modules())
        assert not any(m._forward_pre_hooks for m in merged.modules())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in live.undo().modules())


# -- compiled -------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.Sequential(torch.compile(model, backend="eager"), nn.Identity()),
        lambda model: torch.jit.trace(model.eval(), torch.rand(1, 3, 16, 16)),
    ],
    ids=["compiled", "a part", "script"],
)
def test_a_compiled_model_is_refused(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(
        gv.BadInput, match=r"wrap before you compile|wrap the model it was made from"
    ):
        gv.wrap(make(vit()), [gv.Bitfit()])


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "technique",
    [
        gv.TokenMerge(r=4),
        gv.EarlyExit(at=(1,), threshold=0.0),
        gv.Prompt(tokens=3),
        gv.Lora(rank=2),
    ],
    ids=lambda t: t.name,
)
def test_what_was_compiled_and_run_before_wrap_is_compiled_anew(technique: gv.Technique) -> None:
    model, x = vit().eval(), torch.rand(2, 3, 16, 16)
    old: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = old(x)
        live = gv.wrap(model, [technique])
        for name, parameter in live.declared.items():
            if "head" not in name:
                parameter.add_(0.3)
        want = model(x)
        assert not torch.allclose(want, plain)
        torch.testing.assert_close(old(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.compile(model, backend="eager")(x), want, rtol=1e-4, atol=1e-5
        )
        live.undo()
        torch.testing.assert_close(old(x), plain)


# -- optimizers -----------------------------------------------------------------------------------


def _train(live: Any, *optimizers: torch.optim.Optimizer) -> None:
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    live.model.train()
    x, y = live.batch(x, y)
    output = live.model(x)
    (F.cross_entropy(output, y) + live.loss(x, y, output)).backward()
    for optimizer in optimizers:
        optimizer.step()
    live.step_end()


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "technique",
    [
        gv.Lora(rank=2),
        gv.Lora(rank=2, head="freeze"),
        gv.Adapter(width=4),
        gv.Prompt(tokens=2),
        gv.Side(),
        gv.EarlyExit(at=(1,)),
    ],
    ids=lambda t: t.name,
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda k: k.__name__)
def test_an_optimizer_built_before_wrap_is_refused_at_its_first_step(
    technique: gv.Technique, kind: Any
) -> None:
    model = vit()
    optimizer = kind(model.parameters(), lr=0.1)
    live = gv.wrap(model, [technique])
    with pytest.raises(
        gv.GreenvisError, match=f"'{technique.name}' would train: build the optimizer after wrap"
    ):
        _train(live, optimizer)
    live.undo()
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    optimizer.step()  # of a plain model again


def test_an_optimizer_of_before_a_new_classifier_is_refused() -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
    _train(live, optimizer)
    live.model.reset_classifier(2)
    with pytest.raises(gv.GreenvisError, match=r"no optimizer holds 'head.weight'"):
        _train(live, optimizer)


def test_several_optimizers_may_share_what_trains() -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    head = [p for n, p in live.trainable.items() if "head" in n]
    rest = [p for n, p in live.trainable.items() if "head" not in n]
    one, other = torch.optim.SGD(head, lr=0.1), torch.optim.AdamW(rest, lr=0.1)
    _train(live, one, other)
    _train(live, other, one)
    assert live.unmoved() == []


def test_what_is_not_to_learn_may_be_left_out_and_other_models_are_let_be() -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    live.model.head.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in live.trainable.items()}
    _train(live, torch.optim.SGD([p for n, p in live.trainable.items() if "head" not in n], lr=0.1))
    moved = {n for n, p in live.trainable.items() if not torch.equal(p, before[n])}
    assert moved
    assert not any("head" in name for name in moved)
    stranger = nn.Linear(2, 2)
    bias = stranger.bias.detach().clone()
    stranger(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(stranger.parameters(), lr=0.1).step()
    assert torch.equal(stranger.bias, bias - 0.1)


def test_track_says_what_has_not_moved(tmp_path: Any) -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    with gv.track("still", live, dir=tmp_path) as run:
        _train(live, torch.optim.SGD(live.param_groups(0.0), lr=0.0))
    assert "lora: none of the parameters it trains has moved" in run.path.read_text()
    with gv.track("moving", live, dir=tmp_path) as run:
        _train(live, torch.optim.SGD(live.param_groups(0.1), lr=0.1))
    assert "has moved" not in run.path.read_text()


# -- copies ---------------------------------------------------------------------------------------

EXAMPLES = [  # slow: those behind a technique's first
    pytest.param(host, kind, i, id=f"{host}-{name}-{i}", marks=[pytest.mark.slow] if i else [])
    for host in ("vit", "resnet")
    for name, kind in ((n, registry.find(n)) for n in registry.names())
    for i in range(len(kind.examples))
]


def _live(host: str, kind: Any, example: int) -> Any:
    model = {h.name: h for h in default_hosts()}[host].build()
    arguments = {
        k: v(model) if callable(v) and not isinstance(v, nn.Module) else v
        for k, v in kind.examples[example].items()
    }
    torch.manual_seed(0)
    try:
        return gv.wrap(model, [kind(**arguments)])
    except gv.BadInput as error:
        pytest.skip(str(error))


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("host", "kind", "example"), EXAMPLES)
def test_a_copy_and_a_pickle_answer_alike_and_share_nothing(
    host: str, kind: Any, example: int
) -> None:
    live = _live(host, kind, example)
    model = live.model
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        for parameter in live.trainable.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    optimizer = torch.optim.SGD(live.param_groups(0.01), lr=0.01)

    def loss(between: Callable[[], Any] = lambda: None) -> Tensor:
        torch.manual_seed(3)
        model.train()
        fed(live, x, y)
        xx, yy = live.batch(x, y)
        output = None if live.pretext else model(xx)
        between()
        extra = live.loss(xx, yy, output)
        return extra if live.pretext else live.criterion(F.cross_entropy)(output, yy) + extra

    visits = live.visit(0, Labelled(y))
    if visits is not None:
        x, y = x[visits], y[visits]
    loss().backward()
    live.again(lambda: loss().backward())
    optimizer.step()
    live.step_end()
    ema = ModelEmaV3(model, decay=0.5)
    others = [ema.module]
    file = io.BytesIO()
    try:
        torch.save(model, file)
        file.seek(0)
        others.append(torch.load(file, weights_only=False))
    except RuntimeError as error:
        assert "parametrized modules" in str(error), "torch itself refuses those, with the way out"  # noqa: PT017
    with torch.no_grad():
        answers = model.eval()(x)
        for other in others:
            torch.testing.assert_close(other.eval()(x), answers)
            for tensor in (*other.parameters(), *other.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.5)
            assert not torch.allclose(other(x), answers)
            assert torch.equal(model(x), answers)
    if type(live.installed[0]).batch is not Installed.batch:
        return  # each step draws from a buffer
    if live.installed[0].by_domain:
        return  # a copy in training must be told domains of its own
    copied = ModelEmaV3(model, decay=0.5).module.train()
    state = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    alone = float(loss().detach())
    live.load_state_dict(state)  # a loss may move a queue on
    assert float(loss(lambda: copied(x * 2)).detach()) == pytest.approx(alone, abs=1e-5)


def test_a_copy_is_not_wrapped_once_more() -> None:
    live = gv.wrap(vit(), [gv.Lora(rank=2)])
    with pytest.raises(gv.BadInput, match="a copy of a wrapped one"):
        gv.wrap(copy.deepcopy(live.model), [gv.Lora(rank=2)])


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "technique",
    [gv.LinearProbe(), gv.NormTune(statistics="hold"), gv.Bitfit()],
    ids=lambda t: t.name,
)
def test_a_copy_holds_its_norms_after_a_conversion_too(technique: gv.Technique) -> None:
    copied = copy.deepcopy(gv.wrap(torchvision.models.resnet18(num_classes=3), [technique]).model)
    copied = nn.SyncBatchNorm.convert_sync_batchnorm(copied).train()
    before = copied.bn1.running_mean.clone()
    copied(torch.rand(2, 3, 32, 32))
    assert torch.equal(copied.bn1.running_mean, before)
