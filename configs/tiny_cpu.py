# SPDX-License-Identifier: Apache-2.0
"""A toy editor that trains in seconds: for tests and for trying changes to the training code.

python -m ip2p_jax.train --config configs/tiny_cpu.py --workdir runs/tiny
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Model, Optim
from ip2p_jax.models.presets import ModelConfig, TextConfig, UNetConfig


def get_config() -> Config:
    unet = UNetConfig(
        channels=(32,),
        attention=(True,),
        heads=(2,),
        layers_per_block=1,
        context_dim=32,
        norm_groups=8,
        sample_size=8,
    )
    text = TextConfig(vocab_size=1024, width=32, layers=1, heads=2, mlp_width=64)
    return Config(
        model=Model(
            base="",
            dims=ModelConfig(unet=unet, text=text),
            vae="runs/vae",
            tokenizer="data/tokenizer",
            train_text=True,
        ),
        data=Data(path="data/photos", batch_size=8, resolution=16, threads=1),
        optim=Optim(lr=1e-3, accumulate=2, warmup=2, ema_decay=0.999),
        checkpoint=Checkpoint(every=10),
        log=Log(every=1, samples_every=0, samples=2, sample_steps=2),
        steps=20,
    )
