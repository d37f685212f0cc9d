#!/usr/bin/env bash
# The runs behind docs/dac.md. Parts by name: benchmark/dac.sh quick bandit point ant grid short cpu norm invariants paper published
# The datasets are those of benchmark/wurl_sac.sh (ant, point), through udg_select.py, for the ant with and without --size 50000:
# python udg_select.py --buffers runs/wurl_sac/ant/seed0/buffers --task ant-angle-60 --top 1 2 all --size 50000
# python udg_select.py --buffers runs/wurl_sac/point/seed0/buffers --task point-angle-60 --top 1 all
set -euo pipefail
cd "$(dirname "$0")/.."
ant=runs/udg_select/ant-angle-60
before="--eta 0.2 --q-norm size --rho 1" # of --preset cpu, until --q-norm

quick() { # under 2 minutes on 2 cores
    python dac.py --quick
}

bandit() { # the paper's figure, ours in minutes, and with the code's values: half an hour, most of it denoised
    python benchmark/dac_bandit.py
    python benchmark/dac_bandit.py --preset bandit-code --out runs/dac/bandit/code
    mkdir -p results/dac/bandit
    for name in seed0 code; do cp runs/dac/bandit/$name/bandit.png results/dac/bandit/$name-bandit.png; done
}

point() { # 3 seeds on the selections of udg_select.py, and cloning beside it
    for name in top1 all; do
        data=runs/udg_select/point-angle-60/$name.npz
        python dac.py --dataset $data --preset cpu --num-seeds 3 --out runs/dac/point-angle-60/$name
        python dac.py --dataset $data --preset cpu --num-seeds 3 --guidance none --out runs/dac/point-angle-60/$name-bc
    done
}

ant() { # CPU budget as it was when these were run, 1 seed; as it is now: cpu
    old="$before --tau 0.01 --ema-start 1000 --num-updates 20000 --eval-every 2000"
    for name in top1 all; do
        data=$ant/$name-size50000.npz
        python dac.py --dataset $data --preset cpu $old --out runs/dac/ant-angle-60/$name-cpu
        python dac.py --dataset $data --preset cpu $old --guidance none --out runs/dac/ant-angle-60/$name-cpu-bc
    done
}

grid() { # settings of the short budget on the hopper's replay and the ant: results/dac/grid
    python benchmark/grid.py benchmark/dac_grid.json --jobs 2
    python benchmark/grid_figures.py results/dac/grid --runs runs/dac_grid --last 3
}

short() { # b below 1 and N above 1 beside today's --preset cpu: results/dac/short-grid
    python benchmark/grid.py benchmark/dac_short_grid.json --jobs 2
    python benchmark/grid_figures.py results/dac/short-grid --runs runs/dac_short_grid
}

cpu() { # the short budget before --q-norm, 3 seeds, and with other numbers of samples to choose from
    for name in hopper-medium-replay ant-angle-60; do
        data=data/$name.npz
        [ $name = ant-angle-60 ] && data=$ant/top1-size50000.npz
        for seed in 0 1 2; do
            python dac.py --dataset $data --preset cpu $before --seed $seed --out runs/dac_cpu/$name/cpu/seed$seed
        done
    done
    python benchmark/grid_figures.py results/dac/grid --runs runs/dac_cpu
    python benchmark/dac_choice.py runs/dac_cpu/*/cpu/seed*
}

norm() { # how strong, and how pessimistic? 3 minutes a run; the three seeds of the default: benchmark/cpu_grid.json
    cell() { # name of a set, its file, flags
        local name=${3//--/}
        python dac.py --dataset "$2" --preset cpu --angles none $3 --out "runs/dac_norm/$1/${name// /-}"
    }
    for set in ant-angle-60 cheetah-jump hopper-medium-replay; do
        data=runs/udg_select/$set/top1-size50000.npz
        [ $set = hopper-medium-replay ] && data=data/$set.npz
        for eta in 0.2 0.5; do for rho in 0 1; do
            cell $set $data "--q-norm spread --eta $eta --rho $rho"
        done; done
    done
    for rho in 0.3 0; do cell cheetah-jump runs/udg_select/cheetah-jump/top1-size50000.npz "--q-norm size --eta 0.2 --rho $rho"; done
}

invariants() { # published b = 1: eta under 0.02 by 5k updates, regression around b
    python dac.py --dataset $ant/top1-size50000.npz --preset cpu $before --eta 1 --eta-lr 1e-3 --bc-threshold 1 --tau 0.01 --ema-start 1000 \
        --num-updates 6000 --no-lr-cosine --out runs/dac/ant-angle-60/top1-b1
}

paper() { # 2M updates, 8 seeds, N = 10: for a GPU
    for name in top1 top2 all; do
        python dac.py --dataset $ant/$name.npz --num-seeds 8 --chunk 1000 --out runs/dac/ant-angle-60/paper-$name
    done
}

published() { # D4RL files converted by python -m envs.buffers from-d4rl; presets by the file's name
    for data in data/*-v[02].npz; do python dac.py --dataset "$data" --num-seeds 8 --chunk 1000; done
}

for part in "${@:-quick}"; do $part; done
python benchmark/collect.py runs/dac/*/*
