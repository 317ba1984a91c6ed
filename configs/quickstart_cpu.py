# SPDX-License-Identifier: Apache-2.0
"""A few minutes of training that starts from the embedded model, on 2 CPU cores.

python -m ip2p_jax.train --config configs/quickstart_cpu.py --workdir quickstart/run \\
    --config.data.path=quickstart/photos
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim


def get_config() -> Config:
    return Config(
        model=Model(base="photos", train_text=True),
        data=Data(path="quickstart/photos", batch_size=8, resolution=64, threads=1),
        optim=Optim(lr=1e-4, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=20),
        log=Log(every=5, samples_every=40, samples=4),
        steps=40,
    )
