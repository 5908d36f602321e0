"""Flow and reflow, progressive and consistency distillation: losses against independent formulas,
what they begin and end with, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from techniques.drawings import batch, diffusion
from torch import Tensor

from greenvis.core.technique import Technique
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.diffusion import Diffusion
from greenvis.models.drawing import Setting
from greenvis.tasks.generation import Generation
from greenvis.techniques.inference.sampling._models import image_in
from greenvis.techniques.inference.sampling.consistency_model import ConsistencyModel, boundary
from greenvis.techniques.inference.sampling.flow import Flow
from greenvis.techniques.inference.sampling.progressive import Progressive, target_image
from greenvis.testing.task_matrix import TaskHost, check_tasks


def _moved(model: Diffusion, seed: int = 3) -> Diffusion:
    """Return a copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return other


def _loss(model: Diffusion, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    x, y = batch()
    return model.train()(x, y)["loss"]


def _train(live: Wrapped, steps: int, start: int = 0) -> None:
    optimizer = torch.optim.SGD(live.param_groups(1e-2), lr=1e-2)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model: Any = live.model
        _loss(model, step).backward()
        optimizer.step()
        live.step_end()


def test_reflow_learns_the_straight_line_between_the_teachers_ends() -> None:
    student = diffusion(prediction="flow_prediction", label_dropout=0.0)
    teacher = _moved(student)
    phases: list[str] = []
    live = wrap(
        student, Flow(teacher=teacher, pairs=7, teacher_steps=3, steps=1), task="generation"
    )

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    live.installed[0].phase = phase
    own = _loss(student)
    # by hand: three steps of Euler's, then the loss at the same times
    z = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, x = torch.arange(7) % 3, z.clone()
    with torch.no_grad():
        for s in (1.0, 2 / 3, 1 / 3):
            x = x - teacher.network(x, torch.full((7,), 40 * s), labels).sample / 3
    torch.manual_seed(5)
    rows, share = torch.randint(7, (5,)), torch.rand(5)
    c = share.view(-1, 1, 1, 1)
    out = student.network((1 - c) * x[rows] + c * z[rows], share * 40, labels[rows]).sample
    expected = (out - (z[rows] - x[rows])).square().mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)
    assert phases == ["teacher"]  # drawn once
    assert live.facts() == {"reflow": {"pairs": 7}}
    assert str(student.drawn_by) == "euler-flow 1"


def test_progressive_lands_where_two_steps_of_its_teacher_do() -> None:
    import diffusers

    student = diffusion(prediction="v_prediction", label_dropout=0.0)
    teacher = _moved(student)
    live = wrap(student, Progressive(teacher=teacher, start=4, end=2), task="generation")
    live.plan(10)
    own = _loss(student)
    # by diffusers' DDIM: from time 39 or 19 in two steps of ten
    x, y = batch()
    torch.manual_seed(5)
    t = torch.randint(1, 3, (5,)) * 20 - 1
    z = torch.randn(5, 1, 8, 8)
    ddim = diffusers.DDIMScheduler.from_config(
        student.base().config, clip_sample=False, timestep_spacing="trailing"
    )
    ddim.set_timesteps(4)
    noisy = student.base().add_noise(x * 2 - 1, z, t)
    alphas = torch.cat([student.base().alphas_cumprod, torch.ones(1)])
    losses = []
    for i in range(5):
        earlier, time = noisy[i : i + 1], int(t[i])
        with torch.no_grad():
            for at in (time, time - 10):
                out = teacher.network(earlier, torch.tensor([at]), y[i : i + 1]).sample
                earlier = ddim.step(out, at, earlier).prev_sample
            v = student.network(noisy[i : i + 1], t[i : i + 1], y[i : i + 1]).sample
        now, then = alphas[time], alphas[time - 20]
        image = now.sqrt() * noisy[i] - (1 - now).sqrt() * v[0]
        # the student's own step of DDIM from its target must land there, too
        ratio = ((1 - then) / (1 - now)).sqrt()
        target = (earlier[0] - ratio * noisy[i]) / (then.sqrt() - ratio * now.sqrt())
        losses.append(max(float(now / (1 - now)), 1.0) * (image - target).square().mean())
    assert own.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    one, zero = torch.ones(1), torch.zeros(1)
    assert target_image(noisy, x, (now.sqrt(), (1 - now).sqrt()), (one, zero)).equal(x)


def test_progressive_makes_the_student_the_next_teacher_and_resumes() -> None:
    base = diffusion(prediction="v_prediction")
    request = Progressive(teacher=_moved(base), start=8, end=2)

    def fresh() -> Wrapped:
        own = request.model_copy(update={"teacher": copy.deepcopy(request.teacher)})
        live = wrap(copy.deepcopy(base), own, task="generation")
        live.plan(4)
        return live

    whole = fresh()
    _train(whole, 3)
    assert whole.facts() == {"progressive": {"steps": 2}}
    first = fresh()
    _train(first, 2)
    second = fresh()
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    _train(second, 1, start=2)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    own: Any = whole.model
    assert str(own.drawn_by) == "ddim 2, trailing"
    with pytest.raises(GreenvisError, match=r"live\.plan\(steps\)"):
        wrap(copy.deepcopy(base), request, task="generation").step_end()


