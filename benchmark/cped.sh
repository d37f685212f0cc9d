#!/usr/bin/env bash
# The runs behind docs/cped.md. Parts by name: cped.sh point adversarial returns density grid ant paper published
# The datasets are those of benchmark/wurl_sac.sh ant, through
# python udg_select.py --buffers runs/wurl_sac/ant/seed0/buffers --task ant-angle-60 --top 1 all --size 50000
set -euo pipefail
cd "$(dirname "$0")/.."
ant=runs/udg_select/ant-angle-60

point() { # 3 seeds in one process, under 2 minutes on 2 cores
    python cped.py --quick --num-seeds 3 --out runs/cped/point-angle-0/quick
    python cped.py --quick --num-seeds 3 --bc-only --out runs/cped/point-angle-0/quick-bc
}

adversarial() { # does the adversarial term's weight change a return? A minute each on a core
    for weight in 0 1 3; do
        out=runs/cped/point-angle-0/adv$weight
        python cped.py --quick --num-seeds 3 --disc-outputs one --adv-weight $weight --out $out
    done
}

returns() { # the same on the ant: 5 minutes a run on a core; its data as docs/data.md says
    python benchmark/grid.py benchmark/cped_returns_grid.json --jobs 2
    python benchmark/grid_figures.py results/cped/returns --runs runs/cped_returns --name returns
}

density() { # the adversarial term's weight and form against the true density, 3 seeds
    python benchmark/cped_density.py --num-seeds 3 --flow-updates 10000 --out runs/cped/density
    python mopo.py --dataset $ant/top1-size50000.npz --preset cpu # a policy that sees what the flow sees
    python benchmark/cped_density.py --num-seeds 3 --flow-updates 10000 --out runs/cped/density-ant \
        --task ant-angle-60 --policy runs/mopo/ant-angle-60/seed0/policy.npz
}

grid() { # settings for short runs on the suite's replays (benchmark/suite.py): a few minutes a cell on one core
    python benchmark/grid.py benchmark/cped_grid.json --jobs 2
    python benchmark/grid_figures.py results/cped/grid --runs runs/cped_grid --last 3
}

ant() { # CPU budget as it was when these were run, 1 seed: 21 and 12 minutes on 2 cores that others shared
    python cped.py --dataset $ant/top1-size50000.npz --preset cpu --tau 0.005 --no-scale-rewards
    python cped.py --dataset $ant/top1-size50000.npz --preset cpu --bc-only --out runs/cped/ant-angle-60/bc-seed0
}

paper() { # 0.5M + 1M iterations, 5 seeds: for a GPU
    for part in top1 all; do
        python cped.py --dataset $ant/$part-size50000.npz --num-seeds 5 --out runs/cped/ant-angle-60/$part-1M
    done
}

published() { # the released code's settings, and ours, on D4RL files converted to our layout: for a GPU
    for data in halfcheetah-medium-v2 hopper-medium-v2 walker2d-medium-v2; do
        python cped.py --dataset data/$data.npz --num-seeds 5 --out runs/cped/$data/published
        python cped.py --dataset data/$data.npz --preset ours --num-seeds 5 --out runs/cped/$data/ours
    done
}

for part in "${@:-point}"; do $part; done
python benchmark/collect.py runs/cped/*/*
