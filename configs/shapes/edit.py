# SPDX-License-Identifier: Apache-2.0
"""InstructPix2Pix in the shapes world on 2 CPU cores, from the text-to-image model of sd.py.

JAX_NUM_CPU_DEVICES=2 python -m ip2p_jax.train --config configs/shapes/edit.py \\
    --workdir runs/shapes_edit
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim


def get_config() -> Config:
    return Config(
        model=Model(base="runs/shapes_sd", train_text=True),
        data=Data(path="data/shapes", batch_size=32, resolution=64, flip=0.0, threads=1),
        optim=Optim(lr=5e-4, warmup=100, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=3500,
    )
