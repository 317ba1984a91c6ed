# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe on a TPU v4 slice: 10,000 steps of 1024 pairs, 256 px, from SD 1.5.

python -m data_gen.pack --input clip-filtered-dataset --output data/ip2p
python -m ip2p_jax.train --config configs/tpu_v4.py --workdir gs://BUCKET/ip2p [--distributed]

--distributed where the slice has several hosts. 1024 rows are split over 4 to 256 chips (v4-8 to
v4-512). Each chip takes its rows in four micro-batches, and the EMA decays with each of them, as in
the released code. Networks compute in bfloat16 on a TPU; parameters, EMA and optimizer, 14 GB, are
split over all chips.
"""

from ip2p_jax.config import Config, Data, Mesh, Optim


def get_config() -> Config:
    return Config(
        data=Data(path="data/ip2p", batch_size=1024, resolution=256, workers=8),
        optim=Optim(lr=1e-4, accumulate=4, ema_decay=0.9999),
        mesh=Mesh(data=1, fsdp=-1),
        steps=10_000,
    )
