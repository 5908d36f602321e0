"""Solvers of a finished diffusion model: diffusers' own pipelines, calls counted, settings undone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from techniques.drawings import batch, diffusion, noise

from greenvis import models
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.models.diffusion import Diffusion
from greenvis.models.drawing import CLASSES, Setting, counting
from greenvis.models.pipeline import Pipeline
from greenvis.tasks.generation import Generation
from greenvis.techniques.inference.sampling.sampler import Sampler
from greenvis.testing import default_hosts
from greenvis.testing.task_matrix import TaskHost, check_tasks


@pytest.mark.parametrize(
    ("solver", "steps", "spacing"),
    [
        ("ddpm", 7, "as trained"), ("ddim", 4, "trailing"), ("dpm++", 5, "linspace"),
        ("euler-flow", 3, "linspace"), ("lcm", 2, "as trained"),
    ],
)  # fmt: skip
def test_a_solver_draws_what_diffusers_pipeline_draws(
    solver: Any, steps: int, spacing: Any
) -> None:
    import diffusers

    flow = "flow_prediction" if solver == "euler-flow" else "epsilon"
    model = diffusion(num_classes=None, prediction=flow)
    if solver == "lcm":
        model.become("epsilon", True, Setting("lcm", 2))
    model.set(Setting(solver, steps, spacing=spacing))
    drawn = model.sample(torch.zeros(3), torch.Generator().manual_seed(5))
    more: dict[str, Any] = {} if spacing == "as trained" else {"timestep_spacing": spacing}
    more = {"lcm": {"original_inference_steps": 40}, "euler-flow": {}}.get(solver, more)
    scheduler = getattr(diffusers, CLASSES[solver]).from_config(model.base().config, **more)
    pipe = diffusers.DDPMPipeline(model.network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    own = pipe(
        batch_size=3, num_inference_steps=steps, generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images  # fmt: skip
    assert (drawn - own).abs().max() < 1e-5
    assert own.std() > 0.05
    again = Pipeline(pipe)
    assert again.drawn_by.solver == solver
    again.set(Setting(solver, steps, spacing=spacing))
    assert (again.sample(torch.zeros(3), torch.Generator().manual_seed(5)) - own).abs().max() < 1e-5
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize(("solver", "steps"), [("unipc", 4), ("heun", 3)])
def test_solvers_without_a_generator_follow_their_scheduler(solver: Any, steps: int) -> None:
    import diffusers

    model, labels = diffusion(), torch.tensor([0, 1, 2])
    model.set(Setting(solver, steps))
    with counting(model.network) as rows:
        drawn = model.solve(noise(3), labels)
    scheduler = getattr(diffusers, CLASSES[solver]).from_config(model.base().config)
    scheduler.set_timesteps(steps)
    x = noise(3) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model.network(scheduler.scale_model_input(x, t), t, labels).sample
            x = scheduler.step(out, t, x).prev_sample
    assert (drawn - x).abs().max() < 1e-5 * x.abs().max()
    assert rows[0] == 3 * (steps if solver == "unipc" else 2 * steps - 1)


def test_guidance_goes_from_no_class_to_the_class_and_calls_twice() -> None:
    model, (x, y) = diffusion(), batch()
    t = torch.full((5,), 7)
    with torch.no_grad(), counting(model.network) as rows:
        guided = model.predict(x, t, y, 2.5)
        own, none = model.network(x, t, y).sample, model.network(x, t, torch.full((5,), 3)).sample
    assert torch.allclose(guided, none + 2.5 * (own - none), atol=1e-5)
    assert rows[0] == 10 + 5 + 5
    unknown = model.predict(x, t, torch.full((5,), -1))
    assert torch.allclose(unknown, none, atol=1e-5)
    live = wrap(model, Sampler(steps=(3,), guidance=2.0), task="generation")
    with live.operating_points()["dpm++ 3, guidance 2"] as facts:
        model.sample(y)
    assert facts == {"network_calls": 6.0}
    with pytest.raises(BadInput, match="set label_dropout"):
        wrap(diffusion(label_dropout=0.0), Sampler(guidance=2.0), task="generation")


def test_the_first_steps_answer_and_the_others_are_compared(tmp_path: Path) -> None:
    model, (_, y) = diffusion(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    request = Sampler(steps=(4, 2), beside={"ddpm": (6,), "unipc": (3,)})
    live = wrap(model, request, task="generation")
    assert [*live.operating_points()] == ["ddpm 6", "unipc 3", "dpm++ 4", "dpm++ 2"]
    calls = []
    for point in live.operating_points().values():
        with point as facts:
            model.sample(y)
        calls.append(facts["network_calls"])
    assert calls == [6, 3, 4, 2]
    assert str(model.drawn_by) == "dpm++ 4"
    live.undo()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    merged = wrap(model, request, task="generation").merge()
    path = tmp_path / "m.safetensors"
    from techniques.drawings import UNET

    options = {**UNET, "head": "images", "times": 40, "schedule": "scaled_linear"}
    models.save(merged, path, ref="diffusers/UNet2DModel", options=options)
    loaded = models.build(f"file:{path}")
    assert isinstance(loaded, Diffusion)
    assert str(loaded.drawn_by) == "dpm++ 4"
    assert torch.equal(loaded.solve(noise(), y), model.solve(noise(), y))
    assert type(request)(**json.loads(json.dumps(request.recipe_form()))) == request


def test_its_own_loss_predicts_what_it_is_to_predict() -> None:
    x, y = batch()
    for prediction in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        model = diffusion(prediction=prediction, label_dropout=0.0).train()
        with torch.no_grad():
            torch.manual_seed(3)
            loss = model(x, y)["loss"]
            torch.manual_seed(3)
            clean = x * 2 - 1
            z = torch.randn_like(x)
            if prediction == "flow_prediction":
                s = torch.rand(5)
                c = s.view(-1, 1, 1, 1)
                out, target = model.network((1 - c) * clean + c * z, s * 40, y).sample, z - clean
            else:
                t = torch.randint(40, (5,))
                base = model.base()
                out = model.network(base.add_noise(clean, z, t), t, y).sample
                v = base.get_velocity(clean, z, t)
                target = {"epsilon": z, "v_prediction": v, "sample": clean}[prediction]
        assert loss == pytest.approx(float((out - target).square().mean()), rel=1e-5)
        assert model.range.tolist() == [0.0, 1.0]  # x lies within


def test_what_a_solver_is_not_for_is_refused_with_the_way_out() -> None:
    flow = diffusion(prediction="flow_prediction")
    for model, request, match in (
        (diffusion(), Sampler(solver="lcm", steps=(2,)), "train one with `consistency_model`"),
        (diffusion(), Sampler(solver="euler-flow"), "train one with `flow`"),
        (flow, Sampler(), "a flow is drawn by 'euler-flow'"),
        (diffusion(), Sampler(solver="ddpm", steps=(41,)), "choose 1 to 40"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(BadInput, match=match):
            wrap(model, request, task="generation")
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(BadInput, match="`head: images`"):
        wrap(default_hosts()[2].build(), Sampler())
    with pytest.raises(BadInput, match=r"unknown prediction 'epsilo'.*did you mean 'epsilon'"):
        diffusion(prediction="epsilo")
    with pytest.raises(BadInput, match="no denoising network of images"):
        models.build("plain/mlp", head="images")
    with pytest.raises(BadInput, match="has no `unet`"):
        Pipeline(SimpleNamespace())


def test_on_tasks_it_works_for_generation_alone() -> None:
    (result,) = check_tasks(
        Sampler, [TaskHost("generation", lambda: diffusion().train(), batch)], [{"steps": (2,)}]
    )
    assert result.outcome == "works", result
    model, (x, y) = diffusion(), batch()
    drawn = Generation().answer(model, x, y)
    assert drawn.images.shape == x.shape


def test_what_an_image_costs_is_counted_on_one_call_of_the_network() -> None:
    from greenvis.experiment.serving import Served
    from greenvis.meters import flops

    model, (x, y) = diffusion(), batch()
    model.set(Setting("heun", 3))
    network, example, calls = Served(model, Generation(), y).repeated(x[:2]) or (None, None, 0)
    assert network is model.network
    assert calls == 5
    assert flops.count(model.network, example).macs > 1e4
    assert Served(default_hosts()[2].build(), Generation(), y).repeated(x[:1]) is None
