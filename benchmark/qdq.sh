#!/usr/bin/env bash
# The runs behind docs/qdq.md. Parts by name: benchmark/qdq.sh probes pull kappa small hopper short_lag point short
# ablations sweep full paper published
# The datasets are those of benchmark/wurl_sac.sh (ant, cheetah), through
# python udg_select.py --buffers runs/wurl_sac/ant/seed0/buffers --task ant-angle-60 --top 1 all [--size 50000]
# python udg_select.py --buffers runs/wurl_sac/cheetah/seed0/buffers --task cheetah-jump --top 1 all
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs/qdq/ant-angle-60
ours="python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu"
was="--gamma-ent 0.2 --q-norm size" # the defaults until the pull of the likelihood was measured (pull)
paper="--uncertainty consistency --penalty product --num-critics 2 --no-layer-norm"
# as --preset cpu was when the ant's runs were made
then="$paper $was --tau 0.005 --no-scale-rewards --holdout 0 --num-updates 20000 --eval-every 2000"
ant="$ours $then"
brief="$ant --teacher-updates 20000 --student-updates 20000"

probes() { # H on and off the data, three seeds of the point robot (docs/qdq.md)
    point="python qdq.py --quick --num-seeds 3 --num-updates 3000 --eval-every 1000 --eval-episodes 5"
    out=runs/qdq/point-angle-0/h
    $point $paper --group-size 8 --out $out-group
    $point $paper --group-size 64 --out $out-layer # one group: LayerNorm
    $point $paper --group-size 0 --out $out-none
    point="$point --uncertainty critics --penalty excess --kappa 1 --num-critics 4"
    $point --no-layer-norm --out $out-critics
    $point --layer-norm --out $out-critics-ln
}

small() { # small networks, one seed: returns and H of docs/qdq.md; python benchmark/suite.py makes the hopper's data
    run="python qdq.py --num-updates 5000 --chunk 500 --eval-every 1000 --eval-episodes 5 --hidden-sizes 128 128"
    run="$run --batch-size 128 --actor-lr 1e-3 --critic-lr 1e-3 --uncertainty critics --penalty excess $was"
    hopper="$run --dataset data/hopper-medium-replay.npz"
    out=runs/qdq/hopper-medium-replay/small
    $hopper --num-critics 2 --kappa 0 --no-layer-norm --out $out-k0
    $hopper --num-critics 2 --kappa 0 --layer-norm --out $out-k0-ln
    for kappa in 1 4; do $hopper --num-critics 4 --kappa $kappa --layer-norm --out $out-k$kappa-ln; done
    $hopper --num-critics 4 --kappa 4 --layer-norm --gamma-ent 0.05 --out $out-k4-ln-g05
    $hopper --num-critics 2 --kappa 0 --layer-norm --gamma-ent 0.05 --out $out-k0-ln-g05
    for kappa in 0 4; do
        $hopper --num-critics 4 --kappa $kappa --layer-norm --gamma-ent 0.005 --out $out-k$kappa-ln-g005
    done
    run="$run --dataset runs/udg_select/ant-angle-60/top1-size50000.npz"
    $run --num-critics 2 --kappa 0 --no-layer-norm --out $runs/small-k0
    $run --num-critics 4 --kappa 4 --layer-norm --out $runs/small-k4-ln
}

short_lag() { # --preset cpu at its own size with faster targets: kappa 4, the default then, and without H
    for data in data/hopper-medium-replay.npz runs/udg_select/ant-angle-60/top1-size50000.npz; do
        set=hopper-medium-replay
        [ $data = data/hopper-medium-replay.npz ] || set=ant-angle-60
        run="python qdq.py --dataset $data --preset cpu $was"
        for seed in 0 1 2; do
            $run --kappa 4 --seed $seed --out runs/qdq/$set/default-tau0.02-seed$seed
            $run --seed $seed --kappa 0 --num-critics 2 --no-layer-norm --out runs/qdq/$set/plain-tau0.02-seed$seed
        done
    done
}

