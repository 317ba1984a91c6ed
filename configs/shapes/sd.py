# SPDX-License-Identifier: Apache-2.0
"""Text-to-image from scratch in the shapes world on 2 CPU cores, on the latents of vae.py.

python -m data_gen.tokenizer --data data/shapes --output data/shapes_tokenizer
python -m ip2p_jax.cache_latents --data data/shapes --output data/shapes_latents \\
    --model runs/shapes_vae --resolution 64 --flip 0 --views 1 --rows 64
python -m ip2p_jax.train --config configs/shapes/sd.py \\
    --workdir runs/shapes_sd
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Objective, Optim
from ip2p_jax.models.presets import ModelConfig, TextConfig, UNetConfig


def get_config() -> Config:
    unet = UNetConfig(
        channels=(40, 80, 96),
        attention=(True, True, True),
        heads=(1, 2, 4),  # wide ones: at 16x16, time goes with their number
        layers_per_block=1,
        context_dim=128,
        norm_groups=8,
        sample_size=16,
    )
    text = TextConfig(vocab_size=1024, width=128, layers=3, heads=4, mlp_width=512, positions=56)
    return Config(
        model=Model(
            base="",
            dims=ModelConfig(unet=unet, text=text),
            prediction="v_prediction",
            vae="runs/shapes_vae",
            tokenizer="data/shapes_tokenizer",
            train_text=True,
        ),
        data=Data(path="data/shapes_latents", batch_size=16, resolution=64, flip=0.0, threads=1),
        objective=Objective(kind="generate"),
        optim=Optim(lr=1e-3, warmup=200, cosine_steps=5200, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=5200,
    )
