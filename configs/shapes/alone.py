# SPDX-License-Identifier: Apache-2.0
"""Text-to-image of sd.py trained on for scenes of one object, which teach what words for places and
shapes mean. Noisy timesteps are drawn more often: there a picture's layout is decided.

python -m data_gen.shapes --output data/alone_pairs --pairs 8000 --seed 4 --objects 1
python -m data_gen.pack --input data/alone_pairs --output data/alone
python -m ip2p_jax.cache_latents --data data/alone --output data/alone_latents \\
    --model runs/shapes_vae --resolution 64 --flip 0 --views 1 --rows 64
python -m ip2p_jax.train --config configs/shapes/alone.py --workdir runs/shapes_alone
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Objective, Optim


def get_config() -> Config:
    return Config(
        model=Model(base="runs/shapes_sd", train_text=True),
        data=Data(path="data/alone_latents", batch_size=16, resolution=64, flip=0.0, threads=1),
        objective=Objective(kind="generate", timestep_shift=4.0),
        optim=Optim(lr=7e-4, warmup=50, cosine_steps=2600, accumulate=1, ema_decay=0.995),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=2600,
    )