def test_consistency_is_that_of_neighbours_on_the_teachers_way() -> None:
    import diffusers

    student = diffusion(label_dropout=0.0)
    teacher = _moved(student)
    live = wrap(student, ConsistencyModel(teacher=teacher, momentum=0.5), task="generation")
    before = {k: v.clone() for k, v in student.network.state_dict().items()}
    _train(live, 1)
    mean = _moved(student)  # half of the weights before and half of those there are now
    with torch.no_grad():
        for k, v in mean.network.state_dict().items():
            v.copy_((before[k] + student.network.state_dict()[k]) / 2)
    own = _loss(student)
    x, y = batch()
    torch.manual_seed(5)
    t = torch.randint(1, 41, (5,)) - 1
    z = torch.randn(5, 1, 8, 8)
    base, lcm = student.base(), diffusers.LCMScheduler.from_config(student.base().config)
    assert (t == 0).any() or (t > 0).all()
    noisy, s = base.add_noise(x * 2 - 1, z, t), (t - 1).clamp(min=0)
    alphas = base.alphas_cumprod.view(-1, 1, 1, 1)
    with torch.no_grad():

        def image(network: Any, at: Tensor, time: Tensor) -> Tensor:
            out = network(at, time, y).sample
            return (at - (1 - alphas[time]).sqrt() * out) / alphas[time].sqrt()

        clean = image(teacher.network, noisy, t)
        eps = (noisy - alphas[t].sqrt() * clean) / (1 - alphas[t]).sqrt()
        earlier = alphas[s].sqrt() * clean + (1 - alphas[s]).sqrt() * eps

        def answer(network: Any, at: Tensor, time: Tensor) -> Tensor:
            stays, comes = zip(
                *[lcm.get_scalings_for_boundary_condition_discrete(i) for i in time], strict=True
            )
            of = lambda c: torch.tensor([*map(float, c)]).view(-1, 1, 1, 1)  # noqa: E731
            return of(stays) * at + of(comes) * image(network, at, time)

        target = answer(mean.network, earlier, s)
        expected = (answer(student.network, noisy, t) - target).square().mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-4)
    stays, comes = boundary(torch.tensor([0]))
    assert (stays.item(), comes.item()) == (1.0, 0.0)
    assert str(student.drawn_by) == "lcm 4"
    drawn = student.eval().sample(y)
    assert drawn.isfinite().all()
    live.undo()
    assert str(student.drawn_by) == "ddim 40"


def test_predictions_name_the_same_image() -> None:
    x, z = torch.randn(2, 4, 1, 8, 8)
    signal, sigma = torch.tensor(0.6), torch.tensor(0.8)
    noisy = signal * x + sigma * z
    for prediction, out in (
        ("epsilon", z), ("v_prediction", signal * z - sigma * x), ("sample", x)
    ):  # fmt: skip
        assert torch.allclose(image_in(prediction, out, noisy, signal, sigma), x, atol=1e-5)


def test_what_teaches_it_must_fit_and_nothing_is_changed() -> None:
    cosine = {"schedule": "squaredcos_cap_v2", "times": 1000}
    flow = diffusion(prediction="flow_prediction")
    requests: list[tuple[Diffusion, Technique, str]] = [
        (flow, Flow(teacher=diffusion()), "must be a flow: train it with `flow`"),
        (diffusion(), ConsistencyModel(teacher=_moved(flow)), "trained on noise, not a flow"),
        (diffusion(), ConsistencyModel(teacher=diffusion(num_classes=4)), "classes 4, and the model 3"),
        (diffusion(**cosine), ConsistencyModel(teacher=diffusion(**cosine)), "v_prediction"),
        (diffusion(), Progressive(teacher=diffusion(), start=6, end=3), "must divide the 40 times"),
        (diffusion(), Progressive(teacher=diffusion(prediction="sample"), start=4, end=2),
         "which predicts sample, and this model epsilon"),
    ]  # fmt: skip
    for model, request, match in requests:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(BadInput, match=match):
            wrap(model, request, task="generation")
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert model.objective is None
    for wrong, match in (
        (lambda: Progressive(teacher="run:a", start=12, end=5), "power of two"),
        (lambda: Flow(pairs=4), "without a teacher"),
    ):
        with pytest.raises(BadInput, match=match):
            wrong()
    model = diffusion()
    model.become("epsilon", True, Setting("lcm", 2))
    with pytest.raises(BadInput, match="learns from its teacher"):
        model(*batch())


def test_on_tasks_they_work_for_generation_alone() -> None:
    for technique, options in (
        (Flow, {}), (Flow, {"prediction": "flow_prediction"}),
        (Progressive, {}), (ConsistencyModel, {}),
    ):  # fmt: skip
        host = TaskHost("generation", lambda o=options: diffusion(**o).train(), batch)
        taught = technique is Flow and not options
        examples = technique.examples[:1] if taught else technique.examples[-1:]
        (result,) = check_tasks(technique, [host], examples)
        if technique is Progressive:
            assert "live.plan(steps)" in result.reason
        else:
            assert result.outcome == "works", result
    x, y = batch()
    live = wrap(diffusion(), Flow(), task="generation")
    model: Any = live.model
    assert Generation().answer(model.train(), x, y)["loss"].requires_grad
