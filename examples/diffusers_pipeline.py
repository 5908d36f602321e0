"""A pipeline of diffusers as you have it: metered, and with a solver that needs fewer steps."""

from __future__ import annotations

import tempfile

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import greenvis as gv
from greenvis.models.pipeline import Pipeline

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
    layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)  # fmt: skip
pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100))

# for a pipeline that takes a text: Pipeline(pipe, lambda y: {"prompt": [names[i] for i in y]})
model = Pipeline(pipe)
sampler = gv.Sampler(solver="dpm++", steps=(10,), beside={"ddpm": (100,)})
live = gv.wrap(model, sampler, task="generation")
for setting, point in live.operating_points().items():
    with gv.track(setting, dir=tempfile.mkdtemp()) as run, point as facts:
        images = model.sample(torch.zeros(4))
        run.add(samples=len(images))
    joules = (run.energy().value or 0.0) / len(images)
    print(f"{setting}: {facts['network_calls']:.0f} calls, energy {joules:.3f} J per image")
