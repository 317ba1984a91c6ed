# SPDX-License-Identifier: Apache-2.0
"""Claims: the command compiles a training without data or weights and says what it takes, in a
table and the same in a file; what does not fit is told with advice and exit code 1; bad input in
one line and exit code 2."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data_gen import compile as compile_pairs
from data_gen.candidates import Recipe
from ip2p_jax import compile as command
from ip2p_jax.models.presets import CLIPConfig, ModelConfig, TextConfig, UNetConfig, VisionConfig
from ip2p_jax.tpu import command as shared
from ip2p_jax.tpu import programs
from ip2p_jax.tpu.estimate import Report, compile_plan, out_of_memory
from ip2p_jax.tpu.programs import Plan
from tests.training.tiny import VAE_SMALL

TOY = """
from ip2p_jax.config import Config, Data, Mesh, Model, Optim
from tests.tpu.test_compile import DIMS


def get_config():
    return Config(
        model=Model(base="", dims=DIMS, train_text=True),
        data=Data(path="none", batch_size=128, resolution=32),
        optim=Optim(accumulate=2),
        mesh=Mesh(data=1, fsdp=-1),
    )
"""
DIMS = ModelConfig(
    UNetConfig(
        channels=(32,),
        attention=(True,),
        heads=(2,),
        layers_per_block=1,
        context_dim=32,
        norm_groups=8,
    ),
    VAE_SMALL,
    TextConfig(vocab_size=1024, width=32, layers=1, heads=2, mlp_width=64),
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("configs") / "toy.py"
    path.write_text(TOY)
    return str(path)


def product(chip, side: int) -> Plan:
    x = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
    laid = programs.lay((x, x), chip)
    return Plan(f"product of {side}", jax.jit(jnp.dot), laid, jnp.dot, (x, x), 1.0, "product")


def arguments(*more: str):
    return shared.parser("test", None).parse_args(["--topology=v4-8", *more])


def test_table_and_file_say_the_same(v4, chip, tmp_path, capsys):
    file, program = tmp_path / "table.json", tmp_path / "x.program"
    plans = [product(chip, 512), product(chip, 1024)]
    args = arguments(f"--output={file}", f"--executable={program}")
    assert shared.run(args, plans, v4) == 0
    small, large = (Report(**x) for x in json.loads(file.read_text()))
    assert (small.flops, large.flops) == (2 * 512**3, 2 * 1024**3)
    assert small.flops == small.model_flops and small.fits and small.chips == 4
    assert small.argument_bytes == 2 * 2 * 512**2
    assert large.seconds == sum(large.cycles.values()) / 1.05e9
    assert large.utilisation == pytest.approx(large.flops / large.seconds / 275e12)
    printed = capsys.readouterr().out
    assert printed.count("fits       yes: peak 0.0") == 2
    assert f"{large.utilisation:.1%} of peak" in printed and "together" in printed
    assert program.stat().st_size > 1000


def test_what_does_not_fit_is_told_with_advice(v4, chip, capsys):
    assert shared.run(arguments(), [product(chip, 2**17)], v4) == 1
    printed = capsys.readouterr()
    assert "fits       no: " in printed.out and "estimate" not in printed.out
    assert "(30.75G)" in printed.err and "--config.remat=blocks or full" in printed.err
    assert printed.err.count("\n") == 1


def test_only_the_first_sentence_of_the_compiler_is_told():
    told = out_of_memory("RESOURCE_EXHAUSTED: Used 40.1G of 30.75G hbm. Total hbm\n usage: ...")
    assert told.startswith("Used 40.1G of 30.75G hbm: less is needed with")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--topology=v9-8"], "expected v4, v5e, v5p, v6e"),
        (["--topology=v4-8"], "--config FILE is needed"),
        (["--topology=v4-8", "--what=edit", "--resolution=500"], "expected a multiple of 64"),
        (["--topology=v4-8", "--what=layers", "--rows=0"], "expected a whole number above 0"),
        (["--topology=v4-8", "--what=layers", "--pictures"], "--pictures has no effect"),
        (["--topology=v4-8", "--what=edit", "--only=x"], "--only has no effect"),
        (["--topology=v4-8", "--what=edit", "--frob=1"], "--frob=1: no such option"),
        (["--topology=v4-8", "--config=none.py"], "none.py: no such file"),
        (["TOY", "--topology=v4-8", "--lower", "--executable=x"], "has no effect with --lower"),
        (["TOY", "--topology=v4-8", "--rows=8"], "--rows has no effect with --what train"),
        (["TOY", "--topology=v4-8", "--config.data.batch_size=100"], "a multiple of 8"),
        (["TOY", "--topology=v4-8", "--config.mesh.data=3"], "!= 4 devices"),
        (["TOY", "--topology=v4-8", "--config.objective.kind=vae"], "without effect with"),
        (["TOY", "--topology=v4-8", "--config.data.frob=1"], "frob"),
        (["TOY", "--topology=v4-8", "--config.model.base=me/mine"], "nothing is fetched"),
    ],
)
def test_bad_input_is_told_in_one_line(argv, said, toy, capsys):
    argv = [f"--config={toy}" if x == "TOY" else x for x in argv]
    assert command.main(argv) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_training_is_lowered(toy, capsys):
    assert command.main([f"--config={toy}", "--topology=v4-8", "--lower"]) == 0
    assert "lowered in" in capsys.readouterr().out


def test_layers_are_those_of_the_unet(v4):
    """14 residual blocks and 4 transformers of SD 1.5 are unlike; all its layers are among them."""
    plans = list(programs.layers(programs.SD15.widened(), v4, rows=8, resolution=256))
    kinds = [(plan.name.split(" at ")[0].rsplit(" ", 1)[0], plan.runs) for plan in plans]
    assert len(plans) == 18
    assert sum(runs for kind, runs in kinds if kind == "residual block") == 22
    assert sum(runs for kind, runs in kinds if kind == "transformer") == 16


@pytest.mark.slow
def test_a_training_compiles_for_a_slice(toy, tmp_path: Path, v4):
    """On cached latents: gradients of two micro-batches, gathered parameters, FLOPs as modelled."""
    file, program = tmp_path / "table.json", tmp_path / "step.program"
    argv = [f"--config={toy}", "--topology=v4-8", f"--output={file}", f"--executable={program}"]
    assert command.main(argv) == 0
    [report] = [Report(**x) for x in json.loads(file.read_text())]
    assert list(report.loops.values()) == [2]
    assert 0.9 < report.flops / report.model_flops < 1.1
    assert "all-reduce" in report.collectives and report.peak_bytes < report.memory


@pytest.mark.slow
def test_edits_compile_for_a_slice(v4):
    """The sampler's loop is multiplied out."""
    plan = programs.edit(
        DIMS.widened(), v4, rows=2, resolution=16, steps=3, sampler="euler_ancestral"
    )
    report, _ = compile_plan(plan, v4)
    assert report.fits and 3 in report.loops.values()
    assert 0.9 < report.flops / report.model_flops < 1.1


@pytest.mark.slow
def test_a_single_edit_is_shared_by_the_chips(v4):
    """Each of four chips does less than half of what one does for a picture of its own."""
    options = dict(resolution=16, steps=20, sampler="euler_ancestral")
    (alone, _), (shared, _) = (
        compile_plan(programs.edit(DIMS.widened(), v4, rows=rows, **options), v4) for rows in (1, 0)
    )
    assert shared.fits and shared.flops < 0.5 * alone.flops
    assert shared.model_flops == pytest.approx(alone.model_flops / 4, rel=0.01)


@pytest.mark.slow
def test_pairs_compile_for_a_slice(v4):
    vision = VisionConfig(16, 8, 32, 1, 2, 64, 16)
    recipe = Recipe(steps=3, height=16, width=16)
    plan = compile_pairs.pairs(DIMS, CLIPConfig(DIMS.text, vision), v4, recipe, 2)
    report, _ = compile_plan(plan, v4)
    assert report.fits and 3 in report.loops.values()
    assert 0.9 < report.flops / report.model_flops < 1.1
