# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of the shapes world on 2 CPU cores: 64 px pictures to 16x16x4 latents.

python -m data_gen.shapes --output data/shapes_pairs --pairs 20000
python -m data_gen.pack --input data/shapes_pairs --output data/shapes
JAX_NUM_CPU_DEVICES=2 python -m ip2p_jax.train --config configs/shapes/vae.py \\
    --workdir runs/shapes_vae
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Objective, Optim
from ip2p_jax.models.presets import ModelConfig, VAEConfig


def get_config() -> Config:
    # 16 channels at full size: with 24, XLA's gradient by a kernel takes nine times as long here
    vae = VAEConfig(channels=(16, 32, 64), layers_per_block=1, norm_groups=8, sample_size=64)
    return Config(
        model=Model(base="", dims=ModelConfig(vae=vae)),
        data=Data(path="data/shapes", batch_size=4, resolution=64, threads=1),
        objective=Objective(kind="vae"),
        optim=Optim(lr=1e-3, warmup=100, cosine_steps=13_500, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=13_500,
    )
