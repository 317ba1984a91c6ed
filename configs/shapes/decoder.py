# SPDX-License-Identifier: Apache-2.0
"""A sharper decoder for the latents of vae.py, trained on alone on 2 CPU cores: the latents, and
all that was trained on them, stay.

JAX_NUM_CPU_DEVICES=2 python -m ip2p_jax.train --config configs/shapes/decoder.py \\
    --workdir runs/shapes_decoder
python -m ip2p_jax.convert --from runs/shapes_sd --vae runs/shapes_decoder --to shapes_sd \\
    --format diffusers
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Objective, Optim


def get_config() -> Config:
    return Config(
        model=Model(base="", vae="runs/shapes_vae"),
        data=Data(path="data/shapes", batch_size=8, resolution=64, threads=1),
        objective=Objective(kind="vae"),
        optim=Optim(lr=5e-4, warmup=100, cosine_steps=6000, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=6000,
    )
