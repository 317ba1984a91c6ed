# SPDX-License-Identifier: Apache-2.0
"""A minute of training that starts from the embedded text-to-image model, on 2 CPU cores.

python -m ip2p_jax.train --config configs/shapes/short.py --workdir quickstart/run \\
    --config.data.path=quickstart/shards
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim


def get_config() -> Config:
    return Config(
        model=Model(base="shapes-sd", train_text=True),
        data=Data(path="quickstart/shards", batch_size=8, resolution=64, flip=0.0, threads=1),
        optim=Optim(lr=5e-4, warmup=20, accumulate=1, ema_decay=0.99),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=50),
        log=Log(every=10, samples_every=100, samples=4),
        steps=200,
    )
