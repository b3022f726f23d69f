"""The scales: the race itself, and a test of the program with runs of seconds."""

from benchmarks.race.contenders import MAIN, OTHERS
from benchmarks.race.plan import Judging, Model, Scale, Shape

SCALES = {
    "laptop": Scale(
        models={"0.2M": Model(3, 64, 4), "0.6M": Model(4, 96, 6), "2.4M": Model(4, 192, 6)},
        main=Shape(128, 16, "0.2M", 1500, seconds=140),
        transfer=(
            Shape(64, 32, "0.2M", 1500, seconds=140),
            Shape(256, 16, "0.2M", 1500, seconds=330),
        ),
        larger=(
            Shape(1024, 8, "0.2M", 1000, seconds=950),
            Shape(64, 32, "2.4M", 1500, seconds=700),
            Shape(128, 16, "0.2M", 12000, seconds=1000),
        ),
        rates=(1.5e-3, 3e-3, 6e-3),
        extensions=3,
        tune_seed=100,
        confirm_seeds=(1, 2, 3, 4, 5, 6, 7, 8),
        transfer_seeds=(1, 2, 3, 4),
        larger_seeds=(1, 2),
        fractions=(0.35, 0.45, 0.6, 0.8),
        contenders=tuple(MAIN),
        others=tuple(OTHERS),
        held_out=1024,
        judging=Judging(
            Shape(128, 16, "0.6M", 3000, seconds=500),
            lr=3e-3,
            draws=8,
            texts=256,
            calls=64,
            seconds=150,
        ),
        ending_seeds=(1, 2, 3, 4),
        explain=(
            Shape(64, 16, "0.2M", 600, seconds=36),
            Shape(64, 128, "0.2M", 600, seconds=190),
        ),
        explain_seeds=(1, 2, 3, 4),
        local=Shape(64, 16, "0.2M", 900, seconds=54),
        local_seeds=(1, 2, 3, 4),
    ),
    "ci": Scale(
        models={"0.2M": Model(1, 16, 2), "0.6M": Model(1, 16, 2), "2.4M": Model(1, 32, 2)},
        main=Shape(32, 4, "0.2M", 17, seconds=5),
        transfer=(Shape(16, 4, "0.2M", 17, seconds=5),),
        larger=(Shape(64, 2, "2.4M", 11, seconds=5),),
        rates=(6e-3,),
        extensions=0,
        tune_seed=100,
        confirm_seeds=(1, 2),
        transfer_seeds=(1,),
        larger_seeds=(1,),
        fractions=(0.45,),
        contenders=("standard", "uniform", "clipped", "bell", "bell-fade"),
        others=("paper",),
        held_out=16,
        judging=Judging(
            Shape(32, 4, "0.6M", 17, seconds=5), lr=3e-3, draws=2, texts=4, calls=4, seconds=15
        ),
        ending_seeds=(1,),
        explain=(Shape(16, 2, "0.2M", 11, seconds=5), Shape(16, 8, "0.2M", 11, seconds=5)),
        explain_seeds=(1,),
        local=Shape(16, 4, "0.2M", 17, seconds=5),
        local_seeds=(1, 2),
    ),
}