hopper() { # larger networks
    run="python qdq.py --dataset data/hopper-medium-replay.npz --preset cpu --tau 0.005 $was"
    $run --num-critics 2 --kappa 0 --no-layer-norm --out runs/qdq/hopper-medium-replay/k0
    $run --num-critics 4 --kappa 4 --layer-norm --out runs/qdq/hopper-medium-replay/k4-ln
    $run --num-critics 4 --kappa 4 --layer-norm --gamma-ent 0.05 --out runs/qdq/hopper-medium-replay/k4-ln-g05
}

kappa() { # what is H worth at the default's pull? kappa 1, the default: benchmark/cpu_grid.json
    for set in cheetah-jump ant-angle-60 hopper-medium-replay; do
        data=runs/short/$set/top1-size50000.npz
        [ $set = hopper-medium-replay ] && data=data/$set.npz
        for kappa in 0 4; do for seed in 0 1 2; do
            out=runs/qdq_kappa/$set/kappa$kappa/seed$seed
            python qdq.py --dataset $data --preset cpu --kappa $kappa --seed $seed --out $out
        done; done
    done
}

pull() { # how strongly do the data's actions pull? All at kappa 4; Q over its spread is kappa 4 of part kappa
    cell() { # name of a set, its file, flags
        local name=${3//--/}
        python qdq.py --dataset "$2" --preset cpu --kappa 4 $3 --out "runs/qdq_pull/$1/${name// /-}"
    }
    for set in cheetah-jump ant-angle-60 hopper-medium-replay; do
        data=runs/short/$set/top1-size50000.npz
        [ $set = hopper-medium-replay ] && data=data/$set.npz
        cell $set $data "--gamma-ent 0.04 --q-norm size"
    done
    cell cheetah-jump runs/short/cheetah-jump/top1-size50000.npz "$was --q-from 1"
    for seed in 0 1 2; do cell cheetah-jump runs/short/cheetah-jump/top1-size50000.npz "$was --seed $seed"; done
}

point() { # three seeds on the point robot, minutes
    python qdq.py --quick --num-seeds 3 --out runs/qdq/point-angle-0/quick3
}

short() { # one seed, a short first stage: what docs/qdq.md shows
    $brief --out $runs/seed0-short
}

ablations() { # without H, and cloning only, on the student of `short`
    $brief --student $runs/seed0-short/q_model.npz --alpha 1 --out $runs/seed0-alpha1
    $brief --student $runs/seed0-short/q_model.npz --q-from 1 --out $runs/seed0-clone
}

sweep() { # the weight of the likelihood term on one student
    for weight in 0.05 0.2 1.0; do
        $ant --student $runs/seed0-short/q_model.npz --gamma-ent $weight --out $runs/seed0-gamma$weight
    done
}

full() { # CPU budget: the first two phases at a tenth of their published steps
    $ant --out $runs/seed0
    # the one of docs/qdq.md, on the source of the studies (udg_study.py --run learners-ant makes it)
    data=runs/study/cpu/data/ant/ant-angle-60/top1-size50000.npz
    python qdq.py --dataset $data --preset cpu $then --out $runs/source2-tenth
}

paper() { # 800k teacher, 1.6M student, 1M policy updates, five seeds at once: for a GPU
    for task in ant-angle-60 cheetah-jump; do
        for data in top1 all; do
            python qdq.py --dataset runs/udg_select/$task/$data.npz $paper --num-seeds 5 --out runs/qdq/$task/$data
        done
    done
}

published() { # the paper's settings on a D4RL set of the same name, converted to docs/buffer.md
    python qdq.py --dataset data/halfcheetah-medium-v2.npz --num-seeds 5 --spread mc
}

for part in "${@:-point}"; do $part; done
python benchmark/collect.py runs/qdq/*/*
