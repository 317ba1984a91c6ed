# SPDX-License-Identifier: Apache-2.0
"""A small editor from scratch on 2 CPU cores: 64 px, on the latents of configs/vae_cpu.py.

python -m data_gen.tokenizer --output data/tokenizer
JAX_NUM_CPU_DEVICES=2 python -m ip2p_jax.train --config configs/photos_cpu.py --workdir runs/photos
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim
from ip2p_jax.models.presets import ModelConfig, TextConfig, UNetConfig


def get_config() -> Config:
    unet = UNetConfig(
        channels=(32, 64, 96),
        attention=(True, True, False),
        heads=(4, 4, 4),
        layers_per_block=1,
        context_dim=96,
        norm_groups=8,
        sample_size=16,
    )
    text = TextConfig(vocab_size=1024, width=96, layers=2, heads=4, mlp_width=384)
    return Config(
        model=Model(
            base="",
            dims=ModelConfig(unet=unet, text=text),
            prediction="v_prediction",  # at high noise, colours need z0 itself to be right
            vae="runs/vae",
            tokenizer="data/tokenizer",
            train_text=True,
        ),
        data=Data(path="data/photos", batch_size=16, resolution=64, threads=1),
        optim=Optim(lr=8e-4, warmup=200, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=3500,
    )
